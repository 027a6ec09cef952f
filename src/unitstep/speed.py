"""How fast the networks of a run are on this machine: in PyTorch, and as exported files in the runtimes that are
installed. Everything is timed in one interleaved race. Knows nothing of accuracy."""

import contextlib
import importlib.util
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import onnx
import torch
from torch import Tensor, nn

from unitstep.conversion import Spiking
from unitstep.evaluation import choose_device, forward, ieee
from unitstep.exporting import onnx_of, to_onnx
from unitstep.running import KEY, Runtime, first_line, open_model
from unitstep.runs import Run
from unitstep.timing import peak_memory, race

ONE, MANY, LONGEST = (5, 0.2), (3, 0.2), 1.0  # rounds and seconds per turn; a batch whose call takes longer is the last
MEMORY_BATCH = 64
TORCH = "PyTorch"
TITLES: dict[Runtime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


Name = tuple[int | None, str]  # timesteps, runtime


@dataclass(frozen=True)
class Speed:
    """One network in one runtime."""

    name: str
    steps: int | None
    runtime: str
    p50: float
    """Median seconds for a single image."""
    p99: float
    batch: int
    """Images at a time at which most per second were processed, of those that were tried."""
    images_per_second: float
    """With that batch: the median over the rounds."""
    memory: int | None
    """Bytes beyond what was there before, at the peak of a first call with 64 images; None if not known, as that of a
    GPU."""


@ieee()
def time_run(
    run: Run, images: Tensor, *, device: str = "auto", batches: tuple[int, ...] = (16, 64, 256), progress: Any = None
) -> tuple[Speed, ...]:
    """Time every finished stage of `run`, and the CNN and T = 1 as exported files, in evaluation.

    images: real ones [B, C, H, W], repeated as needed.  device: of PyTorch; exported files run on the processor; a
    runtime that fails with one is left out, with a warning. Batches stop growing when a call takes over a second.
    progress: called with (name, done, total).
    """
    where = choose_device(device)
    calls = dict(_contenders(run, images, where))

    def at(batch: int) -> Tensor:
        return images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]

    def tell(done: int) -> None:
        if progress:
            progress("speed", done, len(batches) + 1)

    with torch.inference_mode():
        memory = {
            name: peak_memory(partial(call, at(MEMORY_BATCH))) if name[1] != TORCH or where.type == "cpu" else None
            for name, call in calls.items()
        }
        one = at(1)
        single = race({name: partial(call, one) for name, call in calls.items()}, rounds=ONE[0], seconds=ONE[1])
        tell(1)
        best: dict[Name, tuple[float, int]] = dict.fromkeys(calls, (0.0, 1))
        left = dict(calls)
        for number, batch in enumerate(batches):
            given = at(batch)
            found = race({name: partial(call, given) for name, call in left.items()}, rounds=MANY[0], seconds=MANY[1])
            for name, turns in found.items():
                seconds = [statistics.mean(turn) for turn in turns]
                best[name] = max(best[name], (batch / statistics.median(seconds), batch))
                if min(seconds) > LONGEST:
                    del left[name]
            tell(number + 2)
    speeds = []
    for name, turns in single.items():
        times = sorted(second for turn in turns for second in turn)
        stage, runtime = name
        speeds.append(
            Speed(
                "CNN" if stage is None else f"T = {stage}", stage, runtime, statistics.median(times),
                times[min(len(times) - 1, round(0.99 * len(times)))], best[name][1], best[name][0], memory[name],
            )
        )  # fmt: skip
    return tuple(speeds)


@ieee()
def time_one(nets: Sequence[tuple[Spiking, int]], images: Tensor, device: torch.device) -> list[float]:
    """Median seconds of each network at its timesteps for the first of `images` [B, C, H, W], in PyTorch, in one
    race."""
    one = images[:1]
    calls = {number: partial(_in_torch(net, steps, device), one) for number, (net, steps) in enumerate(nets)}
    with torch.inference_mode():
        found = race(calls, rounds=ONE[0], seconds=ONE[1])
    return [statistics.median(itertools.chain(*turns)) for turns in found.values()]


def _contenders(run: Run, images: Tensor, device: torch.device) -> Iterator[tuple[Name, Callable[[Tensor], Any]]]:
    for stage in run.stages:
        net = run.net(stage.index).to(device)
        yield (stage.stage.steps, TORCH), _in_torch(net, stage.stage.steps, device)
    installed = [runtime for runtime in get_args(Runtime) if importlib.util.find_spec(runtime)]
    for steps, content in _files(run, images):
        for runtime in installed:
            try:
                open_model(content, runtime)(images[:1].numpy())
                model = open_model(content, runtime, threads=torch.get_num_threads())  # anew: memory is of a first call
            except Exception as error:  # each library has its own, and the others can be timed
                what = f"the exported {'CNN' if steps is None else 'network'} fails in {TITLES[runtime]}"
                warnings.warn(f"{what}, where it is not timed: {first_line(error)}", stacklevel=4)
                continue
            yield (steps, TITLES[runtime]), lambda given, model=model: model(given.numpy())  # type: ignore[misc]


def _in_torch(net: nn.Module, steps: int | None, device: torch.device) -> Callable[[Tensor], Any]:
    def call(images: Tensor) -> Tensor:
        logits = forward(net, images.to(device), steps)
        return logits.cpu()  # waits for the device

    return call


def _files(run: Run, images: Tensor) -> Iterator[tuple[int | None, bytes]]:
    """The CNN in floating point, and the network at one timestep as `unitstep export` writes it; without those that
    cannot be exported."""
    for stage in run.stages:
        steps = stage.stage.steps
        if steps not in (None, 1):
            continue
        net, content = run.net(stage.index), None
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            if steps is None:
                model = onnx_of(net, images)
                onnx.helper.set_model_props(model, {KEY: "{}"})
                path.write_bytes(model.SerializeToString())
            else:
                to_onnx(net, path, images)  # type: ignore[arg-type]
            content = path.read_bytes()
        if content is not None:  # outside, as who takes it may warn
            yield steps, content
