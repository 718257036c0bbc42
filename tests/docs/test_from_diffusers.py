"""docs/from-diffusers.md, docs/from-comfyui.md and examples/pipeline.py do what they say.

The pages' code names models of the hub. Where it runs, folders of those names hold tiny ones, and
every socket fails.
"""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion.external import GeneratorNoise
from k_diffusion.external.families import FAMILIES
from k_diffusion.external.names import foreign_name
from k_diffusion.external.networks import _CALLS
from k_diffusion.sampling import ADAPTIVE, SOLVERS, KSampler, Run, make_plan
from k_diffusion.utils.images import load_png
from k_diffusion.utils.levels import VP
from k_diffusion.utils.scheduler import CustomScheduler, make_scheduler
from tests.external import tiny_pipelines as tiny

ROOT = Path(__file__).parents[2]
DIFFUSERS = ROOT / "docs" / "from-diffusers.md"
K_DIFFUSION = ROOT / "docs" / "from-k-diffusion.md"
COMFYUI = ROOT / "docs" / "from-comfyui.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """All that the page's code has named at its end."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks_of(page.read_text("utf-8")), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


def load(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refiner() -> Any:
    """SDXL's: the second text encoder alone, and a score in the place of the size."""
    base = tiny.tiny_sdxl()
    config = {k: v for k, v in base.unet.config.items() if not k.startswith("_")}
    config |= {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 8 + 16}
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    parts["unet"] = diffusers.UNet2DConditionModel.from_config(config).eval()
    parts = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )


def inpainting() -> Any:
    pipe = tiny.tiny_sd(kind="Inpaint")
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**config, "in_channels": 9}).eval()
    return pipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the models that the pages name, and of the pictures."""
    root = tmp_path_factory.mktemp("hub")
    for name, made in {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.tiny_sd(),
        "stable-diffusion-v1-5/stable-diffusion-inpainting": inpainting(),
        "stabilityai/stable-diffusion-xl-base-1.0": tiny.tiny_sdxl(),
        "stabilityai/stable-diffusion-xl-refiner-1.0": refiner(),
        "stabilityai/stable-diffusion-3-medium-diffusers": tiny.tiny_sd3(),
    }.items():
        made.save_pretrained(root / name)
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(root / "photo.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(root / "mask.png")
    return root


@pytest.fixture
def offline(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(models)
    return models


def test_the_code_for_those_who_use_diffusers(offline: Path) -> None:
    names = run(DIFFUSERS)
    assert len(names["again"]) == 2
    assert names["outside"].shape == (2, 4, 8, 8)
    assert names["apart"] < 1e-5
    assert names["fox"].scheduler.config.solver == "heun"
    assert names["pipe"].scheduler.config.solver == "dpmpp_3m_sde"
    assert names["images"].isfinite().all()
    assert names["image"].size == (16, 16)
    for name in ("varied", "painted", "filled", "plain", "fine"):
        assert [image.size for image in names[name]] == [(16, 16)], name
    assert names["fine"][0].tobytes() != names["plain"][0].tobytes()


def test_the_code_for_those_who_use_comfyui(offline: Path) -> None:
    names = run(COMFYUI)
    assert names["named"][:2] == ("dpmpp_2m_sde", "karras")
    assert names["solver"] == "unipc"
    assert names["noise"].shape == (2, 4, 8, 8)
    assert names["pictures"].shape == (1, 3, 16, 16)
    assert names["pictures"].isfinite().all()
    assert names["sampler"].solver.name == "dpm_2"
    assert len(names["as_there"].levels(20)) == 21
    assert [image.size for image in names["images"]] == [(16, 16)]


class LatentDiffusion(torch.nn.Module):
    """A UNet of diffusers in the place of CompVis' model."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.unet = pipe.unet
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, cond).sample


@torch.no_grad()
def test_the_code_for_those_who_wrap_networks() -> None:
    pipe = tiny.tiny_sd()
    text, empty = pipe.encode_prompt("a red fox", "cpu", 1, True, "")
    names = {"torch": torch, "K": K, "latent_diffusion": LatentDiffusion(pipe)}
    names |= {"text": text, "empty": empty, "unet": pipe.unet, "scheduler": pipe.scheduler}
    part = K_DIFFUSION.read_text("utf-8").partition("## Networks from elsewhere")[2]
    small = part.partition("\n## ")[0].replace("64, 64", "8, 8")  # for speed
    guided, plain, new = blocks_of(small)
    exec(compile(guided, "from-k-diffusion.md, guided", "exec"), names)
    x, sigmas = names["x"], names["sigmas"]
    guided_latents = names["latents"]
    exec(compile(plain, "from-k-diffusion.md, plain", "exec"), names)
    exec(compile(new, "from-k-diffusion.md, new", "exec"), names)
    assert names["samples"].isfinite().all()
    assert names["drawn"].shape == (1, 4, 8, 8)
    # The ways agree: the old loops' levels, through the new Denoisers.
    levels = CustomScheduler(sigmas=sigmas.tolist())
    latents = K.sampling.sample_dpmpp_2m(names["wrapped"], x, sigmas, names["told"])
    for model, told, known in (
        (names["guided"], {"cond": text}, guided_latents),
        (names["same"].denoiser, names["told"], latents),
    ):
        sampler = KSampler(model, levels, "dpmpp_2m")
        first = sampler.levels(20)[0]
        drawn = sampler.sample(x * first.alpha / first.sigma, 20, told)
        assert (drawn - known).abs().max() < 1e-5 * known.abs().max()


