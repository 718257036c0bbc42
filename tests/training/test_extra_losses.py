"""Losses beside the denoising loss: what they see, what they add, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training import ArraySource, Digits, Outcome, Trainer, register_loss
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.extra_losses import _RAWS, LOSSES, ExtraLoss
from k_diffusion.training.loss import denoising_loss, make_weighting
from k_diffusion.training.resume import go_on_from

MakeConfig = Callable[..., TrainConfig]
FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}


@pytest.fixture(autouse=True)
def losses() -> Iterator[list[Outcome]]:
    """Three losses; gives the list of the outcomes that they saw."""
    seen: list[Outcome] = []
    before = dict(LOSSES), dict(_RAWS)

    @register_loss("absolute")
    def absolute(outcome: Outcome, *, power: float = 1.0) -> Tensor:
        seen.append(outcome)
        return (outcome.denoised - outcome.x0).abs().pow(power).flatten(1).mean(1)

    @register_loss("masked", raws=["mask"])
    def masked(outcome: Outcome) -> Tensor:
        seen.append(outcome)
        square = (outcome.denoised - outcome.x0).square() * outcome.raws["mask"]
        return outcome.weight * square.flatten(1).mean(1)

    class Base(nn.Module):
        def __init__(self, *, width: int = 2) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, width, 3)

        def forward(self, outcome: Outcome) -> Tensor:
            error = self.conv(outcome.denoised) - self.conv(outcome.x0)
            return error.square().flatten(1).mean(1) + self.conv.weight.square().mean()

    class Learned(Base):
        trained = True

    register_loss("frozen")(Base)
    register_loss("learned")(Learned)
    yield seen
    for table, kept in zip((LOSSES, _RAWS), before, strict=True):
        table.clear()
        table.update(kept)


def step_inputs(trainer: Trainer) -> Any:
    return trainer.inputs.draw(trainer.stream[0], 0)


def forward(trainer: Trainer) -> Tensor:
    inputs = step_inputs(trainer)
    result: Tensor = trainer.objective(inputs.x0, inputs.sigma, inputs.noise, **inputs.keywords)
    return result


def test_it_is_added_with_its_weight(make_run_config: MakeConfig) -> None:
    extra = {"absolute": {"weight": 0.25, "power": 1.5}}
    trainer = Trainer(make_run_config(model=FLOW, loss={"extra": extra}))
    inputs = step_inputs(trainer)
    got = forward(trainer)
    plain = denoising_loss(
        trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "flow", **inputs.condition
    )
    alpha = (1 - inputs.sigma).reshape(-1, 1, 1, 1).float()
    x = alpha * inputs.x0 + inputs.sigma.reshape(-1, 1, 1, 1).float() * inputs.noise
    denoised = trainer.denoiser(x, inputs.sigma, **inputs.condition)
    added = (denoised - inputs.x0).abs().pow(1.5).flatten(1).mean(1)
    assert (got - plain - 0.25 * added).abs().max() < 1e-5
    # Gathered values that held their graphs would hold a step's memory.
    assert not any(term.requires_grad for term in trainer.objective.terms().values())
    first = None
    for state in trainer:  # each step's own, not those since the start
        first = first or state
        assert set(state.terms) == {"denoising", "absolute"}
        expected = state.terms["denoising"] + 0.25 * state.terms["absolute"]
        assert abs(state.loss - expected) < 1e-5
    assert first is not None
    assert abs(first.terms["absolute"] - added.mean().item()) < 1e-5


def test_it_sees_what_came_of_the_step(make_run_config: MakeConfig, losses: list[Outcome]) -> None:
    trainer = Trainer(make_run_config(model=FLOW, loss={"extra": {"absolute": {}}}))
    inputs = step_inputs(trainer)
    forward(trainer)
    (outcome,) = losses
    assert torch.equal(outcome.x0, inputs.x0)
    assert torch.equal(outcome.sigma, inputs.sigma)
    assert torch.equal(outcome.noise, inputs.noise)
    h = ((1 - inputs.sigma) / inputs.sigma).log()
    assert (outcome.half_log_snr - h).abs().max() < 1e-9
    wide = inputs.sigma.reshape(-1, 1, 1, 1)
    x = (1 - wide) * inputs.x0 + wide * inputs.noise
    assert (outcome.x - x).abs().max() < 1e-6
    assert (outcome.weight / make_weighting("flow")(h) - 1).abs().max() < 1e-6
    assert torch.equal(outcome.condition["class_label"], inputs.condition["class_label"])
    assert outcome.denoised.requires_grad
    assert outcome.raws == {}


def test_weight_is_1_unless_given() -> None:
    assert ExtraLoss("absolute").weight == 1


# ---------------------------------------------------------------- raw inputs


def masks(as_list: bool = False) -> ArraySource:
    digits = Digits("train")
    mask = (
        torch.rand(digits.images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    ).float()
    return ArraySource(digits.images, raws={"mask": list(mask) if as_list else mask})


@pytest.mark.parametrize("as_list", [False, True])
def test_raw_inputs_go_with_their_samples(
    make_run_config: MakeConfig, losses: list[Outcome], as_list: bool
) -> None:
    config = make_run_config(
        model={"type": "tiny"}, loss={"extra": {"masked": {}}}, micro_batch_size=10
    )
    source = masks(as_list)
    trainer = Trainer(config, source=source)
    batch = trainer.stream[0]
    next(iter(trainer))
    assert [len(outcome.x0) for outcome in losses] == [8, 8, 8, 8]
    seen = torch.cat([outcome.raws["mask"] for outcome in losses])
    masks_of = torch.stack(list(source.raws["mask"]))
    assert torch.equal(seen, masks_of[batch.indices])


def test_raw_inputs_that_are_not_there(make_run_config: MakeConfig) -> None:
    config = make_run_config(model={"type": "tiny"}, loss={"extra": {"masked": {}}})
    with pytest.raises(ConfigError, match="asks for the raw input 'mask', but the data has none"):
        Trainer(config)
    words = ArraySource(torch.zeros(40, 1, 8, 8), raws={"mask": ["a"] * 40})
    with pytest.raises(ConfigError, match="'mask', which is no numbers of one shape"):
        Trainer(config, source=words)


# ---------------------------------------------------------------- modules


def test_a_modules_weights_are_frozen_unless_it_says_otherwise(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    extra = {"frozen": {"width": 3}, "learned": {}}
    trainer = Trainer(make_run_config(model=FLOW, loss={"extra": extra}))
    own = {name: p.detach().clone() for name, p in trainer.objective.own_tensors().items()}
    assert set(own) == {
        f"extra_modules.{name}.conv.{kind}" for name in extra for kind in ("weight", "bias")
    }
    assert own["extra_modules.frozen.conv.weight"].shape == (3, 1, 3, 3)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    for state in trainer:
        if state.step == 3:
            break
    now = trainer.objective.own_tensors()
    for name, value in own.items():
        changes = "learned" in name and "weight" in name  # the bias has no say
        assert torch.equal(now[name], value) != changes
    assert all((a != b).any() for a, b in zip(trainer.network.parameters(), before, strict=True))
    # All of them are in the checkpoint, and come back, whatever was drawn meanwhile.
    path = tmp_path / "a.safetensors"
    trainer.save(path)
    with torch.no_grad():
        for p in trainer.objective.extra_modules.parameters():
            p.zero_()
    go_on_from(path, trainer)
    _, parts = read_checkpoint(path, ["loss"])
    assert set(parts["loss"]) == set(own)
    now = trainer.objective.own_tensors()
    assert all(torch.equal(now[name], value) for name, value in parts["loss"].items())
    assert now["extra_modules.learned.conv.weight"].abs().max() > 0


def test_resume_with_a_learned_loss_is_bitwise_exact(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(model=FLOW, loss={"extra": {"learned": {"weight": 0.5}}})
    whole = [state.loss for state in Trainer(config)]
    half = Trainer(config)
    losses = []
    for state in half:
        losses.append(state.loss)
        if state.step == 9:
            break
    half.save(tmp_path / "half.safetensors")
    torch.manual_seed(99)
    losses += [state.loss for state in Trainer(config, resume=tmp_path / "half.safetensors")]
    assert losses == whole


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"absolut": {}}, r"loss.extra: unknown loss 'absolut'; did you mean 'absolute'.*--plugin"),
        ({"absolute": {"powr": 1.0}}, "option of loss 'absolute', 'powr'; did you mean 'power'"),
        ({"absolute": {"power": "a"}}, "option power of loss 'absolute' is 'a'; give a number"),
        ({"absolute": {"weight": 0}}, "absolute.weight = 0; give a number above 0"),
        ({"absolute": {"weight": True}}, "absolute.weight = True; give a number above 0"),
        ({"absolute": 0.5}, "loss.extra.absolute"),
    ],
)
def test_mistakes_are_one_line(make_run_config: MakeConfig, extra: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_run_config(loss={"extra": extra})
    assert "\n" not in str(caught.value)


def test_a_loss_of_another_shape() -> None:
    register_loss("mean")(lambda outcome: (outcome.denoised - outcome.x0).square().mean())
    ones = torch.ones(3, 2)
    outcome = Outcome(ones, ones, ones, ones, ones[:, 0], ones[:, 0], ones[:, 0])
    with pytest.raises(ValueError, match=r"loss 'mean' gave \(\); it must give .* shape \(3,\)"):
        ExtraLoss("mean")(outcome)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="loss 'absolute' is taken by"):
        register_loss("absolute")(nn.Identity)
    with pytest.raises(ValueError, match="has an option 'weight', which every loss has already"):

        @register_loss("heavy")
        def heavy(outcome: Outcome, *, weight: float) -> Tensor:
            return outcome.weight
