"""Guidance by the gradient of a score: a classifier, a distance, or what was measured.

The estimate of x0 is moved as the score of the noisy data would be by grad log p(y | x), for which
log p(y | estimate) stands: with s = (alpha d - x) / sigma² the score that belongs to an estimate d,
s + w g belongs to d + w (sigma² / alpha) g (Tweedie's formula). At alpha = 0 x knows nothing of y,
and there is no guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import call_of
from k_diffusion.guidance.base import (
    Interval,
    Scale,
    Wrapper,
    along,
    check_scale,
    noise_to_signal,
    per_sample_scale,
)
from k_diffusion.guidance.held import Held, Keywords, keywords_of, without
from k_diffusion.utils.maths import is_number


class Score(Protocol):
    """(estimate of x0, sigma) -> log p(y | x0) of each sample but for a constant, shape (B,).

    Of the run's keywords it is told those that its signature names, or all where that ends in
    `**`: the label or the target of each sample. These go with the samples; what a function holds
    of its own does not, and must be the same for all.
    """

    def __call__(self, x0: Tensor, sigma: Tensor, **condition: Any) -> Tensor: ...


class Guided(Wrapper):
    """Guidance by any differentiable score of the estimate: d + w (sigma² / alpha) grad_x score.

    The gradient is taken through the denoiser, as a forward and a backward pass; the score of one
    sample may not look at another.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        score: see `Score`: a classifier's log-probability, minus a distance. (x0, sigma) will do.
        scale: w; 1 is Bayes' rule where the score is log p(y | x0).
        interval: bounds of sigma / alpha outside which there is no guidance.
        largest: the longest step of the estimate in data units, as the root mean square of a
            sample; inf: any. It keeps a steep score from throwing the first estimates far off.
        alone: names of keywords that are for the score alone, and that the model is not told.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, section 4; through the estimate: Chung et
    al. 2022, arXiv:2209.14687, eq. 15; Bansal et al. 2023, arXiv:2302.07121, eq. 6.
    """

    def __init__(
        self,
        denoiser: Any,
        score: Score | Callable[..., Tensor],
        scale: Scale = 1.0,
        *,
        interval: tuple[float, float] | None = None,
        largest: float = float("inf"),
        alone: Sequence[str] = (),
    ) -> None:
        super().__init__(denoiser)
        check_scale("scale", scale)
        if not callable(score):
            raise TypeError(f"score must be a function of (x0, sigma), got {type(score).__name__}")
        if not (is_number(largest) and largest > 0):
            raise ValueError(f"largest must be above 0, got {largest!r}")
        self.score, self.scale, self.largest = score, scale, largest
        if isinstance(alone, str):
            raise TypeError(f"alone must be a list of keywords' names, got {alone!r}")
        self.alone = frozenset(alone)
        self.interval = Interval.of(interval)
        self._names = _named(score)

    def held(self) -> tuple[Held, ...]:
        """See `Holder`."""
        return (Held(self, "scale"),)

    def inside(self) -> tuple[Any, ...]:
        """See `Holder`."""
        return (self.denoiser, self.score)

    def own_keywords(self) -> frozenset[str]:
        """See `Holder`."""
        return super().own_keywords() | self.alone

    def _for_score(self, condition: Keywords) -> Keywords:
        told = without(condition, keywords_of(self) - keywords_of(self.score) - self.alone)
        return {k: v for k, v in told.items() if self._names is None or k in self._names}

    def _gradient(self, d: Any, x: Tensor, sigma: Tensor, condition: Keywords) -> Tensor:
        """That of the score by x, shape of x; what breaks the way to it is named."""
        inner = type(self.denoiser).__name__
        if not isinstance(d, Tensor):
            raise TypeError(
                f"guidance by a score takes one estimate, but {inner} gave {type(d).__name__}: put "
                "Guided inside the guidance that makes a pair"
            )
        if not d.requires_grad:
            raise ValueError(
                f"the estimate of {inner} has no gradient by x, so that a score cannot guide it: "
                "something in it detaches or runs without gradients; Cached goes around Guided, "
                "not inside"
            )
        value = self.score(d, sigma, **self._for_score(condition))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"score must give a tensor of one value a sample, got {type(value).__name__}"
            )
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"score must give one value a sample, shape ({x.shape[0]},), got "
                f"{tuple(value.shape)}"
            )
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "score has no gradient by the estimate: it, or an operator in it, detaches, or "
                "does not look at its first argument"
            )
        return gradient

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The guided estimate of x0."""
        call = call_of(sigma)
        inside = self.interval.holds(call)
        told = self.passed(condition, self.denoiser)
        if inside is False or (call is not None and call.level.alpha == 0):
            estimate: Tensor = self.denoiser(x, sigma, **told)
            return estimate
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "guidance by a score takes a gradient, which torch.inference_mode forbids: use "
                "torch.no_grad, in which it finds its own"
            )
        with torch.enable_grad():
            given = x.detach().requires_grad_(True)
            d = self.denoiser(given, sigma, **told)
            gradient = self._gradient(d, given, sigma, condition)
        d = d.detach()
        alpha = self.alpha(sigma)
        # At alpha = 0 the gradient is 0, and its factor would be no number.
        factor = torch.where(alpha > 0, sigma**2 / alpha.clamp_min(1e-30), 0.0)
        strength = Held(self, "scale").beside(condition, x)
        check_scale("scale", strength)
        scale = per_sample_scale(strength, x, lambda: noise_to_signal(self, sigma))
        step = scale * along(factor, x) * gradient
        if self.largest < float("inf"):
            size = step.flatten(1).square().mean(1).sqrt()
            step = step * along((self.largest / size.clamp_min(1e-30)).clamp(max=1.0), x)
        if inside is None:
            within = self.interval.inside(noise_to_signal(self, sigma))
            step = step * along(within, x)
        return d + step


def _named(score: Callable[..., Any]) -> frozenset[str] | None:
    """The keywords that a score can be told, beside the estimate and sigma; None: any."""
    try:
        # What a module is called with is told by its forward.
        bare = getattr(score, "_orig_mod", score)  # of a compiled one
        called = bare.forward if isinstance(bare, nn.Module) else score
        _, _, *more = inspect.signature(called).parameters.values()
    except ValueError:  # no signature, or fewer than two parameters
        return frozenset()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in more):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in more if parameter.kind in kinds)
