"""What drawn samples are told: by their number alone, of real images, and by every user alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from k_diffusion.evaluation import features_of, figures_of, train_small
from k_diffusion.evaluation.measuring import class_labels
from k_diffusion.models import (
    MODELS,
    ClassConditioner,
    CompositeConditioner,
    KnownPart,
    LowResolution,
)
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import ArraySource, Digits, load_denoiser
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Purpose
from k_diffusion.training.doctor import examine_run
from k_diffusion.training.doctor.measured import open_patient
from k_diffusion.training.evaluating import Evaluation, in_shares, shares_of
from k_diffusion.training.folder import Folder
from k_diffusion.training.previews import Previews
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.told import Shown, Told, evenly, in_turn, make_told, of_one_size
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.images import load_png
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.scheduler import make_scheduler

MakeConfig = Callable[..., TrainConfig]
UNET = {
    "type": "unet", "channels": 8, "channel_mults": [1], "blocks": 1, "attention": [False],
    "head_channels": 8, "prediction": "edm", "sigma_data": 0.5,
}  # fmt: skip
INPAINTING: dict[str, Any] = {
    "model": {**UNET, "image_channels": 2},
    "conditioner": {"type": "known_part", "channels": 1, "mask": "mixed"},
}
EVALUATE = {"every_images": 64, "images": 24, "steps": 2, "seed": 5, "batch_size": 10,
            "metrics": ["fid"]}  # fmt: skip
PREVIEW = {"every_images": 32, "count": 5, "steps": 2}
BUCKETS = [[8, 16], [16, 8]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "k_diffusion.evaluation.measuring.train_small"
    monkeypatch.setattr(name, lambda *a, **k: train_small(*a, images_seen=200, **k))


def run(config: TrainConfig, **options: Any) -> RunResult:
    return run_training(config, **{"progress": False, "say": lambda line: None, **options})


class Watched(ArraySource):
    """Some digits; it counts the images asked for at once."""

    def __init__(self, count: int) -> None:
        digits = Digits()
        super().__init__(digits.images[:count], digits.labels[:count], digits.class_names)
        self.most = 0

    def batch(self, indices: Tensor, seeds: Any = None) -> Any:
        self.most = max(self.most, len(indices))
        return super().batch(indices, seeds)


def told_by(conditioner: Any, source: Any, count: int, seed: int = 3) -> Told:
    return make_told(nn.Identity(), conditioner, source, count, seed=seed, device="cpu")


# ---------------------------------------------------------------- which images


def test_images_are_evenly_spread_and_begin_again() -> None:
    members = torch.tensor([3, 5, 6, 9])
    assert evenly(members, 2).tolist() == [3, 6]
    assert evenly(members, 3).tolist() == [3, 5, 6]
    assert evenly(members, 4).tolist() == [3, 5, 6, 9]
    assert evenly(members, 6).tolist() == [3, 5, 6, 9, 3, 5]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Wide, high and square pictures, of which number i is of grey 8 i."""
    sizes = [(40, 20)] * 9 + [(15, 33)] * 6 + [(21, 20)] * 9
    root = tmp_path / "shapes"
    root.mkdir()
    for i, size in enumerate(sizes):
        Image.new("L", size, 8 * i).save(root / f"{i:02}.png")
    return root


def test_images_of_one_size(shapes: Path) -> None:
    members, shape = of_one_size(Folder(shapes, 8, channels=1, buckets=[(8, 16), (16, 8)]))
    assert (members.tolist(), shape) == (list(range(15, 24)), (1, 8, 8))
    # None is square enough for the source's own size: that of the first is taken.
    source = Folder(shapes, (2, 30), channels=1, buckets=[(16, 8), (8, 12)])
    assert source.buckets is not None
    assert set(source.buckets.tolist()) == {1, 2}
    members, shape = of_one_size(source)
    assert shape == (1, 8, 12)
    assert torch.equal(members, (source.buckets == 2).nonzero()[:, 0])
    assert of_one_size(Digits("test"))[0].tolist() == list(range(359))


# ---------------------------------------------------------------- what is told


def test_each_sample_is_told_of_its_image_with_its_own_chance() -> None:
    source, conditioner = Watched(7), KnownPart(channels=1, mask="box")
    told = told_by(conditioner, source, 12)
    assert told.shown is not None
    assert told.shown.numbers.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    whole = (told(range(12)) or {})["image"]
    for sample in (11, 4, 0):
        seeds = [fold_seed(3, Purpose.CONDITION, sample)]
        clean = source.images[sample % 7][None]
        wanted = conditioner.from_batch({"clean": clean}, seeds)["image"]
        assert torch.equal(whole[sample], wanted[0])
        assert torch.equal((told([sample]) or {})["image"], wanted)  # whoever its neighbours are
    assert not torch.equal(whole[0, 1], whole[7, 1])  # the mask is the sample's, not the image's
    other = told_by(conditioner, source, 12, seed=4)(range(12)) or {}
    assert not torch.equal(other["image"], whole)
    assert source.most == 12


