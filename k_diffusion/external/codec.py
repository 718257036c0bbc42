"""A pipeline's latents: their shape, noise as diffusers draws it, the way to images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.asked import Family


class Codec:
    """What stands between the data and the latents of a pipeline; without a VAE, nothing does.

    Args:
        pipeline: of diffusers.
        family: how it is driven.
    """

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.pipeline = pipeline
        self.kind = family.kind
        self.network = getattr(pipeline, family.network)

    @property
    def vae(self) -> Any:
        """The autoencoder of the pipeline; None: it works on pixels."""
        return getattr(self.pipeline, "vae", None)

    @property
    def _home(self) -> torch.device:
        """Where the pipeline computes, be its modules offloaded or not."""
        return torch.device(self.pipeline._execution_device)

    @property
    def factor(self) -> int:
        """Pixels for one latent."""
        own = getattr(self.pipeline, "vae_scale_factor_spatial", None)
        if own is not None:
            return int(own)
        if self.vae is None:
            return 1
        blocks = getattr(self.vae.config, "block_out_channels", (0,))
        return int(2 ** (len(blocks) - 1))

    @property
    def multiple(self) -> int:
        """What height and width must be a multiple of."""
        patch = getattr(self.network.config, "patch_size", None) or 1
        patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
        if type(self.network).__name__ == "FluxTransformer2DModel":
            patch = 2
        return self.factor * int(patch)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the usual ones where they are None.

        Raises:
            TypeError: no whole number.
            ValueError: a size that the VAE or the network cannot take.
        """
        for name, given in (("height", height), ("width", width)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
                raise TypeError(f"{name} must be a whole number of pixels, got {given!r}")
        if self.kind == "sound":
            if height is not None or width is not None:
                raise ValueError("sound has no height and width: give seconds")
            return 0, 0
        own = getattr(self.network.config, "sample_size", None)
        if own is None:
            own = getattr(self.pipeline, "default_sample_size", None) or 64
        pair = own if isinstance(own, (tuple, list)) else (own, own)
        if self.kind == "video":
            pair = (480 // self.factor, 832 // self.factor)
        size = tuple(
            usual * self.factor if given is None else given
            for given, usual in zip((height, width), pair, strict=True)
        )
        if type(self.network).__name__ == "DiTTransformer2DModel":
            usual = (pair[0] * self.factor, pair[1] * self.factor)
            if size != usual:
                raise ValueError(f"this DiT draws {usual[0]} x {usual[1]} alone, got {size}")
        for name, value in zip(("height", "width"), size, strict=True):
            if value < 1 or value % self.multiple:
                near = max(1, round(value / self.multiple)) * self.multiple
                raise ValueError(
                    f"{name} {value} is not a multiple of {self.multiple}, which one patch of this "
                    f"pipeline's latents covers: give {near}"
                )
        return size[0], size[1]

    def shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        """The shape of one sample's latents."""
        config = self.network.config
        if self.kind == "sound":
            return config.in_channels, config.sample_size
        channels = config.in_channels
        if type(self.network).__name__ == "FluxTransformer2DModel":
            channels //= 4
        elif self.vae is not None and self.kind == "image":
            channels = self.vae.config.latent_channels  # an inpainting network takes more
        space = (height // self.factor, width // self.factor)
        if self.kind == "video":
            step = self.pipeline.vae_scale_factor_temporal
            if not isinstance(frames, int) or frames < 1 or frames % step != 1 % step:
                raise ValueError(f"frames must be 1 more than a multiple of {step}, got {frames}")
            return channels, (frames - 1) // step + 1, *space
        return channels, *space

    def noise(self, generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
        """Unit noise of each sample's generator: the numbers that the pipeline draws from it.

        Made in the network's dtype where the generators are; float32 thereafter.
        """
        from diffusers.utils.torch_utils import randn_tensor

        dtype = torch.float32 if self.kind == "video" else self.network.dtype
        drawn = randn_tensor(
            (len(generators), *shape), generator=list(generators), device=self._home, dtype=dtype
        )
        return drawn.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], shape (B, C, H, W); videos (B, C, F, H, W); sound (B, C, samples).

        Where memory runs out, samples are decoded one by one, then in tiles, with a warning.
        """
        if self.vae is None:
            return latents
        shift, scale = self._statistics(latents)
        raw = latents / scale + shift

        def decode(vae: Any) -> Tensor:
            return vae.decode(raw.to(vae.dtype)).sample.float()

        return self._within_memory(decode)

    def encode(self, images: Tensor) -> Tensor:
        """Latents, the mean of what the VAE gives, of images in [-1, 1]; in float32."""
        if self.vae is None:
            return images.float()

        def encode(vae: Any) -> Tensor:
            made = vae.encode(images.to(self._home, vae.dtype))
            found = getattr(made, "latent_dist", None)
            return (made.latents if found is None else found.mode()).float()

        raw = self._within_memory(encode)
        shift, scale = self._statistics(raw)
        return (raw - shift) * scale

    def _within_memory(self, work: Callable[[Any], Tensor]) -> Tensor:
        vae = self.vae
        # In float16 the VAEs that say so overflow.
        wide = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
        if wide:
            vae.float()
        try:
            ways = [way for way in ("slicing", "tiling") if hasattr(vae, f"enable_{way}")]
            for way in (*(w for w in ways if not getattr(vae, f"use_{w}", False)), None):
                try:
                    with torch.no_grad():
                        return work(vae)
                except torch.OutOfMemoryError:
                    if way is None:
                        raise
                warnings.warn(
                    f"memory ran out in the VAE: it goes on with {way}, which stays on",
                    RuntimeWarning,
                    stacklevel=4,
                )
                getattr(vae, f"enable_{way}")()
            raise AssertionError("unreachable")
        finally:
            if wide:
                vae.half()

    def _statistics(self, like: Tensor) -> tuple[Any, Any]:
        """Shift and scale: latents = (raw - shift) · scale."""
        config = self.vae.config
        scaling = float(config.get("scaling_factor") or 1.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return float(config.get("shift_factor") or 0.0), scaling
        along = (1, -1, *[1] * (like.ndim - 2))
        shift = like.new_tensor(mean).reshape(along)
        return shift, scaling / like.new_tensor(std).reshape(along)


def as_images(given: Any, name: str = "init") -> Tensor:
    """PIL images, or tensors in [-1, 1], as one tensor of shape (B, 3, H, W).

    Raises:
        TypeError: something else.
        ValueError: images of different sizes.
    """
    if isinstance(given, Tensor):
        if not given.is_floating_point() or given.ndim not in (3, 4, 5):
            raise TypeError(
                f"{name} must be PIL images, or floats in [-1, 1] of shape (B, 3, H, W), got "
                f"{given.dtype} of shape {tuple(given.shape)}"
            )
        return given[None] if given.ndim == 3 else given
    from PIL.Image import Image

    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not several or not all(isinstance(image, Image) for image in several):
        raise TypeError(f"{name} must be PIL images or a tensor, got {type(several[0]).__name__}")
    sizes = {image.size for image in several}
    if len(sizes) > 1:
        raise ValueError(f"{name} has images of the sizes {sorted(sizes)}: make them alike")
    return torch.stack([_tensor(image.convert("RGB")) for image in several]) / 127.5 - 1


def as_mask(given: Any) -> Tensor:
    """A PIL image (white: repaint), or a tensor in [0, 1], as shape (B, 1, H, W) in pixels."""
    if isinstance(given, Tensor):
        if not 2 <= given.ndim <= 4 or given.min() < 0 or given.max() > 1:
            raise ValueError(
                "mask must have shape (H, W), (B, H, W) or (B, 1, H, W) with values in [0, 1], got "
                f"shape {tuple(given.shape)} and values from {float(given.min())} to "
                f"{float(given.max())}"
            )
        mask = given.float()
        return mask[:, None] if mask.ndim == 3 else mask.reshape(-1, 1, *mask.shape[-2:])
    from PIL.Image import Image

    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not several or not all(isinstance(image, Image) for image in several):
        raise TypeError(f"mask must be a PIL image or a tensor, got {type(given).__name__}")
    return torch.stack([_tensor(image.convert("L")) for image in several]) / 255


def to_pil(images: Tensor) -> list[Any]:
    """PIL images of (B, C, H, W) in [-1, 1]; a list of frames for each video, (B, C, F, H, W)."""
    from PIL import Image

    from k_diffusion.utils.images import to_uint8

    if images.ndim == 5:
        return [to_pil(video.transpose(0, 1)) for video in images]
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def _tensor(image: Any) -> Tensor:
    channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, channels).permute(2, 0, 1).float()
