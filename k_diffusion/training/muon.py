"""Muon: hidden weights move by orthogonal matrices, all others by AdamW.

Why not torch's own Muon: it came with torch 2.9, takes matrices only (no convolution), leaves the
other weights to a second optimiser, and orthogonalises one matrix at a time, in bfloat16 on the
CPU too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models.mp_layers import MPConv, MPLinear
from k_diffusion.training.shards import is_cut

LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    MPLinear,
    MPConv,
)
"""Layers that are one matrix each, whose `weight` has it."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
"""Newton and Schulz's iteration: x -> a x + b x³ + c x⁵ on each singular value, that many times. It
is steep at 0, and carries what is above 0.0052 of the matrix's norm into [0.68, 1.14] instead of to
1 (Jordan et al. 2024); what is smaller ends between 0 and 1.21."""

RMS = 0.2
"""Root mean square of an update at a learning rate of 1, as AdamW's are about (Liu et al. 2025,
arXiv:2502.16982, eq. 4)."""

_PORTION = 2**25
"""The most numbers that are orthogonalised at once: more would gain no speed and cost memory."""


def hidden_weights(network: nn.Module) -> list[str]:
    """The names of the weights that are matrices between two hidden layers.

    These are the weights of the layers in `LINEAR` with both sides at least 2 and without groups,
    but not those through which a network's inputs enter and its output leaves: the first and the
    last such layer, and those in a module of the network itself that has "in" or "out" as a word of
    its name ("conv_in", "patch_out", "time_in_proj"). Where a network has `hidden_weights`, a list
    of names, that list is taken instead.

    Raises:
        ValueError: the network's own list has a name that none of its weights of two dimensions or
            more has.
    """
    own: Iterable[str] | None = getattr(network, "hidden_weights", None)
    shapes = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
    if own is not None:
        own = list(own)
        for name in own:
            if name not in shapes or len(shapes[name]) < 2:
                raise ValueError(
                    f"{type(network).__name__}.hidden_weights has {name!r}, which is no weight of "
                    "two dimensions or more: name those of `named_parameters`"
                )
        return own
    layers = [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, LINEAR) and getattr(module, "groups", 1) == 1
    ]
    # A network in a wrapper has all its names behind the wrapper's.
    parts = zip(*(name.split(".")[:-1] for name in shapes), strict=False)
    wrapped = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, parts))
    return [
        name
        for name in layers[1:-1]
        if name in shapes
        and min(_sides(shapes[name])) > 1
        and not {"in", "out"} & set(name.split(".")[wrapped].split("_"))
    ]


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: outputs, and all over which one is a sum."""
    return shape[0], math.prod(shape[1:])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices: all singular values become about 1.

    Args:
        matrices: shape (..., M, N), of any scale; all of a matrix's zeros stay zero.

    Returns:
        The same shape; bfloat16 on GPUs, which have units for that, else float32 or better.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Björck
    and Bowie 1971 for the iteration.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # so that the square matrices below are the smaller ones
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # The norm of all numbers is no less than the largest singular value.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
    if x.device.type in ("cuda", "xpu"):
        x = x.bfloat16()
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden weights; AdamW for the rest.

    With g the gradient of a hidden weight w as a matrix of M x N (a convolution's: outputs x all
    the others):

        m <- momentum · m + (1 - momentum) · g
        u  = momentum · m + (1 - momentum) · g                                        (Nesterov)
        w <- (1 - lr · weight_decay) · w - lr · 0.2 · sqrt(max(M, N)) · orthogonalize(u)

    The last factors give the update the root mean square that AdamW's has, so that one learning
    rate serves all weights.

    Args:
        hidden: weights of two dimensions or more, or groups of them (dicts with "params").
        rest: other weights, or groups of them.
        lr: learning rate of all.
        momentum: of the hidden weights, in [0, 1).
        weight_decay: decoupled, of all groups that do not have their own.
        betas, eps: AdamW's.

    Raises:
        ValueError: no hidden weights, or one of a single dimension.

    Source: Jordan et al. 2024; the scale: Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        hidden: Iterable[Any],
        rest: Iterable[Any] = (),
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        hidden, rest = _groups(hidden), _groups(rest)
        if not hidden:
            raise ValueError("Muon has no hidden weights to work on: take AdamW")
        for weight in itertools.chain.from_iterable(group["params"] for group in hidden):
            if weight.ndim < 2:
                raise ValueError(
                    f"Muon's hidden weights are matrices, got one of shape {tuple(weight.shape)}: "
                    "give it among the rest"
                )
        for group in hidden:
            group.setdefault("momentum", momentum)
        self._usual = {"betas": betas, "eps": eps}
        super().__init__([*hidden, *rest], {"lr": lr, "weight_decay": weight_decay})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Another group: of the rest, unless it has a momentum."""
        group = {**param_group, "params": list(param_group["params"])}
        if "momentum" not in group:
            group = {**self._usual, "fused": fusible(group["params"]), **group}
        super().add_param_group(group)
        if hasattr(self, "_rest"):
            self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Let an AdamW work on the other groups and on the state of this one as its own."""
        groups = [group for group in self.param_groups if "momentum" not in group]
        self._rest = torch.optim.AdamW(groups) if groups else None
        if self._rest is not None:
            self._rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all weights that have a gradient; gives the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                self._turn(group)
        if self._rest is not None:
            self._rest.step()
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momentum, gradients = group["momentum"], [p.grad for p in weights]
        averages = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_mul(averages, momentum)
        torch._foreach_add_(updates, gradients, alpha=1 - momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for shape, members in _portions(weights):
            matrices = torch.stack([_whole(updates[i]).reshape(shape) for i in members])
            size = group["lr"] * RMS * math.sqrt(max(shape))
            for i, turned in zip(members, orthogonalize(matrices), strict=True):
                weights[i].add_(_placed_as(weights[i], turned), alpha=-size)


def fusible(weights: Iterable[Tensor]) -> bool:
    """Whether torch has a fused AdamW, which reads and writes each weight once, for all of them."""
    return all(weight.device.type in ("cpu", "cuda", "xpu", "mps") for weight in weights)


def _groups(weights: Iterable[Any]) -> list[dict[str, Any]]:
    """Weights, or groups of them, as groups that are not empty."""
    given = list(weights)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    return [group for group in groups if group["params"]]


def _portions(weights: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Weights that are matrices of one shape, by their places: all at once, within bounds."""
    places: dict[tuple[int, int], list[int]] = {}
    for i, weight in enumerate(weights):
        places.setdefault(_sides(weight.shape), []).append(i)
    for shape, members in places.items():
        count = max(1, _PORTION // math.prod(shape))
        for start in range(0, len(members), count):
            yield shape, members[start : start + count]


def _whole(tensor: Any) -> Tensor:
    """All of a tensor of which each process may hold a part: a part has other singular values."""
    whole: Tensor = tensor.full_tensor() if is_cut(tensor) else tensor
    return whole


def _placed_as(weight: Any, matrix: Tensor) -> Tensor:
    """A whole matrix in a weight's shape and dtype, and of a sharded one the part held here."""
    update = matrix.reshape(weight.shape).to(weight.dtype)
    if not is_cut(weight):
        return update
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    everywhere = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=weight.placements)
