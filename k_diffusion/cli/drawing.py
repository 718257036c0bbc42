"""Drawing images batch by batch, once it is seen that checkpoint and machine can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .problems import UsageError

if TYPE_CHECKING:
    import torch

    from k_diffusion.sampling import KSampler
    from k_diffusion.training.checkpoint import CheckpointInfo


def draw(
    sampler: KSampler,
    shape: Sequence[int],
    seeds: Sequence[int],
    labels: Sequence[int] = (),
    condition: Mapping[str, torch.Tensor] | None = None,
    *,
    steps: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    noise: str = "independent",
    noise_on_cpu: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Draw images batch by batch; each depends on its own seed and label alone.

    Args:
        sampler: what draws.
        shape: of one image, (channels, height, width).
        seeds: one an image.
        labels: one class an image, or none.
        condition: what all images are told beside, keyword -> value of a batch of one.
        steps: steps from noise to image.
        batch_size: images drawn at a time.
        device: where the model is.
        noise: what the noise of a stochastic method is, see `KSampler.sample`.
        noise_on_cpu: whether it is made on the CPU.
        tick: called after each call of the model.

    Yields:
        The index of a batch's first image, and its images (count, channels, height, width) in
        [-1, 1] as the model gives them, on the CPU.
    """
    import torch

    from k_diffusion.sampling import unit_noise

    def asked(*_: object) -> None:
        tick()

    for first in range(0, len(seeds), batch_size):
        chosen = list(seeds[first : first + batch_size])
        told = {
            keyword: value.expand(len(chosen), *value.shape[1:])
            for keyword, value in (condition or {}).items()
        }
        if labels:
            told["class_label"] = torch.tensor(labels[first : first + batch_size], device=device)
        images = sampler.sample(
            unit_noise(shape, chosen, device),
            steps=steps,
            condition=told or None,
            seed=chosen,
            noise=noise,
            noise_on_cpu=noise_on_cpu,
            callback=asked,
        )
        yield first, images.cpu()


def check_shape(info: CheckpointInfo) -> None:
    """Refuse a checkpoint whose samples are no images."""
    if autoencoder := info.data.get("autoencoder"):
        raise UsageError(
            f"{info.path} makes latents of the autoencoder {autoencoder['sha256'][:12]}, not "
            "images: sample it in Python, and decode by the autoencoder"
        )
    shape = info.data.get("shape", [])
    if len(shape) != 3 or not 1 <= shape[0] <= 4:
        raise UsageError(
            f"{info.path} makes data of shape {tuple(shape)}, which is no image (1 to 4 channels, "
            "height, width): sample it in Python, by KSampler"
        )


def pick_device(name: str) -> torch.device:
    """The device of this name, or the usual one for an empty name; refused if it is not there."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {name} cannot be used here ({reason}); try cpu") from None
    return device
