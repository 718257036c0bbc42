"""The gradient of a step: by all processes together, in micro-batches, again where memory runs out.

`gradient` has the parts of which this is made, and `parallel` how processes join theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.buffers import Buffers
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Purpose
from k_diffusion.training.devices import seed_network
from k_diffusion.training.gradient import (
    OutOfMemory,
    add_gradients,
    even_parts,
    largest_that_fits,
)
from k_diffusion.training.health import unchanged_buffers
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.joining import Joining
from k_diffusion.training.noise_scale import BucketNorms, NoiseScale, PartNorms
from k_diffusion.training.objective import Objective
from k_diffusion.training.parallel import clip, out_of_memory
from k_diffusion.training.sections import AUTO
from k_diffusion.training.state import TrainingError
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.memory import is_out_of_memory, release_memory


@dataclass(frozen=True)
class Totals:
    """What all processes together found of a step.

    Attributes:
        loss: mean over the whole batch.
        square: squared norm of its gradient.
        norm: the gradient's norm on the device, float32, shape ().
        terms: name -> mean over the batch of what the loss is made of.
        part_square: mean squared norm of the gradients of the batch's parts, scaled as the loss
            was; None where noise is not measured.
        bad_files: broken files that the processes know, each one's counted.
    """

    loss: float
    square: float
    norm: Tensor
    terms: Mapping[str, float]
    part_square: float | None
    bad_files: int

    @property
    def grad_norm(self) -> float:
        return math.sqrt(self.square)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepGradient:
    """Computes the gradient of the loss in the weights.

    Args:
        config: of the run.
        network: whose buffers no trial may change.
        objective: what is made small.
        optimizer: of its weights; what it is yet to hold counts when memory is tried.
        joining: how the processes join their gradients.
        noise_scale: is told what it needs; None: noise is not measured.
        shape: of one image.

    Attributes:
        micro_batch: the most samples that a process computes at once, halved where memory runs
            out; None: to be found in the next step.
        parameters: all that is trained.
        buffers: of the objective and the network in it, as they were before the step.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        joining: Joining,
        noise_scale: NoiseScale | None,
        shape: tuple[int, ...],
    ) -> None:
        self.config, self.network, self.objective = config, network, objective
        self.optimizer, self.joining, self.noise_scale = optimizer, joining, noise_scale
        self.shape = shape
        self.processes, self.accelerator = joining.processes, joining.accelerator
        self.device = joining.processes.device
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.buffers = Buffers(objective)
        self._bucket_norms: BucketNorms | None = None
        self._share = config.batch_size // self.processes.count
        # Where noise is measured by micro-batches it takes two.
        halves = noise_scale is not None and joining.splits
        self._most_at_once = -(-self._share // 2) if halves else self._share
        self.micro_batch = self._first_micro_batch(config.micro_batch_size)

    def _first_micro_batch(self, asked: int | str | None) -> int | None:
        if asked == AUTO:
            return None
        return self._most_at_once if asked is None else min(self._most_at_once, int(asked))

    @property
    def allowed_by_memory(self) -> int | None:
        """The micro-batch where memory decided on it; None: it is the one asked for."""
        asked = self._first_micro_batch(self.config.micro_batch_size)
        return None if self.micro_batch == asked else self.micro_batch

    @property
    def gradients(self) -> list[Tensor]:
        """Those that the weights have now; of shards, this process's part is in them."""
        return [p.grad for p in self.parameters if p.grad is not None]

    # ------------------------------------------------------------ a step's

    def compute(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Each sample's loss, and the gradient of the whole batch's mean in the weights, unscaled.

        Where memory runs out, the same step begins again with half the micro-batch.

        Returns:
            The losses; and where noise is measured, what this process counts of the mean squared
            norm of the gradients of the batch's parts, scaled.

        Raises:
            TrainingError: memory holds not even one sample at a time.
            OutOfMemory: it holds too little, and this way of joining cannot begin again.
        """
        self.joining.begin(
            lambda: self._has_unused_weights(inputs),
            lambda: self._try_joining(inputs),
        )
        if self.micro_batch is None:
            self.micro_batch = self._largest_micro_batch(inputs)
        self.buffers.keep()
        while True:
            failed, norms = False, self._part_norms()
            try:
                losses = self._add_gradients(inputs, self.micro_batch, norms)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self.joining.retries:
                    raise out_of_memory(self.processes, self.micro_batch) from None
                failed = True
            # Only here, where the error no longer holds what the failed attempt had computed.
            if not self.joining.retries or not self.processes.any(failed):
                break
            if self.micro_batch == 1:
                raise self._too_large()
            self.micro_batch = -(-min(self.micro_batch, len(inputs)) // 2)
            self._forget_gradients()
            self.buffers.put_back()
        self.buffers.bring_home()
        self.joining.finish(self.parameters, self.buffers.tensors())
        self.accelerator.unscale_gradients()
        if self._bucket_norms is not None:
            return losses, [self._bucket_norms.take()[0].double() / self.processes.count]
        return losses, [norms.total] if norms is not None and norms.total is not None else []

    def totals(self, losses: Tensor, part_squares: list[Tensor], bad_files: int) -> Totals:
        """Sum up over the processes what `compute` gave, in one message.

        Args:
            losses, part_squares: of this process.
            bad_files: broken files that it knows.
        """
        count, terms = self.processes.count, self.objective.terms()
        facts = [losses.mean().double() / count]
        facts += [self.joining.squared_norm(self.gradients)]
        facts += [term.to(losses).double() / count for term in terms.values()]
        facts += part_squares
        facts += [torch.full_like(facts[0], bad_files)]
        totals = self.processes.total(torch.stack(facts))
        norm = totals[1].sqrt().float()
        # The one place where the host waits for the device: what follows depends on it.
        loss, square, *rest, known = totals.tolist()
        return Totals(
            loss=loss,
            square=square,
            norm=norm,
            terms=dict(zip(terms, rest, strict=False)),
            part_square=rest[len(terms)] if part_squares else None,
            bad_files=int(known),
        )

    def clip(self, largest: float, totals: Totals) -> None:
        """Scale the gradients to a norm of at most `largest`."""
        if totals.grad_norm > largest:
            clip(self.gradients, largest, totals.norm)

    def measure_noise(self, totals: Totals) -> None:
        """Tell the noise scale of a step, where noise is measured."""
        if self.noise_scale is None or totals.part_square is None:
            return
        batch, part_square = self.config.batch_size, totals.part_square
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            part_square /= scaler.get_scale() ** 2
        self.noise_scale.update(part_square, totals.square, batch / self._parts(), batch)

    def replay(self, inputs: Inputs) -> None:
        """Compute a step's losses once more, forward only and with the same randomness."""
        with self.accelerator.autocast():
            for start, stop in even_parts(len(inputs), self.micro_batch or len(inputs)):
                part = inputs.part(start, stop)
                self.seed_part(part)
                self.objective(part.x0, part.sigma, part.noise, **part.keywords)
        self.joining.after_forward(self.objective)

    def seed_part(self, part: Inputs) -> None:
        """Seed what the network draws (dropout) by the place of a micro-batch's first sample."""
        seed = fold_seed(self.config.seed, Purpose.NETWORK, part.step, part.first)
        seed_network(seed, self.device)

    # ------------------------------------------------------------ its parts

    def _part_norms(self) -> PartNorms | None:
        """What looks at the micro-batches' gradients, where noise is measured by them."""
        if self.noise_scale is None:
            return None
        if isinstance(self.joining.module, nn.parallel.DistributedDataParallel):
            if self._bucket_norms is None:
                self._bucket_norms = BucketNorms(self.joining.module)
            return None
        return PartNorms(self.parameters, self._share, self.joining.squared_norm)

    def _parts(self) -> int:
        """In how many parts the gradient of a step is looked at."""
        count = self.processes.count
        if self._bucket_norms is not None:
            return count
        micro_batches = len(even_parts(self._share, self.micro_batch or 1))
        return micro_batches * (1 if self.joining.cuts else count)

    def _add_gradients(
        self, inputs: Inputs, micro_batch: int, norms: PartNorms | None = None
    ) -> Tensor:
        self.objective.forget_terms()
        return add_gradients(
            self.joining, inputs, micro_batch, seed_part=self.seed_part, norms=norms
        )

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        release_memory(self.device)

    # ------------------------------------------------------------ trials

    def _has_unused_weights(self, inputs: Inputs) -> bool:
        """Whether some weights take no part in the loss, by computing one sample's gradient."""
        part = inputs.part(0, 1)
        with unchanged_buffers(self.network), self.accelerator.autocast():
            self.seed_part(part)
            self.objective(part.x0, part.sigma, part.noise, **part.keywords).sum().backward()
        unused = any(p.grad is None for p in self.parameters)
        self._forget_gradients()
        return unused

    def _try_joining(self, inputs: Inputs) -> None:
        """Join the gradients of one sample of each process, and forget them."""
        part = inputs.part(0, 1)
        # Compiled it would be for this size alone.
        self.buffers.keep()
        with torch.compiler.set_stance("force_eager"):
            self.seed_part(part)
            loss = self.joining.module(part.x0, part.sigma, part.noise, **part.keywords)
            loss.sum().backward()
        self.buffers.put_back()
        self._forget_gradients()

    def _largest_micro_batch(self, inputs: Inputs) -> int:
        """The most samples at a time that fit into memory, by trying; it leaves no trace."""

        # Each size would be compiled anew; compiled, a step takes less memory rather than more.
        with unchanged_buffers(self.network), torch.compiler.set_stance("force_eager"):
            try:
                size = largest_that_fits(lambda size: self._fits(inputs, size), self._most_at_once)
            except OutOfMemory:
                size = 0
        size = self.processes.least(size)
        if not size:
            raise self._too_large()
        return size

    def _fits(self, inputs: Inputs, size: int) -> bool:
        """Whether so many samples at once fit into memory, with all else that a step needs."""
        held: list[Any] = []
        try:
            # The first step of the optimiser takes memory too: its averages of the gradient.
            if not self.optimizer.state:
                held = [torch.empty_like(p) for p in self.parameters for _ in range(2)]
            # Measuring noise keeps the sum of gradients beside the micro-batch's own.
            if self.noise_scale is not None:
                held += [torch.empty_like(p) for p in self.parameters]
            self._add_gradients(inputs.part(0, size), size)
            del held
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._forget_gradients()

    def _too_large(self) -> TrainingError:
        return TrainingError(
            f"out of memory with one image at a time, of shape {self.shape}: set "
            "model.checkpointing = true, or train a smaller model"
        )
