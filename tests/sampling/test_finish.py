"""The last stage: normalised, to bytes, and the second pass that enlarges."""

import pytest
import torch

from k_diffusion.sampling import Enhance, KSampler, unit_noise
from k_diffusion.sampling.finish import dynamic
from k_diffusion.utils.scheduler import CustomScheduler, KarrasScheduler


def loud(x, sigma):
    """Its samples reach far beyond [-1, 1]."""
    return 3 * torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1))))


def x_of(batch=2, size=(3, 8, 8)):
    return unit_noise(size, range(batch))


def test_clamp_and_bytes():
    sampler = KSampler(loud, "karras")
    raw = sampler.sample(x_of(), 4)
    assert raw.abs().max() > 2
    assert torch.equal(sampler.sample(x_of(), 4, normalise="clamp"), raw.clamp(-1, 1))
    picture = sampler.sample(x_of(), 4, to="uint8")
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, ((raw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    assert torch.equal(sampler.sample(x_of(), 4, normalise=lambda x: x / 3), raw / 3)
    # From half-precision noise bytes come from the float32 state, unrounded.
    half = sampler.sample(x_of().half(), 4, to="uint8")
    state = sampler.sample(x_of().half().float(), 4)
    assert torch.equal(half, ((state.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_dynamic_normalisation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 50, 50, generator=generator) * torch.tensor([0.2, 1.0, 4.0]).reshape(
        3, 1, 1, 1
    )
    result = dynamic(x)
    assert torch.equal(result[0], x[0])  # within [-1, 1] already
    assert result.abs().max() <= 1
    for i in (1, 2):
        inside = result[i].abs() < 1
        assert abs((~inside).float().mean().item() - 0.005) < 0.001
        ratio = (result[i] / x[i])[inside]
        assert ratio.std() < 1e-6 < ratio.mean()  # divided, not clipped
        assert torch.equal(dynamic(x[i : i + 1])[0], result[i])  # by itself
    sampler = KSampler(loud, "karras")
    assert torch.equal(sampler.sample(x_of(), 4, normalise="dynamic"),
                       dynamic(sampler.sample(x_of(), 4)))  # fmt: skip


def test_what_a_mask_keeps_is_not_normalised():
    init, mask = torch.full((2, 3, 8, 8), 1.5), torch.zeros(8, 8)
    mask[4:] = 1
    sampler = KSampler(loud, "karras")
    result = sampler.sample(x_of(), 4, init=init, mask=mask, normalise="dynamic")
    assert torch.equal(result[..., :4, :], init[..., :4, :])
    assert result[..., 4:, :].abs().max() <= 1
    picture = sampler.sample(x_of(), 4, init=init * 0.2, mask=mask, to="uint8")
    assert (picture[..., :4, :] == round(1.3 * 127.5)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "dynamc"}, "unknown normalise 'dynamc'; did you mean 'dynamic'"),
        ({"to": "uint16"}, "unknown to 'uint16'; did you mean 'uint8'"),
        ({"normalise": lambda x: x[:1]}, r"normalise returned \(1, 3, 8, 8\) for samples of"),
        ({"enhance": "2x"}, "enhance must be an Enhance, .* got str"),
        ({"enhance": 0.5}, r"enhance's scale must lie in \[1, 64\], got 0.5"),
        ({"enhance": 2, "x": torch.zeros(2, 3, 8)}, r"enhance takes images, .* of \(2, 3, 8\)"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KSampler(loud, "karras").sample(**{"x": x_of(), "steps": 3, **options})


def test_enhance_options_that_cannot_be_are_named():
    for options, message in (
        ({"strength": 1.5}, r"strength must lie in \[0, 1\], got 1.5"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"multiple": 0}, "multiple must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            Enhance(**options)


def smooth(x, sigma):
    """Draws towards what its neighbours are: a network that takes any size."""
    near = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    return torch.tanh(2 * near / (1 + sigma.reshape(-1, 1, 1, 1)))


def test_enhance_is_the_first_pass_enlarged_noised_and_drawn_again():
    sampler = KSampler(smooth, KarrasScheduler(0.05, 5), "dpmpp_2m")
    seen = []
    result = sampler.sample(
        x_of(), 10, seed=4, enhance=Enhance(1.5, strength=0.4, steps=20, multiple=4),
        callback=lambda k, x, sigma, d: seen.append((x, sigma)), details=True,
    )  # fmt: skip
    assert result.samples.shape == (2, 3, 12, 12)
    assert [len(x[0, 0]) for x, _ in seen] == [8] * 10 + [12] * 8
    assert result.calls == 18
    assert result.seeds == (4, 5)
    first = sampler.sample(x_of(), 10, seed=4)
    large = torch.nn.functional.interpolate(first, (12, 12), mode="bicubic")
    sigma = sampler.levels(20).start_at(0.4)[0].sigma
    assert seen[10][1][0].item() == pytest.approx(sigma)
    noise = unit_noise((3, 12, 12), [4, 5], stream=5)
    assert (seen[10][0] - (large + sigma * noise)).abs().max() < 1e-5
    # Its layout is that of the first pass, its details are new.
    close = (result.samples - large).square().mean() / large.square().mean()
    far = sampler.sample(unit_noise((3, 12, 12), [4, 5]), 10)
    assert close < 0.5 < (far - large).square().mean() / large.square().mean()
    assert close > 1e-4


def test_the_second_pass_has_noise_of_its_own():
    """For both passes a step from sigma 2 to 1 of a model that knows the data to be 0: what is
    left of x is the solver's noise."""
    states = []

    def model(x, sigma):
        states.append(x)
        return torch.zeros_like(x)

    sampler = KSampler(model, CustomScheduler(sigmas=(2.0, 1.0, 0.0)), "ddpm")
    sampler.sample(unit_noise((1, 200, 200), [3]), 2, seed=3, enhance=Enhance(1, strength=1))
    first, second = (states[k + 1] - states[k] / 4 for k in (0, 2))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.03
    assert first.std() > 0.5


def test_enhance_of_strength_0_only_enlarges_and_keeps_samples_apart():
    sampler = KSampler(smooth, KarrasScheduler(0.05, 5), "euler_ancestral")
    plain = sampler.sample(x_of(), 6, seed=4)
    large = torch.nn.functional.interpolate(plain, (16, 16), mode="bicubic")
    assert torch.equal(sampler.sample(x_of(), 6, seed=4, enhance=Enhance(strength=0)), large)
    whole = sampler.sample(x_of(), 6, seed=4, enhance=2)
    for i in range(2):
        alone = sampler.sample(x_of()[i : i + 1], 6, seed=4 + i, enhance=True)
        assert (alone - whole[i : i + 1]).abs().max() <= 1e-6


def test_enhance_keeps_what_a_mask_keeps():
    init, mask = (
        torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.ones(8, 8),
    )
    mask[:4] = 0
    # Levels that end above sigma = 0, where the state still has noise on what is known.
    sampler = KSampler(smooth, CustomScheduler(sigmas=(5.0, 2.0, 1.0, 0.5, 0.2)))
    plain = sampler.sample(x_of(), 4, init=init, mask=mask)
    result = sampler.sample(x_of(), 4, init=init, mask=mask, enhance=2)
    large = torch.nn.functional.interpolate(plain, (16, 16), mode="bicubic")
    assert torch.equal(result[..., :8, :], large[..., :8, :])
    assert (result[..., 8:, :] - large[..., 8:, :]).abs().max() > 0.01


def test_enhance_may_be_told_something_else():
    told = []

    def model(x, sigma, scale):
        told.append(scale.tolist())
        return smooth(x, sigma)

    KSampler(model, KarrasScheduler(0.05, 5), "euler").sample(
        x_of(), 2, {"scale": torch.tensor([1.0, 1.0])},
        enhance=Enhance(1, condition={"scale": torch.tensor([2.0, 2.0])}),
    )  # fmt: skip
    assert told == [[1, 1]] * 2 + [[2, 2]]
