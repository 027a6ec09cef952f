"""Accuracy by conversion alone, without any training, against the number of timesteps: each threshold strategy, and a
rate code.

    python benchmarks/conversion.py --data IMAGES --out RUN     goes on with benchmarks/records/conversion.json

IMAGES is CIFAR-10. First the CNN is trained in the run folder RUN. Everything is measured on validation images:
strategies are chosen here. The record is written after every figure; the same command goes on. Then it writes the
table and the picture (docs/conversion-table.md, docs/conversion.png).
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitstep.conversion import spiking
from unitstep.curves import CALIBRATION_STEPS, INITIALS, RATE, STEPS, STRATEGIES, find_thresholds_, right_at
from unitstep.data import Split, load_train
from unitstep.files import write_json
from unitstep.ladder import calibration_images, train
from unitstep.measurement import wilson
from unitstep.neuron import compiled
from unitstep.recipes import Recipe, Stage, recipe_from_dict, without_folder
from unitstep.runs import Run, provenance

HERE = Path(__file__).parent
RECORD = HERE / "records" / "conversion.json"
CNN = Recipe(  # small, so that thousands of timesteps can be run
    "cifar10-quick", "", "vgg-small", (Stage(None, 8, 0.1, "nesterov", 5e-4, warmup=0.2, label_smoothing=0.1),)
)
RATE_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 250, 500, 1000, 1500, 2000, 2500)
BATCH = 250  # images at a time


def batches(split: Split, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for x, y in split.batches(BATCH):
        yield x[: images - seen].contiguous(memory_format=torch.channels_last), y[: images - seen]
        seen += len(x)
        if seen >= images:
            return


def measure(run: Run, images: int, rate_images: int, bf16: bool) -> dict[str, Any]:
    r = run.recipe
    split, val = load_train(r.data, size=r.size, channels=r.channels, augment=r.augment)
    images, rate_images = min(images, len(val)), min(rate_images, len(val))
    cnn: Any = run.net(0)
    cnn = cnn.to(memory_format=torch.channels_last)
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    about = without_folder(r)
    if found and (recipe_from_dict(found["recipe"]) != about or found["images"] != images):
        raise ValueError(f"{RECORD} is of another run or number of images: move it away")
    with torch.no_grad():
        cnn_right = sum(int((cnn(x).argmax(1) == y).sum()) for x, y in batches(val, images))
    if found and abs(found["cnn_accuracy"] - 100 * cnn_right / images) > 0.2:
        raise ValueError(f"{RECORD} is of another CNN, trained anew or elsewhere: move the record away")
    found |= {
        "schema": 1,
        "recipe": about.to_dict(),
        "images": images,
        "cnn_accuracy": 100 * cnn_right / images,
        **provenance(),
    }
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    done = {(row["strategy"], row["initial"], row["steps"]) for row in rows}
    calibration = calibration_images(r, split).contiguous(memory_format=torch.channels_last)

    def add(strategy: str, initial: float, n: int, right: dict[int, int], seconds: float) -> None:
        for steps, hits in right.items():
            row = {"strategy": strategy, "initial": initial, "steps": steps, "images": n, "accuracy": 100 * hits / n}
            rows.append({**row, "interval": wilson(hits, n), "seconds": round(seconds, 1)})
            print(
                f"{strategy:36} initial {initial:3} T={steps:<5} {100 * hits / n:6.2f} %  {seconds:.0f} s", flush=True
            )
        write_json(RECORD, found)

    for strategy, options in STRATEGIES.items():
        few = [(steps,) for steps in STEPS if steps < CALIBRATION_STEPS]
        many = tuple(steps for steps in STEPS if steps >= CALIBRATION_STEPS)  # one run, as thresholds are the same …
        groups = [*few, many] if options["thresholds"] != "mse" else [(steps,) for steps in STEPS]  # … except here
        for initial, marks in itertools.product(INITIALS, groups):
            if (strategy, initial, marks[-1]) in done:
                continue
            started = time.perf_counter()
            snn = spiking(cnn, initial=initial, norm="fold")
            find_thresholds_(snn, calibration, strategy, marks[0])
            with compiled(True):
                parts = [right_at(snn, x, y, marks) for x, y in batches(val, images)]
            right = {mark: sum(part[mark] for part in parts) for mark in marks}
            add(strategy, initial, images, right, time.perf_counter() - started)
    if (RATE, 0.0, max(RATE_STEPS)) not in done and rate_images:
        snn = find_thresholds_(spiking(cnn, norm="fold"), calibration, RATE, max(RATE_STEPS))
        so_far = found.setdefault("rate", {"bf16": bf16, "images": 0, "seconds": 0.0, "right": {}})
        for number, (x, y) in enumerate(batches(val, rate_images)):
            if number * BATCH < so_far["images"]:
                continue
            started = time.perf_counter()
            with compiled(True):
                hits_at = right_at(snn, x, y, RATE_STEPS, rate_seed=number, bf16=so_far["bf16"])
            for mark, hits in hits_at.items():
                so_far["right"][str(mark)] = so_far["right"].get(str(mark), 0) + hits
            so_far["images"] += len(x)
            so_far["seconds"] += time.perf_counter() - started
            write_json(RECORD, found)
            print(f"{RATE}: {so_far['images']} of {rate_images} images, {so_far['seconds']:.0f} s", flush=True)
        right = {int(mark): hits for mark, hits in so_far["right"].items()}
        add(RATE, 0.0, so_far["images"], right, so_far["seconds"])
    return found


def table(found: dict[str, Any]) -> str:
    """Validation accuracy in percent: one line per strategy and initial membrane, one column per T."""
    columns = [steps for steps in RATE_STEPS if any(row["steps"] == steps for row in found["rows"])]
    lines = [
        f"| thresholds | initial | {' | '.join(f'T = {t}' for t in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for strategy, initial in dict.fromkeys((row["strategy"], row["initial"]) for row in found["rows"]):
        mine = {
            r["steps"]: r["accuracy"] for r in found["rows"] if (r["strategy"], r["initial"]) == (strategy, initial)
        }
        cells = [f"{mine[t]:.1f}" if t in mine else "" for t in columns]
        lines.append(f"| {strategy} | {initial:g} | {' | '.join(cells)} |")
    lines += [
        "",
        f"% of {found['images']:,} validation images, by conversion alone; the CNN: {found['cnn_accuracy']:.1f}.",
        "Rows: how thresholds were found, and membranes before the first step, in thresholds.",
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    colours = {name: f"C{number}" for number, name in enumerate([*STRATEGIES, RATE])}
    for strategy, initial in dict.fromkeys((row["strategy"], row["initial"]) for row in found["rows"]):
        mine = [row for row in found["rows"] if (row["strategy"], row["initial"]) == (strategy, initial)]
        label = strategy if initial == 0 else f"{strategy}, initial {initial:g}"
        x, y = [row["steps"] for row in mine], [row["accuracy"] for row in mine]
        axis.plot(x, y, "-" if initial == 0 else "--", color=colours[strategy], label=label, linewidth=1.3)
    axis.axhline(found["cnn_accuracy"], color="black", linewidth=0.8, label="CNN")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("timesteps T")
    axis.set_ylabel("validation accuracy by conversion alone, %")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder or hub name, or what unitstep pack made")
    parser.add_argument("--out", type=Path, required=True, help="run folder of the CNN")
    parser.add_argument("--precision", default="auto", help="in which the CNN is trained: auto, fp32, bf16")
    parser.add_argument("--images", type=int, default=1000, help="validation images per figure (default 1000)")
    parser.add_argument("--rate-images", type=int, default=1000, help="the same for the rate code; 0 leaves it out")
    parser.add_argument("--rate-bf16", action="store_true", help="weights and currents of the rate code in bf16")
    options = parser.parse_args()
    cnn = train(replace(CNN, data=options.data), options.out, precision=options.precision)
    found = measure(cnn, options.images, options.rate_images, options.rate_bf16)
    (HERE.parent / "docs" / "conversion-table.md").write_text(table(found))
    draw(found, HERE.parent / "docs" / "conversion.png")
    print(table(found))


if __name__ == "__main__":
    main()
