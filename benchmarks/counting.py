"""What counting costs: `measure`, which counts spikes and operations, against plain evaluation of the same network.

    python -m benchmarks.counting        writes benchmarks/records/counting.json and docs/counting-table.md

Both get the same images at the same batch size, and take turns in one race, each T by itself. The network is
`pretrained("cifar10-t1")`; the images are training images of fashion-mini at its size, so that it spikes as on real
ones and nothing has to be there. What `measure` does once per network weighs the more, the fewer images: a data set's
test images are more than these.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from unitstep.compact import pretrained
from unitstep.data import InMemory, load_train
from unitstep.evaluation import accuracy
from unitstep.files import write_json
from unitstep.groups import cell
from unitstep.measurement import measure
from unitstep.runs import provenance
from unitstep.tables import markdown
from unitstep.timing import race

RECORD = Path(__file__).parent / "records" / "counting.json"
TABLE = Path(__file__).parents[1] / "docs" / "counting-table.md"
NET = "cifar10-t1"


def bench(steps: list[int], images: int, rounds: int) -> dict[str, Any]:
    snn, device = pretrained(NET).to(memory_format=torch.channels_last), torch.device("cpu")
    train, _ = load_train("fashion-mini", size=32, channels=3)
    split = InMemory(*next(train.batches(images, seed=0)), train.classes)
    rows = []
    for T in steps:
        calls = {
            "plain": partial(accuracy, snn, split, T, device),
            "counting": partial(measure, snn, split, steps=T, device="cpu"),
        }
        found = {name: [mean(turn) for turn in turns] for name, turns in race(calls, rounds=rounds, seconds=0).items()}
        ratios = [counting / plain for plain, counting in zip(found["plain"], found["counting"], strict=True)]
        rate = measure(snn, split, steps=T, device="cpu").spikes_per_neuron
        row = {"steps": T, "n": rounds, "plain_seconds": found["plain"], "counting_seconds": found["counting"]}
        row |= {"ratio": mean(ratios), "deviation": stdev(ratios), "median": median(ratios), "spikes_per_neuron": rate}
        print(f"T = {T}: {mean(ratios):.3f} ± {stdev(ratios):.3f}", flush=True)
        rows.append(row)
    return {"schema": 1, "network": NET, "data": "fashion-mini", "images": images, **provenance(), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """A record as a Markdown table."""
    rows = [
        (str(row["steps"]), cell(row["spikes_per_neuron"], 3), cell(median(row["plain_seconds"]), 2),
         cell(median(row["counting_seconds"]), 2), cell(row["ratio"], 2, row["deviation"]))
        for row in found["rows"]
    ]  # fmt: skip
    machine = found["machine"]
    conditions = (
        f"{found['images']:,} images of {found['data']}, `{found['network']}`, {machine['cpu']}, {machine['threads']} "
        f"threads, torch {found['versions']['torch']}; medians of seconds; ratio: mean of {found['rows'][0]['n']} "
        "rounds ± deviation."
    )
    columns = ("T", "spikes per neuron", "plain, s", "counting, s", "ratio")
    return f"{markdown(columns, rows)}\n\n{conditions}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_json(options.out, bench(options.steps, options.images, options.rounds))
    shown = table(json.loads(options.out.read_text()))
    if options.out == RECORD:
        TABLE.write_text(shown)
    print(shown)


if __name__ == "__main__":
    main()
