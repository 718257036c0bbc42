"""What is done every so many images: when, in which order, and what a stop leaves for later."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from k_diffusion.training.milestones import OWED, Act, Milestones
from k_diffusion.training.signals import StopAsked
from k_diffusion.training.state import Speed


def trainer(images_seen: int = 0, steps: int = 10, batch_size: int = 32) -> Any:
    config = SimpleNamespace(steps=steps, batch_size=batch_size)
    return SimpleNamespace(images_seen=images_seen, config=config, extra={}, speed=Speed())


def made(done: list[str], stop_in: str = "", owner: Any = None) -> list[Act]:
    """An evaluation every 64 images, snapshots every 96, previews every 64, checkpoints seldom."""

    def do(name: str) -> Any:
        def work() -> None:
            if name == stop_in:
                raise StopAsked(15)
            owed = owner.extra.get(OWED) if owner and name == "checkpoint" else None
            done.append(name if owed is None else f"{name} owing {'+'.join(owed)}")

        return work

    return [
        Act("evaluate", (64,), do("evaluate"), can_wait=True),
        Act("snapshot", (96,), do("snapshot")),
        Act("preview", (64,), do("preview"), can_wait=True),
        Act("checkpoint", (128, None), do("checkpoint"), at_a_stop=True),
    ]


@pytest.mark.parametrize(
    ("at", "options", "names"),
    [
        (32, {}, []),
        (64, {}, ["evaluate", "preview"]),
        (96, {}, ["snapshot"]),
        (128, {}, ["evaluate", "preview", "checkpoint"]),
        (128, {"back": True}, []),
        (32, {"ended": True}, ["evaluate", "snapshot", "preview", "checkpoint"]),
        (32, {"stopped": 2}, ["checkpoint"]),
        (128, {"back": True, "stopped": 2}, ["checkpoint"]),
        (192, {"stopped": 2}, ["snapshot", "checkpoint owing evaluate+preview"]),
    ],
)
def test_what_is_done_in_which_order(at: int, options: dict[str, Any], names: list[str]) -> None:
    done: list[str] = []
    owner = trainer()
    acts = Milestones(owner, made(done, owner=owner))
    stopped = acts.reach(at, **{"ended": False, **options})
    assert done == names
    assert stopped == options.get("stopped")
    assert (OWED in owner.extra) == any("owing" in name for name in names)


def test_a_stop_in_one_of_them_leaves_it_and_what_can_wait() -> None:
    done: list[str] = []
    owner = trainer()
    assert Milestones(owner, made(done, "evaluate", owner)).reach(64, ended=True) == 15
    assert done == ["snapshot", "checkpoint owing evaluate+preview"]
    done.clear()
    owner = trainer()
    assert Milestones(owner, made(done, "preview", owner)).reach(64, ended=False) == 15
    assert done == ["evaluate", "checkpoint owing preview"]
    # The next session does what is owed, and writes the checkpoint again, without debts.
    done.clear()
    assert Milestones(owner, made(done, owner=owner)).make_up() is None
    assert done == ["preview", "checkpoint"]
    assert owner.extra == {}
    assert Milestones(owner, made(done, owner=owner)).make_up() is None
    assert done == ["preview", "checkpoint"]


def test_a_stop_while_it_is_made_up() -> None:
    done: list[str] = []
    owner = trainer()
    owner.extra[OWED] = ["evaluate", "preview"]
    assert Milestones(owner, made(done, "preview", owner)).make_up() == 15
    assert done == ["evaluate", "checkpoint owing preview"]
    assert owner.extra == {OWED: ["preview"]}


def test_what_is_owed_but_no_longer_asked_for_is_forgotten() -> None:
    done: list[str] = []
    owner = trainer()
    owner.extra[OWED] = ["evaluate"]
    assert Milestones(owner, made(done, owner=owner)[1:]).make_up() is None
    assert done == []
    assert owner.extra == {}


@pytest.mark.parametrize("size", [1, 4, 10])
@pytest.mark.parametrize("every", [1, 3, 7, 10, 12, 25, 200])
def test_times_ahead_are_counted_one_by_one(size: int, every: int) -> None:
    act = Act("", (every,), lambda: None)
    for steps, done in itertools.product((1, 2, 9, 12), range(13)):
        if done > steps:
            continue
        seen, total = done * size, steps * size
        ends = range(seen + size, total + size, size)
        wanted = sum(at == total or at // every > (at - size) // every for at in ends)
        assert act.times_ahead(seen, size, total) == wanted, (steps, done)


def test_seconds_ahead_are_those_of_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    owner = trainer(images_seen=64)

    def slow() -> None:
        nonlocal now
        now += 7.0

    acts = [Act("evaluate", (64,), slow, can_wait=True), Act("snapshot", (32,), slow)]
    milestones = Milestones(owner, acts)
    assert milestones.seconds_ahead() == 0.0  # none is known yet
    milestones.reach(64, ended=False)
    # Of 10 steps to 320 images those at 128, 192, 256 and 320 are left; snapshots count as steps.
    assert milestones.seconds_ahead() == 4 * 7.0
    # The evaluation's time is none of the training's, the snapshot's is.
    assert abs(owner.speed.after(70) - 10.0) < 1e-9
