"""What the commands, the doctor and a run tell samples: a warp that never was, and real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from k_diffusion.cli import main
from k_diffusion.evaluation import features_of, figures_of, make_reference, train_small
from k_diffusion.guidance import cfg
from k_diffusion.models import MODELS, KnownPart, LowResolution
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import Digits, load_denoiser
from k_diffusion.training.augmentation import unaugmented
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.doctor import examine_run
from k_diffusion.training.previews import Previews
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.told import Shown
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.images import to_uint8
from k_diffusion.utils.scheduler import make_scheduler

MakeConfig = Callable[..., TrainConfig]
UNET = {
    "type": "unet", "channels": 8, "channel_mults": [1], "blocks": 1, "attention": [False],
    "head_channels": 8, "prediction": "edm", "sigma_data": 0.5,
}  # fmt: skip
EVALUATE = {"every_images": 64, "images": 24, "steps": 2, "seed": 5, "batch_size": 10,
            "metrics": ["fid"]}  # fmt: skip
PREVIEW = {"every_images": 32, "count": 5, "steps": 2}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "k_diffusion.evaluation.measuring.train_small"
    monkeypatch.setattr(name, lambda *a, **k: train_small(*a, images_seen=200, **k))


def run(config: TrainConfig, **options: Any) -> RunResult:
    return run_training(config, **{"progress": False, "say": lambda line: None, **options})


# ---------------------------------------------------------------- a network that must be told


@dataclass(frozen=True)
class WarpedConfig:
    in_channels: int = 1
    num_classes: int = 0


class Warped(nn.Module):
    """Cannot do without being told of the warp; of our networks each can."""

    Config = WarpedConfig
    prediction, time_convention, sigma_data = "edm", "log_sigma", 0.5
    augmentation_dim = 9
    told: list[Tensor] = []  # noqa: RUF012

    def __init__(self, config: WarpedConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.layer = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)
        self.how = nn.Linear(9, 1)

    def forward(
        self, x: Tensor, t: Tensor, *, augmentation: Tensor, class_label: Tensor | None = None
    ) -> Tensor:
        if not self.training:
            Warped.told.append(augmentation)
        return self.layer(x) + self.how(augmentation)[..., None, None]


def test_a_network_that_must_be_told_of_the_warp(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever draws tells it zeros, with guidance and without."""
    monkeypatch.setitem(MODELS, "warped", Warped)
    Warped.told.clear()

    def seen() -> int:
        told = list(Warped.told)
        Warped.told.clear()
        assert all(one.shape[1:] == (9,) and not one.any() for one in told)
        return len(told)

    config = make_run_config(
        model={"type": "warped", "num_classes": 10}, augmentation={"warp": 0.3}, total_images=64,
        preview={**PREVIEW, "every_images": 64, "guidance": 2.0}, evaluate=EVALUATE,
    )  # fmt: skip
    said: list[str] = []
    result = run(config, say=said.append)
    assert not [line for line in said if "no preview" in line]
    assert seen() >= 2 + 3 * 2
    report = examine_run(config.out)
    assert not {"average measured", "conditioning", "steps in sampling"} & set(report.unseen)
    assert seen() > 20
    words = [str(result.checkpoint), "--steps", "2", "--device", "cpu"]
    cache = str(Path(config.out, "evaluation"))
    for more in ([], ["--guidance", "2"], ["--guidance", "2", "--negative", "3"]):
        drawn = ["-n", "10", "--overwrite", *more]
        assert main(["sample", *words, "--out", str(tmp_path / "s"), *drawn]) == 0
        assert seen()
        out = ["--out", str(tmp_path / "e.json"), "--cache", cache, "--metrics", "fid"]
        assert main(["evaluate", *words, *out, *drawn]) == 0
        assert seen()
    out = ["--out", str(tmp_path / "c"), "--samplers", "ddim", "-n", "2"]
    assert main(["compare", "--checkpoint", *words, *out]) == 0
    assert seen()


class Asking(Warped):
    """Can do without."""

    def forward(self, x: Tensor, t: Tensor, augmentation: Tensor | None = None) -> Tensor:
        return x


def test_networks_that_need_not_be_told_are_not(make_run_config: MakeConfig) -> None:
    model = {**UNET, "num_classes": 10}
    trainer = Trainer(make_run_config(model=model, augmentation={"warp": 0.3}, preview=PREVIEW))
    assert set(Previews(trainer).told(range(2)) or {}) == {"class_label"}
    assert Previews(trainer).told.null is None
    assert unaugmented(Asking(WarpedConfig()), 3, "cpu") == {}
    found = unaugmented(Warped(WarpedConfig()), 3, "cpu")["augmentation"]
    assert torch.equal(found, torch.zeros(3, 9))


