"""Checkpoints written while training goes on.

The tensors of one moment are copied into memory of the host's own, and a thread hashes, writes and
verifies them. The file is bitwise the one that would have been written at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from k_diffusion.training.checkpoint import CheckpointError, Contents, write_checkpoint


class CheckpointWriter:
    """Writes checkpoints one at a time; what is saved is as it was when `save` was called.

    As a context manager it ends with the last write: its failure is raised there, or told where
    another error is on its way.

    Args:
        background: whether `save` returns before the file is written. This takes host memory for
            one checkpoint, kept from save to save.
        say: takes a line of news.
    """

    def __init__(
        self,
        *,
        background: bool = True,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.background, self._say = background, say
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._sha256 = ""

    def save(
        self, path: Path, contents: Contents, after: Callable[[], object] = lambda: None
    ) -> None:
        """Write a checkpoint, once the one before is written.

        Args:
            path: the file.
            contents: copied before this returns.
            after: called once the file stands, before the write counts as done; in the thread.

        Raises:
            CheckpointError: the one before could not be written, or, not in the background, this.
        """
        self.wait()
        if not self.background:
            self._write(path, contents, after)
            self.wait()
            return
        held = Contents(self._host.take(contents.tensors), contents.record)
        # No daemon: even a program that ends without waiting ends with the file written.
        self._thread = threading.Thread(
            target=self._write, args=(path, held, after), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> str:
        """The sha256 of the last checkpoint, once it is written; "" where there is none.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._sha256

    def _write(self, path: Path, contents: Contents, after: Callable[[], object]) -> None:
        try:
            self._sha256 = write_checkpoint(path, contents)
            after()
        except BaseException as error:  # it is the main thread's, which will ask
            self._error = error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            self._say(str(failure))


class HostCopy:
    """Copies of tensors in host memory; the memory is used again by the next copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors as they are when the work asked of their devices so far is done.

        Raises:
            RuntimeError: memory is short.
        """
        self._held = {name: self._room(name, tensor) for name, tensor in tensors.items()}
        devices = set()
        for name, tensor in tensors.items():
            on_cuda = tensor.device.type == "cuda"
            self._held[name].copy_(tensor, non_blocking=on_cuda)  # pinned: all copies in flight
            if on_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return self._held

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
            return held
        if tensor.device.type == "cuda":
            with suppress(RuntimeError):  # a system may lend less pinned memory than it has
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return torch.empty(tensor.shape, dtype=tensor.dtype)
