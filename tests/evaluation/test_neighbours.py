"""Nearest neighbours on points whose distances are known."""

import pytest
import torch

from k_diffusion.evaluation import memorisation, memorised_share, nearest, nearest_other

LINE = torch.tensor([0.0, 1.0, 3.0, 7.0])[:, None, None, None]


def test_nearest_names_the_reference_and_the_distance() -> None:
    queries = torch.tensor([0.4, 6.0, 2.5])[:, None, None, None]
    distance, index = nearest(queries, LINE, chunk=2)
    assert index.tolist() == [0, 3, 2]
    assert (distance - torch.tensor([0.4, 1.0, 0.5])).abs().max() < 1e-7


def test_near_neighbours_far_from_the_origin_keep_their_digits() -> None:
    # |a|^2 + |b|^2 - 2ab would lose all digits here.
    references = torch.full((30, 64), 1e4, dtype=torch.float64)
    distance, _ = nearest(references[:30] + 1e-5, references)
    assert (distance - 8e-5).abs().max() < 1e-10


def test_an_image_is_not_its_own_neighbour() -> None:
    for chunk in (1, 3, 256):
        assert nearest_other(LINE, chunk=chunk).tolist() == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("sample", "counts"),
    [
        (7.0, True),  # a copy
        (10.9, True),  # 3.9 from 7, whose own neighbour is 4 away
        (11.1, False),
        (0.5 - 0.51, True),
        (-1.1, False),  # 0's neighbour is 1 away
        (4.5, True),  # nearest is 3, at 1.5, whose neighbour is 2 away
        (5.0, False),  # at exactly 2 from 3: no nearer than real images are
    ],
)
def test_memorised_is_nearer_than_the_real_neighbour(sample: float, counts: bool) -> None:
    assert memorised_share(torch.tensor([[[[sample]]]]), LINE) == float(counts)


def test_a_copy_of_a_doubled_training_image_counts() -> None:
    training = torch.tensor([0.0, 0.0, 5.0])[:, None]
    assert memorised_share(torch.tensor([[0.0], [0.1]]), training) == 0.5


def test_the_pairs_behind_the_share() -> None:
    samples = torch.tensor([4.5, 7.0, 20.0, 0.1])[:, None, None, None]
    found = memorisation(samples, LINE, chunk=3)
    assert found.nearest.tolist() == [2, 3, 3, 0]
    assert found.other.tolist() == [1, 2, 2, 1]
    wanted = torch.tensor([1.5 / 2, 0, 13 / 4, 0.1])
    assert (found.ratio - wanted).abs().max() < 1e-6
    assert found.closest(3).tolist() == [1, 3, 0]
    assert found.share == 0.75
    doubled = memorisation(torch.tensor([[0.0], [0.1]]), torch.tensor([[0.0], [0.0], [5.0]]))
    assert doubled.ratio.tolist() == [0, torch.inf]


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="queries of 2 values"):
        nearest(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="1 images have no other"):
        nearest_other(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="0 samples"):
        memorised_share(torch.zeros(0, 2), torch.zeros(3, 2))
