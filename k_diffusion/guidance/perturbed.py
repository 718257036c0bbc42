"""Perturbed-attention guidance: away from the same model with its self-attention spoilt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from k_diffusion.denoiser import make_denoiser
from k_diffusion.guidance.base import Scale
from k_diffusion.guidance.contrast import Contrast, Keywords
from k_diffusion.models.attention import MixesPositions


def self_attentions(network: nn.Module, names: Sequence[str] = ("*",)) -> dict[str, MixesPositions]:
    """The self-attentions of a network of this library, by name.

    Args:
        network: a module that holds some.
        names: patterns such as "*middle*", of which one must fit.

    Raises:
        ValueError: none fits.
    """
    known = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, MixesPositions)
    }
    if not known:
        raise ValueError(
            f"{type(network).__name__} has no self-attention of this library to perturb: use "
            "another kind of guidance"
        )
    chosen = {
        name: module
        for name, module in known.items()
        if any(fnmatchcase(name, pattern) for pattern in names)
    }
    if not chosen:
        raise ValueError(
            f"no self-attention of {type(network).__name__} is called {', '.join(names)}; there "
            f"are {', '.join(known)}"
        )
    return chosen


@contextmanager
def perturbed(modules: Sequence[MixesPositions]) -> Iterator[None]:
    """Within the block these take from every position its own value alone."""
    before = [module.identity for module in modules]
    try:
        for module in modules:
            module.identity = True
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.identity = was


class Perturbed:
    """The second estimate of perturbed-attention guidance, in a call of its own.

    Args:
        denoiser: around a network of this library; the same as the first estimate's, or one inside.
        names: patterns of the self-attentions to spoil.
    """

    def __init__(self, denoiser: Any, names: Sequence[str] = ("*",)) -> None:
        network = getattr(denoiser, "network", denoiser)
        if not isinstance(network, nn.Module):
            raise TypeError(
                "perturbed-attention guidance needs a denoiser around a network of this library, "
                f"got {type(denoiser).__name__}"
            )
        chosen = self_attentions(network, names)
        self.names, self.modules = tuple(chosen), list(chosen.values())

    def __call__(
        self, denoiser: Any, x: Tensor, sigma: Tensor, condition: Keywords
    ) -> tuple[Tensor, Tensor]:
        """See `Second`."""
        d = denoiser(x, sigma, **condition)
        with perturbed(self.modules):
            return d, denoiser(x, sigma, **condition)


def perturbed_attention(
    denoiser: Any,
    scale: Scale,
    *,
    names: Sequence[str] = ("*",),
    interval: tuple[float, float] | None = None,
) -> Contrast:
    """Perturbed-attention guidance, with or without a condition: u + scale (d - u).

    Args:
        denoiser: around a network of this library.
        scale: 1 is no guidance; the paper's s is this one less 1.
        names: patterns of the self-attentions to spoil; the paper takes those of the middle.
        interval: see `cfg`.

    Source: Ahn et al. 2024, arXiv:2403.17377, eqs. 12 and 13.
    """
    denoiser = make_denoiser(denoiser)
    return Contrast(denoiser, Perturbed(denoiser, names), scale, interval=interval)
