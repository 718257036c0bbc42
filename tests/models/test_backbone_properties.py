"""What holds for a backbone whatever it is made of: samples, conditions, memory and learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import MODELS, make_model, model_config

SMALL: dict[str, dict[str, Any]] = {
    "mp_unet": {
        "channels": 16,
        "channel_mults": (1, 2),
        "blocks": 1,
        "attention": (False, True),
        "head_channels": 16,
    },
    "dit": {"width": 32, "depth": 2, "head_channels": 16},
}
CONDITIONS: dict[str, Any] = {
    "num_classes": 4,
    "embedding_dim": 3,
    "augmentation_dim": 2,
    "image_channels": 2,
}
OWN: dict[str, dict[str, Any]] = {"mp_unet": {}, "dit": {"context_dim": 6}}
"""Conditions that only this one takes."""

every = pytest.mark.parametrize("name", SMALL)


def tiny(name: str, awake: bool = True, told: bool = True, **options: Any) -> Any:
    """A small network; awake: what starts at zero has random values; told: takes all conditions."""
    torch.manual_seed(0)
    conditions = CONDITIONS | OWN[name] if told else {}
    model = make_model({"type": name, "in_channels": 2, **SMALL[name], **conditions, **options})
    if awake:
        for parameter in model.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, height, width, generator=generator)
    return x, torch.linspace(-0.9, 1.1, batch)


def conditions(name: str, batch: int = 3, height: int = 8, width: int = 8) -> dict[str, Tensor]:
    """All of them, with one sample that has no label."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "class_label": torch.arange(batch) * 2 % 5,
        "embedding": draw(batch, 3),
        "augmentation": draw(batch, 2),
        "image": draw(batch, 2, height, width),
    }
    if name == "dit":
        given["context"] = draw(batch, 5, 6)
        given["context_mask"] = draw(batch, 5) > -0.5
        given["context_mask"][:, 0] = True
    return given


def absent(name: str) -> dict[str, Tensor]:
    given = conditions(name)
    model = tiny(name)
    return model.drop_condition(given, torch.ones(3, dtype=torch.bool))


# ---------------------------------------------------------------- samples


@every
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 14), (10, 6)])
def test_sizes_that_are_not_square(name: str, height: int, width: int) -> None:
    model = tiny(name, out_channels=5)
    x, t = inputs(2, height, width)
    y = model(x, t, **conditions(name, 2, height, width))
    assert y.shape == (2, 5, height, width)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.std() > 0.02


@every
def test_the_defaults_work(name: str) -> None:
    model = make_model({"type": name, "in_channels": 1})
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)


@every
def test_an_untrained_output_is_zero(name: str) -> None:
    model = tiny(name, awake=False)
    assert model(*inputs(), **conditions(name)).abs().max() == 0
    denoised = make_denoiser(model)(inputs()[0], torch.tensor([0.2, 0.5, 0.9]))
    assert denoised.isfinite().all()


@every
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    model = tiny(name)
    x, t = inputs(4)
    given = conditions(name, 4)
    if name == "dit":
        given["context_mask"][2] = False  # one that has nothing to attend to
    together = model(x, t, **given)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model(x[one], t[one], **{key: value[one] for key, value in given.items()})
        assert (alone - together[one]).abs().max() < 1e-5
    assert together.std() > 0.02


@every
def test_channels_last_agrees(name: str) -> None:
    model = tiny(name)
    x, t = inputs(3, 8, 12)
    given = conditions(name, 3, 8, 12)
    plain = model(x, t, **given)
    model = model.to(memory_format=torch.channels_last)
    assert (model(x.to(memory_format=torch.channels_last), t, **given) - plain).abs().max() < 1e-5


# ---------------------------------------------------------------- conditions


@every
def test_each_condition_changes_the_output(name: str) -> None:
    model = tiny(name)
    x, t = inputs()
    given = conditions(name)
    given.pop("context_mask", None)
    outputs = [model(x, t), model(x, t + 0.5), model(x, t, **given)]
    outputs += [model(x, t, **{key: value}) for key, value in given.items()]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert (first - second).abs().max() > 1e-3


