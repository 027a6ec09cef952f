"""Training: the whole ladder; a run that was stopped anywhere and goes on is the run that was never stopped."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.small import mini, small
from tests.test_data import write_images
from unitstep import Run, Stage, evaluation, ladder, load, measure_run, recipe, runs, train
from unitstep.cli import main
from unitstep.data import Split, load_train, pack
from unitstep.evaluation import forward
from unitstep.ladder import Progress, counted, learning_rate, loss_of, spikes_per_neuron
from unitstep.measurement import measure
from unitstep.neuron import clamp_, compiler_available
from unitstep.runs import build_cnn


def weights(run: Run) -> dict[str, torch.Tensor]:
    """All weights of all finished stages."""
    return {f"{s.stage.name}.{key}": tensor for s in run.stages for key, tensor in load_file(s.path).items()}


def assert_same(run: Run, other: Run) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_whole_ladder_learns_and_is_measured(tmp_path):
    run = train(recipe("fashion-mini", stages=small(5, 4, 3, 2, 1).stages), tmp_path)
    assert [stage.stage.name for stage in run.stages] == ["cnn", "t5", "t4", "t3", "t2", "t1"]
    result = measure_run(run)
    assert result == run.measurement
    assert [row["steps"] for row in result["stages"]] == [None, 5, 4, 3, 2, 1]
    assert result["stages"][-1]["test_accuracy"] > 25  # ten classes, a few optimiser steps
    assert load(run, steps=1)(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), steps=1).shape == (2, 10)
    assert not (tmp_path / "state.safetensors").exists()


def test_loss_trajectory_is_the_recorded_one(unbroken):
    losses = [row["loss"] for row in unbroken.log]
    assert losses == pytest.approx(GOLDEN, abs=0.05)


GOLDEN = [1.40745, 1.44608, 1.63094]  # of the CNN, T=2, T=1, printed by the test on torch 2.13, CPU


def test_the_log_tells_what_training_costs(unbroken):
    assert [row["stage"] for row in unbroken.log] == [0, 1, 2]
    for row, stage in zip(unbroken.log, unbroken.stages, strict=True):
        training = row["step"] * stage.stage.batch / row["images_per_second"]
        assert 0 < training < training + row["val_seconds"] <= stage.seconds + 0.01
        assert row["memory"] is None or 50e6 < row["memory"] < 20e9


def test_the_same_command_again_trains_nothing(unbroken):
    before = weights(unbroken)
    seen: list[Progress] = []
    again = train(small(2, 1), unbroken.path, progress=seen.append)
    assert seen == []
    after = weights(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_two_ladders_from_one_cnn(unbroken, tmp_path):
    straight = small(1)
    run = train(straight, tmp_path / "straight", cnn=unbroken.path)
    for key, tensor in load_file(unbroken.stages[0].path).items():
        assert torch.equal(load_file(run.stages[0].path)[key], tensor)
    assert run.stages[0].seconds == unbroken.stages[0].seconds
    assert [stage.stage.steps for stage in run.stages] == [None, 1]
    with pytest.raises(ValueError, match="is not this recipe's network"):
        train(replace(straight, net="vgg-small"), tmp_path / "other", cnn=unbroken)
    with pytest.raises(ValueError, match=r"is not this recipe's network: other pool, pixel_scale"):
        train(replace(straight, pool="max", pixel_scale=(1 / 50,)), tmp_path / "pool", cnn=unbroken)
    with pytest.raises(ValueError, match="is not a run folder"):
        train(straight, tmp_path / "none", cnn=tmp_path / "nothing")


@pytest.mark.parametrize(("index", "step"), [(0, 15), (1, 2), (2, 1)])
def test_killed_anywhere_and_resumed_is_the_unbroken_run(unbroken, tmp_path, index, step):
    program = f"""
import os, signal, torch
from unitstep import ladder
from tests.small import small
torch.set_num_threads(1)
ladder.CHECKPOINT_SECONDS = 0.0
def kill(p):
    if (p.index, p.step) == ({index}, {step}):
        os.kill(os.getpid(), signal.SIGKILL)
