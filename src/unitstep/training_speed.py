"""How fast, and in how much memory, T timesteps are trained: against other libraries, and against the CNN on T times
as many images, which is what the convolutions cost by themselves. Knows nothing of accuracy.

Every contender is a process of its own, so that its memory is its own; they take turns, so that ratios hold on a
machine whose speed changes. An optimiser step is the forward and backward pass of one batch and an AdamW update.
"""

import itertools
import logging
import math
import multiprocessing
import signal
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unitstep import nets
from unitstep.calibration import to_spiking
from unitstep.files import read_json, write_json
from unitstep.neuron import compiled, compiler_available
from unitstep.peers import PEERS, installed
from unitstep.recomputing import recomputing
from unitstep.runs import provenance
from unitstep.timing import peak_memory, race

CLASSES, SIZE = 10, 32
SECONDS = 0.5  # of a turn: several steps where they are short
UNITSTEP, RECOMPUTE, UNFUSED, CNN = "unitstep", "unitstep, recompute", "unitstep, no compiler", "CNN"
CONTENDERS = (UNITSTEP, RECOMPUTE, UNFUSED, *PEERS, CNN)
LIBRARIES = ("torch", "snntorch", "spikingjelly", "norse", "unitstep")


@dataclass(frozen=True)
class Case:
    """What is trained, and how. steps: T; the CNN takes T·batch images instead."""

    net: str
    steps: int
    batch: int
    precision: str


