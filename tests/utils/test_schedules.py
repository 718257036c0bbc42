"""Each schedule against its published formula, and the spacings against published timesteps."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from k_diffusion.utils.levels import CLEAN, FLOW, VE, VP, Level
from k_diffusion.utils.scheduler import (
    ALIGN_YOUR_STEPS,
    SCHEDULERS,
    AlignYourStepsScheduler,
    BetaScheduler,
    CosineScheduler,
    CustomScheduler,
    DDIMUniformScheduler,
    DynamicFlowScheduler,
    FlowScheduler,
    InterpolatedCosineScheduler,
    KarrasScheduler,
    KLOptimalScheduler,
    LaplaceScheduler,
    LeadingScheduler,
    LinearDynamicFlowScheduler,
    LinearQuadraticScheduler,
    LinearScheduler,
    LinspaceScheduler,
    NormalScheduler,
    PolyexponentialScheduler,
    RectifiedScheduler,
    ScaledLinearScheduler,
    SGMUniformScheduler,
    ShiftedCosineScheduler,
    SigmoidScheduler,
    SimpleScheduler,
    Spacing,
    SquaredCosScheduler,
    TrailingScheduler,
    VPScheduler,
    ZeroTerminalScheduler,
    make_scheduler,
)

LOW, HIGH = 0.03, 14.6
TIMES = (0.002, 0.1, 0.35, 0.5, 0.8, 0.99)
SPACINGS = {name: kind for name, kind in SCHEDULERS.items() if issubclass(kind, Spacing)}


def close(levels, sigmas, rel=1e-12):
    assert len(levels) == len(sigmas)
    assert list(levels.sigmas) == pytest.approx(list(sigmas), rel=rel)
    assert levels[-1] == CLEAN


def snr_of(scheduler, time):
    level = scheduler.level(time)
    return math.log(level.alpha**2 / level.sigma**2)


# ---------------------------------------------------------------- sigma between two ends


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_polyexponential(n):
    ramp = np.linspace(1, 0, n) ** 2.5
    expected = np.exp(ramp * (math.log(HIGH) - math.log(LOW)) + math.log(LOW))
    close(PolyexponentialScheduler(LOW, HIGH, rho=2.5).levels(n), [*expected, 0.0])


def test_rectified_is_even_in_flow_coordinates():
    ends = LOW / (1 + LOW), HIGH / (1 + HIGH)
    even = np.linspace(ends[1], ends[0], 9)
    close(RectifiedScheduler(LOW, HIGH).levels(9), [*(even / (1 - even)), 0.0])


def test_polyexponential_of_rho_1_is_exponential():
    exponential = make_scheduler("exponential", sigma_min=LOW, sigma_max=HIGH).levels(9)
    close(PolyexponentialScheduler(LOW, HIGH).levels(9), exponential.sigmas)


@pytest.mark.parametrize("n", [2, 7, 20])
def test_laplace_is_the_quantiles_of_its_distribution(n):
    shares = np.linspace(1, 0, n)[1:-1]
    inner = np.exp(stats.laplace.ppf(shares, loc=0.2, scale=0.4))
    close(LaplaceScheduler(LOW, HIGH, mu=0.2, beta=0.4).levels(n), [HIGH, *inner, LOW, 0.0], 1e-11)


def test_laplace_lays_what_lies_beyond_the_range_once():
    levels = LaplaceScheduler(0.5, 2.0).levels(100)
    quantiles = np.exp(stats.laplace.ppf(np.linspace(0, 1, 100), scale=0.5))
    inside = [q for q in quantiles if 0.5 < q < 2.0]
    close(levels, [2.0, *inside[::-1], 0.5, 0.0], 1e-11)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_kl_optimal(n):
    shares = np.linspace(0, 1, n)
    angles = shares * math.atan(LOW) + (1 - shares) * math.atan(HIGH)
    close(KLOptimalScheduler(LOW, HIGH).levels(n), [*np.tan(angles), 0.0], 1e-11)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_kl_optimal_is_optimal(sigma_data):
    """No inner level can be moved for Euler's method to end nearer to the true spread."""
    sigmas = list(KLOptimalScheduler(0.05, 10.0, sigma_data=sigma_data).levels(7).sigmas[:-1])

    def shrink(sigmas):  # Euler's factor on N(0, c²): the product of 1 + (t - s) s / (c² + s²)
        c = sigma_data**2
        return math.prod(1 + (t - s) * s / (c + s * s) for s, t in itertools.pairwise(sigmas))

    true = math.sqrt((sigma_data**2 + 0.05**2) / (sigma_data**2 + 10.0**2))
    least = abs(shrink(sigmas) - true)
    assert least > 1e-3  # there is an error to be made less
    for i in range(1, 6):
        for factor in (0.98, 1.02):
            moved = [*sigmas[:i], sigmas[i] * factor, *sigmas[i + 1 :]]
            assert abs(shrink(moved) - true) > least