def test_the_solvers_for_which_coordinates_matter() -> None:
    text = DIFFUSERS.read_text("utf-8").partition("It does for those")[2].partition("They")[0]
    x, seen = torch.randn(1, 8, dtype=torch.float64, generator=torch.manual_seed(0)), set()
    exploding = make_scheduler("karras", sigma_min=0.03, sigma_max=14.6).levels(20)
    preserving = exploding.on(VP)
    start = preserving[0]
    for name, solver in SOLVERS.items():
        if solver.outputs != 1:
            continue
        results = []
        for levels, first in ((exploding, x * 14.6), (preserving, x * 14.6 * start.alpha)):
            plan = make_plan(name, levels)
            noise = GeneratorNoise(torch.Generator().manual_seed(1), x)
            run = Run(plan, first, noise, torch.float64)
            while not run.done:
                alpha, sigma = levels.path.alpha(run.sigma), run.sigma  # of data of deviation 0.5
                run.advance(alpha * 0.25 * run.x / (alpha**2 * 0.25 + sigma**2))
            results.append(run.result)
        apart = (results[0] - results[1]).abs().max() / results[0].abs().max()
        assert apart < 1e-9 or apart > 1e-8, name
        seen |= {name} if apart > 1e-8 else set()
    assert seen == set(re.findall(r"`(\w+)`", text))


def test_the_pages_name_every_pipeline_and_network() -> None:
    text = DIFFUSERS.read_text(encoding="utf-8")
    part = text.partition("### Which pipelines")[2].partition("\nEach does")[0]
    assert set(re.findall(r"`(\w+Pipeline)`", part)) == set(FAMILIES)
    part = text.partition("makes a Denoiser of")[2].partition("The condition's")[0]
    assert {*re.findall(r"`(\w+Model)`", part), "UNet1DModel"} == set(_CALLS)


@pytest.mark.parametrize("page", [DIFFUSERS, COMFYUI, K_DIFFUSION])
def test_what_the_pages_link_to_is_there(page: Path) -> None:
    for file, part in re.findall(r"\]\(([\w-]+\.md)(?:#([\w-]+))?\)", page.read_text("utf-8")):
        text = (page.parent / file).read_text("utf-8")
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        known = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        assert not part or part in known, f"{file}#{part}"


def test_the_page_of_solvers_that_run_inside_is_of_the_registry() -> None:
    made = load("make_plan_scheduler", ROOT / "docs" / "make_plan_scheduler.py")
    text = made.OUT.read_text(encoding="utf-8")
    assert made.page(made.documented()) == text
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {*SOLVERS, *ADAPTIVE}
    inside = {name: float(apart) for name, apart in made.documented().items()}
    assert set(inside) == {name for name, solver in SOLVERS.items() if solver.outputs == 1}
    assert max(inside.values()) < 1e-5
    assert made.begins(made.visit("restart")) < made.STEPS == made.begins(made.visit("heun"))


def test_the_example(tmp_path: Path) -> None:
    example = load("pipeline", ROOT / "examples" / "pipeline.py")
    assert example.main("", "a red fox", 3, str(tmp_path)) < 1e-5
    one, other = (load_png(tmp_path / f"{name}.png")[0] for name in ("sampler", "pipeline"))
    assert (one.float() - other.float()).abs().max() <= 1
    assert one.float().std() > 1
    # The folder that it left is a model like any other.
    assert example.main(str(tmp_path / "model"), "the moon", 2, str(tmp_path)) < 1e-5


def test_names_that_are_said_to_be_missing_are() -> None:
    text = COMFYUI.read_text(encoding="utf-8").partition("**None here**")[2].partition(";")[0]
    missing = re.findall(r"`(\w+)`", text)
    assert len(missing) == 6
    for name in missing:
        with pytest.raises(ValueError, match="unknown foreign sampler"):
            foreign_name(name)
