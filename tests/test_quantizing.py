"""Integer networks: how far they are from the fused one, and that they are integers."""

import pytest
import torch
from torch import nn

from unitstep import nets, to_spiking
from unitstep.fusing import Fire
from unitstep.quantizing import quantize


def fused_vgg(**options):
    torch.manual_seed(0)
    cnn = nets.build("vgg-mini", classes=10)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    cnn.train()(images)  # statistics
    return to_spiking(cnn.eval(), images, steps=1, percentile=80, initial=0.0, **options).fuse(), images


@pytest.mark.parametrize("thresholds", ["percentile", "channel-percentile"])
def test_all_weights_are_whole_and_all_thresholds_halves(thresholds):
    fused, images = fused_vgg(thresholds=thresholds)
    net = quantize(fused, images)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(module.weight, module.weight.round())
            assert module.weight.abs().max() == 127
            assert module.bias is None
        if isinstance(module, Fire):
            assert torch.equal(module.threshold % 1, torch.full_like(module.threshold, 0.5))
    assert not any("float" in node.meta for node in net.graph.nodes)


def test_fewer_bits_are_further_from_the_network():
    fused, images = fused_vgg()
    expected = fused(images)
    away = [(quantize(fused, images, bits=bits)(images) - expected).norm() / expected.norm() for bits in (8, 5, 3)]
    assert away[0] < away[1] < away[2]


def test_of_the_first_layer_hardly_a_spike_differs():
    fused, images = fused_vgg()
    net = quantize(fused, images)
    first = [nn.Sequential(*list(each.children())[:3])(images) for each in (fused, net)]
    assert (first[0] != first[1]).float().mean() < 0.005


def test_a_number_of_bits_that_cannot_be():
    fused, images = fused_vgg()
    with pytest.raises(ValueError, match="2 to 8 bits, not 9"):
        quantize(fused, images, bits=9)
