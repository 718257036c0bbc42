"""The UNet as a function: shapes, conditions, gradients, precision, memory, and that it learns."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.denoiser import DENOISERS, make_denoiser
from k_diffusion.models import UNet, UNetConfig
from k_diffusion.models.network import PREDICTIONS

# The package's attribute of that name is the established switch.
checkpointing = importlib.import_module("k_diffusion.models.checkpointing")


def tiny(awake: bool = True, **options: Any) -> UNet:
    """A small UNet; awake: what starts at zero is set to random values, so that it does speak."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "in_channels": 2,
        "channels": 16,
        "channel_mults": (1, 2),
        "blocks": 1,
        "attention": (False, True),
        "head_channels": 16,
    }
    model = UNet(**{**small, **options})
    if awake:
        for parameter in model.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch: int = 3, channels: int = 2, height: int = 8, width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.linspace(3, 950, batch)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("options", "height", "width"),
    [
        ({"in_channels": 1, "out_channels": 5}, 8, 8),
        ({"in_channels": 3, "channels": 20, "head_channels": 10}, 6, 14),
        ({"in_channels": 4, "channels": 37, "head_channels": 37}, 2, 10),
        ({"channels": 6, "channel_mults": (1,), "attention": (False,), "head_channels": 3}, 5, 3),
        (
            {
                "channel_mults": (1, 2, 3),
                "attention": (True, False, False),
                "blocks": 2,
                "channels": 8,
                "head_channels": 8,
            },
            12,
            20,
        ),
    ],
)
def test_shapes(options: dict[str, Any], height: int, width: int) -> None:
    model = tiny(**options)
    config = model.config
    x, t = inputs(3, config.in_channels, height, width)
    y = model(x, t)
    assert y.shape == (3, config.out_channels or config.in_channels, height, width)
    assert y.dtype == torch.float32
    assert y.isfinite().all()


def test_the_defaults_work() -> None:
    model = UNet(in_channels=1, num_classes=10)
    assert model(torch.randn(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)


def test_a_narrow_network_still_tells_times_apart() -> None:
    model = tiny(channels=2, head_channels=2)
    assert model.mapping.features.count == 16
    assert tiny(channels=64).mapping.features.count == 32


def test_the_signature_and_the_config_are_one() -> None:
    parameters = inspect.signature(UNet).parameters
    signature = {name: p.default for name, p in parameters.items() if name != "process"}
    # The config settles the time convention that the signature leaves to the prediction.
    assert signature == vars(UNetConfig()) | {"time_convention": None}


def test_an_untrained_output_is_zero() -> None:
    model = tiny(awake=False, num_classes=4, embedding_dim=3)
    x, t = inputs()
    assert model(x, t).abs().max() == 0


def test_attention_is_where_it_is_asked_for() -> None:
    options: dict[str, Any] = {"channel_mults": (1, 2, 1), "attention": (False, True, False)}
    model = tiny(blocks=2, **options)
    for path in (model.down, model.up):
        attends = [[b.attention is not None for b in level] for level in path]  # type: ignore[attr-defined]
        assert attends == [[False] * 2, [True] * 2, [False] * 2]
    assert [b.attention is not None for b in model.middle] == [True, False]


def test_blocks_begin_as_identities() -> None:
    model = tiny(awake=False)
    h = torch.randn(2, 16, 4, 4)
    assert torch.equal(model.down[0][0](h, torch.randn(2, 64)), h)  # type: ignore[index]
    attending = model.middle[0]
    h = torch.randn(2, 32, 4, 4)
    assert attending.attention is not None
    assert torch.equal(attending(h, torch.randn(2, 64)), h)


def test_every_convention_of_the_denoisers_is_known() -> None:
    assert set(PREDICTIONS) == set(DENOISERS)
    for prediction in PREDICTIONS:
        for convention in ("timestep", "unit", "log_sigma"):
            model = tiny(
                prediction=prediction,
                time_convention=convention,
                num_classes=3,
                embedding_dim=5,
                sigma_data=0.7,
            )
            assert model.num_classes == 3
            denoiser = make_denoiser(model)
            assert type(denoiser) is DENOISERS[prediction]
            assert denoiser.time_convention == convention
            assert getattr(denoiser, "sigma_data", 0.7) == 0.7
            x, _ = inputs()
            sigma = torch.tensor([0.2, 0.5, 0.9])
            x0 = denoiser(x, sigma, class_label=torch.tensor([0, 1, 3]))
            assert x0.shape == x.shape
            assert x0.isfinite().all()


# ---------------------------------------------------------------- one by one, layouts, precision


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = tiny(num_classes=4, embedding_dim=3).eval()
    x, t = inputs(4)
    label, embedding = torch.tensor([0, 3, 4, 1]), torch.randn(4, 3)
    together = model(x, t, class_label=label, embedding=embedding)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model(x[one], t[one], class_label=label[one], embedding=embedding[one])
        assert (alone - together[one]).abs().max() < 1e-5
    assert together.std() > 0.1


def test_channels_last_runs_throughout_and_agrees() -> None:
    model = tiny(channels=16, num_classes=4)
    x, t = inputs(3, 2, 8, 12)
    plain = model(x, t)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrong = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
                wrong.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    last = model(x.to(memory_format=torch.channels_last), t)
    assert not wrong
    assert (last - plain).abs().max() < 1e-5


def test_bf16_autocast_is_finite_and_near() -> None:
    model = tiny(num_classes=4, embedding_dim=3)
    x, t = inputs()
    label, embedding = torch.tensor([0, 3, 4]), torch.randn(3, 3)
    plain = model(x, t, class_label=label, embedding=embedding)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, t, class_label=label, embedding=embedding)
        null = model(x, t)
    (y.float().square().mean() + null.float().square().mean()).backward()
    assert y.dtype == torch.bfloat16
    assert (y - plain).abs().max() < 0.05 * plain.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_in_bf16_see_the_time_in_float32() -> None:
    model = tiny(embedding_dim=3).bfloat16()
    x, _ = inputs(2)
    same, embedding = x[:1].expand(2, -1, -1, -1).bfloat16(), torch.ones(2, 3)
    # bf16 knows no number between 900 and 904.
    y = model(same, torch.tensor([900.0, 901.0]), embedding=embedding)
    assert y.dtype == torch.bfloat16
    assert (y[0] - y[1]).abs().max() > 0.01


