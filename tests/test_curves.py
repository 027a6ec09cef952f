"""Conversion alone: the curve stops where it should, and says what it says of the images that it names."""

import shutil
from functools import partial

import pytest
import torch

from unitstep import Run, curves, measurement
from unitstep.conversion import spiking
from unitstep.curves import RATE, STRATEGIES, climb, conversion_alone, find_thresholds_, rate_code
from unitstep.data import load_train


def test_rate_code_is_black_and_white_and_as_bright_as_the_image():
    x = torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    frames = torch.stack(list(rate_code(x, 2000, seed=0))).flatten(1)
    assert set(frames.unique().tolist()) == {0, 255}
    assert frames.float().mean(0).tolist() == pytest.approx([0, 64, 255], abs=8)
    assert not torch.equal(frames[0], frames[1]) or not torch.equal(frames[0], frames[2])


@pytest.fixture(scope="module")
def parts(unbroken):
    _, val = load_train(unbroken.recipe.data, size=28, channels=1)
    images, labels = next(val.batches(50))
    return spiking(unbroken.net(0), initial=0.5), images, [(images[:20], labels[:20]), (images[20:], labels[20:])]


@pytest.mark.parametrize(
    ("wanted", "seconds", "steps"),
    [(0, 1e9, [1]), (101, 0, [1]), (101, 1e9, [1, 2, 4])], ids=["reached", "no time", "largest T"],
)  # fmt: skip
def test_where_a_curve_ends(parts, monkeypatch, wanted, seconds, steps):
    monkeypatch.setattr(curves, "STEPS", (1, 2, 4))
    snn, images, batches = parts
    found = list(climb(snn, "least squares", 0.5, images, batches, wanted, seconds))
    assert [point.steps for point in found] == steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accuracies_are_those_of_the_network_called_with_so_many_steps(parts, monkeypatch, strategy):
    monkeypatch.setattr(curves, "STEPS", (3,))
    snn, images, batches = parts
    (point,) = climb(snn, strategy, 0.5, images, batches, 101, 1e9)
    find_thresholds_(snn, images, strategy, 3)
    right = sum(int((snn(x, steps=3).argmax(1) == y).sum()) for x, y in batches)
    assert point.accuracy == 100 * right / 50


def test_a_run_measured_with_its_curve(unbroken, tmp_path, monkeypatch):
    run = Run(shutil.copytree(unbroken.path, tmp_path / "run"))
    quick = partial(conversion_alone, images=60, seconds=0.0)
    monkeypatch.setattr(measurement, "conversion_alone", quick)
    found = measurement.measure_run(run, device="cpu", curve=True)["conversion_alone"]
    assert (found["steps"], found["images"], found["latency"]) == (1, 60, None)
    ways = {(row["strategy"], row["initial"]) for row in found["rows"]}
    assert ways == {*((strategy, initial) for strategy in STRATEGIES for initial in (0, 0.5)), (RATE, 0)}
    assert all(row["latency"] is None for row in found["rows"])
    assert conversion_alone(run, images=200, seconds=0.0)["cnn_accuracy"] == run.stages[0].val_accuracy


def test_what_gets_there_is_timed(unbroken, monkeypatch):
    monkeypatch.setattr("unitstep.speed.ONE", (1, 0.0))
    monkeypatch.setattr(curves, "accuracy", lambda *_: 10.0)  # the run is right by chance
    found = conversion_alone(unbroken, device="cpu", speed=True, images=200, seconds=0.0)
    assert found["latency"] > 0
    timed = [row for row in found["rows"] if row["accuracy"] >= found["accuracy"] and row["strategy"] != RATE]
    assert timed
    assert all((row["latency"] is not None) == (row in timed) for row in found["rows"])


def test_a_run_without_spikes_has_nothing_to_compare(unbroken, tmp_path):
    run = Run(shutil.copytree(unbroken.path, tmp_path / "run"))
    for path in ("1-t2.safetensors", "2-t1.safetensors"):
        (run.path / path).unlink()
    with pytest.raises(ValueError, match="no CNN and spiking stage to compare yet"):
        conversion_alone(run)
