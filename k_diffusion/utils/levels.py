"""Noise levels: x = alpha · x0 + sigma · eps, and the paths on which levels lie.

Signal scale and noise standard deviation travel together, so that every sampler is written once
for variance-exploding, variance-preserving and flow models. They differ by a rescaling of x at
equal log-SNR (Kingma et al. 2021, arXiv:2107.00630, section 5; Karras et al. 2022,
arXiv:2206.00364, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from k_diffusion.utils import maths


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level: signal scale `alpha` and noise standard deviation `sigma`, in data units."""

    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma): +inf for clean data, -inf for pure noise."""
        return maths.log(self.alpha) - maths.log(self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise standard deviation once the signal is scaled to 1."""
        return self.sigma / self.alpha if self.alpha else math.inf

    def __str__(self) -> str:
        return f"(alpha {self.alpha:.6g}, sigma {self.sigma:.6g})"


CLEAN = Level(1.0, 0.0)


class Path:
    """A curve of levels: alpha as a function of sigma. Use the three constants VE, VP and FLOW."""

    name: str

    def alpha(self, sigma: Any) -> Any:
        """The signal scale at `sigma` (a float, or a tensor of any shape)."""
        raise NotImplementedError

    def sigma(self, half_log_snr: Any) -> Any:
        """The noise standard deviation at log(alpha / sigma) (a float, or a tensor)."""
        raise NotImplementedError

    def at(self, half_log_snr: float) -> Level:
        """The level of this path with the given log(alpha / sigma), to full float64 precision.

        Raises:
            ValueError: the path does not reach it (pure noise on the variance-exploding path).
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:  # copies and pickles stay the one constant
        return self.name.upper()


class _VarianceExploding(Path):
    name = "ve"

    def alpha(self, sigma: Any) -> Any:
        return 1.0 if maths.is_number(sigma) else sigma.new_ones(()).expand(sigma.shape)

    def sigma(self, half_log_snr: Any) -> Any:
        return maths.exp(-half_log_snr)

    def at(self, half_log_snr: float) -> Level:
        if half_log_snr == -math.inf:
            raise ValueError(
                "pure noise (alpha = 0) has no place among variance-exploding levels, where its "
                "sigma is infinite: begin at a level with some signal, or use a model whose "
                "coordinates reach alpha = 0 (flow, or v-prediction)"
            )
        return Level(1.0, maths.exp(-half_log_snr))


class _VariancePreserving(Path):
    name = "vp"

    def alpha(self, sigma: Any) -> Any:
        # (1 - s)(1 + s), not 1 - s²: near s = 1 the square would lose half of the digits.
        return maths.sqrt(maths.clamp((1 - sigma) * (1 + sigma), 0.0, 1.0))

    def sigma(self, half_log_snr: Any) -> Any:
        return 1 / maths.sqrt(1 + maths.exp(2 * half_log_snr))

    def at(self, half_log_snr: float) -> Level:
        return Level(self.sigma(-half_log_snr), self.sigma(half_log_snr))


class _Flow(Path):
    name = "flow"

    def alpha(self, sigma: Any) -> Any:
        return 1 - sigma

    def sigma(self, half_log_snr: Any) -> Any:
        return 1 / (1 + maths.exp(half_log_snr))

    def at(self, half_log_snr: float) -> Level:
        return Level(self.sigma(-half_log_snr), self.sigma(half_log_snr))


VE: Path = _VarianceExploding()
"""Variance exploding: alpha = 1 (Karras et al. 2022)."""
VP: Path = _VariancePreserving()
"""Variance preserving: alpha² + sigma² = 1 (Ho et al. 2020)."""
FLOW: Path = _Flow()
"""Straight-line flow: alpha + sigma = 1 (Lipman et al. 2022, Liu et al. 2022)."""
PATHS: dict[str, Path] = {path.name: path for path in (VE, VP, FLOW)}


def make_path(name: str | Path) -> Path:
    """The path called "ve", "vp" or "flow".

    Raises:
        ValueError: no path has that name.
    """
    if isinstance(name, Path):
        return name
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(maths.unknown("path", name, PATHS))
    return PATHS[name]


class Levels(Sequence[Level]):
    """Levels on one path, strictly from noisy to clean: what a solver walks along.

    Args:
        levels: at least one level; log(alpha/sigma) strictly increases along them. The first may
            be pure noise (alpha = 0), the last clean data (sigma = 0).
        path: the path on which they (and the levels between them) lie.
        inverted: they go strictly from clean to noisy instead; see `flipped`.

    Raises:
        ValueError: a level is not finite, negative or off its path, the order is not strict, or
            two levels have one sigma.
    """

    __slots__ = ("_hash", "_levels", "inverted", "path")
    churned = False
    """Whether steps begin at a noisier level than the last one ended at (see `Churn`)."""

    def __init__(self, levels: Iterable[Level], path: Path = VE, *, inverted: bool = False) -> None:
        self._levels = tuple(levels)
        self.path = path
        self.inverted = inverted
        self._hash = hash((self._levels, path.name, inverted))
        if not self._levels:
            raise ValueError("levels are empty: give at least a first and a last one")
        for i, level in enumerate(self._levels):
            if not (math.isfinite(level.alpha) and math.isfinite(level.sigma)):
                raise ValueError(f"level {i} {level} is not finite")
            if level.alpha < 0 or level.sigma < 0 or level.alpha == level.sigma == 0:
                raise ValueError(f"level {i} {level} is not a noise level: alpha, sigma >= 0")
            if abs(path.alpha(level.sigma) - level.alpha) > 1e-6:
                raise ValueError(f"level {i} {level} does not lie on the {path} path")
        for i, (s, t) in enumerate(self.pairs()):
            noisy, clean = (t, s) if inverted else (s, t)
            if not clean.half_log_snr > noisy.half_log_snr:
                way = ("clean to noisy", "noisier") if inverted else ("noisy to clean", "cleaner")
                raise ValueError(
                    f"levels must go strictly from {way[0]}, but level {i + 1} {t} is not "
                    f"{way[1]} than level {i} {s}: sort them and drop repeated ones"
                )
            if s.sigma == t.sigma:  # which is all that a denoiser is told of a level
                raise ValueError(
                    f"levels {i} and {i + 1} share sigma = {s.sigma} on the {path} path, as levels "
                    "too near to pure noise do: begin at less noise, or lower the shift"
                )

    @classmethod
    def from_sigmas(cls, sigmas: Iterable[float], path: Path | str = VE) -> Levels:
        """Levels at the given noise standard deviations of a path, which may be given by name."""
        path = make_path(path)
        sigmas = [float(sigma) for sigma in sigmas]
        for i, sigma in enumerate(sigmas):
            if not 0 <= sigma < math.inf or (path is not VE and sigma > 1):
                raise ValueError(f"sigma {i} is {sigma}, which is no level of the {path} path")
        return cls([Level(path.alpha(sigma), sigma) for sigma in sigmas], path)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise standard deviations, in this path's own units."""
        return tuple(level.sigma for level in self._levels)

    def pairs(self) -> Iterator[tuple[Level, Level]]:
        """The intervals (from, to), in order."""
        return zip(self._levels[:-1], self._levels[1:], strict=True)

    def at(self, half_log_snr: float) -> Level:
        """A level of the same path, for points inside an interval."""
        return self.path.at(half_log_snr)

    def on(self, path: Path) -> Levels:
        """The same levels on another path, at equal signal-to-noise ratio.

        Raises:
            ValueError: a level does not exist there (pure noise on the variance-exploding path).
        """
        if path is self.path:
            return self
        return self._like([path.at(level.half_log_snr) for level in self._levels], path)

    def scaled(self, factor: float) -> Levels:
        """These levels for data `factor` times as large: sigma / alpha times `factor`.

        Levels laid for data of standard deviation 1 become those of a model with sigma_data by
        `levels.scaled(sigma_data)`.
        """
        if not (maths.is_number(factor) and 0 < factor < math.inf):
            raise ValueError(f"factor must be a number above 0, got {factor!r}")
        up = math.log(factor)
        return self._like([self.path.at(level.half_log_snr - up) for level in self._levels])

    def split(self, at: int | Level) -> tuple[Levels, Levels]:
        """Two parts that share a joint, so that `first + second` goes along all of them.

        Args:
            at: the index of an inner level, or a level of the path between the first and the last,
                which both parts get where it is not among the levels.

        Raises:
            ValueError: `at` is not inside.
        """
        if isinstance(at, Level):
            before = [level for level in self._levels if self._goes(level, at)]
            after = [level for level in self._levels if self._goes(at, level)]
            if not (before and after):
                raise ValueError(
                    f"cannot split at {at}: it does not lie between {self[0]} and {self[-1]}"
                )
            return self._like([*before, at]), self._like([at, *after])
        i = at + len(self) if at < 0 else at
        if not 0 < i < len(self) - 1:
            raise ValueError(
                f"cannot split {len(self)} levels at {at}: give the index of an inner one, "
                f"1 to {len(self) - 2}"
            )
        return self[: i + 1], self[i:]

    def __add__(self, other: Levels) -> Levels:
        """These levels, then the others; where they meet in one level, it is there once.

        Raises:
            ValueError: they are on different paths, go different ways, or overlap.
        """
        if not isinstance(other, Levels):
            return NotImplemented
        if other.path is not self.path or other.inverted != self.inverted:
            raise ValueError(
                f"cannot join levels on the {self.path} path{' inverted' * self.inverted} and the "
                f"{other.path} path{' inverted' * other.inverted}: bring them together with "
                ".on(path) and .flipped()"
            )
        if other[0] != self[-1] and not self._goes(self[-1], other[0]):
            raise ValueError(
                f"cannot join levels that overlap: the first end at {self[-1]}, the second begin "
                f"at {other[0]}; split them first"
            )
        return self._like([*self._levels, *other._levels[other[0] == self[-1] :]])

    def start_at(self, strength: float) -> Levels:
        """The last round(strength · steps) steps, one at least: for going on from noised data.

        With strength 0.6, 12 of 20 steps. (`Scheduler.levels(20, strength=0.6)` gives 20 steps over
        that part, by laying more of them.) Noise the data to the first of the levels given.

        Args:
            strength: in (0, 1]; 1 is all of them.
        """
        if not (maths.is_number(strength) and 0 < strength <= 1):
            raise ValueError(f"strength must lie in (0, 1], got {strength!r}")
        if self.inverted:
            raise ValueError("a strength is a share of levels from noisy to clean: flip them first")
        return self[-max(1, round(strength * (len(self) - 1))) - 1 :]

    def flipped(self) -> Levels:
        """The same levels the other way, from clean to noisy: what inversion walks along.

        Solvers of the ODE take them, from sigma above 0; flipped again they are as before.
        """
        return Levels(self._levels[::-1], self.path, inverted=not self.inverted)

    def _goes(self, first: Level, then: Level) -> bool:
        """Whether `then` comes strictly after `first` in these levels' direction."""
        noisy, clean = (then, first) if self.inverted else (first, then)
        return noisy.half_log_snr < clean.half_log_snr

    def _like(self, levels: Iterable[Level], path: Path | None = None) -> Levels:
        return Levels(levels, path or self.path, inverted=self.inverted)

    @overload
    def __getitem__(self, i: int) -> Level: ...
    @overload
    def __getitem__(self, i: slice) -> Levels: ...
    def __getitem__(self, i: int | slice) -> Level | Levels:
        return self._like(self._levels[i]) if isinstance(i, slice) else self._levels[i]

    def __len__(self) -> int:
        return len(self._levels)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Levels)
            and self.path is other.path
            and self.inverted == other.inverted
            and self._levels == other._levels
        )

    def __repr__(self) -> str:
        inverted = ", inverted=True" if self.inverted else ""
        return f"Levels({list(self.sigmas)}, path={self.path}{inverted})"
