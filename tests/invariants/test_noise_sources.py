"""What every stochastic solver must do with every source of noise."""

import gc

import pytest
import torch
from host import levels_between
from watch import WAITS, Watch

from k_diffusion.sampling import (
    FLOW,
    SOLVERS,
    Churn,
    KSampler,
    PathNoise,
    Run,
    SampleNoise,
    make_plan,
)
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler

STOCHASTIC = sorted(name for name, solver in SOLVERS.items() if solver.stochastic)


def denoise(x, sigma):
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) / (1 + 0.1 * sigma)


def model_for(name):
    if SOLVERS[name].outputs == 1:
        return denoise
    return lambda x, sigma: (denoise(x, sigma), 0.9 * denoise(x, sigma))


def noise_of_interval(shape):
    """A caller's sampler whose noise depends on the interval alone."""

    def sampler(sigma, sigma_next):
        sampler.asked.append((sigma, sigma_next))
        generator = torch.Generator().manual_seed(hash((sigma, sigma_next)) % 2**31)
        return torch.randn(shape, generator=generator)

    sampler.asked = []
    return sampler


@pytest.mark.parametrize(("device", "steps"), [("cpu", 8), ("cpu", 40), ("meta", 6)])
@pytest.mark.parametrize("churn", [None, Churn(s_churn=3.0)])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_the_path_holds_little_and_waits_for_nothing(method, device, churn, steps, warm):
    """With the path's own tensors at most 24 of the state's size, however many steps."""
    if churn is not None and SOLVERS[method].predictor:
        pytest.skip("takes no churn")
    for scheduler in (KarrasScheduler(), FlowScheduler()):
        plan = make_plan(method, scheduler.levels(steps), churn=churn)
        x = torch.empty(2, 3, 8, 8, device=device)
        if device == "cpu":
            x.normal_()
        gc.disable()
        try:
            with Watch(x.numel(), device) as watch:
                run = Run(plan, x, PathNoise([1, 2], x))
                watch.track(x)
                del x
                first = len(watch.names)
                while not run.done:
                    run.advance(*(torch.ones_like(run.x) for _ in range(plan.outputs)))
                    first = len(watch.names) if run.k == 1 else first
        finally:
            gc.enable()
        assert [n for n in watch.names[first:] if any(f"aten::{w}" in n for w in WAITS)] == []
        assert watch.peak <= 24
        assert watch.peak <= plan.live + 16


@pytest.mark.parametrize("source", [SampleNoise, PathNoise])
@pytest.mark.parametrize("method", STOCHASTIC)
def test_a_sample_s_noise_is_its_own(method, source):
    """Alone, in another batch, in another order: bitwise the same noise through the whole plan."""
    plan = make_plan(method, levels_between(6, "uneven", FLOW))

    def noise(seeds):
        like = torch.empty(len(seeds), 3, 5)
        made = source(seeds, like)
        return torch.stack([made.draw(draw.interval) for draw in plan.draws], 1)

    whole = noise([11, 12, 13])
    assert torch.equal(whole[1:2], noise([12]))
    assert torch.equal(whole, noise([13, 12, 11]).flip(0))
    assert torch.equal(whole[:2], noise([11, 12, 99, 13])[:2])
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_a_caller_s_noise_sampler_decides_the_sample(name):
    """Through KSampler: asked in the solver's order for its intervals, its noise is what counts;
    fresh noise comes from the seeds."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    churn = None if SOLVERS[name].predictor else Churn(s_churn=2.0)
    for churned in (None, churn):
        sampler = KSampler(model_for(name), "karras", name, churn=churned)
        plan = sampler.plan(6, intervals=True)
        expected = [(d.interval.start.sigma, d.interval.end.sigma)
                    for d in plan.draws if not d.interval.fresh]  # fmt: skip
        own = noise_of_interval(x.shape)
        first = sampler.sample(x, 6, seed=3, noise=own)
        assert own.asked == expected
        assert torch.equal(first, sampler.sample(x, 6, seed=3, noise=noise_of_interval(x.shape)))
        if expected:
            zero = sampler.sample(x, 6, seed=3, noise=lambda s, t: torch.zeros_like(x))
            assert (first - zero).abs().max() > 1e-3
        if any(d.interval.fresh for d in plan.draws):
            other = sampler.sample(x, 6, seed=4, noise=noise_of_interval(x.shape))
            assert (first - other).abs().max() > 1e-3
