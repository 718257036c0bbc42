"""`k-diffusion doctor`: what is off with a run, and what to try."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from .drawing import pick_device
from .plugins import Plugins, load_plugins
from .problems import UsageError, as_usage

if TYPE_CHECKING:
    from k_diffusion.training.doctor import Report

WIDTH = 96


@dataclass
class Doctor:
    """Say in plain words what is off with a run, each with the change to try.

    It reads the run's metrics, and computes a little with its newest checkpoint and some of its
    data, where that can be opened. Nothing in the folder is changed. Findings are no failure: the
    exit code is 0.
    """

    run_folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder."""
    metrics_only: bool = False
    """Only read the metrics: quick, without weights and data."""
    images: int = 64
    """Images of the data that losses are measured on."""
    json: bool = False
    """Print JSON."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        from k_diffusion.training.doctor import examine_run

        if self.images < 2:
            raise UsageError(f"--images is {self.images}; give a whole number of at least 2")
        load_plugins(self.plugin)
        device = "cpu" if self.metrics_only else pick_device(self.device)
        with as_usage():
            report = examine_run(
                self.run_folder, weights=not self.metrics_only, device=device, images=self.images
            )
        print(json.dumps(report.to_json(), indent=2) if self.json else as_text(report))


def as_text(report: Report) -> str:
    """The report as plain text."""
    count = len(report.findings)
    what = (
        "nothing is off"
        if not count
        else "1 thing is off"
        if count == 1
        else f"{count} things are off"
    )
    parts = [f"{report.run}, {report.images_seen:,} images seen: {what}"]
    for finding in report.findings:
        said = _filled(f"{finding.check}: {finding.says}", "- ")
        parts.append(f"{said}\n{_filled(f'try: {finding.change}', '  ')}")
    if report.fine:
        parts.append(_filled(f"fine: {', '.join(report.fine)}", ""))
    if report.unseen:
        lines = [_filled(f"{name}: {why}", "- ") for name, why in _joined(report).items()]
        parts.append("\n".join(["not looked at:", *lines]))
    return "\n\n".join(parts)


def _joined(report: Report) -> dict[str, str]:
    """Checks that could not be made for one reason, together."""
    reasons: dict[str, list[str]] = {}
    for name, why in report.unseen.items():
        reasons.setdefault(why, []).append(name)
    return {", ".join(names): why for why, names in reasons.items()}


def _filled(text: str, head: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent="  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
