"""The machine: devices and processes as accelerate sees them; what is drawn or compiled there."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.config import ConfigError
from k_diffusion.utils.words import reason_of


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
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=many and not _has_gpus(),
            dynamo_backend="no",  # the run compiles by itself
        )
    except ValueError as error:
        AcceleratorState._reset_state()
        message = reason_of(error)
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


def check_launcher(precision: str, compile: bool) -> None:
    """Refuse what accelerate's launcher was told where the run's config says another thing.

    A launcher that was told nothing says "no", which leaves both to the config.

    Raises:
        ConfigError: they differ.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("", "no", precision):
        raise ConfigError(
            f"precision = {precision!r}, but accelerate was launched with ACCELERATE_MIXED_"
            f"PRECISION = {launched!r}: give it in the config, and launch without"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no", *(["inductor"] if compile else [])):
        raise ConfigError(
            f"compile = {str(compile).lower()}, but accelerate was launched with ACCELERATE_DYNAMO_"
            f"BACKEND = {backend!r}: set compile in the config, and launch without"
        )


def is_main_process() -> bool:
    """Whether this process is the first or only one, before `make_accelerator` too."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many processes torchrun or accelerate has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_processes() -> None:
    """End this process's talk with the others of its run, as the last it does.

    Left to the interpreter's end, threads that still listen then abort the process now and then,
    after all its work.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what still holds the talk: modules that average gradients through it
        torch.distributed.destroy_process_group()


def _has_gpus() -> bool:
    """Whether there are devices by which processes can talk to each other."""
    return torch.accelerator.is_available() and not torch.backends.mps.is_available()


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep what it frees for what it allocates next; gives whether it does.

    The C library of Linux hands large blocks back to the system as soon as they are freed, and each
    page that is got again costs a fault: 59,000 of them in a step of a network of 9 M weights, a
    sixth of its time. Kept, the memory of the largest step stays taken as long as the process
    lives. Where the environment has a say of its own in it (MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_MAX_, or another allocator), that holds.
    """
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"}
    if not sys.platform.startswith("linux") or own & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def seed_network(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from. (torch.manual_seed seeks every kind of device each time.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def backward(accelerator: Any, loss: Tensor) -> None:
    """The loss's gradients, scaled for float16.

    As accelerate's own, which looks on the disk each time whether some package is there.
    """
    scaler = getattr(accelerator, "scaler", None)
    (loss if scaler is None else scaler.scale(loss)).backward()


def optimizer_step(accelerator: Any, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimiser, which the scaler of float16 leaves out at an overflow; see above."""
    scaler = getattr(accelerator, "scaler", None)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def compiled(objective: nn.Module) -> nn.Module:
    """The same objective (see `Objective`), whose network runs as torch.compile makes it.

    The weights are shared, and the objective stays what it was: its names are those of a
    checkpoint, and its modules can be watched. Compiled for each batch size by itself; a step's
    micro-batches have two at most.
    """
    denoiser: Any = objective.denoiser
    network = getattr(denoiser, "network", None)
    if network is None:  # a network that is a denoiser itself
        return _with(objective, denoiser=torch.compile(denoiser, dynamic=False))
    faster = _with(denoiser, network=torch.compile(network, dynamic=False))
    return _with(objective, denoiser=faster)


def _with(module: nn.Module, **parts: Any) -> nn.Module:
    """A shallow copy of a module that has other modules as some of its parts."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **parts}
    return twin
