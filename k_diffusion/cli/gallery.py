"""A folder of images that say how they were drawn: what is there already is not drawn again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .problems import UsageError

if TYPE_CHECKING:
    import torch

GRID = "grid.png"
GRID_HOLDS = 400
"""The most images of a grid."""
WHERE = ("checkpoint", "model", "config", "guide", "init", "mask", "command")
"""What an image's text says of places, which its own pixels do not depend on: beside each file
stands its digest, and the command repeats the other settings."""
OF_A_SET = (*WHERE, "images", "class", "prompt")
"""What a grid's text says that changes as the set grows."""


@dataclass
class Gallery:
    """A folder of numbered images and their grid.

    Every file is whole or not there, so that a command that was ended in any way, started again,
    draws what is missing. The image's own text, not a list beside it, says whether it belongs.

    Attributes:
        folder: made where it is missing, by `open`.
        names: of the images' files, in order.
        text: what the PNG of an image says, by its number; of the grid, by None.
    """

    folder: Path
    names: Sequence[str]
    text: Callable[[int | None], dict[str, str]]

    def open(self, overwrite: bool) -> list[int]:
        """Make the folder, and look what is there.

        Args:
            overwrite: draw all anew.

        Returns:
            The numbers of the images that are there.

        Raises:
            UsageError: the folder is a file, or holds files of these names that were drawn
                otherwise.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"--out {self.folder} is a file; give a folder") from None
        if overwrite:
            return []
        there = [i for i, name in enumerate(self.names) if (self.folder / name).exists()]
        files = len(there) + (self.folder / GRID).exists()
        of_all = f"{files} of {len(self.names) + 1} files"
        for name, i in [(self.names[i], i) for i in there] + [(GRID, None)] * (files > len(there)):
            if other := self._other(name, i):
                raise UsageError(
                    f"--out {self.folder} holds {name} already ({of_all}), {other}; give another "
                    "folder, or --overwrite"
                )
        return there

    def clear(self, numbers: Sequence[int]) -> None:
        """Remove what killed processes left of files that they were writing."""
        from k_diffusion.utils.images import clear_unfinished

        clear_unfinished(self.folder, {*(self.names[i] for i in numbers), GRID})

    def write(self, i: int, image: torch.Tensor) -> None:
        """Write one image, float in [-1, 1], shape (channels, height, width)."""
        from k_diffusion.utils.images import save_png

        save_png(self.folder / self.names[i], image, self.text(i))

    def count(self) -> int:
        """How many images are there."""
        return sum((self.folder / name).exists() for name in self.names)

    def images(self, most: int) -> torch.Tensor:
        """The first images, uint8 of shape (count, channels, height, width)."""
        import torch

        from k_diffusion.utils.images import load_png

        return torch.stack([load_png(self.folder / name)[0] for name in self.names[:most]])

    def _other(self, name: str, i: int | None) -> str:
        """In what a file differs from what would be written; nothing where it doesn't."""
        from k_diffusion.utils.images import load_png

        try:
            found: Mapping[str, str] = load_png(self.folder / name)[1]
        except (OSError, ValueError, SyntaxError):  # the last of a damaged PNG
            return "which is no image of this command"
        wanted = self.text(i)
        for key in [*wanted, *found]:
            if key in (OF_A_SET if i is None else WHERE):
                continue
            if found.get(key) != wanted.get(key):
                return f"drawn with {key} {found.get(key, 'none')}, not {wanted.get(key, 'none')}"
        return ""
