"""Training in the latent space of an autoencoder: a source of latents, and a way to train a small
autoencoder to begin with.

    autoencoder = train_autoencoder(SmallAutoencoder(in_channels=1), Digits())
    result = run_training(config, source=LatentSource(Digits(), autoencoder))
    images = autoencoder.decode(KSampler(denoiser).sample(noise))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.models import (
    Autoencoder,
    SmallAutoencoder,
    autoencoder_config,
    make_autoencoder,
)
from k_diffusion.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    save_checkpoint,
)
from k_diffusion.training.dataset import (
    ArraySource,
    Batch,
    DataError,
    Purpose,
    Source,
    Stream,
    as_float,
)
from k_diffusion.training.named_tensors import named_tensors
from k_diffusion.training.restore import load_into
from k_diffusion.utils.augmentation import normals
from k_diffusion.utils.maths import fold_seed

_TOGETHER = 64
"""Images encoded at a time where all are."""


class LatentSource(Source):
    """The latents of another source's images, encoded whenever they are asked for.

    A batch's raw inputs hold the images themselves as "picture". What is augmented is the image.

    Args:
        source: the images.
        autoencoder: is put into evaluation mode, and stays on its device; on a GPU a config's
            `workers` must be 0, for other processes cannot use what is there.

    Raises:
        DataError: the autoencoder does not take such images.
    """

    def __init__(self, source: Source, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.source = source
        self.autoencoder = autoencoder.eval()
        self.class_names = source.class_names
        self.augments = source.augments
        self.bad_files = source.bad_files
        self.buckets = source.buckets
        try:
            first = self.batch(torch.tensor([0])).images
        except ValueError as error:
            raise DataError(f"the autoencoder does not take these images: {error}") from None
        self.shape = tuple(first.shape[1:])

    @property
    def found(self) -> int:
        return self.source.found

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        factor = self.autoencoder.factor
        return tuple(
            (self.shape[0], *(length // factor for length in shape[1:]))
            for shape in self.source.shapes
        )

    def __len__(self) -> int:
        return len(self.source)

    @torch.no_grad()
    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        batch = self.source.batch(indices, seeds)
        home = self.autoencoder.shift.device
        pictures = as_float(batch.images)
        latents = self.autoencoder.encode(pictures.to(home)).float().cpu()
        return batch._replace(images=latents, raws={"picture": pictures, **batch.raws})

    def report(self, bad: Sequence[tuple[int, str]]) -> None:
        self.source.report(bad)

    def facts(self) -> dict[str, Any]:
        """Those of every source, of the latents; and which autoencoder they are of."""
        return super().facts() | {"autoencoder": autoencoder_facts(self.autoencoder)}

    def encoded(self) -> EncodedSource:
        """All latents in memory, encoded once: for data that is not augmented and fits there.

        Raises:
            DataError: the images are augmented anew each time they are seen.
        """
        if self.augments:
            raise DataError(
                "these images are augmented anew each time they are seen, so their latents cannot "
                "be kept: train on the LatentSource itself, or leave the augmentation out"
            )
        if self.buckets is not None:
            raise DataError(
                "these images are of several sizes, so their latents are no one array: train on "
                "the LatentSource itself, or leave the buckets out"
            )
        parts = [self.batch(part) for part in torch.arange(len(self)).split(_TOGETHER)]
        bad = tuple(one for part in parts for one in part.bad)
        self.report(bad)
        return EncodedSource(self, parts)


class EncodedSource(ArraySource):
    """What `LatentSource.encoded` gives."""

    def __init__(self, source: LatentSource, parts: Sequence[Batch]) -> None:
        super().__init__(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            source.class_names,
            raws=_joined([part.raws for part in parts]),
        )
        self.bad_files = source.bad_files
        self._autoencoder = autoencoder_facts(source.autoencoder)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"autoencoder": self._autoencoder}


def _joined(parts: Sequence[Any]) -> dict[str, Any]:
    """Raw inputs of several batches as one; pictures, which are large, are left behind."""
    joined: dict[str, Any] = {}
    for name in parts[0]:
        if name == "picture":
            continue
        several = [part[name] for part in parts]
        whole = all(isinstance(one, Tensor) for one in several)
        joined[name] = torch.cat(several) if whole else [raw for one in several for raw in one]
    return joined


def autoencoder_facts(autoencoder: Autoencoder) -> dict[str, Any]:
    """Which autoencoder it is, as JSON data: its config (None: not registered) and its hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(autoencoder).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    try:
        config = autoencoder_config(autoencoder)
    except (ValueError, TypeError):  # not registered, or made of a module in memory
        config = None
    return {"config": config, "sha256": digest.hexdigest(), "factor": autoencoder.factor}


