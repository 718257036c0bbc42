"""The established DPM-Solver class: steps of orders 1 to 3, with fixed or adaptive lengths.

Where the established one steps a whole batch at once, this steps each sample by itself; what
programs are told stays scalar. Clocks are tensors of the caller's dtype and coefficients are formed
by the published operations in their order, so that a batch of one takes the very steps it always
took; `adaptive` does without either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.sampling.compat_checks import check_answer, check_noise, finite_number
from k_diffusion.sampling.compat_tools import NoiseSampler, face
from k_diffusion.sampling.stepping import PIDStepSizeController

Cache = dict[str, Tensor]
LARGEST = 1 + math.pi / 2  # of what `PIDStepSizeController.limiter` gives


class DPMSolver(nn.Module):
    """DPM-Solver of orders 1 to 3, with fixed and with adaptive steps, for variance-exploding x.

    Its clock is t = -log(sigma). Clocks are tensors of shape (), or of a shape that multiplies x,
    (B, 1, ...), where each sample has its own. Steps return the new x and the cache of the noise
    estimates asked for on the way, by name, which the next step from the same x may be given.

    Args:
        model: called as `model(x, sigma, **extra_args)` with sigma of shape (B,); returns x0.
        extra_args: the model's further arguments.
        eps_callback: called after each call of the model.
        info_callback: called after each step with a dictionary.

    Source: Lu et al. 2022, arXiv:2206.00927.
    """

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any] | None = None,
        eps_callback: Callable[[], Any] | None = None,
        info_callback: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.extra_args = extra_args or {}
        self.eps_callback = eps_callback
        self.info_callback = info_callback

    def t(self, sigma: Tensor) -> Tensor:
        """The clock at a noise standard deviation."""
        return sigma.log().neg()

    def sigma(self, t: Tensor) -> Tensor:
        """The noise standard deviation at a clock."""
        return t.neg().exp()

    def eps(
        self, eps_cache: Cache, key: str, x: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Cache]:
        """The noise that the model sees in x at t, and the cache with it under `key`."""
        if key in eps_cache:
            return eps_cache[key], eps_cache
        level = self.sigma(t).to(x)
        sigma = level.reshape(-1) * x.new_ones([x.shape[0]])
        answer = self.model(x, sigma, *args, **self.extra_args, **kwargs)
        denoised = check_answer(type(self).__name__, answer, x).to(x.dtype)
        if self.eps_callback is not None:
            self.eps_callback()
        eps = (x - denoised) / level
        return eps, {**eps_cache, key: eps}

    def dpm_solver_1_step(
        self, x: Tensor, t: Tensor, t_next: Tensor, eps_cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """One step of DPM-Solver-1: equation 3.7, which is DDIM."""
        h = t_next - t
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        return x - (self.sigma(t_next) * h.expm1()).to(x) * eps, cache

    def dpm_solver_2_step(
        self,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        r1: float = 1 / 2,
        eps_cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """One step of DPM-Solver-2: algorithm 4, with an inner level at the share r1 of the way."""
        h = t_next - t
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        s1 = t + r1 * h
        u1 = x - (self.sigma(s1) * (r1 * h).expm1()).to(x) * eps
        eps_r1, cache = self.eps(cache, "eps_r1", u1, s1)
        sigma = self.sigma(t_next)
        straight = x - (sigma * h.expm1()).to(x) * eps
        return straight - (sigma / (2 * r1) * h.expm1()).to(x) * (eps_r1 - eps), cache

    def dpm_solver_3_step(
        self,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        r1: float = 1 / 3,
        r2: float = 2 / 3,
        eps_cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """One step of DPM-Solver-3: algorithm 5, with inner levels at r1 and r2 of the way."""
        h = t_next - t
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        s1, s2 = t + r1 * h, t + r2 * h
        u1 = x - (self.sigma(s1) * (r1 * h).expm1()).to(x) * eps
        eps_r1, cache = self.eps(cache, "eps_r1", u1, s1)
        bend = self.sigma(s2) * (r2 / r1) * ((r2 * h).expm1() / (r2 * h) - 1)
        u2 = x - (self.sigma(s2) * (r2 * h).expm1()).to(x) * eps - bend.to(x) * (eps_r1 - eps)
        eps_r2, cache = self.eps(cache, "eps_r2", u2, s2)
        sigma = self.sigma(t_next)
        bend = sigma / r2 * (h.expm1() / h - 1)
        return x - (sigma * h.expm1()).to(x) * eps - bend.to(x) * (eps_r2 - eps), cache

    def dpm_solver_fast(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        nfe: int,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> Tensor:
        """Even steps of order 3, with one or two lower at the end so that `nfe` calls are made."""
        eta = finite_number("dpm_solver_fast", "eta", eta, 0.0)
        s_noise = finite_number("dpm_solver_fast", "s_noise", s_noise, 0.0)
        if nfe < 1:
            raise ValueError(f"nfe, the calls of the model, must be 1 or more, got {nfe}")
        if eta and not t_end > t_start:
            raise ValueError("eta must be 0 towards noise, where there is none to add")
        noise_sampler = noise_sampler or face().default_noise_sampler(x)
        count = nfe // 3 + 1
        ts = torch.linspace(float(t_start), float(t_end), count + 1, device=x.device)
        tail = [2, 1] if nfe % 3 == 0 else [nfe % 3]
        orders = [3] * (count - len(tail)) + tail
        solve: dict[int, Callable[..., Any]] = {
            1: self.dpm_solver_1_step,
            2: self.dpm_solver_2_step,
            3: self.dpm_solver_3_step,
        }
        for i, order in enumerate(orders):
            t, t_next = ts[i], ts[i + 1]
            aim, up = self._ancestral(t, t_next, t_end.to(t.device), eta)
            eps, cache = self.eps({}, "eps", x, t)
            if self.info_callback is not None:
                denoised = x - self.sigma(t).to(x) * eps
                self.info_callback({"x": x, "i": i, "t": t, "t_up": t, "denoised": denoised})
            x, _ = solve[order](x, t, aim, eps_cache=cache)
            noise = noise_sampler(self.sigma(t), self.sigma(t_next))  # with eta = 0 too, as ever
            noise = check_noise("noise_sampler", noise, x)
            if eta:
                x = x + (up * s_noise).to(x) * noise
        return x

    def _ancestral(self, s: Tensor, t: Tensor, t_end: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Where to step down to on the way to t, not past the end, and what noise leads back."""
        if not eta:
            return t, torch.zeros_like(t)
        a, b = self.sigma(s), self.sigma(t)
        up = torch.minimum(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
        aim = torch.minimum(t_end, self.t((b**2 - up**2) ** 0.5))
        # An end in finer precision than the other clocks may lie a rounding before t.
        return aim, (b**2 - self.sigma(aim) ** 2).clamp_min(0) ** 0.5

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
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
    ) -> tuple[Tensor, dict[str, int]]:
        """DPM-Solver-12 or -23 with adaptive steps: appendix C.

        Each sample steps by itself, until all have come to t_end; those that are there already
        stay in the batch that the model sees, which may count on its length.

        Args:
            x: states at t_start, shape (B, ...).
            t_start, t_end: clocks, shape ().
            order: 2 for DPM-Solver-12, 3 for DPM-Solver-23.
            rtol, atol: tolerances, of which the larger counts.
            h_init: first step of the clock.
            pcoeff, icoeff, dcoeff, accept_safety: see `PIDStepSizeController`.
            eta, s_noise: of the noise added after each step; 0 for the ODE.
            noise_sampler: called as `noise_sampler(sigma, sigma_next)`; where samples stand at
                different levels it is called for each, and its noise for that sample is taken.

        Returns:
            x at t_end and `steps`, `nfe` (calls of the model), `n_accept` and `n_reject` (the most
            of any sample).

        Raises:
            TypeError, ValueError: an option, answer or noise that cannot be, by name.
            FloatingPointError: the model's answer for a sample isn't finite.
            RuntimeError: a sample's step has shrunk to nothing.
        """
        name = "dpm_solver_adaptive"
        if order not in (2, 3):
            raise ValueError(f"order of dpm_solver_adaptive must be 2 or 3, got {order!r}")
        above = {"rtol": rtol, "atol": atol, "accept_safety": accept_safety, "eta": eta}
        above |= {"s_noise": s_noise}
        rtol, atol, accept_safety, eta, s_noise = (
            finite_number(name, key, value, 0.0) for key, value in above.items()
        )
        anywhere = {"pcoeff": pcoeff, "icoeff": icoeff, "dcoeff": dcoeff, "h_init": h_init}
        pcoeff, icoeff, dcoeff, h_init = (
            finite_number(name, key, value) for key, value in anywhere.items()
        )
        if rtol == atol == 0:
            raise ValueError(f"rtol and atol of {name} are both 0, which no step can meet")
        if h_init == 0:
            raise ValueError(f"h_init of {name}, the first step, must not be 0")
        if accept_safety > LARGEST:
            raise ValueError(
                f"accept_safety of {name} must be at most {LARGEST:.2f}, how much a step can grow, "
                f"or none is accepted, got {accept_safety}"
            )
        forward = bool(t_end > t_start)
        if eta and not forward:
            raise ValueError("eta must be 0 towards noise, where there is none to add")
        first = abs(h_init) * (1 if forward else -1)
        gains = pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety
        pids = [PIDStepSizeController(first, *gains) for _ in range(len(x))]
        least, relative = torch.tensor([atol, rtol], device=x.device).unbind()
        noise_sampler = noise_sampler or face().default_noise_sampler(x)
        column = (-1, *[1] * (x.ndim - 1))
        t_end = t_end.to(x.device)
        s = t_start.to(x.device).expand(len(x)).reshape(column)
        bound = torch.minimum if forward else torch.maximum
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        accepts, rejects = [0] * len(x), [0] * len(x)
        before = x
        while True:
            active = (s < t_end - 1e-5 if forward else s > t_end + 1e-5).flatten().tolist()
            if not any(active):
                return x, info
            h = torch.tensor([pid.h for pid in pids], dtype=torch.float64, device="cpu")
            h = h.to(s.dtype).to(s.device).reshape(column)
            on = torch.tensor(active, device=x.device).reshape(column)
            # Those that have arrived are asked about a step back, which is then forgotten.
            t = torch.where(on, bound(t_end, s + h), s - first)
            aim, up = self._ancestral(s, t, t_end, eta) if forward else (t, t)
            aim = torch.where(on, aim, t)
            eps, cache = self.eps({}, "eps", x, s)
            denoised = x - self.sigma(s).to(x) * eps
            if order == 2:
                low, cache = self.dpm_solver_1_step(x, s, aim, eps_cache=cache)
                high, cache = self.dpm_solver_2_step(x, s, aim, eps_cache=cache)
            else:
                low, cache = self.dpm_solver_2_step(x, s, aim, r1=1 / 3, eps_cache=cache)
                high, cache = self.dpm_solver_3_step(x, s, aim, eps_cache=cache)
            delta = torch.maximum(least, relative * torch.maximum(low.abs(), before.abs()))
            # With atol = 0 a value that is 0 twice is exact, not 0 / 0.
            scaled = torch.where(low == high, 0.0, (low - high) / delta)
            norms = torch.stack([torch.linalg.norm(one) for one in scaled.reshape(len(x), -1)])
            errors = norms / scaled[0].numel() ** 0.5
            good = [
                self._judge(i, pids[i], error, s, t, denoised) if active[i] else False
                for i, error in enumerate(errors.tolist())
            ]
            if any(good):
                yes = torch.tensor(good, device=x.device).reshape(column)
                noise = self._noise(noise_sampler, x, s, t, good, eta)
                if eta:
                    up = torch.where(yes, up, torch.zeros_like(up))
                    high = high + (up * s_noise).to(x) * noise.to(x)
                x, before = torch.where(yes, high, x), torch.where(yes, low, before)
                s = torch.where(yes, t, s)
            for i, well in enumerate(good):
                accepts[i] += active[i] and well
                rejects[i] += active[i] and not well
            info["n_accept"], info["n_reject"] = max(accepts), max(rejects)
            info["nfe"] += order
            info["steps"] += 1
            if self.info_callback is not None:
                noisiest = s.min() if forward else s.max()
                worst = errors[on.flatten()].max()
                h_next = max((pid.h for pid, a in zip(pids, active, strict=True) if a), key=abs)
                told = {"x": x, "i": info["steps"] - 1, "t": noisiest, "t_up": noisiest}
                self.info_callback(
                    {**told, "denoised": denoised, "error": worst, "h": h_next, **info}
                )

    def _judge(
        self,
        i: int,
        pid: PIDStepSizeController,
        error: float,
        s: Tensor,
        t: Tensor,
        denoised: Tensor,
    ) -> bool:
        """Whether a sample's step is accepted; its controller has its next."""
        if not math.isfinite(error) and not bool(denoised[i].isfinite().all()):
            raise FloatingPointError(
                f"the model's answer for sample {i} at sigma {float(self.sigma(s[i])):.4g} is not "
                "finite: check it for overflow or NaN"
            )
        if bool(t[i] == s[i]):
            raise RuntimeError(
                f"sample {i} is stuck at sigma {float(self.sigma(s[i])):.4g}: its step has shrunk "
                f"to {abs(pid.h):.1g}; raise rtol or atol, or check the model for NaN below it"
            )
        return pid.propose_step(error) if math.isfinite(error) else pid.retreat()

    def _noise(
        self,
        noise_sampler: NoiseSampler,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        good: list[bool],
        eta: float,
    ) -> Tensor:
        """Unit noise over each accepted sample's own interval; with eta = 0 drawn as ever."""
        rows = [i for i, well in enumerate(good) if well]
        starts, ends = (self.sigma(clock).flatten() for clock in (s, t))
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        noise: dict[tuple[float, float], Tensor] = {}
        for i in rows:
            if spans[i] not in noise and (eta or not noise):
                made = noise_sampler(starts[i], ends[i])
                noise[spans[i]] = check_noise("noise_sampler", made, x)
        one = next(iter(noise.values()))
        if len(noise) == 1:
            return one
        return torch.stack([noise.get(span, one)[i] for i, span in enumerate(spans)])
