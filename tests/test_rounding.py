"""Weights in few bits, in training and after it."""

from dataclasses import replace

import pytest
import torch

from tests.small import small
from unitstep import Run, Stage, load, train
from unitstep.data import load_test
from unitstep.exporting import to_onnx
from unitstep.rounding import rounded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_become_whole_numbers_of_their_unit(bits):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    q, unit = rounded(weight, bits)
    assert torch.equal(q, q.round())
    assert q.abs().flatten(1).amax(1).tolist() == [2 ** (bits - 1) - 1 if row != 2 else 0 for row in range(5)]
    assert ((q * unit - weight).abs() <= unit / 2 * 1.0001).all()
    again, _ = rounded(q * unit, bits)
    assert torch.equal(again, q)


@pytest.fixture(scope="module", params=[8, 4])
def run(request, tmp_path_factory):
    recipe = small(1, whiten=True)
    last = replace(recipe.stages[-1], weight_bits=request.param, epochs=0.5)
    return train(replace(recipe, stages=(recipe.stages[0], last)), tmp_path_factory.mktemp("rounded") / "run")


def test_a_stage_with_rounded_weights_ends_with_them(run):
    bits = run.recipe.stages[-1].weight_bits
    for name, weight in load(run).state_dict().items():
        if name.endswith("weight") and weight.dim() > 1:
            q, unit = rounded(weight, bits)
            torch.testing.assert_close(q * unit, weight, rtol=1e-6, atol=0)
            assert len(q.unique()) > (20 if bits == 8 else 10)


def test_what_is_exported_is_the_trained_network(run, tmp_path):
    test = load_test("fashion-mini", size=28, channels=1)
    parity = to_onnx(load(run), tmp_path / "net.onnx", test.images, test.labels)
    assert parity.changed == 0
    assert parity.accuracy == parity.file_accuracy


def test_hooks_that_would_stop_the_end_of_a_stage_stop_its_beginning(tmp_path, monkeypatch):
    (tmp_path / "hooked_own.py").write_text(
        "from torch import nn\ndef build():\n    conv = nn.Conv2d(1, 8, 3)\n"
        "    conv.register_forward_hook(lambda *_: None)\n"
        "    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = small(1, net="hooked_own:build")
    last = replace(recipe.stages[-1], weight_bits=8)
    with pytest.raises(ValueError, match=r"Conv2d cnn.0 has forward hooks.*remove them"):
        train(replace(recipe, stages=(recipe.stages[0], last)), tmp_path / "run")
    assert [row["stage"] for row in Run(tmp_path / "run").log] == [0]


def test_heights_per_channel_would_change_what_is_rounded():
    with pytest.raises(ValueError, match="choose other thresholds than channel-percentile, or the height unit"):
        small(1, stages=(Stage(None, 1, 1e-3), Stage(1, 1, 1e-3, weight_bits=8)), thresholds="channel-percentile")
