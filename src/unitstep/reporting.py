"""One page about runs: how accurate, how fast, what it costs, how it came about. Reads the files of run folders, and
runs nothing again.

Runs of one recipe with other seeds are a group, shown as mean and spread; details are of a group's first run.
"""

import base64
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from unitstep import energy
from unitstep.files import write_whole
from unitstep.recipes import Recipe, recipe_from_dict
from unitstep.runs import Run

# arXiv 2110.05929: (data, network): test accuracy in percent of the CNN and T = 5 … 1; is the last in the abstract?
PAPER: dict[tuple[str, str], tuple[tuple[float, ...], bool]] = {
    ("cifar10", "vgg6"): ((91.59, 90.61, 90.52, 90.40, 90.05, 89.10), False),
    ("cifar10", "vgg16"): ((94.10, 93.90, 93.87, 93.85, 93.72, 93.05), True),
    ("cifar10", "resnet20"): ((93.34, 92.62, 92.58, 92.56, 92.11, 91.10), False),
    ("cifar100", "vgg16"): ((72.46, 71.58, 71.51, 71.46, 71.43, 70.15), True),
    ("cifar100", "resnet20"): ((65.90, 65.57, 65.37, 65.16, 64.86, 63.30), False),
    ("imagenet-1k", "vgg16-imagenet"): ((70.08, 69.05, 69.03, 69.01, 69.00, 67.71), True),
}
PAPER_STEPS = (None, 5, 4, 3, 2, 1)
COLOURS = ("#3b76af", "#ef8636", "#519e3e", "#c53a32", "#8d69b8", "#84584e")
Format = Literal["html", "md"]
Figure = dict[str, Any]  # data and layout, as plotly takes them


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


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


def report(runs: Sequence[Run | str | Path], out: str | Path, *, format: Format = "html") -> Path:
    """Write a page about `runs` to the file `out`: HTML in one file that needs no network, or Markdown with the tables.

    ValueError if a run has not been measured, a file of it is damaged, or the runs are of different images, so that
    their accuracies do not compare.
    """
    if format not in ("html", "md"):
        raise ValueError(f"format must be html or md, not {format!r}")
    groups = _groups(runs)
    text = _html(groups) if format == "html" else _markdown(groups)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode())
    return out


def _groups(runs: Sequence[Run | str | Path]) -> list[Group]:
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
        key = json.dumps(found["recipe"] | {"seed": 0, "data": ""}, sort_keys=True)
        if key not in groups:
            taken = any(group.runs[0].recipe.name == run.recipe.name for group in groups.values())
            name = f"{run.recipe.name}, {run.path.name}" if taken else run.recipe.name
            groups[key] = Group(name, [], [], COLOURS[len(groups) % len(COLOURS)])
        groups[key].runs.append(run)
        groups[key].measured.append(found)
    for group in groups.values():
        group.stages = _means(group.measured)
    return list(groups.values())


def _measured(run: Run) -> dict[str, Any]:
    found = run.measurement
    if found is None:
        raise ValueError(f"{run.path} has not been measured: unitstep measure {run.path}")
    keys = {"recipe", "data", "stages", "machine", "versions", "trained"}
    if not isinstance(found, dict) or not keys <= found.keys() or not found["stages"]:
        raise ValueError(f"{run.path / 'measure.json'} is damaged: unitstep measure {run.path} writes it again")
    if any("confusion" not in stage for stage in found["stages"]):
        raise ValueError(
            f"{run.path / 'measure.json'} was written by an older version, without operations: unitstep measure "
            f"{run.path} writes it again"
        )
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
        row: dict[str, Any] = {"steps": steps, "name": _name(steps)}
        for key in ("val_accuracy", "test_accuracy", "spikes_per_neuron", "seconds"):
            values = [stages[steps][key] for stages in by_steps]
            spread = statistics.stdev(values) if len(values) > 1 and None not in values else None
            row[key] = (None if None in values else statistics.mean(values), spread)
        rows.append(row)
    return rows


def _name(steps: int | None) -> str:
    return "CNN" if steps is None else f"T = {steps}"


# -------------------------------------------------------------------------------------------------------------- tables


