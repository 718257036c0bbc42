"""AdamW, the course of its learning rate, and its memory by the names of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from k_diffusion.training.config import OptimizerConfig
from k_diffusion.training.shards import cut_like
from k_diffusion.training.weight_groups import weight_groups


def learning_rate(
    config: OptimizerConfig, images_seen: int, total_images: int, batch: int
) -> float:
    """The learning rate of the step that begins at `images_seen`.

    Args:
        config: its course.
        images_seen: before the step.
        total_images: the run's length.
        batch: images of the step.
    """
    rise = min(1.0, (images_seen + batch) / config.warmup_images) if config.warmup_images else 1.0
    if config.schedule == "constant":
        return config.lr * rise
    # The fall begins where the warm-up ends, and reaches its end with the run.
    length = max(1, total_images - config.warmup_images)
    passed = min(1.0, max(0, images_seen - config.warmup_images) / length)
    left = 0.5 + 0.5 * math.cos(math.pi * passed)
    return config.lr * rise * (config.final_share + (1 - config.final_share) * left)


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in its fused form, which works on each weight once; decay spares biases and gains."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        weight_groups(network, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters),
    )


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors, each as "name of the weight/name of the moment"; not copies."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, network: nn.Module, saved: Mapping[str, Tensor]
) -> None:
    """Give the optimiser back what `moments` gave.

    Raises:
        ValueError: one belongs to no weight, or has another shape.
    """
    parameters = dict(network.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in saved.items():
        name, _, key = full.rpartition("/")
        if name not in order or (tensor.ndim and tensor.shape != parameters[name].shape):
            raise ValueError(f"optimizer/{full} of shape {tuple(tensor.shape)} fits no weight")
        if tensor.ndim:
            tensor = cut_like(tensor, parameters[name])
        state.setdefault(order.index(name), {})[key] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
