"""A new run that begins with the weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint, read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.opening import opening_lines
from k_diffusion.training.restore import load_denoiser, save_inference
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def trained(make_run_config: MakeConfig, tmp_path: Path) -> Path:
    config = make_run_config(out=str(tmp_path / "before"), total_images=320)
    return run_training(config, progress=False).checkpoint


@pytest.mark.parametrize("slim", [False, True])
def test_weights_and_average_alone(
    make_run_config: MakeConfig, trained: Path, tmp_path: Path, slim: bool
) -> None:
    """A file for sampling has the average alone, which is both then."""
    parts = read_checkpoint(trained, ["model", "ema"])[1]
    if slim:
        save_inference(trained, tmp_path / "slim.safetensors")
        trained, parts["model"] = tmp_path / "slim.safetensors", parts["ema"]
    ema = {"profiles": [0.1]}
    trainer = Trainer(make_run_config(init_from=str(trained), seed=8, batch_size=16, ema=ema))
    weights, average = trainer.network.state_dict(), trainer.ema.state_dict()
    assert not torch.equal(parts["ema"]["enter.weight"], trainer.network.enter.weight) or slim
    for name in weights:
        assert torch.equal(weights[name], parts["model"][name]), name
        assert torch.equal(average[name], parts["ema"][name]), name
        assert torch.equal(trainer.averages["ema_0.1"].state_dict()[name], weights[name]), name
    assert (trainer.step, trainer.ema.updates, trainer.optimizer.state) == (0, 0, {})
    assert next(iter(trainer)).step == 1


def test_a_resume_has_its_own_weights(make_run_config: MakeConfig, trained: Path) -> None:
    config = make_run_config(init_from=str(trained), checkpoint_every_images=320)
    whole = run_training(config, progress=False)
    half = Path(config.out) / "checkpoint-000000000320.safetensors"
    trained.unlink()  # it is needed no more
    again = run_training(config, resume=half, progress=False)
    assert again.sha256 == whole.sha256
    assert read_info(whole.checkpoint).config["init_from"] == str(trained)


def test_the_ways_out_lead_there(
    make_run_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    way = rf"begin a new run from .* by init_from = '{trained}'"
    with pytest.raises(CheckpointError, match=f"seed = 3, not 4: resume with the same, or {way}"):
        Trainer(make_run_config(seed=4), resume=trained)
    slim = tmp_path / "slim.safetensors"
    save_inference(trained, slim)
    with pytest.raises(CheckpointError, match=f"cannot be resumed; begin a .* = '{slim}'"):
        Trainer(make_run_config(), resume=slim)
    trainer = Trainer(make_run_config(seed=4, init_from=str(slim)))
    (said, *_) = opening_lines(trainer, None, looked=False)
    assert said.endswith(f"from the beginning, 640 images, with the weights of {slim}")


def test_what_does_not_fit_is_refused(make_run_config: MakeConfig, trained: Path) -> None:
    model: dict[str, Any] = {**make_run_config().model, "width": 4}
    with pytest.raises(CheckpointError, match=r"does not fit Tiny: .*shape.* width = 8, not 4"):
        Trainer(make_run_config(init_from=str(trained), model=model))
    with pytest.raises(CheckpointError, match="nowhere.safetensors does not exist"):
        Trainer(make_run_config(init_from=str(trained.parent / "nowhere.safetensors")))


def test_a_frozen_network_is_refused_by_name(make_run_config: MakeConfig, trained: Path) -> None:
    network = load_denoiser(trained)[0].network
    with pytest.raises(ConfigError, match=r"Tiny has no weight that learns: .*init_from to its"):
        Trainer(make_run_config(), network=network)
    network.requires_grad_(True)
    assert next(iter(Trainer(make_run_config(), network=network))).step == 1
