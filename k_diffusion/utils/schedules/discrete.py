"""Discrete variance-preserving processes: betas at N timesteps, as networks are trained on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, VP
from k_diffusion.utils.schedules.base import Scheduler, settle


def cumprod_of_betas(betas: Sequence[float]) -> list[float]:
    """alpha² at each timestep: the cumulative product of 1 - beta."""
    product, products = 1.0, []
    for i, beta in enumerate(betas):
        if not 0 < beta < 1:
            raise ValueError(f"beta {i} is {beta}; each must lie strictly between 0 and 1")
        product *= 1 - beta
        products.append(product)
    return products


def tables_of_alphas_cumprod(products: Sequence[float]) -> tuple[maths.Table, maths.Table]:
    """Time -> half log-SNR, and back, of a discrete variance-preserving process."""
    for i, (before, after) in enumerate(zip([1.0, *products], products, strict=False)):
        if not 0 < after < before:
            raise ValueError(
                f"alphas_cumprod must decrease strictly within (0, 1), but entry {i} is {after}"
            )
    # alpha² = a and sigma² = 1 - a, so log(alpha / sigma) = log(a / (1 - a)) / 2.
    snr = [0.5 * (math.log(a) - math.log1p(-a)) for a in products]
    times = [i / len(snr) for i in range(len(snr))]
    return maths.Table(times, snr), maths.Table(snr[::-1], times[::-1])


class Discrete(Scheduler):
    """Shared by the schedules given by a cumulative product of 1 - beta at N timesteps; abstract.

    Between timesteps log-SNR is interpolated linearly; timestep i has time i / N.
    """

    path = VP
    adds_clean = True
    discrete = True

    def _alphas_cumprod(self) -> Sequence[float]:
        raise NotImplementedError

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return (self.timesteps - 1) / self.timesteps

    @cached_property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        return tables_of_alphas_cumprod(self._alphas_cumprod())

    def half_log_snr(self, time: Any) -> Any:
        return self._tables[0](time)

    def time(self, half_log_snr: Any) -> Any:
        return self._tables[1](half_log_snr)


def _at_least_two(timesteps: int) -> None:
    if timesteps < 2:
        raise ValueError(f"timesteps must be at least 2, got {timesteps}")


@dataclass(frozen=True)
class _BetaRange(Discrete):
    """Shared by the schedules between a first and a last beta."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        settle(self)
        _at_least_two(self.timesteps)
        if not self.beta_start <= self.beta_end:
            raise ValueError(
                f"beta_start must not exceed beta_end, got {self.beta_start} and {self.beta_end}"
            )
        _ = self._tables

    @property
    def _ends(self) -> tuple[float, float]:
        scale = 1000 / self.timesteps
        return scale * self.beta_start, scale * self.beta_end


@dataclass(frozen=True)
class LinearScheduler(_BetaRange):
    """DDPM's linear betas.

    Args:
        timesteps: number N of discrete timesteps; timestep i has time i / N.
        beta_start: first beta, for N = 1000; for another N it is scaled by 1000 / N, so that the
            process covers the same levels.
        beta_end: last beta, likewise.
    """

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "Ho et al. 2020, arXiv:2006.11239, section 4"

    def _alphas_cumprod(self) -> Sequence[float]:
        return cumprod_of_betas(maths.linspace(*self._ends, self.timesteps))


@dataclass(frozen=True)
class ScaledLinearScheduler(_BetaRange):
    """Stable Diffusion's betas: even steps in the square root of beta.

    Args:
        timesteps: number N of discrete timesteps; timestep i has time i / N.
        beta_start: first beta, for N = 1000; for another N it is scaled by 1000 / N, so that the
            process covers the same levels.
        beta_end: last beta, likewise.
    """

    name: ClassVar[str] = "scaled_linear"
    source: ClassVar[str] = "Rombach et al. 2022, arXiv:2112.10752, as published with the weights"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def _alphas_cumprod(self) -> Sequence[float]:
        if not self.beta_start > 0:
            raise ValueError(f"beta_start must be above 0, got {self.beta_start}")
        first, last = map(math.sqrt, self._ends)
        return cumprod_of_betas([b * b for b in maths.linspace(first, last, self.timesteps)])


