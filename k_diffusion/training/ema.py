"""Averages of a network's weights along training, kept in float32.

Each is a moving average: an update keeps the share `decay` of it and takes the rest from the
network. A profile says how that share goes with the number of updates. `WarmUp` is the established
one, whose memory has a limit; `PowerFunction` remembers the same share of the run however long that
gets, and from snapshots of two of them `posthoc` makes an average of any length afterwards.

The clock of all is updates of the network's weights. An average that moves only every so many of
them keeps what each would have kept, multiplied: the network of that moment gets the weight that
all those since the last move would have had together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from k_diffusion.training.named_tensors import copy_tensors, named_tensors
from k_diffusion.utils.averages import warmup_decay

if TYPE_CHECKING:
    from k_diffusion.training.sections import EmaConfig

MAIN = "ema"
"""The name of the average that sampling takes unless told otherwise, and of its part of a file."""

LONGEST = 12**-0.5
"""The relative length at which a power function is flat: the plain mean of all updates."""


class Profile(Protocol):
    """How much of an average an update keeps."""

    def decay(self, updates: int) -> float:
        """The share that update number `updates` (from 0) keeps; 0 at first."""
        ...


@dataclass(frozen=True)
class WarmUp:
    """Exponential average with a warm-up, see `warmup_decay`.

    Attributes:
        power: exponent of the warm-up.
        inv_gamma: updates after which the warm-up has run through its first factor of 2^power.
        max_decay: the decay's upper limit.
    """

    power: float = 0.75
    inv_gamma: float = 1.0
    max_decay: float = 0.9999

    def decay(self, updates: int) -> float:
        return warmup_decay(
            updates, inv_gamma=self.inv_gamma, power=self.power, max_decay=self.max_decay
        )


@dataclass(frozen=True)
class PowerFunction:
    """Average that weighs the network at time tau by tau^gamma, up to the present time t.

    The clock is updates: a skipped step passes no time, and as only ratios of times matter, images
    learned from would give the same numbers. Update t keeps (1 - 1/t)^(gamma + 1), so that the
    network after update i has the weight (i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1) exactly: the
    integral of tau^gamma over its own unit of time. The initial weights have none.

    Attributes:
        sigma_rel: relative length, the standard deviation of that weight over time as a share of
            t; above 0 and below `LONGEST`.

    Raises:
        ValueError: there is no power function of that length.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1 and appendix C.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        exponent_of(self.sigma_rel)

    @property
    def gamma(self) -> float:
        """The exponent."""
        return exponent_of(self.sigma_rel)

    def decay(self, updates: int) -> float:
        return float((updates / (updates + 1)) ** (self.gamma + 1))


def length_of(gamma: float) -> float:
    """The relative length sigma_rel of the power function tau^gamma, for gamma above -1."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def exponent_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 whose power function has the relative length sigma_rel.

    It is the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2, by Newton's method from
    1 / sigma_rel, which lies above it: the cubic is convex there, so the steps fall to the root.

    Raises:
        ValueError: sigma_rel is not above 0 and below 1/sqrt(12).

    Source: Karras et al. 2024, arXiv:2312.02696, appendix C (the inverse of sigma_rel(gamma)).
    """
    if not 0 < sigma_rel < LONGEST:
        raise ValueError(
            f"sigma_rel = {sigma_rel!r} is no length of a power function: it lies above 0 and "
            f"below {LONGEST:.4f} (1/sqrt(12), the plain mean of all updates), as in 0.05"
        )
    inverse = sigma_rel**-2
    gamma = 1 / sigma_rel
    while True:
        value = (gamma + 2) ** 2 * (gamma + 3) - inverse * (gamma + 1)
        slope = (gamma + 2) * (3 * gamma + 8) - inverse
        lower = gamma - value / slope
        if not lower < gamma:
            return max(gamma, 0.0)
        gamma = lower


def average_name(sigma_rel: float) -> str:
    """The name of the power-function average of that relative length: ema_0.05, ema_0.1."""
    return f"{MAIN}_{sigma_rel:g}"


