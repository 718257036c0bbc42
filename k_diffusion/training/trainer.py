"""The training loop: an iterator, so that logging and saving stay outside it.

Every step is a function of (seed, step): which images, their augmentation, noise levels, noise,
hidden conditions and the network's own randomness. So a resumed run is bitwise the one that was
never stopped. The clock is images seen.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import NetworkDenoiser, check_output, make_denoiser
from k_diffusion.models import (
    ClassConditioner,
    Conditioner,
    conditioner_config,
    make_conditioner,
    make_model,
)
from k_diffusion.models.registry import known_classes, takes_option
from k_diffusion.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    load_into,
    named_tensors,
    read_checkpoint,
    save_checkpoint,
)
from k_diffusion.training.compare import differences, filled, flat, full_model
from k_diffusion.training.config import AUTO, ConfigError, TrainConfig
from k_diffusion.training.dataset import Batch, Purpose, Source, Stream, as_float, make_source
from k_diffusion.training.ema import Ema
from k_diffusion.training.loss import (
    denoising_loss,
    draw_half_log_snr,
    make_density,
    make_weighting,
)
from k_diffusion.training.optimizer import learning_rate, load_moments, make_adamw, moments
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.scheduler import make_scheduler

FIXED = ("seed", "batch_size", "model", "data", "process", "conditioner")
"""What a resumed run must share with the one it continues: else its steps would be others."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


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


