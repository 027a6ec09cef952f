"""The race of exported networks: that everything takes part, at a size that says nothing about speed."""

import json
import subprocess
import sys

import pytest

from unitstep import benching

pytest.importorskip("openvino", reason="bench deploy needs openvino (the bench extra)")
pytest.importorskip("snntorch", reason="bench deploy needs snntorch (the bench extra)")
pytest.importorskip("spikingjelly", reason="bench deploy needs spikingjelly, installed with --no-deps")
pytest.importorskip("norse", reason="bench deploy needs norse, installed with --no-deps")


SMALL = """
import json
from unitstep import benching
benching.NET, benching.BATCHES, benching.ROUNDS, benching.SECONDS = "vgg-mini", (2,), 1, 0.0
print(json.dumps(benching.bench_deploy(threads=(1,))))
"""


def test_all_contenders_run():
    # in a process of its own, as by the command line: three runtimes and a compiler leave threads behind
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    names = [row["name"] for row in record["speeds"]]
    assert len(names) == len(set(names)) == 15
    assert all(row["median"] > 0 for row in record["speeds"])
    assert record["bytes"]["snn-int8.onnx"] < 0.5 * record["bytes"]["cnn.onnx"]
    assert set(record["versions"]) == set(benching.LIBRARIES)


def test_a_record_as_a_table():
    names = (f"{benching.CNN} PyTorch fp32", f"{benching.UNITSTEP} OpenVINO")
    speeds = [
        {"name": name, "batch": batch, "threads": 2, "median": 100.0 * batch * times}
        for name, times in zip(names, (1, 12), strict=True)
        for batch in (1, 64)
    ]
    lines = benching.table({"speeds": speeds}).splitlines()
    assert lines[0] == "| | batch 64, 2 threads | batch 1, 2 threads |"
    assert lines[3] == f"| {names[1]} | 76,800 (12.0×) | 1,200 (12.0×) |"


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(benching, "LIBRARIES", ("torch", "no-such-library"))
    with pytest.raises(ValueError, match=r"no-such-library takes part but is not installed: pip install"):
        benching.bench_deploy()
