"""What to say when a result is not finite: which call of the model, at which level, which module.

A run reads its result once, at its end. Only where that is not finite is it done again, from the
same seeds, reading after each call; so a good run pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.modules import first_bad_module

Told = Callable[[int, Tensor, Tensor, Tensor], None]
"""Told of a call of the model: (k, x, sigma, denoised)."""
WAY_OUT = "check the model's output, the noise and the input for overflow or NaN"
NAMED = 8
"""Samples named in a message; the others are counted."""


class _Found(Exception):
    pass


def check_finite(x: Tensor, what: str) -> None:
    """Refuses a tensor with a value that is not finite; the host waits for it.

    Args:
        what: what it is, for the message; where it begins with "x," it is input.

    Raises:
        ValueError: input is not finite.
        FloatingPointError: something else is not.
    """
    if is_finite(x):
        return
    share = (~torch.isfinite(x)).float().mean().item()
    error = ValueError if what.startswith(("x,", "init")) else FloatingPointError
    raise error(f"{what} is not finite in {share:.1%} of its values: {WAY_OUT}")


def is_finite(x: Tensor) -> bool:
    """Whether all values are finite; the host waits. True on the meta device, of shapes only."""
    # A finite sum proves finite terms, for a fifth of the time; an infinite one may be overflow.
    if x.device.type == "meta" or math.isfinite(x.sum().item()):
        return True
    return bool(torch.isfinite(x).all())


def which_samples(x: Tensor) -> str:
    """The samples that are not finite, as "sample 3" or "samples 1, 3 and 5"."""
    bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if len(bad) == 1:
        return f"sample {bad[0]}"
    if len(bad) > NAMED:
        return f"samples {', '.join(map(str, bad[:NAMED]))} and {len(bad) - NAMED} more"
    return f"samples {', '.join(map(str, bad[:-1]))} and {bad[-1]}"


def explain(
    replay: Callable[[Told], Any], step_of: Callable[[int], str], hook: Told | None = None
) -> str:
    """Where a run first went wrong, in words.

    Args:
        replay: does the run again, and tells of its calls.
        step_of: a call's number, from 0 -> what to call its step.
        hook: what was told of the calls at first and may have changed them: it is told again.

    Returns:
        A part of a sentence that begins with "first".
    """
    said: list[str] = []

    def look(k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        for what, value in (("the state before", x), ("the model's answer to", denoised)):
            check(f"{what} call {k + 1}", value, k, sigma)
        if hook is not None:
            hook(k, x, sigma, denoised)
            for what, value in (("the state", x), ("the model's answer", denoised)):
                check(f"{what} after the callback of call {k + 1}", value, k, sigma)

    def check(what: str, value: Tensor, k: int, sigma: Tensor) -> None:
        if is_finite(value):
            return
        bad = (~value.isfinite()).flatten(1)
        at = sorted(set(sigma.double()[bad.any(1)].tolist()), reverse=True)
        levels = f"sigma {at[0]:.4g}" + (f" to {at[-1]:.4g}" if len(at) > 1 else "")
        share = f"{bad.double().mean().item():.2%} of its values"
        said.append(f"first {what}{step_of(k)} at {levels}, in {share}")
        raise _Found

    # An adaptive solver looks itself, and raises.
    with first_bad_module() as modules, suppress(_Found, FloatingPointError):
        replay(look)
    if not said:
        return (
            "every call of a second run with the same seeds was finite: the last step overflowed, "
            "or the model does not repeat itself"
        )
    return said[0] + (f"; first module: {modules[0]}" if modules else "")