@pytest.mark.parametrize("table", ALIGN_YOUR_STEPS)
def test_align_your_steps(table):
    sigmas = ALIGN_YOUR_STEPS[table]
    scheduler = AlignYourStepsScheduler(table)
    close(scheduler.levels(10), [*sigmas[:-1], 0.0], 1e-14)
    for steps in (1, 3, 20, 33):
        marks = np.linspace(0, 10, steps + 1)
        expected = np.exp(np.interp(marks, range(11), np.log(sigmas)))
        close(scheduler.levels(steps), [*expected[:-1], 0.0])


# ---------------------------------------------------------------- processes


def test_scaled_linear_is_stable_diffusion():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    scheduler = ScaledLinearScheduler()
    for i in (0, 1, 500, 999):
        assert scheduler.level(i / 1000).ratio == pytest.approx(
            math.sqrt((1 - abar[i]) / abar[i]), rel=1e-10
        )
    # The range that is known of it, and the timesteps that Sabour et al. publish beside sigmas.
    assert scheduler.level(0.0).ratio == pytest.approx(0.0292, abs=5e-5)
    assert scheduler.level(0.999).ratio == pytest.approx(14.6146, abs=5e-5)
    published = {
        "sd15": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    }
    for table, timesteps in published.items():
        found = [1000 * scheduler.time(-math.log(s)) for s in ALIGN_YOUR_STEPS[table][:-1]]
        assert max(abs(a - b) for a, b in zip(found, timesteps, strict=True)) < 1.1


def test_scaled_linear_covers_the_same_levels_with_any_number_of_timesteps():
    assert ScaledLinearScheduler(timesteps=4000).level(3999 / 4000).ratio == pytest.approx(
        14.6146, rel=0.01
    )


def test_squaredcos():
    n, s = 100, 0.008
    f = np.cos((np.arange(n + 1) / n + s) / (1 + s) * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.9))
    scheduler = SquaredCosScheduler(timesteps=n, max_beta=0.9)
    for i in (0, 1, 50, 98, 99):
        assert scheduler.level(i / n).alpha == pytest.approx(math.sqrt(abar[i]), rel=1e-12)
    # Where no beta is limited it is the continuous cosine, one timestep on.
    cosine = CosineScheduler(time_max=1.0)
    assert scheduler.level(0.5).ratio == pytest.approx(cosine.level(0.51).ratio, rel=1e-10)


