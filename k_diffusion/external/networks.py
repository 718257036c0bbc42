"""Networks of diffusers as Denoisers: how each kind is called, and what its answer means.

    denoiser = foreign_denoiser(pipe.unet, pipe.scheduler)
    x0 = denoiser(x, sigma, encoder_hidden_states=text)

The condition's keywords are the network's own names, flat and with the batch along their first
axis, so that guidance can stack two conditions. `concat=` is joined to x along its channels, for
networks that see a mask or another image beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import DENOISERS, EDMDenoiser, NetworkDenoiser
from k_diffusion.external.process import Conventions, read_conventions
from k_diffusion.guidance import Clamp, DynamicThreshold, Wrapper
from k_diffusion.guidance.threshold import dynamic_threshold
from k_diffusion.utils import maths

Call = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Tensor]
_CALLS: dict[str, tuple[Call, tuple[str, ...]]] = {}
_ADDED = ("image_embeds", "text_embeds", "time_ids")


def foreign_call(*names: str, takes: tuple[str, ...]) -> Callable[[Call], Call]:
    """Registers how the networks of these class names are called.

    Args:
        names: of classes.
        takes: keywords of a condition.
    """

    def register(call: Call) -> Call:
        _CALLS.update(dict.fromkeys(names, (call, takes)))
        return call

    return register


@foreign_call("UNet2DModel", "UNet1DModel", takes=("class_labels",))
def _unet(module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Any]) -> Tensor:
    return module(x, time, **told, return_dict=False)[0]


@foreign_call(
    "UNet2DConditionModel",
    takes=(
        "attention_mask", "class_labels", "cross_attention_kwargs", "encoder_attention_mask",
        "encoder_hidden_states", "timestep_cond", *_ADDED,
    ),
)  # fmt: skip
def _unet_condition(module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Any]) -> Tensor:
    added = {name: told.pop(name) for name in _ADDED if name in told}
    states = told.pop("encoder_hidden_states", None)
    return module(x, time, states, **told, added_cond_kwargs=added, return_dict=False)[0]


@foreign_call("UNet3DConditionModel", takes=("class_labels", "encoder_hidden_states"))
def _unet_video(module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Any]) -> Tensor:
    return module(x, time, **told, return_dict=False)[0]


@foreign_call("SD3Transformer2DModel", takes=("encoder_hidden_states", "pooled_projections"))
@foreign_call(
    "StableAudioDiTModel",
    takes=("attention_mask", "encoder_attention_mask", "encoder_hidden_states",
           "global_hidden_states"),
)  # fmt: skip
@foreign_call(
    "WanTransformer3DModel", takes=("encoder_hidden_states", "encoder_hidden_states_image")
)
@foreign_call("DiTTransformer2DModel", takes=("class_labels",))
@foreign_call(
    "PixArtTransformer2DModel",
    takes=("aspect_ratio", "encoder_attention_mask", "encoder_hidden_states", "resolution"),
)
def _transformer(module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Any]) -> Tensor:
    name = type(module).__name__
    if name == "PixArtTransformer2DModel":
        added = {key: told.pop(key, None) for key in ("resolution", "aspect_ratio")}
        told["added_cond_kwargs"] = added
    elif name == "StableAudioDiTModel":
        told["rotary_embedding"] = _rotary(module, x, told.get("global_hidden_states"))
    return module(hidden_states=x, timestep=time, **told, return_dict=False)[0]


def _rotary(module: nn.Module, x: Tensor, globals_: Tensor | None) -> Any:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    known: Any = module.config
    length = x.shape[2] + (0 if globals_ is None else globals_.shape[1])
    return get_1d_rotary_pos_embed(
        known.attention_head_dim // 2, length, use_real=True, repeat_interleave_real=False
    )


@foreign_call(
    "FluxTransformer2DModel", takes=("encoder_hidden_states", "guidance", "pooled_projections")
)
def _flux(module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Any]) -> Tensor:
    """x of shape (B, C, H, W) is cut into patches of 2 x 2, which are the tokens."""
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    patches = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = patches.reshape(batch, rows * columns, channels * 4)
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)[None, :]
    text = told["encoder_hidden_states"]
    out = module(
        hidden_states=tokens,
        timestep=time.to(x.dtype),
        img_ids=places.reshape(rows * columns, 3),
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        **told,
        return_dict=False,
    )[0]
    patches = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, height, width)


class ForeignNetwork(nn.Module):
    """A network of diffusers that is called like ours: `network(x, time, **condition)`.

    Args:
        module: of a class that is known here.
        negated: negate its answer.

    Raises:
        TypeError: it is of another class.
    """

    def __init__(self, module: nn.Module, negated: bool = False) -> None:
        super().__init__()
        name = type(module).__name__
        if name not in _CALLS:
            raise TypeError(
                maths.unknown("foreign network", name, _CALLS)
                + "; or wrap a function network(x, time, **condition) in EpsDenoiser, VDenoiser, "
                "X0Denoiser, FlowDenoiser or EDMDenoiser"
            )
        _check_config(module)
        self.register_parameter("place", None)
        self.module = module
        self.negated = negated
        self._call, self.takes = _CALLS[name]

    def stand_at(self, device: torch.device) -> None:
        """Say that it computes on this device, wherever its weights are, in its own precision.

        Said by its first parameter: those of a module that is offloaded, or stored in fewer bits,
        do not tell.
        """
        nothing = torch.empty(0, device=device, dtype=self.module.dtype)  # type: ignore[call-overload]
        self.place = nn.Parameter(nothing, requires_grad=False)

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the network cannot take.

        Raises:
            ValueError: an unknown keyword, or a length that is not the batch's.
        """
        for name, value in condition.items():
            if name not in (*self.takes, "concat"):
                raise ValueError(maths.unknown("condition", name, (*self.takes, "concat")))
            if isinstance(value, Tensor) and value.ndim and len(value) != batch:
                raise ValueError(
                    f"condition {name} has shape {tuple(value.shape)}, but the batch is {batch}: "
                    "its first axis must be the batch"
                )

    def forward(self, x: Tensor, time: Tensor, concat: Any = None, **condition: Any) -> Tensor:
        """The network's prediction.

        Args:
            x: noisy data, shape (B, C, ...).
            time: shape (B,).
            concat: more channels, shape (B, C', ...).
            condition: the network's own keywords; tensors are cast to its dtype.

        Returns:
            Shape of x. Of networks that also predict a variance, the first half of the channels.
        """
        told = {
            name: value.to(x.dtype)
            if torch.is_tensor(value) and value.is_floating_point()
            else value
            for name, value in condition.items()
            if value is not None
        }
        inputs = x if concat is None else torch.cat([x, concat.to(x.dtype)], dim=1)
        out = self._call(self.module, inputs, time, told)
        if out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]
        return -out if self.negated else out


