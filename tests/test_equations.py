"""A whole net made by `to_spiking` against the oracle's: logits, and gradients of all weights, thresholds and leaks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unitstep import LIF, Spiking, to_spiking

from . import oracle

STEPS = [1, 2, 3, 4, 5]
THRESHOLDS = [0.3, 0.1, 0.06]
LEAKS = [0.9, 0.7, 0.8]
IMAGES = (4, 2, 6, 6)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cnn(*, norm: bool, bias: bool = True) -> nn.Sequential:
    """The oracle's net, with names; weights, batch norm and its running statistics are random."""
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(2, 5, 3, padding=1, bias=bias and not norm),
        norm1=nn.BatchNorm2d(5),
        relu1=nn.ReLU(),
        pool=nn.AvgPool2d(2),
        conv2=nn.Conv2d(5, 6, 3, padding=1, bias=bias and not norm),
        norm2=nn.BatchNorm2d(6),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear1=nn.Linear(54, 8, bias=bias),
        relu3=nn.ReLU(),
        readout=nn.Linear(8, 3, bias=bias),
    )
    if not norm:
        del layers["norm1"], layers["norm2"]
    net = nn.Sequential(layers)
    with torch.no_grad():
        for i, (name, tensor) in enumerate(net.state_dict().items()):
            if tensor.dim() > 1:
                tensor.copy_(random(*tensor.shape, seed=i) * (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith("running_var") or (name.startswith("norm") and name.endswith("weight")):
                tensor.copy_(random(*tensor.shape, seed=i).abs() / 2 + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=i) / 5)
    return net.eval()


def spiking(net: nn.Module, **options: Any) -> tuple[Spiking, list[LIF]]:
    """The spiking net in fp64, its thresholds and leaks set by hand, and its neurons in order."""
    options = {"thresholds": "percentile", "initial": 0.0, **options}
    snn = to_spiking(net, random(*IMAGES, seed=1).float(), **options).double()
    lifs = [module for module in snn.modules() if isinstance(module, LIF)]
    with torch.no_grad():
        for lif, threshold, leak in zip(lifs, THRESHOLDS, LEAKS, strict=True):
            lif.threshold.copy_(torch.tensor(threshold))
            lif.leak.copy_(torch.tensor(leak))
    return snn, lifs


def assert_same(
    snn: Spiking, lifs: list[LIF], *, steps: int, weights: dict[str, Tensor], simulate: Any = oracle.net, **options: Any
) -> None:
    """`snn` and the oracle, given `weights`, agree about random images to 1e-10."""
    images = random(*IMAGES, seed=2)
    loss = random(IMAGES[0], 3, seed=3)  # the loss is the logits, weighted at random
    w = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for tensor in w.values():
        tensor.requires_grad_(tensor.is_floating_point())
    neurons = []
    for lif in lifs:
        V, leak = (p.detach().clone().requires_grad_() for p in (lif.threshold, lif.leak))
        neurons.append(oracle.Neurons(V, leak, lif.height, lif.initial))
    expected = simulate(images, w, neurons, steps=steps, readout=options["readout"])
    (expected * loss).sum().backward()
    assert min(n.margin for n in neurons) > 1e-6  # no rounding can flip a spike
    assert all(0.02 < sum(n.rate) / steps < 0.98 for n in neurons)  # and the net is alive

    snn.zero_grad()
    logits = snn(images, steps=steps)
    (logits * loss).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for name, parameter in snn.named_parameters():
        if not name.startswith("neurons.") and parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, w[name].grad, rtol=1e-10, atol=1e-10, msg=name)
    for lif, n in zip(lifs, neurons, strict=True):
        torch.testing.assert_close(lif.threshold.grad, n.V.grad, rtol=1e-10, atol=1e-10)
        if steps > 1 or lif.initial:
            torch.testing.assert_close(lif.leak.grad, n.leak.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("height", ["unit", "threshold"])
@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_without_batch_norm(steps: int, height: str, initial: float, readout: str) -> None:
    net = cnn(norm=False, bias=height == "threshold")  # spikes of height 1 stand for a CNN without biases only
    snn, lifs = spiking(net, height=height, initial=initial, readout=readout, norm="none")
    assert_same(snn, lifs, steps=steps, weights=dict(net.double().named_parameters()), readout=readout)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("height", ["unit", "threshold"])
def test_batch_norm_kept(steps: int, training: bool, height: str) -> None:
    """In training the statistics are those of all T·B rows, for which the oracle goes layer by layer."""
    net = cnn(norm=True)
    snn, lifs = spiking(net, height=height, readout="mean", norm="keep")
    simulate = oracle.net_train if training else oracle.net
    snn.train(training)
    assert_same(snn, lifs, steps=steps, weights=net.double().state_dict(), simulate=simulate, readout="mean")


@pytest.mark.parametrize("steps", STEPS)
def test_batch_norm_folded(steps: int) -> None:
    net = cnn(norm=True)
    folded, lifs = spiking(net, height="threshold", readout="sum", norm="fold")
    assert_same(folded, lifs, steps=steps, weights=dict(folded.named_parameters()), readout="sum")


def test_what_batch_norm_was_folded_into_is_learned() -> None:
    folded, _ = spiking(cnn(norm=True), height="threshold", norm="fold")
    assert not [name for name, parameter in folded.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("steps", [1, 3])
def test_batch_norm_learns_the_statistics_of_all_steps(steps: int) -> None:
    net = cnn(norm=True)
    snn, lifs = spiking(net, height="threshold", readout="mean", norm="keep")
    images = random(*IMAGES, seed=2)
    before = {name: tensor.clone() for name, tensor in snn.state_dict().items()}
    snn.train()(images, steps=steps)
    after = snn.state_dict()
    w = net.double().state_dict()
    first = oracle.Neurons(lifs[0].threshold.detach(), lifs[0].leak.detach(), "threshold")
    currents = [torch.nn.functional.conv2d(images, w["conv1.weight"], padding=1)] * steps
    mean = torch.cat(currents).mean((0, 2, 3))
    torch.testing.assert_close(after["norm1.running_mean"], 0.9 * before["norm1.running_mean"] + 0.1 * mean)
    spikes = [torch.nn.functional.avg_pool2d(first(x), 2) for x in oracle._norm_train(currents, w, "norm1")]
    second = torch.nn.functional.conv2d(torch.cat(spikes), w["conv2.weight"], padding=1)
    for name, statistic in (("mean", second.mean((0, 2, 3))), ("var", second.var((0, 2, 3)))):
        key = f"norm2.running_{name}"
        torch.testing.assert_close(after[key], 0.9 * before[key] + 0.1 * statistic)


def test_names_are_kept() -> None:
    net = cnn(norm=True)
    snn, lifs = spiking(net, height="threshold", norm="keep")
    names = set(snn.state_dict())
    assert set(net.state_dict()) < names
    assert len(names) == len(net.state_dict()) + 2 * len(lifs)
