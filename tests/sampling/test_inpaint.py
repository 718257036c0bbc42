"""Inpainting: what is kept stays exactly, what is drawn goes with it."""

import math

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import (
    ADAPTIVE,
    SOLVERS,
    VE,
    Churn,
    KSampler,
    Resample,
    SampleNoise,
    unit_noise,
    walk,
)
from k_diffusion.sampling.masks import make_stages, noise_back
from k_diffusion.sampling.noise import RESAMPLED
from k_diffusion.utils.levels import FLOW, VP
from k_diffusion.utils.scheduler import KarrasScheduler

# A mixture of three Gaussians in the plane, (a, b): a is known, b is to be drawn.
WEIGHTS = torch.tensor([0.35, 0.4, 0.25], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -0.8], [0.3, 0.9], [1.0, -0.6]], dtype=torch.float64)
SPREADS = ((0.3, 0.35, 0.8), (0.35, 0.25, -0.6), (0.25, 0.3, 0.3))
COVARIANCES = torch.tensor(
    [[[s * s, r * s * t], [r * s * t, t * t]] for s, t, r in SPREADS], dtype=torch.float64
)


def denoise(x, sigma):
    """E[x0 | x] of the mixture, at one level for all samples."""
    total = COVARIANCES + sigma[0].double() ** 2 * torch.eye(2, dtype=torch.float64)
    away = x.double()[:, None, :] - MEANS
    solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(total), away)
    share = (WEIGHTS.log() - 0.5 * torch.logdet(total) - 0.5 * (away * solved).sum(-1)).softmax(-1)
    each = MEANS + torch.einsum("kij,bkj->bki", COVARIANCES, solved)
    return (share[..., None] * each).sum(1).to(x.dtype)


def distance(b, a):
    """Largest distance of the drawn b's distribution function from the true one's, given a."""
    spread = COVARIANCES[:, 0, 0]
    share = (WEIGHTS.log() - 0.5 * spread.log() - 0.5 * (a - MEANS[:, 0]) ** 2 / spread).softmax(0)
    gain = COVARIANCES[:, 0, 1] / spread
    centre = MEANS[:, 1] + gain * (a - MEANS[:, 0])
    variance = COVARIANCES[:, 1, 1] - gain * COVARIANCES[:, 0, 1]
    b = b.double().sort().values
    true = (share * torch.special.ndtr((b[:, None] - centre) / variance.sqrt())).sum(1)
    drawn = torch.arange(1, len(b) + 1) / len(b)
    return (true - drawn).abs().max().item()


def test_jumps_bring_what_is_drawn_to_the_conditional_distribution():
    """Without jumps it is far from it, as any replacement is; each more brings it nearer."""
    a, count = -0.4, 2000
    sampler = KSampler(denoise, KarrasScheduler(0.01, 20), "dpmpp_2m")
    init = torch.tensor([[a, 0.0]])
    found = []
    for times in (1, 5, 30):
        samples = sampler.sample(
            None, 14, init=init, mask=torch.tensor([0, 1]), seeds=range(count), resample=times
        )
        assert torch.equal(samples[:, 0], init[:, 0].expand(count))
        found.append(distance(samples[:, 1], a))
    assert found[0] > 0.25
    assert found[1] < 0.75 * found[0]
    assert found[2] < 0.13  # and on: 0.05 with 60 times and 30 steps


def smooth(path):
    """A denoiser that mixes neighbours, so that what is drawn depends on what is known."""

    def function(x, sigma):
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        near = x + x.roll(1, -1) + x.roll(1, -2)
        return torch.tanh(near / (1 + sigma)) / (1 + 0.1 * sigma)

    return FunctionDenoiser(function, path)


def pair(x, sigma):
    d = smooth(VE)(x, sigma)
    return d, 0.9 * d


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).tanh()
MASK = torch.zeros(4, 4)
MASK[1:, 2:] = 1


