"""Plans: a solver traced on levels becomes plain data that one engine runs.

A solver is a generator. It yields `(state, level)` to ask the denoiser, is sent the answer, and
returns the final state; all its states are symbols (`Expr`) that stand for tensors. `make_plan`
drives it once on the host, in float64, and keeps the linear combinations that it formed:

- a symbol that is used after a later query than the one it was made at is *carried*: it becomes a
  value of the plan, computed once and dropped after its last use; all others are expanded away;
- noise asked for on overlapping intervals is split into independent atoms, so that intervals which
  share a part of the Brownian path are correlated as they must be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from k_diffusion.sampling.expr import Assignment, Expr, Interval, Node, Tracer
from k_diffusion.sampling.registry import Answers, Solver, get_solver
from k_diffusion.utils import maths
from k_diffusion.utils.levels import Level, Levels


@dataclass(frozen=True)
class Draw:
    """Make unit noise for an interval of the Brownian path, and call it `name`."""

    name: str
    interval: Interval
    drop: tuple[str, ...] = ()

    def __str__(self) -> str:
        iv = self.interval
        kind = "fresh noise" if iv.fresh else "noise"
        return f"{self.name} = {kind} from sigma {iv.start.sigma:.6g} to {iv.end.sigma:.6g}"


@dataclass(frozen=True)
class Combine:
    """`name` = sum of coefficient · value; afterwards forget the values in `drop`."""

    name: str
    terms: tuple[tuple[str, float], ...]
    drop: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "".join(f" {'-' if c < 0 else '+'} {abs(c):.6g} {n}" for n, c in self.terms)
        return f"{self.name} = {text[3:] if text.startswith(' +') else text[1:]}"


@dataclass(frozen=True)
class Step:
    """Operations, then one query: `answers = denoiser(state, level.sigma)`.

    `start` says that the query is the first of an interval: its state is the sample itself, not an
    inner stage of a method.
    """

    operations: tuple[Draw | Combine, ...]
    state: str
    level: Level
    answers: tuple[str, ...]
    drop: tuple[str, ...] = ()
    start: bool = True

    def __str__(self) -> str:
        ask = f"{', '.join(self.answers)} = denoise({self.state}, sigma {self.level.sigma:.6g})"
        return "\n".join([*map(str, self.operations), ask])


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run does, as data.

    Attributes:
        solver: name of the solver.
        options: its options, and the churn, as given.
        levels: what it was traced on.
        steps: the queries in order, each with the operations before it.
        last: operations after the last query.
        result: name of the final state.
        outputs: answers that the denoiser gives to a query (1, or 2).
        predictor: whether a queried state may be a mere prediction, so that assigning it has no
            lasting effect.
        intervals: whether noise is drawn once per interval in the solver's order (for a caller's
            own noise sampler); otherwise on independent atoms.
    """

    solver: str
    options: tuple[tuple[str, Any], ...]
    levels: Levels
    steps: tuple[Step, ...]
    last: tuple[Draw | Combine, ...]
    result: str
    outputs: int = 1
    predictor: bool = False
    intervals: bool = False

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser."""
        return len(self.steps)

    @property
    def operations(self) -> Iterator[Draw | Combine]:
        """All operations, in order."""
        for step in self.steps:
            yield from step.operations
        yield from self.last

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The noise that a run draws, in order."""
        return tuple(op for op in self.operations if isinstance(op, Draw))

    @property
    def stochastic(self) -> bool:
        """Whether a run draws noise."""
        return bool(self.draws)

    @functools.cached_property
    def live(self) -> int:
        """The most state-sized tensors that a run holds at once, its input and the denoiser's
        fresh answer included, what the denoiser holds inside not."""
        alive, peak = {"x0"}, 1

        def perform(operations: tuple[Draw | Combine, ...]) -> None:
            nonlocal peak
            for op in operations:
                alias = isinstance(op, Combine) and len(op.terms) == 1 and op.terms[0][1] == 1
                if not (alias and op.terms[0][0] in op.drop):  # type: ignore[union-attr]
                    alive.add(op.name)
                    peak = max(peak, len(alive))
                alive.add(op.name)
                alive.difference_update(op.drop)

        for step in self.steps:
            perform(step.operations)
            alive.update(step.answers)
            peak = max(peak, len(alive))
            alive.difference_update(step.drop)
        perform(self.last)
        return peak

    def __str__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.options)
        head = (
            f"{self.solver}{options}: {len(self.levels) - 1} intervals, {self.evaluations} "
            f"evaluations, {len(self.draws)} draws, {self.live} live tensors"
        )
        return "\n".join([head, *map(str, self.steps), *map(str, self.last), f"-> {self.result}"])


