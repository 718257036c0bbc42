"""The engine: executes any plan on tensors, one query at a time.

    run = Run(plan, x)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    samples = run.result

Nothing in it waits for the device: levels are moved there once, coefficients are Python floats, and
no tensor is compared. The state is float32 or better whatever the denoiser computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import Call, mark_call
from k_diffusion.sampling.noise import NoiseSource
from k_diffusion.sampling.plan import Combine, Draw, Plan, Step

Values = dict[str, Tensor]
Operation = Callable[[Values, NoiseSource | None], None]


def _combine(op: Combine) -> Operation:
    name, drop, compute = op.name, op.drop, _sum(op)

    def run(values: Values, noise: NoiseSource | None) -> None:
        values[name] = compute(values)
        for dead in drop:
            del values[dead]

    return run


def _sum(op: Combine) -> Callable[[Values], Tensor]:
    """A linear combination as a closure over its coefficients, in as few kernels as it takes.

    Terms are never written into: the caller's x and the denoiser's answers may be shared.
    """
    states = [(term, c) for term, c in op.terms if not term.startswith("z")]
    noises = [(term, c) for term, c in op.terms if term.startswith("z")]
    total = sum(c for _, c in states)

    if len(op.terms) == 1:
        ((a, ca),) = op.terms
        answer = a[0] in "du"  # it may be a buffer that the model writes into again

        def scaled(values: Values) -> Tensor:
            if ca != 1:
                return values[a] * ca
            return values[a].clone() if answer else values[a]

        return scaled

    if len(states) > 1 and abs(total - 1) <= 1e-15 * sum(abs(c) for _, c in states):
        # Coefficients that sum to 1, as on all unit-signal and flow levels, are a chain of
        # interpolations: a kernel less. From the largest on, the partial sums stay above 0.
        (a, partial), *rest = sorted(states, key=lambda term: -term[1])
        chain = []
        for term, c in rest:
            partial += c
            chain.append((term, c / partial))
        (b, cb), *more = chain

        def interpolated(values: Values) -> Tensor:
            out = torch.lerp(values[a], values[b], cb)
            for term, weight in more:
                out.lerp_(values[term], weight)
            for term, c in noises:
                out.add_(values[term], alpha=c)
            return out

        return interpolated

    # A coefficient of exactly 1 goes first: it needs no multiplication of its own.
    (a, ca), (b, cb), *rest = sorted(op.terms, key=lambda term: term[1] != 1)

    def summed(values: Values) -> Tensor:
        if ca == 1:
            out = torch.add(values[a], values[b], alpha=cb)
        else:
            out = values[a] * ca
            out.add_(values[b], alpha=cb)
        for term, c in rest:
            out.add_(values[term], alpha=c)
        return out

    return summed


def _draw(op: Draw) -> Operation:
    name, interval, drop = op.name, op.interval, op.drop

    def run(values: Values, noise: NoiseSource | None) -> None:
        assert noise is not None  # Run has seen to it
        values[name] = noise.draw(interval)
        for dead in drop:
            del values[dead]

    return run


Program = tuple[tuple[tuple[Operation, ...], Step | None], ...]


@lru_cache(maxsize=256)
def _program(plan: Plan) -> Program:
    def compiled(operations: tuple[Draw | Combine, ...]) -> tuple[Operation, ...]:
        return tuple(_combine(op) if isinstance(op, Combine) else _draw(op) for op in operations)

    steps: list[Any] = [(compiled(step.operations), step) for step in plan.steps]
    return (*steps, (compiled(plan.last), None))


def place_sigmas(
    plans: Sequence[Plan], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The noise standard deviations of all queries of some plans, moved to a device at one go.

    Args:
        dtype: float64 becomes float32 on devices that have none.

    Returns:
        For each plan its own, shape (queries,).
    """
    if device.type == "mps" and dtype == torch.float64:
        dtype = torch.float32
    sigmas = [step.level.sigma for plan in plans for step in plan.steps]
    moved = torch.tensor(sigmas, dtype=torch.float64, device="cpu").to(dtype).to(device)
    return moved.split([plan.evaluations for plan in plans])


