"""The established names of `utils`: tensors, modules, averages, learning rates, files."""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

import k_diffusion.utils as utils

ESTABLISHED = {
    "CSVLogger", "ConstantLRWithWarmup", "EMAWarmup", "ExponentialLR", "FolderOfImages",
    "InverseLR", "append_dims", "download_file", "ema_update", "ema_update_dict",
    "enable_stratified", "enable_stratified_accelerate", "eval_mode", "from_pil_image",
    "get_safetensors_metadata", "hf_datasets_augs_helper", "n_params", "rand_cosine_interpolated",
    "rand_log_logistic", "rand_log_normal", "rand_log_uniform", "rand_split_log_normal",
    "rand_v_diffusion", "stratified_settings", "stratified_uniform", "stratified_with_settings",
    "tf32_mode", "to_pil_image", "train_mode",
}  # fmt: skip


def test_names() -> None:
    assert set(utils.__all__) == ESTABLISHED
    assert set(dir(utils)) >= ESTABLISHED
    assert {name for name in ESTABLISHED if hasattr(utils, name)} == ESTABLISHED
    from k_diffusion.utils import append_dims

    assert append_dims is utils.append_dims
    with pytest.raises(AttributeError, match=r"'k_diffusion\.utils' has no attribute 'append_dim'"):
        _ = utils.append_dim


# ---------------------------------------------------------------- tensors and modules


def test_append_dims() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert utils.append_dims(x, 4).shape == (2, 3, 1, 1)
    assert torch.equal(utils.append_dims(x, 4)[..., 0, 0], x)
    assert utils.append_dims(x, 2).shape == (2, 3)
    assert utils.append_dims(torch.tensor(3.0), 2).shape == (1, 1)
    turned = utils.append_dims(x.T, 3)
    turned[0, 0, 0] = 9.0
    assert x[0, 0] == 9, "a view, of what is not contiguous too"
    with pytest.raises(ValueError, match=r"2 dimensions, shape \(2, 3\), .* target_dims 1"):
        utils.append_dims(x, 1)


def test_tf32_mode() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    other = not before[0], not before[1]
    with utils.tf32_mode(cudnn=other[0]):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (other[0], before[1])
        with utils.tf32_mode(matmul=other[1]):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == other
    with pytest.raises(KeyError), utils.tf32_mode(*other):
        raise KeyError((cudnn.allow_tf32, matmul.allow_tf32) == other)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


def test_n_params() -> None:
    module = nn.Linear(3, 4)
    module.bias.requires_grad_(False)
    assert utils.n_params(nn.Sequential(module, nn.BatchNorm1d(5))) == 16 + 10


def test_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1][0].eval()
    model[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    for mode, block in ((False, utils.eval_mode(model)), (True, utils.train_mode(model))):
        with block as inside:
            assert inside is model
            assert {module.training for module in model.modules()} == {mode}
        assert [module.training for module in model.modules()] == before
    with utils.train_mode(model, False):
        assert not model.training
    with utils.eval_mode(model):
        model.insert(0, nn.Dropout())  # a part that comes in between
        model[1].train()
    assert [module.training for module in model.modules()] == [before[0], True, *before[1:]]
    with pytest.raises(KeyError), utils.eval_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [before[0], True, *before[1:]]


# ---------------------------------------------------------------- averages


class Averaged(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.register_buffer("mean", torch.full((1,), value))
        self.register_buffer("count", torch.tensor(int(value)))


def test_ema_update() -> None:
    model, average = Averaged(3.0, torch.bfloat16), Averaged(1.0)
    assert utils.ema_update(model, average, 0.75) is None
    assert (average.weight - 1.5).abs().max() < 1e-7
    assert average.weight.dtype == torch.float32
    assert average.mean.item() == 3
    assert average.count.item() == 3
    assert model.weight[0].item() == 3
    utils.ema_update(model, average, 0.75)
    assert (average.weight - 1.875).abs().max() < 1e-7


def test_ema_update_refuses_another_model_whole() -> None:
    model, average = Averaged(3.0), Averaged(1.0)
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="only one has buffer 'extra'"):
        utils.ema_update(model, average, 0.5)
    average.gain = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="only one has parameter 'gain'"):
        utils.ema_update(model, average, 0.5)
    assert average.weight[0].item() == 1


def test_ema_update_dict() -> None:
    values: dict[str, Any] = {"loss": 1.0}
    first = torch.tensor(4.0)
    assert utils.ema_update_dict(values, {"loss": 2.0, "norm": first}, 0.75) is values
    assert values["loss"] == pytest.approx(1.25, abs=1e-15)
    assert values["norm"] is first
    utils.ema_update_dict(values, {"norm": torch.tensor(8.0)}, 0.75)
    assert values["norm"].item() == 5
    assert values["loss"] == pytest.approx(1.25, abs=1e-15)
    assert first.item() == 4, "what was given is not changed"


