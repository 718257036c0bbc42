"""The benchmark of the networks: what it counts, what it says, and that its dry parts run."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from model_bench import peer_ours, report
from model_bench.library import CHANNELS, FLOPS, PARAMETERS, SIZE, Library, Network, Stub, plainly
from model_bench.measure import Case, Limit, Setting
from model_bench.worker import Answers

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
PLAIN = Setting(2, "contiguous")


class Attending(nn.Module):
    """One convolution and one attention, without norms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 16, 3, stride=8, padding=1)

    def forward(self, x, t):
        tokens = self.conv(x).flatten(2)[:, None].mT.contiguous()  # (B, 1, 16, 16)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class Chain(nn.Module):
    """From pixels by two linear layers, with a SiLU between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS, 8), nn.Linear(8, CHANNELS)

    def forward(self, x, t):
        h = self.first(x.permute(0, 2, 3, 1))
        return self.second(F.silu(h)).permute(0, 3, 1, 2)


def test_attention_counts_on_the_cpu_too():
    case = Case(Attending, plainly, PLAIN)
    tokens = (SIZE // 8) ** 2
    convolution = 2 * 2 * tokens * 16 * CHANNELS * 9
    attention = 2 * 2 * (2 * tokens * tokens * 16)
    assert case.flops("forward") == convolution + attention
    # Backward: of the convolution the weights alone; of attention four products for two.
    assert case.flops("both") == 2 * convolution + 3 * attention


def test_saved_bytes_are_those_of_the_activations():
    pixels = 2 * SIZE * SIZE
    # The input (a view of x, kept once), the SiLU's input, the second layer's; no weights.
    expected = 4 * pixels * (CHANNELS + 8 + 8)
    assert Case(Chain, plainly, PLAIN).saved_bytes() == expected


def test_storages_that_live_but_briefly_count_too():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            for _ in range(5):
                x = x * self.gain  # keeps x, which nothing else holds
            return x

    one = 4 * 2 * CHANNELS * SIZE * SIZE
    assert Case(Many, plainly, PLAIN).saved_bytes() == 5 * one


def test_no_parameter_is_left_at_zero():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(3))

    case = Case(Zeros, plainly, PLAIN)
    assert case.network.weight.abs().min() > 0
    assert torch.equal(case.network.gain, torch.ones(3))


def test_layout_and_batch_are_those_asked_for():
    case = Case(lambda: nn.Conv2d(CHANNELS, 4, 3), plainly, Setting(5, "channels_last"))
    assert case.x.shape == (5, CHANNELS, SIZE, SIZE)
    assert case.x.is_contiguous(memory_format=torch.channels_last)
    assert case.network.weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_and_compilation_reach_the_network():
    setting = Setting(1, "contiguous", dtype="bfloat16", backend="eager")
    case = Case(lambda: nn.Conv2d(CHANNELS, 4, 3), lambda n, x, t: n(x), setting)
    assert case.output().dtype == torch.bfloat16
    assert case._called is not case.network


def test_the_limit_knows_its_work():
    limit = Limit(1, products=(16,))
    assert limit.cases["matrix product, 16"][1] == 2 * 16**3
    name = "convolution, 64 channels, 32x32, channels_last"
    assert limit.cases[name][1] == 2 * 9 * 64 * 64 * 32 * 32
    assert set(limit.rates(1)) == set(limit.cases)


@pytest.mark.parametrize("name", peer_ours.SMALL)
def test_ours_are_of_the_size_that_is_compared(name):
    found = {n.name: n for n in peer_ours.library(ROOT).networks}
    if name not in found:
        pytest.skip(f"{name} is not registered")
    network = found[name]
    case = Case(network.make, network.call, Setting(1, "contiguous"))
    assert PARAMETERS[0] <= case.parameters <= PARAMETERS[1]
    assert FLOPS[0] <= case.flops("forward") <= FLOPS[1]
    assert network.checkpointed is not None
    plain = Case(network.make, network.call, PLAIN).saved_bytes()
    assert Case(network.checkpointed, network.call, PLAIN).saved_bytes() <= 0.4 * plain


def test_what_is_not_registered_is_said():
    library = peer_ours.library(ROOT)
    said = {line.split(":")[0] for line in library.missing}
    there = {n.name for n in library.networks}
    assert said | there == {*peer_ours.SMALL, *peer_ours.LARGE}
    assert not said & there


def test_a_stub_stands_for_any_name():
    stub = Stub("package")
    assert isinstance(stub.Anything, type)
    with pytest.raises(AttributeError):
        stub.__all__  # noqa: B018


class Fake:
    """A worker without a process."""

    log: list = []  # noqa: RUF012

    def __init__(self, name, networks=()):
        self.name = name
        self.about = {
            "name": name,
            "networks": [
                {"index": i, "name": n, "options": "", "checkpoints": c, "large": large}
                for i, (n, c, large) in enumerate(networks)
            ],
        }

    def ask(self, **order):
        self.log.append((self.name, order))
        if self.name == "limit":
            return {"a": len(self.log), "b": 1.0}
        if order["do"] == "count":
            found = {"parameters": 1, "saved bytes": 30 if order["checkpointed"] else 100}
            return found | {"flops": {"forward": 10, "both": 30}}
        return 1.5 if order["checkpointed"] else 1.0


def test_turns_alternate_and_the_limit_stands_between_them(monkeypatch):
    bench = importlib.import_module("models")
    monkeypatch.setattr(Fake, "log", [])
    workers = [
        Fake("ours", [("unet", True, False), ("dit", True, False), ("unet_base", True, True)]),
        Fake("peer", [("UNet", False, False)]),
    ]
    turns = bench.turns_of(workers, 4)
    # Both layouts of each, and the unet checkpointed; dit is not asked for, unet_base is large.
    assert [(t.network["name"], t.layout, t.checkpointed) for t in turns] == [
        ("unet", "contiguous", False),
        ("unet", "channels_last", False),
        ("unet", "channels_last", True),
        ("dit", "contiguous", False),
        ("dit", "channels_last", False),
        ("UNet", "contiguous", False),
        ("UNet", "channels_last", False),
    ]
    compiled = [t for t in bench.turns_of(workers, 4, "inductor") if t.backend]
    assert [t.network["name"] for t in compiled] == ["unet", "dit", "UNet"]
    rates = bench.measure(turns, Fake("limit"), 4, 2)
    timed = [name for name, order in Fake.log if order.get("do") != "count"]
    assert timed == 2 * (5 * ["ours", "ours", "limit"] + 2 * ["peer", "peer", "limit"])
    assert rates == {"a": len(Fake.log), "b": 1.0}  # the best of all
    assert all(len(t.seconds["both"]) == 2 for t in turns)
    (row,) = bench.checkpointing(turns)
    assert (row["network"], row["bytes"], row["time"]) == ("unet", 0.3, 1.5)


def figures(key, network, both, saved, **more):
    counted = {
        "parameters": more.get("parameters", 7e6),
        "saved bytes": saved * MB,
        "flops": {"forward": 2e9, "both": 6e9},
    }
    head = {"key": key, "library": key, "network": network, "options": "", "layout": "any",
            "compiled": more.get("compiled", False)}  # fmt: skip
    return report.row(head, counted, {"forward": [1.0, 0.5], "both": both}, 8, 100e9)


def test_what_a_row_says():
    row = figures("ours", "unet", [0.8, 0.6, 0.7], 80)
    assert row["saved MB per GFLOP"] == pytest.approx(80 / 16)
    assert row["both, median s"] == 0.7
    assert row["both, share"] == pytest.approx(8 * 6e9 / 0.6 / 100e9)
    assert row["forward, share"] == pytest.approx(8 * 2e9 / 0.5 / 100e9)
    assert report.comparable(row)
    assert not report.comparable(figures("ours", "unet", [1.0], 1, parameters=5e6))


def test_which_goals_are_missed():
    rows = [
        figures("ours", "unet", [0.5], 80),  # share 0.96
        figures("ours", "unet", [0.6], 10),
        figures("p", "UNet", [0.512], 64),
        figures("p", "UNet", [0.7], 1),  # a slower setting, which does not count
        figures("q", "UNet", [0.9], 90),
        figures("q", "UNet", [0.4], 1, compiled=True),  # by itself
    ]
    results = {
        "networks": rows,
        "checkpointing": [
            {"network": "hourglass", "layout": "any", "saved MB": 1.0, "bytes": 0.3,
             "both, median s": 1.0, "time": 1.485},
        ],
    }  # fmt: skip
    assert [r["key"] for r in report.best(rows)] == ["q", "ours", "p", "q"]
    goals = report.goals(results)
    assert [verdict for *_, verdict in goals] == [
        "met", "met", "missed by 25.0%", "met", "missed by 10.0%",
    ]  # fmt: skip
    assert goals[2][1:3] == ("at most 4", "5 (p's is the bound)")


def test_the_page_has_every_library():
    rows = [figures("ours", "unet", [0.5], 80), figures("p", "UNet", [0.6], 64)]
    about = {"seconds": 1, "processor": "any", "python": "3", "torch": "2", "batch": 8,
             "rounds": 1, "libraries": {"p": "1.0"}}  # fmt: skip
    page = report.page({
        "about": about, "limit": {"GFLOP/s": 100.0, "by": "matrix product, 64"},
        "networks": rows, "checkpointing": [], "missing": ["dit: not registered"],
    })  # fmt: skip
    assert "| **unet** | 7.0 | 2.00 | 0.750 | 0.500 | 0.32 | 0.96 | 80 | 5.00 | any |" in page
    assert "| p: UNet | 7.0 |" in page
    assert "- dit: not registered" in page


def small_library(folder):
    tiny = Network(
        "tiny", lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), "", lambda n, x, t: n(x)
    )
    return Library("small", "1", [tiny])


class Inline:
    """A worker in this process."""

    def __init__(self, module, name, folder):
        self.name, self._answers = name, Answers(small_library(folder))
        self.about = self._answers({"do": "about"}) | {"missing": ["other: not there"]}

    def ask(self, **order):
        return json.loads(json.dumps(self._answers(json.loads(json.dumps(order)))))

    def close(self):
        pass


def test_the_whole_benchmark_runs(monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("models")

    class Rates(Inline):
        def __init__(self, module, name, folder):
            super().__init__(module, name, folder)
            if name == "limit":
                limit = Limit(1, products=(16,))
                self.ask = lambda batch: limit.rates(1)

    monkeypatch.setattr(bench, "Worker", Rates)
    out = tmp_path / "models.json"
    argv = ["models.py", "--quick", "--alone", "--out", str(out), "--docs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    results = json.loads(out.read_text())
    assert [r["layout"] for r in results["networks"]] == ["channels_last"]
    assert results["networks"][0]["both, share"] > 0
    assert "small: tiny" in (tmp_path / "benchmarks-models.md").read_text()
    assert "other: not there" in capsys.readouterr().out


def test_the_gpu_script_s_dry_run(monkeypatch, tmp_path, capsys):
    script = importlib.import_module("on_gpu_models")
    monkeypatch.setattr(script, "Worker", Inline)
    out = tmp_path / "none.json"
    argv = ["on_gpu_models.py", "--device", "cpu", "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    said = capsys.readouterr().out
    row = next(json.loads(line) for line in said.splitlines() if '"tiny"' in line)
    assert row["both, share"] > 0
    assert "failed" not in row
    assert not out.exists()  # a dry run leaves no figures


def test_neighbourhood_attention_is_measured_where_it_is():
    script = importlib.import_module("on_gpu_models")
    if importlib.util.find_spec("k_diffusion.models.neighborhood") is None:
        pytest.skip("no neighbourhood attention")
    options = argparse.Namespace(device="cpu", neighborhoods=((1, 6, 5, 1, 16, 3),), rounds=1)
    rows = {row["backend"]: row for row in script.neighborhood(options)}
    assert set(rows) >= {"tiles", "flex"}
    assert max(row["largest difference"] for row in rows.values()) <= 0.05  # of bfloat16
    assert rows["tiles"]["both, s"] > 0
