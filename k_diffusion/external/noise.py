"""Noise from a program's own torch generators, as diffusers' pipelines hand them about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k_diffusion.sampling.expr import Interval

Generators = torch.Generator | Sequence[torch.Generator] | None


class GeneratorNoise:
    """Unit noise drawn as diffusers draws it, so that a pipeline and a loop outside it agree.

    Numbers are made on the device of the generators. A list gives each sample its own; one
    generator draws the whole batch. Its state goes on from draw to draw: it is not seeded here.

    Args:
        generators: one for all samples, or one per sample; None: torch's global one. May be
            assigned between draws.
        like: a tensor of shape (B, ...) that gives shape, dtype and device of the noise.

    Raises:
        ValueError: generators of another number than the samples.
    """

    def __init__(self, generators: Generators, like: Tensor) -> None:
        self._shape = tuple(like.shape)
        self._like = like.new_empty(0)
        self.generators = generators

    @property
    def generators(self) -> Generators:
        return self._generators

    @generators.setter
    def generators(self, value: Generators) -> None:
        if value is not None and not isinstance(value, torch.Generator):
            value = list(value)
            if len(value) not in (1, self._shape[0]):
                raise ValueError(
                    f"{self._shape[0]} samples need as many generators, or one for all, got "
                    f"{len(value)}"
                )
        self._generators = value

    def draw(self, interval: Interval | None = None) -> Tensor:
        """Unit noise of the shape of `like`, independent of all that was drawn before."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(
            self._shape,
            generator=self._generators,
            device=self._like.device,
            dtype=self._like.dtype,
        )
