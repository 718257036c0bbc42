"""What the doctor says of a run by its metrics: each fault found, and not where there is none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from k_diffusion.training.doctor import Finding, NotSeen, told
from k_diffusion.training.history import read_history

from .made_runs import DATA, course, line, start, write

Look = Callable[..., Finding | None]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """check, lines -> what it finds."""

    def look(name: str, facts: Iterable[Mapping[str, Any] | str]) -> Finding | None:
        return told.CHECKS[name](read_history(write(tmp_path, facts)))

    return look


def event(kind: str, step: int, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "images_seen": 32 * step, **facts}


def lines_of(losses: Iterable[float], **facts: Any) -> list[dict[str, Any]]:
    return [line(10 * k, loss=loss, **facts) for k, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    "name", [n for n in told.CHECKS if n not in ("batch size", "broken files")]
)
def test_nothing_is_off_with_a_good_run(look: Look, name: str) -> None:
    assert look(name, course()) is None


# ---------------------------------------------------------------- diverging


def test_roll_backs(look: Look) -> None:
    diverged = event("diverged", 305, first_step=300, reason="spikes")
    back = event("roll_back", 280, passed_over=[300, 305])
    found = look("diverging", [*course(), diverged, back])
    assert found is not None
    assert found.says == "the run diverged once, first at 9,760 images, and went back once"
    assert found.change == "optimizer.lr = 0.0005"
    found = look("diverging", [*course(), diverged])
    assert found is not None
    assert found.says.endswith("did not go back")
    assert "spikes.roll_back = true with a checkpoint_every_images" in found.change


def test_spikes(look: Look) -> None:
    spikes = [event("spike", 300 + k, loss=9.0, median=1.0) for k in range(3)]
    assert look("diverging", [*course(), *spikes[:2]]) is None
    found = look("diverging", [*course(), *spikes])
    assert found is not None
    assert found.says == "3 losses were spikes, the last at 9,664 images"


def noisy(values: Iterable[float], share: float) -> list[float]:
    draw = random.Random(0)
    return [value * (1 + share * draw.gauss(0, 1)) for value in values]


def test_a_rising_loss(look: Look) -> None:
    """Of 100 lines around 0.5 the last tenth rises by so much: above 5% and 4 standard errors."""
    level = [1.0] * 5 + [0.5] * 85

    def rise(share: float, noise: float) -> Finding | None:
        return look(
            "diverging", [start(), *lines_of(noisy(level + [0.5 * (1 + share)] * 10, noise))]
        )

    assert rise(0.0, 0.02) is None
    assert rise(0.03, 0.001) is None  # many standard errors, but little
    assert rise(0.10, 0.15) is None  # much, but within the noise
    found = rise(0.10, 0.02)
    assert found is not None
    assert found.says.startswith("the loss rises: its last tenth is 0.5")
    assert found.figures["last_tenth"] == pytest.approx(0.55, rel=0.03)
    assert found.figures["lowest_tenth"] == pytest.approx(0.5, rel=0.03)
    assert found.change == "optimizer.lr = 0.0005"


def test_the_noise_of_a_line_is_measured_right(look: Look) -> None:
    """Ten parts of 20 lines, of equal means and Gaussian noise, but the last: it is so many
    standard errors of a difference of two means higher."""
    noise = 0.05
    quantiles = [NormalDist(0, noise).inv_cdf((k + 0.5) / 20) for k in range(20)]
    error, draw = noise * (2 / 20) ** 0.5, random.Random(0)
    for factor, is_found in ((3.4, False), (4.6, True)):
        parts = [draw.sample(quantiles, 20) for _ in range(10)]
        losses = [1 + value for part in parts for value in part]
        losses[180:] = [value + factor * error for value in losses[180:]]
        found = look("diverging", [start(), *lines_of(losses)])
        assert (found is not None) is is_found, factor
        if found is not None:
            assert found.figures["standard_errors"] == pytest.approx(factor, rel=0.15)


def test_a_learned_loss_is_judged_by_its_denoising_part(look: Look) -> None:
    rising = [-1.0] * 40 + [-0.5] * 10
    facts = [start(), *lines_of(rising, terms={"denoising": 0.3})]
    assert look("diverging", facts) is None
    assert look("diverging", [start(), *lines_of(rising)]) is not None


def test_too_few_lines_to_judge(look: Look) -> None:
    with pytest.raises(NotSeen, match="19 train lines, and a course takes 20: train on, or set"):
        look("diverging", course(19))
    assert look("diverging", course(20)) is None


# ---------------------------------------------------------------- skipped, clipped


def test_skipped_steps(look: Look) -> None:
    def run(count: int, where: str = "a layer", **config: Any) -> Finding | None:
        skips = [event("skipped", 300, where=where, images=["a.png"]) for _ in range(count)]
        return look("skipped steps", [start(config), *skips, line(1000, skipped_steps=count)])

    assert run(3) is None
    found = run(4)
    assert found is not None
    assert found.says.startswith("4 of 1000 steps were skipped as not finite; most often (4 of")
    assert found.says.endswith("it began in a layer")
    assert found.change.startswith("optimizer.lr = 0.0005")
    found = run(4, where="the data")
    assert found is not None
    assert found.change == "look at the data (a.png): take out what is not finite"
    found = run(4, precision="fp16")
    assert found is not None
    assert found.change.startswith("precision = 'bf16'")
    # A thousandth of a long run is allowed.
    assert look("skipped steps", [start(), line(100_000, skipped_steps=100)]) is None
    assert look("skipped steps", [start(), line(100_000, skipped_steps=101)]) is not None


def test_clipped_nearly_always(look: Look) -> None:
    def run(above: int) -> Finding | None:
        norms = [5.0] * 30 + [3.0] * above + [0.5] * (30 - above)
        facts = [line(10 * k, grad_norm=norm) for k, norm in enumerate(norms, 1)]
        return look("gradient clipping", [start(), *facts])

    assert run(27) is None
    found = run(28)
    assert found is not None
    assert found.figures["share"] == pytest.approx(28 / 30)
    assert found.change == "grad_clip = 6, twice the usual norm"
    facts = [line(10 * k, grad_norm=50.0) for k in range(1, 61)]
    assert look("gradient clipping", [start({"grad_clip": None}), *facts]) is None


# ---------------------------------------------------------------- data


def data(prediction: str = "edm", sigma_data: float = 0.5, **facts: float) -> list[dict[str, Any]]:
    model = {"prediction": prediction, "sigma_data": sigma_data}
    return [start({"model": model}, data={**DATA, **facts}), line(10)]


def test_data_against_sigma_data(look: Look) -> None:
    assert look("data statistics", data(std=0.62)) is None
    assert look("data statistics", data(std=0.41)) is None
    for std in (0.63, 0.39):
        found = look("data statistics", data(std=std))
        assert found is not None
        assert found.change == f"a new run with model.sigma_data = 'auto' (here {std})"
    assert look("data statistics", data("eps", sigma_data=0.5, std=1.0)) is None
    assert look("data statistics", data("flow", sigma_data=0.5, std=3.9)) is None
    found = look("data statistics", data("flow", std=4.1))
    assert found is not None
    assert found.change.startswith("data divided by 4.1")


def test_mean_of_the_data(look: Look) -> None:
    assert look("data statistics", data(mean=-0.49)) is None
    found = look("data statistics", data(mean=-0.51))
    assert found is not None
    assert "mean is -0.51, above its standard deviation 0.5" in found.says
    assert found.change == "data less its mean"  # sigma_data is the standard deviation
    found = look("data statistics", data(std=0.0))
    assert found is not None
    assert "all values" in found.says
    with pytest.raises(NotSeen, match="no mean and std"):
        look("data statistics", [start(data={}), line(10)])


# ---------------------------------------------------------------- averages


def test_length_of_the_average(look: Look) -> None:
    """d / (1 - d) steps of 1000: a tenth, nearly all, 0.2%."""

    def run(decay: float) -> Finding | None:
        return look("length of the average", [start(), line(1000, ema_decay=decay)])

    assert run(0.99) is None
    found = run(0.9999)
    assert found is not None
    assert "still holds weights of the run's beginning" in found.says
    assert found.change.startswith("ema.max_decay = 0.99 (a tenth of the run)")
    found = run(0.7)
    assert found is not None
    assert "smooths little" in found.says
    assert "ema.profiles = [0.05, 0.1]" in found.change
    with pytest.raises(NotSeen, match="after 199 steps no average has a length to judge; 200 do"):
        look("length of the average", [start(), line(199)])


# ---------------------------------------------------------------- bands


def bands(falls: Iterable[float], whole: float = 0.5, **config: Any) -> list[dict[str, Any]]:
    """The first two lines at 1, all others at 1 less these."""
    after = [1 - fall for fall in falls]
    facts = [line(10 * k, loss=1.0, bands=[1.0] * 8) for k in (1, 2)]
    facts += [line(10 * k, loss=1 - whole, bands=after) for k in range(3, 41)]
    return [start(config), *facts]


def test_a_flat_band(look: Look) -> None:
    assert look("loss by noise level", bands([0.06] * 8)) is None
    found = look("loss by noise level", bands([0.5] * 6 + [0.04, 0.02]))
    assert found is not None
    assert found.says == (
        "the loss is flat (fallen by less than 5%) at noise levels sigma 1.2 to 2, above 2, while "
        "as a whole it fell by 50%"
    )
    assert "loss.uncertainty = true" in found.change
    assert "a higher loss.density_options.mean" in found.change
    found = look("loss by noise level", bands([-0.1] + [0.5] * 7))
    assert found is not None
    assert "sigma below 0.1, while" in found.says
    assert "a lower loss.density_options.mean" in found.change


def test_a_loss_that_is_flat_as_a_whole(look: Look) -> None:
    found = look("loss by noise level", bands([0.1] * 8, whole=0.19))
    assert found is not None
    assert found.says.startswith("the loss has fallen by 19% since the run began")
    assert look("loss by noise level", bands([0.1] * 8, whole=0.21)) is None
    late = [start(), *(line(1000 * k, loss=0.3) for k in range(1, 31))]
    with pytest.raises(NotSeen, match="first line is 1000 steps in"):
        look("loss by noise level", late)


def test_bands_that_cannot_be_judged(look: Look) -> None:
    for facts, why in (
        (course(19), "19 lines over 190 steps, and 20 over 200 tell"),
        ([start(), *(line(k) for k in range(1, 31))], "30 lines over 30 steps"),
        ([start({"init_from": "a"}), line(10)], "began with trained weights"),
        ([start(), line(10, bands=[])], "no loss by noise level"),
        ([start(), line(10, terms={"denoising": 1.0})], "a learned or an added loss"),
    ):
        with pytest.raises(NotSeen, match=why):
            look("loss by noise level", facts)


# ---------------------------------------------------------------- batch, files


def test_batch_against_the_noise_scale(look: Look) -> None:
    def run(scale: float) -> Finding | None:
        facts = [line(10 * k, noise_scale=1.0 if k < 30 else scale) for k in range(1, 41)]
        return look("batch size", [start(), *facts])

    assert run(127.0) is None
    assert run(8.1) is None
    found = run(129.0)
    assert found is not None
    assert "each step is mostly noise" in found.says
    assert found.change.startswith("batch_size = 64, with micro_batch_size = 'auto'")
    found = run(7.9)
    assert found is not None
    assert found.change.startswith("batch_size = 16: more steps")
    with pytest.raises(NotSeen, match="noise_scale_decay = 0.99 does"):
        look("batch size", course())


def test_broken_files(look: Look) -> None:
    def run(count: int) -> Finding | None:
        bad = {f"{k}.png": "truncated" for k in range(count)}
        return look("broken files", [*course(), event("end", 600, bad_files=bad)])

    assert run(0) is None
    assert run(10) is None
    found = run(11)
    assert found is not None
    assert found.says.startswith("11 files of the data are broken, for 1,000 images; such as 0.png")
    with pytest.raises(NotSeen, match="has not ended"):
        look("broken files", course())
