"""Two processes and one are the same run, in whichever way the processes share it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k_diffusion.models import MODELS
from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.health import ONLY_NORM, BadStep, joined
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.joining import blocks_of
from k_diffusion.training.parallel import Processes, check_processes
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
Launch = Callable[..., list[str]]
STEPS = 50
RECORDED = ("x0", "sigma", "noise", "indices", "class_label")
MODEL = {"num_classes": 10, "prediction": "edm", "time_convention": "log_sigma"}
# Clipping acts in most steps; two processes with 16 images each draw dropout as one does that
# computes 16 at a time.
CHANGES: dict[str, Any] = {
    "model": {"type": "blocks", "dropout": 0.2, "sigma_data": "auto", **MODEL},
    "total_images": STEPS * 32,
    "micro_batch_size": 16,
    "grad_clip": 0.3,
    "condition_dropout": 0.3,
}
WAYS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "averaged": {"micro_batch_size": "auto"},
    "sharded": {"parallel": "fsdp"},
}


class Recorded(Trainer):
    """A trainer that keeps what its steps learn from, and how they went."""

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.learned: list[dict[str, Tensor]] = []
        self.seen: list[list[float]] = []
        compute = self.gradient.compute

        def noted(inputs: Inputs) -> Any:
            facts = {name: getattr(inputs, name) for name in RECORDED[:-1]} | dict(inputs.condition)
            self.learned.append({name: value.clone() for name, value in facts.items()})
            return compute(inputs)

        self.gradient.compute = noted  # type: ignore[method-assign]

    def run(self, steps: int | None = None) -> Recorded:
        for state in self:
            self.seen.append([state.loss, state.grad_norm])
            if state.step == steps:
                break
        return self

    def recorded(self) -> dict[str, Tensor]:
        """Each of `RECORDED`, of all steps: shape (steps, B, ...)."""
        return {name: torch.stack([step[name] for step in self.learned]) for name in RECORDED}


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    tensors = {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}
    # How often the network was called is no matter of the run's, but of its processes.
    return {n: t for n, t in tensors.items() if not n.endswith("calls")}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


# ---------------------------------------------------------------- in two processes


def as_one(folder: Path) -> None:
    """Train in each way; the main process leaves what there was to see."""
    config_of = prepared()
    for name, changes in WAYS.items():
        trainer = Recorded(config_of(**{**CHANGES, **changes})).run()
        parts = trainer.processes.gather(trainer.recorded())
        trainer.save(folder / f"{name}.safetensors")
        if trainer.processes.main:
            whole = {n: torch.cat([part[n] for part in parts], 1) for n in RECORDED}
            torch.save([whole, trainer.seen], folder / f"{name}.pt")
    # A resume on another number of processes, from one and to one.
    Recorded(config_of(**CHANGES)).run(10).save(folder / "ten.safetensors")
    trainer = Recorded(config_of(**CHANGES), resume=folder / "one_ten.safetensors").run(20)
    parts = trainer.processes.gather(trainer.recorded())
    if trainer.processes.main:
        whole = {n: torch.cat([part[n] for part in parts], 1) for n in RECORDED}
        torch.save([whole, trainer.seen], folder / "from_one.pt")
    with pytest.raises(ConfigError, match="batch_size = 33 cannot be shared by 2 processes"):
        Trainer(config_of(**CHANGES, batch_size=33))


def prepared() -> Callable[..., TrainConfig]:
    """What the fixtures do, in a process of its own."""
    import conftest

    torch.set_num_threads(1)
    MODELS["tiny"], MODELS["blocks"] = conftest.Tiny, conftest.Blocks
    function: Callable[..., TrainConfig] = conftest.config_of
    return function


def test_two_processes_and_one_are_the_same_run(
    make_run_config: MakeConfig, launch: Launch, tmp_path: Path
) -> None:
    config = make_run_config(**CHANGES)
    Recorded(config).run(10).save(tmp_path / "one_ten.safetensors")
    launch(__file__, "as_one")
    one = Recorded(config).run()
    one.save(tmp_path / "one.safetensors")
    inputs, seen = one.recorded(), torch.tensor(one.seen)
    assert len(seen) == STEPS
    assert (seen[:, 1] > 0.3).sum() > 20  # clipped
    weights = contents(tmp_path / "one.safetensors")
    for way in WAYS:
        theirs, their_seen = torch.load(tmp_path / f"{way}.pt")
        for name in RECORDED:
            assert torch.equal(theirs[name], inputs[name]), (way, name)
        assert (torch.tensor(their_seen) - seen).abs().max() < 1e-5, way
        assert furthest(contents(tmp_path / f"{way}.safetensors"), weights) < 1e-4, way
    resumed = Recorded(config, resume=tmp_path / "ten.safetensors").run(20)
    theirs, their_seen = torch.load(tmp_path / "from_one.pt")
    for name in RECORDED:
        assert torch.equal(resumed.recorded()[name], inputs[name][10:20]), name
        assert torch.equal(theirs[name], inputs[name][10:20]), name
    for losses in (resumed.seen, their_seen):
        assert (torch.tensor(losses) - seen[10:20]).abs().max() < 1e-5


# ---------------------------------------------------------------- trouble in one of two


def troubles(folder: Path) -> None:
    config_of = prepared()
    import conftest

    # Memory runs out on the second process alone, in the third step.
    fails_at = 3

    class Narrow(conftest.Tiny):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if len(x) > 5 and trainer.step >= fails_at - 1 and trainer.processes.index == 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x, *args, **kwargs)

    MODELS["narrow"] = Narrow
    model = {"type": "narrow", "sigma_data": "auto", **MODEL}
    changes = {**CHANGES, "model": model, "total_images": 160}
    losses = {}
    for steps, micro_batch in ((99, "auto"), (fails_at, "auto"), (0, "auto")):
        fails_at = steps
        trainer = Recorded(config_of(**{**changes, "micro_batch_size": micro_batch}))
        trainer.run()
        losses[steps] = trainer.seen
        # 16 fail and 8 fail; from the beginning, 5 is the most of the second process.
        sizes = trainer.processes.gather(trainer.micro_batch)
        assert sizes == [{99: 16, 3: 4, 0: 5}[steps]] * 2, (steps, sizes)
    for steps in (3, 0):
        assert (torch.tensor(losses[steps]) - torch.tensor(losses[99])).abs().max() < 1e-5

    # Bad images on both processes, on one, and a bad gradient.
    digits = Digits()
    for parallel in ("ddp", "fsdp"):
        config = config_of(**{**CHANGES, "parallel": parallel, "total_images": 160})
        numbers = Trainer(config).stream.indices(0, 160)
        images = digits.images.clone()
        bad = numbers[[32 + 3, 32 + 20, 96 + 30]]
        images[bad] = torch.nan
        source = ArraySource(images, digits.labels, digits.class_names)
        trainer = Trainer(config, source=source)
        reports = [state.report for state in trainer]
        told = str(reports)
        assert trainer.processes.gather(told) == [told] * 2
        assert [report is None for report in reports] == [True, False, True, False, True]
        assert reports[1] is not None
        assert reports[3] is not None
        assert reports[1].images == tuple(f"image {n}" for n in bad[:2].tolist())
        assert reports[3].images == (f"image {bad[2]}",)
        assert reports[1].where == reports[3].where == "the data"
        assert trainer.skipped_steps == 2
        assert all(bool(torch.isfinite(t).all()) for t in trainer.ema.state_dict().values())
        # The weights have a wrong value on every process; the module is found by all together.
        with torch.no_grad():
            trainer.network.blocks[1].bias.fill_(math.inf)
        state = next(iter(trainer_again(trainer)))
        assert state.report is not None
        assert state.report.where == "blocks.1 (Conv2d)" or parallel == "fsdp", state.report
        assert "blocks.1" in state.report.where
        assert len(state.report.images) == 8
        assert state.report.more_images == 24

    # What one process finds of broken files all know, in the end.
    trainer = Trainer(config_of(**{**CHANGES, "total_images": 96}))
    for state in trainer:
        if state.step == 1:
            trainer.source.bad_files[f"of {trainer.processes.index}"] = "broken"
    assert set(trainer.source.bad_files) == {"of 0", "of 1"}

    processes = trainer.processes
    with pytest.raises(RuntimeError, match="disk"):
        processes.on_main(lambda: (_ for _ in ()).throw(RuntimeError("disk full")))
    assert processes.on_main(lambda: processes.index) == 0
    assert processes.least(processes.index + 3) == 3
    assert processes.any(processes.index == 1)
    assert not processes.any(False)


def trainer_again(trainer: Trainer) -> Trainer:
    """The same trainer with some steps left to do."""
    trainer.step = 0
    return trainer


def test_trouble_in_one_process_is_everybodys(launch: Launch) -> None:
    launch(__file__, "troubles")


def runs_out(folder: Path) -> None:
    config_of = prepared()
    import conftest

    class Narrow(conftest.Tiny):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if len(x) > 5 and trainer.step == 2 and trainer.processes.index == 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x, *args, **kwargs)

    MODELS["narrow"] = Narrow
    model = {"type": "narrow", "sigma_data": "auto", **MODEL}
    trainer = Trainer(config_of(**{**CHANGES, "model": model, "micro_batch_size": 7}))
    list(trainer)


def test_out_of_memory_with_a_number_ends_the_run(launch: Launch) -> None:
    _, said = launch(__file__, "runs_out", fails=True)
    assert said.splitlines()[-1].endswith(
        "gradient.OutOfMemory: process 1 of 2 ran out of memory with 7 images "
        "at once: set micro_batch_size below 7, or to 'auto' with parallel = 'ddp'"
    )
    assert "During handling" not in said


# ---------------------------------------------------------------- the program


PROGRAM = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"),
        *("--main_process_port", "0"),  # one that is free
    ],
}


def test_launched_stopped_and_resumed(launch: Launch, tmp_path: Path) -> None:
    """torchrun, then SIGTERM to it, then accelerate launch goes on: one voice, the same weights."""
    config, out = tmp_path / "run.toml", tmp_path / "out"
    rng = np.random.default_rng(0)  # the digits would take each process a second of imports
    images = rng.integers(0, 256, (400, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(400) % 10)
    config.write_text(
        'total_images = 320\nbatch_size = 32\nlog_every_images = 32\nparallel = "fsdp"\n'
        f'[data]\nsource = "arrays"\npath = "{tmp_path / "data.npz"}"\n'
        '[model]\ntype = "unet"\nchannels = 8\nhead_channels = 8\nchannel_mults = [1]\nblocks = 1\n'
        "attention = [false]\nnum_classes = 10\n"
    )
    plugin = tmp_path / "pause.py"
    plugin.write_text(
        "import os, signal, time\n"
        "from k_diffusion.training import trainer\n"
        "step = trainer.Trainer.train_step\n"
        "def slow(self, *args):\n"
        "    if self.step == 4:\n"
        "        open(os.path.join(os.environ['PLACE'], os.environ['RANK']), 'w').close()\n"
        "        handler = signal.getsignal(signal.SIGTERM)\n"
        "        while signal.getsignal(signal.SIGTERM) is handler:  # until it has come\n"
        "            time.sleep(0.01)\n"
        "    return step(self, *args)\n"
        "trainer.Trainer.train_step = slow\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLACE": str(tmp_path)}
    arguments = ["-m", "k_diffusion.cli", "train", "--config", str(config), "--out", str(out)]

    def start(program: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, *PROGRAM[program], *arguments, *options]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    metrics = out / "metrics.jsonl"
    stopped = start("torchrun", "--plugin", str(plugin))
    try:
        while stopped.poll() is None and not all((tmp_path / n).exists() for n in "01"):
            time.sleep(0.05)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate(timeout=200)
    finally:
        stopped.kill()
    assert stopped.returncode != 0
    assert said[1].count("stopped by SIGTERM at 160 of 320 images") == 1, said
    assert said[1].count("k-diffusion train: stopped at 160 of 320 images") == 1, said
    checkpoint = out / "checkpoint-000000000160"
    assert checkpoint.is_dir()
    assert read_info(checkpoint).images_seen == 160
    resumed = start("accelerate", "--resume")
    said = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    assert said[0].count("trained on 320 images") == 1
    assert said[0].count("checkpoint: ") == 1
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint-000000000160",
        "checkpoint-000000000320.safetensors",
        "metrics.jsonl",
    ]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["images_seen"] for line in lines if line["event"] == "train"] == [
        32 * n for n in range(1, 11)
    ]
    from k_diffusion.training.config_file import load_config

    alone = run_training(load_config(config, {"out": str(tmp_path / "alone")}), progress=False)
    assert (
        furthest(contents(out / "checkpoint-000000000320.safetensors"), contents(alone.checkpoint))
        < 1e-4
    )


# ---------------------------------------------------------------- without processes


class Count:
    process_index, num_processes, device = 0, 1, torch.device("cpu")


def test_one_process_alone_agrees_with_itself() -> None:
    processes = Processes(Count())
    assert processes.main
    assert processes.gather(3) == [3]
    assert processes.on_main(lambda: 4) == 4
    assert processes.least(5) == 5
    assert processes.any(True)
    assert not processes.any(False)


def test_what_cannot_be_shared_is_refused(make_run_config: MakeConfig) -> None:
    check_processes(make_run_config(), 32)
    with pytest.raises(ConfigError, match="batch_size = 32 cannot be shared by 3 processes: give"):
        check_processes(make_run_config(), 3)
    with pytest.raises(ConfigError, match="micro_batch_size = 'auto' does not go with parallel"):
        make_run_config(parallel="fsdp", micro_batch_size="auto")
    with pytest.raises(ConfigError, match="precision = 'fp16' does not go with parallel = 'fsdp'"):
        make_run_config(parallel="fsdp", precision="fp16")
    measured = make_run_config(noise_scale_decay=0.9, parallel="fsdp")
    with pytest.raises(ConfigError, match="noise_scale_decay is given, but a process has one"):
        check_processes(measured, 32)
    check_processes(make_run_config(noise_scale_decay=0.9), 32)


def test_blocks_that_are_gathered_by_themselves() -> None:
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(2, 2)
            inner = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
            self.levels = nn.ModuleList([nn.ModuleList([inner, nn.SiLU()]), nn.Linear(2, 2)])
            self.part = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))

    network = Network()
    expected = [network.levels[0][0], network.levels[1], network.part[0][0]]  # type: ignore[index]
    assert list(map(id, blocks_of(network))) == list(map(id, expected))
    network.shard_blocks = lambda: [network.enter]  # type: ignore[assignment]
    assert blocks_of(network) == [network.enter]


def test_reports_of_several_processes_are_one() -> None:
    def report(images: tuple[str, ...], more: int, sigma: float, where: str) -> BadStep:
        return BadStep(3, math.nan, math.nan, images, more, (sigma, 2 * sigma), where)

    names = tuple(f"image {n}" for n in range(8))
    both = joined([report(names, 5, 1.0, "the data"), report(names, 1, 0.5, "enter (Conv2d)")])
    assert both.images == names
    assert both.more_images == 14
    assert both.sigmas == (0.5, 2.0)
    assert both.where == "the data"
    # Who had no bad image knows nothing of the levels, nor of the module.
    one = joined([report((), 0, 9.0, ONLY_NORM), report(names[:1], 0, 1.0, "the data")])
    assert (one.images, one.sigmas, one.where) == (names[:1], (1.0, 2.0), "the data")
    # With no bad image anywhere, of any shard's gradient that was bad.
    norm = joined([report((), 0, 1.0, ONLY_NORM), report((), 0, 3.0, "the gradient of a")])
    assert (norm.sigmas, norm.where) == ((1.0, 6.0), "the gradient of a")
    assert joined([report((), 0, 1.0, ONLY_NORM)]).where == ONLY_NORM
