"""The standing list of runs that want a GPU, worked off in slices.

    python benchmarks/gpu.py --data PACKED --work WORK --out OUT --minutes 8.5

Goes through RUNS in order: trains, measures once on the test images, and leaves in OUT, for each finished run, its
record NAME.json and, of runs that are asked for with --weights, the last network, with 8-bit weights, in parts of at
most 16 MB. WORK keeps what is unfinished: the same command goes on there. Which runs are still open, why they are
wanted, and what this needs: gpu.md.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # nothing is installed where this runs

from unitstep import packed
from unitstep.compact import save_compact
from unitstep.files import write_json, write_whole
from unitstep.ladder import train
from unitstep.measurement import measure_run
from unitstep.recipes import Recipe, recipe

PART_BYTES = 16_000_000
LOGGED = ("name", "epoch", "loss", "val_accuracy", "images_per_second", "memory")


def shortened(r: Recipe, factor: float) -> Recipe:
    """With every stage's epochs divided by `factor`."""
    return replace(r, stages=tuple(replace(stage, epochs=stage.epochs / factor) for stage in r.stages))


def straight(r: Recipe) -> Recipe:
    """Without the rungs above T = 1, whose cost, T times that of T = 1 per epoch, goes to T = 1."""
    cnn, *rungs, last = r.stages
    extra = sum(stage.epochs * (stage.steps or 0) for stage in rungs)
    return replace(r, stages=(cnn, replace(last, epochs=last.epochs + extra)))


def longer(r: Recipe) -> Recipe:
    """Twice the epochs of the CNN, three times those of T = 1, and larger squares painted over."""
    cnn, *rungs, last = r.stages
    stages = (replace(cnn, epochs=2 * cnn.epochs), *rungs, replace(last, epochs=3 * last.epochs))
    return replace(r, stages=stages, cutout=12)


def muon(r: Recipe) -> Recipe:
    """With that optimiser in the spiking stages."""
    cnn, *spiking = r.stages
    return replace(r, stages=(cnn, *(replace(stage, optimizer="muon") for stage in spiking)))


VGG16 = recipe("cifar10-vgg16")
LONG = recipe("cifar10-quick-long")
CONV = recipe("cifar10-vgg16-conv")
RUNS: dict[str, Recipe] = {
    "cifar10-vgg16-conv-muon-0": muon(CONV),
    "cifar10-vgg16-conv-longer-muon-0": muon(longer(CONV)),
    "cifar10-vgg16-conv-longer-0": longer(CONV),
    "cifar10-quick-long-muon-0": muon(LONG),
    "cifar10-quick-longer-0": longer(LONG),
    "cifar10-quick-long-1": replace(LONG, seed=1),
    "cifar10-vgg16-conv-1": replace(CONV, seed=1),
    "cifar10-vgg16-conv-0": CONV,
    "cifar10-vgg16-conv-straight-0": straight(CONV),
    "cifar10-resnet20-0": recipe("cifar10-resnet20"),
    "cifar10-vgg6-0": recipe("cifar10-vgg6"),
    "cifar10-vgg16-paper-over-20": shortened(recipe("cifar10-vgg16-paper"), 20),
    "cifar10-vgg16-1": replace(VGG16, seed=1),
    "cifar10-vgg16-2": replace(VGG16, seed=2),
    "cifar10-quick-long-0": LONG,
    "cifar10-vgg16-0": VGG16,
    "cifar100-vgg16-0": recipe("cifar100-vgg16"),
    "cifar100-resnet20-0": recipe("cifar100-resnet20"),
}
SAME_CNN = {"cifar10-vgg16-conv-straight-0": "cifar10-vgg16-conv-0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, or CIFAR-100, as unitstep pack wrote it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is to be kept")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many minutes, to go on later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--commit", help="of this source tree, where it has no history: git describe --always --dirty=+"
    )
    parser.add_argument("--shorter", type=float, default=1.0, help="divide all epochs by this, to try it out")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME", help="a run whose network is kept")
    parser.add_argument("names", nargs="*", help="runs; all that are of these images if none is given")
    options = parser.parse_args()
    if unknown := {*options.names, *options.weights} - RUNS.keys():
        parser.error(f"there is no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    classes = len(packed.read(Path(options.data))["test"].classes)
    fitting = [name for name, r in RUNS.items() if classes == (100 if "cifar100" in r.data else 10)]
    if others := {*options.names, *options.weights} - set(fitting):
        parser.error(f"the images in {options.data} have {classes} classes: not those of {', '.join(sorted(others))}")
    deadline = time.monotonic() + 60 * options.minutes
    if options.shorter != 1:  # not to be taken for the runs themselves
        options.work, options.out = (folder / f"shorter-{options.shorter:g}" for folder in (options.work, options.out))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or fitting:
        path, weights = options.work / name, name in options.weights
        if (options.out / f"{name}.json").exists() and not (weights and not any(options.out.glob(f"{name}.safe*"))):
            continue
        left = (deadline - time.monotonic()) / 60
        if left <= 0:
            break
        r = shortened(RUNS[name], options.shorter)
        cnn = options.work / SAME_CNN[name] if name in SAME_CNN else None
        if cnn is not None and not any(cnn.glob("0-*")) and not path.exists():
            print(f"{name} starts from the CNN of {SAME_CNN[name]}, which is not in {options.work}: left out")
            continue
        run = train(r, path, data=options.data, device=options.device, time_limit=left, cnn=cnn)
        done = len(run.stages)
        print(f"{name}: {done} of {len(run.recipe.stages)} stages", *(s.val_accuracy for s in run.stages), flush=True)
        if done < len(run.recipe.stages):
            break
        found = run.measurement or measure_run(run, data=options.data, device=options.device)
        found["log"] = [{key: row[key] for key in LOGGED} for row in run.log]
        found["recipe"]["data"] = found["data"]["source"] = RUNS[name].data  # not the folder where it lies here
        if options.commit:
            found["commit"] = found["trained"]["commit"] = options.commit
        if weights:
            save_compact(run, path / "compact.safetensors")
            data = (path / "compact.safetensors").read_bytes()
            for number, start in enumerate(range(0, len(data), PART_BYTES)):  # cat puts them together again
                write_whole(options.out / f"{name}.safetensors.{number}", data[start : start + PART_BYTES])
        write_json(options.out / f"{name}.json", found)
        print(f"{name}: test {[round(row['test_accuracy'], 2) for row in found['stages']]}", flush=True)


if __name__ == "__main__":
    main()