@dataclass(frozen=True)
class Churn:
    """Noise added at the start of each interval, a rewrite that any solver's plan can take.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.

    Attributes:
        s_churn: total amount; each of n intervals raises sigma by min(s_churn / n, sqrt(2) - 1).
        s_tmin: least sigma / alpha at which it acts.
        s_tmax: greatest sigma / alpha at which it acts.
        s_noise: scale of the added noise.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
            value = getattr(self, name)
            if not maths.is_number(value):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value!r}")
            if name != "s_tmax" and value == math.inf:
                raise ValueError(f"{name} must be finite, got {value!r}")
        if self.s_tmin > self.s_tmax:
            raise ValueError(
                f"s_tmin {self.s_tmin!r} lies above s_tmax {self.s_tmax!r}: churn would act nowhere"
            )


def make_plan(
    solver: str | Solver,
    levels: Levels,
    *,
    churn: Churn | None = None,
    intervals: bool = False,
    **options: Any,
) -> Plan:
    """Traces a solver on levels. Plans are cached by all the arguments.

    From pure noise (alpha = 0) the first interval is one DDIM step, and the solver starts after it,
    since no history can be had at infinite log-SNR; those that work in sigma, where nothing is
    singular, start there themselves (`Solver.from_pure_noise`).

    Args:
        solver: a registered name or a Solver.
        levels: noisy to clean, at least two; or `levels.flipped()`, from above sigma = 0, for
            solvers that draw no noise.
        churn: noise added at the start of each interval.
        intervals: draw noise once per interval, in the solver's order, instead of on atoms; and
            for churn at every interval, whether it acts there or not.
        options: the solver's own.

    Raises:
        ValueError: unknown solver or option; too few levels; a method that cannot do this; a
            coefficient that is not finite.
    """
    chosen = get_solver(solver)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    chosen.check_options(options)
    if not isinstance(levels, Levels):
        raise TypeError(
            f"levels must be Levels, got {type(levels).__name__}: lay them with a scheduler, or "
            "use Levels.from_sigmas"
        )
    if churn is not None and not isinstance(churn, Churn):
        raise TypeError(f"churn must be a Churn, got {churn!r}: Churn(s_churn={churn!r}), say")
    if len(levels) < 2:
        raise ValueError(f"{chosen.name} needs at least two levels, got {len(levels)}")
    if churn is not None and churn.s_churn == 0:
        churn = None
    if churn is not None and chosen.predictor:
        raise ValueError(
            f"{chosen.name} queries predictions that it corrects afterwards, so churn has no place "
            "in it: use another sampler, or leave s_churn at 0"
        )
    settled = tuple(sorted(options.items()))
    if levels.inverted:
        _check_inversion(chosen, levels, churn, settled)
    return _make_plan(chosen, levels, churn, intervals, settled)


def _check_inversion(
    chosen: Solver, levels: Levels, churn: Churn | None, options: tuple[tuple[str, Any], ...]
) -> None:
    if levels[0].sigma == 0:
        raise ValueError(
            f"{chosen.name} cannot go up from clean data (sigma = 0), which holds no trace of its "
            "noise: begin above it, with levels[:-1].flipped()"
        )
    # Asked of the way down, since going up a solver may find that there is no noise to add.
    if churn is not None or _make_plan(chosen, levels.flipped(), None, False, options).stochastic:
        raise ValueError(
            f"{chosen.name} draws noise with these options, which going from clean to noisy has no "
            "place for: use a solver of the ODE (or eta=0 where it has that), without churn"
        )


class _Walk:
    """The levels as a solver walks along them: it notes where an interval begins, and begins it
    with more noise than the last one ended with, where there is churn."""

    def __init__(self, levels: Levels, churn: Churn | None, intervals: int) -> None:
        self._levels = levels
        self._churn = churn or Churn()
        self._gamma = min(self._churn.s_churn / intervals, math.sqrt(2) - 1)
        self.churned = self._gamma > 0
        self.entered = False
        self.pending: tuple[Level, Level] | None = None

    def pairs(self) -> Iterator[tuple[Level, Level]]:
        for s, t in self._levels.pairs():
            if self.pending is not None:
                raise ValueError("it reads levels ahead of its queries, but churn moves them")
            self.entered = True
            # Pure noise has no more noise to take.
            if (
                s.alpha > 0
                and self._gamma > 0
                and self._churn.s_tmin <= s.ratio <= self._churn.s_tmax
            ):
                raised = self._levels.at(s.half_log_snr - math.log1p(self._gamma))
                self.pending = s, raised
                yield raised, t
            else:
                yield s, t

    def __getattr__(self, name: str) -> Any:
        return getattr(self._levels, name)

    def __getitem__(self, i: int) -> Level:
        return self._levels[i]

    def __len__(self) -> int:
        return len(self._levels)


Request = tuple[Expr, Level, bool]  # state, its level, whether it begins an interval


def _drive(
    chosen: Solver,
    x: Expr,
    levels: Levels,
    tracer: Tracer,
    churn: Churn | None,
    always: bool,
    options: Any,
) -> Generator[Request, Answers, Expr]:
    """The solver's requests, with what holds for every solver done around it."""
    intervals = len(levels) - 1
    s = levels[0]
    if s.alpha == 0 and not chosen.from_pure_noise:
        d = yield x, s, True
        t = levels[1]
        # DDIM: at alpha = 0 the noise is x / sigma, whatever the answer.
        x = t.alpha * (d if chosen.outputs == 1 else d[0]) + (t.sigma / s.sigma) * x
        if len(levels) == 2:
            return x
        levels = levels[1:]
    walk = _Walk(levels, churn, intervals)
    run = chosen.function(x, walk, tracer.noise, **options)
    answer = None
    while True:
        try:
            state, level = run.send(answer)
        except StopIteration as stop:
            return stop.value
        if walk.pending is not None and churn is not None:
            s, raised = walk.pending
            walk.pending = None
            tracer.churn(state, s, raised, churn.s_noise)
        elif walk.entered and churn is not None and always:
            # The established samplers draw their churn where it does not act, too: so seeds agree.
            tracer.noise(level, level, fresh=True)
        entered, walk.entered = walk.entered, False
        answer = yield state, level, entered


