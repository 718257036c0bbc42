"""The established module `config`: trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import k_diffusion as K
from k_diffusion.training.checkpoint import save_checkpoint
from tests.established_configs import V1, config

FIXTURES = Path(__file__).parent / "fixtures" / "established"


def inference_file(path: Path, name: str = "image_v1_cross", half: bool = False) -> Path:
    """A file as the established programs write it for inference."""
    source = FIXTURES / f"{name}.safetensors"
    weights = {
        key.removeprefix("weights/"): value.half() if half and value.is_floating_point() else value
        for key, value in load_file(source).items()
        if key.startswith("weights/")
    }
    raw = (K.utils.get_safetensors_metadata(source) or {})["config"]
    save_file(weights, path, {"config": raw})
    return path


def test_a_trained_model_samples(tmp_path: Path) -> None:
    denoiser = K.config.load_model(inference_file(tmp_path / "m.safetensors"))
    assert type(denoiser) is K.layers.Denoiser
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    recorded = load_file(FIXTURES / "image_v1_cross.safetensors")
    sigma = recorded["input/sigma"]
    told = {key: recorded[f"input/{key}"] for key in ("cross_cond", "cross_cond_padding")}
    x = recorded["input/x"] * sigma[:, None, None, None]
    assert (denoiser(x, sigma, **told) - recorded["output/denoised"]).abs().max() <= 1e-5

    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = K.sampling.KSampler(denoiser, "karras", "heun")
    levels = sampler.levels(4)
    assert levels[0].sigma == pytest.approx(80)  # of the model's config
    assert levels[3].sigma == pytest.approx(0.01)
    sigmas = K.sampling.get_sigmas_karras(4, 0.01, 80)
    ours = sampler.sample(noise, 4, condition=told)
    theirs = K.sampling.sample_heun(denoiser, noise * 80, sigmas, extra_args=told, disable=True)
    assert (ours - theirs).abs().max() < 1e-4
    plain = K.sampling.sample_heun(denoiser, noise * 80, sigmas, disable=True)
    assert (plain - theirs).abs().max() > 1e-3


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    denoiser = K.config.load_model(inference_file(tmp_path / "m.safetensors", half=True))
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_a_training_checkpoint(tmp_path: Path) -> None:
    file = inference_file(tmp_path / "m.safetensors", "image_v1_variance_patch2")
    averaged = load_file(file)
    held = {
        "config": K.config.load_config(file),
        "model": {key: torch.zeros_like(value) for key, value in averaged.items()},
        "model_ema": averaged,
        "epoch": 3,
    }
    path = tmp_path / "m.pth"
    torch.save(held, path)
    denoiser = K.config.load_model(path)
    assert type(denoiser) is K.layers.DenoiserWithVariance
    for key, value in denoiser.inner_model.state_dict().items():
        assert torch.equal(value, averaged[key])
    torch.save({"model": averaged}, path)
    with pytest.raises(ValueError, match=r"m.pth is no training checkpoint: it holds no model_ema"):
        K.config.load_model(path)
    torch.save({"model_ema": averaged}, path)
    with pytest.raises(ValueError, match=r"m.pth holds no config: give it"):
        K.config.load_model(path)
    assert K.config.load_model(path, held["config"]).sigma_data == 0.5


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Harmful, "ran", True))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"model_ema": Harmful()}, path)
    with pytest.raises(ValueError, match=r"m.pth holds more than weights .*\.safetensors") as said:
        K.config.load_model(path, config(V1))
    assert not Harmful.ran
    assert "weights_only" not in str(said.value)  # torch advises to load it all the same
    with pytest.raises(FileNotFoundError):
        K.config.load_model(tmp_path / "none.pth")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_part_of_a_file_is_refused(tmp_path: Path, left: int) -> None:
    path = inference_file(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:left])
    for load in (K.config.load_config, K.config.load_model):
        with pytest.raises(ValueError, match=r"m.safetensors is truncated, damaged or no"):
            load(path)


@pytest.mark.parametrize("averaged", [3, {"a": 3}])
def test_averaged_weights_are_a_state_dict(tmp_path: Path, averaged: Any) -> None:
    torch.save({"model_ema": averaged, "config": config(V1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m.pth .*: its model_ema is no state dict"):
        K.config.load_model(tmp_path / "m.pth")


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    file = inference_file(tmp_path / "m.safetensors")
    other = K.config.load_config(file)
    other["model"]["channels"] = [32, 64]
    with pytest.raises(ValueError, match=r"m.safetensors does not fit this config") as error:
        K.config.load_model(file, other)
    text = str(error.value)
    assert "\n" not in text
    assert "model.channels is [32, 32] there, [32, 64] here" in text
    assert "u_net.d_blocks.1.1.main.2.weight has shape (32, 32, 3, 3) there, (64, " in text
    assert "missing u_net.d_blocks.1.1.skip.weight" in text
    other = K.config.load_config(file)
    other["model"]["cross_attn_depths"] = [True, True]
    with pytest.raises(ValueError, match=r"missing u_net.d_blocks.0.2.kv_proj.bias"):
        K.config.load_model(file, other)
    other["model"] |= {"cross_attn_depths": None, "cross_cond_dim": 0}
    with pytest.raises(ValueError, match=r"no place for u_net.d_blocks.1.2.kv_proj.bias"):
        K.config.load_model(file, other)


def test_a_checkpoint_of_ours_is_pointed_to_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    weights = {"a": torch.zeros(1)}
    config = {"model": {"type": "unet"}}
    save_checkpoint(path, {"ema": weights}, config=config, images_seen=1, step=1)
    with pytest.raises(ValueError, match=r"load it with training.load_denoiser"):
        K.config.load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"m.safetensors holds no config: give it"):
        K.config.load_model(path)
