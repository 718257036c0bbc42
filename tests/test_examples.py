"""The examples, each on next to nothing, and the code of docs/extending.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What registers itself when it is imported is there before what a test registers.
import k_diffusion.external.autoencoder
import k_diffusion.external.text  # noqa: F401
from k_diffusion.models import AUTOENCODERS, CONDITIONERS, MODELS, UNetConfig
from k_diffusion.training.extra_losses import LOSSES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
UNET_TAKES = {field.name for field in dataclasses.fields(UNetConfig)}
LONG = ("demo.py", "pipeline.py")
"""They have tests of their own."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tables = (MODELS, CONDITIONERS, AUTOENCODERS, LOSSES)
    before = [dict(table) for table in tables]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def run(name: str, images: int, out: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    module.main(images, str(out))


@pytest.mark.parametrize(
    ("name", "needs", "left"),
    [
        ("own_model", "", "digits.png"),
        ("own_conditioner", "", ""),
        ("super_resolution", "", "pictures.png"),
        ("inpainting", "", "pictures.png"),
        ("text_to_image", "context_dim", "digits.png"),
        ("audio", "dims", ""),
        ("multimodal", "context_dim", "digits.png"),
        ("latent", "", "digits.png"),
        ("interpolate", "", "between.png"),
        ("extra_losses", "", "digits.png"),
    ],
)
def test_example(
    name: str, needs: str, left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if needs and needs not in UNET_TAKES:
        pytest.skip(f"the UNet takes no {needs}")
    if needs == "context_dim":
        pytest.importorskip("transformers")
    run(name, 128, tmp_path)
    assert list(tmp_path.glob("checkpoint-*.safetensors"))
    assert capsys.readouterr().out
    assert not left or (tmp_path / left).stat().st_size > 0


def test_each_is_short_and_run_here() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")} - set(LONG)
    parametrized = test_example.pytestmark[0].args[1]
    assert names == {f"{case[0]}.py" for case in parametrized}
    for name in names:
        assert len((EXAMPLES / name).read_text().splitlines()) <= 80, name


def test_the_code_in_the_docs_runs() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    module = type(sys)("extending")
    sys.modules["extending"] = module
    vars(module)["__name__"] = "extending"
    try:
        exec(compile(code, "docs/extending.md", "exec"), vars(module))
        import torch

        from k_diffusion.models import make_model

        model = make_model({"type": "plain", "num_classes": 2})
        x = torch.randn(2, 3, 8, 8)
        assert model(x, torch.zeros(2), torch.tensor([0, 2])).shape == x.shape
        told, null = vars(module)["told"], vars(module)["null"]
        assert told["class_label"].tolist() == [1, 0]
        assert null["class_label"].tolist() == [2, 2]
        angle = vars(module)["Angle"]()
        assert angle(angle.read("0"))["embedding"].tolist() == [[1, 0]]
    finally:
        del sys.modules["extending"]


def test_every_type_of_conditioner_is_in_the_docs() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    known = {*CONDITIONERS, *CONDITIONERS.homes}
    assert set(listed) == known
