"""The levels that a diffusers scheduler would visit, as a Scheduler.

They are asked of the scheduler itself, so that nothing of its many spacings is guessed: a copy of
it is told the number of steps, and its sigmas or timesteps are read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from k_diffusion.external.process import BETAS, Conventions, config_of, read_conventions
from k_diffusion.utils.levels import CLEAN, FLOW, VE, VP, Level, Levels, Path
from k_diffusion.utils.schedules.base import Scheduler


class ForeignScheduler(Scheduler):
    """Lays what a diffusers scheduler does, over the process that its config tells.

    Args:
        scheduler: a diffusers scheduler; it is copied, never changed.
        mu: logarithm of the flow's shift, for one whose shift depends on the size of the image.
        even_sigmas: hand it the sigmas 1, ..., 1 / steps, as pipelines of Flux do.

    Raises:
        ValueError: a key or value of its config is not known.
    """

    def __init__(self, scheduler: Any, mu: float | None = None, even_sigmas: bool = False) -> None:
        self._config = config_of(scheduler)
        self.conventions: Conventions = read_conventions(scheduler)
        self._scheduler = copy.deepcopy(scheduler)
        self.mu = mu
        self.even_sigmas = even_sigmas
        process = self.conventions.process
        self.path: Path = process.path
        self.timesteps = process.timesteps

    @property
    def time_min(self) -> float:  # type: ignore[override]
        return self.conventions.process.time_min

    @property
    def time_max(self) -> float:  # type: ignore[override]
        return self.conventions.process.time_max

    @property
    def own_process(self) -> Scheduler | None:
        return self.conventions.process

    def usual(self) -> ForeignScheduler:
        """Itself: it lays what the authors of a model lay."""
        return self

    def half_log_snr(self, time: Any) -> Any:
        return self.conventions.process.half_log_snr(time)

    def time(self, half_log_snr: Any) -> Any:
        return self.conventions.process.time(half_log_snr)

    def _lay(self, steps: int) -> list[Level]:
        scheduler = copy.deepcopy(self._scheduler)
        options: dict[str, Any] = {}
        if self._config.get("use_dynamic_shifting"):
            if self.mu is None:
                raise ValueError(
                    f"{self._config['_class_name']} shifts its levels by the size of the image: "
                    "give mu"
                )
            options["mu"] = self.mu
        if self.even_sigmas:
            options["sigmas"] = [1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)]
            scheduler.set_timesteps(device="cpu", **options)
        else:
            scheduler.set_timesteps(steps, device="cpu", **options)
        return levels_of(scheduler)


def levels_of(scheduler: Any) -> list[Level]:
    """The levels of a diffusers scheduler whose `set_timesteps` was called, noisy to clean.

    A level that is there twice, for a method of two calls a step, is given once.
    """
    visits = getattr(scheduler, "levels", None)
    if isinstance(visits, Levels):  # a PlanScheduler's
        return list(visits)
    config = config_of(scheduler)
    conventions = read_conventions(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and config["_class_name"] != "LCMScheduler":
        path = FLOW if conventions.prediction == "flow" else VE
        # Some lay more than there are timesteps for, and end before them.
        known = list(dict.fromkeys(sigmas[: len(scheduler.timesteps) + 1].double().tolist()))
        levels = [_level(sigma, path) for sigma in known]
        if path is VE and conventions.process.path is VP:
            return [VP.at(level.half_log_snr) if level.sigma else CLEAN for level in levels]
        return levels
    if config["_class_name"] not in BETAS:
        raise ValueError(f"{config['_class_name']} tells neither its sigmas nor its betas")
    timesteps = scheduler.timesteps.tolist()
    if config["_class_name"] == "PNDMScheduler":  # without the inner ones of its Runge-Kutta start
        timesteps = sorted({int(t) for t in scheduler._timesteps}, reverse=True)
    return _levels_at(timesteps, conventions.process, config)


def _level(sigma: float, path: Path) -> Level:
    return Level(path.alpha(sigma), sigma)


def _levels_at(timesteps: Sequence[float], process: Scheduler, config: Any) -> list[Level]:
    """Levels at timesteps of a discrete process, and the one that the last step leads to."""
    laid = [process.level(timestep / process.timesteps) for timestep in dict.fromkeys(timesteps)]
    # Where the clean end is not data, but the process's first level; then that is not laid twice.
    last = CLEAN if config.get("set_alpha_to_one", True) else process.level(0.0)
    return laid if laid[-1] == last else [*laid, last]
