"""Inception v3 as the Frechet Inception Distance has it: the graph of 2015-12-05, 1008 classes.

The modules carry the names under which its weights are handed round (`pt_inception-2015-12-05`),
but the network itself is laid out in a table. It differs from the one trained later for torch in
its mean pooling, which leaves padding out, and in the last block, which pools by the maximum.

Source: Szegedy et al. 2016, arXiv:1512.00567, table 1; as a measure: Heusel et al. 2017,
arXiv:1706.08500.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from k_diffusion.evaluation.extractors import (
    FeatureExtractor,
    antialiased,
    as_rgb,
    cache_folder,
    load_tensors,
)
from k_diffusion.utils.files import download_file
from k_diffusion.utils.words import reason_of

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256_BEGINS = "6726825d"
SIZE = (299, 299)
CLASSES = 1008

Pool = Callable[[Tensor], Tensor]
MEAN: Pool = functools.partial(
    functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
LARGEST: Pool = functools.partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE: Pool = functools.partial(functional.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU.

    Args:
        inputs, outputs: channels.
        kernel: height and width.
        stride: of both.
        pad: zeros around, so that at stride 1 the size stays.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


Step = tuple[str, int, int, int]
"""Of a branch: name, channels, height and width of the kernel."""
Branch = Sequence[Step]


class Mixed(nn.Module):
    """Branches side by side, whose outputs are stacked as channels.

    Args:
        inputs: channels.
        branches: of convolutions, one after the other. Those whose names end in "a" and "b" both
            take what came before them, and are stacked.
        pool: what the last output is made of.
        pooled: channels of a 1 x 1 convolution after the pool; 0: none, and the last convolution of
            each branch halves the size as the pool does.

    Attributes:
        outputs: channels.
    """

    def __init__(self, inputs: int, branches: Sequence[Branch], pool: Pool, pooled: int) -> None:
        super().__init__()
        self.branches, self.pool, self.pooled = branches, pool, pooled
        self.outputs = pooled or inputs
        for branch in branches:
            width = inputs
            for place, (name, outputs, height, breadth) in enumerate(branch):
                halve = not pooled and place == len(branch) - 1
                conv = Conv(width, outputs, (height, breadth), 2 if halve else 1, pad=not halve)
                self.add_module(f"branch{name}", conv)
                if not name.endswith("a"):
                    width = outputs
            forked = len(branch) > 1 and branch[-1][0].endswith("b")
            self.outputs += 2 * width if forked else width
        if pooled:
            self.branch_pool = Conv(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y = x
            for name, *_ in branch:
                conv = getattr(self, f"branch{name}")
                if name.endswith("a"):
                    found.append(conv(y))
                else:
                    y = conv(y)
            found.append(y)
        y = self.pool(x)
        return torch.cat([*found, self.branch_pool(y) if self.pooled else y], 1)


def _double(first: int, middle: int, last: int) -> Branch:
    """Two 3 x 3 convolutions in place of one of 5 x 5."""
    return [("3x3dbl_1", first, 1, 1), ("3x3dbl_2", middle, 3, 3), ("3x3dbl_3", last, 3, 3)]


def _sevens(width: int) -> list[Branch]:
    """7 x 7, cut into rows and columns, once and twice."""
    return [
        [("1x1", 192, 1, 1)],
        [("7x7_1", width, 1, 1), ("7x7_2", width, 1, 7), ("7x7_3", 192, 7, 1)],
        [
            ("7x7dbl_1", width, 1, 1), ("7x7dbl_2", width, 7, 1), ("7x7dbl_3", width, 1, 7),
            ("7x7dbl_4", width, 7, 1), ("7x7dbl_5", 192, 1, 7),
        ],
    ]  # fmt: skip


_FIVES = [[("1x1", 64, 1, 1)], [("5x5_1", 48, 1, 1), ("5x5_2", 64, 5, 5)], _double(64, 96, 96)]
_FORKS = [
    [("1x1", 320, 1, 1)],
    [("3x3_1", 384, 1, 1), ("3x3_2a", 384, 1, 3), ("3x3_2b", 384, 3, 1)],
    [
        ("3x3dbl_1", 448, 1, 1), ("3x3dbl_2", 384, 3, 3),
        ("3x3dbl_3a", 384, 1, 3), ("3x3dbl_3b", 384, 3, 1),
    ],
]  # fmt: skip
_NARROWING = [
    [("3x3_1", 192, 1, 1), ("3x3_2", 320, 3, 3)],
    [
        ("7x7x3_1", 192, 1, 1), ("7x7x3_2", 192, 1, 7), ("7x7x3_3", 192, 7, 1),
        ("7x7x3_4", 192, 3, 3),
    ],
]  # fmt: skip
MIXED: tuple[tuple[str, Sequence[Branch], Pool, int], ...] = (
    ("5b", _FIVES, MEAN, 32),
    ("5c", _FIVES, MEAN, 64),
    ("5d", _FIVES, MEAN, 64),
    ("6a", [[("3x3", 384, 3, 3)], _double(64, 96, 96)], HALVE, 0),
    ("6b", _sevens(128), MEAN, 192),
    ("6c", _sevens(160), MEAN, 192),
    ("6d", _sevens(160), MEAN, 192),
    ("6e", _sevens(192), MEAN, 192),
    ("7a", _NARROWING, HALVE, 0),
    ("7b", _FORKS, MEAN, 192),
    ("7c", _FORKS, LARGEST, 192),
)


class Inception(nn.Module):
    """The network: (B, 3, 299, 299), values from -1 to 1, to 2048 features, shape (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), pad=False)
        width = 192
        for name, branches, pool, pooled in MIXED:
            block = Mixed(width, branches, pool, pooled)
            self.add_module(f"Mixed_{name}", block)
            width = block.outputs
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = HALVE(x)
        x = HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, *_ in MIXED:
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


