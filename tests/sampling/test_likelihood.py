"""Log-likelihood and inversion against closed-form densities and maps."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import (
    FLOW,
    VE,
    VP,
    ExactTrace,
    HutchinsonTrace,
    KSampler,
    Level,
    StepControl,
    bits_per_dimension,
    dequantise,
    invert,
    log_density,
)
from k_diffusion.utils.scheduler import CustomScheduler, KarrasScheduler

_spec = importlib.util.spec_from_file_location("exact", Path(__file__).with_name("exact.py"))
exact = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(exact)
level = exact.level

FINE = StepControl(1e-6, 1e-6)
PATHS = (VE, VP, FLOW)
VARIANCE = torch.linspace(0.05, 1.5, 6, dtype=torch.float64).reshape(2, 3)


def normal(x, mean, variance):
    each = -0.5 * ((x - mean) ** 2 / variance + (2 * math.pi * variance).log())
    return each.flatten(1).sum(1)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("pair", ["dormand_prince", "bogacki_shampine"])
def test_gaussian_density(path, pair):
    s, t = level(path, 0.05), level(path, 20.0)
    y = 0.4 + torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = t.alpha**2 * VARIANCE + t.sigma**2
    told = log_density(
        exact.gaussian_denoiser(path, 0.4, VARIANCE),
        y,
        s,
        t,
        prior=lambda x: normal(x, 0.4 * t.alpha, top),
        control=FINE,
        pair=pair,
    )
    true = normal(y, 0.4, VARIANCE + 0.05**2)
    assert (told.nats - true).abs().max() / 6 < 3e-5
    assert (told.standard_error == 0).all()
    carried = exact.gaussian_flow(y * s.alpha, s, t, 0.4, VARIANCE)
    assert (told.latent / t.alpha - carried / t.alpha).abs().max() < 1e-3


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_mixture_density(path):
    s, t = level(path, 0.1), level(path, 10.0)
    y = torch.linspace(-2, 2.4, 15, dtype=torch.float64).reshape(5, 3)
    scale = math.log(t.alpha)

    def prior(x):
        return exact.mixture_log_density(x / t.alpha, 10.0) - 3 * scale

    told = log_density(exact.mixture_denoiser(path), y, s, t, prior=prior, control=FINE)
    assert (told.nats - exact.mixture_log_density(y, 0.1)).abs().max() / 3 < 1e-4
    assert len(set(told.info.nfe)) > 1
    float32 = log_density(exact.mixture_denoiser(path), y.float(), s, t, prior=prior)
    assert float32.nats.dtype == torch.float32
    assert (float32.nats - told.nats).abs().max() / 3 < 1e-3


def test_pure_noise_has_the_exact_prior_and_a_large_sigma_nearly():
    y = 0.4 + torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    true = normal(y, 0.4, VARIANCE + 0.05**2)
    for path in (VP, FLOW):
        denoiser = exact.gaussian_denoiser(path, 0.4, VARIANCE)
        told = log_density(denoiser, y, level(path, 0.05), Level(0.0, 1.0), control=FINE)
        assert (told.nats - true).abs().max() / 6 < 3e-5
    denoiser = exact.gaussian_denoiser(VE, 0.4, VARIANCE)
    wide = [
        (log_density(denoiser, y, Level(1.0, 0.05), Level(1.0, top), control=FINE).nats - true)
        for top in (80.0, 8000.0)
    ]
    assert 5e-3 < wide[0].abs().max() < 0.1
    assert wide[1].abs().max() < 1e-3


def coupled(x, sigma):
    """A denoiser whose Jacobian has large entries off its diagonal, so that probes scatter."""
    s = sigma.reshape(-1, 1)
    turn = torch.sin(torch.arange(64.0, dtype=x.dtype)).reshape(8, 8)
    return torch.tanh(x @ turn) / (1 + s)


def test_hutchinson_is_unbiased_within_its_own_standard_error():
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = Level(1.0, 0.2), Level(1.0, 10.0)
    control = StepControl(1e-5, 1e-5)
    true = log_density(coupled, x, *ends, control=control).nats
    trace = HutchinsonTrace(range(4), probes=400)
    told = log_density(coupled, x, *ends, trace=trace, control=control)
    assert (told.standard_error > 0.01).all()
    assert ((told.nats - true) / told.standard_error).abs().max() < 3.5
    single = log_density(coupled, x, *ends, trace=HutchinsonTrace(range(4)))
    assert single.standard_error is None
    assert (single.nats - true).abs().max() < 10 * 20 * told.standard_error.max()


@pytest.mark.parametrize("trace", [ExactTrace, HutchinsonTrace])
def test_a_density_does_not_depend_on_the_batch(trace):
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    ends = Level(1.0, 0.2), Level(1.0, 10.0)

    def run(rows, compact=True):
        own = trace() if trace is ExactTrace else HutchinsonTrace([5 + i for i in rows], 3)
        return log_density(coupled, x[rows], *ends, trace=own, compact=compact)

    whole = run([0, 1, 2, 3])
    assert len(set(whole.info.nfe)) > 1
    other = run([2, 0, 3, 1])
    assert (other.nats - whole.nats[[2, 0, 3, 1]]).abs().max() < 1e-9
    assert other.info.nfe == tuple(whole.info.nfe[i] for i in (2, 0, 3, 1))
    alone = run([2])
    assert (alone.nats - whole.nats[2:3]).abs().max() < 1e-9
    full = run([0, 1, 2, 3], compact=False)
    assert (full.nats - whole.nats).abs().max() < 1e-9
    assert (full.latent - whole.latent).abs().max() < 1e-9


def test_probes_are_signs_of_the_seed_alone():
    x = torch.zeros(3, 50, 10)
    probes = HutchinsonTrace([7, 8, 7], 2).start(x)
    assert probes.shape == (3, 2, 50, 10)
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(probes[0], probes[2])
    assert not torch.equal(probes[0], probes[1])
    assert not torch.equal(probes[0, 0], probes[0, 1])
    assert probes.mean().abs() < 0.1


def test_bits_per_dimension():
    # A uniform density over 256 values of width 2/255 costs 8 bits.
    nats = torch.tensor([-12 * math.log(256 * 2 / 255)])
    assert bits_per_dimension(nats, 12).item() == pytest.approx(8.0, rel=1e-6)
    assert bits_per_dimension(nats, 12, width=1.0).item() == pytest.approx(
        math.log2(512 / 255), rel=1e-5
    )


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_inversion_finds_the_noise(path):
    s, t = level(path, 0.01), level(path, 50.0)
    y = 0.4 + torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = exact.gaussian_denoiser(path, 0.4, VARIANCE)
    noise, info = invert(denoiser, y, s, t)
    true = exact.gaussian_flow(y * s.alpha, s, t, 0.4, VARIANCE) / t.sigma
    assert (noise - true).abs().max() < 1e-4
    assert info.steps[0] > 3
    assert noise.dtype == y.dtype
    # KSampler brings the data back.
    scheduler = CustomScheduler(sigmas=(50.0, 0.01))
    sampler = KSampler(denoiser, scheduler, "dormand_prince", rtol=1e-6, atol=1e-6)
    assert (sampler.sample(noise, 1) / s.alpha - y).abs().max() < 1e-3
    assert invert(denoiser, y.half(), s, t)[0].dtype == torch.float16


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_image_from_its_noise_by_another_solver(path):
    """To noise by adaptive steps and back by 100 of Heun's method, on a mixture."""
    s, t = level(path, 0.01), level(path, 20.0)
    mixture = exact.mixture_denoiser(path)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(64, 2, 3, dtype=torch.float64, generator=generator).clamp(-2, 2)
    noise, _ = invert(mixture, y, s, t)
    levels = KarrasScheduler(0.01, 20.0).levels(101)[:-1]  # without the step to sigma = 0
    scheduler = CustomScheduler(sigmas=tuple(v.sigma for v in levels))
    back = KSampler(mixture, scheduler, "heun").sample(noise, 100) / s.alpha
    assert (back - y).abs().max() <= 1e-3


