"""Noise: of a sample's seed alone, exact in law, and on a path that refinement leaves as it is."""

import itertools
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.sampling import (
    FLOW,
    NOISES,
    VE,
    VP,
    CallerNoise,
    Churn,
    KSampler,
    Level,
    Levels,
    PathNoise,
    Run,
    SampleNoise,
    make_plan,
    unit_noise,
)
from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.noise import BROWNIAN, FRESH, INITIAL, PATH
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Half log-SNR from pure noise to clean data: far out, closer than a leaf of the path's tree, at a
# node of it (0), and as samplers have them.
MARKS = (
    -math.inf, -14.0, -5.0, -3.0, -3.0 + 1e-7, -3.0 + 3e-7, -1.0, 0.0, 1e-9, 1e-3, 0.5, 2.0, 6.0,
    13.8, math.inf,
)  # fmt: skip


def level(lam):
    return Level(1.0, 0.0) if lam == math.inf else VP.at(lam)


def interval(a, b, **more):
    return Interval(level(a), level(b), **more)


def clock(lam):
    return math.exp(2 * lam) if lam < math.inf else math.inf


def test_streams_of_one_seed_are_independent():
    like = torch.empty(1, 40_000, dtype=torch.float64)
    path = PathNoise([7], like)
    drawn = [SampleNoise([7], like, stream).draw() for stream in (INITIAL, PATH, FRESH, BROWNIAN)]
    drawn += [path.draw(interval(-1, 1)), path.draw(interval(-1, 1, fresh=True))]
    drawn += [SampleNoise([8], like).draw(), PathNoise([8], like).draw(interval(-1, 1))]
    z = torch.cat(drawn)
    assert_covariance(z, torch.eye(len(drawn), dtype=z.dtype))


def assert_covariance(z, expected):
    """Rows of z, their elements independent, have this covariance, to 4 standard errors."""
    n = z.shape[1]
    variances = expected.diagonal()
    error = ((variances[:, None] * variances[None] + expected**2) / n).sqrt()
    assert ((z @ z.T / n - expected).abs() / error).max() <= 4
    assert (z.mean(1).abs() / (variances / n).sqrt()).max() <= 4
    # Gaussian: the fourth moment is 3, its standard error sqrt(96 / n).
    assert ((z**4).mean(1) - 3 * variances**2).abs().max() <= 4 * math.sqrt(96 / n)


@pytest.mark.parametrize("marks", [MARKS, MARKS[3:6], MARKS[::3]])
def test_increments_of_the_path_are_unit_and_independent(marks):
    """Over elements of a sample, and over samples."""
    for seeds, size in (([3], 40_000), (range(400), 100)):
        path = PathNoise(seeds, torch.empty(len(seeds), size, dtype=torch.float64))
        z = torch.stack([path.draw(interval(*ab)).flatten() for ab in itertools.pairwise(marks)])
        assert_covariance(z, torch.eye(len(z), dtype=z.dtype))


@pytest.mark.parametrize("order", [1, -1])
def test_increments_on_any_intervals_have_the_covariance_of_the_path(order):
    """Overlapping intervals, asked for in either order: overlap / sqrt(product of lengths)."""
    asked = [(-4, -1), (-2, 0), (-1, 1), (-1, -0.9), (0, 3), (-3, 3), (-math.inf, 2), (2.9999, 3)]
    path = PathNoise([5], torch.empty(1, 40_000, dtype=torch.float64))
    drawn = {ab: path.draw(interval(*ab)).flatten() for ab in asked[::order]}
    ends = [(clock(a), clock(b)) for a, b in asked]
    expected = [
        [max(min(b, d) - max(a, c), 0.0) / math.sqrt((b - a) * (d - c)) for c, d in ends]
        for a, b in ends
    ]
    z = torch.stack([drawn[ab] for ab in asked])
    assert_covariance(z, torch.tensor(expected, dtype=z.dtype))


