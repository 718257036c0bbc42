"""What a network is told in training: conditioners made of raw inputs, hidden now and then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.models import (
    ClassConditioner,
    CompositeConditioner,
    KnownPart,
    LowResolution,
)
from k_diffusion.training import (
    ArraySource,
    CheckpointError,
    ConfigError,
    DataError,
    load_conditioner,
    read_info,
    run_training,
)
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Purpose
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.maths import fold_seed

UNET = {
    "type": "unet",
    "channels": 8,
    "channel_mults": [1],
    "blocks": 1,
    "attention": [False],
    "head_channels": 8,
    "prediction": "edm",
}


def told(trainer: Trainer, steps: int = 1) -> list[dict[str, Tensor]]:
    """What the network is told in each of the first steps."""
    return [
        dict(trainer.inputs.draw(trainer.stream[step], step).condition) for step in range(steps)
    ]


def test_a_network_that_knows_classes_is_told_them(make_run_config: Any) -> None:
    """Which ones are hidden is what the seed says, whatever the kind of network."""
    config = make_run_config(condition_dropout=0.3)
    trainer = Trainer(config)
    assert isinstance(trainer.conditioner, ClassConditioner)
    (seen,) = told(trainer)
    generator = torch.Generator().manual_seed(fold_seed(config.seed, Purpose.LABELS, 0))
    hidden = torch.rand(32, generator=generator) < 0.3
    assert 3 < hidden.sum() < 20
    wanted = trainer.stream[0].labels.masked_fill(hidden, 10)
    assert torch.equal(seen["class_label"], wanted)
    networks = Trainer(make_run_config(condition_dropout=0.3, model={**UNET, "num_classes": 10}))
    assert torch.equal(told(networks)[0]["class_label"], wanted)


def test_class_names_and_raw_inputs_reach_the_conditioner(make_run_config: Any) -> None:
    images = torch.rand(9, 1, 8, 8)
    labels = torch.arange(9) % 2
    raws = {"small": torch.arange(9.0).reshape(9, 1, 1, 1).expand(9, 1, 4, 4)}
    source = ArraySource(images, labels, ["cat", "dog"], raws=raws)
    conditioner = CompositeConditioner(
        kind=ClassConditioner(class_names=("dog", "cat"), reads="class_name"),
        picture=LowResolution(channels=1, factor=2, reads="small"),
    )
    config = make_run_config(
        model={**UNET, "num_classes": 2, "image_channels": 1}, condition_dropout=0.0, batch_size=9
    )
    trainer = Trainer(config, source=source, conditioner=conditioner)
    batch = trainer.stream[0]
    (seen,) = told(trainer)
    assert torch.equal(seen["class_label"], 1 - batch.labels)
    small = raws["small"][batch.indices]  # not lowered again, as the clean data would be
    assert torch.equal(seen["image"], conditioner.parts["picture"](small)["image"])


def test_chance_belongs_to_a_sample_of_a_step(make_run_config: Any) -> None:
    model = {**UNET, "image_channels": 2}
    config = make_run_config(model=model, condition_dropout=0.0, batch_size=8)
    conditioner = KnownPart(channels=1)
    first, second = told(Trainer(config, conditioner=conditioner), 2)
    again = told(Trainer(config, conditioner=conditioner), 2)
    assert torch.equal(first["image"], again[0]["image"])
    assert torch.equal(second["image"], again[1]["image"])
    masks = torch.cat([first["image"], second["image"]])[:, 1].flatten(1)
    assert len(masks.unique(dim=0)) == 16
    other = make_run_config(model=model, condition_dropout=0.0, batch_size=8, seed=9)
    assert not torch.equal(
        told(Trainer(other, conditioner=conditioner))[0]["image"], first["image"]
    )
    # Each process sees its own part of the one step.
    trainer = Trainer(config, conditioner=conditioner)
    trainer.stream.rank, trainer.stream.world = 1, 2
    assert torch.equal(told(trainer)[0]["image"], first["image"][4:])


def test_saved_by_its_config_and_checked_at_a_resume(make_run_config: Any) -> None:
    config = make_run_config(
        model={**UNET, "image_channels": 1},
        conditioner={"type": "low_resolution", "channels": 1, "factor": 2},
        total_images=64,
    )
    result = run_training(config, progress=False)
    info = read_info(result.checkpoint)
    conditioner = load_conditioner(info)
    assert isinstance(conditioner, LowResolution)
    assert conditioner.config.factor == 2
    longer = config.model_copy(update={"total_images": 96})
    assert run_training(longer, resume="auto", progress=False).images_seen == 96
    changed = longer.model_copy(
        update={"conditioner": {"type": "low_resolution", "channels": 1, "factor": 4}}
    )
    with pytest.raises(CheckpointError, match="of a run with conditioner.factor = 2, not 4"):
        run_training(changed, resume="auto", progress=False)
    # An object in its place is known by its config, too.
    given = run_training(
        longer.model_copy(update={"conditioner": None}),
        conditioner=LowResolution(channels=1, factor=4),
        overwrite=True,
        progress=False,
    )
    made = load_conditioner(read_info(given.checkpoint))
    assert isinstance(made, LowResolution)
    assert made.config.factor == 4


def test_a_run_of_classes_has_a_conditioner_with_their_names(make_run_config: Any) -> None:
    info = read_info(run_training(make_run_config(total_images=32), progress=False).checkpoint)
    conditioner = load_conditioner(info)
    assert isinstance(conditioner, ClassConditioner)
    assert conditioner(["7", 3])["class_label"].tolist() == [7, 3]
    without = make_run_config(model={"type": "tiny"}, total_images=32)
    result = run_training(without, overwrite=True, progress=False)
    assert load_conditioner(read_info(result.checkpoint)) is None


@pytest.mark.parametrize(
    ("model", "conditioner", "said"),
    [
        ({}, {"type": "low_resolution", "channels": 1}, "image was given, but this model takes no"),
        ({"image_channels": 2}, {"type": "low_resolution", "channels": 1}, "image has shape .1, 1"),
        (
            {"image_channels": 1},
            {"type": "low_resolution", "channels": 1, "factor": 3},
            "factor = 3",
        ),
        (
            {"num_classes": 10},
            {"type": "class", "num_classes": 11},
            "knows 11 classes, but the mod",
        ),
        (
            {"num_classes": 10},
            {"type": "class", "num_classes": 10, "reads": "text"},
            "reads 'text',",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    make_run_config: Any, model: dict[str, Any], conditioner: dict[str, Any], said: str
) -> None:
    config = make_run_config(model={**UNET, **model}, conditioner=conditioner)
    with pytest.raises(ConfigError, match="model, conditioner and data do not fit each other") as e:
        Trainer(config)
    assert said.replace(".1", "(1") in str(e.value)


def test_an_own_network_that_cannot_be_told_is_refused(make_run_config: Any) -> None:
    conditioner = LowResolution(channels=1, factor=2)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'image'"):
        Trainer(make_run_config(model={"type": "tiny"}), conditioner=conditioner)


class Learning(LowResolution):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layer = nn.Linear(2, 2)


def test_a_conditioner_that_would_learn_is_refused(make_run_config: Any) -> None:
    config = make_run_config(model={**UNET, "image_channels": 1})
    conditioner = Learning(channels=1, factor=2)
    with pytest.raises(
        ConfigError, match=r"Learning has weights that ask .* \(layer.weight\), but"
    ):
        Trainer(config, conditioner=conditioner)
    trainer = Trainer(config, conditioner=conditioner.requires_grad_(False))
    assert trainer.config.conditioner is None  # not registered, so it has no config


def test_raw_inputs_are_one_a_sample() -> None:
    with pytest.raises(DataError, match=r"raws\['text'\] has 2 raw inputs for 3 images"):
        ArraySource(torch.zeros(3, 1, 4, 4), raws={"text": ["a", "b"]})


@pytest.mark.parametrize("shape", [(1, 16), (2, 4, 4, 4)])
def test_sounds_and_volumes_are_data_too(shape: tuple[int, ...]) -> None:
    source = ArraySource(torch.rand(5, *shape))
    assert source.shape == shape
    assert source.batch(torch.tensor([1])).images.shape == (1, *shape)


def test_workers_give_the_same_raw_inputs(make_run_config: Any) -> None:
    images = torch.rand(12, 1, 8, 8)
    source = ArraySource(images, raws={"text": [str(i) for i in range(12)]})
    trainer = Trainer(make_run_config(model={"type": "tiny"}), source=source)
    here = [batch.raws for batch in trainer.stream.batches(0, 2)]
    there = [batch.raws for batch in trainer.stream.batches(0, 2, workers=1)]
    assert here == there
    assert isinstance(trainer.config, TrainConfig)
