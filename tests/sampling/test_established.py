"""The established functions give what the original gave: `make_established.py` has recorded it."""

from __future__ import annotations

import json

import pytest
import torch
from established_cases import FIXTURE, call, cases, difference, label, model, sigmas, start
from safetensors import safe_open

from k_diffusion import sampling

with safe_open(FIXTURE, "pt") as file:
    RECORDS = json.loads(file.metadata()["cases"])
    RESULTS = {dtype: file.get_tensor(str(dtype)[6:]) for dtype in (torch.float32, torch.float64)}
NAMES = sorted({record["name"] for record in RECORDS})


def test_the_fixture_is_of_these_cases():
    plain = [{k: v for k, v in r.items() if k not in ("fails", "own")} for r in RECORDS]
    assert plain == json.loads(json.dumps(list(cases())))
    assert len(NAMES) == 12


def recorded(name):
    return [(k, record) for k, record in enumerate(RECORDS) if record["name"] == name]


@pytest.mark.parametrize("name", NAMES)
def test_float64_agrees_to_nine_digits(name):
    for k, record in recorded(name):
        if not record["fails"]:
            error = difference(call(sampling, record, torch.float64), RESULTS[torch.float64][k])
            assert error < 1e-9, label(record)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_within_the_originals_own_error(name):
    for k, record in recorded(name):
        if not record["fails"]:
            ours = call(sampling, record, torch.float32)
            assert ours.dtype == torch.float32
            error = difference(ours, RESULTS[torch.float32][k])
            assert error < max(1e-5, 4 * record["own"]), label(record)


def test_where_the_original_fails_the_answer_is_the_data_estimate():
    failed = [record for record in RECORDS if record["fails"]]
    assert {record["name"] for record in failed} == {"sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"}
    for record in failed:
        sigma, zero = record["sigmas"]
        assert zero == 0
        x = start(torch.float64, sigma, record["seed"])
        expected = model(x, x.new_full((2,), sigma))
        assert torch.equal(call(sampling, record, torch.float64), expected)


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2", "sample_lms"])
def test_it_would_be_seen_if_a_level_were_wrong(name):
    """The tolerances are no wider than a change of one level by a thousandth shows."""
    k, record = next((k, r) for k, r in recorded(name) if len(r["sigmas"]) == 8)
    moved = list(record["sigmas"])
    moved[3] *= 1.001
    ours = call(sampling, {**record, "sigmas": moved}, torch.float32)
    assert difference(ours, RESULTS[torch.float32][k]) > max(1e-5, 4 * record["own"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_and_costs_its_own_rounding_only(name, dtype):
    """The state between calls is float32: what is lost is at the model's input and the end."""
    if name == "sample_dpm_fast":
        x, levels = start(torch.float64, 14.6, 3), (0.03, 14.6, 7)
    else:
        levels = (torch.tensor(sigmas(7, True)),)
        x = start(torch.float64, float(levels[0][0]), 3)
    seen = []

    def watched(x, sigma):
        seen.extend([x.dtype, sigma.dtype])
        return model(x.double(), sigma.double()).to(x.dtype)

    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    keywords = {"disable": True}
    if name not in ("sample_euler", "sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2m"):
        keywords["eta"] = 1.0
    results = []
    for kind in (torch.float64, dtype):
        draws = iter(noise)
        if "eta" in keywords:
            keywords["noise_sampler"] = lambda s, t, draws=draws, kind=kind: next(draws).to(kind)
        results.append(getattr(sampling, name)(watched, x.to(kind), *levels, **keywords))
    assert results[1].dtype == dtype
    assert set(seen[len(seen) // 2 :]) == {dtype}
    assert difference(results[1], results[0]) < 8 * torch.finfo(dtype).eps
