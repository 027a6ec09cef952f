"""AdamW against Muon in the spiking stages of `fashion-mini`, each at three learning rates, and straight to T = 1.

    python -m benchmarks.optimizers --data FASHION_MNIST --out RUNS

FASHION_MNIST is the whole data set, as `unitstep train` takes it: all runs are judged on HELD_OUT of its training
images that are not in `fashion-mini`; the test images are not looked at. All runs of a seed start from the same CNN, on
one thread. The same command goes on; records/optimizers.json gets a row after each run, docs/optimizers-table.md at the
end.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.record import append, rows
from unitstep.data import InMemory, load_test, load_train
from unitstep.evaluation import accuracy
from unitstep.groups import averaged, cell
from unitstep.ladder import train
from unitstep.recipes import Recipe, recipe
from unitstep.runs import provenance
from unitstep.tables import markdown

RECORD = Path(__file__).parent / "records" / "optimizers.json"
TABLE = Path(__file__).parents[1] / "docs" / "optimizers-table.md"
HELD_OUT = 10_000
RATE = 4e-3  # the recipe's
ARMS = [  # optimizer, learning rate, and whether there are no rungs between the CNN and T = 1
    (optimizer, rate, straight)
    for rate, straight in ((RATE, False), (RATE, True), (2e-3, False), (8e-3, False))
    for optimizer in ("adamw", "muon")
]


def held_out(source: str) -> InMemory:
    """Some of the training images of Fashion-MNIST that are not in fashion-mini, by their pixels."""
    shape = {"size": 28, "channels": 1}
    mini = (*load_train("fashion-mini", **shape), load_test("fashion-mini", **shape))  # type: ignore[arg-type]
    known = {image.numpy().tobytes() for split in mini for image in split.images}  # type: ignore[attr-defined]
    whole, _ = load_train(source, **shape)  # type: ignore[arg-type]
    assert isinstance(whole, InMemory)
    others = torch.tensor([i for i, image in enumerate(whole.images) if image.numpy().tobytes() not in known])
    rows = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:HELD_OUT]]
    return InMemory(whole.images[rows], whole.labels[rows], whole.classes)


def arm(optimizer: str, rate: float, straight: bool, seed: int) -> Recipe:
    r = recipe("fashion-mini", seed=seed)
    spiking = (replace(stage, optimizer=optimizer, lr=rate) for stage in r.stages[1:])  # type: ignore[arg-type]
    r = replace(r, stages=(r.stages[0], *spiking))
    return gpu.straight(r) if straight else r


def of(row: dict[str, Any]) -> tuple[str, float, bool]:
    """Which of `ARMS` a row of the record is."""
    return row["optimizer"], row["lr"], len(row["held_out"]) == 2


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the record as a Markdown table: mean over the seeds ± their standard deviation."""
    lines = []
    for optimizer, rate, straight in sorted(ARMS):
        runs = [row for row in rows if of(row) == (optimizer, rate, straight)]
        if runs:
            columns = [*zip(*(run["held_out"] for run in runs), strict=True)]
            shown = [cell(value, 2, spread) for value, spread in map(averaged, columns)]
            shown[1:1] = [""] * (6 - len(shown))
            seconds = cell(mean(sum(run["seconds"][1:]) for run in runs), 0)
            lines.append((f"{optimizer} {rate:g}{', straight' * straight}", *shown, seconds, str(len(runs))))
    first = rows[0]
    conditions = (
        f"% of {HELD_OUT:,} training images of Fashion-MNIST that `fashion-mini` has not; straight: T = 1 gets the "
        f"epochs that the rungs cost. s: of training all spiking stages. {first['machine']['cpu']}, "
        f"{first['machine']['threads']} thread, torch {first['versions']['torch']}, commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}."
    )
    names = ("CNN", "T = 5", "4", "3", "2", "1", "s", "n")
    return f"{markdown(('spiking stages', *names), lines)}\n\n{conditions}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Fashion-MNIST: a folder of its parquet files, or its hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=range(5), help="some only: processes may share the work"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    held, device = held_out(options.data), torch.device("cpu")
    for optimizer, rate, straight in ARMS:
        for seed in options.seeds:
            if any((*of(row), row["seed"]) == (optimizer, rate, straight, seed) for row in rows(RECORD)):
                continue
            about: dict[str, Any] = {"optimizer": optimizer, "lr": rate, "seed": seed}
            r, first = arm(optimizer, rate, straight, seed), options.out / f"adamw-{RATE:g}-{seed}"
            path = options.out / f"{optimizer}-{rate:g}{'-straight' * straight}-{seed}"
            train(arm("adamw", RATE, False, seed), first)  # whose row may have been made elsewhere
            run = train(r, path, cnn=None if path == first else first)
            nets = zip(map(run.net, range(len(r.stages))), r.stages, strict=True)
            about |= {"held_out": [accuracy(net, held, stage.steps, device) for net, stage in nets]}
            about |= {"loss": run.log[-1]["loss"], "seconds": [stage.seconds for stage in run.stages], **provenance()}
            append(RECORD, about)
            print(path.name, about["held_out"][-1], flush=True)
    TABLE.write_text(table(rows(RECORD)))
    print(table(rows(RECORD)))


if __name__ == "__main__":
    main()
