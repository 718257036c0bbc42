"""The training loop: an iterator, so that logging and saving stay outside it.

Every step is a function of (seed, step): which images, their augmentation, noise levels, noise,
hidden conditions and the network's own randomness. So a resumed run is bitwise the one that was
never stopped. The clock is images seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import NetworkDenoiser, make_denoiser
from k_diffusion.models import ClassConditioner, Conditioner, make_conditioner, make_model
from k_diffusion.models.registry import known_classes
from k_diffusion.training.augmentation import Augmentation
from k_diffusion.training.bands import SigmaBands
from k_diffusion.training.broken import check_bad_share
from k_diffusion.training.checkpoint import SUFFIX, Contents, make_contents, write_checkpoint
from k_diffusion.training.compare import full_model
from k_diffusion.training.conditioning import Conditioning
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Batch, DataError, Purpose, Source, Stream, make_source
from k_diffusion.training.devices import (
    check_launcher,
    compiled,
    keep_freed_memory,
    make_accelerator,
    optimizer_step,
)
from k_diffusion.training.ema import MAIN, Ema, make_averages
from k_diffusion.training.fit import check_classes, check_learns, check_shape, settle
from k_diffusion.training.health import BadStep, examine
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.joining import make_joining
from k_diffusion.training.learning_rate import learning_rate
from k_diffusion.training.named_tensors import copy_tensors, own_tensors
from k_diffusion.training.noise_scale import NoiseScale
from k_diffusion.training.objective import Objective, density_of, make_objective
from k_diffusion.training.optimizer import adopt, group_values, make_optimizer
from k_diffusion.training.parallel import Processes, check_processes
from k_diffusion.training.resume import (
    begin_from,
    check_agreed,
    facts_of,
    go_on_from,
    sigma_data_of,
    tensors_of,
)
from k_diffusion.training.sharded import save_sharded
from k_diffusion.training.shards import gathered, local
from k_diffusion.training.spikes import without
from k_diffusion.training.state import Speed, TrainingError, TrainState
from k_diffusion.training.step_gradient import StepGradient, Totals
from k_diffusion.training.step_inputs import StepInputs
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.scheduler import make_scheduler

__all__ = ["TrainState", "Trainer", "TrainingError"]


class Trainer:
    """Trains; `for state in Trainer(config)` is the loop, and `.save(path)` works between steps.

    Args:
        config: the run. `.config` is it with "auto" and what the data decides filled in.
        resume: a checkpoint of this run, to go on from there.
        network: trained instead of one built from the config.
        source: trained on instead of the config's data.
        conditioner: makes what the network is told, instead of the config's.
        optimizer: network -> the optimiser to train it with, instead of the config's; its learning
            rate still takes the config's course. Weights that it leaves out stay as they are.

    Raises:
        ConfigError: model, conditioner and data do not fit each other, or the machine has no such
            precision.
        DataError: the data cannot be used.
        CheckpointError: the checkpoint is damaged, or of another run.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: str | Path | None = None,
        network: nn.Module | None = None,
        source: Source | None = None,
        conditioner: Conditioner | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    ) -> None:
        check_launcher(config.precision, config.compile)
        self.accelerator = make_accelerator(config.precision)
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.processes = Processes(self.accelerator)
        check_processes(config, self.processes.count)
        options = config.data.model_dump()
        if source is None:
            source = self.processes.together(lambda: make_source(**options), DataError)
        self.source = source
        check_bad_share(source, config.max_bad_share)
        before = None if resume is None else sigma_data_of(resume)
        self.config = config = settle(config, self.source, conditioner, before)
        if conditioner is None and config.conditioner is not None:
            torch.manual_seed(fold_seed(config.seed, Purpose.CONDITIONER))
            conditioner = make_conditioner(config.conditioner)
        self.stream = Stream(
            self.source,
            config.batch_size,
            config.seed,
            rank=self.processes.index,
            world=self.processes.count,
        )

        torch.manual_seed(fold_seed(config.seed, Purpose.INIT))
        given, network = network, make_model(config.model) if network is None else network
        self.num_classes = known_classes(network)
        if conditioner is None and self.num_classes:
            check_classes(self.num_classes, self.source)
            conditioner = ClassConditioner(num_classes=self.num_classes)
        self.conditioner = None if conditioner is None else conditioner.to(self.device)
        self.processes.send_from_main(own_tensors(self.conditioner).values())
        average: dict[str, Tensor] = {}
        if config.init_from is not None and resume is None:
            average = begin_from(Path(config.init_from), network, self.conditioner, self.processes)
        check_learns(network)
        conditioning = Conditioning(config, self.conditioner, network, self.source, self.device)
        augmentation = Augmentation(config, network, self.source, self.conditioner)
        examples, said = conditioning.examples(), augmentation.example()
        if given is None:
            check_shape(config.model, {one: {**told, **said} for one, told in examples.items()})
        model = full_model(network, config.model)
        self.config = config = config.model_copy(update={"model": model})
        self.network = network.to(self.device).train()
        self.processes.copy_from_main(self.network)
        process = make_scheduler(**config.process) if config.process else None
        self.denoiser: NetworkDenoiser = make_denoiser(self.network, process)
        density = density_of(config, self.denoiser)
        self.objective: Objective = make_objective(config, self.denoiser).to(self.device)
        self.named = self.objective.named_with(self.network)
        """The network, with the loss's own weights among its named ones."""
        self.bands = SigmaBands(density, self.denoiser.path.sigma, self.device)
        """In which the loss is told by noise level."""
        self.inputs = StepInputs(
            config,
            self.stream,
            conditioning,
            density,
            self.objective,
            self.device,
            augmentation,
        )

        self._joining = make_joining(config, self.accelerator, self.processes)
        self._joining.shard(self.objective, self.network)
        make = optimizer or functools.partial(make_optimizer, config=config.optimizer)
        self.optimizer = make(self.network)
        adopt(self.optimizer, self.network)
        self.objective.add_to(self.optimizer)
        self.group_start = group_values(self.optimizer)
        """What the optimiser's groups held before the first step."""
        self.averages = make_averages(self.network, config.ema)
        """By name; each is moved by every step that is not skipped."""
        self.ema: Ema = self.averages[MAIN]
        if average:
            copy_tensors(average, self.ema.state_dict())
        measured = config.noise_scale_decay
        self.noise_scale = None if measured is None else NoiseScale(measured)
        self.gradient = StepGradient(
            config,
            self.network,
            self.objective,
            self.optimizer,
            self._joining,
            self.noise_scale,
            self.source.shape,
        )
        self._known_bad_files = 0
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.passed_over: list[tuple[int, int]] = []
        """(start, stop) of steps that are left out, counted from 0; the clock runs on over them."""
        self._went_back = 0
        self.extra: dict[str, Any] = {}
        """JSON data of whoever drives the loop; it is saved and comes back at a resume."""
        self.averages_left_out: list[str] = []
        """Of the checkpoint that was resumed from: those that the config has no more."""
        self.data_otherwise: list[str] = []
        """What has changed of the data since that checkpoint, in words."""
        self.computed_otherwise: list[str] = []
        """What is not as when that checkpoint was computed, and changes the last bits, in words."""
        if resume is not None:
            go_on_from(Path(resume), self)
        check_agreed(self.processes, self.step)
        trained = compiled(self.objective) if config.compile else self.objective
        self._optimizer = self._joining.prepare(trained, self.optimizer)
        self.speed = Speed()
        """Of this session; whoever does between steps what is no training lets it stand."""

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch_size

    @property
    def micro_batch(self) -> int | None:
        """The most samples that a process computes at once; None: yet to be found."""
        return self.gradient.micro_batch

    @property
    def scaler(self) -> Any:
        """Of float16's losses; None at other precisions."""
        return getattr(self.accelerator, "scaler", None)

    # ------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[TrainState]:
        config, self.speed = self.config, Speed()
        total = config.steps * config.batch_size
        for batch in self._batches():
            lr = learning_rate(
                config.optimizer, self.images_seen, config.total_images, config.batch_size
            )
            decay = self.ema.decay
            loss, grad_norm, report = self.train_step(batch, lr)
            skipped = report is not None
            images_per_second = self.speed.after(config.batch_size)
            yield TrainState(
                step=self.step,
                images_seen=self.images_seen,
                total_images=total,
                loss=loss,
                grad_norm=grad_norm,
                lr=lr,
                ema_decay=1.0 if skipped else decay,
                skipped=skipped,
                skipped_steps=self.skipped_steps,
                images_per_second=images_per_second,
                seconds_left=(total - self.images_seen) / images_per_second,
                report=report,
                terms=self._terms,
                bands=self._band_sums,
                noise_scale=self.noise_scale.value if self.noise_scale else None,
                micro_batch=self.micro_batch,
            )
            check_bad_share(self.source, config.max_bad_share)
            if self.skipped_in_a_row >= config.max_skipped:
                raise TrainingError(
                    f"{self.skipped_in_a_row} steps in a row were not finite, the last at "
                    f"{self.images_seen} images ({report}): lower optimizer.lr (now "
                    f"{config.optimizer.lr}) or look at the data"
                )

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps to come, with `step` set to each's; anew after `go_back`."""
        again = True
        while again:
            again, turn = False, self._went_back
            for first, last in without(self.passed_over, self.step, self.config.steps):
                self.step = first
                for batch in self.stream.batches(
                    first, last, self.config.workers, pin_memory=self.device.type == "cuda"
                ):
                    yield batch
                    if again := self._went_back != turn:
                        break
                if again:
                    break
        self.step = max(self.step, self.config.steps)  # the last ones may be passed over

    def go_back(self, checkpoint: str | Path, first: int, last: int) -> None:
        """Between two steps: take up an earlier checkpoint, and pass over some steps this time.

        Args:
            checkpoint: of this run.
            first, last: the steps left out, counted from 1, the last one included.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another run.
        """
        passed_over = self.passed_over
        go_on_from(Path(checkpoint), self)
        self.passed_over = [*passed_over, (first - 1, last)]
        self._went_back += 1

    def train_step(self, batch: Batch, lr: float) -> tuple[float, float, BadStep | None]:
        """One step, from (seed, step) alone.

        Returns:
            Loss, norm of the gradient, and what was wrong where the step was skipped.
        """
        inputs = self.inputs.draw(batch, self.step)
        losses, part_squares = self.gradient.compute(inputs)
        found = self.gradient.totals(
            losses, part_squares, len(self.source.bad_files), self.bands.sums(losses, inputs.sigma)
        )
        self._terms, self._band_sums = found.terms, found.bands
        self._share_bad_files(found.bad_files)
        report = None
        if not found.finite:
            self.gradient.buffers.put_back()
            report = self._examine(inputs, losses, found)
        if found.finite and self.config.grad_clip is not None:
            self.gradient.clip(self.config.grad_clip, found)
        self.gradient.measure_noise(found)
        self._move_weights(found, lr)
        self.step += 1
        if found.finite:
            self.objective.after_step()
            for average in self.averages.values():
                average.update()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        return found.loss, found.grad_norm, report

    def _move_weights(self, found: Totals, lr: float) -> None:
        """A step of the optimiser, where loss and gradient are finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if found.finite or (self.scaler is not None and not math.isfinite(found.grad_norm)):
            # At an overflow the scaler skips by itself, and learns from it.
            optimizer_step(self.accelerator, self.optimizer)
        elif self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()

    def _share_bad_files(self, known: int) -> None:
        """Let every process know the broken files that any has met; known: by all of them."""
        if self.processes.count > 1 and known != self._known_bad_files:
            for theirs in self.processes.gather(dict(self.source.bad_files)):
                self.source.bad_files |= theirs
            self._known_bad_files = self.processes.count * len(self.source.bad_files)

    def _examine(self, inputs: Inputs, losses: Tensor, found: Totals) -> BadStep:
        """What was wrong with a step that is not finite."""
        names = self.named.named_parameters()
        return examine(
            step=self.step + 1,
            loss=found.loss,
            grad_norm=found.grad_norm,
            losses=losses,
            inputs=inputs,
            network=self.network,
            gradients={name: local(p.grad) for name, p in names if p.grad is not None},
            replay=self.gradient.replay,
            name=self.source.name,
            processes=self.processes,
        )

    # ------------------------------------------------------------ checkpoints

    def save(self, path: str | Path) -> str:
        """Write a checkpoint; every process has to call it, and gets its sha256.

        Args:
            path: a .safetensors file, which the main process writes, or any other name, of a
                folder to which each process writes its shards.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            facts = functools.partial(facts_of, self)
            return save_sharded(path, tensors_of(self), self.processes, facts)
        contents = self.contents()
        return self.processes.on_main(lambda: write_checkpoint(path, contents))

    def contents(self) -> Contents:
        """What a checkpoint of this moment holds: the live tensors, not copies, where a process has
        them whole. Every process has to call it; what others than the main one get has no tensors
        if the weights are sharded."""
        parts = tensors_of(self)
        if self.is_sharded:
            parts = {
                part: gathered(named, keep=self.processes.main) for part, named in parts.items()
            }
        return make_contents(parts, **facts_of(self))

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its share of the weights."""
        return self._joining.cuts
