"""Whether a run will do: config, data, memory and one step, before any training.

Everything is a copy of its own in memory; the run's folder stays as it is.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models import Conditioner
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import DataError, Source, as_float
from k_diffusion.training.evaluating import look_at
from k_diffusion.training.gradient import even_parts
from k_diffusion.training.lock import refuse_busy
from k_diffusion.training.loggers import check_loggers
from k_diffusion.training.previews import Previews
from k_diffusion.training.run_folder import start_point
from k_diffusion.training.trainer import Trainer, TrainingError

SAMPLE = 512
"""Images that are decoded, where nobody says."""
_NAMED = 3


@dataclass(frozen=True)
class RunCheck:
    """What was found. As text it is a summary of a few lines.

    Attributes:
        config: the run's, with what the data decides.
        shape: of one image.
        num_classes: of the data.
        images: how many the data has, without the broken ones.
        decoded: of how many the decoding was tried, evenly spread.
        bad_files: broken file -> what is wrong with it.
        parameters: of the network.
        weight_bytes: of its weights and buffers.
        gradient_bytes: of one gradient.
        optimizer_bytes: of what the optimiser remembers.
        average_bytes: of all averages of the weights.
        saved_bytes: the most that was held for the backward pass at once, without the weights.
        device: on which it ran.
        peak_bytes: the most that was held on the device; None where the device does not tell.
        device_bytes: what the device has; None likewise.
        processes: that train together.
        micro_batch: images that a process computes at once.
        loss: of the step.
        grad_norm: of the step.
        evaluation: what is measured when and by what, in words; empty: nothing.
        resumed_from: the checkpoint from which the run would go on.
        free_bytes: of the disk that the run's folder is on.
    """

    config: TrainConfig
    shape: tuple[int, ...]
    num_classes: int
    images: int
    decoded: int
    bad_files: Mapping[str, str]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    saved_bytes: int
    device: str
    peak_bytes: int | None
    device_bytes: int | None
    processes: int
    micro_batch: int
    loss: float
    grad_norm: float
    evaluation: str
    resumed_from: Path | None
    free_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, about."""
        return self.weight_bytes + self.optimizer_bytes + self.average_bytes

    @property
    def parts(self) -> int:
        """Micro-batches a step."""
        return len(even_parts(self.config.batch_size // self.processes, self.micro_batch))

    def __str__(self) -> str:
        config, parts = self.config, self.parts
        size = " x ".join(map(str, self.shape))
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        left = f"{len(self.bad_files)} broken" if self.bad_files else "none broken"
        named = [f"{file} ({reason})" for file, reason in self.bad_files.items()][:_NAMED]
        more = [f"{len(self.bad_files) - _NAMED} more"] if len(self.bad_files) > _NAMED else []
        cut = f"{parts} parts of at most {self.micro_batch}" if parts > 1 else "one part"
        shared = f" on each of {self.processes} processes" if self.processes > 1 else ""
        peak = ""
        if self.peak_bytes is not None:
            of = f" of {_size(self.device_bytes)}" if self.device_bytes else ""
            peak = f"; at most {_size(self.peak_bytes)}{of} held on {self.device}"
        start = f", from {self.resumed_from}" if self.resumed_from else ""
        lines = {
            "data": f"{self.images:,} images of {size}{classes}; {self.decoded:,} tried, {left}",
            "broken": ", ".join([*named, *more]),
            "model": f"{config.model.get('type', 'given')}, {config.prediction}, "
            f"{self.parameters:,} parameters",
            "changes": str(config.augmentation),
            "memory": f"weights {_size(self.weight_bytes)}, gradient {_size(self.gradient_bytes)}, "
            f"optimiser {_size(self.optimizer_bytes)}, averages {_size(self.average_bytes)}, kept "
            f"for the backward pass {_size(self.saved_bytes)}{peak}",
            "step": f"{config.batch_size} images in {cut}{shared}; loss {self.loss:.4g}, gradient "
            f"norm {self.grad_norm:.4g}",
            "figures": self.evaluation,
            "run": f"{config.steps:,} steps, {config.total_images:,} images{start}; a checkpoint "
            f"takes about {_size(self.checkpoint_bytes)}, {config.out} has "
            f"{_size(self.free_bytes)} left",
        }
        return "\n".join(f"{name + ':':<8} {text}" for name, text in lines.items() if text)


def check_run(
    config: TrainConfig,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    sample: int = SAMPLE,
    network: nn.Module | None = None,
    source: Source | None = None,
    conditioner: Conditioner | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> RunCheck:
    """Decode a sample of the data and do one step, on copies of everything.

    Args:
        config: the run.
        resume, overwrite: as `run_training` will be told.
        sample: images to decode, evenly spread; as many as the data has: all.
        network, source, conditioner, optimizer: as of `run_training`.

    Raises:
        ConfigError, CheckpointError, DataError: those with which `run_training` would begin.
        TrainingError: the step is not finite (at float16: nor the next ones, `max_skipped` in all),
            or memory holds not even one image.
    """
    out = Path(config.out)
    check_loggers(config.loggers)
    refuse_busy(out)
    start = start_point(out, resume, overwrite, lambda line: None)
    free = _writable(out)
    trainer = Trainer(
        config,
        resume=start,
        network=network,
        source=source,
        conditioner=conditioner,
        optimizer=optimizer,
    )
    Previews(trainer)
    measured = config.evaluate.every_images is not None
    evaluation = look_at(config.evaluate, trainer.source, trainer.denoiser) if measured else ""
    decoded = decode_sample(trainer.source, sample)
    saved, loss, grad_norm = _step(trainer)
    device = trainer.device
    cuda = device.type == "cuda"
    named = dict(trainer.network.named_parameters())
    found = RunCheck(
        config=trainer.config,
        shape=trainer.source.shape,
        num_classes=trainer.source.num_classes,
        images=len(trainer.source),
        decoded=decoded,
        bad_files=dict(trainer.source.bad_files),
        parameters=sum(p.numel() for p in named.values()),
        weight_bytes=_bytes_of(trainer.network.state_dict()),
        gradient_bytes=_bytes_of([p for p in named.values() if p.requires_grad]),
        optimizer_bytes=_bytes_of(trainer.optimizer.state_dict()),
        average_bytes=_bytes_of([average.state_dict() for average in trainer.averages.values()]),
        saved_bytes=saved,
        device=str(device),
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        device_bytes=torch.cuda.mem_get_info(device)[1] if cuda else None,
        processes=trainer.accelerator.num_processes,
        micro_batch=trainer.micro_batch or config.batch_size,
        loss=loss,
        grad_norm=grad_norm,
        evaluation=evaluation,
        resumed_from=start,
        free_bytes=free,
    )
    if free < found.checkpoint_bytes:
        raise ConfigError(
            f"out = {str(out)!r} lies on a disk with {_size(free)} left, and a checkpoint takes "
            f"about {_size(found.checkpoint_bytes)}: make room, or give another folder"
        )
    return found


def _writable(out: Path) -> int:
    """Bytes left where the folder is or will be.

    Raises:
        ConfigError: nothing can be written there.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"out = {str(out)!r} lies in {there}, which is no folder")
    try:
        with tempfile.TemporaryFile(dir=there):  # rights alone do not tell: not root's, nor /proc's
            return shutil.disk_usage(there).free
    except OSError as error:
        raise ConfigError(
            f"out = {str(out)!r}: nothing can be written into {there} ({error.strerror})"
        ) from None


def decode_sample(source: Source, count: int) -> int:
    """Decode so many images, evenly spread; the source takes note of broken ones.

    Returns:
        How many were decoded.

    Raises:
        DataError: a value is not finite, or none can be decoded.
    """
    count = min(count, len(source))
    for first in range(0, count, 32):
        places = torch.arange(first, min(first + 32, count))
        batch = source.batch(places * len(source) // count)
        source.report(batch.bad)
        finite = as_float(batch.images).flatten(1).isfinite().all(1)
        if not finite.all():
            name = source.name(int(batch.indices[~finite][0]))
            raise DataError(f"{name} holds values that are not finite: mend it, or take it out")
    return count


def _step(trainer: Trainer) -> tuple[int, float, float]:
    """Do a step; gives what was kept for the backward pass, loss and norm of the gradient."""
    saved = SavedTensors(trainer.network)
    # The optimiser's memory is there from the first step's end on: the second sees all of it.
    todo, too_large = (2 if trainer.device.type == "cuda" else 1), 0
    while todo:
        batch = trainer.stream[trainer.step]
        trainer.source.report(batch.bad)
        with saved.watching():
            loss, grad_norm, report = trainer.train_step(batch, trainer.config.optimizer.lr)
        if report is None:
            todo -= 1
            continue
        # float16's losses begin scaled by so much that the first gradients overflow, as a rule.
        too_large += 1
        if trainer.scaler is None or too_large == trainer.config.max_skipped:
            steps = "step is" if too_large == 1 else f"{too_large} steps are"
            raise TrainingError(f"the first {steps} not finite: {report}")
    return saved.peak, loss, grad_norm


class SavedTensors:
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Args:
        network: whose weights do not count.

    Attributes:
        peak: the most at once.
    """

    def __init__(self, network: nn.Module) -> None:
        self._weights = {_storage(t) for t in (*network.parameters(), *network.buffers())}
        self._held: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, what is saved is counted until it is released."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())
        storage = _storage(tensor)
        if storage in self._weights:
            return kept
        size = tensor.untyped_storage().nbytes()
        if storage not in self._held:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
        self._held[storage] = self._held.get(storage, 0) + 1
        weakref.finalize(kept, self._release, storage, size)
        return kept

    def _release(self, storage: int, size: int) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            self._bytes -= size


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(state: Any) -> int:
    """Bytes of all tensors in a nest of mappings and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(_bytes_of, state.values()))
    return sum(map(_bytes_of, state)) if isinstance(state, (list, tuple)) else 0


def _size(count: int | None) -> str:
    number, unit = float(count or 0), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
