"""Variance-preserving processes in continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, VP
from k_diffusion.utils.schedules.base import Scheduler, settle


@dataclass(frozen=True)
class CosineScheduler(Scheduler):
    """The cosine schedule in continuous time.

    Args:
        timesteps: what a network with discrete timesteps counts as 1.
        offset: the paper's s, which keeps the noise at time 0 from vanishing too fast.
        time_max: where sampling begins. At 1 the level is pure noise (alpha = 0, exactly), which a
            noise-predicting network cannot use; the default 0.9946 is that of DPM-Solver's
            experiments (Lu et al. 2022, arXiv:2206.00927), where sigma / alpha is about 120.

    A network trained on the discrete cosine schedule counts from the first noisy level: its
    timestep i is time (i + 1) / N here. Give such a one SquaredCosScheduler.
    """

    name: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17"
    timesteps: int = 1000
    offset: float = 0.008
    time_max: float = 0.9946

    def __post_init__(self) -> None:
        settle(self)
        if not 0 < self.time_max <= 1:
            raise ValueError(f"time_max must lie in (0, 1], got {self.time_max}")
        if not 0 < self.offset < 1:
            raise ValueError(f"offset must lie in (0, 1), got {self.offset}")

    @property
    def _origin(self) -> float:
        return self.offset / (1 + self.offset) * math.pi / 2

    def half_log_snr(self, time: Any) -> Any:
        first = self._origin
        left = (1 - time) / (1 + self.offset) * math.pi / 2  # the angle's complement: 0 at time 1
        passed = time / (1 + self.offset) * math.pi / 2
        # With angle a: alpha = cos a / cos a0, sigma² = sin(a - a0) sin(a + a0) / cos² a0.
        return maths.log(maths.sin(left)) - 0.5 * (
            maths.log(maths.sin(passed)) + maths.log(maths.sin(passed + 2 * first))
        )

    def time(self, half_log_snr: Any) -> Any:
        sin0, cos0 = math.sin(self._origin), math.cos(self._origin)
        alpha, sigma = VP.sigma(-half_log_snr), VP.sigma(half_log_snr)
        angle = maths.atan2(maths.sqrt(sin0**2 + (cos0 * sigma) ** 2), alpha * cos0)
        time = angle * ((1 + self.offset) * 2 / math.pi) - self.offset
        return maths.clamp(time, 0.0, self.time_max)


class _Tangent:
    """half log-SNR = shift - log tan(angle), the angle linear in time, between two given ends."""

    def __init__(self, shift: float, low: float, high: float) -> None:
        self.shift = shift
        self.first, last = (math.atan(math.exp(shift - end)) for end in (high, low))
        self.width = last - self.first

    def half_log_snr(self, time: Any) -> Any:
        return self.shift - maths.log(maths.tan(self.first + self.width * time))

    def slope(self, time: Any) -> Any:
        return -2 * self.width / maths.sin(2 * (self.first + self.width * time))

    def time(self, half_log_snr: Any) -> Any:
        off = half_log_snr - self.shift
        angle = maths.atan2(FLOW.sigma(off), FLOW.sigma(-off))
        return maths.clamp((angle - self.first) / self.width, 0.0, 1.0)


def _check_range(scheduler: Any) -> None:
    if not scheduler.log_snr_min < scheduler.log_snr_max:
        raise ValueError(
            f"{type(scheduler).__name__} needs log_snr_min < log_snr_max, got "
            f"{scheduler.log_snr_min} and {scheduler.log_snr_max}"
        )


@dataclass(frozen=True)
class ShiftedCosineScheduler(Scheduler):
    """The cosine schedule of a small image at a larger one: log-SNR moved by 2 log(small / large).

    Args:
        image_size: side of the images, in pixels.
        noise_size: side at which the schedule is the plain cosine one (arXiv:2102.09672).
        log_snr_min: log(alpha² / sigma²) at time 1.
        log_snr_max: log(alpha² / sigma²) at time 0.
        timesteps: what a network with discrete timesteps counts as 1.
    """

    name: ClassVar[str] = "shifted_cosine"
    source: ClassVar[str] = "Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1"
    image_size: int = 256
    noise_size: int = 64
    log_snr_min: float = -15.0
    log_snr_max: float = 15.0
    timesteps: int = 1000
    adds_clean = True

    def __post_init__(self) -> None:
        settle(self)
        _check_range(self)

    @cached_property
    def _curve(self) -> _Tangent:
        shift = math.log(self.noise_size / self.image_size)
        return _Tangent(shift, self.log_snr_min / 2, self.log_snr_max / 2)

    def half_log_snr(self, time: Any) -> Any:
        return self._curve.half_log_snr(time)

    def time(self, half_log_snr: Any) -> Any:
        return self._curve.time(half_log_snr)


@dataclass(frozen=True)
class InterpolatedCosineScheduler(Scheduler):
    """Between two shifted cosine schedules: the lower size's at time 1, the higher's at time 0.

    Args:
        image_size: side of the images, in pixels.
        noise_size_low: side whose cosine schedule holds where there is much noise.
        noise_size_high: side whose cosine schedule holds where there is little.
        log_snr_min: log(alpha² / sigma²) at time 1.
        log_snr_max: log(alpha² / sigma²) at time 0.
        timesteps: what a network with discrete timesteps counts as 1.
    """

    name: ClassVar[str] = "interpolated_cosine"
    source: ClassVar[str] = "Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1"
    image_size: int = 512
    noise_size_low: int = 32
    noise_size_high: int = 256
    log_snr_min: float = -15.0
    log_snr_max: float = 15.0
    timesteps: int = 1000
    adds_clean = True

    def __post_init__(self) -> None:
        settle(self)
        _check_range(self)
        if self.noise_size_low > self.noise_size_high:
            raise ValueError(
                "noise_size_low must not exceed noise_size_high, got "
                f"{self.noise_size_low} and {self.noise_size_high}"
            )

    @cached_property
    def _curves(self) -> tuple[_Tangent, _Tangent]:
        shifts = (
            math.log(n / self.image_size) for n in (self.noise_size_low, self.noise_size_high)
        )
        low, high = (
            _Tangent(shift, self.log_snr_min / 2, self.log_snr_max / 2) for shift in shifts
        )
        return low, high

    def half_log_snr(self, time: Any) -> Any:
        low, high = self._curves
        return time * low.half_log_snr(time) + (1 - time) * high.half_log_snr(time)

    def _slope(self, time: Any) -> Any:
        low, high = self._curves
        # The interpolation's own part: low lies below high, so every term is negative.
        between = low.half_log_snr(time) - high.half_log_snr(time)
        return between + time * low.slope(time) + (1 - time) * high.slope(time)

    @cached_property
    def _start(self) -> maths.Table:
        """A first guess of `time`, near enough for two steps of Newton's method."""
        snrs = maths.linspace(self.log_snr_min / 2, self.log_snr_max / 2, 257)
        times = []
        for snr in snrs[1:-1]:
            low, high = 0.0, 1.0
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if self.half_log_snr(middle) > snr else (low, middle)
            times.append(high)
        return maths.Table(snrs, [1.0, *times, 0.0])

    def time(self, half_log_snr: Any) -> Any:
        snr = maths.clamp(half_log_snr, self.log_snr_min / 2, self.log_snr_max / 2)
        time = self._start(snr)
        for _ in range(3):
            time = time - (self.half_log_snr(time) - snr) / self._slope(time)
        return time