def _cell(value: float | None, digits: int, spread: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _stage_table(group: Group) -> Table:
    rows: list[tuple[str, ...]] = []
    n = len(group.runs)
    for row in group.stages:
        low, high = _of_steps(group.first, row["steps"])["test_interval"]
        interval = f"{low:.2f} – {high:.2f}" if n == 1 else ""
        numbers = _cell(row["spikes_per_neuron"][0], 3, row["spikes_per_neuron"][1]), _cell(row["seconds"][0], 0)
        accuracies = (_cell(mean, 2, spread) for mean, spread in (row["val_accuracy"], row["test_accuracy"]))
        rows.append((row["name"], *accuracies, interval, *numbers))
    rows += [(name, "not trained yet", "", "", "", "") for name in _missing(group)]
    columns = ("stage", "validation %", "test %", "95 % interval", "spikes per neuron", "training, s")
    seeds = f"Mean of {n} seeds, ± their standard deviation. " if n > 1 else ""
    return Table("Stages", columns, rows, f"{seeds}Choices were made on validation images.")


def _missing(group: Group) -> list[str]:
    there = {stage["steps"] for stage in group.stages}
    return [_name(stage.steps) for stage in group.runs[0].recipe.stages if stage.steps not in there]


def _of_steps(found: dict[str, Any], steps: int | None) -> dict[str, Any]:
    stage: dict[str, Any] = next(stage for stage in found["stages"] if stage["steps"] == steps)
    return stage


def _energy_table(group: Group) -> Table:
    rows = []
    for stage in group.first["stages"]:
        for name, model in energy.MODELS.items():
            if stage["steps"] is None or not stage["operations"]:
                continue
            total = energy.total(stage, model)
            even = energy.break_even(stage, total, total.cnn_int8)
            cells = (_cell(joules / 1e6, 3) for joules in (total.cnn_fp32, total.cnn_int8, total.snn))
            ratios = (f"{total.cnn_fp32 / total.snn:.1f}", f"{total.cnn_int8 / total.snn:.2f}")
            rows.append(
                (f"{_name(stage['steps'])}, {name}", *cells, *ratios, "never" if even is None else f"{even:.3f}")
            )
    columns = (
        "network, model",
        "CNN fp32, µJ",
        "CNN int8, µJ",
        "SNN, µJ",
        "fp32 ÷ SNN",
        "int8 ÷ SNN",
        "break-even rate",
    )
    models = " ".join(f"{name}: {energy.about(model)}" for name, model in energy.MODELS.items())
    note = (
        "Microjoules per image; none is a measurement. Break-even rate: spikes per neuron at which the int8 CNN costs "
        f"as much. {models}"
    )
    return Table("Energy", columns, rows, note)


def _operation_table(group: Group) -> Table:
    last = group.first["stages"][-1]
    rows: list[tuple[str, ...]] = [
        (
            layer["name"], layer["input"], f"{layer['macs']:,}", f"{layer['multiplied']:,}",
            _cell(layer["additions"], 0), _cell(layer["additions_by_rate"], 0), f"{layer['weights']:,}",
        )
        for layer in last["operations"]
    ]  # fmt: skip
    if rows:
        sums = [
            sum(layer[key] for layer in last["operations"])
            for key in ("macs", "multiplied", "additions", "additions_by_rate", "weights")
        ]
        rows.append(("all", "", *(_cell(number, 0) for number in sums)))
    columns = (
        "layer",
        "input",
        "multiplications of the CNN",
        "multiplications left",
        "additions",
        "additions by rate",
        "weights",
    )
    note = (
        "Per image. Additions: one for each output that a spike reaches. By rate: spikes per neuron before the layer × "
        "its multiplications, the paper's count."
    )
    return Table(f"Operations at {_name(last['steps'])}", columns, rows, note)


def _layer_table(group: Group) -> Table:
    rows = []
    for stage in group.first["stages"]:
        for layer in stage["layers"]:
            shares = (f"{100 * layer[key]:.1f}" for key in ("dead_channels", "saturated_channels", "surrogate"))
            numbers = f"{layer['threshold']:.4f}", f"{layer['leak']:.4f}", f"{layer['rate']:.4f}"
            rows.append((f"{_name(stage['steps'])}, {layer['name']}", f"{layer['neurons']:,}", *numbers, *shares))
    columns = (
        "stage, layer",
        "neurons",
        "threshold",
        "leak",
        "spikes per neuron",
        "dead channels, %",
        "saturated channels, %",
        "learning, %",
    )
    return Table("Neurons", columns, rows, "Learning: share of membranes where the surrogate gradient is not 0.")


def _speed_table(group: Group) -> Table:
    rows = []
    for row in group.first.get("speed", ()):
        memory = "" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f}"
        times = f"{1000 * row['p50']:.2f}", f"{1000 * row['p99']:.2f}"
        rows.append(
            (f"{row['name']}, {row['runtime']}", *times, f"{row['images_per_second']:,.0f}", str(row["batch"]), memory)
        )
    columns = (
        "network, runtime",
        "one image: median, ms",
        "99 % below, ms",
        "images per second",
        "at batch",
        "memory for 64, MB",
    )
    machine = group.first["machine"]
    note = f"On {machine['gpu'] or machine['cpu']}, {machine['threads']} threads; interleaved." if rows else ""
    return Table("Speed", columns, rows, note)