def bench_train(
    *,
    names: tuple[str, ...] = ("vgg16-conv", "resnet20"),
    steps: tuple[int, ...] = (1, 3, 5),
    batch: int = 32,
    precisions: tuple[str, ...] = ("bf16", "fp32"),
    threads: tuple[int, ...] = (2, 1),
    rounds: int = 3,
    out: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Race all contenders on the processor in every case, and return the record: speeds, memory, versions, machine.

    out: JSON file of the record, written after every case; what is there already is not run again. ValueError if a
    library that takes part is not installed, a network is not known or a number is below 1.
    """
    for net in names:
        nets.build(net, classes=CLASSES)
    if min((*steps, batch, *threads, rounds)) < 1:
        raise ValueError("steps, batch, threads and rounds must be 1 or more")
    about = {**provenance(), "versions": dict(installed(LIBRARIES))}
    before = read_json(out) if out and out.exists() else {"speeds": [], **about}
    begun = before.get("versions"), before.get("machine", {}).get("cpu")
    if begun != (about["versions"], about["machine"]["cpu"]) or "speeds" not in before:
        raise ValueError(
            f"{out} was begun on another machine or with other versions, or is no such record: choose another file"
        )
    rows: list[dict[str, Any]] = before["speeds"]
    for net, precision, T in itertools.product(names, precisions, steps):
        case = Case(net, T, batch, precision)
        there = {row["threads"] for row in rows if asdict(case).items() <= row.items()}
        if not (missing := tuple(count for count in threads if count not in there)):
            continue
        if progress:
            progress(f"{net}, {precision}, T = {T}")
        rows += [asdict(case) | row | {"commit": about["commit"]} for row in _race(case, missing, rounds)]
        if out:
            write_json(out, {"schema": 1, "speeds": rows, **about})
    return {"schema": 1, "speeds": rows, **about}


def _race(case: Case, threads: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """All contenders in one case: images per second in each round (the CNN's divided by T) and their median, and bytes
    of memory that the first step needs beyond what was there, at its peak."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for contender in CONTENDERS:
        ours, theirs = spawn.Pipe()
        workers.append(spawn.Process(target=_work, args=(theirs, contender, case, max(threads)), daemon=True))
        workers[-1].start()
        theirs.close()  # so that its end is noticed
        pipes[contender] = ours
    try:
        memory = {contender: pipe.recv() for contender, pipe in pipes.items()}

        def turn(pipe: Connection, count: int) -> None:
            pipe.send(count)
            pipe.recv()

        rows = []
        for count in threads:
            calls = {contender: partial(turn, pipe, count) for contender, pipe in pipes.items()}
            for contender, turns in race(calls, rounds=rounds, seconds=SECONDS).items():
                speeds = [case.batch / statistics.mean(seconds) for seconds in turns]
                about = {"contender": contender, "threads": count, "rounds": speeds, "memory": memory[contender]}
                rows.append(about | {"median": statistics.median(speeds)})
        return rows
    except (EOFError, BrokenPipeError) as error:
        raise ValueError(
            "the process of a network under test ended early, perhaps for want of memory: a smaller --batch takes less"
        ) from error
    finally:
        for worker, pipe in zip(workers, pipes.values(), strict=True):
            with suppress(OSError):  # of one that has ended
                pipe.send(0)
            worker.join(10)
            worker.kill()


def _work(pipe: Connection, contender: str, case: Case, threads: int) -> None:
    """A contender's process: tells what memory the first step takes, then makes a step on as many threads as it is
    told, until that is 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's
    warnings.simplefilter("ignore")  # of the libraries
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    step_of(contender, case, 2)()  # compiles
    step = step_of(contender, case, case.batch)
    pipe.send(peak_memory(step))
    while count := pipe.recv():
        torch.set_num_threads(count)
        step()
        pipe.send(count)


def step_of(contender: str, case: Case, batch: int) -> Callable[[], None]:
    """An optimiser step of one contender, on random images."""
    torch.manual_seed(0)
    T = case.steps
    images = torch.randint(256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (batch,))
    cnn = nets.build(case.net, classes=CLASSES)
    net: nn.Module = cnn
    fuse = contender in (UNITSTEP, RECOMPUTE) and compiler_available(images.device)
    call: Callable[[], Tensor] = lambda: net(images)  # noqa: E731
    if contender in PEERS:
        net = PEERS[contender](cnn, T)
    elif contender == CNN:
        images, labels = images.repeat(T, 1, 1, 1), labels.repeat(T)
    else:
        net = to_spiking(cnn.eval(), images[:2], steps=T, thresholds="percentile", initial=0.0, norm="keep")
        called = recomputing(net) if contender == RECOMPUTE else net
        call = lambda: called(images, T)  # noqa: E731
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    amp = torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16" else nullcontext()

    def step() -> None:
        with compiled(fuse):
            with amp:
                logits = call()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def table(record: dict[str, Any]) -> str:
    """A record as Markdown: images per second, and of the memory megabytes, each against the fastest or leanest other
    library; one table per network and precision."""
    parts = ["Training: images per second (the CNN's divided by T), and memory of the first step, MB.", ""]
    cases = dict.fromkeys((row["net"], row["precision"], row["batch"]) for row in record["speeds"])
    for net, precision, batch in cases:
        case = {"net": net, "precision": precision, "batch": batch}
        rows = [row for row in record["speeds"] if case.items() <= row.items()]
        columns = sorted({(row["threads"], row["steps"]) for row in rows}, key=lambda c: (-c[0], c[1]))
        title = " | ".join(f"T = {T}, {count} thread{'s' * (count > 1)}" for count, T in columns)
        memories = sorted({T for _, T in columns})
        head = f"| {net}, {precision}, batch {batch} | {title} | {' | '.join(f'MB, T = {T}' for T in memories)} |"
        parts += [head, f"|---{'|---:' * (len(columns) + len(memories))}|"]
        found = {(row["contender"], row["threads"], row["steps"]): row for row in rows}
        for name in dict.fromkeys(row["contender"] for row in rows):
            speeds = [f"{found[name, *column]['median']:,.1f}" for column in columns]
            memory = [next(found[name, *column]["memory"] for column in columns if column[1] == T) for T in memories]
            sizes = ["" if size is None else f"{size / 1e6:,.0f}" for size in memory]
            parts.append(f"| {name} | {' | '.join([*speeds, *sizes])} |")
        parts.append("")
    title = "unitstep ÷ fastest other library | unitstep ÷ CNN | memory ÷ leanest other library | with recompute"
    parts += [f"| | {title} |", "|---|---:|---:|---:|---:|"]
    for steps in sorted({row["steps"] for row in record["speeds"]}):
        for net, precision, batch, threads, *ratios in sorted(bars(record, steps), key=lambda r: (*r[:3], -r[3])):
            name = f"{net}, {precision}, batch {batch}, T = {steps}, {threads} thread{'s' * (threads > 1)}"
            parts.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(parts) + "\n"


def bars(record: dict[str, Any], steps: int) -> list[tuple[str, str, int, int, float, float, float, float]]:
    """(network, precision, batch, threads, unitstep ÷ fastest other library, unitstep ÷ CNN, memory ÷ leanest other
    library, the same with recompute) at `steps` timesteps."""
    found: dict[tuple[str, str, int, int], dict[str, dict[str, Any]]] = {}
    for row in record["speeds"]:
        if row["steps"] == steps:
            case = row["net"], row["precision"], row["batch"], row["threads"]
            found.setdefault(case, {})[row["contender"]] = row
    ratios = []
    for case, rows in found.items():
        ours, fastest = rows[UNITSTEP]["median"], max(rows[peer]["median"] for peer in PEERS)
        leanest = min(rows[peer]["memory"] or math.nan for peer in PEERS)
        plain, again = ((rows[name]["memory"] or math.nan) / leanest for name in (UNITSTEP, RECOMPUTE))
        ratios.append((*case, ours / fastest, ours / rows[CNN]["median"], plain, again))
    return ratios
