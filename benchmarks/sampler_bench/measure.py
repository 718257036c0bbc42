"""What is measured of a method: calls, errors, live tensors, waits for the device, time."""

from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sampler_bench.library import Method, Model
from sampler_bench.problems import Problem

Rows = list[dict[str, Any]]


def evaluations(method: Method, steps: int, ending: str) -> int:
    """Calls of the model in a run of so many intervals, counted."""
    model = Model(lambda x, alpha, sigma: x * (alpha / (alpha * alpha + sigma * sigma)))
    # Steep levels would do as well: the count depends on their number alone.
    ratios = [80 * 0.5**k for k in range(steps)] + [0.0 if ending == "clean" else 80 * 0.5**steps]
    assert method.exact is not None
    method.exact(model, torch.ones(1, 1, 2, 2, dtype=torch.float64), ratios)
    return model.calls


def steps_within(method: Method, budget: int, ending: str, cache: dict[Any, int]) -> int | None:
    """The most steps whose calls stay within a budget; None if there is no such number.

    A number of steps that a method refuses counts as too many.
    """
    for steps in range(budget, 0, -1):
        key = method.name, steps, ending
        if key not in cache:
            try:
                cache[key] = evaluations(method, steps, ending)
            except Exception:
                cache[key] = sys.maxsize
        if cache[key] <= budget:
            return steps
    return None


def error_of(
    method: Method, problem: Problem, curve: dict[float, Tensor], ratios: Sequence[float]
) -> tuple[float, int]:
    """Root mean square distance to the exact end, and the calls that it took."""
    model = Model(problem.denoise)
    assert method.exact is not None
    end = method.exact(model, curve[ratios[0]], ratios)
    target = curve[ratios[-1]] * math.sqrt(1 + ratios[-1] ** 2)
    return (end.double() - target).square().mean().sqrt().item(), model.calls


def errors(
    method: Method,
    problem: Problem,
    curve: dict[float, Tensor],
    levels: dict[str, dict[str, dict[int, list[float]]]],
    budgets: Sequence[int],
    cache: dict[Any, int],
) -> Rows:
    """One row for each schedule, ending and budget; a failure is a row with its reason."""
    rows: Rows = []
    for schedule, endings in levels.items():
        for ending in method.endings:
            for budget in budgets:
                steps = steps_within(method, budget, ending, cache)
                row = {"schedule": schedule, "ending": ending, "budget": budget, "steps": steps}
                if steps is None and budget == max(budgets):
                    rows.append({**row, "failed": "refuses every number of steps"})
                ratios = endings.get(ending, {}).get(steps or 0)
                if ratios is None:
                    continue  # the schedule does not go there in so many steps
                try:
                    error, calls = error_of(method, problem, curve, ratios)
                except Exception as failure:  # it is theirs to fail, ours to say so
                    rows.append({**row, "failed": f"{type(failure).__name__}: {failure}"[:120]})
                    continue
                if not math.isfinite(error):
                    rows.append({**row, "failed": "the result is not finite"})
                elif calls > budget:
                    rows.append({**row, "failed": f"made {calls} calls"})
                else:
                    rows.append({**row, "evaluations": calls, "error": error})
    return rows


class Watch(TorchDispatchMode):
    """Counts live tensors of the state's size, and reads of values that live on the device.

    On the host there is no device to wait for, so values are followed: what the caller would have
    put on the device (`held`) and all that is computed from it. Reading one of those as a Python
    number is a wait.
    """

    WAITS = (
        "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select",
        "_linalg_check_errors",
    )  # fmt: skip

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.peak, self.waits = numel, 0, 0
        self._alive: dict[int, Any] = {}
        self._held: Any = WeakIdKeyDictionary()

    def hold(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._held[tensor] = True

    def track(self, tensor: Tensor) -> None:
        if tensor.numel() < self.numel:
            return
        self._alive[id(tensor)] = weakref.ref(tensor)
        alive = [t for t in (ref() for ref in self._alive.values()) if t is not None]
        self._alive = {id(t): weakref.ref(t) for t in alive}
        self.peak = max(self.peak, len({t.untyped_storage()._cdata for t in alive}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat: list[Any] = []
        for arg in (*args, *(kwargs or {}).values()):
            flat += arg if isinstance(arg, (list, tuple)) else [arg]
        on_device = any(isinstance(a, Tensor) and a in self._held for a in flat)
        name = func.name().removeprefix("aten::").split(".")[0]
        if on_device and name in self.WAITS:
            self.waits += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                if on_device:
                    self._held[tensor] = True
                self.track(tensor)
        return out


def cost(method: Method, shape: Sequence[int], steps: int) -> dict[str, Any]:
    """Peak of live tensors and waits a step, between the first call of the model and the last."""
    x = torch.randn(*shape)
    marks: list[int] = []
    with Watch(x.numel()) as watch:

        def model(x: Tensor, *_: Any, **__: Any) -> Tensor:
            watch.hold(x)
            marks.append(watch.waits)
            return torch.zeros_like(x)

        model.hold = watch.hold  # type: ignore[attr-defined]

        assert method.quick is not None
        call = method.quick(x, model, steps)
        call()  # what is kept from the first run on (plans, generators) is no part of a run
        marks.clear()
        watch.hold(x)
        watch.track(x)
        watch.peak = 0
        gc.collect()
        gc.disable()  # what is freed must be freed by its last reference
        try:
            call()
        finally:
            gc.enable()
    return {
        "live": watch.peak,
        "waits a step": (marks[-1] - marks[0]) / max(1, len(marks) - 1),
    }


def seconds(
    method: Method, shape: Sequence[int], steps: int, prepared: dict[Any, Any]
) -> tuple[float, int]:
    """One timed run with a model that has its answer ready, and its number of calls.

    A run goes before it that does not count, unless it was long: other libraries have had the
    processor's caches since the last turn.
    """
    key = method.name, tuple(shape), steps
    if key not in prepared:
        x, answer = torch.randn(*shape), torch.randn(*shape)
        count = [0]

        def model(*_: Any, **__: Any) -> Tensor:
            count[0] += 1
            return answer

        assert method.quick is not None
        call = method.quick(x, model, steps)
        call()
        prepared[key] = call, count
    call, count = prepared[key]
    for _ in range(2):
        before, start = count[0], time.perf_counter()
        call()
        took = time.perf_counter() - start
        if took > 0.1:  # long enough for caches not to matter
            break
    return took, count[0] - before
