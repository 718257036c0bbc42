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


def modules_after(code):
    """Top-level names in sys.modules that the code adds to those of `import torch`."""
    script = f"import sys, torch\nbefore = set(sys.modules)\n{code}\n" + (
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_brings_in_torch_alone():
    # Beyond torch's own lazy parts only the package itself.
    assert modules_after("import k_diffusion") == {"k_diffusion"}


@pytest.mark.parametrize(
    "room", ["sampling", "models", "denoiser", "utils", "external", "layers", "config"]
)
def test_the_core_is_light(room):
    brought = modules_after(f"import k_diffusion.{room}")
    assert "k_diffusion" in brought
    assert not brought & HEAVY


def test_established_names_are_light():
    """What they need for their work (Pillow, safetensors) they import when they are called."""
    code = (
        "from k_diffusion import external, utils\n"
        "[getattr(room, name) for room in (external, utils) for name in room.__all__]"
    )
    assert not modules_after(code) & HEAVY
    assert modules_after("import k_diffusion.external") == {"k_diffusion"}


def test_established_modules_by_their_established_imports():
    code = (
        "import k_diffusion as K, k_diffusion.utils as utils\n"
        "from k_diffusion import config, external, layers, sampling\n"
        "assert K.utils is utils and K.external is external and K.sampling is sampling\n"
        "assert K.config is config and K.layers is layers and K.Denoiser is layers.Denoiser\n"
        "assert K.utils.append_dims(torch.ones(2), 3).shape == (2, 1, 1)\n"
        "K.evaluation, K.models"
    )
    assert "k_diffusion" in modules_after(code)
    for name in ("augmentation", "gns"):
        with pytest.raises(AttributeError, match=f"k_diffusion.{name} is not there yet: it comes"):
            getattr(k_diffusion, name)


def test_sampling_needs_nothing_heavy_to_run():
    code = (
        "from k_diffusion.sampling import KSampler\n"
        "KSampler(lambda x, s: x / 2, 'karras').sample(torch.randn(1, 2), 3)"
    )
    assert not modules_after(code) & HEAVY


def test_distribution():
    assert importlib.metadata.version("k-diffusion") == k_diffusion.__version__ == "0.3.0.dev0"


def test_rooms_load_when_asked_for():
    assert k_diffusion.sampling.KSampler.__name__ == "KSampler"
    assert k_diffusion.models.UNet.__name__ == "UNet"
    assert "sampling" in dir(k_diffusion)
    with pytest.raises(AttributeError, match="gns is not there yet"):
        _ = k_diffusion.gns
    with pytest.raises(AttributeError, match="no attribute 'smapling'"):
        _ = k_diffusion.smapling
