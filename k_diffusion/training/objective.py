"""What a run makes small: the denoising loss as its config says, and what is learned beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models.mp_layers import Uncertainty, UnitRows
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.densities import DENSITIES, make_density
from k_diffusion.training.extra_losses import ExtraLoss, Outcome
from k_diffusion.training.loss import (
    mean_square,
    noisy,
    uncertainty_loss,
    variance_loss,
)
from k_diffusion.training.named import options_of
from k_diffusion.training.named_tensors import copy_tensors, named_tensors
from k_diffusion.training.sections import AUTO
from k_diffusion.training.weightings import make_weighting

FEATURES = 128
"""Fourier features of the level, for the uncertainty of a network without one of its own."""


class Objective(nn.Module):
    """Denoiser and loss as the one module that is wrapped for processes and precision.

    Args:
        denoiser: what is trained.
        weighting: log(alpha / sigma) -> weight of |D - x0|²; with `variance` that of what the
            network predicts.
        scales: of a frequency-weighted loss, see `mean_square`.
        uncertainty: u of `uncertainty_loss`: called with log(alpha / sigma), shape (B,).
        variance: whether the network tells the log variance of its own error, see `variance_loss`.
        extra: losses added to it.

    Attributes:
        raws: names of the raw inputs that `forward` has to be given.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        weighting: Callable[[Tensor], Tensor],
        *,
        scales: float = 1.0,
        uncertainty: Callable[[Tensor], Tensor] | None = None,
        variance: bool = False,
        extra: tuple[ExtraLoss, ...] = (),
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting
        self.scales = scales
        self.variance = variance
        self.uncertainty = uncertainty
        self.extra = extra
        self.extra_modules = nn.ModuleDict({e.name: e.module for e in extra if e.module})
        self.raws = tuple(dict.fromkeys(name for e in extra for name in e.raws))
        self._terms: dict[str, list[Tensor]] = {}
        # Found once: to walk through a network's modules in every step takes a millisecond.
        self._forced = [
            module
            for name, module in self.named_modules()
            if isinstance(module, UnitRows) and not name.startswith("denoiser.")
        ]

    def forward(
        self,
        x0: Tensor,
        sigma: Tensor,
        noise: Tensor,
        raws: Mapping[str, Tensor] | None = None,
        **condition: Any,
    ) -> Tensor:
        """The loss of each sample, float32 or better, shape (B,); see `denoising_loss`.

        Args:
            raws: what the extra losses asked for.
        """
        x, half_log_snr = noisy(self.denoiser, x0, sigma, noise)
        log_variance = None
        if self.variance:
            tell: Any = self.denoiser.with_variance
            denoised, log_variance = tell(x, sigma, **condition)
        else:
            denoised = self.denoiser(x, sigma, **condition)
        square = mean_square(denoised - x0, self.scales)
        weight = self.weighting(half_log_snr).to(square.dtype)
        loss = plain = weight * square
        if log_variance is not None:
            loss = variance_loss(plain, log_variance)
        # After the network, whose weights are in one place then, were they spread over processes.
        if self.uncertainty is not None:
            with torch.autocast(x0.device.type, enabled=False):
                loss = uncertainty_loss(plain, self.uncertainty(half_log_snr))
        if loss is not plain or self.extra:
            self._note("denoising", plain)
        if self.extra:
            outcome = Outcome(
                x0=x0,
                denoised=denoised,
                x=x,
                noise=noise,
                sigma=sigma,
                half_log_snr=half_log_snr,
                weight=weight,
                condition=condition,
                raws=raws or {},
            )
            for extra in self.extra:
                added = extra(outcome)
                self._note(extra.name, added)
                loss = loss + extra.weight * added.to(loss.dtype)
        return loss

    # ------------------------------------------------- its terms, for the log

    def _note(self, name: str, values: Tensor) -> None:
        self._terms.setdefault(name, []).append(values.detach())

    def forget_terms(self) -> None:
        """Begin anew to gather the terms of a step's loss."""
        self._terms.clear()

    def terms(self) -> dict[str, Tensor]:
        """Name -> mean over the samples since `forget_terms`, on the device, of shape ().

        "denoising" is the weighted denoising loss, before what is learned divides it; the others
        are the extra losses before their weights. Empty where the denoising loss is all there is.
        """
        return {name: torch.cat(parts).mean() for name, parts in self._terms.items()}

    # ------------------------------------------------- its own weights

    def own_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers beside the denoiser's, by name; not copies."""
        return {
            name: tensor
            for name, tensor in named_tensors(self).items()
            if not name.startswith("denoiser.")
        }

    def load_own_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Copy what `own_tensors` gave.

        Raises:
            ValueError: they are of another loss.
        """
        try:
            copy_tensors(saved, self.own_tensors())
        except ValueError as error:
            reason = str(error).replace("in the network", "in this loss").replace("network", "loss")
            raise ValueError(
                f"it was trained with another loss ({reason}): give its loss.uncertainty and "
                "loss.extra"
            ) from None

    @property
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of `own_tensors` that are trained."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("denoiser.")
        }

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimiser of the network's weights move the loss's own, too, without decay."""
        if own := list(self.own_parameters.values()):
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})

    def named_with(self, network: nn.Module) -> nn.Module:
        """A view of a network whose `named_parameters` has the loss's own ones as "loss/..."."""
        return _Named(network, self) if self.own_parameters else network

    def after_step(self) -> None:
        """Put right what a step has put wrong, such as the lengths of weights."""
        network = getattr(self.denoiser, "network", self.denoiser)
        getattr(network, "after_step", lambda: None)()
        for module in self._forced:
            module.force()


