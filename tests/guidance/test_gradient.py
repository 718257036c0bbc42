"""Guidance by a gradient, against posteriors that are known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixture import MEANS, SPREAD, Mixture, given
from torch import Tensor

from k_diffusion.denoiser import Call, mark_call
from k_diffusion.guidance import Cached, Guided, cfg, posterior_sampling, pseudo_inverse
from k_diffusion.guidance.measured import conjugate_gradients
from k_diffusion.sampling import KSampler
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Path


class Gaussian:
    """The exact denoiser of data N(0, deviation²), independent values."""

    float64_sigma = True

    def __init__(self, path: Path = VE, deviation: float = 0.8) -> None:
        self.path, self.sigma_data = path, deviation

    def alpha(self, sigma: Any) -> Any:
        return self.path.alpha(sigma)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        alpha, data = self.alpha(sigma), self.sigma_data**2
        return (alpha * data / (alpha**2 * data + sigma**2)).reshape(-1, *[1] * (x.ndim - 1)) * x


PATHS = pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)


@PATHS
def test_the_exact_classifier_makes_the_conditional_model(path: Path) -> None:
    """With log p(class | x) itself as the score, at scale 1, guidance is Bayes' rule."""
    model = Mixture(path)
    x, sigma, label = given(path)
    alpha = path.alpha(sigma)

    def log_class(noisy: Tensor) -> Tensor:
        variance = (alpha * SPREAD) ** 2 + sigma**2
        away = noisy[:, None] - alpha[:, None, None] * MEANS
        logits = -away.square().sum(2) / (2 * variance[:, None])
        return logits.log_softmax(1).gather(1, label[:, None])[:, 0]

    inner = Mixture(path)

    class Through:
        """Hands the noisy data itself through as the estimate's graph."""

        float64_sigma, path = True, inner.path
        alpha = staticmethod(inner.alpha)

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            self.x = x
            return inner(x, sigma) + 0 * x

    through = Through()
    guided = Guided(through, lambda d, sigma: log_class(through.x) + 0 * d.flatten(1).sum(1))
    expected = model(x, sigma, class_label=label)
    assert float((guided(x, sigma) - expected).abs().max()) < 1e-12


