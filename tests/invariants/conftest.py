"""Every test here that takes `name` runs over every registered solver."""

import sys
from pathlib import Path

import pytest
import torch

from k_diffusion.sampling import SOLVERS

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "docs")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        variants = [(n, dict(o), true) for n, s in SOLVERS.items() for o, _, true in s.variants]
        ids = ["-".join(map(str, (n, *o.values()))) for n, o, _ in variants]
        metafunc.parametrize("variant", variants, ids=ids)
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", sorted(SOLVERS))


@pytest.fixture(scope="module")
def warm():
    """The first use of a dispatch mode in a process keeps a tensor alive a little longer."""
    from watch import Watch  # a neighbour, on the path set above

    with Watch(1, "cpu"):
        torch.lerp(torch.ones_like(torch.zeros(1)), torch.ones(1), 0.5).mul_(2).add_(1)
