"""Changed images in training: which, by what, who is told, and that nothing else decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import (
    MODELS,
    CompositeConditioner,
    SmallAutoencoder,
    UNet,
    make_conditioner,
)
from k_diffusion.training import load_denoiser
from k_diffusion.training.augmentation import Augmentation
from k_diffusion.training.augmentation_config import AugmentationConfig
from k_diffusion.training.check import check_run
from k_diffusion.training.checkpoint import CheckpointError, write_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.config_text import in_full
from k_diffusion.training.dataset import ArraySource, Digits, Purpose, Stream
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.latents import LatentSource
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.augmentation import apart, normals, random_flip, random_shift
from k_diffusion.utils.colours import ColourChange
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.warp import Warp, random_zoom

MakeConfig = Callable[..., TrainConfig]

UNET = {
    "type": "unet", "channels": 8, "channel_mults": [1], "blocks": 1, "attention": [False],
    "head_channels": 8,
    "num_classes": 10, "prediction": "edm", "sigma_data": 0.5,
}  # fmt: skip
ALL = {
    "flip": 0.3, "shift": 1, "crop": 0.6, "contrast": 0.3, "brightness": 0.2, "warp": 0.5,
    "noise": 0.1,
}  # fmt: skip


def colourful(count: int = 64) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    return ArraySource(2 * torch.rand(count, 3, 8, 8, generator=generator) - 1)


def inputs_of(trainer: Trainer, step: int) -> Inputs:
    return trainer.inputs.draw(trainer.stream[step], step)


def at(config: TrainConfig, step: int, key: int) -> Any:
    """The seeds of one change at all places of a step."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    return apart([fold_seed(config.seed, Purpose.CHANGES, place) for place in places], key)


# ---------------------------------------------------------------- what is done


