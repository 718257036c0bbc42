"""How a run begins: noise and seeds, an image to start from, and which part of it to keep."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling.adaptive import take_rows
from k_diffusion.sampling.masks import check_mask, known_part
from k_diffusion.sampling.noise import unit_noise
from k_diffusion.sampling.nonfinite import check_finite
from k_diffusion.utils.levels import Level, Levels
from k_diffusion.utils.maths import is_number


@dataclass(eq=False)
class Start:
    """The settled start of a run.

    Attributes:
        noise: unit noise, shape (B, ...), in the dtype of the result.
        seeds: one per sample.
        init: images in the data's scale, shape (B or 1, ...), in the state's dtype.
        mask: 1 where to repaint, broadcasting to the noise, in the state's dtype.
        strength: share of the steps that are walked.
    """

    noise: Tensor
    seeds: list[int]
    init: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0

    def __len__(self) -> int:
        return len(self.noise)

    def tail(self, levels: Levels) -> Levels:
        """The levels that are walked; strength above 0."""
        return levels if self.strength == 1 else levels.start_at(self.strength)

    def state(self, first: Level) -> Tensor:
        """The state at the first level, shape (B, ...), in float32 or better."""
        dtype = torch.promote_types(self.noise.dtype, torch.float32)
        # x = alpha x0 + sigma eps without its first term, which is not known, and small there.
        x = self.noise.to(dtype) * first.sigma
        if self.init is not None and first.alpha > 0:
            if self.strength < 1:
                return x.add_(self.init, alpha=first.alpha)
            if self.mask is not None:  # here it is known
                return x.add_(self.init * (1 - self.mask), alpha=first.alpha)
        return x

    def keywords(self) -> dict[str, Tensor]:
        """What the denoiser is told of a known part."""
        if self.init is None or self.mask is None:
            return {}
        return known_part(self.init, self.mask)

    def unchanged(self) -> Tensor:
        """The images themselves, for strength 0; shape (B, ...)."""
        assert self.init is not None
        return self.init.expand(self.noise.shape).clone()

    def rows(self, rows: Sequence[int]) -> Start:
        """The start of some samples."""
        index = torch.tensor(rows, device=self.noise.device)
        return replace(
            self,
            noise=self.noise[index],
            seeds=[self.seeds[row] for row in rows],
            init=take_rows(self.init, index, len(self)),
            mask=take_rows(self.mask, index, len(self)),
        )


def make_start(
    x: Tensor | None,
    *,
    shape: Sequence[int] | None,
    seed: int | Sequence[int] | None,
    seeds: Sequence[int] | None,
    init: Tensor | None,
    strength: float | None,
    mask: Tensor | None,
    home: torch.device | None,
) -> Start:
    """Checks what a run is given to begin with, and completes it; see `KSampler.sample`.

    Args:
        home: where the model is.

    Raises:
        TypeError, ValueError: something of a wrong type, shape, value or device, by name.
    """
    share = _strength(strength, init, mask)
    if seeds is not None:
        if seed is not None:
            raise ValueError("give seed or seeds, not both: seeds is one per sample")
        seed = _listed(seeds)
    if x is None:
        x, seed = _drawn(shape, seed, init, home)
    elif not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor of unit noise, got {kind}")
    elif shape is not None and tuple(shape) != x.shape[1:]:
        raise ValueError(
            f"shape {tuple(shape)} is not that of a sample of x, {tuple(x.shape[1:])}: leave it "
            "away, it goes with no x"
        )
    if x.itemsize < 2:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x must have shape (B, C, ...) with B >= 1 and no length of 0, got {tuple(x.shape)}"
        )
    if home is not None and home != x.device:
        raise ValueError(f"x is on {x.device} but the model on {home}: move one of them")
    check_finite(x, "x, the initial noise,")
    settled = settle_seeds(seed, x.shape[0])
    if init is None:
        return Start(x, settled)
    init = _init(init, x)
    mask = None if mask is None else check_mask(mask, init.expand(x.shape))
    return Start(x, settled, init, mask, share)


def settle_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed a sample: those given, `seed + i` of one number, or drawn from torch's generator.

    Raises:
        TypeError, ValueError: no whole numbers, or not as many as samples.
    """
    if seed is None:
        return torch.randint(0, 2**62, (batch,)).tolist()
    one = whole(seed)
    if isinstance(one, int) and not isinstance(one, bool):
        return [one + i for i in range(batch)]
    if isinstance(seed, Sequence):
        seeds = [whole(s) for s in seed]
        if all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            if len(seeds) != batch:
                raise ValueError(f"{batch} samples need as many seeds, got {len(seeds)}")
            return seeds
    raise TypeError(f"seed must be a whole number or one per sample, got {seed!r}")


def whole(value: Any) -> Any:
    """A whole number of another library (numpy's, say) as Python's; anything else as it is."""
    if isinstance(value, (int, str, Tensor)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _listed(seeds: Any) -> Sequence[int]:
    listed = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise TypeError(f"seeds must be whole numbers, one per sample, got {seeds!r}")
    return listed


def _strength(strength: Any, init: Any, mask: Any) -> float:
    if init is None:
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None:
                raise ValueError(f"{name} says how much of init to keep: give init, the images")
        return 1.0
    if strength is None:
        if mask is None:
            raise ValueError(
                "init alone does not say how much of it to keep: give strength, from 0 (all of "
                "it) to 1 (nothing; 0.75 is usual), or a mask"
            )
        return 1.0
    if not is_number(strength) or not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength!r}")
    return float(strength)


def _init(init: Any, x: Tensor) -> Tensor:
    """init as the state's dtype has it."""
    if not isinstance(init, Tensor) or not init.is_floating_point():
        kind = init.dtype if isinstance(init, Tensor) else type(init).__name__
        raise TypeError(
            f"init must be a floating-point tensor of images in the data's scale, got {kind}"
        )
    if init.shape[1:] != x.shape[1:] or init.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"init has shape {tuple(init.shape)} and x {tuple(x.shape)}: give one image of a "
            "sample's shape, or one per sample"
        )
    if init.device != x.device:
        raise ValueError(f"init is on {init.device} but x on {x.device}: move one of them")
    check_finite(init, "init")
    return init.to(x.dtype).to(torch.promote_types(x.dtype, torch.float32))


def _drawn(
    shape: Sequence[int] | None, seed: Any, init: Any, home: torch.device | None
) -> tuple[Tensor, Any]:
    """Initial noise from the seeds, and the seeds."""
    images = init if isinstance(init, Tensor) and init.ndim > 1 else None
    if shape is None and images is None:
        raise ValueError("there is no x: give one, or the shape of a sample and seeds")
    size = tuple(images.shape[1:] if shape is None else shape)  # type: ignore[union-attr]
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"shape must be that of one sample, (C, H, W) say, got {size}")
    count = len(seed) if isinstance(seed, Sequence) else None
    if count is None:
        if images is None:
            raise ValueError(
                "seeds must be one per sample where there is no x: they tell how many to draw"
            )
        count = len(images)
    seeds = settle_seeds(seed, count)
    device = home or ("cpu" if images is None else images.device)
    noise = unit_noise(size, seeds, device)
    if images is not None and images.is_floating_point():
        noise = noise.to(images.dtype)
    return noise, seeds