@dataclass(frozen=True)
class SquaredCosScheduler(Discrete):
    """The discrete cosine schedule: betas from the ratio of squared cosines, with a largest beta.

    `cosine` is the same in continuous time, without the largest beta.

    Args:
        timesteps: number N of discrete timesteps; timestep i has time i / N and the cosine's level
            at (i + 1) / N.
        offset: the paper's s, which keeps the first beta from being too small.
        max_beta: limit of each beta; without it the last one would be 1.
    """

    name: ClassVar[str] = "squaredcos"
    source: ClassVar[str] = "Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17"
    timesteps: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        settle(self)
        _at_least_two(self.timesteps)
        if not 0 < self.offset < 1:
            raise ValueError(f"offset must lie in (0, 1), got {self.offset}")
        if not 0 < self.max_beta < 1:
            raise ValueError(f"max_beta must lie in (0, 1), got {self.max_beta}")
        _ = self._tables

    def _alphas_cumprod(self) -> Sequence[float]:
        def angle(i: int) -> float:
            return (i / self.timesteps + self.offset) / (1 + self.offset) * math.pi / 2

        betas = []
        for i in range(self.timesteps):
            now, then = angle(i), angle(i + 1)
            # 1 - cos²(then) / cos²(now), without the cancellation.
            beta = math.sin(then - now) * math.sin(then + now) / math.cos(now) ** 2
            betas.append(min(beta, self.max_beta))
        return cumprod_of_betas(betas)


@dataclass(frozen=True)
class ZeroTerminalScheduler(Scheduler):
    """A discrete process shifted and scaled in alpha so that its last timestep is pure noise.

    Its first level is alpha = 0 exactly, where a noise-predicting network has no estimate: it is
    for v, x0 and flow networks. The first timestep keeps its level.

    Args:
        process: the discrete process to rescale, or its name; None: the model's if that is
            discrete, or DDPM's linear one.
    """

    name: ClassVar[str] = "zero_terminal_snr"
    source: ClassVar[str] = "Lin et al. 2023, arXiv:2305.08891, algorithm 1"
    process: Scheduler | None = None
    path = VP
    adds_clean = True
    discrete = True

    def __post_init__(self) -> None:
        settle(self)
        if self.process is not None and not self.process.discrete:
            raise ValueError(
                f"zero_terminal_snr rescales a discrete process, and {type(self.process).__name__} "
                "is none: give linear, scaled_linear, squaredcos or CustomScheduler(betas=...)"
            )

    @property
    def _over(self) -> Scheduler:
        return self.process or LinearScheduler()

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        return self._over.timesteps

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return self._over.time_max

    def within(self, process: Scheduler) -> Scheduler:
        fits = self.process is None and process.discrete
        return dataclasses.replace(self, process=process) if fits else self

    @cached_property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        over = self._over
        times = [i / over.timesteps for i in range(over.timesteps)]
        alphas = [over.level(time).alpha for time in times]
        first, last = alphas[0], alphas[-1]
        alphas = [(alpha - last) * first / (first - last) for alpha in alphas]
        # Interpolated in sigma / (alpha + sigma), which is finite at alpha = 0, as log-SNR isn't.
        shares = [VP.alpha(alpha) / (alpha + VP.alpha(alpha)) for alpha in alphas]
        return maths.Table(times, shares), maths.Table(shares, times)

    def half_log_snr(self, time: Any) -> Any:
        share = self._tables[0](time)
        return maths.log(1 - share) - maths.log(share)

    def time(self, half_log_snr: Any) -> Any:
        return self._tables[1](FLOW.sigma(half_log_snr))