def _paper_table(group: Group) -> Table | None:
    run = group.runs[0].recipe
    found = PAPER.get((Path(run.data.split("?")[0]).name, run.net))
    if found is None:
        return None
    accuracies, stated = found
    ours = {row["steps"]: row["test_accuracy"] for row in group.stages}
    cells = [f"{accuracy:.2f}" for accuracy in accuracies]
    mine = [_cell(ours[steps][0], 2, ours[steps][1]) if steps in ours else "not run" for steps in PAPER_STEPS]
    note = (
        "The paper's T = 1 is in its abstract; its other figures are from memory and have not been checked."
        if stated
        else "From memory; not checked."
    )
    return Table(
        "The paper's row", ("", *map(_name, PAPER_STEPS)), [("arXiv 2110.05929", *cells), ("this", *mine)], note
    )


def _class_table(group: Group) -> Table | None:
    last, classes = group.first["stages"][-1], group.first["data"]["classes"]
    if not last["confusion"]:
        return None
    rows = []
    for index, (name, row) in enumerate(zip(classes, last["confusion"], strict=True)):
        others = sorted(((number, other) for other, number in enumerate(row) if other != index), reverse=True)
        taken = ", ".join(f"{classes[other]} ({number})" for number, other in others[:2] if number)
        rows.append((name, str(sum(row)), f"{100 * row[index] / max(1, sum(row)):.1f}", taken))
    return Table(f"Classes at {_name(last['steps'])}", ("class", "images", "right, %", "most often taken for"), rows)


def _tables(group: Group) -> list[Table]:
    found = [
        _stage_table(group),
        _paper_table(group),
        _energy_table(group),
        _operation_table(group),
        _speed_table(group),
    ]
    return [table for table in [*found, _layer_table(group), _class_table(group)] if table is not None and table.rows]


# --------------------------------------------------------------------------------------------------------------- words


def _verdict(group: Group) -> str:
    """The result in a sentence, with its numbers."""
    stages = {row["steps"]: row for row in group.stages}
    steps = [each for each in stages if each is not None]
    if not steps:
        return "Only the CNN has been trained and measured so far."
    least = min(steps)
    accuracy, spread = stages[least]["test_accuracy"]
    last = _of_steps(group.first, least)
    text = f"At {_name(least)}, {_cell(accuracy, 2, spread)} % of {last['test_images']:,} test images are right"
    if spread is None:
        text += " (95 %: {:.2f} – {:.2f})".format(*last["test_interval"])
    text += f", with {stages[least]['spikes_per_neuron'][0]:.3f} spikes per neuron"
    if None in stages:
        cnn = stages[None]["test_accuracy"][0]
        text += f"; the CNN has {cnn:.2f} %. "
        close = [each for each in steps if stages[each]["test_accuracy"][0] > cnn - 1]
        text += (
            f"The smallest T that loses less than 1 point is {min(close)}."
            if close
            else "Every T loses 1 point or more."
        )
    else:
        text += "."
    if last["operations"]:
        full, short = energy.total(last, energy.exact), energy.total(last, energy.int8)
        text += (
            f" Its operations would cost {_times(full.cnn_fp32, full.snn)} energy than the CNN's in fp32, and "
            f"{_times(short.cnn_int8, short.snn)} in 8 bits: counted with every spike, at figures for 45 nm, without "
            "memory; not measured."
        )
    return text


