"""What a trained network does on images it was not trained on: accuracy, spikes, dead and saturated neurons. Knows
nothing of training."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from unitstep.calibration import ROWS, Activity, record, watching
from unitstep.conversion import Spiking, trace
from unitstep.curves import conversion_alone
from unitstep.data import Split, load_test
from unitstep.evaluation import batch_size, choose_device, forward, ieee
from unitstep.files import check_writable, read_json, write_json
from unitstep.fusing import fuse, per_channel
from unitstep.neuron import LIF, compiled, compiler_available, membranes
from unitstep.operations import Layer, Operation, of_rows, operations
from unitstep.runs import SCHEMA, Finished, Run, provenance

HEALTH_IMAGES = 64  # on which membranes are looked at
CONFUSED = 100  # classes of which a confusion matrix is kept, at most
SAMPLES, SAMPLE_LAYERS, SAMPLE_CHANNELS = 8, 3, 8  # images of which spikes are kept, in the first layers and channels


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
    dead_channels: float
    """Share of the channels without a spike on any image."""
    saturated_channels: float
    """Share of the channels all of whose neurons are saturated."""
    surrogate: float
    """Share of the membranes, before the reset, between 0 and two thresholds, where the surrogate gradient is not 0:
    what is outside does not learn. Of the first images, over all steps."""
    membranes: tuple[float, ...]
    """Where these membranes are: their shares in bins of a quarter threshold from −2 to 4, with what is beyond in the
    first and last."""


@dataclass(frozen=True)
class OperationMeasurement(Layer):
    """One layer with weights: what it computes per image, over all T steps."""

    multiplied: int
    """Multiply-accumulates that are done: `macs` for a static input, T times as many for another analog one, 0 for
    spikes."""
    additions: float
    """Spike-exact: one for each output that a spike reaches, mean over the images."""
    additions_by_rate: float
    """The paper's formula: spikes per neuron of the layers that feed it, times `macs`."""


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
    operations: tuple[OperationMeasurement, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Images of each class (rows) by the class they were taken for (columns); empty above 100 classes."""


@ieee()
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
    there are no images, if the network does not give logits [B, classes], or if `steps` is not of its kind.
    """
    if isinstance(net, Spiking) != (steps is not None):
        raise ValueError("a spiking network is measured at a number of timesteps, a CNN at steps=None")
    where = choose_device(device)
    net = net.eval().to(where)
    at_least = min(HEALTH_IMAGES, ROWS // (steps or 1))
    batches = _checked(data.batches(max(at_least, batch_size(steps, where))) if isinstance(data, Split) else data)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no images to measure on")
    snn, found = net, _operations(net, first[0][:1].to(where))
    lifs = net.lifs if isinstance(net, Spiking) else {}
    counted: dict[str, nn.Module] = dict(lifs)
    pools = {name for operation in found for name in operation.fan_out} - lifs.keys()
    if pools:
        net, taps = _with_taps(net, pools)  # type: ignore[arg-type]
        counted |= taps
    spikes: dict[str, Tensor] = {}  # of each neuron, and at each max pool's outputs, over all images and steps

    def count(name: str, module: nn.Module, _args: Any, _kwargs: Any, out: Tensor) -> None:
        k, rest = divmod(len(out), at_once * (steps or 1))  # rows of an image: several behind some reshapes
        if rest or not k:
            raise ValueError(f"layer {name} has {len(out)} rows, which mix the {at_once} images: it is not counted")
        fired = of_rows(torch.stack([_times_fired(out[row::k], module) for row in range(k)]))
        spikes[name] = spikes[name] + fired if name in spikes else fired

    at_once = 0
    right, images_seen, confusion, started = 0, 0, torch.zeros(0), time.perf_counter()
    compiling = compiled(where.type == "cuda" and compiler_available(where))
    with torch.no_grad(), compiling, watching(counted, count):
        for images, labels in itertools.chain([first], batches):
            at_once = len(images)
            logits = forward(net, images.to(where), steps)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                shape = f"of shape {list(logits.shape)}" if isinstance(logits, Tensor) else "more than a tensor"
                raise ValueError(f"the network's output is {shape}, not logits [B, classes]: give it such a head")
            said, labels = logits.argmax(1), labels.to(where).long()
            right += int((said == labels).sum())
            images_seen += len(labels)
            if (classes := logits.shape[1]) <= CONFUSED:
                known = labels < classes
                pairs = (labels * classes + said)[known].bincount(minlength=classes**2).view(classes, classes)
                confusion = confusion + pairs if len(confusion) else pairs
            if progress:
                progress(images_seen)
    seconds = time.perf_counter() - started
    layers: tuple[LayerMeasurement, ...] = ()
    if isinstance(snn, Spiking):
        with torch.no_grad(), record(snn) as seen:
            forward(snn, first[0][:HEALTH_IMAGES].to(where), steps)
        layers = tuple(_layer(name, lif, spikes[name], seen[name], images_seen) for name, lif in lifs.items())
    return Measurement(
        steps, images_seen, 100 * right / images_seen, wilson(right, images_seen),
        _rate(lifs, spikes, images_seen) if lifs else None, seconds, layers,
        tuple(_cost(operation, spikes, images_seen, steps or 1) for operation in found),
        tuple(tuple(row) for row in confusion.tolist()),
    )  # fmt: skip


def _checked(data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that are not empty. ValueError if one is not of images and labels."""
    for batch in data:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(each, Tensor) for each in batch)
        if not pair or batch[1].shape != batch[0].shape[:1] or (batch[1] < 0).any():
            raise ValueError(
                "data must be batches of (images [B, C, H, W], labels [B]), the labels whole numbers from 0 on; a "
                "torch.utils.data.DataLoader makes them of a Dataset"
            )
        if len(batch[0]):
            yield batch[0], batch[1]


def _operations(net: nn.Module, image: Tensor) -> tuple[Operation, ...]:
    """Empty for a CNN that cannot be traced: its accuracy can be measured all the same."""
    if isinstance(net, Spiking):
        return operations(fuse(net, image), image)
    try:
        return operations(trace(net), image)
    except ValueError:
        return ()


def _times_fired(out: Tensor, module: nn.Module) -> Tensor:
    """How often each neuron fired: [B, …] → int64 […]. In the order in which values lie in memory, and of neurons,
    which have one height, by their sums, since anything else takes longer than the network."""
    last = out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)
    out = out.permute(0, 2, 3, 1) if last else out
    if isinstance(module, LIF):
        height = module.threshold.detach() if module.height == "threshold" else torch.ones_like(module.threshold)
        height = height if last else per_channel(height, out.dim())
        fired = (out.sum(0, dtype=torch.promote_types(out.dtype, torch.float32)) / height.to(out.dtype)).round().long()
    else:
        fired = (out != 0).sum(0)
    return fired.permute(2, 0, 1) if last else fired


def _with_taps(snn: Spiking, names: set[str]) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    """`snn`, whose modules it shares, with a module behind each operation of `names` that hands its output on."""
    net = fx.GraphModule(snn, copy.deepcopy(snn.graph))
    taps: dict[str, nn.Module] = {}
    for node in list(net.graph.nodes):
        if node.name in names:
            taps[node.name] = nn.Identity()
            net.add_submodule(f"tap_{node.name}", taps[node.name])
            with net.graph.inserting_after(node):
                tap = net.graph.call_module(f"tap_{node.name}", (node,))
            node.replace_all_uses_with(tap, lambda user, tap=tap: user is not tap)
    net.recompile()
    return net, taps


def _rate(names: Iterable[str], spikes: dict[str, Tensor], images: int) -> float:
    """Spikes per neuron and image, mean over all neurons of some layers."""
    each = [spikes[name] for name in names]
    return sum(int(fired.sum()) for fired in each) / images / sum(fired.numel() for fired in each)


def _cost(operation: Operation, spikes: dict[str, Tensor], images: int, steps: int) -> OperationMeasurement:
    o, analog = operation, operation.input == "analog"
    return OperationMeasurement(
        **{each.name: getattr(o, each.name) for each in fields(Layer)},
        multiplied=o.macs * (1 if o.static else steps) if analog else 0,
        additions=o.additions(spikes) / images,
        additions_by_rate=0.0 if analog else _rate(o.neurons, spikes, images) * o.macs,
    )


def _layer(name: str, lif: LIF, spikes: Tensor, seen: Activity, images: int) -> LayerMeasurement:
    """spikes: [C, …], of each neuron over all images and steps.  seen: the first images."""
    neurons, steps = spikes.numel(), len(seen.spikes)
    by_channel = spikes.flatten(1) if spikes.dim() > 1 else spikes.reshape(-1, 1)
    dead, saturated = by_channel == 0, by_channel == images * steps
    V = per_channel(seen.threshold, seen.current.dim() - 1)
    inside, bins, values = 0, torch.zeros(24, dtype=torch.int64), steps * seen.spikes[0].numel()
    for _, membrane, _ in membranes(seen.current, V, lif.leak.detach(), steps, lif.initial):
        relative = (membrane / V).float()
        inside += int(((relative > 0) & (relative < 2)).count_nonzero())
        quarters = relative.clamp_(-1.99, 3.99).add_(2).mul_(4).to(torch.uint8)  # from −2 to 4
        bins += quarters.flatten().bincount(minlength=24).cpu()
    return LayerMeasurement(
        name, neurons, lif.threshold.mean().item(), lif.leak.item(), int(spikes.sum()) / images / neurons,
        dead.float().mean().item(), saturated.float().mean().item(),
        dead.all(1).float().mean().item(), saturated.all(1).float().mean().item(),
        inside / values, tuple((bins / values).tolist()),
    )  # fmt: skip


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion of `right` in `n`, in percent."""
    z = 1.959964
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * end / (1 + z * z / n) for end in (centre - half, centre + half))
    return max(0.0, low), min(100.0, high)


def measure_run(
    run: Run | str | Path,
    *,
    data: str | None = None,
    device: str = "auto",
    bad_images: Literal["refuse", "skip"] = "refuse",
    speed: bool = False,
    curve: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Evaluate every finished stage of `run` once on the test split and write measure.json, whose content is returned.

    data: where the images are now, if no longer where the recipe says.  speed: time the networks, too, which says
    something only if nothing else runs meanwhile.  curve: find how many timesteps the CNN needs by conversion alone for
    the last network's accuracy, on validation images; takes up to a quarter of an hour.  progress: called with (what,
    done, in all).
    ValueError if no stage is finished or the data set has other classes than the run.
    """
    run = run if isinstance(run, Run) else Run(run)
    r = run.recipe
    finished = run.stages
    if not finished:
        raise ValueError(f"{run.path} has no finished stage to measure: unitstep train goes on with it")
    check_writable(run.path / "measure.json")
    test = load_test(data or r.data, size=r.size, channels=r.channels, augment=r.augment, bad_images=bad_images)
    run.check_images(test.classes)
    first, _ = next(test.batches(64))
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
            | {"operations": found["operations"], "confusion": found["confusion"]}
        )
    result = {
        "schema": SCHEMA,
        "recipe": r.to_dict(),
        "data": {"source": data or r.data, "test_images": len(test), "classes": list(test.classes)},
        **provenance(),
        "trained": run.trained,
        "device": str(choose_device(device)),
        "stages": rows,
        "speed": [],
    }
    if finished[-1].index > 0:
        _write_samples(run, finished[-1], test)
    write_json(run.path / "measure.json", result)  # whatever happens to the rest
    if speed:
        from unitstep.speed import time_run  # needs onnx, which nothing else here does

        result["speed"] = [asdict(each) for each in time_run(run, first, device=device, progress=progress)]
        write_json(run.path / "measure.json", result)
    if curve:
        result["conversion_alone"] = conversion_alone(
            run, data=data, device=device, bad_images=bad_images, speed=speed, progress=progress
        )
        write_json(run.path / "measure.json", result)
    return read_json(run.path / "measure.json")


@torch.no_grad()
def _write_samples(run: Run, stage: Finished, test: Split) -> None:
    """Write the first test images, what they were taken for, and where the first layers fired, to samples.safetensors:
    images uint8 [8, C, H, W]; labels and predictions [8]; spikes.NAME, spikes over all steps, uint8 [8, ≤ 8, H, W],
    of layers that see each image as one map."""
    images, labels = next(test.batches(SAMPLES))
    with record(snn := run.net(stage.index)) as seen:  # type: ignore[arg-type]
        logits = forward(snn, images, stage.stage.steps)
    tensors = {"images": images, "labels": labels, "predictions": logits.argmax(1)}
    for name, layer in itertools.islice(seen.items(), SAMPLE_LAYERS):
        if layer.spikes.dim() == 5 and layer.spikes.shape[1] == len(images):
            tensors[f"spikes.{name}"] = layer.spikes[:, :, :SAMPLE_CHANNELS].sum(0).to(torch.uint8)
    run.save(run.samples_path, tensors, stage.index)
