import gc
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unitstep import ladder, packed
from unitstep.ladder import Progress
from unitstep.recipes import Recipe, Stage, recipe
from unitstep.replaying import WARM_UP, Replayed
from unitstep.runs import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_replayed_computation_follows_its_inputs_its_state_and_the_seed() -> None:
    weight = torch.ones(4, device="cuda")
    calls = 0

    def compute(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        weight.add_(1)
        return torch.stack([(x * weight).sum(), torch.rand((), device="cuda")])

    replayed, seen = Replayed(compute), list[float]()
    for call in range(8):
        torch.manual_seed(call % 2)
        value, random = replayed(torch.full((4,), float(call), device="cuda")).tolist()
        assert value == 4 * call * (call + 2)
        seen.append(random)
    assert seen == seen[:2] * 4
    assert seen[0] != seen[1]
    assert calls == WARM_UP + 1


def recipe_for(folder: Path, optimizer: str, sizes: tuple[float, ...] = ()) -> Recipe:
    """CNN, T = 2 and T = 1, 27 steps each, on random images with something to learn."""
    size = 16 if sizes else 28
    images = torch.randint(256, (640, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(640) % 10
    images[torch.arange(640), 0, labels] = 255
    for split in ("train", "test"):
        (folder / "data").mkdir(exist_ok=True)
        packed.write(folder / "data", split, images, labels, [str(label) for label in range(10)])
    stages = [Stage(None, 3, 0.02, "nesterov", 5e-4, batch=64, warmup=0.2)]
    for steps in (2, 1):
        stages.append(Stage(steps, 3, 1e-3, optimizer, 5e-4, batch=64, warmup=0.2, distillation=0.5))  # type: ignore[arg-type]
    changes = {"stages": tuple(replace(stage, sizes=sizes) for stage in stages), "size": size}
    return replace(recipe("fashion-mini"), data=str(folder / "data"), dropout=0.2, whiten=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "sizes"),
    [("nesterov", ()), ("adamw", ()), ("adam-amsgrad", ()), ("muon", ()), ("adamw", (0.5, 0.75, 1))],
)
def test_training_is_the_same_replayed_and_not_and_resumed(
    tmp_path: Path, optimizer: str, sizes: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = recipe_for(tmp_path, optimizer, sizes)
    calls, compute = list[str](), ladder._Fit._compute

    def counted(fit: ladder._Fit, *batch: torch.Tensor) -> torch.Tensor:
        calls.append(fit.stage.name)
        return compute(fit, *batch)

    monkeypatch.setattr(ladder._Fit, "_compute", counted)

    def losses(folder: str, **options: Any) -> list[float]:
        ladder.train(r, tmp_path / folder, device="cuda", precision="fp32", **options)
        return [row["loss"] for row in Run(tmp_path / folder).log]

    replayed = losses("on")
    assert Counter(calls) == dict.fromkeys(("cnn", "t2", "t1"), max(1, len(sizes)) * (WARM_UP + 1))
    assert replayed == pytest.approx(losses("off", compile="off"), rel=2e-2)

    def interrupt(progress: Progress) -> None:
        if (progress.stage.name, progress.step) == ("t1", 13):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        losses("resumed", progress=interrupt)
    assert losses("resumed") == pytest.approx(replayed, rel=2e-2)


def test_a_finished_stage_leaves_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, begin = list[weakref.ref[ladder._Fit]](), ladder._Fit.__init__

    def noted(fit: ladder._Fit, *arguments: Any) -> None:
        begin(fit, *arguments)
        fits.append(weakref.ref(fit))

    monkeypatch.setattr(ladder._Fit, "__init__", noted)
    gc.disable()
    try:
        ladder.train(recipe_for(tmp_path, "adamw"), tmp_path / "run", device="cuda", precision="fp32")
        assert [fit() for fit in fits] == [None] * 3
    finally:
        gc.enable()


WAITS = """
import torch
from unitstep.replaying import Replayed
replayed = Replayed(lambda x: x + x.sum().item())
for call in range(4):
    print(replayed(torch.full((2,), float(call), device="cuda")).tolist())
"""


def test_what_waits_for_the_device_is_refused_with_the_way_out() -> None:
    # in another process, as random numbers are spoilt there
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[0.0, 0.0]", "[3.0, 3.0]", "[6.0, 6.0]"]
    assert "cannot be recorded for the GPU" in done.stderr
    assert "--compile off" in done.stderr
