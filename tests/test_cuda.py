"""What a graphics card must not change: conversion, and what is measured in fp32."""

import pytest
import torch

from unitstep import nets, pretrained, to_spiking
from unitstep.data import InMemory
from unitstep.measurement import measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_network_on_a_gpu_converts_as_on_the_processor() -> None:
    torch.manual_seed(0)
    cnn, images = nets.build("vgg-small", classes=10).eval(), torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    # thresholds of whole layers: those per channel, of untrained weights, move by half where weights do by 1/2,048
    here = to_spiking(cnn, images, steps=2, thresholds="percentile")
    there = to_spiking(cnn.cuda(), images.cuda(), steps=2, thresholds="percentile")
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}
    for ours, theirs in zip(here.lifs.values(), there.lifs.values(), strict=True):
        torch.testing.assert_close(theirs.threshold.cpu(), ours.threshold, rtol=0.02, atol=1e-3)
    assert there.fuse(images.cuda(), 2)(images.cuda()).device.type == "cuda"


def test_a_network_has_the_same_spikes_on_both() -> None:
    noise = torch.randint(256, (500, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net, test = pretrained("fashion-mini-t1"), InMemory(noise, torch.arange(500) % 10, [str(i) for i in range(10)])
    here, there = (measure(net, test, steps=1, device=device) for device in ("cpu", "cuda"))
    assert there.spikes_per_neuron == pytest.approx(here.spikes_per_neuron, rel=1e-5)
    assert there.accuracy == pytest.approx(here.accuracy, abs=0.3)
