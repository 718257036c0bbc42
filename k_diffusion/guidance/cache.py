"""Calls that a denoiser is spared, where its estimate hardly changes from level to level."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import call_of
from k_diffusion.guidance.base import Wrapper
from k_diffusion.guidance.memory import RunMemory
from k_diffusion.utils.maths import is_number


class Cached(Wrapper):
    """A Denoiser that carries its last estimates forward instead of calling the network again.

    Between calls the estimate is the line through the last two in log(alpha / sigma). How far the
    line is off is foreseen from what the last call showed: the difference of its estimate from the
    line before, relative to the estimate's size, grows with the square of the distance. A call is
    spared as long as that stays below the threshold, and no more than `most` in a row; the first
    three are made. It remembers within one run of fixed steps:
    give each sampler that runs at the same time one of its own. Elsewhere (adaptive steps, levels
    that differ within a batch) no call is spared.

    The decision is the batch's: its worst sample decides. So a sample alone may be spared other
    calls than among others, and differ by what those are off: of all guidance this alone does not
    draw each sample as if alone. To know what the last call showed the host waits for that call,
    once for each call made.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        threshold: the relative error that is allowed, as the root mean square over a sample: 0
            spares nothing.
        most: calls spared in a row.
        until: sigma / alpha below which every call is made.

    Attributes:
        made, spared: calls of the run.

    Raises:
        ValueError: a threshold, `most` or `until` out of range.
    """

    def __init__(
        self, denoiser: Any, threshold: float = 0.02, *, most: int = 3, until: float = 0.0
    ) -> None:
        super().__init__(denoiser)
        for name, value in (("threshold", threshold), ("until", until)):
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}")
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"most must be a whole number of at least 1, got {most!r}")
        self.threshold, self.most, self.until = float(threshold), most, float(until)
        self.made = self.spared = 0
        self._memory = RunMemory(_Memory)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The estimate of x0: the denoiser's, or the line through its last two."""
        call = call_of(sigma)
        if call is None:
            return self.denoiser(x, sigma, **condition)
        if self._memory.turn(call, x.shape):
            self.made = self.spared = 0
        memory = self._memory.kept
        at, near = call.level.half_log_snr, call.level.ratio < self.until
        if not near and memory.spares(at, self.threshold, self.most):
            self.spared += 1
            return memory.line(at)
        estimate = self.denoiser(x, sigma, **condition)
        if not isinstance(estimate, Tensor):
            raise TypeError(
                f"Cached wraps a denoiser of one estimate, got {type(estimate).__name__}: put it "
                "inside the guidance that makes a pair"
            )
        self.made += 1
        memory.learn(at, estimate.detach())
        return estimate


class _Memory:
    """The last two estimates of a run, and how far the next was off their line."""

    def __init__(self) -> None:
        self.known: list[tuple[float, Tensor]] = []  # (log(alpha / sigma), estimate)
        self.bend = math.inf  # relative error of the line, by the product of both distances
        self.row = 0  # calls spared since the last one made

    def spares(self, at: float, threshold: float, most: int) -> bool:
        """Whether the line will do at log(alpha / sigma) = at; counts it if so."""
        if len(self.known) < 2 or self.row >= most or not math.isfinite(at):
            return False
        (before, _), (last, _) = self.known
        # The error of the line through two points at a third is half the second derivative times
        # the distances to both.
        if self.bend * abs((at - last) * (at - before)) >= threshold:
            return False
        self.row += 1
        return True

    def line(self, at: float) -> Tensor:
        """The line through both estimates at log(alpha / sigma) = at."""
        (before, first), (last, second) = self.known
        return torch.lerp(first, second, (at - before) / (last - before))

    def learn(self, at: float, estimate: Tensor) -> None:
        """Take up the estimate of a call that was made."""
        self.row = 0
        if not math.isfinite(at):
            return
        if len(self.known) == 2:
            (before, _), (last, _) = self.known
            off = (estimate - self.line(at)).flatten(1).float()
            size = estimate.flatten(1).float()
            share = off.square().mean(1).sqrt() / size.square().mean(1).sqrt().clamp_min(1e-12)
            new = float(share.max()) / max(abs((at - last) * (at - before)), 1e-12)
            # An estimate may cross its line once by chance: half of what was seen before stays.
            self.bend = max(new, self.bend / 2) if math.isfinite(self.bend) else new
        self.known = [*(entry for entry in self.known if entry[0] != at), (at, estimate)][-2:]
