"""How the gradients of several processes become one.

Each process computes its share of a step's batch. The gradients are then joined in one of four
ways, each a class: `Alone`, `Overlapped` (DistributedDataParallel), `Averaged` (all-reduce once
all have computed, so that a process may fail and all begin the step again) and `Sharded` (FSDP2:
each process also holds only its share of weights, average and optimiser).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from k_diffusion.training.config import TrainConfig
from k_diffusion.training.parallel import Processes, average, fill_gradients, send_from_main
from k_diffusion.training.sections import AUTO
from k_diffusion.training.shards import local


class Joining(ABC):
    """A way in which the processes of a run join their gradients.

    Attributes:
        module: inputs -> losses, once `prepare` or `begin` has made it.
        retries: whether a step that ran out of memory can be begun again.
        splits: whether noise is told from gradient by micro-batches, of which it needs two.
        cuts: whether a process holds its share of the weights alone, and every micro-batch's
            gradient is joined at once.
    """

    retries: ClassVar[bool]
    splits: ClassVar[bool]
    cuts: ClassVar[bool] = False

    def __init__(self, accelerator: Any, processes: Processes) -> None:
        self.accelerator, self.processes = accelerator, processes
        self.module: Any = None

    def shard(self, objective: nn.Module, network: nn.Module) -> None:
        """Take away what this process shall not hold; before optimiser and average are made.

        Args:
            objective: holds the network; what training calls.
            network: whose weights are meant.
        """

    @abstractmethod
    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Make `module`; gives the optimiser as it is to be stepped."""

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


@final
class Alone(Joining):
    """One process."""

    retries = True
    splits = True

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        # The optimiser's state is where it belongs: moving it, accelerate would cast it, too.
        self.module, prepared = self.accelerator.prepare(
            objective, optimizer, device_placement=[True, False]
        )
        return prepared


@final
class Overlapped(Joining):
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


@final
class Averaged(Joining):
    """All compute, then all average: until then each may run out of memory, and all begin again."""

    retries = True
    splits = False

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        self.module = self.accelerator.prepare_model(objective, evaluation_mode=True)
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def finish(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
        send_from_main(buffers)
        fill_gradients(parameters, self.processes)
        average([p.grad for p in parameters if p.grad is not None], self.processes.count)


@final
class Sharded(Joining):
    """FSDP2: weights are gathered block by block when they are computed with.

    Every micro-batch's gradient is averaged at once, into shards: to keep them whole until the
    last would take the memory that sharding spares. The arithmetic's precision is autocast's as
    everywhere, so that the numbers are those of one process; weights are gathered in float32.

    A part of the batch, for the noise scale, is what is averaged at once: a micro-batch of every
    process. Weights of a single number, which are averaged at the end, count there by each
    process's own micro-batch.
    """

    retries = False
    splits = True
    cuts = True

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


def make_joining(config: TrainConfig, accelerator: Any, processes: Processes) -> Joining:
    """How the processes of a run join their gradients."""
    way: type[Joining]
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
