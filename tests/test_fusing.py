"""A network at fixed steps as convolutions and comparisons: the same spikes and logits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures import ARCHITECTURES, build, randomise_
from unitstep import LIF, measure, nets, record, to_onnx, to_spiking
from unitstep.fusing import Fire

ONE: dict[str, Any] = {"thresholds": "percentile", "percentile": 80, "scale": 0.7, "initial": 0.0}
EACH: dict[str, Any] = {"thresholds": "channel-percentile", "percentile": 90, "initial": 0.3}
UNIT: dict[str, Any] = {
    "thresholds": "percentile",
    "percentile": 80,
    "height": "unit",
    "readout": "sum",
    "norm": "fold",
}
CAPPED = {name for name in ARCHITECTURES if any(isinstance(module, nn.ReLU6) for module in build(name)[0].modules())}


def agrees(snn, images, steps):
    """All spikes are the same, except of neurons within 1e-6 of their threshold, and so are the logits."""
    fused = snn.fuse(images, steps)
    seen = {}
    for name, module in fused.named_modules():
        if isinstance(module, Fire):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with record(snn) as wanted, torch.no_grad():
        expected, logits = snn(images, steps=steps), fused(images)
    assert list(seen) == list(wanted) == list(snn.lifs)
    for name, layer in wanted.items():
        assert torch.equal(seen[name] != 0, layer.spikes.flatten(0, 1) != 0), name
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    return fused


@pytest.mark.parametrize("options", [EACH, UNIT], ids=["per channel", "unit height"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fused_architecture_is_the_same_function(name, options):
    cnn, images = build(name)
    if name in CAPPED:  # a cap needs a height that has a unit
        options = options | {"height": "threshold"}
    snn = to_spiking(cnn, images, steps=3, **options)
    before = copy.deepcopy(snn.state_dict())
    for steps in (1, 3):
        agrees(snn, images, steps)
    assert all(torch.equal(before[key], value) for key, value in snn.state_dict().items())


@pytest.mark.parametrize("options", [ONE, EACH], ids=["one threshold", "per channel"])
def test_of_a_vgg_convolutions_and_comparisons_remain(options):
    cnn = nets.build("vgg-mini", classes=10)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    fused = to_spiking(cnn, images, steps=1, **options).fuse(images)
    kinds = [type(module) for module in fused.children()]
    assert set(kinds) == {nets.Normalize, nn.Conv2d, Fire, nn.AvgPool2d, nn.Flatten, nn.Linear}
    assert all(bool((module.height == 1).all()) for module in fused.children() if isinstance(module, Fire))


def test_torch_can_export_it():
    cnn, images = build("vgg")
    fused = to_spiking(cnn, images, steps=1, **ONE).fuse(images)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(fused, (images,), dynamic_shapes=({0: batch},))
    for number in (1, len(images)):
        torch.testing.assert_close(exported.module()(images[:number]), fused(images[:number]))


class Twice(nn.Module):
    """Has the same value twice in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nets.Normalize([100], [0.03])
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(12, 6, 3), nn.Linear(2 * 6 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.a(self.pixels(x)))
        x = torch.relu(self.b(torch.cat([x, x], 1)))
        return self.fc(torch.cat(tensors=[x, x], dim=1).flatten(1))


@pytest.mark.parametrize("options", [ONE, EACH, UNIT], ids=["one threshold", "per channel", "unit height"])
def test_the_same_value_twice_in_a_concatenation(options, tmp_path):
    torch.manual_seed(0)
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    snn = to_spiking(Twice().eval(), images, steps=1, **options)
    agrees(copy.deepcopy(snn).double(), images, 1)
    for form in ("float", "int8"):
        assert to_onnx(snn, tmp_path / "net.onnx", images, form=form).changed <= (1 if form == "int8" else 0)