@dataclass(frozen=True)
class SigmoidScheduler(Scheduler):
    """alpha² falls as a piece of the sigmoid function, moved and scaled to go from 1 to 0.

    Args:
        timesteps: what a network with discrete timesteps counts as 1.
        start: where the piece begins, at time 0.
        end: where it ends, at time 1.
        tau: temperature: the sigmoid's argument is divided by it.
        time_max: where sampling begins. At 1 the level is pure noise (alpha = 0, exactly), which a
            noise-predicting network cannot use; at the default sigma / alpha is about 140.
    """

    name: ClassVar[str] = "sigmoid"
    source: ClassVar[str] = (
        "Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972, alg. 1"
    )
    timesteps: int = 1000
    start: float = -3.0
    end: float = 3.0
    tau: float = 0.9
    time_max: float = 0.9998

    def __post_init__(self) -> None:
        settle(self)
        if not self.start < self.end:
            raise ValueError(f"start must be below end, got {self.start} and {self.end}")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")
        if not 0 < self.time_max <= 1:
            raise ValueError(f"time_max must lie in (0, 1], got {self.time_max}")
        if max(abs(self.start), abs(self.end)) / self.tau > 30:
            raise ValueError(
                f"start {self.start} and end {self.end} over tau {self.tau} leave the sigmoid flat "
                "in double precision: keep them within 30"
            )

    def half_log_snr(self, time: Any) -> Any:
        low, high = self.start / self.tau, self.end / self.tau
        passed = (high - low) * time
        left = (high - low) * (1 - time)
        # S(p) - S(q) = sinh((p - q) / 2) / (2 cosh(p / 2) cosh(q / 2)): no cancellation.
        ratio = math.log(math.cosh(low / 2)) - math.log(math.cosh(high / 2))
        return 0.5 * (_log_sinh_half(left) - _log_sinh_half(passed) + ratio)

    def time(self, half_log_snr: Any) -> Any:
        low, high = self.start / self.tau, self.end / self.tau
        noise, signal = (
            FLOW.sigma(2 * half_log_snr),
            FLOW.sigma(-2 * half_log_snr),
        )  # sigma², alpha²
        above = noise / (1 + math.exp(-high)) + signal / (1 + math.exp(-low))
        below = noise / (1 + math.exp(high)) + signal / (1 + math.exp(low))
        time = (maths.log(above) - maths.log(below) - low) / (high - low)
        return maths.clamp(time, 0.0, self.time_max)


