import json
import math

import numpy as np
import pytest
import torch

from k_diffusion.utils.levels import VE, VP, Level
from k_diffusion.utils.scheduler import (
    SCHEDULERS,
    AlignYourStepsScheduler,
    CosineScheduler,
    CustomScheduler,
    DynamicFlowScheduler,
    ExponentialScheduler,
    FlowScheduler,
    InterpolatedCosineScheduler,
    KarrasScheduler,
    KLOptimalScheduler,
    LaplaceScheduler,
    LinearDynamicFlowScheduler,
    LinearScheduler,
    PolyexponentialScheduler,
    RectifiedScheduler,
    ScaledLinearScheduler,
    Scheduler,
    ShiftedCosineScheduler,
    SigmoidScheduler,
    SimpleScheduler,
    Spacing,
    SquaredCosScheduler,
    VPScheduler,
    ZeroTerminalScheduler,
    make_scheduler,
)  # fmt: skip

BETAS = np.linspace(1e-4, 0.02, 1000)
ALL = {
    "linear": LinearScheduler(),
    "linear, 50": LinearScheduler(timesteps=50),
    "cosine": CosineScheduler(),
    "cosine from pure noise": CosineScheduler(time_max=1.0),
    "karras": KarrasScheduler(),
    "karras, rho 3": KarrasScheduler(0.03, 14.6, rho=3.0),
    "exponential": ExponentialScheduler(0.01, 50.0),
    "rectified": RectifiedScheduler(0.03, 14.6),
    "polyexponential": PolyexponentialScheduler(),
    "polyexponential, rho 2": PolyexponentialScheduler(0.03, 14.6, rho=2.0),
    "laplace": LaplaceScheduler(),
    "laplace, wide": LaplaceScheduler(0.1, 3.0, mu=0.5, beta=2.0),
    "kl_optimal": KLOptimalScheduler(),
    "kl_optimal, sigma_data 0.5": KLOptimalScheduler(0.03, 14.6, sigma_data=0.5),
    "align_your_steps": AlignYourStepsScheduler(),
    "align_your_steps, svd": AlignYourStepsScheduler(table="svd"),
    "scaled_linear": ScaledLinearScheduler(),
    "squaredcos": SquaredCosScheduler(),
    "squaredcos, 50": SquaredCosScheduler(timesteps=50),
    "zero_terminal_snr": ZeroTerminalScheduler(),
    "zero_terminal_snr of scaled_linear": ZeroTerminalScheduler(ScaledLinearScheduler()),
    "shifted_cosine": ShiftedCosineScheduler(),
    "interpolated_cosine": InterpolatedCosineScheduler(),
    "interpolated_cosine, far": InterpolatedCosineScheduler(1024, 8, 1024, -20.0, 12.0),
    "sigmoid": SigmoidScheduler(),
    "sigmoid from pure noise": SigmoidScheduler(start=0.0, tau=0.3, time_max=1.0),
    "vp": VPScheduler(),
    "vp, constant beta": VPScheduler(beta_d=0.0, beta_min=8.0),
    "flow_dynamic": DynamicFlowScheduler(tokens=1024),
    "flow_dynamic_linear": LinearDynamicFlowScheduler(tokens=1024),
    "flow": FlowScheduler(),
    "flow, shift 3": FlowScheduler(shift=3.0),
    "betas": CustomScheduler(betas=tuple(BETAS)),
    "alphas_cumprod": CustomScheduler(alphas_cumprod=tuple(np.cumprod(1 - BETAS))),
    "sigmas": CustomScheduler(sigmas=(14.6, 5.0, 2.0, 0.3, 0.0)),
    "flow sigmas": CustomScheduler(sigmas=(1.0, 0.7, 0.2, 0.0), path_name="flow"),
    "function": CustomScheduler(function=lambda t: 0.01 * 3000**t),
    "vp function": CustomScheduler(function=lambda t: math.sin(t * math.pi / 2), path_name="vp"),
}
INFINITE = {
    "cosine from pure noise", "flow", "flow, shift 3", "flow sigmas", "vp function",
    "zero_terminal_snr", "zero_terminal_snr of scaled_linear", "sigmoid from pure noise",
    "flow_dynamic", "flow_dynamic_linear",
}  # fmt: skip


