"""What the engine must do for every solver: agree with the plan, wait for nothing, hold little."""

import gc
import itertools
import json

import numpy as np
import pytest
import torch
from host import execute, levels_between
from watch import WAITS, Watch

from k_diffusion.sampling import (
    FLOW,
    SOLVERS,
    CallerNoise,
    Churn,
    KSampler,
    Run,
    SampleNoise,
    make_plan,
)  # fmt: skip
from k_diffusion.sampling.plan_file import load_plan, plan_from_dict, plan_to_dict, save_plan
from k_diffusion.utils.levels import PATHS
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler

STEPS = 8


def denoise(x, sigma):
    """Smooth, nonlinear, of one sample at a time."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) / (1 + 0.1 * sigma)


def advance(run, denoise=denoise):
    """Answers a query; a solver of two outputs is given two that differ."""
    if run.plan.outputs == 1:
        run.advance(denoise(run.x, run.sigma))
    else:
        run.advance(denoise(run.x, run.sigma), 0.9 * denoise(run.x, run.sigma))


def model_for(name):
    """The denoiser that `advance` asks, as a model."""
    if SOLVERS[name].outputs == 1:
        return denoise
    return lambda x, sigma: (denoise(x, sigma), 0.9 * denoise(x, sigma))


def start(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 4, 5, generator=generator, dtype=torch.float64).to(dtype)


def test_engine_equals_the_plan_executed_plainly(name):
    plan = make_plan(name, levels_between(STEPS, "uneven", FLOW))
    x = start()
    noise = SampleNoise([1, 2, 3], x)
    drawn = [noise.draw() for _ in plan.draws]

    def answers(v, level):
        sigma = torch.full((3,), level.sigma, dtype=torch.float64)
        answer = model_for(name)(torch.from_numpy(v), sigma)
        return tuple(d.numpy() for d in answer) if plan.outputs == 2 else answer.numpy()

    expected = execute(plan, x.numpy(), answers, lambda k: drawn[k].numpy())
    run = Run(plan, x, SampleNoise([1, 2, 3], x))
    while not run.done:
        advance(run)
    assert np.abs(run.result.numpy() - expected).max() <= 1e-12


def test_stepwise_equals_the_loop_bitwise(name):
    x = start(dtype=torch.float32)
    sampler = KSampler(model_for(name), "karras", name)
    whole = sampler.sample(x, STEPS, seed=5)
    plan = sampler.plan(STEPS)
    state = x * plan.levels[0].sigma
    run = Run(plan, state, SampleNoise([5, 6, 7], state))
    while not run.done:
        advance(run)
    assert torch.equal(whole, run.result)


def test_a_sample_does_not_depend_on_its_neighbours(name):
    x = start(dtype=torch.float32)
    sampler = KSampler(model_for(name), "karras", name)
    whole = sampler.sample(x, STEPS, seed=[11, 12, 13])
    alone = torch.cat([sampler.sample(x[i : i + 1], STEPS, seed=11 + i) for i in range(3)])
    turned = sampler.sample(x.flip(0), STEPS, seed=[13, 12, 11]).flip(0)
    assert (whole - alone).abs().max() <= 1e-6
    assert (whole - turned).abs().max() <= 1e-6
    assert torch.equal(whole, sampler.sample(x, STEPS, seed=[11, 12, 13]))
    if SOLVERS[name].stochastic:
        assert (whole - sampler.sample(x, STEPS, seed=[11, 12, 14])).abs().max() > 1e-3


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("churn", [None, Churn(s_churn=3.0)])
def test_no_wait_and_no_more_live_tensors_than_declared(name, device, churn, warm):
    """No host-device copy and no read of the device after the first step; memory as declared."""
    if churn is not None and SOLVERS[name].predictor:
        pytest.skip("takes no churn")
    plan = make_plan(name, KarrasScheduler().levels(STEPS), churn=churn)
    x = torch.empty(2, 3, 16, 16, device=device)
    if device == "cpu":
        x.normal_()
    answer_op = "aten::ones_like"
    gc.disable()  # what is freed must be freed by its last reference, not by the collector
    try:
        with Watch(x.numel(), device) as watch:
            run = Run(plan, x, SampleNoise([1, 2], x))
            watch.track(x)
            del x
            first = len(watch.names)
            while not run.done:
                if plan.outputs == 1:
                    run.advance(torch.ones_like(run.x))
                else:
                    run.advance(torch.ones_like(run.x), torch.ones_like(run.x))
                if run.k == 1:
                    first = len(watch.names)
    finally:
        gc.enable()
    waits = [n for n in watch.names[first:] if any(f"aten::{w}" in n for w in WAITS)]
    assert waits == []
    assert watch.names.count(answer_op) == plan.evaluations * plan.outputs
    assert watch.peak <= plan.live
    assert run.result.shape == (2, 3, 16, 16)


LIVE = {
    "ddim": 3, "euler": 3, "dpmpp_2m": 4, "heun": 5, "dpmpp_3m_sde": 6, "er_sde": 6, "restart": 6,
    "sa_solver": 7, "sa_solver_pece": 6, "seeds_2": 5, "seeds_3": 6, "dpmpp_2m_cfg_pp": 5,
}  # fmt: skip


def test_live_tensors_stay_few(name):
    """Declared memory does not grow with the steps, and is what the design counted."""
    few, many = (make_plan(name, KarrasScheduler().levels(n)).live for n in (12, 40))
    assert few == many <= 8
    if name in LIVE:
        assert many == LIVE[name]


def test_save_and_load(name, tmp_path):
    plan = make_plan(name, FlowScheduler().levels(5))
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    assert plan_to_dict(again) == plan_to_dict(plan)
    assert str(again) == str(plan)
    x = start()
    ends = []
    for p in (plan, again):
        run = Run(p, x, SampleNoise([1, 2, 3], x))
        while not run.done:
            advance(run)
        ends.append(run.result)
    assert torch.equal(*ends)


def test_damaged_plans_are_refused(tmp_path):
    good = plan_to_dict(make_plan("heun", KarrasScheduler().levels(3), churn=Churn(1.0)))
    assert plan_to_dict(plan_from_dict(good)) == good
    text = json.dumps(good)
    for old, new, message in [
        ('"k_diffusion plan"', '"other"', "not a plan"),
        ('"version": 1', '"version": 9', "version 9"),
        ('["d1", ', '["d7", ', "uses d7"),
        ('"state": "x2"', '"state": "x9"', "uses x9"),
        ('"levels": ', '"level": ', "levels"),
        ('"outputs": 1', '"outputs": 2', "1 answers, not 2"),
        (f'"result": "{good["result"]}"', '"result": "x77"', "uses x77"),
        ('["d1", ', '["d1", NaN, ', "damaged"),
        ('[["x1", ', '[["x1", 1e999], ["x1", ', "coefficient inf"),
    ]:
        assert old in text
        path = tmp_path / "bad.json"
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
            load_plan(path)
    (tmp_path / "cut.json").write_text(text[:200])
    with pytest.raises(ValueError, match="cut.json"):
        load_plan(tmp_path / "cut.json")


def test_a_caller_s_noise_sampler_is_asked_once_per_interval_in_order():
    levels = KarrasScheduler().levels(4)
    asked = []

    def sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.zeros(3, 2, 4, 5, dtype=torch.float64)

    run = Run(
        make_plan("dpmpp_sde", levels, intervals=True), start(), CallerNoise(sampler, start())
    )
    while not run.done:
        run.advance(denoise(run.x, run.sigma))
    s = levels.sigmas
    middle = [(a * b) ** 0.5 for a, b in itertools.pairwise(s)]
    expected = [p for k in range(3) for p in ((s[k], middle[k]), (s[k], s[k + 1]))]
    assert np.abs(np.array(asked) - np.array(expected)).max() <= 1e-12


@pytest.mark.parametrize("network", [torch.bfloat16, torch.float16], ids=str)
def test_a_coarse_network_s_error_is_all_there_is(name, network):
    """With answers rounded to half precision, a float32 run is as far from the exact one as a
    float64 run is: the arithmetic between the calls adds nothing."""

    def exact(x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + 0.1 * torch.tanh(x)

    def rounded(x, sigma):
        return exact(x.double(), sigma.double()).to(network)

    def run(model, dtype, state):
        states = []
        noise = SampleNoise(range(64), fine)
        run = Run(plan, state.to(dtype), Cast(noise, torch.promote_types(dtype, torch.float32)))
        while not run.done:
            states.append(run.x.dtype)
            run.advance(*[model(run.x, run.sigma)] * plan.outputs)
        assert set(states) == {run.result.dtype}
        return run.result.double()

    class Cast:
        """The same numbers for both runs."""

        def __init__(self, noise, dtype):
            self.noise, self.dtype = noise, dtype

        def draw(self, interval):
            return self.noise.draw(interval).to(self.dtype)

    plan = make_plan(name, KarrasScheduler(0.02, 20.0).levels(30))
    fine = 20 * torch.randn(64, 2, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    truth = run(exact, torch.float64, fine)
    wide = (run(rounded, torch.float64, fine) - truth).square().mean().sqrt()
    for given in (torch.float32, network):  # a run given a half-precision x is a float32 one too
        start = fine.to(given).double()
        reference = truth if given is torch.float32 else run(exact, torch.float64, start)
        error = (run(rounded, given, start) - reference).square().mean().sqrt()
        assert error <= 1.1 * wide


def test_assigning_x(name):
    """At the start of a step an edit stays; where it would be undone it is refused."""
    plan = make_plan(name, levels_between(5, "even"))
    plain = None
    for edited in range(-1, plan.evaluations):
        run = Run(plan, start(), SampleNoise([1, 2, 3], start()))
        refused = False
        while not run.done:
            if run.k == edited:
                if SOLVERS[name].predictor or not plan.steps[run.k].start:
                    with pytest.raises(ValueError, match=f"{name}"):
                        run.x = run.x + 5
                    refused = True
                else:
                    run.x = run.x + 5
                    with pytest.raises(ValueError, match="x has shape"):
                        run.x = torch.zeros(1)
            advance(run)
        plain = run.result if plain is None else plain
        moved = (run.result - plain).abs().max() > 1e-3
        assert moved == (edited >= 0 and not refused)


def test_assigned_values_keep_the_state_s_dtype():
    run = Run(make_plan("euler", KarrasScheduler().levels(2)), start(dtype=torch.float32))
    run.x = run.x.double()
    assert run.x.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS.values(), ids=str)
def test_the_engine_agrees_with_the_generator_itself(name, path):
    """The solver's own code, run on arrays instead of symbols: neither tracing nor engine in it."""
    levels = levels_between(7, "uneven", path)
    x = start()
    drawn = []

    class Source:
        def draw(self, interval):
            drawn.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))
            return drawn[-1]

    generator = torch.Generator().manual_seed(0)
    plan = make_plan(name, levels, intervals=True)
    run = Run(plan, x, Source())
    while not run.done:
        advance(run)
    given = iter(drawn)
    solving = SOLVERS[name].function(x, levels, lambda s, t, fresh=False: next(given))
    answer, asked = None, []
    while True:
        try:
            state, level = solving.send(answer)
        except StopIteration as stop:
            expected = stop.value
            break
        asked.append(level)
        answer = model_for(name)(state, torch.full((3,), level.sigma, dtype=x.dtype))
    assert asked == [step.level for step in plan.steps]
    assert (run.result - expected).abs().max() <= 1e-12


