"""Symbols that record linear combinations, and the choice of what is kept between two queries.

A `Tracer` hands a solver its symbols and counts the queries. `Tracer.resolve` then turns what the
solver formed into assignments `value = sum of coefficient · value`, in the order of execution.
"""

from __future__ import annotations

import itertools
import math
import weakref
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from k_diffusion.utils.levels import Level


class Node:
    """One recorded symbol: a leaf (input, answer, noise) or a linear combination of earlier ones.

    `epoch` is the number of queries that had been answered when it was made.
    """

    __slots__ = ("epoch", "index", "leaf", "terms")

    def __init__(
        self, epoch: int, index: int, terms: tuple[tuple[Node, float], ...], leaf: str = ""
    ) -> None:
        self.epoch = epoch
        self.index = index
        self.terms = terms
        self.leaf = leaf


class Expr:
    """A symbolic tensor: may be added, subtracted, negated, and scaled by numbers."""

    __slots__ = ("__weakref__", "_tracer", "node")

    def __init__(self, tracer: Tracer, node: Node) -> None:
        self._tracer = tracer
        self.node = node
        if tracer.churned:
            tracer.alive.add(self)

    def _make(self, *terms: tuple[Node, float]) -> Expr:
        return Expr(self._tracer, self._tracer.combination(terms))

    def __add__(self, other: Any) -> Expr:
        if isinstance(other, Expr):
            return self._make((self.node, 1.0), (other.node, 1.0))
        if isinstance(other, Real) and other == 0:  # so that sum() works
            return self
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Expr:
        if isinstance(other, Expr):
            return self._make((self.node, 1.0), (other.node, -1.0))
        return NotImplemented

    def __neg__(self) -> Expr:
        return self._make((self.node, -1.0))

    def __mul__(self, factor: Any) -> Expr:
        if isinstance(factor, Real):
            return self._make((self.node, float(factor)))
        return NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Expr:
        # 1 / 0 becomes inf here and is refused, with the solver's name, when the plan is made.
        if isinstance(divisor, Real):
            return self._make((self.node, 1 / float(divisor) if divisor else math.inf))
        return NotImplemented


@dataclass(frozen=True)
class Interval:
    """Unit Gaussian noise that belongs to the part of the Brownian path from `start` to `end`.

    `fresh` noise belongs to no path: it is independent of all other noise. A run that goes back to
    a noisier level (churn) begins another `path`, since it crosses the same levels again.
    """

    start: Level
    end: Level
    fresh: bool = False
    path: int = 0


@dataclass
class Assignment:
    """`name` (a Node) = sum of coefficient · term."""

    node: Node
    terms: dict[Node, float]


