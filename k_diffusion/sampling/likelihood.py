"""Log-likelihood and inversion by the probability-flow ODE, each sample by steps of its own.

Densities are those of y = x / alpha, clean data plus noise of standard deviation sigma / alpha, in
data units: the same on every path. The ODE is integrated by an embedded Runge-Kutta pair in the
straight chart (see `pairs`), whose clock reaches pure noise. There a flow or v network's prior is
exact; on the variance-exploding path it is N(0, sigma²) at a large sigma, too narrow by the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.sampling.adaptive import AdaptiveInfo, Query, sample_adaptive
from k_diffusion.sampling.pairs import STRAIGHT, Pair, get_pair
from k_diffusion.sampling.stepping import State, StepControl, along, integrate
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import fold_seed

PROBES = 3
"""Stream of a seed that the probes are drawn from; noise takes 1, 2 and 4 to 6."""
DEQUANTISED = 7
"""That of dequantisation."""
TOLERANCE = StepControl(rtol=1e-5, atol=1e-5)


class Trace(Protocol):
    """Estimates the trace of a Jacobian from products with it."""

    def start(self, x: Tensor) -> Tensor | None:
        """What belongs to each sample for the whole run, shape (B, ...), or nothing."""
        ...

    def __call__(self, d: Tensor, x: Tensor, own: Tensor | None) -> Tensor:
        """Estimates of the trace of dd/dx for each sample, shape (B, K); d depends on x."""
        ...


class ExactTrace:
    """The trace itself: one pass backwards for each value of a sample. For small ones."""

    def start(self, x: Tensor) -> Tensor | None:
        """Nothing."""
        return None

    def __call__(self, d: Tensor, x: Tensor, own: Tensor | None) -> Tensor:
        """The trace for each sample, shape (B, 1)."""
        flat = d.flatten(1)
        total = torch.zeros_like(flat[:, :1])
        for k in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, k].sum(), x, retain_graph=True)
            total = total + row.flatten(1)[:, k : k + 1]
        return total


class HutchinsonTrace:
    """vᵀ J v for probes v of random signs, whose mean is the trace; one pass backwards each.

    Args:
        seeds: one per sample, which makes a sample's probes its own.
        probes: how many; two or more give a standard error.

    Source: Hutchinson 1990, doi:10.1080/03610919008812866; Grathwohl et al. 2018,
    arXiv:1810.01367, section 3.1 (one probe held along the whole path).
    """

    def __init__(self, seeds: Sequence[int], probes: int = 1) -> None:
        if probes < 1:
            raise ValueError(f"probes must be 1 or more, got {probes}")
        self.seeds, self.probes = tuple(seeds), probes

    def start(self, x: Tensor) -> Tensor | None:
        """The probes, shape (B, K, ...)."""
        if len(self.seeds) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} samples need as many seeds, got {len(self.seeds)}")
        signs = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(fold_seed(seed, PROBES))
            bits = torch.randint(2, (self.probes, *x.shape[1:]), generator=generator)
            signs.append(bits * 2 - 1)
        return torch.stack(signs).to(x)

    def __call__(self, d: Tensor, x: Tensor, own: Tensor | None) -> Tensor:
        """One estimate for each probe, shape (B, K)."""
        assert own is not None
        return probe_products(d, x, own)


def probe_products(d: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """vᵀ (dd/dx) v for each sample and probe, shape (B, K); probes of shape (B, K, ...)."""
    estimates = []
    for v in probes.unbind(1):
        (product,) = torch.autograd.grad((d * v).sum(), x, retain_graph=True)
        estimates.append((product * v).flatten(1).sum(1))
    return torch.stack(estimates, 1)


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of a batch.

    Attributes:
        nats: log-density of each sample, shape (B,), in data units.
        standard_error: of `nats` by the trace's estimate, shape (B,); None where it is not known
            (one probe). Zero for an exact trace.
        latent: where the ODE carries the samples, in the denoiser's coordinates, shape (B, ...).
        info: what it took.
    """

    nats: Tensor
    standard_error: Tensor | None
    latent: Tensor
    info: AdaptiveInfo


