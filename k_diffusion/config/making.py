"""From a config to its network, its Denoiser, and its trained weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion import layers
from k_diffusion.config.keys import COMMON, check
from k_diffusion.config.reading import load_config, metadata_of
from k_diffusion.models.augment_wrapper import AUGMENT_DIM, KarrasAugmentWrapper
from k_diffusion.models.image_transformer_v1 import ImageTransformerDenoiserModelV1
from k_diffusion.models.image_transformer_v2 import (
    GlobalAttentionSpec,
    ImageTransformerDenoiserModelV2,
    LevelSpec,
    MappingSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)
from k_diffusion.models.image_v1 import ImageDenoiserModelV1
from k_diffusion.utils.scheduler import KarrasScheduler


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config, with fresh weights: called as `model(x, sigma, **condition)`.

    Args:
        config: as of `load_config`.

    Raises:
        ValueError: a key that cannot be, or several that cannot be together.
    """
    config = load_config(config)
    classes = config["dataset"]["num_classes"]
    model = config["model"]
    try:
        if model["type"] == "image_v1":
            return _image_v1(model, classes)
        # One class more than the data has: no class.
        rows = classes + 1 if classes else 0
        if model["type"] == "image_transformer_v1":
            return _transformer_v1(model, rows)
        return _transformer_v2(model, rows)
    except ValueError as error:
        raise ValueError(_in_keys(str(error))) from None


def _image_v1(model: Mapping[str, Any], classes: int) -> nn.Module:
    if classes:
        raise ValueError(
            f"dataset.num_classes = {classes}, but image_v1 knows no classes: leave it out, and "
            "give the class as mapping_cond"
        )
    attends = any(model["cross_attn_depths"] or ())
    if attends != bool(model["cross_cond_dim"]):
        raise ValueError(
            f"cross_attn_depths = {model['cross_attn_depths']!r}, but cross_cond_dim = "
            f"{model['cross_cond_dim']}: give both, or neither"
        )
    network = ImageDenoiserModelV1(
        model["input_channels"],
        model["mapping_out"],
        model["depths"],
        model["channels"],
        model["self_attn_depths"],
        model["cross_attn_depths"],
        mapping_cond_dim=model["mapping_cond_dim"] + AUGMENT_DIM * model["augment_wrapper"],
        unet_cond_dim=model["unet_cond_dim"],
        cross_cond_dim=model["cross_cond_dim"],
        dropout_rate=model["dropout_rate"],
        patch_size=model["patch_size"],
        skip_stages=model["skip_stages"],
        has_variance=model["has_variance"],
    )
    return KarrasAugmentWrapper(network) if model["augment_wrapper"] else network


def _transformer_v1(model: Mapping[str, Any], rows: int) -> nn.Module:
    return ImageTransformerDenoiserModelV1(
        model["depth"],
        model["width"],
        model["d_ff"],
        model["input_channels"],
        model["input_channels"],
        model["patch_size"],
        num_classes=rows,
        dropout=model["dropout_rate"],
        sigma_data=model["sigma_data"],
    )


def _transformer_v2(model: Mapping[str, Any], rows: int) -> nn.Module:
    levels = [
        LevelSpec(depth, width, d_ff, _attention(spec), dropout)
        for depth, width, d_ff, spec, dropout in zip(
            model["depths"], model["widths"], model["d_ffs"], model["self_attns"],
            model["dropout_rate"], strict=True,
        )
    ]  # fmt: skip
    mapping = MappingSpec(
        model["mapping_depth"],
        model["mapping_width"],
        model["mapping_d_ff"],
        model["mapping_dropout_rate"],
    )
    return ImageTransformerDenoiserModelV2(
        levels,
        mapping,
        model["input_channels"],
        model["input_channels"],
        model["patch_size"],
        num_classes=rows,
        mapping_cond_dim=model["mapping_cond_dim"],
    )


_KEY_OF = {
    # What the networks call what a config calls otherwise.
    "in_channels": "input_channels",
    "in_features": "input_channels",
    "mapping_width": "mapping_out",
    "self_attention": "self_attn_depths",
    "cross_attention": "cross_attn_depths",
    "embedding_dim": "mapping_cond_dim",
    "image_channels": "unet_cond_dim",
    "context_dim": "cross_cond_dim",
    "dropout": "dropout_rate",
}


def _in_keys(message: str) -> str:
    """A network's refusal, in the words of a config."""
    return re.sub(r"\b(" + "|".join(_KEY_OF) + r")\b", lambda m: _KEY_OF[m[0]], message)


def _attention(spec: Mapping[str, Any]) -> Any:
    head = spec.get("d_head", 64)
    if spec["type"] == "neighborhood":
        return NeighborhoodAttentionSpec(head, spec.get("kernel_size", 7))
    if spec["type"] == "shifted-window":
        return ShiftedWindowAttentionSpec(head, spec["window_size"])
    return GlobalAttentionSpec(head) if spec["type"] == "global" else NoAttentionSpec()


