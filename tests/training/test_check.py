"""Looking at a run before it: what is found, what is refused, and that nothing is left behind."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.cli import main
from k_diffusion.models import MODELS
from k_diffusion.training.check import SavedTensors, check_run, decode_sample
from k_diffusion.training.config import ConfigError
from k_diffusion.training.dataset import ArraySource, DataError
from k_diffusion.training.folder import Folder
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer, TrainingError
from k_diffusion.utils.images import save_png


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_found_is_what_training_has(make_run_config: Any, tmp_path: Path) -> None:
    config = make_run_config()
    found = check_run(config)
    assert not Path(config.out).exists()
    trainer = Trainer(config)
    loss, norm, _ = trainer.train_step(trainer.stream[0], config.optimizer.lr)
    assert (found.loss, found.grad_norm) == (loss, norm)
    assert found.config == trainer.config
    assert (found.images, found.decoded, found.num_classes) == (len(trainer.source), 512, 10)
    assert found.shape == (1, 8, 8)
    parameters = list(trainer.network.parameters())
    floats = sum(p.numel() for p in parameters)
    assert found.parameters == floats
    assert found.weight_bytes == 4 * floats + 8  # and a buffer of int64
    assert found.gradient_bytes == 4 * floats
    # Two averages of the gradient, and a count of steps a weight.
    assert found.optimizer_bytes == 4 * (2 * floats + len(parameters))
    assert found.average_bytes == found.weight_bytes
    assert (found.micro_batch, found.parts, found.processes) == (32, 1, 1)
    assert found.saved_bytes > 32 * 8 * 8 * 8 * 4  # one image of eight channels a sample, and more
    assert (found.peak_bytes, found.device_bytes, found.device) == (None, None, "cpu")
    assert found.free_bytes > 0


def test_what_is_out_of_room_is_refused(
    make_run_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="nothing can be written into /proc"):
        check_run(make_run_config(out="/proc/run"))
    room = check_run(make_run_config(out=str(tmp_path / "run"))).checkpoint_bytes
    for free, fits in ((room, True), (room - 1, False)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        if fits:
            check_run(make_run_config(out=str(tmp_path / "run")))
            continue
        with pytest.raises(ConfigError, match=r"disk with .* left, and a checkpoint takes about"):
            check_run(make_run_config(out=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_the_summary(make_run_config: Any) -> None:
    text = str(check_run(make_run_config(micro_batch_size=10, total_images=1000)))
    lines = dict(line.split(":", 1) for line in text.splitlines())
    assert list(lines) == ["data", "model", "memory", "step", "run"]
    assert "1,438 images of 1 x 8 x 8, 10 classes; 512 tried, none broken" in lines["data"]
    assert "tiny, edm, 257 parameters" in lines["model"]
    assert "32 images in 4 parts of at most 10; loss " in lines["step"]
    assert "32 steps, 1,000 images; a checkpoint takes about " in lines["run"]
    assert "weights 1.04 kB, gradient 1.03 kB, optimiser 2.08 kB" in lines["memory"]


def test_what_is_drawn_on_the_way_is_looked_at(make_run_config: Any, tmp_path: Path) -> None:
    """Missing weights of an extractor are named before anything is trained, and nothing is drawn or
    fetched for it; so is what previews cannot show."""
    evaluate = {"every_images": 320, "metrics": ["fid"], "images": 40}
    found = check_run(make_run_config(evaluate=evaluate))
    assert found.evaluation == (
        "fid of 40 samples every 320 images, by small (which is trained on the data first)"
    )
    assert f"figures: {found.evaluation}" in str(found)
    for weights, extractor in (("none.pth", "inception"), ("none.safetensors", "small")):
        named = {"extractor": extractor, "weights": str(tmp_path / weights)}
        with pytest.raises(ConfigError, match=f"'{extractor}' cannot be had: .*{weights} is miss"):
            check_run(make_run_config(evaluate={**evaluate, **named}))
    check_run(make_run_config(evaluate={"weights": str(tmp_path / "none.pth")}))  # never needed
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="told nothing anyway: leave it out"):
        check_run(
            make_run_config(
                model={"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"},
                preview={"every_images": 320, "guidance": 2.0},
            )
        )


def test_every_average_and_an_optimiser_of_one_s_own_count(make_run_config: Any) -> None:
    def sgd(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), lr=0.1)

    found = check_run(make_run_config(ema={"profiles": [0.05, 0.1]}), optimizer=sgd)
    assert found.average_bytes == 3 * found.weight_bytes
    assert found.optimizer_bytes == 0
    assert found.checkpoint_bytes == 4 * found.weight_bytes


def test_micro_batches_keep_less(make_run_config: Any) -> None:
    whole, cut = (check_run(make_run_config(micro_batch_size=m)) for m in (32, 8))
    assert whole.saved_bytes / cut.saved_bytes == pytest.approx(4, rel=0.01)


def test_an_auto_micro_batch_is_found(
    make_run_config: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    class Narrow(tiny):  # type: ignore[misc]
        def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
            if len(x) > 5 and x.device.type != "meta":
                raise torch.OutOfMemoryError("no more memory")
            return super().forward(x, t, class_label)

    monkeypatch.setitem(MODELS, "narrow", Narrow)
    model = {"type": "narrow", "num_classes": 10, "prediction": "edm", "sigma_data": 0.5}
    found = check_run(make_run_config(model=model, micro_batch_size="auto"))
    assert (found.micro_batch, found.parts) == (5, 7)
    assert "32 images in 7 parts of at most 5" in str(found)


# ---------------------------------------------------------------- memory


def test_saved_tensors_are_counted_once_and_until_they_are_released() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    saved = SavedTensors(network)
    kept = 4 * (4 * 8 + 4 * 16)  # the input, and what ReLU gives: to its own backward, and on
    with saved.watching():
        out = network(torch.randn(4, 8)).sum()
        assert saved.peak == kept
        out.backward()
        del out
        gc.collect()
        network(torch.randn(2, 8)).sum().backward()
        assert saved.peak == kept
        both = [network(torch.randn(4, 8)).sum() for _ in range(2)]
        assert saved.peak == 2 * kept
        sum(both).backward()  # type: ignore[union-attr]
    network(torch.randn(400, 8)).sum().backward()
    assert saved.peak == 2 * kept


def test_gradients_are_the_same_while_they_are_counted() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3), nn.Softplus())
    x = torch.randn(3, 1, 9, 9)
    network(x).square().mean().backward()
    plain = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    with SavedTensors(network).watching():
        network(x).square().mean().backward()
    for p, wanted in zip(network.parameters(), plain, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, wanted)


# ---------------------------------------------------------------- data


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        save_png(folder / f"{i}.png", torch.rand(1, 8, 8) * 2 - 1)
    return folder


def test_broken_images_are_counted_and_named(pictures: Path, make_run_config: Any) -> None:
    from PIL import Image

    (pictures / "header.png").write_bytes(b"\x89PNG\r\n")
    big = torch.linspace(0, 1, 64 * 64).reshape(64, 64).mul(255).byte().numpy()
    Image.fromarray(big).save(pictures / "cut.jpg", quality=95)
    whole = (pictures / "cut.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # its header is whole
    data = {"source": "folder", "path": str(pictures), "size": 8, "channels": 1}
    model = {"type": "tiny", "prediction": "edm", "sigma_data": 0.5}
    found = check_run(make_run_config(data=data, model=model))
    assert sorted(Path(file).name for file in found.bad_files) == ["cut.jpg", "header.png"]
    assert (found.images, found.decoded) == (7, 7)  # the header's alone is known before
    text = str(found)
    assert "7 images of 1 x 8 x 8; 7 tried, 2 broken" in text
    assert "cut.jpg (" in text.splitlines()[1]
    source = Folder(pictures, 8, 1)
    assert len(source.bad_files) == 1
    decode_sample(source, 7)
    assert len(source.bad_files) == 2


def test_a_sample_is_spread_over_all_images(pictures: Path) -> None:
    source, seen = Folder(pictures, 8, 1), []
    inner = source.batch

    def batch(indices: Tensor, seeds: Any = None) -> Any:
        seen.extend(indices.tolist())
        return inner(indices, seeds)

    source.batch = batch  # type: ignore[method-assign]
    assert decode_sample(source, 3) == 3
    assert seen == [0, 2, 4]
    seen.clear()
    assert decode_sample(source, 100) == 6
    assert seen == list(range(6))


def test_what_is_not_finite_ends_the_check(make_run_config: Any) -> None:
    images = torch.rand(40, 1, 8, 8)
    images[17] = torch.nan
    model = {"type": "tiny", "prediction": "edm", "sigma_data": 0.5}
    config = make_run_config(model=model)
    with pytest.raises(DataError, match="image 17 holds values that are not finite"):
        check_run(config, source=ArraySource(images))
    with pytest.raises(TrainingError, match="the first step is not finite: loss nan"):
        check_run(config, source=ArraySource(images), sample=3)


def test_float16_may_begin_with_losses_that_are_scaled_too_much(
    make_run_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"bad": 3}

    class Scaled(Trainer):
        scaler = object()  # type: ignore[assignment]

        def train_step(self, batch: Any, lr: float) -> Any:
            self.step += 1
            return 0.5, 0.25, "too large" if self.step <= steps["bad"] else None

    monkeypatch.setattr("k_diffusion.training.check.Trainer", Scaled)
    found = check_run(make_run_config(max_skipped=4))
    assert (found.loss, found.grad_norm) == (0.5, 0.25)
    steps["bad"] = 4
    with pytest.raises(TrainingError, match="the first 4 steps are not finite: too large"):
        check_run(make_run_config(max_skipped=4))


# ---------------------------------------------------------------- the folder


def test_the_folder_stays_as_it_is(make_run_config: Any) -> None:
    config = make_run_config(total_images=64)
    result = run_training(config, progress=False)
    out = Path(config.out)
    before = contents(out)
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run(config)
    assert check_run(config, overwrite=True).resumed_from is None
    found = check_run(make_run_config(total_images=128), resume="auto")
    assert found.resumed_from == result.checkpoint
    assert f"128 images, from {result.checkpoint}" in str(found)
    assert contents(out) == before


def test_a_folder_that_cannot_be_is_refused(make_run_config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="which is no folder"):
        check_run(make_run_config(out=str(tmp_path / "file/run")))
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        check_run(make_run_config(out=str(tmp_path / "file")))


def test_by_the_command_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "model": {"type": "tiny", "prediction": "edm", "sigma_data": "auto"},
        "data": {"source": "digits"},
        "total_images": 640,
        "out": str(tmp_path / "run"),
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    argv = ["train", "--config", str(path), "--check"]
    assert main([*argv, "--batch-size", "auto"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("data:    1,438 images")
    assert "128 images in one part" in said.out
    assert not said.err
    monkeypatch.setenv("RANK", "1")  # of two, the first says it
    assert main(argv) == 0
    assert not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    assert main([*argv, "--set", "model.num_classes=3"]) == 1
    assert "num_classes is 3, but the data has 10" in capsys.readouterr().err
    assert main([*argv, "--set", "model.numclasses=3"]) == 2
    assert list(tmp_path.iterdir()) == [path]
