"""Noise schedules: how noisy the data is at each time, and which levels a sampler visits.

A scheduler has two uses. In training it is the *process* that the network learns: it tells the
network's time for any level. In sampling it *lays levels*: `steps + 1` of them, noisy to clean.
Everything is float64 on the host; `time` and `half_log_snr` also take tensors.

Time is in [0, 1], 0 nearest to the clean data. A network that counts discrete timesteps sees
`time * timesteps`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import CLEAN, FLOW, VE, VP, Level, Levels, Path, make_path

SCHEDULERS: dict[str, type[Scheduler]] = {}


class Scheduler:
    """A noise schedule. To add one: subclass, give `path`, `half_log_snr` and `time`."""

    name: ClassVar[str] = ""
    path: Path = VP
    timesteps: int = 1000
    time_min: float = 0.0
    time_max: float = 1.0
    adds_clean: ClassVar[bool] = False
    """Whether the schedule stops above sigma = 0: then the clean level is laid after it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            SCHEDULERS[cls.name] = cls

    def half_log_snr(self, time: Any) -> Any:
        """log(alpha / sigma) at a time in [time_min, time_max] (a float, or a tensor)."""
        raise NotImplementedError

    def time(self, half_log_snr: Any) -> Any:
        """The inverse of `half_log_snr`; levels outside the schedule get its nearest end."""
        raise NotImplementedError

    def level(self, time: float) -> Level:
        """The level at a time in [time_min, time_max]."""
        if not self.time_min <= time <= self.time_max:
            raise ValueError(
                f"time {time} is outside {type(self).__name__}'s [{self.time_min}, {self.time_max}]"
            )
        return self.path.at(self.half_log_snr(float(time)))

    def levels(self, steps: int) -> Levels:
        """`steps + 1` levels on `self.path`, from the noisiest to the cleanest.

        Raises:
            ValueError: steps is not a whole number of at least 1.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        return Levels(self._lay(steps), self.path)

    def _lay(self, steps: int) -> list[Level]:
        times = maths.linspace(self.time_max, self.time_min, steps + (not self.adds_clean))
        return [self.level(time) for time in times] + [CLEAN] * self.adds_clean

    def within(self, process: Scheduler) -> Scheduler:
        """This schedule with its open ends (a sigma_min of None, say) taken from a process."""
        return self

    def to_config(self) -> dict[str, Any]:
        """Name and options as plain JSON data: `make_scheduler(**config)` gives an equal one."""
        if not dataclasses.is_dataclass(self) or SCHEDULERS.get(self.name) is not type(self):
            raise ValueError(f"{type(self).__name__} cannot be saved: it isn't a named scheduler")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: v for k, v in options.items() if v is not None}}


class _Discrete(Scheduler):
    """Shared by the schedules given by a cumulative product of 1 - beta at N timesteps.

    Between timesteps log-SNR is interpolated linearly; timestep i has time i / N.
    """

    path = VP
    adds_clean = True

    def _alphas_cumprod(self) -> Sequence[float]:
        raise NotImplementedError

    @cached_property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        return _tables_of_alphas_cumprod(self._alphas_cumprod())

    def half_log_snr(self, time: Any) -> Any:
        return self._tables[0](time)

    def time(self, half_log_snr: Any) -> Any:
        return self._tables[1](half_log_snr)


def _settle(scheduler: Any) -> None:
    """Makes the numbers of a frozen scheduler plain floats and whole numbers, or refuses them."""
    for field in dataclasses.fields(scheduler):
        value = getattr(scheduler, field.name)
        if value is None:
            continue
        try:
            plain = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{field.name} must be a number, got {value!r}") from None
        if field.name == "timesteps":
            if plain != int(plain) or plain < 1:
                raise ValueError(f"timesteps must be a whole number of at least 1, got {value!r}")
            plain = int(plain)
        object.__setattr__(scheduler, field.name, plain)


def _cumprod_of_betas(betas: Sequence[float]) -> list[float]:
    product, products = 1.0, []
    for i, beta in enumerate(betas):
        if not 0 < beta < 1:
            raise ValueError(f"beta {i} is {beta}; each must lie strictly between 0 and 1")
        product *= 1 - beta
        products.append(product)
    return products


def _tables_of_alphas_cumprod(products: Sequence[float]) -> tuple[maths.Table, maths.Table]:
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


@dataclass(frozen=True)
class LinearScheduler(_Discrete):
    """DDPM's linear betas (Ho et al. 2020, arXiv:2006.11239, section 4).

    Args:
        timesteps: number N of discrete timesteps; timestep i has time i / N.
        beta_start: first beta, for N = 1000; for another N it is scaled by 1000 / N, so that the
            process covers the same levels.
        beta_end: last beta, likewise.
    """

    name: ClassVar[str] = "linear"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        _settle(self)
        if self.timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {self.timesteps}")
        if not self.beta_start <= self.beta_end:
            raise ValueError(
                f"beta_start must not exceed beta_end, got {self.beta_start} and {self.beta_end}"
            )
        _ = self._tables

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return (self.timesteps - 1) / self.timesteps

    def _alphas_cumprod(self) -> Sequence[float]:
        scale = 1000 / self.timesteps
        ends = scale * self.beta_start, scale * self.beta_end
        return _cumprod_of_betas(maths.linspace(*ends, self.timesteps))


@dataclass(frozen=True)
class CosineScheduler(Scheduler):
    """The cosine schedule in continuous time (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).

    Args:
        timesteps: what a network with discrete timesteps counts as 1.
        offset: the paper's s, which keeps the noise at time 0 from vanishing too fast.
        time_max: where sampling begins. At 1 the level is pure noise (alpha = 0, exactly), which a
            noise-predicting network cannot use; the default 0.9946 is that of DPM-Solver's
            experiments (Lu et al. 2022, arXiv:2206.00927), where sigma / alpha is about 120.

    A network trained on the discrete cosine schedule counts from the first noisy level: its
    timestep i is time (i + 1) / N here. Give such a one CustomScheduler(alphas_cumprod=...).
    """

    name: ClassVar[str] = "cosine"
    timesteps: int = 1000
    offset: float = 0.008
    time_max: float = 0.9946

    def __post_init__(self) -> None:
        _settle(self)
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


@dataclass(frozen=True)
class _SigmaRange(Scheduler):
    """Shared by the variance-exploding schedules between two noise standard deviations."""

    sigma_min: float | None = None
    sigma_max: float | None = None
    path = VE
    adds_clean = True

    def __post_init__(self) -> None:
        _settle(self)
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
        high = process.half_log_snr(process.time_max)
        low = process.half_log_snr(process.time_min)
        changes = {}
        if self.sigma_min is None and low < math.inf:
            changes["sigma_min"] = math.exp(-low)
        if self.sigma_max is None and high > -math.inf:
            changes["sigma_max"] = math.exp(-high)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class KarrasScheduler(_SigmaRange):
    """Even steps in sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5), then 0.

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
        rho: larger spends more steps at little noise.
    """

    name: ClassVar[str] = "karras"
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, got {self.rho}")

    def half_log_snr(self, time: Any) -> Any:
        low, high = (sigma ** (1 / self.rho) for sigma in self._ends)
        return -self.rho * maths.log(low * (1 - time) + high * time)

    def time(self, half_log_snr: Any) -> Any:
        low, high = (sigma ** (1 / self.rho) for sigma in self._ends)
        root = maths.exp(-half_log_snr / self.rho)
        return maths.clamp((root - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class ExponentialScheduler(_SigmaRange):
    """Even steps in log sigma, then 0 (Song et al. 2021, arXiv:2011.13456, eq. 9).

    Args:
        sigma_min: last noise level above 0, in data units; None: the model's, or 0.002.
        sigma_max: first noise level, in data units; None: the model's, or 80.
    """

    name: ClassVar[str] = "exponential"

    def half_log_snr(self, time: Any) -> Any:
        low, high = map(math.log, self._ends)
        return -(low * (1 - time) + high * time)

    def time(self, half_log_snr: Any) -> Any:
        low, high = map(math.log, self._ends)
        return maths.clamp((-half_log_snr - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class FlowScheduler(Scheduler):
    """Rectified flow: time is sigma, from pure noise (exactly) to data.

    Args:
        shift: levels are laid at shift·u / (1 + (shift - 1)·u) for even u; above 1 it spends more
            steps at much noise, as larger images need (Esser et al. 2024, arXiv:2403.03206,
            eq. 23). It moves the levels only: the network's time for a level stays its sigma.
        timesteps: what a network with discrete timesteps counts as sigma = 1.
    """

    name: ClassVar[str] = "flow"
    shift: float = 1.0
    timesteps: int = 1000
    path = FLOW

    def __post_init__(self) -> None:
        _settle(self)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0, got {self.shift}")

    def half_log_snr(self, time: Any) -> Any:
        return maths.log(1 - time) - maths.log(time)

    def time(self, half_log_snr: Any) -> Any:
        return FLOW.sigma(half_log_snr)

    def _lay(self, steps: int) -> list[Level]:
        even = maths.linspace(1.0, 0.0, steps + 1)
        sigmas = [self.shift * u / (1 + (self.shift - 1) * u) for u in even]
        return [
            Level((1 - u) / (1 + (self.shift - 1) * u), s)
            for u, s in zip(even, sigmas, strict=True)
        ]


@dataclass(frozen=True)
class CustomScheduler(Scheduler):
    """A schedule from your own numbers or your own function; give exactly one of the four.

    Args:
        betas: a discrete variance-preserving process; timestep i of N has time i / N.
        alphas_cumprod: the same, by the cumulative product of 1 - beta (alpha²).
        sigmas: noise levels of `path_name`, noisy to clean, laid as they are for `len - 1` steps
            and interpolated for any other number. A final 0 is yours to give.
        function: time in [0, 1] -> sigma of `path_name`, strictly increasing.
        path_name: "ve", "vp" or "flow": the coordinates of `sigmas` and `function`.
    """

    name: ClassVar[str] = "custom"
    betas: Sequence[float] | None = None
    alphas_cumprod: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    function: Callable[[float], float] | None = None
    path_name: str = "ve"

    def __post_init__(self) -> None:
        given = [
            n
            for n in ("betas", "alphas_cumprod", "sigmas", "function")
            if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "CustomScheduler takes exactly one of betas, alphas_cumprod, sigmas and function, "
                f"got {' and '.join(given) or 'none'}"
            )
        if not self.function:
            numbers = tuple(float(v) for v in getattr(self, given[0]))
            if len(numbers) < 2:
                raise ValueError(f"{given[0]} needs at least 2 numbers, got {len(numbers)}")
            object.__setattr__(self, given[0], numbers)
        make_path(self.path_name)
        _ = self._tables

    @property
    def _discrete(self) -> bool:
        return self.betas is not None or self.alphas_cumprod is not None

    @property
    def path(self) -> Path:  # type: ignore[override]
        return VP if self._discrete else make_path(self.path_name)

    @property
    def adds_clean(self) -> bool:  # type: ignore[override]
        return self._discrete

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        return len(self.betas or self.alphas_cumprod or range(1000))

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return (self.timesteps - 1) / self.timesteps if self._discrete else 1.0

    @cached_property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        if self._discrete:
            products = (
                _cumprod_of_betas(self.betas) if self.betas else list(self.alphas_cumprod or ())
            )
            return _tables_of_alphas_cumprod(products)
        # Interpolated in sigma / (alpha + sigma), which is finite, and exact, at both ends of any
        # path: 1 for pure noise and 0 for clean data, where log-SNR is infinite.
        if self.function is not None:
            times = maths.linspace(0.0, 1.0, 4097)
            sigmas = [float(self.function(time)) for time in times]
        else:
            sigmas = list(self.sigmas or ())[::-1]
            times = maths.linspace(0.0, 1.0, len(sigmas))
        for low, high in itertools.pairwise(sigmas):
            if not low < high:
                what = "function must increase" if self.function else "sigmas must decrease"
                raise ValueError(f"{what} strictly, got {high} next to {low}")
        Levels.from_sigmas(sigmas[::-1], self.path)  # refuses what the path does not hold
        shares = [sigma / (self.path.alpha(sigma) + sigma) for sigma in sigmas]
        return maths.Table(times, shares), maths.Table(shares, times)

    def half_log_snr(self, time: Any) -> Any:
        if self._discrete:
            return self._tables[0](time)
        if self.function is not None and maths.is_number(time):
            sigma = float(self.function(time))
            return Level(self.path.alpha(sigma), sigma).half_log_snr
        share = self._tables[0](time)
        return maths.log(1 - share) - maths.log(share)

    def time(self, half_log_snr: Any) -> Any:
        """The inverse of `half_log_snr`; exact for floats, and for the tensors of all but a
        `function`, whose times are interpolated between 4097 points (to about 1e-7)."""
        if self._discrete:
            return self._tables[1](half_log_snr)
        if self.function is None or not maths.is_number(half_log_snr):
            return self._tables[1](FLOW.sigma(half_log_snr))
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high:
            if self.half_log_snr(middle) > half_log_snr:
                low = middle
            else:
                high = middle
        return high

    def _lay(self, steps: int) -> list[Level]:
        if self.sigmas is not None and steps == len(self.sigmas) - 1:
            return list(Levels.from_sigmas(self.sigmas, self.path))
        return super()._lay(steps)

    def to_config(self) -> dict[str, Any]:
        if self.function is not None:
            raise ValueError(
                "a CustomScheduler made from a function cannot be saved: give its sigmas instead"
            )
        return super().to_config()


def make_scheduler(name: str | Scheduler, **options: Any) -> Scheduler:
    """A scheduler by name, as in `make_scheduler("karras", rho=5.0)`; a scheduler passes through.

    Raises:
        ValueError: unknown name or option (the nearest known one is offered).
    """
    if isinstance(name, Scheduler):
        return name
    if name not in SCHEDULERS:
        raise ValueError(maths.unknown("scheduler", name, SCHEDULERS))
    kind = SCHEDULERS[name]
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ValueError(maths.unknown(f"option of scheduler {name!r},", option, known))
    return kind(**options)
