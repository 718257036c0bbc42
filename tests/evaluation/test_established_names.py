"""The established functions: signatures, definitions, gradients."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import k_diffusion as K

SIGNATURES = {
    "compute_features": "accelerator, sample_fn, extractor_fn, n, batch_size",
    "fid": "x, y, eps=1e-08",
    "kid": "x, y, max_size=5000",
    "polynomial_kernel": "x, y",
    "sqrtm_eig": "a",
    "squared_mmd": "x, y, kernel",
    "InceptionV3FeatureExtractor": "device='cpu'",
    "CLIPFeatureExtractor": "name='ViT-B/16', device='cpu'",
    "DINOv2FeatureExtractor": "name='vitl14', device='cpu'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    found = inspect.signature(getattr(K.evaluation, name)).parameters.values()
    told = []
    for parameter in found:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue  # ours, beside the established ones
        plain = parameter.default is parameter.empty or callable(parameter.default)
        told.append(parameter.name + ("" if plain else f"={parameter.default!r}"))
    assert ", ".join(told) == SIGNATURES[name]


def spd(size: int, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size)


def test_square_roots_and_their_gradients() -> None:
    a = spd(5, 0, (2, 3))
    root = K.evaluation.sqrtm_eig(a)
    for one, other in zip(a.flatten(0, 1), root.flatten(0, 1), strict=True):
        assert np.abs(scipy.linalg.sqrtm(one.numpy()) - other.numpy()).max() < 1e-10

    def symmetric(x: Tensor) -> Tensor:
        return K.evaluation.sqrtm_eig((x + x.mT) / 2)

    assert torch.autograd.gradcheck(symmetric, spd(4, 1).requires_grad_())
    for wrong in (torch.zeros(3), torch.zeros(2, 3)):
        with pytest.raises(RuntimeError, match="square matrices"):
            K.evaluation.sqrtm_eig(wrong)


def test_fid_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(80, 4, generator=generator, dtype=torch.float64) * 1.4 + 0.3
    found = K.evaluation.fid(x, y)
    assert found.shape == ()
    assert abs(float(found) - K.evaluation.frechet_distance(x, y)) < 1e-6
    assert torch.autograd.gradcheck(lambda z: K.evaluation.fid(z, y), x[:8].requires_grad_())


def test_kid_has_a_gradient_and_its_inputs_dtype() -> None:
    x, y = torch.randn(30, 4, requires_grad=True), torch.randn(20, 4)
    found = K.evaluation.kid(x, y, max_size=10)
    assert found.dtype == torch.float32
    found.backward()
    assert x.grad is not None and x.grad.abs().sum() > 0  # noqa: PT018


class Accelerator:
    """One of two processes, the other of which gives the same, negative."""

    num_processes, is_main_process = 2, False

    @staticmethod
    def gather(rows: Tensor) -> Tensor:
        return torch.cat([rows, -rows])


def test_compute_features() -> None:
    asked = []

    def sample(count: int) -> Tensor:
        asked.append(count)
        return torch.full((count, 1), float(len(asked)))

    found = K.evaluation.compute_features(Accelerator, sample, lambda x: x * 10, 9, 2)
    assert asked == [2, 2, 1]  # five of its own
    assert found.flatten().tolist() == [10, 10, -10, -10, 20, 20, -20, -20, 30]

    def ends(count: int) -> Tensor:
        if len(asked) == 5:
            raise StopIteration
        return sample(count)

    found = K.evaluation.compute_features(Accelerator, ends, lambda x: x, 100, 2)
    assert len(found) == 8


def test_compute_features_refuses() -> None:
    def none(count: int) -> Any:
        raise StopIteration

    with pytest.raises(ValueError, match="sample_fn gave no sample"):
        K.evaluation.compute_features(Accelerator, none, lambda x: x, 4, 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        K.evaluation.compute_features(Accelerator, none, lambda x: x, 4, 0)