@functools.lru_cache(maxsize=256)
def _make_plan(
    chosen: Solver,
    levels: Levels,
    churn: Churn | None,
    intervals: bool,
    options: tuple[tuple[str, Any], ...],
) -> Plan:
    tracer = Tracer(churned=churn is not None)
    x = tracer.leaf("x0", (levels[0].alpha, levels[0].sigma))
    run = _drive(chosen, x, levels, tracer, churn, intervals, dict(options))
    queries: list[_Query] = []
    answer: Answers = None
    while True:
        try:
            state, level, start = run.send(answer)
        except StopIteration as stop:
            if not isinstance(stop.value, Expr):
                raise TypeError(
                    f"{chosen.name} must return its final state, got {stop.value!r}"
                ) from None
            result: Node = stop.value.node
            break
        except (ArithmeticError, TypeError) as error:
            raise ValueError(
                f"{chosen.name} cannot take these levels or is in error after {len(queries)} "
                f"queries: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{chosen.name}: {error}") from error
        asked = state.node
        tracer.content[asked] = level.alpha, level.sigma
        tracer.epoch += 1
        k = len(queries) + 1
        answers = tuple(
            tracer.leaf(f"{kind}{k}", (1.0, 0.0)) for kind in ("d", "u")[: chosen.outputs]
        )
        answer = answers[0] if chosen.outputs == 1 else answers
        queries.append(_Query(asked, level, tuple(a.node for a in answers), start))
    if not intervals:
        tracer.split_noise()
    assignments = tracer.resolve([query.state for query in queries], result)
    for assignment in assignments:
        if not assignment.terms:
            raise ValueError(f"{chosen.name} forms a state in which all terms cancel")
        if not all(map(math.isfinite, assignment.terms.values())):
            k = max(assignment.node.epoch - 1, 0)
            raise ValueError(
                f"{chosen.name} has no finite coefficients after the query at level "
                f"{queries[k].level} (query {k + 1} of {len(queries)}): it cannot take these levels"
            )
    every = tuple(sorted(options)) if churn is None else (*sorted(options), ("churn", churn))
    return _assemble(chosen, every, levels, queries, result, assignments, tracer, intervals)


