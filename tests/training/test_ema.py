"""The averaged weights: closed form, warm-up, buffers, precision."""

import pytest
import torch
from torch import nn

from k_diffusion.training.ema import Ema, WarmUp, warmup_decay


class Tied(nn.Module):
    """Two names for one weight, a counting buffer, one that is not saved, and bf16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_warmup_decay_is_the_published_curve() -> None:
    assert warmup_decay(0) == 0
    assert abs(warmup_decay(9999, max_decay=1.0) - 0.999) < 1e-12
    assert abs(warmup_decay(3, inv_gamma=3.0, power=2.0, max_decay=1.0) - 0.75) < 1e-12
    assert warmup_decay(10**9) == 0.9999
    decays = [warmup_decay(i, max_decay=1.0) for i in range(100)]
    assert decays == sorted(decays)


@pytest.mark.parametrize("power", [0.75, 2 / 3, 2.0])
def test_average_is_the_closed_form(power: float) -> None:
    network = nn.Linear(4, 3)
    ema = Ema(network, WarmUp(power=power, inv_gamma=2.0, max_decay=0.9))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator) for _ in range(40)]
    for value in values:
        with torch.no_grad():
            network.weight.copy_(value)
        ema.update()
    # The share of value i: (1 - decay_i) times all later decays; the initial weights have none.
    decays = [min(0.9, 1 - (1 + i / 2.0) ** -power) for i in range(40)]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i, value in enumerate(values):
        share = 1 - decays[i]
        for later in decays[i + 1 :]:
            share *= later
        expected += share * value.double()
    assert (ema.state_dict()["weight"] - expected).abs().max() < 1e-6
    assert ema.updates == 40


def test_low_precision_weights_are_averaged_in_float32() -> None:
    network = Tied()
    ema = Ema(network, WarmUp(max_decay=0.999, power=100.0))  # the upper limit from the second update on
    ema.update()
    with torch.no_grad():
        network.low.fill_(2.0)
    for _ in range(10):
        ema.update()
    average = ema.state_dict()["low"]
    assert average.dtype == torch.float32
    # bf16 would lose each of these steps: it has 8 bits.
    assert (average - (2 - 0.999**10)).abs().max() < 1e-6


def test_buffers_are_copied_and_shared_weights_kept_once() -> None:
    network = Tied()
    ema = Ema(network)
    network.count += 5
    assert ema.state_dict()["count"] == 0
    ema.update()
    assert ema.state_dict()["count"] == 5
    assert set(ema.state_dict()) == {"first.weight", "low", "count"}


def test_average_is_no_view_of_the_network() -> None:
    network = nn.Linear(2, 2)
    ema = Ema(network)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(ema.state_dict()["weight"], before)


def test_state_round_trip_goes_on_bitwise() -> None:
    torch.manual_seed(0)
    network, other = nn.Linear(4, 3), nn.Linear(4, 3)
    ema, copy = Ema(network), Ema(other)
    for step in range(20):
        with torch.no_grad():
            network.weight.add_(torch.randn(3, 4))
            other.load_state_dict(network.state_dict())
        ema.update()
        if step == 9:
            state = {name: t.clone() for name, t in ema.state_dict().items()}
            copy.load_state_dict(state, ema.updates)
        elif step > 9:
            copy.update()
    assert torch.equal(ema.state_dict()["weight"], copy.state_dict()["weight"])


def test_state_that_does_not_fit_is_refused() -> None:
    ema = Ema(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\).*\(3,\)"):
        ema.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, 1)
    with pytest.raises(ValueError, match="bias is missing"):
        ema.load_state_dict({"weight": torch.ones(3, 4)}, 1)
    assert not torch.equal(ema.state_dict()["weight"], torch.ones(3, 4))
    assert ema.updates == 0


def test_swapped_lends_the_average_and_gives_the_weights_back() -> None:
    network = nn.Linear(2, 2)
    ema = Ema(network)
    with torch.no_grad():
        network.weight.fill_(3.0)
    average = ema.state_dict()["weight"].clone()

    def use() -> None:
        with ema.swapped():
            assert torch.equal(network.weight, average)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert (network.weight == 3.0).all()
    target = nn.Linear(2, 2)
    ema.copy_to(target)
    assert torch.equal(target.weight, average)
