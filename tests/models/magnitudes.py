"""What the tests of magnitude-preserving layers and networks measure by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {
    "in_channels": 2,
    "channels": 16,
    "channel_mults": (1, 2),
    "blocks": 1,
    "attention": (False, True),
    "head_channels": 16,
}


def rms(x: Tensor, dim: Any = None) -> Tensor:
    """Root mean square in float64."""
    return x.detach().double().square().mean(dim).sqrt()


def gaussian(*shape: int) -> Tensor:
    """Unit noise in float64."""
    return torch.randn(*shape, dtype=torch.float64)