class Ema:
    """Moving average; parameters are averaged, buffers copied.

    Args:
        network: whose weights are averaged, in place on its device; the average begins as a copy.
        profile: how much each update keeps.
        every: updates between moves of the average. It moves at the first one, and at all whose
            number is a multiple of this.

    Attributes:
        updates: of the network's weights so far, the clock.
        reached: the update at which the average has last moved.
    """

    def __init__(self, network: nn.Module, profile: Profile | None = None, every: int = 1) -> None:
        self.profile = WarmUp() if profile is None else profile
        self.every = every
        self.updates = 0
        self.reached = 0
        averaged = {name for name, p in network.named_parameters() if p.is_floating_point()}
        self._average: dict[str, Tensor] = {}
        self._copied: dict[str, Tensor] = {}
        self._live = named_tensors(network)  # walking the modules anew would cost more than a lerp
        for name, tensor in self._live.items():
            if name in averaged:
                self._average[name] = tensor.detach().to(torch.float32, copy=True)
            else:
                self._copied[name] = tensor.detach().clone()

    @property
    def decay(self) -> float:
        """What the next update keeps by the profile, whether or not the average moves then."""
        return self.profile.decay(self.updates)

    @property
    def buffers(self) -> set[str]:
        """The names of what is copied, not averaged."""
        return set(self._copied)

    @torch.no_grad()
    def update(self) -> None:
        """The network's weights have been updated; move the average towards them if that is due."""
        self.updates += 1
        if self.updates == 1 or self.updates % self.every == 0:
            self._move()

    def _move(self) -> None:
        """Move towards the network's present weights, in one multi-tensor call.

        Weights in float32 are read where they are; only others are first copied to float32.
        """
        kept = math.prod(self.profile.decay(i) for i in range(self.reached, self.updates))
        live = [self._live[name] for name in self._average]
        new = [tensor if tensor.dtype is torch.float32 else tensor.float() for tensor in live]
        if new:
            torch._foreach_lerp_(list(self._average.values()), new, 1 - kept)
        for name, tensor in self._copied.items():
            tensor.copy_(self._live[name])
        self.reached = self.updates

    def state_dict(self) -> dict[str, Tensor]:
        """The average (float32) and the copied buffers, by the network's own names; not copies."""
        return {**self._average, **self._copied}

    def load_state_dict(
        self, state: Mapping[str, Tensor], updates: int, reached: int | None = None
    ) -> None:
        """Take over what `state_dict` gave.

        Args:
            state: average and buffers by name.
            updates: of the network that had been made.
            reached: the one at which the average had last moved; None: the last one.

        Raises:
            ValueError: names or shapes differ from the network's; nothing is changed then.
        """
        copy_tensors(state, self.state_dict())
        self.updates = updates
        self.reached = updates if reached is None else reached

    def copy_to(self, network: nn.Module) -> None:
        """Write the average into a network of the same shapes, in the network's own dtype."""
        copy_tensors(self.state_dict(), named_tensors(network))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the network has the average as its weights; afterwards its own again."""
        own = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        copy_tensors(self.state_dict(), self._live)
        try:
            yield
        finally:
            copy_tensors(own, self._live)


def make_averages(network: nn.Module, config: EmaConfig) -> dict[str, Ema]:
    """The averages that a run keeps, by name: `MAIN`, and one for each of its profiles."""
    main = WarmUp(power=config.power, inv_gamma=config.inv_gamma, max_decay=config.max_decay)
    profiles: dict[str, Profile] = {
        average_name(sigma_rel): PowerFunction(sigma_rel) for sigma_rel in config.profiles
    }
    return {
        name: Ema(network, profile, config.update_every_steps)
        for name, profile in {MAIN: main, **profiles}.items()
    }


def load_averages(
    averages: Mapping[str, Ema],
    parts: Mapping[str, Mapping[str, Tensor]],
    updates: int,
    reached: int,
) -> None:
    """Give every average back what a checkpoint has of it.

    Args:
        averages: of the run.
        parts: average's name -> tensors by name.
        updates: of the network that had been made.
        reached: the one at which the averages had last moved.

    Raises:
        ValueError: the checkpoint lacks one, or names or shapes differ from the network's.
    """
    for name, average in averages.items():
        if not parts.get(name) and average.state_dict():
            raise ValueError(
                f"it has no average {name}, and one cannot begin in mid-run, as it needs every "
                "update: take it out of ema.profiles, or begin a new run"
            )
        average.load_state_dict(parts[name], updates, reached)
