"""Many processes: what they say to each other; messages that carry weights and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.gradient import OutOfMemory
from k_diffusion.training.shards import local
from k_diffusion.utils.words import reason_of

T = TypeVar("T")
BUCKET = 32 * 2**20
"""Bytes of gradients that are averaged in one message."""


class Processes:
    """The processes of a run, as one of them sees them; everything here is done by all of them.

    Args:
        accelerator: from accelerate, which has started their talk.

    Attributes:
        index: of this one; 0 is the main one, which alone writes files and speaks.
        count: how many there are.
    """

    def __init__(self, accelerator: Any) -> None:
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def main(self) -> bool:
        return self.index == 0

    @property
    def here(self) -> int:
        """How many of them this machine has, as the launcher says; all where it says nothing."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def gather(self, value: T) -> list[T]:
        """What each process gave, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """What the main process's work gives, on every process; so no other is ahead of it.

        Raises:
            RuntimeError: the work failed; on the main process what it raised.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.main:
            try:
                outcome[0] = work()
            except Exception as error:
                failure, outcome[1] = error, str(error)
        torch.distributed.broadcast_object_list(outcome, src=0, device=self.device)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise Elsewhere(outcome[1])
        return outcome[0]

    def together(self, work: Callable[[], T], failure: Callable[[str], Exception]) -> T:
        """What this process's work gives, once all have done theirs.

        Args:
            work: done by each process.
            failure: message -> what is raised on all where the work failed on any.

        Raises:
            Exception: of the first process where it failed, with its number, unless it was the same
                on all of them; then what the work raised.
        """
        if self.count == 1:
            return work()
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:
            own = error
        reasons = self.gather(None if own is None else reason_of(own))
        found = [(index, reason) for index, reason in enumerate(reasons) if reason is not None]
        if not found:
            return cast(T, result)
        index, reason = found[0]
        alike = own is not None and len(set(reasons)) == 1
        raised = own if alike else failure(f"{reason} (on process {index} of {self.count})")
        raised.everywhere = True  # type: ignore[union-attr]  # as in ConfigError
        raise cast(Exception, raised) from None

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, elementwise, the same bits on each."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        return value if self.count == 1 else min(self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        return bool(self.total(flags).item())

    def copy_from_main(self, network: nn.Module) -> None:
        """Give every process the main one's weights and buffers."""
        self.send_from_main([*network.parameters(), *network.buffers()])

    def send_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Put the main process's values into every one's tensors."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)


class Elsewhere(RuntimeError):
    """What failed on the main process, which tells of it."""

    everywhere = True  # as in ConfigError


def check_processes(config: TrainConfig, count: int) -> None:
    """Refuse a config that cannot be shared by so many processes.

    Raises:
        ConfigError: it cannot.
    """
    if config.batch_size % count:
        raise ConfigError(
            f"batch_size = {config.batch_size} cannot be shared by {count} processes: give a "
            f"multiple of {count}"
        )
    halves = count == 1 or config.parallel == "fsdp"
    if config.noise_scale_decay is not None and halves and config.batch_size // count < 2:
        raise ConfigError(
            "noise_scale_decay is given, but a process has one image a step, and two are needed "
            "to tell noise from gradient: raise batch_size, or leave it out"
        )


# ---------------------------------------------------------------- messages


@torch.no_grad()
def send_from_main(tensors: Sequence[Tensor]) -> None:
    """Give every process the main one's values, in one message for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        joined = torch.cat([tensor.flatten() for tensor in alike])
        torch.distributed.broadcast(joined, src=0)
        parts = joined.split([tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def fill_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Give each weight that only others have a gradient of one of zeros."""
    if not parameters:
        return
    has = [p.grad is not None for p in parameters]
    found = torch.tensor(has, dtype=torch.int32, device=processes.device)
    for parameter, own, count in zip(parameters, has, processes.total(found).tolist(), strict=True):
        if count and not own:
            parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def average(gradients: Sequence[Tensor], count: int) -> None:
    """Make each of the gradients its mean over the processes, in messages of about `BUCKET`."""
    start = 0
    while start < len(gradients):
        stop, size = start, 0
        while stop < len(gradients) and (not size or size < BUCKET):
            size += gradients[stop].numel() * gradients[stop].element_size()
            stop += 1
        bucket = list(gradients[start:stop])
        joined = torch.cat([g.float().flatten() for g in bucket]) / count
        torch.distributed.all_reduce(joined)
        parts = joined.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])
        start = stop


def clip(gradients: Sequence[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients, or this process's shards of them, to a norm of at most `largest`."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(g) for g in gradients], factor)


def out_of_memory(processes: Processes, images: int) -> OutOfMemory:
    """What to say where one of several processes cannot go on."""
    return OutOfMemory(
        f"process {processes.index} of {processes.count} ran out of memory with {images} images at "
        f"once: set micro_batch_size below {images}, or to 'auto' with parallel = 'ddp'"
    )
