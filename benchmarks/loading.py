"""Loading beside torch.utils.data on plain files and WebDataset: images a second of one core.

    python benchmarks/loading.py                          # pictures of noise and shapes, made here
    python benchmarks/loading.py --images pictures.zip    # any zip of pictures
    python benchmarks/loading.py --quick                  # a few seconds, to see that it runs

The same pictures lie as PNG and JPEG files, in a zip, in tar shards and as an array. All load them
in this process, in batches, in random order (WebDataset from a buffer of a thousand), as uint8 of
shape (B, C, H, W); what counts is the process's time on the core, in turns. Neither flips nor
crops. WebDataset is left out where `make bench` has not installed it into benchmarks/.peers.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from k_diffusion.training import Stream, make_source

Loader = Callable[[], Iterator[torch.Tensor]]
PEER = Path(__file__).resolve().parent / ".peers" / "webdataset"
LIMIT = 0.9
"""Of the better of the others: the least that passes."""


# ---------------------------------------------------------------- the same pictures, five times


def pictures(path: Path | None, count: int, size: int) -> list[Image.Image]:
    """Those of a zip, or coloured shapes with a little noise."""
    if path is not None:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".png", ".jpeg"))]
            chosen = names[:: max(1, len(names) // count)][:count]
            found = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
            return [image.resize((size, size)) if size else image for image in found]
    generator, made = np.random.default_rng(0), []
    y, x = np.mgrid[: size or 32, : size or 32] / (size or 32)
    for _ in range(count):
        a, b, c = generator.normal(size=(3, 3, 1, 1))
        waves = np.sin(6 * (a * x + b * y) + c) * 100 + 128 + generator.normal(size=(3, *x.shape))
        made.append(Image.fromarray(waves.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return made


def lay_out(images: list[Image.Image], root: Path) -> None:
    """PNG and JPEG files, a zip and tar shards of the JPEGs, and an array of all."""
    contents: dict[str, list[bytes]] = {"PNG": [], "JPEG": []}
    for kind, found in contents.items():
        (root / kind).mkdir(parents=True)
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            found.append(buffer.getvalue())
            (root / kind / f"{i:06}.{kind.lower()}").write_bytes(found[-1])
    with zipfile.ZipFile(root / "jpeg.zip", "w") as archive:
        for i, content in enumerate(contents["JPEG"]):
            archive.writestr(f"{i:06}.jpeg", content)
    arrays = np.stack([np.asarray(image) for image in images])
    np.save(root / "array.npy", arrays)
    buffers = []
    for array in arrays:
        buffer = io.BytesIO()
        np.save(buffer, array)
        buffers.append(buffer.getvalue())
    for name, ending, members in (
        ("png", "png", contents["PNG"]),
        ("jpeg", "jpeg", contents["JPEG"]),
        ("array", "npy", buffers),
    ):
        with tarfile.open(root / f"{name}.tar", "w") as shard:
            for i, content in enumerate(members):
                info = tarfile.TarInfo(f"{i:06}.{ending}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


# ---------------------------------------------------------------- three ways to load them


def ours(batch: int, steps: int, **options: Any) -> Loader:
    source = make_source(**options)  # once: its scan is of the run's beginning

    def load() -> Iterator[torch.Tensor]:
        for found in Stream(source, batch, seed=0).batches(0, steps):
            yield found.images

    return load


class Files(Dataset):
    """Plain files, as the documentation of torch.utils.data shows it."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return as_tensor(image)


class Rows(Dataset):
    """Rows of an array that is mapped from disk."""

    def __init__(self, path: Path) -> None:
        self.values = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.values[index].transpose(2, 0, 1).copy())


def as_tensor(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def torch_data(dataset: Dataset, batch: int, steps: int) -> Loader:
    def load() -> Iterator[torch.Tensor]:
        done = 0
        while done < steps:
            for images in DataLoader(dataset, batch, shuffle=True, drop_last=True):
                yield images
                done += 1
                if done == steps:
                    return

    return load


def web_dataset(path: Path, batch: int, steps: int) -> Loader | None:
    try:
        import webdataset
    except ImportError:
        return None

    def tensor(sample: dict[str, Any]) -> torch.Tensor:
        (content,) = (value for key, value in sample.items() if not key.startswith("__"))
        if path.stem == "array":
            return torch.from_numpy(np.load(io.BytesIO(content)).transpose(2, 0, 1).copy())
        return as_tensor(Image.open(io.BytesIO(content)))

    def load() -> Iterator[torch.Tensor]:
        samples = webdataset.WebDataset(str(path), shardshuffle=False).repeat()
        batches = samples.shuffle(1000).map(tensor).batched(batch, collation_fn=torch.stack)
        for _, images in zip(range(steps), batches, strict=False):
            yield images

    return load


# ---------------------------------------------------------------- measuring


def images_per_second(load: Loader) -> float:
    start, count = time.process_time(), 0
    for images in load():
        count += len(images)
    return count / (time.process_time() - start)


def measure(loaders: dict[str, Loader], rounds: int) -> dict[str, list[float]]:
    """In turns; the first of each is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        for name, load in loaders.items():
            speed = images_per_second(load)
            if turn:
                found[name].append(speed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a zip of pictures; left out: made here")
    parser.add_argument("--count", type=int, default=4096, help="how many of them")
    parser.add_argument("--size", type=int, default=0, help="in pixels; 0: as they are, or 32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few pictures, one round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.quick:
        args.count, args.batch, args.rounds = 64, 16, 1
    torch.set_num_threads(1)
    sys.path.append(str(PEER))
    passed, report = True, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        images = pictures(args.images, args.count, args.size)
        lay_out(images, root)
        steps, size = len(images) // args.batch, (images[0].height, images[0].width)
        print(f"{len(images)} pictures of {size[0]} x {size[1]}, batches of {args.batch}; images/s")
        print(f"{'':14}{'ours':>10}{'torch data':>12}{'WebDataset':>12}{'of the better':>15}")
        for name, options, dataset, tar in (
            ("PNG", {"source": "folder", "path": root / "PNG", "size": size},
             Files(root / "PNG"), "png.tar"),
            ("JPEG in a zip", {"source": "archive", "path": root / "jpeg.zip", "size": size},
             Files(root / "JPEG"), "jpeg.tar"),
            ("array", {"source": "arrays", "path": root / "array.npy", "layout": "channels_last"},
             Rows(root / "array.npy"), "array.tar"),
        ):  # fmt: skip
            loaders: dict[str, Loader] = {
                "ours": ours(args.batch, steps, **options),
                "torch data": torch_data(dataset, args.batch, steps),
            }
            web = web_dataset(root / tar, args.batch, steps)
            loaders |= {"WebDataset": web} if web is not None else {}
            turns = measure(loaders, args.rounds)
            speeds = {key: statistics.median(found) for key, found in turns.items()}
            # By turns, which a busy machine slows down together.
            others = [found for key, found in turns.items() if key != "ours"]
            ratio = min(
                statistics.median(a / b for a, b in zip(turns["ours"], found, strict=True))
                for found in others
            )
            shown = "".join(
                f"{speeds[key]:>{width},.0f}" if key in speeds else f"{'-':>{width}}"
                for key, width in (("ours", 10), ("torch data", 12), ("WebDataset", 12))
            )
            print(f"{name:14}{shown}{ratio:>15.2f}{'' if ratio >= LIMIT else '  too slow'}")
            passed &= ratio >= LIMIT
            report[name] = {"images_per_second": speeds, "of_the_better": ratio}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
