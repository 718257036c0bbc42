"""Whether model, conditioner and data fit each other, and what the data decides of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import check_output
from k_diffusion.models import Conditioner, conditioner_config, make_model
from k_diffusion.models.registry import known_classes, takes_option
from k_diffusion.training.augmentation_config import with_augmentation_dim
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Source
from k_diffusion.training.sections import AUTO

ROUNDING = 1e-6
"""Share by which a sum over the same data may differ between machines and numbers of threads."""


def settle(
    config: TrainConfig,
    source: Source,
    conditioner: Conditioner | None = None,
    sigma_data_before: float | None = None,
) -> TrainConfig:
    """The config with what the data decides: in_channels, and a sigma_data of "auto"; and with the
    augmentation_dim that a warp asks for.

    The conditioner's own config, where it has one, takes the place of the one that is there.

    Args:
        config: as it is given.
        source: the data.
        conditioner: given instead of the config's.
        sigma_data_before: of the run that goes on, which stays as it is to the last bit where the
            data are the same but for rounding.

    Raises:
        ConfigError: the data is constant, so that it has no sigma_data.
    """
    model = dict(config.model)
    if takes_option(model, "in_channels"):
        model.setdefault("in_channels", source.shape[0])
    if model.get("in_channels", source.shape[0]) != source.shape[0]:
        raise ConfigError(
            f"model.in_channels is {model['in_channels']}, but the data has {source.shape[0]} "
            "channels: leave it out, and the data decides"
        )
    model = with_augmentation_dim(model, config.augmentation)
    if model.get("sigma_data") == AUTO:
        if source.std < 1e-6:
            raise ConfigError("model.sigma_data is auto, but all values of the data are equal")
        same = sigma_data_before is not None and math.isclose(
            source.std, sigma_data_before, rel_tol=ROUNDING
        )
        model["sigma_data"] = sigma_data_before if same else source.std
    update: dict[str, Any] = {"model": model}
    if conditioner is not None:
        update["conditioner"] = None
        with suppress(ValueError):  # one that is not registered has no config
            update["conditioner"] = conditioner_config(conditioner)
    return config.model_copy(update=update)


def check_shape(
    model: Mapping[str, Any], examples: Mapping[tuple[int, ...], Mapping[str, Tensor]]
) -> None:
    """Run the network on one image without memory, to see whether it takes the data's shapes.

    Args:
        model: its config.
        examples: shape of an image -> what it is told of such a one, as a batch of one.
    """
    for one, example in examples.items():
        condition = {keyword: value.to("meta") for keyword, value in example.items()}
        with torch.device("meta"), torch.no_grad(), suppress(NotImplementedError, RuntimeError):
            try:
                network, shape = make_model(model), (1, *one)
                out = network(torch.zeros(shape), torch.zeros(1), **condition)
                check_output(network, out, shape)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"model and data do not fit each other: {error}") from None


def check_null(network: nn.Module, conditioner: Conditioner, example: Mapping[str, Tensor]) -> None:
    """Refuse a conditioner whose "no class" the network takes for a class, or for none at all."""
    null = conditioner.null(1, example)
    if "class_label" in null and int(null["class_label"][0]) != known_classes(network):
        raise ValueError(
            f"the conditioner knows {int(null['class_label'][0])} classes, but the model's "
            f"num_classes is {known_classes(network)}: give the same number"
        )


def check_learns(network: nn.Module) -> None:
    """Refuse a network of which nothing would be trained.

    Raises:
        ConfigError: all its weights are frozen, or it has none.
    """
    if not any(weight.requires_grad for weight in network.parameters()):
        raise ConfigError(
            f"network {type(network).__name__} has no weight that learns: what load_denoiser gives "
            "is frozen; call network.requires_grad_(True), or set init_from to its file"
        )


def check_classes(num_classes: int, source: Source) -> None:
    if num_classes and num_classes != source.num_classes:
        raise ConfigError(
            f"model.num_classes is {num_classes}, but the data has {source.num_classes} classes: "
            "give as many, or 0 to learn without classes"
        )
