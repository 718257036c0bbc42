"""Noise on one Brownian path: with one seed, runs of any steps on any levels follow the same path.

The path's clock is the signal-to-noise ratio c = (alpha / sigma)², from 0 (pure noise) to infinity
(clean data); see `Tracer.split_noise`. What is kept of the path W is its scaled form

    V = W(c) / sqrt(c),    a function of half log-SNR lam = log(c) / 2,

which has unit variance everywhere and the covariance exp(-|lam - lam'|): the stationary
Ornstein-Uhlenbeck process (Doob 1942, doi:10.2307/1968873). It has no beginning and no end, so no
number over- or underflows, however noisy or clean the levels are, and from far away it is
independent: both ends of the clock need no case of their own.

V is a function of the seed and of lam. It is found by bisection on a fixed dyadic tree of lam, each
node drawn given its two neighbours (a bridge) from a key made of seed and node, as in the virtual
Brownian tree (Li et al. 2020, arXiv:2001.01328, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.noise import BROWNIAN, FRESH, Canvas
from k_diffusion.utils.maths import fold_seed

# Runs agree on the path at the ends of its leaves, 4e-5 wide in half log-SNR at lam = 0 and 1e-4 at
# |lam| = 6; each level of the tree costs a draw for each new point.
DEPTH = 18
SCALE = 2.5
# Values of nodes down to this depth stay in memory while they lie ahead of the walk: 10 at most.
# Runs have far fewer points than 2^10, so that keeping deeper ones would hardly save a draw.
KEPT = 10


class Point(NamedTuple):
    """The path at one half log-SNR; no value where it lies infinitely far away."""

    lam: float
    value: Tensor | None


class PathNoise:
    """Unit noise that is the increment of one Brownian path over an interval, scaled.

    On [a, b] it is (W(c_b) - W(c_a)) / sqrt(c_b - c_a). The path depends on the sample's seed
    alone: it is the same in any batch, for any number of steps and any levels, so that a sample
    converges as its steps are refined. Up to clean data, which is infinitely far away, the noise is
    independent of the rest; fresh noise is so too, and is drawn in the order of asking.

    Intervals in order, from noisy to clean, cost about 15 draws each and 12 tensors of the state's
    size between two of them; out of order it starts anew from the root, with the same result.

    Args:
        seeds: one per sample.
        like: a tensor of shape (B, ...) that gives shape, dtype and device of the noise.
        on_cpu: make the noise on the CPU, so that a seed gives the same on every device.
    """

    def __init__(self, seeds: Sequence[int], like: Tensor, *, on_cpu: bool = False) -> None:
        self._seeds = [int(seed) for seed in seeds]
        self._canvas = Canvas(seeds, like, on_cpu)
        self._generator = self._canvas.generator()
        self._fresh_keys = [fold_seed(seed, FRESH) for seed in seeds]
        self._fresh_count = 0
        self._seen: dict[tuple[int, int], list[float]] = {}
        self._enter(0)

    def draw(self, interval: Interval) -> Tensor:
        """Unit noise for an interval, shape (B, ...).

        Raises:
            ValueError: the interval has no length.
        """
        if interval.fresh:
            self._fresh_count += 1
            return self._canvas.hand_over(self._noise(self._fresh_keys, self._fresh_count))
        start, end = interval.start.half_log_snr, interval.end.half_log_snr
        if start == end:
            raise ValueError(
                f"noise was asked for on the path from {interval.start} to {interval.end}, an "
                "interval of no length: ask for fresh noise there"
            )
        if interval.path != self._path:
            self._enter(interval.path)
        sign = 1.0 if start < end else -1.0
        start, end = min(start, end), max(start, end)
        if end == math.inf:
            return self._canvas.hand_over(self._noise(self._keys, 0).mul_(sign))
        before, after = self._value(start), self._value(end)
        assert after is not None  # only pure noise has none
        if before is None:
            return self._canvas.hand_over(after * sign)
        h = end - start
        noise = torch.sub(after, before, alpha=math.exp(-h))
        return self._canvas.hand_over(noise.mul_(sign / math.sqrt(-math.expm1(-2 * h))))

    def _enter(self, path: int) -> None:
        """Goes over to another path, which has keys of its own."""
        self._path = path
        self._keys = [fold_seed(seed, BROWNIAN, path) for seed in self._seeds]
        self._last = Point(-math.inf, None)
        self._return_to_root()

    def _return_to_root(self) -> None:
        # The walk stands in the interval of `_node` (1 is the root; 2n and 2n + 1 are the halves of
        # n), between `_left` and the last of `_ahead`, the points not passed yet with their nodes.
        self._node = 1
        self._left = Point(-math.inf, None)
        self._ahead = [(0, Point(math.inf, None))]

    def _value(self, lam: float) -> Tensor | None:
        """V at a half log-SNR; not to be written into."""
        if lam == -math.inf:
            return None
        if lam == self._last.lam:
            return self._last.value
        if lam < self._left.lam:
            self._return_to_root()
        while self._ahead[-1][1].lam <= lam:
            node, self._left = self._ahead.pop()
            self._node = 2 * node + 1
        node, left, right = self._node, self._left, self._ahead[-1][1]
        while node < 1 << DEPTH:
            point = self._between(left, _middle(node), right, node)
            passed = point.lam <= lam
            if node < 1 << KEPT:
                if passed:
                    self._left = point
                else:
                    self._ahead.append((node, point))
                self._node = 2 * node + passed
            left, right = (point, right) if passed else (left, point)
            node = 2 * node + passed
        self._last = point = self._in_leaf(node, left, right, lam)
        return point.value

    def _in_leaf(self, leaf: int, left: Point, right: Point, lam: float) -> Point:
        """The path inside a leaf. There it depends on the points asked for, each drawn given those
        before it, so that the law is exact however close they are."""
        if lam == left.lam:
            return left
        seen = self._seen.setdefault((self._path, leaf), [])
        if lam not in seen:
            seen.append(lam)
        for k, at in enumerate(seen):
            if left.lam < at < right.lam:
                point = self._between(left, at, right, leaf, k)
                if at == lam:
                    break
                left, right = (point, right) if at < lam else (left, point)
        return point

    def _between(self, left: Point, lam: float, right: Point, *key: int) -> Point:
        """A point drawn given its neighbours: the bridge of the process with covariance
        exp(-|lam - lam'|)."""
        to_left, to_right = lam - left.lam, right.lam - lam
        gain_left, gain_right = -math.expm1(-2 * to_left), -math.expm1(-2 * to_right)
        whole = -math.expm1(-2 * (to_left + to_right))
        value = self._noise(self._keys, *key).mul_(math.sqrt(gain_left * gain_right / whole))
        if left.value is not None:
            value.add_(left.value, alpha=math.exp(-to_left) * gain_right / whole)
        if right.value is not None:
            value.add_(right.value, alpha=math.exp(-to_right) * gain_left / whole)
        return Point(lam, value)

    def _noise(self, keys: Sequence[int], *of: int) -> Tensor:
        """Unit noise that is a function of each sample's key and of what it is for."""
        noise = self._canvas.empty()
        generator = self._generator
        for sample, key in zip(noise, keys, strict=True):
            if generator is not None:
                generator.manual_seed(fold_seed(key, *of))
            sample.normal_(generator=generator)
        return noise


def _middle(node: int) -> float:
    """The half log-SNR at which the interval of a node is halved.

    In the coordinate u = logistic(lam / SCALE) the tree halves [0, 1], so that its leaves are
    narrow where levels lie, and it reaches from pure noise to clean data.
    """
    depth = node.bit_length() - 1
    odd = 2 * (node - (1 << depth)) + 1  # u = odd / 2^(depth + 1)
    return SCALE * math.log(odd / ((2 << depth) - odd))
