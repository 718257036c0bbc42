"""`k-diffusion sample` and `k-diffusion info`."""

import json
import pickle
import shlex

import pytest
import torch

from k_diffusion.cli import main
from k_diffusion.cli.signals import Terminated
from k_diffusion.models import UNet
from k_diffusion.sampling import KSampler
from k_diffusion.sampling.many import Many
from k_diffusion.training import read_info
from k_diffusion.utils.images import load_png


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_images_and_a_grid_that_say_how_they_were_made(trained, tmp_path, capsys) -> None:
    out = tmp_path / "new/out"
    argv = ["sample", str(trained), "--steps", "3", "--seed", "7", "-n", "4", "--out", str(out)]
    assert main([*argv, "--class-label", "3,5", "--sampler-options", ""]) == 2
    assert "--sampler-options: ''" in one_line(capsys)
    assert main([*argv, "--class-label", "3,5", "--batch-size", "3"]) == 0
    assert capsys.readouterr().out == f"4 images and grid.png are in {out}\n"
    files = [f"seed{seed:06d}_class{3 if seed % 2 else 5}.png" for seed in (7, 8, 9, 10)]
    assert names(out) == ["grid.png", *files]
    image, text = load_png(out / files[1])
    assert image.shape == (1, 8, 8)
    assert text["software"].startswith("k-diffusion 0.")
    assert text["checkpoint sha256"] == read_info(trained).sha256
    expected = {
        "checkpoint": str(trained),
        "weights": "ema",
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "steps": "3",
        "seed": "8",
        "class": "5",
        "images": "1",
    }
    assert expected.items() <= text.items()
    grid, text = load_png(out / "grid.png")
    # Two columns, with the names 3 and 5 over images eightfold, between gaps of 2.
    assert grid.shape[0] == 1
    assert grid.shape[2] == 134
    names_high = grid.shape[1] - 134
    assert 5 < names_high < 20
    assert (grid[:, :names_high, :67] < 255).any()
    assert (grid[:, :names_high, 67:] < 255).any()
    assert (text["seed"], text["images"], text["class"]) == ("7", "4", "3,5")


