"""Every test here that takes `name` runs over every registered solver."""

import sys
from pathlib import Path

import pytest

from k_diffusion.sampling import SOLVERS

sys.path.insert(0, str(Path(__file__).parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", sorted(SOLVERS))