class LossModule(nn.Module):
    """Denoiser and loss as the one module that accelerate wraps for processes and precision."""

    def __init__(self, denoiser: nn.Module, weighting: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting

    def forward(self, x0: Tensor, sigma: Tensor, noise: Tensor, **condition: Any) -> Tensor:
        return denoising_loss(self.denoiser, x0, sigma, noise, self.weighting, **condition)


class Trainer:
    """Trains; `for state in Trainer(config)` is the loop, and `.save(path)` works between steps.

    Args:
        config: the run. `.config` is it with "auto" and what the data decides filled in.
        resume: a checkpoint of this run, to go on from there.
        network: trained instead of one built from the config.
        source: trained on instead of the config's data.
        conditioner: makes what the network is told, instead of the config's.

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
    ) -> None:
        self.accelerator = _accelerator(config.precision)
        self.device: torch.device = self.accelerator.device
        options = config.data.model_dump()
        self.source = make_source(**options) if source is None else source
        self.config = config = settle(config, self.source, conditioner)
        if conditioner is None and config.conditioner is not None:
            conditioner = make_conditioner(config.conditioner)
        self.stream = Stream(
            self.source,
            config.batch_size,
            config.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

        torch.manual_seed(fold_seed(config.seed, Purpose.INIT))
        given, network = network, make_model(config.model) if network is None else network
        self.num_classes = known_classes(network)
        if conditioner is None and self.num_classes:
            _check_classes(self.num_classes, self.source)
            conditioner = ClassConditioner(num_classes=self.num_classes)
        self.conditioner = None if conditioner is None else conditioner.to(self.device)
        example = self._example(network)
        if given is None:
            _check_shape(config.model, self.source, example)
        model = full_model(network, config.model)
        self.config = config = config.model_copy(update={"model": model})
        self.network = network.to(self.device).train()
        process = make_scheduler(**config.process) if config.process else None
        self.denoiser: NetworkDenoiser = make_denoiser(self.network, process)
        self._density = make_density(
            config.density, self.denoiser.process, **config.loss.density_options
        )
        weighting = make_weighting(
            config.weighting,
            getattr(self.denoiser, "sigma_data", 1.0),
            **config.loss.weighting_options,
        )

        self.optimizer = make_adamw(self.network, config.optimizer)
        self.ema = Ema(
            self.network,
            power=config.ema.power,
            inv_gamma=config.ema.inv_gamma,
            max_decay=config.ema.max_decay,
        )
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.extra: dict[str, Any] = {}
        """JSON data of whoever drives the loop; it is saved and comes back at a resume."""
        if resume is not None:
            self._resume(Path(resume))
        self._module, self._optimizer = self.accelerator.prepare(
            LossModule(self.denoiser, weighting), self.optimizer
        )
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        # Some networks have something to put right, such as the lengths of their weights.
        self._after_step = getattr(self.network, "after_step", lambda: None)

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch_size

    # ------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[TrainState]:
        config = self.config
        batches = self.stream.batches(
            self.step, config.steps, config.workers, pin_memory=self.device.type == "cuda"
        )
        clock = deque([(time.perf_counter(), self.images_seen)], maxlen=51)
        for batch in batches:
            lr = learning_rate(
                config.optimizer, self.images_seen, config.total_images, config.batch_size
            )
            decay = self.ema.decay
            loss, grad_norm, skipped = self.train_step(batch, lr)
            clock.append((time.perf_counter(), self.images_seen))
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
            )
            if self.skipped_in_a_row >= config.max_skipped:
                raise TrainingError(
                    f"{self.skipped_in_a_row} steps in a row were not finite (loss {loss}, "
                    f"gradient norm {grad_norm}), the last at {self.images_seen} images: lower "
                    f"optimizer.lr (now {config.optimizer.lr}) or look at the data"
                )

    def train_step(self, batch: Batch, lr: float) -> tuple[float, float, bool]:
        """One step, from (seed, step) alone.

        Returns:
            Loss, norm of the gradient, and whether the step was skipped.
        """
        x0, sigma, noise, condition = self._inputs(batch)
        _seed_network(self._seed(Purpose.NETWORK, self.accelerator.process_index), self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._module(x0, sigma, noise, **condition).mean()
        self.accelerator.backward(loss)
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        total = self.accelerator.reduce(loss.detach(), reduction="mean")
        # The one place where the host waits for the device: what follows depends on it.
        loss_value, norm_value = torch.stack([total.double(), norm.double()]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        clip = self.config.grad_clip
        if finite and clip is not None and norm_value > clip:
            nn.utils.clip_grads_with_norm_(self._parameters, clip, norm, foreach=True)
        scaler = getattr(self.accelerator, "scaler", None)
        if finite or (scaler is not None and not math.isfinite(norm_value)):
            self._optimizer.step()  # the scaler skips by itself here, and learns from it
        elif scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if finite:
            self._after_step()
            self.ema.update()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        return loss_value, norm_value, not finite

    def _seed(self, purpose: Purpose, *keys: int) -> int:
        return fold_seed(self.config.seed, purpose, self.step, *keys)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Clean data, sigma, noise and condition of this process's part of the step.

        Each is drawn for the whole batch and then cut, so that the step is the same on any number
        of processes.
        """
        config, device = self.config, self.device
        share = len(batch.images)
        mine = slice(share * self.stream.rank, share * (self.stream.rank + 1))
        x0 = as_float(batch.images.to(device, non_blocking=True))
        generator = torch.Generator().manual_seed(self._seed(Purpose.LEVELS))
        half_log_snr = draw_half_log_snr(
            self._density, config.batch_size, generator, stratified=config.loss.stratified
        )
        sigma = self.denoiser.path.sigma(half_log_snr)[mine]
        if device.type == "mps":  # it has no float64
            sigma = sigma.float()
        sigma = sigma.to(device, non_blocking=True)
        generator = torch.Generator(device).manual_seed(self._seed(Purpose.NOISE))
        shape = (config.batch_size, *x0.shape[1:])
        noise = torch.randn(shape, generator=generator, device=device)[mine]
        if self.conditioner is None:
            return x0, sigma, noise, {}
        generator = torch.Generator().manual_seed(self._seed(Purpose.LABELS))
        hidden = torch.rand(config.batch_size, generator=generator)[mine] < config.condition_dropout
        first = self.images_seen + mine.start
        condition = self._condition(batch, x0, range(first, first + share))
        drop = getattr(self.network, "drop_condition", self.conditioner.hide)
        return x0, sigma, noise, drop(condition, hidden.to(device, non_blocking=True))

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
            _check_null(network, self.conditioner, example)
        except ValueError as error:
            raise ConfigError(
                f"model, conditioner and data do not fit each other: {error}"
            ) from None
        return example

    # ------------------------------------------------------------ checkpoints

    def save(self, path: str | Path) -> str:
        """Write a checkpoint, on the main process only; gives its sha256."""
        if not self.accelerator.is_main_process:
            return ""
        scaler = getattr(self.accelerator, "scaler", None)
        return save_checkpoint(
            path,
            {
                "model": named_tensors(self.network),
                "ema": self.ema.state_dict(),
                "optimizer": moments(self.optimizer, self.network),
            },
            config=self.config.to_json(),
            images_seen=self.images_seen,
            step=self.step,
            data=self.source.facts(),
            state={
                "ema_updates": self.ema.updates,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "extra": self.extra,
            },
        )

    def _resume(self, path: Path) -> None:
        info, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
        self._check_same_run(info)
        if not parts["model"]:
            raise CheckpointError(
                f"checkpoint {path} holds weights for sampling only: it cannot be resumed"
            )
        load_into(self.network, parts["model"], info)
        try:
            self.ema.load_state_dict(parts["ema"], info.state["ema_updates"])
            load_moments(self.optimizer, self.network, parts["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be resumed: {error}") from None
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and info.state["scaler"] is not None:
            scaler.load_state_dict(info.state["scaler"])
        self.step = info.step
        self.skipped_steps = info.state["skipped_steps"]
        self.skipped_in_a_row = info.state["skipped_in_a_row"]
        self.extra = dict(info.state["extra"])

    def _check_same_run(self, info: CheckpointInfo) -> None:
        theirs, ours = flat(filled(info.config)), flat(filled(self.config.to_json()))
        theirs["data.images"], ours["data.images"] = info.data.get("images"), len(self.source)
        theirs, ours = (
            {k: v for k, v in both.items() if k.split(".")[0] in FIXED and k != "data.path"}
            for both in (theirs, ours)
        )
        if differing := differences(theirs, ours):
            raise CheckpointError(
                f"checkpoint {info.path} is of a run with {'; '.join(differing)}: resume with the "
                "same, or begin a new run"
            )


def _seed_network(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from. (torch.manual_seed seeks every kind of device each time.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def settle(
    config: TrainConfig, source: Source, conditioner: Conditioner | None = None
) -> TrainConfig:
    """The config with what the data decides: in_channels, and a sigma_data of "auto".

    The conditioner's own config, where it has one, takes the place of the one that is there.

    Raises:
        ConfigError: the data is constant, so that it has no sigma_data.
    """
    model = dict(config.model)
    if takes_option(model, "in_channels"):
        model.setdefault("in_channels", source.shape[0])
    if model.get("in_channels", source.shape[0]) != source.shape[0]:
        raise ConfigError(
            f"model.in_channels is {model['in_channels']}, but the data has {source.shape[0]} "
            "channels: leave it out, and the data decides"
        )
    if model.get("sigma_data") == AUTO:
        if source.std < 1e-6:
            raise ConfigError("model.sigma_data is auto, but all values of the data are equal")
        model["sigma_data"] = source.std
    update: dict[str, Any] = {"model": model}
    if conditioner is not None:
        update["conditioner"] = None
        with suppress(ValueError):  # one that is not registered has no config
            update["conditioner"] = conditioner_config(conditioner)
    return config.model_copy(update=update)


def _check_shape(model: Mapping[str, Any], source: Source, example: Mapping[str, Tensor]) -> None:
    """Run the network on one image without memory, to see whether it takes the data's shape."""
    condition = {keyword: value.to("meta") for keyword, value in example.items()}
    with torch.device("meta"), torch.no_grad(), suppress(NotImplementedError, RuntimeError):
        try:
            network, shape = make_model(model), (1, *source.shape)
            check_output(network, network(torch.zeros(shape), torch.zeros(1), **condition), shape)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model and data do not fit each other: {error}") from None


def _check_null(
    network: nn.Module, conditioner: Conditioner, example: Mapping[str, Tensor]
) -> None:
    """Refuse a conditioner whose "no class" the network takes for a class, or for none at all."""
    null = conditioner.null(1, example)
    if "class_label" in null and int(null["class_label"][0]) != known_classes(network):
        raise ValueError(
            f"the conditioner knows {int(null['class_label'][0])} classes, but the model's "
            f"num_classes is {known_classes(network)}: give the same number"
        )


def _check_classes(num_classes: int, source: Source) -> None:
    if num_classes and num_classes != source.num_classes:
        raise ConfigError(
            f"model.num_classes is {num_classes}, but the data has {source.num_classes} classes: "
            "give as many, or 0 to learn without classes"
        )


def _accelerator(precision: str) -> Any:
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
