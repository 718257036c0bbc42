"""A folder of images as a torch data set, under its established name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import Dataset

from k_diffusion.utils.words import reason_of


class FolderOfImages(Dataset):
    """All images in a folder and the folders in it, without classes.

    Args:
        root: the folder. Its images are in the sorted order of their paths.
        transform: applied to each Pillow image in mode RGB; None: none.

    Item i is the tuple (transform(image),).

    Raises:
        NotADirectoryError: there is no such folder.
        OSError: on access: an image cannot be decoded; the error names it.
    """

    IMG_EXTENSIONS: ClassVar[set[str]] = {
        ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
    }  # fmt: skip

    def __init__(self, root: Path | str, transform: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.root = Path(root)
        if not self.root.is_dir():
            raise NotADirectoryError(f"there is no folder of images {self.root}")
        self.transform = nn.Identity() if transform is None else transform
        self.paths = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        self.paths = sorted(filter(self._holds_image, self.paths))

    def _holds_image(self, path: Path) -> bool:
        known = path.suffix.lower() in self.IMG_EXTENSIONS
        return known and path.is_file()

    def __repr__(self) -> str:
        told = f'root="{self.root}", len: {len(self)}'
        return f"FolderOfImages({told})"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int) -> tuple[Any]:
        from PIL import Image

        path = self.paths[key]
        with open(path, "rb") as file:
            try:
                image = Image.open(file).convert("RGB")
            except Exception as error:  # a decoder may raise anything on a broken file
                reason = reason_of(error)
                raise OSError(f"image {path} cannot be decoded: {reason}") from error
        return (self.transform(image),)
