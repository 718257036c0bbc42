"""Variance-exploding schedules: rules for sigma between two noise standard deviations, then 0."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import CLEAN, FLOW, VE, Level
from k_diffusion.utils.schedules.base import Scheduler, settle


@dataclass(frozen=True)
class SigmaRange(Scheduler):
    """Shared by the schedules between two noise standard deviations; abstract."""

    sigma_min: float | None = None
    sigma_max: float | None = None
    path = VE
    adds_clean = True

    def __post_init__(self) -> None:
        settle(self)
        low, high = self._ends
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"{type(self).__name__} needs 0 < sigma_min < sigma_max, got {low} and {high}"
            )

    @property
    def _ends(self) -> tuple[float, float]:
        # EDM's range where nobody says otherwise (Karras et al. 2022, table 1).
        low = 0.002 if self.sigma_min is None else self.sigma_min
        high = 80.0 if self.sigma_max is None else self.sigma_max
        return low, high

    def within(self, process: Scheduler) -> Scheduler:
        low, high = (
            maths.exp(-process.half_log_snr(time)) for time in (process.time_min, process.time_max)
        )
        if isinstance(process, SigmaRange):
            low, high = process._ends  # to the last digit
        changes = {}
        if self.sigma_min is None and low > 0:
            changes["sigma_min"] = low
        if self.sigma_max is None and high < math.inf:
            changes["sigma_max"] = high
        return dataclasses.replace(self, **changes)

    def _lay(self, steps: int) -> list[Level]:
        (low, high), levels = self._ends, super()._lay(steps)
        levels[0] = Level(1.0, high)  # both to the last digit, whatever the rule between them
        return levels if steps == 1 else [*levels[:-2], Level(1.0, low), CLEAN]


@dataclass(frozen=True)
class KarrasScheduler(SigmaRange):
    """Even steps in sigma^(1/rho), then 0.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
        rho: larger spends more steps at little noise.
    """

    name: ClassVar[str] = "karras"
    source: ClassVar[str] = "Karras et al. 2022, arXiv:2206.00364, eq. 5"
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, got {self.rho}")
        low, high = self._ends
        if self.rho > 1e6:
            raise ValueError(
                f"rho {self.rho:g} leaves sigma^(1/rho) too few digits: give 1e6 at most, or use "
                "the exponential schedule, which is the limit"
            )
        if max(abs(math.log(low)), abs(math.log(high))) > 700 * self.rho:
            raise ValueError(
                f"rho {self.rho:g} is too small: sigma^(1/rho) is beyond floating point for sigma "
                f"from {low} to {high}"
            )

    def half_log_snr(self, time: Any) -> Any:
        low, high = (sigma ** (1 / self.rho) for sigma in self._ends)
        return -self.rho * maths.log(low * (1 - time) + high * time)

    def time(self, half_log_snr: Any) -> Any:
        low, high = (sigma ** (1 / self.rho) for sigma in self._ends)
        root = maths.exp(-half_log_snr / self.rho)
        return maths.clamp((root - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class ExponentialScheduler(SigmaRange):
    """Even steps in log sigma, then 0.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
    """

    name: ClassVar[str] = "exponential"
    source: ClassVar[str] = "Song et al. 2021, arXiv:2011.13456, eq. 9"

    def half_log_snr(self, time: Any) -> Any:
        low, high = map(math.log, self._ends)
        return -(low * (1 - time) + high * time)

    def time(self, half_log_snr: Any) -> Any:
        low, high = map(math.log, self._ends)
        return maths.clamp((-half_log_snr - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class RectifiedScheduler(SigmaRange):
    """Even steps in sigma / (1 + sigma), the sigma of flow coordinates, then 0.

    The levels of an unshifted flow for a variance-exploding model, whose sigma has an end.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
    """

    name: ClassVar[str] = "rectified"
    source: ClassVar[str] = "Liu et al. 2022, arXiv:2209.03003, its even times"

    def half_log_snr(self, time: Any) -> Any:
        low, high = (sigma / (1 + sigma) for sigma in self._ends)
        u = low * (1 - time) + high * time
        return maths.log(1 - u) - maths.log(u)

    def time(self, half_log_snr: Any) -> Any:
        low, high = (sigma / (1 + sigma) for sigma in self._ends)
        return maths.clamp((FLOW.sigma(half_log_snr) - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class PolyexponentialScheduler(SigmaRange):
    """Steps in log sigma that go as a power of even ones, then 0.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
        rho: 1 is the exponential schedule; larger spends more steps at little noise.
    """

    name: ClassVar[str] = "polyexponential"
    source: ClassVar[str] = "Crowson 2022, k-diffusion's get_sigmas_polyexponential"
    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, got {self.rho}")

    def half_log_snr(self, time: Any) -> Any:
        low, high = map(math.log, self._ends)
        return -(low + (high - low) * time**self.rho)

    def time(self, half_log_snr: Any) -> Any:
        low, high = map(math.log, self._ends)
        return maths.clamp((-half_log_snr - low) / (high - low), 0.0, 1.0) ** (1 / self.rho)


@dataclass(frozen=True)
class LaplaceScheduler(SigmaRange):
    """Even quantiles of a Laplace distribution of log sigma, limited to a range, then 0.

    Quantiles beyond the range lie at its end, and are laid once: with many steps there are fewer
    than asked for.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
        mu: the log sigma round which the levels crowd.
        beta: the distribution's scale, in units of log sigma.
    """

    name: ClassVar[str] = "laplace"
    source: ClassVar[str] = "Hang et al. 2024, arXiv:2407.03297, with the defaults of ComfyUI"
    mu: float = 0.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 < self.time_min < self.time_max < 1:
            raise ValueError(
                f"mu {self.mu} and beta {self.beta} leave nothing of the Laplace distribution "
                "between sigma_min and sigma_max: move mu to log sigma there, or raise beta"
            )

    @property
    def time_min(self) -> float:  # type: ignore[override]
        return self._share(math.log(self._ends[0]))

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return self._share(math.log(self._ends[1]))

    def _share(self, log_sigma: Any) -> Any:
        """The share of the distribution below log_sigma."""
        z = (log_sigma - self.mu) / self.beta
        below, above = maths.clamp(z, -math.inf, 0.0), maths.clamp(z, 0.0, math.inf)
        return 0.5 * maths.exp(below) + 0.5 * (1 - maths.exp(-above))

    def half_log_snr(self, time: Any) -> Any:
        # One of the two logarithms is 0: the first above the median, the second below it.
        below = maths.log(maths.clamp(2 * time, 0.0, 1.0))
        above = maths.log(maths.clamp(2 * (1 - time), 0.0, 1.0))
        return -(self.mu + self.beta * (below - above))

    def time(self, half_log_snr: Any) -> Any:
        return maths.clamp(self._share(-half_log_snr), self.time_min, self.time_max)

    def _lay(self, steps: int) -> list[Level]:
        even = maths.linspace(1.0, 0.0, steps)
        times = dict.fromkeys(maths.clamp(time, self.time_min, self.time_max) for time in even)
        return [*map(self.level, times), CLEAN]


@dataclass(frozen=True)
class KLOptimalScheduler(SigmaRange):
    """Even steps in atan(sigma / sigma_data), then 0: the least KL divergence that Euler's method
    can reach on Gaussian data.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
        sigma_data: standard deviation of the data.
    """

    name: ClassVar[str] = "kl_optimal"
    source: ClassVar[str] = "Sabour et al. 2024, arXiv:2404.14507, theorem 3.1"

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {self.sigma_data}")

    @property
    def _angles(self) -> tuple[float, float]:
        low, high = self._ends
        return math.atan(low / self.sigma_data), math.atan(high / self.sigma_data)

    def half_log_snr(self, time: Any) -> Any:
        low, high = self._angles
        tangent = maths.tan(low * (1 - time) + high * time)
        return -maths.log(tangent) - math.log(self.sigma_data)

    def time(self, half_log_snr: Any) -> Any:
        low, high = self._angles
        snr = half_log_snr + math.log(self.sigma_data)
        # Sine and cosine up to a factor: finite at both ends, where sigma / alpha is not.
        angle = maths.atan2(FLOW.sigma(snr), FLOW.sigma(-snr))
        return maths.clamp((angle - low) / (high - low), 0.0, 1.0)


ALIGN_YOUR_STEPS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""sigma / alpha optimised for ten steps of each model (Sabour et al. 2024, table 3)."""


