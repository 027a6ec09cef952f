"""Measured runs as they are read for a report: those of one recipe with other seeds are a group, with means and
spreads. Knows nothing of pages."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unitstep.recipes import differences, recipe_from_dict
from unitstep.runs import Run

COLOURS = ("#3b76af", "#ef8636", "#519e3e", "#c53a32", "#8d69b8", "#84584e")
STAGE = {"index", "name", "steps", "val_accuracy", "test_accuracy", "test_interval", "test_images"}
STAGE |= {"spikes_per_neuron", "seconds", "layers", "operations", "confusion"}


@dataclass
class Group:
    """Runs of one recipe that differ in their seeds."""

    name: str
    runs: list[Run]
    measured: list[dict[str, Any]]
    colour: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Those that all the runs have: means, and deviations if there are several runs."""

    @property
    def first(self) -> dict[str, Any]:
        return self.measured[0]


def read_groups(runs: Sequence[Run | str | Path]) -> list[Group]:
    if not runs:
        raise ValueError("give at least one run folder: unitstep report RUN --out report.html")
    opened = [run if isinstance(run, Run) else Run(run) for run in runs]
    measured = [_measured(run) for run in opened]
    first = measured[0]["data"]
    for run, found in zip(opened, measured, strict=True):
        if (found["data"]["classes"], found["data"]["test_images"]) != (first["classes"], first["test_images"]):
            raise ValueError(
                f"{run.path} was measured on other images ({_of(found)}) than {opened[0].path} "
                f"({_of(measured[0])}), so that accuracies do not compare: make a report for each data set"
            )
    groups: dict[str, Group] = {}
    for run, found in zip(opened, measured, strict=True):
        whole = recipe_from_dict(found["recipe"]).to_dict()  # fields that came later have their defaults
        key = json.dumps(whole | {"seed": 0, "data": ""}, sort_keys=True)
        if key not in groups:
            taken = any(group.runs[0].recipe.name == run.recipe.name for group in groups.values())
            name = f"{run.recipe.name}, {run.path.name}" if taken else run.recipe.name
            groups[key] = Group(name, [], [], COLOURS[len(groups) % len(COLOURS)])
        if (seed := found["recipe"]["seed"]) in (other["recipe"]["seed"] for other in groups[key].measured):
            raise ValueError(f"{run.path} has the recipe and the seed, {seed}, of another of these runs: leave one out")
        groups[key].runs.append(run)
        groups[key].measured.append(found)
    for group in groups.values():
        group.stages = _means(group.measured)
    return list(groups.values())


def _measured(run: Run) -> dict[str, Any]:
    found = run.measurement
    if found is None:
        raise ValueError(f"{run.path} has not been measured: unitstep measure {run.path}")
    data = found.get("data") or {}
    whole = {"recipe", "data", "stages", "machine", "versions", "trained"} <= found.keys() and found["stages"]
    whole = whole and {"source", "classes", "test_images"} <= data.keys()
    if not whole or any(not stage.keys() >= STAGE for stage in found["stages"]):
        raise ValueError(
            f"{run.path / 'measure.json'} is damaged or of another version: unitstep measure {run.path} writes it again"
        )
    if differences(recipe_from_dict(found["recipe"]), replace(run.recipe, data=found["recipe"].get("data", ""))):
        raise ValueError(f"{run.path / 'measure.json'} is of another run: unitstep measure {run.path} writes it again")
    return found


def _of(found: dict[str, Any]) -> str:
    return f"{found['data']['test_images']:,} of {len(found['data']['classes'])} classes"


def _means(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per stage that all runs have: steps, and (mean, deviation or None) of its numbers."""
    by_steps = [{stage["steps"]: stage for stage in found["stages"]} for found in measured]
    rows = []
    for steps in (stage["steps"] for stage in measured[0]["stages"]):
        if not all(steps in stages for stages in by_steps):
            continue
        row: dict[str, Any] = {"steps": steps, "name": name_of(steps)}
        for key in ("val_accuracy", "test_accuracy", "spikes_per_neuron", "seconds"):
            values = [stages[steps][key] for stages in by_steps]
            row[key] = (None, None) if None in values else averaged(values)
        rows.append(row)
    return rows


def averaged(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation if there are several."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def name_of(steps: int | None) -> str:
    return "CNN" if steps is None else f"T = {steps}"


def of_steps(found: dict[str, Any], steps: int | None) -> dict[str, Any]:
    stage: dict[str, Any] = next(stage for stage in found["stages"] if stage["steps"] == steps)
    return stage


def hardware(machine: dict[str, Any], device: str | None) -> str:
    """What PyTorch ran on, if it used `device` of this machine: the graphics card, unless that is known to be "cpu", or
    the processor, with its threads."""
    gpu = None if device == "cpu" else machine.get("gpu")
    return gpu or f"{machine.get('cpu')}, {machine.get('threads')} threads"


def trained_on(trained: dict[str, Any]) -> str:
    """What a run was trained on, one after the other, and in which precision."""
    places = [hardware(each["machine"] or {}, each.get("device")) for each in (trained, *trained.get("continued", []))]
    return f"{', then '.join(dict.fromkeys(places))}, {trained['precision']}"


def cell(value: float | None, digits: int, spread: float | None = None) -> str:
    """ "86.40 ± 0.25", or "86.40" without a spread, or ""."""
    if value is None:
        return ""
    return f"{value:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