def test_every_process_is_among_the_cases():
    processes = {name for name, kind in SCHEDULERS.items() if not issubclass(kind, Spacing)}
    assert processes == {scheduler.name for scheduler in ALL.values()}
    assert all(kind.source and kind.summary() for kind in SCHEDULERS.values())


@pytest.mark.parametrize("case", ALL)
def test_time_and_level_are_inverse(case):
    scheduler = ALL[case]
    times = np.linspace(scheduler.time_min, scheduler.time_max, 203)[1:-1].tolist()
    snrs = [scheduler.level(t).half_log_snr for t in times]
    assert max(abs(scheduler.time(s) - t) for s, t in zip(snrs, times, strict=True)) <= 1e-9
    again = [scheduler.half_log_snr(scheduler.time(s)) for s in snrs]
    assert max(abs(a - s) for a, s in zip(again, snrs, strict=True)) <= 1e-9
    # A function's inverse on tensors is a table of 4097 points: see CustomScheduler.time.
    tolerance = 1e-6 if "function" in case else 1e-9
    on_tensor = scheduler.time(torch.tensor(snrs, dtype=torch.float64))
    assert max(abs(a - t) for a, t in zip(on_tensor.tolist(), times, strict=True)) <= tolerance
    snr_on_tensor = scheduler.half_log_snr(torch.tensor(times, dtype=torch.float64))
    assert (
        max(abs(a - s) for a, s in zip(snr_on_tensor.tolist(), snrs, strict=True)) <= tolerance * 10
    )


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_levels(case, steps):
    scheduler = ALL[case]
    levels = scheduler.levels(steps)
    if case == "laplace, wide":  # quantiles outside the range are laid once, at its ends
        below, above = (0.5 * math.exp(-abs(math.log(s) - 0.5) / 2) for s in (0.1, 3.0))
        even = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
        inside = int(np.sum((even > below) & (even < 1 - above)))
        assert len(levels) == inside + (2 if steps > 1 else 1) + 1
    else:
        assert len(levels) == steps + 1
    assert levels.path is scheduler.path
    top = scheduler.half_log_snr(scheduler.time_max)
    assert levels[0].half_log_snr == pytest.approx(top, rel=1e-12)
    assert (levels[0].alpha == 0) == (case in INFINITE)
    assert (levels[-1].sigma == 0) == (case != "function")
    for level in levels:
        # Near pure noise a float's sigma of the vp path holds only some digits of alpha.
        tolerance = 1e-12 + (2e-16 / level.alpha if level.alpha else 0.0)
        assert abs(scheduler.path.alpha(level.sigma) - level.alpha) <= tolerance


@pytest.mark.parametrize("case", ALL)
def test_times_outside_are_clamped_or_refused(case):
    scheduler = ALL[case]
    # sin is 1 to the last bit a little before its top: no inverse can tell these times apart.
    tolerance = 1e-7 if case == "vp function" else 1e-12
    for snr, end in ((math.inf, scheduler.time_min), (-math.inf, scheduler.time_max)):
        assert scheduler.time(snr) == pytest.approx(end, abs=tolerance)
        tensor = scheduler.time(torch.tensor([snr], dtype=torch.float64))
        assert tensor.item() == pytest.approx(end, abs=1e-12)
    with pytest.raises(ValueError, match="time 1.5 is outside"):
        scheduler.level(1.5)


def test_linear_is_ddpm():
    abar = np.cumprod(1 - BETAS)
    for i in (0, 1, 500, 998, 999):
        level = LinearScheduler().level(i / 1000)
        assert level.alpha == pytest.approx(math.sqrt(abar[i]), rel=1e-12)
        assert level.sigma == pytest.approx(math.sqrt(1 - abar[i]), rel=1e-10)
    levels = LinearScheduler().levels(4)
    expected = [LinearScheduler().level(i / 1000).sigma for i in (999, 666, 333, 0)]
    assert levels.sigmas == pytest.approx([*expected, 0.0], rel=1e-12)