def load_inception(weights: str | Path = "") -> Inception:
    """The network with the weights of a file.

    Args:
        weights: a state dict, .safetensors or of torch, in the layout of
            `pt_inception-2015-12-05`; "": that file, fetched into the cache once.

    Raises:
        ValueError: the file is missing, damaged or has other names or shapes.
        OSError: it cannot be fetched.
    """
    tensors = load_tensors(weights or _fetched())
    network = Inception()
    wanted = network.state_dict()
    _check_layout(weights, tensors, wanted)
    network.load_state_dict({**wanted, **tensors})
    return network


def check_inception(weights: str | Path) -> None:
    """Refuse a file that `load_inception` would refuse, without reading the weights in it.

    Raises:
        ValueError: the file is missing, damaged or has other names or shapes.
    """
    with torch.device("meta"):
        wanted = Inception().state_dict()
    _check_layout(weights, load_tensors(weights, "meta"), wanted)


def _check_layout(
    weights: str | Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    # Counters of batches are in some copies of the file, and unused here.
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - tensors.keys() - counters)
    over = sorted(tensors.keys() - wanted.keys())
    wrong = [n for n in wanted.keys() & tensors.keys() if tensors[n].shape != wanted[n].shape]
    for what, names in (("lacks", missing), ("also has", over), ("has another shape of", wrong)):
        if names:
            raise ValueError(
                f"weights {weights} are not Inception's of 2015-12-05: the file {what} "
                f"{sorted(names)[0]} ({len(names)} of {len(wanted)} names)"
            )


def usual_file() -> Path:
    """Where the usual weights are kept, once they are fetched."""
    return cache_folder() / Path(URL).name


def _fetched() -> Path:
    path = usual_file()
    try:
        download_file(path, URL)
    except OSError as error:
        reason = reason_of(error)
        raise OSError(
            f"Inception's weights cannot be fetched from {URL} ({reason}): give a local copy, or "
            "use another extractor"
        ) from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(SHA256_BEGINS):
        raise ValueError(
            f"{path} has the sha256 {found[:12]}..., but should begin with {SHA256_BEGINS}: delete "
            "it to fetch it again"
        )
    return path


def corner_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing as TensorFlow 1 did it: pixel i of n lies at i / n, without antialiasing.

    The last pixels repeat the edge. Where the size grows it is half a pixel off the usual one;
    FID's figures were made with it.

    Args:
        images: shape (B, C, H, W).
        size: height and width.
    """
    for axis, wanted in ((2, size[0]), (3, size[1])):
        given = images.shape[axis]
        place = torch.arange(wanted, device=images.device, dtype=images.dtype) * (given / wanted)
        low = place.floor().long().clamp(max=given - 1)
        high = (low + 1).clamp(max=given - 1)
        share = (place - low).view([-1 if a == axis else 1 for a in range(4)])
        lower, upper = images.index_select(axis, low), images.index_select(axis, high)
        images = lower + (upper - lower) * share
    return images


class FIDInception(FeatureExtractor):
    """Inception's features with the input of the published FID: whole bytes, TensorFlow 1's
    bilinear resizing to 299 x 299, then (bytes - 128) / 128.

    Args:
        device: where it computes.
        weights: see `load_inception`.
        network: taken instead of loading one.

    Source: Heusel et al. 2017, arXiv:1706.08500, and the graph of 2015-12-05 that it used.
    """

    name = "inception"
    input = "RGB, rounded to bytes, TensorFlow 1's bilinear to 299 x 299, (bytes - 128) / 128"
    size = SIZE

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        weights: str | Path = "",
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = load_inception(weights) if network is None else network
        self.frozen(device)

    def bring(self, images: Tensor) -> Tensor:
        """What the network is given, shape (B, 3, 299, 299)."""
        pixels = ((as_rgb(images).float() + 1) * 127.5).round().clamp(0, 255)
        return (corner_bilinear(pixels, SIZE) - 128) / 128

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(self.bring(images)).float()
        return features


class InceptionV3FeatureExtractor(FIDInception):
    """Inception's features with the input of the established class: bicubic, antialiased, to 299 x
    299, then cut off at 0 and 255, not rounded. Its figures differ from the published FID's.

    Args: see `FIDInception`.
    """

    name = "inception_antialiased"
    input = "RGB, antialiased bicubic to 299 x 299, cut off to bytes' range, (bytes - 128) / 128"

    def bring(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], shape (B, C, H, W), as the network takes them, (B, 3, 299, 299)."""
        pixels = (antialiased(as_rgb(images).float(), SIZE) * 127.5 + 127.5).clamp(0, 255)
        return (pixels - 128) / 128
