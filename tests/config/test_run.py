"""Established configs as runs: what is trained is what they say, or they are refused by name."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import k_diffusion as K
from k_diffusion.cli import main
from k_diffusion.cli.train import Train
from k_diffusion.config.run import is_established, load_run, to_run
from k_diffusion.training import load_denoiser, read_info
from k_diffusion.training.augmentation_config import AugmentationConfig
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.loss import DENSITIES, make_density
from k_diffusion.training.sections import LossConfig, OptimizerConfig
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.images import save_png

LEVELS = {
    "input_channels": 3, "input_size": [8, 8], "sigma_data": 0.5, "sigma_min": 0.01,
    "sigma_max": 80, "sigma_sample_density": {"type": "lognormal", "mean": -1.0, "std": 1.1},
}  # fmt: skip
V1: dict[str, Any] = {
    "type": "image_v1", "mapping_out": 16, "depths": [1, 1], "channels": [8, 16],
    "self_attn_depths": [False, True], **LEVELS,
}  # fmt: skip
T1: dict[str, Any] = {
    "type": "image_transformer_v1", "patch_size": [4, 4], "width": 64, "depth": 1, **LEVELS,
}  # fmt: skip
T2: dict[str, Any] = {
    "type": "image_transformer_v2", "patch_size": [2, 2], "widths": [64, 64], "depths": [1, 1],
    "self_attns": [{"type": "shifted-window", "d_head": 64, "window_size": 2},
                   {"type": "global", "d_head": 64}],
    **LEVELS,
}  # fmt: skip
RESUME = "--resume-from" if "resume_from" in Train.__dataclass_fields__ else "--resume"
SCHEDULES = str(OptimizerConfig.model_fields["schedule"].annotation)


def established(model: dict[str, Any] = V1, **sections: Any) -> dict[str, Any]:
    return {"model": model, "dataset": {"type": "imagefolder", "location": "images"}, **sections}


def run_of(model: dict[str, Any] = V1, **sections: Any) -> TrainConfig:
    return make_config({"total_images": 64, **to_run(established(model, **sections))})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four images each."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            picture = torch.rand(3, 8, 8, generator=generator) * 2 - 1
            save_png(tmp_path / "images" / name / f"{i}.png", picture)
    return tmp_path / "images"


def write(folder: Path, data: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(data))
    return path


# ---------------------------------------------------------------- what is taken over


def test_sections() -> None:
    config = run_of(
        dataset={
            "type": "imagefolder-class", "location": "faces", "num_classes": 0,
            "cond_dropout_rate": 0.2,
        },
        optimizer={"type": "adamw", "lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.02},
        ema_sched={"type": "inverse", "power": 0.7, "max_value": 0.99},
    )  # fmt: skip
    assert config.data.model_dump() == {
        "source": "folder", "path": "faces", "size": (8, 8), "channels": 3, "crop": "center",
        "flip": False, "classes": "none", "max_pixels": 89_478_485, "bits": 8, "captions": "none",
        "caption_key": "text", "buckets": (),
    }  # fmt: skip
    assert config.condition_dropout == 0.2
    assert (config.batch_size, config.grad_clip) == (64, None)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (3e-4, (0.9, 0.95), 1e-6)
    assert (optimizer.weight_decay, optimizer.schedule) == (0.02, "constant")
    assert (config.ema.power, config.ema.max_decay, config.ema.inv_gamma) == (0.7, 0.99, 1.0)
    assert config.process == {"name": "karras", "sigma_min": 0.01, "sigma_max": 80}
    assert (config.loss.weighting, config.loss.density) == ("edm", "lognormal")
    assert config.loss.density_options == {"mean": -1.0, "std": 1.1}
    assert config.loss.stratified
    model = config.model["model"]
    assert model == K.config.load_config(established())["model"]
    assert run_of(T2, dataset={"type": "imagefolder", "location": "x", "num_classes": 3}).model[
        "num_classes"
    ] == 3  # fmt: skip


@pytest.mark.parametrize("kind", ["inverse", "constant"])
def test_the_averages_decay(kind: str) -> None:
    """Against the established schedule, update by update; a constant one from the second on."""
    given = {"type": kind, "power": 0.75, "max_value": 0.95, "inv_gamma": 2.0}
    ema = run_of(ema_sched=given).ema
    theirs = K.utils.EMAWarmup(inv_gamma=2.0, power=0.75, max_value=0.95)
    for update in range(200):
        ours = K.utils.averages.warmup_decay(
            update, inv_gamma=ema.inv_gamma, power=ema.power, max_decay=ema.max_decay
        )
        wanted = theirs.get_value() if kind == "inverse" else 0.95 * (update > 0)
        assert abs(ours - wanted) < 1e-12
        theirs.step()


COURSES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "constant"}, lambda o: K.utils.ConstantLRWithWarmup(o)),
    ({"type": "constant", "warmup": 0.9}, lambda o: K.utils.ConstantLRWithWarmup(o, warmup=0.9)),
    (
        {"type": "inverse", "inv_gamma": 50.0, "power": 0.5, "warmup": 0.8, "min_lr": 2e-5},
        lambda o: K.utils.InverseLR(o, 50.0, 0.5, warmup=0.8, min_lr=2e-5),
    ),
    (
        {"type": "exponential", "num_steps": 40, "decay": 0.3, "warmup": 0.5},
        lambda o: K.utils.ExponentialLR(o, 40, 0.3, warmup=0.5),
    ),
]


@pytest.mark.parametrize(("section", "theirs"), COURSES)
@pytest.mark.parametrize("batch", [64, 10])
def test_the_learning_rate_falls(section: dict[str, Any], theirs: Any, batch: int) -> None:
    """Against the established schedule, step by step."""
    known = "warmup_decay" in OptimizerConfig.model_fields and section["type"] in SCHEDULES
    if section != {"type": "constant"} and not known:
        pytest.skip(f"no course {section} here")
    given = to_run(established(lr_sched=section, optimizer={"lr": 1e-3}), {"batch_size": batch})
    config = make_config({"total_images": 100_000, **given})
    assert config.batch_size == batch
    home = "learning_rate" if known else "optimizer"
    ours = importlib.import_module(f"k_diffusion.training.{home}").learning_rate
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = theirs(optimizer)
    for step in range(200):
        lr = ours(config.optimizer, step * batch, config.total_images, batch)
        assert abs(lr - scheduler.get_last_lr()[0]) < 1e-15
        optimizer.step()
        scheduler.step()


DRAWN: list[dict[str, Any]] = [
    {"type": "lognormal", "mean": -0.5, "std": 0.7},
    {"type": "lognormal", "loc": -0.5, "scale": 0.7},
    {"type": "loguniform"},
    {"type": "loguniform", "min_value": 0.1, "max_value": 5.0},
    {"type": "loglogistic"},
    {"type": "loglogistic", "loc": 0.3, "scale": 0.4, "min_value": 0.2, "max_value": 20.0},
    {"type": "v-diffusion"},
    {"type": "cosine", "min_value": 0.05, "max_value": 30.0},
    {"type": "split-lognormal", "mean": 0.2, "std_1": 0.5, "std_2": 1.5},
    {"type": "cosine-interpolated"},
    {"type": "cosine-interpolated", "noise_d_low": 16, "noise_d_high": 64, "image_d": 32},
]


@pytest.mark.parametrize("density", DRAWN)
def test_the_levels_drawn(density: dict[str, Any]) -> None:
    """The quantiles here are those of many draws of the established function."""
    loss = to_run(established({**V1, "sigma_sample_density": density}))["loss"]
    if loss["density"] not in DENSITIES:
        pytest.skip(f"no density {loss['density']} here")
    options = dict(loss["density_options"])
    if "sigma_data" in (DENSITIES[loss["density"]].__kwdefaults__ or {}):
        options["sigma_data"] = V1["sigma_data"]  # the trainer's part
    quantile = make_density(loss["density"], None, **options)
    torch.manual_seed(0)
    draw = K.config.make_sample_density({**V1, "sigma_sample_density": density})
    drawn = draw([400_000], dtype=torch.float64).log().sort().values
    share = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98], dtype=torch.float64)
    theirs = drawn[(share * len(drawn)).long()]
    # Least noise has the largest log(alpha / sigma).
    ours = (-quantile(torch.cat([share, 1 - share]))).sort().values[::2]
    assert (ours - theirs).abs().max() < 0.02 * drawn.std()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"loss_weighting": "soft-min-snr"},
        {"loss_weighting": "snr"},
        {"loss_config": "simple"},
        {"loss_config": "simple", "loss_scales": 2},
        {"loss_scales": 2},
        {"loss_scales": 0, "loss_weighting": "snr"},
        {"has_variance": True},
        {"has_variance": True, "loss_weighting": "snr"},
    ],
)
def test_the_loss_is_the_established_one(more: dict[str, Any], images: Path) -> None:
    """On the same network, images, levels and noise."""
    data = to_run(established({**V1, **more}))
    for key in ("scales", "variance"):
        if key in data["loss"] and key not in LossConfig.model_fields:
            pytest.skip(f"no loss.{key} here")
    data["data"]["path"] = str(images)
    trainer = Trainer(make_config({"total_images": 8, **data, "batch_size": 8}))
    with torch.no_grad():
        for parameter in trainer.network.parameters():  # else it says zero, whatever it is told
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs = trainer.inputs.draw(trainer.stream[0], 0)
    whole = K.config.load_config(established({**V1, **more}))
    denoiser = K.config.make_denoiser_wrapper(whole)(trainer.network.inner_model)
    theirs = denoiser.loss(inputs.x0, inputs.noise, inputs.sigma.float())
    ours = trainer.objective(inputs.x0, inputs.sigma, inputs.noise)
    assert theirs.std() > 0.01
    assert ((ours - theirs) / theirs).abs().max() < 2e-4


@pytest.mark.parametrize("model", [V1, T1, T2])
def test_weights_decay_and_learn_as_established(model: dict[str, Any], images: Path) -> None:
    given = to_run(established(model), {"data.path": str(images)})
    given["data"]["path"] = str(images)
    trainer = Trainer(make_config({"total_images": 8, **given, "batch_size": 8}))
    lr, decay = trainer.config.optimizer.lr, trainer.config.optimizer.weight_decay
    trainer.train_step(trainer.stream[0], 0.5 * lr)
    network: Any = trainer.network.inner_model
    wanted = {
        id(p): (0.5 * group["lr"], group.get("weight_decay", decay))
        for group in network.param_groups(lr)
        for p in group["params"]
    }
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert found == wanted
    assert len(set(found.values())) >= 2
    assert decay > 0


# ---------------------------------------------------------------- trained, loaded, sampled


@pytest.mark.parametrize(("model", "classes"), [(V1, 0), (T1, 2), (T2, 2)])
def test_trained_by_the_command_line_loaded_by_both_faces(
    model: dict[str, Any], classes: int, images: Path, capsys: Any
) -> None:
    folder = images.parent
    data = {"model": model, "dataset": {"type": "huggingface", "num_classes": classes}}
    argv = ["train", "--config", str(write(folder, data)), "--data", str(images)]
    argv += ["--batch-size", "4", "--set", "optimizer.lr=0.01", "--out", str(folder / "out")]
    assert main([*argv, "--total-images", "8"]) == 0
    (checkpoint,) = (folder / "out").glob("*.safetensors")
    assert read_info(checkpoint).config["model"]["type"] == "established"
    more = [RESUME, str(checkpoint), "--total-images", "12"]
    assert main([*argv, *more]) == 0
    checkpoint = max((folder / "out").glob("*.safetensors"))
    theirs = K.config.load_model(checkpoint)
    ours, info = load_denoiser(checkpoint)
    assert info.images_seen == 12
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0.05, 1.0, 20.0])
    x = x * sigma[:, None, None, None]
    told = torch.tensor([0, 1, classes]) if classes else None
    mine = ours(x, sigma, **({} if told is None else {"class_label": told}))
    other = theirs(x, sigma, **({} if told is None else {"class_cond": told}))
    assert (mine - other).abs().max() < 1e-5
    assert (other - theirs(x, sigma)).abs().max() > (1e-6 if classes else -1)
    assert (theirs.process.sigma_min, theirs.process.sigma_max) == (0.01, 80)
    out = str(folder / "drawn")
    more = ["--class-label", "0,1"] if classes else ["-n", "2"]
    assert main(["sample", str(checkpoint), "--steps", "2", "--out", out, *more]) == 0
    assert "2 images" in capsys.readouterr().out
    assert main(["info", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["known here"]


def test_the_two_kinds_are_told_apart(tmp_path: Path) -> None:
    ours = {"model": {"type": "unet"}, "data": {"source": "digits"}, "total_images": 5}
    assert not is_established(ours)
    assert not is_established({**ours, "model": {"type": "image_v1", "input_channels": 3}})
    assert not is_established({"total_images": 5})
    assert is_established({"model": V1})
    assert is_established({"model": {"type": "image_v1"}, "lr_sched": {}})
    with pytest.raises(ConfigError, match="input_channels = 3 is no option of this model"):
        load_run(write(tmp_path, {**ours, "model": {"type": "image_v1", "input_channels": 3}}))
    assert load_run(write(tmp_path, ours), {"seed": 4}).seed == 4


def test_overrides_go_to_the_kind_that_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, established())
    config = load_run(
        path,
        {
            "total_images": 640,
            "model.channels": [16, 32],
            "optimizer.weight_decay": 0.5,
            "dataset.location": "there",
            "data.flip": True,
            "loss.weighting": "min_snr",
            "batch_size": 32,
        },
    )
    assert config.model["model"]["channels"] == [16, 32]
    assert config.optimizer.weight_decay == 0.5
    assert config.data.model_dump()["path"] == "there"
    assert config.data.model_dump()["flip"]
    assert (config.loss.weighting, config.batch_size, config.steps) == ("min_snr", 32, 20)
    digits = load_run(path, {"total_images": 1, "data": {"source": "digits"}})
    assert digits.data.source == "digits"
    assert load_run(path, {"total_images": 1, "batch_size": "auto"}).micro_batch_size == "auto"


@pytest.mark.parametrize("model", [V1, T1, T2])
def test_the_established_augmentation(model: dict[str, Any], images: Path) -> None:
    assert run_of(model).augmentation == AugmentationConfig()
    config = run_of({**model, "augment_prob": 0.9}, dataset={"location": str(images)})
    assert config.augmentation == AugmentationConfig(warp=0.9)
    trainer = Trainer(config.model_copy(update={"batch_size": 8}))
    drawn = trainer.inputs.draw(trainer.stream[0], 0)
    clean = trainer.stream[0].images
    assert drawn.x0.shape == clean.shape
    assert drawn.condition["augmentation"].shape == (8, 9)
    loss, _, report = trainer.train_step(trainer.stream[0], 1e-3)
    assert report is None
    assert math.isfinite(loss)
    network = trainer.network.eval()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape)
        x, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
        told = {"augmentation": torch.zeros(2, 9)}
        assert torch.equal(network(x, t), network(x, t, **told))
        assert not torch.equal(network(x, t), network(x, t, augmentation=torch.ones(2, 9)))


def test_an_image_v1_without_its_wrapper_can_only_leak(images: Path) -> None:
    model = {**V1, "augment_prob": 0.1, "augment_wrapper": False}
    config = run_of(model, dataset={"location": str(images)})
    with pytest.raises(ConfigError, match=r"Established cannot be told of it: .*augment_wrapper"):
        Trainer(config)
    leaky = AugmentationConfig(warp=0.1, leaky=True)
    trainer = Trainer(config.model_copy(update={"augmentation": leaky, "batch_size": 8}))
    assert not trainer.inputs.draw(trainer.stream[0], 0).condition


# ---------------------------------------------------------------- what is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {**V1, "dropout": 0.1}}, "model.dropout = 0.1 is no key: did you mean dropout_rate"),
    ({"model": {**V1, "zzz": 1}}, "model.zzz = 1 has no effect: take it out"),
    ({"model": {**V1, "type": "image_v9"}}, "unknown model.type 'image_v9'"),
    ({"model": {**V1, "depths": "x"}}, "model.depths = 'x' does not fit"),
    ({"model": {**V1, "augment_prob": 1.2}}, "model.augment_prob = 1.2 does not fit"),
    ({"model": {**V1, "mapping_cond_dim": 4}}, "model.mapping_cond_dim = 4 cannot be taken over"),
    ({"model": {**V1, "unet_cond_dim": 4}}, "model.unet_cond_dim = 4 cannot be taken over"),
    ({"model": {k: v for k, v in V1.items() if k != "input_size"}}, "model.input_size is missing"),
    (
        {"model": {k: v for k, v in V1.items() if k != "sigma_sample_density"}},
        "model.sigma_sample_density is missing",
    ),
    (
        {"model": {**V1, "sigma_sample_density": {"type": "lognorm"}}},
        "unknown sigma_sample_density.type 'lognorm'; did you mean 'lognormal'",
    ),
    ({"dataset": {"type": "huggingface"}}, "dataset.type = 'huggingface' cannot be taken over"),
    ({"dataset": {"type": "imagefolder"}}, "dataset.location is missing: give it, or --data FO"),
    ({"dataset": {"type": "imagefolder", "locaton": "x"}}, "did you mean location?"),
    ({"dataset": {"location": 3}}, "dataset.location = 3 does not fit"),
    ({"dataset": {"location": "x", "num_classes": -1}}, "dataset.num_classes = -1 does not fit"),
    ({"optimizer": {"type": "sgd"}}, "optimizer.type = 'sgd' cannot be taken over: give adamw"),
    ({"optimizer": {"type": "adam"}}, "optimizer.weight_decay = 0.001 of adam cannot be taken"),
    ({"optimizer": {"lr": "x"}}, "optimizer.lr = 'x' does not fit"),
    ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum = 0.9 cannot be taken over; known"),
    ({"lr_sched": {"type": "cosine"}}, "lr_sched.type = 'cosine' cannot be taken over: give one"),
    ({"lr_sched": {"type": "exponential"}}, "lr_sched.num_steps is missing"),
    ({"lr_sched": {"warmup": 1.0}}, "lr_sched.warmup = 1.0 does not fit"),
    ({"lr_sched": {"inv_gamma": 5}}, "lr_sched.inv_gamma = 5 cannot be taken over"),
    ({"ema_sched": {"type": "linear"}}, "ema_sched.type = 'linear' cannot be taken over"),
    ({"ema_sched": {"min_value": 0.5}}, "ema_sched.min_value = 0.5 does not fit"),
    ({"ema_sched": {"max_valu": 0.5}}, "did you mean max_value?"),
    ({"modell": {}}, "unknown section 'modell'; did you mean 'model'"),
    ({"dataset": []}, "dataset = [] does not fit: give an object"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_cannot_be_taken_over_is_named(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    path = write(tmp_path, {**established(), **change})
    assert main(["train", "--config", str(path), "--total-images", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == [path]


def test_how_long_is_not_in_an_established_config(tmp_path: Path) -> None:
    path = write(tmp_path, established())
    with pytest.raises(ConfigError, match=re.escape("total_images is missing")):
        load_run(path)
    with pytest.raises(ConfigError, match="data.channels = 2 is not one of 1, 3 or 4"):
        load_run(write(tmp_path, established({**V1, "input_channels": 2})), {"total_images": 1})
    adam = {"type": "adam", "weight_decay": 0.0}
    assert load_run(write(tmp_path, established(optimizer=adam)), {"total_images": 1})
    assert math.isfinite(load_run(path, {"total_images": 1}).optimizer.lr)
