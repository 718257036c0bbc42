"""The training loop: an iterator, so that logging and saving stay outside it.

Every step is a function of (seed, step): which images, their augmentation, noise levels, noise,
hidden conditions and the network's own randomness. So a resumed run is bitwise the one that was
never stopped. The clock is images seen.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import NetworkDenoiser, make_denoiser
from k_diffusion.models import ClassConditioner, Conditioner, make_conditioner, make_model
from k_diffusion.models.registry import known_classes
from k_diffusion.training.checkpoint import (
    SUFFIX,
    CheckpointError,
    CheckpointInfo,
    Contents,
    make_contents,
    named_tensors,
    read_checkpoint,
    write_checkpoint,
)
from k_diffusion.training.compare import differences, filled, flat, full_model
from k_diffusion.training.config import AUTO, ConfigError, TrainConfig
from k_diffusion.training.dataset import Batch, Purpose, Source, Stream, as_float, make_source
from k_diffusion.training.devices import (
    compiled,
    keep_freed_memory,
    make_accelerator,
    optimizer_step,
    seed_network,
)
from k_diffusion.training.ema import MAIN, Ema, load_averages, make_averages
from k_diffusion.training.extra_losses import raw_tensors
from k_diffusion.training.fit import check_classes, check_null, check_shape, settle
from k_diffusion.training.gradient import (
    OutOfMemory,
    add_gradients,
    even_parts,
    is_out_of_memory,
    largest_that_fits,
    release_memory,
)
from k_diffusion.training.health import BadStep, examine, unchanged_buffers
from k_diffusion.training.inputs import Inputs, draw_hidden, draw_noise
from k_diffusion.training.learning_rate import learning_rate
from k_diffusion.training.loss import draw_half_log_snr
from k_diffusion.training.noise_scale import BucketNorms, NoiseScale, PartNorms
from k_diffusion.training.objective import Objective, density_of, make_objective
from k_diffusion.training.optimizer import (
    adopt,
    group_values,
    load_moments,
    make_optimizer,
    moments,
    plain_state,
)
from k_diffusion.training.parallel import (
    Processes,
    Sharded,
    check_processes,
    clip,
    make_joining,
    out_of_memory,
)
from k_diffusion.training.restore import load_into
from k_diffusion.training.sharded import read_sharded, save_sharded
from k_diffusion.training.shards import gathered, local
from k_diffusion.training.spikes import without
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.scheduler import make_scheduler

FIXED = ("seed", "batch_size", "model", "data", "process", "conditioner", "optimizer.type")
"""What a resumed run must share with the one it continues: else its steps would be others."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""

    everywhere = True  # as in ConfigError


