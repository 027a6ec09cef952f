import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from unitstep import ladder, packed
from unitstep.recipes import Stage, recipe
from unitstep.replaying import WARM_UP, Replayed

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


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw", "adam-amsgrad"])
def test_training_is_the_same_replayed_and_not(tmp_path: Path, optimizer: str) -> None:
    images = torch.randint(256, (640, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(640) % 10
    images[torch.arange(640), 0, labels] = 255
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        packed.write(tmp_path / "data", split, images, labels, [str(label) for label in range(10)])
    stages = [Stage(None, 3, 0.02, "nesterov", 5e-4, batch=64, warmup=0.2)]
    for steps in (2, 1):
        stages.append(Stage(steps, 3, 1e-3, optimizer, 5e-4, batch=64, warmup=0.2, distillation=0.5))  # type: ignore[arg-type]
    r = replace(recipe("fashion-mini"), data=str(tmp_path / "data"), stages=tuple(stages), dropout=0.2, whiten=True)

    def losses(compile: Literal["on", "off"]) -> list[float]:
        run = ladder.train(r, tmp_path / compile, device="cuda", precision="fp32", compile=compile)
        return [row["loss"] for row in run.log]

    assert losses("on") == pytest.approx(losses("off"), rel=2e-2)


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
