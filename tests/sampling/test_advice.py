"""What a run is warned of before it begins: once, in plain words, with the change to try."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.denoiser import EDMDenoiser, EpsDenoiser, FlowDenoiser, VDenoiser, X0Denoiser
from k_diffusion.guidance import Clamp, apg, cfg
from k_diffusion.sampling import SOLVERS, KSampler, SamplingAdvice
from k_diffusion.utils.scheduler import (
    SCHEDULERS,
    AlignYourStepsScheduler,
    KarrasScheduler,
    SimpleScheduler,
    VPScheduler,
)


class Flat(torch.nn.Module):
    """A network that predicts 0."""

    prediction, time_convention, sigma_data = "edm", "log_sigma", 0.5

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return torch.zeros_like(x)


def said(model: Any, scheduler: Any = "karras", solver: str = "euler", **options: Any) -> list[str]:
    x = torch.randn(2, 1, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = KSampler(model, scheduler, solver)
        for _ in range(2):  # once for each sampler
            sampler.sample(x, **{"steps": 5, **options})
    assert all(issubclass(w.category, SamplingAdvice) for w in caught)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun", "dpmpp_3m"])
def test_a_sound_run_is_told_nothing(solver: str) -> None:
    for steps in (3, 20):
        assert said(EDMDenoiser(Flat()), solver=solver, steps=steps) == []
    assert said(lambda x, sigma: x * 0, solver=solver) == []
    assert said(cfg(EDMDenoiser(Flat()), 7.5)) == []


KINDS = {
    "edm": EDMDenoiser,
    "eps": EpsDenoiser,
    "v": VDenoiser,
    "x0": X0Denoiser,
    "flow": FlowDenoiser,
}


def network(kind: str) -> Flat:
    made = Flat()
    made.prediction = kind
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "custom"])
def test_every_schedule_as_it_comes_is_told_nothing(kind: str, name: str) -> None:
    model = KINDS[kind](network(kind))
    ran, refused = 0, []
    for steps in (2, 3, 7, 20):
        try:
            KSampler(model, name).levels(steps)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert said(model, name, steps=steps) == []
        ran += 1
    assert all("pure noise" in line for line in refused)  # where this kind has no say
    assert ran or name in ("flow", "flow_dynamic", "flow_dynamic_linear", "zero_terminal_snr")
    # A network that carries no process takes the schedule as its own.
    if ran:
        assert said(network(kind), name) == []


def test_levels_beyond_the_models_range() -> None:
    (line,) = said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=500.0))
    assert "begins at sigma / alpha = 500, but the model was trained up to 80 only" in line
    assert "give the scheduler a sigma_max of 80" in line
    (line,) = said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=2.0))
    assert "samples come out blurred or alike; give the scheduler a sigma_max of 80" in line
    assert said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=60.0)) == []
    assert said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=14.6)) == []


def test_levels_beyond_the_range_of_other_kinds_of_networks() -> None:
    eps = EpsDenoiser(network("eps"))  # up to 157
    (line,) = said(eps, KarrasScheduler(sigma_max=1000.0))
    assert "begins at sigma / alpha = 1000, but the model was trained up to 157.4 only" in line
    (line,) = said(eps, KarrasScheduler(sigma_max=5.0))
    assert "samples come out blurred or alike; give the scheduler a sigma_max of 157.4" in line
    assert said(eps, KarrasScheduler(sigma_max=14.6)) == []  # as Stable Diffusion has it
    # No end to its levels is as good as an end that is far away.
    flow = FlowDenoiser(network("flow"))
    assert said(flow, KarrasScheduler(sigma_max=14.6)) == []
    assert said(flow, KarrasScheduler(sigma_max=500.0)) == []
    (line,) = said(flow, KarrasScheduler(sigma_max=5.0))
    assert "trained up to inf: so little noise" in line
    assert line.endswith("leave the scheduler's sigma_max open")
    # Of a schedule without a sigma_max, another way out.
    (line,) = said(eps, VPScheduler(beta_d=2.0))
    assert "leave the options of VPScheduler away, or lay karras levels" in line
    assert said(eps, VPScheduler(beta_d=19.0)) == []
    # Laid over another process by a schedule that goes as it is told; and where it always begins.
    assert said(eps, SimpleScheduler(process="scaled_linear")) == []
    assert said(eps, AlignYourStepsScheduler()) == []


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m_sde", "unipc", "heun", "dpm_solver_3"])
def test_one_step_is_too_few_for_the_order(solver: str) -> None:
    """It ends at the clean data, and so is one of euler's, whatever the method."""
    order = SOLVERS[solver].order
    assert order > 1
    (line,) = said(EDMDenoiser(Flat()), solver=solver, steps=1)
    assert line == (
        f"1 step is too few for {solver}, which is of order {order} only with {order} or more: "
        "take more steps, or euler"
    )
    assert said(EDMDenoiser(Flat()), solver=solver, steps=order) == []


def test_two_steps_are_enough_for_order_three_in_each() -> None:
    """dpm_solver_3 calls the model three times in its first step."""
    assert SOLVERS["dpm_solver_3"].order == 3
    assert said(EDMDenoiser(Flat()), solver="dpm_solver_3", steps=2) == []


def test_two_steps_are_too_few_for_order_three_by_earlier_steps() -> None:
    assert SOLVERS["unipc"].order == 3
    (line,) = said(EDMDenoiser(Flat()), solver="unipc", steps=2)
    assert line.startswith("2 steps are too few for unipc, which is of order 3 only with 3 or more")


def test_images_that_are_not_on_the_models_scale() -> None:
    image = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    (line,) = said(EDMDenoiser(Flat()), init=image, strength=0.5)
    assert "init has a standard deviation of" in line
    assert "but the model's data have 0.5: bring it to the scale of training" in line
    assert said(EDMDenoiser(Flat()), init=image / 127.5 - 1, strength=0.5) == []
    # Begun from an image, a run need not begin at the noisiest level.
    assert said(EDMDenoiser(Flat()), init=image / 127.5 - 1, strength=0.1) == []


def test_guidance_that_saturates() -> None:
    model = EDMDenoiser(Flat())
    (line,) = said(cfg(model, 30.0))
    assert "guidance of scale 30 saturates most models: take less, or apg" in line
    assert said(apg(model, 30.0)) == []
    assert said(cfg(model, 30.0, rescale=0.7)) == []
    assert said(Clamp(cfg(model, 30.0))) == []
    assert len(said(cfg(Clamp(model), 30.0))) == 1  # held too early


def test_each_sampler_says_it_for_itself() -> None:
    lines = [said(cfg(EDMDenoiser(Flat()), 30.0)) for _ in range(2)]
    assert [len(found) for found in lines] == [1, 1]