def test_classes_in_turn_and_in_shares() -> None:
    network = MODELS["tiny"](num_classes=10)
    classes = ClassConditioner(num_classes=10)
    turn = make_told(network, classes, Digits(), 23, seed=0, device="cpu")
    assert turn.labels == [k % 10 for k in range(23)]
    assert turn.shape is None
    assert torch.equal((turn([22, 3]) or {})["class_label"], torch.tensor([2, 3]))
    counts = [5, 1, 0, 2, 2, 2, 2, 2, 2, 2]
    shares = make_told(network, classes, Digits(), 40, in_shares(counts), seed=0, device="cpu")
    assert shares.labels == class_labels(counts, 40)
    assert [shares.labels.count(k) for k in range(3)] == [10, 2, 0]
    for unfit in ([40], [1] * 11):  # no classes, or others than the network's
        assert shares_of(unfit, 10) == [1] * 10
        assert in_shares(unfit)(classes, 10, 10) == list(range(10))


def test_shares_of_classes_in_another_order_are_asked_of_the_images() -> None:
    names = [str(k) for k in reversed(range(10))]
    by_name = ClassConditioner(class_names=tuple(names), reads="class_name")
    network, digits = MODELS["tiny"](num_classes=10), Digits()
    counts = digits.labels.bincount().tolist()
    told = make_told(network, by_name, digits, 50, in_shares(counts), seed=0, device="cpu")
    assert not told.labels
    assert told.shown is not None
    wanted = 9 - digits.labels[told.shown.numbers]
    assert torch.equal((told(range(50)) or {})["class_label"], wanted)


def test_several_things_are_those_of_one_image() -> None:
    both = CompositeConditioner(
        kind=ClassConditioner(num_classes=10), small=LowResolution(channels=1, factor=2)
    )
    digits, network = Digits(), MODELS["tiny"](num_classes=10)
    told = make_told(network, both, digits, 9, in_turn, seed=0, device="cpu")
    assert told.shown is not None
    found = told(range(9)) or {}
    assert torch.equal(found["class_label"], digits.labels[told.shown.numbers])
    small = both.parts["small"]
    assert isinstance(small, LowResolution)
    wanted = small(small.lower(digits.images[told.shown.numbers]))["image"]
    assert torch.equal(found["image"], wanted)


def test_without_data_they_are_told_nothing() -> None:
    assert told_by(None, Digits(), 5)(range(5)) is None
    assert not told_by(None, Digits(), 5).anything
    known = KnownPart(channels=1, size=(8, 8))
    told = told_by(known, None, 5)
    assert told.anything
    assert torch.equal((told([1, 2]) or {})["image"], torch.zeros(2, 2, 8, 8))
    with pytest.raises(ValueError, match="needs the size of x: give `size`"):
        told_by(KnownPart(channels=1), None, 5)
    labels = make_told(
        MODELS["tiny"](num_classes=4), ClassConditioner(num_classes=4), None, 5, seed=0,
        device="cpu",
    ).labels  # fmt: skip
    assert labels == [0, 1, 2, 3, 0]


# ---------------------------------------------------------------- in a run


def test_evaluation_tells_each_sample_of_an_image(make_run_config: MakeConfig) -> None:
    """The figure is that of samples drawn from the last checkpoint with these very conditions; and
    no more conditions are made at once than are drawn."""
    config = make_run_config(
        **INPAINTING, evaluate=EVALUATE, optimizer={"lr": 0.02}, ema={"max_decay": 0.5}
    )
    source = Watched(200)
    trainer = Trainer(config, source=source)
    for _ in trainer:  # until it looks at what it is told
        pass
    evaluation = Evaluation(trainer)
    evaluation.prepare(lambda line: None)
    source.most = 0
    found = evaluation.measure()["figures"]["fid"]
    assert source.most == 10
    conditioner = trainer.conditioner
    assert conditioner is not None
    condition = Shown(conditioner, source, 24, 5)(range(24))
    assert condition["image"].abs().sum() > 0
    denoiser = evaluation._averaged()
    sampler = KSampler(denoiser, make_scheduler("karras"), "dpmpp_2m")

    def fid(condition: dict[str, Tensor]) -> float:
        drawn = sampler.sample(unit_noise((1, 8, 8), range(5, 29)), 2, condition)
        features = features_of(lambda numbers: drawn[numbers], 24, evaluation.reference)
        return figures_of(features, evaluation.reference, ["fid"]).values["fid"]

    assert abs(fid(condition) / found - 1) < 1e-3
    for other in ({}, Shown(conditioner, source, 24, 0)(range(24))):
        assert abs(fid(other) / found - 1) > 0.02


