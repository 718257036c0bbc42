"""Loading without the network and without running anything; what is refused, and by which words."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import diffusers
import pytest
import torch

from k_diffusion.external import PipelineSampler, load
from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny
from tests.external.single_file import compvis

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    # huggingface_hub's word about an option that diffusers and transformers hand it
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]
PROMPT = "a red fox"
SMALL = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any socket fails, so that nothing here can be downloaded."""

    def refuse(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny.tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be spoilt."""
    import shutil

    return shutil.copytree(saved, tmp_path / "sd")


def test_a_saved_pipeline_draws_the_same(saved):
    loaded = load(saved, "karras", "dpmpp_2m", local=True)
    made = KSampler.from_pipeline(tiny.tiny_sd(), "karras", "dpmpp_2m")
    one, other = (
        s.sample(PROMPT, "green", steps=3, seeds=[1, 2], to="latent", **SMALL)
        for s in (loaded, made)
    )
    assert torch.equal(one, other)
    assert load(saved, dtype=torch.bfloat16, local=True).pipeline.unet.dtype == torch.bfloat16


def test_a_folder_of_one_network_with_its_scheduler(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no scheduler_config"):
        load(tmp_path)
    scheduler.save_pretrained(tmp_path)
    drawn = load(tmp_path, local=True).sample(steps=5, seeds=[1], to="latent")
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(unet(x, time).sample, time, x).prev_sample
    assert (drawn - x).abs().max() / x.abs().max() < 1e-5


class Runs:
    """What a pickle of it does when it is read is make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_that_may_run_code_are_refused(folder, tmp_path):
    ran = tmp_path / "ran"
    pickle = tmp_path / "model.ckpt"
    torch.save({"state_dict": Runs(ran)}, pickle)
    with pytest.raises(ValueError, match=r"model\.ckpt is a pickle that weights_only cannot read"):
        load(pickle, kind="StableDiffusionPipeline")
    weights = next((folder / "unet").glob("*.safetensors"))
    pickled = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Runs(ran)}, pickled)
    load(folder, local=True)  # the safetensors beside it are taken
    weights.unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is a pickle that weights"):
        load(folder, local=True)
    pickled.write_bytes(pickled.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is a pickle that weights"):
        load(folder, local=True)
    assert not ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors_alone_are_read(saved, folder, zipped):
    from safetensors.torch import load_file

    for part, name in (
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        weights = next((folder / part).glob("*.safetensors"))
        torch.save(load_file(weights), folder / part / name, _use_new_zipfile_serialization=zipped)
        weights.unlink()
    asked = {"steps": 2, "seeds": [1], "to": "latent", **SMALL}
    drawn = load(folder, local=True).sample(PROMPT, **asked)
    assert torch.equal(drawn, load(saved, local=True).sample(PROMPT, **asked))


def test_one_file_of_a_whole_checkpoint(saved, tmp_path):
    """Through diffusers' own loader, from the names of CompVis, with no socket."""
    from safetensors.torch import save_file

    weights = compvis(tiny.tiny_sd())
    save_file(weights, tmp_path / "one.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "one.ckpt")
    asked = {"steps": 2, "seeds": [1], "to": "tensor", **SMALL}
    drawn = load(saved, local=True).sample(PROMPT, **asked)
    for name in ("one.safetensors", "one.ckpt"):
        one = load(tmp_path / name, kind="StableDiffusionPipeline", config=saved, local=True)
        assert torch.equal(one.sample(PROMPT, **asked), drawn)


def test_files_that_are_not_whole_are_refused(folder, tmp_path):
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"vae.*safetensors is damaged or not whole"):
        load(folder, local=True)
    single = tmp_path / "one.safetensors"
    single.write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"one\.safetensors is damaged"):
        load(single, kind="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="give kind"):
        load(single)
    with pytest.raises(ValueError, match="StableDiffusionPipelin"):
        load(single, kind="StableDiffusionPipelin")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read"):
        load(folder)


def test_weights_that_are_missing_are_refused(folder):
    from safetensors.torch import load_file, save_file

    file = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"unet.*has no conv_in\.weight \(1 weights are missing"):
        load(folder, local=True)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("_class_name", ["my_code", "Mine"], "code of its own"),
        ("_class_name", "AudioLDMPipeline", "unknown diffusers pipeline 'AudioLDMPipeline'"),
        ("unet", ["os", "system"], "takes unet from 'os'"),
        ("unet", ["k_diffusion.cli", "main"], "takes unet from 'k_diffusion.cli'"),
        ("unet", ["pipeline_utils", "DiffusionPipeline"], "takes unet from 'pipeline_utils'"),
    ],
)
def test_code_of_a_folder_is_never_run(folder, key, value, words):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(ValueError, match=words):
        load(folder, local=True)