@dataclass(frozen=True)
class TrainState:
    """What is known after a step.

    Attributes:
        step: steps done, skipped ones included.
        images_seen: the clock.
        total_images: where the run ends.
        loss: mean over the batch; not finite in a skipped step.
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of this step.
        ema_decay: what this step kept of the average.
        skipped: whether this step changed nothing, because loss or gradient were not finite.
        report: what was wrong with a skipped step.
        terms: name -> mean over the batch of what the loss is made of, see `Objective.terms`.
        noise_scale: the gradient noise scale in images; None where it is not measured, or not yet
            told from noise.
        skipped_steps: how many have been, since the start of the run.
        images_per_second: over the last steps of this session.
        seconds_left: at that speed, to the end of the run.
    """

    step: int
    images_seen: int
    total_images: int
    loss: float
    grad_norm: float
    lr: float
    ema_decay: float
    skipped: bool
    skipped_steps: int
    images_per_second: float
    seconds_left: float
    report: BadStep | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    noise_scale: float | None = None


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
        self.accelerator = make_accelerator(config.precision)
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.processes = Processes(self.accelerator)
        check_processes(config, self.processes.count)
        options = config.data.model_dump()
        self.source = make_source(**options) if source is None else source
        self.config = config = settle(config, self.source, conditioner)
        if conditioner is None and config.conditioner is not None:
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
        example = self._example(network)
        if given is None:
            check_shape(config.model, self.source, example)
        model = full_model(network, config.model)
        self.config = config = config.model_copy(update={"model": model})
        self.network = network.to(self.device).train()
        self.processes.copy_from_main(self.network)
        process = make_scheduler(**config.process) if config.process else None
        self.denoiser: NetworkDenoiser = make_denoiser(self.network, process)
        self._density = density_of(config, self.denoiser)
        self.objective: Objective = make_objective(config, self.denoiser).to(self.device)
        self._named = self.objective.named_with(self.network)
        self._raws(self.source.batch(torch.tensor([0])) if self.objective.raws else None)

        self._joining = make_joining(config, self.accelerator, self.processes)
        self._joining.shard(self.objective, self.network)
        make = optimizer or functools.partial(make_optimizer, config=config.optimizer)
        self.optimizer = make(self.network)
        adopt(self.optimizer, self.network)
        self.objective.add_to(self.optimizer)
        self._group_start = group_values(self.optimizer)
        self.averages = make_averages(self.network, config.ema)
        """By name; each is moved by every step that is not skipped."""
        self.ema: Ema = self.averages[MAIN]
        measured = config.noise_scale_decay
        self.noise_scale = None if measured is None else NoiseScale(measured)
        self._bucket_norms: BucketNorms | None = None
        self._known_bad_files = 0
        self.micro_batch = self._first_micro_batch()
        """The most samples that a process computes at once, halved where memory runs out; None:
        to be found in the next step."""
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.passed_over: list[tuple[int, int]] = []
        """(start, stop) of steps that are left out, counted from 0; the clock runs on over them."""
        self._went_back = 0
        self.extra: dict[str, Any] = {}
        """JSON data of whoever drives the loop; it is saved and comes back at a resume."""
        if resume is not None:
            self._resume(Path(resume))
        self._check_agreed()
        trained = compiled(self.objective) if config.compile else self.objective
        self._optimizer = self._joining.prepare(trained, self.optimizer)
        self._parameters = [p for p in self.objective.parameters() if p.requires_grad]

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch_size

    # ------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[TrainState]:
        config = self.config
        done = 0  # images of this session
        clock = deque([(time.perf_counter(), done)], maxlen=51)
        for batch in self._batches():
            lr = learning_rate(
                config.optimizer, self.images_seen, config.total_images, config.batch_size
            )
            decay = self.ema.decay
            loss, grad_norm, report = self.train_step(batch, lr)
            skipped = report is not None
            done += config.batch_size
            clock.append((time.perf_counter(), done))
            seconds = clock[-1][0] - clock[0][0]
            speed = (clock[-1][1] - clock[0][1]) / max(seconds, 1e-9)
            left = config.steps * config.batch_size - self.images_seen
            yield TrainState(
                step=self.step,
                images_seen=self.images_seen,
                total_images=config.steps * config.batch_size,
                loss=loss,
                grad_norm=grad_norm,
                lr=lr,
                ema_decay=1.0 if skipped else decay,
                skipped=skipped,
                skipped_steps=self.skipped_steps,
                images_per_second=speed,
                seconds_left=left / speed,
                report=report,
                terms=self._terms,
                noise_scale=self.noise_scale.value if self.noise_scale else None,
            )
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
        self._resume(Path(checkpoint))
        self.passed_over = [*passed_over, (first - 1, last)]
        self._went_back += 1

    def train_step(self, batch: Batch, lr: float) -> tuple[float, float, BadStep | None]:
        """One step, from (seed, step) alone.

        Returns:
            Loss, norm of the gradient, and what was wrong where the step was skipped.
        """
        inputs = self._inputs(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        losses, part_norms = self._gradient(inputs)
        terms = self.objective.terms()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        facts = [losses.mean().double() / self.processes.count]
        facts += [self._joining.squared_norm(gradients)]
        facts += [term.to(losses).double() / self.processes.count for term in terms.values()]
        facts += part_norms
        facts += [torch.full_like(facts[0], len(self.source.bad_files))]
        totals = self.processes.total(torch.stack(facts))
        norm = totals[1].sqrt().float()
        # The one place where the host waits for the device: what follows depends on it.
        loss_value, square, *rest, bad_files = totals.tolist()
        self._terms = dict(zip(terms, rest, strict=False))
        part_squares = rest[len(terms) :]
        self._share_bad_files(int(bad_files))
        norm_value = math.sqrt(square)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        report = None if finite else self._examine(inputs, losses, loss_value, norm_value)
        largest = self.config.grad_clip
        if finite and largest is not None and norm_value > largest:
            clip(gradients, largest, norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if part_squares:
            self._measure_noise(part_squares[0], square, scaler)
        if finite or (scaler is not None and not math.isfinite(norm_value)):
            # At an overflow the scaler skips by itself, and learns from it.
            optimizer_step(self.accelerator, self.optimizer)
        elif scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if finite:
            self.objective.after_step()
            for average in self.averages.values():
                average.update()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        return loss_value, norm_value, report

    def _share_bad_files(self, known: int) -> None:
        """Let every process know the broken files that any has met; known: by all of them."""
        if self.processes.count > 1 and known != self._known_bad_files:
            for theirs in self.processes.gather(dict(self.source.bad_files)):
                self.source.bad_files |= theirs
            self._known_bad_files = self.processes.count * len(self.source.bad_files)

    @property
    def _most_at_once(self) -> int:
        """The most samples of a process that may be computed at once, memory aside."""
        share = self.config.batch_size // self.processes.count
        halves = self.noise_scale is not None and self._joining.splits
        return -(-share // 2) if halves else share

    def _first_micro_batch(self) -> int | None:
        asked, most = self.config.micro_batch_size, self._most_at_once
        if asked == AUTO:
            return None
        return most if asked is None else min(most, int(asked))

    def _gradient(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Each sample's loss, and the gradient of the whole batch's mean in the weights, unscaled.

        Where memory runs out, the same step begins again with half the micro-batch.

        Returns:
            The losses; and where noise is measured, what this process counts of the mean squared
            norm of the gradients of the batch's parts, scaled.
        """
        self._joining.begin(lambda: self._has_unused_weights(inputs))
        if self.micro_batch is None:
            self.micro_batch = self._largest_micro_batch(inputs)
        while True:
            failed, norms = False, self._part_norms()
            try:
                losses = self._add_gradients(inputs, self.micro_batch, norms)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._joining.retries:
                    raise out_of_memory(self.processes, self.micro_batch) from None
                failed = True
            # Only here, where the error no longer holds what the failed attempt had computed.
            if not self._joining.retries or not self.processes.any(failed):
                break
            if self.micro_batch == 1:
                raise self._too_large()
            self.micro_batch = -(-min(self.micro_batch, len(inputs)) // 2)
            self._forget_gradients()
        self._joining.finish(self._parameters)
        self.accelerator.unscale_gradients()
        if self._bucket_norms is not None:
            return losses, [self._bucket_norms.take()[0].double() / self.processes.count]
        return losses, [norms.total] if norms is not None and norms.total is not None else []

    def _part_norms(self) -> PartNorms | None:
        """What looks at the micro-batches' gradients, where noise is measured by them."""
        if self.noise_scale is None:
            return None
        if isinstance(self._joining.module, nn.parallel.DistributedDataParallel):
            if self._bucket_norms is None:
                self._bucket_norms = BucketNorms(self._joining.module)
            return None
        share = self.config.batch_size // self.processes.count
        return PartNorms(self._parameters, share, self._joining.squared_norm)

    def _measure_noise(self, part_square: float, square: float, scaler: Any) -> None:
        assert self.noise_scale is not None
        batch = self.config.batch_size
        if scaler is not None:
            part_square /= scaler.get_scale() ** 2
        self.noise_scale.update(part_square, square, batch / self._parts(), batch)

    def _parts(self) -> int:
        """In how many parts the gradient of a step is looked at."""
        count = self.processes.count
        if self._bucket_norms is not None:
            return count
        micro_batches = len(even_parts(self.config.batch_size // count, self.micro_batch or 1))
        return micro_batches * (1 if isinstance(self._joining, Sharded) else count)

    def _has_unused_weights(self, inputs: Inputs) -> bool:
        """Whether some weights take no part in the loss, by computing one sample's gradient."""
        part = inputs.part(0, 1)
        with unchanged_buffers(self.network), self.accelerator.autocast():
            self._seed_part(part)
            self.objective(part.x0, part.sigma, part.noise, **part.keywords).sum().backward()
        unused = any(p.grad is None for p in self._parameters)
        self._forget_gradients()
        return unused

    def _add_gradients(
        self, inputs: Inputs, micro_batch: int, norms: PartNorms | None = None
    ) -> Tensor:
        self.objective.forget_terms()
        return add_gradients(
            self._joining, inputs, micro_batch, seed_part=self._seed_part, norms=norms
        )

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        release_memory(self.device)

    def _largest_micro_batch(self, inputs: Inputs) -> int:
        """The most samples at a time that fit into memory, by trying; it leaves no trace."""

        def fits(size: int) -> bool:
            try:
                # The first step of the optimiser takes memory too: its averages of the gradient.
                held = (
                    []
                    if self.optimizer.state
                    else [torch.empty_like(p) for p in self._parameters for _ in range(2)]
                )
                # Measuring noise keeps the sum of gradients beside the micro-batch's own.
                if self.noise_scale is not None:
                    held += [torch.empty_like(p) for p in self._parameters]
                self._add_gradients(inputs.part(0, size), size)
                del held
                return True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return False
            finally:
                self._forget_gradients()

        # Each size would be compiled anew; compiled, a step takes less memory rather than more.
        with unchanged_buffers(self.network), torch.compiler.set_stance("force_eager"):
            try:
                size = largest_that_fits(fits, self._most_at_once)
            except OutOfMemory:
                size = 0
        size = self.processes.least(size)
        if not size:
            raise self._too_large()
        return size

    def _too_large(self) -> TrainingError:
        return TrainingError(
            f"out of memory with one image at a time, of shape {self.source.shape}: set "
            "model.checkpointing = true, or train a smaller model"
        )

    def _examine(self, inputs: Inputs, losses: Tensor, loss: float, norm: float) -> BadStep:
        """What was wrong with a step that is not finite."""
        names = self._named.named_parameters()

        def replay(inputs: Inputs) -> None:
            with self.accelerator.autocast():
                for start, stop in even_parts(len(inputs), self.micro_batch or len(inputs)):
                    part = inputs.part(start, stop)
                    self._seed_part(part)
                    self.objective(part.x0, part.sigma, part.noise, **part.keywords)
            self._joining.after_forward(self.objective)

        return examine(
            step=self.step + 1,
            loss=loss,
            grad_norm=norm,
            losses=losses,
            inputs=inputs,
            network=self.network,
            gradients={name: local(p.grad) for name, p in names if p.grad is not None},
            replay=replay,
            name=self.source.name,
            processes=self.processes,
        )

    def _seed_part(self, part: Inputs) -> None:
        """Seed what the network draws (dropout) by the place of a micro-batch's first sample."""
        config = self.config
        seed_network(fold_seed(config.seed, Purpose.NETWORK, self.step, part.first), self.device)

    def _inputs(self, batch: Batch) -> Inputs:
        """What this process's part of the step learns from."""
        config, device = self.config, self.device
        share = len(batch.images)
        mine = slice(share * self.stream.rank, share * (self.stream.rank + 1))
        x0 = as_float(batch.images.to(device, non_blocking=True))
        generator = torch.Generator().manual_seed(fold_seed(config.seed, Purpose.LEVELS, self.step))
        half_log_snr = draw_half_log_snr(
            self._density, config.batch_size, generator, stratified=config.loss.stratified
        )
        sigma = self.denoiser.path.sigma(half_log_snr)[mine]
        if device.type == "mps":  # it has no float64
            sigma = sigma.float()
        shape = (config.batch_size, *x0.shape[1:])
        return Inputs(
            x0=x0,
            sigma=sigma.to(device, non_blocking=True),
            noise=draw_noise(config.seed, self.step, shape, device)[mine],
            condition=self._shown_condition(batch, x0, mine),
            indices=batch.indices,
            first=mine.start,
            raws=self._raws(batch),
        )

    def _raws(self, batch: Batch | None) -> dict[str, Tensor]:
        """What the extra losses asked for, of a batch."""
        if batch is None or not self.objective.raws:
            return {}
        try:
            return raw_tensors(self.objective.raws, batch.raws, self.device)
        except ValueError as error:
            raise ConfigError(f"loss.extra and data do not fit each other: {error}") from None

    def _shown_condition(self, batch: Batch, x0: Tensor, mine: slice) -> dict[str, Tensor]:
        """The samples' condition, a share of them without any; mine: their places in the step."""
        if self.conditioner is None:
            return {}
        config = self.config
        hidden = draw_hidden(config.seed, self.step, config.batch_size, config.condition_dropout)
        first = self.images_seen + mine.start
        condition = self._condition(batch, x0, range(first, first + len(x0)))
        drop = getattr(self.network, "drop_condition", self.conditioner.hide)
        shown: dict[str, Tensor] = drop(condition, hidden[mine].to(self.device, non_blocking=True))
        return shown

    @torch.no_grad()
    def _condition(self, batch: Batch, x0: Tensor, places: Sequence[int]) -> dict[str, Tensor]:
        """What the conditioner makes of a batch; places: the samples' in the whole run."""
        assert self.conditioner is not None
        raws: dict[str, Any] = {"clean": x0}
        names = self.source.class_names
        if names:
            raws["label"] = batch.labels
            raws["class_name"] = [names[label] for label in batch.labels.tolist()]
        seeds = [fold_seed(self.config.seed, Purpose.CONDITION, place) for place in places]
        return self.conditioner.from_batch({**raws, **batch.raws}, seeds)

    def _example(self, network: nn.Module) -> dict[str, Tensor]:
        """The condition of the first image, once it is seen to fit the network."""
        if self.conditioner is None:
            return {}
        for name, parameter in self.conditioner.named_parameters():
            if parameter.requires_grad:
                raise ConfigError(
                    f"{type(self.conditioner).__name__} has weights that ask for gradients "
                    f"({name}), but only the network is trained: freeze them by "
                    "requires_grad_(False), or make them part of the network"
                )
        try:
            batch = self.source.batch(torch.tensor([0]))
            example = self._condition(batch, as_float(batch.images.to(self.device)), [0])
            check: Any = getattr(network, "check_condition", None)
            if check is not None:
                check(1, **example)
            check_null(network, self.conditioner, example)
        except ValueError as error:
            raise ConfigError(
                f"model, conditioner and data do not fit each other: {error}"
            ) from None
        return example

    # ------------------------------------------------------------ checkpoints

    def save(self, path: str | Path) -> str:
        """Write a checkpoint; every process has to call it, and gets its sha256.

        Args:
            path: a .safetensors file, which the main process writes, or any other name, of a
                folder to which each process writes its shards.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            return save_sharded(path, self._named_parts(), self.processes, self._facts)
        contents = self.contents()
        return self.processes.on_main(lambda: write_checkpoint(path, contents))

    def contents(self) -> Contents:
        """What a checkpoint of this moment holds: the live tensors, not copies, where a process has
        them whole. Every process has to call it; what others than the main one get has no tensors
        if the weights are sharded."""
        parts = self._named_parts()
        if self.is_sharded:
            parts = {
                part: gathered(named, keep=self.processes.main) for part, named in parts.items()
            }
        return make_contents(parts, **self._facts())

    def _named_parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "model": named_tensors(self.network),
            **{name: average.state_dict() for name, average in self.averages.items()},
            "optimizer": moments(self.optimizer, self._named),
            "loss": self.objective.own_tensors(),
        }

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its share of the weights."""
        return isinstance(self._joining, Sharded)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "config": self.config.to_json(),
            "images_seen": self.images_seen,
            "step": self.step,
            "data": self.source.facts(),
            "state": {
                "ema_updates": self.ema.updates,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "micro_batch": self.micro_batch,
                "passed_over": [list(part) for part in self.passed_over],
                "noise_scale": self.noise_scale.state_dict() if self.noise_scale else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "optimizer": plain_state(self.optimizer, self._named, self._group_start),
                "extra": self.extra,
                "network": type(self.network).__name__,
                "conditioner": None
                if self.conditioner is None
                else type(self.conditioner).__name__,
            },
        }

    def _resume(self, path: Path) -> None:
        wanted = ["model", *self.averages, "optimizer", "loss"]
        if self.is_sharded and path.is_dir():
            info, parts = read_sharded(
                path, wanted, self.processes, cut_like=dict(self._named.named_parameters())
            )
        else:
            info, parts = read_checkpoint(path, wanted)
        self._check_same_run(info)
        if not parts["model"]:
            raise CheckpointError(
                f"checkpoint {path} holds weights for sampling only: it cannot be resumed"
            )
        load_into(self.network, parts["model"], info)
        try:
            load_averages(self.averages, parts, info.state["ema_updates"])
            self.objective.load_own_tensors(parts["loss"])
            load_moments(
                self.optimizer, self._named, parts["optimizer"], info.state.get("optimizer")
            )
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be resumed: {error}") from None
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and info.state["scaler"] is not None:
            scaler.load_state_dict(info.state["scaler"])
        self.step = info.step
        self.skipped_steps = info.state["skipped_steps"]
        self.skipped_in_a_row = info.state["skipped_in_a_row"]
        # What memory once refused it would refuse again.
        known = [m for m in (self.micro_batch, info.state.get("micro_batch")) if m is not None]
        self.micro_batch = min(known, default=None)
        self.passed_over = [(a, b) for a, b in info.state.get("passed_over", [])]
        if self.noise_scale is not None and info.state.get("noise_scale") is not None:
            self.noise_scale.load_state_dict(info.state["noise_scale"])
        self.extra = dict(info.state["extra"])

    def _check_agreed(self) -> None:
        """Refuse to begin where processes do not go on from the same place."""
        steps = self.processes.gather(self.step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"the processes would go on from steps {', '.join(map(str, steps))}: the "
                "checkpoints must lie on a disk that all of them see"
            )

    def _check_same_run(self, info: CheckpointInfo) -> None:
        theirs, ours = flat(filled(info.config)), flat(filled(self.config.to_json()))
        theirs["data.images"], ours["data.images"] = info.data.get("images"), len(self.source)
        theirs.setdefault("optimizer.type", "adamw")
        theirs, ours = (
            {
                k: v
                for k, v in both.items()
                if {k, k.split(".")[0]} & set(FIXED) and k != "data.path"
            }
            for both in (theirs, ours)
        )
        if differing := differences(theirs, ours):
            raise CheckpointError(
                f"checkpoint {info.path} is of a run with {'; '.join(differing)}: resume with the "
                "same, or begin a new run"
            )
