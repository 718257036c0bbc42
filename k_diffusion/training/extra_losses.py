"""Losses beside the denoising loss, by name.

A function of what came of a forward pass gives each sample's loss; its keyword-only arguments
become its options:

    @register_loss("sharp")
    def sharp(outcome: Outcome, *, power: float = 1.0) -> Tensor: ...     # shape (B,)

and so does an `nn.Module` class whose constructor takes the options, and whose forward takes the
outcome. A module's weights are frozen, unless its class has a true `trained`: then the run's
optimiser moves them too. Either way they are in the run's checkpoints, and go with it to its
device. A config asks for it by

    [loss.extra.sharp]
    weight = 0.1
    power = 2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.named import Table


@dataclass(frozen=True)
class Outcome:
    """What came of a forward pass in training.

    Attributes:
        x0: clean data, shape (B, ...).
        denoised: the estimate of it, of its shape; gradients flow through it.
        x: what the denoiser saw: alpha x0 + sigma noise.
        noise: unit Gaussian, of x0's shape.
        sigma: noise standard deviations in the denoiser's coordinates, shape (B,).
        half_log_snr: log(alpha / sigma), shape (B,).
        weight: of |denoised - x0|² in the denoising loss, shape (B,).
        condition: what the denoiser was told.
        raws: name -> the batch's raw inputs that the loss asked for, B first in each.
    """

    x0: Tensor
    denoised: Tensor
    x: Tensor
    noise: Tensor
    sigma: Tensor
    half_log_snr: Tensor
    weight: Tensor
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    raws: Mapping[str, Tensor] = field(default_factory=dict)


LOSSES = Table("loss", reserved=("name", "weight"))
_RAWS: dict[str, tuple[str, ...]] = {}


def register_loss(name: str, raws: Iterable[str] = ()) -> Callable[[Any], Any]:
    """A decorator that makes an extra loss known by name, to configs too.

    Args:
        name: of the table in `loss.extra`.
        raws: names of raw inputs of the batch (see `Batch.raws`) that it wants to see, numbers or
            tensors of one shape.
    """

    def add(made: Any) -> Any:
        LOSSES.register(name)(made)
        _RAWS[name] = tuple(raws)
        return made

    return add


class ExtraLoss:
    """A registered loss with its options and its weight.

    Attributes:
        name, weight: as the config has them.
        raws: the raw inputs that it wants to see.
        module: the `nn.Module` that it is, or None.

    Raises:
        ValueError: unknown name or option, or the module refuses its options.
    """

    def __init__(self, name: str, weight: float = 1.0, **options: Any) -> None:
        found = LOSSES.find(name, options)
        self.name, self.weight = name, float(weight)
        self.raws = _RAWS.get(name, ())
        self.module: nn.Module | None = None
        self._options = options
        self._call: Callable[..., Any] = found
        if isinstance(found, type):
            try:
                made = found(**options)
            except TypeError as error:
                raise ValueError(f"loss {name!r} cannot be made: {error}") from None
            if isinstance(made, nn.Module):
                self.module = made
                if not getattr(made, "trained", False):
                    made.requires_grad_(False).eval()
            self._call, self._options = made, {}

    def __call__(self, outcome: Outcome) -> Tensor:
        """The loss of each sample, float32 or better, shape (B,).

        Raises:
            ValueError: it is not of that shape.
        """
        loss = self._call(outcome, **self._options)
        if not isinstance(loss, Tensor) or loss.shape != outcome.x0.shape[:1]:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"loss {self.name!r} gave {got}; it must give one number a sample, shape "
                f"({len(outcome.x0)},)"
            )
        return loss.to(torch.promote_types(loss.dtype, torch.float32))


def raw_tensors(
    names: Iterable[str], raws: Mapping[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """The raw inputs of a batch by these names, as tensors.

    Raises:
        ValueError: one is not there, or is no numbers of one shape.
    """
    found = {}
    for name in names:
        if name not in raws:
            raise ValueError(
                f"an extra loss asks for the raw input {name!r}, but the data has "
                f"{', '.join(map(repr, raws)) or 'none'}: give data that has it"
            )
        raw = raws[name]
        try:
            if not isinstance(raw, Tensor):
                raw = torch.stack([torch.as_tensor(one) for one in raw])
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"an extra loss asks for the raw input {name!r}, which is no numbers of one shape"
            ) from None
        found[name] = raw.to(device, non_blocking=True)
    return found
