"""What samples depend on beside the weights, as text, by which a folder of them is gone on with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.guidance.base import Wrapper

DEPTH = 8
"""Objects within objects that are looked into."""
COUNTERS = ("made", "spared")
"""What a wrapper counts, and no sample depends on."""


def described(value: Any) -> Any:
    """A setting as JSON data, the same in every process; of what is no data, its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def described_model(model: Any, each: Sequence[Tensor] = ()) -> str:
    """A model by its name; guidance by all that it was made with, down to the model inside.

    Functions are told by name and by the numbers, tensors and functions that they close over.

    Args:
        model: a Denoiser, guided or not.
        each: tensors that it holds of which each row belongs to a sample: they are told by their
            dtype alone, so that a set may grow; see `digest_rows` for what they hold.
    """
    rows = frozenset(map(id, each))
    return _inside(model, DEPTH, rows) if isinstance(model, Wrapper) else type(model).__name__


def digest(value: Any) -> str:
    """A tensor's shape, and 16 hexadecimal digits of its bytes; the host waits for the device."""
    data = hashlib.sha256(_bytes(value)).hexdigest()[:16]
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {data}"


def digest_rows(told: Any, n: int) -> str:
    """What each of n samples is told, as 8 hexadecimal digits for each, one after another.

    Args:
        told: tensors, text and numbers, alone or in mappings and lists, of one sample: a function
            of its number.
    """
    return "".join(hashlib.sha256(_told(told(i)).encode()).hexdigest()[:8] for i in range(n))


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_told(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_told, value)) + "]"
    return repr(described(value))


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # of one value any stride is contiguous
    return flat.view(torch.uint8).numpy().tobytes()


def _inside(value: Any, depth: int, rows: frozenset[int]) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor):
        each = f"{value.dtype} of each sample".removeprefix("torch.")
        return f"Tensor({each if id(value) in rows else digest(value)})"
    if depth == 0 or isinstance(value, nn.Module):  # weights are not compared
        return type(value).__name__
    told = functools.partial(_inside, depth=depth - 1, rows=rows)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(told, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {told(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, functools.partial):
        return f"partial{told([value.func, value.args, value.keywords])}"
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return _call(value.__qualname__, {name: told(cell.cell_contents) for name, cell in cells})
    if isinstance(value, types.MethodType):
        return f"{told(value.__self__)}.{value.__name__}"
    if not isinstance(value, Wrapper) and hasattr(value, "path"):  # a denoiser: a model's name
        return type(value).__name__
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return _call(name, {key: told(item) for key, item in getattr(value, "__dict__", {}).items()})


def _call(name: str, items: Mapping[str, str]) -> str:
    kept = {k: v for k, v in items.items() if not k.startswith("_") and k not in COUNTERS}
    return f"{name}({', '.join(f'{key}={item}' for key, item in sorted(kept.items()))})"
