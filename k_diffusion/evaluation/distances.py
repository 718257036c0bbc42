"""Euclidean distances between rows: by matrix products, and anew where those could mislead.

|a|^2 + |b|^2 - 2ab is many times faster than the differences themselves, but loses the digits in
which near neighbours differ. So what a decision hangs on (the nearest of all, the k-th nearest, a
distance close to a radius) is computed once more from the differences: every decision is that of
the direct formula in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 22
"""Numbers that the direct formula holds at a time."""


def rows_of(images: Tensor) -> Tensor:
    """Images or features, shape (count, ...), as float64 rows."""
    return images.detach().flatten(1).double()


class Distances:
    """The distances of rows to references, some rows at a time.

    Args:
        queries: shape (m, d), float64.
        references: shape (n, d), float64.
        chunk: queries at a time; bounds the memory to chunk times n numbers.
    """

    def __init__(self, queries: Tensor, references: Tensor, chunk: int = 256) -> None:
        # Nearer to the origin fewer digits are lost, and less has to be computed anew.
        centre = references.mean(0)
        self.references = references - centre
        self.queries = self.references if queries is references else queries - centre
        self.chunk = chunk
        self._squares = self.references.square().sum(1)
        # The bound of a dot product's rounding (Higham 2002, section 3.1), for each of the terms.
        self._unit = 4 * (queries.shape[1] + 4) * torch.finfo(torch.float64).eps

    def __iter__(self) -> Iterator[tuple[slice, Block]]:
        """The places of some queries, and their distances."""
        for start in range(0, len(self.queries), self.chunk):
            place = slice(start, start + self.chunk)
            rows = self.queries[place]
            own = rows.square().sum(1, keepdim=True)
            about = own + self._squares - 2 * rows @ self.references.T
            slack = self._unit * (own + self._squares.max())
            yield place, Block(rows, self.references, about, slack)


class Block:
    """The squared distances of some rows, known up to a slack; exact where it is asked for.

    Args:
        rows: shape (m, d).
        references: shape (n, d).
        about: squared distances, shape (m, n); it is written to.
        slack: how far they may be off, shape (m, 1).
    """

    def __init__(self, rows: Tensor, references: Tensor, about: Tensor, slack: Tensor) -> None:
        self.rows, self.references, self.about, self.slack = rows, references, about, slack

    def leave_out(self, columns: Tensor) -> None:
        """Put a row's own reference, one a row, infinitely far away."""
        self.about[torch.arange(len(columns), device=columns.device), columns] = torch.inf

    def nearest(self, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k-th smallest distance of each row and whose it is, both of shape (m,)."""
        level = self.about.kthvalue(k, 1, keepdim=True).values
        # What may be among the first k, and what may be the k-th: within twice the slack of it.
        found = self._exact(level, 2 * self.slack).kthvalue(k, 1)
        return found.values.sqrt(), found.indices

    def within(self, radii: Tensor) -> Tensor:
        """Which distances are at most a radius, shape (m, n); radii: shape (n,)."""
        squares = self._exact(radii.square(), self.slack + self._about_radii(radii))
        return squares.sqrt() <= radii

    def _about_radii(self, radii: Tensor) -> Tensor:
        return 8 * torch.finfo(radii.dtype).eps * radii.square()

    def _exact(self, level: Tensor, slack: Tensor) -> Tensor:
        """Squared distances, by the direct formula wherever they are within slack of a level."""
        near = ((self.about - level).abs() <= slack).nonzero()
        # An infinite level (where a row has no k others) is near to nothing: inf - inf is nan.
        squares = self.about.clamp(min=0)
        for part in near.split(max(1, PIECE // self.rows.shape[1])):
            row, column = part.unbind(1)
            apart = self.rows[row] - self.references[column]
            squares[row, column] = apart.square().sum(1)
        return squares