def _log_sinh_half(x: Any) -> Any:
    """log(2 sinh(x / 2))."""
    return maths.log(maths.expm1(x)) - x / 2


@dataclass(frozen=True)
class VPScheduler(Scheduler):
    """The continuous variance-preserving SDE, with beta linear in time, then 0.

    Args:
        beta_d: growth of beta over the unit of time.
        beta_min: beta at time 0.
        eps_s: the least time, from which the last step goes to clean data.
        timesteps: what a network with discrete timesteps counts as 1.
    """

    name: ClassVar[str] = "vp"
    source: ClassVar[str] = "Song et al. 2021, arXiv:2011.13456, eq. 32"
    beta_d: float = 19.9
    beta_min: float = 0.1
    eps_s: float = 1e-3
    timesteps: int = 1000
    adds_clean = True

    def __post_init__(self) -> None:
        settle(self)
        if not (self.beta_d >= 0 and self.beta_min >= 0 and self.beta_d + self.beta_min > 0):
            raise ValueError(
                "beta_d and beta_min must be 0 or more, and not both 0, got "
                f"{self.beta_d} and {self.beta_min}"
            )
        if not 0 < self.eps_s < 1:
            raise ValueError(f"eps_s must lie in (0, 1), got {self.eps_s}")
        if not self.beta_d / 2 + self.beta_min < 700:
            raise ValueError(
                f"beta_d {self.beta_d} and beta_min {self.beta_min} leave alpha below double "
                "precision at time 1: keep beta_d / 2 + beta_min under 700"
            )

    @property
    def time_min(self) -> float:  # type: ignore[override]
        return self.eps_s

    def half_log_snr(self, time: Any) -> Any:
        # alpha² = exp(-integral of beta), so (sigma / alpha)² = exp(integral) - 1.
        return -0.5 * maths.log(maths.expm1((self.beta_d / 2 * time + self.beta_min) * time))

    def time(self, half_log_snr: Any) -> Any:
        ends = self.half_log_snr(1.0), self.half_log_snr(self.eps_s)
        integral = maths.log1p(maths.exp(-2 * maths.clamp(half_log_snr, *ends)))
        root = maths.sqrt(self.beta_min**2 + 2 * self.beta_d * integral)
        return maths.clamp(2 * integral / (self.beta_min + root), self.eps_s, 1.0)
