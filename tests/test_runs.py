"""The run folder: whole files, and nothing foreign or damaged is ever loaded."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.small import small
from unitstep import Run, load, measurement, train
from unitstep.files import check_writable, write_whole
from unitstep.groups import trained_on
from unitstep.runs import locked, open_run


@pytest.fixture
def run(unbroken, tmp_path) -> Run:
    """A run of CNN, T=2 and T=1 to play with."""
    return Run(shutil.copytree(unbroken.path, tmp_path / "run"))


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    run = open_run(tmp_path, small(1))
    run.save(run.stage_path(0), {}, 0)
    with pytest.raises(ValueError, match=r"made by another recipe.*\n  seed: 0 → 7"):
        open_run(tmp_path, replace(small(1), seed=7))


def test_a_folder_in_which_nothing_was_trained_takes_another_recipe(tmp_path):
    """As after a mistake in the first command."""
    for bad, message in (({"net": "vgg-mimi"}, "no network named"), ({"data": "phtos"}, "phtos")):
        with pytest.raises(ValueError, match=message):
            train(replace(small(1), **bad), tmp_path)
    with locked(open_run(tmp_path, small(1)).path), pytest.raises(ValueError, match="another process is at work"):
        open_run(tmp_path, replace(small(1), seed=7))
    (tmp_path / "log.jsonl").write_text("{}\n")  # of an epoch that ended before the first state was saved
    run = open_run(tmp_path, replace(small(1), seed=7))
    assert run.recipe.seed == 7
    assert run.log == []


def test_measurements_of_networks_that_are_gone_go_too(run, tmp_path):
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    (copy.path / "measure.json").write_text("{}")
    for path in copy.path.glob("*.safetensors"):
        path.unlink()
    copy.save(copy.samples_path, {}, 2)
    made = open_run(copy.path, small(3))
    assert made.measurement is None
    assert not made.samples_path.exists()


def test_files_of_another_program_stay(tmp_path):
    (tmp_path / "recipe.json").write_text('{"soup": "onion"}')
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"recipe\.json"):
        open_run(tmp_path, small(1))
    assert (tmp_path / "recipe.json").read_text() == '{"soup": "onion"}'
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_what_a_killed_process_left_half_written_goes(run):
    left = run.path / ".state.safetensors.1234"
    left.write_bytes(b"half")
    train(run.recipe, run.path)
    assert not left.exists()


def test_a_run_that_another_process_trains_is_left_alone(run):
    with locked(run.path), pytest.raises(ValueError, match="another process is at work"):
        train(run.recipe, run.path)


def test_a_state_of_a_longer_ladder_is_named(run, tmp_path):
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    run.save(copy.state_path, {}, 9)
    copy.stage_path(2).unlink()
    with pytest.raises(ValueError, match="does not belong to this run and stage"):
        train(copy.recipe, copy.path)


def test_truncated_and_foreign_files_are_named_and_left_alone(run):
    path = run.stage_path(2)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", pickle.dumps({"weights": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"2-t1\.safetensors is damaged"):
            load(run)
        with pytest.raises(ValueError, match=r"2-t1\.safetensors is damaged"):
            train(small(2, 1), run.path)
        assert path.read_bytes() == content
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="was not written by unitstep"):
        load(run)
    path.write_bytes(run.stage_path(0).read_bytes())
    with pytest.raises(ValueError, match="does not belong to this run and stage"):
        load(run)
    run.save(path, {}, 2, step=1)  # what an interrupted stage leaves
    with pytest.raises(ValueError, match="does not belong to this run and stage"):
        load(run)


def test_a_state_of_another_run_is_refused(run, tmp_path):
    other = open_run(tmp_path / "other", replace(small(1), seed=1))
    run.save(other.state_path, {"model.x": torch.zeros(1)}, 0, step=1)
    with pytest.raises(ValueError, match=r"state\.safetensors does not belong"):
        train(other.recipe, other.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"recipe": {"name": 1}}'])
def test_a_damaged_recipe_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json is (damaged|not the recipe)"):
        Run(tmp_path)


def test_a_damaged_log_is_named(run):
    (run.path / "log.jsonl").write_text('{"stage": 0')
    run.stage_path(2).unlink()
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged"):
        train(run.recipe, run.path)


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        Run(tmp_path / "nothing")
    (tmp_path / "state.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"has no recipe.json but holds state\.safetensors"):
        open_run(tmp_path, small(1))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the run folder"):
        open_run(tmp_path / "file" / "run", small(1))


def test_no_such_stage(run):
    with pytest.raises(ValueError, match=r"no stage of 3 timesteps; its ladder is 2, 1"):
        load(run, steps=3)
    run.stage_path(2).unlink()
    with pytest.raises(ValueError, match=r"stage t1 of .* is not trained yet"):
        load(run)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        usual = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, usual=usual: (calls.append(name), usual(*given))[1])
    write_whole(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_provenance_is_recorded(run):
    about = json.loads((run.path / "recipe.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert {"machine", "commit", "precision", "device"} <= about.keys()


def test_training_that_goes_on_elsewhere_is_recorded(run):
    """The stage at T = 1 is trained with another torch than those before it."""
    assert "continued" not in run.trained
    about = json.loads((run.path / "recipe.json").read_text())
    now = about["versions"]
    (run.path / "recipe.json").write_text(json.dumps(about | {"versions": now | {"torch": "1.0"}}))
    train(run.recipe, run.path)  # trains nothing
    assert "continued" not in Run(run.path).trained
    run.stage_path(2).unlink()
    for _ in range(2):
        train(run.recipe, run.path)
    trained = Run(run.path).trained
    assert trained["versions"]["torch"] == "1.0"
    assert [each["versions"] for each in trained["continued"]] == [now]
    elsewhere = trained["continued"][0] | {"machine": {"cpu": "Z80", "threads": 1}, "device": "cpu"}
    here = trained_on({key: value for key, value in trained.items() if key != "continued"})
    assert trained_on(trained) == here
    assert trained_on(trained | {"continued": [elsewhere]}) == here.replace(", fp32", ", then Z80, 1 threads, fp32")


def test_a_stage_is_not_put_under_those_that_began_with_another(run):
    moved = run.stage_path(0).rename(run.path.parent / "cnn")
    with pytest.raises(ValueError, match=r"has 1-t2\S+, 2-t1\S+, which began with 0-cnn\S+, and that is not there"):
        train(run.recipe, run.path)
    moved.rename(run.stage_path(0))
    assert len(train(run.recipe, run.path).stages) == 3


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "new" / "file")
    (tmp_path / "loose").symlink_to(tmp_path / "newer" / "file")
    check_writable(tmp_path / "loose")
    write_whole(tmp_path / "loose", b"content")
    write_whole(tmp_path / "link", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    for path, message in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is no ordinary file"),
        (tmp_path / "link" / "file", "cannot write"),
    ):
        with pytest.raises(ValueError, match=message):
            check_writable(path)


def test_an_evaluation_that_cannot_be_kept_is_not_begun(run, monkeypatch):
    monkeypatch.setattr(measurement, "load_test", None)
    (run.path / "measure.json").mkdir()
    with pytest.raises(ValueError, match=r"measure\.json is a folder"):
        measurement.measure_run(run)
