"""The established wrappers: networks of other projects as variance-exploding Denoisers.

x is x0 + sigma · eps in all of them; the network sees c_in · x and its own time t. A subclass may
override `get_eps` or `get_v` (how the network is called), `get_scalings`, `sigma_to_t`,
`t_to_sigma`, `loss` and `forward`.

Source: Karras et al. 2022, arXiv:2206.00364, appendix C.3 (discrete networks on continuous
levels) and eq. 7 (the scalings).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.exploding import Default, VarianceExploding, at_least_float32
from k_diffusion.utils.scheduler import CustomScheduler, Scheduler
from k_diffusion.utils.tensors import append_dims


class _PredictsV(VarianceExploding):
    """What the networks that predict v share; abstract: `sigma_to_t` is to come."""

    sigma_data: float
    sigma_to_t: Any

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out (below 0) and c_in, each of sigma's shape."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, -sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's v; a subclass says here how the network is called."""
        return self.inner_model(*args, **kwargs)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The mean squared error of each sample's v, float32 or better, shape (B,).

        Args:
            input: clean data, shape (B, ...).
            noise: unit Gaussian, of its shape.
            sigma: noise standard deviations above 0, shape (B,).
            kwargs: for the network.
        """
        c_skip, c_out, c_in = self._scalings(input, sigma)
        x = input + noise * append_dims(sigma.to(input), input.ndim)
        t = self.sigma_to_t(sigma.to(input.device))
        v = self.get_v(self._for_network(x * c_in), t, **kwargs)
        error = at_least_float32(v - (input - c_skip * x) / c_out)
        return error.pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The estimate of x0.

        Args:
            input: noisy data, shape (B, ...).
            sigma: noise standard deviations, shape (B,).
            kwargs: for the network.
        """
        c_skip, c_out, c_in = self._scalings(input, sigma)
        t = self.sigma_to_t(sigma.to(input.device))
        v = self.get_v(self._for_network(input * c_in), t, **kwargs)
        return (v * c_out + input * c_skip).to(input.dtype)


class VDenoiser(_PredictsV):
    """A network that predicts v at continuous times in [0, 1], where sigma = tan(pi t / 2)
    (Salimans and Ho 2022, arXiv:2202.00512).

    Args:
        inner_model: called as `inner_model(x, t, **kwargs)`, t of sigma's shape and dtype.
    """

    def __init__(self, inner_model: Any) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = 1.0

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The network's time at sigma."""
        return (at_least_float32(sigma).atan() / math.pi * 2).to(sigma.dtype)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The inverse of `sigma_to_t`."""
        return (at_least_float32(t) * math.pi / 2).tan().to(t.dtype)


def _schedule(sigmas: Tensor) -> Scheduler:
    """An infinite last sigma (zero terminal SNR) is left out: it is no level of this path."""
    sigmas = sigmas.cpu().double()  # not every device has float64
    return CustomScheduler(alphas_cumprod=(1 / (1 + sigmas[sigmas.isfinite()] ** 2)).tolist())


class DiscreteSchedule(VarianceExploding):
    """Continuous noise levels for a network that knows a list of them.

    Time t is the place in that list; between places log sigma is interpolated linearly.

    Args:
        sigmas: noise standard deviations, not decreasing, shape (N,), N of at least 2.
        quantize: whether `sigma_to_t` gives the nearest whole place.

    Raises:
        ValueError: the sigmas are of another shape, not above 0, not a number or not in order.
    """

    sigmas: Tensor
    log_sigmas: Tensor
    process: Any = Default(lambda self: _schedule(self.sigmas))
    """The list as a schedule: KSampler takes from it what its scheduler leaves open."""

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        sigmas = at_least_float32(sigmas)
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(
                f"sigmas must be a list of at least 2 levels, got shape {tuple(sigmas.shape)}"
            )
        if not sigmas.is_meta:
            if not bool((sigmas > 0).all()):
                raise ValueError(
                    "sigmas must be above 0, but the least is "
                    f"{sigmas.min().item()} (alphas_cumprod of 1 or more gives no level; in low "
                    "precision it rounds to 1: give float32)"
                )
            if not bool((sigmas[1:] >= sigmas[:-1]).all()):
                raise ValueError(
                    "sigmas must go from clean to noisy, but they decrease somewhere: sort them"
                )
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Halving a network must not halve its schedule: neighbouring levels would become one.
        before = {name: self._buffers[name] for name in ("sigmas", "log_sigmas")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    @property
    def sigma_min(self) -> Tensor:
        """The least noise standard deviation, shape ()."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The greatest noise standard deviation, shape ()."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """Noise standard deviations from the greatest to the least, then 0.

        Args:
            n: how many above 0, evenly in t; None: the whole list.
        """
        if n is None:
            sigmas = self.sigmas.flip(0)
        else:
            last = len(self.sigmas) - 1
            sigmas = self.t_to_sigma(torch.linspace(last, 0, n, device=self.sigmas.device))
        return torch.cat([sigmas, sigmas.new_zeros([1])])

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The time at sigma, of its shape and on its device; the nearest end outside the list.

        Args:
            sigma: noise standard deviations, any shape; 0 and infinity are allowed.
            quantize: whole places, int64, or else numbers of at least float32; None: as the
                object was made.
        """
        quantize = self.quantize if quantize is None else quantize
        table = self.log_sigmas.to(sigma.device)
        precise = table.to(torch.promote_types(table.dtype, sigma.dtype))
        log_sigma = sigma.to(precise.dtype).log().clamp(precise[0], precise[-1])
        # The last place whose level is not above sigma, and the one after it.
        passed = torch.searchsorted(precise, log_sigma.contiguous(), right=True)
        low = (passed - 1).clamp(0, len(table) - 2)
        below, above = table[low], table[low + 1]
        if quantize:
            return low + ~(log_sigma - below <= above - log_sigma)
        share = (log_sigma - below) / (above - below)
        return low + torch.where(log_sigma >= above, 1.0, share)  # 0 / 0 where both are the last

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The inverse of `sigma_to_t`: noise standard deviations of t's shape.

        Args:
            t: places in the list, from 0 to N - 1.
        """
        t = at_least_float32(t)
        table = self.log_sigmas.to(t.device)
        low = t.floor().long()
        w = t - low
        below, above = table[low], table[t.ceil().long()]
        # At a place itself its neighbour does not count, be it infinite.
        return torch.where(w > 0, (1 - w) * below + w * above, below).exp()


