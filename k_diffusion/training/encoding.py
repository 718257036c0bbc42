"""Encoding all images of a source to latents on disk, once, for training on them.

The images are cut into shards by their numbers alone. So several processes can share the work, a
shard that a killed one had finished stays, and the result is the same, byte for byte, whoever
encoded what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.models import Autoencoder
from k_diffusion.training.dataset import DataError, Source, as_float
from k_diffusion.training.latent_shards import FORMAT, INDEX, Shard, open_shard, shard_name
from k_diffusion.training.latents import autoencoder_facts
from k_diffusion.training.tensor_file import write_tensors
from k_diffusion.utils.files import write_text
from k_diffusion.utils.images import clear_unfinished, write_whole

PLAN = "encode.json"


@dataclass(frozen=True)
class Encoded:
    """What `encode` did.

    Attributes:
        folder: where the latents are.
        images: how many were encoded, by this process and before; None: others are still at it.
        made: shards that this process wrote.
        kept: shards that were there already.
        bad_files: broken image -> what is wrong with it, as far as this process knows.
    """

    folder: Path
    images: int | None
    made: int
    kept: int
    bad_files: dict[str, str]


def encode(
    source: Source,
    autoencoder: Autoencoder,
    out: str | Path,
    *,
    shard_size: int = 1024,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    variance: bool = True,
    process: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = lambda line: None,
) -> Encoded:
    """Write the latents of all images of a source; what is there already is not made again.

    Args:
        source: the images; nothing about them may be left to chance.
        autoencoder: on the device where it is to run.
        out: the folder; it is made.
        shard_size: images of a shard.
        batch_size: images encoded at once.
        dtype: what latents are stored as: float32, float16 or bfloat16.
        variance: store the log-variance too, if the autoencoder tells it.
        process: number of this one, from 0, and of how many: it makes each so many-th shard.
        say: takes each line of news.

    Raises:
        DataError: the images are augmented or of several sizes, the autoencoder does not take them,
            none is good, or the folder holds latents of something else.
    """
    number, count = process
    if source.augments or source.buckets is not None:
        what = "augmented anew each time" if source.augments else "of several sizes"
        raise DataError(f"these images are {what}: leave flip, random crop and buckets out")
    folder, autoencoder = Path(out), autoencoder.eval()
    _check(source, autoencoder)
    plan = _plan(source, autoencoder, shard_size, dtype, variance)
    _begin(folder, plan)
    shards = -(-len(source) // shard_size)
    made = kept = 0
    for shard in range(number, shards, count):
        path = folder / shard_name(shard)
        if _is_whole(path, plan):
            kept += 1
            continue
        first = shard * shard_size
        numbers = torch.arange(first, min(first + shard_size, len(source)))
        tensors, texts = _encode(source, autoencoder, numbers, batch_size, dtype, variance)
        _write(path, tensors, {"format": FORMAT, "plan": plan["digest"], **texts})
        made += 1
        say(f"shard {shard + 1} of {shards}: {len(tensors['mean'])} images")
    whole = all(_is_whole(folder / shard_name(shard), plan) for shard in range(shards))
    images = _finish(folder, shards, plan, source, autoencoder) if whole else None
    return Encoded(folder, images, made, kept, dict(source.bad_files))


@torch.no_grad()
def _check(source: Source, autoencoder: Autoencoder) -> None:
    """Refuse images that the autoencoder does not take, by one of them."""
    first = as_float(source.batch(torch.tensor([0])).images)
    try:
        autoencoder.encode(first.to(autoencoder.shift.device))
    except ValueError as error:
        raise DataError(f"the autoencoder does not take these images: {error}") from None


def _plan(
    source: Source, autoencoder: Autoencoder, shard_size: int, dtype: torch.dtype, variance: bool
) -> dict[str, Any]:
    """What decides the latents, as JSON data, and its hash."""
    facts = {
        "format": FORMAT,
        "autoencoder": autoencoder_facts(autoencoder),
        "data": source.facts(),
        "shard_size": shard_size,
        "dtype": str(dtype).removeprefix("torch."),
        "variance": variance,
    }
    return facts | {"digest": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder say what is encoded there, or see that it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if not path.exists():
        if any(folder.glob("latents*")):
            raise DataError(f"folder {folder} holds latents, but no {PLAN}: give another one")
        write_text(path, json.dumps(plan, indent=1) + "\n")
    try:
        theirs = json.loads(path.read_text())
        differing = [key for key in plan if theirs.get(key) != plan[key] and key != "digest"]
    except (ValueError, AttributeError):
        raise DataError(f"{path} is damaged: give another folder") from None
    if differing:
        raise DataError(
            f"folder {folder} holds latents with another {', '.join(differing)}: give the same, or "
            "another folder"
        )


def _is_whole(path: Path, plan: dict[str, Any]) -> bool:
    try:
        return open_shard(path).texts.get("plan") == plan["digest"]
    except DataError:
        return False


@torch.no_grad()
def _encode(
    source: Source,
    autoencoder: Autoencoder,
    numbers: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    variance: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a shard; of broken images there is nothing but their names."""
    home = autoencoder.shift.device
    means, logvars, labels, indices = [], [], [], []
    captions: list[str] | None = None
    bad: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    for part in numbers.split(batch_size):
        batch = source.batch(part)
        source.report(batch.bad)
        bad |= {source.name(index): reason for index, reason in batch.bad}
        good = batch.indices == part  # what stands in for a broken one has a place of its own
        mean, logvar = autoencoder.posterior(as_float(batch.images).to(home))
        if not bool(mean.isfinite().all()):
            raise DataError(
                f"the autoencoder makes latents that are not finite of {source.name(int(part[0]))} "
                "or those after it: encode in float32, or take them out"
            )
        shape = tuple(mean.shape[1:])
        means.append(mean.cpu()[good].to(dtype))
        if variance and logvar is not None:
            logvars.append(logvar.cpu()[good].to(dtype))
        labels.append(batch.labels[good])
        indices.append(part[good])
        if "text" in batch.raws:
            told = [text for text, one in zip(batch.raws["text"], good, strict=True) if one]
            captions = [*(captions or []), *told]
    tensors = {"mean": torch.cat(means), "labels": torch.cat(labels), "indices": torch.cat(indices)}
    if logvars:
        tensors["logvar"] = torch.cat(logvars)
    texts = {"bad": json.dumps(bad), "shape": json.dumps(shape)}
    if captions is not None:
        texts["captions"] = json.dumps(captions)
    return tensors, texts


