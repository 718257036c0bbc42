"""One file of a whole Stable Diffusion checkpoint, with the names of CompVis."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE = {
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}  # fmt: skip


def compvis(pipeline: Any, layers: int = 1) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion pipeline, with `layers` to a block, by those names."""
    found = {}
    for name, weight in pipeline.unet.state_dict().items():
        found[f"model.diffusion_model.{_unet(name, layers)}"] = weight
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, weight in pipeline.vae.state_dict().items():
        wide = weight
        if re.search(r"to_(q|k|v|out\.0)\.weight", name):
            wide = weight[..., None, None]  # a convolution there
        found[f"first_stage_model.{_vae(name, blocks)}"] = wide
    for name, weight in pipeline.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{bare}"] = weight
    return {name: weight.clone().contiguous() for name, weight in found.items()}


def _unet(name: str, layers: int) -> str:
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    for ours, theirs in RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{ours}\.", rf"\1.{theirs}.", name)
    place = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if place is None:
        name = name.replace("mid_block.attentions.0", "middle_block.1")
        return re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    side, block, kind, layer, rest = place.groups()
    first = int(block) * (layers + 1)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + int(layer) + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.2.{rest}"
    return f"output_blocks.{first + int(layer)}.{int(kind == 'attentions')}.{rest}"


def _vae(name: str, blocks: int) -> str:
    for ours, theirs in VAE.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
    if up is None:
        return name
    rest = up[2].replace("resnets", "block").replace("upsamplers.0", "upsample")
    return f"decoder.up.{blocks - 1 - int(up[1])}.{rest}"
