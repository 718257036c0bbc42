"""Checkpoints that somebody made, with hashes that fit: refused by name, and never a crash."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.training import sharded
from k_diffusion.training.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_info,
    save_checkpoint,
)
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.parallel import Processes
from k_diffusion.training.resume import facts_of, tensors_of
from k_diffusion.training.retention import latest_checkpoint
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
Change = Callable[[dict[str, Any]], Any]
WEIGHT = "model/enter.weight"


@pytest.fixture
def folder(tmp_path: Path, make_run_config: MakeConfig, recwarn: Any) -> Path:
    """A whole checkpoint in shards, of this process alone."""
    trainer = Trainer(make_run_config())
    next(iter(trainer))
    path = tmp_path / "checkpoint-000000000032"
    parts = {"model": tensors_of(trainer)["model"]}
    processes = Processes(trainer.accelerator)
    sharded.save_sharded(path, parts, processes, lambda: facts_of(trainer))
    assert read_info(path).step == 1
    return path


def crafted(folder: Path, record: Change | None = None, manifest: Change | None = None) -> None:
    """Change a folder in place and make its hashes fit again."""
    if record:
        said = json.loads((folder / "record.json").read_text())
        record(said)
        (folder / "record.json").write_text(json.dumps(said))
    sealed = json.loads((folder / "manifest.json").read_text())
    sealed["files"]["record.json"] = sharded._sha256(folder / "record.json")
    if manifest:
        manifest(sealed)
    with contextlib.suppress(ValueError):  # of what no seal can be made
        sealed["sha256"] = sharded.seal_of(sealed)
    (folder / "manifest.json").write_text(json.dumps(sealed))


def tensor(facts: Any) -> Change:
    return lambda said: said["tensors"].update({WEIGHT: facts})


NO_RECORD = "its record is not one that k_diffusion writes: it needs config, images_seen"
RECORDS: dict[str, tuple[Change, str]] = {
    "a function of torch": (tensor(["load", [8, 1, 3, 3]]), f"says of tensor {WEIGHT} what cannot"),
    "no dtype": (tensor(["Tensor", [8, 1, 3, 3]]), "what cannot be"),
    "huge": (tensor(["float32", [2**45]]), "what cannot be"),
    "too huge for torch": (tensor(["float32", [0, 2**40, 2**40]]), "what cannot be"),
    "negative": (tensor(["float32", [-1]]), "what cannot be"),
    "a truth": (tensor(["float32", [True]]), "what cannot be"),
    "not two facts": (tensor("float32"), "what cannot be"),
    "a shape that is a number": (tensor(["float32", 8]), "what cannot be"),
    "tensors missing": (lambda said: said.pop("tensors"), "says nothing of its tensors"),
    "tensors in a list": (lambda said: said.update(tensors=[]), "says nothing of its tensors"),
    "state missing": (lambda said: said.pop("state"), NO_RECORD),
    "config a text": (lambda said: said.update(config="x"), NO_RECORD),
    "before the beginning": (lambda said: said.update(step=-1), NO_RECORD),
    "a truth for a step": (lambda said: said.update(step=True), NO_RECORD),
}
MANIFESTS: dict[str, tuple[Change, str]] = {
    "no format": (lambda m: m.pop("format"), "it is of format None 1"),
    "another version": (lambda m: m.update(version="7"), "it is of format k_diffusion 7"),
    "files in a list": (lambda m: m.update(files=[]), "names no record.json among its files"),
    "no record": (lambda m: m["files"].pop("record.json"), "names no record.json among its"),
    "not a number": (lambda m: m.update(note=math.nan), "manifest.json cannot be read"),
}


def refused(path: Path, problem: str) -> None:
    for read in (read_info, lambda path: read_checkpoint(path, ["model", "ema"])):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        line = str(caught.value)
        assert problem in line
        assert str(path) in line
        assert "\n" not in line


@pytest.mark.parametrize("name", RECORDS)
def test_a_folder_whose_record_says_what_cannot_be(folder: Path, name: str) -> None:
    change, problem = RECORDS[name]
    crafted(folder, record=change)
    refused(folder, problem)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_folder_whose_manifest_says_what_cannot_be(folder: Path, name: str) -> None:
    change, problem = MANIFESTS[name]
    crafted(folder, manifest=change)
    refused(folder, problem)


@pytest.mark.parametrize("name", ["manifest.json", "record.json"])
def test_json_deeper_than_a_reader_goes(folder: Path, name: str) -> None:
    """And the newest one that is whole is taken in its place."""
    before = folder.with_name("checkpoint-000000000016")
    shutil.copytree(folder, before)
    (folder / name).write_text("[" * 200_000)
    if name == "record.json":
        crafted(folder)
    refused(folder, "")
    said: list[str] = []
    assert latest_checkpoint(folder.parent, said.append) == before
    assert len(said) == 1


STATES: dict[str, tuple[Change, str]] = {
    "empty": (lambda s: s.clear(), "it lacks 'ema_updates'"),
    "skipped_steps": (lambda s: s.update(skipped_steps="3"), "'3' is no whole number of at least"),
    "micro_batch": (lambda s: s.update(micro_batch=0), "0 is no whole number of at least 1"),
    "passed_over": (lambda s: s.update(passed_over=5), "not iterable"),
    "passed_over backwards": (lambda s: s.update(passed_over=[[5, 3]]), "3 is no whole number of"),
    "passed_over so far": (lambda s: s.update(passed_over=[[0, 10**30]]), "is no whole number"),
    "scaler": (lambda s: s.update(scaler=3), "3 is no table of scale, growth_factor"),
    "scaler's": (lambda s: s.update(scaler={"scale": 2.0}), "is no table of scale, growth_factor"),
    "noise_scale": (lambda s: s.update(noise_scale={"updates": 1}), "is no table of updates"),
    "noise_scale's": (
        lambda s: s.update(noise_scale={"updates": 1, "square": "1", "variance": 1.0}),
        "square = '1' is no number",
    ),
    "optimizer": (lambda s: s.update(optimizer=3), "not subscriptable"),
    "optimizer's weights": (lambda s: s["optimizer"].update(weights={"a": 1}), "of the optimizer"),
    "optimizer's groups": (
        lambda s: s["optimizer"].update(groups=[{"params": []}]), "of the optimizer",
    ),
    "extra": (lambda s: s.update(extra=5), "not iterable"),
}  # fmt: skip


def test_a_state_that_cannot_be_changes_nothing(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = Trainer(make_run_config())
    next(iter(trainer))
    path, parts = tmp_path / "crafted.safetensors", tensors_of(trainer)
    facts = facts_of(trainer)
    save_checkpoint(path, parts, **facts)
    other = Trainer(make_run_config(), resume=path)
    next(iter(other))
    before = {name: weight.clone() for name, weight in other.network.state_dict().items()}
    for name, (change, problem) in STATES.items():
        crafted_facts = json.loads(json.dumps(facts))
        change(crafted_facts["state"])
        save_checkpoint(path, parts, **crafted_facts)
        with pytest.raises(CheckpointError, match="its state is not one that k_diff") as caught:
            other.go_back(path, 1, 1)
        assert problem in str(caught.value), name
        assert "\n" not in str(caught.value)
        assert other.step == 2
        assert all(before[n].equal(w) for n, w in other.network.state_dict().items()), name
