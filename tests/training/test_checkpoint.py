"""Checkpoints: what is written comes back; nothing that is damaged or foreign gets in."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from k_diffusion.denoiser import EDMDenoiser
from k_diffusion.training import checkpoint
from k_diffusion.training.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_info,
    save_checkpoint,
)
from k_diffusion.training.restore import load_denoiser, save_inference

MODEL = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma", "sigma_data": 0.7}


def parts_of(tiny: Any) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    network, average = (tiny(prediction="edm", sigma_data=0.7) for _ in range(2))
    return {
        "model": dict(network.state_dict()),
        "ema": dict(average.state_dict()),
        "optimizer": {"enter.weight/step": torch.tensor(3.0), "none": torch.zeros(0, 2)},
    }


@pytest.fixture
def saved(tmp_path: Path, tiny: Any) -> Path:
    path = tmp_path / "a.safetensors"
    config = {"model": MODEL, "process": {"name": "karras", "sigma_max": 20.0}, "seed": 3}
    save_checkpoint(
        path,
        parts_of(tiny),
        config=config,
        images_seen=640,
        step=20,
        data={"num_classes": 0},
        state={"ema_updates": 20},
    )
    return path


def refused(path: Path) -> str:
    """The one line with which every way of reading refuses a file."""
    lines = set()
    for read in (read_info, load_denoiser, lambda p: read_checkpoint(p, ["model"])):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        lines.add(str(caught.value))
    (line,) = lines
    assert str(path) in line
    assert "\n" not in line
    return line


def test_round_trip(saved: Path, tiny: Any) -> None:
    info, parts = read_checkpoint(saved, ["model", "ema", "optimizer"])
    for part, named in parts_of(tiny).items():
        assert set(parts[part]) == set(named)
        for name, tensor in named.items():
            assert torch.equal(parts[part][name], tensor)
            assert parts[part][name].dtype == tensor.dtype
    assert (info.images_seen, info.step, info.state) == (640, 20, {"ema_updates": 20})
    assert info.config["seed"] == 3
    assert info.data == {"num_classes": 0}
    assert info.parameters == sum(t.numel() for t in parts["model"].values())
    assert info.bytes == saved.stat().st_size
    assert info == read_info(saved)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
    tensors = {str(d): torch.arange(6).reshape(2, 3).T.to(d) for d in dtypes}
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model": tensors}, config={}, images_seen=0, step=0)
    _, parts = read_checkpoint(path, ["model"])
    for name, tensor in tensors.items():
        assert parts["model"][name].dtype == tensor.dtype
        assert torch.equal(parts["model"][name], tensor)


def test_hash_tells_contents_apart(tmp_path: Path) -> None:
    def sha256(value: float, seed: int = 0) -> str:
        tensors = {"model": {"a": torch.tensor([value])}}
        path = tmp_path / "a.safetensors"
        return save_checkpoint(path, tensors, config={"seed": seed}, images_seen=1, step=1)

    assert sha256(1.0) == sha256(1.0) == read_info(tmp_path / "a.safetensors").sha256
    assert len({sha256(1.0), sha256(1.0000001), sha256(1.0, seed=1)}) == 3


def test_denoiser_comes_back(saved: Path, tiny: Any) -> None:
    denoiser, info = load_denoiser(saved)
    assert isinstance(denoiser, EDMDenoiser)
    assert not denoiser.training
    assert denoiser.sigma_data == 0.7
    assert denoiser.process.sigma_max == 20.0  # type: ignore[attr-defined]
    assert info.images_seen == 640
    own = tiny(prediction="edm")
    for weights, part in (("ema", "ema"), ("last", "model")):
        for network in (None, own):
            denoiser, _ = load_denoiser(saved, weights, network=network)
            for name, tensor in denoiser.network.state_dict().items():
                assert torch.equal(tensor, parts_of(tiny)[part][name])
    assert denoiser.network is own


def test_inference_file_has_one_set_of_weights(saved: Path, tmp_path: Path, tiny: Any) -> None:
    small = tmp_path / "small.safetensors"
    for weights, part in (("ema", "ema"), ("last", "model")):
        save_inference(saved, small, weights=weights)
        info = read_info(small)
        assert {name.partition("/")[0] for name in info.tensors} == {"ema"}
        assert info.config == read_info(saved).config
        denoiser, _ = load_denoiser(small)
        for name, tensor in denoiser.network.state_dict().items():
            assert torch.equal(tensor, parts_of(tiny)[part][name])
    with pytest.raises(CheckpointError, match="holds no weights 'last', only ema: ask for 'ema'"):
        load_denoiser(small, "last")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("length", [0x4B50, 0x10280])
def test_header_as_long_as_a_pickle_begins_is_none(tmp_path: Path, length: int) -> None:
    """The first bytes are the header's length, here "PK" or a pickle's 80 02."""
    path, size, padding = tmp_path / "a.safetensors", 0, 0
    while size != length:
        padding = max(0, padding + length - size)
        tensors = {"model": {"a": torch.ones(2)}}
        save_checkpoint(path, tensors, config={"x": "a" * padding}, images_seen=1, step=1)
        size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert read_info(path).parameters == 2


def test_a_single_byte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="is truncated, damaged or no safetensors file"):
        read_info(tmp_path / "a.safetensors")


def test_any_flipped_bit_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [
        *range(8),
        *torch.randint(8, header, (150,), generator=generator).tolist(),
        *torch.randint(header, len(whole), (150,), generator=generator).tolist(),
        header - 1,
        len(whole) - 1,
    ]
    bits = torch.randint(8, (len(places),), generator=generator).tolist()
    for place, bit in zip(places, bits, strict=True):
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        saved.write_bytes(broken)
        with pytest.raises(CheckpointError) as caught:
            read_info(saved)
        assert str(saved) in str(caught.value)
        assert "\n" not in str(caught.value)
    saved.write_bytes(whole)
    read_info(saved)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    line = refused(saved)
    assert "is empty" in line if not share else "truncated, damaged or no safetensors" in line
    saved.write_bytes(whole + b"\0")
    refused(saved)


def test_damaged_tensor_is_named(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    whole[-1] ^= 1
    saved.write_bytes(whole)
    assert "is damaged: tensor " in refused(saved)


def test_swapped_tensors_are_refused(saved: Path) -> None:
    """Each is whole, but they stand under each other's names."""
    _rewrite(saved, lambda t: {**t, "model/enter.weight": t["ema/enter.weight"] + 0})
    assert "tensor model/enter.weight is not what was written" in refused(saved)


