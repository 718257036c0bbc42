"""Plans as JSON files: to keep, to read, to run elsewhere. Loading one runs no code."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.plan import Churn, Combine, Draw, Plan, Step
from k_diffusion.utils.levels import Level, Levels, make_path

FORMAT, VERSION = "k_diffusion plan", 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data; floats keep every bit."""

    def operation(op: Draw | Combine) -> dict[str, Any]:
        if isinstance(op, Combine):
            return {"name": op.name, "terms": [list(t) for t in op.terms], "drop": list(op.drop)}
        iv = op.interval
        noise = {
            "start": asdict(iv.start),
            "end": asdict(iv.end),
            "fresh": iv.fresh,
            "path": iv.path,
        }
        return {"name": op.name, "noise": noise, "drop": list(op.drop)}

    return {
        "format": FORMAT,
        "version": VERSION,
        "solver": plan.solver,
        "options": {k: asdict(v) if isinstance(v, Churn) else v for k, v in plan.options},
        "path": plan.levels.path.name,
        "inverted": plan.levels.inverted,
        "levels": [asdict(level) for level in plan.levels],
        "steps": [
            {
                "operations": [operation(op) for op in step.operations],
                "state": step.state,
                "level": asdict(step.level),
                "answers": list(step.answers),
                "drop": list(step.drop),
                "start": step.start,
            }
            for step in plan.steps
        ],
        "last": [operation(op) for op in plan.last],
        "result": plan.result,
        "outputs": plan.outputs,
        "predictor": plan.predictor,
        "intervals": plan.intervals,
    }


def plan_from_dict(data: Any) -> Plan:
    """The plan that `plan_to_dict` wrote.

    Raises:
        ValueError: it is no plan, or uses a value before it is made or after it is dropped.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'not a plan: it should hold "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ValueError(f"a plan of version {data.get('version')}; this library reads {VERSION}")
    try:
        plan = _build(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"a damaged plan: {type(error).__name__}: {error}") from error
    _check(plan)
    return plan


def _build(data: dict[str, Any]) -> Plan:
    def operation(op: dict[str, Any]) -> Draw | Combine:
        drop = tuple(map(str, op["drop"]))
        if "noise" in op:
            n = op["noise"]
            interval = Interval(
                Level(**n["start"]), Level(**n["end"]), bool(n["fresh"]), int(n["path"])
            )
            return Draw(str(op["name"]), interval, drop)
        terms = tuple((str(name), float(c)) for name, c in op["terms"])
        return Combine(str(op["name"]), terms, drop)

    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in dict(data["options"]).items()
    }
    if isinstance(options.get("churn"), dict):
        options["churn"] = Churn(**options["churn"])
    steps = tuple(
        Step(
            tuple(map(operation, step["operations"])),
            str(step["state"]),
            Level(**step["level"]),
            tuple(map(str, step["answers"])),
            tuple(map(str, step["drop"])),
            bool(step["start"]),
        )
        for step in data["steps"]
    )
    return Plan(
        str(data["solver"]),
        tuple(options.items()),
        Levels(
            [Level(**level) for level in data["levels"]],
            make_path(data["path"]),
            inverted=bool(data.get("inverted", False)),  # not in files older than inversion
        ),
        steps,
        tuple(map(operation, data["last"])),
        str(data["result"]),
        int(data["outputs"]),
        bool(data["predictor"]),
        bool(data["intervals"]),
    )


def _check(plan: Plan) -> None:
    alive = {"x0"}

    def use(name: str) -> None:
        if name not in alive:
            raise ValueError(f"a damaged plan: it uses {name}, which it does not hold there")

    def perform(operations: tuple[Draw | Combine, ...]) -> None:
        for op in operations:
            for name, c in op.terms if isinstance(op, Combine) else ():
                use(name)
                if not math.isfinite(c):
                    raise ValueError(f"a damaged plan: {op.name} has the coefficient {c} of {name}")
            alive.add(op.name)
            alive.difference_update(op.drop)

    for step in plan.steps:
        perform(step.operations)
        use(step.state)
        if len(step.answers) != plan.outputs:
            raise ValueError(f"a damaged plan: {len(step.answers)} answers, not {plan.outputs}")
        alive.update(step.answers)
        alive.difference_update(step.drop)
    perform(plan.last)
    use(plan.result)


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes a plan to a JSON file, whole or not at all."""
    path = FilePath(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plan_to_dict(plan), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan from a JSON file.

    Raises:
        ValueError: the file is no plan, or a damaged one.
    """
    try:
        return plan_from_dict(json.loads(FilePath(path).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
