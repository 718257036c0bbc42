"""The section of a run's config that says where the images come from, of each kind of data."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from k_diffusion.training.sections import Amount, Count, StrictConfig, from_list


class DigitsConfig(StrictConfig):
    """The handwritten digits that come with scikit-learn: 1 x 8 x 8, ten classes."""

    source: Literal["digits"] = Field(default="digits", description="Which kind of data this is.")
    split: Literal["train", "test", "all"] = Field(
        default="train", description="Four fifths of each class, the other fifth, or all of them."
    )
    split_seed: Amount = Field(default=0, description="Decides which images are held out.")


def _pair(value: Any) -> Any:
    one = isinstance(value, int) and not isinstance(value, bool)
    return (value, value) if one else from_list(value)


class _PicturesConfig(StrictConfig):
    """What picture files have in common."""

    # First, as in every kind of data: it tells them apart.
    source: str = Field(default="", description="Which kind of data this is.")
    path: str = Field(description="The folder; or the zip or tar, or a folder of these.")
    size: Annotated[tuple[Count, Count], BeforeValidator(_pair)] = Field(
        description="Height and width in pixels that training sees; one number: a square."
    )
    channels: Literal[1, 3, 4] = Field(default=3, description="1: grey, 3: RGB, 4: RGB and alpha.")
    crop: Literal["center", "random"] = Field(
        default="center", description="Which part is taken of an image that is not of that shape."
    )
    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    classes: Literal["auto", "folders", "none"] = Field(
        default="auto",
        description="Whether folders are classes; auto: where there are any with images.",
    )
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        default=89_478_485, description="Files with more pixels count as broken."
    )
    bits: Literal[8, 16] = Field(
        default=8, description="16: keep what a file has beyond 8 bits a channel."
    )
    captions: Literal["none", "files", "metadata"] = Field(
        default="none",
        description="What a text conditioner reads; files: x.txt beside x.png; metadata: "
        "metadata.jsonl or metadata.csv with file_name and the caption (webdataset: its .json; "
        "huggingface: its column). A picture without its caption counts as broken.",
    )
    caption_key: str = Field(
        default="text", description="The column of the table, or the key, that is the caption."
    )
    buckets: Annotated[
        tuple[Annotated[tuple[Count, Count], BeforeValidator(from_list)], ...],
        BeforeValidator(from_list),
    ] = Field(
        default=(),
        description="Further sizes (height, width), as in [[48, 80], [80, 48]]: each image is "
        "taken at the one of these and size whose shape is nearest; a batch has one size.",
    )


class FolderConfig(_PicturesConfig):
    """A folder of images, or of one folder a class."""

    source: Literal["folder"] = Field(default="folder", description="Which kind of data this is.")


class ArchiveConfig(_PicturesConfig):
    """Images in a zip or an uncompressed tar, read where they lie; or a folder of such shards."""

    source: Literal["archive"] = Field(default="archive", description="Which kind of data this is.")


class ArraysConfig(StrictConfig):
    """Images, sounds or videos in a .npy or .npz file, read where they lie on disk."""

    source: Literal["arrays"] = Field(default="arrays", description="Which kind of data this is.")
    path: str = Field(description="The .npy or .npz file.")
    holds: Literal["images", "sounds", "videos"] = Field(
        default="images",
        description="images: (N, H, W, C), (N, C, H, W) or (N, H, W); sounds: (N, L, C), (N, C, L) "
        "or (N, L); videos: (N, D, H, W, C), (N, C, D, H, W) or (N, D, H, W).",
    )
    layout: Literal["auto", "channels_first", "channels_last"] = Field(
        default="auto",
        description="auto: the channels' axis is the one of these two that has at most 4 entries.",
    )
    key: str = Field(default="images", description="Which array of a .npz with several.")
    label_key: str = Field(
        default="auto",
        description="Which array of a .npz is the classes, as numbers or one-hot rows; auto: "
        'labels, where there is one; "": none.',
    )
    class_names: Annotated[tuple[str, ...], BeforeValidator(from_list)] = Field(
        default=(), description="One name a class; left out: their numbers."
    )
    value_range: Annotated[tuple[float, float], BeforeValidator(from_list)] | None = Field(
        default=None,
        description="The values of black and white, such as [0, 1]; none: whole numbers use all of "
        "their type's range, floats are in [-1, 1] or of no such range.",
    )
    flip: bool = Field(default=False, description="Mirror half of the samples left to right.")


class WebDatasetConfig(_PicturesConfig):
    """Images in WebDataset's tar shards, read by their places; their order is ours."""

    source: Literal["webdataset"] = Field(
        default="webdataset", description="Which kind of data this is."
    )
    path: str = Field(description="A tar, a folder of tars, or several: shards/{00000..00009}.tar.")
    class_names: Annotated[tuple[str, ...], BeforeValidator(from_list)] = Field(
        default=(), description="One name a class; left out: the numbers in .cls."
    )


