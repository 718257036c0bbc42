"""What to say of a step whose loss or gradient is not finite: which images, levels and module.

Such a step changes nothing and is counted (see `Trainer`). It is computed once more here, forward
only and with the same randomness, to find where the first value went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k_diffusion.training.inputs import Inputs
from k_diffusion.utils import modules

if TYPE_CHECKING:
    from k_diffusion.training.parallel import Processes

NAMED = 8
"""Images named in a report; the others are counted."""
ONLY_NORM = "the norm of the gradient, each part of which is finite"


@dataclass(frozen=True)
class BadStep:
    """A step that was not finite.

    Attributes:
        step: its number, counted from 1.
        loss: mean over the whole batch.
        grad_norm: norm of the gradient; nan where it was not computed.
        images: names of the images whose loss was not finite; where each loss was, of none, since
            a gradient is everybody's.
        more_images: how many there were beyond those named.
        sigmas: least and greatest noise level of those images, or else of all.
        where: the first thing that was not finite: "the data", a module or a weight's gradient.
    """

    step: int
    loss: float
    grad_norm: float
    images: tuple[str, ...]
    more_images: int
    sigmas: tuple[float, float]
    where: str

    def __str__(self) -> str:
        more = f" and {self.more_images} more" if self.more_images else ""
        images = f", from {', '.join(self.images)}{more}" if self.images else ""
        low, high = self.sigmas
        levels = f"sigma {low:.4g}" if low == high else f"sigma {low:.4g} to {high:.4g}"
        return (
            f"loss {self.loss}, gradient norm {self.grad_norm}{images}, at {levels}; first not "
            f"finite: {self.where}"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON data, which knows no nan: such a loss or norm is its name."""
        facts = asdict(self)
        for key in ("loss", "grad_norm"):
            if not math.isfinite(facts[key]):
                facts[key] = str(facts[key])
        return facts


def examine(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    losses: Tensor,
    inputs: Inputs,
    network: nn.Module,
    gradients: Mapping[str, Tensor],
    replay: Callable[[Inputs], Any],
    name: Callable[[int], str],
    processes: Processes,
) -> BadStep:
    """Find out what was wrong with a step; all processes do so together, and all are told.

    Args:
        step, loss, grad_norm: see `BadStep`.
        losses: of each sample of this process, shape (B,).
        inputs: of this process.
        network: whose modules are watched.
        gradients: by the weights' names, as the step computed them; of shards, this process's.
        replay: computes some inputs forward once more, as in the step.
        name: number of an image -> what to call it.
        processes: of the run.
    """
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    some = bad or range(len(inputs))
    sigmas = inputs.sigma[list(some)].double()
    # Alone, the bad samples take another path through float arithmetic than among the others: only
    # the whole batch shows again what went wrong there. Sharded weights are gathered on the way,
    # so that all processes compute it where one has to.
    module = ""
    if processes.any(bool(bad)):
        module = first_bad_module(network, lambda: replay(inputs))
    report = BadStep(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        images=tuple(name(int(inputs.indices[i])) for i in bad[:NAMED]),
        more_images=max(0, len(bad) - NAMED),
        sigmas=(float(sigmas.min()), float(sigmas.max())),
        where=_where(inputs, bad, module, gradients),
    )
    return joined(processes.gather(report))


def joined(reports: Sequence[BadStep]) -> BadStep:
    """What several processes found of one step, each in its part of the batch."""
    # Whose images were all well knows neither their levels nor the module.
    having = [r for r in reports if r.images] or list(reports)
    images = [image for r in having for image in r.images]
    more = sum(r.more_images for r in having)
    found = [r.where for r in having if r.where != ONLY_NORM]
    return replace(
        reports[0],
        images=tuple(images[:NAMED]),
        more_images=more + max(0, len(images) - NAMED),
        sigmas=(min(r.sigmas[0] for r in having), max(r.sigmas[1] for r in having)),
        where=found[0] if found else ONLY_NORM,
    )


def _where(
    inputs: Inputs,
    bad: list[int],
    module: str,
    gradients: Mapping[str, Tensor],
) -> str:
    if bad:
        if not inputs.x0[bad].isfinite().all():
            return "the data"
        for keyword, value in inputs.condition.items():
            if value.is_floating_point() and not value[bad].isfinite().all():
                return f"the condition {keyword}"
        return module or "the loss, of a finite network output"
    for parameter, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the gradient of {parameter}"
    return ONLY_NORM


@torch.no_grad()
def first_bad_module(network: nn.Module, run: Callable[[], Any]) -> str:
    """Name and kind of the first module whose output is not finite as `run` calls the network.

    Empty where all outputs are finite. A module without parts comes before one that holds it.
    Buffers and the state of torch's global generators are as before afterwards.
    """
    with (
        unchanged_buffers(network),
        unchanged_generators(network),
        modules.first_bad_module(network) as found,
    ):
        run()
    return found[0] if found else ""


@contextmanager
def unchanged_buffers(network: nn.Module) -> Iterator[None]:
    """Within the block the network may be called; what that changes in its buffers is undone."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def unchanged_generators(network: nn.Module) -> Iterator[None]:
    """Within the block torch's global generators, of the CPU and of the network's devices, may be
    drawn from; their state comes back."""
    devices = {p.device for p in network.parameters() if p.device.type in ("cuda", "xpu")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=sorted(devices, key=str), device_type=kind):
        yield
