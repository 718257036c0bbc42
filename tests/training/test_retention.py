"""Which checkpoints stay: a function of their names alone, and nothing goes too early."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.training import retention, run_training
from k_diffusion.training.checkpoint import CheckpointError
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.retention import (
    checkpoint_path,
    images_of,
    list_checkpoints,
    passed,
    remove_surplus,
    surplus,
)
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def test_names_tell_the_clock(tmp_path: Path) -> None:
    for images in (0, 7, 10**11):
        path = checkpoint_path(tmp_path, images)
        path.touch()
        assert images_of(path) == images
    for other in ("checkpoint-1.safetensors", "checkpoint-000000000001.pt", "model.safetensors"):
        (tmp_path / other).touch()
    (tmp_path / "checkpoint-00000000000x.safetensors").touch()
    assert [images_of(path) for path in list_checkpoints(tmp_path)] == [0, 7, 10**11]


def test_a_multiple_is_passed_once() -> None:
    for batch in (1, 7, 32, 250):
        for every in (1, 10, 100, 96):
            ends = range(batch, 40 * batch + 1, batch)
            for multiple in range(every, ends[-1] + 1, every):
                first = min(end for end in ends if end >= multiple)
                assert passed(first, batch, every)
            count = sum(passed(end, batch, every) for end in ends)
            assert count == len({end // every for end in ends} - {0})
    assert not passed(100, 10, None)


@pytest.mark.parametrize(
    ("found", "newest", "keep", "every", "later", "old"),
    [
        ([32, 64, 96, 128], 128, 2, None, [], [32, 64]),
        ([32, 64, 96, 128], 128, 1, None, [], [32, 64, 96]),
        ([32, 64, 96, 128], 128, 9, None, [], []),
        ([32, 64, 96, 128], 128, 1, 64, [], [32, 96]),
        # The first step at or after 100 and 200 ends at 128 and 224.
        ([96, 128, 160, 192, 224, 256], 256, 1, 100, [], [96, 160, 192]),
        ([96, 128, 160, 192, 224, 256], 256, 2, 100, [], [96, 160, 192]),
        ([96, 128, 160, 192, 224, 256], 256, 3, 100, [], [96, 160]),
        # A resume from 96 gave up what lies after.
        ([32, 64, 96, 128, 160, 192], 128, 2, 64, [160, 192], [32]),
    ],
)
def test_what_goes(
    found: list[int], newest: int, keep: int, every: int | None, later: list[int], old: list[int]
) -> None:
    went = surplus(reversed(found), newest, keep=keep, keep_every=every, batch_size=32)
    assert went == (later, old)


def test_a_run_keeps_the_multiples_for_ever(make_run_config: MakeConfig) -> None:
    """Also where no checkpoint would be written there but for them."""
    config = make_run_config(
        checkpoint_every_images=96, keep_every_images=250, keep_checkpoints=2, total_images=1280
    )
    run_training(config, progress=False)
    # The steps that reach 250, 500, 750, 1000, 1250, and the newest two.
    kept = [images_of(path) for path in list_checkpoints(config.out)]
    assert kept == [256, 512, 768, 1024, 1248, 1280]
    again = make_run_config(**{**config.to_json(), "total_images": 1600, "keep_every_images": 500})
    run_training(again, resume="auto", progress=False)
    kept = [images_of(path) for path in list_checkpoints(config.out)]
    assert kept == [512, 1024, 1504, 1536, 1600]


def test_the_old_one_goes_after_the_new_one_stands(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []

    def look(newest: Path, *arguments: Any) -> None:
        before = [images_of(path) for path in list_checkpoints(newest.parent)]
        seen.append((images_of(newest), before))
        remove_surplus(newest, *arguments)

    monkeypatch.setattr("k_diffusion.training.run.remove_surplus", look)
    config = make_run_config(checkpoint_every_images=320, keep_checkpoints=1)
    run_training(config, progress=False)
    assert seen == [(320, [320]), (640, [320, 640])]
    assert [images_of(path) for path in list_checkpoints(config.out)] == [640]


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.filterwarnings("ignore")  # torch's, of the storage of shards
def test_what_the_run_gave_up_goes(
    make_run_config: MakeConfig, tmp_path: Path, suffix: str
) -> None:
    """Steps 2 and 3 are passed over: a checkpoint there that does not know it is of before."""
    trainer, said = Trainer(make_run_config()), list[str]()
    for trainer.step, trainer.passed_over in (
        (1, []), (2, []), (3, [(1, 3)]), (4, []), (5, [(1, 3)]), (6, [(1, 3)])
    ):  # fmt: skip
        trainer.save(checkpoint_path(tmp_path, trainer.images_seen, not suffix))
    newest = list_checkpoints(tmp_path)[-1]
    config = make_run_config(keep_checkpoints=9, keep_every_images=32)
    remove_surplus(newest, config, said.append)
    assert len(list_checkpoints(tmp_path)) == 6
    remove_surplus(newest, config, said.append, [(1, 3)])
    assert [images_of(p) // 32 for p in list_checkpoints(tmp_path)] == [1, 3, 4, 5, 6]
    assert len(said) == 1
    files = list(newest.parent.glob("checkpoint-000000000096*/record.json"))
    for file in files:
        file.write_text(file.read_text() + " ")
    if not files:
        checkpoint_path(tmp_path, 96).write_bytes(b"")
    remove_surplus(newest, config, said.append, [(1, 3)])  # damaged: it cannot say that it knows
    assert [images_of(p) // 32 for p in list_checkpoints(tmp_path)] == [1, 4, 5, 6]


def test_a_folder_of_shards_goes_as_a_file_does(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    for images in (32, 64, 96):
        folder = checkpoint_path(tmp_path, images, sharded=True)
        folder.mkdir()
        (folder / "shard.safetensors").touch()
    whole = checkpoint_path(tmp_path, 96)
    whole.touch()
    assert [images_of(p) for p in list_checkpoints(tmp_path)] == [32, 64, 96, 96]
    assert list_checkpoints(tmp_path)[-1] == whole
    remove_surplus(whole, make_run_config(keep_checkpoints=2), print)
    assert [p.name[-3:] for p in list_checkpoints(tmp_path)] == ["064", "096", "ors"]


def test_what_cannot_be_removed_is_told(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    checkpoint_path(tmp_path, 32).touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    newest = checkpoint_path(tmp_path, 64)
    newest.touch()
    said: list[str] = []
    remove_surplus(newest, make_run_config(keep_checkpoints=1), said.append)
    assert len(said) == 1
    assert said[0].startswith(f"{checkpoint_path(tmp_path, 32)} cannot be removed (")
    assert newest.exists()


def test_half_written_files_go_and_others_stay(tmp_path: Path) -> None:
    half = tmp_path / ".checkpoint-000000000064.safetensors.123.tmp"
    other = tmp_path / ".model.safetensors.123.tmp"
    for path in (half, other):
        path.touch()
    retention.remove_half_written(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.filterwarnings("ignore")  # torch's, of the storage of shards
def test_what_a_kill_left_of_shards_is_in_nobodys_way(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = Trainer(make_run_config())
    trainer.save(tmp_path / "x")
    (tmp_path / ".x.old.tmp").mkdir()
    (tmp_path / ".x.old.tmp" / "shard").touch()
    trainer.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.filterwarnings("ignore")  # torch's, of the storage of shards
def test_shards_that_a_kill_left_without_their_name_have_it_again(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, folder = Trainer(make_run_config()), tmp_path / "checkpoint-000000000000"
    old, new = (folder.with_name(f".{folder.name}{end}") for end in (".old.tmp", ".tmp"))
    trainer.save(folder)
    rename = Path.rename

    def killed(self: Path, target: Path) -> None:
        if self == new:
            raise OSError("killed")
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        for _ in range(2):  # the second write finds what the first left, and puts it back
            with pytest.raises(CheckpointError, match="killed"):
                trainer.save(folder)
            assert [path.exists() for path in (old, folder)] == [True, False]
    result = run_training(
        make_run_config(out=str(tmp_path), total_images=32), resume="auto", progress=False
    )
    assert result.resumed_from == folder
    assert not old.exists()


def test_what_a_run_was_removing_stays_away(tmp_path: Path) -> None:
    """It is no checkpoint any more: a part of it may be gone."""
    folder = checkpoint_path(tmp_path, 32, sharded=True)
    folder.mkdir()
    (folder / "shard").touch()
    removed: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", removed.append)
        retention._remove(folder)
    assert [path.exists() for path in removed] == [True]
    retention.put_back(tmp_path)
    assert not folder.exists()
    retention.remove_half_written(tmp_path)
    assert not list(tmp_path.iterdir())
