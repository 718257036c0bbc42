"""What turns images into features, each of which a figure names."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k_diffusion.utils.tensors import tf32_mode
from k_diffusion.utils.words import reason_of


class FeatureExtractor(nn.Module):
    """A frozen network from images to features; abstract.

    Called with floats in [-1, 1] of shape (B, C, H, W), C from 1 to 4, it gives float32 of shape
    (B, features), each row a function of its own image alone.

    Attributes:
        name: what figures are told with.
        input: how images are brought to it, in words.
        size: height and width that they are brought to; None: their own.
    """

    name = ""
    input = ""
    size: tuple[int, int] | None = None

    def __call__(self, images: Tensor) -> Any:
        """Features, without gradients, and in whole float32: TF32's ten bits of mantissa would move
        them by a thousandth."""
        with torch.no_grad(), tf32_mode(cudnn=False, matmul=False):
            return super().__call__(images)

    def frozen(self, device: torch.device | str) -> Any:
        """Itself, on a device, in evaluation mode, without gradients."""
        return self.to(device).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """Stays in evaluation mode."""
        return super().train(False)

    def facts(self) -> dict[str, str]:
        """By which figures can be told from those of another: name, weights and input."""
        return {"name": self.name, "weights sha256": weights_sha256(self), "input": self.input}


def weights_sha256(module: nn.Module) -> str:
    """A hash of all weights and buffers, with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def why_unread(path: Path, error: Exception) -> str:
    """What is wrong with a file of weights, where torch would tell how to run what it holds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [PurePath(name).name for name in archive.namelist()]
        if "constants.pkl" in names:
            return "it is a program of TorchScript, which is not run: give a state dict"
    if isinstance(error, UnpicklingError):
        return "it is damaged, or holds more than tensors"
    return reason_of(error)[:200]


def as_rgb(images: Tensor) -> Tensor:
    """Three channels, shape (B, 3, H, W): grey is repeated, what is transparent becomes white.

    Args:
        images: floats in [-1, 1], shape (B, C, H, W): grey, grey and alpha, RGB, or RGB and alpha.

    Raises:
        ValueError: no such shape.
    """
    if images.ndim != 4 or not 1 <= images.shape[1] <= 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; (B, C, H, W) with 1 to 4 channels fits"
        )
    if images.shape[1] in (2, 4):
        images, alpha = images[:, :-1], (images[:, -1:] + 1) / 2
        images = images * alpha + (1 - alpha)
    return images.expand(-1, 3, -1, -1)


def antialiased(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased; an image that has the size already stays as it is."""
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Each channel of images in [-1, 1], brought to [0, 1], less its mean, by its deviation."""
    m, s = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return ((images + 1) / 2 - m) / s


def cache_folder() -> Path:
    """Where fetched weights are kept: $XDG_CACHE_HOME/k-diffusion, or that of ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k-diffusion"


def load_tensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A state dict from a safetensors file or one of torch, of which no code is run.

    Args:
        path: the file.
        device: where they are to be; "meta": names and shapes alone, and no value is read.

    Raises:
        ValueError: there is none, or it is no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {path} " + ("is no file" if path.exists() else "is missing"))
    try:
        if path.suffix == ".safetensors":
            if str(device) == "meta":
                return _outlines(path)
            from safetensors.torch import load_file

            return load_file(path, str(device))
        mapped = str(device) == "meta" and zipfile.is_zipfile(path)  # else it is of an old layout
        found = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # of either format's own kinds
        reason = why_unread(path, error)
        raise ValueError(f"weights {path} cannot be read: {reason}") from None
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"weights {path} is no state dict: name -> tensor")
    return dict(found)


def _outlines(path: Path) -> dict[str, Tensor]:
    """Names and shapes of a safetensors file, as tensors without memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
