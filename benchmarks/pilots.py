"""Pilots for `cifar10-quick`: changes to what it was before them, and to what it is now, judged on images that none of
them is trained on.

    python -m benchmarks.pilots --data PACKED --work WORK --device cuda --minutes 8

PACKED is CIFAR-10 as `unitstep pack` wrote it. HELD_OUT of its training images are set aside, with a fixed seed; the
rest is trained on, 4 % of it for validation, as always. The test images are not looked at. Where a change makes an
epoch dearer on a CPU, there are fewer epochs, so that all pilots would take a CPU about the same time.

records/pilots.json gets, for every pilot, the accuracy on the held-out images of the weights that training keeps: the
best on the validation images, or "now" the last epoch's. (The first five also have those of the last epoch and means
over the last epochs, made at the commit in their rows.) The same command goes on.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import muon
from benchmarks.record import append, rows
from unitstep import ladder, packed
from unitstep.data import load_test
from unitstep.evaluation import accuracy, choose_device
from unitstep.recipes import Recipe, Stage, recipe, without_folder
from unitstep.runs import provenance

HELD_OUT = 8_000
RECORD = Path(__file__).parent / "records" / "pilots.json"
SCHEDULE = 27.0  # epochs at T = 1
BEFORE = replace(  # cifar10-quick as it was
    recipe("cifar10-quick"),
    cutout=0,
    stages=(
        Stage(None, 6, 0.1, "nesterov", 5e-4, vector_lr=8, warmup=0.2, label_smoothing=0.1),
        Stage(1, SCHEDULE, 2e-3, "adamw", 0.2, warmup=0.1, label_smoothing=0.1),
    ),
)
NOW = recipe("cifar10-quick")
DISTILLED = 1.28  # times the time of an epoch without it


def changed(of: Recipe, cnn: float | None = None, last: float | None = None, lr: float | None = None) -> Recipe:
    """With other epochs of the CNN and at T = 1, or another rate there."""
    first, final = of.stages
    final = replace(final, epochs=last or final.epochs, lr=lr or final.lr)
    return replace(of, stages=(replace(first, epochs=first.epochs if cnn is None else cnn), final))


def distilled(of: Recipe, share: float) -> Recipe:
    first, final = of.stages
    return replace(of, stages=(first, replace(final, distillation=share, epochs=final.epochs / DISTILLED)))


PILOTS: dict[str, Recipe] = {
    "none": BEFORE,
    "cutout 8": replace(BEFORE, cutout=8),
    "distillation 0.5, 21 epochs": distilled(BEFORE, 0.5),
    "cutout 12": replace(BEFORE, cutout=12),
    "cutout 8, lr 4e-3": changed(replace(BEFORE, cutout=8), lr=4e-3),
    "now": NOW,  # 76 minutes on two cores
    "now, 26 epochs": changed(NOW, last=26),
    "now, CNN 5 epochs": changed(NOW, cnn=5),
    "now, CNN 3 epochs, 29 epochs": changed(NOW, cnn=3, last=29),
    "now, lr 3e-3": changed(NOW, lr=3e-3),
    "now, muon": muon(NOW),
    "now, muon, 25 epochs": muon(changed(NOW, last=25)),
}


def set_aside(source: Path, out: Path) -> None:
    """Write the training images of the packed folder `source` as a packed folder whose test images are HELD_OUT of
    them."""
    part = packed.read(source)["train"]
    order = torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(1))
    out.mkdir(parents=True)
    for name, chosen in (("test", order[:HELD_OUT]), ("train", order[HELD_OUT:])):
        packed.write(out, name, part.images[chosen], part.labels[chosen], part.classes)


def pilot(r: Recipe, work: Path, device: str) -> dict[str, Any]:
    """Train, and judge the weights that training keeps on the held-out images."""
    run = ladder.train(r, work, device=device)
    held_out, where = load_test(r.data, size=r.size, channels=r.channels), choose_device(device)
    kept = accuracy(run.net(1).to(where), held_out.to(where), 1, where)
    return {
        "held_out": {"kept": kept}, "held_out_images": len(held_out),
        "losses": [row["loss"] for row in run.log if row["stage"] == 1],
        "val_accuracy": [stage.val_accuracy for stage in run.stages], "seconds": [s.seconds for s in run.stages],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as unitstep pack wrote it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record, a JSON file")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin none after so many minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument(
        "--commit", help="of this source tree, where it has no history: git describe --always --dirty=+"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("names", nargs="*", help="pilots; all if none is given")
    options = parser.parse_args()
    if unknown := set(options.names) - PILOTS.keys():
        parser.error(f"there is no pilot {', '.join(sorted(unknown))}; there are: {'; '.join(PILOTS)}")
    deadline = time.monotonic() + 60 * options.minutes
    data = options.work / "data"
    if not data.exists():
        set_aside(options.data, data)
    done = {(row["change"], row["seed"]) for row in rows(options.out)}
    for seed in options.seeds:
        for number, (change, r) in enumerate(PILOTS.items()):
            wanted = not options.names or change in options.names
            if not wanted or (change, seed) in done or time.monotonic() > deadline:
                continue
            folder = options.work / f"{number}-{seed}"
            found = pilot(replace(r, data=str(data), seed=seed), folder, options.device)
            about = provenance() | ({"commit": options.commit} if options.commit else {})
            whole = without_folder(replace(r, seed=seed)).to_dict()
            row = {"change": change, "seed": seed, **found, "recipe": whole, **about}
            append(options.out, row)
            print(change, seed, found["held_out"], f"{sum(found['seconds']):.0f} s", flush=True)


if __name__ == "__main__":
    main()
