"""A schedule from numbers or a function of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, VP, Level, Levels, Path, make_path
from k_diffusion.utils.schedules.base import Scheduler
from k_diffusion.utils.schedules.discrete import cumprod_of_betas, tables_of_alphas_cumprod


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
    source: ClassVar[str] = "yours"
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
        if self.function is not None and not callable(self.function):
            raise ValueError(f"function must be a function of the time, got {self.function!r}")
        if self.function is None:
            numbers = _numbers(given[0], getattr(self, given[0]))
            if len(numbers) < 2:
                raise ValueError(f"{given[0]} needs at least 2 numbers, got {len(numbers)}")
            object.__setattr__(self, given[0], numbers)
        make_path(self.path_name)
        _ = self._tables

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        return self.betas is not None or self.alphas_cumprod is not None

    @property
    def path(self) -> Path:  # type: ignore[override]
        return VP if self.discrete else make_path(self.path_name)

    @property
    def adds_clean(self) -> bool:  # type: ignore[override]
        return self.discrete

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        return len(self.betas or self.alphas_cumprod or range(1000))

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return (self.timesteps - 1) / self.timesteps if self.discrete else 1.0

    @cached_property
    def _tables(self) -> tuple[maths.Table, maths.Table]:
        if self.discrete:
            products = (
                cumprod_of_betas(self.betas) if self.betas else list(self.alphas_cumprod or ())
            )
            return tables_of_alphas_cumprod(products)
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
        if self.discrete:
            return self._tables[0](time)
        if self.function is not None and maths.is_number(time):
            sigma = float(self.function(time))
            return Level(self.path.alpha(sigma), sigma).half_log_snr
        share = self._tables[0](time)
        return maths.log(1 - share) - maths.log(share)

    def time(self, half_log_snr: Any) -> Any:
        """The inverse of `half_log_snr`; exact for floats, and for the tensors of all but a
        `function`, whose times are interpolated between 4097 points (to about 1e-7)."""
        if self.discrete:
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


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """The values as plain floats; text is none, though it can be gone through."""
    try:
        plain = [] if isinstance(values, (str, bytes)) else list(values)
        if not plain or any(isinstance(value, (str, bool)) for value in plain):
            raise TypeError
        return tuple(float(value) for value in plain)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}") from None
