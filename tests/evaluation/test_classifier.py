"""The small classifier."""

import pytest
import torch

from k_diffusion.evaluation import classify, share_of, train_classifier
from k_diffusion.evaluation.classifier import _moved


def digits() -> tuple[torch.Tensor, ...]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(5))
    held, rest = order[:360], order[360:]
    return images[rest], labels[rest], images[held], labels[held]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_tells_held_out_digits_apart() -> None:
    images, labels, held, held_labels = digits()
    model = train_classifier(images, labels, epochs=12)
    assert not model.training
    found, features = classify(model, held)
    assert share_of(found, held_labels) >= 0.97
    assert features.shape == (360, 96)
    assert torch.equal(model.head(features).argmax(1), found)
    alone, its = classify(model, held[:1])
    assert (its - features[:1]).abs().max() < 1e-4
    assert alone == found[:1]


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    images, labels, *_ = digits()
    before = torch.get_rng_state()
    first, second, other = (
        train_classifier(images[:96], labels[:96], epochs=1, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_last_batch_of_one_image_trains() -> None:
    images, labels, *_ = digits()
    train_classifier(images[:9], labels[:9], epochs=1, batch_size=4)


def test_each_image_moves_by_its_own_whole_pixels() -> None:
    image = torch.zeros(200, 2, 5, 5)
    image[:, 0, 2, 2] = 1
    image[:, 1, 1, 2] = 1
    moved = _moved(image, 1, torch.Generator().manual_seed(0))
    spots = {(int(y), int(x)) for y, x in (plane.nonzero()[0] for plane in moved[:, 0])}
    assert spots == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    for plane in moved:  # both channels move together
        assert (plane[0].nonzero()[0] - plane[1].nonzero()[0]).tolist() == [1, 0]
    assert torch.equal(_moved(image, 0, torch.Generator()), image)


def test_the_edge_is_repeated() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(60, 1, 3, 3)
    moved = _moved(image, 1, torch.Generator().manual_seed(0))
    up_left = torch.tensor([[0.0, 0, 1], [0, 0, 1], [3, 3, 4]])
    assert any(torch.equal(plane[0], up_left) for plane in moved)


def test_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(4,\)"):
        train_classifier(torch.zeros(5, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="differ"):
        share_of(torch.zeros(3), torch.zeros(4))
