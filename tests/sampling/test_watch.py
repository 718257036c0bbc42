"""Looking on while a run goes on: previews, trajectory, cancelling; and waiting for nothing."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from k_diffusion.sampling import (
    Cancelled,
    KSampler,
    Preview,
    Result,
    SampleNoise,
    make_plan,
    unit_noise,
)
from k_diffusion.sampling.preview import Previewer
from k_diffusion.utils.scheduler import KarrasScheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "invariants"))
from watch import WAITS, Watch

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def shrink(x, sigma):
    return torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1))))


def x_of(batch=2, size=(3, 8, 8)):
    return unit_noise(size, range(batch))


# Previews


def test_previews_are_the_estimates_made_small():
    x, shown, estimates = x_of(2, (3, 96, 48)), [], []
    KSampler(shrink, "karras", "euler").sample(
        x, 5, preview=Preview(lambda k, p: shown.append((k, p)), every=2, size=32),
        callback=lambda k, x, sigma, d: estimates.append(d),
    )  # fmt: skip
    assert [k for k, _ in shown] == [0, 2, 4]
    for k, pictures in shown:
        assert pictures.shape == (2, 3, 32, 16)
        assert pictures.dtype == torch.uint8
        mean = estimates[k].reshape(2, 3, 32, 3, 16, 3).mean((3, 5))
        assert (pictures.float() - (mean + 1) * 127.5).abs().max() <= 0.51


def test_small_samples_are_not_enlarged_and_a_function_is_a_preview():
    shown = []
    sampler = KSampler(shrink, "karras", "euler")
    result = sampler.sample(x_of(), 3, preview=lambda k, p: shown.append(p))
    assert [p.shape for p in shown] == [(2, 3, 8, 8)] * 3
    # The last estimate is the result of an Euler step to sigma = 0.
    assert torch.equal(shown[-1], ((result + 1) * 127.5).round().to(torch.uint8))


def test_latents_are_shown_by_a_linear_map():
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 0.3
    bias, shown, estimates = torch.tensor([0.1, -0.2, 0.0]), [], []
    KSampler(shrink, "karras", "euler").sample(
        x_of(2, (5, 8, 8)), 2,
        preview=Preview(lambda k, p: shown.append(p), matrix=matrix, bias=bias),
        callback=lambda k, x, sigma, d: estimates.append(d),
    )  # fmt: skip
    expected = torch.einsum("oc,bchw->bohw", matrix, estimates[0]) + bias.reshape(-1, 1, 1)
    assert (shown[0].float() - (expected.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.51


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_shown_black(value):
    shown = []
    with pytest.raises(FloatingPointError):
        KSampler(lambda x, s: torch.full_like(x, value), "karras").sample(
            x_of(), 2, preview=lambda k, p: shown.append(p)
        )
    assert shown[0].max() == 0


def test_pictures_that_are_still_on_their_way_are_shown_at_the_end(monkeypatch):
    """As from a device that has not copied any of them yet."""
    order = []

    class Event:
        def synchronize(self):
            order.append("waited")

    def late(self, k, x, sigma, denoised):
        self._waiting.append((k, self._picture(denoised), Event()))

    monkeypatch.setattr(Previewer, "__call__", late)
    KSampler(shrink, "karras", "euler").sample(x_of(), 3, preview=lambda k, p: order.append(k))
    assert order == ["waited", 0, "waited", 1, "waited", 2]


@pytest.mark.parametrize(
    ("preview", "size", "message"),
    [
        (lambda k, p: None, (3, 8), r"preview shows images, but x has shape \(1, 3, 8\)"),
        (lambda k, p: None, (5, 8, 8), r"x has 5 channels, .*a matrix of shape \(3, 5\)"),
        (Preview(print, matrix=torch.ones(3, 4)), (5, 8, 8), r"matrix has shape \(3, 4\): x has 5"),
        (Preview(print, matrix=torch.ones(5)), (5, 8, 8), r"matrix has shape \(5,\)"),
        (
            Preview(print, matrix=torch.ones(3, 5), bias=torch.ones(5)),
            (5, 8, 8),
            r"asks for \(3,\)",
        ),
        ("small", (3, 8, 8), "preview must be a Preview or a function .* got str"),
    ],
)
def test_previews_that_cannot_be_are_named(preview, size, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KSampler(shrink, "karras").sample(x_of(1, size), 2, preview=preview)


def test_preview_options_that_cannot_be_are_named():
    for options, message in (
        ({"every": 0}, "every must be a whole number"),
        ({"size": 1.5}, "size must be a whole number"),
        ({"bias": torch.ones(3)}, "bias goes with a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            Preview(print, **options)
    with pytest.raises(TypeError, match="show must be callable"):
        Preview(3)


# Trajectory and details


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "euler_ancestral", "sa_solver"])
def test_a_trajectory_holds_the_states_and_estimates_of_the_steps(solver):
    sampler = KSampler(shrink, KarrasScheduler(0.1, 5), solver)
    x, calls = x_of(), []
    result = sampler.sample(
        x, 5, seed=3, trajectory=True, callback=lambda k, *seen: calls.append(seen)
    )
    assert isinstance(result, Result)
    assert torch.equal(result.samples, sampler.sample(x, 5, seed=3))
    starts = [step.start for step in sampler.plan(5).steps]
    firsts = [seen for seen, start in zip(calls, starts, strict=True) if start]
    assert len(result.states) == len(result.estimates) == len(result.levels) == len(firsts)
    assert list(result.levels) == list(sampler.levels(5))[: len(firsts)]
    for state, estimate, level, (x_k, sigma, d) in zip(
        result.states, result.estimates, result.levels, firsts, strict=True
    ):
        assert torch.equal(state, x_k)
        assert torch.equal(estimate, d)
        assert sigma[0].item() == pytest.approx(level.sigma)
    assert result.nbytes == 2 * len(firsts) * x.numel() * 4
    assert result.calls == len(calls) == sampler.plan(5).evaluations
    assert result.seeds == (3, 4)
    assert result.steps == (5, 5)


def test_a_trajectory_is_not_written_over_by_the_model_s_buffer():
    buffer = torch.empty(2, 3, 8, 8)

    def model(x, sigma):
        return torch.mul(x, 0.5, out=buffer)

    result = KSampler(model, "karras", "euler").sample(x_of(), 3, trajectory=True)
    for state, estimate in zip(result.states, result.estimates, strict=True):
        assert torch.equal(estimate, 0.5 * state)


def test_details_say_what_it_took():
    sampler = KSampler(shrink, "karras", "dpm_adaptive")
    calls = []
    result = sampler.sample(
        x_of(), 5, seed=1, details=True, callback=lambda k, *rest: calls.append(k)
    )
    assert result.calls == len(calls) == calls[-1] + 1
    assert (result.states, result.nbytes) == ((), 0)
    for options in ({"solver": "dpm_adaptive"}, {"steps": "auto"}):
        steps = options.pop("steps", 5)
        with pytest.raises(ValueError, match="no steps in common for a trajectory"):
            KSampler(shrink, "karras", **options).sample(x_of(), steps, trajectory=True)


# Cancelling


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpm_adaptive"])
def test_cancelling_from_another_thread_gives_the_last_estimate(solver):
    cancel, reached, estimates = threading.Event(), threading.Event(), []

    def model(x, sigma):
        if len(estimates) == 3:  # the fourth call: let the other thread act
            reached.set()
            assert cancel.wait(20)
        return shrink(x, sigma)

    def other():
        assert reached.wait(20)
        cancel.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(Cancelled, match="cancelled after 4 calls") as caught:
        KSampler(model, "karras", solver).sample(
            x_of(), 10, cancel=cancel, callback=lambda k, x, s, d: estimates.append(d)
        )
    thread.join()
    assert caught.value.calls == len(estimates) == 4
    assert torch.equal(caught.value.estimate, estimates[-1])


def test_cancelled_before_it_began_it_does_not_call_the_model():
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled) as caught:
        KSampler(lambda x, sigma: 1 / 0, "karras").sample(x_of(), 3, cancel=cancel)
    assert caught.value.estimate is None
    assert caught.value.calls == 0
    with pytest.raises(TypeError, match="cancel must be a threading.Event, .* got bool"):
        KSampler(shrink, "karras").sample(x_of(), 3, cancel=True)
    with pytest.raises(TypeError, match="callback must be callable, got int"):
        KSampler(shrink, "karras").sample(x_of(), 3, callback=3)


# Waiting and cost


def names_in_a_run(**options):
    """Operations after the first call of a run and before its end."""
    between = []

    def model(x, sigma):
        between.append(len(watch.names))
        return torch.ones_like(x)

    sampler = KSampler(model, KarrasScheduler(0.1, 5), "euler")
    x = x_of()
    with Watch(x.numel(), "cpu") as watch:
        sampler.sample(x, 6, **options)
    return watch.names[between[0] + 1 : between[-1] + 1], watch.peak


INIT = {"init": torch.zeros(2, 3, 8, 8), "mask": torch.ones(8, 8)}


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, ()),
        (INIT, ()),
        ({**INIT, "strength": 0.7}, ()),
        ({**INIT, "resample": 3}, ()),
        ({"cancel": threading.Event()}, ()),
        ({"details": True, "normalise": "dynamic", "to": "uint8"}, ()),
        ({"trajectory": True}, ("_to_copy", "copy_", "clone")),  # on the device itself
        ({"preview": Preview(lambda k, p: None, size=4)}, ("_to_copy",)),  # float to uint8
    ],
    ids=["plain", "mask", "strength", "resample", "cancel", "finish", "trajectory", "preview"],
)
def test_nothing_waits_for_the_device_between_calls(options, allowed, warm_watch):
    names, _ = names_in_a_run(**options)
    waits = [n for n in names if any(f"aten::{w}" in n for w in WAITS)]
    assert [n for n in waits if not any(a in n for a in allowed)] == []


def test_options_that_are_off_cost_no_operation(warm_watch):
    """A run without them does what the engine does, and no more."""
    names, _ = names_in_a_run()
    plan = make_plan("euler", KarrasScheduler(0.1, 5).levels(6))
    steps = [n for n in names if n != "aten::ones_like"]
    assert len(steps) == plan.evaluations - 1  # one lerp each
    with_mask, _ = names_in_a_run(**INIT)
    assert len(with_mask) == len(names) + plan.evaluations - 1  # and one more to put it in


@pytest.fixture(scope="module")
def warm_watch():
    """The first use of a dispatch mode in a process does more."""
    with Watch(1, "cpu"):
        torch.ones_like(torch.zeros(1)).mul_(2).add_(1)


@cuda
@pytest.mark.parametrize("every", [1, 3])
def test_previews_on_a_gpu_do_not_wait(every):
    """The whole loop under the debug mode that raises at any wait."""
    shown = []
    x = torch.randn(2, 3, 256, 256, device="cuda")
    sampler = KSampler(shrink, "karras", "dpmpp_2m_sde")
    armed = []

    def model(x, sigma):
        if not armed:
            torch.cuda.set_sync_debug_mode("error")
            armed.append(1)
        elif len(armed) == 19:
            torch.cuda.set_sync_debug_mode("default")
        armed.append(1)
        return shrink(x, sigma)

    try:
        KSampler(model, "karras", "dpmpp_2m_sde").sample(
            x, 20, seed=1, cancel=threading.Event(), trajectory=True,
            init=torch.zeros_like(x), mask=torch.ones(256, 256, device="cuda"),
            preview=Preview(lambda k, p: shown.append((k, p.clone())), every=every),
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [k for k, _ in shown] == list(range(0, 20, every))
    assert all(not p.is_cuda and p.shape == (2, 3, 64, 64) for _, p in shown)
    plain = []
    sampler.sample(
        x, 20, seed=1, init=torch.zeros_like(x), mask=torch.ones(256, 256, device="cuda"),
        callback=lambda k, x, s, d: plain.append(d),
    )  # fmt: skip
    mean = torch.nn.functional.avg_pool2d(plain[0], 4).clamp(-1, 1)
    assert (shown[0][1].float() - (mean.cpu() + 1) * 127.5).abs().max() <= 0.51


def test_seeds_of_another_pass_are_other_noise():
    like = torch.empty(1, 50_000)
    streams = [SampleNoise([3], like, stream).draw() for stream in (1, 2, 4, 5, 6)]
    for i, a in enumerate(streams):
        for b in streams[i + 1 :]:
            assert abs((a * b).mean().item()) < 0.03