def _times(rival: float, ours: float) -> str:
    return f"{rival / ours:.1f} times less" if rival >= ours else f"{ours / rival:.1f} times more"


def health(found: dict[str, Any]) -> list[str]:
    """What is wrong with the layers of a measured run, a sentence each; empty if nothing is."""
    said = []
    for stage in found["stages"]:
        for layer in stage["layers"]:
            at = f"{layer['name']} at {_name(stage['steps'])}"
            if layer["rate"] == 0:
                said.append(f"{at} never fires: nothing reaches what is behind it. A lower threshold would let it.")
            elif layer["dead_channels"] > 0.1:
                said.append(
                    f"{at}: {100 * layer['dead_channels']:.0f} % of the channels never fire; they could be removed."
                )
            if layer["saturated_channels"] > 0.02:
                said.append(
                    f"{at}: {100 * layer['saturated_channels']:.0f} % of the channels always fire, and say nothing."
                )
            if layer["surrogate"] < 0.1:
                said.append(
                    f"{at}: only {100 * layer['surrogate']:.0f} % of the membranes are within reach of the surrogate "
                    "gradient; it hardly learns."
                )
    return said


# ------------------------------------------------------------------------------------------------------------- figures


def _over_steps(groups: list[Group]) -> Figure:
    data = []
    for group in groups:
        rows = [row for row in group.stages if row["steps"] is not None]
        spreads = [row["test_accuracy"][1] or 0 for row in rows]
        data.append(
            {"x": [row["steps"] for row in rows], "y": [row["test_accuracy"][0] for row in rows], "name": group.name,
             "mode": "lines+markers", "line": {"color": group.colour},
             "error_y": {"array": spreads, "visible": any(spreads)},
             "hovertemplate": "T = %{x}: %{y:.2f} %<extra></extra>"}
        )  # fmt: skip
        cnn = next((row for row in group.stages if row["steps"] is None), None)
        if cnn:
            data.append(
                {"x": [1, max([5, *(row["steps"] for row in rows)])], "y": [cnn["test_accuracy"][0]] * 2,
                 "name": f"{group.name}: CNN", "mode": "lines", "line": {"color": group.colour, "dash": "dot"},
                 "hovertemplate": "CNN: %{y:.2f} %<extra></extra>"}
            )  # fmt: skip
    return {
        "data": data,
        "layout": {"xaxis": {"title": "timesteps T", "dtick": 1}, "yaxis": {"title": "test accuracy, %"}},
    }


def _latency(groups: list[Group]) -> Figure | None:
    data = []
    for number, group in enumerate(groups):
        rows = group.first.get("speed", ())
        for runtime in dict.fromkeys(row["runtime"] for row in rows):
            mine = [row for row in rows if row["runtime"] == runtime]
            data.append(
                {"x": [row["name"] for row in mine], "y": [1000 * row["p50"] for row in mine], "type": "bar",
                 "name": f"{group.name}, {runtime}" if len(groups) > 1 else runtime, "opacity": 1 - 0.3 * (number % 3),
                 "hovertemplate": "%{x}: %{y:.2f} ms<extra></extra>"}
            )  # fmt: skip
    layout = {"yaxis": {"title": "one image: median, ms", "type": "log"}, "barmode": "group"}
    return {"data": data, "layout": layout} if data else None


def _rates(group: Group) -> Figure | None:
    stages = [stage for stage in group.first["stages"] if stage["layers"]]
    if not stages:
        return None
    names = [layer["name"] for layer in stages[0]["layers"]]
    z = [[stage["layers"][index]["rate"] for stage in stages] for index in range(len(names))]
    data = [
        {"type": "heatmap", "x": [_name(stage["steps"]) for stage in stages], "y": names, "z": z,
         "colorscale": "Viridis",
         "colorbar": {"title": "spikes"}, "hovertemplate": "%{y}, %{x}: %{z:.4f} spikes per neuron<extra></extra>"}
    ]  # fmt: skip
    return {"data": data, "layout": {"yaxis": {"autorange": "reversed", "type": "category"}}}


