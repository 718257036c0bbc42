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
