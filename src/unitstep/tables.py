"""The tables of a report, for a page, for Markdown and for a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unitstep import energy
from unitstep.groups import Group, cell, hardware, name_of, of_steps

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


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        body = markdown(self.columns, self.rows)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left, the others to the right."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def stage_table(group: Group) -> Table:
    rows: list[tuple[str, ...]] = []
    n = len(group.runs)
    for row in group.stages:
        low, high = of_steps(group.first, row["steps"])["test_interval"]
        interval = f"{low:.2f} – {high:.2f}" if n == 1 else ""
        numbers = cell(row["spikes_per_neuron"][0], 3, row["spikes_per_neuron"][1]), cell(row["seconds"][0], 0)
        accuracies = (cell(mean, 2, spread) for mean, spread in (row["val_accuracy"], row["test_accuracy"]))
        rows.append((row["name"], *accuracies, interval, *numbers))
    rows += [(*missing, "", "", "", "") for missing in _missing(group)]
    columns = ("stage", "validation %", "test %", "95 % interval", "spikes per neuron", "training, s")
    seeds = f"Mean of {n} seeds, ± their standard deviation. " if n > 1 else ""
    return Table("Stages", columns, rows, f"{seeds}Choices were made on validation images.")


def training_table(group: Group) -> Table:
    """What each stage cost to train, from the log."""
    run, rows = group.runs[0], list[tuple[str, ...]]()
    finished = {stage["index"]: stage["seconds"] for stage in group.first["stages"]}
    log = run.log
    for index, stage in enumerate(run.recipe.stages):
        epochs = [row for row in log if row["stage"] == index]
        if not epochs:
            continue
        seconds = finished.get(index, epochs[-1]["seconds"])
        done = index in finished or run.stage_path(index).exists()
        speeds, validation, memory = (
            [row[key] for row in epochs if row.get(key) is not None]  # logs of older versions are without them
            for key in ("images_per_second", "val_seconds", "memory")
        )
        rows.append(
            (
                name_of(stage.steps), f"{stage.epochs:g}" if done else f"{len(epochs)}, not finished",
                cell(statistics.median(speeds), 0) if speeds else "", cell(seconds, 0),
                cell(100 * sum(validation) / max(seconds, sum(validation)), 0) if validation else "",
                cell(max(memory) / 1e6, 0) if memory else "",
            )
        )  # fmt: skip
    columns = ("stage", "epochs", "images per second", "seconds", "of which validation, %", "peak memory, MB")
    precision, machine = run.about.get("precision"), run.about.get("machine") or {}
    note = (
        f"On {hardware(machine, run.about.get('device'))}, {precision}. Images per "
        "second: median of the epochs, without validation; a first epoch may have compiled the neurons. Memory: what "
        "torch had allocated on a GPU, else the whole process's."
    )
    if any(row.get("size", run.recipe.size) < run.recipe.size for row in log):
        note += " A stage that begins with smaller images has more of these per second."
    return Table("Training cost", columns, rows, note)


def _missing(group: Group) -> list[tuple[str, str]]:
    """Stages that some run lacks, and what they wait for."""
    there, run = {stage["steps"] for stage in group.stages}, group.runs[0]
    stages = [(index, stage) for index, stage in enumerate(run.recipe.stages) if stage.steps not in there]
    trained = [all(run.stage_path(index).exists() for run in group.runs) for index, _ in stages]
    return [
        (name_of(stage.steps), "not measured yet" if done else "not trained yet")
        for (_, stage), done in zip(stages, trained, strict=True)
    ]


def _energy_table(group: Group, models: Mapping[str, energy.Model]) -> Table:
    rows = []
    for stage in group.first["stages"]:
        for name, model in models.items():
            if stage["steps"] is None or not stage["operations"]:
                continue
            total = energy.total(stage, model)
            even = energy.break_even(stage, total, total.cnn_int8)
            cells = (cell(joules / 1e6, 3) for joules in (total.cnn_fp32, total.cnn_int8, total.snn))
            ratios = (f"{total.cnn_fp32 / total.snn:.1f}", f"{total.cnn_int8 / total.snn:.2f}")
            rows.append(
                (f"{name_of(stage['steps'])}, {name}", *cells, *ratios, "never" if even is None else f"{even:.3f}")
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
    assumptions = " ".join(f"{name}: {model.about}" for name, model in models.items())
    note = (
        "Microjoules per image; none is a measurement. Break-even rate: spikes per neuron at which the int8 CNN costs "
        f"as much; above T, which no neuron reaches, the network is cheaper at any rate. {assumptions}"
    )
    return Table("Energy", columns, rows, note)


def ratio_table(group: Group, models: Mapping[str, energy.Model]) -> Table:
    """How many times less energy than the CNN's, fp32 / int8, by each model: what a terminal has room for."""
    rows = []
    for stage in group.first["stages"]:
        if stage["steps"] is None or not stage["operations"]:
            continue
        sums = (sum(layer[key] for layer in stage["operations"]) for key in ("multiplied", "additions"))
        totals = (energy.total(stage, model) for model in models.values())
        ratios = (f"{total.cnn_fp32 / total.snn:.1f} / {total.cnn_int8 / total.snn:.2f}" for total in totals)
        rows.append((name_of(stage["steps"]), *(f"{number / 1e6:.2f} M" for number in sums), *ratios))
    note = "\n".join(f"{name}: {model.about}" for name, model in models.items())
    return Table(
        "Energy of the CNN (fp32 / int8) ÷ energy of this network, by model; none is a measurement",
        ("network", "multiplications", "additions", *models), rows, note,
    )  # fmt: skip


