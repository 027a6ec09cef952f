"""The small file, and the script that makes one on a GPU."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.small import small
from unitstep import load, measure, pretrained, train
from unitstep.compact import MODELS, load_compact, save_compact
from unitstep.data import load_test, pack
from unitstep.files import read_json


def test_weights_are_rounded_to_a_127th_of_the_largest_of_their_row(unbroken, tmp_path):
    path = tmp_path / "net.safetensors"
    save_compact(unbroken, path)
    assert path.stat().st_size < 0.5 * unbroken.stages[-1].path.stat().st_size
    ours, theirs = load_compact(path), load(unbroken, steps=1)
    assert not ours.training
    for name, tensor in theirs.state_dict().items():
        found = ours.state_dict()[name]
        if name.endswith("weight") and tensor.dim() > 1:
            step = tensor.abs().flatten(1).amax(1).view(-1, *[1] * (tensor.dim() - 1)) / 127
            assert ((found - tensor).abs() <= step * 0.5001).all()
            assert not torch.equal(found, tensor)
        else:
            assert torch.equal(found, tensor)
    images = load_test("fashion-mini", size=28, channels=1).images[:200]
    with torch.no_grad():
        same = ours(images, steps=1).argmax(1) == theirs(images, steps=1).argmax(1)
    assert same.float().mean() > 0.7  # a network after a few optimiser steps: chance is 0.1


@pytest.mark.parametrize("bits", [3, 8])
def test_weights_that_were_trained_in_few_bits_stay(bits, unbroken, tmp_path):
    stages = small(1).stages
    recipe = small(stages=(stages[0], replace(stages[1], weight_bits=bits)))
    run = train(recipe, tmp_path / "run", cnn=unbroken)
    save_compact(run, tmp_path / "net.safetensors")
    ours, theirs = (net.state_dict() for net in (load_compact(tmp_path / "net.safetensors"), load(run)))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("content", [None, b"", b"\x10" * 50])
def test_not_a_compact_network(tmp_path, content):
    path = tmp_path / "net.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or was not written by unitstep") as error:
        load_compact(path)
    assert str(error.value).count(path.name) == (2 if content is None else 1)  # the system names what is not there, too


def test_a_stage_of_a_run_is_not_a_compact_network(unbroken):
    with pytest.raises(ValueError, match="is not a compact network"):
        load_compact(unbroken.stages[-1].path)


def test_the_list_of_gpu_runs(tmp_path: Path, monkeypatch, capsys):
    """As on a GPU, with a small run and a processor: stopped at the time limit, gone on, kept."""
    pack("fashion-mini", tmp_path / "data", size=28, channels=1)
    monkeypatch.setattr(gpu, "RUNS", {"small": small(1, data="fashion-mini")})
    monkeypatch.setattr(gpu, "PART_BYTES", 10_000)
    arguments = ["gpu.py", "--data", tmp_path / "data", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    for more in (["--minutes", "0.0001"], [], ["--weights", "small", "small"]):
        monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--device", "cpu", *more])
        gpu.main()
        assert list((tmp_path / "out").glob("*.safetensors.*")) == [] or more
    assert capsys.readouterr().out.startswith("small: 0 of 2 stages\nsmall: 2 of 2 stages")
    found = read_json(tmp_path / "out" / "small.json")
    assert found["stages"][-1]["steps"] == 1
    assert [row["name"] for row in found["log"]] == ["cnn", "t1"]
    assert found["data"]["source"] == "fashion-mini"
    parts = sorted((tmp_path / "out").glob("small.safetensors.*"), key=lambda path: int(path.suffix[1:]))
    assert len(parts) > 1
    (tmp_path / "whole").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert load_compact(tmp_path / "whole").lifs


def test_gpu_runs_of_other_images_are_refused(tmp_path: Path, monkeypatch, capsys):
    pack("fashion-mini", tmp_path / "data", size=28, channels=1)
    command = ["gpu.py", "--data", str(tmp_path / "data"), "--work", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "cifar100-vgg16-0"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "have 10 classes: not those of cifar100-vgg16-0" in capsys.readouterr().err


def test_a_network_that_comes_with_the_package_does_what_its_card_says():
    found = measure(pretrained("fashion-mini-t1"), load_test("fashion-mini", size=28, channels=1), steps=1)
    card = (MODELS / "fashion-mini-t1.md").read_text()
    stated = float(re.search(r"\| accuracy \| ([\d.]+) %", card)[1])
    assert found.accuracy == pytest.approx(stated, abs=0.2)  # rounding differs between processors
    spikes = float(re.search(r"\| spikes \| ([\d.]+) per neuron", card)[1])
    assert found.spikes_per_neuron == pytest.approx(spikes, abs=0.005)
    with pytest.raises(ValueError, match=r"no trained network named 'vgg'.*there are: cifar10-t1, fashion-mini-t1"):
        pretrained("vgg")


def test_networks_and_cards_that_come_with_the_package():
    assert {path.stem for path in MODELS.glob("*.safetensors")} == {path.stem for path in MODELS.glob("*.md")}
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 10e6