@every
def test_absent_conditions_are_unconditional(name: str) -> None:
    model = tiny(name)
    x, t = inputs()
    plain = model(x, t)
    null = absent(name)
    assert torch.equal(model(x, t, **null), plain)
    assert torch.equal(model(x, t, **dict.fromkeys(null)), plain)
    for key, value in null.items():
        if key == "context":
            given = {"context": value, "context_mask": null["context_mask"]}
        elif key != "context_mask":
            given = {key: value}
        assert torch.equal(model(x, t, **given), plain), key


@every
def test_vectors_and_context_that_are_absent_leave_the_network_as_if_it_took_none(
    name: str,
) -> None:
    """So one may be added to a trained network, which then says the same without it."""
    plain = tiny(name, told=False)
    model = tiny(name, told=False, embedding_dim=3, augmentation_dim=2, **OWN[name])
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    x, t = inputs()
    zeros = {"embedding": torch.zeros(3, 3), "augmentation": torch.zeros(3, 2)}
    assert torch.equal(model(x, t), plain(x, t))
    assert torch.equal(model(x, t, **zeros), plain(x, t))


# ---------------------------------------------------------------- precision


@every
def test_bf16_autocast_is_finite_and_near(name: str) -> None:
    model = tiny(name)
    x, t = inputs()
    plain = model(x, t, **conditions(name))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, t, **conditions(name))
        null = model(x, t)
    (y.float().square().mean() + null.float().square().mean()).backward()
    assert y.dtype == torch.bfloat16
    assert (y - plain).abs().max() < 0.1 * plain.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every
def test_weights_in_bf16_see_the_time_in_float32(name: str) -> None:
    model = tiny(name, time_convention="timestep").bfloat16()
    x = inputs(1)[0].expand(2, -1, -1, -1).bfloat16()
    given = {key: v[:1].expand(2, *v.shape[1:]) for key, v in conditions(name).items()}
    # bf16 knows no number between 900 and 904.
    y = model(x, torch.tensor([900.0, 902.0]), **given)
    assert y.dtype == torch.bfloat16
    assert (y[0] - y[1]).abs().max() > 0.005


