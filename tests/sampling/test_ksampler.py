"""KSampler as its users call it, and what it says of wrong input."""

import math

import pytest
import torch

from k_diffusion.denoiser import EpsDenoiser, FunctionDenoiser, VDenoiser
from k_diffusion.models import UNet
from k_diffusion.sampling import FLOW, SOLVERS, Churn, KSampler, Run, make_plan, unit_noise
from k_diffusion.utils.scheduler import (
    CosineScheduler,
    CustomScheduler,
    FlowScheduler,
    KarrasScheduler,
    LinearScheduler,
    Scheduler,
)


def small_unet(**options):
    torch.manual_seed(0)
    options = {"in_channels": 3, "channels": 8, "channel_mults": (1, 2), "blocks": 1, **options}
    model = UNet(attention=(False, True), head_channels=8, **options).eval()
    with torch.no_grad():  # the output is zero at first, which would hide the condition
        for p in model.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.02)
    return model


def test_the_first_example_runs_as_written():
    model = small_unet()
    sampler = KSampler(model)
    x = torch.randn(1, 3, 64, 64)
    samples = sampler.sample(x, steps=50)
    assert samples.shape == (1, 3, 64, 64)
    assert samples.dtype == torch.float32
    assert torch.isfinite(samples).all()
    assert not samples.requires_grad
    assert sampler.denoiser.prediction == "eps"
    assert sampler.scheduler == LinearScheduler()


def test_the_second_example_runs_as_written():
    def get_condition(label):
        return torch.tensor([label])

    model = small_unet(num_classes=10)
    x = torch.randn(1, 3, 64, 64)
    scheduler = CosineScheduler()
    sampler = KSampler(model, scheduler=scheduler)
    condition = get_condition(7)
    samples = sampler.sample(x, steps=50, condition=condition)
    assert samples.shape == x.shape
    assert (samples - sampler.sample(x, steps=50)).abs().max() > 1e-4
    assert (samples - sampler.sample(x, steps=50, condition=get_condition(3))).abs().max() > 1e-4
    assert sampler.denoiser.process == scheduler


def test_gaussian_data_come_out_with_their_mean_and_deviation():
    """An exact denoiser: what the scaling of x, the levels and the solver give together."""
    mean, deviation = 0.3, 0.5

    def denoise(x, sigma):
        s = sigma.reshape(-1, 1)
        return (deviation**2 * x + s**2 * mean) / (deviation**2 + s**2)

    x = torch.randn(4, 5_000, generator=torch.Generator().manual_seed(0))
    for name, solver in SOLVERS.items():
        if solver.order == 0:  # for consistency models
            continue
        model = denoise if solver.outputs == 1 else lambda x, sigma: (denoise(x, sigma),) * 2
        # 400 steps: the coarse Karras steps of a first-order method shrink the noise a little.
        samples = KSampler(model, KarrasScheduler(0.002, 80), name).sample(x, 400, seed=0)
        assert abs(samples.mean().item() - mean) < 0.01, name
        assert abs(samples.std().item() - deviation) < 0.01, name


def eps_of_gaussian(path_sigma=0.5):
    """A network that knows the noise in x for data N(0, path_sigma²), from its time alone."""

    class Net(torch.nn.Module):
        prediction, time_convention, process = "eps", "timestep", None
        weight = None

        def forward(self, x, t, **condition):
            snr = LinearScheduler().half_log_snr(t.double() / 1000)
            sigma = (1 / (1 + (2 * snr).exp()).sqrt()).reshape(-1, 1)
            alpha2 = 1 - sigma**2
            return (x * sigma / (alpha2 * path_sigma**2 + sigma**2)).to(x.dtype)

    return Net()


@pytest.mark.parametrize(
    "scheduler",
    [None, "karras", "exponential", KarrasScheduler(0.02, 60.0), CustomScheduler(
        sigmas=(100.0, 30.0, 10.0, 3.0, 1.0, 0.5, 0.25, 0.1, 0.0))],
)  # fmt: skip
def test_a_scheduler_for_other_coordinates_is_carried_over(scheduler):
    denoiser = EpsDenoiser(eps_of_gaussian(), LinearScheduler())
    sampler = KSampler(denoiser, scheduler, "heun")
    assert sampler.denoiser.process == LinearScheduler()
    x = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    steps = 8 if isinstance(scheduler, CustomScheduler) else 40
    assert abs(sampler.sample(x, steps).std().item() - 0.5) < 0.02
    levels = sampler.levels(steps)
    assert levels.path is denoiser.path
    if scheduler in ("karras", "exponential"):  # open ends are the model's own
        assert levels[0].ratio == pytest.approx(LinearScheduler().levels(2)[0].ratio, rel=1e-9)


