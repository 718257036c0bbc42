"""SEEDS: single-step exponential integrators of the reverse SDE, on data estimates.

Source: Gonzalez et al. 2023, arXiv:2305.14267, in the data-prediction form in use. The noise of an
inner stage is that of the path up to there, and goes on into the stages after it. The variance of
the noise goes as eta: 0 is the probability-flow ODE, 1 the reverse diffusion.
"""

from __future__ import annotations

from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import LEAST_SHARE
from k_diffusion.sampling.solvers.sde import sde_scales, sde_step, slope_weight
from k_diffusion.utils.levels import Level


class _Path:
    """The noise that a state at `level` holds since the start of the step."""

    def __init__(self, start: Level, noise: Any, eta: float, s_noise: float) -> None:
        self.level, self.held = start, None
        self._noise, self._eta, self._s_noise = noise, eta, s_noise

    def add(self, x: Expr, level: Level) -> Expr:
        """Goes on to a later level, and adds the noise there to x."""
        decay, up = sde_scales(self.level, level, self._eta)
        held = self.held if self.held is None else decay * self.held
        if up > 0:
            new = (up * self._s_noise) * self._noise(self.level, level)
            held = new if held is None else held + new
        self.level, self.held = level, held
        return x if held is None else x + held


@solver(order=2, source="Gonzalez et al. 2023, arXiv:2305.14267, SEEDS-2 on data", stochastic=True)
def seeds_2(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Trace:
    """SEEDS-2: one more data estimate at the share r of a step, on the reverse SDE's own path."""
    if not LEAST_SHARE <= r <= 1:
        raise ValueError(f"r must lie in [{LEAST_SHARE}, 1], got {r}")
    for s, t in levels.pairs():
        d = yield x, s
        if not t.sigma > 0:
            x, _, _ = sde_step(x, d, s, t, eta)
            continue
        m = levels.at(s.half_log_snr + r * (t.half_log_snr - s.half_log_snr)) if r < 1 else t
        path = _Path(s, noise, eta, s_noise)
        middle, _, _ = sde_step(x, d, s, m, eta)
        d_middle = yield path.add(middle, m), m
        x, _, _ = sde_step(x, (1 - 1 / (2 * r)) * d + 1 / (2 * r) * d_middle, s, t, eta)
        x = path.add(x, t)
    return x


@solver(
    order=2,
    claimed=3,
    source="Gonzalez et al. 2023, arXiv:2305.14267, SEEDS-3 on data",
    stochastic=True,
)
def seeds_3(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> Trace:
    """SEEDS-3: two more data estimates, at the shares r1 and r2 of a step, on the reverse SDE's own
    path. Of order 3 at eta 0 only: with noise a third would need integrals of the path that no
    inner state carries."""
    if not LEAST_SHARE <= r1 < r2 < 1:
        raise ValueError(
            f"r1 and r2 must lie in [{LEAST_SHARE}, 1), r1 below r2: got {r1} and {r2}"
        )
    for s, t in levels.pairs():
        d = yield x, s
        if not t.sigma > 0:
            x, _, _ = sde_step(x, d, s, t, eta)
            continue
        h = t.half_log_snr - s.half_log_snr
        m1, m2 = levels.at(s.half_log_snr + r1 * h), levels.at(s.half_log_snr + r2 * h)
        path = _Path(s, noise, eta, s_noise)
        u1, _, _ = sde_step(x, d, s, m1, eta)
        d1 = yield path.add(u1, m1), m1
        u2, _, whole = sde_step(x, d, s, m2, eta)
        u2 = u2 + (m2.alpha * slope_weight(whole) * r2 / r1) * (d1 - d)
        d2 = yield path.add(u2, m2), m2
        x, _, whole = sde_step(x, d, s, t, eta)
        x = path.add(x + (t.alpha * slope_weight(whole) / r2) * (d2 - d), t)
    return x
