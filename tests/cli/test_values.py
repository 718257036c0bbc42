"""How options are read."""

import pytest

from k_diffusion.cli.values import classes, settings, show_settings


@pytest.mark.parametrize(
    ("word", "found"),
    [("3", (3,)), ("0,1,2", (0, 1, 2)), ("0-3", (0, 1, 2, 3)), ("7, 1-2,7", (7, 1, 2, 7))],
)
def test_classes(word: str, found: tuple[int, ...]) -> None:
    assert classes(word) == found


@pytest.mark.parametrize("word", ["", "x", "-1", "1,", "1-", "1.5", "2-x", "²"])
def test_what_is_no_class(word: str) -> None:
    with pytest.raises(ValueError, match="not a class"):
        classes(word)


def test_settings_both_ways() -> None:
    word = "eta=0.5,s-noise=1,kind=log,flag=true,none=null,sigmas=[3, 1.5, 0]"
    found = settings(word)
    assert found == {
        "eta": 0.5,
        "s_noise": 1,
        "kind": "log",
        "flag": True,
        "none": None,
        "sigmas": [3, 1.5, 0],
    }
    assert settings(show_settings(found)) == found
    assert isinstance(found["s_noise"], int)


@pytest.mark.parametrize("word", ["eta", "=1", "eta=", "a=1,,b=2"])
def test_what_is_no_setting(word: str) -> None:
    with pytest.raises(ValueError, match="not of the form name=value"):
        settings(word)
