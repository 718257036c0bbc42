"""The machine: devices and processes as accelerate sees them, and what is drawn on them."""

from __future__ import annotations

from typing import Any

import torch

from k_diffusion.training.config import ConfigError


def make_accelerator(precision: str) -> Any:
    """accelerate's view of the machine, once a process; its state is shared by all of them."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()  # another run of this process had another precision
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError as error:
        AcceleratorState._reset_state()
        message = " ".join(str(error).split())
        raise ConfigError(f"precision = {precision!r} does not work here: {message}") from None
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision = 'fp16' needs a GPU; give 'bf16' or 'no'")
    return accelerator


def seed_network(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from. (torch.manual_seed seeks every kind of device each time.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