class Functional(nn.Module):
    """Pools as functions and methods, of spikes whose heights differ by channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.a(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.b(x)), kernel_size=2, ceil_mode=True)
        x = F.adaptive_max_pool2d(F.avg_pool2d(x, x.size(3) // 2), 2)
        return self.c(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1) + x.mean((2, 3)) + x.mean((-1, -2), True).flatten(1))


@pytest.mark.parametrize("options", [ONE, EACH])
def test_functional_pools_become_modules(options):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    snn = to_spiking(Functional().double().eval(), images, steps=1, **options)
    agrees(snn, images, 1)
    called = [node.target for node in snn.fuse(images).graph.nodes if node.op != "call_module"]
    assert {"avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean"}.isdisjoint(
        str(target) for target in called
    )
    found = measure(snn, [(images, torch.zeros(4))], steps=1, device="cpu")
    assert [operation.name for operation in found.operations] == ["a", "b", "c"]


@pytest.mark.parametrize("options", [ONE, EACH])
@pytest.mark.parametrize("kind", ["Avg", "Max"])
def test_adaptive_pools_are_written_as_the_pools_that_they_equal(kind, options, tmp_path):
    """Those whose windows are alike and do not overlap: 8×8 to 4×2, but not 8×8 to 3×3, nor to 16×16."""
    adaptive, ordinary = getattr(nn, f"Adaptive{kind}Pool2d"), getattr(nn, f"{kind}Pool2d")
    torch.manual_seed(0)
    layers = [nets.Normalize((121,), (1 / 64,)), nn.Conv2d(3, 8, 3), nn.ReLU(), adaptive((4, 2)), nn.Conv2d(8, 8, 1)]
    cnn = nn.Sequential(*layers, nn.ReLU(), adaptive(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randint(256, (4, 3, 10, 10), dtype=torch.uint8)
    snn = to_spiking(cnn, images, steps=1, **options)
    agrees(copy.deepcopy(snn).double(), images, 1)
    pools = [module for module in snn.fuse(images).modules() if isinstance(module, ordinary)]
    assert [pool.kernel_size for pool in pools] == [(2, 4), (4, 2)]
    assert to_onnx(snn, tmp_path / "net.onnx", images, form="int8").in_float == {}
    for size in (3, 16):
        cnn[3], cnn[6] = adaptive(size), nn.Identity()
        cnn[8] = nn.Linear(8 * size * size, 4)
        snn = to_spiking(cnn, images, steps=1, **options)
        agrees(copy.deepcopy(snn).double(), images, 1)
        assert [type(module) for module in snn.fuse(images).modules() if "Pool" in type(module).__name__] == [adaptive]


@pytest.mark.parametrize("steps", [1, 3])
def test_fused_neurons_integrate_in_double_precision_where_others_do(steps):
    lif, current = LIF(1.0, initial=0.0), torch.full((steps, 1), 1 + 1e-10, dtype=torch.float64)
    assert torch.equal(Fire(lif, steps, static=False)(current), lif(current, steps))
    assert lif(current, steps)[0] == 1


class Turned(nn.Module):
    """Concatenates what one operation gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.cat(torch.relu(self.conv(x)).chunk(2, 1)[::-1], 1)
        return self.fc(x.mean((2, 3)).view(-1, self.conv.weight.shape[0]))


def test_a_concatenation_of_what_one_operation_gives_and_a_size_of_weights():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    agrees(to_spiking(Turned().double().eval(), images, steps=2, **ONE), images, 2)


def test_hooks_are_refused():
    x = torch.randn(4, 3, 8, 8)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    cnn[0].register_forward_hook(lambda _module, _inputs, out: 2 * out)
    with pytest.raises(ValueError, match=r"Conv2d 0 has forward hooks"):
        to_spiking(cnn, x, steps=1).fuse(x)


def test_a_pool_over_features_is_no_pool_over_each_channel():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 4, 4)
    for pool in (nn.MaxPool1d(2), nn.AvgPool1d(2)):
        cnn = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), pool, nn.Linear(8, 3)).eval()
        agrees(to_spiking(cnn, x, steps=1), x, 1)


def test_a_network_in_bf16():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    x = torch.randn(4, 3, 8, 8).bfloat16()
    for strategy in ("percentile", "channel-percentile"):
        snn = to_spiking(nn.Sequential(*layers).bfloat16().eval(), x, steps=1, thresholds=strategy)
        assert snn.fuse(x)(x).dtype == torch.bfloat16


class NormReLU(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


@pytest.mark.parametrize("norm", ["keep", "fold"])
def test_a_leaf_that_is_more_than_its_batch_norm_stays_whole(norm):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    layers = nn.Conv2d(3, 4, 3), NormReLU(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    cnn = randomise_(nn.Sequential(*layers)).double().eval()
    snn = to_spiking(cnn, x, steps=2, norm=norm, thresholds="max", leaf_modules=(NormReLU,))
    assert not snn.report["_1"].became.startswith("folded")
    with torch.no_grad():
        torch.testing.assert_close(snn(x, steps=500), cnn(x), rtol=0, atol=0.02 * cnn(x).abs().max().item())
    agrees(snn, x, 2)
