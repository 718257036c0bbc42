"""Batches of one size from images of several: which, in which step, and how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.models import SmallAutoencoder
from k_diffusion.training import ConfigError, DataError, LatentSource, Trainer
from k_diffusion.training.dataset import Stream
from k_diffusion.training.folder import Folder
from k_diffusion.training.order import bucket_step
from k_diffusion.training.pictures import nearest_shapes

BUCKETS = [(8, 16), (16, 8)]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """13 wide, 6 high and 9 square pictures; image i is of grey 5 i."""
    sizes = [(40, 20)] * 13 + [(15, 33)] * 6 + [(21, 20)] * 9
    root = tmp_path / "shapes"
    root.mkdir()
    for i, size in enumerate(sizes):
        Image.new("L", size, 5 * i).save(root / f"{i:02}.png")
    return root


def test_nearest_in_the_logarithm() -> None:
    found = nearest_shapes([(10, 10), (10, 20), (20, 10), (10, 14), (10, 15)], [(1, 1), (1, 2)])
    assert found.tolist() == [0, 1, 0, 0, 1]  # the border is at 10 x 14.14


def test_a_batch_is_of_one_bucket_and_of_its_size(shapes: Path) -> None:
    source = Folder(shapes, 8, channels=1, buckets=BUCKETS)
    assert source.shapes == ((1, 8, 8), (1, 8, 16), (1, 16, 8))
    assert source.buckets is not None
    assert source.buckets.tolist() == [1] * 13 + [2] * 6 + [0] * 9
    stream = Stream(source, 4, seed=0)
    for step in range(60):
        batch = stream[step]
        (bucket,) = set(source.buckets[batch.indices].tolist())
        assert batch.images.shape[1:] == source.shapes[bucket]
        assert torch.equal(batch.images[:, 0, 0, 0].long(), 5 * batch.indices)


def test_a_picture_that_is_to_be_turned_is_of_its_upright_shape(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "tif"):
        Image.new("L", (40, 20)).save(tmp_path / f"x.{suffix}", exif=exif)
    source = Folder(tmp_path, 8, channels=1, buckets=BUCKETS)
    assert source.buckets is not None
    assert source.buckets.tolist() == [2, 2, 2]


def test_buckets_are_mixed_apart(tmp_path: Path) -> None:
    for i in range(16):
        Image.new("L", (20, 20) if i < 8 else (40, 20)).save(tmp_path / f"{i:02}.png")
    stream = Stream(Folder(tmp_path, 8, channels=1, buckets=BUCKETS), 8, seed=0)
    square, wide = (stream.indices(0, 40, bucket) for bucket in (0, 1))
    assert set(wide.tolist()) == set(range(8, 16))
    assert not torch.equal(square, wide - 8)


def test_each_bucket_is_an_endless_sequence_without_a_gap(shapes: Path) -> None:
    source = Folder(shapes, 8, channels=1, buckets=BUCKETS)
    stream = Stream(source, 4, seed=3)
    seen: dict[int, list[int]] = {}
    for step in range(400):
        indices = stream[step].indices
        seen.setdefault(int(source.buckets[indices[0]]), []).extend(indices.tolist())  # type: ignore[index]
    for bucket, size in ((0, 9), (1, 13), (2, 6)):
        members = set((source.buckets == bucket).nonzero()[:, 0].tolist())
        epochs = [seen[bucket][i : i + size] for i in range(0, len(seen[bucket]) - size, size)]
        assert len(epochs) > 20
        assert all(set(epoch) == members for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 20
    times = Counter(i for part in seen.values() for i in part)
    assert min(times.values()) / max(times.values()) > 0.93


def test_any_step_alone_with_workers_and_processes(shapes: Path) -> None:
    source = Folder(shapes, 8, channels=1, buckets=BUCKETS, crop="random", flip=True)
    whole = [Stream(source, 4, seed=1)[step] for step in range(250)]
    late = Stream(source, 4, seed=1)
    for step in (249, 17, 200, 3):
        assert torch.equal(late[step].images, whole[step].images)
    for step, batch in enumerate(Stream(source, 4, seed=1).batches(5, 12, workers=2), 5):
        assert torch.equal(batch.images, whole[step].images)
    halves = [Stream(source, 4, seed=1, rank=r, world=2) for r in range(2)]
    for step in range(20):
        joined = torch.cat([half[step].images for half in halves])
        assert torch.equal(joined, whole[step].images)


def test_a_single_size_has_the_order_it_always_had(shapes: Path) -> None:
    plain = Stream(Folder(shapes, 8, channels=1), 5, seed=2)
    twice = Stream(Folder(shapes, 8, channels=1, buckets=[(8, 8)]), 5, seed=2)
    for step in range(9):
        assert torch.equal(plain[step].images, twice[step].images)


def test_shares_of_steps_are_those_of_images() -> None:
    counts = (700, 0, 299, 1)
    steps = Counter(bucket_step(counts, 10, 0, step)[0] for step in range(2560))
    assert steps[1] == 0
    assert steps[3] >= 2560 // 260  # one a cycle: no image is left out
    for bucket in (0, 2):
        assert abs(steps[bucket] / 2560 - counts[bucket] / 1000) < 0.01
    turns = [turn for bucket, turn in (bucket_step(counts, 10, 0, s) for s in range(900))
             if bucket == 0]  # fmt: skip
    assert turns == list(range(len(turns)))
    assert [bucket_step(counts, 10, 0, s) for s in range(90)] != [
        bucket_step(counts, 10, 1, s) for s in range(90)
    ]


def test_a_broken_image_is_replaced_by_one_of_its_shape(shapes: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 20), dtype=np.uint8)
    Image.fromarray(noise).save(shapes / "00a.jpg")
    whole = (shapes / "00a.jpg").read_bytes()
    (shapes / "00a.jpg").write_bytes(whole[: len(whole) // 2])  # 20 x 40: high, among wide ones
    source = Folder(shapes, 8, channels=1, buckets=BUCKETS)
    batch = source.batch(torch.tensor([1]))
    assert [index for index, _ in batch.bad] == [1]
    assert batch.images.shape[1:] == (1, 16, 8)
    assert batch.indices.tolist() == [14]  # the first high one after it


def test_the_network_must_take_every_size(shapes: Path, make_run_config) -> None:
    data = {"source": "folder", "path": str(shapes), "size": 8, "channels": 1}
    model = {"type": "dit", "patch_size": 2, "depth": 1, "width": 64, "prediction": "edm"}
    assert Trainer(make_run_config(model=model, data={**data, "buckets": [[8, 16]]}))
    with pytest.raises(ConfigError, match="model and data do not fit each other"):
        Trainer(make_run_config(model=model, data={**data, "buckets": [[8, 15]]}))


def test_training_resumes_exactly(shapes: Path, tmp_path: Path, make_run_config) -> None:
    data = {
        "source": "folder", "path": str(shapes), "size": 8, "channels": 1,
        "buckets": [list(size) for size in BUCKETS],
    }  # fmt: skip
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    config = make_run_config(model=model, data=data, total_images=64, batch_size=8)
    whole = [state.loss for state in Trainer(config)]
    first, losses = Trainer(config), []
    for state in first:
        losses.append(state.loss)
        if state.step == 3:
            first.save(tmp_path / "x.safetensors")
            break
    again = Trainer(config, resume=tmp_path / "x.safetensors")
    assert losses + [state.loss for state in again] == whole


def test_latents_of_several_sizes(shapes: Path) -> None:
    source = Folder(shapes, 8, channels=1, buckets=BUCKETS)
    latents = LatentSource(source, SmallAutoencoder(in_channels=1, channels=8, halvings=1))
    assert latents.shapes == ((4, 4, 4), (4, 4, 8), (4, 8, 4))
    stream = Stream(latents, 4, seed=0)
    assert {tuple(stream[step].images.shape[1:]) for step in range(20)} == set(latents.shapes)
    with pytest.raises(DataError, match="of several sizes"):
        latents.encoded()
