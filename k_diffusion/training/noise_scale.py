"""The gradient noise scale: the batch size beyond which larger batches bring little.

The mean gradient over b images is the true gradient G plus noise of covariance Sigma / b, so that
its expected squared norm is |G|² + tr(Sigma) / b. Measured at two sizes, of a batch's parts and of
the whole, that gives unbiased estimates of both, and their ratio tr(Sigma) / |G|², in images, is
the simple noise scale (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1). The estimates of
one step are far too noisy to divide; their moving averages are divided.

With `loss.stratified` a batch's levels are spread on purpose: tr(Sigma) stays unbiased, since the
parts are drawn without regard to the strata, but the estimate of |G|² is then low by the variance
of the gradient between levels over the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def estimate(
    small_square: float, large_square: float, small: float, large: float
) -> tuple[float, float]:
    """Unbiased estimates of |G|² and tr(Sigma) from squared gradient norms at two batch sizes.

    Args:
        small_square: squared norm of the mean gradient over `small` images; a mean over several.
        large_square: that over `large` images.
        small, large: images; where the parts differ in size and each counts by its images, small
            is their mean size.

    Raises:
        ValueError: the sizes do not grow.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    if not 0 < small < large:
        raise ValueError(
            f"batches of {small:g} and {large:g} images do not tell noise from gradient: give two "
            "sizes above 0, the smaller first"
        )
    square = (large * large_square - small * small_square) / (large - small)
    variance = (small_square - large_square) / (1 / small - 1 / large)
    return square, variance


class NoiseScale:
    """Moving averages of the estimates, and the noise scale as their ratio.

    Args:
        decay: what a step keeps of the averages, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._square = 0.0
        self._variance = 0.0

    def update(self, small_square: float, large_square: float, small: float, large: float) -> None:
        """Take in a step; the arguments are those of `estimate`. What is not finite is left out."""
        new = estimate(small_square, large_square, small, large)
        if not all(map(math.isfinite, new)):
            return
        self._square += (1 - self.decay) * (new[0] - self._square)
        self._variance += (1 - self.decay) * (new[1] - self._variance)
        self.updates += 1

    @property
    def square(self) -> float:
        """|G|², averaged; nan before the first update."""
        return self._unbiased(self._square)

    @property
    def variance(self) -> float:
        """tr(Sigma), the trace of the covariance of one image's gradient; nan before any update."""
        return self._unbiased(self._variance)

    @property
    def value(self) -> float | None:
        """The noise scale in images; None while the averages do not tell gradient from noise."""
        if not self.updates or self._square <= 0 or self._variance <= 0:
            return None
        return self._variance / self._square

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON data."""
        return {"updates": self.updates, "square": self._square, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.updates = int(state["updates"])
        self._square, self._variance = float(state["square"]), float(state["variance"])

    def _unbiased(self, average: float) -> float:
        """An average that began at 0, as the mean of what it has seen."""
        return average / (1 - self.decay**self.updates) if self.updates else math.nan


class PartNorms:
    """The squared norms of the gradients of a process's micro-batches, as these are computed.

    Each gradient has to stand alone for that: between the micro-batches the sum of those before
    is kept aside, which takes the memory of one more gradient.

    Args:
        parameters: whose gradients they are.
        share: images of this process.
        squared_norm: gradients -> their squared norm, or what this process counts of it.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        share: int,
        squared_norm: Callable[[list[Tensor]], Tensor],
    ) -> None:
        self.parameters, self.share, self.squared_norm = parameters, share, squared_norm
        self.total: Tensor | None = None
        """Sum of squared norms of the parts' mean gradients, each by its share of the images."""
        self.parts = 0
        self._sum: list[Tensor | None] = [None] * len(parameters)

    def take(self, size: int) -> None:
        """Take the gradient of the last micro-batch of `size` images away from the weights."""
        new = [p.grad for p in self.parameters]
        # The gradient is of the sum of losses over `share`: the part's mean is share / size times
        # it, and size / share is the weight of its square.
        square = self.squared_norm([g for g in new if g is not None]) * (self.share / size)
        self.total = square if self.total is None else self.total + square
        self.parts += 1
        with torch.no_grad():
            for i, gradient in enumerate(new):
                held = self._sum[i]
                if held is None:
                    self._sum[i] = gradient
                elif gradient is not None:
                    held += gradient
        self._place([None] * len(new))

    def give_back(self) -> None:
        """Leave the sum of all in the weights' gradients."""
        self._place(self._sum)

    def _place(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


class BucketNorms:
    """Squared norms of each process's own gradient, before DistributedDataParallel averages it.

    A communication hook: it averages as the default one does, and looks at what goes through.

    Args:
        module: wrapped by DistributedDataParallel, without a hook.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, module: nn.Module) -> None:
        register = getattr(module, "register_comm_hook", None)
        if register is None:
            raise ValueError(
                f"{type(module).__name__} has no communication between processes to look at: wrap "
                "it in torch.nn.parallel.DistributedDataParallel"
            )
        self._own: list[Tensor] = []
        self._mean: list[Tensor] = []
        # DDP looks at annotations, and takes none but its own.
        register(self, lambda norms, bucket: norms.average(bucket))

    def average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average one bucket of gradients over the processes (what DDP calls)."""
        import torch.distributed as dist

        gradient = bucket.buffer()
        self._own.append(_square(gradient))
        gradient.div_(dist.get_world_size())
        work: Any = dist.all_reduce(gradient, async_op=True)

        def look(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            mean = future.value()[0]
            self._mean.append(_square(mean))
            return mean

        return work.get_future().then(look)

    def take(self) -> tuple[Tensor, Tensor]:
        """Squared norms since the last call: of this process's gradient, and of the mean."""
        both = torch.stack(self._own).sum(), torch.stack(self._mean).sum()
        self._own, self._mean = [], []
        return both


def _square(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
