"""Which losses are spikes, and when a run has diverged: the rule alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.sections import SpikesConfig
from k_diffusion.training.spikes import Divergence, SpikeWatch, Verdict, times, without


def judge(
    losses: Sequence[float], max_skipped: int = 20, **config: Any
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts on steps 1, 2, ...; a nan is a skipped step. The memory goes through JSON."""
    watch = SpikeWatch(SpikesConfig(**config), max_skipped)
    memory, verdicts, in_a_row = watch.begin(), [], 0
    for step, loss in enumerate(losses, 1):
        skipped = not math.isfinite(loss)
        in_a_row = in_a_row + 1 if skipped else 0
        verdicts.append(watch.add(memory, step, loss, skipped, in_a_row))
        memory = json.loads(json.dumps(memory, allow_nan=False))
    return verdicts, memory


def spikes(verdicts: Sequence[Verdict]) -> dict[int, float]:
    return {i: v.median for i, v in enumerate(verdicts, 1) if v.median is not None}


def divergences(verdicts: Sequence[Verdict]) -> list[Divergence]:
    return [v.divergence for v in verdicts if v.divergence is not None]


def test_a_spike_is_above_factor_times_the_median() -> None:
    options = {"factor": 2.0, "window": 5, "patience": 2}
    usual = [1.0, 9.0, 2.0, 3.0, 8.0]  # the median is 3
    assert spikes(judge([*usual, 6.0], **options)[0]) == {}
    assert spikes(judge([*usual, 6.01], **options)[0]) == {6: 3.0}
    assert spikes(judge([*usual[:4], 100.0], **options)[0]) == {}  # not enough to judge by
    # The window moves on: 9, 2, 3, 8, 4 have the median 4.
    assert spikes(judge([*usual, 4.0, 8.0], **options)[0]) == {}
    assert spikes(judge([*usual, 4.0, 8.1], **options)[0]) == {7: 4.0}
    assert spikes(judge([*usual, 600.0, 3.0])[0]) == {}  # no factor, no spikes


def test_spikes_and_what_is_not_finite_stay_out_of_the_median() -> None:
    losses = [1.0, 1.0, 1.0, 50.0, 1.0, 60.0, 1.0, 1.0, 1.0, 2.5]
    verdicts, memory = judge(losses, factor=2.0, window=3, patience=2)
    assert spikes(verdicts) == {4: 1.0, 6: 1.0, 10: 1.0}
    assert divergences(verdicts) == []
    assert memory["usual"] == [1.0, 1.0, 1.0]
    losses = [1.0, math.nan, 1.0, math.nan, 1.0, 1.9, 2.1]
    verdicts, memory = judge(losses, factor=2.0, window=3, patience=5)
    assert spikes(verdicts) == {7: 1.0}
    assert memory == {"usual": [1.0, 1.0, 1.9], "first": 7, "since": [[2.1, True]]}


def test_diverged_where_most_of_the_steps_since_are_spikes() -> None:
    options = {"factor": 2.0, "window": 3, "patience": 4}
    usual = [1.0, 1.0, 1.0]
    verdicts, memory = judge([*usual, 5.0, 1.0, 5.0, 1.5], **options)  # two of four
    assert divergences(verdicts) == []
    assert memory == {"usual": [1.0, 1.0, 1.5], "first": None, "since": []}
    verdicts, memory = judge([*usual, 5.0, 1.0, 5.0, 6.0], **options)
    assert divergences(verdicts) == [Divergence(4, 7, "3 of 4 losses were spikes")]
    assert spikes(verdicts) == {4: 1.0, 6: 1.0, 7: 1.0}
    # Gone on with all the same, it is the usual.
    assert memory == {"usual": [1.0, 5.0, 6.0], "first": None, "since": []}
    # What is not finite counts as a spike here, but begins nothing.
    verdicts, _ = judge([*usual, math.nan, 5.0, math.nan, 1.0, math.inf], **options)
    assert spikes(verdicts) == {5: 1.0}
    assert divergences(verdicts) == [Divergence(5, 8, "3 of 4 losses were spikes")]


def test_too_many_in_a_row_that_are_not_finite() -> None:
    verdicts, _ = judge([1.0, math.nan, 1.0, math.nan, math.nan, math.nan], max_skipped=3)
    assert divergences(verdicts) == [Divergence(4, 6, "3 steps in a row were not finite")]
    # With a spike before them that is still in question, it began there.
    losses = [1.0, 1.0, 5.0, 1.0, math.nan, math.nan, math.nan]
    options = {"factor": 2.0, "window": 2, "max_skipped": 3}
    verdicts, _ = judge(losses, patience=10, **options)
    assert divergences(verdicts) == [Divergence(3, 7, "3 steps in a row were not finite")]
    verdicts, _ = judge(losses, patience=2, **options)
    assert divergences(verdicts) == [Divergence(5, 7, "3 steps in a row were not finite")]


def test_losses_below_zero() -> None:
    usual = [-3.0, -4.0, -5.0]  # 4 above -4 at a factor of 2
    options = {"factor": 2.0, "window": 3, "patience": 2}
    assert spikes(judge([*usual, -0.1], **options)[0]) == {}
    assert spikes(judge([*usual, 0.1], **options)[0]) == {4: -4.0}


def test_in_words() -> None:
    assert times(5.0, 2.0) == "2.5 times the usual 2"
    assert times(0.1, -4.0) == "where -4 is usual"


@pytest.mark.parametrize(
    ("ranges", "left"),
    [
        ([], [(2, 20)]),
        ([(5, 7)], [(2, 5), (7, 20)]),
        ([[12, 14], [5, 7]], [(2, 5), (7, 12), (14, 20)]),
        ([(5, 9), (6, 8), (8, 11)], [(2, 5), (11, 20)]),
        ([(0, 4)], [(4, 20)]),
        ([(0, 2), (20, 30)], [(2, 20)]),
        ([(18, 30)], [(2, 18)]),
        ([(30, 40)], [(2, 20)]),
        ([(0, 40)], []),
    ],
)
def test_without(ranges: Any, left: list[tuple[int, int]]) -> None:
    assert list(without(ranges, 2, 20)) == left
    numbers = [n for first, last in left for n in range(first, last)]
    assert numbers == [n for n in range(2, 20) if not any(a <= n < b for a, b in ranges)]
    assert list(without(ranges, 20, 20)) == []


def config(**changes: Any) -> TrainConfig:
    model = {"type": "tiny", "prediction": "v"}
    return make_config(
        {"model": model, "data": {"source": "digits"}, "total_images": 64, **changes}
    )


def test_config() -> None:
    assert config().spikes == SpikesConfig(
        factor=None, window=100, patience=20, roll_back=False, most_roll_backs=3
    )
    with pytest.raises(ConfigError, match=r"^config: spikes\.factor = 1\.0: .* greater than 1"):
        config(spikes={"factor": 1.0})
    with pytest.raises(ConfigError, match=r"^config: spikes\.patience = 1: "):
        config(spikes={"patience": 1})
    with pytest.raises(ConfigError, match=r"^config: spikes\.windows = 3 is no known key; did"):
        config(spikes={"windows": 3})


def test_a_way_back_is_needed() -> None:
    message = r"^config: spikes\.roll_back = true has nothing to go back to: give checkpoint_every"
    with pytest.raises(ConfigError, match=message):
        config(spikes={"roll_back": True})
    assert config(spikes={"roll_back": True}, checkpoint_every_images=80).spikes.roll_back
