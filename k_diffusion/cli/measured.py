"""What `k-diffusion evaluate` measures where it is there already, and what its file says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k_diffusion.utils.words import reason_of

from .gallery import GRID
from .problems import UsageError, as_usage

if TYPE_CHECKING:
    import torch

    from k_diffusion.evaluation import Reference
    from k_diffusion.training.checkpoint import CheckpointInfo
    from k_diffusion.training.dataset import Source


def begin_processes() -> bool:
    """Begin the talk of processes that torchrun has started; whether there are any others."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from k_diffusion.training.devices import make_accelerator

    make_accelerator("no")
    return True


def first_shape(folder: str) -> list[int]:
    """The shape of a folder's first image, (channels, height, width)."""
    from PIL import Image

    from k_diffusion.training.folder import image_files

    with as_usage():
        files = [path for path in image_files(Path(folder))[0] if path.name != GRID]
    if not files:
        raise UsageError(f"--samples {folder} holds no images")
    try:
        with Image.open(files[0]) as picture:
            channels = {"L": 1, "RGBA": 4}.get(picture.mode, 3)
            return [channels, picture.height, picture.width]
    except OSError as error:
        raise UsageError(
            f"--samples {folder}: {files[0].name} is no image that can be read "
            f"({reason_of(error)}): take it out"
        ) from None


def drawn_before(path: str, shape: list[int]) -> tuple[torch.Tensor, Source]:
    """The numbers of a folder's images, its grid left out, and the images.

    Raises:
        UsageError: there are none, or one has another size.
    """
    import torch
    from PIL import Image

    from k_diffusion.training.dataset import make_source

    height, width = shape[1:]
    with as_usage():
        source = make_source(
            "folder", path=path, size=(height, width), channels=shape[0], classes="none"
        )
    numbers = [i for i in range(len(source)) if Path(source.name(i)).name != GRID]
    for i in numbers:
        with Image.open(source.name(i)) as picture:
            if picture.size != (width, height):
                raise UsageError(
                    f"--samples: {source.name(i)} has {picture.width} x {picture.height} pixels, "
                    f"not {width} x {height} as the others: scaled, it would be another image"
                )
    if source.bad_files:
        raise _broken(*next(iter(source.bad_files.items())))
    if len(numbers) < 10:
        raise UsageError(f"--samples {path} holds {len(numbers)} images; give at least 10")
    return torch.tensor(numbers), source


def samples_of(source: Source, numbers: torch.Tensor) -> torch.Tensor:
    """Samples that were drawn before, shape (count, channels, height, width).

    Raises:
        UsageError: one turns out broken; another in its place would count twice.
    """
    batch = source.batch(numbers)
    if batch.bad:
        number, reason = batch.bad[0]
        raise _broken(source.name(number), reason)
    return batch.images


def _broken(name: str, reason: str) -> UsageError:
    return UsageError(f"--samples: {name} is broken ({reason}): take it out, or draw it anew")


def weights_facts(info: CheckpointInfo, weights: str) -> dict[str, Any]:
    """A checkpoint, and which of its weights were taken."""
    return {
        "path": str(info.path),
        "sha256": info.sha256,
        "images seen": info.images_seen,
        "weights": weights,
    }


def data_facts(source: Source, given: Any, reference: Reference) -> dict[str, Any]:
    """Real images: what was asked for, how many, and their hash."""
    facts = reference.statistics.facts
    found = {"source": given, "images": facts["images"], "sha256": facts["data sha256"]}
    return found | ({"broken files": len(source.bad_files)} if source.bad_files else {})


def software() -> dict[str, str]:
    """Versions that figures may hang on."""
    import platform
    from importlib.metadata import version

    import torch

    return {
        "k-diffusion": version("k-diffusion"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
