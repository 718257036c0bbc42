"""Pipelines that begin from images, or paint into them; decoding where memory is short."""

from __future__ import annotations

import diffusers
import pytest
import torch
from PIL import Image

from k_diffusion.external import PipelineSampler
from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny
from tests.external.test_pipelines import _changed

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
PROMPT = "a red fox"


def _picture(seed=0, size=16):
    pixels = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).to(torch.uint8).numpy())


def _mask():
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    return mask


def test_image_to_image_as_the_pipeline_does_it():
    # Its VAE's answers are drawn; with a deviation of almost nothing they are the mean.
    pipeline = tiny.tiny_sd(kind="Img2Img")
    with torch.no_grad():
        convolution = pipeline.vae.quant_conv
        convolution.weight[4:] = 0
        convolution.bias[4:] = -60
    sampler = PipelineSampler(pipeline)
    init = _picture()
    expected = pipeline(
        PROMPT,
        image=init,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 8, 8, generator=generator)  # of the VAE's
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    drawn = sampler.sample(
        PROMPT, init=init, strength=0.6, steps=10, guidance=5.0, latents=noise, to="latent"
    )
    # "leading" timesteps: the clean end of ours is data, theirs the process's first level.
    assert (drawn - expected).abs().max() / expected.abs().max() < 1e-3
    assert (sampler.sample(PROMPT, init=init, strength=0.0, to="latent", seed=1)
            - sampler.encode_images(init)).abs().max() == 0  # fmt: skip


def test_what_a_mask_keeps_is_kept():
    sampler = KSampler.from_pipeline(tiny.tiny_sd())
    init = _picture()
    kept = sampler.encode_images(init)
    white = Image.fromarray((_mask() * 255).to(torch.uint8).numpy())
    for mask in (_mask(), white):
        drawn = sampler.sample(PROMPT, init=init, mask=mask, steps=4, seed=1, to="latent")
        assert (drawn - kept)[..., 4:, :].abs().max() == 0
        assert (drawn - kept)[..., :4, :].abs().max() > 1


def _inpainting():
    torch.manual_seed(0)
    pipeline = tiny.tiny_sd(kind="Inpaint")
    config = _changed(pipeline.unet, in_channels=9)
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    with torch.no_grad():
        pipeline.vae.quant_conv.weight[4:] = 0
        pipeline.vae.quant_conv.bias[4:] = -60
    return pipeline


def test_a_network_for_inpainting_is_told_the_mask():
    pipeline = _inpainting()
    expected = pipeline(
        PROMPT,
        image=_picture(),
        mask_image=Image.fromarray((_mask() * 255).to(torch.uint8).numpy()),
        height=16,
        width=16,
        strength=1.0,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    drawn = PipelineSampler(pipeline).sample(
        PROMPT, init=_picture(), mask=_mask(), steps=5, guidance=5.0, seed=3, to="latent"
    )
    assert (drawn - expected).abs().max() / expected.abs().max() < 1e-4
    for asked, word in (({}, "needs init"), ({"init": _picture()}, "give mask")):
        with pytest.raises(ValueError, match=word):
            PipelineSampler(pipeline).sample(PROMPT, height=16, width=16, **asked)


def test_decoding_goes_on_in_slices_and_tiles_where_memory_runs_out():
    pipeline = tiny.tiny_sd()
    sampler = PipelineSampler(pipeline)
    latents = sampler.latents([1, 2], height=16, width=16)
    expected = sampler.decode(latents)
    whole, failures = pipeline.vae.decode, [torch.OutOfMemoryError("full")]

    def decode(z):
        if failures:
            raise failures.pop()
        return whole(z)

    pipeline.vae.decode = decode
    with pytest.warns(RuntimeWarning, match="slicing"):
        sliced = sampler.decode(latents)
    assert pipeline.vae.use_slicing
    assert not pipeline.vae.use_tiling
    assert (sliced - expected).abs().max() < 1e-5
    failures.append(torch.OutOfMemoryError("full"))
    with pytest.warns(RuntimeWarning, match="tiling"):
        sampler.decode(latents)
    assert pipeline.vae.use_tiling
    failures.append(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        sampler.decode(latents)


def test_encoding_is_undone_by_decoding_in_scale():
    pipeline = tiny.tiny_sd3()  # with a shift and a scale
    sampler = PipelineSampler(pipeline)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = pipeline.vae.encode(image).latent_dist.mode()
        latents = sampler.encode_images(image)
        assert (latents - (raw - 0.06) * 1.5).abs().max() < 1e-6
        assert (sampler.decode(latents) - pipeline.vae.decode(raw).sample).abs().max() < 1e-5


def test_what_a_safety_checker_objects_to_is_black():
    pipeline = tiny.tiny_sd()
    pipeline.safety_checker = object()
    pipeline.run_safety_checker = lambda images, device, dtype: (images, [False, True])
    sampler = PipelineSampler(pipeline)
    with pytest.warns(RuntimeWarning, match="image 1"):
        images = sampler.sample(PROMPT, seeds=[1, 2], steps=2, height=16, width=16, to="tensor")
    assert (images[1] == -1).all()
    assert (images[0] != -1).any()


def test_pictures_videos_and_sound():
    image = PipelineSampler(tiny.tiny_sd()).sample(PROMPT, steps=2, seed=1, height=16, width=24)
    assert [picture.size for picture in image] == [(24, 16)]
    asked = {"height": 16, "width": 16, "frames": 5, "max_sequence_length": 12}
    video = PipelineSampler(tiny.tiny_video(), None, "euler").sample(
        PROMPT, steps=2, seed=1, **asked
    )
    assert [len(frames) for frames in video] == [5]
    sound = PipelineSampler(tiny.tiny_stable_audio())
    assert sound.sample(PROMPT, steps=2, seed=1, seconds=1.5).shape == (1, 2, 24)


def test_an_autoencoder_that_gives_latents_themselves():
    pipeline = tiny.tiny_sd()
    pipeline.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()
    init = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sampler = PipelineSampler(pipeline)
    with torch.no_grad():
        known = pipeline.vae.encode(init).latents
    assert torch.equal(sampler.encode_images(init), known)
    drawn = sampler.sample(PROMPT, init=init, strength=0.5, steps=4, seed=1, to="tensor")
    assert drawn.shape == (1, 3, 16, 16)
