"""What importing the package brings in, and what its public face offers."""

import importlib.metadata
import subprocess
import sys

import pytest

import k_diffusion

HEAVY = {
    "accelerate", "diffusers", "matplotlib", "PIL", "pandas", "pydantic", "scipy", "sklearn",
    "safetensors", "torchsde", "tqdm", "transformers", "tyro", "torchvision", "wandb",
}  # fmt: skip


ROOMS = ["external", "utils", "denoiser", "sampling", "models", "layers", "config"]
STEPS = {
    "k_diffusion": "import k_diffusion",
    **{room: f"import k_diffusion.{room}" for room in ROOMS},
    # What they need for their work (Pillow, safetensors) they import when they are called.
    # PlanScheduler is a class of diffusers' own kind, so that it brings that in.
    "established names": (
        "from k_diffusion import external, utils\n"
        "names = {external: {*external.__all__} - {'PlanScheduler'}, utils: utils.__all__}\n"
        "[getattr(room, name) for room, known in names.items() for name in known]"
    ),
    "a run": (
        "from k_diffusion.sampling import KSampler\n"
        "KSampler(lambda x, s: x / 2, 'karras').sample(torch.randn(1, 2), 3)"
    ),
}


def fresh(code):
    """What a fresh interpreter prints that runs the code after `import torch`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, torch\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def brought():
    """Step -> top-level names that it adds to sys.modules, after the steps before it.

    One interpreter for all, since importing torch takes seconds.
    """
    told = "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}), sep=',')"
    code = "\n".join(f"before = set(sys.modules)\n{step}\n{told}" for step in STEPS.values())
    lines = [set(line.split(",")) - {""} for line in fresh(code).splitlines()]
    return dict(zip(STEPS, lines, strict=True))


@pytest.mark.parametrize("step", ["k_diffusion", "external"])
def test_the_package_itself_brings_in_torch_alone(brought, step):
    # Beyond torch's own lazy parts only the package itself.
    assert brought[step] == {"k_diffusion"}


@pytest.mark.parametrize("step", STEPS)
def test_the_core_is_light(brought, step):
    assert not brought[step] & HEAVY


def test_established_modules_by_their_established_imports():
    code = (
        "import k_diffusion as K, k_diffusion.utils as utils\n"
        "from k_diffusion import config, external, layers, sampling\n"
        "assert K.utils is utils and K.external is external and K.sampling is sampling\n"
        "assert K.config is config and K.layers is layers and K.Denoiser is layers.Denoiser\n"
        "assert K.utils.append_dims(torch.ones(2), 3).shape == (2, 1, 1)\n"
        "K.evaluation, K.models, K.augmentation"
    )
    fresh(code)


def test_distribution():
    assert importlib.metadata.version("k-diffusion") == k_diffusion.__version__ == "0.3.0.dev0"


def test_rooms_load_when_asked_for():
    assert k_diffusion.sampling.KSampler.__name__ == "KSampler"
    assert k_diffusion.models.UNet.__name__ == "UNet"
    assert "sampling" in dir(k_diffusion)
    with pytest.raises(AttributeError, match="no attribute 'smapling'"):
        _ = k_diffusion.smapling
