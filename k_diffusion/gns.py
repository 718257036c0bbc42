"""The established module `gns`: the gradient noise scale over `training.noise_scale`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.noise_scale import BucketNorms, estimate

__all__ = ["DDPGradientStatsHook", "GradientNoiseScale"]


class DDPGradientStatsHook:
    """Measures gradients within and over the processes of a DistributedDataParallel module.

    Args:
        ddp_module: the module; it must have no communication hook yet.

    Raises:
        ValueError: the module is not wrapped in DistributedDataParallel.
    """

    def __init__(self, ddp_module: nn.Module) -> None:
        self._norms = BucketNorms(ddp_module)

    def get_stats(self) -> tuple[float, float]:
        """Squared gradient norms of the step since the last call; every process has to ask.

        Returns:
            The mean over processes of each one's own, and that of the mean gradient.
        """
        import torch.distributed as dist

        both = torch.stack(self._norms.take()) / dist.get_world_size()
        dist.all_reduce(both)
        small, large = both.tolist()
        return small, large


class GradientNoiseScale:
    """The gradient noise scale, or critical batch size, from squared gradient norms.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    Args:
        beta: what an update keeps of the moving averages.
        eps: the least that either average counts as in their ratio.
    """

    def __init__(self, beta: float = 0.9998, eps: float = 1e-8) -> None:
        self.beta = beta
        self.eps = eps
        self.ema_sq_norm = 0.0
        self.ema_var = 0.0
        self.beta_cumprod = 1.0
        self.gradient_noise_scale = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, as plain numbers."""
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.__dict__.update(state_dict)

    def update(
        self,
        sq_norm_small_batch: float | Tensor,
        sq_norm_large_batch: float | Tensor,
        n_small_batch: int,
        n_large_batch: int,
    ) -> float:
        """Take in a step, and give the noise scale.

        Args:
            sq_norm_small_batch: mean squared norm of the gradients of the batch's parts.
            sq_norm_large_batch: squared norm of the whole batch's mean gradient.
            n_small_batch: images of a part; 1: gradients of single images.
            n_large_batch: images of the whole batch.

        Raises:
            ValueError: the two sizes do not grow.
        """
        square, variance = estimate(
            sq_norm_small_batch,  # type: ignore[arg-type]
            sq_norm_large_batch,  # type: ignore[arg-type]
            n_small_batch,
            n_large_batch,
        )
        self.ema_sq_norm = self.beta * self.ema_sq_norm + (1 - self.beta) * square
        self.ema_var = self.beta * self.ema_var + (1 - self.beta) * variance
        self.beta_cumprod *= self.beta
        self.gradient_noise_scale = max(self.ema_var, self.eps) / max(self.ema_sq_norm, self.eps)
        return self.gradient_noise_scale

    def get_gns(self) -> float:
        """The noise scale in images; nan before the first update."""
        return self.gradient_noise_scale

    def get_stats(self) -> tuple[float, float]:
        """The averages of |G|² and tr(Sigma), as means of what they have seen."""
        weight = 1 - self.beta_cumprod
        return self.ema_sq_norm / weight, self.ema_var / weight
