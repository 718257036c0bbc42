"""Two problems whose probability-flow map is known, in float64.

States are written in unit-variance coordinates, z = y / sqrt(1 + ratio²) with y = x / alpha and
ratio = sigma / alpha, which stay finite from pure noise (ratio infinite, z = noise) to clean data
(ratio 0, z = y = x0). A solver begins at the exact point of its first level on the curve that pure
noise `eps` begins, so that all schedules that cover the way have one and the same target, and a
schedule's own start adds no error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler_bench.library import unit

Array = np.ndarray
FAR = 1e6  # a ratio from which on noise is pure but for terms of the size of 1 / FAR²
SCALE = 0.03  # the smallest standard deviations of the data: below it the curves are straight


@dataclass
class Problem:
    """A mixture of K Gaussians in D dimensions, its covariances by their eigenvectors.

    Args:
        name: what the results call it.
        weights: shape (K,), summing to 1.
        means: shape (K, D).
        bases: orthogonal matrices, eigenvectors in columns, shape (K, D, D); None: the axes.
        variances: eigenvalues of the covariances, shape (K, D).
        eps: the pure noise that the curves begin with, shape (B, C, H, W), C · H · W = D.
    """

    name: str
    weights: Array
    means: Array
    bases: Array | None
    variances: Array
    eps: Array

    def __post_init__(self) -> None:
        self._log_weights = torch.from_numpy(np.log(self.weights))
        self._means = torch.from_numpy(self.means)
        self._variances = torch.from_numpy(self.variances)
        self._along = self._back = None
        self._centres = self._means
        if self.bases is not None:
            # All eigenvectors side by side, (D, K · D): one product for all components.
            bases = torch.from_numpy(self.bases)
            self._centres = torch.einsum("kd,kde->ke", self._means, bases)
            self._along = bases.permute(1, 0, 2).flatten(1).contiguous()
            self._back = bases.mT.flatten(0, 1).contiguous()

    def _parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities (B, K, 1), x less the means along the eigenvectors (B, K, D), and the
        variances there (K, D)."""
        flat = x.reshape(x.shape[0], -1).double()
        if self._along is None:
            along = flat[:, None]
        else:
            along = (flat @ self._along).unflatten(1, self.variances.shape)
        off = along - alpha * self._centres
        total = alpha * alpha * self._variances + sigma * sigma
        logits = self._log_weights - (off.square() / total + total.log()).sum(-1) / 2
        return torch.softmax(logits, 1)[..., None], off, total

    def _sum(self, along: Tensor) -> Tensor:
        """The sum of the components' vectors, back in pixels: (B, K, D) to (B, D)."""
        return along.sum(1) if self._back is None else along.flatten(1) @ self._back

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x] for x = alpha x0 + sigma noise, shape and dtype of x."""
        weights, off, total = self._parts(x, alpha, sigma)
        gains = alpha * self._variances / total
        d = self._sum(weights * (self._centres + gains * off))
        return d.reshape(x.shape).to(x.dtype)

    def pull(self, y: Tensor, ratio: float) -> Tensor:
        """(y - E[x0 | y]) / ratio², which is minus the score and has no cancellation at ratio 0."""
        weights, off, total = self._parts(y, 1.0, ratio)
        return self._sum(weights * off / total).reshape(y.shape)

    def curve(self, ratios: Iterable[float], tolerance: float = 1e-12) -> dict[float, Array]:
        """The exact states, in unit-variance coordinates, that pure noise `eps` is carried to."""
        ratios = sorted({float(ratio) for ratio in ratios}, reverse=True)
        if self.closed:
            return {ratio: self._closed_form(ratio) for ratio in ratios}
        found = {ratio: self.eps for ratio in ratios if ratio > FAR}
        state, at = self.start(), FAR
        for ratio in ratios:
            if ratio <= FAR:
                state, at = self._integrate(state, at, ratio, tolerance), ratio
                found[ratio] = state
        return found

    @property
    def closed(self) -> bool:
        return len(self.weights) == 1 and self.bases is None

    def _closed_form(self, ratio: float) -> Array:
        """On one Gaussian (y - mean) / sqrt(variance + ratio²) stays what it is: eps."""
        if math.isinf(ratio):
            return self.eps
        spread = np.sqrt(self.variances[0] + ratio**2)
        y = self.means[0] + spread * self.eps.reshape(len(self.eps), -1)
        return (y * unit(ratio)).reshape(self.eps.shape)

    def start(self) -> Array:
        """The state at ratio FAR: y = ratio eps + mean + covariance eps / (2 ratio) + ..."""
        flat = self.eps.reshape(len(self.eps), -1)
        mean = self.weights @ self.means
        bases = np.eye(len(mean))[None] if self.bases is None else self.bases
        covariance = np.einsum("k,kij,kj,klj->il", self.weights, bases, self.variances, bases)
        away = self.means - mean
        covariance = covariance + np.einsum("k,ki,kj->ij", self.weights, away, away)
        y = FAR * flat + mean + flat @ covariance / (2 * FAR)
        return (y * unit(FAR)).reshape(self.eps.shape)

    def slope(self, w: float, z: Array) -> Array:
        """dz/dw along the curve, with ratio = SCALE sinh(w): logarithmic far out, linear at 0."""
        ratio = SCALE * math.sinh(w)
        alpha = unit(ratio)
        pull = self.pull(torch.from_numpy(z / alpha), ratio).numpy()
        return (alpha * ratio * pull - alpha**2 * ratio * z) * (SCALE * math.cosh(w))

    def _integrate(self, z: Array, start: float, end: float, tolerance: float) -> Array:
        from scipy.integrate import solve_ivp

        a, b = math.asinh(start / SCALE), math.asinh(end / SCALE)
        if a == b:
            return z
        solved = solve_ivp(
            lambda w, flat: self.slope(w, flat.reshape(z.shape)).ravel(),
            (a, b),
            z.ravel(),
            method="DOP853",
            rtol=10 * tolerance,
            atol=tolerance,
        )
        if not solved.success:
            raise RuntimeError(f"the reference of {self.name} failed: {solved.message}")
        return solved.y[:, -1].reshape(z.shape)

    def save(self, path: Path, curve: dict[float, Array]) -> None:
        """Writes the problem with the states of its curve."""
        arrays = {k: getattr(self, k) for k in ("weights", "means", "variances", "eps")}
        if self.bases is not None:
            arrays["bases"] = self.bases
        np.savez(
            path,
            name=self.name,
            ratios=np.array(list(curve)),
            states=np.stack(list(curve.values())),
            **arrays,
        )


def load_problem(path: Path) -> tuple[Problem, dict[float, Tensor]]:
    """A saved problem and its curve."""
    data: Any = np.load(path)
    parts = (data[k] for k in ("weights", "means"))
    bases = data.get("bases")
    problem = Problem(str(data["name"]), *parts, bases, data["variances"], data["eps"])
    states = torch.from_numpy(data["states"])
    return problem, {float(r): states[i] for i, r in enumerate(data["ratios"])}


def spectrum() -> Problem:
    """One Gaussian whose standard deviations decay from 1 to 1/64 as those of images do.

    The map is linear and acts on each coordinate alone, so that the root mean square of a run from
    ones is the expectation over all noise, exactly.
    """
    size = 256
    variances = np.arange(1.0, size + 1) ** -1.5
    ones = np.ones((1, 1, 16, 16))
    return Problem("spectrum", np.ones(1), np.zeros((1, size)), None, variances[None], ones)


def digits(samples: int = 16, seed: int = 0) -> Problem:
    """Ten Gaussians, one a class, with the full covariances of real 8×8 images of digits.

    The images have 17 grey levels, scaled to [-1, 1]; the covariances gain the variance of
    rounding to them, 1/12 of a level squared, which also makes the blank corners no exception.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.data / 8 - 1, data.target
    weights, means, bases, variances = [], [], [], []
    for label in range(10):
        members = images[labels == label]
        values, vectors = np.linalg.eigh(np.cov(members.T, bias=True))
        weights.append(len(members) / len(images))
        means.append(members.mean(0))
        bases.append(vectors)
        variances.append(np.maximum(values, 0) + (1 / 8) ** 2 / 12)
    eps = np.random.default_rng(seed).standard_normal((samples, 1, 8, 8))
    stacks = [np.array(v) for v in (weights, means, bases, variances)]
    return Problem("digits", *stacks, eps)


PROBLEMS = {"spectrum": spectrum, "digits": digits}