def test_flow_from_pure_noise():
    class Net(torch.nn.Module):
        prediction, time_convention = "flow", "unit"

        def forward(self, x, t):
            s = t.reshape(-1, 1)
            x0 = (1 - s) * 0.25 * x / ((1 - s) ** 2 * 0.25 + s**2)
            return torch.where(s > 0, (x - x0) / s, x)

    sampler = KSampler(Net(), solver="heun")
    assert sampler.levels(10)[0].alpha == 0
    x = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    assert abs(sampler.sample(x, 40).std().item() - 0.5) < 0.01


def test_starts_that_cannot_be_are_refused_by_name():
    eps = eps_of_gaussian()
    with pytest.raises(ValueError, match="FlowScheduler begins at pure noise .* noise-predicting"):
        KSampler(EpsDenoiser(eps), FlowScheduler()).levels(4)
    with pytest.raises(ValueError, match="CosineScheduler begins at pure noise"):
        KSampler(eps, CosineScheduler(time_max=1.0)).levels(4)
    with pytest.raises(ValueError, match="variance-exploding levels"):
        KSampler(lambda x, sigma: x, "flow").levels(4)
    v = VDenoiser(eps, CosineScheduler(time_max=1.0))
    assert KSampler(v).levels(4)[0].alpha == 0


def test_a_function_in_other_coordinates():
    def velocity_free(x, sigma):
        return x * (1 - sigma.reshape(-1, 1))

    sampler = KSampler(FunctionDenoiser(velocity_free, FLOW))
    assert sampler.scheduler == FlowScheduler()
    assert sampler.sample(torch.randn(2, 3), 4).shape == (2, 3)


