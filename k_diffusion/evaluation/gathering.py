"""What processes that share the work say to each other, by torch.distributed where it has begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from k_diffusion.evaluation.moments import Moments

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def on_first(work: Callable[[], T]) -> T:
    """What the first process's work gives, on every process.

    Raises:
        Exception: on the first process what the work raised; on others a RuntimeError of it.
    """
    rank, world = place()
    if world == 1:
        return work()
    said: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            said[0] = work()
        except Exception as error:
            failure, said[1] = error, str(error)
    distributed.broadcast_object_list(said, src=0)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise ElsewhereError(said[1])
    return said[0]


def on_first_looking(work: Callable[[Callable[[], None]], T], look: Callable[[], None]) -> T:
    """`on_first` for long work: after each of its steps all processes look.

    Args:
        work: is given what it calls after each step.
        look: may raise, on all processes or on none, to end it.
    """
    rank, world = place()
    if world == 1:
        return work(look)
    result: Any = None
    failure: Exception | None = None
    ended_by_look = False

    def step() -> None:
        nonlocal ended_by_look
        _first_says(True)
        ended_by_look = True
        look()
        ended_by_look = False

    if rank:
        while _first_says(False):
            look()
    else:
        try:
            result = work(step)
        except Exception as error:
            if ended_by_look:  # the others have left, too
                raise
            failure = error
        _first_says(False)

    def told() -> T:
        if failure is not None:
            raise failure
        return cast(T, result)

    return on_first(told)


def look_last(parts: int, look: Callable[[], None]) -> None:
    """What a process calls that has looked after each of its parts, of which the processes take one
    each in turn: so that all look equally often."""
    rank, world = place()
    if parts % world and rank >= parts % world:
        look()


class ElsewhereError(RuntimeError):
    """What failed on the first process, which tells of it."""

    everywhere = True  # of several processes all meet it, so that one may speak for them


def joined_moments(moments: Moments) -> Moments:
    """What all processes have seen together, the same on each."""
    _, world = place()
    if world == 1:
        return moments
    count = _total(torch.tensor(float(moments.count), dtype=torch.float64))
    total = Moments(len(moments.mean))
    total.count = round(float(count))
    if not total.count:
        return total
    total.mean = _total(moments.mean.cpu() * moments.count) / total.count
    apart = moments.mean.cpu() - total.mean
    total.scatter = _total(moments.scatter.cpu() + moments.count * apart.outer(apart))
    return total


def joined_rows(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """All processes' rows on the CPU, in the order of their numbers, the same on each.

    Args:
        rows: of this process, shape (count, ...).
        numbers: of each, int64, shape (count,).
    """
    _, world = place()
    rows, numbers = rows.cpu(), numbers.cpu()
    if world > 1:
        rows, numbers = _stacked(rows), _stacked(numbers)
    order = numbers.argsort(stable=True)
    return rows[order], numbers[order]


def _device() -> torch.device:
    """Where what is said has to be: NCCL knows the GPU's memory alone."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _first_says(more: bool) -> bool:
    """Whether the first process has more to do; what others give does not count."""
    return bool(_total(torch.tensor(float(more and place()[0] == 0))))


def _total(values: Tensor) -> Tensor:
    values = values.to(_device(), copy=True)
    distributed.all_reduce(values)
    return values.cpu()


def _stacked(rows: Tensor) -> Tensor:
    """The rows of all processes, however many each has."""
    _, world = place()
    device = _device()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
    most = int(max(counts))
    padded = rows.new_zeros(most, *rows.shape[1:]).to(device)
    padded[: len(rows)] = rows.to(device)
    found = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(found, padded)
    return torch.cat([part[: int(n)] for part, n in zip(found, counts, strict=True)]).cpu()
