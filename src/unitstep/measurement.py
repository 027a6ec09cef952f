"""What a trained network does on images it was not trained on: accuracy, spikes, dead and saturated neurons. Knows
nothing of training."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unitstep.conversion import Spiking
from unitstep.data import Split, load_test
from unitstep.files import read_json, write_json
from unitstep.ladder import choose_device, forward
from unitstep.neuron import compiled, compiler_available
from unitstep.runs import SCHEMA, Run, provenance


@dataclass(frozen=True)
class LayerMeasurement:
    """One neuron layer: its two parameters, and its neurons' spikes over all images and all T steps."""

    name: str
    neurons: int
    threshold: float
    leak: float
    rate: float
    """Spikes per neuron and image, summed over the T steps."""
    dead: float
    """Share of the neurons that emitted no spike on any image."""
    saturated: float
    """Share of the neurons that emitted a spike at every step of every image."""


@dataclass(frozen=True)
class Measurement:
    """One network on one set of images."""

    steps: int | None
    images: int
    accuracy: float
    """Percent of the images."""
    interval: tuple[float, float]
    """95 % interval of `accuracy` (Wilson), in percent: what other images of the same kind could have given."""
    spikes_per_neuron: float | None
    """Spikes per neuron and image, summed over the T steps, mean over all neurons; None for a CNN."""
    seconds: float
    layers: tuple[LayerMeasurement, ...]


def measure(
    net: nn.Module,
    data: Split | Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int | None,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Evaluate `net` once on `data`, a `Split` or batches of (images [B, C, H, W], labels [B]), at `steps` timesteps
    (None: it is a CNN), in fp32.

    `net` is put in evaluation mode, on `device`. progress: called with the number of images done so far. ValueError if
    there are no images.
    """
    where = choose_device(device)
    net = net.eval().to(where)
    batches = data.batches(max(1, 512 // (steps or 1))) if isinstance(data, Split) else data
    lifs = net.lifs if isinstance(net, Spiking) and steps is not None else {}
    counts: dict[str, Tensor] = {}  # spikes of each neuron over all images and steps

    def count(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
            fired = (spikes != 0).sum(0, dtype=torch.int64).flatten()
            counts[name] = counts[name] + fired if name in counts else fired

        return hook

    hooks = [lif.register_forward_hook(count(name)) for name, lif in lifs.items()]
    right, images_seen, started = 0, 0, time.perf_counter()
    try:
        with torch.no_grad(), compiled(where.type == "cuda" and compiler_available(where)):
            for images, labels in batches:
                logits = forward(net, images.to(where), steps)
                right += int((logits.argmax(1) == labels.to(where)).sum())
                images_seen += len(labels)
                if progress:
                    progress(images_seen)
    finally:
        for hook in hooks:
            hook.remove()
    if not images_seen:
        raise ValueError("there are no images to measure on")
    layers = tuple(
        _layer(name, lif.threshold.mean().item(), lif.leak.item(), counts[name], images_seen, steps or 1)
        for name, lif in lifs.items()
    )
    neurons = sum(layer.neurons for layer in layers)
    spikes = sum(int(fired.sum()) for fired in counts.values())
    return Measurement(
        steps, images_seen, 100 * right / images_seen, wilson(right, images_seen),
        spikes / images_seen / neurons if layers else None, time.perf_counter() - started, layers,
    )  # fmt: skip


def _layer(name: str, threshold: float, leak: float, fired: Tensor, images: int, steps: int) -> LayerMeasurement:
    neurons = len(fired)
    dead, saturated = int((fired == 0).sum()), int((fired == images * steps).sum())
    return LayerMeasurement(
        name, neurons, threshold, leak, int(fired.sum()) / images / neurons, dead / neurons, saturated / neurons
    )


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion of `right` in `n`, in percent."""
    z = 1.959964
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)


def measure_run(
    run: Run | str,
    *,
    data: str | None = None,
    device: str = "auto",
    bad_images: Literal["refuse", "skip"] = "refuse",
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Evaluate every finished stage of `run` once on the test split and write measure.json, whose content is returned.

    data: where the images are now, if no longer where the recipe says.  progress: called with (stage name, images
    done, images in all). ValueError if no stage is finished or the data set has other classes than the run.
    """
    run = run if isinstance(run, Run) else Run(run)
    r = run.recipe
    finished = run.stages
    if not finished:
        raise ValueError(f"{run.path} has no finished stage to measure: unitstep train goes on with it")
    test = load_test(data or r.data, size=r.size, channels=r.channels, augment=r.augment, bad_images=bad_images)
    if test.classes != finished[0].classes:
        raise ValueError(
            f"the test images have the classes {test.classes}, but the run was trained on {finished[0].classes}"
        )
    rows = []
    for stage in finished:
        tell = partial(progress, stage.stage.name, total=len(test)) if progress else None
        found = asdict(measure(run.net(stage.index), test, steps=stage.stage.steps, device=device, progress=tell))
        rows.append(
            {"index": stage.index, "name": stage.stage.name, "steps": stage.stage.steps}
            | {"val_accuracy": stage.val_accuracy, "seconds": stage.seconds}
            | {"test_accuracy": found["accuracy"], "test_interval": found["interval"]}
            | {"test_images": found["images"], "test_seconds": found["seconds"]}
            | {"spikes_per_neuron": found["spikes_per_neuron"], "layers": found["layers"]}
        )
    result = {
        "schema": SCHEMA,
        "recipe": r.to_dict(),
        "data": {"source": data or r.data, "test_images": len(test), "classes": list(test.classes)},
        **provenance(),
        "trained": {key: run.about.get(key) for key in ("precision", "device", "versions", "machine", "commit")},
        "stages": rows,
    }
    write_json(run.path / "measure.json", result)
    return read_json(run.path / "measure.json")