def test_linear_covers_the_same_levels_with_any_number_of_timesteps():
    assert LinearScheduler(timesteps=50).levels(1)[0].alpha < 0.01
    assert LinearScheduler(timesteps=4000).levels(1)[0].alpha == pytest.approx(0.0064, rel=0.03)


def test_numbers_of_other_libraries_become_floats():
    by_tensor = KarrasScheduler(torch.tensor(0.5), np.float32(8.0))
    assert by_tensor == KarrasScheduler(0.5, 8.0)
    assert {type(level.sigma) for level in by_tensor.levels(3)} == {float}


def test_cosine_is_its_formula():
    s = 0.008

    def abar(t):
        return (
            math.cos((t + s) / (1 + s) * math.pi / 2) ** 2
            / math.cos(s / (1 + s) * math.pi / 2) ** 2
        )

    for t in (0.001, 0.1, 0.5, 0.9, 0.9946):
        level = CosineScheduler().level(t)
        assert level.alpha == pytest.approx(math.sqrt(abar(t)), rel=1e-12)
        assert level.sigma == pytest.approx(math.sqrt(1 - abar(t)), rel=1e-9)
    assert CosineScheduler(time_max=1.0).levels(3)[0] == Level(0.0, 1.0)
    assert CosineScheduler().levels(3)[-1] == Level(1.0, 0.0)
    assert 115 < CosineScheduler().levels(3)[0].ratio < 125


def test_karras_and_exponential_are_their_formulas():
    low, high, rho, n = 0.03, 14.6, 7.0, 6
    ramp = np.linspace(0, 1, n)
    expected = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    assert KarrasScheduler(low, high).levels(n).sigmas == pytest.approx([*expected, 0.0], rel=1e-12)
    expected = np.exp(np.linspace(math.log(high), math.log(low), n))
    laid = ExponentialScheduler(low, high).levels(n).sigmas
    assert laid == pytest.approx([*expected, 0.0], rel=1e-12)


def test_flow_is_exact_at_both_ends_and_shifts():
    levels = FlowScheduler(shift=3.0).levels(4)
    assert levels[0] == Level(0.0, 1.0)
    assert levels[-1] == Level(1.0, 0.0)
    assert levels.sigmas == pytest.approx([1.0, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0.0], rel=1e-15)
    assert FlowScheduler(shift=3.0).time(levels[2].half_log_snr) == pytest.approx(0.75, rel=1e-14)


def test_custom_numbers_are_laid_as_they_are():
    sigmas = (14.6, 5.0, 2.0, 0.3, 0.0)
    assert ALL["sigmas"].levels(4).sigmas == sigmas
    assert ALL["sigmas"].levels(8).sigmas[::2] == pytest.approx(sigmas, rel=1e-12)
    same = LinearScheduler().levels(9).sigmas
    for case in ("betas", "alphas_cumprod"):
        assert ALL[case].levels(9).sigmas == pytest.approx(same, rel=1e-9)


def test_open_ends_come_from_the_process():
    fitted = KarrasScheduler().within(LinearScheduler())
    levels = fitted.levels(5)
    assert levels[0].sigma == pytest.approx(LinearScheduler().levels(1)[0].ratio, rel=1e-12)
    assert levels[-2].sigma == pytest.approx(LinearScheduler().level(0.0).ratio, rel=1e-12)
    assert KarrasScheduler(sigma_max=5.0).within(LinearScheduler()).levels(3)[0].sigma == (
        pytest.approx(5.0, rel=1e-12)
    )
    assert ExponentialScheduler().within(KarrasScheduler(0.03, 14.6)) == (
        ExponentialScheduler(0.03, 14.6)
    )
    # A process without ends to give (pure noise, clean data) leaves the usual range.
    assert KarrasScheduler().within(FlowScheduler()) == KarrasScheduler()


@pytest.mark.parametrize("case", [c for c in ALL if "function" not in c])
def test_config_round_trip(case):
    config = json.loads(json.dumps(ALL[case].to_config()))
    again = make_scheduler(**config)
    assert again == ALL[case]
    assert hash(again) == hash(ALL[case])


