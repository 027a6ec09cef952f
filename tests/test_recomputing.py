"""Pieces that are computed again in the backward pass: the same network, in less memory."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.small import small
from unitstep import ladder, nets, to_spiking, train
from unitstep.neuron import LIF
from unitstep.recomputing import Piece, recomputing

IMAGES = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def spiking(name, **options):
    torch.manual_seed(0)
    cnn = nets.build(name, classes=5, **options)
    return to_spiking(cnn.eval(), IMAGES, steps=3, thresholds="percentile", initial=0.0, norm="keep").train()


def step(net, called):
    torch.manual_seed(1)
    loss = F.cross_entropy(called(IMAGES, 3), torch.arange(6) % 5)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in net.named_parameters()}, net.state_dict()


@pytest.mark.parametrize(
    ("name", "options"), [("vgg-mini", {"dropout": 0.3}), ("resnet20", {}), ("vgg6", {"size": 32})]
)
def test_values_gradients_and_statistics_are_the_same_bit_for_bit(name, options):
    plain = spiking(name, **options)
    again = copy.deepcopy(plain)
    loss, gradients, state = step(plain, plain)
    loss_again, gradients_again, state_again = step(again, recomputing(again))
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for key, gradient in gradients.items():
        assert (gradient is None) == (gradients_again[key] is None), key
        assert gradient is None or torch.equal(gradient, gradients_again[key]), key
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)


@pytest.mark.parametrize("name", ["vgg-mini", "resnet20"])
def test_less_is_kept_for_the_backward_pass(name):
    def kept(called):
        saved: dict[int, int] = {}  # bytes by storage: what is saved twice is held once

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = called(IMAGES, 3)
        return sum(saved.values()), logits  # which hold all of it until now

    snn = spiking(name)
    assert kept(recomputing(snn))[0] < 0.7 * kept(snn)[0]


def test_every_neuron_layer_is_in_a_piece():
    snn = spiking("resnet20")
    pieces = [module for module in recomputing(snn).children() if isinstance(module, Piece)]
    inside = {id(module) for piece in pieces for module in piece.modules() if isinstance(module, LIF)}
    assert inside == {id(lif) for lif in snn.lifs.values()}


def test_a_stage_so_trained_is_the_stage_trained_without(tmp_path, monkeypatch):
    recipe, weights, called = small(2, whiten=True), [], []
    monkeypatch.setattr(ladder, "recomputing", lambda net: (called.append(net), recomputing(net))[1])
    for recompute in (False, True):
        last = replace(recipe.stages[1], recompute=recompute, weight_bits=8)
        run = train(replace(recipe, stages=(recipe.stages[0], last)), tmp_path / str(recompute))
        weights.append(run.net(1).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert len(called) == 1
