"""From the time, and what is known of a sample as a whole, to one embedding.

Letters in shapes: B samples, E the width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.network import TIME_SCALES


def sinusoids(t: Tensor, count: int) -> Tensor:
    """Cosines and sines of t at `count` frequencies from 1 down to about 1/10,000.

    Args:
        t: times, shape (B,).
        count: frequencies.

    Returns:
        Features of unit mean square, shape (B, 2 count), float32 or better.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Ho et al. 2020, arXiv:2006.11239.
    """
    # Angles reach a thousand: below float32 they would be noise, whatever the network computes in.
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    powers = torch.arange(count, device=t.device, dtype=t.dtype)
    return _waves(t[:, None] * torch.exp(powers * (-math.log(10_000) / count)))


def _waves(angles: Tensor) -> Tensor:
    return torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(2)


class FourierFeatures(nn.Module):
    """Cosines and sines of random projections, fixed once drawn; they are kept with the weights.

    Source: Tancik et al. 2020, arXiv:2006.10739, section 5; Song et al. 2021, arXiv:2011.13456,
    appendix C.1.

    Args:
        inputs: numbers a sample.
        count: frequencies.
        std: their standard deviation, in cycles per unit of the input.
    """

    def __init__(self, inputs: int, count: int, std: float = 1.0) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.randn(count, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        """Features of unit mean square, float32 or better, shape (B, 2 count), of x (B, inputs)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # No matrix product: autocast would round the angles to its own precision.
        angles = (x.to(dtype)[:, None] * self.weight.to(dtype)).sum(-1)
        return _waves(2 * math.pi * angles)


TIME_FEATURES = ("sinusoidal", "fourier")


class TimeFeatures(nn.Module):
    """Features of the time.

    Args:
        kind: "sinusoidal": see `sinusoids`; "fourier": see `FourierFeatures`, with frequencies of
            standard deviation 1 over what the time convention calls a unit of log_sigma, as in
            Karras et al. 2022.
        count: frequencies.
        convention: the time's, see `network.TIME_SCALES`.
    """

    def __init__(self, kind: str, count: int, convention: str) -> None:
        super().__init__()
        # Fourier's frequencies are laid for a span of about four: TIME_SCALES makes it a thousand.
        self.scale = TIME_SCALES[convention] * (1 if kind == "sinusoidal" else 1 / 250)
        self.count = count
        self.fourier = FourierFeatures(1, count) if kind == "fourier" else None

    def forward(self, t: Tensor) -> Tensor:
        """Shape (B, 2 count), float32 or better, of times t, shape (B,)."""
        if self.fourier is None:
            return sinusoids(t * self.scale, self.count)
        return self.fourier(t[:, None] * self.scale)


class MappingNetwork(nn.Module):
    """From time and condition to one embedding, in two layers.

    What is known of a sample meets in the hidden layer, so that the second layer can mix it.

    Args:
        time: the features of the time.
        width: E.
        num_classes: classes; row `num_classes` of the table is the learned "no label".
        vectors: name -> width of the vectors that it can be told; zeros add nothing.
    """

    def __init__(
        self,
        time: TimeFeatures,
        width: int,
        num_classes: int = 0,
        vectors: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = time
        self.time = nn.Linear(2 * time.count, width)
        self.mapping = nn.Linear(width, width)
        self.vectors = nn.ModuleDict(
            {name: nn.Linear(size, width, bias=False) for name, size in (vectors or {}).items()}
        )
        if num_classes:
            self.classes = nn.Embedding(num_classes + 1, width)
            # About the size that the time features have here, so that neither drowns the other.
            nn.init.normal_(self.classes.weight, std=0.5)

    def forward(
        self, t: Tensor, class_label: Tensor | None = None, **vectors: Tensor | None
    ) -> Tensor:
        """The embedding, shape (B, E).

        Args:
            t: times in the network's convention, shape (B,).
            class_label: shape (B,), integers from 0 to num_classes (that one: no label); None: no
                labels.
            vectors: each of shape (B, its width); None: zeros.
        """
        hidden = self.time(self.features(t).to(self.time.weight.dtype))
        if self.num_classes:
            if class_label is None:
                hidden = hidden + self.classes.weight[self.num_classes]
            else:
                hidden = hidden + self.classes(class_label.long())
        for name, layer in self.vectors.items():
            if (vector := vectors.get(name)) is not None:
                hidden = hidden + layer(vector.to(self.time.weight.dtype))
        # The blocks' modulations begin with this non-linearity: once here instead of in each.
        return F.silu(self.mapping(F.silu(hidden)))
