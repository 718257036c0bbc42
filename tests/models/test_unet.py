"""The UNet: its parts, sizes of any kind, layouts, presets, memory. More: test_backbones.py."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from k_diffusion.denoiser import DENOISERS, make_denoiser
from k_diffusion.models import UNet, UNetConfig, checkpointing, make_model, model_config
from k_diffusion.models.network import PREDICTIONS


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


def test_attention_is_where_it_is_asked_for() -> None:
    options: dict[str, Any] = {"channel_mults": (1, 2, 1), "attention": (False, True, False)}
    model = tiny(blocks=2, **options)
    for path in (model.down, model.up):
        attends = [[b.attention is not None for b in level] for level in path]  # type: ignore[attr-defined]
        assert attends == [[False] * 2, [True] * 2, [False] * 2]
    assert [b.attention is not None for b in model.middle] == [True, False]


@pytest.mark.parametrize("where", [None, (True, False, False), (False, False, False)])
def test_cross_attention_is_where_it_is_asked_for(where: Any) -> None:
    options: dict[str, Any] = {"channel_mults": (1, 2, 1), "attention": (False, True, False)}
    model = tiny(context_dim=3, cross_attention=where, **options)
    for path in (model.down, model.up):
        attends = tuple(level[0].cross_attention is not None for level in path)  # type: ignore[index]
        assert attends == (where or (False, True, False))
    assert [b.cross_attention is not None for b in model.middle] == [True, False]
    model = tiny(**options)
    assert not any("cross_attention" in name for name in model.state_dict())


def test_an_empty_context_is_none() -> None:
    model = tiny(context_dim=3)
    x, t = inputs()
    assert torch.equal(model(x, t, context=torch.ones(3, 0, 3)), model(x, t))


def test_weights_and_context_need_not_be_of_one_dtype() -> None:
    model = tiny(context_dim=3).bfloat16()
    x, t = inputs()
    assert model(x.bfloat16(), t, context=torch.ones(3, 2, 3)).dtype == torch.bfloat16


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


# ---------------------------------------------------------------- any dimension, any size


@pytest.mark.parametrize("size", [(8,), (7,), (1,), (1, 1), (9, 6), (4, 6, 2), (3, 5, 1)])
@pytest.mark.parametrize("resampling", ["strided", "antialiased"])
def test_any_dimension_and_size(size: tuple[int, ...], resampling: str) -> None:
    every: dict[str, Any] = {"context_dim": 5, "image_channels": 1, "num_classes": 3}
    model = tiny(dims=len(size), resampling=resampling, **every)
    x, t = torch.randn(2, 2, *size), torch.tensor([3.0, 700.0])
    given = {
        "context": torch.randn(2, 3, 5),
        "image": torch.randn(2, 1, *size),
        "class_label": torch.tensor([1, 2]),
    }
    y = model(x, t, **given)
    assert y.shape == x.shape
    assert y.std() > 0.05
    y.square().mean().backward()
    # In one position blurs and interpolations see one value alone.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(7,), (9, 6), (3, 5, 1)])
def test_odd_sizes_are_padded_with_what_ends_them(size: tuple[int, ...]) -> None:
    model = tiny(dims=len(size), channel_mults=(1, 1, 2), attention=(False, False, True))
    x, t = torch.randn(2, 2, *size), torch.tensor([3.0, 700.0])
    padded = x
    for dim, n in enumerate(size, 2):
        index = torch.arange(-(-n // 4) * 4).clamp(max=n - 1)
        padded = padded.index_select(dim, index)
    expected = model(padded, t)[(..., *(slice(n) for n in size))]  # type: ignore[index]
    assert torch.equal(model(x, t), expected)


# ---------------------------------------------------------------- layouts, precision


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((8, 12), torch.channels_last),
        ((9, 6), torch.channels_last),
        ((4, 3, 4), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("resampling", ["strided", "antialiased"])
def test_channels_last_throughout(
    size: tuple[int, ...], layout: torch.memory_format, resampling: str
) -> None:
    """Whatever the layout of x and of the weights."""
    model = tiny(dims=len(size), resampling=resampling, context_dim=4, num_classes=4)
    x, t = torch.randn(3, 2, *size), torch.tensor([3.0, 500.0, 700.0])
    context = torch.randn(3, 5, 4)
    wrong = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.ndim == x.ndim and not out.is_contiguous(memory_format=layout):
                wrong.append(name)

        return hook

    for name, module in model.named_modules():
        if name:  # the output itself may be cropped
            module.register_forward_hook(look(name))
    plain = model(x, t, context=context)
    assert plain.is_contiguous()
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    last = model(x.to(memory_format=layout), t, context=context)
    assert last.stride(1) == 1
    assert not wrong
    assert (last - plain).abs().max() < 1e-5


def test_weights_in_bf16_see_the_time_in_float32() -> None:
    model = tiny(embedding_dim=3).bfloat16()
    x, _ = inputs(2)
    same, embedding = x[:1].expand(2, -1, -1, -1).bfloat16(), torch.ones(2, 3)
    # bf16 knows no number between 900 and 904.
    y = model(same, torch.tensor([900.0, 901.0]), embedding=embedding)
    assert y.dtype == torch.bfloat16
    assert (y[0] - y[1]).abs().max() > 0.01


# ---------------------------------------------------------------- gradients and conditions


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_null_class_is_no_label_exactly(dtype: torch.dtype) -> None:
    model = tiny(num_classes=4)
    x, t = inputs()
    assert torch.equal(model(x, t), model(x, t, class_label=torch.full((3,), 4, dtype=dtype)))


def test_only_the_rows_in_use_get_gradients() -> None:
    model = tiny(num_classes=6)
    x, t = inputs(4)
    model(x, t, class_label=torch.tensor([1, 4, 4, 6])).square().sum().backward()
    gradient = model.mapping.classes.weight.grad
    assert gradient is not None
    used = gradient.abs().amax(1) > 0
    assert used.tolist() == [False, True, False, False, True, False, True]


@pytest.mark.parametrize("resampling", ["strided", "antialiased"])
def test_moved_by_the_factor_the_output_moves_along(resampling: str) -> None:
    """And by one position: nearly, where the resampling is anti-aliased.

    The speck is so far from the border that neither sees the other; attention sees all, wherever.
    """
    options: dict[str, Any] = {"resampling": resampling, "channels": 8, "head_channels": 8}
    model = tiny(**options).double()
    x = torch.zeros(1, 2, 128, 128, dtype=torch.float64)
    x[..., 62:66, 62:66] = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))
    inner = (..., slice(34, 94), slice(34, 94))

    def difference(shift: int) -> float:
        with torch.no_grad():
            y = model(x, torch.tensor([100.0]))
            moved = model(x.roll((shift, shift), (2, 3)), torch.tensor([100.0]))
        error = (moved.roll((-shift, -shift), (2, 3)) - y)[inner]
        return (error.square().mean().sqrt() / y[inner].std()).item()

    assert difference(model.config.factor) < 1e-12
    if resampling == "strided":
        assert difference(1) > 0.7  # 0.8 was measured
    else:
        assert difference(1) < 0.6  # 0.5


# ---------------------------------------------------------------- memory


class Operations(TorchDispatchMode):
    """The names of all operations that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def saved_bytes(model: UNet, x: Tensor, t: Tensor) -> int:
    """Bytes kept for the backward pass, parameters left out."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []  # or a freed one's address would be given to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(model(x, t))
    return sum(storages.values())


@pytest.mark.parametrize("resampling", ["strided", "antialiased"])
def test_bytes_at_the_size_that_is_benchmarked(resampling: str) -> None:
    """Plainly 2.94 MB per GFLOP of the forward pass; and full checkpointing in 0.36 of it."""
    x, t = torch.randn(8, 3, 32, 32), torch.linspace(0, 900, 8)
    model = make_model({"type": "unet_small", "resampling": resampling})
    assert isinstance(model, UNet)
    plain = saved_bytes(model, x, t)
    model.checkpointing = checkpointing.Checkpointing(True)
    assert saved_bytes(model, x, t) < 0.4 * plain
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    assert plain / counter.get_total_flops() < 2.95e6 / 1e9


def test_what_is_computed_again_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = inputs()
    results = []
    for small in (2**60, 0):
        monkeypatch.setattr(checkpointing, "SMALL", small)
        model = tiny(dropout=0.3, channel_mults=(1, 2), attention=(False, False))
        torch.manual_seed(5)
        kept = saved_bytes(model, x, t)
        torch.manual_seed(5)
        model(x, t).square().mean().backward()
        results.append((kept, [p.grad for p in model.parameters()]))
    (plain, gradients), (lean, again) = results
    assert lean < 0.6 * plain
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # type: ignore[arg-type]


def test_no_convolution_is_computed_again_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and activations are; and under checkpointing, one convolution of two."""
    monkeypatch.setattr(checkpointing, "SMALL", 0)
    x, t = inputs()
    for policy, again in ((False, 0), (True, 6)):
        model = tiny(channel_mults=(1, 1), attention=(False, False), checkpointing=policy)
        loss = model(x, t).sum()
        with Operations() as operations:
            loss.backward()
        # Six blocks; that of the middle with attention computes both of its convolutions again.
        assert operations.names.count("convolution") == again + (again > 0)
        assert operations.names.count("native_group_norm") >= 13


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_transforms_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "SMALL", 0)
    model = tiny().double()
    x, t = inputs()
    x, along = x.double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    _, forward = torch.func.jvp(lambda x: model(x, t), (x,), (along,))
    assert isinstance(forward, Tensor)
    with torch.no_grad():
        difference = (model(x + 1e-6 * along, t) - model(x - 1e-6 * along, t)) / 2e-6
    assert (forward - difference).abs().max() < 1e-6 * difference.abs().max()
    expected = torch.autograd.grad(model(x.requires_grad_(), t).sum(), x)[0]
    found = torch.func.grad(lambda x: model(x, t).sum())(x.detach())
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


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