def test_names_and_options():
    assert make_scheduler("karras", rho=5.0) == KarrasScheduler(rho=5.0)
    assert make_scheduler(FlowScheduler()) == FlowScheduler()
    with pytest.raises(ValueError, match="unknown scheduler 'karas'; did you mean 'karras'"):
        make_scheduler("karas")
    with pytest.raises(ValueError, match="'roh'; did you mean 'rho'"):
        make_scheduler("karras", roh=5.0)
    with pytest.raises(ValueError, match="function cannot be saved"):
        ALL["function"].to_config()


@pytest.mark.parametrize("steps", [0, -1, "x", 2.5, True, None])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        KarrasScheduler().levels(steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KarrasScheduler(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: KarrasScheduler(0.0, 0.5), "0 < sigma_min"),
        (lambda: LinearScheduler(beta_end=1.5), "beta .* strictly between 0 and 1"),
        (lambda: LinearScheduler(timesteps=1), "timesteps must be at least 2"),
        (lambda: LinearScheduler(beta_start=0.03), "beta_start must not exceed beta_end"),
        (lambda: KarrasScheduler(rho=0), "rho must be above 0, got 0.0"),
        (lambda: KarrasScheduler(rho=-1), "rho must be above 0"),
        (lambda: KarrasScheduler("low"), "sigma_min must be a number, got 'low'"),
        (lambda: CosineScheduler(timesteps=0), "timesteps must be a whole number of at least 1"),
        (lambda: FlowScheduler(timesteps=2.5), "timesteps must be a whole number .* got 2.5"),
        (lambda: CosineScheduler(time_max=0.0), "time_max"),
        (lambda: CosineScheduler(offset=-1.0), "offset"),
        (lambda: FlowScheduler(shift=0.0), "shift must be above 0"),
        (lambda: KarrasScheduler(rho=math.inf), "rho must be a finite number, got inf"),
        (lambda: PolyexponentialScheduler(rho=0), "rho must be above 0, got 0.0"),
        (lambda: LaplaceScheduler(beta=0), "beta must be above 0, got 0.0"),
        (lambda: LaplaceScheduler(mu=500.0), "mu 500.0 and beta 0.5 leave nothing"),
        (lambda: KLOptimalScheduler(sigma_data=-1), "sigma_data must be above 0, got -1.0"),
        (lambda: AlignYourStepsScheduler("sd51"), "table 'sd51'; did you mean 'sd15'"),
        (lambda: ScaledLinearScheduler(beta_start=-1e-3), "beta_start must be above 0, got -0.001"),
        (lambda: SquaredCosScheduler(max_beta=1), r"max_beta must lie in \(0, 1\), got 1.0"),
        (lambda: SquaredCosScheduler(offset=0), r"offset must lie in \(0, 1\), got 0.0"),
        (lambda: SquaredCosScheduler(timesteps=1), "timesteps must be at least 2, got 1"),
        (lambda: ZeroTerminalScheduler("cosine"), "CosineScheduler is none: give linear"),
        (lambda: ZeroTerminalScheduler("simple"), "SimpleScheduler, which only lays levels"),
        (lambda: ZeroTerminalScheduler(3), "process must be a Scheduler or its name, got 3"),
        (lambda: ShiftedCosineScheduler(log_snr_min=20), "log_snr_min < log_snr_max, got 20.0"),
        (lambda: ShiftedCosineScheduler(image_size=0), "image_size must be a whole number"),
        (lambda: InterpolatedCosineScheduler(noise_size_low=300), "got 300 and 256"),
        (lambda: SigmoidScheduler(start=3.0), "start must be below end, got 3.0 and 3.0"),
        (lambda: SigmoidScheduler(tau=0), "tau must be above 0, got 0.0"),
        (lambda: SigmoidScheduler(time_max=1.5), r"time_max must lie in \(0, 1\], got 1.5"),
        (lambda: SigmoidScheduler(tau=0.01), "leave the sigmoid flat in double precision"),
        (lambda: VPScheduler(beta_d=0, beta_min=0), "not both 0, got 0.0 and 0.0"),
        (lambda: VPScheduler(eps_s=0), r"eps_s must lie in \(0, 1\), got 0.0"),
        (lambda: VPScheduler(beta_d=2000), "beta_d 2000.0 and beta_min 0.1 leave alpha below"),
        (lambda: DynamicFlowScheduler(base_tokens=4096), "base_tokens and max_tokens are both"),
        (lambda: LinearDynamicFlowScheduler(1, base_shift=-9), "tokens 1 gives a shift of -9"),
        (lambda: CustomScheduler(), "exactly one .* got none"),
        (lambda: CustomScheduler(betas=(0.1, 0.2), sigmas=(1.0, 0.0)), "betas and sigmas"),
        (lambda: CustomScheduler(sigmas=(1.0,)), "at least 2 numbers"),
        (lambda: CustomScheduler(sigmas=(1.0, 2.0)), "sigmas must decrease"),
        (lambda: CustomScheduler(sigmas=(2.0, 1.0), path_name="vp"), "sigma 0 is 2.0"),
        (lambda: CustomScheduler(alphas_cumprod=(0.5, 0.9)), "must decrease"),
        (lambda: CustomScheduler(function=lambda t: 1 - t), "function must increase"),
        (lambda: CustomScheduler(function=lambda t: t, path_name="x"), "unknown path"),
        (lambda: CustomScheduler(function=5), "function must be a function of the time, got 5"),
        (lambda: CustomScheduler(function=0), "function must be a function of the time, got 0"),
        (lambda: CustomScheduler(sigmas="10"), "sigmas must be a sequence of numbers, got '10'"),
        (lambda: CustomScheduler(sigmas=["1", "0"]), "sigmas must be a sequence of numbers"),
        (lambda: CustomScheduler(betas=3.0), "betas must be a sequence of numbers, got 3.0"),
        (lambda: AlignYourStepsScheduler(["a"]), r"unknown align_your_steps table \['a'\]"),
        (lambda: make_scheduler(["a"]), r"unknown scheduler \['a'\]"),
        (lambda: KarrasScheduler(rho=1e-3), "rho 0.001 is too small: .* from 0.002 to 80.0"),
        (lambda: KarrasScheduler(sigma_min=1e-9, rho=0.025), "rho 0.025 is too small"),
        (lambda: KarrasScheduler(rho=1e9), r"rho 1e\+09 leaves .* too few digits: .* exponential"),
        (
            lambda: FlowScheduler(shift=1e17).levels(5),
            "levels 0 and 1 share sigma = 1.0 on the flow",
        ),
        (lambda: SimpleScheduler(FlowScheduler(1e17)).levels(5), "levels 0 and 1 share sigma"),
        (lambda: KarrasScheduler(1.0, 1e20).levels(9).on(VP), "levels 0 and 1 share sigma .* vp"),
    ],
)
def test_bad_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [KarrasScheduler, ExponentialScheduler, KLOptimalScheduler])
def test_a_range_s_ends_are_exact(kind):
    """To the last digit, for rules that would lose some: 80 came out as 80.00000000000004, say."""
    made = [kind(0.002, 80.0), kind(0.03, 14.6)]
    if kind is KarrasScheduler:
        made += [kind(rho=rho) for rho in (0.02, 1e4, 1e6)]
    for scheduler in made:
        low, high = scheduler.sigma_min or 0.002, scheduler.sigma_max or 80.0
        assert scheduler.levels(7).sigmas[0] == high
        assert scheduler.levels(7).sigmas[-2:] == (low, 0.0)
        assert scheduler.levels(2).sigmas == (high, low, 0.0)
        assert scheduler.levels(1).sigmas == (high, 0.0)


def test_a_scheduler_of_one_s_own():
    class Quadratic(Scheduler):
        path = VE

        def half_log_snr(self, time):
            return -math.log(0.01 + time**2)

        def time(self, half_log_snr):
            return math.sqrt(max(math.exp(-half_log_snr) - 0.01, 0.0))

    levels = Quadratic().levels(4)
    assert levels.sigmas == pytest.approx([1.01, 0.5725, 0.26, 0.0725, 0.01])
    with pytest.raises(ValueError, match="Quadratic cannot be saved"):
        Quadratic().to_config()