def test_lost_and_added_tensors_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    _rewrite(saved, lambda t: {n: v for n, v in t.items() if n != "model/enter.weight"})
    assert "tensor model/enter.weight is missing" in refused(saved)
    saved.write_bytes(whole)
    _rewrite(saved, lambda t: {**t, "model/more": torch.ones(2)})
    assert "tensor model/more is not what was written" in refused(saved)


def _rewrite(path: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, metadata)


def test_edited_metadata_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    assert whole.count(b'\\"images_seen\\":640') == 1
    saved.write_bytes(whole.replace(b'\\"images_seen\\":640', b'\\"images_seen\\":641'))
    assert "its metadata is not what was written" in refused(saved)


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_not_opened(saved: Path, protocol: int) -> None:
    saved.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    assert "is a pickle, which could run code" in refused(saved)


def test_torch_save_is_not_opened(saved: Path) -> None:
    torch.save({"model": torch.ones(3)}, saved)
    assert "is a pickle, which could run code" in refused(saved)


def test_other_files(saved: Path) -> None:
    saved.write_text("just a text file that is long enough")
    assert "truncated, damaged or no safetensors file" in refused(saved)
    save_file({"weight": torch.ones(2)}, saved)
    assert "not one written by k_diffusion training" in refused(saved)
    assert "is a folder: name the .safetensors file" in refused(saved.parent)


def test_missing_file_names_its_neighbour(saved: Path) -> None:
    assert f"did you mean {saved}?" in refused(saved.with_name("b.safetensors"))
    assert "there is no folder" in refused(saved.parent / "no" / "b.safetensors")


def test_other_version(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    assert "has version 1 of the format; this release reads version 2" in refused(saved)


def test_network_that_does_not_fit(saved: Path, tiny: Any) -> None:
    def loading(network: nn.Module) -> str:
        before = {n: t.clone() for n, t in network.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load_denoiser(saved, network=network)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name])
        return str(caught.value)

    assert "enter.weight has shape (8, 1, 3, 3), but the network's has (9, 1, 3, 3)" in loading(
        tiny(width=9)
    )
    more = tiny()
    more.more = nn.Linear(2, 2)
    assert "more.bias is missing (and 1 more)" in loading(more)
    less = tiny()
    del less.time
    assert "time.bias has no place in the network (and 1 more)" in loading(less)


def test_network_that_cannot_be_built(tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "a.safetensors"
    for model in ({**MODEL, "prediction": "sure"}, {**MODEL, "depth": 3}):
        save_checkpoint(path, parts_of(tiny), config={"model": model}, images_seen=0, step=0)
        with pytest.raises(CheckpointError, match="holds a network that cannot be built here"):
            load_denoiser(path)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(
    saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    old = saved.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(saved, parts_of(tiny), config={}, images_seen=1, step=1)
    assert str(caught.value) == (
        f"checkpoint {saved} could not be written (no space left); what was there before is "
        "untouched"
    )
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_file_and_folder_are_flushed_in_order(
    saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed before its bytes lie on the disk, a file could be whole in name only."""
    events = []
    fsync, replace, read = os.fsync, os.replace, checkpoint.read_info

    def note_fsync(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def note_replace(*args: Any) -> None:
        events.append("rename")
        replace(*args)

    def note_forget(handle: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        events.append("forget")

    def note_read(path: Path) -> Any:
        events.append("read")
        return read(path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(checkpoint, "read_info", note_read)
    if hasattr(os, "posix_fadvise"):  # what is read back is then what lies on the disk
        monkeypatch.setattr(os, "posix_fadvise", note_forget)
    save_checkpoint(saved, parts_of(tiny), config={}, images_seen=1, step=1)
    kinds = ["file", "forget", "read", "rename", "folder"]
    assert events == (kinds if os.path.isdir("/proc/self/fd") else events)


KILLED = """
import os, sys, torch
from k_diffusion.training.checkpoint import save_checkpoint
replace = os.replace
def die(*args):
    os.kill(os.getpid(), 9)
if sys.argv[2] == "die":
    os.replace = die
tensors = {"a": torch.full((1000,), 2.0)}
save_checkpoint(sys.argv[1], {"model": tensors}, config={}, images_seen=2, step=2)
"""


def test_killed_in_mid_write_leaves_the_old_file(saved: Path) -> None:
    old = read_info(saved).sha256
    ended = subprocess.run([sys.executable, "-c", KILLED, str(saved), "die"], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read_info(saved).sha256 == old
    assert len(list(saved.parent.iterdir())) == 2  # the half-written one stands beside it


def test_a_checkpoint_is_readable_as_any_file_of_its_user(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"ema": {"w": torch.ones(2)}}, config={}, images_seen=0, step=0)
    assert path.stat().st_mode == other.stat().st_mode
