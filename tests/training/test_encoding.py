"""Latents on disk: what is written, by whom, after what; and training on them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.cli.app import main
from k_diffusion.cli.encode import share_of
from k_diffusion.models import Autoencoder, SmallAutoencoder
from k_diffusion.training import (
    ArraySource,
    DataError,
    Digits,
    Trainer,
    save_autoencoder,
)
from k_diffusion.training.dataset import Stream
from k_diffusion.training.encoding import encode
from k_diffusion.training.folder import Folder
from k_diffusion.training.latent_shards import LatentShards


@pytest.fixture(scope="module")
def autoencoder() -> SmallAutoencoder:
    torch.manual_seed(0)
    made = SmallAutoencoder(in_channels=1, latent_channels=2, channels=8, halvings=1)
    made.measure([Digits().images])
    return made.eval()


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_each_step_draws_its_latent_by_its_seed(
    tmp_path: Path, autoencoder: SmallAutoencoder
) -> None:
    digits = Digits("test")
    done = encode(digits, autoencoder, tmp_path, shard_size=100)
    assert (done.images, done.made, done.kept) == (len(digits), 4, 0)
    source = LatentShards(tmp_path)
    assert source.shape == (2, 4, 4)
    assert source.class_names == digits.class_names
    with torch.no_grad():
        mean, logvar = autoencoder.posterior(digits.images)
        exact = autoencoder.encode(digits.images)
    indices = torch.tensor([0, 99, 100, 303, 350, 0])
    means = source.batch(indices)
    assert (means.images - exact[indices]).abs().max() < 1e-6
    assert torch.equal(means.labels, digits.labels[indices])
    drawn = source.batch(indices, list(range(6)))
    assert not torch.equal(drawn.images[0], drawn.images[5])  # another place, another draw
    assert torch.equal(source.batch(indices[4:5], [4]).images[0], drawn.images[4])
    many = source.batch(torch.zeros(4000, dtype=torch.int64), list(range(4000))).images.double()
    raw_std = (0.5 * logvar[0]).exp() * autoencoder.scale[:, None, None]
    assert ((many.mean(0) - exact[0]) / raw_std).abs().max() < 5 / 4000**0.5
    assert (many.std(0) / raw_std - 1).abs().max() < 5 / 8000**0.5
    alone = LatentShards(tmp_path, draw="no")
    assert not alone.augments
    assert torch.equal(alone.batch(indices, list(range(6))).images, means.images)
    assert mean.shape == (len(digits), 2, 4, 4)


def test_statistics_are_of_all_that_training_sees(
    tmp_path: Path, autoencoder: SmallAutoencoder
) -> None:
    digits = Digits("test")
    encode(digits, autoencoder, tmp_path, shard_size=64)
    source = LatentShards(tmp_path)
    with torch.no_grad():
        mean, logvar = (z.double() for z in autoencoder.posterior(digits.images))
    scale = autoencoder.scale.double()[:, None, None]
    z = (mean - autoencoder.shift.double()[:, None, None]) * scale
    squares = z.square() + logvar.exp() * scale**2
    channel = z.mean((0, 2, 3))
    std = (squares.mean((0, 2, 3)) - channel**2).sqrt()
    index = json.loads((tmp_path / "latents.json").read_text())
    assert (torch.tensor(index["mean"]) - channel).abs().max() < 1e-6
    assert (torch.tensor(index["std"]) - std).abs().max() < 1e-6
    assert abs(source.mean - float(z.mean())) < 1e-6
    assert abs(source.std - float((squares.mean() - z.mean() ** 2).sqrt())) < 1e-6
    drawn = Stream(source, len(digits) * 4, seed=0)[0].images
    assert abs(float(drawn.std()) / source.std - 1) < 0.01


def test_the_same_bytes_by_one_process_or_several(
    tmp_path: Path, autoencoder: SmallAutoencoder
) -> None:
    digits = Digits("test")
    encode(digits, autoencoder, tmp_path / "one", shard_size=50)
    first = encode(digits, autoencoder, tmp_path / "two", shard_size=50, process=(1, 2))
    assert first.images is None
    with pytest.raises(DataError, match="has been begun but not finished: the same k-diffusion"):
        LatentShards(tmp_path / "two")
    second = encode(digits, autoencoder, tmp_path / "two", shard_size=50, process=(0, 2))
    assert (first.made, second.made, second.images) == (4, 4, len(digits))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_what_is_there_is_kept_and_what_is_damaged_made_anew(
    tmp_path: Path, autoencoder: SmallAutoencoder
) -> None:
    digits = Digits("test")
    encode(digits, autoencoder, tmp_path, shard_size=100)
    before = hashes(tmp_path)
    (tmp_path / "latents-000001.safetensors").unlink()
    half = tmp_path / "latents-000002.safetensors"
    half.write_bytes(half.read_bytes()[:2000])
    (tmp_path / "latents.json").unlink()
    (tmp_path / ".latents-000001.safetensors.99.tmp").write_text("left behind")
    done = encode(digits, autoencoder, tmp_path, shard_size=100)
    assert (done.made, done.kept) == (2, 2)
    assert hashes(tmp_path) == before
    encode(digits, autoencoder, tmp_path / "other", shard_size=100, dtype=torch.float16)
    (tmp_path / "other" / half.name).replace(half)  # whole, but of something else
    done = encode(digits, autoencoder, tmp_path, shard_size=100)
    assert (done.made, done.kept) == (1, 3)
    assert hashlib.sha256(half.read_bytes()).hexdigest() == before[half.name]


class Slow(ArraySource):
    """Images that take their time."""

    def batch(self, indices: Any, seeds: Any = None) -> Any:
        time.sleep(0.05)
        return super().batch(indices, seeds)


def _encode_slowly(folder: str) -> None:
    torch.set_num_threads(1)  # with others the last bits are others
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(in_channels=1, channels=8, halvings=1)
    images = torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    encode(Slow(images), autoencoder, folder, shard_size=10, say=lambda line: print(line))


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import test_encoding; test_encoding._encode_slowly({str(tmp_path / 'killed')!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    there = len(list((tmp_path / "killed").glob("latents-*")))
    assert 3 <= there < 10
    _encode_slowly(str(tmp_path / "killed"))
    _encode_slowly(str(tmp_path / "whole"))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_broken_images_are_left_out_and_named(
    tmp_path: Path, autoencoder: SmallAutoencoder
) -> None:
    for i in range(7):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"grey {i}\n")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "3.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:2000])
    (tmp_path / "9.png").write_bytes(b"")  # which the scan finds, 3.jpg not
    source = Folder(tmp_path, 8, channels=1, captions="files")
    done = encode(source, autoencoder, tmp_path / "out", shard_size=4)
    assert done.images == 7
    assert {Path(file).name for file in done.bad_files} == {"3.jpg", "9.png"}
    index = json.loads((tmp_path / "out/latents.json").read_text())
    assert [Path(file).name for file in index["bad_files"]] == ["3.jpg", "9.png"]
    latents = LatentShards(tmp_path / "out")
    batch = latents.batch(torch.arange(7))
    assert batch.raws["text"] == [f"grey {i}" for i in range(7)]
    with torch.no_grad():
        grey = torch.arange(7.0).mul(30 / 127.5).sub(1)[:, None, None, None].expand(7, 1, 8, 8)
        assert (batch.images - autoencoder.encode(grey)).abs().max() < 1e-5


def test_what_is_refused(tmp_path: Path, autoencoder: SmallAutoencoder) -> None:
    digits = Digits("test")
    with pytest.raises(DataError, match="augmented anew each time: leave flip"):
        encode(ArraySource(digits.images, flip=True), autoencoder, tmp_path / "x")
    with pytest.raises(DataError, match="does not take these images: x has shape"):
        encode(ArraySource(torch.zeros(2, 3, 8, 8)), autoencoder, tmp_path / "x")
    with pytest.raises(DataError, match="does not take these images: .* multiples of 2"):
        encode(ArraySource(torch.zeros(2, 1, 9, 8)), autoencoder, tmp_path / "x")
    several = ArraySource(digits.images)
    several.buckets = torch.zeros(len(several), dtype=torch.int64)
    with pytest.raises(DataError, match="of several sizes: leave flip, random crop and buckets"):
        encode(several, autoencoder, tmp_path / "x")
    named = r"makes latents that are not finite of image 0 or those after it: encode in float32"
    with pytest.raises(DataError, match=named):
        encode(digits, Overflowing(), tmp_path / "x")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/latents-000000.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"theirs holds latents, but no encode\.json: give another"):
        encode(digits, autoencoder, tmp_path / "theirs")
    encode(digits, autoencoder, tmp_path / "a", shard_size=100)
    with pytest.raises(DataError, match="latents with another shard_size, dtype: give the same"):
        encode(digits, autoencoder, tmp_path / "a", shard_size=99, dtype=torch.float16)
    other = SmallAutoencoder(in_channels=1, latent_channels=2, channels=8, halvings=1)
    with pytest.raises(DataError, match="latents with another autoencoder"):
        encode(digits, other, tmp_path / "a", shard_size=100)
    with pytest.raises(DataError, match="nowhere holds no latents"):
        LatentShards(tmp_path / "nowhere")
    shard = tmp_path / "a/latents-000001.safetensors"
    whole = shard.read_bytes()
    source = LatentShards(tmp_path / "a")
    shard.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"latents-000001\.safetensors are damaged"):
        LatentShards(tmp_path / "a")
    with pytest.raises(DataError, match="have been cut since the run began"):
        source.batch(torch.arange(100, 200), list(range(100)))
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        LatentShards(tmp_path / "a")


class Means(Autoencoder):
    """Halves by means; tells no variance."""

    def __init__(self) -> None:
        super().__init__(1, 1, 2)

    def encode_raw(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    def decode_raw(self, z: torch.Tensor) -> torch.Tensor:
        return z.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Overflowing(Means):
    """As one in float16 whose values grow too large."""

    def encode_raw(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode_raw(x) / 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_codec_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    digits = Digits("test")
    encode(digits, Means(), tmp_path, dtype=dtype)
    source = LatentShards(tmp_path)
    assert not source.augments
    exact = Means().encode(digits.images)
    error = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert (source.batch(torch.arange(len(digits))).images - exact).abs().max() <= error
    with pytest.raises(DataError, match="have no variance to draw by"):
        LatentShards(tmp_path, draw="yes")


def test_training_on_them_resumes_exactly(
    tmp_path: Path, autoencoder: SmallAutoencoder, make_run_config: Any
) -> None:
    encode(Digits(), autoencoder, tmp_path / "latents", shard_size=300)
    model = {
        "type": "tiny", "num_classes": 10, "prediction": "edm", "time_convention": "log_sigma",
        "sigma_data": "auto",
    }  # fmt: skip
    data = {"source": "latents", "path": str(tmp_path / "latents")}
    config = make_run_config(model=model, data=data, total_images=320)
    trainer, losses = Trainer(config), []
    assert trainer.config.model["sigma_data"] == trainer.source.std
    whole = [state.loss for state in Trainer(config)]
    for state in trainer:
        losses.append(state.loss)
        if state.step == 4:
            trainer.save(tmp_path / "x.safetensors")
            break
    again = Trainer(config.model_copy(update={"workers": 2}), resume=tmp_path / "x.safetensors")
    assert losses + [state.loss for state in again] == whole


def test_the_command(
    tmp_path: Path, autoencoder: SmallAutoencoder, capsys: pytest.CaptureFixture[str]
) -> None:
    save_autoencoder(tmp_path / "ae.safetensors", autoencoder)
    for i in range(6):
        Image.new("L", (20, 16), 30 * i).save(tmp_path / f"{i}.png")
    command = ["encode", str(tmp_path), "--autoencoder", str(tmp_path / "ae.safetensors")]
    command += ["--size", "8", "--set", "channels=1", "--shard-size", "2", "--batch-size", "4"]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--process", "1/2"]) == 0
    assert "waits for the shards of other processes" in capsys.readouterr().out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "2 shards written, 1 were there already" in out
    assert "6 latents, 0 images broken" in out
    assert LatentShards(tmp_path / "out").shape == (2, 4, 4)
    assert share_of("", {"RANK": "2", "WORLD_SIZE": "5"}) == (2, 5)
    assert share_of("1/3", {"RANK": "2", "WORLD_SIZE": "5"}) == (1, 3)
    assert share_of("", {}) == (0, 1)
    assert main([*command, "--process", "2/2"]) == 2
    assert "--process 2/2 is no share" in capsys.readouterr().err
    assert main([*command, "--set", "chanels=3"]) == 2
    assert "did you mean data.channels?" in capsys.readouterr().err
    assert main([*command, "--shard-size", "0"]) == 2
    command[command.index("--out") + 1] = str(tmp_path / "means")
    assert main([*command, "--means-only"]) == 0
    assert not LatentShards(tmp_path / "means").augments
