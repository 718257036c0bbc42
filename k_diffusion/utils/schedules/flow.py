"""Schedules of straight-line flow, where sigma goes from 1 (pure noise) to 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, Level
from k_diffusion.utils.schedules.base import Scheduler, settle


class Flow(Scheduler):
    """Shared by the flow schedules: time is sigma, and levels are laid at a shift; abstract."""

    shift: float
    path = FLOW

    def half_log_snr(self, time: Any) -> Any:
        return maths.log(1 - time) - maths.log(time)

    def time(self, half_log_snr: Any) -> Any:
        return FLOW.sigma(half_log_snr)

    def laid(self, time: float) -> Level:
        whole = 1 + (self.shift - 1) * time
        return Level((1 - time) / whole, self.shift * time / whole)


@dataclass(frozen=True)
class FlowScheduler(Flow):
    """Rectified flow: time is sigma, from pure noise (exactly) to data.

    Args:
        shift: levels are laid at shift·u / (1 + (shift - 1)·u) for even u; above 1 it spends more
            steps at much noise, as larger images need (Esser et al. 2024, arXiv:2403.03206,
            eq. 23). It moves the levels only: the network's time for a level stays its sigma.
        timesteps: what a network with discrete timesteps counts as sigma = 1.
    """

    name: ClassVar[str] = "flow"
    source: ClassVar[str] = "Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206"
    shift: float = 1.0
    timesteps: int = 1000

    def __post_init__(self) -> None:
        settle(self)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0, got {self.shift}")


@dataclass(frozen=True)
class _DynamicFlow(Flow):
    """Shared by the flow schedules whose shift grows with the number of tokens of an image."""

    tokens: int = 4096
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    timesteps: int = 1000

    def __post_init__(self) -> None:
        settle(self)
        if self.base_tokens == self.max_tokens:
            raise ValueError(f"base_tokens and max_tokens are both {self.max_tokens}: give two")
        if not 0 < self.shift < math.inf:
            raise ValueError(
                f"tokens {self.tokens} gives a shift of {self.shift}, which must be above 0: bring "
                "base_shift and max_shift nearer to one another"
            )

    @property
    def mu(self) -> float:
        """The line through (base_tokens, base_shift) and (max_tokens, max_shift), at `tokens`."""
        share = (self.tokens - self.base_tokens) / (self.max_tokens - self.base_tokens)
        return self.base_shift + share * (self.max_shift - self.base_shift)


@dataclass(frozen=True)
class DynamicFlowScheduler(_DynamicFlow):
    """Flow whose log shift grows linearly with the image's number of tokens, as in Flux.

    Args:
        tokens: the length of the image's sequence: (height / 16) · (width / 16) for Flux.
        base_tokens: a length, and
        max_tokens: another, between which mu = log(shift) is a straight line.
        base_shift: mu at base_tokens.
        max_shift: mu at max_tokens.
        timesteps: what a network with discrete timesteps counts as sigma = 1.
    """

    name: ClassVar[str] = "flow_dynamic"
    source: ClassVar[str] = "Black Forest Labs 2024, Flux, as published with the weights"

    @property
    def shift(self) -> float:  # type: ignore[override]
        return math.exp(self.mu)


@dataclass(frozen=True)
class LinearDynamicFlowScheduler(_DynamicFlow):
    """Flow whose shift itself grows linearly with the image's number of tokens.

    Args:
        tokens: the length of the image's sequence.
        base_tokens: a length, and
        max_tokens: another, between which the shift is a straight line.
        base_shift: the shift at base_tokens.
        max_shift: the shift at max_tokens.
        timesteps: what a network with discrete timesteps counts as sigma = 1.
    """

    name: ClassVar[str] = "flow_dynamic_linear"
    source: ClassVar[str] = 'diffusers\' time_shift_type "linear"'

    @property
    def shift(self) -> float:  # type: ignore[override]
        return self.mu
