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

# By `python docs/measure_names.py`: the calls of 20 steps, theirs and ours, and how far apart.
MEASURED: dict[str, tuple[int, int, float | None]] = {
    "CosineDPMSolverMultistepScheduler": (20, 20, None),
    "DDIMParallelScheduler": (20, 20, 6.7e-07),
    "DDIMScheduler": (20, 20, 6.7e-07),
    "DDPMParallelScheduler": (20, 20, 6.4e-07),
    "DDPMScheduler": (20, 20, 6.4e-07),
    "DEISMultistepScheduler": (20, 20, 5.1e-07),
    "DPMSolverMultistepScheduler": (20, 20, 5.1e-07),
    "DPMSolverSDEScheduler": (39, 39, None),
    "DPMSolverSinglestepScheduler": (20, 39, 1.7e-03),
    "EDMDPMSolverMultistepScheduler": (20, 20, 3.8e-07),
    "EDMEulerScheduler": (20, 20, 3.4e-07),
    "EulerAncestralDiscreteScheduler": (20, 20, 3.7e-07),
    "EulerDiscreteScheduler": (20, 20, 2.0e-07),
    "FlowMatchEulerDiscreteScheduler": (20, 20, 1.0e-07),
    "FlowMatchHeunDiscreteScheduler": (39, 39, 1.6e-06),
    "FlowMatchLCMScheduler": (20, 20, 3.5e-01),
    "HeunDiscreteScheduler": (39, 39, 2.2e-03),
    "KDPM2AncestralDiscreteScheduler": (39, 39, 4.3e-03),
    "KDPM2DiscreteScheduler": (39, 39, 1.1e-03),
    "LCMScheduler": (20, 20, 1.0e-06),
    "LMSDiscreteScheduler": (20, 20, 2.4e-03),
    "PNDMScheduler": (29, 20, 2.8e-03),
    "SASolverScheduler": (20, 20, 9.2e-01),
    "TCDScheduler": (20, 20, 1.2e00),
    "UniPCMultistepScheduler": (20, 20, 2.8e-07),
}
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
  network: [where solvers step](from-diffusers.md#where-solvers-step). Both have the same order, and
  the same image in the limit of many steps.
- `LCMScheduler`'s boundary coefficients differ from (0, 1) by less than 10⁻³ at the timesteps that
  it visits; here they are left out.
- `PNDMScheduler` begins with four calls of a Runge-Kutta method, or with two at one level; `ipndm`
  begins with lower order, a call a step.
- `TCDScheduler` with its eta at 0 is DDIM over the levels of LCM; its own eta is 0.3, which draws
  noise that `ddim` does not.
- `KSampler.from_pipeline` reads more of the config than the name says: `algorithm_type`,
  `solver_order` and `solver_type` of DPM-Solver, UniPC and DEIS, `variance_type` of DDPM.
- `DPMSolverSinglestepScheduler` makes one call a step, of which some lie between its levels;
  `dpmpp_2s` takes the steps that are asked for, with two calls in each but the last: ask for half
  as many. `PNDMScheduler` makes more calls than steps, `ipndm` does not.
- `FlowMatchLCMScheduler` draws noise for its first step, too, where `lcm` goes from pure noise by
  a step of DDIM: the noise of later steps is other. `SASolverScheduler` draws none outside
  timesteps 200 to 800; `sa_solver` does, unless `s_tmin` and `s_tmax` say so.
- `CosineDPMSolverMultistepScheduler` and `DPMSolverSDEScheduler` draw their noise from a tree of
  their own, so that no number compares them.
- `DDPMScheduler` with `variance_type="learned"` or `"learned_range"` takes the variance that the
  network gives; here it is left out, and the smaller of the two fixed ones is taken.
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


def _measured() -> str:
    def row(name: str, named: Named) -> str:
        theirs, ours, apart = MEASURED[name]
        calls = f"{theirs}" if theirs == ours else f"{theirs}, {ours}"
        far = "other noise" if apart is None else "same" if apart < 1e-5 else f"{apart:.0e}"
        return f"| `{name}` | {_cell(named)} | {calls} | {far} |\n"

    rows = "".join(row(name, named) for name, named in DIFFUSERS.items())
    return f"""
Calls are those of the network in 20 steps, theirs and ours where they differ. *Apart* is the
largest difference of the latents after 20 steps, as a share of the largest value, with a fixed
function for a network (`python docs/measure_names.py`); "same": below 10⁻⁵.

| scheduler | here | calls | apart |
| --- | --- | --- | --- |
{rows}"""


def _schedules(names: dict[str, str]) -> str:
    rows = "".join(f"| `{name}` | `{ours}` |\n" for name, ours in names.items())
    return f"\n| schedule | here |\n| --- | --- |\n{rows}"


def page() -> str:
    return "".join([
        HEAD,
        "\n## diffusers\n", _measured(), NOTES["diffusers"],
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
