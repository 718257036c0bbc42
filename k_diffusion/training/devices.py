"""The machine: devices and processes as accelerate sees them, and what is drawn on them."""

from __future__ import annotations

import os
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
        # Left to itself accelerate would not see the other processes of a machine without a GPU.
        many = world_size() > 1
        accelerator = Accelerator(mixed_precision=precision, cpu=many and not _has_gpus())
    except ValueError as error:
        AcceleratorState._reset_state()
        message = " ".join(str(error).split())
        raise ConfigError(f"precision = {precision!r} does not work here: {message}") from None
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision = 'fp16' needs a GPU; give 'bf16' or 'no'")
    if accelerator.num_processes != world_size():
        raise ConfigError(
            f"{world_size()} processes were started, but accelerate sees "
            f"{accelerator.num_processes}: start them by torchrun or accelerate launch"
        )
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"accelerate was launched for {kind}, which wraps the network in its own way: launch "
            "it for plain processes, and set parallel = 'fsdp' to shard the weights"
        )
    return accelerator


def is_main_process() -> bool:
    """Whether this process is the first or only one, before `make_accelerator` too."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many processes torchrun or accelerate has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _has_gpus() -> bool:
    """Whether there are devices by which processes can talk to each other."""
    return torch.accelerator.is_available() and not torch.backends.mps.is_available()


def seed_network(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from. (torch.manual_seed seeks every kind of device each time.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