# ---------------------------------------------------------------- the compiler


def test_training_compiles_as_one_graph() -> None:
    """With every condition, an odd size, checkpointing. With the CPU's code: test_backbones.py."""
    every: dict[str, Any] = {"num_classes": 4, "context_dim": 6, "image_channels": 1}
    model = tiny(checkpointing=True, resampling="antialiased", **every)
    x, t = inputs(3, 2, 7, 5)
    given = {
        "class_label": torch.tensor([0, 3, 4]),
        "context": torch.randn(3, 4, 6),
        "context_mask": torch.arange(4) < torch.tensor([[4], [2], [0]]),
        "image": torch.randn(3, 1, 7, 5),
    }
    torch.compiler.reset()
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = function(x, t, **given)
        y.square().mean().backward()
        results.append((y, [p.grad for p in model.parameters()]))
        model.zero_grad()
    (y, gradients), (z, again) = results
    assert (y - z).abs().max() < 1e-4
    for a, b in zip(gradients, again, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= 1e-4 * max(1, a.abs().max().item())


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gigaflops"),
    [
        ("unet_tiny", 16, (0.3, 1), (0.02, 0.2)),
        ("unet_small", 32, (6, 10), (2, 4)),
        ("unet_base", 64, (60, 120), (40, 90)),
    ],
)
def test_presets(name: str, size: int, parameters: Any, gigaflops: Any) -> None:
    with torch.device("meta"):
        model = make_model({"type": name, "num_classes": 10})
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size), torch.empty(1))
    assert isinstance(model, UNet)
    assert model.config.num_classes == 10
    assert parameters[0] < sum(p.numel() for p in model.parameters()) / 1e6 < parameters[1]
    assert gigaflops[0] < counter.get_total_flops() / 1e9 < gigaflops[1]
    plain = model_config(model)
    assert plain["type"] == "unet"
    with torch.device("meta"):
        again = make_model(json.loads(json.dumps(plain)))
        narrow = make_model({"type": name, "channels": 64})
    assert again.config == model.config
    assert narrow.config == dataclasses.replace(model.config, channels=64, num_classes=0)  # type: ignore[type-var]


# ---------------------------------------------------------------- time


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
