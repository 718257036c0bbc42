"""The established `sample_*` functions, with the parameters that programs call them by.

Each names a solver and its options; `established.sample` does the rest. Every registered solver
that has no established name gets a function too, with the same leading parameters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling.compat_checks import real_number
from k_diffusion.sampling.compat_tools import NoiseSampler, face, number
from k_diffusion.sampling.established import Callback, Grid, Model, Times, sample
from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.plan import Churn
from k_diffusion.sampling.registry import SOLVERS, Solver


def _churn(name: str, s_churn: Any, s_tmin: Any, s_tmax: Any, s_noise: Any) -> Churn | None:
    given = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    churn = Churn(**{key: real_number(name, key, value) for key, value in given.items()})
    return churn if churn.s_churn else None


def _sde_options(eta: Any, s_noise: Any) -> dict[str, Any]:
    return {"eta": number(eta), "s_noise": number(s_noise)}


def _tree(x: Tensor, grid: Grid) -> NoiseSampler:
    """The established noise of the SDE methods: a Brownian path over all sigmas above 0."""
    sigmas = grid.sigmas
    return face().BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max())


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler steps, with churn. Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.

    The parameters mean the same in every `sample_*` function.

    Args:
        model: called as `model(x, sigma, **extra_args)` with sigma of shape (B,); returns the
            denoised x.
        x: noise of standard deviation sigmas[0] plus data, shape (B, ...).
        sigmas: noise standard deviations in data units, shape (n + 1,), from noisy to clean.
        extra_args: further arguments of the model.
        callback: called once an interval, after the model, with the dictionary of `x`, `i`,
            `sigma`, `sigma_hat` and `denoised`.
        disable: True hides the progress bar; None hides it where there is no terminal.
        s_churn: amount of noise added on the way, over all intervals.
        s_tmin, s_tmax: the sigmas between which it is added.
        s_noise: scale of the noise that is added.

    Returns:
        Samples at the last sigma, shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that has no right answer, by name.
    """
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_euler",
        "euler",
        *given,
        {},
        churn=_churn("sample_euler", s_churn, s_tmin, s_tmax, s_noise),
    )


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's steps, with churn. Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_heun",
        "heun",
        *given,
        {},
        churn=_churn("sample_heun", s_churn, s_tmin, s_tmax, s_noise),
        copied=True,
    )


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Midpoint steps in log sigma, with churn; see `dpm_2`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpm_2",
        "dpm_2",
        *given,
        {},
        churn=_churn("sample_dpm_2", s_churn, s_tmin, s_tmax, s_noise),
    )


