"""Where a pipeline's run begins that begins from images, and what of them stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.codec import Codec, as_mask


def begin_from(
    codec: Codec,
    pixels: Tensor | None,
    strength: float | None,
    mask: Any,
    x: Tensor,
    condition: Any,
) -> dict[str, Any]:
    """The keywords of a run that begins from images; a network's own mask goes to its condition.

    Args:
        codec: of the pipeline.
        pixels: in [-1, 1], shape (B, 3, H, W); None: it begins from noise.
        strength, mask: see `PipelineSampler.sample`.
        x: unit noise, shape (B, C, H, W).
        condition: the network's keywords, to which is added.

    Raises:
        ValueError: something is missing, or does not fit.
    """
    known, takes = x.shape[1], codec.network.config.in_channels
    told = type(codec.network).__name__.startswith("UNet") and takes > known
    if pixels is None:
        if mask is not None or strength is not None or told:
            what = "this network for inpainting" if told else "a mask or a strength"
            raise ValueError(f"{what} needs init, the images to begin from")
        return {}
    if told and mask is None:
        raise ValueError("this network is for inpainting: give mask, 1 where to repaint")
    if codec.kind == "image":
        codec.size(int(pixels.shape[-2]), int(pixels.shape[-1]))
    start = codec.encode(pixels).to(x.device)
    if mask is None:
        return {"init": start, "strength": strength}
    wanted = as_mask(mask)
    if wanted.shape[-2:] != pixels.shape[-2:]:
        raise ValueError(
            f"mask has size {tuple(wanted.shape[-2:])} and init {tuple(pixels.shape[-2:])}: "
            "make them alike"
        )
    if not told:
        rows, columns = start.shape[-2:]
        small = torch.nn.functional.adaptive_avg_pool2d(wanted, (rows, columns))
        return {"init": start, "strength": strength, "mask": small.to(x)}
    if takes != 2 * known + 1:
        raise ValueError(
            f"this UNet takes {takes} channels for {known} of latents: only {known} and "
            f"{2 * known + 1} (for inpainting) are understood"
        )
    hidden = (wanted >= 0.5).float()
    kept = codec.encode(pixels * (1 - hidden.to(pixels))).to(x.device)
    small = torch.nn.functional.interpolate(hidden, start.shape[-2:]).to(kept)
    both = torch.cat([small.expand(len(kept), -1, -1, -1), kept], dim=1)
    condition["concat"] = both.expand(len(x), -1, -1, -1)
    if strength is None or strength == 1:
        return {}
    return {"init": start, "strength": strength}
