"""An `AutoencoderKL` of diffusers in the role of an autoencoder, on tiny random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k_diffusion.external import PretrainedAutoencoder
from k_diffusion.models import autoencoder_config, make_autoencoder
from k_diffusion.training import ArraySource, LatentSource

diffusers = pytest.importorskip("diffusers")


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=2,
        **options,
    ).eval()


def test_scale_and_shift_are_its_own() -> None:
    module = make(scaling_factor=0.25, shift_factor=0.5)
    made = PretrainedAutoencoder.from_module(module)
    assert (made.in_channels, made.latent_channels, made.factor) == (3, 3, 2)
    x = torch.randn(2, 3, 8, 12).clamp(-1, 1)
    with torch.no_grad():
        raw = module.encode(x).latent_dist.mode()
        z = made.encode(x)
        assert z.shape == (2, 3, 4, 6)
        assert (z - (raw - 0.5) * 0.25).abs().max() < 1e-6
        assert (made.decode(z) - module.decode(z / 0.25 + 0.5).sample).abs().max() < 1e-5


def test_statistics_of_each_channel() -> None:
    mean, std = [0.1, -0.2, 0.3], [0.5, 2.0, 4.0]
    module = make(scaling_factor=0.25, latents_mean=mean, latents_std=std)
    made = PretrainedAutoencoder.from_module(module)
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        raw = module.encode(x).latent_dist.mode()
        by_hand = (raw - torch.tensor(mean)[:, None, None]) * 0.25
        by_hand = by_hand / torch.tensor(std)[:, None, None]
        assert (made.encode(x) - by_hand).abs().max() < 1e-6


def test_without_a_shift() -> None:
    made = PretrainedAutoencoder.from_module(make(scaling_factor=0.5))
    assert made.shift.tolist() == [0, 0, 0]
    assert made.scale.tolist() == [0.5] * 3


def test_from_a_folder_by_name_frozen(tmp_path: Path) -> None:
    make(scaling_factor=0.5).save_pretrained(tmp_path / "whole" / "vae")
    made = PretrainedAutoencoder.from_pretrained(tmp_path / "whole", subfolder="vae").train()
    assert not made.module.training
    assert not any(p.requires_grad for p in made.parameters())
    plain = json.loads(json.dumps(autoencoder_config(made)))
    assert plain["type"] == "diffusers_kl"
    again = make_autoencoder(plain)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(again.encode(x), made.encode(x))
    source = LatentSource(ArraySource(torch.rand(3, 3, 8, 8)), made)
    assert source.shape == (3, 4, 4)
    assert source.facts()["autoencoder"]["config"] == plain


def test_of_a_module_in_memory_there_is_no_config() -> None:
    made = PretrainedAutoencoder.from_module(make())
    with pytest.raises(ValueError, match="was made of a module in memory"):
        autoencoder_config(made)
    source = LatentSource(ArraySource(torch.rand(3, 3, 8, 8)), made)
    assert source.facts()["autoencoder"]["config"] is None


# diffusers gives huggingface_hub what it no longer takes.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    for path in (tmp_path, tmp_path / "vae", "nobody/nothing"):
        with pytest.raises(ValueError, match="cannot be loaded|does not exist") as caught:
            PretrainedAutoencoder.from_pretrained(path, local=True)
        assert "\n" not in str(caught.value)
        assert "safetensors" in str(caught.value)


def test_its_posterior_goes_to_shards(tmp_path: Path) -> None:
    from k_diffusion.cli.app import main
    from k_diffusion.training import LatentShards

    module = make(scaling_factor=0.25, shift_factor=0.5)
    module.save_pretrained(tmp_path / "whole/vae")
    x = torch.randint(256, (5, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.to(torch.uint8).numpy())
    command = ["encode", str(tmp_path / "x.npy"), "-a", str(tmp_path / "whole")]
    command += ["--subfolder", "vae", "--out", str(tmp_path / "latents"), "--shard-size", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    source = LatentShards(tmp_path / "latents")
    with torch.no_grad():
        known = module.encode(x.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    means = source.batch(torch.arange(5)).images
    assert (means - 0.25 * (known.mean - 0.5)).abs().max() < 1e-6
    seeds = list(range(5))
    noise = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s))
                         for s in seeds])  # fmt: skip
    drawn = source.batch(torch.arange(5), seeds).images
    assert (drawn - 0.25 * (known.mean + known.std * noise - 0.5)).abs().max() < 1e-5
    assert source.facts()["autoencoder"]["config"]["type"] == "diffusers_kl"