@dataclass
class Tracer:
    """Hands out symbols while a solver is driven.

    Attributes:
        churned: whether there will be churn, which must find the symbols that the solver holds.
        epoch: queries answered so far.
        path: which Brownian path noise is asked for on.
        nodes: all symbols ever made.
        draws: the noise among them.
        content: for leaves and queried states, what they are made of: (signal, noise) such that on
            data at one point c the symbol is signal · c + noise · (the state's unit noise).
        alive: the symbols that the solver still holds; kept for churn alone.
        stale: symbols that churn has left behind.
        estimates: for symbols that churn has changed, the data estimate of their query.
    """

    churned: bool = False
    epoch: int = 0
    path: int = 0
    nodes: list[Node] = field(default_factory=list)
    draws: list[tuple[Node, Interval]] = field(default_factory=list)
    content: dict[Node, tuple[float, float]] = field(default_factory=dict)
    alive: weakref.WeakSet[Expr] = field(default_factory=weakref.WeakSet)
    stale: set[Node] = field(default_factory=set)
    estimates: dict[Node, Node] = field(default_factory=dict)

    def combination(self, terms: tuple[tuple[Node, float], ...]) -> Node:
        """A new node for a linear combination."""
        node = Node(self.epoch, len(self.nodes), terms)
        if self.stale and any(term in self.stale for term, _ in terms):
            raise ValueError("it goes back to an earlier state, which churn has left behind")
        self.nodes.append(node)
        return node

    def leaf(self, name: str, content: tuple[float, float] = (0.0, 0.0)) -> Expr:
        """A new symbol for the input, an answer, or noise."""
        node = Node(self.epoch, len(self.nodes), (), name)
        self.nodes.append(node)
        self.content[node] = content
        return Expr(self, node)

    def content_of(self, node: Node) -> tuple[float, float]:
        """(signal, noise) of any symbol; see `content`."""
        if node not in self.content:
            parts = [(c, self.content_of(term)) for term, c in node.terms]
            self.content[node] = sum(c * p[0] for c, p in parts), sum(c * p[1] for c, p in parts)
        return self.content[node]

    def data_of(self, node: Node) -> Node | None:
        """The data estimate of the query after which a symbol was made."""
        if node in self.estimates:
            return self.estimates[node]
        for i in range(node.index - 1, -1, -1):
            earlier = self.nodes[i]
            if earlier.epoch != node.epoch:
                break
            if earlier.leaf and self.content[earlier] == (1.0, 0.0):
                return earlier
        return None

    def churn(self, state: Expr, s: Level, raised: Level, s_noise: float) -> None:
        """Puts noise under a solver's feet: its state at s becomes one at the noisier level.

        With k = ratio_s / ratio_raised the state's unit noise eps becomes k eps + sqrt(1 - k²) z.
        The noise estimates that a multistep solver remembers are of the old eps, and turn into the
        new one in the same way; its data estimates stay what they are; in a velocity (a difference
        of both) the noise is found by taking out the data estimate of the same query. What it holds
        besides, a sum of both (an earlier state), is of the old noise: it may not be used any more.
        """
        keep = s.ratio / raised.ratio
        add = math.sqrt(max((1 - keep) * (1 + keep), 0.0)) * s_noise
        z = self.noise(raised, s, fresh=True)
        self.path += 1
        for symbol in sorted(self.alive, key=lambda symbol: symbol.node.index):
            if symbol.node is state.node:
                continue
            signal, noise = self.content_of(symbol.node)
            if not noise:
                continue
            data = self.data_of(symbol.node)
            if abs(signal) <= 1e-12 * abs(noise):
                symbol.node = (keep * symbol + (noise * add) * z).node
            elif signal * noise < 0 and data is not None:
                still = (1 - keep) * signal * Expr(self, data)
                symbol.node = (still + keep * symbol + (noise * add) * z).node
                self.estimates[symbol.node] = data
            else:
                self.stale.add(symbol.node)
                continue
            self.content[symbol.node] = signal, noise
        scale = raised.alpha / s.alpha
        before = state.node
        after = (scale * state + (raised.sigma * add) * z).node
        for symbol in list(self.alive):  # the solver may hold the state under several names
            if symbol.node is before:
                symbol.node = after

    def noise(self, start: Level, end: Level, *, fresh: bool = False) -> Expr:
        """Unit noise on the interval between two levels; see `Interval`."""
        symbol = self.leaf(f"z{len(self.draws) + 1}")
        self.draws.append((symbol.node, Interval(start, end, fresh, self.path)))
        return symbol

    def split_noise(self) -> None:
        """Replaces noise on intervals by a combination of independent atoms.

        With the path's clock c, noise on [a, b] is (W(b) - W(a)) / sqrt(b - a): the sum of the
        atoms inside, each weighted by sqrt(its length / (b - a)). The clock is the signal-to-noise
        ratio, finite from pure noise on. In it the Gaussian term of the reverse diffusion is an
        exact Brownian path: x / (alpha · ratio²) gains variance 1 / ratio_t² - 1 / ratio_s²
        between two levels, with ratio = sigma / alpha.
        """
        marks: dict[int, dict[float, Level]] = {}  # per path: the levels at which intervals end
        for _, iv in self.draws:
            if not iv.fresh:
                marks.setdefault(iv.path, {}).update(
                    zip(_clock(iv), (iv.start, iv.end), strict=True)
                )
        clocks = {path: sorted(levels) for path, levels in marks.items()}
        atoms: dict[tuple[int, float], Node] = {}
        draws: list[tuple[Node, Interval]] = []
        for node, interval in self.draws:
            a, b = _clock(interval)
            if interval.fresh or not a < b:
                draws.append((node, interval))
                continue
            levels, ends = marks[interval.path], clocks[interval.path]
            inside = ends[bisect_left(ends, a) : bisect_right(ends, b)]
            terms = []
            for low, high in itertools.pairwise(inside):
                key = interval.path, low
                if key not in atoms:
                    atoms[key] = Node(node.epoch, node.index, (), "z")
                    part = Interval(levels[low], levels[high], path=interval.path)
                    draws.append((atoms[key], part))
                # An interval up to clean data is infinitely long: its last atom has all the weight.
                share = float(math.isinf(high)) if math.isinf(b) else (high - low) / (b - a)
                terms.append((atoms[key], math.sqrt(share)))
            node.leaf, node.terms = "", tuple(terms)
        self.draws = draws
        for i, (node, _) in enumerate(draws):
            node.leaf = f"z{i + 1}"

    def resolve(self, queries: list[Node], result: Node) -> list[Assignment]:
        """Assignments for all that must be kept: queried states, the result, carried symbols."""
        kept = {node for node in (*queries, result) if not node.leaf}
        needed = {*queries, result}
        for node in reversed(self.nodes):
            if node in needed:
                for operand, _ in node.terms:
                    needed.add(operand)
                    if operand.epoch < node.epoch and not operand.leaf:
                        kept.add(operand)
        order = sorted(kept, key=lambda node: node.index)
        assignments = [Assignment(node, _expand(node, kept)) for node in order]
        return _inline(assignments, {*queries, result}, queries)


