"""Guidance by a measurement y = A(x0) + noise: inpainting, deblurring, super-resolution.

Given x, y is taken to be Gaussian about A(d), d the estimate of x0, which itself is off by a
Gaussian of variance r² = sigma_data² sigma² / (alpha² sigma_data² + sigma²): what is left to know
of Gaussian data of that deviation. The gradient of its logarithm guides (see `gradient`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import make_denoiser
from k_diffusion.guidance.base import Scale, along
from k_diffusion.guidance.gradient import Guided
from k_diffusion.guidance.held import Held, Holder
from k_diffusion.utils.maths import is_number

Operator = Callable[[Tensor], Tensor]
"""A measurement of clean data: (B, ...) -> (B, ...), of each sample by itself, differentiable."""


def posterior_sampling(
    denoiser: Any,
    operator: Operator,
    measured: Tensor | str,
    scale: Scale = 1.0,
    *,
    noise: float = 0.0,
    sigma_data: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """Diffusion posterior sampling, for any differentiable operator: variance noise² + r² for all.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        operator: A: masks, blurs, makes smaller, takes the modulus of a transform.
        measured: y, shape of A(x), or of one sample for all; or the name of the run's keyword, in
            its condition, that is one of these.
        scale: w.
        noise: standard deviation of the measurement's noise.
        sigma_data: standard deviation of the data, for r; None: the denoiser's, or 1; 0: r = 0, as
            in the paper, which wants noise above 0 and a small scale.
        interval: see `Guided`.

    Raises:
        ValueError: noise and sigma_data are both 0, or negative.

    Source: Chung et al. 2022, arXiv:2209.14687, eq. 16; r: Song et al. 2023 (ICLR, "Pseudoinverse-
    guided diffusion models for inverse problems"), section 3.2.
    """
    spread = _Spread(denoiser, noise, sigma_data)

    def score(x0: Tensor, sigma: Tensor, measured: Tensor) -> Tensor:
        away = _residual(operator, x0, measured)
        variance = spread(sigma) + noise**2
        return -away.flatten(1).square().sum(1) / (2 * variance.to(away.dtype))

    return Guided(spread.denoiser, _Towards(measured, score), scale, interval=interval)


def pseudo_inverse(
    denoiser: Any,
    operator: Operator,
    measured: Tensor | str,
    scale: Scale = 1.0,
    *,
    noise: float = 0.0,
    sigma_data: float | None = None,
    iterations: int = 8,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """Pseudo-inverse guidance, for linear operators and affine ones: covariance noise² I + r² A Aᵀ.

    Exact for Gaussian data of deviation sigma_data. (r² A Aᵀ + noise² I)⁻¹ is applied by conjugate
    gradients, from A and its transpose, which automatic differentiation gives: no pseudo-inverse
    need be known. One iteration is exact where A Aᵀ is a multiple of a projection (masks, means of
    squares).

    Args:
        denoiser, measured, scale, noise, interval: see `posterior_sampling`.
        operator: A, linear but for a constant.
        sigma_data: standard deviation of the data, above 0; None: the denoiser's, or 1.
        iterations: of the conjugate gradients.

    Source: Song et al. 2023 (ICLR, "Pseudoinverse-guided diffusion models for inverse problems"),
    eqs. 7 and 8.
    """
    spread = _Spread(denoiser, noise, sigma_data)
    if not spread.sigma_data:
        raise ValueError("sigma_data must be above 0 for pseudo-inverse guidance")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number of at least 1, got {iterations!r}")

    def score(x0: Tensor, sigma: Tensor, measured: Tensor) -> Tensor:
        away = _residual(operator, x0, measured)
        uncertain = along(spread(sigma), away).detach()
        with torch.enable_grad():
            origin = torch.zeros_like(x0).requires_grad_(True)
            image = operator(origin)

        def covariance(v: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(image, origin, v, retain_graph=True)
            # Of an affine operator, A x + b, the linear part; b is in what was measured, too.
            return uncertain * (operator(back) - image.detach()) + noise**2 * v

        with torch.no_grad():
            solved = conjugate_gradients(covariance, away.detach(), iterations)
        # Its gradient is Aᵀ solved, and through the denoiser the pseudo-inverse guidance.
        return (solved * (away.detach() - away)).flatten(1).sum(1)

    return Guided(spread.denoiser, _Towards(measured, score), scale, interval=interval)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """v with matrix(v) = b, of each sample by itself, in a number of iterations that is known.

    Args:
        matrix: symmetric and not negative, (B, ...) -> (B, ...).
        b: shape (B, ...), in the range of the matrix.
        iterations: a sample that is solved before stays as it is.
    """

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return (a * c).flatten(1).sum(1)

    v, rest, way = torch.zeros_like(b), b, b
    length = first = dot(b, b)
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(iterations):
        image = matrix(way)
        # What is left is rounding once it has fallen so far: steps along that lead astray.
        goes = length > first * torch.finfo(b.dtype).eps ** 2
        step = torch.where(goes, length / dot(way, image).clamp_min(tiny), 0.0)
        v = v + along(step, b) * way
        rest = rest - along(step, b) * image
        new = dot(rest, rest)
        way = rest + along(torch.where(goes, new / length.clamp_min(tiny), 0.0), b) * way
        length = torch.where(goes, new, length)
    return v


class _Towards(Holder):
    """A score of what was measured, which goes with the samples."""

    def __init__(
        self, measured: Tensor | str, score: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        self.measured, self.score = measured, score

    def held(self) -> tuple[Held, ...]:
        """See `Holder`."""
        return (Held(self, "measured"),)

    def __call__(self, x0: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """See `Score`."""
        return self.score(x0, sigma, Held(self, "measured").beside(condition, x0))


class _Spread:
    """r², what is left to know of a value of x0 at a level."""

    def __init__(self, denoiser: Any, noise: float, sigma_data: float | None) -> None:
        self.denoiser = make_denoiser(denoiser)
        if sigma_data is None:
            sigma_data = float(getattr(self.denoiser, "sigma_data", 1.0))
        for name, value in (("noise", noise), ("sigma_data", sigma_data)):
            if not is_number(value) or not value >= 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}")
        if noise == 0 == sigma_data:
            raise ValueError("noise and sigma_data are both 0: give one of them")
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        """r² at noise standard deviations (B,), in the denoiser's coordinates."""
        if not self.sigma_data:
            return torch.zeros_like(sigma)
        data = self.sigma_data**2
        alpha: Tensor = self.denoiser.alpha(sigma)
        return data * sigma**2 / (alpha**2 * data + sigma**2)


def _residual(operator: Operator, x0: Tensor, measured: Tensor) -> Tensor:
    made = operator(x0)
    if not isinstance(made, Tensor) or made.shape[:1] != x0.shape[:1]:
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(
            f"operator must keep the batch of {x0.shape[0]} samples, but gave {shape} of "
            f"{tuple(x0.shape)}"
        )
    same = made.shape[1:] == measured.shape[1:]
    if not same or measured.shape[0] not in (1, x0.shape[0]):
        way_out = (
            ": where a run's samples are another number each time, give the name of a keyword "
            "instead, and what was measured in the run's condition"
        )
        raise ValueError(
            f"measured has shape {tuple(measured.shape)}, but the operator gives "
            f"{tuple(made.shape)}{way_out if same else ''}"
        )
    return measured.to(made.device, made.dtype) - made