class _Named(nn.Module):
    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self._of = (network, objective)  # as parts of this module they would have its names

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        network, objective = self._of
        yield from network.named_parameters(*args, **options)
        for name, parameter in objective.own_parameters.items():
            yield f"loss/{name}", parameter


class LevelUncertainty(nn.Module):
    """u for a network that has none: one layer on Fourier features of log(sigma / alpha) / 4
    (Karras et al. 2024, arXiv:2312.02696, eqs. 14 to 16 and 75)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Uncertainty(FEATURES, 1.0)

    def forward(self, half_log_snr: Tensor) -> Tensor:
        """Shape (B,) in and out."""
        return self.head(half_log_snr * -0.25)


def has_trait(network: Any, name: str) -> bool:
    """Whether a network, or its config, has a true attribute, such as "has_variance"."""
    return bool(getattr(network, name, getattr(getattr(network, "config", None), name, False)))


def make_objective(config: TrainConfig, denoiser: Any) -> Objective:
    """The objective of a run.

    Args:
        config: of the run, "auto" among its values.
        denoiser: of the network that is trained, whose traits `has_uncertainty` (it has
            `uncertainty(t)`) and `has_variance` (it takes `return_variance=True`) decide what
            "auto" is.

    Raises:
        ConfigError: loss and network do not fit each other.
    """
    loss = config.loss
    network = getattr(denoiser, "network", denoiser)
    name = type(network).__name__
    varies, tells = (has_trait(network, f"has_{trait}") for trait in ("variance", "uncertainty"))
    variance = varies if loss.variance == AUTO else loss.variance is True
    uncertainty = tells if loss.uncertainty == AUTO else loss.uncertainty is True
    if tells and not uncertainty:
        raise ConfigError(
            f"loss.uncertainty is false, but {name} has has_uncertainty, which nothing would "
            "train: leave one of them out"
        )
    if variance and not (varies and hasattr(denoiser, "with_variance")):
        raise ConfigError(
            f"loss.variance is true, but {name} tells no variance: build it with has_variance"
        )
    if variance:
        for key, said in (
            ("weighting", loss.weighting != AUTO),
            ("scales", loss.scales != 1),
            ("uncertainty", uncertainty),
        ):
            if said:
                raise ConfigError(
                    f"loss.{key} = {getattr(loss, key)!r} has no place in the loss of {name}, "
                    "which tells its own variance: leave it out, or give loss.variance = false"
                )
    sigma_data = getattr(denoiser, "sigma_data", 1.0)
    try:
        extra = tuple(ExtraLoss(name, **options) for name, options in loss.extra.items())
        weighting = make_weighting(config.weighting, sigma_data, **loss.weighting_options)
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from None
    log_variance: Callable[[Tensor], Tensor] | None = None
    if tells:
        log_variance = NetworkUncertainty(denoiser)
    elif uncertainty:
        log_variance = LevelUncertainty()
    return Objective(
        denoiser,
        weighting,
        scales=loss.scales,
        uncertainty=log_variance,
        variance=variance,
        extra=extra,
    )


class NetworkUncertainty:
    """u of a network that has it, at its own times."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    def __call__(self, half_log_snr: Tensor) -> Tensor:
        """Shape (B,) in and out."""
        u: Tensor = self.denoiser.network.uncertainty(self.denoiser.time(half_log_snr).float())
        return u


def density_of(config: TrainConfig, denoiser: Any) -> Callable[[Tensor], Tensor]:
    """The density of a run's noise levels; its sigma_data is the denoiser's where none is given.

    Raises:
        ConfigError: its options do not fit.
    """
    options: dict[str, Any] = dict(config.loss.density_options)
    known = options_of(DENSITIES[config.density]) if config.density in DENSITIES else {}
    if "sigma_data" in known and hasattr(denoiser, "sigma_data"):
        options.setdefault("sigma_data", denoiser.sigma_data)
    try:
        return make_density(config.density, denoiser.process, **options)
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from None
