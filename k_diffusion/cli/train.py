"""`k-diffusion train`: a model from a config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Train:
    """Train a model as a config says."""

    config: str = ""
    """file"""

    def run(self) -> None: ...