def partition_error(marks, dtype):
    """Largest error of the increments' weighted sum against the increment over the whole, which
    another source of the same seed gives."""
    like = torch.empty(2, 300, dtype=dtype)
    path = PathNoise([5, 6], like)
    parts = [path.draw(interval(a, b)) for a, b in itertools.pairwise(marks)]
    whole = PathNoise([5, 6], like).draw(interval(marks[0], marks[-1]))
    length = clock(marks[-1]) - clock(marks[0])
    weights = [
        math.sqrt((clock(b) - clock(a)) / length) if length < math.inf else float(b == math.inf)
        for a, b in itertools.pairwise(marks)
    ]
    total = sum(w * z for w, z in zip(weights, parts, strict=True))
    assert total.dtype == dtype
    return ((total - whole).abs().max() / whole.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_increments_add_up(dtype, bound):
    assert partition_error(MARKS, dtype) == 0
    assert partition_error(MARKS[:-1], dtype) <= bound
    assert partition_error(MARKS[1:-3], dtype) <= bound
    for scheduler, steps in itertools.product((KarrasScheduler(), FlowScheduler()), (7, 20, 90)):
        marks = [lv.half_log_snr for lv in scheduler.levels(steps)]
        assert partition_error(marks[:-1], dtype) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_asking_changes_nothing(dtype):
    """Also inside one leaf of the tree, where the points asked for first count."""
    like = torch.empty(2, 20, dtype=dtype)
    pairs = list(itertools.pairwise(MARKS))
    path = PathNoise([1, 2], like)
    first = {ab: path.draw(interval(*ab)) for ab in pairs}
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        for ab in pairs:
            assert torch.equal(path.draw(interval(*ab)), first[ab])
    backwards = PathNoise([1, 2], like)
    for ab in sorted(first, reverse=True):
        if ab[1] - ab[0] > 0.1:  # its own increment does not drown in what a leaf leaves open
            error = (backwards.draw(interval(*ab)) - first[ab]).abs().max()
            shares_a_leaf = any(-3.001 < lam < -2.999 or abs(lam) < 1e-6 for lam in ab)
            assert error <= (0.01 if shares_a_leaf else 0)
    for a, b in ((-math.inf, -14.0), (0.5, 2.0), (13.8, math.inf)):
        assert torch.equal(path.draw(interval(b, a)), -first[a, b])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_points_of_one_leaf_are_exact_in_law_in_any_order(order):
    points = [-3.0 + 1e-7 * k for k in (0, 1, 3, 4)]
    path = PathNoise([5], torch.empty(1, 20_000, dtype=torch.float64))
    for k in order:
        path.draw(interval(-9.0, points[k]))
    z = torch.cat([path.draw(interval(a, b)) for a, b in itertools.pairwise(points)])
    assert_covariance(z, torch.eye(3, dtype=z.dtype))


def test_levels_of_other_coordinates_are_on_the_same_path():
    """Equal up to the rounding of the levels, of which the path makes a square root."""
    like = torch.empty(1, 100, dtype=torch.float64)
    levels = KarrasScheduler().levels(12)[:-1]
    for path in (VP, FLOW):
        a, b = PathNoise([4], like), PathNoise([4], like)
        for (s, t), (v, w) in zip(levels.pairs(), levels.on(path).pairs(), strict=True):
            assert (a.draw(Interval(s, t)) - b.draw(Interval(v, w))).abs().max() <= 1e-6


def test_close_levels_are_close_on_the_path():
    """A level that is moved by less than the tree resolves moves the noise a little."""
    like = torch.empty(1, 1000, dtype=torch.float64)
    for lam in (-6.0, -1.0, 0.3, 6.0):
        a = PathNoise([4], like).draw(interval(-8.0, lam))
        b = PathNoise([4], like).draw(interval(-8.0, lam + 1e-6))
        assert 0 < (a - b).std() < 0.02


def test_fresh_noise_and_other_paths_are_independent_and_leave_the_path_alone():
    like = torch.empty(1, 40_000, dtype=torch.float64)
    path = PathNoise([9], like)
    ask = [
        interval(-1, 0),
        interval(0, -1, fresh=True),
        interval(0, 2),
        interval(-1, 1, fresh=True),
    ]
    ask += [interval(-1, 0, path=1), interval(2, math.inf), interval(0, math.inf, path=1)]
    drawn = [path.draw(iv) for iv in ask]
    z = torch.cat(drawn)
    assert_covariance(z, torch.eye(len(z), dtype=z.dtype))
    plain = PathNoise([9], like)
    assert torch.equal(drawn[0], plain.draw(ask[0]))
    assert torch.equal(drawn[2], plain.draw(ask[2]))
    other = PathNoise([9], like)
    assert torch.equal(drawn[4], other.draw(ask[4]))
    assert torch.equal(drawn[2], other.draw(ask[2]))
    assert torch.equal(drawn[1], other.draw(ask[3]))  # fresh noise comes in the order of asking


def test_points_of_one_path_do_not_move_another():
    like = torch.empty(1, 50, dtype=torch.float64)
    path, other = PathNoise([9], like), PathNoise([9], like)
    path.draw(interval(-1, 0.3))
    asked = interval(-1, 0.3 + 1e-7, path=1)
    assert torch.equal(path.draw(asked), other.draw(asked))


def test_an_interval_of_no_length_is_refused():
    path = PathNoise([1], torch.empty(1, 4))
    with pytest.raises(ValueError, match="no length") as caught:
        path.draw(interval(1.0, 1.0))
    assert "\n" not in str(caught.value)
    for source in NOISES.values():
        with pytest.raises(ValueError, match="3 samples need as many seeds, got 2"):
            source([1, 2], torch.empty(3, 4))


# Costs and memory


@pytest.mark.parametrize("steps", [20, 50, 200])
def test_a_new_point_costs_about_fifteen_draws(steps, monkeypatch):
    draws = []
    whole = PathNoise._noise
    monkeypatch.setattr(PathNoise, "_noise", lambda *a: draws.append(1) or whole(*a))
    for scheduler in (KarrasScheduler(), FlowScheduler()):
        plan = make_plan("euler_ancestral", scheduler.levels(steps))
        path = PathNoise([1], torch.empty(1, 4))
        draws.clear()
        for draw in plan.draws:
            path.draw(draw.interval)
        assert len(draws) <= 16 * steps
        path.draw(interval(0.0, 1.0))
        draws.clear()
        path.draw(interval(-math.inf, 1.0))
        assert draws == []


def test_the_path_holds_twelve_tensors_between_draws():
    """On the worst levels too: steps that halve the distance to pure noise, and back again."""
    path = PathNoise([1], torch.empty(1, 4))
    marks = [-30.0 + 0.5 * k for k in range(120)]
    for a, b in [*itertools.pairwise(marks), (-40.0, -39.0), (-1.0, -0.9)]:
        path.draw(interval(a, b))
        held = [point.value for _, point in path._ahead] + [path._left.value, path._last.value]
        assert len({id(value) for value in held if value is not None}) <= 12


# Strong convergence


def gaussian_levels(n, kind):
    """n intervals from sigma 2 to 0.1 on the variance-exploding path."""
    if kind == "karras":
        return KarrasScheduler(0.1, 2.0).levels(n + 1)[:-1]
    weights = [1.0 if kind == "even" or k % 2 else 2.0 for k in range(n)]
    marks = [0.0, *itertools.accumulate(weights)]
    lam = -math.log(2.0)
    return Levels([VE.at(lam + m / marks[-1] * math.log(20.0)) for m in marks])


START = torch.randn(
    1, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
) * math.sqrt(4.3)


def end_of_run(name, n, kind, source, options):
    """A run on Gaussian data of variance 0.3, with its exact denoiser."""
    run = Run(make_plan(name, gaussian_levels(n, kind), **options), START, source([5], START))
    while not run.done:
        run.advance(run.x * (0.3 / (0.3 + run.sigma[0] ** 2)))
    return run.result


SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize(
    "kinds", [("even", "even"), ("even", "uneven"), ("karras", "even"), ("uneven", "karras")]
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_ancestral", {}),
        ("ddim", {"eta": 1.0}),
        ("dpmpp_sde", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
    ],
)
def test_strong_convergence(name, options, kinds):
    """n and 2n steps of one seed, on levels of one or of two kinds, come together with order 1 (the
    noise is exact, and the data estimate is a rough function of it); of independent noise not."""
    coarse, fine = kinds

    def distance(n, source):
        a = end_of_run(name, n, coarse, source, options)
        b = end_of_run(name, 2 * n, fine, source, options)
        return (a - b).square().mean().sqrt().item()

    distances = [distance(n, PathNoise) for n in SIZES]
    slope = math.log2(distances[0] / distances[-1]) / math.log2(SIZES[-1] / SIZES[0])
    assert abs(slope - 1) <= 0.15
    assert distances[-1] < 0.02
    assert distance(SIZES[-1], SampleNoise) > 0.3


# Noise made on the CPU


@pytest.mark.parametrize("source", [SampleNoise, PathNoise])
def test_noise_on_the_cpu_is_made_there_and_used_elsewhere(source):
    """The meta device stands for another one: it has no numbers, but a run on it needs none."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::normal_":
                seen.add(args[0].device.type)
            return func(*args, **(kwargs or {}))

    like = torch.empty(2, 3, device="meta")
    for on_cpu, where in ((True, {"cpu"}), (False, {"meta"})):
        seen = set()
        with Devices():
            noise = source([1, 2], like, on_cpu=on_cpu)
            for iv in (interval(-1, 1), interval(-1, 1, fresh=True), interval(1, math.inf)):
                assert noise.draw(iv).device.type == "meta"
        assert seen == where
    cpu = torch.empty(2, 3)
    a, b = source([1, 2], cpu), source([1, 2], cpu, on_cpu=True)
    assert torch.equal(a.draw(interval(-1, 1)), b.draw(interval(-1, 1)))


@cuda
@pytest.mark.parametrize("source", [SampleNoise, PathNoise])
def test_noise_on_a_gpu(source):
    """Made on the CPU it is the CPU's, bit for bit; neither way waits for the device."""
    like = torch.empty(2, 3, 64, 64, device="cuda")
    marks = [-3.0, -1.0, 0.0, 2.0]
    here = source([1, 2], like.cpu())
    there, own = source([1, 2], like, on_cpu=True), source([1, 2], like)
    for a, b in itertools.pairwise(marks):
        expected = here.draw(interval(a, b))
        torch.cuda.set_sync_debug_mode("error")
        try:
            moved, made = there.draw(interval(a, b)), own.draw(interval(a, b))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(moved.cpu(), expected)
        assert made.is_cuda
        assert abs(made.std().item() - 1) < 0.02


# Through KSampler


def shrink(x, sigma):
    return x * (0.3 / (0.3 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2))


def test_a_path_is_followed_through_ksampler():
    sampler = KSampler(shrink, KarrasScheduler(0.05, 5.0), "dpmpp_2m_sde")
    x = unit_noise((2000,), [1, 2])

    def distance(noise):
        a, b = (sampler.sample(x, n, seed=[1, 2], noise=noise) for n in (40, 80))
        return (a - b).square().mean().sqrt()

    assert distance("path") < 0.03 < 0.2 < distance("independent")
    default = sampler.sample(x, 10, seed=[1, 2])
    assert torch.equal(default, sampler.sample(x, 10, seed=[1, 2], noise="independent"))
    whole = sampler.sample(x, 10, seed=[1, 2], noise="path")
    assert (
        whole - sampler.sample(x.flip(0), 10, seed=[2, 1], noise="path").flip(0)
    ).abs().max() <= 1e-6


def test_noise_on_the_cpu_is_asked_for_through_ksampler(monkeypatch):
    made = []

    class Noted(SampleNoise):
        def __init__(self, *args, on_cpu):
            made.append(on_cpu)
            super().__init__(*args, on_cpu=on_cpu)

    x = torch.randn(1, 4)
    sampler = KSampler(shrink, "karras", "euler_ancestral")
    monkeypatch.setitem(NOISES, "independent", Noted)
    sampler.sample(x, 3)
    sampler.sample(x, 3, noise_on_cpu=True)
    assert made == [False, True]
    monkeypatch.setattr("k_diffusion.sampling.walk.SampleNoise", Noted)
    sampler.sample(x, 3, noise=lambda s, t: x, noise_on_cpu=True)
    assert made == [False, True, True]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("pathh", "unknown noise 'pathh'; did you mean 'path'"),
        ("", "unknown noise ''; known: independent, path"),
        (3, r"noise must be 'independent' or 'path', or a function noise_sampler\(.*got 3"),
        (None, "noise must be .* got None"),
        (lambda s, t: torch.zeros(1), r"noise_sampler returned shape \(1,\) for a .* \(2, 3\)"),
        (lambda s, t: None, "noise_sampler must return unit noise, .* got NoneType"),
        (lambda s, t: [[0.0] * 3] * 2, "noise_sampler must return .* got list"),
        (lambda s, t: torch.zeros(2, 3, dtype=torch.complex64), "noise_sampler .*complex64"),
        (lambda s, t: torch.zeros(2, 3, dtype=torch.long), "noise_sampler .* got torch.int64"),
        (lambda s, t: torch.zeros(2, 3, device="meta"), "noise_sampler .* on meta .* on cpu"),
    ],
)
def test_wrong_noise_is_named(noise, message):
    """Also where the solver draws none, but for a function, which is not called then."""
    for solver in ("euler_ancestral", "euler"):
        if callable(noise) and solver == "euler":
            continue
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            KSampler(shrink, "karras", solver).sample(torch.randn(2, 3), 4, noise=noise)
        assert "\n" not in str(caught.value)