def _sigmas(alphas_cumprod: Tensor) -> Tensor:
    alphas_cumprod = at_least_float32(alphas_cumprod)
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A network that predicts the noise at discrete times (Ho et al. 2020, arXiv:2006.11239).

    Args:
        model: called as `model(x, t, **kwargs)` by `get_eps`.
        alphas_cumprod: its alpha² at times 0, 1, ..., decreasing, shape (N,).
        quantize: whether it is asked at whole times only.
    """

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model
        self.sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_out and c_in, each of sigma's shape."""
        return -sigma, 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's noise; a subclass says here how the network is called."""
        return self.inner_model(*args, **kwargs)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The mean squared error of each sample's noise, float32 or better, shape (B,).

        Args:
            input: clean data, shape (B, ...).
            noise: unit Gaussian, of its shape.
            sigma: noise standard deviations, shape (B,).
            kwargs: for the network.
        """
        _, c_in = self._scalings(input, sigma)
        x = input + noise * append_dims(sigma.to(input), input.ndim)
        t = self.sigma_to_t(sigma.to(input.device))
        eps = self.get_eps(self._for_network(x * c_in), t, **kwargs)
        return at_least_float32(eps - noise).pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The estimate of x0.

        Args:
            input: noisy data, shape (B, ...).
            sigma: noise standard deviations, shape (B,).
            kwargs: for the network.
        """
        c_out, c_in = self._scalings(input, sigma)
        t = self.sigma_to_t(sigma.to(input.device))
        eps = self.get_eps(self._for_network(input * c_in), t, **kwargs)
        return (input + eps * c_out).to(input.dtype)


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """A network of guided-diffusion or its kin.

    Args:
        model: called as `model(x, t, **kwargs)`.
        diffusion: has its `alphas_cumprod`.
        quantize: whether it is asked at whole times only.
        has_learned_sigmas: whether it returns a variance too, as a second half of the channels,
            which is left out.
        device: of the list of levels.
    """

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        alphas_cumprod = torch.as_tensor(diffusion.alphas_cumprod).to(device, torch.float32)
        super().__init__(model, alphas_cumprod, quantize=quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's noise, without its variance."""
        output = self.inner_model(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """A noise-predicting network of latent-diffusion or Stable Diffusion.

    Args:
        model: called as `model.apply_model(x, t, **kwargs)`, has `alphas_cumprod`.
        quantize: whether it is asked at whole times only.
        device: has no effect: the levels lie where `alphas_cumprod` does.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's noise."""
        return self.inner_model.apply_model(*args, **kwargs)


class DiscreteVDDPMDenoiser(_PredictsV, DiscreteSchedule):
    """A network that predicts v at discrete times.

    Args:
        model: called as `model(x, t, **kwargs)` by `get_v`.
        alphas_cumprod: its alpha² at times 0, 1, ..., decreasing, shape (N,).
        quantize: whether it is asked at whole times only.
    """

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model
        self.sigma_data = 1.0


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """A v-predicting network of latent-diffusion or Stable Diffusion.

    Args:
        model: called as `model.apply_model(x, t, cond)`, has `alphas_cumprod`.
        quantize: whether it is asked at whole times only.
        device: has no effect: the levels lie where `alphas_cumprod` does.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        """The network's v; keywords other than `cond` are not passed on."""
        return self.inner_model.apply_model(x, t, cond)
