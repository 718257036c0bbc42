"""Many processes: what they say to each other, and how they share weights and gradients.

Each process computes its share of a step's batch. The gradients are then joined in one of four
ways, each a class: `Alone`, `Overlapped` (DistributedDataParallel), `Averaged` (all-reduce once
all have computed, so that a process may fail and all begin the step again) and `Sharded` (FSDP2:
each process also holds only its share of weights, average and optimiser).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.gradient import OutOfMemory
from k_diffusion.training.sections import AUTO
from k_diffusion.training.shards import local

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
        reasons = self.gather(None if own is None else " ".join(str(own).split()) or repr(own))
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


# ---------------------------------------------------------------- how gradients are joined


class Alone:
    """One process.

    Attributes:
        module: inputs -> losses, once `prepare` or `begin` has made it.
        retries: whether a step that ran out of memory can be begun again.
        splits: whether noise is told from gradient by micro-batches, of which it needs two.
    """

    retries = True
    splits = True

    def __init__(self, accelerator: Any, processes: Processes) -> None:
        self.accelerator, self.processes = accelerator, processes
        self.module: Any = None

    def shard(self, objective: nn.Module, network: nn.Module) -> None:
        """Take away what this process shall not hold; before optimiser and average are made.

        Args:
            objective: holds the network; what training calls.
            network: whose weights are meant.
        """

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Make `module`; gives the optimiser as it is to be stepped."""
        # The optimiser's state is where it belongs: moving it, accelerate would cast it, too.
        self.module, prepared = self.accelerator.prepare(
            objective, optimizer, device_placement=[True, False]
        )
        return prepared

    def begin(self, has_unused: Callable[[], bool], trial: Callable[[], None]) -> None:
        """Before a step.

        Args:
            has_unused: whether weights take no part in the loss of this process.
            trial: computes a gradient through `module`, and forgets it.
        """

    def joining(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch, the last of its step or not."""
        return nullcontext()

    def finish(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
        """After the last micro-batch: what is left to do until all gradients are the mean."""

    def squared_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's part of a squared norm: the sum over processes is the whole, float64."""
        norm = nn.utils.get_total_norm(tensors, foreach=True)
        return norm.double().square() / self.processes.count

    def after_forward(self, objective: nn.Module) -> None:
        """After a forward pass that no backward pass follows."""


class Overlapped(Alone):
    """DistributedDataParallel: gradients are averaged while others are still computed.

    Whether some weights take no part in the loss is seen in a session's first step: by one sample
    of each process. Later all weights have to take part in each step if they did so then.
    """

    retries = False  # who fails leaves the others waiting in the midst of an average
    splits = False  # the processes are the parts

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        self._objective = objective
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def begin(self, has_unused: Callable[[], bool], trial: Callable[[], None]) -> None:
        if self.module is not None:
            return
        from accelerate import DistributedDataParallelKwargs

        # To look for unused weights in every step costs a walk through the graph, and not to look
        # where there are some never ends the average. All have to do alike.
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=self.processes.any(has_unused())
        )
        self.module = self.accelerator.prepare_model(self._objective)
        # The first backward pass lays the gradients in other buckets for all that follow, and in
        # others they are summed in another order: were it a step's, a resumed run would differ.
        trial()

    def joining(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.module.no_sync()


class Averaged(Alone):
    """All compute, then all average: until then each may run out of memory, and all begin again."""

    splits = False

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        self.module = self.accelerator.prepare_model(objective, evaluation_mode=True)
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def finish(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
        send_from_main(buffers)
        fill_gradients(parameters, self.processes)
        average([p.grad for p in parameters if p.grad is not None], self.processes.count)


class Sharded(Alone):
    """FSDP2: weights are gathered block by block when they are computed with.

    Every micro-batch's gradient is averaged at once, into shards: to keep them whole until the
    last would take the memory that sharding spares. The arithmetic's precision is autocast's as
    everywhere, so that the numbers are those of one process; weights are gathered in float32.

    A part of the batch, for the noise scale, is what is averaged at once: a micro-batch of every
    process. Weights of a single number, which are averaged at the end, count there by each
    process's own micro-batch.
    """

    retries = False

    def shard(self, objective: nn.Module, network: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        # A single number cannot be cut: every process keeps it, and `finish` averages it.
        numbers = {p for p in network.parameters() if not p.ndim}
        options: dict[str, Any] = {"mesh": mesh} | ({"ignored_params": numbers} if numbers else {})
        for block in blocks_of(network):
            block.register_forward_hook(_with_own_memory)
            fully_shard(block, **options)
        # Not the network, so that its other methods too have their weights within the objective.
        fully_shard(objective, **options)

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        self.module = self.accelerator.prepare_model(objective, evaluation_mode=True)
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def finish(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
        send_from_main(buffers)
        fill_gradients([p for p in parameters if local(p) is p], self.processes)
        whole = [p.grad for p in parameters if p.grad is not None and local(p.grad) is p.grad]
        average(whole, self.processes.count)

    def squared_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        cut = [local(t) for t in tensors if local(t) is not t]
        whole = [t for t in tensors if local(t) is t]
        square = nn.utils.get_total_norm(cut, foreach=True).double().square()
        return square + super().squared_norm(whole) if whole else square

    def after_forward(self, objective: nn.Module) -> None:
        # Else the outermost weights stay gathered, and the next step computes with old ones.
        objective.reshard()  # type: ignore[operator]


def _with_own_memory(module: nn.Module, args: Any, output: Any) -> Any:
    """A block's output, copied where it is a view: changed in place, such a one would lose the
    hook that gathers the block's weights again for the backward pass."""
    if isinstance(output, Tensor):
        return output.clone() if output._is_view() else output
    if type(output) in (tuple, list):
        return type(output)(_with_own_memory(module, args, part) for part in output)
    return output


def make_joining(config: TrainConfig, accelerator: Any, processes: Processes) -> Alone:
    """How the processes of a run join their gradients."""
    way: type[Alone]
    if processes.count == 1:
        way = Alone
    elif config.parallel == "fsdp":
        way = Sharded
    elif config.micro_batch_size == AUTO:
        way = Averaged
    else:
        way = Overlapped
    return way(accelerator, processes)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network whose weights are gathered one after the other.

    They are what its `shard_blocks()` gives, where it has that, or else the modules in its lists
    of modules: the outermost, with weights.
    """
    if (offered := getattr(network, "shard_blocks", None)) is not None:
        return list(offered())
    found: list[nn.Module] = []

    def look(module: nn.Module, listed: bool) -> None:
        if listed and not isinstance(module, nn.ModuleList):
            if any(p.ndim for p in module.parameters()):
                found.append(module)
            return
        for child in module.children():
            look(child, isinstance(module, nn.ModuleList))

    look(network, False)
    return found


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
