"""Writes docs/samplers.md from the registry; with --check, fails where the file is stale.

Writing measures every order anew (about a minute). The check takes the measured figures as they
stand: that each is right is seen to by tests/invariants/test_exactness.py, which measures it too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from k_diffusion.cli.samplers import sampler_rows

OUT = Path(__file__).with_name("samplers.md")
HOST = Path(__file__).parents[1] / "tests" / "invariants"
HEAD = """# Samplers

Made by `python docs/make_samplers.py` from the registry: do not edit.

*Claimed* is the order that a method's name or its authors give it, *measured* the order of
convergence that its formula has on a general problem in float64: the least over data that is one
Gaussian or a mixture of three, even and uneven levels, and the three paths (variance exploding,
variance preserving, flow), as `tests/invariants` measures it; for methods that draw noise it is the
weak order, on Gaussian data. Where a method has an option `order`, there is one figure for each
value. *Calls* are calls of the model a step. *Live* is the most state-sized tensors that a run
holds at once.

Those named `_cfg_pp` take two estimates from the denoiser, the guided and the unconditional one.
Every sampler takes levels on any path, ending at 0 or above it. From pure noise (alpha = 0) those
that work in sigma (the Runge-Kutta methods, lms, ipndm...) keep their order; the others begin with
a step of DDIM, and are of order 2 at most. What one cannot do it refuses by name.

| sampler | claimed | measured | calls | noise | live | options | what it does | source |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


TAIL = """
Those of adaptive steps choose their levels themselves, for each sample of a batch: the scheduler
gives the range. Both results of each pair have their orders on fixed steps, and the error goes down
with the tolerance, as `tests/sampling/test_adaptive.py` measures.
"""


def measure() -> dict[str, list[str]]:
    """The least measured order of every variant of every solver."""
    sys.path.insert(0, str(HOST))
    from host import slopes

    from k_diffusion.sampling import ADAPTIVE, SOLVERS

    orders = {
        name: [
            f"{abs(min(slopes(solver, **o).values())):.1f}"  # no -0.0
            for o, _, _ in solver.variants
        ]
        for name, solver in SOLVERS.items()
    }
    # Their formulas on fixed steps have their order by tests/sampling/test_adaptive.py.
    return orders | {name: ["see below"] for name in ADAPTIVE}


def documented() -> dict[str, list[str]]:
    """The measured orders that the file shows, by solver."""
    rows = [line.split(" | ") for line in OUT.read_text(encoding="utf-8").splitlines()]
    return {row[0][3:-1]: row[2].split(", ") for row in rows if row[0].startswith("| `")}


def page(measured: Mapping[str, list[str]]) -> str:
    lines = []
    for row in sampler_rows():
        options = ", ".join(f"`{k}={v}`" for k, v in row.options.items())
        cells = [
            f"`{row.name}`", ", ".join(map(str, row.claimed)),
            ", ".join(measured.get(row.name, ["not measured"])),
            row.evaluations_per_step or "adaptive",
            "yes" if row.stochastic else "", row.live_tensors or "", options, row.summary,
            row.source,
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(lines) + TAIL


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(page(measure()), encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != page(documented()):
        sys.exit("docs/samplers.md is stale: run `python docs/make_samplers.py`")


if __name__ == "__main__":
    main()
