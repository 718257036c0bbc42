"""Learning rates as closed forms of the number of steps, under their established names.

Each begins with an exponential warm-up, 1 - warmup^(step + 1), and is then never below `min_lr`,
where it has one. `verbose` is taken for the sake of old programs, and says nothing: torch's own
schedules have it no more.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class _ClosedForm(LRScheduler):
    """What the three share; abstract. `_decayed` is the rate apart from the warm-up."""

    def __init__(self, optimizer: Optimizer, warmup: float, last_epoch: int) -> None:
        if not 0.0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), where 0 is none, got {warmup}")
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def _decayed(self, base_lr: Any) -> Any:
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group at step `last_epoch`."""
        return self._get_closed_form_lr()

    # By this name torch finds it, for `step(epoch)`.
    def _get_closed_form_lr(self) -> list[Any]:
        rise = 1 - self.warmup ** (self.last_epoch + 1)
        return [rise * self._decayed(base_lr) for base_lr in self.base_lrs]


class InverseLR(_ClosedForm):
    """lr · (1 + step / inv_gamma)^-power.

    Args:
        optimizer: whose learning rate is set.
        inv_gamma: steps after which the rate has fallen to (1/2)^power of its first value.
        power: exponent of the fall.
        warmup: of the exponential warm-up, in [0, 1); 0 is none.
        min_lr: the fall stops here.
        last_epoch: number of the step to go on from; -1 begins anew.
        verbose: says nothing, see above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        inv_gamma: float = 1.0,
        power: float = 1.0,
        warmup: float = 0.0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.inv_gamma, self.power, self.min_lr = inv_gamma, power, min_lr
        super().__init__(optimizer, warmup, last_epoch)

    def _decayed(self, base_lr: Any) -> Any:
        return max(self.min_lr, base_lr * (1 + self.last_epoch / self.inv_gamma) ** -self.power)


class ExponentialLR(_ClosedForm):
    """lr · decay^(step / num_steps).

    Args:
        optimizer: whose learning rate is set.
        num_steps: steps in which the rate falls by the factor `decay`, smoothly.
        decay: that factor.
        warmup: of the exponential warm-up, in [0, 1); 0 is none.
        min_lr: the fall stops here.
        last_epoch: number of the step to go on from; -1 begins anew.
        verbose: says nothing, see above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: float,
        decay: float = 0.5,
        warmup: float = 0.0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.num_steps, self.decay, self.min_lr = num_steps, decay, min_lr
        super().__init__(optimizer, warmup, last_epoch)

    def _decayed(self, base_lr: Any) -> Any:
        return max(self.min_lr, base_lr * self.decay ** (self.last_epoch / self.num_steps))


class ConstantLRWithWarmup(_ClosedForm):
    """lr, after its warm-up.

    Args:
        optimizer: whose learning rate is set.
        warmup: of the exponential warm-up, in [0, 1); 0 is none.
        last_epoch: number of the step to go on from; -1 begins anew.
        verbose: says nothing, see above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        super().__init__(optimizer, warmup, last_epoch)

    def _decayed(self, base_lr: Any) -> Any:
        return base_lr
