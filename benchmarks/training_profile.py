"""Where the time and the memory of training go, by kind of operation.

    python -m benchmarks.training_profile step --label after       a step of vgg16-conv at T = 5, into the record
    python -m benchmarks.training_profile epoch --data IMAGES      an epoch of cifar10-quick at T = 1, into the record
    python -m benchmarks.training_profile docs                     tables and picture of docs/training-speed.md

The record is benchmarks/records/training-profile.json; docs reads benchmarks/records/training-speed.json, too, which
`unitstep bench train` writes. "before" was taken with the source of an older commit, by PYTHONPATH. Nothing else should
run meanwhile.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from unitstep import nets, recipe
from unitstep.calibration import to_spiking
from unitstep.data import load_train
from unitstep.evaluation import accuracy
from unitstep.files import write_json
from unitstep.neuron import compiled
from unitstep.runs import provenance

HERE = Path(__file__).parent
RECORD = HERE / "records" / "training-profile.json"
NET, STEPS, BATCH, REPEATS = "vgg16-conv", 5, 32, 5
KINDS = {  # by what the name of an operation or of a backward node contains; the first that fits
    "convolution_backward": "convolutions, backward", "convolution": "convolutions, forward", "Fire": "neurons",
    "batch_norm": "batch norm", "BatchNorm": "batch norm", "avg_pool": "pools", "AvgPool": "pools",
    "Optimizer.step": "optimiser", "Convolution": "convolutions, forward",
}  # fmt: skip


def kind_of(name: str) -> str | None:
    return next((kind for part, kind in KINDS.items() if part in name), None)


def trainer(net: str, steps: int, batch: int) -> tuple[nn.Module, Any]:
    """A spiking network in training, and an optimiser step that returns the loss before it goes backward."""
    torch.manual_seed(0)
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (batch,))
    cnn = nets.build(net, classes=10).eval()
    snn = to_spiking(cnn, images[:8], steps=steps, thresholds="percentile", initial=0.0, norm="keep")
    snn.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(snn.parameters(), lr=1e-4, fused=True)

    def step(look: Any = lambda loss: None) -> None:
        with compiled(True):
            with torch.autocast("cpu", torch.bfloat16):
                logits = snn(images, steps)
            loss = F.cross_entropy(logits.float(), labels)
            look(loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()

    return snn, step


def saved_bytes(loss: torch.Tensor) -> dict[str, int]:
    """What the graph of `loss` keeps for the backward pass, by kind of operation; each storage once, no weights."""
    found: Counter[str] = Counter()
    seen, nodes, queue = set(), set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        queue += [following for following, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") and name != "_saved_weight"]
        for tensor in [*kept, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                found[kind_of(node.name()) or "other"] += tensor.untyped_storage().nbytes()
    return dict(found)


def of_step() -> dict[str, Any]:
    """Milliseconds and kept bytes of a training step, by kind."""
    _, step = trainer(NET, STEPS, BATCH)
    step()
    kept: dict[str, int] = {}
    step(lambda loss: kept.update(saved_bytes(loss)))
    runs = []
    for _ in range(REPEATS):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
        spent: Counter[str] = Counter()
        for event in found.events():
            place, kind = event, None
            while place is not None and kind is None:
                kind, place = kind_of(place.name), place.cpu_parent
            spent[kind or "other"] += event.self_cpu_time_total / 1000
        runs.append(spent)
    kinds = sorted({kind for spent in runs for kind in spent})
    return {"milliseconds": {kind: median(spent[kind] for spent in runs) for kind in kinds}, "bytes": kept}


def of_epoch(data: str) -> dict[str, Any]:
    """Seconds of an epoch of cifar10-quick: the images alone, the validation alone, and the steps."""
    r = recipe("cifar10-quick")
    last = r.stages[-1]
    train, val = load_train(data, size=r.size, channels=r.channels)
    options: dict[str, Any] = {"augment": r.augment, "padding": r.padding, "border": r.border, "cutout": r.cutout}
    next(train.batches(last.batch, seed=0, **options))
    started = time.perf_counter()
    count = sum(1 for _ in train.batches(last.batch, seed=1, **options))
    pipeline = time.perf_counter() - started
    snn, step = trainer(r.net, 1, last.batch)
    step()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    accuracy(snn, val, 1, torch.device("cpu"))
    started = time.perf_counter()
    accuracy(snn, val, 1, torch.device("cpu"))
    return {"images": pipeline, "validation": time.perf_counter() - started, "steps": count * median(times)}


def table(rows: dict[str, Any]) -> str:
    step = {label: row for label, row in rows.items() if "milliseconds" in row}
    kinds = sorted({kind for row in step.values() for kind in row["milliseconds"]})
    kinds.sort(key=lambda kind: -max(row["milliseconds"].get(kind, 0) for row in step.values()))
    columns = [f"{label}, {unit}" for unit in ("ms", "MB kept") for label in step]
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for kind in kinds:
        times = [f"{row['milliseconds'].get(kind, 0):,.0f}" for row in step.values()]
        sizes = [f"{row['bytes'].get(kind, 0) / 1e6:,.0f}" for row in step.values()]
        lines.append(f"| {kind} | {' | '.join(times + sizes)} |")
    sums = [f"{sum(row['milliseconds'].values()):,.0f}" for row in step.values()]
    sums += [f"{sum(row['bytes'].values()) / 1e6:,.0f}" for row in step.values()]
    lines.append(f"| all | {' | '.join(sums)} |")
    epochs = {label: row["epoch"] for label, row in rows.items() if "epoch" in row}
    if epochs:
        lines += [
            "",
            "| an epoch of cifar10-quick at T = 1, without whitening and rounding | s | share |",
            "|---|---:|---:|",
        ]
    for epoch in epochs.values():
        total = sum(epoch.values())
        lines += [f"| {name} | {seconds:.1f} | {100 * seconds / total:.1f} % |" for name, seconds in epoch.items()]
    lines += ["", "Kept: for the backward pass. What was run: [training-speed.md](training-speed.md)."]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Images per second and memory against T, of each contender, for each network in bf16 on the most threads."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in record["speeds"] if row["precision"] == "bf16"), key=lambda row: row["steps"])
    rows = [row for row in rows if row["threads"] == max(row["threads"] for row in rows)]
    networks = list(dict.fromkeys(row["net"] for row in rows))
    figure = Figure(figsize=(10, 3.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False)
    for network, (speed, memory) in zip(networks, axes, strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if (row["net"], row["contender"]) == (network, contender)]
            style = "k--" if contender == "CNN" else "o-"
            speed.plot([row["steps"] for row in mine], [row["median"] for row in mine], style, label=contender)
            memory.plot([row["steps"] for row in mine], [row["memory"] / 1e6 for row in mine], style)
        speed.set(title=network, ylabel="training, images per second", yscale="log")
        memory.set(title=network, ylabel="memory of a step, MB", ylim=(0, None))
        for axis in (speed, memory):
            axis.set(xlabel="timesteps T", xticks=sorted({row["steps"] for row in rows}))
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write_docs(docs: Path) -> None:
    from unitstep import training_speed  # the older commit has none

    (docs / "training-profile.md").write_text(table(json.loads(RECORD.read_text())["rows"]))
    speeds = json.loads((RECORD.parent / "training-speed.json").read_text())
    (docs / "training-speed-table.md").write_text(training_speed.table(speeds))
    draw(speeds, docs / "training-speed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "epoch", "docs"])
    parser.add_argument("--label", default="now")
    parser.add_argument("--data", help="CIFAR-10, for epoch")
    options = parser.parse_args()
    rows = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else {}
    if options.what == "step":
        rows[options.label] = {"net": NET, "steps": STEPS, "batch": BATCH, **of_step(), **provenance()}
    elif options.what == "epoch":
        rows["epoch"] = {"epoch": of_epoch(options.data), **provenance()}
    else:
        return write_docs(HERE.parent / "docs")
    write_json(RECORD, {"schema": 1, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