def test_ema_warmup() -> None:
    """1 - (1 + n / inv_gamma)^-power between its limits, from `start_at` on."""
    average = utils.EMAWarmup()
    seen, mean = [], 0.0
    for n in range(6):
        decay = average.get_value()
        mean = decay * mean + (1 - decay) * n**2
        seen.append(n**2)
        assert mean == pytest.approx(sum(seen) / len(seen), abs=1e-12), "a plain average"
        average.step()
    warmup = utils.EMAWarmup(2.0, 0.5, min_value=0.1, max_value=0.6, start_at=3)
    values = []
    for _ in range(20):
        values.append(warmup.get_value())
        warmup.step()
    assert values[:4] == [0.1] * 4
    assert values[9] == pytest.approx(1 - (1 + 6 / 2) ** -0.5, abs=1e-15)
    assert values[-1] == 0.6
    copied = utils.EMAWarmup(9.0)
    state = warmup.state_dict()
    assert state == {
        "inv_gamma": 2.0, "power": 0.5, "min_value": 0.1, "max_value": 0.6, "start_at": 3,
        "last_epoch": 20,
    }  # fmt: skip
    copied.load_state_dict(state)
    copied.last_epoch = 9
    assert copied.get_value() == values[9]
    state["last_epoch"] = 0
    assert warmup.last_epoch == 20


# ---------------------------------------------------------------- learning rates

SCHEDULES: list[tuple[str, dict[str, float], Any]] = [
    ("InverseLR", {"inv_gamma": 5.0, "power": 0.7}, lambda n: (1 + n / 5) ** -0.7),
    ("InverseLR", {"min_lr": 0.02}, lambda n: max(0.2, 1 / (1 + n))),
    ("ExponentialLR", {"num_steps": 7.0}, lambda n: 0.5 ** (n / 7)),
    (
        "ExponentialLR",
        {"num_steps": 2, "decay": 0.3, "min_lr": 0.01},
        lambda n: max(0.1, 0.3 ** (n / 2)),
    ),
    ("ConstantLRWithWarmup", {}, lambda n: 1.0),
]


def optimizer() -> torch.optim.SGD:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.4}], 0.1)


@pytest.mark.parametrize(("name", "options", "expected"), SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.9])
def test_learning_rates(name: str, options: dict[str, float], expected: Any, warmup: float) -> None:
    sgd = optimizer()
    schedule = getattr(utils, name)(sgd, **options, warmup=warmup, verbose=False)
    assert isinstance(schedule, LRScheduler)
    rates = []
    for _ in range(12):
        rates.append(sgd.param_groups[0]["lr"])
        assert schedule.get_last_lr()[0] == rates[-1]
        sgd.step()
        schedule.step()
    for n, rate in enumerate(rates):
        assert rate == pytest.approx(0.1 * expected(n) * (1 - warmup ** (n + 1)), rel=1e-12)
    if "min_lr" not in options:
        assert sgd.param_groups[1]["lr"] == pytest.approx(4 * sgd.param_groups[0]["lr"], rel=1e-12)
    # What is saved goes on in another object.
    again = optimizer()
    resumed = getattr(utils, name)(again, **options)
    resumed.load_state_dict(schedule.state_dict())
    sgd.step(), schedule.step(), again.step(), resumed.step()
    assert resumed.get_last_lr() == schedule.get_last_lr()
    assert resumed.warmup == warmup


@pytest.mark.parametrize("name", ["InverseLR", "ExponentialLR", "ConstantLRWithWarmup"])
def test_learning_rate_arguments(name: str) -> None:
    options = {"num_steps": 3} if name == "ExponentialLR" else {}
    for warmup in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"warmup must lie in \[0, 1\), .* got {warmup}"):
            getattr(utils, name)(optimizer(), warmup=warmup, **options)
    parameters = list(inspect.signature(getattr(utils, name)).parameters)
    between = {
        "InverseLR": ["inv_gamma", "power", "warmup", "min_lr"],
        "ExponentialLR": ["num_steps", "decay", "warmup", "min_lr"],
        "ConstantLRWithWarmup": ["warmup"],
    }[name]
    assert parameters == ["optimizer", *between, "last_epoch", "verbose"]
    groups = optimizer()
    for group in groups.param_groups:
        group["initial_lr"] = group["lr"]
    resumed = getattr(utils, name)(groups, last_epoch=4, warmup=0.5, **options)
    assert resumed.last_epoch == 5


