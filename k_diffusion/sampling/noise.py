"""Noise that belongs to a sample, not to a batch: each sample has a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from k_diffusion.sampling.expr import Interval
from k_diffusion.utils.maths import fold_seed

# Streams of one seed. The initial noise and the noise of a sampler must not be the same numbers,
# nor those of two kinds of sources, nor of two passes of one run. (3 is also the probes' stream of
# likelihoods, which draw no path.)
INITIAL, PATH, BROWNIAN, FRESH, ENHANCED, RESAMPLED = 1, 2, 3, 4, 5, 6


class NoiseSource(Protocol):
    """Makes the noise of a run."""

    def draw(self, interval: Interval) -> Tensor:
        """Unit Gaussian noise of the state's shape, dtype and device, for an interval."""
        ...


class Canvas:
    """A state's shape and dtype, the device on which its noise is made, and that where it is used.

    Args:
        seeds: one per sample.
        like: a tensor of shape (B, ...) that gives shape and dtype of the noise, and the device
            where it is used.
        on_cpu: make it on the CPU, so that a seed gives the same noise on every device.
    """

    def __init__(self, seeds: Sequence[int], like: Tensor, on_cpu: bool) -> None:
        if len(seeds) != like.shape[0]:
            raise ValueError(f"{like.shape[0]} samples need as many seeds, got {len(seeds)}")
        self._home = like.device
        self._shape = like.shape
        self._like = like.new_empty(0, device="cpu" if on_cpu else None)

    def generator(self) -> torch.Generator | None:
        """A new generator where the noise is made; none on the meta device, of shapes only."""
        device = self._like.device
        return None if device.type == "meta" else torch.Generator(device)

    def empty(self) -> Tensor:
        """Room for noise, shape (B, ...), where it is made."""
        return self._like.new_empty(self._shape)

    def hand_over(self, noise: Tensor) -> Tensor:
        """The noise where it is used; the host does not wait until it has arrived."""
        if noise.device == self._home:
            return noise
        if self._home.type == "cuda":  # from pinned memory, which is not given away before
            return noise.pin_memory().to(self._home, non_blocking=True)
        return noise.to(self._home)


class SampleNoise:
    """Independent unit noise, each sample's drawn from its own seed.

    A sample gets the same noise alone, in any batch and in any order.

    Args:
        seeds: one per sample.
        like: a tensor of shape (B, ...) that gives shape, dtype and device of the noise.
        stream: separates uses of one seed.
        on_cpu: make the noise on the CPU, so that a seed gives the same on every device.
    """

    def __init__(
        self, seeds: Sequence[int], like: Tensor, stream: int = PATH, *, on_cpu: bool = False
    ) -> None:
        self._canvas = Canvas(seeds, like, on_cpu)
        self._generators = [self._canvas.generator() for _ in seeds]
        for seed, generator in zip(seeds, self._generators, strict=True):
            if generator is not None:
                generator.manual_seed(fold_seed(seed, stream))

    def draw(self, interval: Interval | None = None) -> Tensor:
        """Fresh unit noise of shape (B, ...), independent of all that was drawn before."""
        noise = self._canvas.empty()
        for sample, generator in zip(noise, self._generators, strict=True):
            sample.normal_(generator=generator)
        return self._canvas.hand_over(noise)


class CallerNoise:
    """A caller's own `noise_sampler(sigma, sigma_next)`, for plans made with `intervals=True`.

    Args:
        noise_sampler: given two numbers, returns unit noise of the state's shape and device, in any
            floating-point dtype. It may be one buffer, which is copied: a plan can hold noise over
            the next call.
        like: a tensor of the state's shape, dtype and device.
        fresh: makes the noise that belongs to no path (churn), of which the caller's sampler knows
            nothing. None: from torch's global generator.
    """

    def __init__(
        self,
        noise_sampler: Callable[[float, float], Tensor],
        like: Tensor,
        fresh: NoiseSource | None = None,
    ) -> None:
        self._sampler = noise_sampler
        self._fresh = fresh
        self._like = like.new_empty(0)
        self._shape = like.shape

    def draw(self, interval: Interval) -> Tensor:
        if interval.fresh:
            if self._fresh is not None:
                return self._fresh.draw(interval)
            return torch.randn_like(self._like.new_empty(self._shape))
        noise = self._sampler(interval.start.sigma, interval.end.sigma)
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(
                f"noise_sampler must return unit noise, a floating-point tensor, got {kind}"
            )
        if noise.shape != self._shape:
            raise ValueError(
                f"noise_sampler returned shape {tuple(noise.shape)} for a state of shape "
                f"{tuple(self._shape)}"
            )
        if noise.device != self._like.device:
            raise ValueError(
                f"noise_sampler returned a tensor on {noise.device} for a state on "
                f"{self._like.device}: make its noise there"
            )
        return noise.to(self._like.dtype, copy=True)


def unit_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    stream: int = INITIAL,
) -> Tensor:
    """Initial noise for `KSampler.sample`: sample i is a function of seeds[i] alone.

    Args:
        shape: of one sample, (C, H, W) say.
        seeds: one per sample.
        device: where it is used. It is made on the CPU, so that a seed gives the same noise on
            every device.
        stream: separates uses of one seed.

    Returns:
        Unit Gaussian noise, shape (len(seeds), *shape), float32.
    """
    like = torch.empty(len(seeds), *shape)
    return SampleNoise(seeds, like, stream).draw().to(device)
