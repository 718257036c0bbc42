"""Text encoders of transformers, on tiny ones made here: CLIP's and T5's."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from k_diffusion.external import TextEncoder
from k_diffusion.models import conditioner_config, make_conditioner

pytest.importorskip("transformers")
spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_t5(tmp_path_factory.mktemp("t5"))


def test_clip_is_what_transformers_computes(clip: Path) -> None:
    from transformers import CLIPTextModel

    made = TextEncoder.from_pretrained(clip, max_length=8, pooled=True)
    assert made.keywords == ("context", "context_mask", "embedding")
    assert (made.context_dim, made.embedding_dim) == (16, 16)
    told = made(["a red fox", "cat"])
    model = CLIPTextModel.from_pretrained(clip).eval()
    for row, ids in enumerate(([1, 4, 5, 8, 2], [1, 9, 2])):  # start, words, end
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        count = len(ids)
        # Alone and not padded: so neither padding nor a neighbour is seen.
        assert (told["context"][row, :count] - wanted.last_hidden_state[0]).abs().max() < 1e-5
        assert (told["embedding"][row] - wanted.pooler_output[0]).abs().max() < 1e-5
        assert told["context_mask"][row].tolist() == [True] * count + [False] * (8 - count)
    earlier = TextEncoder.from_pretrained(clip, max_length=8, layer=-2)
    assert earlier.keywords == ("context", "context_mask")
    seen = earlier(["cat"])["context"][0, :3]
    assert (seen - wanted.hidden_states[-2][0]).abs().max() < 1e-5


def test_t5_sees_no_padding(t5: Path) -> None:
    from transformers import T5EncoderModel

    made = TextEncoder.from_pretrained(t5, max_length=16)
    told = made(["green cat"])
    with torch.no_grad():
        model = T5EncoderModel.from_pretrained(t5).eval()
        wanted = model(input_ids=torch.tensor([[1, 6, 9, 2]])).last_hidden_state
    assert told["context"].shape == (1, 16, 24)
    assert (told["context"][0, :4] - wanted[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="has no pooled output: leave `pooled` out"):
        TextEncoder.from_pretrained(t5, pooled=True)


def test_no_text_is_the_null_condition(clip: Path) -> None:
    made = TextEncoder.from_pretrained(clip, max_length=6, pooled=True)
    told = made(["a fox", None, ""])
    null = made.null(3, told)
    assert {k: (v.shape, v.dtype) for k, v in null.items()} == {
        k: (v.shape, v.dtype) for k, v in told.items()
    }
    assert {k: v.shape for k, v in made.null(3).items()} == {k: v.shape for k, v in null.items()}
    assert not any(value.any() for value in null.values())
    for keyword, value in told.items():
        assert torch.equal(value[1], null[keyword][1])
    assert told["context_mask"].sum(1).tolist() == [4, 0, 2]  # an empty text still has its ends
    with pytest.raises(ValueError, match="a text encoder reads texts, got int"):
        made([3])


def test_long_texts(clip: Path) -> None:
    text = "a red green blue fox cat a red"
    made = TextEncoder.from_pretrained(clip, max_length=6)
    with pytest.raises(
        ValueError, match="'a red green.* has 10 tokens, but max_length is 6: short"
    ):
        made(["cat", text])
    cut = TextEncoder.from_pretrained(clip, max_length=6, truncate=True)
    assert cut([text])["context_mask"].all()
    with pytest.raises(ValueError, match="max_length = 13, but .* takes 12"):
        TextEncoder.from_pretrained(clip, max_length=13)


def test_it_is_frozen(clip: Path) -> None:
    made = TextEncoder.from_pretrained(clip, max_length=6).train()
    assert not made.training
    assert not made.encoder.training
    assert not any(p.requires_grad for p in made.parameters())
    assert not made(["cat"])["context"].requires_grad
    plain = made(["cat"])["context"]
    with torch.autocast("cpu", torch.bfloat16):  # of the training, which is not the encoder's
        assert torch.equal(made(["cat"])["context"], plain)


def test_by_name_and_back_through_json(clip: Path) -> None:
    made = make_conditioner({"type": "text", "path": str(clip), "max_length": 5, "reads": "class"})
    plain = json.loads(json.dumps(conditioner_config(made)))
    again = make_conditioner(plain)
    assert conditioner_config(again) == plain
    assert torch.equal(again(["cat"])["context"], made(["cat"])["context"])
    assert torch.equal(made(made.read("cat"))["context"], made(["cat"])["context"])


def test_only_safetensors_are_read(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded .*safetensors") as caught:
        TextEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_weights_is_not_run(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    shutil.copytree(clip, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["./gone", "/no/folder", "a/b/c"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match=f"text encoder {path} does not exist: give a folder with"):
        TextEncoder.from_pretrained(path)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, "nobody/nothing"):
        with pytest.raises(ValueError, match="cannot be loaded .* give a folder with") as caught:
            TextEncoder.from_pretrained(path, local=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="path is missing"):
        make_conditioner({"type": "text"})


def test_broken_weights_are_said_in_one_line(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(clip, folder)
    (weights,) = folder.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be loaded .*: give a folder with"):
        TextEncoder.from_pretrained(folder)
