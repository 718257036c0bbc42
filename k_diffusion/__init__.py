"""k_diffusion: sampling from and training of diffusion and flow models; samplers are data.

Submodules load when they are first asked for, so that importing the package needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.3.0.dev0"

_ROOMS = (
    "augmentation", "config", "denoiser", "evaluation", "external", "gns", "guidance", "layers",
    "models", "sampling", "training", "utils",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "Denoiser":  # the established class; the protocol is denoiser.Denoiser
        return importlib.import_module(f"{__name__}.layers").Denoiser
    if name == "PlanScheduler":  # where diffusers looks for it when it loads a pipeline
        return importlib.import_module(f"{__name__}.external.plan_scheduler").PlanScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Denoiser", "PlanScheduler", *_ROOMS])