def _clock(interval: Interval) -> tuple[float, float]:
    def snr(level: Level) -> float:
        return (level.alpha / level.sigma) ** 2 if level.sigma else math.inf

    return snr(interval.start), snr(interval.end)


def _expand(node: Node, kept: set[Node]) -> dict[Node, float]:
    """A node as a combination of leaves and kept nodes, equal terms collected."""
    contributions: dict[Node, list[float]] = {}
    stack = [(operand, factor) for operand, factor in reversed(node.terms)]
    while stack:
        operand, factor = stack.pop()
        if operand.leaf or operand in kept:
            contributions.setdefault(operand, []).append(factor)
        else:
            stack.extend((inner, factor * c) for inner, c in reversed(operand.terms))
    return _collect(contributions)


def _collect(contributions: dict[Node, list[float]]) -> dict[Node, float]:
    """Sums; what cancels down to rounding error is left out."""
    totals = {}
    for node, factors in contributions.items():
        total = math.fsum(factors) if all(map(math.isfinite, factors)) else math.nan
        if not abs(total) <= 2e-16 * sum(map(abs, factors)):
            totals[node] = total
    return totals


def _inline(
    assignments: list[Assignment], fixed: set[Node], queries: list[Node]
) -> list[Assignment]:
    """Removes carried values that cost more than they save.

    A value is replaced by its terms where that keeps at most one more term alive (so no more
    tensors than the value itself) and takes no more operations. Heun's slope (x - d) / sigma, say,
    is not stored: x is kept anyway, so keeping d in the slope's place is free.
    """
    last_use: dict[Node, int] = {}
    position = {a.node: i for i, a in enumerate(assignments)}
    # A queried state lives until its query, which comes after the assignments of its epoch.
    start = 0
    for q, state in enumerate(queries):
        while start < len(assignments) and assignments[start].node.epoch <= q:
            start += 1
        last_use[state] = max(last_use.get(state, 0), start - 1)
    uses: dict[Node, list[Assignment]] = {}
    for i, assignment in enumerate(assignments):
        for term in assignment.terms:
            last_use[term] = max(last_use.get(term, 0), i)
            uses.setdefault(term, []).append(assignment)
    remaining = []
    for assignment in assignments:
        node, terms = assignment.node, assignment.terms
        users = uses.get(node, [])
        if node in fixed:
            remaining.append(assignment)
            continue
        if not users:  # formed, carried, and never used
            continue
        extended = [term for term in terms if last_use[term] < last_use[node]]
        added = sum(len(terms.keys() - user.terms.keys()) - 1 for user in users)
        if len(extended) > 1 or added > len(terms):
            remaining.append(assignment)
            continue
        for user in users:
            factor = user.terms.pop(node)
            contributions = {term: [c] for term, c in user.terms.items()}
            for term, c in terms.items():
                contributions.setdefault(term, []).append(factor * c)
                last_use[term] = max(last_use[term], position[user.node])
            user.terms = _collect(contributions)
    return remaining