@pytest.mark.parametrize("over", [LinearScheduler(), ScaledLinearScheduler(timesteps=200)])
def test_zero_terminal_snr(over):
    n = over.timesteps
    scheduler = ZeroTerminalScheduler(over)
    root = np.array([over.level(i / n).alpha for i in range(n)])
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    for i in (0, 1, n // 2, n - 2):
        assert scheduler.level(i / n).alpha == pytest.approx(expected[i], rel=1e-9)
    assert scheduler.levels(5)[0] == Level(0.0, 1.0)
    assert scheduler.level(0.0).ratio == pytest.approx(over.level(0.0).ratio, rel=1e-12)
    assert ZeroTerminalScheduler().within(over) == scheduler
    assert ZeroTerminalScheduler().within(CosineScheduler()) == ZeroTerminalScheduler()
    assert ZeroTerminalScheduler(over).within(SquaredCosScheduler()) == scheduler


def test_zero_terminal_snr_of_your_own_betas():
    custom = CustomScheduler(betas=(0.1, 0.2, 0.3))
    assert ZeroTerminalScheduler(custom).levels(2)[0] == Level(0.0, 1.0)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_vp_is_song_s(n):
    t = np.linspace(1, 1e-3, n)
    sigmas = np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    levels = VPScheduler().levels(n)
    assert levels.path is VP
    close(levels.on(VE), [*sigmas, 0.0], 1e-10)


@pytest.mark.parametrize("time", TIMES)
def test_cosines_of_other_sizes(time):
    def shifted(t, noise, image, low=-15.0, high=15.0):
        shift = 2 * math.log(noise / image)
        first = math.atan(math.exp(-0.5 * (high - shift)))
        last = math.atan(math.exp(-0.5 * (low - shift)))
        return -2 * math.log(math.tan(first + t * (last - first))) + shift

    found = snr_of(ShiftedCosineScheduler(image_size=512), time)
    assert found == pytest.approx(shifted(time, 64, 512), abs=1e-9)
    mixed = time * shifted(time, 32, 512) + (1 - time) * shifted(time, 256, 512)
    assert snr_of(InterpolatedCosineScheduler(), time) == pytest.approx(mixed, abs=1e-9)


@pytest.mark.parametrize(
    "kind", [ShiftedCosineScheduler, InterpolatedCosineScheduler], ids=lambda kind: kind.name
)
def test_cosines_keep_the_ends_of_their_range(kind):
    scheduler = kind(log_snr_min=-12.0, log_snr_max=10.0)
    assert snr_of(scheduler, 1.0) == pytest.approx(-12.0, abs=1e-9)
    assert snr_of(scheduler, 0.0) == pytest.approx(10.0, abs=1e-9)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 0.9), (0, 3, 0.3), (-3, 3, 1.1)])
def test_sigmoid(time, start, end, tau):
    def v(t):
        return 1 / (1 + math.exp(-(t * (end - start) + start) / tau))

    gamma = (v(1) - v(time)) / (v(1) - v(0))
    level = SigmoidScheduler(start=start, end=end, tau=tau).level(time)
    assert level.alpha**2 == pytest.approx(gamma, rel=1e-10)
    assert level.sigma**2 == pytest.approx(1 - gamma, rel=1e-10)


def test_sigmoid_begins_where_a_noise_predicting_network_can():
    assert 120 < SigmoidScheduler().levels(3)[0].ratio < 160
    assert SigmoidScheduler(time_max=1.0).levels(3)[0] == Level(0.0, 1.0)
    assert SigmoidScheduler().levels(3)[-1] == CLEAN


def test_flow_s_dynamic_shift():
    even = np.linspace(1, 0, 9)

    def check(scheduler, shift):
        close(scheduler.levels(8), shift * even / (1 + (shift - 1) * even), 1e-14)

    # Flux at 256, 4096 and (256 + 4096) / 2 tokens: exp(mu) / (exp(mu) + 1 / t - 1).
    check(DynamicFlowScheduler(tokens=256), math.exp(0.5))
    check(DynamicFlowScheduler(), math.exp(1.15))
    check(DynamicFlowScheduler(tokens=2176), math.exp(0.825))
    check(LinearDynamicFlowScheduler(tokens=2176), 0.825)
    check(LinearDynamicFlowScheduler(tokens=256, base_shift=2.0), 2.0)
    assert DynamicFlowScheduler().time(0.0) == FlowScheduler().time(0.0) == 0.5


# ---------------------------------------------------------------- spacings


def timesteps_of(scheduler, steps, over):
    """The timesteps, fractional, whose levels a spacing lays."""
    levels = scheduler.levels(steps)
    assert levels[-1] == CLEAN
    return [over.timesteps * over.time(level.half_log_snr) for level in levels[:-1]]


