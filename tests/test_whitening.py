"""Whitened pixels: other coordinates for the training, the same network for everybody else."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.small import small
from tests.test_ladder import assert_same
from unitstep import train
from unitstep.conversion import Spiking
from unitstep.data import load_train
from unitstep.ladder import calibration_images
from unitstep.nets import build
from unitstep.runs import build_cnn, build_snn
from unitstep.whitening import Whitened, plain_state, whiten_

WHITE = replace(small(2, 1), whiten=True)


@pytest.fixture(scope="module")
def images():
    split, _ = load_train("fashion-mini", size=28, channels=1)
    return calibration_images(WHITE, split)


def net():
    torch.manual_seed(0)
    return build("vgg-mini", classes=10, channels=1, size=28).eval()


def test_patches_become_white(images):
    cnn = net()
    whiten_(cnn, images, fresh=True)
    white = cnn.conv1.parametrizations.weight[0].P
    x = F.unfold(cnn.normalize(images), 3).transpose(0, 1).flatten(1)
    moment = white @ (x @ x.T / x.shape[1]) @ white.T  # of P·x: diagonal, λ / (λ + ε)
    power = moment.diagonal()
    assert torch.allclose(moment, power.diag(), atol=1e-3)
    assert ((power > 0) & (power < 1)).all()
    assert power[-1] > 0.99  # the most common direction, brightness
    assert (x @ x.T / x.shape[1]).diagonal().max() / x.pow(2).mean() < 2  # … and not because pixels were so before


def test_a_trained_network_stays_the_same_function(images):
    cnn = net()
    before, state = cnn(images[:8]), cnn.state_dict()
    whiten_(cnn, images, fresh=False)
    after, plain = cnn(images[:8]), plain_state(cnn)
    assert torch.allclose(before, after, atol=1e-4)
    assert plain.keys() == state.keys()
    assert torch.allclose(plain["conv1.weight"], state["conv1.weight"], atol=1e-5)
    cnn.conv1.parametrizations.weight.original.data.mul_(2)
    plain = plain_state(cnn)
    other = net()
    other.load_state_dict(plain)
    assert torch.equal(other(images[:8]), cnn(images[:8]))


def test_random_weights_are_drawn_in_white_coordinates(images):
    cnn = net()
    drawn = cnn.conv1.weight.clone()
    whiten_(cnn, images, fresh=True)
    assert torch.allclose(cnn.conv1.parametrizations.weight.original, drawn, atol=1e-4)


def test_autocast_leaves_the_product_alone():
    white = Whitened(torch.eye(9) * 3)
    kernel = torch.randn(4, 1, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        product = white(kernel)
    assert torch.equal(product, white(kernel))
    assert product.dtype == torch.float32


def test_the_ladder_stores_plain_networks_and_resumes(tmp_path):
    run = train(WHITE, tmp_path / "unbroken")
    plain = train(replace(WHITE, whiten=False), tmp_path / "plain")
    for stage, other in zip(run.stages, plain.stages, strict=True):
        ours, theirs = load_file(stage.path), load_file(other.path)
        assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert not torch.equal(run.net(0).get_parameter("conv1.weight"), plain.net(0).get_parameter("conv1.weight"))
    broken = tmp_path / "broken"
    for _ in range(100):
        stopped = train(WHITE, broken, time_limit=1e-9)  # one optimiser step at a time
        if len(stopped.stages) == len(WHITE.stages):
            break
    assert len(stopped.stages) == len(WHITE.stages)
    assert_same(run, stopped)


def test_the_ladder_draws_a_fresh_networks_weights_in_white_coordinates(images, tmp_path):
    step = replace(WHITE.stages[0], lr=1e-12, epochs=1e-9)  # one, of no size
    run = train(replace(WHITE, stages=(step,)), tmp_path)
    cnn = build_cnn(WHITE, 10)
    whiten_(cnn, images, fresh=True)
    torch.testing.assert_close(run.net(0).get_parameter("conv1.weight"), cnn.conv1.weight, rtol=0, atol=1e-4)


def test_a_spiking_network_keeps_its_logits(images):
    snn = build_snn(WHITE, net())
    assert isinstance(snn, Spiking)
    for lif in snn.lifs.values():
        lif.threshold.data.fill_(0.5)
    before = snn.eval()(images[:8], 2)
    whiten_(snn, images, 2, fresh=False)
    assert torch.allclose(before, snn(images[:8], 2), atol=1e-3)


def test_networks_without_such_a_convolution_are_refused(images):
    with pytest.raises(ValueError, match=r"it has no convolution\. Set whiten to False"):
        whiten_(nn.Flatten(), images.float(), fresh=False)
    grouped = nn.Conv2d(2, 2, 3, groups=2)
    with pytest.raises(ValueError, match="cut into groups"):
        whiten_(grouped, torch.rand(4, 2, 8, 8), fresh=False)
    with pytest.raises(ValueError, match="larger than its images"):
        whiten_(nn.Conv2d(2, 2, 9, padding=4), torch.rand(4, 2, 8, 8), fresh=False)
    tied = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="is another layer's, too"):
        whiten_(tied, torch.rand(4, 2, 8, 8), fresh=False)


def test_a_layer_with_two_names_is_stored_under_both():
    layer = nn.Conv2d(2, 2, 3)
    net = nn.ModuleDict({"first": layer, "body": nn.Sequential(layer, nn.ReLU())})
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    whiten_(net["body"], torch.rand(4, 2, 8, 8), fresh=False)
    after = plain_state(net)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_the_weights_of_an_own_network_stay(tmp_path, monkeypatch):
    (tmp_path / "whitened_own.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(5)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    step = replace(WHITE.stages[0], lr=1e-12, epochs=1e-9)  # one, of no size
    run = train(replace(WHITE, net="whitened_own:build", stages=(step,)), tmp_path / "run")
    torch.manual_seed(5)
    torch.testing.assert_close(run.net(0).get_parameter("cnn.0.weight"), nn.Conv2d(1, 8, 3).weight, rtol=0, atol=1e-4)
