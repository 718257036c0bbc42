"""What a model and a callback see of the established functions, and what they may write."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from established_models import ESTABLISHED, ODE, SIGMAS, model, noise

from k_diffusion import sampling
from k_diffusion.sampling import SOLVERS, solver

# --- what a model and a callback see -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ESTABLISHED)
def test_the_model_and_the_callback_see_what_they_ever_saw(name, dtype):
    levels = SIGMAS.double() if dtype == torch.float64 else SIGMAS
    x, calls, infos = noise().to(dtype), [], []

    def watched(x, sigma, scale, shift=0.0):
        assert (scale, shift) == (1.0, 0.5)
        assert not torch.is_grad_enabled()
        assert sigma.shape == (2,)
        assert sigma.is_contiguous()
        assert sigma.dtype == x.dtype == dtype
        calls.append((x.clone(), sigma.clone(), model(x, sigma)))
        return calls[-1][2]

    result = getattr(sampling, name)(
        watched,
        x,
        levels,
        extra_args={"scale": 1.0, "shift": 0.5},
        callback=lambda info: infos.append({**info, "x": info["x"].clone()}),
        disable=True,
    )
    assert result.dtype == dtype
    assert not result.requires_grad
    assert [info["i"] for info in infos] == [0, 1, 2, 3]
    for i, info in enumerate(infos):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert info["sigma"].shape == info["sigma_hat"].shape == ()
        assert info["sigma"].dtype == levels.dtype
        assert info["sigma"] == info["sigma_hat"] == levels[i]
        first = next(call for call in calls if torch.equal(call[0], info["x"]))
        assert torch.equal(first[1], (levels[i] * x.new_ones(2)).to(dtype))
        assert torch.equal(info["denoised"], first[2])
        assert info["denoised"].dtype == info["x"].dtype == dtype
    assert torch.equal(infos[0]["x"], x)


def test_the_callback_comes_after_the_first_call_of_an_interval_and_before_the_second():
    order = []

    def watched(x, sigma):
        order.append(round(float(sigma[0]), 3))
        return model(x, sigma)

    sampling.sample_heun(
        watched, noise(), SIGMAS[1:], callback=lambda info: order.append(info["i"]), disable=True
    )
    assert order == [4.0, 0, 1.5, 1.5, 1, 0.4, 0.4, 2]


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2", "sample_deis"])
def test_churn_is_told_and_drawn_at_every_interval(name):
    infos, shapes, plain = [], [], torch.randn_like

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randn_like(self, x):
            shapes.append((x.shape, x.dtype))
            return plain(x)

    sampling.torch = Torch()
    try:
        options = {"s_tmin": 1.0, "s_tmax": 5.0, "callback": infos.append, "disable": True}
        run = getattr(sampling, name)
        run(model, noise().half(), SIGMAS, s_churn=1.0, **options)
        assert shapes == [((2, 3, 4), torch.float16)] * 4
        shapes.clear()
        run(model, noise(), SIGMAS, s_churn=0.0, **options)
        assert shapes == []
    finally:
        sampling.torch = torch
    for info in infos[:4]:
        raised = info["sigma"] in (SIGMAS[1], SIGMAS[2])
        assert float(info["sigma_hat"] / info["sigma"]) == pytest.approx(1.25 if raised else 1)
        assert info["sigma"] == SIGMAS[info["i"]]
    assert torch.equal(infos[0]["x"], noise().half())
    assert (infos[1]["x"] - infos[5]["x"]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_euler_ancestral"])
def test_what_a_callback_writes_into_its_tensors_counts(name, dtype):
    """A callback that paints over x or denoised is not undone: the method goes on from there."""

    def paint_x(info):
        if info["i"] == 2:
            info["x"].mul_(0.5)

    def paint_denoised(info):
        if info["i"] == 3:
            info["denoised"].zero_()

    run, keywords = getattr(sampling, name), {"disable": True}
    if name == "sample_euler_ancestral":
        keywords["eta"] = 0.0
    plain = run(model, noise().to(dtype), SIGMAS, **keywords)
    assert not torch.allclose(
        run(model, noise().to(dtype), SIGMAS[:4], callback=paint_x, **keywords),
        run(model, noise().to(dtype), SIGMAS[:4], **keywords),
        atol=0.1,
    )
    assert torch.equal(run(model, noise().to(dtype), SIGMAS, callback=len, **keywords), plain)
    painted = run(model, noise().to(dtype), SIGMAS, callback=paint_denoised, **keywords)
    assert painted.abs().max() < 1e-2  # the last step ends at the data estimate
    assert plain.abs().max() > 0.1


def test_what_a_callback_writes_into_a_rounded_answer_counts():
    def paint(info):
        if info["i"] == 3:
            info["denoised"][0] = 0.25

    answers = []

    def precise(x, sigma):
        answers.append(model(x.float(), sigma.float()))
        return answers[-1]

    result = sampling.sample_dpmpp_2m(precise, noise().half(), SIGMAS, callback=paint, disable=True)
    assert (result[0] == 0.25).all()
    assert torch.equal(result[1], answers[-1][1].half())


def test_half_precision_keeps_what_a_callback_leaves_alone():
    """Only what a callback has changed is taken from the rounded copy that it was shown."""
    x = noise().half()

    def touch(info):
        info["x"][0] += 1

    states = []

    def watched(x, sigma):
        states.append(x.clone())
        return model(x, sigma)

    touched = sampling.sample_euler(watched, x, SIGMAS, callback=touch, disable=True)
    plain = sampling.sample_euler(watched, x, SIGMAS, disable=True)
    assert torch.equal(states[0], states[4])
    assert torch.equal(touched[1], plain[1])
    assert not torch.equal(states[1][0], states[5][0])


@pytest.mark.parametrize("name", ODE)
def test_a_callback_that_only_looks_changes_no_bit(name):
    """The answer, finer than x, is shown rounded, but taken as it is."""
    run = getattr(sampling, name)

    def precise(x, sigma):
        return model(x.float(), sigma.float())

    x = noise().half()
    watched = run(precise, x, SIGMAS[:4], callback=lambda info: None, disable=True)
    assert torch.equal(watched, run(precise, x, SIGMAS[:4], disable=True))


def test_a_prediction_is_shown_to_a_callback_but_not_taken_back():
    @solver(order=1, source="this test", predictor=True)
    def foresees(x, levels, noise):
        """Euler's method, as if its states were predictions."""
        for s, t in levels.pairs():
            d = yield x, s
            x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
        return x

    def paint(info):
        info["x"].zero_()

    try:
        x = noise().half()
        plain = sampling.sample_foresees(model, x, SIGMAS, disable=True)
        painted = sampling.sample_foresees(model, x, SIGMAS, callback=paint, disable=True)
        assert torch.equal(plain, painted)
    finally:
        del SOLVERS["foresees"]
        vars(sampling).pop("sample_foresees", None)