PUBLISHED = {
    (SimpleScheduler(), 7): [999, 857, 714, 571, 428, 285, 142],
    (SimpleScheduler(), 1): [999],
    (NormalScheduler(), 7): [999, 832.5, 666, 499.5, 333, 166.5, 0],
    (NormalScheduler(), 1): [999],
    (SGMUniformScheduler(), 4): [999, 749.25, 499.5, 249.75],
    (SGMUniformScheduler(), 1): [999],
    (DDIMUniformScheduler(), 5): [801, 601, 401, 201, 1],
    (DDIMUniformScheduler(), 7): [995, 853, 711, 569, 427, 285, 143, 1],
    (DDIMUniformScheduler(), 1): [1],
    (LeadingScheduler(), 4): [750, 500, 250, 0],
    (LeadingScheduler(steps_offset=1), 50): list(range(981, 0, -20)),
    (LeadingScheduler(), 7): [852, 710, 568, 426, 284, 142, 0],
    (TrailingScheduler(), 10): [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
    (TrailingScheduler(), 7): [999, 856, 713, 570, 428, 285, 142],
    (LinspaceScheduler(), 7): [999, 832, 666, 500, 333, 166, 0],
    (LinspaceScheduler(), 10): [999, 888, 777, 666, 555, 444, 333, 222, 111, 0],
}


@pytest.mark.parametrize(("scheduler", "steps"), PUBLISHED, ids=str)
@pytest.mark.parametrize("over", [LinearScheduler(), ScaledLinearScheduler()])
def test_spacings_pick_the_published_timesteps(scheduler, steps, over):
    found = timesteps_of(scheduler.within(over), steps, over)
    assert found == pytest.approx(PUBLISHED[scheduler, steps], abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 150, 999])