class Run:
    """A plan being executed.

    Args:
        plan: from `make_plan`.
        x: the state at the first level, shape (B, ...), in the levels' coordinates. It is not
            changed, nor kept once it is not needed; but `run.x` is at first this very tensor if
            its dtype serves, so do not write into that.
        noise: makes the noise, for a plan that draws any.
        sigma_dtype: dtype of `sigma`; by default the state's. float64 becomes float32 on devices
            that have none.
        sigmas: those of the queries, shape (queries,), where `place_sigmas` has moved them to the
            device already, for several runs at once.

    Attributes:
        done: whether no query is left.
        k: number of queries answered.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        noise: NoiseSource | None = None,
        sigma_dtype: torch.dtype | None = None,
        sigmas: Tensor | None = None,
    ) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(f"x must hold at least one sample along its first axis: {x.shape}")
        if noise is None and plan.stochastic:
            raise ValueError(
                f"{plan.solver} draws noise here: give the run a noise source, SampleNoise say"
            )
        self.plan = plan
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.k = 0
        self.done = False
        self._shape = x.shape
        self._device = x.device
        self._noise = noise
        self._program = _program(plan)
        self._values: Values = {"x0": x.to(self.dtype)}
        if sigmas is None:
            (sigmas,) = place_sigmas([plan], x.device, sigma_dtype or self.dtype)
        self._sigmas = sigmas.unsqueeze(1).expand(-1, x.shape[0]).unbind()
        itself = object()  # not this Run, whose tensors a memory of it would keep
        for k, (step, marked) in enumerate(zip(plan.steps, self._sigmas, strict=True)):
            mark_call(marked, Call(k, step.level, itself))
        self._prepare()

    def _prepare(self) -> None:
        operations, step = self._program[self.k]
        for operation in operations:
            operation(self._values, self._noise)
        self._step = step
        self.done = step is None

    @property
    def x(self) -> Tensor:
        """The state to be denoised next, shape (B, ...), in float32 or better.

        It may be assigned, to edit the sample between two steps; not at an inner stage of one,
        where it is not the sample itself (`plan.steps[k].start` tells).
        """
        if self._step is None:
            return self.result
        return self._values[self._step.state]

    @x.setter
    def x(self, value: Tensor) -> None:
        if self.plan.predictor:
            raise ValueError(
                f"{self.plan.solver} queries predictions that it corrects afterwards, so assigning "
                "x would be undone: use another sampler, or wrap the denoiser"
            )
        if self._step is not None and not self._step.start:
            raise ValueError(
                f"query {self.k + 1} of {self.plan.solver} is an inner stage of a step, not the "
                "sample itself: assign x where run.plan.steps[run.k].start is true"
            )
        if value.shape != self._shape:
            raise ValueError(f"x has shape {tuple(self._shape)}, got {tuple(value.shape)}")
        name = self.plan.result if self._step is None else self._step.state
        self._values[name] = value.to(self.dtype)

    @property
    def sigma(self) -> Tensor:
        """The noise standard deviation of `x`, shape (B,), in the levels' coordinates."""
        return self._sigmas[self.k]

    @property
    def result(self) -> Tensor:
        """The final state, once `done`."""
        if not self.done:
            raise RuntimeError(
                f"the run has answered {self.k} of {self.plan.evaluations} queries: "
                "advance it until it is done"
            )
        return self._values[self.plan.result]

    def advance(self, denoised: Tensor, *others: Tensor) -> None:
        """Takes the denoiser's answer for `x` at `sigma`, and goes on to the next query.

        Args:
            denoised: the estimate of x0, of x's shape.
            others: further answers, for a solver that takes more than one.

        Raises:
            ValueError: an answer of another shape, or another number of them.
            RuntimeError: the run is done already.
        """
        step = self._step
        if step is None:
            raise RuntimeError("the run is done: it takes no more answers")
        if len(others) != len(step.answers) - 1:
            raise ValueError(
                f"{self.plan.solver} takes {len(step.answers)} answers for each query, "
                f"got {len(others) + 1}"
            )
        values = self._values
        for name, answer in zip(step.answers, (denoised, *others), strict=True):
            if not isinstance(answer, Tensor):
                raise TypeError(
                    f"the denoiser must return a tensor, the estimate of x0, got "
                    f"{type(answer).__name__}"
                )
            if answer.shape != self._shape:
                raise ValueError(
                    f"the denoiser returned shape {tuple(answer.shape)} for x of shape "
                    f"{tuple(self._shape)}: it must return an estimate of x0 in x's shape"
                )
            if answer.device != self._device:
                raise ValueError(
                    f"the denoiser returned a tensor on {answer.device} for x on {self._device}: "
                    "move the model to x's device"
                )
            if answer.dtype != self.dtype:
                if not answer.is_floating_point():
                    raise TypeError(
                        f"the denoiser returned {answer.dtype}: it must return an estimate of x0, "
                        "a floating-point tensor"
                    )
                answer = answer.to(self.dtype)
            values[name] = answer
        for dead in step.drop:
            del values[dead]
        del (
            denoised,
            others,
            answer,
        )  # so that dropped values are freed before the next ones are made
        self.k += 1
        self._prepare()
