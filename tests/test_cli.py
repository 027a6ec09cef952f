"""The command line, as a user meets it."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from unitstep import exporting
from unitstep.cli import main
from unitstep.exporting import to_onnx
from unitstep.recipes import RECIPES

TINY = [part for i in range(6) for part in (f"--stages.{i}.epochs", "0.02", f"--stages.{i}.optimizer", "adamw")]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unitstep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"]])
def test_a_reader_who_has_seen_enough_is_no_error(arguments):
    """`unitstep recipes | head -1`"""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "unitstep", *arguments], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert done.returncode == 1
    assert done.stderr == ""


def test_train_measure_and_the_errors_between(tmp_path, capsys):
    out = str(tmp_path / "run")
    train = ["train", "fashion-mini", "--out", out, "--threads", "1", "--calibration-images", "64", *TINY]
    assert main([*train, "--time-limit", "0"]) == 3
    assert "stopped at the time limit; to go on: unitstep train fashion-mini" in capsys.readouterr().err
    assert main(train) == 0
    printed = capsys.readouterr()
    assert "t1: validation" in printed.out
    assert f"unitstep measure {out}" in printed.err
    assert main(["measure", out, "--no-speed"]) == 0  # timing is in test_speed.py
    assert main(["report", out, "--out", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / "report.md").read_text().startswith("# ")
    table = capsys.readouterr().out
    lines, steps = [line.split("  ")[0].rstrip() for line in table.splitlines()], [f"T = {T}" for T in (5, 4, 3, 2, 1)]
    assert lines[:8] == ["Stages", "stage", "CNN", *steps]
    start = lines.index("network")
    head = table.splitlines()[start].split()
    assert head == ["network", "multiplications", "additions", "paper", "exact", "int8", "memory"]
    assert lines[start + 1 : start + 6] == steps
    model = tmp_path / "model.onnx"
    assert main(["export", out, "--out", str(model), "--images", "50", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert "50 validation images in ONNX Runtime" in printed.out
    assert len(re.findall(r"relu\d +\d+ +0 of \d+", printed.out)) == 4
    assert f"{model}: int8" in printed.err
    assert "8-bit weights cost" not in printed.err

    def worse(*arguments, **options):
        parity = to_onnx(*arguments, **options)
        return replace(parity, accuracy=parity.file_accuracy + 0.31, rounded=("conv1",))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_onnx", worse)
        assert main(["export", out, "--out", str(model), "--images", "50", "--threads", "1"]) == 0
    said = capsys.readouterr().err
    assert "8-bit weights cost 0.31 points here: take --form float, or train a new run" in said
    assert "--stages.N.weight_bits 8, N being its last stage" in said
    assert "conv1: rounded once more" in said
    assert main(["export", out, "--out", str(model), "--images", "50", "--steps", "2", "--threads", "1"]) == 0
    assert f"{model}: float" in capsys.readouterr().err
    assert main(["export", out, "--out", str(model), "--images", "50", "--form", "float", "--threads", "1"]) == 0
    assert f"{model}: float" in capsys.readouterr().err
    assert main(["export", out, "--out", str(tmp_path / "a.nir"), "--to", "nir"]) == 0
    assert "a.nir: 1 Input, " in capsys.readouterr().out
    assert main(["export", out, "--out", str(model), "--to", "nir", "--form", "float"]) == 1
    assert "leave it out with --to nir" in capsys.readouterr().err
    assert main(["export", out, "--out", str(model), "--steps", "7"]) == 1
    assert "no stage of 7 timesteps" in capsys.readouterr().err
    assert main([*train, "--seed", "1"]) == 1
    assert "seed: 0 → 1" in capsys.readouterr().err


def test_max_loss_is_said(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--threads", "1", "--max-loss", "0", *TINY, "--stages.0.epochs", "2"]
    assert main(["train", "fashion-mini", *options]) == 0
    assert "the ladder ends at t5, which loses" in capsys.readouterr().err


def test_recipes_lists_all(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(RECIPES)
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("imagenet")] == ["run"]


def test_help_explains_every_field(capsys):
    for arguments in (["train", "--help"], ["train", "cifar10-vgg16", "--help"], ["measure", "-h"], ["recipes", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--stages.5.lr" in out
    assert "Percentage points of validation accuracy" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "cifar10-vg16", "--out", "x"], 1, "did you mean cifar10-vgg16"),
        (["train"], 2, "RECIPE is one of: fashion-mini"),
        (["train", "fashion-mini", "--out", "x", "--threads", "0"], 1, "--threads must be 1 or more"),
        (["fly"], 2, "no verb 'fly'"),
        (["measure", "nowhere"], 1, "nowhere is not a run folder"),
        (["train", "fashion-mini", "--out", "x", "--data", "./nowhere"], 1, "no such folder"),
        (["train", "fashion-mini", "--out", "x", "--net", "vgg16", "--size", "8"], 1, "too small"),
    ],
)
def test_errors_are_one_sentence(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert message in capsys.readouterr().err


def test_as_a_module_and_without_a_terminal():
    assert run("--version").stdout.startswith("unitstep 0.")
    refused = run("train", "fashion-mini", "--out", "x", "--stages.1.steps", "0")
    assert refused.returncode == 2
    assert "steps of 1 or more" in refused.stdout + refused.stderr


def test_letters_that_the_terminal_has_not_are_escaped():
    found = run("recipes", PYTHONIOENCODING="latin-1")
    assert found.returncode == 0
    assert r"\u2192" in found.stdout  # an arrow
