"""What networks are told, and what a pipeline cannot take: each by its number or its name."""

from __future__ import annotations

import diffusers
import pytest
import torch

from k_diffusion.external import PipelineSampler, load
from k_diffusion.external.settle import own_solver
from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny
from tests.external.test_pipelines import _changed

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
PROMPT = "a red fox"
SMALL = {"height": 16, "width": 16}


def test_the_sizes_that_sdxl_is_told():
    sampler = PipelineSampler(tiny.tiny_sdxl())
    told = sampler.encode(
        PROMPT,
        guidance=5.0,
        height=16,
        width=24,
        original_size=(32, 48),
        crops_coords_top_left=(1, 2),
        negative_original_size=(8, 9),
        negative_crops_coords_top_left=(3, 4),
        negative_target_size=(5, 6),
    )
    assert told.condition["time_ids"].tolist() == [[32, 48, 1, 2, 16, 24]]
    assert told.negative["time_ids"].tolist() == [[8, 9, 3, 4, 5, 6]]


def test_the_scores_that_a_refiner_is_told():
    base = tiny.tiny_sdxl()
    config = _changed(base.unet, projection_class_embeddings_input_dim=5 * 8 + 16)
    parts = {**base.components, "unet": diffusers.UNet2DConditionModel.from_config(config).eval()}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    )
    told = PipelineSampler(pipeline).encode(PROMPT, guidance=5.0, **SMALL)
    assert told.condition["time_ids"].tolist() == [[16, 16, 0, 0, 6]]
    assert told.negative["time_ids"].tolist() == [[16, 16, 0, 0, 2.5]]
    told = PipelineSampler(pipeline).encode(PROMPT, guidance=5.0, aesthetic_score=7.5, **SMALL)
    assert told.condition["time_ids"][0, 4] == 7.5
    wrong = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.raises(ValueError, match="takes 56 numbers of sizes and pooled text, but is told"):
        PipelineSampler(wrong).encode(PROMPT, **SMALL)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("boundary_ratio", 0.9, "two transformers"), ("expand_timesteps", True, "for each token")],
)
def test_videos_of_another_make_are_refused(key, value, words):
    pipeline = tiny.tiny_video()
    pipeline.register_to_config(**{key: value})
    with pytest.raises(ValueError, match=words):
        PipelineSampler(pipeline).encode(PROMPT, max_sequence_length=12)


def test_frames_and_sizes_that_do_not_fit():
    video = PipelineSampler(tiny.tiny_video())
    with pytest.raises(ValueError, match="frames must be 1 more than a multiple of 4, got 6"):
        video.sample(PROMPT, frames=6, max_sequence_length=12, **SMALL)
    with pytest.raises(ValueError, match="this DiT draws 16 x 16 alone"):
        PipelineSampler(tiny.tiny_dit()).sample(labels=[1], height=32, width=32)
    with pytest.raises(ValueError, match="label 1000 is none of the classes 0 to 999"):
        PipelineSampler(tiny.tiny_dit()).sample(labels=[1000])
    with pytest.raises(ValueError, match="height 18 is not a multiple of 4"):
        PipelineSampler(tiny.tiny_flux()).sample(PROMPT, height=18, width=16)
    sampler = PipelineSampler(tiny.tiny_sd())
    with pytest.raises(ValueError, match="height 17 is not a multiple"):
        sampler.encode_images(torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match="mask has size .*8, 8.* and init .*16, 16"):
        sampler.sample(PROMPT, init=torch.zeros(1, 3, 16, 16), mask=torch.zeros(8, 8), **SMALL)


def test_a_network_of_channels_that_are_not_understood():
    pipeline = tiny.tiny_sd(kind="Inpaint")
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(
        _changed(pipeline.unet, in_channels=7)
    ).eval()
    given = {"init": torch.zeros(1, 3, 16, 16), "mask": torch.ones(16, 16)}
    with pytest.raises(ValueError, match="this UNet takes 7 channels for 4 of latents"):
        PipelineSampler(pipeline).sample(PROMPT, **given)