def _curves(group: Group) -> Figure | None:
    """Validation accuracy, and dotted the loss, of all stages one behind the other."""
    data: list[dict[str, Any]] = []
    done, run = 0.0, group.runs[0]
    for index, stage in enumerate(run.recipe.stages):
        rows, name = [row for row in run.log if row["stage"] == index], _name(stage.steps)
        x, line = [done + row["epoch"] for row in rows], {"color": COLOURS[index % len(COLOURS)]}
        both = {"x": x, "mode": "lines+markers", "name": name, "marker": {"size": 4}, "legendgroup": name}
        accuracy = {"y": [row["val_accuracy"] for row in rows], "line": line}
        accuracy |= {"hovertemplate": name + ", epoch %{x:.1f}: %{y:.2f} %<extra></extra>"}
        loss = {"y": [row["loss"] for row in rows], "yaxis": "y2", "line": line | {"dash": "dot"}, "showlegend": False}
        loss |= {"hovertemplate": name + ", loss %{y:.3f}<extra></extra>"}
        data += [both | accuracy, both | loss]
        done += rows[-1]["epoch"] if rows else 0
    right = {"title": "training loss (dotted)", "overlaying": "y", "side": "right", "showgrid": False}
    layout = {"xaxis": {"title": "epochs, all stages"}, "yaxis": {"title": "validation, %"}, "yaxis2": right}
    return {"data": data, "layout": layout} if done else None


def _drift(group: Group, key: str) -> Figure | None:
    stages = [stage for stage in group.first["stages"] if stage["layers"]]
    if len(stages) < 2:
        return None
    names = [layer["name"] for layer in stages[0]["layers"]]
    data = [
        {"x": [_name(stage["steps"]) for stage in stages], "y": [stage["layers"][index][key] for stage in stages],
         "name": name, "mode": "lines+markers", "hovertemplate": name + ", %{x}: %{y:.4f}<extra></extra>"}
        for index, name in enumerate(names)
    ]  # fmt: skip
    return {"data": data, "layout": {"yaxis": {"title": key}, "xaxis": {"type": "category"}}}


def _membranes(group: Group) -> Figure | None:
    layers = group.first["stages"][-1]["layers"]
    if not layers:
        return None
    x = [-2 + 0.25 * index + 0.125 for index in range(len(layers[0]["membranes"]))]
    data = [
        {"x": x, "y": [100 * share for share in layer["membranes"]], "name": layer["name"], "mode": "lines",
         "line": {"shape": "hvh"},
         "hovertemplate": layer["name"] + ", %{x:.2f} thresholds: %{y:.1f} %<extra></extra>"}
        for layer in layers
    ]  # fmt: skip
    line = {
        "type": "line",
        "x0": 1,
        "x1": 1,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"dash": "dot", "color": "#c53a32"},
    }
    layout = {
        "xaxis": {"title": "membrane ÷ threshold: right of the line it fires"},
        "yaxis": {"title": "membranes, %"},
        "shapes": [line],
    }
    return {"data": data, "layout": layout}


def _confusion(group: Group) -> Figure | None:
    last, classes = group.first["stages"][-1], group.first["data"]["classes"]
    if not last["confusion"]:
        return None
    data = [
        {"type": "heatmap", "x": classes, "y": classes, "z": last["confusion"], "showscale": False,
         "colorscale": [[0, "rgba(59,118,175,0)"], [1, "rgb(59,118,175)"]],
         "hovertemplate": "%{y} taken for %{x}: %{z}<extra></extra>"}
    ]  # fmt: skip
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": "taken for", "type": "category"},
            "yaxis": {"title": "is", "autorange": "reversed", "type": "category"},
        },
    }


