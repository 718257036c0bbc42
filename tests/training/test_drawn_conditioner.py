"""Conditioners that draw something for themselves: it is the run's, and in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import CONDITIONERS, Conditioner
from k_diffusion.training import load_conditioner, read_info, save_inference
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


@dataclass(frozen=True, kw_only=True)
class ShuffledConfig:
    reads: str = "label"


class Shuffled(Conditioner):
    """Class indices in an order that it has drawn."""

    Config = ShuffledConfig
    keywords = ("class_label",)

    def __init__(self, config: Any = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        self.register_buffer("order", torch.randperm(10))

    def forward(self, raw: Any) -> dict[str, Tensor]:
        return {"class_label": self.order[raw]}

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"class_label": torch.full((batch,), 10)}


class Loaded(Shuffled):
    """One that would find its weights on the disk."""

    loads_weights = True


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in {"shuffled": Shuffled, "loaded": Loaded}.items():
        monkeypatch.setitem(CONDITIONERS, name, kind)


def order(trainer: Trainer) -> list[int]:
    assert isinstance(trainer.conditioner, Shuffled)
    return list(trainer.conditioner.order.tolist())


def test_the_seed_decides_it(make_run_config: MakeConfig) -> None:
    trainers = []
    for before in (1, 2):
        torch.manual_seed(before)
        trainers.append(Trainer(make_run_config(conditioner={"type": "shuffled"})))
    one, other = trainers
    assert order(one) == order(other)
    another = Trainer(make_run_config(conditioner={"type": "shuffled"}, seed=4))
    assert order(another) != order(one)
    # The first weights are those of a run without it.
    weights = Trainer(make_run_config()).network.state_dict()
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_checkpoints_and_files_for_sampling_hold_it(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(conditioner={"type": "shuffled"}, total_images=64)
    result = run_training(config, progress=False)
    info = read_info(result.checkpoint)
    trained = read_checkpoint(result.checkpoint, ["conditioner"])[1]["conditioner"]["order"]
    save_inference(result.checkpoint, tmp_path / "model.safetensors")
    slim = read_info(tmp_path / "model.safetensors")
    assert (
        slim.parameters
        == info.parameters
        == sum(t.numel() for t in Trainer(config).network.state_dict().values())
    )
    for seed, said in enumerate((info, slim)):
        torch.manual_seed(seed)
        loaded = load_conditioner(said)
        assert isinstance(loaded, Shuffled)
        assert torch.equal(loaded.order, trained)


def test_a_resume_takes_it_from_the_checkpoint(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """One given as an object has drawn it elsewhere."""
    config = make_run_config(total_images=320)
    torch.manual_seed(0)
    whole = Trainer(config, conditioner=Shuffled())
    losses = []
    for state in whole:
        losses.append(state.loss)
        if state.step == 5:
            whole.save(tmp_path / "five.safetensors")
    torch.manual_seed(1)
    resumed = Trainer(config, conditioner=Shuffled(), resume=tmp_path / "five.safetensors")
    assert order(resumed) == order(whole)
    assert [state.loss for state in resumed] == losses[5:]


def test_what_is_loaded_from_elsewhere_is_not_held(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = Trainer(make_run_config(conditioner={"type": "loaded"}))
    trainer.save(tmp_path / "none.safetensors")
    names = read_info(tmp_path / "none.safetensors").tensors
    assert not any(name.startswith("conditioner/") for name in names)


def test_a_run_that_begins_from_weights_takes_it_with_them(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """The classes were learned in this order; in another one the weights would know nothing."""
    options = {"conditioner": {"type": "shuffled"}, "total_images": 64}
    before = run_training(make_run_config(**options), progress=False)
    known = read_checkpoint(before.checkpoint, ["conditioner"])[1]["conditioner"]["order"].tolist()
    config = make_run_config(
        **options, out=str(tmp_path / "new"), seed=9, init_from=str(before.checkpoint)
    )
    assert order(Trainer(config)) == known
    assert order(Trainer(config.model_copy(update={"init_from": None}))) != known
