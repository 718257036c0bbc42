"""What a run makes small: uncertainty, variance and frequencies, in the Trainer and alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion import layers
from k_diffusion.denoiser import EDMDenoiser, FunctionDenoiser, VDenoiser, make_denoiser
from k_diffusion.models import make_model
from k_diffusion.training import Trainer, denoising_loss, load_denoiser, make_density
from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.densities import draw_half_log_snr
from k_diffusion.training.loss import make_weighting, uncertainty_loss
from k_diffusion.training.objective import LevelUncertainty, Objective, density_of, has_trait
from k_diffusion.utils.levels import VE

MakeConfig = Callable[..., TrainConfig]
MP_UNET = {
    "type": "mp_unet", "channels": 8, "channel_mults": [1], "blocks": 1, "attention": [False],
    "head_channels": 8, "has_uncertainty": True, "prediction": "edm", "sigma_data": 0.5,
}  # fmt: skip
VARIANCE = {
    "type": "image_v1", "channels": [16], "depths": [1], "self_attention": [False],
    "mapping_width": 16, "has_variance": True, "sigma_data": 0.5,
}  # fmt: skip
SMALL = {"batch_size": 8, "total_images": 48}


def train(config: TrainConfig, path: Path, steps: int | None = None, **kwargs: Any) -> Trainer:
    trainer = Trainer(config, **kwargs)
    for state in trainer:
        if state.step == steps:
            break
    trainer.save(path)
    return trainer


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer", "loss"])
    return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}


def step_inputs(trainer: Trainer) -> Any:
    return trainer.inputs.draw(trainer.stream[0], 0)


# ---------------------------------------------------------------- plain


def test_without_more_it_is_the_denoising_loss(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config())
    inputs = step_inputs(trainer)
    trainer.gradient.seed_part(inputs)
    got = trainer.objective(inputs.x0, inputs.sigma, inputs.noise, **inputs.condition)
    trainer.gradient.seed_part(inputs)
    given = (trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "edm")
    assert torch.equal(got, denoising_loss(*given, **inputs.condition))
    assert trainer.objective.terms() == {}
    assert trainer.objective.own_tensors() == {}
    state = next(iter(trainer))
    assert state.terms == {}


def test_frequencies_in_the_trainer(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config(loss={"scales": 2.0}, model={"type": "tiny"}))
    inputs = step_inputs(trainer)
    got = trainer.objective(inputs.x0, inputs.sigma, inputs.noise)
    given = (trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "eps")
    assert torch.equal(got, denoising_loss(*given, scales=2.0))
    assert not torch.allclose(got, denoising_loss(*given))


def test_sigma_data_of_the_density_is_the_denoisers(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config(loss={"density": "v_diffusion"}))
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)
    std = trainer.denoiser.sigma_data  # type: ignore[attr-defined]
    assert abs(std - 1) > 0.05
    assert torch.equal(trainer.inputs.density(u), make_density("v_diffusion", sigma_data=std)(u))
    given = {"density": "v_diffusion", "density_options": {"sigma_data": 2.0}}
    other = density_of(make_run_config(loss=given), trainer.denoiser)
    assert torch.equal(other(u), make_density("v_diffusion", sigma_data=2.0)(u))


# ---------------------------------------------------------------- uncertainty


def test_it_converges_to_the_log_of_the_expected_loss() -> None:
    """Errors of a known size at each level: at every level u finds the log of their mean square."""
    torch.manual_seed(0)

    def size(half_log_snr: Tensor) -> Tensor:
        return torch.exp(0.8 * torch.sin(1.3 * half_log_snr) - 0.3 * half_log_snr)

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        return size(-sigma.log()).reshape(shape) * torch.randn_like(x)

    objective = Objective(
        FunctionDenoiser(estimate, VE),  # type: ignore[arg-type]
        make_weighting("x0"),
        uncertainty=LevelUncertainty(),
    )
    optimizer = torch.optim.Adam(objective.own_parameters.values(), lr=0.02)
    density = make_density("lognormal", mean=0.0, std=1.2)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.zeros(256, 16)
    steps = 800
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        sigma = torch.exp(-draw_half_log_snr(density, 256, generator, stratified=True))
        objective(x0, sigma, x0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()
    levels = torch.linspace(-2, 2, 41, dtype=torch.float64)
    with torch.no_grad():
        assert objective.uncertainty is not None
        u = objective.uncertainty(levels)
    assert (u - 2 * size(levels).log()).abs().max() < 0.1
    head = objective.own_parameters["uncertainty.head.layer.weight"]
    assert (head.square().mean() - 1).abs() < 1e-5  # put back to unit length after each step


def test_loss_with_uncertainty_and_its_terms(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config(loss={"uncertainty": True}, model={"type": "tiny"}))
    inputs = step_inputs(trainer)
    got = trainer.objective(inputs.x0, inputs.sigma, inputs.noise)
    plain = denoising_loss(trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "eps")
    h = trainer.denoiser.alpha(inputs.sigma).log() - inputs.sigma.log()
    u = trainer.objective.uncertainty.head(-h / 4)  # type: ignore[union-attr]
    assert torch.equal(got, uncertainty_loss(plain, u))
    trainer.objective.forget_terms()
    state = next(iter(trainer))
    assert set(state.terms) == {"denoising"}
    assert abs(state.terms["denoising"] - plain.mean().item()) < 1e-6
    assert abs(state.loss - got.mean().item()) < 1e-6


def test_terms_are_means_over_the_micro_batches(make_run_config: MakeConfig) -> None:
    changes: dict[str, Any] = {"loss": {"uncertainty": True}, "model": {"type": "tiny"}}
    whole = next(iter(Trainer(make_run_config(**changes))))
    trainer = Trainer(make_run_config(**changes, micro_batch_size=5))
    parts = next(iter(trainer))
    assert abs(parts.terms["denoising"] / whole.terms["denoising"] - 1) < 1e-5
    auto = next(iter(Trainer(make_run_config(**changes, micro_batch_size="auto"))))
    assert auto.terms == whole.terms  # what was tried before the step does not count


def test_the_networks_own_head_is_trained_at_its_own_time(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=MP_UNET, **SMALL)
    trainer = Trainer(config)
    network: Any = trainer.network
    assert trainer.objective.own_tensors() == {}  # it is the network's
    inputs = step_inputs(trainer)
    got = trainer.objective(inputs.x0, inputs.sigma, inputs.noise)
    plain = denoising_loss(trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "edm")
    u = network.uncertainty((inputs.sigma.log() / 4).float())
    assert (got - uncertainty_loss(plain, u)).abs().max() < 1e-6
    before = network.log_variance.layer.weight.clone()
    next(iter(trainer))
    assert (network.log_variance.layer.weight - before).abs().max() > 1e-6


@pytest.mark.parametrize("model", [MP_UNET, VARIANCE, {"type": "tiny"}])
def test_every_parameter_gets_a_gradient(make_run_config: MakeConfig, model: Any) -> None:
    """Else processes that join their gradients would wait for it."""
    loss = {"uncertainty": True} if model["type"] == "tiny" else {}
    if model["type"] == "tiny":
        model = {**model, "num_classes": 10}
    trainer = Trainer(make_run_config(model=model, loss=loss, **SMALL))
    inputs = step_inputs(trainer)
    trainer.objective(inputs.x0, inputs.sigma, inputs.noise, **inputs.condition).sum().backward()
    assert [n for n, p in trainer.objective.named_parameters() if p.grad is None] == []


def test_own_weights_are_clipped_and_moved_by_the_runs_optimizer(
    make_run_config: MakeConfig,
) -> None:
    config = make_run_config(loss={"uncertainty": True}, optimizer={"lr": 0.01})
    trainer = Trainer(config)
    head = trainer.objective.own_parameters["uncertainty.head.layer.weight"]
    assert any(head is p for p in trainer.gradient.parameters)
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert held.count(id(head)) == 1
    before = head.detach().clone()
    next(iter(trainer))
    assert (head - before).abs().max() > 1e-3
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.01] * 3
    assert not any("uncertainty" in name for name in trainer.ema.state_dict())


@pytest.mark.parametrize("model", [{"type": "tiny", "dropout": 0.2}, MP_UNET, VARIANCE])
def test_resume_is_bitwise_exact(make_run_config: MakeConfig, tmp_path: Path, model: Any) -> None:
    loss = {"uncertainty": True} if model["type"] == "tiny" else {}
    config = make_run_config(model=model, loss=loss, **SMALL)
    train(config, tmp_path / "whole.safetensors")
    train(config, tmp_path / "half.safetensors", 3)
    torch.manual_seed(99)
    train(config, tmp_path / "rest.safetensors", resume=tmp_path / "half.safetensors")
    whole, rest = (contents(tmp_path / f"{name}.safetensors") for name in ("whole", "rest"))
    assert set(whole) == set(rest)
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    if loss:
        own = "uncertainty.head.layer.weight"
        assert {f"loss/{own}", f"optimizer/loss/{own}/exp_avg"} <= set(whole)
        half = contents(tmp_path / "half.safetensors")
        assert not torch.equal(half[f"loss/{own}"], whole[f"loss/{own}"])
    denoiser, _ = load_denoiser(tmp_path / "rest.safetensors")  # sampling needs none of it
    x = torch.randn(2, 1, 8, 8)
    assert denoiser(x, torch.ones(2)).shape == x.shape


def test_a_checkpoint_of_another_loss_is_refused(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    plain, learned = make_run_config(), make_run_config(loss={"uncertainty": True})
    for name, config in (("plain", plain), ("learned", learned)):
        train(config, tmp_path / f"{name}.safetensors", 1)
    with pytest.raises(CheckpointError, match=r"another loss \(uncertainty.head.* is missing"):
        Trainer(learned, resume=tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"has no place in this loss.*give its loss.uncert"):
        Trainer(plain, resume=tmp_path / "learned.safetensors")


def test_uncertainty_is_float32_under_bf16(make_run_config: MakeConfig) -> None:
    """u of 5 in bfloat16 would be off by a hundredth."""
    config = make_run_config(model={"type": "tiny"}, loss={"uncertainty": True}, precision="bf16")
    trainer = Trainer(config)
    inputs = step_inputs(trainer)
    objective = trainer.objective
    with trainer.accelerator.autocast():
        got = objective(inputs.x0, inputs.sigma, inputs.noise)
        plain = denoising_loss(trainer.denoiser, inputs.x0, inputs.sigma, inputs.noise, "eps")
    h = trainer.denoiser.alpha(inputs.sigma).log() - inputs.sigma.log()
    assert objective.uncertainty is not None
    assert (got - uncertainty_loss(plain, objective.uncertainty(h))).abs().max() < 1e-6


# ---------------------------------------------------------------- variance


def test_loss_with_variance_is_the_established_one() -> None:
    torch.manual_seed(0)
    network: Any = make_model({**VARIANCE, "in_channels": 2})
    nn.init.normal_(network.proj_out.weight, std=0.5)
    network.double()

    def inner(x: Tensor, sigma: Tensor, **options: Any) -> Any:
        return network(x, (sigma.log() / 4).float(), **options)

    x0, noise = torch.randn(2, 6, 2, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 60.0], dtype=torch.float64)
    expected = layers.DenoiserWithVariance(inner, 0.5).loss(x0, noise, sigma)
    objective = Objective(EDMDenoiser(network, 0.5), make_weighting("edm", 0.5), variance=True)
    got = objective(x0, sigma, noise)
    assert (got - expected).abs().max() < 1e-6
    (ours,) = torch.autograd.grad(got.sum(), network.proj_out.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), network.proj_out.weight)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    plain = denoising_loss(EDMDenoiser(network, 0.5), x0, sigma, noise, "edm")
    assert (objective.terms()["denoising"] - plain.mean()).abs() < 1e-9


def test_variance_is_learned_in_the_networks_own_space(make_run_config: MakeConfig) -> None:
    """A network that knows only two numbers: 0 as its prediction, and s, which finds the log of the
    mean square of what it should predict: v of unit-variance data, 1 at every level."""

    class Two(nn.Module):
        prediction, has_variance, time_convention = "v", True, "log_sigma"

        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, t: Tensor, return_variance: bool = False) -> Any:
            output = 0 * x * self.s
            return (output, self.s.expand(len(x))) if return_variance else output

    network = Two()
    objective = Objective(VDenoiser(network), make_weighting("v"), variance=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x0, noise = torch.randn(2, 256, 8, generator=generator)
        sigma = torch.rand(256, generator=generator, dtype=torch.float64) * 0.98 + 0.01
        objective(x0, sigma, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert network.s.abs().item() < 0.03


def test_variance_through_the_trainer(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=VARIANCE, **SMALL)
    trainer = Trainer(config)
    assert trainer.objective.variance
    states = list(trainer)
    assert set(states[-1].terms) == {"denoising"}
    assert not Trainer(
        make_run_config(model=VARIANCE, loss={"variance": False}, **SMALL)
    ).objective.variance


def test_a_network_that_tells_no_variance_when_asked() -> None:
    denoiser = VDenoiser(nn.Identity())
    denoiser.network.forward = lambda x, t, return_variance=False: x  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="Identity returned Tensor; with return_variance=True"):
        denoiser.with_variance(torch.ones(2, 3), 0.5)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ({"type": "tiny"}, {"variance": True}, "loss.variance is true, but Tiny tells no variance"),
        (MP_UNET, {"uncertainty": False}, "loss.uncertainty is false, but MPUNet has has_uncert"),
        (VARIANCE, {"uncertainty": True}, "loss.uncertainty = True has no place in the loss of"),
        (
            VARIANCE,
            {"weighting": "snr"},
            "loss.weighting = 'snr' has no place in the loss of Image",
        ),
        (VARIANCE, {"scales": 3.0}, "loss.scales = 3.0 has no place .* loss.variance = false"),
        ({"type": "tiny"}, {"density": "cosine_interpolated"}, "image_d .* is missing"),
        (
            {"type": "tiny"},
            {"density": "loguniform", "density_options": {"min": 0.0}},
            r"loss: min = 0.0 and max = 80.0 .*; give 0 < min < max",
        ),
    ],
)
def test_loss_and_network_that_do_not_fit(
    make_run_config: MakeConfig, model: Any, loss: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(make_run_config(model=model, loss=loss, **SMALL))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"variance": True, "uncertainty": True}, "loss: variance and uncertainty are both true"),
        ({"uncertainty": 1}, "loss.uncertainty"),
        ({"scales": -1.0}, "loss.scales"),
        ({"uncertainy": True}, "did you mean loss.uncertainty"),
    ],
)
def test_configs_of_losses_that_are_refused(
    make_run_config: MakeConfig, loss: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_run_config(loss=loss)
    assert "\n" not in str(caught.value)


def test_traits_of_networks_are_those_of_their_configs() -> None:
    assert has_trait(make_model({**MP_UNET, "in_channels": 1}), "has_uncertainty")
    assert not has_trait(
        SimpleNamespace(config=SimpleNamespace(has_variance=False)), "has_variance"
    )
    assert has_trait(SimpleNamespace(has_variance=True), "has_variance")
    assert not has_trait(make_denoiser(lambda x, s: x), "has_variance")