def _write(path: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    def write(name: Path) -> None:
        with open(name, "wb") as file:
            write_tensors(file, tensors, texts)

    clear_unfinished(path.parent, [path.name])  # of a killed one: this shard is ours alone
    write_whole(path, write)


def _finish(
    folder: Path, shards: int, plan: dict[str, Any], source: Source, autoencoder: Autoencoder
) -> int:
    """Write the index, once all shards are there; gives the number of latents."""
    opened = [open_shard(folder / shard_name(shard)) for shard in range(shards)]
    images = sum(map(len, opened))
    if not images:
        raise DataError("none of these images can be decoded, so there are no latents of them")
    mean, std = _statistics(opened, autoencoder)
    bad: dict[str, str] = {}
    for shard in opened:
        bad |= json.loads(shard.texts["bad"])
    index = {
        "format": FORMAT,
        "shape": json.loads(opened[0].texts["shape"]),
        "images": images,
        "shards": [shard.path.name for shard in opened],
        "class_names": list(source.class_names),
        "captions": all("captions" in shard.texts for shard in opened),
        "mean": mean,
        "std": std,
        "shift": autoencoder.shift.tolist(),
        "scale": autoencoder.scale.tolist(),
        "autoencoder": plan["autoencoder"],
        "bad_files": dict(sorted((source.bad_files | bad).items())),
    }
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return images


def _statistics(shards: list[Shard], autoencoder: Autoencoder) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the scaled latents, of those drawn where there
    is a variance; in float64, in the order of the shards."""
    channels = len(autoencoder.shift)
    shift, scale = autoencoder.shift.double().cpu(), autoencoder.scale.double().cpu()
    count, total, squares = 0, torch.zeros(channels), torch.zeros(channels)
    total, squares = total.double(), squares.double()
    for shard in shards:
        if not len(shard):
            continue
        values = shard.tensor("mean").double().transpose(0, 1).flatten(1)
        values = (values - shift[:, None]) * scale[:, None]
        count += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
        if "logvar" in shard.entries:
            variances = shard.tensor("logvar").double().exp().transpose(0, 1).flatten(1)
            squares += variances.sum(1) * scale**2
    mean = total / count
    return mean.tolist(), (squares / count - mean**2).clamp(min=0).sqrt().tolist()
