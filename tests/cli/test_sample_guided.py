"""`k-diffusion sample` with guidance, from an image, into a part of one, in steps auto."""

import shlex
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from k_diffusion.cli import main
from k_diffusion.cli.problems import plain_warnings
from k_diffusion.guidance import apg, autoguidance, cfg, cfg_zero_star, perturbed_attention
from k_diffusion.sampling import KSampler, SamplingAdvice
from k_diffusion.training import load_denoiser, read_info
from k_diffusion.utils.images import load_png, save_png, to_float, to_uint8

SHAPE = (1, 8, 8)
STEPS = 4
LABELS = torch.tensor([3, 5])


def draw(trained, out, *more, sampler="heun") -> list[str]:
    argv = ["sample", str(trained), "--sampler", sampler, "--steps", str(STEPS), "-n", "2"]
    return [*argv, "--class-label", "3,5", "--out", str(out), *more]


def images(folder: Path) -> Tensor:
    return torch.stack([load_png(p)[0] for p in sorted(folder.glob("seed*.png"))])


def by_library(model, sampler="heun", steps=STEPS, **options) -> Tensor:
    drawn = KSampler(model, "karras", sampler).sample(
        None, steps, LABELS, shape=SHAPE, seeds=[0, 1], **options
    )
    return to_uint8(drawn)


def far(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_config) -> Path:
    """A checkpoint of a model that heeds its classes; the tests' `trained` is a lesser one."""
    folder = tmp_path_factory.mktemp("model")
    config = write_config(folder, 800)
    config.write_text(config.read_text() + "\n[optimizer]\nlr = 1e-2\n")
    assert main(["train", "--config", str(config)]) == 0
    (checkpoint,) = (folder / "run").glob("*.safetensors")
    return checkpoint


