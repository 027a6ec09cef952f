"""The figures of a report, as plotly takes them."""

from collections.abc import Mapping
from typing import Any

from unitstep import energy
from unitstep.groups import COLOURS, Group, name_of

Figure = dict[str, Any]  # data and layout


def over_steps(groups: list[Group]) -> Figure:
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


def latency(groups: list[Group]) -> Figure | None:
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


def figures_of(group: Group) -> dict[str, Figure]:
    """Those of one group, by their titles."""
    last = name_of(group.first["stages"][-1]["steps"])
    found = {
        "Spikes per neuron, by layer and timesteps": _rates(group), "Training": _curves(group),
        "Thresholds over the stages": _drift(group, "threshold"), "Leaks over the stages": _drift(group, "leak"),
        "Conversion alone, from half a threshold (dotted: from 0)": _alone(group),
        f"Membranes at {last}": _membranes(group), f"Confusion at {last}": _confusion(group),
    }  # fmt: skip
    return {title: figure for title, figure in found.items() if figure}


def _rates(group: Group) -> Figure | None:
    stages = [stage for stage in group.first["stages"] if stage["layers"]]
    if not stages:
        return None
    names = [layer["name"] for layer in stages[0]["layers"]]
    z = [[stage["layers"][index]["rate"] for stage in stages] for index in range(len(names))]
    data = [
        {"type": "heatmap", "x": [name_of(stage["steps"]) for stage in stages], "y": names, "z": z,
         "colorscale": "Viridis",
         "colorbar": {"title": "spikes"}, "hovertemplate": "%{y}, %{x}: %{z:.4f} spikes per neuron<extra></extra>"}
    ]  # fmt: skip
    return {"data": data, "layout": {"yaxis": {"autorange": "reversed", "type": "category"}}}


def _curves(group: Group) -> Figure | None:
    """Validation accuracy, and dotted the loss, of all stages one behind the other."""
    data: list[dict[str, Any]] = []
    done, run = 0.0, group.runs[0]
    for index, stage in enumerate(run.recipe.stages):
        rows, name = [row for row in run.log if row["stage"] == index], name_of(stage.steps)
        ends = [min(row["epoch"], stage.epochs) for row in rows]  # that of the last step may be a part of an epoch
        x, line = [done + end for end in ends], {"color": COLOURS[index % len(COLOURS)]}
        both = {"x": x, "mode": "lines+markers", "name": name, "marker": {"size": 4}, "legendgroup": name}
        accuracy = {"y": [row["val_accuracy"] for row in rows], "line": line, "connectgaps": True}  # some unvalidated
        accuracy |= {"hovertemplate": name + ", epoch %{x:.1f}: %{y:.2f} %<extra></extra>"}
        loss = {"y": [row["loss"] for row in rows], "yaxis": "y2", "line": line | {"dash": "dot"}, "showlegend": False}
        loss |= {"hovertemplate": name + ", loss %{y:.3f}<extra></extra>"}
        data += [both | accuracy, both | loss]
        done += ends[-1] if ends else 0
    right = {"title": "training loss (dotted)", "overlaying": "y", "side": "right", "showgrid": False}
    right |= {"tickmode": "auto"}
    layout = {"xaxis": {"title": "epochs, all stages"}, "yaxis": {"title": "validation, %"}, "yaxis2": right}
    return {"data": data, "layout": layout} if done else None


def _alone(group: Group) -> Figure | None:
    """Accuracy by conversion alone against T, and the run's own."""
    found = group.first.get("conversion_alone")
    if found is None:
        return None
    ways = list(dict.fromkeys((row["strategy"], row["initial"]) for row in found["rows"]))
    strategies = list(dict.fromkeys(strategy for strategy, _ in ways))
    data: list[dict[str, Any]] = []
    for strategy, initial in ways:
        rows = [row for row in found["rows"] if (row["strategy"], row["initial"]) == (strategy, initial)]
        hover = f"{strategy}, initial {initial:g}, T = %{{x}}: %{{y:.2f}} %<extra></extra>"
        number = strategies.index(strategy)
        line = {"color": COLOURS[number % len(COLOURS)], "dash": "dot" if initial == 0 else "solid"}
        data.append(
            {"x": [row["steps"] for row in rows], "y": [row["accuracy"] for row in rows], "line": line,
             "name": strategy.split(" (")[0], "mode": "lines+markers", "marker": {"size": 4}, "legendgroup": strategy,
             "showlegend": (strategy, 0.5) not in ways or initial == 0.5, "hovertemplate": hover}
        )  # fmt: skip
    own = f"this run, {name_of(found['steps'])}"
    data.append(
        {"x": [1, max(row["steps"] for row in found["rows"])], "y": [found["accuracy"]] * 2, "name": own,
         "mode": "lines", "line": {"color": "#7f7f7f", "dash": "dash"},
         "hovertemplate": own + ": %{y:.2f} %<extra></extra>"}
    )  # fmt: skip
    marks = sorted({row["steps"] for row in found["rows"]})
    axis = {"title": "timesteps T", "type": "log", "tickvals": marks, "ticktext": [str(mark) for mark in marks]}
    return {"data": data, "layout": {"xaxis": axis, "yaxis": {"title": "validation, %"}}}


def _drift(group: Group, key: str) -> Figure | None:
    stages = [stage for stage in group.first["stages"] if stage["layers"]]
    if len(stages) < 2:
        return None
    names = [layer["name"] for layer in stages[0]["layers"]]
    data = [
        {"x": [name_of(stage["steps"]) for stage in stages], "y": [stage["layers"][index][key] for stage in stages],
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


def energies(group: Group, models: Mapping[str, energy.Model]) -> dict[str, Any]:
    """By model: totals of each T, and of the layers at the least T, in microjoules."""
    stages = [stage for stage in group.first["stages"] if stage["steps"] is not None and stage["operations"]]
    found: dict[str, Any] = {}
    for name, model in models.items() if stages else ():
        totals = [energy.total(stage, model) for stage in stages]
        layers = energy.per_layer(stages[-1], model)
        found[name] = {
            "about": model.about,
            "steps": [name_of(stage["steps"]) for stage in stages],
            "layers": [layer["name"] for layer in stages[-1]["operations"]],
            "totals": [[getattr(total, kind) / 1e6 for total in totals] for kind in ("cnn_fp32", "cnn_int8", "snn")],
            "by_layer": [[getattr(layer, kind) / 1e6 for layer in layers] for kind in ("cnn_fp32", "cnn_int8", "snn")],
            "last": name_of(stages[-1]["steps"]),
        }
    return found
