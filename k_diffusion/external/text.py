"""Frozen text encoders of transformers as conditioners: CLIP's, T5's, any that it knows.

Only weights in safetensors are read, and no code that comes with them is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.models.conditioners import Conditioner, register_conditioner
from k_diffusion.models.registry import check_types
from k_diffusion.utils.words import reason_of

NEEDED = "config.json, model.safetensors and a tokenizer's files"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which encoder, and what is taken from it.

    Args:
        path: a folder that holds the encoder, or its id on the Hugging Face hub.
        subfolder: of it, where the encoder lies; "": itself.
        tokenizer: of it, where the tokenizer lies; "": beside the encoder.
        revision: a branch, tag or commit on the hub; "": its main one.
        local: never ask the hub, only its cache on this machine.
        max_length: tokens that every text is padded to.
        truncate: cut longer texts; else they are refused.
        layer: the hidden state that is taken as the sequence, as the encoder counts them: -1 is its
            output, with its last norm; -2 what its last layer begins with.
        pooled: give the encoder's pooled output as `embedding`, too.
        reads: see `Conditioner`.
    """

    path: str
    subfolder: str = ""
    tokenizer: str = ""
    revision: str = ""
    local: bool = False
    max_length: int = 77
    truncate: bool = False
    layer: int = -1
    pooled: bool = False
    reads: str = "text"

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_length < 1:
            raise ValueError(f"max_length = {self.max_length} is too small; give at least 1")


@register_conditioner("text")
class TextEncoder(Conditioner):
    """Texts, each as its tokens' hidden states, and on request as one vector.

    Args:
        config: see `TextConfig`.
        options: its fields.

    Raises:
        ValueError: it cannot be loaded, or has not what is asked of it.
        ImportError: transformers is not installed.
    """

    Config = TextConfig
    config: TextConfig
    loads_weights = True

    def __init__(self, config: TextConfig | None = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        self.tokenizer, encoder = _load(config)
        self.encoder = encoder.float().eval().requires_grad_(False)
        if self.tokenizer.pad_token is None:  # what pads does not count, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        most = getattr(encoder.config, "max_position_embeddings", None) or config.max_length
        if config.max_length > most:
            raise ValueError(f"max_length = {config.max_length}, but {config.path} takes {most}")
        self.keywords = ("context", "context_mask") + ("embedding",) * config.pooled
        empty = self([""])
        self.context_dim = empty["context"].shape[2]
        """Width of the sequence: the model's option of that name."""
        self.embedding_dim = empty["embedding"].shape[1] if config.pooled else 0
        """Width of the vector: the model's option of that name; 0: none."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> TextEncoder:
        """The encoder in a folder or on the hub; see `TextConfig` for the options."""
        return cls(path=str(path), **options)

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode: it is frozen, and its dropout off."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"context": (B, max_length, D), "context_mask": (B, max_length)}, "embedding": (B, E).

        Args:
            raw: texts; None: no text, which is not the same as an empty one.

        Raises:
            ValueError: a text is too long, or none.
        """
        config = self.config
        texts = [raw] if isinstance(raw, str) else list(raw)
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"a text encoder reads texts, got {type(text).__name__}")
        tokens = self.tokenizer(
            ["" if text is None else text for text in texts],
            padding="max_length",
            truncation=config.truncate,
            max_length=config.max_length,
            return_tensors=None,
        )
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) > config.max_length:
                raise ValueError(
                    f"the text {_short(text)} has {len(ids)} tokens, but max_length is "
                    f"{config.max_length}: shorten it, or let it be cut by truncate = true"
                )
        ids = torch.tensor(tokens["input_ids"], device=self.device)
        mask = torch.tensor(tokens["attention_mask"], device=self.device).bool()
        with torch.autocast(self.device.type, enabled=False):
            output = self.encoder(
                input_ids=ids, attention_mask=mask.long(), output_hidden_states=config.layer != -1
            )
        condition = {"context": self._sequence(output), "context_mask": mask}
        if config.pooled:
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(f"{config.path} has no pooled output: leave `pooled` out")
            condition["embedding"] = output.pooler_output
        absent = torch.tensor([text is None for text in texts], device=self.device)
        return self.hide(condition, absent) if None in texts else condition

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        length = self.config.max_length if like is None else like["context"].shape[1]
        here: dict[str, Any] = {"device": self.device}
        width = self.context_dim if like is None else like["context"].shape[2]
        condition = {
            "context": torch.zeros(batch, length, width, **here),
            "context_mask": torch.zeros(batch, length, dtype=torch.bool, **here),
        }
        if self.config.pooled:
            condition["embedding"] = torch.zeros(batch, self.embedding_dim, **here)
        return condition

    def _sequence(self, output: Any) -> Tensor:
        layer = self.config.layer
        if layer == -1:
            return output.last_hidden_state
        count = len(output.hidden_states)
        if not -count <= layer < count:
            raise ValueError(
                f"layer = {layer}, but {self.config.path} has {count} hidden states: give one from "
                f"{-count} to {count - 1}"
            )
        return output.hidden_states[layer]


def _load(config: TextConfig) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": config.local}
    if config.revision:
        where["revision"] = config.revision
    if not_there(config.path):
        raise ValueError(f"text encoder {config.path} does not exist: give a folder with {NEEDED}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, subfolder=config.tokenizer or config.subfolder, **where
        )
        encoder = AutoModelForTextEncoding.from_pretrained(
            config.path, subfolder=config.subfolder, use_safetensors=True, **where
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = reason_of(error)
        raise ValueError(
            f"text encoder {config.path!r} cannot be loaded ({_cut(reason, 250)}): give a folder "
            f"with {NEEDED}, or the id of one on the Hugging Face hub that can be reached"
        ) from None
    return tokenizer, encoder


def not_there(path: str) -> bool:
    """Whether a path can only mean a folder, but there is none (an id: `name`, `owner/name`)."""
    only_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_absolute()
    return only_path and not Path(path).is_dir()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _short(text: str | None) -> str:
    return repr(_cut(text or "", 40))
