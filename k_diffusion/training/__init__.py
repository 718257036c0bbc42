"""Training: data, loss, averaged weights, checkpoints and the loop.

Names are resolved when they are asked for, so that reading a checkpoint brings in no accelerate,
scikit-learn or pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k_diffusion.training.archived import Archived
    from k_diffusion.training.checkpoint import (
        CheckpointError,
        CheckpointInfo,
        read_info,
    )
    from k_diffusion.training.config import ConfigError, TrainConfig
    from k_diffusion.training.config_file import load_config, make_config
    from k_diffusion.training.dataset import (
        ArraySource,
        DataError,
        Digits,
        Source,
        Stream,
        make_source,
    )
    from k_diffusion.training.densities import make_density, register_density
    from k_diffusion.training.ema import Ema, PowerFunction, WarmUp
    from k_diffusion.training.extra_losses import Outcome, register_loss
    from k_diffusion.training.folder import Folder
    from k_diffusion.training.latents import (
        LatentSource,
        check_autoencoder,
        load_autoencoder,
        save_autoencoder,
        train_autoencoder,
    )
    from k_diffusion.training.loss import denoising_loss, uncertainty_loss, variance_loss
    from k_diffusion.training.posthoc import (
        PosthocError,
        Reconstruction,
        reconstruct,
        save_reconstruction,
    )
    from k_diffusion.training.restore import load_conditioner, load_denoiser, save_inference
    from k_diffusion.training.retention import latest_checkpoint
    from k_diffusion.training.run import RunResult, run_training
    from k_diffusion.training.snapshots import Snapshot, list_snapshots
    from k_diffusion.training.trainer import Trainer, TrainingError, TrainState
    from k_diffusion.training.weightings import make_weighting, register_weighting

_HOMES = {
    "checkpoint": (
        "CheckpointError",
        "CheckpointInfo",
        "read_info",
    ),
    "config": ("ConfigError", "TrainConfig"),
    "config_file": ("load_config", "make_config"),
    "dataset": ("ArraySource", "DataError", "Digits", "Source", "Stream", "make_source"),
    "ema": ("Ema", "PowerFunction", "WarmUp"),
    "densities": ("make_density", "register_density"),
    "extra_losses": ("Outcome", "register_loss"),
    "archived": ("Archived",),
    "folder": ("Folder",),
    "loss": ("denoising_loss", "uncertainty_loss", "variance_loss"),
    "latents": (
        "LatentSource",
        "check_autoencoder",
        "load_autoencoder",
        "save_autoencoder",
        "train_autoencoder",
    ),
    "posthoc": ("PosthocError", "Reconstruction", "reconstruct", "save_reconstruction"),
    "restore": ("load_conditioner", "load_denoiser", "save_inference"),
    "retention": ("latest_checkpoint",),
    "run": ("RunResult", "run_training"),
    "snapshots": ("Snapshot", "list_snapshots"),
    "trainer": ("TrainState", "Trainer", "TrainingError"),
    "weightings": ("make_weighting", "register_weighting"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Archived",
    "ArraySource",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "DataError",
    "Digits",
    "Ema",
    "Folder",
    "LatentSource",
    "Outcome",
    "PosthocError",
    "PowerFunction",
    "Reconstruction",
    "RunResult",
    "Snapshot",
    "Source",
    "Stream",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "TrainingError",
    "WarmUp",
    "check_autoencoder",
    "denoising_loss",
    "latest_checkpoint",
    "list_snapshots",
    "load_autoencoder",
    "load_conditioner",
    "load_config",
    "load_denoiser",
    "make_config",
    "make_density",
    "make_source",
    "make_weighting",
    "read_info",
    "reconstruct",
    "register_density",
    "register_loss",
    "register_weighting",
    "run_training",
    "save_autoencoder",
    "save_inference",
    "save_reconstruction",
    "train_autoencoder",
    "uncertainty_loss",
    "variance_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
