"""The names of other programs: each leads to a solver and a schedule that are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from k_diffusion.external.names import (
    A1111,
    A1111_SCHEDULES,
    COMFYUI,
    COMFYUI_SCHEDULES,
    DIFFUSERS,
    foreign_name,
    foreign_schedule,
)
from k_diffusion.external.process import KNOWN
from k_diffusion.sampling.ksampler import find_solver
from k_diffusion.utils.scheduler import make_scheduler

DOCS = Path(__file__).parents[2] / "docs"


def _script(name):
    found = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # torchsde's, of the last interval
def test_a_name_of_diffusers_gives_what_the_docs_say(name):
    """Any other solver in its place gives another figure, or other calls."""
    theirs, ours, apart = _script("measure_names").measure(name)
    said = _script("make_names").MEASURED[name]
    assert (theirs, ours) == said[:2]
    if said[2] is None:
        assert apart is None
    elif said[2] < 1e-5:
        assert apart < 1e-5
    else:
        assert apart == pytest.approx(said[2], rel=0.06)  # of two digits


@pytest.mark.parametrize("name", [*DIFFUSERS, *COMFYUI, *A1111])
def test_a_name_leads_to_a_solver(name):
    named = foreign_name(name)
    find_solver(named.solver).check_options(dict(named.options))
    if named.schedule is not None:
        make_scheduler(named.schedule)


@pytest.mark.parametrize("name", [*COMFYUI_SCHEDULES, *A1111_SCHEDULES])
def test_a_name_leads_to_a_schedule(name):
    make_scheduler(foreign_schedule(name))


def test_every_scheduler_that_can_be_read_has_a_solver():
    assert set(DIFFUSERS) == set(KNOWN)


def test_the_web_uis_names_with_a_schedule():
    assert foreign_name("DPM++ 2M SDE Karras")[:2] == ("dpmpp_2m_sde", "karras")
    assert foreign_name("DPM++ 2M SDE Heun Exponential")[:2] == ("dpmpp_2m_sde_heun", "exponential")
    assert foreign_name("DPM++ 2M") == ("dpmpp_2m", None, {})


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown foreign sampler 'DPM\\+\\+ 2N'.*DPM\\+\\+ 2M"):
        foreign_name("DPM++ 2N")
    with pytest.raises(ValueError, match="unknown foreign schedule 'Karas'.*Karras"):
        foreign_schedule("Karas")
