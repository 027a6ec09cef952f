"""Measuring: the counts are right, and a run's evidence lands in measure.json."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.small import small
from tests.test_data import write_images
from unitstep import Run, measure, measure_run, measurement, to_onnx, to_spiking
from unitstep.conversion import spiking
from unitstep.measurement import wilson
from unitstep.runs import open_run


def test_rates_dead_and_saturated_neurons_of_a_net_counted_by_hand():
    """Four neurons with the currents 3x, x, 0.4x and −x, threshold 1, T = 2."""
    cnn = nn.Sequential(nn.Flatten(), nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        cnn[1].weight.copy_(torch.tensor([[3.0], [1.0], [0.4], [-1.0]]))
        cnn[3].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    batches = [(torch.ones(3, 1, 1, 1), torch.tensor([0, 0, 1]))]
    found = measure(spiking(cnn.eval(), height="unit"), batches, steps=2, device="cpu")
    (layer,) = found.layers
    # x = 1: current 3 fires at both steps; 1 is a tie and then 2 > 1 fires once; 0.4 reaches 0.8; −1 never fires
    assert (layer.neurons, layer.rate, layer.dead, layer.saturated) == (4, 3 / 4, 2 / 4, 1 / 4)
    assert (layer.dead_channels, layer.saturated_channels) == (2 / 4, 1 / 4)
    # membranes before the reset: 3 and 3 − 1 + 3 = 5; 1 and 2; 0.4 and 0.8; −1 and −2; inside (0, 2): 3 of 8
    assert layer.surrogate == 3 / 8
    filled = {-2 + index / 4: share for index, share in enumerate(layer.membranes) if share}
    assert filled == {-2: 1 / 8, -1: 1 / 8, 0.25: 1 / 8, 0.75: 1 / 8, 1: 1 / 8, 2: 1 / 8, 3: 1 / 8, 3.75: 1 / 8}
    assert found.spikes_per_neuron == 3 / 4
    assert found.confusion == ((2, 0), (1, 0))
    assert found.accuracy == pytest.approx(200 / 3)
    assert found.images == 3


def test_wilson_interval():
    low, high = wilson(9000, 10000)
    assert (low, high) == pytest.approx((89.396, 90.573), abs=0.01)
    assert (wilson(100, 100)[1], wilson(0, 7)[0]) == (100, 0)


def test_a_run_without_stages_and_one_of_other_classes(tmp_path, unbroken):
    run = open_run(tmp_path / "empty", small(1))
    with pytest.raises(ValueError, match="no finished stage to measure"):
        measure_run(run)
    photos = write_images(tmp_path / "photos", train=10, test=4)
    with pytest.raises(ValueError, match=r"these images have the classes .* was trained on .* --data"):
        measure_run(unbroken.path, data=str(photos))


def test_measure_json(unbroken, tmp_path):
    run = Run(shutil.copytree(unbroken.path, tmp_path / "run"))
    result = measure_run(run)
    assert run.measurement == result
    assert {"schema", "recipe", "data", "machine", "stages", "versions", "commit", "trained"} <= result.keys()
    cnn, _, last = result["stages"]
    keys = {"index", "name", "steps", "val_accuracy", "test_accuracy", "test_interval", "spikes_per_neuron", "seconds"}
    assert keys <= cnn.keys()
    assert cnn["spikes_per_neuron"] is None
    assert cnn["layers"] == []
    assert [layer["name"] for layer in last["layers"]] == ["relu1", "relu2", "relu3", "relu4"]
    assert {"threshold", "leak", "rate", "dead", "saturated"} <= last["layers"][0].keys()
    assert last["test_images"] == 1000
    assert [operation["name"] for operation in last["operations"]] == ["conv1", "conv2", "conv3", "conv4", "readout"]
    assert [operation["input"] for operation in cnn["operations"]] == ["analog"] * 5
    assert sum(map(sum, last["confusion"])) == 1000
    assert 100 * sum(row[i] for i, row in enumerate(last["confusion"])) / 1000 == pytest.approx(last["test_accuracy"])
    samples, _ = run.load(run.path / "samples.safetensors", last["index"])
    assert samples["images"].shape == (8, 1, 28, 28)
    assert samples["spikes.relu2"].shape == (8, 8, 14, 14)
    low, high = last["test_interval"]
    assert low < last["test_accuracy"] < high


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


def test_what_gives_no_logits_or_is_asked_for_the_wrong_kind():
    batches = [(torch.ones(3, 2, 4, 4), torch.zeros(3).long())]
    for cnn, told in ((Pair(), "more than a tensor"), (nn.Conv2d(2, 2, 1), r"of shape \[3, 2, 4, 4\]")):
        with pytest.raises(ValueError, match=f"output is {told}, not logits"):
            measure(cnn, batches, steps=None, device="cpu")
    cnn = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2))
    for net, steps in ((cnn, 2), (spiking(cnn.eval()), None)):
        with pytest.raises(ValueError, match="at a number of timesteps, a CNN at steps=None"):
            measure(net, batches, steps=steps, device="cpu")
    for nothing in ([], [(torch.ones(0, 2, 4, 4), torch.zeros(0))]):
        with pytest.raises(ValueError, match="no images to measure"):
            measure(cnn, nothing, steps=None, device="cpu")


@pytest.mark.parametrize(
    "data",
    [
        [(torch.ones(3, 2, 4, 4), -torch.ones(3))],
        [(torch.ones(3, 2, 4, 4), torch.zeros(3, 1))],
        [{"images": torch.ones(3, 2, 4, 4), "labels": torch.zeros(3)}],
        TensorDataset(torch.ones(3, 2, 4, 4), torch.zeros(3)),
    ],
    ids=["unlabelled", "columns", "dicts", "a Dataset"],
)
def test_what_is_no_batches_is_refused(data):
    with pytest.raises(ValueError, match="data must be batches of"):
        measure(nn.Sequential(nn.Flatten(), nn.Linear(32, 2)), data, steps=None, device="cpu")


def test_an_empty_batch_counts_nothing():
    batches = [(torch.ones(n, 2, 4, 4), torch.zeros(n)) for n in (2, 0, 1)]
    snn = spiking(nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2)).eval())
    assert measure(snn, batches, steps=2, device="cpu").images == 3


def test_what_was_measured_is_kept_if_the_rest_fails(unbroken, tmp_path, monkeypatch):
    def fails(*_args, **_options):
        raise ValueError("no")

    run = Run(shutil.copytree(unbroken.path, tmp_path / "run"))
    monkeypatch.setattr(measurement, "conversion_alone", fails)
    with pytest.raises(ValueError, match="no"):
        measure_run(run, device="cpu", curve=True)
    assert len(run.measurement["stages"]) == len(run.stages)
    assert run.measurement["device"] == "cpu"


def test_fp32_on_a_gpu_is_not_rounded_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    class Telling(nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.allow_tf32)
            return x.flatten(1)

    images = [(torch.ones(3, 2, 1, 1), torch.zeros(3))]
    measure(Telling(), images, steps=None, device="cpu")
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32
    conv = torch.backends.cudnn.conv
    conv.fp32_precision = "ieee"  # now the older name cannot be read
    try:
        measure(nn.Flatten(), images, steps=None, device="cpu")
        assert (conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        conv.fp32_precision = "tf32"
    assert torch.backends.cudnn.allow_tf32


def test_hooks_do_not_keep_a_network_from_being_measured():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    images = torch.randn(8, 3, 8, 8)
    snn = to_spiking(nn.Sequential(*layers, nn.Linear(64, 2)).eval(), images, steps=1)
    batches = [(images, torch.zeros(8))]
    plain = measure(snn, batches, steps=1, device="cpu")
    snn.get_submodule("0").register_forward_hook(lambda *_: None)
    assert measure(snn, batches, steps=1, device="cpu").operations == plain.operations
    normed = nn.Sequential(*layers, nn.Linear(64, 2)).eval()
    torch.nn.utils.spectral_norm(normed[3])
    snn = to_spiking(normed, images, steps=1)
    snn.train()(images, 1).sum().backward()
    found = measure(snn, batches, steps=1, device="cpu")
    assert [o.macs for o in found.operations] == [o.macs for o in plain.operations]
    with pytest.raises(ValueError, match="Conv2d 3 has forward hooks"):
        to_onnx(snn, "nowhere.onnx", images, form="float")
