"""Accuracy by conversion alone, without any training of spikes, against the number of timesteps: each threshold
strategy, and a rate code. Knows nothing of test images: curves are made on validation images."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unitstep.calibration import calibrate_, unroll
from unitstep.conversion import Spiking
from unitstep.data import InMemory, load_train
from unitstep.evaluation import accuracy, choose_device, ieee
from unitstep.ladder import calibration_images
from unitstep.neuron import compiled, compiler_available
from unitstep.runs import Run, build_snn

STRATEGIES: dict[str, dict[str, Any]] = {
    "percentile 90 (the paper's)": {"thresholds": "percentile", "percentile": 90.0},
    "percentile 99.7 × 0.4 (DIET-SNN's)": {"thresholds": "percentile", "percentile": 99.7, "scale": 0.4},
    "percentile 99 per channel": {"thresholds": "channel-percentile", "percentile": 99.0},
    "maximum": {"thresholds": "max"},
    "least squares": {"thresholds": "mse"},
}
RATE = "rate code, percentile 99.7"
INITIALS = (0.0, 0.5)
CALIBRATION_STEPS = 8  # currents are taken over T steps, but at most over so many
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
RATE_STEPS = (*STEPS, 256, 512, 1024, 2048)
IMAGES, BATCH = 500, 250  # validation images of a run's curve, and how many at a time
SECONDS = 60.0  # for each strategy and initial membrane

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Point:
    """What one conversion reaches at T = `steps`."""

    strategy: str
    initial: float
    """Membrane before the first step, in thresholds."""
    steps: int
    accuracy: float
    """Percent of the images."""
    seconds: float
    """To find thresholds and to evaluate."""
    latency: float | None = None
    """Median seconds for a single image; None if not timed."""


@ieee()
def find_thresholds_(snn: Spiking, images: Tensor, strategy: str, steps: int) -> Spiking:
    """`calibrate_` by one of `STRATEGIES`, or for the rate code, for use at T = `steps`, in place. A layer that never
    fires is no warning here: accuracy shows it."""
    rate = strategy == RATE
    options = {"thresholds": "percentile", "percentile": 99.7} if rate else STRATEGIES[strategy]
    over = CALIBRATION_STEPS if rate else min(steps, CALIBRATION_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate_(snn, images, steps=steps, calibration_steps=over, **options)


@ieee()
@torch.no_grad()
def right_at(
    snn: Spiking, x: Tensor, y: Tensor, marks: Sequence[int], *, rate_seed: int | None = None, bf16: bool = False
) -> dict[int, int]:
    """Images x [B, C, H, W] whose class y [B] has the largest summed output after each number of steps in `marks`.

    rate_seed: show black and white frames, drawn with it, in place of the images.  bf16: weights and currents;
    membranes and sums are fp32 all the same.
    """
    right = dict.fromkeys(marks, 0)
    total: Any = 0
    frames = itertools.repeat(x, max(marks)) if rate_seed is None else rate_code(x, max(marks), rate_seed)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        for t, output in enumerate(unroll(snn, frames), 1):
            total = total + output.float()
            if t in right:
                right[t] += int((total.argmax(1) == y).sum())
    return right


def rate_code(x: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Frames of images x uint8 [B, C, H, W]: at every step a pixel is white, 255, with probability x/255, else 0."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        draw = torch.randint(255, x.shape, generator=generator).to(x.device)
        yield ((draw < x) * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def climb(
    snn: Spiking, strategy: str, initial: float, calibration: Tensor, batches: Batches, wanted: float, seconds: float
) -> Iterator[Point]:
    """Points at T = 1, 2, 4 …, thresholds found anew for each, up to the first whose accuracy is `wanted` percent, the
    largest T, or where the next point would take longer than what is left of `seconds`: at least one point."""
    started = time.perf_counter()
    for steps in RATE_STEPS if strategy == RATE else STEPS:
        before = time.perf_counter()
        find_thresholds_(snn, calibration, strategy, steps)
        right = 0
        for number, (x, y) in enumerate(batches):
            right += right_at(snn, x, y, (steps,), rate_seed=number if strategy == RATE else None)[steps]
        now = time.perf_counter()
        point = Point(strategy, initial, steps, 100 * right / sum(len(y) for _, y in batches), now - before)
        yield point
        if point.accuracy >= wanted or now - started + 2 * point.seconds > seconds:
            return


def conversion_alone(
    run: Run,
    *,
    data: str | None = None,
    device: str = "auto",
    bad_images: Literal["refuse", "skip"] = "refuse",
    speed: bool = False,
    images: int = IMAGES,
    seconds: float = SECONDS,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """How many timesteps the CNN of `run` needs by conversion alone for what the run's last network reaches.

    Both are evaluated on the same `images` validation images, drawn at random with seed 0; each strategy has so many
    `seconds`.  speed: also time a single image of the networks that get there, in one race with the run's own.
    progress: called with (what, done, in all).  Returns {"steps", "images", "accuracy", "latency" of the run's last
    network, "cnn_accuracy", "seconds" for each strategy, "rows": a `Point` each}. ValueError if the run has no CNN or
    no spiking stage.
    """
    finished, r, where = run.stages, run.recipe, choose_device(device)
    if not finished or finished[0].index > 0 or finished[-1].index == 0:
        raise ValueError(f"{run.path} has no CNN and spiking stage to compare yet: unitstep train goes on with it")
    last = run.net(finished[-1].index).to(where)
    steps = finished[-1].stage.steps
    source = data or r.data
    split, val = load_train(source, size=r.size, channels=r.channels, augment=r.augment, bad_images=bad_images)
    run.check_images(split.classes)
    calibration = calibration_images(r, split).to(where)
    chosen = InMemory(*next(val.batches(min(images, len(val)), seed=0)), val.classes).to(where)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in chosen.batches(BATCH)]
    wanted, of_cnn = accuracy(last, chosen, steps, where), accuracy(run.net(0).to(where), chosen, None, where)
    points, there = list[Point](), dict[int, tuple[Spiking, int]]()
    ways = [*itertools.product(STRATEGIES, INITIALS), (RATE, 0.0)]
    for number, (strategy, initial) in enumerate(ways):
        recipe = replace(r, initial=initial, thresholds="percentile", height="threshold", readout="mean")
        snn = build_snn(recipe, run.net(0)).to(where)
        with compiled(where.type == "cuda" and compiler_available(where)):
            points += climb(snn, strategy, initial, calibration, batches, wanted, seconds)
        if points[-1].accuracy >= wanted and strategy != RATE:  # its steps cannot be one call
            there[len(points) - 1] = snn, points[-1].steps
        if progress:
            progress("conversion alone", number + 1, len(ways))
    latency = None
    if speed:
        from unitstep.speed import time_one  # needs onnx, which nothing else here does

        assert isinstance(last, Spiking)
        assert steps is not None
        *taken, latency = time_one([*there.values(), (last, steps)], batches[0][0], where)
        for index, median in zip(there, taken, strict=True):
            points[index] = replace(points[index], latency=median)
    return {
        "steps": steps, "images": len(chosen), "accuracy": wanted, "cnn_accuracy": of_cnn, "latency": latency,
        "seconds": seconds, "rows": [vars(point) for point in points],
    }  # fmt: skip
