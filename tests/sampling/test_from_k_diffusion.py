"""The examples for those who come from k-diffusion run as they are written.

Those of networks from elsewhere: tests/docs/test_from_diffusers.py.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

import k_diffusion as K

PAGE = Path(__file__).parents[2] / "docs" / "from-k-diffusion.md"


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
SMALL = {
    "type": "image_v1", "input_channels": 3, "mapping_out": 8, "depths": [1], "channels": [8],
    "self_attn_depths": [False], "sigma_sample_density": {"type": "lognormal", "mean": 0, "std": 1},
}  # fmt: skip


def run(block):
    names = {"K": K, "torch": torch}
    exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_example_runs(capsys):
    names = run(BLOCKS[0])
    assert names["samples"].shape == (2, 3, 32, 32)
    assert names["samples"].isfinite().all()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [str(i) for i in range(20)]


def test_the_example_of_configs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = json.dumps({"model": SMALL})
    Path("config.json").write_text(config)
    weights = K.config.make_model({"model": SMALL}).state_dict()
    save_file(weights, "model.safetensors", {"config": config})
    (block,) = [block for block in BLOCKS if "load_config" in block]
    names = run(block)
    assert names["samples"].shape == (4, 3, 32, 32)
    assert names["sample_density"]([5]).shape == (5,)
