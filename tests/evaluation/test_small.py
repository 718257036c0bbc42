"""The small extractor: what it learns, and that it is the same again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from made_data import bars

from k_diffusion.evaluation import SmallExtractor, train_small
from k_diffusion.evaluation.extractors import weights_sha256
from k_diffusion.evaluation.small import TEMPERATURE, contrast, smaller
from k_diffusion.utils.images import to_float

HASH = "0123456789abcdef"


def told_apart(extractor: SmallExtractor, seed: int = 9) -> float:
    """The share of new bars whose nearest of others by features is of their own class."""
    images, labels = bars(300, seed, noise=0.8)
    features = extractor(to_float(images))
    nearest = torch.cdist(features[:100], features[100:]).argmin(1)
    return float((labels[100:][nearest] == labels[:100]).float().mean())


@pytest.mark.parametrize("told", [True, False])
def test_learns_with_and_without_classes(told: bool) -> None:
    images, labels = bars(200, noise=0.8)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    extractor = train_small(to_float(images), labels if told else None, HASH, images_seen=4000)
    assert torch.equal(torch.get_rng_state(), before)
    assert extractor(to_float(images[:5])).shape == (5, 96)
    assert extractor.trained["learned"] == ("classes" if told else "instances")
    untrained = train_small(to_float(images), None, HASH, images_seen=1)
    assert told_apart(extractor) > told_apart(untrained) + 0.1


def test_the_same_on_any_number_of_threads_and_from_its_file(tmp_path: Path) -> None:
    images, labels = bars(100)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(train_small(to_float(images), labels, HASH, images_seen=500))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    one, other = found
    assert weights_sha256(one) == weights_sha256(other)
    assert weights_sha256(train_small(to_float(images), labels, HASH, images_seen=500, seed=1)) != (
        weights_sha256(one)
    )
    one.save(tmp_path / "small.safetensors")
    again = SmallExtractor.load(tmp_path / "small.safetensors")
    assert again.facts() == one.facts()
    assert again.name == "small-0123456789ab"
    assert again.trained == one.trained
    assert torch.equal(again(to_float(images)), one(to_float(images)))


def test_the_contrast_one_pair_at_a_time() -> None:
    codes = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = codes / codes.norm(dim=1, keepdim=True)
    wanted = 0.0
    for i in range(6):
        like = [math.exp(float(codes[i] @ codes[j]) / TEMPERATURE) for j in range(6)]
        wanted -= math.log(like[(i + 3) % 6] / (sum(like) - like[i])) / 6
    assert abs(float(contrast(codes)) - wanted) < 1e-12


def test_large_images_are_made_smaller_first() -> None:
    assert smaller(torch.zeros(2, 3, 64, 128)).shape == (2, 3, 16, 32)
    same = torch.zeros(2, 3, 32, 9)
    assert smaller(same) is same
    assert smaller(torch.zeros(1, 1, 4, 800)).shape == (1, 1, 1, 32)


def test_what_is_no_extractor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        SmallExtractor.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no small extractor"):
        SmallExtractor.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"shape \(1, 1, 8, 8\)"):
        train_small(torch.zeros(1, 1, 8, 8), None, HASH)
