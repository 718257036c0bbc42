"""The order of training, the digits, and splitting work over workers and processes."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training import between, dataset
from k_diffusion.training.dataset import ArraySource, Batch, DataError, Digits, Stream, make_source


def numbered(count: int, flip: bool = False) -> ArraySource:
    """Image i holds (i, -i)."""
    values = torch.arange(float(count))
    return ArraySource(torch.stack([values, -values], 1).reshape(count, 1, 1, 2), flip=flip)


def test_each_epoch_is_another_permutation_and_batches_cross_its_border() -> None:
    stream = Stream(numbered(10), 4, seed=0)
    order = torch.cat([stream[step].indices for step in range(10)])
    epochs = order.reshape(4, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).expand(4, 10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert not torch.equal(epochs[0], torch.arange(10))


def test_a_batch_larger_than_the_data() -> None:
    batch = Stream(numbered(3), 8, seed=0)[1]
    assert len(batch.images) == 8
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)


def test_a_step_is_a_function_of_seed_and_step() -> None:
    steps = [9, 0, 3, 9, 2]
    wanted = [Stream(numbered(10, flip=True), 4, seed=5)[step] for step in steps]
    stream = Stream(numbered(10, flip=True), 4, seed=5)
    for step, batch in zip(steps, wanted, strict=True):
        assert torch.equal(stream[step].images, batch.images)
    other = Stream(numbered(10, flip=True), 4, seed=6)
    assert not torch.equal(other[0].images, stream[0].images)


def test_first_steps_are_equally_likely_to_hold_each_image() -> None:
    counts = torch.zeros(5)
    for seed in range(1500):
        counts[Stream(numbered(5), 1, seed=seed)[0].indices] += 1
    assert (counts / 1500 - 0.2).abs().max() < 0.035


def test_an_image_is_mirrored_anew_each_time_it_comes() -> None:
    stream = Stream(numbered(2, flip=True), 2, seed=0)
    mirrored = torch.stack(
        [
            torch.cat([stream[step].images[:, 0, 0, 0][stream[step].indices == 1]])
            for step in range(300)
        ]
    )
    assert abs((mirrored < 0).float().mean() - 0.5) < 3.3 * 0.5 / 300**0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_start_change_nothing(workers: int) -> None:
    stream = Stream(numbered(10, flip=True), 4, seed=1)
    state = torch.get_rng_state()
    got = list(stream.batches(3, 12, workers))
    assert len(got) == 9
    for step, batch in zip(range(3, 12), got, strict=True):
        assert torch.equal(batch.images, stream[step].images)
        assert torch.equal(batch.indices, stream[step].indices)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_share_the_batch_of_one() -> None:
    whole = Stream(numbered(10, flip=True), 6, seed=1)
    parts = [Stream(numbered(10, flip=True), 6, seed=1, rank=r, world=3) for r in range(3)]
    for step in range(5):
        together = torch.cat([part[step].images for part in parts])
        assert torch.equal(together, whole[step].images)
    with pytest.raises(DataError, match="batch_size 6 cannot be shared by 4 processes"):
        Stream(numbered(10), 6, seed=1, world=4)


class Signalled(ArraySource):
    """Its workers get what a terminal sends to all processes on Ctrl-C, and SIGTERM."""

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices, seeds)


def test_workers_leave_signals_to_the_main_process() -> None:
    stream = Stream(Signalled(torch.zeros(4, 1, 1, 1)), 2, seed=0)
    assert len(list(stream.batches(0, 4, workers=2))) == 4


def test_digits_are_the_real_ones() -> None:
    digits = Digits("all")
    assert len(digits) == 1797
    assert digits.shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    image, label = digits[0]
    assert label == 0
    assert image[0, 0].tolist() == [-1, -1, -0.375, 0.625, 0.125, -0.875, -1, -1]
    values = digits.images.double()
    assert abs(digits.mean - values[torch.arange(512) * 1797 // 512].mean()) < 1e-12
    assert abs(digits.std - values.std()) < 0.01


def test_digits_split_is_stratified_disjoint_and_seeded() -> None:
    train, test, whole = Digits("train"), Digits("test"), Digits("all")
    assert len(train) + len(test) == len(whole)

    def keys(source: Digits) -> list[bytes]:
        return [image.numpy().tobytes() for image in source.images]

    assert sorted(keys(train) + keys(test)) == sorted(keys(whole))
    assert len(set(keys(whole))) == 1797  # so the split parts share none
    held_out = torch.bincount(test.labels)
    assert torch.equal(held_out, (0.2 * torch.bincount(whole.labels)).round().long())
    assert keys(Digits("test")) == keys(test)
    assert keys(Digits("test", split_seed=1)) != keys(test)


def test_constant_bytes_have_their_moments() -> None:
    source = ArraySource(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert (source.mean, source.std) == (0, 1)
    assert source.facts() == {
        "shape": [1, 1, 1],
        "num_classes": 0,
        "class_names": [],
        "images": 2,
        "mean": 0.0,
        "std": 1.0,
    }


def test_unusable_arrays_are_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(0, 1, 2, 2\)"):
        ArraySource(torch.zeros(0, 1, 2, 2))
    with pytest.raises(DataError, match="from 0 to 3 do not fit 2 images of 3 named classes"):
        ArraySource(torch.zeros(2, 1, 2, 2), torch.tensor([0, 3]), ["a", "b", "c"])
    with pytest.raises(DataError, match="unknown split 'tests'; did you mean 'test'"):
        Digits("tests")
    with pytest.raises(DataError, match="unknown source 'digit'; did you mean 'digits'"):
        make_source("digit")
    with pytest.raises(IndexError):
        numbered(3)[3]


def test_purposes_keep_their_numbers() -> None:
    """A changed number would change every run of every seed."""
    assert [purpose.value for purpose in dataset.Purpose] == list(range(1, 12))
    names = "INIT ORDER AUGMENT LEVELS NOISE LABELS NETWORK SPLIT CONDITION CONDITIONER CHANGES"
    assert [purpose.name for purpose in dataset.Purpose] == names.split()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 3, 4, 4), (9, 1, 4, 4), (9, 3, 96, 96), (9, 2, 7)])
@pytest.mark.parametrize("last", [False, True])
def test_workers_hand_over_what_they_made(
    dtype: torch.dtype, shape: tuple[int, ...], last: bool
) -> None:
    """Small and large, and with strides by which a network may choose how it computes."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)

    class Strided(ArraySource):
        def batch(self, indices: torch.Tensor, seeds: Any = None) -> Batch:
            found = super().batch(indices, seeds)
            if last and found.images.ndim == 4:
                rearranged = found.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
                found = found._replace(images=rearranged)
            return found

    source = Strided(images, torch.arange(9) % 2, ["a", "b"])
    stream = Stream(source, 8, seed=1)
    for step, batch in enumerate(stream.batches(0, 2, workers=1)):
        expected = stream[step]
        for name in ("images", "labels", "indices"):
            ours, theirs = getattr(batch, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs)
            ours.zero_()  # it may be written to
        assert batch.bad == expected.bad


def test_small_tensors_take_no_shared_memory() -> None:
    stream = Stream(ArraySource(torch.zeros(9, 3, 4, 4)), 8, seed=1)
    there = between.packed(stream[0])
    assert not any(isinstance(t, torch.Tensor) for t in there[:3])
    large = Stream(ArraySource(torch.zeros(9, 3, 96, 96)), 8, seed=1)
    assert isinstance(between.packed(large[0]).images, torch.Tensor)
