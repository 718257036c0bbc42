"""Changes the images of each step: the whole batch at once, where the network is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models import Conditioner
from k_diffusion.models.registry import known_augmentation
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Purpose, Source
from k_diffusion.utils.augmentation import apart, normals, random_flip, random_shift
from k_diffusion.utils.colours import ColourChange
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.warp import CONDITION, Warp, random_zoom

COLOURS = ColourChange()
"""No change of them."""

KEYWORD = "augmentation"
"""Under which the network is told."""

_FLIP, _SHIFT, _CROP, _COLOURS, _WARP, _NOISE = range(6)
"""Keys of each change's numbers, part of what a seed means: add new ones, never change one."""


class Augmentation:
    """Changes the images of a run, each as its place in the run decides.

    Args:
        config: of the run.
        network: which is told of the warp.
        source: of the images.
        conditioner: of the run; None: there is none.

    Raises:
        ConfigError: what is asked for does not fit the data, the network or the conditioner.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        source: Source,
        conditioner: Conditioner | None = None,
    ) -> None:
        own = config.augmentation
        self.config, self.seed = own, config.seed
        self.told = own.told
        self.colours = ColourChange(
            own.hue, own.saturation, own.greyscale, own.contrast, own.brightness
        )
        self.recolours = self.colours != COLOURS
        self.warp = Warp(own.warp) if own.warp else None
        if own.chosen:
            self._check_data(source)
        if self.told:
            self._check_told(network, conditioner)

    def __call__(self, x0: Tensor, places: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Changed images, and what the network is told of it.

        Args:
            x0: data in [-1, 1], shape (B, C, H, W), on any device.
            places: the samples' in the whole run.
        """
        own = self.config
        if not own.chosen:
            return x0, {}
        seeds = [fold_seed(self.seed, Purpose.CHANGES, place) for place in places]
        if own.flip:
            x0 = random_flip(x0, apart(seeds, _FLIP), own.flip)
        if own.shift:
            x0 = random_shift(x0, own.shift, apart(seeds, _SHIFT))
        if own.crop < 1:
            x0 = random_zoom(x0, own.crop, apart(seeds, _CROP))
        if self.recolours:
            x0 = self.colours(x0, apart(seeds, _COLOURS))
        said: dict[str, Tensor] = {}
        if self.warp is not None:
            x0, numbers = self.warp(x0, apart(seeds, _WARP))
            said = {KEYWORD: numbers} if self.told else {}
        if own.noise:
            x0 = x0 + own.noise * normals(apart(seeds, _NOISE), x0.shape).to(x0)
        return x0, said

    def example(self) -> dict[str, Tensor]:
        """What the network is told of an image left as it is."""
        return {KEYWORD: torch.zeros(1, CONDITION)} if self.told else {}

    def _check_data(self, source: Source) -> None:
        chosen, shape = self.config.chosen, source.shape
        named = " and ".join(f"augmentation.{key}" for key in chosen)
        if "autoencoder" in source.facts():
            raise ConfigError(f"{named} is for pictures, not for latents: leave it out")
        moving = {"flip", "shift", "crop", "warp"} & set(chosen)
        if len(shape) != 3 and set(chosen) != {"noise"}:
            raise ConfigError(f"{named}: data of shape {shape} are no pictures; leave it out")
        colourful = {"hue", "saturation", "greyscale"} & set(chosen)
        if (colourful and shape[0] not in (3, 4)) or (self.recolours and shape[0] > 4):
            keys = " and ".join(f"augmentation.{key}" for key in chosen if hasattr(COLOURS, key))
            raise ConfigError(
                f"{keys}: images of {shape[0]} channels have no such colours; leave it out"
            )
        raws: dict[str, Any] = dict(source.batch(torch.tensor([0])).raws) if moving else {}
        for name, raw in raws.items():
            one = raw[0] if len(raw) else None
            if isinstance(one, Tensor) and tuple(one.shape[-2:]) == shape[-2:] and one.ndim > 1:
                raise ConfigError(
                    f"{named} moves the images but not the data's {name!r}, a picture of the same "
                    "size, which would no longer fit them: leave it out"
                )

    def _check_told(self, network: nn.Module, conditioner: Conditioner | None) -> None:
        width, name = known_augmentation(network), type(network).__name__
        if width != CONDITION:
            has = f"takes {width} numbers" if width else "cannot be told of it"
            raise ConfigError(
                f"augmentation.warp is told to the network by {CONDITION} numbers, but {name} "
                f"{has}: give a model with augmentation_dim = {CONDITION} (an established one: "
                "augment_wrapper = true), or augmentation.leaky = true, by which it draws warped "
                "images"
            )
        if conditioner is not None and KEYWORD in conditioner.keywords:
            raise ConfigError(
                f"{type(conditioner).__name__} and augmentation.warp both tell the network its "
                f"{KEYWORD}: leave one of them out"
            )


def unaugmented(network: nn.Module, count: int, device: torch.device | str) -> dict[str, Tensor]:
    """What drawn samples are told of a warp, where a network cannot do without: zeros, as training
    tells it of an image left as it is.

    Args:
        network: whose `forward` takes `augmentation` and has no default for it; else it is told
            nothing.
        count: samples.
        device: where they are drawn.
    """
    asked = inspect.signature(network.forward).parameters.get(KEYWORD)
    if asked is None or asked.default is not inspect.Parameter.empty:
        return {}
    return {KEYWORD: torch.zeros(count, known_augmentation(network) or CONDITION, device=device)}
