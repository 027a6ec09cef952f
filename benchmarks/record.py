"""Turn measured runs of one recipe, with different seeds, into a record and its table.

    python benchmarks/record.py NAME RUN [RUN …]      writes benchmarks/records/NAME.json, prints Markdown

RUN is a run folder, or its measure.json alone, as gpu.py brings it from another machine. A record holds what `unitstep
measure` wrote for each run, with mean and spread over the seeds; nothing in it is typed by hand.
"""

import fcntl
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from unitstep.files import read_json, write_json
from unitstep.groups import averaged, cell, name_of
from unitstep.recipes import Recipe, differences, recipe_from_dict, without_folder
from unitstep.runs import Run
from unitstep.tables import markdown

RECORDS = Path(__file__).parent / "records"


def rows(path: Path) -> list[dict[str, Any]]:
    """Those of a record that grows by rows; none if there is no such file yet."""
    return read_json(path)["rows"] if path.exists() else []  # type: ignore[no-any-return]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to such a record, to which other processes may add, too."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(path, {"schema": 1, "rows": [*rows(path), row]})
    finally:
        os.close(folder)


def measured(path: Path) -> dict[str, Any]:
    """What `unitstep measure` wrote: of a run folder, with its log, or the file itself. ValueError if the run is not
    measured."""
    if not path.is_dir():
        return read_json(path)
    run = Run(path)
    if run.measurement is None:
        raise ValueError(f"{path} has no measure.json: unitstep measure {path}")
    return run.measurement | {"log": run.log}


def record(paths: list[Path]) -> dict[str, Any]:
    """Runs of one recipe → one record. ValueError if one is not measured to its end, recipes differ in more than the
    seed, or a seed is there twice."""
    runs, recipes = [], list[Recipe]()
    for path in paths:
        found = measured(path)
        recipes.append(recipe_from_dict(found["recipe"]))
        if len(found["stages"]) < len(recipes[-1].stages):
            raise ValueError(f"{path} was measured before all its stages were trained")
        # another machine has its images elsewhere
        first, this = (replace(without_folder(r), seed=0) for r in (recipes[0], recipes[-1]))
        if changes := differences(first, this):
            raise ValueError(f"{path} has another recipe than {paths[0]}: {'; '.join(changes)}")
        # a record names the data set, not the folder where it lay
        found["recipe"]["data"] = found["data"]["source"] = this.data
        *before, this_seed = (r.seed for r in recipes)
        if this_seed in before:
            raise ValueError(
                f"{path} has seed {recipes[-1].seed} like a run before it: a spread is over different seeds"
            )
        runs.append(found)
    stages = []
    for rows in zip(*(found["stages"] for found in runs), strict=True):
        summary: dict[str, Any] = {"name": rows[0]["name"], "steps": rows[0]["steps"], "n": len(rows)}
        for key in ("val_accuracy", "test_accuracy", "spikes_per_neuron", "seconds"):
            values = [row[key] for row in rows if row[key] is not None]
            if values:
                average, deviation = averaged(values)
                summary[key] = {"mean": average, "deviation": deviation, "values": values}
        stages.append(summary)
    return {"schema": 1, "n": len(paths), "seeds": [r.seed for r in recipes], "stages": stages, "runs": runs}


def table(found: dict[str, Any]) -> str:
    """A record as a Markdown table: mean, and ± the standard deviation over seeds where there are several."""
    keys = (("val_accuracy", 2), ("test_accuracy", 2), ("spikes_per_neuron", 3), ("seconds", 0))
    rows = [
        (name_of(row["steps"]), *(mean_cell(row[key], digits) if key in row else "" for key, digits in keys))
        for row in found["stages"]
    ]
    return markdown(("stage", "validation %", "test %", "spikes per neuron", "training, s"), rows)


def mean_cell(value: dict[str, Any], digits: int) -> str:
    """ "86.40 ± 0.25", or "86.40" where there is no deviation."""
    return cell(value["mean"], digits, value["deviation"])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    found = record([Path(path) for path in sys.argv[2:]])
    RECORDS.mkdir(exist_ok=True)
    write_json(RECORDS / f"{sys.argv[1]}.json", found)
    print(table(found))
