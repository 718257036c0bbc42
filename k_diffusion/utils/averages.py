"""Moving averages of a model's weights and of measured values, under their established names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def warmup_decay(
    updates: float, *, inv_gamma: float = 1.0, power: float = 0.75, max_decay: float = 0.9999
) -> float:
    """The share of the old average that update number `updates` (from 0) keeps.

    It is 1 - (1 + updates / inv_gamma)^-power, at most `max_decay`: 0 at first, so that the
    average forgets the initial weights, and rising from then on. With power 2/3 it reaches 0.999
    after 31,600 updates and 0.9999 after a million; with power 3/4 after 10,000 and 215,400.

    Source: the established EMAWarmup of k-diffusion (Crowson et al. 2022).
    """
    return min(max_decay, 1 - (1 + updates / inv_gamma) ** -power)


class EMAWarmup:
    """The decay of a moving average as it warms up; see `warmup_decay` for the curve.

    Args:
        inv_gamma: updates after which the new values' share has fallen by a factor of 2^power.
        power: exponent; 1 with inv_gamma 1 is the plain average of all updates.
        min_value: the decay's lower limit.
        max_value: the decay's upper limit.
        start_at: number of the update at which the curve begins.
        last_epoch: number of updates made already.
    """

    def __init__(
        self,
        inv_gamma: float = 1.0,
        power: float = 1.0,
        min_value: float = 0.0,
        max_value: float = 1.0,
        start_at: int = 0,
        last_epoch: int = 0,
    ) -> None:
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self.max_value = max_value
        self.start_at = start_at
        self.last_epoch = last_epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, as plain numbers."""
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.__dict__.update(state_dict)

    def get_value(self) -> float:
        """The decay of the next update."""
        updates = max(0, self.last_epoch - self.start_at)
        decay = warmup_decay(updates, inv_gamma=self.inv_gamma, power=self.power, max_decay=1.0)
        return min(self.max_value, max(self.min_value, decay))

    def step(self) -> None:
        """Count one update."""
        self.last_epoch += 1


@torch.no_grad()
def ema_update(model: nn.Module, averaged_model: nn.Module, decay: float) -> None:
    """Move an averaged model towards the model, after each step of its optimiser.

    Parameters become decay · average + (1 - decay) · model, in the average's own dtype and on its
    device; buffers are copied.

    Args:
        model: the one being trained.
        averaged_model: its copy, changed in place.
        decay: share of the average that is kept.

    Raises:
        ValueError: the two have not the same parameters or buffers; nothing has been changed.
    """
    averaged = dict(averaged_model.named_parameters())
    copied = dict(averaged_model.named_buffers())
    _same_names("parameter", dict(model.named_parameters()), averaged)
    _same_names("buffer", dict(model.named_buffers()), copied)
    for name, parameter in model.named_parameters():
        average = averaged[name]
        if average.is_floating_point() or average.is_complex():
            average.lerp_(parameter.to(average), 1 - decay)
        else:
            average.copy_(parameter)
    for name, buffer in model.named_buffers():
        copied[name].copy_(buffer)


def _same_names(kind: str, ours: Iterable[str], theirs: Iterable[str]) -> None:
    different = sorted(set(ours) ^ set(theirs))
    if different:
        raise ValueError(
            f"model and averaged_model differ: only one has {kind} {different[0]!r} "
            f"({len(different)} such in all); make the average by copy.deepcopy(model)"
        )


def ema_update_dict(
    values: dict[str, Any], updates: Mapping[str, float | Tensor], decay: float
) -> dict[str, Any]:
    """Move averaged values towards new ones; a name that is new begins with its first value.

    Args:
        values: averages by name, changed in place.
        updates: new values, numbers or tensors, which stay as they are.
        decay: share of the average that is kept.

    Returns:
        `values`.
    """
    for name, new in updates.items():
        if name in values:
            values[name] = values[name] * decay + (1 - decay) * new
        else:
            values[name] = new
    return values