# ---------------------------------------------------------------- files


def test_download(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights" * 1000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    target = tmp_path / "deep" / "down" / "weights.bin"
    assert utils.download_file(str(target), source.as_uri(), digest.upper()) == target
    assert target.read_bytes() == source.read_bytes()
    source.unlink()
    assert utils.download_file(target, source.as_uri(), digest) == target, "there already"
    assert utils.download_file(target, source.as_uri()) == target
    assert os.listdir(target.parent) == ["weights.bin"]


def test_a_wrong_hash_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "weights.bin"
    source.write_bytes(b"other")
    with pytest.raises(OSError, match=f"should be {'0' * 64} for file://.*source$"):
        utils.download_file(target, source.as_uri(), "0" * 64)
    assert os.listdir(target.parent) == []
    target.write_bytes(b"mine")
    with pytest.raises(OSError, match="was there already: delete it to fetch it from file://"):
        utils.download_file(target, source.as_uri(), "0" * 64)
    assert target.read_bytes() == b"mine"


def test_a_broken_transfer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import urllib.request

    class Response(io.BytesIO):
        headers: ClassVar[dict[str, str]] = {"Content-Length": "10"}

    with monkeypatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", lambda url: Response(b"half"))
        with pytest.raises(OSError, match="https://x/y broke off after 4 of 10 bytes"):
            utils.download_file(tmp_path / "y", "https://x/y")
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="missing"):
        utils.download_file(tmp_path / "y", (tmp_path / "missing").as_uri())
    assert os.listdir(tmp_path) == []


def test_safetensors_metadata(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "a", {"config": "{}"})
    save_file({"w": torch.zeros(1)}, tmp_path / "b")
    assert utils.get_safetensors_metadata(tmp_path / "a") == {"config": "{}"}
    assert utils.get_safetensors_metadata(str(tmp_path / "b")) is None


def test_csv_logger(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    logger = utils.CSVLogger(str(path), ["step", "loss"])
    logger.write(1, 0.5)
    assert path.read_text() == "step,loss\n1,0.5\n", "each line is on disk at once"
    assert (logger.filename, logger.columns) == (path, ["step", "loss"])
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match=r"log\.csv is closed: make another CSVLogger"):
        logger.write(2, 0.25)
    with utils.CSVLogger(path, ["step", "loss"]) as logger:
        logger.write(2, 0.25)
    assert logger.file.closed
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    empty = tmp_path / "empty.csv"
    empty.touch()
    with utils.CSVLogger(empty, ("a", "b")):
        pass
    assert empty.read_text() == "a,b\n"
    with pytest.raises(FileNotFoundError):
        utils.CSVLogger(tmp_path / "nowhere" / "log.csv", ["a"])


def test_a_forgotten_logger_closes_its_file(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = utils.CSVLogger(tmp_path / "log.csv", ["a"]).file
        gc.collect()
    assert file.closed
    assert caught == []


# ---------------------------------------------------------------- a folder of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "directory.png").mkdir()
    for name, value in (("c.PNG", 3), ("b/a.webp", 2), ("a.jpg", 1)):
        pixels = np.full((4, 5), 80 * value, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_of_images(folder: Path) -> None:
    images = utils.FolderOfImages(str(folder))
    assert isinstance(images, Dataset)
    assert images.paths == [folder / "a.jpg", folder / "b" / "a.webp", folder / "c.PNG"]
    assert len(images) == 3
    assert repr(images) == f'FolderOfImages(root="{folder}", len: 3)'
    (image,) = images[-1]
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert np.asarray(image)[0, 0].tolist() == [240, 240, 240]
    tensors = utils.FolderOfImages(folder, transform=utils.from_pil_image)
    (batch,) = next(iter(DataLoader(tensors, batch_size=3)))
    assert batch.shape == (3, 3, 4, 5)
    assert (batch[:, 0, 0, 0] - (torch.tensor([80.0, 160, 240]) / 127.5 - 1)).abs().max() < 0.02


def test_a_broken_image_is_named(folder: Path) -> None:
    whole = (folder / "c.PNG").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (folder / "a.jpg").write_bytes(content)
        with pytest.raises(OSError, match=r"image .*a\.jpg cannot be decoded: \w"):
            _ = utils.FolderOfImages(folder)[0]
    images = utils.FolderOfImages(folder)
    assert images[2]
    (folder / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        _ = images[0]
    with pytest.raises(NotADirectoryError, match="there is no folder of images .*missing"):
        utils.FolderOfImages(folder / "missing")


def test_copies(folder: Path) -> None:
    """Loader processes get a copy."""
    assert copy.deepcopy(utils.FolderOfImages(folder))[0][0].size == (5, 4)
