"""When a result is not finite: the message says where it went wrong first."""

import contextlib
import math

import pytest
import torch
from torch import nn

from k_diffusion.denoiser import EpsDenoiser
from k_diffusion.models import UNet
from k_diffusion.sampling import Enhance, KSampler, unit_noise
from k_diffusion.utils.modules import first_bad_module
from k_diffusion.utils.scheduler import KarrasScheduler

LEVELS = KarrasScheduler(0.1, 10)


def x_of(batch=3):
    return unit_noise((2, 4, 4), range(batch))


def breaks_below(bound, sample=1):
    """One value of one sample is infinite at levels below a bound."""

    def model(x, sigma):
        d = torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)))
        d[sample, 0, 0, 0] = torch.where(sigma[sample] < bound, math.inf, d[sample, 0, 0, 0])
        return d

    return model


def test_the_message_names_call_step_level_share_and_sample():
    sampler = KSampler(breaks_below(2.0), LEVELS, "heun")
    sigmas = sampler.levels(6).sigmas
    first = next(i for i, sigma in enumerate(sigmas) if sigma < 2)
    calls = [step.level.sigma for step in sampler.plan(6).steps]
    k = next(k for k, sigma in enumerate(calls) if sigma < 2)
    step = sum(s.start for s in sampler.plan(6).steps[: k + 1])
    assert step == first  # heun's second stage looks ahead
    with pytest.raises(FloatingPointError) as caught:
        sampler.sample(x_of(), 6)
    said = str(caught.value)
    assert "\n" not in said
    assert "the result of heun after 6 steps is not finite in 1." in said
    assert "in sample 1: first the model's answer to call" in said
    assert f"call {k + 1} of 11 (step {step}) at sigma {calls[k]:.4g}, in 1.04% of its" in said
    assert said.endswith("values: check the model's output, the noise and the input for overflow "
                         "or NaN")  # fmt: skip


def small_unet():
    torch.manual_seed(0)
    return UNet(
        in_channels=3,
        channels=8,
        channel_mults=(1, 2),
        blocks=1,
        attention=(False, True),
        head_channels=8,
    ).eval()


