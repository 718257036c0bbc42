"""Noise that belongs to a sample, not to a batch: each sample has a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k_diffusion.sampling.expr import Interval
from k_diffusion.utils.maths import fold_seed

# Streams of one seed. The initial noise and the noise of a sampler must not be the same numbers.
INITIAL, PATH = 1, 2


class SampleNoise:
    """Independent unit noise, each sample's drawn from its own seed.

    A sample gets the same noise alone, in any batch and in any order.

    Args:
        seeds: one per sample.
        like: a tensor of shape (B, ...) that gives shape, dtype and device of the noise.
        stream: separates uses of one seed.
    """

    def __init__(self, seeds: Sequence[int], like: Tensor, stream: int = PATH) -> None:
        if len(seeds) != like.shape[0]:
            raise ValueError(f"{like.shape[0]} samples need as many seeds, got {len(seeds)}")
        self._like = like.new_empty(0)
        self._shape = like.shape
        self._generators: list[torch.Generator | None]
        if like.device.type == "meta":  # shapes only: there is no generator, and nothing to seed
            self._generators = [None] * len(seeds)
        else:
            self._generators = [
                torch.Generator(like.device).manual_seed(fold_seed(seed, stream)) for seed in seeds
            ]

    def draw(self, interval: Interval | None = None) -> Tensor:
        """Fresh unit noise of shape (B, ...), independent of all that was drawn before."""
        noise = self._like.new_empty(self._shape)
        for sample, generator in zip(noise, self._generators, strict=True):
            sample.normal_(generator=generator)
        return noise


class CallerNoise:
    """A caller's own `noise_sampler(sigma, sigma_next)`, for plans made with `intervals=True`.

    Fresh noise (churn), which belongs to no path, comes from torch's global generator.

    Args:
        noise_sampler: given two numbers, returns unit noise of the state's shape.
        like: a tensor of the state's shape, dtype and device.
    """

    def __init__(self, noise_sampler: Callable[[float, float], Tensor], like: Tensor) -> None:
        self._sampler = noise_sampler
        self._like = like.new_empty(0)
        self._shape = like.shape

    def draw(self, interval: Interval) -> Tensor:
        if interval.fresh:
            return torch.randn_like(self._like.new_empty(self._shape))
        noise = self._sampler(interval.start.sigma, interval.end.sigma)
        if noise.shape != self._shape:
            raise ValueError(
                f"the noise sampler returned shape {tuple(noise.shape)} for a state of shape "
                f"{tuple(self._shape)}"
            )
        return noise


def unit_noise(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Initial noise for `KSampler.sample`: sample i is a function of seeds[i] alone.

    Args:
        shape: of one sample, (C, H, W) say.
        seeds: one per sample.
        device: where it is used. It is made on the CPU, so that a seed gives the same noise on
            every device.

    Returns:
        Unit Gaussian noise, shape (len(seeds), *shape), float32.
    """
    like = torch.empty(len(seeds), *shape)
    return SampleNoise(seeds, like, INITIAL).draw().to(device)