def test_a_sampler_of_adaptive_steps(trained, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    argv = ["sample", str(trained), "--sampler", "dpm_adaptive", "-n", "2", "--out", str(out)]
    assert main([*argv, "--noise", "path"]) != 0
    assert "dpm_adaptive draws noise for the steps it finds" in one_line(capsys)
    assert main([*argv, "--sampler-options", "rtol=0.2"]) == 0
    assert capsys.readouterr().out == f"2 images and grid.png are in {out}\n"
    assert len(names(out)) == 3


@pytest.mark.parametrize("noise", [[], ["--noise", "path", "--noise-on-cpu"]])
def test_the_command_in_the_text_makes_the_image_again(trained, tmp_path, noise) -> None:
    first = tmp_path / "first"
    argv = ["--sampler", "dpmpp_2m_sde", "--scheduler", "exponential", "--steps", "4", "-n", "5"]
    argv += [
        "--sampler-options",
        "eta=0.7",
        "--scheduler-options",
        "sigma_max=20",
        "--weights",
        "last",
        *noise,
    ]
    assert main(["sample", str(trained), *argv, "--out", str(first)]) == 0
    for index, name in ((2, "seed000002_class2.png"), (None, "grid.png")):
        wanted, text = load_png(first / name)
        program, *command = shlex.split(text["command"])
        assert program == "k-diffusion"
        again = tmp_path / f"again{index}"
        assert main([*command, "--out", str(again)]) == 0
        if index is not None:
            assert names(again) == ["grid.png", name]
        found, said = load_png(again / name)
        assert (found.int() - wanted.int()).abs().max() <= 1  # 1e-4 may cross a rounding edge
        assert said == text
        assert set(noise) <= set(command)
        assert text.get("noise", "independent") == (noise[1] if noise else "independent")


def test_noise_is_chosen_and_an_unknown_one_named(trained, tmp_path, capsys) -> None:
    argv = ["sample", str(trained), "--sampler", "euler_ancestral", "--steps", "3", "-n", "1"]
    images = []
    for k, noise in enumerate(("independent", "path")):
        assert main([*argv, "--noise", noise, "--out", str(tmp_path / str(k))]) == 0
        images.append(load_png(tmp_path / str(k) / "seed000000_class0.png")[0].int())
    assert (images[0] - images[1]).abs().max() > 5
    capsys.readouterr()
    assert main([*argv, "--noise", "paht", "--out", str(tmp_path / "2")]) == 2
    assert "unknown noise 'paht'; did you mean 'path'" in one_line(capsys)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_an_image_depends_on_its_seed_and_class_alone(solver) -> None:
    torch.manual_seed(0)
    model = UNet(
        in_channels=1,
        channels=8,
        channel_mults=(1, 2),
        blocks=1,
        attention=(False, True),
        head_channels=8,
        num_classes=10,
        prediction="edm",
        time_convention="log_sigma",
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sampler = KSampler(model.eval(), "karras", solver)

    def images(seeds, labels, batch_size, steps=6):
        return sampler.sample_many(
            len(seeds), steps=steps, shape=(1, 8, 8), condition=torch.tensor(labels), seed=seeds,
            batch_size=batch_size,
        ).collect()  # fmt: skip

    seeds, labels = [7, 8, 9, 10, 11], [3, 5, 3, 5, 3]
    together = images(seeds, labels, 64)
    assert (images(seeds, labels, 2) - together).abs().max() < 1e-4
    for index in range(5):
        alone = images(seeds[index : index + 1], labels[index : index + 1], 1)
        assert (alone - together[index]).abs().max() < 1e-4
    # The test would say nothing of a model whose images are all alike.
    assert 0.1 < together.abs().max() < 10
    assert (together[0] - together[2]).abs().max() > 1e-2
    assert (images([7], [5], 1) - together[0]).abs().max() > 1e-3


def test_classes_are_taken_in_turn(trained, tmp_path) -> None:
    assert main(["sample", str(trained), "--steps", "2", "-n", "12", "--out", str(tmp_path)]) == 0
    labels = [name.partition("_class")[2] for name in names(tmp_path) if name != "grid.png"]
    assert labels == [f"{index % 10}.png" for index in range(12)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--class-label", "11"], "--class-label 11 does not exist: "),
        (["--class-label", "3,10"], "--class-label 10 does not exist: "),
        (["--sampler", "eular"], "unknown sampler 'eular'; did you mean 'euler'?"),
        (["--scheduler", "karas"], "unknown scheduler 'karas'; did you mean 'karras'?"),
        (["--scheduler", "karras", "--scheduler-options", "sigma_max=-1"], "sigma_max, got"),
        (["--sampler-options", "eta=high", "--sampler", "ddim"], "eta"),
        (["--sampler", "unipc", "--sampler-options", "s_churn=-4"], "s_churn must be 0 or more"),
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "x"], "--steps: 'x'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    trained, tmp_path, capsys, more, said
) -> None:
    out = tmp_path / "out"
    assert main(["sample", str(trained), "--out", str(out), *more]) == 2
    assert said in one_line(capsys)
    assert not out.exists()


def test_churn_is_an_option_of_any_sampler(trained, tmp_path) -> None:
    argv = ["sample", str(trained), "--steps", "3", "-n", "1"]
    assert main([*argv, "--out", str(tmp_path / "a")]) == 0
    churned = [*argv, "--sampler-options", "s_churn=3,s_noise=1.003"]
    assert main([*churned, "--out", str(tmp_path / "b")]) == 0
    a, b = (load_png(tmp_path / f"{name}/seed000000_class0.png")[0] for name in "ab")
    assert not torch.equal(a, b)
    assert main([*argv, "--sampler-options", "s_noise=1.003", "--out", str(tmp_path / "c")]) == 2


def test_a_model_without_classes(tmp_path, write_config, capsys) -> None:
    argv = ["--config", str(write_config(tmp_path)), "--set", "model.num_classes=0"]
    assert main(["train", *argv]) == 0
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    capsys.readouterr()
    sample = ["sample", str(checkpoint), "--steps", "2", "-n", "2", "--out", str(tmp_path / "out")]
    assert main([*sample, "--class-label", "1"]) == 2
    assert "was trained without classes" in one_line(capsys)
    assert main(sample) == 0
    assert names(tmp_path / "out") == ["grid.png", "seed000000.png", "seed000001.png"]
    assert "class" not in load_png(tmp_path / "out/grid.png")[1]


def test_images_that_are_there_are_not_replaced_unasked(trained, tmp_path, capsys) -> None:
    argv = ["sample", str(trained), "--steps", "2", "-n", "2", "--out", str(tmp_path)]
    (tmp_path / "seed000001_class1.png").write_bytes(b"mine")
    assert main(argv) == 2
    assert "holds seed000001_class1.png already (1 of 3 files)" in one_line(capsys)
    assert names(tmp_path) == ["seed000001_class1.png"]
    assert (tmp_path / "seed000001_class1.png").read_bytes() == b"mine"
    assert main([*argv, "--overwrite"]) == 0
    assert load_png(tmp_path / "seed000001_class1.png")[1]["seed"] == "1"
    capsys.readouterr()
    assert main([*argv[:-1], str(tmp_path / "grid.png")]) == 2
    assert "is a file; give a folder" in one_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; 2 of 5 images are in "),
        (Terminated(), 143, "stopped; 2 of 5 images are in "),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
    ],
)
def test_an_end_half_way_leaves_whole_files_only(
    trained, tmp_path, capsys, monkeypatch, error, code, said
) -> None:
    from PIL.Image import Image

    save, saved = Image.save, []

    def third_fails(self, name, **options):
        saved.append(name)
        if len(saved) == 3:
            name.write_bytes(b"half a file")
            raise error
        return save(self, name, **options)

    monkeypatch.setattr(Image, "save", third_fails)
    argv = ["sample", str(trained), "--steps", "2", "-n", "5", "--batch-size", "2"]
    assert main([*argv, "--out", str(tmp_path)]) == code
    assert one_line(capsys).startswith(f"k-diffusion sample: {said}")
    assert names(tmp_path) == ["seed000000_class0.png", "seed000001_class1.png"]
    for name in names(tmp_path):
        load_png(tmp_path / name)


