"""Evaluation along a run: its lines, and that the run is the one without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.denoiser import make_denoiser
from k_diffusion.evaluation import features_of, figures_of, make_reference, train_small
from k_diffusion.evaluation.measuring import class_labels
from k_diffusion.evaluation.statistics import data_sha256
from k_diffusion.sampling import KSampler
from k_diffusion.sampling.many import Many
from k_diffusion.training import ArraySource, Digits, evaluating, load_denoiser
from k_diffusion.training.check import check_run
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import DataError
from k_diffusion.training.evaluating import Evaluation, look_at, open_data
from k_diffusion.training.history import read_history
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.scheduler import KarrasScheduler

MakeConfig = Callable[..., TrainConfig]
Launch = Callable[..., list[str]]
EVALUATE = {
    "every_images": 256,
    "images": 24,
    "steps": 3,
    "seed": 5,
    "batch_size": 10,
    "metrics": ["fid", "recall"],
}


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "k_diffusion.evaluation.measuring.train_small"
    monkeypatch.setattr(name, lambda *a, **k: train_small(*a, images_seen=300, **k))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def lines(out: str | Path) -> list[dict[str, Any]]:
    text = Path(out, "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {k: v for k, v in f.items() if k not in ("images_per_second", "seconds")} for f in found
    ]


def evaluations(out: str | Path) -> list[dict[str, Any]]:
    return [line for line in lines(out) if line["event"] == "evaluate"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}


def test_the_run_is_the_same_with_and_without(make_run_config: MakeConfig, tmp_path: Path) -> None:
    said: list[str] = []
    plain = run_training(make_run_config(out=str(tmp_path / "plain")))
    config = make_run_config(evaluate=EVALUATE)
    measured = run_training(config, say=said.append)
    one, other = weights(plain.checkpoint), weights(measured.checkpoint)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    without = [line for line in lines(config.out) if line["event"] != "evaluate"]
    for line, wanted in zip(without, lines(tmp_path / "plain"), strict=True):
        if line["event"] == "train":
            assert line == wanted
    # Every 256 images, to the next whole step of 32, and at the end.
    found = evaluations(config.out)
    assert [line["images_seen"] for line in found] == [256, 512, 640]
    assert [line["step"] for line in found] == [8, 16, 20]
    assert all(list(line["figures"]) == ["fid", "recall"] for line in found)
    assert len({line["figures"]["fid"] for line in found}) == 3
    news = [line for line in said if line.startswith("evaluation at ")]
    assert len(news) == 3
    assert news[0].startswith("evaluation at 256 images: fid ")
    assert news[0].endswith(f"(24 samples, features of {found[0]['extractor']})")
    kept = {path.name for path in Path(config.out, "evaluation").iterdir()}
    assert f"{found[0]['extractor']}.safetensors" in kept
    assert len(kept) == 2  # and the statistics
    # The last line is of the last checkpoint's average.
    denoiser, _ = load_denoiser(measured.checkpoint)
    reference = make_reference(Digits(), cache=Path(config.out, "evaluation"))
    assert reference.extractor.name == found[0]["extractor"]
    labels = torch.tensor(class_labels(reference.statistics.facts["classes"], 24))
    samples = KSampler(denoiser, KarrasScheduler(), "dpmpp_2m").sample_many(
        24, steps=3, shape=(1, 8, 8), condition=labels, seed=5
    )
    from k_diffusion.evaluation.statistics import as_seen

    features = reference.extractor(as_seen(samples.collect()))
    figures = figures_of(features, reference, ["fid", "recall"]).values
    assert abs(figures["fid"] - found[-1]["figures"]["fid"]) < 1e-3
    assert figures["recall"] == found[-1]["figures"]["recall"]


def test_a_resumed_run_has_the_same_lines(make_run_config: MakeConfig, tmp_path: Path) -> None:
    options = {"evaluate": EVALUATE, "checkpoint_every_images": 256, "keep_checkpoints": 9}
    whole = make_run_config(**options)
    run_training(whole)
    again = make_run_config(**options, out=str(tmp_path / "again"))

    class Stop(Exception):
        pass

    def stop(trainer: Any, state: Any) -> None:
        if state.step == 18:
            raise Stop

    with pytest.raises(Stop):
        run_training(again, on_step=stop)
    assert len(evaluations(again.out)) == 2
    # Goes on from 512, or from 256, whose line of 512 is then written a second time.
    run_training(again, resume="auto")
    assert evaluations(again.out) == evaluations(whole.out)
    run_training(again, resume=Path(again.out, "checkpoint-000000000256.safetensors"))
    assert evaluations(again.out) == evaluations(whole.out)


def test_a_run_whose_last_steps_are_left_out_is_evaluated_at_its_end(
    make_run_config: MakeConfig,
) -> None:
    config = make_run_config(
        evaluate=EVALUATE, checkpoint_every_images=256, background_checkpoints=False
    )

    def go_back(trainer: Trainer, state: Any) -> None:
        if state.step == 19 and not trainer.passed_over:
            trainer.go_back(Path(config.out, "checkpoint-000000000512.safetensors"), 19, 20)

    assert run_training(config, on_step=go_back).images_seen == 640
    assert [line["images_seen"] for line in evaluations(config.out)] == [256, 512, 640]


def test_the_global_generator_is_put_back(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(*args: Any, **options: Any) -> Any:  # as a model of one's own may
        torch.rand(1)
        return features_of(*args, **options)

    monkeypatch.setattr("k_diffusion.training.evaluating.features_of", draws)
    trainer = Trainer(make_run_config(evaluate=EVALUATE))
    before = torch.get_rng_state()
    training = trainer.network.training
    evaluation = Evaluation(trainer)
    evaluation.prepare(lambda line: None)
    assert evaluation.measure()["figures"]
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.network.training == training
    assert int(trainer.network.calls) == 0  # its buffers too are the run's own


def test_samples_that_are_no_number_end_no_run(make_run_config: MakeConfig) -> None:
    config = make_run_config(evaluate=EVALUATE, total_images=256)

    def spoil(trainer: Any, state: Any) -> None:
        next(iter(trainer.ema.state_dict().values())).fill_(torch.nan)

    said: list[str] = []
    result = run_training(config, on_step=spoil, say=said.append)
    assert result.images_seen == 256
    (line,) = evaluations(config.out)
    assert line["figures"] is None
    assert line["reason"].startswith("the result of dpmpp_2m after 3 steps is not finite")
    assert f"evaluation at 256 images: {line['reason']}" in said


def test_without_classes_and_with_other_data(make_run_config: MakeConfig) -> None:
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    images = Digits().images[:100].repeat(1, 3, 1, 1)
    config = make_run_config(evaluate=EVALUATE, total_images=256, model={**model, "in_channels": 3})
    run_training(config, source=ArraySource(images))
    (line,) = evaluations(config.out)
    assert line["figures"]["fid"] > 0


def in_two(folder: Path) -> None:
    import conftest

    from k_diffusion.models import MODELS

    MODELS["tiny"], MODELS["blocks"] = conftest.Tiny, conftest.Blocks
    patch = pytest.MonkeyPatch()
    quick(patch)
    for way, changes in WAYS.items():
        run_training(
            conftest.config_of(evaluate=EVALUATE, out=str(folder / way), **changes), progress=False
        )


WAYS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {"parallel": "fsdp"}}


def test_two_processes_write_the_same_lines(
    launch: Launch, make_run_config: MakeConfig, tmp_path: Path
) -> None:
    model = make_run_config().model | {"dropout": 0.0}
    for changes in WAYS.values():
        changes["model"] = model
    launch(__file__, "in_two")
    config = make_run_config(evaluate=EVALUATE)
    run_training(config)
    wanted = evaluations(config.out)
    for way in WAYS:
        found = evaluations(tmp_path / way)
        assert [f["images_seen"] for f in found] == [256, 512, 640]
        for one, other in zip(found, wanted, strict=True):
            assert one["extractor"] == other["extractor"]
            # The weights themselves agree to rounding alone.
            assert abs(one["figures"]["fid"] / other["figures"]["fid"] - 1) < 0.02, way


def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def refused(match: str, source: Any = None, **changes: Any) -> None:
        config = make_run_config(evaluate={**EVALUATE, **changes}, model=MODEL)
        with pytest.raises(ConfigError, match=match):
            run_training(config, source=source, overwrite=True, on_step=lambda *a: seen.append(a))

    refused(
        "evaluate.extractor = 'inception' cannot be had: .* is missing",
        extractor="inception",
        weights=str(tmp_path / "none.pth"),
    )
    assert not seen
    sound = ArraySource(torch.zeros(50, 1, 8, 8, 8))
    options, denoiser = make_run_config(evaluate=EVALUATE).evaluate, make_denoiser(lambda x, s: x)
    with pytest.raises(ConfigError, match="every_images = 256, but the data are of shape"):
        look_at(options, sound, denoiser)


MODEL = {"type": "tiny", "num_classes": 10, "prediction": "edm", "time_convention": "log_sigma"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"metrics": ["fidd"]}, "evaluate: unknown metric 'fidd'|evaluate.*fidd"),
        ({"sampler": "eulr"}, "eulr"),
        ({"scheduler": "kras"}, "kras"),
        ({"images": 3}, r"evaluate\.images = 3"),
        ({"extractor": "incep"}, r"evaluate\.extractor = 'incep'"),
        ({"every": 3}, r"evaluate\.every = 3 is no known key"),
    ],
)
def test_config(make_run_config: MakeConfig, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_run_config(evaluate=change)


def test_nothing_is_evaluated_unless_asked(make_run_config: MakeConfig) -> None:
    assert make_run_config().evaluate.every_images is None


def test_data_to_compare_with(tmp_path: Path) -> None:
    assert len(open_data("", {"source": "digits", "split": "test"}, (1, 8, 8))) == 359
    assert len(open_data("digits:all", {}, (1, 8, 8))) == 1797
    from k_diffusion.utils.images import save_png

    for kind in "ab":
        (tmp_path / kind).mkdir()
        save_png(tmp_path / kind / "0.png", torch.zeros(1, 20, 30))
    source = open_data(str(tmp_path), {"classes": "none", "crop": "random"}, (3, 10, 10))
    assert source.shape == (3, 10, 10)
    assert source.num_classes == 0
    assert not source.augments
    with pytest.raises(DataError, match=r"shape \(1, 8, 8\), but the samples have \(3, 8, 8\)"):
        open_data("digits", {}, (3, 8, 8))
    with pytest.raises(DataError, match="give --data"):
        open_data("", {}, (3, 8, 8))


def test_sizes_in_buckets_are_refused_before_the_run(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are of images of one size."""
    monkeypatch.setattr(Digits, "shapes", ((1, 8, 8), (1, 4, 16)))
    config = make_run_config(evaluate=EVALUATE)
    with pytest.raises(ConfigError, match="evaluate.every_images = 256, but data.buckets"):
        Evaluation(Trainer(config))
    with pytest.raises(ValueError, match="the real images have several sizes"):
        make_reference(Digits())


