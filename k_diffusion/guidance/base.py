"""What all guidance shares: a Denoiser around a Denoiser, and how much of it is wanted where."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import Call, make_denoiser
from k_diffusion.guidance.held import Holder, placed
from k_diffusion.utils.levels import Path
from k_diffusion.utils.maths import is_number

Scale = float | Tensor | Callable[[Tensor], Tensor] | str
"""A strength of guidance: one number, one a sample (B,), or a function of the samples' noise-to-
signal ratios sigma / alpha, shape (B,), that gives one for each, shape (B,); or the name of the
run's keyword, in its condition, that is one of these."""


TOLD = frozenset({
    "process", "prediction", "sigma_data", "time_convention", "network", "inner_model", "training",
    "sigmas", "log_sigmas", "sigma_min", "sigma_max", "get_sigmas", "sigma_to_t", "t_to_sigma",
})  # fmt: skip
"""What a denoiser tells of itself, which a Wrapper tells of the one inside."""
SETS = frozenset({
    "to", "cpu", "cuda", "half", "bfloat16", "float", "double", "train", "eval", "requires_grad_",
})  # fmt: skip
"""What sets the denoisers inside; the guidance stays around them."""


class Wrapper(Holder):
    """A Denoiser around another, in the same coordinates; abstract: a kind writes `__call__`.

    It is no `nn.Module`, but `to`, `eval`, `train`, `half` and their kin (see `SETS`) do to the
    models inside what they do to a module, and return the guided denoiser.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser: Any = make_denoiser(denoiser)

    @property
    def path(self) -> Path:
        """The coordinates of x and sigma: those of the denoiser inside."""
        path: Path = self.denoiser.path
        return path

    @property
    def float64_sigma(self) -> bool:
        """Whether the denoiser inside wants sigma in float64."""
        return bool(getattr(self.denoiser, "float64_sigma", False))

    def alpha(self, sigma: Any) -> Any:
        """The signal scale at sigma, a float or a tensor."""
        return self.denoiser.alpha(sigma)

    def parameters(self) -> Iterable[Any]:
        """Those of the denoiser inside, which tell the device."""
        parameters = getattr(self.denoiser, "parameters", None)
        return parameters() if callable(parameters) else ()

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the denoiser inside cannot take, and a keyword that is missing."""
        others = (part for part in self.inside() if not isinstance(part, Wrapper))
        for part in (self, *others):
            for held in part.held() if isinstance(part, Holder) else ():
                held.of(condition)
        check = getattr(self.denoiser, "check_condition", None)
        if check is not None:
            check(batch, **self.passed(condition, self.denoiser))

    def inside(self) -> tuple[Any, ...]:
        """See `Holder`."""
        return (self.denoiser,)

    def models(self) -> tuple[Any, ...]:
        """The denoisers inside, which are moved, cast and set together."""
        return (self.denoiser,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "denoiser":
            raise AttributeError(name)
        if name in TOLD:
            return getattr(self.denoiser, name)
        if name in SETS:
            return functools.partial(self._set, [_setter(m, name) for m in self.models()])
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}; the denoiser inside, without this guidance, "
            "is its .denoiser"
        )

    def _set(self, setters: Iterable[Callable[..., Any]], *args: Any, **options: Any) -> Any:
        for setter in setters:
            setter(*args, **options)
        return self

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The guided estimate of x0, shape of x (B, ...), at noise standard deviations (B,)."""
        raise NotImplementedError


def _setter(model: Any, name: str) -> Callable[..., Any]:
    """A denoiser's `to` or its kin; of a function in coordinates of its own, the function's."""
    for owner in (model, getattr(model, "function", None)):
        if callable(setter := getattr(owner, name, None)):
            return setter
    raise AttributeError(
        f"{type(model).__name__} has no {name!r}: do that to the model before it is guided"
    )


def along(factor: Any, x: Tensor) -> Any:
    """A number as it is; one per sample, shape (B,), made to multiply x, shape (B, ...)."""
    if not isinstance(factor, Tensor) or factor.ndim == 0:
        return factor
    return factor.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def noise_to_signal(denoiser: Any, sigma: Tensor) -> Tensor:
    """sigma / alpha, the noise standard deviation at unit signal, shape (B,); inf at alpha = 0."""
    ratio: Tensor = sigma / denoiser.alpha(sigma)
    return ratio


def per_sample_scale(
    scale: Scale, x: Tensor, ratio: Callable[[], Tensor], name: str = "scale"
) -> Any:
    """The strength for each sample, as a number or as a tensor that multiplies x.

    Args:
        scale: what it is, not the name of a keyword.
        x: the samples, shape (B, ...).
        ratio: gives sigma / alpha, shape (B,).
        name: what it is called.

    Raises:
        ValueError: a tensor with neither one value nor one a sample.
    """
    if is_number(scale):
        return scale
    value = scale if isinstance(scale, Tensor) else scale(ratio())  # type: ignore[operator]
    if not isinstance(value, Tensor):
        return value
    if value.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(
            f"{name} must be one number or one a sample, shape ({x.shape[0]},), got "
            f"{tuple(value.shape)}: where a run's samples are another number each time, give the "
            "name of a keyword instead, and the values in the run's condition"
        )
    return along(placed(value, x.device, x.dtype), x)


def check_scale(name: str, scale: Any) -> None:
    """Refuse what is no strength of guidance.

    Raises:
        TypeError, ValueError: it is neither a finite number, nor a real tensor, nor a function.
    """
    if is_number(scale):
        if not math.isfinite(scale):
            raise ValueError(f"{name} must be finite, got {scale}")
    elif isinstance(scale, Tensor):
        if scale.is_complex() or scale.dtype is torch.bool or scale.ndim > 1:
            raise ValueError(
                f"{name} must be one number or one a sample, got a tensor of {scale.dtype} and "
                f"shape {tuple(scale.shape)}"
            )
    elif not callable(scale) and not (isinstance(scale, str) and scale.isidentifier()):
        got = type(scale).__name__ + (f" {scale!r}" if isinstance(scale, str) else "")
        raise TypeError(
            f"{name} must be a number, a tensor of one a sample, a function of sigma / alpha, or "
            f"the name of a keyword that is one, got {got}"
        )


class Interval:
    """The levels at which guidance is wanted (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    Args:
        low, high: bounds of sigma / alpha, which is sigma for an EDM network; low is outside, high
            inside.

    Raises:
        ValueError: they are no interval.
    """

    @classmethod
    def of(cls, interval: Sequence[float] | None) -> Interval:
        """Of the two bounds that a kind of guidance is given; None: all levels.

        Raises:
            TypeError: something else than two bounds.
        """
        if interval is None:
            return cls()
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise TypeError(
                f"interval must be two bounds of sigma / alpha, low and high, such as (0.3, 5.0), "
                f"got {interval!r}: no bound above is (0.3, math.inf), none below is (0.0, 5.0)"
            )
        return cls(*interval)

    def __init__(self, low: float = 0.0, high: float = math.inf) -> None:
        if not (is_number(low) and is_number(high) and 0 <= low < high):
            raise ValueError(
                f"interval = ({low}, {high}) must be two numbers, 0 <= low < high, in units of "
                "sigma / alpha"
            )
        self.low, self.high = float(low), float(high)

    @property
    def everywhere(self) -> bool:
        """Whether no level is outside."""
        return self.low == 0 and self.high == math.inf

    def holds(self, call: Call | None) -> bool | None:
        """Whether all samples of a call are inside; None: that cannot be told on the host."""
        if self.everywhere:
            return True
        return None if call is None else self.low < call.level.ratio <= self.high

    def inside(self, ratio: Tensor) -> Tensor:
        """Which samples are inside, booleans of shape (B,)."""
        return (ratio > self.low) & (ratio <= self.high)
