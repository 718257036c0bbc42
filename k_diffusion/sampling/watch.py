"""What may look on while a run goes on: callbacks, previews, its trajectory, a way to stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from k_diffusion.denoiser import call_of
from k_diffusion.sampling.nonfinite import Told
from k_diffusion.sampling.preview import Previewer, make_preview
from k_diffusion.utils.levels import Level


class Flag(Protocol):
    """What stops a run once it is set: a `threading.Event`, say."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


class Cancelled(Exception):
    """A run was stopped by its `cancel`.

    Attributes:
        estimate: the last estimate of x0, shape (B, ...), in float32 or better; None if the model
            had not been called. By an adaptive solver, of the samples that the call was about.
        calls: calls of the model that were made.
    """

    def __init__(self, estimate: Tensor | None, calls: int) -> None:
        super().__init__(f"the run was cancelled after {calls} calls of the model")
        self.estimate = estimate
        self.calls = calls


@dataclass(frozen=True)
class Result:
    """Samples and how they came about.

    What `trajectory=True` keeps, states and estimates, stays on the device in the state's dtype:
    two tensors of the batch's size a step.

    Attributes:
        samples: shape (B, C, ...), what `sample` returns otherwise.
        seeds: one per sample.
        steps: that each sample's levels were laid with, of the last pass; with `steps="auto"`,
            those it was found to need. (A strength walks a part of them.)
        calls: of the model, on the batch or a part of it; of all passes together.
        changes: with `steps="auto"`, how much each sample changed when its steps were doubled for
            the last time, as a share of its root mean square.
        levels: of the states.
        states: at the start of each step, shape (B, C, ...) each; of an enhancing pass, too.
        estimates: the model's estimate of x0 there (of two, the guided one).
    """

    samples: Tensor
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    calls: int
    changes: tuple[float, ...] | None = None
    levels: tuple[Level, ...] = ()
    states: tuple[Tensor, ...] = ()
    estimates: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory of states and estimates, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.states, *self.estimates))


@dataclass
class Recorder:
    """Keeps the states at the steps' starts, and the estimates there."""

    starts: Sequence[bool] = ()
    """Whether each call begins a step; set before a pass."""
    levels: list[Level] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    estimates: list[Tensor] = field(default_factory=list)

    def __call__(self, k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        if not self.starts[k]:
            return
        call = call_of(sigma)
        assert call is not None  # every run of a plan marks its calls
        self.levels.append(call.level)
        self.states.append(x)
        # The model may write its next answer into the same buffer.
        self.estimates.append(denoised.to(x.dtype, copy=True))


class _Stop:
    def __init__(self, flag: Flag) -> None:
        self._flag = flag
        self.calls = 0

    def __call__(self, k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        self.calls += 1
        if self._flag.is_set():
            raise Cancelled(denoised.to(x.dtype, copy=True), self.calls)


class Watchers:
    """Everything that looks on in one call of `KSampler.sample`.

    Args:
        callback, preview, trajectory, cancel: see there.

    Attributes:
        recorder: of the trajectory, or None.
        callback: the caller's, or None; it may change what it is told of.

    Raises:
        TypeError: one of them is not what it must be.
    """

    def __init__(
        self, callback: Told | None, preview: Any, trajectory: bool, cancel: Flag | None
    ) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise TypeError(
                f"cancel must be a threading.Event, or have its is_set(), got "
                f"{type(cancel).__name__}"
            )
        self.recorder = Recorder() if trajectory else None
        self.callback = callback
        self._preview = None if preview is None else make_preview(preview)
        self._stop = None if cancel is None else _Stop(cancel)
        self._cancel = cancel
        self._previewer: Previewer | None = None

    def begin(self, x: Tensor, starts: Callable[[], Sequence[bool]]) -> Told | None:
        """What to tell of the calls of a pass; None: nobody looks on.

        Args:
            x: of the pass's shape and device.
            starts: tells whether each call begins a step.

        Raises:
            Cancelled: it is to stop before it has begun.
        """
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(None, 0 if self._stop is None else self._stop.calls)
        told: list[Callable[..., None]] = []
        if self.recorder is not None:
            self.recorder.starts = starts()
            told.append(self.recorder)
        if self._preview is not None:
            self._previewer = Previewer(self._preview, x)
            told.append(self._previewer)
        told += [watcher for watcher in (self.callback, self._stop) if watcher is not None]
        if len(told) < 2:
            return told[0] if told else None

        def tell(k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
            for watcher in told:
                watcher(k, x, sigma, denoised)

        return tell

    def end(self) -> None:
        """A pass is over."""
        if self._previewer is not None:
            self._previewer.finish()
