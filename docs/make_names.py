"""Writes docs/foreign-names.md from the tables of names; with --check, fails where it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from k_diffusion.external.names import (
    A1111,
    A1111_SCHEDULES,
    COMFYUI,
    COMFYUI_SCHEDULES,
    DIFFUSERS,
    Named,
)

OUT = Path(__file__).with_name("foreign-names.md")
HEAD = """# The names of other programs

Made by `python docs/make_names.py` from `k_diffusion/external/names.py`: do not edit.

```python
from k_diffusion.external import foreign_name

solver, schedule, options = foreign_name("DPM++ 2M SDE Karras")   # dpmpp_2m_sde, karras
```

It takes the names of all three programs below. A name tells the method; the levels are those of
`scheduler=`, or the model's own. [from-diffusers.md](from-diffusers.md) and
[from-comfyui.md](from-comfyui.md) show how they are used.
"""
NOTES = {
    "diffusers": """
DDIM and Euler give the same latents to 10⁻⁵ on the levels of their own scheduler
(`tests/external/test_process.py`). Further:

- Their multistep solvers fall to lower order at the last steps where there are fewer than 15; ours
  where the step's end asks for it.
- Heun, LMS, KDPM2 and others of theirs step in variance-exploding coordinates, ours in those of the
  network: [where solvers step](from-diffusers.md#where-solvers-step).
- `LCMScheduler`'s boundary coefficients differ from (0, 1) by less than 10⁻³ at the timesteps that
  it visits; here they are left out.
- `PNDMScheduler` begins with four calls of a Runge-Kutta method, or with two at one level; `ipndm`
  begins with lower order, a call a step.
- `TCDScheduler` with its eta at 0 is DDIM over the levels of LCM.
""",
    "ComfyUI": """
Its names are mostly those of k-diffusion, and so are ours. `_gpu` there tells where the noise is
made: here that is `noise_on_cpu=`. What differs in the numbers: [from-comfyui.md](from-comfyui.md).
""",
    "web": """
A schedule may follow the name: "DPM++ 2M Karras". "Automatic" is the sampler's usual one.
What differs in the numbers: [from-comfyui.md](from-comfyui.md).
""",
}


def _cell(named: Named) -> str:
    schedule = f", schedule `{named.schedule}`" if named.schedule else ""
    return f"`{named.solver}`{schedule}"


def _table(names: dict[str, Named], what: str) -> str:
    rows = "".join(f"| `{name}` | {_cell(named)} |\n" for name, named in names.items())
    return f"\n| {what} | here |\n| --- | --- |\n{rows}"


def _schedules(names: dict[str, str]) -> str:
    rows = "".join(f"| `{name}` | `{ours}` |\n" for name, ours in names.items())
    return f"\n| schedule | here |\n| --- | --- |\n{rows}"


def page() -> str:
    return "".join([
        HEAD,
        "\n## diffusers\n", _table(DIFFUSERS, "scheduler"), NOTES["diffusers"],
        "\n## ComfyUI\n", _table(COMFYUI, "sampler"),
        _schedules(COMFYUI_SCHEDULES), NOTES["ComfyUI"],
        "\n## Stable Diffusion web UI (A1111, Forge)\n", _table(A1111, "sampler"),
        _schedules(A1111_SCHEDULES), NOTES["web"],
    ])  # fmt: skip


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(page(), encoding="utf-8")
    elif not OUT.is_file() or OUT.read_text(encoding="utf-8") != page():
        sys.exit("docs/foreign-names.md is stale: run `python docs/make_names.py`")


if __name__ == "__main__":
    main()