@pytest.mark.parametrize("solver", [*SOLVERS, *ADAPTIVE])
def test_known_pixels_are_exact_and_follow_their_own_noise(solver):
    """With every solver; in every state that is queried, a predicted one and an inner stage too,
    the known part is the image plus Gaussian noise of the level."""
    known = SOLVERS.get(solver)
    model = smooth(VE) if known is None or known.outputs == 1 else pair
    sampler = KSampler(model, KarrasScheduler(0.05, 5), solver)
    states = []
    result = sampler.sample(
        None, 6, init=IMAGES, mask=MASK, seeds=[1, 2],
        callback=lambda k, x, sigma, d: states.append((x, sigma)),
    )  # fmt: skip
    keep = MASK == 0
    assert torch.equal(result[..., keep], IMAGES[..., keep])
    assert (result[..., ~keep] - IMAGES[..., ~keep]).abs().max() > 0.05
    again = sampler.sample(None, 5, init=IMAGES, mask=MASK, seeds=[1, 2], resample=Resample(2, 2))
    assert torch.equal(again[..., keep], IMAGES[..., keep])
    assert (again - result).abs().max() > 0.01
    if known is not None and (known.order == 0 or "cfg_pp" in solver):
        return  # these are not exact on a point: consistency models, and guidance between two
    for x, sigma in states:
        if len(x) < 2:  # of an adaptive one, when a sample has come to its end
            continue
        eps = (x - IMAGES)[..., keep] / sigma.reshape(-1, 1, 1)
        assert 0.5 < eps.std().item() < 1.6
        if known is not None and not known.stochastic:
            expected = unit_noise((3, 4, 4), [1, 2])[..., keep]
            assert (eps - expected).abs().max() < 1e-3


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_masks_broadcast_and_keep_in_any_coordinates(path):
    sampler = KSampler(smooth(path), KarrasScheduler(0.05, 5), "heun", churn=Churn(1.0))
    first = None
    for mask in (MASK, MASK.bool(), MASK.long(), MASK[None], MASK.expand(2, 1, 4, 4),
                 MASK.expand(2, 3, 4, 4), MASK.double()):  # fmt: skip
        result = sampler.sample(None, 5, init=IMAGES, mask=mask, seeds=[1, 2], resample=2)
        first = result if first is None else first
        assert torch.equal(result, first)
        assert torch.equal(result[..., MASK == 0], IMAGES[..., MASK == 0])
    half = sampler.sample(None, 5, init=IMAGES, mask=MASK, strength=0.4, seeds=[1, 2])
    assert torch.equal(half[..., MASK == 0], IMAGES[..., MASK == 0])
    assert (half - first).abs().max() > 0.05
    one_row = torch.ones(1, 3, 1, 1)
    one_row[:, 1] = 0
    result = sampler.sample(None, 5, init=IMAGES, mask=one_row, seeds=[1, 2])
    assert torch.equal(result[:, 1], IMAGES[:, 1])


def test_a_half_precision_image_is_kept_to_the_bit():
    init = IMAGES.half()
    result = KSampler(smooth(VE), "karras").sample(None, 3, init=init, mask=MASK, seeds=[1, 2])
    assert result.dtype == torch.float16
    assert torch.equal(result[..., MASK == 0], init[..., MASK == 0])


def test_a_soft_mask_goes_that_share_of_the_way():
    """The model says 1 everywhere: the result is the mask's mean of it and the image."""
    mask = torch.linspace(0, 1, 16).reshape(4, 4)
    sampler = KSampler(lambda x, sigma: torch.ones_like(x), "karras", "dpmpp_2m")
    result = sampler.sample(None, 8, init=IMAGES, mask=mask, seeds=[1, 2])
    assert (result - torch.lerp(IMAGES, torch.ones(()), mask)).abs().max() < 1e-5