def test_runs_on_the_meta_device(name):
    x = torch.empty(2, 3, 8, 8, device="meta")
    result = KSampler(model_for(name), "karras", name).sample(x, 5)
    assert result.shape == x.shape
    assert result.device.type == "meta"


def test_advance_refuses_what_it_cannot_take():
    x = start()
    run = Run(make_plan("euler", KarrasScheduler().levels(1)), x)
    with pytest.raises(RuntimeError, match="answered 0 of 1"):
        _ = run.result
    with pytest.raises(ValueError, match=r"returned shape \(3, 2, 4\)"):
        run.advance(x[..., 0])
    with pytest.raises(ValueError, match="takes 1 answers"):
        run.advance(x, x)
    run.advance(x)
    with pytest.raises(RuntimeError, match="done"):
        run.advance(x)
    with pytest.raises(ValueError, match="noise source"):
        Run(make_plan("euler_ancestral", KarrasScheduler().levels(2)), x)
    with pytest.raises(TypeError, match="must return a tensor, .* got tuple"):
        Run(make_plan("euler", KarrasScheduler().levels(1)), x).advance((x,))
    for answer, message in [
        (x.long(), "returned torch.int64"),
        (x.to(torch.complex64), "returned torch.complex64"),
    ]:
        with pytest.raises(TypeError, match=message):
            Run(make_plan("euler", KarrasScheduler().levels(1)), x).advance(answer)
    with pytest.raises(ValueError, match="on meta for x on cpu"):
        Run(make_plan("euler", KarrasScheduler().levels(1)), x).advance(x.to("meta"))
    with pytest.raises(TypeError, match="floating-point"):
        Run(make_plan("euler", KarrasScheduler().levels(1)), x.long())
    with pytest.raises(ValueError, match="at least one sample"):
        Run(make_plan("euler", KarrasScheduler().levels(1)), x[:0])