def test_gradcheck() -> None:
    model = tiny(
        in_channels=1, channels=4, head_channels=4, num_classes=2, embedding_dim=3
    ).double()
    x = torch.randn(2, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 700.0], dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 2])

    def function(x: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        return model(x, t, class_label=label, embedding=embedding)

    assert torch.autograd.gradcheck(function, (x, t, embedding))


# ---------------------------------------------------------------- gradients and conditions


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny(
        num_classes=4, embedding_dim=3, channels=8, head_channels=8, attention=(True, True)
    )
    x, t = inputs()
    model(
        x, t, class_label=torch.tensor([0, 1, 2]), embedding=torch.randn(3, 3)
    ).square().sum().backward()
    missing = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not missing


def test_conditions_change_the_output() -> None:
    model = tiny(num_classes=4, embedding_dim=3)
    x, t = inputs(1)
    outputs = [
        model(x, t),
        model(x, t + 1),
        model(x, t, class_label=torch.tensor([0])),
        model(x, t, class_label=torch.tensor([1])),
        model(x, t, embedding=torch.ones(1, 3)),
        model(x, t, class_label=torch.tensor([0]), embedding=torch.ones(1, 3)),
    ]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_null_class_is_no_label_exactly(dtype: torch.dtype) -> None:
    model = tiny(num_classes=4)
    x, t = inputs()
    assert torch.equal(model(x, t), model(x, t, class_label=torch.full((3,), 4, dtype=dtype)))


def test_the_null_embedding_is_no_embedding_exactly() -> None:
    model = tiny(embedding_dim=3)
    x, t = inputs()
    assert torch.equal(model(x, t), model(x, t, embedding=torch.zeros(3, 3)))


def test_only_the_rows_in_use_get_gradients() -> None:
    model = tiny(num_classes=6)
    x, t = inputs(4)
    model(x, t, class_label=torch.tensor([1, 4, 4, 6])).square().sum().backward()
    gradient = model.mapping.classes.weight.grad
    assert gradient is not None
    used = gradient.abs().amax(1) > 0
    assert used.tolist() == [False, True, False, False, True, False, True]


def test_dropout_is_off_in_evaluation() -> None:
    model = tiny(dropout=0.5)
    same = tiny(dropout=0.0)
    same.load_state_dict(model.state_dict())
    x, t = inputs()
    assert not torch.equal(model(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), same.eval()(x, t))


# ---------------------------------------------------------------- device and memory


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


def test_forward_waits_for_no_device_and_copies_nothing_to_it() -> None:
    model = tiny(num_classes=4, embedding_dim=3)
    x, t = inputs()
    label = torch.tensor([0, 1, 4])
    with Operations() as operations:
        model(x, t, class_label=label, embedding=torch.zeros(3, 3))
    assert "aten::convolution" in operations.names
    waiting = {"_local_scalar_dense", "lift_fresh", "_to_copy", "nonzero", "is_nonzero", "equal"}
    assert not operations.names & {f"aten::{name}" for name in waiting}


def test_on_meta_tensors() -> None:
    with torch.device("meta"):
        model = UNet(in_channels=1, num_classes=10, embedding_dim=2)
        x, t = torch.empty(2, 1, 8, 8), torch.empty(2)
        condition = {
            "class_label": torch.empty(2, dtype=torch.int64),
            "embedding": torch.empty(2, 2),
        }
    model.check_condition(2, **condition)
    assert model(x, t, **condition).device.type == "meta"


def saved_bytes(model: UNet, x: Tensor, t: Tensor) -> tuple[int, Tensor]:
    """Bytes kept for the backward pass, parameters left out, and the output."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x, t)
    return sum(storages.values()), out


def test_checkpointing_saves_memory_and_changes_no_gradient() -> None:
    x, t = inputs(4, 2, 16, 16)
    results = []
    for policy in (False, True):
        model = tiny(checkpointing=policy, dropout=0.1, blocks=2).train()
        torch.manual_seed(5)
        kept, out = saved_bytes(model, x, t)
        out.square().mean().backward()
        results.append((kept, out, [p.grad for p in model.parameters()]))
    (plain, y, gradients), (lean, z, again) = results
    assert lean < 0.4 * plain
    assert torch.equal(y, z)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # type: ignore[arg-type]


def test_checkpointing_rests_where_no_gradient_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would read the device's random state at every block."""
    model = tiny(checkpointing=True)
    x, t = inputs()
    expected = model(x, t)
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    with torch.no_grad():
        assert torch.equal(model(x, t), expected)


# ---------------------------------------------------------------- learning, keeping


def test_state_dict_round_trip() -> None:
    model = tiny(num_classes=4, embedding_dim=3)
    other = UNet.from_config(vars(model.config))
    x, t = inputs()
    assert not torch.equal(model(x, t), other(x, t))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x, t), other(x, t))


def test_overfits_sixteen_images() -> None:
    torch.manual_seed(0)
    model = tiny(awake=False, in_channels=1, num_classes=16)
    images = torch.randn(16, 1, 8, 8)
    label = torch.arange(16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def loss(repeats: int) -> Tensor:
        x0, time = images.repeat(repeats, 1, 1, 1), torch.rand(16 * repeats)
        angle = (0.2 + time * 1.2).reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x = angle.cos() * x0 + angle.sin() * noise
        return (model(x, time * 1000, class_label=label.repeat(repeats)) - noise).square().mean()

    first = loss(8).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss(2).backward()
        optimizer.step()
    with torch.no_grad():
        last = loss(8).item()
    assert last < first / 20


def test_the_usual_time_of_a_prediction():
    usual = {
        "eps": "timestep",
        "v": "timestep",
        "x0": "timestep",
        "flow": "unit",
        "edm": "log_sigma",
    }
    for prediction, convention in usual.items():
        model = UNet(channels=8, head_channels=8, prediction=prediction)
        assert model.time_convention == model.config.time_convention == convention
        assert make_denoiser(model).time_convention == convention
    assert tiny(prediction="edm", time_convention="timestep").time_convention == "timestep"