def test_the_first_module_is_named_wherever_the_network_is_held():
    network = small_unet()
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    chosen = names[len(names) // 2]
    with torch.no_grad():
        network.get_submodule(chosen).bias[0] = math.nan
        for p in network.parameters():  # its last layer begins at zero
            if p.abs().max() == 0:
                p.fill_(0.01)
    x = unit_noise((3, 16, 16), [1, 2])
    denoiser = EpsDenoiser(network)
    for model, prefix in ((denoiser, "network."), (lambda x, sigma: network(x, sigma), "")):
        with pytest.raises(FloatingPointError) as caught:
            KSampler(model, "karras").sample(x, 3)
        assert f"; first module: {prefix}{chosen} (Conv2d)" in str(caught.value)
        assert "samples 0 and 1: first the model's answer to call 1 of 3 (step 1)" in str(
            caught.value
        )


def test_report_warns_and_gives_the_samples_that_are_good():
    sampler = KSampler(breaks_below(2.0), LEVELS, "dpmpp_2m")
    good = KSampler(breaks_below(0.0), LEVELS, "dpmpp_2m").sample(x_of(), 6)
    with pytest.warns(RuntimeWarning, match="in sample 1: first the model's answer") as warned:
        result = sampler.sample(x_of(), 6, on_nan="report")
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert torch.equal(result[[0, 2]], good[[0, 2]])
    assert not result[1].isfinite().all()
    with pytest.warns(RuntimeWarning):  # and bytes of them, black where there is no value
        picture = sampler.sample(x_of(), 6, on_nan="report", to="uint8")
    assert picture[1, 0, 0, 0] == 0
    with pytest.raises(ValueError, match="unknown on_nan 'ignore'; .*raise"):
        sampler.sample(x_of(), 6, on_nan="ignore")


def test_noise_that_is_not_finite_is_found_in_the_state():
    drawn = []

    def noise(s, t):
        drawn.append(s)
        return torch.full((3, 2, 4, 4), math.nan if s < 2 else 0.1)

    with pytest.raises(FloatingPointError, match="first the state before call . of 6"):
        KSampler(breaks_below(0.0), LEVELS, "euler_ancestral").sample(x_of(), 6, noise=noise)


def test_the_run_is_done_again_with_the_same_seeds_and_only_when_it_must():
    calls = []

    def model(x, sigma):
        calls.append(x.clone())
        return torch.where(sigma.reshape(-1, 1, 1, 1) < 2, x * math.nan, x * 0.5)

    sampler, told = KSampler(model, LEVELS, "euler_ancestral"), []
    with pytest.raises(FloatingPointError):
        sampler.sample(x_of(), 6, callback=lambda k, *rest: told.append(k))
    first, again = calls[:6], calls[6:]
    bad = [level.sigma < 2 for level in sampler.levels(6)]
    assert len(again) == bad.index(True) + 1 < 6  # it stops where it finds it
    for a, b in zip(first, again, strict=False):
        assert torch.equal(a, b)
    # The callback is told again, for it may change what it is told of.
    assert told == [*range(6), *range(bad.index(True))]
    calls.clear()
    KSampler(lambda x, s: (calls.append(0), x * 0.5)[1], LEVELS).sample(x_of(), 6)
    assert len(calls) == 6


def test_a_model_that_does_not_repeat_itself_is_said_to():
    calls = []

    def model(x, sigma):
        calls.append(0)
        return x * (math.nan if len(calls) == 4 else 0.5)

    with pytest.raises(FloatingPointError, match="every call of a second run .* was finite"):
        KSampler(model, LEVELS).sample(x_of(), 4)


def test_an_adaptive_solver_raises_with_the_module_too():
    network = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        network[1].bias[0] = math.nan
    for on_nan in ("raise", "report"):
        with pytest.raises(FloatingPointError, match=r"sample 0 .*first module: 1 \(Conv2d\)"):
            KSampler(lambda x, sigma: network(x), LEVELS, "dpm_adaptive").sample(
                x_of(), 4, on_nan=on_nan
            )


def test_an_enhancing_pass_is_explained_as_well():
    def model(x, sigma):
        return x * (math.nan if x.shape[-1] > 4 else 0.5)

    with pytest.raises(FloatingPointError, match="first the model's answer to call 1 of 3"):
        KSampler(model, LEVELS).sample(x_of(), 6, enhance=Enhance(2))


def test_first_bad_module_watches_all_that_is_called_and_leaves_no_hook():
    inner = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    outer = nn.Sequential(nn.Identity(), inner)
    with first_bad_module() as found:
        outer(torch.ones(1, 2))
    assert found == []
    with torch.no_grad():
        inner[1].weight.fill_(math.inf)
    with first_bad_module() as found:
        outer(torch.ones(1, 2))
        outer(torch.ones(1, 2))
    assert found == ["1.1 (Linear)"]

    class Raises(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = Raises(), nn.Linear(2, 2)

        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.part(x)
            return {"out": (self.last(x) * math.nan,), "n": 3}

    with first_bad_module() as found:
        Catches()(torch.ones(1, 2))
    assert found == ["Catches"]
    before = len(found)
    outer(torch.ones(1, 2))
    assert len(found) == before  # no hook is left
    finite = Catches()
    finite.forward = lambda x: Catches.forward(finite, x) and x
    with first_bad_module() as found:
        finite(torch.ones(1, 2))
        outer(torch.ones(1, 2))
    assert found == ["1.1 (Linear)"]  # not lost by what the exception left unfinished


@pytest.mark.parametrize(
    ("solver", "written"),
    [("euler", 0), ("euler", 1), ("dpm_adaptive_12", 1)],  # whose x is a copy
)
def test_a_callback_that_spoils_a_run_is_named(solver, written):
    """The second run has the same hooks, or it would be another run."""

    def callback(k, x, sigma, denoised):
        if k == 2:
            (x, denoised)[written][1, 0, 0, 0] = math.nan

    what = ("the state", "the model's answer")[written]
    sampler = KSampler(lambda x, sigma: 0.5 * x, KarrasScheduler(0.05, 5), solver)
    with pytest.raises(FloatingPointError, match=f"first {what} after the callback of call 3.* at"):
        sampler.sample(steps=5, shape=(3, 4, 4), seeds=range(2), callback=callback)
