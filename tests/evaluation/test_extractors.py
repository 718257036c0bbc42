"""What extractors do to images: input, names, weights; with random weights, for want of others."""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from k_diffusion.evaluation import (
    FeatureExtractor,
    FIDInception,
    InceptionV3FeatureExtractor,
    inception,
    make_extractor,
)
from k_diffusion.evaluation.extractors import as_rgb, load_tensors, normalised, weights_sha256
from k_diffusion.evaluation.inception import (
    HALVE,
    LARGEST,
    MEAN,
    Inception,
    corner_bilinear,
    load_inception,
)


@pytest.fixture(scope="module")
def network() -> Inception:
    """Random weights, with running statistics that tell their layers apart."""
    torch.manual_seed(0)
    made = Inception()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return made.eval()


def test_as_many_weights_as_published(network: Inception) -> None:
    # Keras counts 23,851,784 in its Inception v3 (1,000 classes, no scale in its batch norms),
    # 34,432 of them running statistics: two for each channel that is normalised.
    channels = 34_432 // 2
    named = dict(network.named_parameters())
    convolutions = [p for name, p in named.items() if name.endswith("conv.weight")]
    assert len(convolutions) == 94
    assert sum(p.numel() for p in convolutions) == 23_851_784 - 3 * channels - 2049 * 1000
    assert sum(p.numel() for n, p in named.items() if n.endswith("bn.weight")) == channels
    assert network.fc.weight.shape == (1008, 2048)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-3}


def test_the_names_of_the_handed_round_weights(network: Inception) -> None:
    tops = list(dict.fromkeys(name.split(".")[0] for name in network.state_dict()))
    stem = ["1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"]
    mixed = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
    assert tops == [*(f"Conv2d_{n}" for n in stem), *(f"Mixed_{n}" for n in mixed), "fc"]
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,),
    }.items():
        assert shapes[name] == shape, name


def test_the_network_layer_by_layer(network: Inception) -> None:
    """Against its modules called one by one, as the paper's figures have them."""
    seen = dict(network.named_modules())
    x = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def run(names: str, x: Tensor) -> Tensor:
        for name in names.split():
            x = seen[name](x)
        return x

    def block(name: str, x: Tensor, *branches: str) -> list[Tensor]:
        where = [" ".join(f"Mixed_{name}.branch{b}" for b in branch.split()) for branch in branches]
        return [run(branch, x) for branch in where]

    sizes = []
    x = run("Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3", x)
    sizes.append(x.shape[-1])
    x = run("Conv2d_3b_1x1 Conv2d_4a_3x3", torch.max_pool2d(x, 3, 2))
    x = torch.max_pool2d(x, 3, 2)
    sizes.append(x.shape[-1])
    for name in ("5b", "5c", "5d"):
        parts = block(name, x, "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
        x = torch.cat([*parts, run(f"Mixed_{name}.branch_pool", MEAN(x))], 1)
    parts = block("6a", x, "3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
    x = torch.cat([*parts, torch.max_pool2d(x, 3, 2)], 1)
    sizes.append(x.shape[-1])
    for name in ("6b", "6c", "6d", "6e"):
        double = " ".join(f"7x7dbl_{i}" for i in range(1, 6))
        parts = block(name, x, "1x1", "7x7_1 7x7_2 7x7_3", double)
        x = torch.cat([*parts, run(f"Mixed_{name}.branch_pool", MEAN(x))], 1)
    parts = block("7a", x, "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
    x = torch.cat([*parts, torch.max_pool2d(x, 3, 2)], 1)
    sizes.append(x.shape[-1])
    for name, pool in (("7b", MEAN), ("7c", LARGEST)):
        three, double = "3x3_1", "3x3dbl_1 3x3dbl_2"
        parts = block(
            name, x, "1x1", f"{three} 3x3_2a", f"{three} 3x3_2b",
            f"{double} 3x3dbl_3a", f"{double} 3x3dbl_3b",
        )  # fmt: skip
        x = torch.cat([*parts, run(f"Mixed_{name}.branch_pool", pool(x))], 1)
    assert sizes == [147, 35, 17, 8]
    assert x.shape == (1, 2048, 8, 8)
    start = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, wanted = network(start), x.mean((2, 3))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_pools() -> None:
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0, 0] = 36
    assert MEAN(x)[0, 0].tolist() == [[9, 6, 0], [6, 4, 0], [0, 0, 0]]  # padding does not count
    assert LARGEST(x)[0, 0].tolist() == [[36, 36, 0], [36, 36, 0], [0, 0, 0]]
    assert HALVE(x).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(9, 7), (5, 12), (3, 3), (2, 4)])
def test_tensorflows_bilinear_one_pixel_at_a_time(size: tuple[int, int]) -> None:
    given = (4, 5)
    image = torch.rand(1, 2, *given, dtype=torch.float64, generator=torch.Generator())
    found = corner_bilinear(image, size)
    wanted = np.zeros((2, *size))
    for y, x in itertools.product(*map(range, size)):
        place = [i * n / w for i, n, w in zip((y, x), given, size, strict=True)]
        low = [int(p) for p in place]
        for dy, dx in itertools.product((0, 1), (0, 1)):
            share = [
                p - k if d else 1 - p + k for p, k, d in zip(place, low, (dy, dx), strict=True)
            ]
            at = [min(k + d, n - 1) for k, d, n in zip(low, (dy, dx), given, strict=True)]
            wanted[:, y, x] += share[0] * share[1] * image[0, :, at[0], at[1]].numpy()
    assert np.abs(found[0].numpy() - wanted).max() < 1e-12