def test_an_extractor_that_cannot_be_had_costs_no_run(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """The run that was to be overwritten is there still."""
    before = run_training(make_run_config(checkpoint_every_images=320), progress=False, say=len)
    there = sorted(path.name for path in before.checkpoint.parent.iterdir())
    for extractor, weights in (("inception", "none.pth"), ("clip", "none"), ("small", "none")):
        evaluate = {**EVALUATE, "extractor": extractor, "weights": str(tmp_path / weights)}
        with pytest.raises(ConfigError, match=f"extractor = '{extractor}' cannot be had"):
            run_training(
                make_run_config(evaluate=evaluate), overwrite=True, progress=False, say=len
            )
    assert sorted(path.name for path in before.checkpoint.parent.iterdir()) == there


FAILURES = {
    "draw": (Many, RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    "features_of": (evaluating, DataError("image 3 is gone"), "DataError: image 3 is gone"),
    "figures_of": (evaluating, OSError("no space left"), "OSError: no space left"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_evaluation_that_fails_is_told_and_ends_no_run(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    owner, error, reason = FAILURES[name]
    work = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if [line[:17] for line in said if "evaluation at" in line] == ["evaluation at 256"]:
            raise error  # in the second one alone
        return work(*args, **options)

    said: list[str] = []
    config = make_run_config(evaluate=EVALUATE, checkpoint_every_images=320)
    sound = run_training(config, progress=False, say=said.append)
    wanted = evaluations(config.out)
    assert len(wanted) == 3
    said.clear()
    monkeypatch.setattr(owner, name, failing)
    found = run_training(config, overwrite=True, progress=False, say=said.append)
    assert evaluations(config.out) == [
        wanted[0], {**wanted[1], "figures": None, "reason": reason}, wanted[2]
    ]  # fmt: skip
    assert f"evaluation at 512 images: {reason}" in said
    assert found.sha256 == sound.sha256


@pytest.mark.parametrize("section", ["evaluate", "preview"])
def test_levels_that_do_not_suit_are_refused_before_the_run(
    make_run_config: MakeConfig, section: str
) -> None:
    options = {"every_images": 256, "scheduler": "flow", "steps": 3}
    config = make_run_config(model=MODEL, **{section: options})
    said = rf"{section}.scheduler = 'flow' with {section}.steps = 3 does not suit this model: "
    for begin in (run_training, check_run):
        with pytest.raises(ConfigError, match=said):
            begin(config)
    assert not Path(config.out).exists()


def test_figures_say_of_which_data(make_run_config: MakeConfig) -> None:
    config = make_run_config(evaluate=EVALUATE)
    run_training(config, progress=False, say=len)
    wanted = data_sha256(Digits(), torch.arange(len(Digits())))[:12]
    assert {line["data"] for line in evaluations(config.out)} == {wanted}
    (judge,) = read_history(config.out).figures()
    assert judge.data == wanted