def check_autoencoder(info: CheckpointInfo, autoencoder: Autoencoder) -> None:
    """Refuse to decode a network's latents with another autoencoder than they were made with.

    Raises:
        CheckpointError: it is another, or the network was not trained on latents.
    """
    wanted = info.data.get("autoencoder")
    if wanted is None:
        raise CheckpointError(f"checkpoint {info.path} was not trained on latents: decode nothing")
    if (found := autoencoder_facts(autoencoder)["sha256"]) != wanted["sha256"]:
        raise CheckpointError(
            f"checkpoint {info.path} was trained on latents of the autoencoder "
            f"{wanted['sha256'][:12]}, but this one is {found[:12]}: decode with the same weights"
        )


# ---------------------------------------------------------------- a small autoencoder


def train_autoencoder(
    autoencoder: SmallAutoencoder,
    source: Source,
    *,
    total_images: int = 50_000,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SmallAutoencoder:
    """Train a small autoencoder, and measure the scale and shift of its latents.

    Args:
        autoencoder: with its fresh weights; it is trained in place.
        source: the images.
        total_images: images seen.
        batch_size: images a step.
        lr: AdamW's learning rate, which falls to 0 along a cosine.
        seed: decides order, augmentation and noise.
        device: where to train.

    Returns:
        The same autoencoder, in evaluation mode.

    Raises:
        DataError: it does not take such images.
        ValueError: the loss is not finite.
    """
    autoencoder = autoencoder.to(device).train()
    if source.shape[0] != autoencoder.in_channels:
        raise DataError(
            f"the images have {source.shape[0]} channels, but the autoencoder takes "
            f"in_channels = {autoencoder.in_channels}"
        )
    stream = Stream(source, batch_size, seed)
    steps = max(1, -(-total_images // batch_size))
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = as_float(stream[step].images).to(device)
        size = [length // autoencoder.factor for length in x.shape[2:]]
        seeds = [fold_seed(seed, Purpose.NOISE, step * batch_size + i) for i in range(len(x))]
        noise = normals(seeds, (len(x), autoencoder.latent_channels, *size)).to(device)
        loss = autoencoder.loss(x, noise).mean()
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the autoencoder's loss is not finite at step {step}: lower lr = {lr}"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    autoencoder.eval()
    autoencoder.measure(x.to(device) for x in pictures(source))
    return autoencoder


def pictures(source: Source) -> Iterator[Tensor]:
    """All images of a source as floats, some at a time, not augmented."""
    for part in torch.arange(len(source)).split(_TOGETHER):
        yield as_float(source.batch(part).images)


def save_autoencoder(path: str | Path, autoencoder: Autoencoder) -> str:
    """Write an autoencoder with its config, scale and shift; gives the file's sha256.

    Raises:
        ValueError: its class is not registered.
    """
    config = {"autoencoder": autoencoder_config(autoencoder)}
    return save_checkpoint(
        path, {"autoencoder": named_tensors(autoencoder)}, config=config, images_seen=0, step=0
    )


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """What `save_autoencoder` wrote, in evaluation mode.

    Raises:
        CheckpointError: missing, damaged, or no autoencoder's.
    """
    info, parts = read_checkpoint(path, ["autoencoder"])
    if "autoencoder" not in info.config or not parts["autoencoder"]:
        raise CheckpointError(f"checkpoint {path} holds no autoencoder")
    try:
        autoencoder = make_autoencoder(info.config["autoencoder"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds an autoencoder that cannot be built here ({error})"
        ) from None
    load_into(autoencoder, parts["autoencoder"], info)
    return autoencoder.to(device).eval().requires_grad_(False)
