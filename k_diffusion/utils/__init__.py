"""Utilities: noise levels and schedules, augmentation, images, small mathematics.

The established names (`append_dims`, `rand_log_normal`...) are resolved when they are asked for,
so that importing this brings in nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    from k_diffusion.utils.averages import EMAWarmup, ema_update, ema_update_dict
    from k_diffusion.utils.files import CSVLogger, download_file, get_safetensors_metadata
    from k_diffusion.utils.folder import FolderOfImages
    from k_diffusion.utils.lr_schedules import ConstantLRWithWarmup, ExponentialLR, InverseLR
    from k_diffusion.utils.modules import eval_mode, n_params, train_mode
    from k_diffusion.utils.pil import from_pil_image, hf_datasets_augs_helper, to_pil_image
    from k_diffusion.utils.sigma_sampling import (
        rand_cosine_interpolated,
        rand_log_logistic,
        rand_log_normal,
        rand_log_uniform,
        rand_split_log_normal,
        rand_v_diffusion,
    )
    from k_diffusion.utils.stratified import (
        enable_stratified,
        enable_stratified_accelerate,
        stratified_settings,
        stratified_uniform,
        stratified_with_settings,
    )
    from k_diffusion.utils.tensors import append_dims, tf32_mode

_HOMES = {
    "averages": ("EMAWarmup", "ema_update", "ema_update_dict"),
    "files": ("CSVLogger", "download_file", "get_safetensors_metadata"),
    "folder": ("FolderOfImages",),
    "lr_schedules": ("ConstantLRWithWarmup", "ExponentialLR", "InverseLR"),
    "modules": ("eval_mode", "n_params", "train_mode"),
    "pil": ("from_pil_image", "hf_datasets_augs_helper", "to_pil_image"),
    "sigma_sampling": (
        "rand_cosine_interpolated",
        "rand_log_logistic",
        "rand_log_normal",
        "rand_log_uniform",
        "rand_split_log_normal",
        "rand_v_diffusion",
    ),
    "stratified": (
        "enable_stratified",
        "enable_stratified_accelerate",
        "stratified_settings",
        "stratified_uniform",
        "stratified_with_settings",
    ),
    "tensors": ("append_dims", "tf32_mode"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CSVLogger",
    "ConstantLRWithWarmup",
    "EMAWarmup",
    "ExponentialLR",
    "FolderOfImages",
    "InverseLR",
    "append_dims",
    "download_file",
    "ema_update",
    "ema_update_dict",
    "enable_stratified",
    "enable_stratified_accelerate",
    "eval_mode",
    "from_pil_image",
    "get_safetensors_metadata",
    "hf_datasets_augs_helper",
    "n_params",
    "rand_cosine_interpolated",
    "rand_log_logistic",
    "rand_log_normal",
    "rand_log_uniform",
    "rand_split_log_normal",
    "rand_v_diffusion",
    "stratified_settings",
    "stratified_uniform",
    "stratified_with_settings",
    "tf32_mode",
    "to_pil_image",
    "train_mode",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