# ---------------------------------------------------------------- by the command line


@pytest.fixture
def completing(make_run_config: MakeConfig) -> Path:
    """A checkpoint that has learned to look at what it is told."""
    config = make_run_config(
        model={**UNET, "image_channels": 2}, optimizer={"lr": 0.02}, ema={"max_decay": 0.5},
        conditioner={"type": "known_part", "channels": 1, "mask": "box"},
    )  # fmt: skip
    return run(config).checkpoint


def test_evaluate_tells_each_sample_of_an_image(
    completing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    words = ["evaluate", str(completing), "-n", "30", "--steps", "2", "--seed", "7", "--metrics",
             "fid", "--device", "cpu", "--batch-size", "8"]  # fmt: skip
    assert main([*words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["sampling"]["told of"] == "30 images of the data"
    assert "classes in the shares of" not in found["sampling"]
    conditioner, digits = KnownPart(channels=1, mask="box"), Digits()
    denoiser, _ = load_denoiser(completing)
    sampler = KSampler(denoiser, make_scheduler("karras"), "dpmpp_2m")
    noise = unit_noise((1, 8, 8), range(7, 37))
    reference = make_reference(digits, cache=completing.parent / "evaluation")

    def fid(condition: dict[str, Tensor]) -> float:
        drawn = sampler.sample(noise, 2, condition)
        features = features_of(lambda numbers: drawn[numbers], 30, reference)
        return figures_of(features, reference, ["fid"]).values["fid"]

    wanted = found["figures"]["fid"]
    assert abs(fid(Shown(conditioner, digits, 30, 7)(range(30))) - wanted) < 1e-3
    for other in ({}, Shown(conditioner, digits, 30, 0)(range(30))):
        assert abs(fid(other) - wanted) > 1e-2
    assert main([*words, "--guidance", "2", "--out", str(tmp_path / "g.json")]) == 0
    guided = json.loads((tmp_path / "g.json").read_text())
    assert abs(guided["figures"]["fid"] - wanted) > 1e-3
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        other = LowResolution(channels=1, factor=2, reads="small")
        name = "k_diffusion.training.restore.load_conditioner"
        patch.setattr(name, lambda info, device: other)
        assert main([*words, "--out", str(tmp_path / "n.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "without --condition the samples are told what images of the data are, but" in said
    assert "LowResolution reads 'small', but a batch of this data has clean" in said


def test_guidance_goes_away_from_what_training_hid_conditions_by(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """In networks that do not know it themselves, too: another embedding, not none at all."""
    preview = {**PREVIEW, "guidance": 2.5, "steps": 2, "sampler": "euler", "seed": 7}
    trainer = Trainer(make_run_config(model={"type": "tiny", "num_classes": 10}, preview=preview))
    assert not hasattr(trainer.network, "drop_condition")
    previews = Previews(trainer)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    told = previews.told(range(4))
    assert told is not None
    guided = cfg(trainer.denoiser, 2.5, null=previews.told.null)
    sigma = torch.full((4,), 0.6)
    with torch.no_grad():
        none = trainer.denoiser(x, sigma, class_label=torch.full((4,), 10))
        wanted = none + 2.5 * (trainer.denoiser(x, sigma, **told) - none)
        assert (guided(x, sigma, **told) - wanted).abs().max() < 1e-6
        assert (cfg(trainer.denoiser, 2.5)(x, sigma, **told) - wanted).abs().max() > 1e-3
    drawn = previews.draw()
    trainer.save(tmp_path / "a.safetensors")
    words = ["sample", str(tmp_path / "a.safetensors"), "--steps", "2", "--sampler", "euler",
             "--guidance", "2.5", "-n", str(len(drawn)), "--seed", "7",
             "--out", str(tmp_path / "drawn"), "--device", "cpu"]  # fmt: skip
    assert main(words) == 0
    for k, image in enumerate(drawn):
        (path,) = (tmp_path / "drawn").glob(f"seed{preview['seed'] + k:06d}_*.png")
        found = torch.from_numpy(np.array(Image.open(path)))
        assert (found.int() - to_uint8(image)[0].int()).abs().max() <= 1
