"""More samples than memory holds: batch by batch, in several processes, to disk, and resumed.

Sample i is a function of its own seed and condition alone. So it makes no difference which batch
or process draws it, nor whether a run was broken off before.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.guidance.held import bound_rows, check_bound, wide_shape
from k_diffusion.sampling.settings import described, digest_rows
from k_diffusion.sampling.start import whole
from k_diffusion.utils.files import write_text
from k_diffusion.utils.images import clear_unfinished, save_png, write_whole
from k_diffusion.utils.memory import is_out_of_memory, release_memory

AUTO_BATCH = 64
"""Samples that are tried at a time where the batch size is left open."""
SETTINGS = "settings.json"
_OWN = ("x", "seeds", "trajectory", "details")
_PER_SAMPLE = ("init", "mask")
TOLD = "conditions and images, one digest a sample"


class Many:
    """Samples that are drawn as they are asked for; made by `KSampler.sample_many`.

    Iterating gives `(i, sample)` in ascending order of i, for the samples of this process.

    Attributes:
        indices: the samples of this process: every `world`-th, from `rank` on.
        batch_size: samples drawn at a time; it falls when memory runs out.
    """

    def __init__(
        self,
        sampler: Any,
        n: int,
        *,
        steps: Any,
        shape: Sequence[int] | None,
        condition: Any,
        seed: int | Sequence[int],
        batch_size: int | str,
        rank: int | None,
        world: int | None,
        progress: bool,
        options: Mapping[str, Any],
    ) -> None:
        n = _count("n", n)
        if batch_size == "auto":
            batch_size = AUTO_BATCH
        self.batch_size = _count("batch_size", batch_size, ' or "auto"')
        known = inspect.signature(sampler.sample).parameters
        for name in options:
            if name in _OWN or name not in known:
                raise TypeError(f"sample_many takes no {name!r}: it goes with sample, if anywhere")
        init = options.get("init")
        if shape is None:
            if not isinstance(init, Tensor) or init.ndim < 2:
                raise ValueError("sample_many needs the shape of a sample, (C, H, W) say, or init")
            shape = init.shape[1:]
        self.shape = tuple(shape)
        self.rank, self.world = _place(rank, world)
        self.indices = range(self.rank, n, self.world)
        self._n = n
        self._sampler = sampler
        self._steps = steps
        self._condition = condition
        batch = (n, *self.shape)
        check_bound(sampler.denoiser, batch)
        # What the guidance itself holds of each sample goes with the samples as a condition does.
        self._bound = bound_rows(sampler.denoiser, batch)
        self._seed = whole(seed)
        if isinstance(self._seed, bool) or not isinstance(self._seed, (int, Sequence)):
            raise TypeError(f"seed must be a whole number or one per sample, got {seed!r}")
        if isinstance(self._seed, Sequence) and len(self._seed) != n:
            raise ValueError(f"{n} samples need as many seeds, got {len(self._seed)}")
        self._progress = progress
        self._options = dict(options)
        mask = options.get("mask")
        if isinstance(mask, Tensor) and mask.ndim <= len(self.shape):  # (H, W), say: for all
            wide = wide_shape(tuple(mask.shape), len(self.shape) + 1)
            self._options["mask"] = mask.reshape(wide)
        for name in _PER_SAMPLE:
            _check_rows(self._options.get(name), n, name)
        if not callable(condition):
            _check_rows(condition, n, "condition")

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self.draw(self.indices)

    def collect(self) -> Tensor:
        """The samples of this process in one tensor on the CPU, shape (len, C, ...)."""
        samples = [sample for _, sample in self]
        if not samples:
            raise ValueError(f"process {self.rank} of {self.world} has none of {self._n} samples")
        return torch.stack(samples)

    def draw(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Some of this process's samples, in the order given: those that are missing, say.

        Raises:
            ValueError: a number that is none of this process's.
        """
        for i in indices:
            if i not in self.indices:
                raise ValueError(f"sample {i} is none of process {self.rank}'s {self.indices}")
        return self._draw_each(indices)

    def save(
        self,
        folder: Path | str,
        *,
        write: Callable[[Path, Tensor], object] | None = None,
        suffix: str | None = None,
    ) -> list[Path]:
        """Writes each sample of this process to a file of its own, unless it is there already.

        A file is whole or not there, so that a run which was broken off in any way goes on where
        it was when it is started again. Beside them stand the settings; a folder of other settings
        is refused, that of other guidance, conditions and images included. (Weights are not
        compared, nor what a function of samples' numbers returns.)

        Args:
            folder: made where it is missing.
            write: called as `write(path, sample)` with a path to write to and a tensor on the CPU.
                None: PNG where samples are uint8 images, and safetensors ("sample") otherwise.
            suffix: of the files, for a `write` of your own.

        Returns:
            The files of this process, drawn now or before.

        Raises:
            ValueError: the folder holds samples of other settings.
        """
        folder = Path(folder)
        if (write is None) != (suffix is None):
            raise ValueError("give write and suffix together: a suffix says what a file holds")
        channels = self.shape[0] if len(self.shape) == 3 else 0
        png = self._options.get("to") == "uint8" and 1 <= channels <= 4
        suffix = suffix or (".png" if png else ".safetensors")
        folder.mkdir(parents=True, exist_ok=True)
        paths = {i: folder / f"{i:06d}{suffix}" for i in self.indices}
        self._check_settings(folder, suffix)
        clear_unfinished(folder, {path.name for path in paths.values()})
        there = {entry.name for entry in os.scandir(folder)}
        missing = [i for i, path in paths.items() if path.name not in there]
        for i, sample in self.draw(missing):
            if write is None:
                _save(paths[i], sample, {"index": str(i), "seed": str(self._seed_of(i))}, png)
            else:
                write_whole(paths[i], functools.partial(_written, write, sample))
        return list(paths.values())

    def _seed_of(self, i: int) -> int:
        return self._seed + i if isinstance(self._seed, int) else self._seed[i]

    def _draw_each(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        bar = None
        if self._progress:
            from tqdm import tqdm

            name = "sampling" + (f" {self.rank + 1}/{self.world}" if self.world > 1 else "")
            done = len(self) - len(indices)
            bar = tqdm(total=len(self), initial=done, desc=name, unit="sample")
        try:
            place = 0
            while place < len(indices):
                chosen = list(indices[place : place + self.batch_size])
                samples = self._attempt(chosen)
                if samples is None:
                    self.batch_size = len(chosen) // 2
                    continue
                place += len(chosen)
                for i, sample in zip(chosen, samples, strict=True):
                    yield i, sample
                    if bar is not None:
                        bar.update()
        finally:
            if bar is not None:
                bar.close()

    def _attempt(self, chosen: list[int]) -> Tensor | None:
        """Some samples, on the CPU; None where memory does not hold them."""
        try:
            return self._draw(chosen).cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(chosen) == 1:
                raise torch.OutOfMemoryError(
                    f"not even one sample of shape {self.shape} fits into memory: {error}"
                ) from error
        # Here, where the error and the tensors that its frames held are gone.
        release_memory(self._sampler.device)
        return None

    def _draw(self, chosen: list[int]) -> Tensor:
        if callable(self._condition):
            condition = self._condition(chosen)
        else:
            condition = _rows(self._condition, chosen, self._n)
        if self._bound:
            condition = {**_rows(self._bound, chosen, self._n), **as_keywords(condition)}
        options = {**self._options, **self._images(chosen)}
        seeds = [self._seed_of(i) for i in chosen]
        return self._sampler.sample(
            None, self._steps, condition, shape=self.shape, seeds=seeds, **options
        )

    def _images(self, chosen: Sequence[int]) -> dict[str, Any]:
        options = self._options
        return {
            name: _rows(options[name], chosen, self._n) for name in _PER_SAMPLE if name in options
        }

    def _told(self, i: int) -> Any:
        """All that sample i alone is told."""
        condition = None if callable(self._condition) else self._condition
        bound = [_rows(value, [i], self._n) for value in self._bound.values()]
        return [_rows(condition, [i], self._n), *([bound] if bound else []), self._images([i])]

    def _check_settings(self, folder: Path, suffix: str) -> None:
        """Refuses a folder of other samples; writes down what these are."""
        file = folder / SETTINGS
        settings = {
            "shape": list(self.shape),
            "steps": described(self._steps),
            "seed": self._seed if isinstance(self._seed, int) else "one per sample",
            **self._sampler.settings(_each(list(self._bound.values()), self._n)),
            **{name: described(value) for name, value in sorted(self._options.items())},
        }
        for name in ("callback", "preview", "cancel", *_PER_SAMPLE):
            settings.pop(name, None)
        called = callable(self._condition)
        if called:
            settings["condition"] = described(self._condition)
        if self._bound or self._images([]) or not (called or self._condition is None):
            settings[TOLD] = digest_rows(self._told, self._n)
        if not file.exists():
            other = next(folder.glob(f"[0-9]*{suffix}"), None)
            # Looked for again: another process may have come first, with its settings before all.
            if other is not None and not file.exists():
                raise ValueError(
                    f"{folder} holds {other.name} but no {SETTINGS}, so it is not known how that "
                    "was drawn: give another folder"
                )
        if not file.exists():
            write_text(file, json.dumps(settings, indent=1) + "\n")
        found = json.loads(file.read_text())
        before, now = found.pop(TOLD, None), settings.pop(TOLD, None)
        for name in sorted({*settings, *found}):
            if found.get(name) != settings.get(name):
                raise ValueError(
                    f"{folder} holds samples with {name} = {found.get(name)!r}, and this run has "
                    f"{settings.get(name)!r}: give another folder"
                )
        if (before is None) != (now is None):
            had, has = ("no", "has one") if before is None else ("a", "has none")
            raise ValueError(
                f"{folder} holds samples with {had} condition or image, and this run {has}: give "
                "another folder"
            )
        if before is None or now is None:
            return
        for i, (one, other) in enumerate(zip(*map(_in_eights, (before, now)), strict=False)):
            if one != other:
                raise ValueError(
                    f"{folder} holds sample {i} with another condition, image or guidance than "
                    "this run's: give another folder"
                )
        if len(now) > len(before):  # the set has grown
            write_text(file, json.dumps({**settings, TOLD: now}, indent=1) + "\n")


def _in_eights(text: str) -> list[str]:
    return [text[place : place + 8] for place in range(0, len(text), 8)]


def as_keywords(condition: Any) -> dict[str, Any]:
    """A condition as keyword arguments; see `KSampler.sample`.

    Raises:
        TypeError: it is none.
    """
    if condition is None:
        return {}
    if isinstance(condition, Mapping):
        return dict(condition)
    if isinstance(condition, Tensor):
        return {"embedding" if condition.is_floating_point() else "class_label": condition}
    raise TypeError(
        "condition must be class labels (an integer tensor), an embedding (a float tensor) "
        f"or a mapping of keyword arguments, got {type(condition).__name__}"
    )


def _written(write: Callable[[Path, Tensor], object], sample: Tensor, path: Path) -> None:
    write(path, sample)


def _save(path: Path, sample: Tensor, text: dict[str, str], png: bool) -> None:
    if png:
        save_png(path, sample, text)
        return
    from safetensors.torch import save_file

    one = {"sample": sample.contiguous()}
    write_whole(path, lambda file: save_file(one, file, metadata=text))


def _count(name: str, value: Any, other: str = "") -> int:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1{other}, got {value!r}")
    return value


def _rows(value: Any, rows: Sequence[int], n: int) -> Any:
    """What some samples are told: rows of tensors and items of lists; one for all is given to each.

    Tuples and mappings, and lists of another length, hold such values.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) == n:
            return value[list(rows)]
        return value.expand(len(rows), *value.shape[1:]) if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _rows(item, rows, n) for key, item in value.items()}
    if isinstance(value, list) and len(value) == n:
        return [value[row] for row in rows]
    if isinstance(value, (list, tuple)):
        items = [_rows(item, rows, n) for item in value]
        if isinstance(value, list):
            return items
        make = getattr(type(value), "_make", tuple)  # of a named tuple
        return make(items)
    return value


def _each(value: Any, n: int) -> list[Tensor]:
    """Of the tensors in mappings and lists those with a row for each of n samples."""
    if isinstance(value, Tensor):
        return [value] if value.shape[:1] == (n,) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _each(item, n)] if isinstance(value, (list, tuple)) else []


def _check_rows(value: Any, n: int, name: str) -> None:
    """Refuses a tensor of which it cannot be told what belongs to which sample."""
    if isinstance(value, Tensor):
        if value.ndim and len(value) not in (1, n):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, and there are {n} samples: give one row "
                "per sample, or one for all ([None] in front)"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_rows(item, n, f"{name} {key!r}")
    elif isinstance(value, (list, tuple)) and not (isinstance(value, list) and len(value) == n):
        for item in value:
            _check_rows(item, n, name)


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Which process this is, of how many: as given, or as torch.distributed or torchrun say."""
    if (rank is None) != (world is None):
        raise ValueError(f"give rank and world together, got rank {rank} of world {world}")
    if rank is None or world is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, world), got rank {rank} of world {world}")
    return rank, world
