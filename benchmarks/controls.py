"""The controls: what the ladder gives, against what else the same training could have bought.

    python -m benchmarks.controls --data IMAGES --out RUNS     goes on with benchmarks/records/controls.json

IMAGES is CIFAR-10. Every ladder trains the same small network, starts from the same CNN of its seed, and costs the
same: COST passes over the images, a pass at T timesteps counting T times. Half of it goes to the rungs above T = 1, the
same number of epochs each. A CNN costs as much per pass as T = 1, so training from scratch gets the CNN's passes as
well. All accuracies are of the validation images: ladders are chosen here.

The record is written after every run; the same command goes on. Seeds are outermost, so that what is there after any
seed is complete. `--variants LADDER` changes one thing at a time on that ladder instead (its passes stay, whatever they
cost then), `--only` some of them. At the end docs/controls-table.md and docs/controls.png are written.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from benchmarks.record import append
from benchmarks.record import rows as recorded
from unitstep.data import load_train
from unitstep.groups import averaged, cell
from unitstep.ladder import train
from unitstep.measurement import measure
from unitstep.recipes import Recipe, Stage, without_folder
from unitstep.runs import Run
from unitstep.tables import markdown

HERE = Path(__file__).parent
RECORD = HERE / "records" / "controls.json"
Norm = Literal["keep", "none"]
NORMS: tuple[Norm, ...] = ("keep", "none")
SEEDS = (0, 1, 2)
CNN_EPOCHS, COST = 3, 6.0
FULL, STRAIGHT, SCRATCH = "5→4→3→2→1", "straight to 1", "from scratch"
LADDERS: dict[str, tuple[int, ...]] = {  # timesteps of the rungs above T = 1
    FULL: (5, 4, 3, 2), "5→3→1": (5, 3), "5→1": (5,), "3→2→1": (3, 2), STRAIGHT: (), SCRATCH: (),
}  # fmt: skip
BASE = Recipe("control", "", "vgg-small", (Stage(None, CNN_EPOCHS, 0.1),), padding=2, border="mirror", whiten=True)
PENALTIES = (0.001, 0.002, 0.003, 0.01, 0.03, 0.3, 1.0, 3.0, 10.0)
COMMON: dict[str, dict[str, Any]] = {  # what the recipes took from common practice, and what it is compared with
    "fp32": {},
    "fp32, smoothing 0": {"label_smoothing": 0.0},
    "fp32, warmup 0": {"warmup": 0.0},
    "fp32, 64 calibration images": {"calibration_images": 64},
    "fp32, CNN smoothing 0": {"cnn": {"label_smoothing": 0.0}},
    "fp32, CNN warmup 0": {"cnn": {"warmup": 0.0}},
    "fp32, CNN decay 0": {"cnn": {"weight_decay": 0.0}},
    "fp32, CNN lr 0.05": {"cnn": {"lr": 0.05}},
    "fp32, CNN lr 0.2": {"cnn": {"lr": 0.2}},
}
VARIANTS: dict[str, dict[str, Any]] = {  # one change each, with batch norm kept: fields of the recipe, of its spiking
    # stages, or of its CNN; or the precision, which is found by `auto` elsewhere (bf16 in the record)
    **{variant: {"precision": "fp32", **change} for variant, change in COMMON.items()},
    "weights of 8 bits": {"weight_bits": 8},
    "batch norm folded first": {"norm": "fold"},
    "max pools": {"pool": "max"},
    "readout sum": {"readout": "sum"},
    "height 1": {"height": "unit"},
    "initial membrane 0.5": {"initial": 0.5},
    "percentile 70": {"percentile": 70.0},
    "percentile 99": {"percentile": 99.0},
    "percentile 99 per channel, initial 0.5": {
        "thresholds": "channel-percentile", "percentile": 99.0, "initial": 0.5,
    },
    "distillation 0.5": {"distillation": 0.5},
    "Muon": {"optimizer": "muon"},
    **{f"spike penalty {weight:g}": {"spike_penalty": weight} for weight in PENALTIES},
}  # fmt: skip


@dataclass(frozen=True)
class Control:
    """One run: which ladder, with or without batch norm, what is changed, which seed."""

    ladder: str
    norm: Norm
    variant: str
    seed: int

    @property
    def folder(self) -> str:
        words = f"{self.ladder}-{self.norm}-{self.variant}-{self.seed}".replace("→", "").replace(",", "")
        return words.replace(" ", "_").replace("__", "_")

    def recipe(self, data: str) -> Recipe:
        kept = self.norm == "keep"
        epochs = CNN_EPOCHS if self.ladder != SCRATCH else 1e-9  # … of which one optimiser step is made
        # without batch norm the large steps of a CNN with it diverge
        lr = 0.1 if kept else 0.02
        cnn = Stage(None, epochs, lr, "nesterov", 5e-4, vector_lr=8.0, warmup=0.2, label_smoothing=0.1)
        spiking = Stage(1, COST, 2e-3 if kept else 1e-3, "adamw", 0.2, warmup=0.1, label_smoothing=0.1)
        changes = {**VARIANTS.get(self.variant, {})}
        changes.pop("precision", None)  # not of the recipe
        cnn = replace(cnn, **changes.pop("cnn", {}))
        of_stages = {key: value for key, value in changes.items() if hasattr(spiking, key)}
        spiking = replace(spiking, **of_stages)
        upper = LADDERS[self.ladder]
        rungs = [replace(spiking, steps=steps, epochs=COST / 2 / sum(upper)) for steps in upper]
        last = replace(spiking, epochs=COST / 2 if upper else COST)
        if self.ladder == SCRATCH:
            last = replace(last, epochs=COST + CNN_EPOCHS)
        fields = {"norm": self.norm, **{key: value for key, value in changes.items() if key not in of_stages}}
        return replace(BASE, data=data, stages=(cnn, *rungs, last), seed=self.seed, **fields)


def controls(
    variants: str | None, seeds: Sequence[int] = SEEDS, only: Sequence[str] = tuple(VARIANTS)
) -> Iterator[Control]:
    for seed in seeds:
        if variants:
            yield from (Control(variants, "keep", variant, seed) for variant in only)
        else:
            yield from (Control(ladder, norm, "", seed) for norm in NORMS for ladder in LADDERS)


def run(control: Control, data: str, out: Path, deadline: float, **options: Any) -> dict[str, Any] | None:
    """Train, and measure on the validation images; None if the time was up before."""
    recipe = control.recipe(data)
    change = VARIANTS.get(control.variant, {})
    precision = change.get("precision", "auto")
    options = {**options, "precision": precision}

    def left() -> float:
        return max(0.0, (deadline - time.monotonic()) / 60)

    cnn: Run | None = None
    if control.ladder != SCRATCH:  # one CNN for all ladders of a seed
        norm: Norm = "none" if recipe.norm == "none" else "keep"
        alone = replace(
            BASE, name="control-cnn", data=data, stages=recipe.stages[:1], seed=recipe.seed, norm=norm, pool=recipe.pool
        )
        own = "cnn" in change
        of = control.folder if own else f"{norm}-{recipe.pool}-{precision}-{recipe.seed}"
        cnn = train(alone, out / f"cnn-{of}", time_limit=left(), **options)
        if not cnn.stages:
            return None
    made = train(recipe, out / control.folder, cnn=cnn, time_limit=left(), **options)
    if len(made.stages) < len(recipe.stages):
        return None
    _, val = load_train(recipe.data, size=recipe.size, channels=recipe.channels)
    stages: list[dict[str, Any]] = []
    for stage in made.stages:
        found = measure(made.net(stage.index), val, steps=stage.stage.steps, device=options["device"])
        layers = [{"name": layer.name, "rate": layer.rate, "dead": layer.dead} for layer in found.layers]
        stages.append(
            {"steps": stage.stage.steps, "epochs": stage.stage.epochs, "val_accuracy": stage.val_accuracy}
            | {"spikes_per_neuron": found.spikes_per_neuron, "seconds": stage.seconds, "layers": layers}
        )
    whole = without_folder(recipe).to_dict()
    return {**asdict(control), "stages": stages, "val_images": len(val), "recipe": whole, **made.trained}


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """The runs of each (norm, ladder, variant, precision), one per seed."""
    order = ["", *VARIANTS]
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (order.index(row["variant"]), NORMS.index(row["norm"]), row["seed"])):
        found.setdefault((row["norm"], row["ladder"], row["variant"], row["precision"]), []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Validation accuracy in percent: one line per ladder or variant; mean, and ± the standard deviation over seeds."""

    def of(values: list[float], digits: int) -> str:
        average, spread = averaged(values)
        return cell(average, digits, spread)

    names = ("batch norm", "ladder", "changed", "precision", "CNN", "before T = 1", "T = 1", "spikes per neuron")
    text = list[Sequence[str]]()
    for (norm, ladder, variant, precision), runs in lines(rows).items():
        cnn = "" if ladder == SCRATCH else of([run["stages"][0]["val_accuracy"] for run in runs], 1)
        above = of([run["stages"][-2]["val_accuracy"] for run in runs], 1) if LADDERS[ladder] else ""
        last = [run["stages"][-1] for run in runs]
        dead = of([100 * max(layer["dead"] for layer in stage["layers"]) for stage in last], 0)
        cells = [norm, ladder, variant, precision, cnn, above, of([stage["val_accuracy"] for stage in last], 1)]
        text.append([*cells, of([stage["spikes_per_neuron"] for stage in last], 3), f"{dead} %", str(len(runs))])
    return markdown((*names, "dead, worst layer", "n"), text) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Above: accuracy at T = 1 of each ladder, one dot per seed. Below: spikes per neuron in each layer there, of three
    of them. Left with batch norm, right without."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(NORMS))
    for (norm, ladder, variant, _), runs in lines(rows).items():
        if variant:
            continue
        dots, rates = axes[:, NORMS.index(norm)]
        accuracies = [run["stages"][-1]["val_accuracy"] for run in runs]
        dots.plot([list(LADDERS).index(ladder)] * len(runs), accuracies, "oC0", alpha=0.7, markersize=5)
        if ladder in (FULL, "5→1", STRAIGHT):
            layers = [run["stages"][-1]["layers"] for run in runs]
            per_layer = [mean(layer["rate"] for layer in same) for same in zip(*layers, strict=True)]
            rates.plot(range(1, len(per_layer) + 1), per_layer, "o-", label=ladder)
    for (dots, rates), words in zip(axes.T, ("batch norm kept", "no batch norm"), strict=True):
        dots.set_title(words)
        dots.set_xticks(range(len(LADDERS)), list(LADDERS), rotation=25, fontsize=8)
        dots.set_ylabel("validation accuracy at T = 1, %")
        rates.set_xlabel("neuron layer")
        rates.set_ylabel("spikes per neuron at T = 1")
        rates.set_ylim(0)
        rates.legend(fontsize=8)
        for axis in (dots, rates):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder or hub name, or what unitstep pack made")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many minutes, to go on later")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="some only: processes may share the work")
    parser.add_argument(
        "--variants", metavar="LADDER", choices=list(LADDERS), help="the variants, on this ladder, instead"
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="of the variants")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.only != list(VARIANTS) and options.variants is None:
        parser.error("--only chooses among the --variants of a ladder: name that, too")
    deadline = time.monotonic() + 60 * options.minutes
    done = {(row["ladder"], row["norm"], row["variant"], row["seed"]) for row in recorded(RECORD)}
    for control in controls(options.variants, options.seeds, options.only):
        if (control.ladder, control.norm, control.variant, control.seed) in done:
            continue
        row = run(control, options.data, options.out, deadline, device=options.device)
        if row is None:
            print("time is up; the same command goes on")
            break
        append(RECORD, row)
        print(f"{control.folder}: {row['stages'][-1]['val_accuracy']:.2f} %", flush=True)
    if rows := recorded(RECORD):
        (HERE.parent / "docs" / "controls-table.md").write_text(table(rows))
        draw(rows, HERE.parent / "docs" / "controls.png")
        print(table(rows))


if __name__ == "__main__":
    main()
