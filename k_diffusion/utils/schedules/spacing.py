"""Spacings: they only lay levels, over another scheduler's process, and are no process themselves.

A process is seen here as a table of N = `timesteps` noisy levels, counted from the cleanest, 0, to
the noisiest, N - 1: a discrete process is one, and of a continuous one they are taken evenly in
time (for flow at sigma = 1 / N, 2 / N ... 1). Clean data follows the last level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import CLEAN, FLOW, Level, Path
from k_diffusion.utils.schedules.base import Scheduler, settle
from k_diffusion.utils.schedules.discrete import LinearScheduler
from k_diffusion.utils.schedules.flow import FlowScheduler
from k_diffusion.utils.special import inverse_incomplete_beta


@dataclass(frozen=True)
class Spacing(Scheduler):
    """What the spacings share; abstract. To add one: give `picked`."""

    process: Scheduler | None = None

    def __post_init__(self) -> None:
        settle(self)

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        """The timesteps to lay, noisiest first, in [0, timesteps - 1], perhaps fractional."""
        raise NotImplementedError

    @property
    def _over(self) -> Scheduler:
        return self.process or LinearScheduler()

    @property
    def own_process(self) -> Scheduler | None:
        return self.process

    def within(self, process: Scheduler) -> Scheduler:
        fits = self.process is None and process.own_process is not None
        return dataclasses.replace(self, process=process.own_process) if fits else self

    @property
    def path(self) -> Path:  # type: ignore[override]
        return self._over.path

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        return self._over.timesteps

    @property
    def time_min(self) -> float:  # type: ignore[override]
        return self._over.time_min

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return self._over.time_max

    def half_log_snr(self, time: Any) -> Any:
        return self._over.half_log_snr(time)

    def time(self, half_log_snr: Any) -> Any:
        return self._over.time(half_log_snr)

    def _lay(self, steps: int) -> list[Level]:
        over = self._over
        n, first, last = over.timesteps, over.time_min, over.time_max
        if over.half_log_snr(first) == math.inf:  # clean data is not one of the N
            first += (last - first) / n
        timesteps = dict.fromkeys(self.picked(steps, n))  # a repeated one is laid once
        levels = [
            over.laid(last if i == n - 1 else first + (last - first) * i / (n - 1))
            for i in timesteps
        ]
        return [*levels, CLEAN]

    def _refuse_more(self, steps: int, timesteps: int) -> None:
        if steps > timesteps:
            raise ValueError(
                f"{self.name} cannot lay {steps} steps over the {timesteps} timesteps of "
                f"{type(self._over).__name__}: ask for fewer"
            )


@dataclass(frozen=True)
class SimpleScheduler(Spacing):
    """Every (N / steps)-th timestep from the noisiest, rounded up; repeated ones are laid once.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "simple"
    source: ClassVar[str] = "ComfyUI's simple"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        return [timesteps - 1 - int(i * (timesteps / steps)) for i in range(steps)]


@dataclass(frozen=True)
class NormalScheduler(Spacing):
    """Even steps in time from the noisiest timestep to the cleanest, between timesteps too.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "normal"
    source: ClassVar[str] = "ComfyUI's normal; Crowson 2022, k-diffusion's DiscreteSchedule"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        return maths.linspace(timesteps - 1, 0, steps)


@dataclass(frozen=True)
class SGMUniformScheduler(Spacing):
    """Even steps in time from the noisiest timestep towards the cleanest, which 0 replaces.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "sgm_uniform"
    source: ClassVar[str] = "ComfyUI's sgm_uniform, after Stability AI's generative-models"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        return maths.linspace(timesteps - 1, 0, steps + 1)[:-1]


