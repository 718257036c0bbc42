"""Encoders of a few thousand weights, made here and saved as the real ones are."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tokenizer(folder: Path, words: str) -> int:
    """A tokenizer of whole words, with the ends that CLIP marks; gives the number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<start>", "<end>", "<unknown>", *words.split()]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    ).save_pretrained(folder)
    return len(vocabulary)


def save_clip(folder: Path, words: str = "a red green blue fox cat") -> Path:
    """A CLIP text encoder of width 16 and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    count = save_tokenizer(folder, words)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path, words: str = "a red green blue fox cat") -> Path:
    """A T5 encoder of width 24 and its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    count = save_tokenizer(folder, words)
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=count, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, pad_token_id=0
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder
