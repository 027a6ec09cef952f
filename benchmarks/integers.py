"""Is what is exported in integers the network that was trained? Predictions of both on all test images.

    python -m benchmarks.integers RUN … --data IMAGES     writes benchmarks/records/integers.json

RUN: folders of runs whose last stage has one timestep and `weight_bits`. Only predictions are compared: labels of the
test images are not looked at.
"""

import argparse
import tempfile
from pathlib import Path

from unitstep.data import load_test
from unitstep.exporting import to_onnx
from unitstep.files import write_json
from unitstep.recipes import without_folder
from unitstep.runs import Run, load, provenance

RECORD = Path(__file__).parent / "records" / "integers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True, help="the images that the runs were trained on")
    options = parser.parse_args()
    rows = []
    for path in options.runs:
        run = Run(path)
        r, last = run.recipe, run.stages[-1]
        test = load_test(options.data, size=r.size, channels=r.channels, augment=r.augment)
        with tempfile.TemporaryDirectory() as folder:
            found = to_onnx(load(run), Path(folder) / "model.onnx", test.images)  # type: ignore[attr-defined]
        row = {"recipe": without_folder(r).to_dict(), "trained": run.about["commit"], "images": found.images}
        row |= {"weight_bits": last.stage.weight_bits, "val_accuracy": last.val_accuracy}
        row |= {"changed_predictions": found.changed, "largest_difference": found.logits}
        row |= {"spikes_that_differ": {layer.name: layer.differ for layer in found.layers}}
        rows.append(row)
        print(f"{path}: {found.changed} of {found.images} predictions differ", flush=True)
    write_json(RECORD, {"schema": 1, "rows": rows, **provenance()})


if __name__ == "__main__":
    main()