def test_by_default_nothing_is_done(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config())
    batch = trainer.stream[3]
    drawn = inputs_of(trainer, 3)
    assert torch.equal(drawn.x0, batch.images)
    assert set(drawn.condition) == {"class_label"}
    assert AugmentationConfig().chosen == {}


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Callable[[int], Any]], Tensor]]] = {
    "flip": ({"flip": 0.3}, lambda x, seeds: random_flip(x, seeds(0), 0.3)),
    "shift": ({"shift": 2}, lambda x, seeds: random_shift(x, 2, seeds(1))),
    "crop": ({"crop": 0.5}, lambda x, seeds: random_zoom(x, 0.5, seeds(2))),
    "colours": (
        {"hue": 0.1, "saturation": 0.2, "greyscale": 0.3, "contrast": 0.4, "brightness": 0.5},
        lambda x, seeds: ColourChange(0.1, 0.2, 0.3, 0.4, 0.5)(x, seeds(3)),
    ),
    "warp": ({"warp": 0.4, "leaky": True}, lambda x, seeds: Warp(0.4)(x, seeds(4))[0]),
    "noise": ({"noise": 0.3}, lambda x, seeds: x + 0.3 * normals(seeds(5), x.shape)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_what_its_function_does(name: str, make_run_config: MakeConfig) -> None:
    chosen, function = CHANGES[name]
    config = make_run_config(model={"type": "tiny"}, augmentation=chosen)
    trainer = Trainer(config, source=colourful())
    drawn = inputs_of(trainer, 3)
    clean = trainer.stream[3].images
    assert not torch.equal(drawn.x0, clean)
    assert torch.equal(drawn.x0, function(clean, lambda key: at(config, 3, key)))
    assert not drawn.condition
    assert drawn.x0.dtype is torch.float32


def test_all_are_done_in_order(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=UNET, augmentation=ALL)
    trainer = Trainer(config)
    x, drawn = trainer.stream[2].images, inputs_of(trainer, 2)
    x = random_zoom(random_shift(random_flip(x, at(config, 2, 0), 0.3), 1, at(config, 2, 1)), 0.6,
                    at(config, 2, 2))  # fmt: skip
    x = ColourChange(contrast=0.3, brightness=0.2)(x, at(config, 2, 3))
    x, told = Warp(0.5)(x, at(config, 2, 4))
    x = x + 0.1 * normals(at(config, 2, 5), x.shape)
    assert torch.equal(drawn.x0, x)
    assert torch.equal(drawn.condition["augmentation"], told)


# ---------------------------------------------------------------- by seed and place alone


def test_a_sample_does_not_know_processes_nor_parts(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=UNET, augmentation=ALL)
    trainer = Trainer(config)
    whole = inputs_of(trainer, 5)
    for rank in range(4):
        stream = Stream(trainer.source, config.batch_size, config.seed, rank=rank, world=4)
        trainer.inputs.stream = stream
        share = trainer.inputs.draw(stream[5], 5)
        part = whole.part(8 * rank, 8 * rank + 8)
        assert torch.equal(share.x0, part.x0)
        assert torch.equal(share.condition["augmentation"], part.condition["augmentation"])
    trainer.inputs.stream = trainer.stream
    other = inputs_of(trainer, 6).condition["augmentation"]
    assert not torch.equal(whole.condition["augmentation"], other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bitwise_the_unbroken_one(
    make_run_config: MakeConfig, tmp_path: Path, workers: int
) -> None:
    changes: dict[str, Any] = {"model": UNET, "augmentation": ALL, "total_images": 256}
    whole = [state.loss for state in Trainer(make_run_config(**changes))]
    config = make_run_config(**changes, workers=workers)
    losses, path = [], tmp_path / "a.safetensors"
    first = Trainer(config)
    for state in first:
        losses.append(state.loss)
        if state.step == 3:
            break
    first.save(path)
    torch.manual_seed(99)
    second = Trainer(config, resume=path)
    losses += [state.loss for state in second]
    assert len(whole) == 8
    assert losses == whole
    plain = [s.loss for s in Trainer(make_run_config(**{**changes, "augmentation": {}}))]
    assert all(a != b for a, b in zip(plain, whole, strict=True))


def test_only_a_run_of_the_same_changes_goes_on(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    plain = Trainer(make_run_config())
    plain.save(path)
    with pytest.raises(CheckpointError, match=r"augmentation\.shift = 0, not 2"):
        Trainer(make_run_config(augmentation={"shift": 2}), resume=path)
    contents = plain.contents()
    record = json.loads(contents.record)
    del record["config"]["augmentation"]  # of a time when there was none
    write_checkpoint(tmp_path / "old.safetensors", replace(contents, record=json.dumps(record)))
    Trainer(make_run_config(), resume=tmp_path / "old.safetensors")


# ---------------------------------------------------------------- who is told


def test_the_network_is_told_of_the_warp_and_of_nothing_in_sampling(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(model=UNET, augmentation={"warp": 0.9}, condition_dropout=1.0)
    trainer = Trainer(config)
    assert trainer.config.model["augmentation_dim"] == 9
    drawn = inputs_of(trainer, 0)
    assert (drawn.condition["class_label"] == 10).all()  # hidden; how it was warped is not
    assert (drawn.condition["augmentation"] != 0).any(1).float().mean() > 0.9
    name = "mapping.vectors.augmentation.weight"
    before = trainer.network.state_dict()[name].clone()
    assert len(list(trainer)) == 20
    assert (trainer.network.state_dict()[name] - before).abs().max() > 0
    path = tmp_path / "a.safetensors"
    trainer.save(path)
    denoiser, info = load_denoiser(path)
    assert info.config["model"]["augmentation_dim"] == 9
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0])
    untold = denoiser(x, sigma)
    assert torch.equal(untold, denoiser(x, sigma, augmentation=torch.zeros(3, 9)))
    assert not torch.equal(untold, denoiser(x, sigma, augmentation=torch.ones(3, 9)))


def test_what_a_condition_reads_is_the_changed_image(make_run_config: MakeConfig) -> None:
    config = make_run_config(
        model={**UNET, "num_classes": 0, "image_channels": 1}, augmentation={"warp": 0.9},
        conditioner={"type": "low_resolution", "channels": 1, "factor": 2}, condition_dropout=0.0,
    )  # fmt: skip
    drawn = inputs_of(Trainer(config), 1)
    small = torch.nn.functional.interpolate(drawn.x0, size=(4, 4), mode="area")
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    assert (drawn.condition["image"] - large).abs().max() < 1e-6


def test_the_run_in_full_says_what_the_model_becomes(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=UNET, augmentation={"warp": 0.12})
    full = in_full(config)
    assert full["model"]["augmentation_dim"] == 9
    assert Trainer(make_config(full)).config.model == Trainer(config).config.model
    assert "augmentation_dim" not in in_full(make_run_config(model={"type": "tiny"}))["model"]
    leaky = make_run_config(model=UNET, augmentation={"warp": 0.12, "leaky": True})
    assert in_full(leaky)["model"]["augmentation_dim"] == 0
    assert Trainer(leaky).config.model["augmentation_dim"] == 0


def test_the_check_names_the_changes(make_run_config: MakeConfig) -> None:
    assert "changes" not in str(check_run(make_run_config()))
    told = str(check_run(make_run_config(model=UNET, augmentation={"flip": 0.5, "warp": 0.12})))
    assert "\nchanges: flip 0.5; warp 0.12, told to the network\n" in told
    leaky = AugmentationConfig(warp=0.12, leaky=True, noise=0.1)
    assert str(leaky) == "warp 0.12, which leaks; noise 0.1"
    assert "changes: flip 0.5\n" in str(check_run(make_run_config(augmentation={"flip": 0.5})))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augmentation": {"warp": 0.1}}, "but Tiny cannot be told of it: give a model with augm"),
        (
            {"augmentation": {"warp": 0.1}, "model": {**UNET, "augmentation_dim": 5}},
            "told to the network by 9 numbers, but UNet takes 5 numbers",
        ),
        (
            {"augmentation": {"hue": 0.1, "flip": 0.1}},
            r"^augmentation\.hue: images of 1 channels have no such",
        ),
    ],
)
def test_what_does_not_fit_the_model_or_the_data(
    changes: dict[str, Any], said: str, make_run_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=said):
        Trainer(make_run_config(**changes))


def test_a_network_that_says_that_it_can_be_told_is_tried(
    make_run_config: MakeConfig, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(tiny):
        augmentation_dim = 9

    class Told(Deaf):
        def forward(self, x: Tensor, t: Tensor, augmentation: Tensor | None = None) -> Tensor:
            seen.append(augmentation)
            return super().forward(x, t)

    seen: list[Any] = []
    monkeypatch.setitem(MODELS, "deaf", Deaf)
    monkeypatch.setitem(MODELS, "told", Told)
    with pytest.raises(ConfigError, match="do not fit each other: .*unexpected keyword.*'augmen"):
        Trainer(make_run_config(model={"type": "deaf"}, augmentation={"warp": 0.5}))
    trainer = Trainer(make_run_config(model={"type": "told"}, augmentation={"warp": 0.5}))
    trainer.train_step(trainer.stream[0], 1e-3)
    assert torch.equal(seen[-1], inputs_of(trainer, 0).condition["augmentation"])


def test_pictures_alone_are_changed(make_run_config: MakeConfig) -> None:
    config = make_run_config(model={"type": "tiny"}, augmentation={"flip": 0.5})
    images = Digits().images[:8]
    with pytest.raises(ConfigError, match=r"flip: data of shape .* are no pictures"):
        Augmentation(config, UNet(), ArraySource(torch.zeros(4, 2, 9)))
    noisy = make_run_config(model={"type": "tiny"}, augmentation={"noise": 0.5})
    sounds, said = Augmentation(noisy, UNet(), ArraySource(torch.zeros(4, 2, 9)))(
        torch.zeros(4, 2, 9), range(4)
    )
    assert sounds.std() > 0.4
    assert not said
    latents = LatentSource(ArraySource(images), SmallAutoencoder(in_channels=1))
    for chosen in (config, noisy):
        with pytest.raises(ConfigError, match="is for pictures, not for latents: leave it out"):
            Augmentation(chosen, UNet(), latents)
    beside = ArraySource(images, raws={"text": ["a"] * 8, "depth": torch.zeros(8, 1, 8, 8)})
    with pytest.raises(ConfigError, match="flip moves the images but not the data's 'd"):
        Augmentation(config, UNet(), beside)
    Augmentation(noisy, UNet(), beside)
    del beside.raws["depth"]
    Augmentation(config, UNet(), beside)
    five = ArraySource(torch.zeros(4, 5, 8, 8))
    bright = make_run_config(model={"type": "tiny"}, augmentation={"brightness": 0.5})
    with pytest.raises(ConfigError, match="images of 5 channels have no such colours"):
        Augmentation(bright, UNet(), five)


def test_one_alone_tells_the_augmentation(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=UNET, augmentation={"warp": 0.1})
    own = make_conditioner({"type": "class", "num_classes": 10})
    own.keywords = ("augmentation",)
    with pytest.raises(ConfigError, match="both tell the network its augmentation: leave one"):
        Augmentation(config, UNet(augmentation_dim=9), Digits(), CompositeConditioner(own=own))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"leaky": True}, "leaky = true is for a warp, and warp is 0: leave it out"),
        ({"flip": 1.5}, "augmentation.flip"),
        ({"crop": 0.0}, "augmentation.crop"),
        ({"hue": 0.6}, "augmentation.hue"),
        ({"shift": -1}, "augmentation.shift"),
        ({"flop": 0.5}, "augmentation.flop"),
    ],
)
def test_a_wrong_key_is_named(section: dict[str, Any], said: str, make_run_config: Any) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_run_config(augmentation=section)
    assert "\n" not in str(caught.value)
