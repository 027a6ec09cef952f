"""The race of training steps: that everything takes part, at a size that says nothing about speed."""

import json
import subprocess
import sys

import pytest

from unitstep import training_speed
from unitstep.peers import PEERS
from unitstep.runs import provenance

pytest.importorskip("snntorch", reason="bench train needs snntorch (the bench extra)")
pytest.importorskip("spikingjelly", reason="bench train needs spikingjelly, installed with --no-deps")
pytest.importorskip("norse", reason="bench train needs norse, installed with --no-deps")


def test_all_contenders_run(tmp_path):
    out = tmp_path / "record.json"
    options = ["--nets", "vgg-mini", "--steps", "2", "--batch", "4", "--precisions", "bf16", "--threads", "1"]
    command = [sys.executable, "-m", "unitstep", "bench", "train", *options, "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(out.read_text())
    assert [row["contender"] for row in record["speeds"]] == list(training_speed.CONTENDERS)
    assert all(row["median"] > 0 and row["memory"] is not None for row in record["speeds"])
    assert set(record["versions"]) == set(training_speed.LIBRARIES)
    assert "| vgg-mini, bf16, batch 4 | T = 2, 1 thread | MB, T = 2 |" in done.stdout
    assert done.stderr.splitlines() == ["vgg-mini, bf16, T = 2"]

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (again.stderr, again.stdout) == ("", done.stdout)  # from the file


def test_ratios_are_against_the_best_of_the_others():
    speeds = {"unitstep": (30, 50), "unitstep, recompute": (25, 30), "SpikingJelly": (20, 200), "snnTorch": (10, 100)}
    speeds |= {"Norse": (5, 400), "CNN": (40, 10)}
    case = {"net": "net", "steps": 5, "batch": 1, "precision": "bf16", "threads": 1}
    rows = [case | {"contender": name, "median": m, "memory": b} for name, (m, b) in speeds.items()]
    assert training_speed.bars({"speeds": rows}, 5) == [("net", "bf16", 1, 1, 1.5, 0.75, 0.5, 0.3)]
    assert training_speed.table({"speeds": rows}).splitlines()[-1] == (
        "| net, bf16, batch 1, T = 5, 1 thread | 1.50 | 0.75 | 0.50 | 0.30 |"
    )
    # other batches, and steps that were run on other threads, do not mix
    other = [row | {"batch": 2, "median": 2.0 * row["median"]} for row in rows]
    later = [row | {"steps": 7, "threads": 2} for row in rows]
    table = training_speed.table({"speeds": rows + other + later})
    assert "| unitstep | 30.0 | 30.0 | 0 | 0 |" in table
    assert "| unitstep | 60.0 | 0 |" in table
    assert "| net, bf16, batch 2, T = 5, 1 thread | 1.50 | 0.75 | 0.50 | 0.30 |" in table
    assert "| net, bf16, batch 1, T = 7, 2 threads | 1.50 | 0.75 | 0.50 | 0.30 |" in table


@pytest.mark.parametrize(
    ("wrong", "message"), [({"names": ("vgg61",)}, "vgg61"), ({"threads": (0,)}, "must be 1 or more")]
)
def test_what_cannot_be_raced_is_refused_before(wrong, message):
    with pytest.raises(ValueError, match=message):
        training_speed.bench_train(**wrong)


@pytest.mark.parametrize(
    "content",
    [
        lambda: "{}",
        lambda: json.dumps(provenance() | {"versions": dict(training_speed.installed(training_speed.LIBRARIES))}),
    ],
)
def test_what_is_no_record_is_not_overwritten(content, tmp_path):
    (tmp_path / "other.json").write_text(content())
    with pytest.raises(ValueError, match="no such record: choose another file"):
        training_speed.bench_train(out=tmp_path / "other.json")


@pytest.mark.parametrize("peer", PEERS)
def test_other_libraries_forget_between_steps(peer):
    step = training_speed.step_of(peer, training_speed.Case("resnet20", 2, 2, "fp32"), 2)
    step()
    step()
