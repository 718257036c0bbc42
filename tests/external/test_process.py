"""What the configs of diffusers' schedulers say, against what those schedulers do."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from k_diffusion.external.lays import ForeignScheduler
from k_diffusion.external.networks import foreign_denoiser, limited
from k_diffusion.external.process import BETAS, KNOWN, read_conventions
from k_diffusion.sampling import KSampler
from k_diffusion.utils.levels import FLOW, VE, VP
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def _make(name, **options):
    if name.startswith("CosineDPM"):
        options = {"prediction_type": "v_prediction", "sigma_data": 1.0, **options}
    return getattr(diffusers, name)(**options)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_process_is_that_of_the_betas(name, betas):
    scheduler = _make(name, beta_schedule=betas, beta_start=0.0009, beta_end=0.013)
    process = read_conventions(scheduler).process
    known = scheduler.alphas_cumprod.double()
    ours = [process.level(i / 1000).alpha ** 2 for i in range(1000)]
    # Theirs is a product in float32.
    assert (torch.tensor(ours) / known - 1).abs().max() < 2e-4
    assert process.path is VP


def test_another_number_of_timesteps_and_own_betas():
    for options in ({"num_train_timesteps": 400}, {"trained_betas": [0.01, 0.02, 0.03, 0.5]}):
        scheduler = diffusers.DDIMScheduler(**options)
        process = read_conventions(scheduler).process
        ours = [process.level(i / process.timesteps).alpha ** 2 for i in range(process.timesteps)]
        assert (torch.tensor(ours) / scheduler.alphas_cumprod - 1).abs().max() < 1e-5


def test_zero_terminal_signal_is_zero():
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    levels = ForeignScheduler(scheduler).levels(5)
    assert levels[0].alpha == 0
    assert levels[0].sigma == 1
    scheduler.set_timesteps(5)
    known = scheduler.alphas_cumprod[scheduler.timesteps].double().sqrt()
    ours = torch.tensor([level.alpha for level in levels[:-1]], dtype=torch.float64)
    assert (ours - known).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("said", "prediction"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")]
)
def test_the_prediction(said, prediction):
    assert read_conventions(diffusers.DDIMScheduler(prediction_type=said)).prediction == prediction


def test_flow_networks():
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    ):
        said = read_conventions(scheduler)
        assert said.prediction == "flow"
        assert said.process == FlowScheduler()
        levels = ForeignScheduler(scheduler).levels(4)
        scheduler.set_timesteps(4)
        assert levels.path is FLOW
        assert (
            max(abs(a - b) for a, b in zip(levels.sigmas, scheduler.sigmas.tolist(), strict=True))
            < 1e-7
        )


def test_edm_and_cosine():
    said = read_conventions(_make("EDMEulerScheduler", prediction_type="v_prediction"))
    assert (said.prediction, said.time_convention, said.negated) == ("edm", "log_sigma", True)
    assert said.process == KarrasScheduler(0.002, 80.0, 7.0)
    said = read_conventions(_make("CosineDPMSolverMultistepScheduler"))
    assert (said.prediction, said.time_convention) == ("v", "unit")
    for sigma in (0.3, 1.0, 12.0, 500.0):
        time = said.process.time(-math.log(sigma))
        assert abs(time - math.atan(sigma) * 2 / math.pi) < 1e-12
    said = read_conventions(
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
        )
    )
    assert (said.prediction, said.time_convention) == ("v", "log_sigma")


SPACED = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "options", SPACED, ids=lambda options: "-".join(map(str, options.values()))
)
def test_the_levels_are_those_that_it_visits(name, options):
    known = read_conventions(_make(name))  # so that every one of the list can be read
    try:
        scheduler = _make(name, **options)
        scheduler.set_timesteps(6, device="cpu")
    except (TypeError, ValueError, AttributeError):
        pytest.skip("it has no such option")
    levels = ForeignScheduler(_make(name, **options)).levels(6)
    sigmas = getattr(scheduler, "sigmas", None)
    if name in ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "TCDScheduler"):
        products = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
        theirs = ((1 - products) / products).sqrt().tolist()
    elif sigmas is not None and name not in ("LCMScheduler", "PNDMScheduler"):
        theirs = list(dict.fromkeys(sigmas.double().tolist()))
    else:
        return
    ours = [
        level.sigma if known.prediction == "flow" else level.ratio
        for level in list(levels)[: len(theirs)]
    ]
    assert len(ours) == len(theirs)
    # Their products are float32: near clean data 1 - alpha² has few digits left.
    assert max(abs(a - b) / max(b, 0.05) for a, b in zip(ours, theirs, strict=True)) < 3e-4
    assert levels.path in (VP, VE, FLOW)


def test_the_clean_end_of_ddim_may_be_the_first_level():
    stable = {"set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}
    levels = ForeignScheduler(diffusers.DDIMScheduler(**stable)).levels(10)
    process = read_conventions(diffusers.DDIMScheduler(**stable)).process
    assert levels[-1] == process.level(0.0)
    assert levels[-1].sigma > 0
    assert ForeignScheduler(diffusers.DDIMScheduler()).levels(10)[-1].sigma == 0


def _unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


STABLE = {"set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}
SAME = [
    ("DDIMScheduler", "ddim", {"clip_sample": False}),
    ("DDIMScheduler", "ddim", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("DDIMScheduler", "ddim", {"clip_sample": False, **STABLE}),
    ("EulerDiscreteScheduler", "euler", {}),
    ("EulerDiscreteScheduler", "euler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", "euler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", "euler", {"timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("name", "solver", "options"), SAME)
@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 20])
@torch.no_grad()
def test_the_same_samples_as_their_own_loop(name, solver, options, said, steps):
    network = _unet()
    scheduler = _make(name, prediction_type=said, **options)
    noise = torch.randn(2, 3, 8, 8)
    lays = ForeignScheduler(scheduler)
    denoiser = limited(foreign_denoiser(network, scheduler), lays.conventions)
    first = lays.levels(steps)[0]
    x = noise / first.sigma if lays.conventions.unit_start else noise
    ours = KSampler(denoiser, lays, solver).sample(x, steps)

    scheduler.set_timesteps(steps)
    theirs = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(theirs, t), t).sample
        theirs = scheduler.step(out, t, theirs).prev_sample
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_what_is_not_known_is_refused_by_name():
    config = {**diffusers.DDIMScheduler().config, "_class_name": "DDIMScheduler"}
    with pytest.raises(ValueError, match="a config needs its _class_name"):
        read_conventions(dict(diffusers.DDIMScheduler().config))
    with pytest.raises(
        ValueError, match="unknown key in the config of DDIMScheduler, 'beta_strat'"
    ):
        read_conventions({**config, "beta_strat": 0.1})
    with pytest.raises(ValueError, match="unknown prediction_type .* 'epsilom'"):
        read_conventions({**config, "prediction_type": "epsilom"})
    with pytest.raises(ValueError, match="unknown beta_schedule .* 'cubic'"):
        read_conventions({**config, "beta_schedule": "cubic"})
    with pytest.raises(ValueError, match="unknown diffusers scheduler 'AmusedScheduler'"):
        read_conventions({**config, "_class_name": "AmusedScheduler"})
    with pytest.raises(TypeError, match="a diffusers scheduler or its config is needed, got int"):
        read_conventions(3)
    with pytest.raises(ValueError, match="give mu"):
        ForeignScheduler(
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        ).levels(4)


def test_keys_that_other_schedulers_left_decide_nothing():
    """A config that was handed from one scheduler to another keeps the keys of both."""
    config = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=True).config
    euler = diffusers.EulerDiscreteScheduler.from_config(config)
    assert "clip_sample" in euler.config
    assert read_conventions(euler).prediction == "v"
    assert read_conventions(euler).clip is None


@pytest.mark.parametrize("steps", [5, 20])
@torch.no_grad()
def test_a_network_of_videos_by_their_own_loop(steps):
    torch.manual_seed(0)
    network = diffusers.UNet3DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **STABLE)
    noise, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 8)
    lays = ForeignScheduler(scheduler)
    sampler = KSampler(foreign_denoiser(network, scheduler), lays, "ddim")
    x = noise / lays.levels(steps)[0].sigma
    ours = sampler.sample(x, steps, {"encoder_hidden_states": text})
    scheduler.set_timesteps(steps)
    theirs = noise
    for t in scheduler.timesteps:
        out = network(theirs, t, text).sample
        theirs = scheduler.step(out, t, theirs).prev_sample
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    other = sampler.sample(x, steps, {"encoder_hidden_states": text + 1})
    assert (other - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas Fal"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("EulerDiscreteScheduler", {"timestep_type": "both"}, "unknown timestep_type .*'both'"),
        ("DDPMScheduler", {"snr_shift_scale": 2.0}, "snr_shift_scale 2.0|unknown key"),
    ],
)
def test_what_contradicts_itself_is_refused_by_key(name, options, words):
    config = {**dict(_make(name).config), "_class_name": name, **options}
    with pytest.raises(ValueError, match=words):
        read_conventions(config)


def test_the_scheduler_itself_is_left_alone():
    own = diffusers.EulerDiscreteScheduler()
    own.set_timesteps(3)
    before = own.timesteps.clone(), own.sigmas.clone(), dict(own.config)
    lays = ForeignScheduler(own)
    lays.levels(7)
    assert torch.equal(own.timesteps, before[0])
    assert torch.equal(own.sigmas, before[1])
    own.register_to_config(beta_end=0.02)
    own.set_timesteps(9)
    assert len(lays.levels(7)) == 8
    assert dict(own.config) | {"beta_end": before[2]["beta_end"]} == before[2]


def test_pndm_lays_its_levels_without_the_inner_ones_of_its_start():
    levels = ForeignScheduler(diffusers.PNDMScheduler(skip_prk_steps=False)).levels(10)
    plain = ForeignScheduler(diffusers.DDIMScheduler()).levels(10)
    ratios = [level.ratio for level in plain][:-1]
    assert [level.ratio for level in levels][: len(ratios)] == pytest.approx(ratios, rel=1e-3)


def test_sigmas_beyond_the_last_timestep_are_not_visited():
    own = diffusers.EulerDiscreteScheduler(interpolation_type="log_linear")
    own.set_timesteps(6)
    levels = ForeignScheduler(own).levels(6)
    assert [level.ratio for level in levels] == pytest.approx(own.sigmas[:7].tolist(), rel=1e-5)


def test_a_network_whose_config_has_an_unknown_key_is_refused():
    network = _unet()
    network.register_to_config(sandwich_norm=True)
    with pytest.raises(
        ValueError, match="unknown key in the config of UNet2DModel, 'sandwich_norm"
    ):
        foreign_denoiser(network, diffusers.DDIMScheduler())
    denoiser = foreign_denoiser(_unet(), diffusers.DDIMScheduler())
    for told, words in (
        ({"class_label": torch.zeros(2)}, "unknown condition 'class_label'.*class_labels"),
        ({"class_labels": torch.zeros(3)}, r"class_labels has shape \(3,\), but the batch is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            KSampler(denoiser).sample(torch.randn(2, 3, 8, 8), 2, told)
