"""What a run says of itself before its first step, and of what it meets or measures later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k_diffusion.training.between import crowding

if TYPE_CHECKING:
    from k_diffusion.training.trainer import Trainer

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def opening_lines(trainer: Trainer, start: Path | None, looked: bool) -> list[str]:
    """The lines of news with which a run begins.

    Args:
        trainer: about to begin.
        start: the checkpoint from which it goes on, or None.
        looked: whether the run's folder was searched for one.
    """
    config, count = trainer.config, trainer.processes.count
    total = config.steps * config.batch_size
    if start is not None:
        where = f"from {start} at {trainer.images_seen} of {total} images"
    elif looked:
        where = f"no checkpoint in {config.out}: from the beginning"
    else:
        where = f"from the beginning, {total} images"
    if start is None and config.init_from is not None:
        where += f", with the weights of {config.init_from}"
    size = sum(p.numel() for p in trainer.network.parameters())
    processes = f"{count} processes" if count > 1 else "1 process"
    kind = config.model.get("type") or type(trainer.network).__name__
    lines = [
        f"training {kind}, {size} parameters, {processes} on {trainer.device.type} in "
        f"{PRECISIONS[config.precision]}, "
        f"{_parts(trainer)} a step; {where}"
    ]
    if bad := len(trainer.source.bad_files):
        lines += [f"{bad} of {trainer.source.found} images are broken, and not learned from"]
    if start is not None:
        lines += [
            f"the average {name} of {start} is left out, as ema.profiles has it no more: it cannot "
            "be taken up again later"
            for name in trainer.averages_left_out
        ]
        if changed := trainer.data_otherwise:
            lines += [
                f"the data are others than before: {'; '.join(changed)}; the run learns from these "
                "from now on"
            ]
        if changed := trainer.computed_otherwise:
            lines += [
                f"the run goes on to rounding, not bit for bit, as {'; '.join(changed)}: sums are "
                "done in another order there"
            ]
    if told := crowding(config.workers, trainer.processes.here):
        lines += [told]
    never = config.checkpoint_every_images is None and config.keep_every_images is None
    if never and trainer.step < config.steps:
        lines += [
            "a kill or a power cut will lose this session: checkpoint_every_images is none, so "
            "there is a checkpoint only at the end, or at Ctrl-C or SIGTERM"
        ]
    return lines


def micro_batch_line(before: int | None, now: int | None) -> str:
    """What to say when the most images that a process computes at once has changed."""
    if before is None:
        return f"memory holds {now} images at once on each process: micro_batch_size = {now}"
    return f"out of memory with {before} images at once: going on with {now}"


def evaluation_line(images_seen: int, line: Mapping[str, Any]) -> str:
    """What to say of an evaluation, whose line in the metrics file this is."""
    if line["figures"] is None:
        return f"evaluation at {images_seen} images: {line['reason']}"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in line["figures"].items())
    return (
        f"evaluation at {images_seen} images: {figures} ({line['samples']} samples, features of "
        f"{line['extractor']})"
    )


def _parts(trainer: Trainer) -> str:
    batch, size = trainer.config.batch_size, trainer.micro_batch
    if size is None:
        return f"{batch} images, in parts yet to be found,"
    return f"{batch} images" + (f", {size} at once," if size < batch else "")
