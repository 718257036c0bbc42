"""Live previews: the model's estimate of x0 as small pictures, without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preview:
    """What to show of a run while it goes on.

    Pictures are made small on the device. From a CUDA device they are copied while it goes on
    computing, and shown when they have arrived: at a later call, or at the run's end. Elsewhere
    than there and on the CPU the host waits for each.

    Attributes:
        show: called as `show(k, pictures)`, pictures being the estimates after the k-th call, a
            uint8 tensor of shape (B, C, h, w) on the CPU; by an adaptive solver, of the samples
            that the call was about.
        every: calls from one picture to the next.
        size: the longer side in pixels, at most.
        matrix: for latents: what makes the picture's channels, in [-1, 1], of theirs; shape
            (1 to 4 channels of the picture, channels of the latent).
        bias: added to them, one number a channel of the picture.
    """

    show: Callable[[int, Tensor], object]
    every: int = 1
    size: int = 64
    matrix: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if not callable(self.show):
            raise TypeError(f"preview's show must be callable, got {type(self.show).__name__}")
        for name in ("every", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"preview's {name} must be a whole number of at least 1, got {value!r}"
                )
        if self.bias is not None and self.matrix is None:
            raise ValueError("preview's bias goes with a matrix: give that too")


def make_preview(preview: Any) -> Preview:
    """A Preview; a function is its `show`.

    Raises:
        TypeError: neither.
    """
    if isinstance(preview, Preview):
        return preview
    if not callable(preview):
        raise TypeError(
            f"preview must be a Preview or a function (k, pictures), got {type(preview).__name__}"
        )
    return Preview(preview)


class Previewer:
    """The previews of one run: told of calls, it makes pictures and shows them.

    Args:
        preview: what to show.
        x: a tensor of the run's shape and device.

    Raises:
        ValueError: samples that are no pictures, or a matrix that does not fit them.
    """

    def __init__(self, preview: Preview, x: Tensor) -> None:
        self._preview = preview
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._matrix = self._bias = None
        if x.ndim != 4:
            raise ValueError(
                f"preview shows images, but x has shape {tuple(x.shape)}, not (B, C, H, W): use "
                "callback"
            )
        channels = x.shape[1]
        if preview.matrix is None:
            if channels > 4:
                raise ValueError(
                    f"x has {channels} channels, which is no picture: give preview a matrix of "
                    f"shape (3, {channels})"
                )
            return
        out, into = preview.matrix.shape if preview.matrix.ndim == 2 else (0, 0)
        if into != channels or not 1 <= out <= 4:
            raise ValueError(
                f"preview's matrix has shape {tuple(preview.matrix.shape)}: x has {channels} "
                f"channels, so give (3, {channels})"
            )
        # Brought to the device before the run, within which that would be waited for.
        self._matrix = preview.matrix.to(x.device, torch.float32)
        if preview.bias is not None:
            if preview.bias.shape != (out,):
                raise ValueError(
                    f"preview's bias has shape {tuple(preview.bias.shape)}; its matrix asks for "
                    f"({out},)"
                )
            self._bias = preview.bias.to(x.device, torch.float32).reshape(-1, 1, 1)

    def __call__(self, k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """Takes a picture, if it is time for one, and shows those that have arrived."""
        if k % self._preview.every == 0:
            picture = self._picture(denoised)
            if picture.device.type == "cuda":
                there = torch.empty(picture.shape, dtype=picture.dtype, pin_memory=True)
                there.copy_(picture, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(picture.device))
                self._waiting.append((k, there, event))
            else:
                self._preview.show(k, picture.cpu())
        while self._waiting and self._waiting[0][2].query():
            self._show_next()

    def finish(self) -> None:
        """Waits for the pictures that are still on their way, and shows them."""
        while self._waiting:
            self._waiting[0][2].synchronize()
            self._show_next()

    def _show_next(self) -> None:
        k, picture, _ = self._waiting.popleft()
        self._preview.show(k, picture)

    def _picture(self, denoised: Tensor) -> Tensor:
        height, width = denoised.shape[-2:]
        share = min(1.0, self._preview.size / max(height, width))
        size = (max(1, round(height * share)), max(1, round(width * share)))
        small = denoised.detach().float()
        if share < 1:
            small = F.interpolate(small, size, mode="area")
        if self._matrix is not None:
            small = torch.einsum("oc,bchw->bohw", self._matrix, small)
            if self._bias is not None:
                small = small + self._bias
        small = small.nan_to_num(-1.0, -1.0, -1.0).clamp(-1, 1)  # what is not finite is black
        return ((small + 1) * 127.5).round().to(torch.uint8)
