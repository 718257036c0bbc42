"""The model card: what a file of weights is, in Markdown, for whoever comes across it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k_diffusion.models.registry import model_trait
from k_diffusion.training.checkpoint import CheckpointInfo

SAMPLING: Mapping[str, Any] = {"sampler": "dpmpp_2m", "scheduler": "karras", "steps": 20}
"""What `k-diffusion sample` does unless told otherwise."""


def model_card(
    info: CheckpointInfo, *, weights: str, dtype: str, licence: str = "", note: str = ""
) -> str:
    """The card of the weights that are taken from a checkpoint.

    Args:
        info: of the checkpoint; its network's type must be registered.
        weights: which they are: "ema", "last", or the name of another average.
        dtype: what they are stored as.
        licence: under which they are given away; empty: the card says that none is stated.
        note: Markdown, put at the end.
    """
    from importlib.metadata import version

    config, data, model = info.config, info.data, info.config["model"]
    prediction = model_trait(model, "prediction", "eps")
    shape = " x ".join(map(str, data.get("shape", ()))) or "unknown"
    lines = {
        "network": f"{model['type']}, {info.parameters:,} parameters and buffers",
        "prediction": prediction,
        "noise schedule": _options(config.get("process"), "name") or "the prediction's usual one",
        "makes": f"data of shape {shape}",
        "is told": _told(info),
        "trained on": _data(config.get("data") or {}, data),
        "training": f"{info.images_seen:,} images seen, in {info.step:,} steps",
        "weights": f"{_which(weights, config)}, stored as {dtype}",
        "made from": f"checkpoint of SHA-256 {info.sha256}",
        "made with": f"k-diffusion {version('k-diffusion')}",
        "sampling": f"`k-diffusion sample FILE {_command()}`",
        "licence": licence or "none is stated: ask whoever gave you this file",
    }
    if autoencoder := data.get("autoencoder"):
        lines["makes"] += f", latents of the autoencoder of SHA-256 {autoencoder['sha256']}"
        lines["sampling"] = "in Python, by KSampler; the autoencoder decodes"
    text = f"# Diffusion model: {model['type']}, {prediction}\n\n"
    text += "".join(f"- {name}: {' '.join(said.split())}\n" for name, said in lines.items())
    return text + (f"\n{note.strip()}\n" if note.strip() else "")


def _which(weights: str, config: Mapping[str, Any]) -> str:
    if weights == "last":
        return "those after the last step"
    if weights != "ema":
        return f"the moving average {weights}"
    options = _options(config.get("ema"))
    return f"moving average ({options})" if options else "moving average"


def _told(info: CheckpointInfo) -> str:
    if conditioner := info.config.get("conditioner"):
        return f"what the conditioner {conditioner['type']} makes"
    classes = int(model_trait(info.config["model"], "num_classes", 0))
    if not classes:
        return "nothing"
    names = info.data.get("class_names") or []
    return f"one of {classes} classes" + (f": {', '.join(names)}" if names else "")


def _data(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Which data; its folder's name is its owner's matter."""
    count = f"{facts['images']:,} images" if "images" in facts else "an unknown number of images"
    told = f" ({config['source']})" if config.get("source") else ""
    moments = ""
    if "mean" in facts:
        moments = f", mean {facts['mean']:.4g}, standard deviation {facts['std']:.4g}"
    return f"{count}{told}{moments}"


def _options(config: Mapping[str, Any] | None, name: str = "") -> str:
    if not config:
        return ""
    options = ", ".join(f"{key} = {value}" for key, value in config.items() if key != name)
    head = str(config.get(name, ""))
    return f"{head} ({options})" if head and options else head or options


def _command() -> str:
    return " ".join(f"--{name} {value}" for name, value in SAMPLING.items())