@torch.no_grad()
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep steps of up to the given order; see `lms`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_lms",
        "lms",
        *given,
        {"order": number(order)},
    )


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M); see `dpmpp_2m`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpmpp_2m",
        "dpmpp_2m",
        *given,
        {},
    )


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler steps below the next sigma, and noise up to it; see `euler_ancestral`.

    Args:
        eta: how far below: 0 is the ODE, 1 the reverse diffusion.
        s_noise: scale of the noise.
        noise_sampler: called as `noise_sampler(sigma, sigma_next)`, gives unit noise of x's shape;
            None: `default_noise_sampler(x)`.
    """
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_euler_ancestral",
        "euler_ancestral",
        *given,
        _sde_options(eta, s_noise),
        noise_sampler=noise_sampler,
        idle=True,
    )


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Midpoint steps below the next sigma, and noise up to it; see `dpm_2_ancestral`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpm_2_ancestral",
        "dpm_2_ancestral",
        *given,
        _sde_options(eta, s_noise),
        noise_sampler=noise_sampler,
        idle=True,
    )


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2S) steps below the next sigma, and noise up to it; see `dpmpp_2s_ancestral`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpmpp_2s_ancestral",
        "dpmpp_2s_ancestral",
        *given,
        _sde_options(eta, s_noise),
        noise_sampler=noise_sampler,
        idle=True,
    )


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """SDE-DPM-Solver++(2S); see `dpmpp_sde`.

    Args:
        noise_sampler: None: `BrownianTreeNoiseSampler(x, least sigma above 0, greatest sigma)`.
        r: where in a step, in log sigma, the second call of the model lies.
    """
    r = number(r)
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpmpp_sde",
        "dpmpp_sde",
        *given,
        {**_sde_options(eta, s_noise), "r": r},
        noise_sampler=noise_sampler,
        make_noise=_tree,
        make_times=lambda grid: _log_times(grid, r),
    )


def _log_times(grid: Grid, r: float) -> Times:
    """The established sigmas of dpmpp_sde's noise, formed as exp(-t) from t = -log(sigma).

    They differ from the levels by the last bits, and so does a tree's noise for them: it is theirs
    that a seed is known for. Beyond the ends of the path, where rounding may lead, there is none.
    """
    sigmas, index = grid.sigmas, {value: i for i, value in enumerate(grid.values)}
    low, high = sigmas[sigmas > 0].min(), sigmas.max()

    def sigma(t: Tensor) -> Tensor:
        return t.neg().exp().clamp(low, high)

    def times(interval: Interval) -> tuple[Tensor, Tensor]:
        i = index[interval.start.sigma]
        t, t_next = sigmas[i].log().neg(), sigmas[i + 1].log().neg()
        end = t_next if interval.end.sigma == grid.values[i + 1] else t + (t_next - t) * r
        return sigma(t), sigma(end)

    return times


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M); see `dpmpp_2m_sde` ("midpoint") and `dpmpp_2m_sde_heun` ("heun")."""
    solvers = {"midpoint": "dpmpp_2m_sde", "heun": "dpmpp_2m_sde_heun"}
    if not isinstance(solver_type, str) or solver_type not in solvers:
        raise ValueError(f"solver_type must be 'heun' or 'midpoint', got {solver_type!r}")
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpmpp_2m_sde",
        solvers[solver_type],
        *given,
        _sde_options(eta, s_noise),
        noise_sampler=noise_sampler,
        make_noise=_tree,
    )


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(3M); see `dpmpp_3m_sde`."""
    given = model, x, sigmas, extra_args, callback, disable
    return sample(
        "sample_dpmpp_3m_sde",
        "dpmpp_3m_sde",
        *given,
        _sde_options(eta, s_noise),
        noise_sampler=noise_sampler,
        make_noise=_tree,
    )


def make_function(chosen: Solver) -> Callable[..., Tensor]:
    """`sample_<name>` of a registered solver: the established leading parameters, its options, and
    `noise_sampler` where it can draw noise, else churn where it can take any.

    Without a noise sampler, noise is drawn on the atoms of the plan's intervals, where independent
    draws are right; a caller's noise sampler is asked once per interval.
    """
    name = f"sample_{chosen.name}"
    noisy = chosen.stochastic or "eta" in chosen.options
    extra: dict[str, Any] = {"noise_sampler": None} if noisy else {}
    if not (noisy or chosen.predictor):
        extra = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    leading = [inspect.Parameter(key, kind) for key in ("model", "x", "sigmas")]
    defaults = {"extra_args": None, "callback": None, "disable": None, **chosen.options, **extra}
    signature = inspect.Signature(
        [*leading, *(inspect.Parameter(key, kind, default=d) for key, d in defaults.items())]
    )

    def function(*args: Any, **kwargs: Any) -> Tensor:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        given.apply_defaults()
        values = given.arguments
        churn = _churn(name, *(values[key] for key in extra)) if "s_churn" in extra else None
        return sample(
            name,
            chosen.name,
            values["model"],
            values["x"],
            values["sigmas"],
            values["extra_args"],
            values["callback"],
            values["disable"],
            {key: number(values[key]) for key in chosen.options},
            churn=churn,
            noise_sampler=values.get("noise_sampler"),
            intervals=churn is not None,
        )

    function.__name__ = function.__qualname__ = name
    function.__module__ = "k_diffusion.sampling"
    function.__doc__ = f"{chosen.summary}\n\nSource: {chosen.source}."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return torch.no_grad()(function)


def missing_functions(namespace: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """A function for each registered solver that has none in a namespace yet."""
    return {
        f"sample_{name}": make_function(chosen)
        for name, chosen in SOLVERS.items()
        if f"sample_{name}" not in namespace
    }
