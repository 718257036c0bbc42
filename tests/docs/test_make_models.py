"""docs/make_models.py: what it trains on, how it judges, and that the page is of the figures."""

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make_models():
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ticking(make_models, monkeypatch):
    """A clock of which each look takes a second."""
    seconds = itertools.count()

    class Clock:
        perf_counter = staticmethod(lambda: float(next(seconds)))

    monkeypatch.setattr(make_models, "time", Clock)


def test_what_is_enlarged_is_reduced_to_what_it_was(make_models):
    digits = make_models.Digits("test").images[:50]
    large = make_models.enlarged(digits, 32)
    assert large.shape == (50, 1, 32, 32)
    assert (make_models.reduced(large) - digits).abs().max() <= 1e-6
    assert torch.equal(make_models.reduced(digits), digits)
    # Smooth: it changes within the squares, too.
    squares = large.unfold(2, 4, 4).unfold(3, 4, 4)
    assert squares.std((-1, -2)).mean() > 0.1


def test_a_backbone_is_trained_by_the_clock_and_judged(make_models, ticking, monkeypatch):
    rates = []
    step = make_models.Trainer.train_step
    monkeypatch.setattr(
        make_models.Trainer, "train_step", lambda self, b, lr: rates.append(lr) or step(self, b, lr)
    )
    judge = make_models.Judge(make_models.Digits("train"), make_models.Digits("test"), epochs=1)
    row = make_models.measure("unet", 8, judge, 5.0, 10)
    assert len(rates) == 4  # at 1, 2, 3 and 4 of 5 seconds
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] <= make_models.RATES["unet"]
    assert row["images seen"] == 4 * make_models.BATCH
    assert row["backbone"] == "unet"
    assert 0 <= row["share of the asked class"] <= 1
    assert row["frechet ratio"] > 1


def test_the_untrained_one_takes_no_step(make_models, ticking):
    digits = make_models.Digits("train")
    trainer, _ = make_models.train("unet", 8, digits, 0.0)
    assert trainer.images_seen == 0
    assert trainer.network.conv_out.weight.abs().max() == 0


def test_real_digits_are_judged_as_real(make_models):
    train = make_models.Digits("train")
    judge = make_models.Judge(train, make_models.Digits("test"), epochs=3)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:300]
    images, labels = train.images[some], train.labels[some]
    found = judge.figures(images, labels)
    assert found["share of the asked class"] >= 0.9
    assert found["frechet ratio"] <= 1.5
    shuffled = judge.figures(images.flip(2), labels.flip(0))
    assert shuffled["share of the asked class"] <= 0.3
    assert shuffled["frechet ratio"] >= 2


@pytest.mark.parametrize("size", [8, 32])
def test_every_config_makes_a_model_of_about_a_million(make_models, size):
    from k_diffusion.models import MODELS, make_model

    for name, options in make_models.MODELS_OF[size].items():
        if name in MODELS:
            config = {"type": name, **make_models.COMMON, "sigma_data": 0.5, **options}
            network = make_model({**config, "in_channels": 1}).eval()
            count = sum(p.numel() for p in network.parameters())
            assert 0.5e6 <= count <= 1.7e6, name
            with torch.no_grad():
                assert network(torch.zeros(1, 1, size, size), torch.zeros(1)).shape[-1] == size


def test_the_page_s_example_runs(make_models):
    (block,) = re.findall(r"```python\n(.*?)```", make_models.PAGE.read_text("utf-8"), re.DOTALL)
    names = {}
    exec(compile(block, "docs/models.md", "exec"), names)
    assert names["samples"].shape == (4, 1, 16, 16)
    assert names["samples"].isfinite().all()


def test_the_page_is_of_the_figures(make_models):
    make_models.main(["--check"])


def test_the_section_has_all_figures(make_models):
    row = {
        "size": 8, "backbone": "unet", "options": {"channels": 48}, "lr": 2e-3,
        "parameters": 905_000, "images seen": 12_800, "seconds": 120.0, "samples": 400,
        "share of the asked class": 0.955, "frechet ratio": 1.25,
    }  # fmt: skip
    figures = {
        "command": "python docs/make_models.py", "asked seconds": 120.0, "threads": 1,
        "samples": 400, "judge": 0.98, "rows": [row, {**row, "backbone": "untrained"}],
    }  # fmt: skip
    text = make_models.section(json.loads(json.dumps(figures)))
    assert "| 8×8 | unet | 0.91 M | 12,800 | 120 | 95.5% | 1.25 |" in text
    assert "| 8×8 | `unet` | `channels = 48` | 0.002 |" in text
    assert text.count("| 8×8 |") == 3  # the untrained one has no config of its own
    page = make_models.page(f"head {make_models.BEGIN}old\n{make_models.END} tail", figures)
    assert page == f"head {make_models.BEGIN}{text}{make_models.END} tail"
    with pytest.raises(SystemExit, match="lost its markers"):
        make_models.page("nothing", figures)