@dataclass(frozen=True)
class AlignYourStepsScheduler(Scheduler):
    """Levels optimised for one model's ten steps, interpolated in log sigma to any number.

    The last of the table's levels is 0 instead, as its authors use it.

    Args:
        table: "sd15", "sdxl", "deepfloyd" or "svd": the model that it was made for.
    """

    name: ClassVar[str] = "align_your_steps"
    source: ClassVar[str] = "Sabour et al. 2024, arXiv:2404.14507, table 3"
    table: str = "sd15"
    path = VE

    def __post_init__(self) -> None:
        if not isinstance(self.table, str) or self.table not in ALIGN_YOUR_STEPS:
            raise ValueError(maths.unknown("align_your_steps table", self.table, ALIGN_YOUR_STEPS))

    @property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        return _INTERPOLATED[self.table]

    def half_log_snr(self, time: Any) -> Any:
        return self._tables[0](time)

    def time(self, half_log_snr: Any) -> Any:
        return self._tables[1](half_log_snr)

    def _lay(self, steps: int) -> list[Level]:
        return [*super()._lay(steps)[:-1], CLEAN]


def _interpolated(sigmas: tuple[float, ...]) -> tuple[maths.Table, maths.Table]:
    times = maths.linspace(1.0, 0.0, len(sigmas))
    snrs = [-math.log(sigma) for sigma in sigmas]
    return maths.Table(times[::-1], snrs[::-1]), maths.Table(snrs, times)


_INTERPOLATED = {name: _interpolated(sigmas) for name, sigmas in ALIGN_YOUR_STEPS.items()}
