"""The options of guidance on the command line, made a Denoiser around the checkpoint's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .problems import UsageError

if TYPE_CHECKING:
    import torch

    from k_diffusion.guidance import Null

METHODS = ("cfg", "apg", "cfg_zero_star", "perturbed_attention", "autoguidance")
WITHOUT_CONDITION = ("perturbed_attention", "autoguidance")
"""Methods that need nothing that the model is told."""
_NOT_OPTIONS = ("denoiser", "scale", "weaker", "null", "pair", "names")


def check_guidance(
    scale: float, method: str, options: Mapping[str, Any], guide: str, negative: tuple[str, ...]
) -> str:
    """Refuse, before anything is loaded, what does not go together.

    Returns:
        The method: as asked for, or autoguidance where there is a guide, or cfg.

    Raises:
        UsageError: options without a scale, an unknown method or option, a guide that is missing.
    """
    from k_diffusion import guidance
    from k_diffusion.utils.maths import unknown

    if method and method not in METHODS:
        raise UsageError(unknown("guidance method", method, METHODS))
    chosen = method or ("autoguidance" if guide else "cfg")
    if scale == 1:
        for option, given in (
            ("--guidance-method", method), ("--guidance-options", options), ("--guide", guide),
            ("--negative", negative),
        ):  # fmt: skip
            if given:
                raise UsageError(
                    f"{option} does nothing at --guidance 1, which is none: give its strength, "
                    "such as --guidance 2"
                )
    if (chosen == "autoguidance") != bool(guide):
        raise UsageError(
            f"--guide is {guide}, which only autoguidance takes: leave --guidance-method away"
            if guide
            else "autoguidance needs --guide, the checkpoint of a lesser model"
        )
    if negative and chosen in WITHOUT_CONDITION:
        raise UsageError(
            f"--negative is {negative[0]}, but {chosen} tells the model the same twice"
        )
    known = inspect.signature(getattr(guidance, chosen)).parameters
    names = [name for name in known if name not in _NOT_OPTIONS]
    for name in options:
        if name not in names:
            raise UsageError(unknown(f"option of {chosen},", name, names))
    return chosen


def make_guided(
    denoiser: Any,
    scale: float,
    method: str,
    options: Mapping[str, Any],
    *,
    guide: Any = None,
    null: Null = None,
    outputs: int = 1,
) -> Any:
    """The checkpoint's denoiser under guidance.

    Args:
        denoiser: of the checkpoint.
        scale: 1 is none.
        method: one of METHODS.
        options: of the method.
        guide: the lesser model's denoiser, for autoguidance.
        null: what the second estimate is told instead: keyword -> value of a batch of one, or see
            `guidance.Null`.
        outputs: how many estimates the solver takes.

    Raises:
        TypeError, ValueError: options of a wrong type or value.
    """
    from k_diffusion import guidance

    if scale == 1 and outputs == 1:
        return denoiser
    keywords = dict(options)
    if "interval" in keywords:
        ends = keywords["interval"]
        if not isinstance(ends, list) or len(ends) != 2:
            raise ValueError(f"interval must be two numbers, such as [0.3,5], got {ends!r}")
        keywords["interval"] = tuple(ends)
    arguments = [denoiser, *([guide] if method == "autoguidance" else []), scale]
    if method not in WITHOUT_CONDITION and null is not None:
        keywords["null"] = null if callable(null) else _Instead(null)
    made = getattr(guidance, method)(*arguments, **keywords)
    made.pair = outputs == 2
    return made


class _Instead:
    """A condition with other values, for as many samples as it is for."""

    def __init__(self, null: Mapping[str, torch.Tensor]) -> None:
        self.null = null

    def __call__(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        batch = len(next(iter(condition.values())))
        wide = {k: v.expand(batch, *v.shape[1:]) for k, v in self.null.items()}
        return {**condition, **wide}