@PATHS
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_pseudo_inverse_is_exact_for_gaussian_data(path: Path, noise: float) -> None:
    torch.manual_seed(0)
    model = Gaussian(path)
    data = model.sigma_data**2
    x = torch.randn(3, 6, dtype=torch.float64)
    matrix = torch.randn(4, 6, dtype=torch.float64)
    measured = torch.randn(3, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    guided = pseudo_inverse(model, lambda x0: x0 @ matrix.T, measured, noise=noise)(x, sigma)
    for i, (a, s) in enumerate(zip(path.alpha(sigma), sigma, strict=True)):
        # y and x are jointly Gaussian with x0: its mean given both.
        rows = torch.cat([float(a) * torch.eye(6, dtype=torch.float64), matrix])
        noises = torch.tensor([float(s) ** 2] * 6 + [noise**2] * 4, dtype=torch.float64)
        covariance = data * rows @ rows.T + noises.diag()
        known = torch.cat([x[i], measured[i]])
        mean = data * rows.T @ torch.linalg.solve(covariance, known)
        assert float((guided[i] - mean).abs().max()) < 1e-9


def test_pseudo_inverse_of_an_affine_operator_is_that_of_its_linear_part() -> None:
    """A x + b = y is A x = y - b, where a mean is taken off or a range is mapped, say."""
    torch.manual_seed(0)
    model = Gaussian()
    x = torch.randn(3, 6, dtype=torch.float64)
    matrix, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    measured = torch.randn(3, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for noise in (0.0, 0.3):
        plain = pseudo_inverse(model, lambda x0: x0 @ matrix.T, measured - b, noise=noise)
        moved = pseudo_inverse(model, lambda x0: x0 @ matrix.T + b, measured, noise=noise)
        assert float((moved(x, sigma) - plain(x, sigma)).abs().max()) < 1e-12


def test_isotropic_form_is_exact_where_the_operator_is_a_mask() -> None:
    torch.manual_seed(1)
    model = Gaussian(FLOW)
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    mask = (torch.rand(3, 3) < 0.5).double()
    measured = torch.randn(2, 1, 3, 3, dtype=torch.float64) * mask
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    both = [
        make(model, lambda x0: x0 * mask, measured, noise=0.1)(x, sigma)
        for make in (posterior_sampling, pseudo_inverse)
    ]
    assert float((both[0] - both[1]).abs().max()) < 1e-12


@PATHS
def test_a_whole_run_draws_from_the_posterior(path: Path) -> None:
    """Half of the values are measured: they come out, and the other half is left as it was."""
    model = Gaussian(path)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    measured = torch.tensor([[0.7, 0.0]], dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    guided = pseudo_inverse(model, lambda x0: x0 * mask, measured, noise=0.2)
    drawn = KSampler(guided, "karras" if path is VE else None, "heun").sample(noise, 40)
    gain = 0.64 / (0.64 + 0.04)
    assert abs(float(drawn[:, 0].mean()) - 0.7 * gain) < 0.015
    assert abs(float(drawn[:, 0].std()) - math.sqrt(0.64 * (1 - gain))) < 0.015
    assert abs(float(drawn[:, 1].mean())) < 0.05
    assert abs(float(drawn[:, 1].std()) - 0.8) < 0.03


def test_conjugate_gradients() -> None:
    torch.manual_seed(3)
    root = torch.randn(3, 5, 5, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(3, 5, dtype=torch.float64)
    b[2] = 0
    v = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], b, 30)
    assert float((v - torch.linalg.solve(matrix, b)).abs().max()) < 1e-11


def test_scale_interval_and_longest_step() -> None:
    model = Gaussian()
    x, sigma, _ = given(VE)
    measured = torch.ones(1, 2, dtype=torch.float64)

    def guided(scale: Any = 1.0, **more: Any) -> Tensor:
        def score(x0: Tensor, sigma: Tensor) -> Tensor:
            return -(x0 - measured).square().sum(1)

        result: Tensor = Guided(model, score, scale, **more)(x, sigma)
        return result

    plain = model(x, sigma)
    assert torch.equal(guided(0.0), plain)
    step = guided() - plain
    assert torch.allclose(guided(2.5) - plain, 2.5 * step, rtol=1e-12, atol=0)
    assert torch.equal(guided(interval=(1.0, 2.0)), plain)
    assert torch.equal(guided(interval=(0.1, 2.0)), guided())
    short = guided(100.0, largest=0.01) - plain
    assert torch.allclose(short.square().mean(1).sqrt(), torch.full((4,), 0.01).double())
    gain = 0.64 / (0.64 + 0.49)
    exact = 0.49 * gain * -2 * (plain - measured)
    assert torch.allclose(step, exact, rtol=1e-12, atol=0)


def test_what_breaks_the_way_of_the_gradient_is_named() -> None:
    model, (x, sigma, _) = Gaussian(), given(VE)

    def score(x0: Tensor, sigma: Tensor) -> Tensor:
        return -x0.square().sum(1)

    def refused(kind: type[Exception], match: str, inner: Any, score: Any = score) -> None:
        with pytest.raises(kind, match=match):
            KSampler(Guided(inner, score), "karras", "euler").sample(x, 12, seed=1)

    refused(ValueError, "the estimate of Cached has no gradient by x, .*: .* Cached goes around",
            Cached(model, 1.0))  # fmt: skip
    refused(ValueError, "the estimate of FunctionDenoiser has no gradient", lambda x, s: x.detach())
    refused(TypeError, "takes one estimate, but Contrast gave tuple: put Guided inside",
            cfg(model, 2.0, pair=True))  # fmt: skip
    refused(TypeError, "score must give a tensor of one value a sample, got float", model,
            lambda x0, sigma: 1.0)  # fmt: skip
    refused(ValueError, "score has no gradient by the estimate: it, or an operator in it, detaches",
            model, lambda x0, sigma: x0.detach().sum(1))  # fmt: skip
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    refused(ValueError, "score has no gradient by the estimate", model, lambda x0, sigma: weight)
    refused(ValueError, "score has no gradient by the estimate",
            posterior_sampling(model, lambda x0: x0.detach(), x).denoiser,
            posterior_sampling(model, lambda x0: x0.detach(), x).score)  # fmt: skip
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        Guided(model, score)(x, sigma)
    with torch.no_grad():
        inner = Guided(Cached(model, 0.0), score)(x, sigma)  # a call that is made has its gradient
    assert torch.equal(inner, Guided(model, score)(x, sigma))


def test_at_pure_noise_the_score_says_nothing() -> None:
    """x knows nothing of y there, whatever the model makes of it; and no gradient is paid for."""
    asked = []

    class Odd(Gaussian):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x  # at alpha = 0 as elsewhere

    def score(x0: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return -x0.square().sum(1)

    x, *_ = given(FLOW)
    one = torch.ones(4, dtype=torch.float64)
    guided = Guided(Odd(FLOW), score)
    assert torch.equal(guided(x, one), x)
    assert len(asked) == 1
    assert torch.equal(guided(x, mark_call(one.clone(), Call(0, Level(0.0, 1.0)))), x)
    assert len(asked) == 1


def test_wrong_input_is_refused_by_name() -> None:
    model, (x, sigma, _) = Gaussian(), given(VE)
    with pytest.raises(ValueError, match=r"operator must keep the batch of 4 samples"):
        posterior_sampling(model, lambda x0: x0[:2], x)(x, sigma)
    with pytest.raises(ValueError, match=r"measured has shape \(4, 3\), but the operator gives"):
        posterior_sampling(model, lambda x0: x0, torch.ones(4, 3))(x, sigma)
    with pytest.raises(ValueError, match=r"score must give one value a sample, shape \(4,\)"):
        Guided(model, lambda x0, sigma: x0.sum())(x, sigma)
    with pytest.raises(ValueError, match="noise and sigma_data are both 0"):
        posterior_sampling(model, lambda x0: x0, x, sigma_data=0.0)
    with pytest.raises(ValueError, match="noise must be a number of 0 or more, got -1"):
        pseudo_inverse(model, lambda x0: x0, x, noise=-1)
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        pseudo_inverse(model, lambda x0: x0, x, iterations=0)
    with pytest.raises(TypeError, match="score must be a function"):
        Guided(model, "sharp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="largest must be above 0"):
        Guided(model, lambda x0, sigma: x0.sum(1), largest=0)
