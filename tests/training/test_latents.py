"""Training on latents: the source, what a checkpoint keeps of it, and a trained autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.models import SmallAutoencoder
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import (
    ArraySource,
    CheckpointError,
    DataError,
    Digits,
    LatentSource,
    check_autoencoder,
    load_autoencoder,
    load_denoiser,
    read_info,
    run_training,
    save_autoencoder,
    train_autoencoder,
)


@pytest.fixture(scope="module")
def autoencoder() -> SmallAutoencoder:
    torch.manual_seed(0)
    fresh = SmallAutoencoder(in_channels=1, latent_channels=2, channels=8, halvings=1)
    return train_autoencoder(fresh, Digits("train"), total_images=6400, batch_size=64)


def test_training_makes_a_better_one_of_measured_scale(autoencoder: SmallAutoencoder) -> None:
    x = Digits("test").images
    with torch.no_grad():
        z = autoencoder.encode(x)
        error = float((autoencoder.decode(z) - x).square().mean())
    assert z.shape == (len(x), 2, 4, 4)
    assert error < 0.5 * float(x.var())  # an untrained one gives about the variance, or more
    assert z.mean((0, 2, 3)).abs().max() < 0.1
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert not autoencoder.training


def test_training_an_autoencoder_is_a_function_of_its_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        fresh = SmallAutoencoder(in_channels=1, latent_channels=1, channels=4, halvings=1)
        done = train_autoencoder(fresh, Digits(), total_images=64, batch_size=32, seed=seed)
        return torch.nn.utils.parameters_to_vector(done.parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_source_of_latents(autoencoder: SmallAutoencoder) -> None:
    digits = Digits()
    source = LatentSource(digits, autoencoder)
    assert source.shape == (2, 4, 4)
    assert len(source) == len(digits)
    assert source.class_names == digits.class_names
    indices = torch.tensor([3, 700, 5])
    batch = source.batch(indices)
    with torch.no_grad():
        wanted = autoencoder.encode(digits.images[indices])
    assert torch.equal(batch.images, wanted)
    assert torch.equal(batch.labels, digits.labels[indices])
    assert torch.equal(batch.raws["picture"], digits.images[indices])
    assert abs(source.std - 1) < 0.1
    encoded = source.encoded()
    kept = encoded.batch(indices)
    assert (kept.images - batch.images).abs().max() < 1e-5
    assert torch.equal(kept.labels, batch.labels)
    assert encoded.facts()["autoencoder"] == source.facts()["autoencoder"]


def test_raw_inputs_go_with_the_latents(autoencoder: SmallAutoencoder) -> None:
    images = torch.randn(70, 1, 8, 8).clamp(-1, 1)
    raws = {"text": [f"picture {i}" for i in range(70)], "sound": torch.arange(70.0)[:, None]}
    for source in (
        LatentSource(ArraySource(images, raws=raws), autoencoder),
        LatentSource(ArraySource(images, raws=raws), autoencoder).encoded(),
    ):
        batch = source.batch(torch.tensor([69, 2]))
        assert batch.raws["text"] == ["picture 69", "picture 2"]
        assert batch.raws["sound"].tolist() == [[69], [2]]


def test_augmentation_is_the_images(autoencoder: SmallAutoencoder) -> None:
    images = torch.rand(4, 1, 8, 8)
    source = LatentSource(ArraySource(images, flip=True), autoencoder)
    assert source.augments
    seeds = list(range(4))
    seen = source.batch(torch.arange(4), seeds)
    with torch.no_grad():
        wanted = autoencoder.encode(source.source.batch(torch.arange(4), seeds).images)
    assert torch.equal(seen.images, wanted)
    with pytest.raises(DataError, match="augmented anew each time they are seen"):
        source.encoded()


def test_what_does_not_fit_is_refused(autoencoder: SmallAutoencoder) -> None:
    with pytest.raises(DataError, match=r"does not take these images: x has shape \(1, 3, 8, 8\)"):
        LatentSource(ArraySource(torch.zeros(2, 3, 8, 8)), autoencoder)
    with pytest.raises(DataError, match="the images have 3 channels, but .* in_channels = 1"):
        train_autoencoder(autoencoder, ArraySource(torch.zeros(2, 3, 8, 8)))


def test_saved_and_loaded(autoencoder: SmallAutoencoder, tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "vae.safetensors"
    save_autoencoder(path, autoencoder)
    again = load_autoencoder(path)
    x = Digits("test").images[:9]
    with torch.no_grad():
        z = autoencoder.encode(x)
        assert torch.equal(again.encode(x), z)
        assert torch.equal(again.decode(z), autoencoder.decode(z))
    assert not again.training
    with pytest.raises(CheckpointError, match="does not exist"):
        load_autoencoder(tmp_path / "gone.safetensors")


def test_a_network_trained_and_sampled_in_latents(
    autoencoder: SmallAutoencoder, make_run_config: Any
) -> None:
    config = make_run_config(total_images=64)
    source = LatentSource(Digits(), autoencoder)
    checkpoint = run_training(config, source=source, progress=False).checkpoint
    denoiser, info = load_denoiser(checkpoint)
    assert info.data["shape"] == [2, 4, 4]
    assert info.config["model"]["in_channels"] == 2
    check_autoencoder(info, autoencoder)
    latents = KSampler(denoiser, "karras").sample(unit_noise((2, 4, 4), [0, 1]), 3)
    assert autoencoder.decode(latents).shape == (2, 1, 8, 8)
    torch.manual_seed(1)
    other = SmallAutoencoder(in_channels=1, latent_channels=2, channels=8, halvings=1)
    with pytest.raises(CheckpointError, match="trained on latents of the autoencoder .* but this"):
        check_autoencoder(info, other)
    other.load_state_dict(autoencoder.state_dict())
    check_autoencoder(info, other)
    other.scale.mul_(2)  # another scale is another space
    with pytest.raises(CheckpointError, match="decode with the same weights"):
        check_autoencoder(info, other)


def test_a_network_of_images_is_not_decoded(
    autoencoder: SmallAutoencoder, make_run_config: Any
) -> None:
    checkpoint = run_training(make_run_config(total_images=32), progress=False).checkpoint
    with pytest.raises(CheckpointError, match="was not trained on latents: decode nothing"):
        check_autoencoder(read_info(checkpoint), autoencoder)
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        load_autoencoder(checkpoint)