def test_the_latents_of_videos_have_a_mean_and_a_deviation():
    pipeline = tiny.tiny_video()
    config = pipeline.vae.config
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(config[f"latents_{n}"]).reshape(shape) for n in ("mean", "std"))
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = pipeline.vae.decode(latents * std + mean).sample
    assert (PipelineSampler(pipeline).decode(latents) - known).abs().max() < 1e-5
    # Their noise is drawn in float32, whatever the network computes in.
    pipeline.transformer.to(torch.bfloat16)
    drawn = PipelineSampler(pipeline).latents([4], frames=5, **SMALL)
    known = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, known)


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32():
    pipeline = tiny.tiny_sd()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.half()
    seen = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    PipelineSampler(pipeline).decode(torch.zeros(1, 4, 8, 8))
    assert seen == [torch.float32]
    assert pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [
        (lambda: diffusers.DPMSolverMultistepScheduler(), "dpmpp_2m"),
        (lambda: diffusers.DPMSolverMultistepScheduler(solver_order=1), "ddim"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            "dpmpp_2m_sde",
        ),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", solver_order=3
            ),
            "dpmpp_3m_sde",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            "lcm",
        ),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "euler"),
        (lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3), "dpmpp_3m"),
        (lambda: diffusers.DPMSolverMultistepScheduler(solver_type="heun"), "dpmpp_2m_heun"),
        (lambda: diffusers.UniPCMultistepScheduler(solver_type="bh1"), "unipc_bh1"),
        (lambda: diffusers.UniPCMultistepScheduler(predict_x0=False), "unipc_noise"),
        (lambda: diffusers.EulerAncestralDiscreteScheduler(), "euler_ancestral"),
    ],
)
def test_the_solver_that_a_config_stands_for(scheduler, solver):
    assert own_solver(scheduler())[0] == solver


def test_a_negative_is_checked_as_the_condition_is():
    sampler = KSampler.from_pipeline(tiny.tiny_sd())
    run = sampler.ksampler((4, 8, 8), guidance=3.0)
    text = torch.zeros(2, 4, 16)
    told = {"encoder_hidden_states": text, "negative_encoder_hidden_states": text[:1]}
    with pytest.raises(ValueError, match="encoder_hidden_states has shape .1, 4, 16.*batch is 2"):
        run.sample(torch.randn(2, 4, 8, 8), 2, told)


def test_of_the_hub_only_safetensors_of_known_classes_are_asked(monkeypatch):
    asked = {}

    def index(source, **options):
        return found

    def whole(source, **options):
        asked.update(options)
        raise OSError("not here")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", index)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", whole)
    found = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]}
    with pytest.raises(ValueError, match="cannot be loaded .not here"):
        load("owner/name")
    assert asked["use_safetensors"] is True
    assert not asked.get("trust_remote_code")
    asked.clear()
    found = {**found, "unet": ["owner_code", "UNet"]}
    with pytest.raises(ValueError, match="takes unet from 'owner_code'"):
        load("owner/name")
    found = {"_class_name": ["pipeline", "Mine"]}
    with pytest.raises(ValueError, match="code of its own"):
        load("owner/name")
    assert not asked


def test_a_network_whose_config_has_an_unknown_key_is_refused():
    pipeline = tiny.tiny_sd()
    pipeline.unet.register_to_config(mid_block_atention="none")
    with pytest.raises(ValueError, match="unknown key in the config of UNet2DCondit.*mid_block_at"):
        PipelineSampler(pipeline)
    pipeline = tiny.tiny_sd()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler()
    pipeline.scheduler.register_to_config(snr_shift_scale=2.0)
    with pytest.raises(ValueError, match="snr_shift_scale"):
        PipelineSampler(pipeline)