def test_inceptions_two_inputs(network: Inception) -> None:
    published = FIDInception(network=network)
    established = InceptionV3FeatureExtractor.__new__(InceptionV3FeatureExtractor)
    nn.Module.__init__(established)
    grey = torch.tensor([[-1.5, -1.0], [0.0, 1.0]])[None, None]
    brought = published.bring(grey)
    assert brought.shape == (1, 3, 299, 299)
    # Bytes 0 and 128 (127.5, rounded to even) and 255, by (bytes - 128) / 128.
    corners = [brought[0, 0, y, x] for y, x in ((0, 0), (298, 0), (298, 298))]
    assert [float(c) for c in corners] == [-1, 0, 127 / 128]
    assert torch.equal(brought[:, 0], brought[:, 2])
    bicubic = established.bring(grey)
    assert float(bicubic.min()) == -1
    assert abs(float(bicubic[0, 0, 298, 298]) - 127 / 128) < 0.02
    whole = torch.full((1, 1, 299, 299), 0.1234)
    assert float(published.bring(whole).unique()) == (round((0.1234 + 1) * 127.5) - 128) / 128
    plain = float(established.bring(whole).unique())
    assert abs(plain - (1.1234 * 127.5 - 128) / 128) < 1e-6


def test_inception_as_an_extractor(network: Inception, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    kept = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "weights.safetensors")
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator()) * 2 - 1
    wanted = FIDInception(network=network)(images)
    assert wanted.shape == (3, 2048)
    for name in ("weights.pth", "weights.safetensors"):
        extractor = make_extractor("inception", weights=tmp_path / name)
        assert torch.equal(extractor(images), wanted)
        assert extractor.facts()["name"] == "inception"
        assert not any(p.requires_grad for p in extractor.parameters())
        assert not extractor.train().training
    alone = extractor(images[1:2])
    assert (alone - wanted[1:2]).abs().max() < 1e-3 * wanted.abs().max()


def test_weights_are_fetched_once_and_checked(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away" / "pt_inception.pth"
    away.parent.mkdir()
    torch.save(network.state_dict(), away)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "URL", away.as_uri())
    with pytest.raises(ValueError, match="but should begin with 6726825d: delete it"):
        load_inception()
    digest = hashlib.sha256(away.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "SHA256_BEGINS", digest[:8])
    away.unlink()
    fetched = load_inception()
    assert torch.equal(fetched.fc.weight, network.fc.weight)
    (tmp_path / "cache/k-diffusion/pt_inception.pth").unlink()
    with pytest.raises(OSError, match=r"cannot be fetched from file:.*: give a local copy, or use"):
        load_inception()


def test_weights_that_do_not_fit(network: Inception, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = {n: t for n, t in network.state_dict().items() if n != "fc.bias"}
    save_file(state, path)
    with pytest.raises(ValueError, match=r"the file lacks fc\.bias \(1 of 566 names\)"):
        load_inception(path)
    save_file({**state, "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=r"has another shape of fc\.bias"):
        load_inception(path)
    save_file({**state, "fc.bias": torch.zeros(1008), "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"also has more"):
        load_inception(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"w\.safetensors cannot be read"):
        load_inception(path)
    with pytest.raises(ValueError, match="missing"):
        load_tensors(tmp_path / "none.pth")
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth cannot be read: it is damaged, or holds more"):
        load_tensors(tmp_path / "code.pth")
    with zipfile.ZipFile(tmp_path / "inception-2015-12-05.pt", "w") as program:  # as TorchScript's
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"inception/{name}", b"")
    with pytest.raises(ValueError, match="it is a program of TorchScript, which is not run: give"):
        load_tensors(tmp_path / "inception-2015-12-05.pt")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_tensors(tmp_path / "list.pth")


def test_channels() -> None:
    grey = torch.tensor([0.5])[None, :, None, None]
    assert as_rgb(grey).flatten().tolist() == [0.5] * 3
    clear = torch.tensor([0.5, -0.5, 0.0, -1.0])[None, :, None, None]
    assert as_rgb(clear).flatten().tolist() == [1, 1, 1]
    half = torch.tensor([-1.0, 0.0])[None, :, None, None]
    assert as_rgb(half).flatten().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="1 to 4 channels"):
        as_rgb(torch.zeros(1, 5, 2, 2))
    found = normalised(
        torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None], (0, 0.5, 0.5), (1, 1, 2)
    )
    assert found.flatten().tolist() == [0, 0, 0.25]


def test_a_hash_of_names_shapes_and_values() -> None:
    one = nn.Linear(2, 3)
    before = weights_sha256(one)
    assert before == weights_sha256(one) and len(before) == 64  # noqa: PT018
    with torch.no_grad():
        one.bias[0] += 1
    assert weights_sha256(one) != before


def test_unknown_extractors() -> None:
    with pytest.raises(ValueError, match="did you mean 'inception'|inception"):
        make_extractor("inceptoin")


def test_features_have_no_gradient_and_all_their_digits() -> None:
    class Seen(FeatureExtractor):
        def forward(self, images: Tensor) -> Tensor:
            found = (torch.backends.cudnn, torch.backends.cuda.matmul)
            assert not any(place.allow_tf32 for place in found)
            assert not torch.is_grad_enabled()
            return images

    before = torch.backends.cudnn.allow_tf32
    Seen()(torch.zeros(1))
    assert torch.backends.cudnn.allow_tf32 == before
