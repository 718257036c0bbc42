import copy
import math
import pickle
from decimal import Context, Decimal

import pytest
import torch

from k_diffusion.utils.levels import FLOW, PATHS, VE, VP, Level, Levels, make_path


@pytest.mark.parametrize("path", PATHS.values(), ids=str)
def test_paths_keep_log_snr_to_full_precision(path):
    for k in range(-80, 81):
        snr = k / 8
        level = path.at(snr)
        assert abs(level.half_log_snr - snr) <= 1e-14
        assert abs(path.sigma(snr) / level.sigma - 1) <= 1e-14
        assert abs(level.ratio * math.exp(snr) - 1) <= 1e-14
        assert abs(path.alpha(level.sigma) - level.alpha) <= 1e-9
        tensor = path.sigma(torch.tensor([snr], dtype=torch.float64))
        assert abs(tensor.item() - level.sigma) <= 1e-14 * max(1, level.sigma)
        assert abs(path.alpha(tensor).item() - level.alpha) <= 1e-9


def test_definitions_of_the_paths():
    assert VE.at(-math.log(3.0)) == Level(1.0, pytest.approx(3.0, rel=1e-15))
    for level in (VP.at(v) for v in (-9.0, -1.0, 0.0, 4.0)):
        assert abs(level.alpha**2 + level.sigma**2 - 1) <= 1e-15
    for level in (FLOW.at(v) for v in (-9.0, -1.0, 0.0, 4.0)):
        assert abs(level.alpha + level.sigma - 1) <= 1e-15


def test_ends_are_exact():
    for path in (VP, FLOW):
        assert path.at(-math.inf) == Level(0.0, 1.0)
        assert path.at(math.inf) == Level(1.0, 0.0)
    assert VE.at(math.inf) == Level(1.0, 0.0)
    with pytest.raises(ValueError, match="pure noise .* variance-exploding"):
        VE.at(-math.inf)
    assert Level(0.0, 1.0).half_log_snr == -math.inf
    assert Level(1.0, 0.0).half_log_snr == math.inf


def test_levels_are_carried_over_at_equal_log_snr():
    levels = Levels.from_sigmas([80.0, 3.0, 0.002, 0.0])
    there = levels.on(FLOW)
    assert there.path is FLOW
    for a, b in zip(levels, there, strict=True):
        assert a.ratio == pytest.approx(b.ratio, rel=1e-14)
    back = there.on(VE)
    assert back.sigmas == pytest.approx(levels.sigmas, rel=1e-14)
    assert levels.on(VE) is levels


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 2.0], "level 1 .* is not cleaner than level 0"),
        ([1.0, 1.0], "not cleaner"),
        ([1.0, 0.0, 0.0], "level 2 .* not cleaner"),
        ([0.0, 0.0], "not cleaner"),
        ([1.0, -0.5], "sigma 1 is -0.5"),
        ([math.nan, 0.0], "sigma 0 is nan"),
        ([math.inf, 1.0], "sigma 0 is inf"),
        ([], "empty"),
    ],
)
def test_bad_levels_are_named(sigmas, message):
    with pytest.raises(ValueError, match=message):
        Levels.from_sigmas(sigmas)


def test_levels_off_their_path_are_refused():
    with pytest.raises(ValueError, match="does not lie on the flow path"):
        Levels([Level(1.0, 0.5), Level(1.0, 0.0)], FLOW)
    with pytest.raises(ValueError, match=r"sigma 0 is 1.5"):
        Levels.from_sigmas([1.5, 0.5], VP)
    with pytest.raises(ValueError, match="unknown path 'fow'; did you mean 'flow'"):
        make_path("fow")


def test_levels_are_values():
    a, b = (Levels.from_sigmas([2.0, 1.0, 0.0]) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Levels.from_sigmas([0.5, 0.2, 0.0], VP)
    assert a[1:].sigmas == (1.0, 0.0)
    assert pickle.loads(pickle.dumps(VP)) is VP
    assert copy.deepcopy(FLOW) is FLOW


def test_alpha_keeps_its_digits_near_pure_noise():
    """For the float that sigma is, sqrt(1 - sigma²) to the last bits, where 1 - sigma² cancels."""
    for k in range(1, 60):
        sigma = 1 - 2.0 ** -(k / 2 + 2)
        exact = (1 - Decimal(sigma) ** 2).sqrt(Context(prec=60))
        for alpha in (VP.alpha(sigma), VP.alpha(torch.tensor(sigma, dtype=torch.float64)).item()):
            assert abs(Decimal(alpha) / exact - 1) <= 4e-16
