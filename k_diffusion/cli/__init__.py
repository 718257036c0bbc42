"""The command line `k-diffusion`: train, sample, info, samplers."""

from .app import main

__all__ = ["main"]