def test_inpainting_with_several_sizes(
    make_run_config: MakeConfig, shapes: Path, tmp_path: Path
) -> None:
    """It trains, shows pictures of the size drawn, goes on as if it had never stopped, and the
    doctor can look at it."""
    data = {"source": "folder", "path": str(shapes), "size": 8, "channels": 1, "buckets": BUCKETS}
    options = {**INPAINTING, "data": data, "preview": PREVIEW, "total_images": 128, "batch_size": 8,
               "checkpoint_every_images": 64, "keep_checkpoints": 9}  # fmt: skip
    whole = make_run_config(**options)
    trainer = Trainer(whole)
    sizes = {tuple(trainer.inputs.draw(trainer.stream[k], k).x0.shape[2:]) for k in range(16)}
    assert sizes == {(8, 8), (8, 16), (16, 8)}
    previews = Previews(trainer)
    assert previews.draw().shape == (5, 1, 8, 8)
    assert previews.text()["told of images"] == "15,16,18,20,22"
    assert "command" not in previews.text()
    result = run(whole)
    files = {p.name: p.read_bytes() for p in Path(whole.out, "previews").iterdir()}
    assert len(files) == 4
    assert load_png(Path(whole.out, "previews", min(files)))[0].shape[0] == 1
    again = make_run_config(**options, out=str(tmp_path / "again"))

    class Stop(Exception):
        pass

    def stop(trainer: Any, state: Any) -> None:
        if state.step == 11:
            raise Stop

    with pytest.raises(Stop):
        run(again, on_step=stop)
    resumed = run(again, resume="auto")
    one, other = (load_denoiser(r.checkpoint)[0].state_dict() for r in (result, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in files:
        grids = [load_png(Path(c.out, "previews", name))[0] for c in (whole, again)]
        assert torch.equal(*grids)
    patient = open_patient(result.checkpoint, "cpu", 64)
    assert patient.x0 is not None
    assert patient.x0.shape == (9, 1, 8, 8)  # the square ones, each once
    assert "steps in sampling" not in examine_run(whole.out).unseen


def test_a_size_that_no_image_has_is_not_drawn(make_run_config: MakeConfig, shapes: Path) -> None:
    """Of what images are told, none is of the source's own size: that of the first one is drawn."""
    data = {"source": "folder", "path": str(shapes), "size": [2, 30], "channels": 1,
            "buckets": [[8, 12], [16, 8]]}  # fmt: skip
    config = make_run_config(**INPAINTING, data=data, preview=PREVIEW, total_images=64)
    trainer = Trainer(config)
    assert trainer.source.shape == (1, 2, 30)
    assert Previews(trainer).draw().shape == (5, 1, 8, 12)
    run(config)
    assert "steps in sampling" not in examine_run(config.out).unseen


def test_every_size_is_tried_with_its_own_condition(
    make_run_config: MakeConfig, shapes: Path
) -> None:
    data = {"source": "folder", "path": str(shapes), "size": 8, "channels": 1}
    small = {
        "model": {**UNET, "image_channels": 1},
        "conditioner": {"type": "low_resolution", "channels": 1, "factor": 2},
    }
    trainer = Trainer(make_run_config(**small, data={**data, "buckets": [[8, 16]]}))
    examples = trainer.inputs.conditioning.examples()
    assert {shape: tuple(e["image"].shape) for shape, e in examples.items()} == {
        (1, 8, 8): (1, 1, 8, 8), (1, 8, 16): (1, 1, 8, 16),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"factor = 2 does not divide the size \(8, 17\)"):
        Trainer(make_run_config(**small, data={**data, "buckets": [[8, 17]]}))
    # Nothing can be asked of images that are not there.
    Trainer(make_run_config(**small, data={**data, "buckets": [[3, 99]]}))
    dit = {"type": "dit", "patch_size": 4, "depth": 1, "width": 64, "prediction": "edm"}
    with pytest.raises(ConfigError, match="model and data do not fit each other"):
        Trainer(
            make_run_config(
                **{**small, "model": {**dit, "image_channels": 1}},
                data={**data, "buckets": [[8, 18]]},
            )
        )


def test_data_that_do_not_say_what_is_told(make_run_config: MakeConfig) -> None:
    """The run's own data came from Python; what its config names lacks what the conditioner reads:
    the doctor says so, and evaluation asks for it."""
    raws = {"small": Digits().images[:60, :, ::2, ::2]}
    source = ArraySource(Digits().images[:60], raws=raws)
    conditioner = LowResolution(channels=1, factor=2, reads="small")
    config = make_run_config(model={**UNET, "image_channels": 1}, total_images=64)
    result = run(config, source=source, conditioner=conditioner)
    same = ArraySource(source.images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k_diffusion.training.doctor.measured._open_data", lambda info: same)
        patient = open_patient(result.checkpoint, "cpu", 8)
    assert patient.x0 is None
    assert patient.told is None
    assert "the data at hand does not say what the network is told (LowR" in patient.no_data