def log_density(
    denoiser: Any,
    x: Tensor,
    start: Level,
    end: Level,
    *,
    trace: Trace | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    pair: str | Pair = "dormand_prince",
    control: StepControl = TOLERANCE,
    condition: Mapping[str, Any] | None = None,
    compact: bool = True,
) -> Likelihood:
    """The log-likelihood of data under a model, by the instantaneous change of variables.

    Args:
        denoiser: a Denoiser, or anything that `make_denoiser` takes; differentiable in x.
        x: data in data units, shape (B, ...), taken to lie at `start` with the signal at scale 1.
        start: the level whose density is told, with little noise but some.
        end: the level where the prior is known; pure noise where the denoiser reaches it.
        trace: None: `ExactTrace`. `HutchinsonTrace` for anything large.
        prior: log-density of the denoiser's x at `end`, (B, ...) to (B,); None: N(0, sigma²).
        pair: an embedded pair that steps in the straight chart: a Runge-Kutta pair.
        control: tolerances, which the state and the log-density per dimension both keep.
        condition: the denoiser's keyword arguments.
        compact: see `Query`.

    Raises:
        ValueError: a level, x or pair that cannot be.

    Source: Song et al. 2021, arXiv:2011.13456, equation 39.
    """
    pair, trace = get_pair(pair), trace or ExactTrace()
    if pair.chart is not STRAIGHT:
        raise ValueError(f"{pair.name} does not integrate densities: use a Runge-Kutta pair")
    if not x.is_floating_point() or x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be floating point, (B, C, ...), got {x.dtype} {tuple(x.shape)}")
    if not start.sigma > 0 or not end.half_log_snr < start.half_log_snr:
        raise ValueError(f"must go from some noise to more, not from {start} to {end}")
    y = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    ask = Query(denoiser, condition, y, compact)
    ask.check_levels(start, end)
    dimensions = y[0].numel()
    begin, stop = (STRAIGHT.clock(level.half_log_snr) for level in (start, end))
    own = trace.start(y)

    def slope(rows: Sequence[int], state: State, clocks: Sequence[float]) -> State:
        levels, w = ask.levels(STRAIGHT, clocks), state[0]
        mine = own if own is None or len(rows) == own.shape[0] else own[list(rows)]
        with torch.enable_grad():
            at = along([STRAIGHT.scale(level) for level in levels], w)
            x = (w * at).requires_grad_()
            d = ask(rows, x, levels)
            traces = trace(d, x, mine) * at.reshape(-1, 1)
        divisor = along([STRAIGHT.divisor(clock) for clock in clocks], w)
        # The density is carried per dimension, so that its tolerance is one for any size.
        divergence = (1 - traces / dimensions) / divisor.reshape(-1, 1)
        return (w - d.detach()) / divisor, divergence.detach()

    count = 1 if own is None else own.shape[1]
    flow = (y * STRAIGHT.unit(begin), y.new_zeros(y.shape[0], count))
    with torch.no_grad():
        (w, change), accepted, refused = integrate(slope, flow, begin, stop, pair, control)
        scale = STRAIGHT.scale(end)
        latent = w * scale
        known = _gaussian(latent, end.sigma) if prior is None else prior(latent)
        # From y to w at the start, and from w to the denoiser's x at the end.
        constant = math.log(STRAIGHT.unit(begin)) + math.log(scale)
        each = known.to(y.dtype).reshape(-1, 1) + dimensions * (change + constant)
        error = each.std(1) / count**0.5 if count > 1 else None
        error = torch.zeros_like(each[:, 0]) if own is None else error
    steps = tuple(a + r for a, r in zip(accepted, refused, strict=True))
    info = AdaptiveInfo(steps, tuple(ask.nfe), tuple(accepted), tuple(refused), ask.calls)
    return Likelihood(each.mean(1), error, latent, info)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    flat = x.flatten(1)
    constant = flat.shape[1] * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    return -0.5 * (flat / sigma).square().sum(1) - constant


def bits_per_dimension(nats: Tensor, dimensions: int, width: float = 2 / 255) -> Tensor:
    """Bits that coding one value takes, from the log-density of continuous data.

    Args:
        nats: log-densities.
        dimensions: values in a sample.
        width: distance of neighbouring values in data units; 8-bit images in [-1, 1] by default.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.3; Theis et al. 2016, arXiv:1511.01844,
    section 3.1 (the density bounds the code length only for data dequantised by uniform noise).
    """
    return -(nats / dimensions + math.log(width)) / math.log(2)


def dequantise(images: Tensor, seeds: Sequence[int], width: float = 2 / 255) -> Tensor:
    """Images of whole values as samples of a density: each value uniform within its own width.

    The bits of the result (`bits_per_dimension`, of the same width) are, in the mean over the
    seeds, no fewer than those that the images themselves take.

    Args:
        images: bytes, shape (B, ...); v stands for -1 + width v.
        seeds: one per image, which makes its noise its own.
        width: distance of neighbouring values in data units.

    Returns:
        Data in data units, shape (B, ...), float32.

    Raises:
        TypeError, ValueError: other values than bytes, or not as many seeds.

    Source: Theis et al. 2016, arXiv:1511.01844, section 3.1.
    """
    if images.dtype is not torch.uint8:
        raise TypeError(f"images must be bytes (torch.uint8) to dequantise, got {images.dtype}")
    if len(seeds) != len(images):
        raise ValueError(f"{len(images)} images need as many seeds, got {len(seeds)}")
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(fold_seed(seed, DEQUANTISED))
        noise.append(torch.rand(images.shape[1:], generator=generator))
    return (images + torch.stack(noise).to(images.device) - 0.5) * width - 1


def invert(
    denoiser: Any,
    x: Tensor,
    start: Level,
    end: Level,
    *,
    pair: str | Pair = "dormand_prince",
    control: StepControl = TOLERANCE,
    condition: Mapping[str, Any] | None = None,
    compact: bool = True,
) -> tuple[Tensor, AdaptiveInfo]:
    """The noise from which the probability-flow ODE makes the given data.

    Args:
        denoiser, pair, control, condition, compact: as for `sample_adaptive`.
        x: data in data units, shape (B, ...), taken to lie at `start` with the signal at scale 1.
        start: a level with little noise but some.
        end: the level that sampling begins at.

    Returns:
        Noise in units of `end`'s sigma, as `KSampler.sample` takes it, in x's dtype; what it took.
    """
    state = x.to(torch.promote_types(x.dtype, torch.float32)) * start.alpha
    latent, info = sample_adaptive(
        denoiser,
        state,
        start,
        end,
        pair=pair,
        control=control,
        condition=condition,
        compact=compact,
    )
    return (latent / end.sigma).to(x.dtype), info
