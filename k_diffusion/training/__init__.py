"""Training: data, loss, averaged weights, checkpoints and the loop.

Names are resolved when they are asked for, so that reading a checkpoint brings in no accelerate,
scikit-learn or pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k_diffusion.utils.lazy import lazy

if TYPE_CHECKING:
    from k_diffusion.training.archived import Archived
    from k_diffusion.training.arrays import Arrays
    from k_diffusion.training.checkpoint import (
        CheckpointError,
        CheckpointInfo,
        read_info,
    )
    from k_diffusion.training.config import ConfigError, TrainConfig
    from k_diffusion.training.config_file import load_config, make_config
    from k_diffusion.training.dataset import (
        ArraySource,
        Batch,
        DataError,
        Digits,
        Source,
        Stream,
        make_source,
    )
    from k_diffusion.training.densities import make_density, register_density
    from k_diffusion.training.ema import Ema, PowerFunction, WarmUp
    from k_diffusion.training.encoding import Encoded, encode
    from k_diffusion.training.extra_losses import Outcome, register_loss
    from k_diffusion.training.folder import Folder
    from k_diffusion.training.huggingface import HuggingFace
    from k_diffusion.training.latent_shards import LatentShards
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
    from k_diffusion.training.webdataset import WebShards
    from k_diffusion.training.weightings import make_weighting, register_weighting

_HOMES = {
    "checkpoint": (
        "CheckpointError",
        "CheckpointInfo",
        "read_info",
    ),
    "config": ("ConfigError", "TrainConfig"),
    "config_file": ("load_config", "make_config"),
    "dataset": ("ArraySource", "Batch", "DataError", "Digits", "Source", "Stream", "make_source"),
    "ema": ("Ema", "PowerFunction", "WarmUp"),
    "densities": ("make_density", "register_density"),
    "extra_losses": ("Outcome", "register_loss"),
    "archived": ("Archived",),
    "arrays": ("Arrays",),
    "encoding": ("Encoded", "encode"),
    "folder": ("Folder",),
    "huggingface": ("HuggingFace",),
    "latent_shards": ("LatentShards",),
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
    "webdataset": ("WebShards",),
    "weightings": ("make_weighting", "register_weighting"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Archived",
    "ArraySource",
    "Arrays",
    "Batch",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "DataError",
    "Digits",
    "Ema",
    "Encoded",
    "Folder",
    "HuggingFace",
    "LatentShards",
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
    "WebShards",
    "check_autoencoder",
    "denoising_loss",
    "encode",
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

__getattr__, __dir__ = lazy(__name__, _HOME)
