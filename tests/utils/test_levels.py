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
    with pytest.raises(ValueError, match=r"unknown path \['ve'\]"):
        make_path(["ve"])


def test_a_path_may_be_given_by_name():
    assert Levels.from_sigmas([1, 0], "ve") == Levels.from_sigmas([1, 0])
    assert Levels.from_sigmas([0.5, 0], "flow").path is FLOW


def test_two_levels_that_a_denoiser_cannot_tell_apart_are_refused():
    near = [VP.at(-40.0), VP.at(-39.0)]
    assert near[0].sigma == near[1].sigma
    with pytest.raises(ValueError, match=r"levels 0 and 1 share sigma = 1.0 on the vp path"):
        Levels(near, VP)


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


# ---------------------------------------------------------------- arithmetic

WHOLE = Levels.from_sigmas([8.0, 4.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("levels", [WHOLE, WHOLE[:-1].flipped()], ids=["down", "up"])
def test_parts_of_a_split_join_again(levels):
    for i in range(1, len(levels) - 1):
        first, second = levels.split(i)
        assert first[-1] == second[0] == levels[i]
        assert (len(first), len(second)) == (i + 1, len(levels) - i)
        assert first + second == levels
        assert levels.split(i - len(levels)) == (first, second)
        assert levels.split(levels[i]) == (first, second)
    # A level that is not among them is put into both parts, and stays.
    first, second = levels.split(Level(1.0, 3.0))
    assert first[-1] == second[0] == Level(1.0, 3.0)
    assert len(first + second) == len(levels) + 1


def test_levels_join_with_a_gap_and_not_with_an_overlap():
    assert (WHOLE[:2] + WHOLE[3:]).sigmas == (8.0, 4.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"overlap: the first end at .*sigma 2\), .* begin at .*4"):
        WHOLE[:3] + WHOLE[1:]
    with pytest.raises(ValueError, match=r"the ve path and the flow path: .* \.on\(path\)"):
        WHOLE[:3] + WHOLE[2:].on(FLOW)
    with pytest.raises(ValueError, match=r"the ve path and the ve path inverted: .* \.flipped\(\)"):
        WHOLE[:3] + WHOLE[:3].flipped()
    with pytest.raises(TypeError):
        WHOLE + WHOLE.sigmas


@pytest.mark.parametrize("at", [0, 4, -1, 9, Level(1.0, 8.0), Level(1.0, 9.0), Level(1.0, 0.0)])
def test_a_split_outside_is_refused(at):
    with pytest.raises(ValueError, match="cannot split .*(inner one, 1 to 3|lie between)"):
        WHOLE.split(at)


def test_a_strength_keeps_the_last_steps():
    levels = Levels.from_sigmas([float(k) for k in range(20, -1, -1)])
    assert levels.start_at(0.6) == levels[8:]
    assert levels.start_at(0.73) == levels[5:]  # round(14.6) steps
    assert levels.start_at(0.001) == levels[-2:]
    assert levels.start_at(1) == levels.start_at(1.0) == levels
    for strength in (0, -0.5, 1.01, math.nan, "all", None):
        with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\], got"):
            levels.start_at(strength)
    with pytest.raises(ValueError, match="flip them first"):
        levels[:-1].flipped().start_at(0.5)


@pytest.mark.parametrize("path", PATHS.values(), ids=str)
def test_scaled_levels_are_those_of_larger_data(path):
    levels = WHOLE.on(path)
    scaled = levels.scaled(0.5)
    assert scaled.path is path
    ratios = [level.ratio for level in scaled]
    assert ratios == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.0], rel=1e-14)
    assert scaled.scaled(2.0).sigmas == pytest.approx(levels.sigmas, rel=1e-14)
    for factor in (0.0, -1.0, math.inf, "2"):
        with pytest.raises(ValueError, match="factor must be a number above 0, got"):
            levels.scaled(factor)


def test_flipped_levels_go_up_and_back():
    up = WHOLE.flipped()
    assert up.inverted
    assert not WHOLE.inverted
    assert up.sigmas == WHOLE.sigmas[::-1]
    assert up.flipped() == WHOLE
    assert up[1:3].inverted
    assert up.on(FLOW).flipped() == WHOLE.on(FLOW)
    assert up.scaled(2.0).inverted
    assert next(iter(up.pairs())) == (WHOLE[4], WHOLE[3])
    assert repr(WHOLE[:2].flipped()) == "Levels([4.0, 8.0], path=ve, inverted=True)"
    assert pickle.loads(pickle.dumps(up)) == up
    one = WHOLE[:1]  # the same levels, another direction: another plan
    assert one != one.flipped()
    assert hash(one) != hash(one.flipped())
    with pytest.raises(
        ValueError, match="strictly from clean to noisy, but level 1 .* not noisier"
    ):
        Levels(WHOLE, VE, inverted=True)
