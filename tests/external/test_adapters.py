"""LoRA that is loaded in the pipeline counts, in its network and in its text encoder."""

from __future__ import annotations

import pytest
import torch

from k_diffusion.external import PlanScheduler
from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny

peft = pytest.importorskip("peft")
# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SMALL = {"height": 16, "width": 16}


def _add(module, seed, names):
    module.add_adapter(peft.LoraConfig(r=2, target_modules=names))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B" in name:  # zeros when it is made
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def _theirs(pipe, **asked):
    return pipe(
        "a red fox", num_inference_steps=5, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3), output_type="latent", **SMALL, **asked,
    ).images  # fmt: skip


def _ours(pipe, **options):
    asked = {"steps": 5, "guidance": 3.0, "seeds": [3], "to": "latent", **SMALL, **options}
    return KSampler.from_pipeline(pipe).sample("a red fox", **asked)


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_adapter_in_the_pipeline(part):
    pipe = tiny.tiny_sd()
    plain = _theirs(pipe)
    names = ["to_q", "to_v"] if part == "unet" else ["q_proj", "v_proj"]
    _add(getattr(pipe, part), 5, names)
    with_it = _theirs(pipe)
    assert far(with_it, plain) > 1e-3
    assert far(_ours(pipe), with_it) < 1e-4
    scale = {"cross_attention_kwargs": {"scale": 0.3}}
    less = _theirs(pipe, **scale)
    assert far(less, with_it) > 1e-4
    assert far(_ours(pipe, **scale), less) < 1e-4
    own = pipe.scheduler
    pipe.scheduler = PlanScheduler.from_config(own, solver="ddim")
    assert far(_theirs(pipe), with_it) < 1e-4
    pipe.scheduler = own
    getattr(pipe, part).disable_adapters()
    assert far(_ours(pipe), plain) < 1e-4


def test_a_file_of_an_adapter_that_the_pipeline_loads(tmp_path):
    source = tiny.tiny_sd()
    _add(source.unet, 5, ["to_q", "to_v"])
    layers = peft.get_peft_model_state_dict(source.unet)
    source.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = tiny.tiny_sd()
    plain = _theirs(pipe)
    pipe.load_lora_weights(tmp_path, local_files_only=True)
    with_it = _theirs(pipe)
    assert far(with_it, plain) > 1e-3
    assert far(_ours(pipe), with_it) < 1e-4
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)  # its scale
    half = _theirs(pipe)
    assert far(half, with_it) > 1e-4
    assert far(_ours(pipe), half) < 1e-4
