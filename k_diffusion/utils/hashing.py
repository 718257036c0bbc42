"""`maths.fold_seed` for many seeds and keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def fold_seeds(seeds: Sequence[int], keys: Sequence[int]) -> np.ndarray[Any, Any]:
    """`fold_seed(seed, key)` of each seed with each key, int64, shape (seeds, keys).

    Source: as of `fold_seed`, whose arithmetic modulo 2^64 numpy's unsigned integers do.
    """
    import numpy as np

    mask = (1 << 64) - 1
    first = np.array([int(seed) & mask for seed in seeds], np.uint64).reshape(-1, 1)
    state = _mixed(first)
    then = np.array([int(key) & mask for key in keys], np.uint64).reshape(1, -1)
    return (_mixed(state + then) >> np.uint64(1)).astype(np.int64)


def _mixed(state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