ladder.train(small(2, 1, data={mini()!r}), {str(tmp_path)!r}, precision="fp32", progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (step == 1) == (runs.Run(tmp_path).state_index() is None)
    run = train(small(2, 1), tmp_path)
    assert_same(run, unbroken)
    assert [(row["stage"], row["epoch"], row["loss"]) for row in run.log] == [
        (row["stage"], row["epoch"], row["loss"]) for row in unbroken.log
    ]


def test_sigint_saves_the_state_and_the_run_goes_on(unbroken, tmp_path):
    def interrupt(now: Progress) -> None:
        if (now.index, now.step) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # in a shell's background it is ignored
    with pytest.raises(KeyboardInterrupt):
        train(small(2, 1), tmp_path, progress=interrupt)
    assert Run(tmp_path).state_index() == 1
    assert signal.getsignal(signal.SIGINT) is before
    resumed: list[Progress] = []
    assert_same(train(small(2, 1), tmp_path, progress=resumed.append), unbroken)
    assert (resumed[0].index, resumed[0].step) == (1, 4)


def test_time_limit_stops_with_a_saved_state(unbroken, tmp_path):
    run = train(small(2, 1), tmp_path, time_limit=0.0)
    assert (run.stages, run.load(run.state_path, 0)[1]["step"]) == ((), 1)
    assert_same(train(small(2, 1), tmp_path), unbroken)


def test_thresholds_per_channel_are_resumed(unbroken, tmp_path):
    recipe = small(1, thresholds="channel-percentile", height="unit")
    once = train(recipe, tmp_path / "once", cnn=unbroken)
    while len((again := train(recipe, tmp_path / "again", cnn=unbroken, time_limit=0.0)).stages) < 2:
        pass
    first, second = (run.net(1).state_dict() for run in (once, again))
    assert first["neurons.relu1.threshold"].dim() == 1
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("keep", "every", "curve", "kept"),
    [
        ("best", 1, (97, 99, 99, 95), (99, 6)),
        ("last", 1, (97, 99, 99, 95), (95, 8)),
        ("best", 2, (None, 99, None, 95), (99, 4)),
        ("last", 3, (None, None, 99, 95), (95, 8)),
    ],
)
def test_whose_epochs_weights_are_kept(tmp_path, monkeypatch, asked, keep, every, curve, kept):
    """Of four epochs, of two steps each, with a stop after each step."""
    accuracies, losses = iter([accuracy for accuracy in curve if accuracy is not None]), []

    def noted(*given):
        losses.append(loss_of(*given))
        return losses[-1]

    monkeypatch.setattr(ladder, "accuracy", lambda *_: next(accuracies))
    monkeypatch.setattr(ladder, "loss_of", noted)
    stage = replace(small().stages[0], epochs=4, batch=2000, keep=keep, validate_every=every)
    while not (run := train(small(stages=(stage,)), tmp_path, time_limit=0.0)).stages:
        pass
    assert (run.finished(0).val_accuracy, run.net(0).state_dict()["norm1.num_batches_tracked"]) == kept
    means = [(first.item() + second.item()) / 2 for first, second in zip(losses[::2], losses[1::2], strict=True)]
    assert [row["epoch"] for row in run.log] == [1, 2, 3, 4]
    assert tuple(row["val_accuracy"] for row in run.log) == curve
    assert [row["loss"] for row in run.log] == pytest.approx(means, abs=1e-5)
    assert len({call["seed"] for call in asked}) == 4  # another order in each


def test_images_are_changed_as_the_recipe_says(tmp_path, asked):
    once = tuple(replace(stage, epochs=1e-9) for stage in small(1).stages)
    train(small(stages=once, augment="crop-flip", padding=2, border="mirror", cutout=8), tmp_path)
    changes = {"augment": "crop-flip", "padding": 2, "border": "mirror"}
    assert [changes.items() <= call.items() for call in asked] == [True] * 3
    assert [call.get("cutout", 0) for call in asked] == [8, 0, 8]  # thresholds are found without


