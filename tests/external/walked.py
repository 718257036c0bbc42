"""Schedulers walked through as a pipeline does."""

from __future__ import annotations

import diffusers
import torch

from k_diffusion.external.lays import ForeignScheduler
from k_diffusion.external.plan_scheduler import PlanScheduler
from tests.external import tiny_pipelines as tiny

SIZE = {"height": 16, "width": 16, "output_type": "latent"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def ddim(**options):
    return diffusers.DDIMScheduler(**{**tiny.BETAS, "clip_sample": False, **options})


def plan(config=None, *args, **options):
    return PlanScheduler.from_config((config or ddim()).config, *args, **options)


class Network(torch.nn.Module):
    """A fixed answer that depends on all that a network sees."""

    def forward(self, x, time):
        return torch.tanh(x) + 0.1 * torch.cos(time / 100).reshape(-1, 1)


def levels_of_own(own):
    return ForeignScheduler(own).levels(5).sigmas


def walk(scheduler, x, dtype=None, edit=None, generator=None):
    """The loop of a pipeline."""
    network = Network()
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        output = network(seen, t.expand(len(x)).to(x.dtype))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert dtype is None or x.dtype == dtype
        x = x if edit is None else edit(i, x)
    return x
