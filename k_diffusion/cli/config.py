"""`k-diffusion config`: a run's config in full, every key explained, a file to begin with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from .plugins import Plugins, load_plugins
from .problems import UsageError, as_usage
from .values import MoreSettings, joined


@dataclass
class Config:
    """Print a run's config with all its defaults; or explain the keys; or write a first config."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE|KEY")] = ()
    """A config, TOML or JSON (an established one is printed as a run of today). With --explain:
    which keys, such as optimizer or model.unet; none: all. With --template: which model."""
    explain: bool = False
    """Say of every key what it takes, its default and what it is for."""
    template: bool = False
    """Print a TOML file to begin with, every key in it, those at their defaults commented out."""
    format: Literal["toml", "json"] | None = None
    """Of a config, TOML unless told otherwise; --explain --format json gives a list of keys."""
    set: MoreSettings = ()
    """Keys of the config to change, such as optimizer.lr=3e-4,model.channels=64; again for
    more."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        load_plugins(self.plugin)
        if self.explain and self.template:
            raise UsageError("--explain and --template are two things: give one of them")
        if (self.explain or self.template) and self.set:
            raise UsageError("--set changes a config, which --explain and --template have not")
        with as_usage():
            if self.explain:
                print(self._explained())
            elif self.template:
                print(self._template())
            else:
                print(self._in_full())

    def _explained(self) -> str:
        from k_diffusion.training.explain import as_text, config_sections, narrowed

        if self.format == "toml":
            raise UsageError("--explain has no TOML: it is plain text, or --format json")
        sections = config_sections()
        if self.names:
            sections = [part for name in self.names for part in narrowed(sections, name)]
        if self.format == "json":
            return json.dumps([asdict(section) for section in sections], indent=2)
        return as_text(sections)

    def _template(self) -> str:
        from k_diffusion.training.config_text import template

        if self.format == "json":
            raise UsageError("--template has comments, which JSON has not: leave out --format")
        if len(self.names) > 1:
            raise UsageError(f"--template takes one model, got {' and '.join(self.names)}")
        return template(*self.names)

    def _in_full(self) -> str:
        from k_diffusion.config.run import load_run
        from k_diffusion.training.config_text import as_json, as_toml

        if len(self.names) != 1:
            got = f"one config, not {' and '.join(self.names)}" if self.names else "a config's file"
            raise UsageError(f"give {got}; or --explain for the keys, --template for a first file")
        config = load_run(self.names[0], joined(self.set))
        return as_json(config) if self.format == "json" else as_toml(config)