@dataclass(frozen=True)
class _Query:
    state: Node
    level: Level
    answers: tuple[Node, ...]
    start: bool


def _assemble(
    chosen: Solver,
    options: tuple[tuple[str, Any], ...],
    levels: Levels,
    queries: list[_Query],
    result: Node,
    assignments: list[Assignment],
    tracer: Tracer,
    intervals: bool,
) -> Plan:
    """Names the values, places the draws, and works out when each value can be forgotten."""
    names = {node: node.leaf for node in tracer.nodes if node.leaf}
    names.update((node, node.leaf) for node, _ in tracer.draws)
    for k, node in enumerate(dict.fromkeys([*(q.state for q in queries), result])):
        names.setdefault(node, f"x{k + 1}")
    for k, node in enumerate(a.node for a in assignments if a.node not in names):
        names[node] = f"v{k + 1}"

    blocks: list[list[Draw | Combine]] = [[] for _ in range(len(queries) + 1)]
    interval_of = dict(tracer.draws)
    drawn: set[Node] = set()

    def draw(node: Node, epoch: int) -> None:
        drawn.add(node)
        blocks[epoch].append(Draw(names[node], interval_of[node]))

    if intervals:  # as often, and in the order, that the solver asked
        for node, _ in tracer.draws:
            draw(node, node.epoch)
    for assignment in assignments:
        for term in assignment.terms:
            if term in interval_of and term not in drawn:
                draw(term, assignment.node.epoch)
        terms = tuple((names[node], c) for node, c in assignment.terms.items())
        blocks[assignment.node.epoch].append(Combine(names[assignment.node], terms))

    # Backwards over the plan: what is met for the first time is used for the last time.
    seen = {names[result]}
    steps: list[Step] = []

    def finish(block: list[Draw | Combine]) -> tuple[Draw | Combine, ...]:
        finished: list[Draw | Combine] = []
        for op in reversed(block):
            if isinstance(op, Draw):
                unused = () if op.name in seen else (op.name,)
                finished.append(Draw(op.name, op.interval, unused))
                continue
            drop = tuple(name for name, _ in op.terms if name not in seen)
            seen.update(drop)
            finished.append(Combine(op.name, op.terms, drop))
        return tuple(reversed(finished))

    last = finish(blocks[-1])
    for k in reversed(range(len(queries))):
        query, state = queries[k], names[queries[k].state]
        answers = tuple(names[node] for node in query.answers)
        drop = tuple(name for name in (state, *answers) if name not in seen)
        seen.add(state)
        operations = finish(blocks[k])
        steps.append(Step(operations, state, query.level, answers, drop, query.start))
    return Plan(
        chosen.name,
        options,
        levels,
        tuple(reversed(steps)),
        last,
        names[result],
        chosen.outputs,
        chosen.predictor,
        intervals,
    )
