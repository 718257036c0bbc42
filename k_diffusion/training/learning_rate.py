"""The course of the learning rate along a run: a function of images seen, so that no state is kept.

To add one, write a function here, enter it in `COURSES`, and its name and options in
`OptimizerConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from k_diffusion.training.sections import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, images_seen: int, total_images: int, batch: int
) -> float:
    """The learning rate of the step that begins at `images_seen`.

    Args:
        config: its course.
        images_seen: before the step.
        total_images: the run's length.
        batch: images of the step.
    """
    course = COURSES[config.schedule]
    return warmup(config, images_seen + batch, batch) * course(config, images_seen, total_images)


def warmup(config: OptimizerConfig, images: int, batch: int) -> float:
    """The share of the course that has been reached after so many images, in (0, 1]."""
    if config.warmup_decay:
        return 1 - config.warmup_decay ** (images / batch)
    return min(1.0, images / config.warmup_images) if config.warmup_images else 1.0


def constant(config: OptimizerConfig, images: int, total_images: int) -> float:
    """lr."""
    return config.lr


def cosine(config: OptimizerConfig, images: int, total_images: int) -> float:
    """Half a cosine from lr down to its `final_share` (Loshchilov and Hutter 2017,
    arXiv:1608.03983, eq. 5, without restarts).

    The fall begins where the linear warm-up ends, and reaches its end with the run.
    """
    length = max(1, total_images - config.warmup_images)
    passed = min(1.0, max(0, images - config.warmup_images) / length)
    left = 0.5 + 0.5 * math.cos(math.pi * passed)
    return config.lr * (config.final_share + (1 - config.final_share) * left)


def inverse_sqrt(config: OptimizerConfig, images: int, total_images: int) -> float:
    """lr / sqrt(max(images / decay_images, 1)) (Karras et al. 2024, arXiv:2312.02696,
    appendix B)."""
    return max(config.min_lr, config.lr / math.sqrt(max(images / _decay_images(config), 1)))


def inverse(config: OptimizerConfig, images: int, total_images: int) -> float:
    """lr · (1 + images / decay_images)^-power, as `utils.InverseLR` has it in steps."""
    return max(config.min_lr, config.lr * (1 + images / _decay_images(config)) ** -config.power)


def exponential(config: OptimizerConfig, images: int, total_images: int) -> float:
    """lr · decay^(images / decay_images), as `utils.ExponentialLR` has it in steps."""
    return max(config.min_lr, config.lr * config.decay ** (images / _decay_images(config)))


def _decay_images(config: OptimizerConfig) -> float:
    assert config.decay_images is not None  # the config sees to it
    return config.decay_images


COURSES: dict[str, Callable[[OptimizerConfig, int, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "inverse": inverse,
    "exponential": exponential,
}
"""Name -> (config, images before the step, the run's images) -> the rate apart from the warm-up."""