def test_a_stage_takes_small_images_first(tmp_path, monkeypatch):
    """Six optimiser steps at three sizes, with a stop after each of them; the CNN that is imitated has the last."""
    seen, data = [], str(tmp_path / "data")
    pack("fashion-mini", data, size=16, channels=1)

    def noted(net, images, steps):
        seen.append((images.shape[-1], images.dtype))
        return forward(net, images, steps)

    stages = tuple(replace(stage, epochs=1.5, batch=1200, sizes=(0.5, 0.75, 1)) for stage in small(2, 1).stages)
    stages = (*stages[:2], replace(stages[2], distillation=0.5))
    ladder_of_sizes = small(stages=stages, size=16, data=data)
    monkeypatch.setattr(ladder, "forward", noted)
    unbroken = train(ladder_of_sizes, tmp_path / "unbroken")
    asked = [size for size, kind in seen if kind == torch.uint8]
    wanted = "".join(f"{size} " for size in asked)
    assert wanted.count("8 8 12 12 16 16 ") == 2
    assert wanted.endswith("16 8 16 8 16 12 16 12 16 16 16 16 ")
    assert [row["size"] for row in unbroken.log] == [8, 16] * 3
    while len((run := train(ladder_of_sizes, tmp_path / "stopped", time_limit=0.0)).stages) < 3:
        pass
    assert_same(run, unbroken)


def test_a_network_that_takes_no_small_images_has_large_ones_and_it_is_said(tmp_path):
    stages = small(1).stages
    with pytest.warns(UserWarning, match=r"vgg-mini takes no images of 14×14 pixels .*stage t1 .*28×28 .*Adaptive"):
        run = train(small(stages=(stages[0], replace(stages[1], sizes=(0.5, 1)))), tmp_path / "sizes")
    assert [row["size"] for row in run.log] == [28, 28]
    assert_same(run, train(small(stages=stages), tmp_path / "none"))


@pytest.fixture
def asked(monkeypatch):
    """What training asks of its images: the arguments of each pass with a seed."""
    calls, usual = [], Split.batches

    def batches(split, size, **options):
        if "seed" in options:
            calls.append(options)
        return usual(split, size, **options)

    monkeypatch.setattr(Split, "batches", batches)
    return calls


@pytest.mark.parametrize("optimizer", ["nesterov", "adam-amsgrad", "muon"])
def test_the_optimisers_memory_is_resumed(unbroken, tmp_path, optimizer):
    last = replace(small(1).stages[1], optimizer=optimizer, weight_decay=5e-4, lr=1e-3)
    mine = small(stages=(small().stages[0], last))
    whole = train(mine, tmp_path / "whole", cnn=unbroken)
    while len((run := train(mine, tmp_path / "cut", cnn=unbroken, time_limit=0.0)).stages) < 2:
        pass
    assert_same(run, whole)


def test_a_crash_while_a_stage_is_written_costs_one_step(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "CHECKPOINT_SECONDS", 0.0)
    usual = Run.save

    def save(run, path, *given, **info):
        if path == run.stage_path(1):
            raise OSError("the plug was pulled")
        usual(run, path, *given, **info)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        with pytest.raises(OSError, match="the plug"):
            train(small(2, 1), tmp_path)
    assert Run(tmp_path).state_index() == 1
    resumed: list[Progress] = []
    assert_same(train(small(2, 1), tmp_path, progress=resumed.append), unbroken)
    assert resumed[0].step == resumed[0].total