def _energies(group: Group) -> dict[str, Any]:
    """By model: totals of each T, and of the layers at the least T, in microjoules."""
    stages = [stage for stage in group.first["stages"] if stage["steps"] is not None and stage["operations"]]
    found: dict[str, Any] = {}
    for name, model in energy.MODELS.items() if stages else ():
        totals = [energy.total(stage, model) for stage in stages]
        layers = energy.per_layer(stages[-1], model)
        found[name] = {
            "about": energy.about(model),
            "steps": [_name(stage["steps"]) for stage in stages],
            "layers": [layer["name"] for layer in stages[-1]["operations"]],
            "totals": [[getattr(total, kind) / 1e6 for total in totals] for kind in ("cnn_fp32", "cnn_int8", "snn")],
            "by_layer": [[getattr(layer, kind) / 1e6 for layer in layers] for kind in ("cnn_fp32", "cnn_int8", "snn")],
            "last": _name(stages[-1]["steps"]),
        }
    return found


# --------------------------------------------------------------------------------------------------------------- pages


def _html(groups: list[Group]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("unitstep", "."), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}
    sections = []
    for group in groups:
        figures = {
            "Spikes per neuron, by layer and timesteps": _rates(group), "Training": _curves(group),
            "Thresholds over the stages": _drift(group, "threshold"), "Leaks over the stages": _drift(group, "leak"),
            f"Membranes at {_name(group.first['stages'][-1]['steps'])}": _membranes(group),
            f"Confusion at {_name(group.first['stages'][-1]['steps'])}": _confusion(group),
        }  # fmt: skip
        sections.append(
            {"group": group, "verdict": _verdict(group), "health": health(group.first), "tables": _tables(group),
             "figures": {title: figure for title, figure in figures.items() if figure}, "energies": _energies(group),
             "samples": _samples(group.runs[0], group.first), "provenance": _provenance(group)}
        )  # fmt: skip
    page = environment.get_template("report.html")
    return page.render(sections=sections, plotly=get_plotlyjs(), overview=_over_steps(groups), latency=_latency(groups))


def _markdown(groups: list[Group]) -> str:
    parts = []
    for group in groups:
        parts.append(f"# {group.name}\n\n{_verdict(group)}\n")
        parts += [table.markdown() for table in _tables(group)]
        parts += [f"- {sentence}\n" for sentence in health(group.first)]
        parts.append("\n".join(f"- {key}: {value}" for key, value in _provenance(group)) + "\n")
    return "\n".join(parts)


def _provenance(group: Group) -> list[tuple[str, str]]:
    found, trained = group.first, group.first["trained"]
    recipe: Recipe = recipe_from_dict(found["recipe"])
    machine = trained["machine"] or {}
    where = f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('threads')} threads, {trained['precision']}"
    versions = ", ".join(f"{name} {number}" for name, number in (trained["versions"] or {}).items())
    epochs = ", ".join(f"{_name(stage.steps)} {stage.epochs:g}" for stage in recipe.stages)
    return [
        ("recipe", recipe.name), ("network", recipe.net), ("images", Path(found["data"]["source"]).name),
        ("epochs", epochs),
        ("seeds", ", ".join(str(run.recipe.seed) for run in group.runs)), ("trained on", where), ("versions", versions),
        ("commit", str(trained["commit"])), ("measured with commit", str(found["commit"])),
        ("folders", ", ".join(run.path.name for run in group.runs)),
    ]  # fmt: skip


def _samples(run: Run, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of samples.safetensors and where their first layers fired, as data URLs; empty without that file."""
    classes = found["data"]["classes"]
    if not run.samples_path.exists():
        return []
    tensors, _ = run.load(run.samples_path, found["stages"][-1]["index"])
    shown = []
    for number, image in enumerate(tensors["images"].numpy()):
        maps = []
        for key in (key for key in tensors if key.startswith("spikes.")):
            spikes = tensors[key][number].numpy()
            tiles = np.pad(spikes, ((0, 0), (0, 1), (0, 1)))  # a dark line between channels
            tiles = np.concatenate(
                [np.concatenate(list(row), 1) for row in np.array_split(tiles, max(1, len(tiles) // 4))], 0
            )
            maps.append({"name": key.removeprefix("spikes."), "url": _png(255 * tiles // max(1, int(tiles.max())))})
        right, said = (classes[int(tensors[key][number])] for key in ("labels", "predictions"))
        shown.append({"url": _png(image.transpose(1, 2, 0).squeeze()), "label": right, "said": said, "maps": maps})
    return shown


def _png(pixels: "np.ndarray[Any, Any]") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