def _operation_table(group: Group) -> Table:
    last = group.first["stages"][-1]
    rows: list[tuple[str, ...]] = [
        (
            layer["name"], layer["input"], f"{layer['macs']:,}", f"{layer['multiplied']:,}",
            cell(layer["additions"], 0), cell(layer["additions_by_rate"], 0), f"{layer['weights']:,}",
        )
        for layer in last["operations"]
    ]  # fmt: skip
    if rows:
        sums = [
            sum(layer[key] for layer in last["operations"])
            for key in ("macs", "multiplied", "additions", "additions_by_rate", "weights")
        ]
        rows.append(("all", "", *(cell(number, 0) for number in sums)))
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
    return Table(f"Operations at {name_of(last['steps'])}", columns, rows, note)


def _layer_table(group: Group) -> Table:
    rows = []
    for stage in group.first["stages"]:
        for layer in stage["layers"]:
            shares = (f"{100 * layer[key]:.1f}" for key in ("dead_channels", "saturated_channels", "surrogate"))
            numbers = f"{layer['threshold']:.4f}", f"{layer['leak']:.4f}", f"{layer['rate']:.4f}"
            rows.append((f"{name_of(stage['steps'])}, {layer['name']}", f"{layer['neurons']:,}", *numbers, *shares))
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


def speed_table(group: Group) -> Table:
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
    machine, device = group.first["machine"], group.first.get("device")
    where, processor = hardware(machine, device), hardware(machine, "cpu")
    note = f"On {where}; interleaved." + (f" Exported files: on {processor}." if where != processor else "")
    return Table("Speed", columns, rows, note)


def equal_table(group: Group) -> Table | None:
    """Timesteps and latency at the accuracy of the run's last network: its own, by conversion alone, with a rate
    code."""
    found = group.first.get("conversion_alone")
    if found is None:
        return None
    own, wanted = found["latency"], found["accuracy"]
    rows = [
        ("this run", str(found["steps"]), f"{wanted:.2f}", "" if own is None else f"{1000 * own:.2f}", "1.0"),
        ("its CNN, not spiking", "", f"{found['cnn_accuracy']:.2f}", "", ""),
    ]
    for strategy in dict.fromkeys(row["strategy"] for row in found["rows"]):
        ends = list({row["initial"]: row for row in found["rows"] if row["strategy"] == strategy}.values())  # largest T
        there = [row for row in ends if row["accuracy"] >= wanted]
        best = min(there, key=lambda row: row["steps"]) if there else max(ends, key=lambda row: row["accuracy"])
        name = strategy + (f", initial {best['initial']:g}" if len(ends) > 1 else "")
        steps = str(best["steps"]) if there else f"not within {best['steps']}"
        timed = own is not None and best["latency"] is not None
        times = (f"{1000 * best['latency']:.2f}", f"{best['latency'] / own:.1f}") if timed else ("", "")
        rows.append((name, steps, f"{best['accuracy']:.2f}", *times))
    columns = ("network", "timesteps needed", "validation %", "one image: median, ms", "× this run")
    note = (
        f"Conversion alone: the CNN's own weights, thresholds found on training images, no training of spikes. T = 1, "
        f"2, 4 … until {found['images']:,} validation images, the same for all, are as often right as by this run, up "
        f"to 128, with a rate code 2048, and {found['seconds']:.0f} s for each strategy. Of two initial membranes, 0 "
        "and 0.5 thresholds, the better. Times are measured in PyTorch, interleaved; the rate code's is not."
    )
    return Table("Latency at equal accuracy", columns, rows, note)


def _paper_table(group: Group) -> Table | None:
    run = group.runs[0].recipe
    found = PAPER.get((Path(run.data.split("?")[0]).name, run.net))
    if found is None:
        return None
    accuracies, stated = found
    ours = {row["steps"]: row["test_accuracy"] for row in group.stages}
    cells = [f"({accuracy:.2f})" for accuracy in accuracies]
    cells[-1] = f"{accuracies[-1]:.2f}" if stated else cells[-1]
    mine = [cell(ours[steps][0], 2, ours[steps][1]) if steps in ours else "not run" for steps in PAPER_STEPS]
    note = "In brackets: from memory, not checked. " + "The paper's T = 1 is in its abstract." * stated
    return Table(
        "The paper's row", ("", *map(name_of, PAPER_STEPS)), [("arXiv 2110.05929", *cells), ("this", *mine)], note
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
    return Table(f"Classes at {name_of(last['steps'])}", ("class", "images", "right, %", "most often taken for"), rows)


def tables_of(group: Group, models: Mapping[str, energy.Model]) -> list[Table]:
    found = [
        stage_table(group),
        training_table(group),
        _paper_table(group),
        _energy_table(group, models),
        _operation_table(group),
        speed_table(group),
        equal_table(group),
    ]
    return [table for table in [*found, _layer_table(group), _class_table(group)] if table is not None and table.rows]
