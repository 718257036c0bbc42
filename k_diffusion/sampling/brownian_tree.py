"""Brownian noise by torchsde's tree, where programs expect the noise that its seeds give.

torchsde is imported when a tree is made. Ours, without it: `SampleNoise`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling.compat_tools import as_time, face


def _torchsde() -> Any:
    try:
        return face().torchsde
    except ModuleNotFoundError as error:
        if error.name not in ("torchsde", "trampoline"):
            raise
        raise ImportError(
            "the noise of a Brownian tree needs torchsde: pip install 'k-diffusion[torchsde]', or "
            "pass a noise_sampler of your own, default_noise_sampler(x) say"
        ) from error


def _finite(name: str, time: Any) -> Any:
    if not math.isfinite(time):
        raise ValueError(f"{name} is {float(time)}: a Brownian tree has finite times only")
    return time


class BatchedBrownianTree:
    """torchsde's Brownian tree between two times, one for all of x or one per sample.

    Args:
        x: gives shape, dtype and device, shape (B, ...).
        t0, t1: the ends of the path, floats or tensors of shape (), in either order.
        seed: one number, or one per sample; None: from torch's global generator.
        kwargs: torchsde's own, `tol` say.

    Raises:
        ValueError: a time that is not finite, or another number of seeds than samples.
        ImportError: torchsde is not installed.
    """

    def __init__(
        self, x: Tensor, t0: Any, t1: Any, seed: int | Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        tree = _torchsde().BrownianTree
        t0, t1, self.sign = self.sort(_finite("t0", t0), _finite("t1", t1))
        if not t0 < t1:
            raise ValueError(f"the ends of a Brownian tree must differ, both are {float(t0)}")
        w0 = kwargs.pop("w0", None)
        if w0 is None:
            w0 = torch.zeros_like(x)
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        try:
            seeds = [operator.index(seed)]  # type: ignore[arg-type]
            self.batched = False
        except TypeError:
            seeds = [operator.index(s) for s in seed]  # type: ignore[union-attr]
            self.batched = True
            if len(seeds) != x.shape[0]:
                raise ValueError(
                    f"seed must be one number or one for each of {x.shape[0]} samples, got "
                    f"{len(seeds)}"
                ) from None
            w0 = w0[0]
        # torchsde rounds its times, but compares them unrounded with the rounded ends and warns.
        self._digits = -int(math.log10(kwargs.get("tol", 1e-6)))
        self.trees = [tree(t0, w0, t1, entropy=s, **kwargs) for s in seeds]

    @staticmethod
    def sort(a: Any, b: Any) -> tuple[Any, Any, int]:
        """The two in order, and -1 if they had to be exchanged, else 1."""
        if b <= a:
            return b, a, -1
        return a, b, 1

    def __call__(self, t0: Any, t1: Any) -> Tensor:
        """The path's increment from t0 to t1, shape (B, ...)."""
        times = (round(float(_finite("time", t)), self._digits) for t in (t0, t1))
        start, end, direction = self.sort(*times)
        increments = [tree(start, end) for tree in self.trees]
        whole = torch.stack(increments) if self.batched else increments[0]
        return whole * (direction * self.sign)


class BrownianTreeNoiseSampler:
    """Unit noise for `sample_*`, of one Brownian path over sigma.

    With a seed, a sampler gets the same path whatever its levels.

    Args:
        x: gives shape, dtype and device of the noise, shape (B, ...).
        sigma_min, sigma_max: the ends of the path, floats or tensors of shape ().
        seed: one number, or one per sample; None: from torch's global generator.
        transform: the path's time as a function of sigma (a tensor).
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        self.tree = face().BatchedBrownianTree(x, *self._times(sigma_min, sigma_max), seed)

    def _times(self, *sigmas: Any) -> list[Tensor]:
        return [self.transform(as_time(sigma)) for sigma in sigmas]

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """Unit noise for the interval from sigma to sigma_next, shape (B, ...)."""
        start, end = self._times(sigma, sigma_next)
        duration = (end - start).abs()
        return self.tree(start, end) / duration.sqrt()
