"""Timing: everyone has its turns; memory is seen; all networks of a run take part."""

import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from unitstep import Run, speed
from unitstep.timing import peak_memory, race


def test_everyone_has_a_turn_in_every_round_and_the_first_call_is_not_timed():
    called = []
    found = race({name: lambda name=name: called.append(name) for name in "abc"}, rounds=3, seconds=0.0)
    assert {name: [len(turn) for turn in turns] for name, turns in found.items()} == {name: [1, 1, 1] for name in "abc"}
    assert called[:3] == list("abc")
    turns = [called[start : start + 2] for start in range(3, len(called), 2)]
    assert all(first == second for first, second in turns)
    orders = ["".join(name for name, _ in turns[start : start + 3]) for start in (0, 3, 6)]
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(set(orders)) > 1


def test_slow_and_fast():
    found = race({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=2, seconds=0.05)
    assert min(found["slow"][0]) >= 0.02
    assert len(found["fast"][1]) > len(found["slow"][1])


def test_peak_memory_is_that_of_what_is_freed_again():
    if peak_memory(lambda: None) is None:
        pytest.skip("the system does not say")
    assert 40e6 < peak_memory(lambda: np.ones(6_250_000).sum()) < 80e6


HASTY = """
import sys
from unitstep import speed
from unitstep.cli import main
speed.ONE = speed.MANY = (1, 0.0)
sys.exit(main(["measure", sys.argv[1], "--device", "cpu", "--threads", "1"]))
"""


def test_all_networks_of_a_run(unbroken, tmp_path):
    run = Run(shutil.copytree(unbroken.path, tmp_path / "run"))
    # in a process of its own, as by the command line: the runtimes leave threads behind
    done = subprocess.run([sys.executable, "-c", HASTY, str(run.path)], capture_output=True, text=True, check=True)
    assert "images per second" in done.stdout
    found = run.measurement["speed"]
    steps = [stage.stage.steps for stage in run.stages]
    assert [row["steps"] for row in found if row["runtime"] == "PyTorch"] == steps
    assert {row["steps"] for row in found if row["runtime"] == "ONNX Runtime"} == {None, 1}
    for row in found:
        assert 0 < row["p50"] <= row["p99"]
        assert row["batch"] in (16, 64, 256)
        assert row["images_per_second"] > 0


def test_a_runtime_that_fails_is_left_out(unbroken, monkeypatch):
    def opened(content, runtime, *, threads=None):
        if runtime == "openvino":
            raise ValueError("it has no such layer")
        return lambda images: [images]

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True))
    monkeypatch.setattr(speed, "importlib", there)
    monkeypatch.setattr(speed, "open_model", opened)
    monkeypatch.setattr(speed, "onnx_of", lambda net, images: onnx.ModelProto())
    monkeypatch.setattr(speed, "to_onnx", lambda net, path, images: path.write_bytes(b""))
    monkeypatch.setattr(speed, "ONE", (1, 0.0))
    monkeypatch.setattr(speed, "MANY", (1, 0.0))
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="fails in OpenVINO, where it is not timed: it has no such layer"):
        found = speed.time_run(unbroken, images, device="cpu", batches=(1,))
    assert {row.runtime for row in found} == {"PyTorch", "ONNX Runtime"}
