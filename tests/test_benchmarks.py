"""The scripts that make the records: what hours of runs must not be needed to find out."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import controls, optimizers, pilots, results
from benchmarks.record import append, record, rows
from unitstep.recipes import Recipe, recipe_from_dict

RECORDS = results.RECORDS


def test_every_control_is_a_recipe_with_a_folder_of_its_own():
    ladders = list(controls.controls(None))
    variants = [each for ladder in controls.LADDERS for each in controls.controls(ladder)]
    assert len({each.folder for each in (*ladders, *variants)}) == len(ladders) + len(variants)
    for each in ladders:
        *rungs, last = each.recipe("images").stages[1:]
        cost = sum(stage.epochs * stage.steps for stage in (*rungs, last))
        assert cost == pytest.approx(controls.COST + (each.ladder == controls.SCRATCH) * controls.CNN_EPOCHS)
    for each in variants:
        unchanged = replace(each, variant="").recipe("images")
        assert (each.recipe("images") == unchanged) is (each.variant == "fp32")


def test_only_wants_a_ladder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["controls", "--data", "x", "--out", "x", "--only", "fp32"])
    with pytest.raises(SystemExit):
        controls.main()
    assert "--only chooses among the --variants of a ladder" in capsys.readouterr().err


def test_precisions_are_not_averaged():
    row = rows(controls.RECORD)[0]
    pair = [row | {"precision": precision} for precision in ("bf16", "fp32")]
    assert len(controls.lines(pair)) == 2
    assert controls.table(pair).count("| 1 |") == 2


def test_pilots_and_arms_are_recipes():
    assert all(isinstance(each, Recipe) for each in pilots.PILOTS.values())
    assert len({optimizers.arm(*arm, seed=0) for arm in optimizers.ARMS}) == len(optimizers.ARMS)


def test_rows_are_added(tmp_path: Path):
    path = tmp_path / "record.json"
    assert rows(path) == []
    append(path, {"a": 1})
    append(path, {"a": 2})
    assert rows(path) == [{"a": 1}, {"a": 2}]


def test_a_record_is_of_finished_runs_with_different_seeds(tmp_path: Path):
    found = json.loads((RECORDS / "fashion-mini.json").read_text())
    paths = [tmp_path / f"{seed}.json" for seed in found["seeds"]]
    for path, run in zip(paths, found["runs"], strict=True):
        path.write_text(json.dumps(run))
    assert record(paths) == found
    with pytest.raises(ValueError, match="has seed 0 like a run before it"):
        record([paths[0], paths[0]])
    run = found["runs"][1]
    paths[1].write_text(json.dumps(run | {"stages": run["stages"][:-1]}))
    with pytest.raises(ValueError, match="was measured before all its stages were trained"):
        record(paths)
    other = replace(recipe_from_dict(run["recipe"]), percentile=80.0)
    paths[1].write_text(json.dumps(run | {"recipe": other.to_dict()}))
    with pytest.raises(ValueError, match="has another recipe than"):
        record(paths)


def test_pictures_are_drawn(tmp_path: Path):
    controls.draw(rows(controls.RECORD), tmp_path / "controls.png")
    results.draw(results.records(), tmp_path / "curves.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