def shrink(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        seen = []

        def denoise(x, sigma, seen=seen):
            seen.append((x.dtype, sigma.dtype, tuple(sigma.shape)))
            return shrink(x, sigma)

        x = torch.randn(2, 3, dtype=dtype)
        assert KSampler(denoise, "karras").sample(x, 4).dtype == dtype
        state = torch.float64 if dtype == torch.float64 else torch.float32
        assert set(seen) == {(state, state, (2,))}


def test_x_is_left_alone_and_progress_and_callback_are_told(capsys):
    x = torch.randn(2, 3)
    before = x.clone()
    told = []
    sampler = KSampler(shrink, "karras", "heun")
    result = sampler.sample(
        x, 3, callback=lambda k, x, sigma, d: told.append((k, x.clone(), sigma, d)), progress=True
    )
    assert torch.equal(x, before)
    assert [k for k, *_ in told] == [0, 1, 2, 3, 4]
    for _, state, sigma, denoised in told:
        assert torch.equal(denoised, shrink(state, sigma))
    assert torch.equal(result, sampler.sample(x, 3))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sampling" in captured.err


def test_seeds():
    x = torch.randn(3, 50)
    sampler = KSampler(shrink, "karras", "euler_ancestral")
    whole = sampler.sample(x, 5, seed=4)
    assert torch.equal(whole, sampler.sample(x, 5, seed=[4, 5, 6]))
    torch.manual_seed(1)
    a = sampler.sample(x, 5)
    torch.manual_seed(1)
    assert torch.equal(a, sampler.sample(x, 5))
    assert not torch.equal(a, sampler.sample(x, 5))
    for bad, error in (([1, 2], ValueError), ("7", TypeError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed"):
            sampler.sample(x, 5, seed=bad)


def test_unit_noise_is_of_its_seed_alone():
    noise = unit_noise((2, 64, 64), [5, 9, 5])
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1:2], unit_noise((2, 64, 64), [9]))
    assert abs(noise[:2].std().item() - 1) < 0.02
    assert abs((noise[0] * noise[1]).mean().item()) < 0.04
    # A sampler's own noise for the same seed is another stream.
    seen = []
    plan = make_plan("euler_ancestral", KarrasScheduler().levels(2))
    from k_diffusion.sampling import SampleNoise

    source = SampleNoise([5], noise[:1])
    run = Run(plan, noise[:1], source)
    seen.append(SampleNoise([5], noise[:1]).draw())
    run.advance(noise[:1])
    assert abs((seen[0] * noise[:1]).mean().item()) < 0.04


def test_churn_changes_samples_and_keeps_their_deviation():
    def denoise(x, sigma):
        return 0.25 * x / (0.25 + sigma.reshape(-1, 1) ** 2)

    x = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    plain = KSampler(denoise, "karras", "heun")
    churned = KSampler(denoise, "karras", "heun", churn=Churn(s_churn=20.0))
    samples = churned.sample(x, 60, seed=0)
    assert (samples - plain.sample(x, 60)).abs().max() > 0.1
    assert abs(samples.std().item() - 0.5) < 0.02
    for name in ("s_churn", "s_tmin", "s_noise"):
        with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
            Churn(**{name: -1.0})


def test_bad_churn_is_named():
    for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
        for value in ("1", True, None, [1.0]):
            with pytest.raises(TypeError, match=f"{name} must be a number, got "):
                Churn(**{name: value})
        with pytest.raises(ValueError, match=f"{name} must be 0 or more, got nan"):
            Churn(**{name: math.nan})
        if name != "s_tmax":
            with pytest.raises(ValueError, match=f"{name} must be finite, got inf"):
                Churn(**{name: math.inf})
    with pytest.raises(ValueError, match="s_tmin 2.0 lies above s_tmax 1: churn would act nowhere"):
        Churn(1.0, s_tmin=2.0, s_tmax=1)
    assert Churn(1.0, s_tmin=1, s_tmax=1.0, s_noise=0) == Churn(1.0, 1.0, 1.0, 0.0)


CASES = [
    ({"solver": "hein"}, {}, "unknown sampler 'hein'; did you mean 'heun'"),
    ({"scheduler": "kara"}, {}, "unknown scheduler 'kara'; did you mean 'karras'"),
    ({"solver": "ddim", "etta": 0.5}, {}, "unknown option of ddim, 'etta'; did you mean 'eta'"),
    ({"solver": "ddim", "eta": "big"}, {}, "ddim's eta must be of type float: 'big'"),
    ({"solver": "ddim", "eta": math.nan}, {}, "ddim's eta must be finite"),
    ({"solver": "lms", "order": 0}, {}, "lms's order must be 1 or more, got 0"),
    ({"solver": "lms", "order": 2.5}, {}, "lms's order must be of type int"),
    ({"solver": "dpmpp_sde", "r": 0.0}, {}, r"dpmpp_sde: r must lie in \[0.001, 1\]"),
    ({"solver": "dpmpp_sde", "r": 1e-12}, {}, r"r must lie in \[0.001, 1\], got 1e-12"),
    ({"solver": "sa_solver", "eta": 1e200}, {}, r"sa_solver's eta must be 1e\+12 at most: 1e\+200"),
    ({"solver": "ddpm", "s_noise": 1e13}, {}, r"ddpm's s_noise must be 1e\+12 at most"),
    ({"solver": "dpm_fast", "tail": ([1],)}, {}, r"dpm_fast's tail must hold .* int: \(\[1\],\)"),
    ({"solver": "dpm_fast", "tail": (True,)}, {}, r"dpm_fast's tail must hold .* \(True,\)"),
    ({"solver": "dpm_fast", "tail": (1.0,)}, {}, r"dpm_fast's tail must hold .* \(1.0,\)"),
    ({"solver": "dpm_adaptive", "max_steps": 2.5}, {}, "max_steps must be a whole number, got 2.5"),
    ({}, {"seed": [True]}, r"seed must be a whole number or one per sample, got \[True\]"),
    ({}, {"x": torch.zeros(4, 0)}, r"no length of 0, got \(4, 0\)"),
    (
        {},
        {"x": torch.zeros(1, 2).to(torch.float8_e4m3fn)},
        "x must be float16.*torch.float8_e4m3fn",
    ),
    ({}, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    ({}, {"steps": -1}, "steps must be a whole number of at least 1, got -1"),
    ({}, {"steps": "x"}, "steps must be a whole number of at least 1, got 'x'"),
    ({}, {"steps": [3]}, r"steps must be a whole number of at least 1, got \[3\]"),
    ({}, {"steps": True}, "steps must be a whole number of at least 1, got True"),
    ({}, {"x": torch.full((1, 2), math.nan)}, r"x, the initial noise, is not finite in 100.0%"),
    ({}, {"x": torch.zeros(1, 2, dtype=torch.long)}, r"x must be a floating-point .* torch.int64"),
    ({}, {"x": [1.0]}, "x must be a floating-point tensor of unit noise, got list"),
    ({}, {"x": torch.zeros(0, 2)}, "B >= 1"),
    ({}, {"x": torch.zeros(3)}, r"x must have shape \(B, C, ...\)"),
    ({}, {"condition": "seven"}, "condition must be class labels .* got str"),
    ({"scheduler": 3}, {}, "scheduler must be a Scheduler or a name, got int"),
]


@pytest.mark.parametrize(("made", "called", "message"), CASES)
def test_bad_input_is_named(made, called, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        KSampler(shrink, **{"scheduler": "karras", **made}).sample(
            **{"x": torch.randn(1, 2), "steps": 4, **called}
        )
    assert "\n" not in str(caught.value)


def test_a_steps_of_true_is_refused_even_after_one():
    sampler = KSampler(shrink, "karras", "euler")
    sampler.sample(torch.randn(1, 2), 1)
    with pytest.raises(ValueError, match="got True"):
        sampler.sample(torch.randn(1, 2), True)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.tensor([11]), "11"),
        (torch.tensor([1, 2, 3]), "3"),
        ({"klass": torch.tensor([1])}, "klass"),
        (torch.randn(1, 4), "embedding"),
    ],
)
def test_a_condition_that_the_model_cannot_take_is_named(condition, message):
    sampler = KSampler(small_unet(num_classes=10))
    with pytest.raises(ValueError, match=message) as caught:
        sampler.sample(torch.randn(1, 3, 8, 8), 2, condition=condition)
    assert "\n" not in str(caught.value)


