"""Whether a checkpoint and a machine can draw images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .problems import UsageError

if TYPE_CHECKING:
    import torch

    from k_diffusion.training.checkpoint import CheckpointInfo


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
    """The device of this name, or the usual one for an empty name; refused if it is not there.

    Of several processes that torchrun has started, each usually takes a GPU of its own.
    """
    import torch

    usual = "cpu"
    if not name and torch.cuda.is_available():
        usual = "cuda"
        if local := os.environ.get("LOCAL_RANK"):
            usual = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        device = torch.device(name or usual)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {name} cannot be used here ({reason}); try cpu") from None
    return device
