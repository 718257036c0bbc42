"""An established network as a model of this library, which runs train and sampling makes use of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from k_diffusion.config.making import make_model
from k_diffusion.config.reading import load_config
from k_diffusion.models.augment_wrapper import AUGMENT_DIM
from k_diffusion.models.registry import register_model


@dataclass(frozen=True, kw_only=True)
class EstablishedConfig:
    """What an established network is built from.

    Args:
        model: the "model" of an established config.
        num_classes: that of its "dataset"; 0: no classes.

    Raises:
        ValueError: see `k_diffusion.config.load_config`.
    """

    model: dict[str, Any]
    num_classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.established["model"])

    @property
    def established(self) -> dict[str, Any]:
        """The established config."""
        return load_config({"model": self.model, "dataset": {"num_classes": self.num_classes}})


@register_model("established")
class Established(nn.Module):
    """The network of an established config: "image_v1", "image_transformer_v1" or "_v2".

    It is told sigma itself, classes as `class_cond`, and augmentation as `aug_cond`.
    """

    Config = EstablishedConfig
    prediction = "edm"
    time_convention = "log_sigma"

    def __init__(self, config: EstablishedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.has_variance = bool(config.model["has_variance"])
        self.sigma_data = float(config.model["sigma_data"])
        self.inner_model = make_model(config.established)

    @property
    def augmentation_dim(self) -> int:
        """See `NetworkConfig`: 9, or 0 for an image_v1 without augment_wrapper."""
        model = self.config.model
        return AUGMENT_DIM if model["augment_wrapper"] or model["type"] != "image_v1" else 0

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_label: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
        return_variance: bool = False,
    ) -> Any:
        """What the network predicts.

        Args:
            x: noisy data of unit variance, shape (B, input_channels, H, W).
            t: log(sigma) / 4, shape (B,).
            class_label: classes, shape (B,), num_classes for none; None: none for all.
            augmentation: how the samples were augmented, shape (B, 9), where the network takes it;
                None: not at all.
            return_variance: whether to return the log variance of its error, too, shape (B,).
        """
        condition: dict[str, Any] = {} if class_label is None else {"class_cond": class_label}
        if augmentation is not None:
            condition["aug_cond"] = augmentation
        if return_variance:
            condition["return_variance"] = True
        return self.inner_model(x, (4 * t).exp(), **condition)

    def check_condition(self, batch: int, **condition: Any) -> None:
        """See `Network.check_condition`."""
        if "class_label" in condition:
            condition["class_cond"] = condition.pop("class_label")
        if "augmentation" in condition:
            condition["aug_cond"] = condition.pop("augmentation")
        self.inner_model.check_condition(batch, **condition)  # type: ignore[operator]

    def param_groups(self, base_lr: float) -> list[dict[str, Any]]:
        """Those of the network, each with its own lr and weight_decay."""
        return self.inner_model.param_groups(base_lr)  # type: ignore[operator]
