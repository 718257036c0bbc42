"""What is asked of a pipeline and what its network is told: the words that all kinds share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Keywords = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is wanted of a pipeline.

    Attributes:
        count: how many samples are told differently; rows of a condition.
        guidance: the scale; up to 1 it is none, unless both estimates are wanted.
        prompts, negatives: texts, one for each; None: what the pipeline takes then.
        labels: classes, one for each.
        height, width: in pixels.
        frames: of a video.
        seconds: of sound, from its start.
        options: the pipeline's own names: prompt_embeds, prompt_2, clip_skip, original_size...
        pair: both estimates are wanted whatever the scale, for a solver of two outputs.
    """

    count: int
    guidance: float
    prompts: list[str] | None = None
    negatives: list[str] | None = None
    labels: list[int] | None = None
    height: int = 0
    width: int = 0
    frames: int = 1
    seconds: float = 0.0
    options: Keywords = field(default_factory=dict)
    pair: bool = False

    @property
    def guided(self) -> bool:
        """Whether two answers are asked for at each step."""
        return self.pair or self.guidance > 1


class Told(NamedTuple):
    """What a network is told.

    Attributes:
        condition: keywords of the network; tensors have one row for each that was asked.
        negative: those of them that differ in the second estimate of guidance.
        scale: of classifier-free guidance; up to 1: none, as pipelines have it.
    """

    condition: Keywords
    negative: Keywords
    scale: float


@dataclass(frozen=True)
class Family:
    """How one kind of pipeline is driven.

    Attributes:
        network: name of the component that is sampled from.
        tell: the function of the kind.
        options: what it takes beside those of `encode_prompt`.
        guidance: the usual scale.
        needs: other components that it cannot do without.
        kind: what its samples are: "image", "video" or "sound".
    """

    network: str
    tell: Callable[[Any, Asked], Told]
    options: tuple[str, ...] = ()
    guidance: float = 7.5
    needs: tuple[str, ...] = ("vae",)
    kind: str = "image"


FAMILIES: dict[str, Family] = {}
_NOT_OURS = ("self", "prompt", "negative_prompt", "device", "do_classifier_free_guidance", "kwargs")


def family(*names: str, **options: Any) -> Callable[..., Any]:
    """Registers how pipelines of these class names are driven; options: those of `Family`."""

    def register(tell: Callable[[Any, Asked], Told]) -> Callable[[Any, Asked], Told]:
        FAMILIES.update(dict.fromkeys(names, Family(tell=tell, **options)))
        return tell

    return register


def encode_options(pipeline: Any) -> list[str]:
    """The options of its `encode_prompt` that one may give."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        return []
    taken = inspect.signature(encode).parameters
    return [n for n in taken if n not in _NOT_OURS and not n.startswith("num_")]


def encode(pipeline: Any, asked: Asked, **changed: Any) -> Any:
    """What `encode_prompt` gives for one sample of each prompt."""
    taken = inspect.signature(pipeline.encode_prompt).parameters
    given: Keywords = {
        "prompt": asked.prompts,
        "negative_prompt": asked.negatives,
        "device": pipeline._execution_device,
        "do_classifier_free_guidance": asked.guided,
        **{name: 1 for name in taken if name.startswith("num_")},
        **dict.fromkeys(("prompt_2", "prompt_3")),
        **_scale(asked),
        **{name: value for name, value in asked.options.items() if name in taken},
        **changed,
    }
    with torch.no_grad():
        return pipeline.encode_prompt(**{k: v for k, v in given.items() if k in taken})


def _scale(asked: Asked) -> Keywords:
    """The scale of the adapters, which holds for text encoders, too."""
    given = (asked.options.get("cross_attention_kwargs") or {}).get("scale")
    return {} if given is None else {"lora_scale": given}