WAYS = {
    "plain": ([], lambda d, weak: d),
    "cfg": (["--guidance", "3"], lambda d, weak: cfg(d, 3.0)),
    "interval": (
        ["--guidance", "3", "--guidance-options", "interval=[0.1,20],rescale=0.7"],
        lambda d, weak: cfg(d, 3.0, interval=(0.1, 20.0), rescale=0.7),
    ),
    "apg": (
        ["--guidance", "3", "--guidance-method", "apg", "--guidance-options", "norm=2.5"],
        lambda d, weak: apg(d, 3.0, norm=2.5),
    ),
    "cfg_zero_star": (
        ["--guidance", "3", "--guidance-method", "cfg_zero_star"],
        lambda d, weak: cfg_zero_star(d, 3.0),
    ),
    "negative": (
        ["--guidance", "3", "--negative", "7"],
        lambda d, weak: cfg(d, 3.0, null={"class_label": torch.tensor([7, 7])}),
    ),
    "guide": (["--guidance", "3", "--guide", "LESSER"], lambda d, weak: autoguidance(d, weak, 3.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_guidance_is_what_the_library_does(model, trained, tmp_path, way) -> None:
    options, wrap = WAYS[way]
    options = [str(trained) if word == "LESSER" else word for word in options]
    assert main(draw(model, tmp_path, *options)) == 0
    found = images(tmp_path)
    denoiser, weak = load_denoiser(model)[0], load_denoiser(trained)[0]
    assert far(found, by_library(wrap(denoiser, weak))) <= 1  # a last bit may cross an edge
    for other, (_, wrapped) in WAYS.items():
        if other != way:
            assert far(found, by_library(wrapped(denoiser, weak))) > 1, other
    text = load_png(tmp_path / "seed000001_class5.png")[1]
    assert text.get("guidance") == ("3.0" if options else None)
    assert text.get("guide sha256") == (read_info(trained).sha256 if way == "guide" else None)
    # The command in the text draws it again.
    again = tmp_path / "again"
    assert main([*shlex.split(text["command"])[1:], "--out", str(again)]) == 0
    assert far(load_png(again / "seed000001_class5.png")[0], found[1]) <= 1
    assert load_png(again / "seed000001_class5.png")[1] == text


def test_a_solver_of_two_outputs_is_given_both(model, tmp_path) -> None:
    assert main(draw(model, tmp_path, "--guidance", "3", sampler="euler_cfg_pp")) == 0
    denoiser = load_denoiser(model)[0]
    wanted = by_library(cfg(denoiser, 3.0, pair=True), "euler_cfg_pp")
    assert far(images(tmp_path), wanted) <= 1
    assert main(draw(model, tmp_path / "one", sampler="euler_cfg_pp")) == 0  # guidance 1


def test_perturbed_attention(tmp_path, write_config, capsys, trained) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("[false]", "[true]"))
    assert main(["train", "--config", str(config)]) == 0
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    options = ["--guidance", "4", "--guidance-method", "perturbed_attention"]
    assert main(draw(checkpoint, tmp_path / "out", *options)) == 0
    denoiser = load_denoiser(checkpoint)[0]
    assert far(images(tmp_path / "out"), by_library(perturbed_attention(denoiser, 4.0))) <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guide", "LESSER"], "--guide does nothing at --guidance 1, which is none"),
        (["--negative", "3"], "--negative does nothing at --guidance 1"),
        (["--guidance-options", "rescale=0.5"], "--guidance-options does nothing at --guidance 1"),
        (["--guidance-method", "apg"], "--guidance-method does nothing at --guidance 1"),
        (
            ["--guidance", "2", "--guidance-method", "apgg"],
            "unknown guidance method 'apgg'; did you mean 'apg'?",
        ),
        (
            ["--guidance", "2", "--guidance-options", "rescal=0.5"],
            "unknown option of cfg, 'rescal'; did you mean 'rescale'?",
        ),
        (
            ["--guidance", "2", "--guidance-method", "apg", "--guidance-options", "rescale=0.5"],
            "unknown option of apg, 'rescale'",
        ),
        (
            ["--guidance", "2", "--guidance-method", "autoguidance"],
            "autoguidance needs --guide, the checkpoint of a lesser model",
        ),
        (
            ["--guidance", "2", "--guidance-method", "cfg", "--guide", "LESSER"],
            "which only autoguidance takes: leave --guidance-method away",
        ),
        (
            ["--guidance", "2", "--guide", "LESSER", "--negative", "3"],
            "--negative is 3, but autoguidance tells the model the same twice",
        ),
        (["--guidance", "2", "--negative", "11"], "class 11 does not exist: there are 0 to 9"),
        (["--guidance", "nan"], "must be finite, got nan"),
        (
            ["--guidance", "2", "--guidance-options", "interval=[5,1]"],
            "interval = (5, 1) must be two numbers, 0 <= low < high",
        ),
        (
            ["--guidance", "2", "--guidance-options", "interval=5"],
            "interval must be two numbers, such as [0.3,5], got 5",
        ),
        (
            ["--guidance", "2", "--guidance-options", "rescale=1.5"],
            "rescale must lie in [0, 1], got 1.5",
        ),
        (["--strength", "0.5"], "--strength says how much of an image to keep: give it as --init"),
        (["--mask", "MASK"], "--mask says how much of an image to keep: give it as --init"),
        (["--init", "MASK"], "alone does not say how much of it to keep: give --strength"),
        (["--init", "MASK", "--strength", "1.5"], "--strength is 1.5; give a number from 0 to 1"),
        (["--init", "none.png", "--strength", "0.5"], "--init none.png is no image that can be"),
        (["--init", "TEXT", "--strength", "0.5"], "is no image that can be read"),
        (
            ["--init", "MASK", "--strength", "0.5", "--resample", "3"],
            "--resample fits what is drawn to what a mask keeps: give --mask",
        ),
        (["--resample", "0"], "--resample is 0; give a whole number of at least 1"),
        (["--steps", "atuo"], "--steps: 'atuo' is not a whole number"),
    ],
)
def test_what_cannot_be_is_refused(trained, tmp_path, capsys, options, said) -> None:
    save_png(tmp_path / "mask.png", torch.zeros(1, 8, 8))
    (tmp_path / "text.png").write_text("no image")
    named = {"LESSER": trained, "MASK": tmp_path / "mask.png", "TEXT": tmp_path / "text.png"}
    words = [str(named.get(word, word)) for word in options]
    assert main(draw(trained, tmp_path / "out", *words)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_know_nothing_needs_a_negative(
    tmp_path, write_config, capsys, trained
) -> None:
    config = write_config(tmp_path)
    argv = ["train", "--config", str(config), "--set", "condition_dropout=0"]
    assert main(argv) == 0
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    capsys.readouterr()
    assert main(draw(checkpoint, tmp_path / "out", "--guidance", "2")) == 2
    assert "trained with condition_dropout = 0 and always told: give --negative, or --guide" in (
        capsys.readouterr().err
    )
    for k, more in enumerate((["--negative", "4"], ["--guide", str(trained)])):
        assert main(draw(checkpoint, tmp_path / f"out{k}", "--guidance", "2", *more)) == 0


def test_a_model_that_is_told_nothing_needs_a_guide(tmp_path, write_config, capsys) -> None:
    argv = ["train", "--config", str(write_config(tmp_path)), "--set", "model.num_classes=0"]
    assert main(argv) == 0
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    capsys.readouterr()
    sample = ["sample", str(checkpoint), "--steps", "2", "-n", "1", "--guidance", "2"]
    assert main([*sample, "--out", str(tmp_path / "out")]) == 2
    assert "needs something that the model is told" in capsys.readouterr().err
    guided = [*sample, "--guide", str(checkpoint.parent), "--out", str(tmp_path / "out")]
    assert main(guided) == 0


@pytest.fixture
def picture(tmp_path) -> Path:
    """A photograph, larger than the model's images and in colour."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 4, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (32, 48), mode="bicubic")[0]
    save_png(tmp_path / "photo.png", (2 * pixels - 1).clamp(-1, 1))
    return tmp_path / "photo.png"


def fitted(path: Path) -> Tensor:
    """By Pillow alone: the middle of it in grey."""
    grey = Image.open(path).convert("L").resize((12, 8), Image.Resampling.BICUBIC)
    pixels = torch.tensor(list(grey.crop((2, 0, 10, 8)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, 1, 8, 8)


def test_from_an_image(trained, tmp_path, picture) -> None:
    init = fitted(picture)
    denoiser = load_denoiser(trained)[0]
    for strength in (0.0, 0.6):
        out = tmp_path / str(strength)
        more = ["--init", str(picture), "--strength", str(strength), "--steps", "10"]
        assert main(draw(trained, out, *more)) == 0
        wanted = by_library(denoiser, steps=10, init=to_float(init), strength=strength)
        assert far(images(out), wanted) <= 1
        # At strength 0 it is the image itself.
        assert (far(images(out), init) == 0) == (strength == 0)
    text = load_png(tmp_path / "0.6/grid.png")[1]
    assert (text["init"], text["strength"]) == (str(picture), "0.6")
    assert len(text["init sha256"]) == 64


def test_what_a_mask_keeps_stays(trained, tmp_path, picture) -> None:
    mask = torch.full((1, 32, 48), -1.0)
    mask[:, 16:] = 1  # the lower half is white
    save_png(tmp_path / "mask.png", mask)
    more = ["--init", str(picture), "--mask", str(tmp_path / "mask.png")]
    assert main(draw(trained, tmp_path / "out", *more)) == 0
    found, init = images(tmp_path / "out"), fitted(picture)
    assert far(found[:, :, :3], init[:, :, :3]) == 0  # the edge itself is blurred by the scaling
    assert far(found[:, :, 5:], init[:, :, 5:]) > 10
    assert main(draw(trained, tmp_path / "again", *more, "--resample", "3")) == 0
    again = images(tmp_path / "again")
    assert far(again[:, :, :3], init[:, :, :3]) == 0
    assert far(again, found) > 1
    assert load_png(tmp_path / "again/grid.png")[1]["resample"] == "3"
    # Another image is another set.
    save_png(tmp_path / "mask.png", -mask)
    assert main(draw(trained, tmp_path / "out", *more)) == 2


def test_as_many_steps_as_it_takes(model, tmp_path) -> None:
    assert main(draw(model, tmp_path, "--steps", "auto")) == 0
    denoiser = load_denoiser(model)[0]
    assert far(images(tmp_path), by_library(denoiser, steps="auto")) <= 1
    assert load_png(tmp_path / "grid.png")[1]["steps"] == "auto"


def test_advice_is_one_line_and_the_images_are_drawn(trained, tmp_path, capsys) -> None:
    assert main(draw(trained, tmp_path, "--guidance", "30", "--steps", "1")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": warning: ")[0] for line in lines] == ["k-diffusion sample"] * 2
    assert "1 step is too few for heun" in lines[0]
    assert "guidance of scale 30 saturates" in lines[1]
    assert main(draw(trained, tmp_path / "well", "--guidance", "3")) == 0
    assert capsys.readouterr().err == ""


def test_a_warning_is_one_line_of_the_first_process(monkeypatch, capsys) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with plain_warnings("k-diffusion sample"):
            for _ in range(2):
                warnings.warn("two\nlines", SamplingAdvice, stacklevel=1)
        said = "k-diffusion sample: warning: two lines\n" if rank == 0 else ""
        assert capsys.readouterr().err == said
    with pytest.warns(SamplingAdvice, match="elsewhere"):
        warnings.warn("elsewhere", SamplingAdvice, stacklevel=1)
    assert not capsys.readouterr().err


def test_each_process_takes_a_gpu_of_its_own(monkeypatch) -> None:
    from k_diffusion.cli import drawing

    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: taken.append(str(device)))
    for local in ("0", "1", "2", None):
        if local is None:
            monkeypatch.delenv("LOCAL_RANK")
        else:
            monkeypatch.setenv("LOCAL_RANK", local)
        drawing.pick_device("")
    drawing.pick_device("cpu")
    assert taken == ["cuda:0", "cuda:1", "cuda:0", "cuda", "cpu"]