def test_the_time_limit_is_in_minutes(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(ladder, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # a second per look
    run = train(small(), tmp_path, time_limit=0.25)
    assert 4 < run.load(run.state_path, 0)[1]["step"] < 12
    with pytest.raises(ValueError, match="time_limit must be 0 or more minutes, not -1"):
        train(small(), tmp_path, time_limit=-1)
    with pytest.raises(ValueError, match="time_limit must be 0 or more minutes, not nan"):
        train(small(), tmp_path, time_limit=float("nan"))
    with pytest.raises(ValueError, match="max_loss must be 0 or more percentage points, not -1"):
        train(small(), tmp_path, max_loss=-1)


def test_what_cannot_be_converted_is_not_trained_first(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        train(small(1, leaf_modules=("nosuch",)), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_bf16_is_for_training_alone_and_each_step_is_clamped(tmp_path, monkeypatch):
    kinds, clamped, usual = set(), [], ladder.forward

    def forward(net, images, steps):
        logits = usual(net, images, steps)
        kinds.add((net.training, logits.dtype))
        return logits

    monkeypatch.setattr(ladder, "forward", forward)
    monkeypatch.setattr(evaluation, "forward", forward)
    monkeypatch.setattr(ladder, "clamp_", lambda net: (clamped.append(net), clamp_(net)))
    run = train(small(2, 1, whiten=True), tmp_path, precision="bf16")
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    assert len(clamped) == sum(row["step"] for row in run.log) == 25


@pytest.mark.parametrize(
    ("seconds", "what"),
    [(0.0, "weights are not finite in stage t1 at step 1"), (60.0, "the loss is not finite in stage t1 at step 2")],
)
def test_nan_loss_names_stage_and_step_and_keeps_the_last_state(tmp_path, monkeypatch, seconds, what):
    monkeypatch.setattr(ladder, "CHECKPOINT_SECONDS", seconds)
    wild = small(1)
    wild = replace(wild, stages=(wild.stages[0], replace(wild.stages[1], lr=1e39, optimizer="sgd", warmup=0.0)))
    with pytest.raises(FloatingPointError, match=rf"{what} of 5.*--stages\.N\.lr, now 1e\+39"):
        train(wild, tmp_path)
    run = Run(tmp_path)
    assert [stage.stage.name for stage in run.stages] == ["cnn"]
    if run.state_path.exists():
        state, _ = run.load(run.state_path, 1)
        assert all(tensor.isfinite().all() for name, tensor in state.items() if name.startswith("model."))


def test_disk_full_keeps_the_old_state(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "CHECKPOINT_SECONDS", 0.0)
    real, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 5:  # of the second state: after the recipe's two and the first state's two
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(small(1), tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert Run(tmp_path).load(tmp_path / "state.safetensors", 0)[1]["step"] == 1
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert len(train(small(1), tmp_path).stages) == 2


def test_a_dead_layer_is_named(tmp_path):
    dead = small(1, scale=1e6)
    with pytest.warns(UserWarning, match=r"layer relu1.* emits no spike"):
        train(dead, tmp_path)


def test_streamed_photos_go_down_the_ladder(tmp_path):
    """Large JPEGs, decoded and cropped by workers; resumed in the middle of an epoch."""
    photos = write_images(tmp_path / "photos", train=60, test=6, size=(320, 240))
    cnn, last = small(1).stages
    stages = (replace(cnn, epochs=1, batch=16), replace(last, epochs=1, batch=16))
    streamed = replace(small(1), data=photos, augment="resized-crop-flip", channels=3, stages=stages)
    whole = train(streamed, tmp_path / "whole")
    while len((run := train(streamed, tmp_path / "cut", time_limit=0.0)).stages) < 2:
        pass
    assert_same(run, whole)
    assert measure_run(run)["stages"][-1]["test_images"] == 12


def test_a_run_goes_on_with_the_images_that_it_was_begun_with(tmp_path, capsys):
    photos = Path(write_images(tmp_path / "photos", train=40, test=3))
    cnn, last = small(1).stages
    mine = small(1, data=str(photos), channels=3, stages=(replace(cnn, epochs=1, batch=16), last))
    train(mine, tmp_path / "in-the-cnn", time_limit=0.0)
    while not train(mine, tmp_path / "run", time_limit=0.0).stages:
        pass
    (photos / "train/dog/0.jpg").rename(tmp_path / "0.jpg")
    for folder in ("in-the-cnn", "run"):
        with pytest.raises(ValueError, match=r"75 training images, but .* was trained on 76"):
            train(mine, tmp_path / folder)
    (tmp_path / "0.jpg").rename(photos / "train/dog/0.jpg")
    moved = photos.rename(tmp_path / "moved")
    assert main(["train", "--from", str(tmp_path / "run"), "--data", str(moved)]) == 0
    assert f"unitstep measure {tmp_path / 'run'} --data {moved}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="photos"):
        train(mine, tmp_path / "run")
    moved.rename(photos)
    for split in ("train", "test"):  # the order of the classes is another
        (photos / split / "cat").rename(photos / split / "zebra")
    left = (tmp_path / "in-the-cnn/state.safetensors").read_bytes()
    for folder in ("in-the-cnn", "run"):
        with pytest.raises(ValueError, match=r"have the classes dog, zebra, but .* was trained on cat, dog"):
            train(mine, tmp_path / folder)
    mine = replace(mine, data=write_images(tmp_path / "others", train=20))
    other = train(mine, tmp_path / "other")
    other.state_path.write_bytes(left)  # as after a crash: of a stage that is finished
    train(mine, other.path)
    with pytest.raises(ValueError, match=r"was trained on cat, dog"):
        train(replace(mine, data=str(photos)), tmp_path / "its cnn", cnn=other)
    assert main(["export", str(other.path), "--data", str(photos), "--out", str(tmp_path / "a.onnx")]) == 1
    assert "have the classes dog, zebra" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.filterwarnings("always:1 unreadable images")  # the command line says so, rather than raise
def test_unreadable_images_are_named(tmp_path, capsys):
    photos = Path(write_images(tmp_path / "photos", train=30, test=3))
    broken = next((photos / "train").glob("*/*.jpg"))
    broken.write_bytes(b"not a picture")
    mine = replace(small(1), data=str(photos), channels=3)
    with pytest.raises(ValueError, match=broken.name):
        train(mine, tmp_path / "run")
    with pytest.warns(UserWarning, match=f"1 unreadable images were left out: .*{broken.name}"):
        assert len(train(mine, tmp_path / "run", bad_images="skip").stages) == 2
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "x.onnx"), "--images", "1", "--form", "float"]
    assert main(export) == 1
    assert main([*export, "--bad-images", "skip"]) == 0
    assert "1 unreadable images were left out" in capsys.readouterr().err


def test_a_run_goes_on_in_the_precision_it_was_begun_in(unbroken):
    with pytest.raises(ValueError, match="was begun in fp32"):
        train(small(2, 1), unbroken.path, precision="bf16")


@pytest.mark.parametrize(("faster", "auto"), [(None, False), (1.0, False), (2.0, True)])
def test_bf16_is_taken_where_it_is_faster_and_refused_where_it_crashes(monkeypatch, faster, auto):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(ladder, "_bf16_speed", lambda: faster)
    assert ladder._precision("auto", torch.device("cpu")) == auto
    if faster is None:
        with pytest.raises(ValueError, match="crash on this processor"):
            ladder._precision("bf16", torch.device("cpu"))
    else:
        assert ladder._precision("bf16", torch.device("cpu"))


def test_the_trial_of_bf16_tells_a_crash_from_other_failures(trial_of_bf16, monkeypatch):
    monkeypatch.setattr(ladder, "_TRIAL", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert trial_of_bf16() is None
    monkeypatch.setattr(ladder, "_TRIAL", "1/0")
    with pytest.warns(UserWarning, match=r"could not be tried \(ZeroDivisionError: division by zero\)"):
        assert trial_of_bf16() == 0


def test_cuda_asked_for_and_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA device is available here.*--device cpu"):
        train(small(1), tmp_path, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_schedules():
    falling = Stage(1, 1, 1.0, warmup=0.25)
    assert [learning_rate(falling, step, 8) for step in range(8)] == pytest.approx(
        [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    stairs = Stage(1, 1, 1.0, milestones=(0.5, 0.75), factor=10)
    assert [learning_rate(stairs, step, 4) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


def test_accumulated_parts_give_the_gradient_of_the_batch(tmp_path):
    stage = replace(small().stages[0], optimizer="sgd", lr=0.01)  # whose steps are as long as the gradient
    whole = small(norm="none", dropout=0.0, stages=(stage,))
    cut = replace(whole, stages=(replace(stage, accumulate=4),))
    one, four = train(whole, tmp_path / "a"), train(cut, tmp_path / "b")
    assert [row["loss"] for row in four.log] == pytest.approx([row["loss"] for row in one.log], abs=1e-4)
    a, b = weights(one), weights(four)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_vectors_have_a_learning_rate_of_their_own(tmp_path):
    step = Stage(None, 1e-9, 0.01, "sgd", batch=64)  # one step
    once, four = (
        weights(train(small(stages=(replace(step, vector_lr=times),)), tmp_path / str(times))) for times in (1.0, 4.0)
    )
    assert once["cnn.norm1.bias"].abs().max() > 0  # from 0
    for name, tensor in once.items():
        times = 4 if name.endswith("bias") else 1
        if "norm" not in name or times == 4:
            torch.testing.assert_close(four[name], times * tensor, rtol=1e-4, atol=1e-7)


def test_one_step_of_each_optimiser(tmp_path):
    def after(number, **changes):
        step = Stage(None, 1e-9, 0.01, **{"optimizer": "sgd", "batch": 64, **changes})
        return weights(train(small(stages=(step,)), tmp_path / str(number)))

    plain, decayed, nesterov = (
        after(number, **changes)
        for number, changes in enumerate(({}, {"weight_decay": 0.5}, {"optimizer": "nesterov"}))
    )
    for name, start in build_cnn(small(), 10).named_parameters():
        moved = plain[f"cnn.{name}"] - start
        decay = -0.01 * 0.5 * start if start.dim() > 1 else torch.zeros_like(start)
        torch.testing.assert_close(decayed[f"cnn.{name}"] - start, moved + decay, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(nesterov[f"cnn.{name}"] - start, 1.9 * moved, rtol=1e-3, atol=1e-6)
    amsgrad = ladder._optimizer(build_cnn(small(), 10), Stage(1, 1, 0.1, "adam-amsgrad"), torch.device("cpu"))
    assert amsgrad.defaults["amsgrad"]


def test_distillation_is_the_equation_and_learns_from_the_cnn(tmp_path, monkeypatch):
    logits, wanted = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, d = torch.tensor([0, 1, 2, 0, 1]), 0.7
    p, q = (wanted / 2).softmax(1), (logits / 2).softmax(1)
    plain = -logits.log_softmax(1)[range(5), labels].mean()
    stage = Stage(1, 1, 1.0, distillation=d)
    expected = (1 - d) * plain + d * 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(loss_of(logits, labels, stage, wanted), expected)
    torch.testing.assert_close(loss_of(logits, labels, stage, None), plain)
    smooth = 0.9 * plain - 0.1 * logits.log_softmax(1).mean()
    torch.testing.assert_close(loss_of(logits, labels, Stage(1, 1, 1.0, label_smoothing=0.1), None), smooth)

    recipe = small(1)
    taught = replace(
        recipe, stages=(recipe.stages[0], replace(recipe.stages[1], distillation=1.0, label_smoothing=0.5))
    )
    run = train(taught, tmp_path / "taught")
    other = replace(taught, stages=(recipe.stages[0], replace(taught.stages[1], label_smoothing=0.0)))
    assert_same(train(other, tmp_path / "other", cnn=run), run)  # labels have no say

    nets, usual = [], Run.net
    monkeypatch.setattr(Run, "net", lambda run, index: (nets.append(index), usual(run, index))[1])
    two = replace(recipe, stages=(recipe.stages[0], small(2).stages[1], taught.stages[1]))
    train(two, tmp_path / "two", cnn=run)
    assert nets == [0, 1, 0]  # the CNN teaches all rungs


@pytest.mark.parametrize("height", ["unit", "threshold"])
@pytest.mark.parametrize("thresholds", ["percentile", "channel-percentile"])
def test_counted_spikes_are_those_measured_and_have_the_surrogates_gradient(tmp_path, height, thresholds):
    run = train(small(2, height=height, thresholds=thresholds), tmp_path)
    net, (_, val) = run.net(1), load_train("fashion-mini", size=28, channels=1)
    with counted(net, True) as spikes:
        net(val.images, 2)
    rate = spikes_per_neuron(spikes, len(val))
    assert rate.item() == pytest.approx(measure(net, val, steps=2, device="cpu").spikes_per_neuron, rel=1e-5)
    assert all(((layer == 0) | ((layer - 1).abs() < 1e-5)).all() for layer in spikes)
    rate.backward()
    # of the last layer, whose spikes inhibit no other: higher thresholds, fewer spikes, whatever a spike is worth
    assert (list(net.lifs.values())[-1].threshold.grad < 0).all()
    with counted(net, False) as spikes:
        net(val.images[:2], 2)
    assert spikes == []


def test_a_spike_penalty_makes_spikes_fewer(tmp_path):
    plain = small(1, dropout=0.0)
    quiet = replace(plain, stages=(plain.stages[0], replace(plain.stages[1], spike_penalty=100.0)))
    runs = train(plain, tmp_path / "plain"), train(quiet, tmp_path / "quiet", cnn=tmp_path / "plain")
    loud, low = (measure_run(run)["stages"][-1]["spikes_per_neuron"] for run in runs)
    assert low < 0.8 * loud


def test_thresholds_and_leaks_are_brought_back_into_their_range(unbroken):
    snn = load(unbroken)
    with torch.no_grad():
        for lif, leak in zip(snn.lifs.values(), (2.0, -1.0, 0.5, 1.0), strict=True):
            lif.threshold.fill_(-1.0)
            lif.leak.fill_(leak)
    with pytest.raises(ValueError, match=r"neurons.relu1 have thresholds of 0 or less.*clamp_"):
        snn.fuse(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    clamp_(snn)
    assert [lif.threshold.item() for lif in snn.lifs.values()] == pytest.approx([1e-3] * 4)
    assert [lif.leak.item() for lif in snn.lifs.values()] == pytest.approx([1.0, 1e-3, 0.5, 1.0])


def test_a_compiler_without_pythons_headers_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"'{sys.executable}' g++")  # a program that is there, as ccache is
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert compiler_available(torch.device("cpu"))
    (tmp_path / "Python.h").unlink()
    assert not compiler_available(torch.device("cpu"))


def test_too_little_memory_says_what_takes_less(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ladder._Fit, "_optimise", full)
    with pytest.raises(ValueError, match=r"stage cnn does not fit .*--stages\.0\.accumulate, now 1"):
        train(small(1), tmp_path / "run")


def test_too_little_memory_for_calibration_says_so_too(unbroken, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ladder, "calibrate_", full)
    with pytest.raises(ValueError, match=r"stage t1 does not fit .* fewer --calibration-images"):
        train(small(1), tmp_path / "run", cnn=unbroken)


def test_without_a_compiler_a_long_stage_says_what_that_costs_and_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "compiler_available", lambda device: False)
    monkeypatch.setattr(ladder, "COMPILE_FROM", 0)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler here .* takes longer") as warned:
        run = train(small(2), tmp_path / "run")
    assert len(run.stages) == 2
    assert len(warned) == 1


def test_a_stage_in_which_spikes_vanish_says_so(tmp_path, monkeypatch):
    usual = Run.net

    def high(run, index):
        net = usual(run, index)
        if index == 1:
            next(iter(net.lifs.values())).threshold.data.mul_(1e6)
        return net

    monkeypatch.setattr(Run, "net", high)
    with pytest.warns(UserWarning, match=r"stage t1 starts with layers that never fire \(relu1, relu2"):
        train(small(2, 1, norm="none"), tmp_path / "run")


def test_a_command_that_trained_nothing_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "_precision", lambda name, _: name == "bf16")
    photos = tmp_path / "photos"
    mine = small(1, data=str(photos), channels=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with pytest.raises(ValueError, match="no such folder"):
        train(mine, tmp_path / "run", precision="bf16")
    torch.set_num_threads(threads)
    write_images(photos, train=40, test=3)
    run = train(mine, tmp_path / "run", precision="fp32")
    assert (run.about["machine"]["threads"], run.about["precision"]) == (threads, "fp32")


def test_a_cnn_that_is_taken_over_is_validated_here_and_not_swapped(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "accuracy", lambda *_: 12.5)
    straight = replace(unbroken.recipe, stages=(unbroken.recipe.stages[0], unbroken.recipe.stages[-1]))
    run = train(straight, tmp_path / "run", cnn=unbroken)
    assert run.stages[0].val_accuracy == 12.5
    train(straight, tmp_path / "run", cnn=unbroken)
    with pytest.warns(UserWarning, match="moved is gone"):
        train(straight, tmp_path / "run", cnn=tmp_path / "moved")
    other = train(replace(straight, seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match=r"has a CNN already, and it is not that of .*other"):
        train(straight, tmp_path / "run", cnn=other)


def test_the_first_rung_that_loses_too_much_is_said(tmp_path, capsys):
    run = train(small(3, 2, 1), tmp_path)
    for index, accuracy in enumerate((85.0, 83.0, 85.0)):
        tensors, info = run.load(run.stage_path(index), index)
        given = {key: info[key] for key in ("seconds", "classes")}
        run.save(run.stage_path(index), tensors, index, val_accuracy=accuracy, **given)
    run.stage_path(3).unlink()
    assert main(["train", "--from", str(tmp_path), "--max-loss", "1"]) == 0
    assert "the ladder ends at t3, which loses 2.00 points" in capsys.readouterr().err


def test_random_numbers_of_gpus_are_left_alone(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("a GPU was seeded"))
    load(unbroken, steps=1)
    train(small(1), tmp_path, device="cpu", time_limit=0.0)


def test_bf16_that_is_only_emulated_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: SimpleNamespace(major=7))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert not ladder._precision("auto", torch.device("cuda"))


def test_the_trial_of_bf16_does_not_import_from_the_current_folder(trial_of_bf16, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("1/0")
    monkeypatch.chdir(tmp_path)
    assert trial_of_bf16() != 0  # which it is if the trial fails