@dataclass(frozen=True)
class DDIMUniformScheduler(Spacing):
    """Timestep 1 and every (N // steps)-th after it, as DDIM was published for latent diffusion.

    Where steps does not divide N there are as many levels as the stride gives, perhaps more than
    asked for; and it begins below the noisiest timestep (Lin et al. 2023, arXiv:2305.08891, table
    2, "leading"), far below it for few steps.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "ddim_uniform"
    source: ClassVar[str] = "ComfyUI's ddim_uniform; Song et al. 2021, arXiv:2010.02502, appendix D"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        return range(1, timesteps, max(timesteps // steps, 1))[::-1]


@dataclass(frozen=True)
class BetaScheduler(Spacing):
    """Quantiles of a Beta distribution over the timesteps, rounded; repeated ones are laid once.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
        alpha: below 1 levels crowd at the clean end.
        beta: below 1 levels crowd at the noisy end.
    """

    name: ClassVar[str] = "beta"
    source: ClassVar[str] = "Lee et al. 2024, arXiv:2407.12173, as in ComfyUI's beta"
    alpha: float = 0.6
    beta: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alpha > 0 and self.beta > 0):
            raise ValueError(f"alpha and beta must be above 0, got {self.alpha} and {self.beta}")

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        shares = (1 - i / steps for i in range(steps))
        try:
            quantiles = [inverse_incomplete_beta(self.alpha, self.beta, share) for share in shares]
        except ArithmeticError:
            raise ValueError(
                f"the quantiles of a Beta distribution with alpha {self.alpha} and beta "
                f"{self.beta} are beyond floating point: bring them nearer to 1"
            ) from None
        return [round(quantile * (timesteps - 1)) for quantile in quantiles]


@dataclass(frozen=True)
class LeadingScheduler(Spacing):
    """Timesteps 0, k, 2k... with k = N // steps, and an offset.

    It begins below the noisiest timestep (Lin et al. 2023, arXiv:2305.08891, section 3.3).

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
        steps_offset: added to each timestep; 1 for Stable Diffusion.
    """

    name: ClassVar[str] = "leading"
    source: ClassVar[str] = "Lin et al. 2023, arXiv:2305.08891, table 2; diffusers"
    steps_offset: int = 0

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        self._refuse_more(steps, timesteps)
        stride = timesteps // steps
        noisiest = (steps - 1) * stride + self.steps_offset
        if noisiest > timesteps - 1:
            raise ValueError(
                f"steps_offset {self.steps_offset} moves the noisiest of {steps} steps to timestep "
                f"{noisiest}, beyond {timesteps - 1}: lower it, or ask for fewer steps"
            )
        return range(noisiest, self.steps_offset - 1, -stride)


@dataclass(frozen=True)
class TrailingScheduler(Spacing):
    """Every (N / steps)-th timestep from the noisiest, rounded.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "trailing"
    source: ClassVar[str] = "Lin et al. 2023, arXiv:2305.08891, table 2; diffusers"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        self._refuse_more(steps, timesteps)
        return [round(timesteps - i * (timesteps / steps)) - 1 for i in range(steps)]


@dataclass(frozen=True)
class LinspaceScheduler(Spacing):
    """Even steps from the noisiest timestep to the cleanest, rounded to whole timesteps.

    Args:
        process: what to lay over; None: the model's, or DDPM's linear one.
    """

    name: ClassVar[str] = "linspace"
    source: ClassVar[str] = "Lin et al. 2023, arXiv:2305.08891, table 2; diffusers"

    def picked(self, steps: int, timesteps: int) -> Sequence[float]:
        self._refuse_more(steps, timesteps)
        return [round(i) for i in maths.linspace(timesteps - 1, 0, steps)]


@dataclass(frozen=True)
class LinearQuadraticScheduler(Spacing):
    """Small even steps from the noisiest sigma, then steps that grow quadratically down to 0.

    In units of the process's largest sigma: the flow's own, and sigma / alpha on other paths.

    Args:
        process: whose largest sigma to begin at; None: the model's, or a flow's.
        threshold_noise: how far the even steps go down.
        linear_steps: how many even steps; None: half of all.
    """

    name: ClassVar[str] = "linear_quadratic"
    source: ClassVar[str] = "Genmo 2024, Mochi 1; after Polyak et al. 2024, arXiv:2410.13720"
    threshold_noise: float = 0.025
    linear_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold_noise < 1:
            raise ValueError(f"threshold_noise must lie in (0, 1), got {self.threshold_noise}")

    @property
    def _over(self) -> Scheduler:
        return self.process or FlowScheduler()

    def _lay(self, steps: int) -> list[Level]:
        top = self._over.level(self._over.time_max)
        largest = top.sigma if self.path is FLOW else top.ratio
        if largest == math.inf:
            raise ValueError(
                f"linear_quadratic scales the largest sigma / alpha, which is infinite for "
                f"{type(self._over).__name__}: lay it over a flow process, or one that begins lower"
            )
        levels = [top]
        for gone in self._gone(steps)[1:-1]:
            sigma = largest * (1 - gone)
            snr = math.log((1 - sigma) if self.path is FLOW else 1.0) - math.log(sigma)
            levels.append(self.path.at(snr))
        return [*levels, CLEAN]

    def _gone(self, steps: int) -> list[float]:
        """How far down each level is, from 0 to 1."""
        if steps == 1:
            return [0.0, 1.0]
        even = self.linear_steps or steps // 2
        if even >= steps:
            raise ValueError(
                f"linear_steps {even} leaves none of {steps} steps for the quadratic part: ask for "
                "more steps, or fewer linear ones"
            )
        slope = self.threshold_noise / even
        # The parabola leaves the line with the line's slope and ends at 1.
        bend = 1 - slope * steps
        if slope * (steps - even) + 2 * bend <= 0:
            raise ValueError(
                f"threshold_noise {self.threshold_noise} within {even} of {steps} steps goes down "
                "too fast for the quadratic part to go on: lower it"
            )
        return [
            slope * i + bend * (max(i - even, 0) / (steps - even)) ** 2 for i in range(steps + 1)
        ]
