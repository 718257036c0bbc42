"""Pipelines from a folder, the hub or one file, without running anything that is in them.

Weights are safetensors, or pickles of tensors and nothing else, which torch reads by
`weights_only`; code is what is installed. Other pickles, and folders that name code of their own,
are refused before anything of them is loaded.
"""

from __future__ import annotations

import json
import pkgutil
import zipfile
from pathlib import Path
from typing import Any

from k_diffusion.external.families import FAMILIES
from k_diffusion.external.pipelines import PipelineSampler
from k_diffusion.external.process import KNOWN
from k_diffusion.external.text import not_there
from k_diffusion.utils import maths
from k_diffusion.utils.words import reason_of

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_LIBRARIES = ("diffusers", "transformers", "k_diffusion.external.plan_scheduler")


def load(
    source: str | Path,
    scheduler: Any = None,
    solver: Any = None,
    *,
    dtype: Any = None,
    device: Any = None,
    local: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    kind: str | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> PipelineSampler:
    """A pipeline, ready to draw.

    Args:
        source: a folder that `save_pretrained` wrote, of a pipeline, or of one UNet2DModel with its
            scheduler; an id on the Hugging Face hub, of a repository with safetensors; or one file,
            .safetensors or .ckpt, of a whole checkpoint.
        scheduler, solver, options: see `PipelineSampler`.
        dtype: of the weights, `torch.bfloat16` say; None: as they are, float32 mostly.
        device: to move it to; None: it stays where it is.
        local: never ask the hub.
        revision, variant: of a repository on the hub: a tag or commit; "fp16".
        kind: the pipeline's class, "StableDiffusionXLPipeline" say, of a single file.
        config: of a single file: a folder or an id with the pipeline's configs; None: those that
            diffusers finds for it, on the hub.

    Raises:
        ValueError: a pickle, a file that is not whole, code of its own, an unknown pipeline, or
            what cannot be loaded, by name.
        TypeError: a pipeline of an unknown class.
    """
    path = Path(source)
    if path.suffix in (".safetensors", *PICKLES):
        pipeline = _single_file(path, kind, config, dtype, local)
    elif kind is not None or config is not None:
        raise ValueError("kind and config are of a single file: leave them")
    elif not_there(str(source)):
        raise ValueError(f"{source} does not exist: give a folder, an id or a .safetensors file")
    else:
        where = {"local_files_only": local, "use_safetensors": True, _dtype_word(): dtype}
        where |= {k: v for k, v in (("revision", revision), ("variant", variant)) if v}
        where = {name: value for name, value in where.items() if value is not None}
        if path.is_dir() and check_folder(path):
            del where["use_safetensors"]
        if path.is_dir() and not (path / "model_index.json").exists():
            pipeline = _single_network(path, where)
        else:
            pipeline = _whole(str(source), where)
    if device is not None:
        pipeline.to(device)
    return PipelineSampler(pipeline, scheduler, solver, **options)


def check_folder(folder: Path) -> bool:
    """Refuses, before anything is loaded, what may run code and weights that are not whole.

    Returns:
        Whether pickles are among what is to be loaded.

    Raises:
        ValueError: by name.
    """
    index = folder / "model_index.json"
    if index.exists():
        _check_index(_read(index), index)
    needed = False
    for sub in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        whole = sorted(sub.glob("*.safetensors"))
        pickled = sorted(p for p in sub.iterdir() if p.suffix in PICKLES)
        for file in whole or pickled:
            check_weights(file)
        needed = needed or bool(pickled and not whole)
    return needed


def check_weights(file: Path) -> None:
    """Refuses a safetensors file that is not whole, and a pickle of more than tensors.

    Raises:
        ValueError: by name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix in PICKLES:
            _read_pickle(file)
        else:
            with safe_open(file, "pt"):
                pass
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: give a .safetensors file, a folder or an id"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not whole ({' '.join(str(error).split())}): copy or download it "
            "again"
        ) from None


def _read_pickle(file: Path) -> None:
    import torch

    try:
        # Of files as torch writes them today, the tensors themselves stay on the disk.
        torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # of broken files, torch raises anything
        reason = reason_of(error)
        raise ValueError(
            f"{file} is a pickle that weights_only cannot read, so that it may run code, or is not "
            f"whole ({reason[:100]}...): convert it to .safetensors where you trust it"
        ) from None


def _check_index(index: dict[str, Any], file: Path) -> None:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{file} names code of its own, {name!r}, which is never run")
    if name not in FAMILIES:
        raise ValueError(f"{file}: " + maths.unknown("diffusers pipeline", name, FAMILIES))
    import diffusers

    for component, said in index.items():
        if component.startswith("_") or not isinstance(said, list) or said[0] is None:
            continue
        library = str(said[0])
        if library not in (*_LIBRARIES, *_folders(diffusers.pipelines)):
            raise ValueError(
                f"{file} takes {component} from {library!r}, which is not of diffusers or "
                "transformers: such code is never run"
            )


def _whole(source: str, where: dict[str, Any]) -> Any:
    import diffusers

    # A saved pipeline may name it, and diffusers looks only among what is imported.
    import k_diffusion.external.plan_scheduler  # noqa: F401

    try:
        if not Path(source).is_dir():  # the index first: it may name code of its own
            named = diffusers.DiffusionPipeline.load_config(
                source, **{k: v for k, v in where.items() if k in ("local_files_only", "revision")}
            )
            _check_index(dict(named), Path(source) / "model_index.json")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, **where)
        for name, module in pipeline.components.items():
            if isinstance(module, diffusers.ModelMixin):
                _check_complete(module, Path(source) / name)
        return pipeline
    except (OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _refused(source, error) from None


_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _check_complete(module: Any, folder: Path) -> None:
    """Refuses a folder's module whose file has not all of its weights: the others are random."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return  # of the hub, or pickles
    there: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            there.update(weights.keys())
    for old, new in _RENAMED.items():  # names that diffusers takes still
        there |= {name.replace(f".{old}.", f".{new}.") for name in there}
    missing = sorted(set(module.state_dict()) - there)
    if missing:
        raise ValueError(f"{files[0]} has no {missing[0]} ({len(missing)} weights are missing)")


def _folders(package: Any) -> list[str]:
    """The packages within diffusers.pipelines, whose classes a pipeline's parts may be."""
    return [found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg]


def _single_file(
    path: Path, kind: str | None, config: str | Path | None, dtype: Any, local: bool
) -> Any:
    import diffusers

    if kind is None:
        raise ValueError(f"{path} does not say what it is: give kind, its pipeline's class")
    if kind not in FAMILIES:
        raise ValueError(maths.unknown("diffusers pipeline", kind, FAMILIES))
    check_weights(path)
    given = {"config": None if config is None else str(config), _dtype_word(): dtype}
    try:
        return getattr(diffusers, kind).from_single_file(
            str(path),
            local_files_only=local,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise _refused(str(path), error) from None


def _single_network(folder: Path, where: dict[str, Any]) -> Any:
    """An unconditional network with its scheduler, as a pipeline without a VAE."""
    import diffusers

    from k_diffusion.external.plan_scheduler import PlanScheduler

    homes = [p for p in (folder, folder / "unet") if (p / "config.json").exists()]
    plans = [p for p in (folder, folder / "scheduler") if (p / "scheduler_config.json").exists()]
    if not homes or not plans:
        missing = "config.json" if not homes else "scheduler_config.json"
        raise ValueError(
            f"{folder} has no model_index.json and no {missing}: give the folder of a pipeline, or "
            "of a UNet2DModel with its scheduler"
        )
    name = _read(homes[0] / "config.json").get("_class_name")
    if name != "UNet2DModel":
        raise ValueError(
            f"{folder} holds {name}, which is told something: give the folder of its pipeline, or "
            "wrap it by foreign_denoiser"
        )
    said = _read(plans[0] / "scheduler_config.json").get("_class_name", "")
    if said not in (*KNOWN, "PlanScheduler"):
        file = plans[0] / "scheduler_config.json"
        raise ValueError(f"{file}: {maths.unknown('diffusers scheduler', said, KNOWN)}")
    kind = PlanScheduler if said == "PlanScheduler" else getattr(diffusers, said)
    try:
        unet = diffusers.UNet2DModel.from_pretrained(homes[0], **where)
        _check_complete(unet, homes[0])
        return diffusers.DDPMPipeline(unet=unet, scheduler=kind.from_pretrained(plans[0]))
    except (OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _refused(str(folder), error) from None


def _dtype_word() -> str:
    """diffusers renamed this option, and warns of the old name."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): copy or download it again") from None
    if not isinstance(read, dict):
        raise ValueError(f"{file} is no config: copy or download it again")
    return read


def _refused(source: str, error: Exception) -> ValueError:
    reason = reason_of(error)
    reason = reason if len(reason) <= 300 else reason[:297] + "..."
    return ValueError(
        f"{source!r} cannot be loaded ({reason}): give a folder that save_pretrained wrote with "
        "safetensors, or an id on the Hugging Face hub that can be reached"
    )
