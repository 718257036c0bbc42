"""The established wrapper that tells a network how its training images were augmented."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models.conditions import Condition, Vector
from k_diffusion.models.established_conditions import check_established

AUGMENT_DIM = 9
"""Numbers that say how an image was augmented (Karras et al. 2022, arXiv:2206.00364, app. F.2)."""


class KarrasAugmentWrapper(nn.Module):
    """A network whose `mapping_cond` begins with the nine numbers of an augmentation.

    Args:
        model: called as `model(input, sigma, mapping_cond=..., **kwargs)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner_model = model

    def check_condition(self, batch: int, **condition: Any) -> None:
        """See `Network.check_condition`; where the network has such a check."""
        own = {name: condition.pop(name, None) for name in ("aug_cond", "mapping_cond")}
        more = getattr(self.inner_model, "mapping_cond_dim", None)
        widths: dict[Condition, int] = {Vector("aug_cond", AUGMENT_DIM): AUGMENT_DIM}
        if more is None:
            own.pop("mapping_cond")
        else:
            more = max(0, more - AUGMENT_DIM)
            widths[Vector("mapping_cond", more)] = more
        check_established(widths, batch, None, own, values=True)
        check = getattr(self.inner_model, "check_condition", None)
        if check is not None:
            check(batch, **condition)

    def forward(
        self,
        input: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the network predicts.

        Args:
            input: noisy data, shape (B, ...).
            sigma: noise standard deviations, shape (B,).
            aug_cond: shape (B, 9); None: not augmented, zeros.
            mapping_cond: what else is known of a sample, shape (B, D); None: nothing, zeros where
                the network expects something.
            kwargs: for the network.
        """
        if aug_cond is None:
            aug_cond = input.new_zeros(len(input), AUGMENT_DIM)
        elif aug_cond.shape != (len(input), AUGMENT_DIM):
            raise ValueError(
                f"aug_cond has shape {tuple(aug_cond.shape)}; give {AUGMENT_DIM} numbers a sample, "
                f"shape ({len(input)}, {AUGMENT_DIM})"
            )
        if mapping_cond is None:
            more = getattr(self.inner_model, "mapping_cond_dim", AUGMENT_DIM) - AUGMENT_DIM
            mapping_cond = aug_cond.new_zeros(len(input), max(0, more))
        mapping_cond = torch.cat([aug_cond, mapping_cond.to(aug_cond.dtype)], 1)
        return self.inner_model(input, sigma, mapping_cond=mapping_cond, **kwargs)

    def param_groups(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Those of the network."""
        return self.inner_model.param_groups(*args, **kwargs)  # type: ignore[operator]

    def set_skip_stages(self, skip_stages: int) -> Any:
        """That of the network."""
        return self.inner_model.set_skip_stages(skip_stages)  # type: ignore[operator]

    def set_patch_size(self, patch_size: int) -> Any:
        """That of the network."""
        return self.inner_model.set_patch_size(patch_size)  # type: ignore[operator]
