"""The loss by noise level: which band of levels has learned, and which has not.

The bands have equal shares of the levels that the run draws: their edges are quantiles of its
density. So each band's mean is over equally many samples, whatever the process and the density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BANDS = 8


class SigmaBands:
    """Sums up losses by band, on the device.

    Args:
        density: u in (0, 1) -> log(alpha / sigma), the distribution of the levels that are drawn.
        sigma: log(alpha / sigma) -> sigma in the denoiser's coordinates, elementwise.
        device: of the losses.

    Attributes:
        edges: the sigmas between two bands, rising; `BANDS - 1` of them.
    """

    def __init__(
        self,
        density: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        u = torch.arange(1, BANDS, dtype=torch.float64) / BANDS
        edges = sigma(density(u)).sort().values
        self.edges: list[float] = edges.tolist()
        self._edges = edges.to(device, torch.float32)
        self._bands = torch.arange(BANDS, device=device)

    def sums(self, losses: Tensor, sigma: Tensor) -> Tensor:
        """Each band's sum of losses, then each band's number of samples; float64, shape (16,).

        Args:
            losses, sigma: of the samples, shape (B,).
        """
        band = torch.bucketize(sigma.float(), self._edges)
        # By a product and not by adding at indices, whose order on a GPU is left to chance.
        inside = (band == self._bands[:, None]).double()
        return torch.cat([inside @ losses.double(), inside.sum(1)])


def means(sums: Sequence[float]) -> list[float | None]:
    """Each band's mean loss, from the noiseless to the noisy; None where there was no sample.

    Args:
        sums: as `SigmaBands.sums` has them.
    """
    totals, counts = sums[:BANDS], sums[BANDS:]
    return [total / n if n else None for total, n in zip(totals, counts, strict=True)]
