"""Which blocks a checkpointing policy chooses: by their place, and by their level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from k_diffusion.models import make_model
from k_diffusion.models.recompute import Checkpointing

UNET = {"channels": 8, "channel_mults": (1, 2), "attention": (False, True), "head_channels": 8}
SMALL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unet": (
        {**UNET, "blocks": 1},
        ["down.0.0", "down.1.0", "middle.0", "middle.1", "up.1.0", "up.0.0"],
    ),
    "mp_unet": (
        {**UNET, "blocks": 1},
        [
            *("down.0.0", "down.1.0", "down.1.1", "middle.0", "middle.1"),
            *("up.0.0", "up.0.1", "up.1.0", "up.1.1", "up.1.2"),
        ],
    ),
    "image_v1": (
        {"channels": (8, 8), "depths": (2, 1), "self_attention": (False, True)},
        [
            *("u_net.d_blocks.0.1", "u_net.d_blocks.0.2"),
            *("u_net.d_blocks.1.1", "u_net.d_blocks.1.2"),
            *("u_net.u_blocks.0.0", "u_net.u_blocks.0.1"),
            *("u_net.u_blocks.1.0", "u_net.u_blocks.1.1"),
        ],
    ),
    "hourglass": (
        {"patch_size": 1, "widths": (8, 16), "depths": (2, 1), "head_channels": 8, "kernel_size": 3}
        | {"mapping_width": 8},
        ["down_levels.0.0", "down_levels.0.1", "mid_level.0", "up_levels.0.0", "up_levels.0.1"],
    ),
    "dit": (
        {"width": 8, "head_channels": 8, "depth": 3},
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
}
LEVELS = {
    "unet": [0, 1, 1, 1, 1, 0],
    "mp_unet": [0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "image_v1": [0, 0, 1, 1, 1, 1, 0, 0],
    "hourglass": [0, 0, 1, 0, 0],
    "dit": [0, 0, 0],
}


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        *((False, []), (True, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4])),
        *((2, [1, 3]), (3, [2]), (5, [4])),
        *(((0,), [0, 4]), ((1,), [1, 3]), ((0, 2), [0, 2, 4])),
    ],
)
def test_a_policy_chooses(policy: Any, chosen: list[int]) -> None:
    levels = [0, 1, 2, 1, 0]
    choice = Checkpointing(policy)
    assert [i for i in range(5) if choice.chooses(i, levels[i])] == chosen


@pytest.mark.parametrize("name", SMALL)
def test_blocks_are_numbered_as_they_run_and_know_their_level(name: str) -> None:
    options, blocks = SMALL[name]
    network: Any = make_model({"type": name, "in_channels": 1, **options})
    names = {id(module): name for name, module in network.named_modules()}
    run, ran = network.checkpointing.run, []

    def watched(block: Any, *args: Any, index: int, level: int = 0) -> Any:
        # Of image_v1 a function joins a skip, and its module is told to it.
        module = block if isinstance(block, nn.Module) else args[0]
        ran.append((names[id(module)], index, level))
        return run(block, *args, index=index, level=level)

    network.checkpointing.run = watched
    network(torch.randn(1, 1, 8, 8), torch.ones(1))
    assert ran == list(zip(blocks, range(len(blocks)), LEVELS[name], strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_a_policy_that_chooses_nothing_is_refused(name: str) -> None:
    options, blocks = SMALL[name]
    most = len(blocks)
    make_model({"type": name, **options, "checkpointing": most})
    refusal = f"checkpointing = {most + 1} chooses none of the model's {most} blocks; .* {most}$"
    with pytest.raises(ValueError, match=refusal):
        make_model({"type": name, **options, "checkpointing": most + 1})
    with pytest.raises(ValueError, match=r"checkpointing = \(\) names no level; .* or false"):
        make_model({"type": name, **options, "checkpointing": []})
