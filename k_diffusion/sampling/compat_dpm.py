"""The established `sample_dpm_adaptive` and `log_likelihood`, which take two sigmas for a range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling.compat_checks import check_answer, check_input, warn_unless_finite
from k_diffusion.sampling.compat_tools import NoiseSampler, as_time, face
from k_diffusion.sampling.likelihood import log_density, probe_products
from k_diffusion.sampling.stepping import StepControl
from k_diffusion.utils.levels import VE, Level


@torch.no_grad()
def sample_dpm_adaptive(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Any:
    """DPM-Solver-12 (order 2) and -23 (order 3) with adaptive steps for each sample.

    Args:
        model: called as `model(x, sigma, **extra_args)`, sigma of shape (B,).
        x: states at sigma_max, shape (B, ...).
        sigma_min, sigma_max: noise standard deviations to go between, in either direction.
        callback: called after each step with `x`, `i`, `sigma` and `sigma_hat` (the noisiest
            sample's), `denoised`, `error` (the largest), `h`, and the counts of `info`.
        disable: True hides the progress bar.
        order, rtol, atol, h_init, pcoeff, icoeff, dcoeff, accept_safety, eta, s_noise,
        noise_sampler: see `DPMSolver.dpm_solver_adaptive`.
        return_info: whether to return `(x, info)`.

    Raises:
        TypeError, ValueError: a sigma or x that cannot be; and see
            `DPMSolver.dpm_solver_adaptive`.

    Source: Lu et al. 2022, arXiv:2206.00927, appendix C.
    """
    name = "sample_dpm_adaptive"
    check_input(name, model, x)
    for key, value in {"sigma_min": sigma_min, "sigma_max": sigma_max}.items():
        if not 0 < float(value) < math.inf:
            raise ValueError(f"{key} of {name} must be finite and above 0, got {float(value)}")
    working = torch.promote_types(x.dtype, torch.float32)

    def widened(state: Tensor, sigma: Tensor, **keywords: Any) -> Tensor:
        answer = model(state.to(x.dtype), sigma.to(x.dtype), **keywords)
        return check_answer(name, answer, x).to(working)

    def told(info: dict[str, Any]) -> None:
        assert callback is not None
        narrow = {key: info[key].to(x.dtype) for key in ("x", "denoised")}
        sigma, sigma_hat = solver.sigma(info["t"]), solver.sigma(info["t_up"])
        callback({"sigma": sigma, "sigma_hat": sigma_hat, **info, **narrow})

    with face().tqdm(disable=disable) as bar:
        solver = face().DPMSolver(
            model if working == x.dtype else widened, extra_args, eps_callback=bar.update
        )
        if callback is not None:
            solver.info_callback = told
        first, last = (solver.t(as_time(sigma)) for sigma in (sigma_max, sigma_min))
        result, info = solver.dpm_solver_adaptive(
            x.to(working),
            first,
            last,
            order,
            rtol,
            atol,
            h_init,
            pcoeff,
            icoeff,
            dcoeff,
            accept_safety,
            eta,
            s_noise,
            noise_sampler or face().default_noise_sampler(x),
        )
    warn_unless_finite(name, result, 3)
    result = result.to(x.dtype)
    return (result, info) if return_info else result


class _GivenProbes:
    """Hutchinson's estimate with probes that are at hand."""

    def __init__(self, probes: Tensor) -> None:
        self.probes = probes

    def start(self, x: Tensor) -> Tensor | None:
        return self.probes.to(x).unsqueeze(1)

    def __call__(self, d: Tensor, x: Tensor, own: Tensor | None) -> Tensor:
        assert own is not None
        return probe_products(d, x, own)


@torch.no_grad()
def log_likelihood(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: dict[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """Log-likelihoods of x by the probability-flow ODE, with one random probe of the divergence.

    Args:
        model: called as `model(x, sigma, **extra_args)`, sigma of shape (B,); differentiable in x.
        x: data with noise of standard deviation sigma_min, shape (B, ...).
        sigma_min, sigma_max: where it begins, and where the prior N(0, sigma_max²) is.
        atol, rtol: tolerances. Steps keep a fiftieth of them, which takes about the calls of the
            established integrator or fewer, at an error like its own.

    Returns:
        Log-densities in nats, shape (B,), in float32 or better, and `fevals`, calls of the model.

    Source: Song et al. 2021, arXiv:2011.13456, equation 39; `likelihood.log_density` is the same
    for any path, with more probes or none.
    """
    given = extra_args or {}

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        return model(state.to(x.dtype), sigma.to(x.dtype), **given)

    # Below this, float32 has nothing but rounding to control.
    floor = 10 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    start, end = (Level(1.0, float(sigma)) for sigma in (sigma_min, sigma_max))
    likelihood = log_density(
        FunctionDenoiser(denoise, VE),
        x,
        start,
        end,
        trace=_GivenProbes(torch.randint_like(x, 2) * 2 - 1),
        control=StepControl(max(rtol / 50, floor), max(atol / 50, floor)),
        compact=False,
    )
    return likelihood.nats, {"fevals": likelihood.info.calls}
