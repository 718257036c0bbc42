"""Writes docs/samplers.md from the registry; with --check, fails where the file is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from k_diffusion.cli.samplers import sampler_rows

OUT = Path(__file__).with_name("samplers.md")
HEAD = """# Samplers

Made by `python docs/make_samplers.py` from the registry: do not edit.

*Order* is the order of convergence that the formula has on a general problem (for those that draw
noise the weak order, on Gaussian data), as `tests/invariants` measures it, not the number in its
name.
*Calls* are calls of the model a step. *Live* is the most state-sized tensors that a run holds at
once. Every sampler takes levels on any path (variance exploding, variance preserving, flow), ending
at 0 or above it; from pure noise its first step is one of DDIM.

| sampler | order | calls | noise | live | options | what it does | source |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    lines = []
    for row in sampler_rows():
        options = ", ".join(f"`{k}={v}`" for k, v in row.options.items())
        cells = [
            f"`{row.name}`", row.order, row.evaluations_per_step,
            "yes" if row.stochastic else "", row.live_tensors, options, row.summary, row.source,
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(lines)


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(page(), encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != page():
        sys.exit("docs/samplers.md is stale: run `python docs/make_samplers.py`")


if __name__ == "__main__":
    main()
