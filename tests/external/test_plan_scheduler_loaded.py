"""A pipeline that was saved with a PlanScheduler in it, loaded by a program that knows of none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from k_diffusion import PlanScheduler
from tests.external.tiny_pipelines import tiny_sd

ROOT = Path(__file__).parents[2]
LOADS = """
import sys, torch
from k_diffusion import external
sampler = external.load(sys.argv[1])
print(sampler.ksampler((4, 8, 8)).solver.name if hasattr(sampler, "ksampler") else "")
torch.save(sampler.sample("a cat", steps=4, seed=3, to="latent"), sys.argv[2])
"""


def test_a_fresh_program_loads_it_and_samples_with_its_solver(tmp_path):
    pipe = tiny_sd()
    pipe.scheduler = PlanScheduler.from_config(
        pipe.scheduler.config, solver="dpmpp_3m_sde", schedule="karras"
    )
    pipe.save_pretrained(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path / "pipe"), str(tmp_path / "latents.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    latents = torch.load(tmp_path / "latents.pt")
    pipe.set_progress_bar_config(disable=True)
    known = pipe(
        "a cat",
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert (latents - known).abs().max() < 1e-4 * known.abs().max()
