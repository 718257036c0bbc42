"""Pictures as conditions: a small one to enlarge, and a part of one to complete.

They work on data of any number of dimensions: (B, C, L), (B, C, H, W) or (B, C, D, H, W).
Source: Ho et al. 2022, arXiv:2106.15282, section 2 (the low-resolution picture joined to x);
Saharia et al. 2022, arXiv:2111.05826 (the picture to complete, too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k_diffusion.models.conditioners import Conditioner, register_conditioner
from k_diffusion.models.registry import check_types
from k_diffusion.utils.augmentation import MASKS, random_mask
from k_diffusion.utils.images import load_png, to_float
from k_diffusion.utils.maths import unknown

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What pictures have in common.

    Args:
        channels: of the picture.
        size: of x, without batch and channels; only a null condition without `like` needs it.
        reads: see `Conditioner`.
    """

    channels: int = 3
    size: tuple[int, ...] = ()
    reads: str = "clean"

    def __post_init__(self) -> None:
        check_types(self)
        if self.channels < 1:
            raise ValueError(f"channels = {self.channels} is too small; give at least 1")


class _Picture(Conditioner):
    """What both share; abstract."""

    config: PictureConfig
    keywords = ("image",)

    @property
    def image_channels(self) -> int:
        """The model's option of that name."""
        return self.config.channels

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if like is not None:
            return {"image": like["image"].new_zeros(batch, *like["image"].shape[1:])}
        if not self.config.size:
            raise ValueError(
                f"a null condition of {type(self).__name__} needs the size of x: give `size` in "
                "its config, or `like`, the condition to compare with"
            )
        shape = (batch, self.image_channels, *self.config.size)
        return {"image": torch.zeros(shape, device=self.device)}

    def _pictures(self, raw: Any) -> Tensor:
        """Floats in [-1, 1] of shape (B, channels, ...), of those or of bytes, or of a list."""
        if not isinstance(raw, Tensor):
            rows = list(raw) if isinstance(raw, (list, tuple)) else [raw]
            if not rows or not all(isinstance(row, Tensor) for row in rows):
                kinds = ", ".join(sorted({type(row).__name__ for row in rows}))
                raise ValueError(
                    f"{type(self).__name__} takes pictures as tensors, got {kinds or 'none'}"
                )
            if len({row.shape for row in rows}) > 1:
                raise ValueError(
                    f"{type(self).__name__} takes pictures of one shape, got "
                    f"{', '.join(str(tuple(row.shape)) for row in rows)}"
                )
            raw = torch.stack(rows)
        pictures = raw
        if pictures.ndim not in _LINEAR or pictures.shape[1] != self.config.channels:
            raise ValueError(
                f"{type(self).__name__} takes pictures of shape (B, {self.config.channels}, "
                f"height, width) or of other dimensions, got {tuple(pictures.shape)}"
            )
        pictures = pictures.to(self.device)
        return to_float(pictures) if pictures.dtype == torch.uint8 else pictures.float()


@dataclass(frozen=True, kw_only=True)
class LowResolutionConfig(PictureConfig):
    """See `PictureConfig`.

    Args:
        factor: how many times larger than the picture x is, along each axis. Training makes the
            picture of the clean data, by means over as many pixels, unless it `reads` small ones.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor = {self.factor} is too small; give at least 1")


@register_conditioner("low_resolution")
class LowResolution(_Picture):
    """Super-resolution: a small picture, enlarged linearly to the size of x."""

    Config = LowResolutionConfig
    config: LowResolutionConfig

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"image": (B, channels, ...)}, raw: small pictures, floats in [-1, 1] or bytes."""
        small = self._pictures(raw)
        large = F.interpolate(small, scale_factor=self.config.factor, mode=_LINEAR[small.ndim])
        size = self.config.size
        if size and tuple(large.shape[2:]) != size:
            raise ValueError(
                f"a picture of {tuple(small.shape[2:])} enlarged {self.config.factor} times is of "
                f"{tuple(large.shape[2:])}, but size = {size}: give one of "
                f"{tuple(length // self.config.factor for length in size)}"
            )
        return {"image": large}

    def from_batch(self, raws: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Tensor]:
        pictures = self._pictures(self.find(raws))
        return self(self.lower(pictures) if self.config.reads == "clean" else pictures)

    def lower(self, pictures: Tensor) -> Tensor:
        """The small picture of a large one, shape (B, C, ...), by means over factor^n pixels.

        Raises:
            ValueError: a length that the factor does not divide.
        """
        factor = self.config.factor
        if any(length % factor for length in pictures.shape[2:]):
            raise ValueError(
                f"factor = {factor} does not divide the size {tuple(pictures.shape[2:])} of the "
                "data; give one that does"
            )
        return F.interpolate(
            pictures, size=[length // factor for length in pictures.shape[2:]], mode="area"
        )

    def read(self, word: str) -> Any:
        return load_png(word)[0][None]


@dataclass(frozen=True, kw_only=True)
class KnownPartConfig(PictureConfig):
    """See `PictureConfig`.

    Args:
        mask: what training hides: a name in `augmentation.MASKS`.
    """

    mask: str = "box"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in MASKS:
            raise ValueError(unknown("mask", self.mask, MASKS))


@register_conditioner("known_part")
class KnownPart(_Picture):
    """Inpainting: a picture of which a part is known, and the mask of that part.

    The mask is the last channel, 1 where the picture is known; elsewhere all channels are 0. So the
    model's image_channels is one more than the picture's.
    """

    Config = KnownPartConfig
    config: KnownPartConfig

    @property
    def image_channels(self) -> int:
        return self.config.channels + 1

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"image": (B, channels + 1, ...)}.

        Args:
            raw: a pair: pictures of shape (B, channels, ...), floats in [-1, 1] or bytes, and where
                they are known, booleans of shape (B, 1, ...).
        """
        pictures, known = self._pictures(raw[0]), raw[1]
        if known.dtype != torch.bool or known.shape != pictures[:, :1].shape:
            raise ValueError(
                f"what is known is {known.dtype} of shape {tuple(known.shape)}; give booleans of "
                f"shape {tuple(pictures[:, :1].shape)}, true where the picture is known"
            )
        mask = known.to(self.device, pictures.dtype)
        return {"image": torch.cat([pictures * mask, mask], 1)}

    def from_batch(self, raws: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Tensor]:
        pictures = self._pictures(self.find(raws))
        size = (pictures.shape[2], pictures.shape[3])
        return self((pictures, ~random_mask(self.config.mask, len(pictures), size, seeds)))

    def read(self, word: str) -> Any:
        """A PNG whose transparent part is not known."""
        picture = load_png(word)[0]
        if picture.shape[0] not in (2, 4):
            raise ValueError(f"{word} has no transparent part: what is to be made must be one")
        return picture[None, :-1], picture[None, -1:] > 0