class HuggingFaceConfig(_PicturesConfig):
    """Images of a Hugging Face data set; needs the datasets package."""

    source: Literal["huggingface"] = Field(
        default="huggingface", description="Which kind of data this is."
    )
    path: str = Field(
        description="A folder that save_to_disk wrote, one of parquet files, or an id on the hub."
    )
    name: str = Field(default="", description="Of the configuration, where there are several.")
    split: str = Field(default="train", description="Such as train, or train[:1000].")
    revision: str = Field(default="", description='A branch, tag or commit on the hub; "": main.')
    image_key: str = Field(default="image", description="The column of the pictures.")
    label_key: str = Field(
        default="auto",
        description='The column of the classes; auto: label or labels, if there is one; "": none.',
    )


class LatentsConfig(StrictConfig):
    """Latents that `k-diffusion encode` wrote."""

    source: Literal["latents"] = Field(default="latents", description="Which kind of data this is.")
    path: str = Field(description="The folder of latents.")
    draw: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Whether each step draws a latent by its mean and variance, or takes the mean; "
        "auto: draws where there is a variance.",
    )


DataConfig = Annotated[
    DigitsConfig
    | FolderConfig
    | ArchiveConfig
    | ArraysConfig
    | WebDatasetConfig
    | HuggingFaceConfig
    | LatentsConfig,
    Field(discriminator="source"),
]

KINDS: dict[str, type[StrictConfig]] = {
    kind.model_fields["source"].default: kind for kind in get_args(get_args(DataConfig)[0])
}
"""Kind of data, as in data.source -> its table."""

_ARCHIVES, _ARRAYS = (".zip", ".tar"), (".npy", ".npz")
_HUB = "hf:"
_LOOKED_AT = 64
"""Files of a tar by which it is told whether it is laid out as WebDataset does."""


def guess_data(given: str) -> dict[str, str]:
    """The kind of data that a word of the command line means, and its path.

    Args:
        given: "digits"; hf:OWNER/NAME, of a data set on the hub; or a file, a folder, or several
            shards with braces, which is looked at.
    """
    if given == "digits":
        return {"source": "digits"}
    if given.startswith(_HUB):
        return {"source": "huggingface", "path": given.removeprefix(_HUB)}
    return {"source": _kind_of(Path(given)), "path": given}


def _kind_of(path: Path) -> str:
    if "{" in str(path):
        return "webdataset"
    if path.suffix.lower() in _ARRAYS:
        return "arrays"
    if path.suffix.lower() in _ARCHIVES:
        return "webdataset" if _is_webdataset(path) else "archive"
    if not path.is_dir():
        return "folder"
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if names & {"latents.json", "encode.json"}:
        return "latents"
    if names & {"dataset_dict.json", "state.json"}:
        return "huggingface"
    if names and all(Path(name).suffix.lower() in _ARCHIVES for name in names):
        return "webdataset" if _is_webdataset(path / min(names)) else "archive"
    return "folder"


def _is_webdataset(path: Path) -> bool:
    """Whether a tar has the numbers of classes, or JSON, beside its pictures."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for member, _ in zip(archive, range(_LOOKED_AT), strict=False)]
    except (tarfile.TarError, OSError):
        return False  # a zip, or what its source will refuse with a better reason
    stems = {name.rpartition("/")[2].partition(".")[2].lower() for name in names}
    return "cls" in stems or ("json" in stems and len(stems) > 1)


def kept_keys(own: Any, source: str) -> dict[str, Any]:
    """What of a data section has a meaning for data of another kind, too."""
    mine = KINDS.get(str(own.get("source"))) if isinstance(own, Mapping) else None
    if mine is None or own["source"] == source:
        return dict(own) if mine is not None else {}
    if not (issubclass(mine, _PicturesConfig) and issubclass(KINDS[source], _PicturesConfig)):
        return {}  # it gives way as a whole
    return {key: value for key, value in own.items() if key in _PicturesConfig.model_fields}