def _check_config(module: nn.Module) -> None:
    """A key of its config that its class does not know may change what it computes."""
    config = dict(getattr(module, "config", {}))
    known = [name for name in inspect.signature(type(module).__init__).parameters if name != "self"]
    for key in config:
        if not key.startswith("_") and key not in known:
            what = f"key in the config of {type(module).__name__},"
            raise ValueError(maths.unknown(what, key, known))


def foreign_denoiser(module: nn.Module, scheduler: Any) -> NetworkDenoiser:
    """A network of diffusers as a Denoiser, by what the config of its scheduler says.

    Its estimates are not clipped; see `limited`.

    Args:
        module: `UNet2DModel`, `UNet2DConditionModel`, `SD3Transformer2DModel`,
            `FluxTransformer2DModel`, `PixArtTransformer2DModel`, `DiTTransformer2DModel`,
            `StableAudioDiTModel`, `UNet3DConditionModel` or `WanTransformer3DModel`.
        scheduler: the diffusers scheduler that came with it, its config, or `Conventions`.

    Raises:
        TypeError: a network that is not known.
        ValueError: a key or value of a config that is not known.
    """
    said = scheduler if isinstance(scheduler, Conventions) else read_conventions(scheduler)
    network = ForeignNetwork(module, said.negated)
    # Its own code multiplies by 1000.
    scaled = type(module).__name__ == "FluxTransformer2DModel"
    network.time_convention = "unit" if scaled else said.time_convention  # type: ignore[assignment]
    if said.prediction == "edm":
        return EDMDenoiser(network, said.sigma_data, said.process)
    return DENOISERS[said.prediction](network, said.process)


def limited(denoiser: Any, said: Conventions) -> Any:
    """A Denoiser whose estimates are clipped or thresholded as a scheduler's config says.

    To be wrapped around guidance, not inside: schedulers limit the guided estimate.
    """
    if said.threshold is not None:
        quantile, largest = said.threshold
        return DynamicThreshold(denoiser, quantile, largest=largest)
    if said.clip is not None:
        return Clamp(denoiser, -said.clip, said.clip)
    return denoiser


def limit(x0: Tensor, said: Conventions) -> Tensor:
    """An estimate of x0, shape (B, ...), clipped or thresholded as a scheduler's config says."""
    if said.threshold is not None:
        quantile, largest = said.threshold
        return dynamic_threshold(x0, quantile, largest=largest)
    return x0 if said.clip is None else x0.clamp(-said.clip, said.clip)


class BothLimits(Wrapper):
    """A Denoiser that gives the limited estimate and the one before: for `renoised` solvers."""

    def __init__(self, denoiser: Any, said: Conventions) -> None:
        super().__init__(denoiser)
        self.said = said

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> tuple[Tensor, Tensor]:
        """Two estimates of x0, shape of x (B, ...)."""
        d = self.denoiser(x, sigma, **condition)
        return limit(d, self.said), d