def test_dequantised_bytes_take_the_bits_of_their_discrete_distribution():
    """A density that is level over each byte's width takes what the bytes themselves take."""
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 40).reshape(2, 40, 256)
    share = torch.arange(1, 257, dtype=torch.float64) / (128 * 257)
    x = dequantise(images, [3, 4])
    assert x.dtype == torch.float32
    back = (x.double() + 1) * 127.5
    assert torch.equal(back.round().clamp(0, 255).to(torch.uint8), images)
    density = share[back.round().long()] / (2 / 255)
    bits = bits_per_dimension(density.log().flatten(1).sum(1), images[0].numel())
    true = -share.log2().mean()
    assert (bits - true).abs().max() < 1e-12
    within = (back - images).flatten().sort().values + 0.5  # uniform in [0, 1]
    assert (within - torch.linspace(0, 1, len(within))).abs().max() < 1.63 / len(within) ** 0.5
    assert abs(torch.corrcoef(torch.stack([*(back - images).flatten(1)]))[0, 1]) < 0.05
    assert torch.equal(dequantise(images[1:], [4]), x[1:])  # of its own seed alone
    with pytest.raises(TypeError, match=r"images must be bytes .* got torch.float32"):
        dequantise(x, [3, 4])
    with pytest.raises(ValueError, match="2 images need as many seeds, got 1"):
        dequantise(images, [3])


def test_conditions_reach_the_denoiser():
    def denoise(x, sigma, shift):
        return exact.gaussian_denoiser(VE, 0.0, 0.5)(x - shift, sigma) + shift

    y = torch.tensor([[0.5], [0.5], [0.5]], dtype=torch.float64)
    shift = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    ends = Level(1.0, 0.1), Level(1.0, 50_000.0)
    told = log_density(denoise, y, *ends, condition={"shift": shift})
    assert (told.nats - normal(y, shift, torch.tensor(0.51))).abs().max() < 1e-3
    noise, _ = invert(denoise, y, *ends, condition={"shift": shift})
    assert (noise.diff(dim=0).abs() > 1e-3).all()


def identity(x, sigma):
    return x * 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": "dpm_23"}, "dpm_23 does not integrate densities: use a Runge-Kutta pair"),
        ({"start": Level(1.0, 0.0)}, "must go from some noise to more"),
        ({"end": Level(1.0, 0.01)}, "must go from some noise to more"),
        ({"x": torch.ones(2, 3, dtype=torch.long)}, "floating point.* torch.int64"),
        ({"x": torch.ones(2)}, r"\(2,\)"),
        ({"trace": HutchinsonTrace([1])}, "2 samples need as many seeds, got 1"),
        ({"start": Level(0.5, 0.5), "denoiser": FunctionDenoiser(identity, VE)}, "ve path"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    given = {"denoiser": identity, "x": torch.ones(2, 3), "start": Level(1.0, 0.1)}
    with pytest.raises(ValueError, match=message):
        log_density(**{**given, "end": Level(1.0, 5.0), **options})


def test_probes_must_be_some():
    with pytest.raises(ValueError, match="probes must be 1 or more, got 0"):
        HutchinsonTrace([1], probes=0)
