"""Make a trained network that comes with the package, and its card.

    python -m benchmarks.model NAME RUN [--data IMAGES]

RUN is a measured run that ends at T = 1; or what is left of one that gpu.py made on another machine, its record X.json,
with the network beside it as X.safetensors; IMAGES is then where the images are here. The last stage is written to
src/unitstep/models twice, with the same 8-bit weights: as NAME.safetensors, and in integers as NAME-int8.onnx. That one
is evaluated in ONNX Runtime on the test images; the other tells its spikes. The card is NAME.md there.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import measured
from unitstep.compact import MODELS, load_compact, save_compact
from unitstep.data import load_test, load_train
from unitstep.exporting import describe, to_onnx
from unitstep.files import write_whole
from unitstep.groups import trained_on
from unitstep.measurement import Measurement, measure, wilson
from unitstep.recipes import RECIPES, Recipe, recipe_from_dict, without_folder
from unitstep.running import open_model
from unitstep.runs import Run

CARD = """# {name}

A spiking network that needs one timestep: `unitstep.pretrained("{name}")`.

| | |
|---|---|
| images | `{data}` |
| input | uint8 [B, {channels}, {size}, {size}]; normalisation is inside |
| output | logits [B, {classes}]: {names} |
| accuracy | {accuracy:.2f} % of the {images:,} test images (95 %: {low:.2f}–{high:.2f}), in ONNX Runtime |
| as measured after training | {before:.2f} %; {val:.2f} % of the validation images{chosen} |
| spikes | {rate:.3f} per neuron and image; {spikes:,.0f} per image in {neurons:,} neurons |
| trained | recipe `{recipe}`, network `{net}`, seed {seed}; {seconds:.0f} s on {where} |
| by | commit {commit}, torch {torch} |
| `{name}-int8.onnx` | {onnx_bytes:,} bytes; integers from the pixels to the last spikes |
| `{name}.safetensors` | {bytes:,} bytes; the same weights; thresholds, leaks and batch norms in fp32 |

Limits: it knows these classes and nothing else, so any image gets one of them. Its logits are no calibrated
probabilities. On images that were made or cut out in another way than those it was trained on, expect less. It is one
network of one seed; both test accuracies are of the same weights, in other arithmetic. Licence: Apache-2.0, as the
package.
"""


def card(name: str, of_run: dict[str, Any], found: Measurement, right: int) -> str:
    """Of the network `name`; of_run: the measure.json of its run; found: what its rounded form does on the test
    images; right: how many of them the integer file gets right."""
    r, last, trained = recipe_from_dict(of_run["recipe"]), of_run["stages"][-1], of_run["trained"]
    neurons, rate = sum(layer.neurons for layer in found.layers), found.spikes_per_neuron or 0.0
    classes = of_run["data"]["classes"]
    return CARD.format(
        name=name, data=without_folder(r).data, channels=r.channels, size=r.size, classes=len(classes),
        names=", ".join(classes),
        accuracy=100 * right / found.images, images=found.images, low=wilson(right, found.images)[0],
        high=wilson(right, found.images)[1], onnx_bytes=(MODELS / f"{name}-int8.onnx").stat().st_size,
        chosen=", on which it was chosen" if r.stages[-1].keep == "best" else "",
        before=last["test_accuracy"], val=last["val_accuracy"], rate=rate, spikes=rate * neurons, neurons=neurons,
        recipe=_shipped_as(r), net=r.net, seed=r.seed, seconds=sum(stage["seconds"] for stage in of_run["stages"]),
        where=trained_on(trained),
        commit=trained["commit"], torch=trained["versions"]["torch"],
        bytes=(MODELS / f"{name}.safetensors").stat().st_size,
    )  # fmt: skip


def _shipped_as(r: Recipe) -> str:
    """The name of the shipped recipe that `r` is but for the seed and where its images are; if there is none, what it
    was made from."""
    r = without_folder(r)
    alike = {name: replace(without_folder(s), name=r.name, seed=r.seed) for name, s in RECIPES.items()}
    return next((name for name, shipped in alike.items() if shipped == r), f"{r.name}, changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="where the images are, if not where they were")
    options = parser.parse_args()
    found = measured(options.run)
    if found["stages"][-1]["steps"] != 1:
        raise ValueError(f"{options.run} does not end at T = 1: unitstep train goes on with it")
    path = MODELS / f"{options.name}.safetensors"
    MODELS.mkdir(exist_ok=True)
    if options.run.is_dir():
        save_compact(Run(options.run), path)
    else:
        write_whole(path, options.run.with_suffix(".safetensors").read_bytes())
    r, net = recipe_from_dict(found["recipe"]), load_compact(path)
    r = replace(r, data=options.data or r.data)
    _, val = load_train(r.data, size=r.size, channels=r.channels, augment=r.augment)
    images, labels = next(val.batches(1000))
    to_onnx(net, MODELS / f"{options.name}-int8.onnx", images, labels, about=describe(r, val))
    test = load_test(r.data, size=r.size, channels=r.channels, augment=r.augment)
    model = open_model(MODELS / f"{options.name}-int8.onnx")
    right = sum(int((model(x.numpy())[0].argmax(1) == y.numpy()).sum()) for x, y in test.batches(500))
    text = card(options.name, found, measure(net, test, steps=1), right)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