def test_noise_that_is_not_finite_is_named_at_the_end():
    """The loop does not look at the noise, which would wait for the device: the end does."""
    nan = torch.full((2, 3), math.nan)
    with pytest.raises(FloatingPointError, match="check the model's output, the noise and the"):
        KSampler(shrink, "karras", "ddpm").sample(torch.randn(2, 3), 4, noise=lambda s, t: nan)


@pytest.mark.parametrize("name", ["seeds_2", "seeds_3", "dpmpp_sde", "euler_ancestral"])
def test_a_noise_sampler_may_return_one_buffer_and_any_float_dtype(name):
    """A plan can hold noise over a query and the draws after it."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype, reused in ((torch.float32, False), (torch.float32, True), (torch.float64, True)):
        generator, buffer = torch.Generator().manual_seed(0), torch.empty(2, 3, dtype=dtype)

        def noise(s, t, reused=reused, generator=generator, buffer=buffer):
            new = torch.randn(2, 3, generator=generator)
            return buffer.copy_(new) if reused else new

        results.append(KSampler(shrink, "karras", name).sample(x, 5, noise=noise))
        assert CallerNoise(noise, x).draw(interval(-1, 1)).dtype == torch.float32
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_caller_s_fresh_noise_is_the_global_generator_s_unless_it_is_given():
    x = torch.empty(2, 3)
    fresh = interval(0, -1, fresh=True)
    torch.manual_seed(0)
    a = CallerNoise(lambda s, t: x, x).draw(fresh)
    torch.manual_seed(0)
    assert torch.equal(a, torch.randn(2, 3))
    given = CallerNoise(lambda s, t: x, x, SampleNoise([1, 2], x)).draw(fresh)
    assert torch.equal(given, SampleNoise([1, 2], x).draw())


def test_churn_draws_from_the_seeds_on_the_path_too():
    x = torch.randn(2, 3)
    sampler = KSampler(shrink, "karras", "dpmpp_2m_sde", churn=Churn(s_churn=3.0))
    whole = sampler.sample(x, 6, seed=[1, 2], noise="path")
    assert torch.equal(whole, sampler.sample(x, 6, seed=[1, 2], noise="path"))
    alone = sampler.sample(x[1:], 6, seed=2, noise="path")
    assert (whole[1:] - alone).abs().max() <= 1e-6
