"""What the established functions ask of a caller's model, x, noise and options, by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from k_diffusion.sampling.compat_tools import number
from k_diffusion.sampling.nonfinite import check_finite


def check_input(name: str, model: Any, x: Any) -> None:
    """Refuses by name what no sampler can begin with.

    Raises:
        TypeError: the model is not callable, x no floating-point tensor.
        ValueError: x holds no sample, or a value that is not finite.
    """
    if not callable(model):
        raise TypeError(f"model of {name} must be callable, got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x of {name} must be a floating-point tensor, got {kind}")
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x of {name} must have shape (B, ...) with B >= 1, got {tuple(x.shape)}")
    check_finite(x, f"x, the initial state of {name},")


def check_answer(name: str, answer: Any, x: Tensor) -> Tensor:
    """The model's answer for x, once it is a floating-point tensor of x's shape and device.

    Raises:
        TypeError, ValueError: it is not.
    """
    what = f"the model must return the denoised x for {name}"
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise TypeError(f"{what}, a floating-point tensor, got {kind}")
    if answer.shape != x.shape:
        raise ValueError(f"{what}, of x's shape {tuple(x.shape)}, got {tuple(answer.shape)}")
    if answer.device != x.device:
        raise ValueError(f"{what}, on x's device {x.device}, got {answer.device}: move the model")
    return answer


def check_noise(source: str, noise: Any, x: Tensor) -> Tensor:
    """Noise for x, once it is a tensor of x's shape and device.

    Raises:
        ValueError: it is not; names its source.
    """
    if not isinstance(noise, Tensor) or noise.shape != x.shape:
        got = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(
            f"{source} returned {got}: it must return unit noise of x's shape {tuple(x.shape)}"
        )
    if noise.device != x.device:
        raise ValueError(
            f"{source} returned noise on {noise.device} for x on {x.device}: draw it there"
        )
    return noise


def real_number(name: str, key: str, value: Any) -> float:
    """An option as a float, tensors and numpy's numbers too.

    Raises:
        TypeError: it is no number.
    """
    try:
        return float(number(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{key} of {name} must be a number, got {value!r}") from None


def finite_number(name: str, key: str, value: Any, at_least: float = -math.inf) -> float:
    """An option as a finite float that is not below its least value.

    Raises:
        TypeError, ValueError: it is not.
    """
    answer = real_number(name, key, value)
    if not math.isfinite(answer):
        raise ValueError(f"{key} of {name} must be finite, got {answer}")
    if answer < at_least:
        raise ValueError(f"{key} of {name} must be {at_least:g} or more, got {answer}")
    return answer


def warn_unless_finite(name: str, result: Tensor, stacklevel: int) -> None:
    """Warns the program, `stacklevel` calls up from the caller, of a result that is not finite."""
    try:
        check_finite(result, f"the result of {name}")
    except FloatingPointError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=stacklevel + 1)
