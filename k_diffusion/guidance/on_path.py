"""A Denoiser asked in other coordinates than its own: two models of different kinds in one run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from k_diffusion.denoiser import call_of, mark_call
from k_diffusion.guidance.base import Wrapper, along
from k_diffusion.utils.levels import Level, Path


class OnPath(Wrapper):
    """A Denoiser asked in other coordinates than its own, at equal signal-to-noise ratio.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        path: the coordinates of x and sigma. Levels that its own path does not reach (pure noise,
            of a variance-exploding denoiser) give infinite values.
    """

    def __init__(self, denoiser: Any, path: Path) -> None:
        super().__init__(denoiser)
        self._path = path

    @property
    def path(self) -> Path:
        """The coordinates of x and sigma."""
        return self._path

    def alpha(self, sigma: Any) -> Any:
        """The signal scale at sigma, a float or a tensor."""
        return self._path.alpha(sigma)

    def own(self, sigma: Tensor) -> Tensor:
        """The denoiser's own sigma of equal signal-to-noise ratio, in float64 where there is
        one; inf where its path does not reach."""
        wide = sigma if sigma.device.type == "mps" else sigma.double()
        own: Tensor = self.denoiser.path.sigma(self._path.alpha(wide).log() - wide.log())
        return own

    def reaches(self, level: Level) -> bool:
        """Whether the denoiser's path has a level of equal signal-to-noise ratio."""
        return math.isfinite(self.denoiser.path.sigma(level.half_log_snr))

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The estimate of x0, shape of x (B, ...)."""
        own = self.own(sigma)
        inner = own if getattr(self.denoiser, "float64_sigma", False) else own.to(sigma.dtype)
        if (call := call_of(sigma)) is not None and math.isfinite(call.level.half_log_snr):
            level = self.denoiser.path.at(call.level.half_log_snr)
            mark_call(inner, replace(call, level=level))
        return self.denoiser(x * along(own / sigma.to(own.dtype), x), inner, **condition)


def with_path(name: str, denoiser: Any) -> Any:
    """A denoiser that is on a path of which the levels are known.

    Raises:
        ValueError: it is on another.
    """
    if not isinstance(denoiser.path, Path):
        raise ValueError(
            f"{name} is on the path {denoiser.path!r}, which is none of VE, VP and FLOW: wrap it "
            "in FunctionDenoiser with the path it is on"
        )
    return denoiser