def test_adaptive_samples_keep_their_own_image_when_others_have_ended():
    """Each row of image and mask goes with its sample."""
    masks = torch.stack([MASK, 1 - MASK])[:, None]

    def stiff(x, sigma, sharp):  # the second sample needs more steps
        near = (x + x.roll(1, -1)) * sharp.reshape(-1, 1, 1, 1)
        return torch.tanh(near / (1 + sigma.reshape(-1, 1, 1, 1)))

    sampler = KSampler(stiff, KarrasScheduler(0.05, 5), "dormand_prince", rtol=1e-3, atol=1e-3)
    lengths = []
    result = sampler.sample(
        None, 4, {"sharp": torch.tensor([0.5, 9.0])}, init=IMAGES, mask=masks, seeds=[1, 2],
        callback=lambda k, x, s, d: lengths.append(len(x)),
    )  # fmt: skip
    assert min(lengths) == 1
    assert torch.equal(result[0][..., MASK == 0], IMAGES[0][..., MASK == 0])
    assert torch.equal(result[1][..., MASK == 1], IMAGES[1][..., MASK == 1])


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_noise_back_gives_the_noisier_level_exactly(path):
    clean, noisy = path.at(1.0), path.at(-0.7)
    x0, eps, fresh = (torch.randn(100_000, dtype=torch.float64) for _ in range(3))
    back = noise_back(clean.alpha * x0 + clean.sigma * eps, fresh, clean, noisy)
    rest = back - noisy.alpha * x0
    assert abs((rest * x0).mean().item()) < 0.02
    assert rest.std().item() == pytest.approx(noisy.sigma, rel=0.01)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x[:1], r"returned shape \(1, 3, 4, 4\) for x of shape \(2, 3, 4, 4\)"),
        (lambda x: x[..., :1], r"returned shape \(2, 3, 4, 1\)"),
        (lambda x: x.long(), "returned torch.int64"),
        (lambda x: (x, x), "must return a tensor, .* got tuple"),
        (lambda x: None, "must return a tensor, .* got NoneType"),
    ],
)
def test_a_model_s_wrong_answer_is_named_as_without_a_mask(answer, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KSampler(lambda x, sigma: answer(x), "karras").sample(
            None, 3, init=IMAGES, mask=MASK, seeds=[1, 2]
        )


def test_the_levels_that_jumps_walk():
    levels = KarrasScheduler().levels(5)
    assert [s.levels for s in make_stages(levels, None)] == [levels]
    assert [s.levels for s in make_stages(levels, Resample(1))] == [levels]
    stages = make_stages(levels, Resample(3, jump=2))
    assert [s.levels for s in stages] == [levels[0:3]] * 3 + [levels[2:5]] * 3 + [levels[4:6]] * 3
    assert [s.back_from for s in stages[:3]] == [None, levels[2], levels[2]]
    calls = []
    KSampler(smooth(VE), "karras", "euler").sample(
        None, 5, init=IMAGES, mask=MASK, seeds=[1, 2], resample=Resample(3, jump=2),
        callback=lambda k, *rest: calls.append(k),
    )  # fmt: skip
    assert calls == list(range(15))


def test_each_walk_draws_noise_of_its_own():
    """A stochastic solver walks the same levels again with other noise, seeded all the same."""
    drawn = []

    def model(x, sigma):
        drawn.append(x.clone())
        return torch.zeros_like(x)

    sampler = KSampler(model, KarrasScheduler(0.5, 1.0), "euler_ancestral")
    big = torch.zeros(1, 1, 100, 100)
    options = {"init": big, "mask": torch.ones(100, 100), "seeds": [4], "resample": Resample(2, 2)}
    sampler.sample(None, 2, **options)
    again = list(drawn)
    drawn.clear()
    sampler.sample(None, 2, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, drawn, strict=True))
    a, b = drawn[1].flatten(), drawn[3].flatten()  # after the first step of both walks
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.05
    assert math.isclose(a.std().item(), b.std().item(), rel_tol=0.05)


@pytest.mark.parametrize("call", ["sample", "sample_many"])
def test_a_mask_that_may_be_of_samples_or_of_channels_is_refused(call):
    mask, init = torch.zeros(3, 8, 8), torch.full((3, 3, 8, 8), 0.5)
    mask[0] = 1
    sampler = KSampler(lambda x, sigma: 0.5 * x, KarrasScheduler(0.05, 5), "euler")

    def draw(mask):
        if call == "sample":
            return sampler.sample(steps=2, init=init, mask=mask, seeds=range(3))
        return sampler.sample_many(3, steps=2, init=init, mask=mask).collect()

    with pytest.raises(ValueError, match=r"give \(3, 1, 8, 8\) or \(1, 3, 8, 8\)"):
        draw(mask)
    kept = (draw(mask[:, None]) == 0.5).flatten(1).float().mean(1)
    assert kept.tolist() == [0, 1, 1]
    kept = (draw(mask[None]) == 0.5).float().mean((0, 2, 3))
    assert kept.tolist() == [0, 1, 1]
    assert torch.equal(draw(mask[:1]), draw(mask[0]))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "lms"])
def test_a_multistep_method_is_ddim_where_each_step_is_walked_anew(solver):
    def run(name, jump):
        return KSampler(denoise, KarrasScheduler(0.01, 20), name).sample(
            None, 8, init=torch.tensor([[-0.4, 0.0]]), mask=torch.tensor([0, 1]),
            seeds=range(20), resample=Resample(3, jump),
        )  # fmt: skip

    assert (run(solver, 1) - run("ddim", 1)).abs().max() < 1e-6
    assert (run(solver, 2) - run("ddim", 2)).abs().max() > 0.03


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_noise_of_jumps_is_made_where_that_of_the_solver_is(on_cpu, monkeypatch):
    made = []

    class Noted(SampleNoise):
        def __init__(self, seeds, like, stream=0, *, on_cpu=False):
            made.append((stream, on_cpu))
            super().__init__(seeds, like, stream, on_cpu=on_cpu)

    monkeypatch.setattr(walk, "SampleNoise", Noted)
    KSampler(denoise, KarrasScheduler(0.01, 20), "euler").sample(
        None, 2, init=torch.zeros(1, 2), mask=torch.tensor([0, 1]), seeds=[1], resample=2,
        noise_on_cpu=on_cpu,
    )  # fmt: skip
    assert made == [(RESAMPLED, on_cpu)]