def test_embeddings_and_mappings_are_conditions():
    model = small_unet(num_classes=10, embedding_dim=4)
    x = torch.randn(2, 3, 8, 8)
    sampler = KSampler(model)
    e, c = torch.randn(2, 4), torch.tensor([1, 2])
    by_tensor = sampler.sample(x, 3, condition=e)
    assert torch.equal(by_tensor, sampler.sample(x, 3, condition={"embedding": e}))
    both = sampler.sample(x, 3, condition={"embedding": e, "class_label": c})
    assert (both - by_tensor).abs().max() > 1e-5


def test_a_model_that_breaks_is_reported():
    def broken(x, sigma):
        return torch.where(sigma.reshape(-1, 1) < 1, x * math.inf, x)

    with pytest.raises(FloatingPointError, match="result of dpmpp_2m after 5 steps is not finite"):
        KSampler(broken, "karras").sample(torch.randn(2, 3), 5)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\)"):
        KSampler(lambda x, s: x[:, :1], "karras").sample(torch.randn(2, 3), 5)


def test_large_finite_values_are_not_called_infinite():
    x = torch.full((1, 4), 3e38)
    sampler = KSampler(lambda x, s: x * 0 + 3e38, CustomScheduler(sigmas=(1.0, 0.5, 0.0)))
    assert torch.isfinite(sampler.sample(x, 2)).all()


def test_a_scheduler_that_cannot_be_hashed():
    class Own(Scheduler):
        __hash__ = None

        def half_log_snr(self, time):
            return LinearScheduler().half_log_snr(time * 0.999)

        def time(self, half_log_snr):
            return LinearScheduler().time(half_log_snr)

    levels = KSampler(shrink, Own()).levels(3)
    assert len(levels) == 4


def test_the_plan_can_be_read():
    text = str(KSampler(shrink, KarrasScheduler(0.5, 2.0), "dpmpp_2m").plan(2))
    assert text.splitlines() == [
        "dpmpp_2m: 2 intervals, 2 evaluations, 0 draws, 3 live tensors",
        "d1 = denoise(x0, sigma 2)",
        "x2 = 0.25 x0 + 0.75 d1",
        "d2 = denoise(x2, sigma 0.5)",
        "x3 = 1 d2",
        "-> x3",
    ]