def test_what_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no\.safetensors does not exist"):
        load(tmp_path / "no.safetensors", kind="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="owner/name.* cannot be loaded"):
        load("owner/name", local=True)


def test_pipelines_that_are_not_understood():
    with pytest.raises(TypeError, match="unknown diffusers pipeline 'Linear'"):
        PipelineSampler(torch.nn.Linear(1, 1))
    pipeline = tiny.tiny_sd()
    pipeline.vae = None
    with pytest.raises(ValueError, match="has no vae"):
        PipelineSampler(pipeline)
    pipeline = tiny.tiny_sd()
    pipeline.scheduler.register_to_config(prediction_type="epsilo")
    with pytest.raises(ValueError, match="prediction_type.*'epsilo'"):
        PipelineSampler(pipeline)
    pipeline = tiny.tiny_sd()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="no text_encoder"):
        PipelineSampler(pipeline).sample(PROMPT, **SMALL)
    with pytest.raises(ValueError, match="unknown sampler 'eulr'"):
        PipelineSampler(tiny.tiny_sd(), None, "eulr")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": [PROMPT, "cat"], "seeds": [1, 2, 3]}, "3 seeds for 2 images"),
        ({"prompt": [PROMPT, "cat"], "n": 2, "seeds": [1, 2]}, "2 seeds for 4 images"),
        ({"prompt": PROMPT, "negative": ["a", "b"]}, "2 negatives for 1 prompts"),
        ({"prompt": PROMPT, "height": 17}, "height 17 is not a multiple of 2.*give 16"),
        ({"prompt": PROMPT, "width": 0}, "width 0 is not a multiple"),
        ({}, "needs a prompt"),
        ({"prompt": PROMPT, "clip_skp": 1}, "unknown option .*clip_skp.*clip_skip"),
        ({"prompt": PROMPT, "labels": [1]}, "takes no labels"),
        ({"prompt": PROMPT, "frames": 4}, "frames are of videos"),
        ({"prompt": PROMPT, "seconds": 4}, "draws no sound"),
        ({"prompt": PROMPT, "seed": 1, "seeds": [1]}, "not both"),
        ({"prompt": PROMPT, "to": "png"}, "unknown output 'png'"),
        ({"prompt": PROMPT, "guidance": "high"}, "guidance must be a number"),
        ({"prompt": PROMPT, "seeds": 5}, "seeds must be whole numbers"),
        ({"prompt": PROMPT, "seeds": [2**64]}, "seeds must be whole numbers"),
        ({"prompt": PROMPT, "seed": -1}, "seed must be a whole number"),
        ({"prompt": PROMPT, "height": "16"}, "height must be a whole number of pixels, got '16'"),
        ({"prompt": PROMPT, "negative": 5}, "negative must be a text"),
        ({"prompt": PROMPT, "n": True}, "n must be a whole number"),
        ({"prompt": PROMPT, "latents": torch.zeros(1, 4, 4, 4)}, r"latents have shape"),
        ({"prompt": PROMPT, "init": torch.zeros(1, 3, 16, 16)}, "give strength"),
        ({"prompt": PROMPT, "mask": torch.zeros(16, 16)}, "needs init"),
    ],
)
def test_wrong_input_is_refused_by_name(asked, words):
    sampler = PipelineSampler(tiny.tiny_sd())
    with pytest.raises((TypeError, ValueError), match=words):
        sampler.sample(**{**SMALL, "steps": 2, **asked})


def test_embeddings_instead_of_texts():
    sampler = PipelineSampler(tiny.tiny_sd())
    told = sampler.encode([PROMPT, "cat"], "green", guidance=5.0)
    embeds = {
        "prompt_embeds": told.condition["encoder_hidden_states"],
        "negative_prompt_embeds": told.negative["encoder_hidden_states"],
    }
    asked = {"steps": 2, "guidance": 5.0, "seeds": [1, 2], "to": "latent", **SMALL}
    one = sampler.sample(**embeds, **asked)
    assert torch.equal(one, sampler.sample([PROMPT, "cat"], "green", **asked))
