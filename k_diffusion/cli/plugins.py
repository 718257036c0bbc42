"""A user's own files, named on the command line, imported so that what they register is known."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from .problems import UsageError

Plugins = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE.py|MODULE")
]

_LOADED: dict[Path, ModuleType] = {}


def load_plugins(names: Sequence[str]) -> None:
    """Import files of Python, or modules by their names.

    A file's folder, or for a module the present one, comes last among those that imports look in.
    Only the command line names them: a config or a checkpoint cannot.

    Raises:
        UsageError: there is no such file or module, or it fails.
    """
    for name in names:
        is_file = name.endswith(".py") or os.sep in name
        path = Path(name).resolve()
        if is_file and not (path.is_file() and path.suffix == ".py"):
            raise UsageError(f"--plugin {name} does not exist: give a file of Python, FILE.py")
        if not is_file and not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"--plugin {name!r} is no module's name; a file is given as FILE.py")
        _look_in(path.parent if is_file else Path.cwd())
        try:
            if is_file:
                _load(path)
            elif _is_bare_folder(_import(name)):  # which runs nothing
                raise UsageError(f"--plugin {name} is a folder; give a file in it, FILE.py")
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                reason = f"there is no module {error.name}; a file is given as FILE.py"
            else:
                reason = f"it cannot be imported: {_reason(error)}"
            raise UsageError(f"--plugin {name}: {reason}") from error


def _load(path: Path) -> None:
    """Once a process, by whatever name: else what it registers would be taken already."""
    if path in _LOADED or path in map(_file, list(sys.modules.values())):
        return
    spec = importlib.util.spec_from_file_location(f"k_diffusion_plugin{len(_LOADED)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    _LOADED[path] = module


def _import(name: str) -> ModuleType:
    """A module by its name; the one that is there, if its file was loaded before."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)  # runs the folders that it lies in, not itself
        if spec is not None and spec.has_location and spec.origin is not None:
            loaded = _LOADED.get(Path(spec.origin).resolve())
            if loaded is not None:
                sys.modules[name] = loaded
    return importlib.import_module(name)


def _file(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if isinstance(name, str) else None


def _is_bare_folder(module: ModuleType) -> bool:
    return hasattr(module, "__path__") and getattr(module, "__file__", None) is None


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it hides nothing that is installed


def _reason(error: BaseException) -> str:
    """What went wrong, and in which of the plugin's lines."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    trace, where = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not where and "importlib" not in file and file != __file__:
            where = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{where}"
