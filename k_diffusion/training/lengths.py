"""How far back the averages of a run's weights reach, from its metrics. Needs no torch.

The length of an average is the standard deviation of the ages of the weights in it, in images. For
a power function it is sigma_rel of the images seen, by definition (Karras et al. 2024,
arXiv:2312.02696, section 3.1); for an exponential average of a constant decay d it tends to
sqrt(d) / (1 - d) steps, the standard deviation of a geometric distribution.
"""

from __future__ import annotations

import math

from k_diffusion.training.history import History


def average_lengths(history: History) -> dict[str, list[tuple[int, float]]]:
    """Average's name -> (images seen, its length in images) at the train lines."""
    found = {"ema": [(images, length) for images, _, length in _ages(history)]}
    profiles = history.setting("ema.profiles") or ()
    for sigma_rel in profiles:
        found[f"ema_{sigma_rel:g}"] = [
            (line.images_seen, sigma_rel * line.images_seen) for line in history.lines
        ]
    return {name: lengths for name, lengths in found.items() if lengths}


def main_age(history: History) -> float | None:
    """The mean age, in images, of the weights in the main average at the last line.

    In the long run it is the length. An average that has kept its first weights is older than long.
    """
    ages = _ages(history)
    return ages[-1][1] if ages else None


def _ages(history: History) -> list[tuple[int, float, float]]:
    """Images seen, mean age and length of the average with a warm-up, all in images.

    Its decay between two lines is taken as the later one's.
    """
    found, mean, square, last_step, decay = [], 0.0, 0.0, 0, 0.0
    for line in history.lines:
        if line.ema_decay is not None and line.ema_decay < 1:  # 1: its step was skipped
            decay = line.ema_decay
        mean, square = _aged(mean, square, decay, line.step - last_step)
        last_step = line.step
        length, batch = math.sqrt(max(square - mean * mean, 0.0)), history.batch_size
        found.append((line.images_seen, mean * batch, length * batch))
    return found


def _aged(mean: float, square: float, decay: float, steps: int) -> tuple[float, float]:
    """Mean age and mean square age, in steps, after so many updates that each keep `decay`.

    An update makes all ages one more, keeps `decay` of them and adds age 0: the recursions
    m -> d (m + 1) and s -> d (s + 2 m + 1), summed up.
    """
    kept, limit = decay**steps, decay / (1 - decay)
    return (
        limit + kept * (mean - limit),
        kept * square + (2 * limit + 1) * limit * (1 - kept) + 2 * steps * kept * (mean - limit),
    )
