"""Batches, low precision and two networks, by whole pipelines."""

from __future__ import annotations

import pytest
import torch

from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny
from tests.external.test_pipelines import KINDS, PROMPT, SMALL, _far

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@pytest.mark.parametrize("kind", ["sd1-ddim", "sdxl-euler", "sd3", "flux", "audio-euler", "video"])
@pytest.mark.parametrize("solver", [None, "dpmpp_2m_sde"])
def test_a_batch_is_its_single_runs(kind, solver):
    make, _, _, asked = KINDS[kind]
    sampler = KSampler.from_pipeline(make(), None, solver)
    asked = {**asked, "steps": 4, "guidance": 5.0, "to": "latent"}
    batch = sampler.sample([PROMPT, "blue cat"], n=2, seeds=[5, 2, 9, 2], **asked)
    for row, (prompt, seed) in enumerate(
        ((PROMPT, 5), (PROMPT, 2), ("blue cat", 9), ("blue cat", 2))
    ):
        alone = sampler.sample(prompt, seeds=[seed], **asked)
        assert _far(batch[row : row + 1], alone) < 1e-4
    assert _far(batch[1:2], batch[3:]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_with_its_state_in_float32(dtype):
    pipeline = tiny.tiny_sd()
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.to(dtype)
    sampler = KSampler.from_pipeline(pipeline)
    seen = []

    def watch(k, x, sigma, denoised):
        seen.append(x.dtype)

    batch = sampler.sample(
        PROMPT, steps=4, seeds=[1, 2], to="latent", run={"callback": watch}, **SMALL
    )
    assert set(seen) == {batch.dtype} == {torch.float32}
    alone = sampler.sample(PROMPT, steps=4, seeds=[2], to="latent", **SMALL)
    assert _far(batch[1:], alone) < 1e-4
    # The noise is what the pipeline draws in its dtype, and the result that of float32 nearly.
    drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)
    assert torch.equal(sampler.latents([2], **SMALL), drawn.float())
    wide = KSampler.from_pipeline(tiny.tiny_sd())
    same = wide.sample(PROMPT, steps=4, latents=drawn.float(), to="latent", **SMALL)
    assert _far(alone, same) < 0.1


def test_base_and_refiner_are_switched_at_a_level():
    base, refiner = tiny.tiny_sdxl(), tiny.tiny_sdxl()
    with torch.no_grad():
        for weight in refiner.unet.parameters():
            weight.mul_(0.9)
    one, two = KSampler.from_pipeline(base), KSampler.from_pipeline(refiner)
    asked = {"steps": 6, "guidance": 4.0, "to": "latent", **SMALL}

    def draw(seeds, ratio):
        return one.sample(PROMPT, seeds=seeds, refiner=two, refine_at=ratio, **asked)

    assert torch.equal(draw([1], 1e-6), one.sample(PROMPT, seeds=[1], **asked))
    assert _far(draw([1], 1e6), two.sample(PROMPT, seeds=[1], **asked)) < 1e-6
    both = draw([1, 2], 1.0)
    assert _far(both[1:], draw([2], 1.0)) < 1e-4
    assert _far(both[:1], draw([1], 1e6)) > 1e-4
    assert _far(both[:1], draw([1], 1e-6)) > 1e-4


def test_steps_for_each_sample_take_its_own_negative():
    sampler = KSampler.from_pipeline(tiny.tiny_sd(), None, "dpm_adaptive")
    asked = {"guidance": 5.0, "to": "latent", **SMALL}
    both = sampler.sample([PROMPT, "cat"], ["green", "moon"], seeds=[1, 2], **asked)
    for row, (prompt, negative) in enumerate(((PROMPT, "green"), ("cat", "moon"))):
        alone = sampler.sample(prompt, negative, seeds=[row + 1], **asked)
        assert _far(both[row : row + 1], alone) < 1e-3


def test_guidance_by_a_solver_of_two_outputs():
    sampler = KSampler.from_pipeline(tiny.tiny_sd(), "karras", "euler_cfg_pp")
    assert torch.isfinite(sampler.sample(PROMPT, steps=3, seed=1, to="latent", **SMALL)).all()


@pytest.mark.parametrize("way", ["offloaded", "stored in 8 bits"])
def test_a_network_whose_weights_are_elsewhere_or_stored_otherwise(way):
    import accelerate

    pipeline = tiny.tiny_sd()
    sampler = KSampler.from_pipeline(pipeline)
    asked = {"steps": 3, "seeds": [1, 2], "to": "latent", **SMALL}
    plain = sampler.sample(PROMPT, **asked)
    if way == "offloaded":
        accelerate.cpu_offload(pipeline.unet, execution_device="cpu")
        assert next(pipeline.unet.parameters()).device.type == "meta"
        assert torch.equal(sampler.sample(PROMPT, **asked), plain)
    else:
        pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert _far(sampler.sample(PROMPT, **asked), plain) < 0.5
    # Moved by its own means, afterwards.
    sampler = KSampler.from_pipeline(tiny.tiny_sd())
    sampler.pipeline.unet.to(torch.bfloat16)
    assert sampler.sample(PROMPT, **asked).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_guidance_up_to_1_is_none_as_in_pipelines(scale):
    pipeline = tiny.tiny_sd()
    expected = pipeline(
        PROMPT, num_inference_steps=3, guidance_scale=scale, output_type="latent",
        generator=torch.Generator().manual_seed(1), **SMALL,
    ).images  # fmt: skip
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *given: calls.append(len(given[1][0])))
    sampler = KSampler.from_pipeline(pipeline)
    drawn = sampler.sample(PROMPT, steps=3, guidance=scale, seeds=[1], to="latent", **SMALL)
    assert _far(drawn, expected) < 1e-4
    assert calls == [1, 1, 1]


def test_a_refiner_hears_its_own_options():
    base = KSampler.from_pipeline(tiny.tiny_sdxl())
    refiner = KSampler.from_pipeline(tiny.tiny_sdxl())
    asked = {"steps": 4, "seeds": [1], "to": "latent", **SMALL}

    def draw(**told):
        return base.sample(PROMPT, refiner=refiner, refine_at=3.0, refiner_options=told, **asked)

    plain = draw()
    assert torch.equal(plain, draw(original_size=(16, 16)))
    assert _far(draw(original_size=(64, 8)), plain) > 1e-4
    told = refiner.encode("blue cat").condition
    embeds = {
        "prompt_embeds": told["encoder_hidden_states"],
        "pooled_prompt_embeds": told["text_embeds"],
    }
    against = refiner.encode("blue cat", "").negative
    embeds["negative_prompt_embeds"] = against["encoder_hidden_states"]
    embeds["negative_pooled_prompt_embeds"] = against["text_embeds"]
    assert torch.equal(draw(**embeds), draw(prompt="blue cat", negative=""))
    with pytest.raises(ValueError, match="refine_at and refiner_options are of a refiner"):
        base.sample(PROMPT, refine_at=3.0, **asked)
