"""Optimisers, and what they remember by the names of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.config import ConfigError
from k_diffusion.training.muon import Muon, fusible, hidden_weights
from k_diffusion.training.sections import OptimizerConfig
from k_diffusion.training.shards import cut_like
from k_diffusion.training.weight_groups import weight_groups


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that the config names; weight decay spares biases and gains.

    Raises:
        ConfigError: the network has no weights for it.
    """
    return OPTIMIZERS[config.type](network, config)


def make_adamw(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in its fused form, which works on each weight once."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        weight_groups(network, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fusible(parameters),
    )


def make_muon(network: nn.Module, config: OptimizerConfig) -> Muon:
    """Muon for the hidden weights, fused AdamW for the others."""
    names = set(hidden_weights(network))
    if not names:
        raise ConfigError(
            f"optimizer.type is muon, but {type(network).__name__} has no hidden weights: take "
            "adamw, or name them in the network's hidden_weights"
        )
    hidden = {id(p) for name, p in network.named_parameters() if name in names}
    groups = weight_groups(network, config)
    return Muon(
        _of_groups(groups, lambda weight: id(weight) in hidden),
        _of_groups(groups, lambda weight: id(weight) not in hidden),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        betas=config.betas,
        eps=config.eps,
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": make_adamw,
    "muon": make_muon,
}


def _of_groups(
    groups: Sequence[Mapping[str, Any]], chosen: Callable[[Tensor], bool]
) -> list[dict[str, Any]]:
    """Of each group the chosen weights, with what the group says of them."""
    cut = [{**group, "params": [p for p in group["params"] if chosen(p)]} for group in groups]
    return [group for group in cut if group["params"]]


def adopt(optimizer: Any, network: nn.Module) -> None:
    """Take an optimiser of a network's weights; those that it leaves out learn nothing any more.

    Without that their gradients would be computed, add up from step to step, and count in the norm
    that is clipped.

    Raises:
        ConfigError: it is no optimiser, or one of other weights than the network's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer gave {type(optimizer).__name__}: give a function network -> "
            "torch.optim.Optimizer"
        )
    own = {id(p): p for p in network.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for weight in held:
        if id(weight) not in own:
            raise ConfigError(
                f"{type(optimizer).__name__} holds a weight of shape {tuple(weight.shape)} that is "
                "not the network's: make it of network.parameters()"
            )
    _keep_shares(optimizer)
    for left_out in set(own) - {id(p) for p in held}:
        own[left_out].requires_grad_(False)


def _keep_shares(optimizer: torch.optim.Optimizer) -> None:
    """Let groups that were given learning rates of their own keep their shares of the largest.

    Each step sets the rates anew, by the course and a group's "lr_scale".
    """
    rates = [(g, float(g["lr"])) for g in optimizer.param_groups if g.get("lr") is not None]
    rates = [(group, rate) for group, rate in rates if "lr_scale" not in group]
    largest = max((rate for _, rate in rates), default=0.0)
    for group, rate in rates:
        if rate != largest:
            group["lr_scale"] = rate / largest


# ---------------------------------------------------------------- what it remembers


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors, each as "name of the weight/name of the moment"; not copies."""
    return {
        f"{name}/{key}": value
        for name, state in _states(optimizer, network)
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def plain_state(
    optimizer: torch.optim.Optimizer, network: nn.Module, start: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What an optimiser remembers beside tensors, as JSON data.

    Args:
        optimizer: any.
        network: whose weights it has.
        start: what `group_values` gave when the optimiser was new. Some keep count in the values of
            their groups: those that are others now are taken, but the learning rate, which is set
            anew in each step.

    Raises:
        TypeError: it keeps something in its state that is neither a tensor nor plain.
    """
    weights: dict[str, dict[str, Any]] = {}
    for name, state in _states(optimizer, network):
        for key, value in state.items():
            if isinstance(value, Tensor):
                continue
            if not _is_plain(value):
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of "
                    f"{name}: only tensors and plain values can be saved"
                )
            weights.setdefault(name, {})[key] = value
    groups = [
        {k: v for k, v in now.items() if k != "lr" and (k not in before or v != before[k])}
        for now, before in zip(group_values(optimizer), start, strict=True)
    ]
    return {"class": type(optimizer).__name__, "weights": weights, "groups": groups}


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The plain values of each group."""
    return [
        {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def load_moments(
    optimizer: torch.optim.Optimizer,
    network: nn.Module,
    saved: Mapping[str, Tensor],
    plain: Mapping[str, Any] | None = None,
) -> None:
    """Give the optimiser back what `moments` and `plain_state` gave.

    Raises:
        ValueError: it is of another class, or a tensor belongs to no weight or has another shape.
    """
    plain = plain or {}
    kind = type(optimizer).__name__
    if plain.get("class", kind) != kind:
        raise ValueError(f"its optimizer is {plain['class']}, not {kind}: give the same")
    names = {id(p): name for name, p in network.named_parameters()}
    weights = dict(network.named_parameters())
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for full, tensor in saved.items():
        name, _, key = full.rpartition("/")
        if name not in number or not _fits(tensor, weights[name]):
            raise ValueError(f"optimizer/{full} of shape {tuple(tensor.shape)} fits no weight")
        whole = tensor.ndim and tensor.shape == weights[name].shape
        state.setdefault(number[name], {})[key] = (
            cut_like(tensor, weights[name]) if whole else tensor
        )
    for name, values in plain.get("weights", {}).items():
        state.setdefault(number[name], {}).update(values)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    # torch casts all to the weight's dtype: a float64 average, or a count, would not come back.
    for full, tensor in saved.items():
        name, _, key = full.rpartition("/")
        loaded = optimizer.state[weights[name]]
        if loaded[key].dtype != tensor.dtype:
            loaded[key] = tensor.to(loaded[key].device)
    for group, values in zip(optimizer.param_groups, plain.get("groups", []), strict=False):
        group.update({key: _as(group.get(key), value) for key, value in values.items()})


def _states(
    optimizer: torch.optim.Optimizer, network: nn.Module
) -> list[tuple[str, Mapping[str, Any]]]:
    names = {id(p): name for name, p in network.named_parameters()}
    return [(names[id(p)], state) for p, state in optimizer.state.items()]


def _fits(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a moment is a number, of the weight's shape, or of 1 along some of its axes."""
    if not tensor.ndim:
        return True
    return tensor.ndim == weight.ndim and all(
        n in (1, full) for n, full in zip(tensor.shape, weight.shape, strict=True)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _as(present: Any, value: Any) -> Any:
    """A value from JSON, which has lists where there was a tuple."""
    return tuple(value) if isinstance(present, tuple) and isinstance(value, list) else value
