"""A tiny trained run that the command line's tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """
total_images = {total}
batch_size = 8
log_every_images = 8
out = {out!r}

[model]
type = "unet"
channels = 8
channel_mults = [1]
blocks = 1
attention = [false]
head_channels = 8
num_classes = 10
prediction = "edm"
time_convention = "log_sigma"
sigma_data = "auto"

[data]
source = "digits"

[ema]
max_decay = 0.5
"""


def _write_config(folder: Path, total: int = 32) -> Path:
    path = folder / "tiny.toml"
    path.write_text(TINY.format(total=total, out=str(folder / "run")))
    return path


@pytest.fixture(scope="session")
def write_config() -> Callable[..., Path]:
    """Writes a config of seconds into a folder; its run goes to the folder `run` beside it."""
    return _write_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that `k-diffusion train` made."""
    from k_diffusion.cli import main

    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "--config", str(_write_config(folder))]) == 0
    (checkpoint,) = (folder / "run").glob("*.safetensors")
    return checkpoint