def test_images_that_are_not_finite_are_no_files(trained, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Many, "_draw", lambda *_: torch.full((2, 1, 8, 8), torch.nan))
    argv = ["sample", str(trained), "--steps", "2", "-n", "2", "--out", str(tmp_path)]
    assert main(argv) == 1
    assert "values that are not finite" in one_line(capsys)
    assert names(tmp_path) == []


def test_a_grid_holds_no_more_than_it_can_show(trained, tmp_path, monkeypatch) -> None:
    from k_diffusion.cli import sample

    monkeypatch.setattr(sample, "GRID_HOLDS", 4)
    assert main(["sample", str(trained), "--steps", "2", "-n", "7", "--out", str(tmp_path)]) == 0
    assert len(names(tmp_path)) == 8
    grid = load_png(tmp_path / "grid.png")[0]
    assert grid.shape[1] < 67 * 2  # one row of seven classes, of which four are held


@pytest.mark.parametrize("command", ["sample", "info"])
def test_a_checkpoint_that_is_none(trained, tmp_path, capsys, command) -> None:
    whole = trained.read_bytes()
    close = tmp_path / "checkpoint-000000000032.safetensors"
    close.write_bytes(whole)
    made = {
        "cut.safetensors": (whole[: len(whole) // 2], "truncated"),
        "flipped.safetensors": (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "damaged"),
        "empty.safetensors": (b"", "is empty"),
        "text.safetensors": (b"weights, honestly", "no safetensors file"),
        "old.ckpt": (pickle.dumps({"w": 1}), "is a pickle"),
    }
    for name, (content, said) in made.items():
        (tmp_path / name).write_bytes(content)
        assert main([command, str(tmp_path / name)]) == 1
        line = one_line(capsys)
        assert line.startswith(f"k-diffusion {command}: error: checkpoint {tmp_path / name} ")
        assert said in line
    assert main([command, str(tmp_path / "checkpoint-32.safetensors")]) == 1
    assert f"does not exist; did you mean {close}?" in one_line(capsys)
    empty = tmp_path / "run"
    empty.mkdir()
    assert main([command, str(empty)]) == 1
    assert "is a folder" in one_line(capsys)
    assert not (tmp_path / "samples").exists()


def test_a_runs_folder_stands_for_its_newest_checkpoint(trained, tmp_path, capsys) -> None:
    older, newer = (trained.with_name(f"checkpoint-{n:012d}.safetensors") for n in (16, 64))
    newer.write_bytes(b"cut by a full disk")
    older.write_bytes(b"older")
    try:
        argv = ["--steps", "2", "-n", "1", "--out", str(tmp_path)]
        assert main(["sample", str(trained.parent), *argv]) == 0
        assert f"passing over checkpoint {newer} is" in capsys.readouterr().err
        text = load_png(tmp_path / "grid.png")[1]
        assert text["checkpoint"] == str(trained)
        assert str(trained) in text["command"]
        assert main(["info", str(trained.parent)]) == 0
        assert f"checkpoint:     {trained}\n" in capsys.readouterr().out
    finally:
        newer.unlink()
        older.unlink()


def test_info(trained, capsys) -> None:
    info = read_info(trained)
    assert main(["info", str(trained), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == info.sha256
    assert facts["images seen"] == 32
    assert (facts["model"], facts["prediction"]) == ("unet", "edm")
    assert facts["weights"] == ["ema", "last"]
    assert facts["parts"] == ["ema", "model", "optimizer"]
    assert facts["parameters"] == info.parameters > 1000
    assert facts["config"] == info.config
    assert main(["info", str(trained)]) == 0
    text = capsys.readouterr().out
    assert f"sha256:         {info.sha256}\n" in text
    assert f"parameters:     {info.parameters:,}\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["shape", "1,", "8,", "8"] in lines
    assert ["ema.max_decay", "0.5"] in lines
    assert ["grad_clip", "1.0"] in lines
