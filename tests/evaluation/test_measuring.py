"""From images to figures: what is kept, what is shared by processes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import Pictures, Project, bars

from k_diffusion.evaluation import (
    Statistics,
    density_coverage,
    features_of,
    figures_of,
    frechet_distance,
    kernel_distance,
    make_reference,
    memorised_share,
    precision_recall,
)
from k_diffusion.evaluation.measuring import class_labels
from k_diffusion.evaluation.statistics import as_seen, data_sha256, spread
from k_diffusion.utils.images import to_float

Launch = Callable[..., list[str]]


def test_all_figures_are_those_of_their_functions() -> None:
    images, labels = bars(150)
    made = bars(90, seed=1)[0]
    extractor = Project(64)
    reference = make_reference(Pictures(images, labels), extractor)
    features = features_of(lambda n: made[n], 90, reference, batch_size=32)
    real, drawn = extractor(to_float(images)), extractor(to_float(made))
    assert (features - drawn).abs().max() < 1e-5
    found = figures_of(features, reference)
    some = real[torch.arange(90) * 150 // 90]
    kid = kernel_distance(some, drawn)
    wanted = {
        "fid": frechet_distance(real, drawn),
        "kid": kid.value,
        "kid_error": kid.error,
        **precision_recall(some, drawn)._asdict(),
        **density_coverage(some, drawn)._asdict(),
        "memorised": memorised_share(drawn, real),
    }
    assert list(found.values) == list(wanted)
    for name, value in wanted.items():
        assert abs(found.values[name] - value) < 1e-4 * max(1, abs(value)), name
    assert found.notes == ()
    assert list(figures_of(features, reference, ["recall", "kid"]).values) == [
        "kid", "kid_error", "recall"
    ]  # fmt: skip
    assert reference.statistics.facts["classes"] == [150 - int(labels.sum()), int(labels.sum())]


def test_what_figures_are_to_be_read_with() -> None:
    reference = make_reference(Pictures(bars(12)[0]), Project(64, size=40))
    features = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    notes = figures_of(features, reference).notes
    assert "30 samples do not fill 40 features" in notes[0]
    assert "30 samples meet only 12 real images" in notes[1]
    for count in (40, 41):
        more = torch.randn(count, 40, generator=torch.Generator().manual_seed(0))
        filled = "do not fill" not in figures_of(more, reference, ["fid"]).notes[0]
        assert filled == (count > 40)  # a covariance of n rows has rank n - 1
    with pytest.raises(ValueError, match="unknown metric 'fidd'"):
        figures_of(features, reference, ["fidd"])
    with pytest.raises(ValueError, match="no metric is named"):
        figures_of(features, reference, [])
    with pytest.raises(ValueError, match="unknown extractor"):
        make_reference(Pictures(bars(12)[0]), "incption")
    with pytest.raises(ValueError, match=r"weights none\.pth is missing"):
        make_reference(Pictures(bars(12)[0]), "inception", weights="none.pth")
    several: Any = Pictures(bars(12)[0])
    several.shapes = [(1, 8, 8), (1, 8, 16)]
    with pytest.raises(ValueError, match="the real images have several sizes"):
        make_reference(several, Project(64))


def test_pictures_are_measured_as_bytes_hold_them() -> None:
    images = bars(5)[0]
    assert torch.equal(as_seen(images), to_float(images))
    assert torch.equal(as_seen(to_float(images) + 0.003), to_float(images))
    sound = torch.full((2, 1, 9), 0.12345)
    assert torch.equal(as_seen(sound), sound)
    with pytest.raises(ValueError, match="not finite"):
        as_seen(torch.full((1, 1, 2, 2), torch.nan))


def test_what_the_data_hash_sees() -> None:
    images, labels = bars(70)
    everything = torch.arange(70)

    def found(i: torch.Tensor, c: torch.Tensor, numbers: torch.Tensor = everything) -> str:
        return data_sha256(Pictures(i, c), numbers)

    first = found(images, labels)
    assert first == found(to_float(images), labels)
    changed = images.clone()
    changed[69, 0, 7, 7] += 1
    others = [
        found(changed, labels),
        found(images, 1 - labels),
        found(images, labels, everything[:-1]),
        found(images.flip(0), labels.flip(0)),
        found(images.view(70, 1, 4, 16), labels),
    ]
    assert len({first, *others}) == 6


def test_statistics_are_kept_by_data_and_extractor(tmp_path: Path) -> None:
    data = Pictures(*bars(100))
    first = make_reference(data, Project(64), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("statistics-project-")
    again = Project(64)
    second = make_reference(data, again, cache=tmp_path)
    assert again.seen == 0
    for name in ("features", "numbers"):
        assert torch.equal(getattr(first.statistics, name), getattr(second.statistics, name))
    assert torch.equal(first.statistics.moments.scatter, second.statistics.moments.scatter)
    assert second.statistics.moments.count == 100
    assert first.statistics.facts == json.loads(json.dumps(second.statistics.facts))
    # Another extractor, other data, or fewer of them: other files.
    make_reference(data, Project(64, seed=1), cache=tmp_path)
    make_reference(Pictures(*bars(100, seed=1)), Project(64), cache=tmp_path)
    make_reference(data, Project(64), cache=tmp_path, most=50)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_or_foreign_file_is_said_and_measured_anew(tmp_path: Path) -> None:
    data, said = Pictures(*bars(40)), list[str]()
    whole = make_reference(data, Project(64), cache=tmp_path).statistics
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    again = make_reference(data, Project(64), cache=tmp_path, say=said.append).statistics
    assert torch.equal(again.features, whole.features)
    assert path.read_bytes() == content
    Statistics(whole.moments, whole.features, whole.numbers, {"layout": 0}).save(path)
    make_reference(data, Project(64), cache=tmp_path, say=said.append)
    assert path.read_bytes() == content
    assert [line.partition(path.name)[2].split("(")[0].strip() for line in said] == [
        "holds no statistics of features", "is of something else: it is measured anew"
    ]  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_small_extractor_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k_diffusion.evaluation.small.IMAGES_SEEN", 300)
    train = "k_diffusion.evaluation.measuring.train_small"
    from k_diffusion.evaluation import train_small

    monkeypatch.setattr(train, lambda *a, **k: train_small(*a, images_seen=300, **k))
    data, said = Pictures(*bars(60)), list[str]()
    first = make_reference(data, cache=tmp_path, say=said.append)
    (line,) = said
    assert line.startswith("training a small extractor on 60 images of the data, which takes")
    sha256 = first.statistics.facts["data sha256"]
    assert first.extractor.name == f"small-{sha256[:12]}"
    assert {p.name.partition("-")[0] for p in tmp_path.iterdir()} == {"small", "statistics"}
    monkeypatch.setattr(train, None)
    second = make_reference(data, cache=tmp_path)
    assert second.extractor.facts() == first.extractor.facts()
    file = tmp_path / f"small-{sha256[:12]}.safetensors"
    third = make_reference(Pictures(*bars(60, seed=1)), "small", weights=file)
    assert third.extractor.facts() == first.extractor.facts()


def test_a_small_extractor_is_trained_on_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def train(images: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> Any:
        asked.append((images, labels))
        raise ValueError("enough")

    monkeypatch.setattr("k_diffusion.evaluation.measuring.train_small", train)
    images, labels = bars(300)
    with pytest.raises(ValueError, match="enough"):
        make_reference(Pictures(images, labels))
    assert torch.equal(asked[0][0], to_float(images))
    assert torch.equal(asked[0][1], labels)


def test_evenly_spread() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 9).tolist() == [0, 1, 2]
    images, labels = bars(100)
    statistics = make_reference(Pictures(images, labels), Project(64), most=10).statistics
    assert statistics.numbers.tolist() == list(range(0, 100, 10))
    assert torch.equal(statistics.features, Project(64)(to_float(images[::10])))


def test_classes_in_the_shares_of_the_data() -> None:
    assert class_labels([1, 1, 2], 4) == [0, 1, 2, 2]
    assert class_labels([1, 1], 1) == [1]
    assert class_labels([3, 0, 1], 8) == [0] * 6 + [2] * 2
    assert np.bincount(class_labels([142, 146, 150], 1000)).tolist() == [324, 334, 342]


# ---------------------------------------------------------------- in two processes


def figures(cache: Path | None) -> dict[str, Any]:
    images, labels = bars(333)
    made = bars(205, seed=1)[0]
    reference = make_reference(Pictures(images, labels), Project(64), cache=cache)
    features = features_of(lambda n: made[n], 205, reference, batch_size=16)
    statistics = reference.statistics
    return {
        "figures": figures_of(features, reference).values,
        "features": features,
        "mean": statistics.moments.mean,
        "covariance": statistics.moments.covariance,
        "kept": statistics.features,
        "facts": statistics.facts,
    }


def few(cache: Path | None) -> int:
    """One batch, which only one of the processes has."""
    data = Pictures(*bars(20))
    reference = make_reference(data, Project(64), cache=cache)
    return len(features_of(lambda n: data.images[n], 20, reference, batch_size=64))


def in_processes(folder: Path) -> None:
    from k_diffusion.evaluation.gathering import on_first, place

    rank, world = place()
    torch.save(figures(folder / "cache"), folder / f"{world}-{rank}.pt")
    assert few(None) == 20
    assert on_first(lambda: rank) == 0
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="only here"):
        on_first(lambda: fail())


def fail() -> None:
    raise ValueError("only here")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_find_the_same_figures(launch: Launch, tmp_path: Path, processes: int) -> None:
    alone = figures(None)
    launch(__file__, "in_processes", processes)
    for rank in range(processes):
        found = torch.load(tmp_path / f"{processes}-{rank}.pt")
        assert torch.equal(found["features"], alone["features"])
        assert torch.equal(found["kept"], alone["kept"])
        assert found["facts"] == alone["facts"]
        assert (found["mean"] - alone["mean"]).abs().max() < 1e-12
        assert (found["covariance"] - alone["covariance"]).abs().max() < 1e-12
        for name, value in alone["figures"].items():
            assert abs(found["figures"][name] - value) < 1e-10, name
    assert len(list((tmp_path / "cache").iterdir())) == 1
