"""What the established wrappers share: variance-exploding Denoisers around networks of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.utils.levels import VE
from k_diffusion.utils.tensors import append_dims


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or in float32 where its precision is lower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_DEFAULTS = ("path", "alpha", "process")


class Default:
    """What an object has by a name until it sets its own: a value, Parameter, buffer or Module.

    Programs' subclasses of these wrappers have attributes of those names for purposes of theirs.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owned: Any, owner: type | None = None) -> Any:
        if owned is None:
            return self
        for kind in ("_parameters", "_buffers", "_modules"):
            held = owned.__dict__.get(kind, {})
            if self._name in held:
                return held[self._name]
        return self._make(owned)


class VarianceExploding(nn.Module):
    """What the established wrappers share; abstract. Makes them Denoisers with alpha = 1."""

    path: Any = Default(lambda self: VE)
    """The coordinates of x and sigma."""
    alpha: Any = Default(lambda self: VE.alpha)
    """The signal scale at sigma, a float or a tensor: 1."""
    inner_model: Any
    get_scalings: Any

    # torch refuses to register what a class has by the same name, unless it is registered already.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in _DEFAULTS:
            self._parameters.setdefault(name, None)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name in _DEFAULTS:
            self._buffers.setdefault(name, None)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name in _DEFAULTS:
            self._modules.setdefault(name, None)
        super().add_module(name, module)

    def _scalings(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """`get_scalings` made to multiply x.

        Squares of a half-precision sigma overflow above 255, so they are taken in float32.
        """
        scalings = self.get_scalings(at_least_float32(sigma.to(x.device)))
        return [append_dims(scaling, x.ndim).to(x.dtype) for scaling in scalings]

    def _for_network(self, x: Tensor) -> Tensor:
        """x in the network's precision, where all of its weights share one that is not x's.

        A network of mixed or integer weights, or under autocast, sees to that itself.
        """
        if not isinstance(self.inner_model, nn.Module):
            return x
        parameters = self.inner_model.parameters()
        first = next(parameters, None)
        if first is None or first.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        alike = first.dtype in plain and all(p.dtype == first.dtype for p in parameters)
        return x.to(first.dtype) if alike else x