@every
def test_gradcheck(name: str) -> None:
    narrow = {
        "mp_unet": {"channels": 4, "head_channels": 4},
        "dit": {"width": 8, "head_channels": 4, "depth": 1, "qk_norm": True},
    }[name]
    model = tiny(name, **narrow).double()
    x, t = (v.double().requires_grad_() for v in inputs(2, 4, 2))
    given = conditions(name, 2, 4, 2)
    moved = {
        key: value.double().requires_grad_()
        for key, value in given.items()
        if value.is_floating_point()
    }

    def function(x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        return model(x, t, **given | dict(zip(moved, values, strict=True)))

    assert torch.autograd.gradcheck(function, (x, t, *moved.values()))


# ---------------------------------------------------------------- gradients, memory, devices


@every
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny(name, **({"qk_norm": True} if name == "dit" else {}))
    model(*inputs(), **conditions(name)).square().sum().backward()
    missing = [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not missing


def saved_bytes(model: nn.Module, *args: Any, **condition: Any) -> tuple[int, Tensor]:
    """Bytes kept for the backward pass, parameters left out, and the output."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*args, **condition)
    return sum(storages.values()), out


@every
def test_checkpointing_saves_memory_and_changes_no_gradient(name: str) -> None:
    x, t = inputs(4, 16, 16)
    results = []
    more = {"mp_unet": {"blocks": 2}, "dit": {"depth": 4}}[name]
    for policy in (False, True):
        model = tiny(name, checkpointing=policy, dropout=0.1, **more).train()
        torch.manual_seed(5)
        kept, out = saved_bytes(model, x, t, **conditions(name, 4, 16, 16))
        out.square().mean().backward()
        results.append((kept, out, [p.grad for p in model.parameters()]))
    (plain, y, gradients), (lean, z, again) = results
    assert lean < 0.4 * plain
    assert torch.equal(y, z)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@every
def test_each_policy_chooses_its_blocks(name: str) -> None:
    x, t = inputs(2, 16, 16)
    kept = {
        policy: saved_bytes(tiny(name, checkpointing=policy), x, t)[0]
        for policy in (False, True, 1, 2, (0,))
    }
    assert kept[True] == kept[1] < kept[2] < kept[False]
    level = kept[0,]
    assert (kept[True] < level < kept[False]) if name == "mp_unet" else (level == kept[True])


class Operations(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@every
def test_forward_waits_for_no_device_and_copies_nothing_to_it(name: str) -> None:
    model = tiny(name)
    (x, t), given = inputs(), conditions(name)
    with Operations() as operations:
        model(x, t, **given)
        model(x, t)
    assert "aten::cos" in operations.names
    waiting = {"_local_scalar_dense", "lift_fresh", "_to_copy", "nonzero", "is_nonzero", "equal"}
    assert not {n for n in waiting if f"aten::{n}" in operations.names}


@every
def test_on_meta_tensors(name: str) -> None:
    with torch.device("meta"):
        model = tiny(name, awake=False)
        x, t = torch.empty(3, 2, 8, 8), torch.empty(3)
    given = {key: value.to("meta") for key, value in conditions(name).items()}
    model.check_condition(3, **given)
    assert model(x, t, **given).device.type == "meta"


@every
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the compiler's own
def test_compiles_to_one_graph(name: str, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.option.markexpr:
        pytest.skip("it takes a minute to compile: run pytest -m slow")
    # As few kernels as hold every kind of layer: each is built by a C++ compiler.
    fewer = {
        "mp_unet": {"channel_mults": (1,), "attention": (True,)},
        "dit": {"depth": 1, "qk_norm": True},
    }[name]
    model = tiny(name, **fewer)
    x, t = inputs()
    given = conditions(name)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(x, t, **given)
        assert (y - model(x, t, **given)).abs().max() < 1e-5


@every
def test_its_gradients_are_one_graph(name: str) -> None:
    """The graph is the one that inductor gets, too."""
    model = tiny(name)
    x, t = inputs()
    given = conditions(name)
    expected = model(x, t, **given)
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, **given)
    assert (y - expected).abs().max() < 1e-5
    y.square().mean().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - gradient).abs().max() < 1e-4 * max(1.0, float(gradient.abs().max()))


# ---------------------------------------------------------------- learning, keeping


@every
def test_dropout_is_off_in_evaluation(name: str) -> None:
    model, same = tiny(name, dropout=0.5), tiny(name, dropout=0.0)
    same.load_state_dict(model.state_dict())
    x, t = inputs()
    assert not torch.equal(model(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), same.eval()(x, t))


@every
def test_a_config_and_a_state_make_the_network_anew(name: str) -> None:
    model = tiny(name)
    torch.manual_seed(9)
    other = make_model(model_config(model))
    assert type(other) is MODELS[name]
    x, t = inputs()
    given = conditions(name)
    assert not torch.equal(model(x, t, **given), other(x, t, **given))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x, t, **given), other(x, t, **given))


@every
def test_overfits_sixteen_images(name: str) -> None:
    # Directions of weights turn by the learning rate a step: there it is larger than elsewhere.
    options, rate, steps, repeats = {
        "mp_unet": ({}, 4e-2, 130, 2),
        "dit": ({"width": 64, "head_channels": 32}, 5e-3, 250, 4),
    }[name]
    told = {"in_channels": 1, "num_classes": 16, "prediction": "eps"}
    model = tiny(name, awake=False, told=False, **told, **options)
    images = torch.randn(16, 1, 8, 8)
    label = torch.arange(16)
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    after_step = getattr(model, "after_step", lambda: None)

    def loss(repeats: int) -> Tensor:
        x0, time = images.repeat(repeats, 1, 1, 1), torch.rand(16 * repeats)
        angle = (0.6 + time * 0.8).reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x = angle.cos() * x0 + angle.sin() * noise
        return (model(x, time * 1000, class_label=label.repeat(repeats)) - noise).square().mean()

    first = loss(8).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(repeats).backward()
        optimizer.step()
        after_step()
    with torch.no_grad():
        last = loss(8).item()
    assert last < first / 20