def test_a_callback_may_end_it():
    class Interrupted(Exception):
        pass

    def stop(info):
        if info["i"] == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        sampling.sample_heun(model, noise(), SIGMAS, callback=stop, disable=True)


def test_extra_args_may_change_on_the_way():
    seen, extra = [], {"k": 0}

    def watched(x, sigma, k):
        seen.append(k)
        return model(x, sigma)

    sampling.sample_euler(
        watched, noise(), SIGMAS, extra, lambda info: extra.update(k=info["i"] + 1), True
    )
    assert seen == [0, 1, 2, 3]


def test_a_model_may_write_into_its_sigma():
    def careless(x, sigma):
        answer = model(x, sigma)
        sigma.zero_()
        return answer

    expected = sampling.sample_heun(model, noise(), SIGMAS, disable=True)
    assert torch.equal(sampling.sample_heun(careless, noise(), SIGMAS, disable=True), expected)


def test_nothing_of_the_callers_is_changed():
    x, levels = noise(), SIGMAS.clone()
    for name in ESTABLISHED:
        getattr(sampling, name)(model, x, levels, disable=True)
    assert torch.equal(x, noise())
    assert torch.equal(levels, SIGMAS)


# --- progress ------------------------------------------------------------------------------------


def test_the_bar_counts_intervals():
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        sampling.sample_heun(model, noise(), SIGMAS)
        sampling.sample_heun(model, noise(), SIGMAS, disable=False)
    assert "4/4" in text.getvalue()
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        sampling.sample_heun(model, noise(), SIGMAS, disable=True)
    assert text.getvalue() == ""


def test_trange_is_tqdms():
    assert sampling.trange(3, disable=True) == range(3)  # no bar, and no tqdm
    bar = sampling.trange(2, 4, disable=True, desc="x")
    assert bar.total == 2
    assert list(bar) == [2, 3]