def make_denoiser_wrapper(config: Mapping[str, Any]) -> Callable[..., layers.Denoiser]:
    """What makes a config's network a Denoiser with its loss: `wrapper(model)`.

    Args:
        config: its "model" says sigma_data, has_variance, loss_config, loss_weighting, loss_scales.

    Raises:
        ValueError: one of them is not known, or they cannot be together.
    """
    model = config["model"]
    said = ("sigma_data", "has_variance", "loss_config", "loss_weighting", "loss_scales")
    check("model", model, {key: COMMON[key] for key in said})
    sigma_data = model.get("sigma_data", 1.0)
    if model.get("loss_config", "karras") == "simple":
        if model.get("has_variance", False):
            raise ValueError(
                "model.loss_config = 'simple' has no use for model.has_variance = True: give "
                "'karras', or false"
            )
        return partial(layers.SimpleLossDenoiser, sigma_data=sigma_data)
    weighting = model.get("loss_weighting", "karras")
    if model.get("has_variance", False):
        return partial(layers.DenoiserWithVariance, sigma_data=sigma_data, weighting=weighting)
    scales = model.get("loss_scales", 1)
    return partial(layers.Denoiser, sigma_data=sigma_data, weighting=weighting, scales=scales)


# ---------------------------------------------------------------- weights


def load_model(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> layers.Denoiser:
    """The Denoiser of a trained model, in evaluation mode, in float32: for `sample_*`, `KSampler`.

    Args:
        path: weights for inference (.safetensors), or a training checkpoint (.pth, or of
            `k-diffusion train` on an established config), of which the averaged weights are taken;
            no code in it runs.
        config: as of `load_config`; None: the one in the file.
        device: where to put it.

    Raises:
        ValueError: there is no config, it cannot be, or the weights are of another one: the
            differing keys are named.
    """
    path = Path(path)
    weights, own = _read_weights(path)
    if config is None and own is None:
        raise ValueError(f"{path} holds no config: give it, as a JSON file or as data")
    whole = load_config(own if config is None else config)  # type: ignore[arg-type]
    network = make_model(whole)
    differing = _differing(network.state_dict(), weights)
    if differing:
        if config is not None and own is not None:
            ours, theirs = whole["model"], load_config(own)["model"]
            keys = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
            differing += [
                f"model.{k} is {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys
            ]
        raise ValueError(
            f"{path} does not fit this config: {'; '.join(differing)}: give the config that it was "
            "trained with"
        )
    network.load_state_dict(weights)
    denoiser: layers.Denoiser = make_denoiser_wrapper(whole)(network)
    model = whole["model"]
    # KSampler takes from it what its scheduler leaves open.
    denoiser.process = KarrasScheduler(  # type: ignore[assignment]
        model.get("sigma_min"), model.get("sigma_max")
    )
    return denoiser.to(device).eval().requires_grad_(False)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        metadata = metadata_of(path)
        if metadata.get("format") == "k_diffusion":
            return _read_run(path)
        return load_file(path), load_config(path) if "config" in metadata else None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whose words advise to load the file with all the code in it
        raise ValueError(
            f"{path} holds more than weights and plain data, so that code could run, or is "
            "damaged: convert it to .safetensors where it was made"
        ) from None
    if not isinstance(held, Mapping) or "model_ema" not in held:
        raise ValueError(f"{path} is no training checkpoint: it holds no model_ema")
    weights = held["model_ema"]
    if not isinstance(weights, Mapping) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"{path} is no training checkpoint: its model_ema is no state dict")
    return dict(weights), held.get("config")


def _read_run(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Averaged weights and config of a checkpoint of this library's own training."""
    from k_diffusion.training.checkpoint import read_checkpoint

    info, parts = read_checkpoint(path, ["ema"])
    model = info.config["model"]
    if model["type"] != "established" or not parts["ema"]:
        raise ValueError(
            f"{path} is a checkpoint of this library: load it with training.load_denoiser"
        )
    weights = {name.removeprefix("inner_model."): value for name, value in parts["ema"].items()}
    dataset = {"num_classes": model.get("num_classes", 0)}
    return weights, {"model": model["model"], "dataset": dataset}


def _differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from fitting a network, in words."""
    missing = sorted(set(ours) - set(theirs))
    surplus = sorted(set(theirs) - set(ours))
    shapes = [
        f"{key} has shape {tuple(theirs[key].shape)} there, {tuple(ours[key].shape)} here"
        for key in sorted(set(ours) & set(theirs))
        if ours[key].shape != theirs[key].shape
    ]
    words = [f"missing {_some(missing)}"] if missing else []
    words += [f"no place for {_some(surplus)}"] if surplus else []
    return [*words, *([_some(shapes)] if shapes else [])]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