def test_spacings_against_numpy(steps):
    over = LinearScheduler()

    def check(kind, timesteps):
        assert timesteps_of(kind().within(over), steps, over) == pytest.approx(timesteps, abs=1e-9)

    quantiles = np.rint(stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * 999)
    check(BetaScheduler, list(dict.fromkeys(quantiles)))
    check(TrailingScheduler, np.round(1000 - np.arange(steps) * (1000 / steps)) - 1)
    check(LeadingScheduler, np.arange(steps)[::-1] * (1000 // steps))
    check(SimpleScheduler, 999 - np.floor(np.arange(steps) * (1000 / steps)))
    if steps > 1:
        check(LinspaceScheduler, np.round(np.linspace(0, 999, steps))[::-1])


def test_beta_of_other_shapes_moves_the_levels():
    over = LinearScheduler()
    for a, b in ((0.6, 0.6), (0.4, 2.0), (3.0, 0.7)):
        expected = np.rint(stats.beta.ppf(1 - np.arange(12) / 12, a, b) * 999)
        found = timesteps_of(BetaScheduler(over, alpha=a, beta=b), 12, over)
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize(
    "over",
    [LinearScheduler(), LinearScheduler(timesteps=1500), FlowScheduler(shift=3.0),
     KarrasScheduler(), CosineScheduler(), VPScheduler()],
    ids=lambda over: f"{over.name} {over.timesteps}",
)  # fmt: skip
def test_spacings_lay_levels_over_any_process(name, steps, over):
    scheduler = SPACINGS[name]().within(over)
    levels = scheduler.levels(steps)
    assert levels.path is over.path
    assert levels[-1] == CLEAN
    if name not in ("beta", "ddim_uniform"):  # Levels itself sees that none is there twice
        assert len(levels) == steps + 1
    top = over.half_log_snr(over.time_max)
    if name not in ("ddim_uniform", "leading"):
        assert levels[0].half_log_snr == pytest.approx(top, rel=1e-12)
    elif steps > 1:
        assert levels[0].half_log_snr >= top


def test_repeated_timesteps_are_laid_once():
    over = LinearScheduler(timesteps=100)
    assert len(SimpleScheduler(over).levels(250)) == 100 + 1
    assert len(DDIMUniformScheduler(over).levels(250)) == 99 + 1
    picked = stats.beta.ppf(1 - np.arange(250) / 250, 0.6, 0.6)
    assert len(BetaScheduler(over).levels(250)) == len(set(np.rint(picked * 99))) + 1
    assert len(NormalScheduler(over).levels(250)) == 250 + 1  # between timesteps there is room


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_more_steps_than_timesteps_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot lay 101 steps over the 100 timesteps of"):
        make_scheduler(name, process=LinearScheduler(timesteps=100)).levels(101)


def test_a_spacing_of_a_flow_keeps_its_shift():
    """As if the shifted levels at sigma 1/N ... 1 were the table that the timesteps count."""
    shifted = [3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25)]
    close(SimpleScheduler(FlowScheduler(3.0)).levels(4), [*shifted, 0.0], 1e-14)
    clean_most = NormalScheduler(FlowScheduler()).levels(3)
    assert clean_most.sigmas == pytest.approx([1.0, 0.5005, 0.001, 0.0], rel=1e-12)


def test_a_spacing_takes_the_model_s_process_and_no_spacing():
    bare = TrailingScheduler()
    assert bare.own_process is None
    assert bare.within(CosineScheduler()).process == CosineScheduler()
    assert bare.within(SimpleScheduler(VPScheduler())).process == VPScheduler()
    assert bare.within(SimpleScheduler()) == bare
    assert TrailingScheduler(VPScheduler()).within(CosineScheduler()).process == VPScheduler()
    assert TrailingScheduler(process="vp") == TrailingScheduler(VPScheduler())
    assert LinearScheduler().own_process == LinearScheduler()
    with pytest.raises(ValueError, match="process cannot be SimpleScheduler, which only lays"):
        TrailingScheduler(process=SimpleScheduler())


def test_linear_quadratic_is_a_line_and_a_parabola():
    """The parabola leaves the line's end with its slope, and ends at 1."""
    for steps, even, threshold in ((40, 20, 0.025), (7, 3, 0.025), (9, 2, 0.1)):
        rows = [[even**2, even, 1], [2 * even, 1, 0], [steps**2, steps, 1]]
        bend = np.linalg.solve(rows, [threshold, threshold / even, 1])
        gone = [
            threshold * i / even if i <= even else np.polyval(bend, i) for i in range(steps + 1)
        ]
        linear_steps = None if even == steps // 2 else even
        scheduler = LinearQuadraticScheduler(threshold_noise=threshold, linear_steps=linear_steps)
        levels = scheduler.levels(steps)
        assert levels.path is FLOW
        assert levels[0] == Level(0.0, 1.0)
        assert levels[-1] == CLEAN
        assert list(levels.sigmas) == pytest.approx(1 - np.array(gone), abs=1e-12)
        # Elsewhere it is scaled to the largest sigma / alpha.
        elsewhere = scheduler.within(LinearScheduler()).levels(steps).on(VE)
        top = LinearScheduler().level(0.999).ratio
        assert list(elsewhere.sigmas) == pytest.approx(top * (1 - np.array(gone)), abs=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaScheduler(alpha=0), "alpha and beta must be above 0, got 0.0 and 0.6"),
        (lambda: BetaScheduler(alpha=1e-6).levels(5), "with alpha 1e-06 and beta 0.6 are beyond"),
        (lambda: LeadingScheduler(steps_offset=-1), "steps_offset must be a whole number of at"),
        (lambda: LeadingScheduler(steps_offset=1).levels(1000), "timestep 1000, beyond 999"),
        (lambda: LinearQuadraticScheduler(threshold_noise=1.0), r"must lie in \(0, 1\), got 1.0"),
        (lambda: LinearQuadraticScheduler(linear_steps=5).levels(5), "leaves none of 5 steps"),
        (lambda: LinearQuadraticScheduler(threshold_noise=0.9).levels(9), "goes down too fast"),
        (
            lambda: LinearQuadraticScheduler(ZeroTerminalScheduler()).levels(3),
            "largest sigma / alpha, which is infinite for ZeroTerminalScheduler",
        ),
        (lambda: SimpleScheduler(process="nope"), "unknown scheduler 'nope'"),
        (lambda: SimpleScheduler(process=5), "process must be a Scheduler or its name, got 5"),
    ],
)
def test_bad_spacings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", SPACINGS)
def test_spacings_through_a_config(name):
    for process in (None, VPScheduler(beta_d=10.0)):
        scheduler = SPACINGS[name](process=process)
        config = json.loads(json.dumps(scheduler.to_config()))
        assert make_scheduler(**config) == scheduler
        assert hash(make_scheduler(**config)) == hash(scheduler)


# ---------------------------------------------------------------- from the middle


def test_a_strength_lays_as_many_steps_over_a_part():
    whole = KarrasScheduler().levels(40)
    part = KarrasScheduler().levels(20, strength=0.5)
    assert part == whole[20:]
    assert KarrasScheduler().levels(20, strength=1.0) == KarrasScheduler().levels(20)
    assert len(KarrasScheduler().levels(7, strength=0.3)) == 8
    for strength in (0.0, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\], got"):
            KarrasScheduler().levels(7, strength=strength)
    with pytest.raises(ValueError, match=r"strength 1e-09 lays 5e\+09 steps .* raise it to 5e-05"):
        KarrasScheduler().levels(5, strength=1e-9)
    assert len(KarrasScheduler().levels(5, strength=1e-4)) == 6
