"""Conversion, and fusing, against an independent simulation that runs the user's own forward once per timestep: whole
architectures, and each operation that converts; and what is refused, with the line that calls it."""

import copy
import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.architectures import ARCHITECTURES, build, has_max_pool, randomise_
from tests.simulation import simulate
from tests.test_conversion import Shared
from unitstep import Spiking, record, to_onnx, to_spiking
from unitstep.conversion import _is_users
from unitstep.measurement import measure

STEPS = (1, 2, 5)
AWAKE: dict[str, Any] = {  # thresholds at which every layer spikes
    "steps": 5, "thresholds": "percentile", "percentile": 80, "scale": 0.7, "initial": 0.0,
}  # fmt: skip


def agrees(snn: Spiking, cnn: Callable[[Tensor], Tensor], images: Tensor, after: Any = None, **options: Any) -> None:
    """All spikes of `snn` are those of the simulation, and so are its logits (once those have gone through `after`)."""
    for steps in STEPS:
        given = images.clone()
        with record(snn) as seen, torch.no_grad():
            logits = snn(given, steps=steps)
        assert torch.equal(given, images)
        thresholds = [lif.threshold for lif in snn.lifs.values()]
        expected, fired = simulate(cnn, images, thresholds, steps=steps, **options)
        assert list(seen) == list(snn.lifs)
        for (name, layer), spikes in zip(seen.items(), fired, strict=True):
            assert layer.spikes.shape == spikes.shape
            assert not (layer.spikes != spikes).any(), f"other spikes in {name} at T = {steps}"
        expected = expected if after is None else after(expected)
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(snn.fuse(images, steps)(images), logits, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------- whole architectures


@pytest.mark.parametrize("norm", ["keep", "fold"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_its_simulation_spike_for_spike(name, norm):
    cnn, images = build(name)
    agrees(to_spiking(cnn, images, norm=norm, **AWAKE), cnn, images)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not has_max_pool(build(name)[0])])
def test_with_the_largest_current_as_threshold_more_steps_come_nearer_to_the_cnn(name):
    cnn, images = build(name)
    snn = to_spiking(cnn, images, steps=20, thresholds="max", initial=0.5)
    with torch.no_grad():
        wanted = cnn(images)
        error = {T: ((snn(images, steps=T) - wanted).norm() / wanted.norm()).item() for T in (4, 64, 256)}
    assert error[64] < error[4] / 2
    assert error[256] < error[64] / 2
    assert error[256] < 0.1


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not has_max_pool(build(name)[0])])
def test_by_default_too_more_steps_come_nearer(name):
    cnn, images = build(name)
    snn = to_spiking(cnn, images, steps=64, norm="fold")
    with torch.no_grad():
        wanted = cnn(images)
        error = {T: ((snn(images, steps=T) - wanted).norm() / wanted.norm()).item() for T in (4, 16, 64)}
    assert error[64] < error[16] / 2 < error[4] / 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vgg_bn-average", "resnet-basic", "mobilenet_v2", "densenet", "stochastic-depth"])
def test_an_architecture_stays_as_it_was(name, training):
    cnn, images = build(name)
    cnn.train(training)

    def flags() -> dict[str, Any]:
        return {name: (m.training, getattr(m, "inplace", None), vars(m).keys()) for name, m in cnn.named_modules()}

    weights, before, given = copy.deepcopy(cnn.state_dict()), flags(), images.clone()
    for norm in ("keep", "fold"):
        snn = to_spiking(cnn, images, norm=norm, max_pool="average", **AWAKE)
        assert snn.training == training
    after = cnn.state_dict()
    assert list(weights) == list(after)
    assert all(torch.equal(weights[key], after[key]) for key in weights)
    assert flags() == before
    assert torch.equal(images, given)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision.models", "resnet18"),
        ("torchvision.models", "vgg16_bn"),
        ("torchvision.models", "mobilenet_v2"),
        ("timm", "resnet18"),
    ],
)
def test_the_libraries_own_networks(library, name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models = importlib.import_module(library)
    except Exception as error:  # torchvision beside another build of torch raises a RuntimeError
        pytest.skip(f"{library} cannot be imported: {error}")
    cnn = models.create_model(name) if library == "timm" else getattr(models, name)(weights=None)
    cnn = randomise_(cnn).double().eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for norm in ("keep", "fold"):
        agrees(to_spiking(cnn, images, norm=norm, **AWAKE), cnn, images)


# ---------------------------------------------------------------------------------------------------- single operations

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SIGNALS = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Around(nn.Module):
    """An operation on currents (first) or on spikes; then two more layers."""

    def __init__(self, operation: Callable[[Tensor], Tensor], images: Tensor = IMAGES, first: bool = False) -> None:
        super().__init__()
        self.stem = (nn.Conv2d if images.dim() == 4 else nn.Conv1d)(3, 4, 3, padding=1).double()
        operation = operation if isinstance(operation, nn.Module) else Do(operation)
        self.operation, self.first = operation.double().eval(), first
        with torch.no_grad():
            features = self._features(images).flatten(1).shape[1]
        self.hidden, self.head = nn.Linear(features, 8), nn.Linear(8, 3)
        randomise_(self).double().eval()

    def _features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.operation(x)) if self.first else self.operation(F.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self._features(x), 1)
        return self.head(torch.relu(self.hidden(x)))


class Rectified(nn.Module):
    """Two convolutions with the same rectifier, one module if it is one, behind each."""

    def __init__(self, rectify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rectify = rectify
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 3)
        randomise_(self).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rectify(self.b(self.rectify(self.a(x)))).flatten(1))


RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "relu": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "input=": lambda x: F.relu(input=x),
    "clamp(0)": lambda x: x.clamp(0),
    "torch.clamp(min=0)": lambda x: torch.clamp(x, min=0.0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "clip": lambda x: torch.clip(x, 0),
}
CAPPED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "ReLU6": (nn.ReLU6(), 6),
    "ReLU6 in place": (nn.ReLU6(inplace=True), 6),
    "F.relu6": (F.relu6, 6),
    "F.relu6 in place": (lambda x: F.relu6(x, inplace=True), 6),
    "Hardtanh(0, 2)": (nn.Hardtanh(0, 2), 2),
    "Hardtanh(0, 0.4)": (nn.Hardtanh(0, 0.4, inplace=True), 0.4),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0.0, 2.0), 2),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, 0.0, 2.0), 2),
    "clamp(0, 3)": (lambda x: x.clamp(0, 3), 3),
    "clamp_(0, 3)": (lambda x: x.clamp_(0, 3), 3),
    "torch.clamp": (lambda x: torch.clamp(x, min=0, max=0.3), 0.3),
    "relu, clamp": (lambda x: x.relu().clamp(max=0.3), 0.3),
    "relu, clamp_max": (lambda x: F.relu(x).clamp_max(2), 2),
    "relu, clamp_ in place": (lambda x: F.relu(x, inplace=True).clamp_(max=2), 2),
}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_a_rectifier(name):
    cnn = Rectified(RECTIFIERS[name])
    snn = to_spiking(cnn, IMAGES, **AWAKE)
    assert [row.became for row in snn.report.rows if row.name in snn.lifs] == ["neuron"] * 2
    agrees(snn, cnn, IMAGES)


@pytest.mark.parametrize("name", CAPPED)
def test_a_rectifier_with_a_cap(name):
    rectify, cap = CAPPED[name]
    cnn = Rectified(rectify)
    snn = to_spiking(cnn, IMAGES, **AWAKE)
    assert [(row.became, row.cap) for row in snn.report.rows if row.name in snn.lifs] == [
        (f"neuron, capped at {cap:g}", cap)
    ] * 2
    assert all(lif.threshold.item() <= cap * (1 + 1e-6) for lif in snn.lifs.values())
    agrees(snn, cnn, IMAGES)


@pytest.mark.parametrize("name", ["ReLU", *CAPPED])  # the other rectifiers are the same neurons: test_a_rectifier
def test_a_rectifier_comes_nearer_with_more_steps(name):
    cnn = Rectified(RECTIFIERS[name] if name in RECTIFIERS else CAPPED[name][0])
    snn = to_spiking(cnn, IMAGES, steps=20, thresholds="max", initial=0.5)
    with torch.no_grad():
        wanted = cnn(IMAGES.clone())
        error = {T: (snn(IMAGES, steps=T) - wanted).norm() / wanted.norm() for T in (4, 64, 256)}
    assert error[256] < error[64] / 2 < error[4] / 4


APPROXIMATED: dict[str, Callable[[Tensor], Tensor]] = {
    "LeakyReLU": nn.LeakyReLU(0.1),
    "LeakyReLU in place": nn.LeakyReLU(inplace=True),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU(approximate="tanh"),
    "Hardswish": nn.Hardswish(),
    "PReLU": nn.PReLU(4),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.hardswish": F.hardswish,
    "F.prelu": lambda x: F.prelu(x, torch.full((1,), 0.1, dtype=torch.float64)),
    "torch.prelu": lambda x: torch.prelu(x, torch.full((1,), 0.1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", APPROXIMATED)
def test_an_approximation_on_request_only(name):
    cnn = Rectified(APPROXIMATED[name])
    with pytest.raises(ValueError, match="approximate=True") as refusal:
        to_spiking(cnn, IMAGES, **AWAKE)
    assert name.split()[0].removeprefix("F.").removeprefix("torch.") in str(refusal.value)
    snn = to_spiking(cnn, IMAGES, approximate=True, **AWAKE)
    assert len(snn.lifs) == 2
    agrees(snn, cnn, IMAGES, approximations=True)


def _halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat((b, a), 1)


def _thirds(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [1, 2, 1], dim=1)
    return torch.cat([c, a, b], dim=1)


def _shuffled(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def _add_in_place(x: Tensor) -> Tensor:
    x = x * 0.5
    x += x.flip(1)
    return x


ON_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "Conv2d": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "dilated": nn.Conv2d(4, 4, 3, dilation=2, padding="same"),
    "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    "F.conv2d": lambda x: F.conv2d(x, torch.full((2, 4, 2, 2), 0.1, dtype=torch.float64)),
    "Linear on the last dimension": nn.Linear(8, 5),
    "a constant by name": lambda x: torch.add(x, other=0.5),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "MaxPool2d": nn.MaxPool2d(3, 2, 1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((3, 2)),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "mean of channels": lambda x: torch.mean(x, dim=1, keepdim=True),
    "sum": lambda x: x.sum(-1) / x.size(-1),
    "amax": lambda x: x.amax((2, 3)),
    "Dropout": nn.Dropout(0.5),
    "Dropout2d": nn.Dropout2d(0.5),
    "F.dropout": lambda x: F.dropout(x, 0.5, training=False),
    "Flatten": nn.Flatten(),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "flatten": lambda x: x.flatten(1, 2),
    "reshape": lambda x: x.reshape(x.shape[0], 16, -1),
    "view": lambda x: x.view(x.size(0), x.size(1) * x.size(2) // 2, -1),
    "view of -1 rows": lambda x: x.view(-1, 4 * 8 * 8),
    "channels into the batch": lambda x: x.view(x.size(0) * x.size(1), 1, 8, 8).relu().view(x.size(0), 4, 8, 8),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: torch.transpose(x, 1, 3),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "chunk": _halves,
    "split": _thirds,
    "unbind": lambda x: torch.stack((x.unbind(1)[3], x.unbind(1)[0]), 1),
    "channel shuffle": _shuffled,
    "ChannelShuffle": nn.ChannelShuffle(2),
    "PixelShuffle": nn.PixelShuffle(2),
    "slice of channels": lambda x: x[:, 1:3],
    "every second": lambda x: x[:, ::2, ::2],
    "ellipsis": lambda x: x[..., 0],
    "new dimension": lambda x: x[:, None].squeeze(1),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "Upsample": nn.Upsample(scale_factor=2),
    "interpolate": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"),
    "flip and roll": lambda x: torch.roll(x.flip(1), 1, 2),
    "x + x": lambda x: x + x,
    "torch.add": lambda x: torch.add(x, x.flip(1), alpha=2),
    "sub": lambda x: 1 - x / 2,
    "neg": lambda x: -(2 * x) + 0.5,
    "in place": _add_in_place,
    "cat": lambda x: torch.cat([x, -x], dim=1),
    "concat": lambda x: torch.concat((x, x[:, :1]), 1),
    "stack": lambda x: torch.stack([x, 0.5 * x], dim=-1),
}
ON_SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "Conv1d": nn.Conv1d(4, 6, 3, stride=2, dilation=2),
    "grouped": nn.Conv1d(4, 4, 3, groups=2, padding=1),
    "depthwise": nn.Conv1d(4, 8, 3, groups=4),
    "transposed": nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1),
    "BatchNorm1d": nn.BatchNorm1d(4),
    "BatchNorm1d on vectors": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
    "AvgPool1d": nn.AvgPool1d(2),
    "MaxPool1d": nn.MaxPool1d(3, 2),
    "F.avg_pool1d": lambda x: F.avg_pool1d(x, 4, 2),
    "F.max_pool1d": lambda x: F.max_pool1d(x, 2),
    "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(3),
    "AdaptiveMaxPool1d": nn.AdaptiveMaxPool1d(3),
    "Dropout1d": nn.Dropout1d(0.5),
}
OPERATIONS = [(name, ON_IMAGES[name], IMAGES) for name in ON_IMAGES]
OPERATIONS += [(f"{name}, 1-D", ON_SIGNALS[name], SIGNALS) for name in ON_SIGNALS]


@pytest.mark.parametrize("first", [True, False], ids=["on currents", "on spikes"])
@pytest.mark.parametrize(
    ("operation", "images"), [case[1:] for case in OPERATIONS], ids=[case[0] for case in OPERATIONS]
)
def test_an_operation(operation, images, first):
    cnn = Around(copy.deepcopy(operation), images, first)
    agrees(to_spiking(cnn, images, **AWAKE), cnn, images)


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        ([nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], 0),
        ([nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6, affine=False)], 0),
        ([nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6)], 0),
        ([nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)], 0),
        ([nn.ConvTranspose2d(4, 4, 2, groups=4), nn.BatchNorm2d(4)], 0),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], 0),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2, stride=2, dilation=2, bias=False)], 0),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)], 1),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")], 1),
        ([nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)], 1),
        ([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.AvgPool2d(2)], 2),
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], 0),
        ([nn.Flatten(), nn.Linear(256, 6), nn.BatchNorm1d(6)], 0),
        ([nn.Flatten(), nn.Linear(256, 6), nn.BatchNorm1d(6, affine=False)], 0),
        ([nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 6)], 0),
    ],
    ids=lambda value: " ".join(type(layer).__name__ for layer in value) if isinstance(value, list) else None,
)
def test_folding_a_batch_norm_where_it_is_exact(layers, left):
    cnn = Around(nn.Sequential(*copy.deepcopy(layers)))
    kept, folded = (to_spiking(cnn, IMAGES, norm=norm, **AWAKE) for norm in ("keep", "fold"))
    agrees(kept, cnn, IMAGES)
    agrees(folded, cnn, IMAGES)
    norms = [module for module in folded.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == left
    rows = [row for row in folded.report.rows if row.kind.startswith("BatchNorm")]
    assert sum(row.became.startswith("folded into") for row in rows) == len(rows) - left
    assert sum(row.became.startswith("kept") for row in rows) == left


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(2), nn.BatchNorm1d(4), nn.Linear(64, 6)],
        [nn.AvgPool2d(4), nn.Flatten(2), nn.BatchNorm1d(4), nn.Linear(4, 6)],
        [nn.Flatten(2), nn.Linear(64, 4), nn.BatchNorm1d(4)],
        [nn.Flatten(2), nn.Linear(64, 6), nn.BatchNorm1d(4)],
        [nn.BatchNorm2d(4), nn.Linear(8, 6)],
    ],
    ids=lambda layers: " ".join(type(layer).__name__ for layer in layers),
)
def test_a_linear_layer_acts_on_the_last_dimension_and_a_batch_norm_on_the_second(layers):
    """So neither folds into the other, even where the two are of the same length. To refuse would do, too."""
    cnn = Around(nn.Sequential(*copy.deepcopy(layers)))
    try:
        snn = to_spiking(cnn, IMAGES, norm="fold", **AWAKE)
    except ValueError as error:
        refusal = str(error)
    else:
        return agrees(snn, cnn, IMAGES)
    assert re.match(r"(Linear|BatchNorm.d) operation[._]", refusal)


class Interleaved(nn.Module):
    """All of a branch comes between another one's convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = F.relu(self.norm_b(self.b(x)))
        return self.head(F.relu(self.norm_a(a) + b).flatten(1))


class SharedNorm(nn.Module):
    """One batch norm, and one convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.conv(x)).flatten(1))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.conv(input=x))
        return self.head(input=torch.flatten(input=F.relu(input=x), start_dim=1))


class LateCap(nn.Module):
    """Something else happens between a ReLU and its cap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = self.b(x)
        return self.head(F.relu(a.clamp(max=6) + b).flatten(1))


@pytest.mark.parametrize("norm", ["keep", "fold"])
@pytest.mark.parametrize("cls", [Interleaved, SharedNorm, ByKeyword, LateCap, Shared])
def test_the_order_of_calls_does_not_matter(cls, norm):
    cnn = randomise_(cls()).double().eval()
    agrees(to_spiking(cnn, IMAGES, norm=norm, **AWAKE), cnn, IMAGES)


@pytest.mark.parametrize(
    ("maximum", "average", "images"),
    [
        (nn.MaxPool2d(2), nn.AvgPool2d(2), IMAGES),
        (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGES),
        (nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True), IMAGES),
        (lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), IMAGES),
        (
            lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            IMAGES,
        ),
        (nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d(2), IMAGES),
        (lambda x: F.adaptive_max_pool2d(x, (2, 4)), lambda x: F.adaptive_avg_pool2d(x, (2, 4)), IMAGES),
        (lambda x: x.amax((2, 3)), lambda x: x.mean((2, 3)), IMAGES),
        (lambda x: torch.amax(x, dim=1), lambda x: torch.mean(x, dim=1), IMAGES),
        (nn.MaxPool1d(3, 2), nn.AvgPool1d(3, 2), SIGNALS),
        (lambda x: F.max_pool1d(x, 2), lambda x: F.avg_pool1d(x, 2), SIGNALS),
        (nn.AdaptiveMaxPool1d(4), nn.AdaptiveAvgPool1d(4), SIGNALS),
    ],
)
def test_average_pools_in_the_places_of_max_pools(maximum, average, images):
    cnn = Around(maximum, images)
    swapped = copy.deepcopy(cnn)
    swapped.operation = average if isinstance(average, nn.Module) else Do(average)
    snn = to_spiking(cnn, images, max_pool="average", **AWAKE)
    agrees(snn, swapped, images)
    assert any("average pool in its place" in row.became for row in snn.report.rows)
    assert not any(
        "average pool in its place" in row.became for row in to_spiking(swapped, images, **AWAKE).report.rows
    )


@pytest.mark.parametrize(
    "options",
    [
        {"thresholds": "channel-percentile"},
        {"thresholds": "mse"},
        {"initial": 0.5},
        {"readout": "sum"},
        {"height": "unit"},
        {"height": "unit", "initial": 0.25, "readout": "sum", "thresholds": "channel-percentile"},
    ],
    ids=str,
)
def test_options(options):
    cnn, images = build("resnet-basic")
    snn = to_spiking(cnn, images, **{**AWAKE, **options})
    if options.get("thresholds") == "channel-percentile":
        assert all(lif.threshold.dim() == 1 for lif in snn.lifs.values())
    agrees(snn, cnn, images, **{key: options[key] for key in options.keys() - {"thresholds"}})


class Ends(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.end = Rectified(F.relu), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize(
    "end",
    [
        nn.LogSoftmax(dim=1),
        nn.Softmax(dim=-1),
        nn.Sigmoid(),
        lambda x: F.log_softmax(x, dim=1),
        lambda x: torch.softmax(x, 1),
        lambda x: x.log_softmax(1),
        torch.sigmoid,
    ],
)
def test_a_softmax_at_the_end_comes_after_the_readout(end, readout):
    cnn = Ends(end)
    agrees(to_spiking(cnn, IMAGES, readout=readout, **AWAKE), cnn.body, IMAGES, after=end, readout=readout)


# ------------------------------------------------------------------------------------------------------------- in place


def _discarded_module(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    net.relu(x)
    x = net.b(x)
    net.relu(x)  # the same module again
    return x


def _pre_activation(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    x = x + net.b(net.relu(x))  # what is added to has been rectified
    return x + net.c(net.relu(x))


def _discarded_call(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    F.relu(x, inplace=True)
    x = net.b(x)
    x.clamp_(min=0)
    return x


def _torch_clamp_min_(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    torch.clamp_min_(x, 0)
    return net.b(x)


def _augmented_add(net: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    y = x
    y += net.b(x)  # x changes, too
    return net.c(y) + x


def _augmented_mul(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    y = x
    y *= 2
    return net.c(x)


def _augmented_size(net: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    n = k = x.size(1)
    k -= 1  # a number is no tensor: n stays
    return torch.cat([x[:, k:n], x[:, :k]], 1)


def _view_changed(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    first = x[:, :2]
    first += 1
    return net.c(x)


def _view_of_changed(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    flat = x.flatten(2)
    x += 1
    return F.relu(flat)


def _through_stochastic_depth(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    y = net.drop_path(x)  # does nothing in evaluation, so y is x
    y.add_(1)
    return F.relu(net.c(x)) + y


def _abs_(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    x.abs_()
    return net.c(x)


def _elu_(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    F.elu_(x)
    return net.c(x)


def _out(net: nn.Module, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    torch.add(x, 1, out=x)
    return net.c(x)


def _the_images(net: nn.Module, x: Tensor) -> Tensor:
    x.sub_(0.5).mul_(2)
    return F.relu(net.a(x))


def _chain(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    y = net.b(x)
    F.relu_(x)
    x.add_(-0.1)
    x.relu_()
    return net.c(x) + y


def _viewed_afterwards(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    F.relu_(x)
    y = x.flatten(2)
    return net.c(y.view(x.size(0), 4, 8, 8))


def _viewed_and_changed_again(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    F.relu_(x)
    y = x.flatten(2)
    x.sub_(0.3).relu_()
    return net.c(y.view(x.size(0), 4, 8, 8))


def _accumulated(net: nn.Module, x: Tensor) -> Tensor:
    """0 + x is another tensor, which changes; x does not."""
    x = net.c(F.relu(net.a(x)))
    y: Any = 0
    y += x
    y += F.relu(x)
    return y + net.b(F.relu(x))


def _read_size_afterwards(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    y = F.relu(x.flatten(1), inplace=True)
    return net.c(y.view(y.size(0), x.size(1), x.size(2), x.size(3)))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class InPlace(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.relu, self.drop_path, self.head = nn.ReLU(inplace=True), DropPath(), nn.Linear(256, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, x)
        return self.head(F.relu(x).flatten(1))


MUST_CONVERT = [
    _discarded_module, _pre_activation, _discarded_call, _augmented_add, _augmented_mul, _augmented_size, _the_images,
    _chain, _viewed_afterwards, _read_size_afterwards, _accumulated,
]  # fmt: skip
MAY_BE_REFUSED = [
    _torch_clamp_min_, _view_changed, _view_of_changed, _viewed_and_changed_again, _through_stochastic_depth, _abs_,
    _elu_, _out,
]  # fmt: skip


@pytest.mark.parametrize("body", [*MUST_CONVERT, *MAY_BE_REFUSED], ids=lambda body: body.__name__[1:])
def test_what_changes_in_place_changes_for_everyone_or_is_refused(body):
    cnn = randomise_(InPlace(body)).double().eval()
    try:
        snn = to_spiking(cnn, IMAGES, **AWAKE)
    except ValueError:
        if body in MUST_CONVERT:
            raise
    else:
        agrees(snn, cnn, IMAGES)


# ------------------------------------------------------------------------------------------------------------- refusals


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.fc2(F.relu(self.fc1(scale)))
        scale = F.hardsigmoid(scale)  # refused: hardsigmoid
        return scale * x  # refused: mul


class Halved(nn.Module):
    """Stochastic depth as it was first written: it scales in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


Halved.__name__ = "DropPath"


class AlwaysDropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)  # refused: dropout


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x  # refused: square


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k, dim=-1)  # refused: softmax
        return v @ weights  # refused: matmul


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm([4, 8, 8]), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)  # refused: layer norm
        return self.group(x)  # refused: group norm


class Batch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)  # refused: mean of the images


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x  # refused: branch


class InAMethod(nn.Module):
    def forward_features(self, x: Tensor) -> Tensor:
        return torch.sin(x)  # refused: in a method

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)


def _helper(x: Tensor) -> Tensor:
    return torch.cos(x)  # refused: in a function


class InAFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _helper(x)


def _line(mark: str) -> int:
    """The number of this file's line that ends with a mark."""
    lines = inspect.getsource(inspect.getmodule(_line)).splitlines()  # type: ignore[arg-type]
    (line,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"# refused: {mark}"))
    return line


@pytest.mark.parametrize("first", [True, False], ids=["on currents", "on spikes"])
@pytest.mark.parametrize(
    ("module", "refused"),
    [
        (SqueezeExcitation(), {"hardsigmoid": "hardsigmoid", "mul": "mul"}),
        (Square(), {"mul": "square"}),
        (AlwaysDropped(), {"dropout": "dropout"}),
        (Attention(), {"softmax": "softmax", "matmul": "matmul"}),
        (Norms(), {"LayerNorm": "layer norm", "GroupNorm": "group norm"}),
        (Branches(), {"": "branch"}),
        (InAMethod(), {"sin": "in a method"}),
        (InAFunction(), {"cos": "in a function"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_refusal_names_the_operation_and_its_line(module, refused, first):
    with pytest.raises(ValueError, match=r"test_architectures\.py") as refusal:
        to_spiking(Around(copy.deepcopy(module), first=first), IMAGES, **AWAKE)
    for kind, mark in refused.items():
        assert re.search(rf"{kind}\b.*test_architectures\.py:{_line(mark)}\b", str(refusal.value))


def test_stochastic_depth_is_left_out_only_if_it_changes_nothing():
    with pytest.raises(ValueError, match=r"DropPath .*changes values in evaluation"):
        to_spiking(Around(Halved()), IMAGES, **AWAKE)


def test_lines_of_libraries_are_a_users_unless_the_library_is_torch():
    site = Path(torch.__file__).parent.parent
    assert _is_users(str(site / "torchvision" / "models" / "resnet.py"))
    assert _is_users("<ipython-input-1-abc>")
    assert not _is_users(str(site / "torch" / "nn" / "functional.py"))


class OwnShapes(nn.Module):
    """A weight that is used twice, a current of one number per image, and channels that go among the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(192, 1)
        self.head = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = F.relu(self.norm(self.conv(x)))
        y = F.relu(F.conv2d(y, self.conv.weight))
        gate = F.relu(self.gate(y.flatten(1)).squeeze(1))
        y = F.relu(y.view(b * c, 1, h, w)).view(b, c, h, w)
        return self.head(y.flatten(1)) + gate.unsqueeze(1)


@pytest.mark.parametrize("thresholds", ["channel-percentile", "percentile"])
@pytest.mark.parametrize("norm", ["keep", "fold"])
def test_own_shapes(norm, thresholds):
    cnn = randomise_(OwnShapes()).double().eval()
    snn = to_spiking(cnn, IMAGES, norm=norm, **{**AWAKE, "thresholds": thresholds})
    agrees(snn, cnn, IMAGES)
    with record(snn) as seen, torch.no_grad():
        snn(IMAGES, steps=5)
    for name, layer in seen.items():
        per_image = layer.spikes.sum().item() / len(IMAGES)
        assert snn.report[name].rate == pytest.approx(per_image / math.prod(snn.report[name].shape))


def test_own_shapes_are_measured_and_exported(tmp_path):
    cnn, images = randomise_(OwnShapes()).eval(), IMAGES.float()
    snn = to_spiking(cnn, images, **{**AWAKE, "thresholds": "percentile"})
    found = measure(snn, [(images, torch.zeros(len(images)))], steps=1, device="cpu")
    assert {layer.name: layer.neurons for layer in found.layers}["relu_2"] == 1
    assert to_onnx(snn, tmp_path / "net.onnx", images, form="float").changed == 0


def test_one_dimension_is_measured():
    cnn = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(28, 3),
    )  # fmt: skip
    signals = torch.randn(8, 2, 20)
    snn = to_spiking(randomise_(cnn).eval(), signals, steps=2)
    found = measure(snn, [(signals, torch.zeros(8))], steps=2, device="cpu")
    assert [layer.neurons for layer in found.layers] == [72, 28]


class Mixer(nn.Module):
    def forward(self, currents: Tensor, spikes: Tensor) -> Tensor:
        return currents + 2 * spikes if spikes.sum() > -1 else spikes  # a branch: it cannot be traced


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mixer, self.head = *(nn.Conv2d(3, 3, 1) for _ in range(2)), Mixer(), nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(F.relu(self.mixer(x, self.b(F.relu(x)))).flatten(1))


def test_a_leaf_module_runs_at_each_step_on_currents_and_spikes():
    cnn = randomise_(Mixed()).double().eval()
    with pytest.raises(ValueError, match=r"leaf_modules=\('mixer',\)"):
        to_spiking(cnn, IMAGES, **AWAKE)
    for leaf in ("mixer", Mixer):
        agrees(to_spiking(cnn, IMAGES, leaf_modules=(leaf,), **AWAKE), cnn, IMAGES)


def test_a_branch_in_the_network_itself_needs_a_module_of_its_own():
    with pytest.raises(ValueError, match=r"put it into a module of its own.*leaf_modules=\(its name,\)"):
        to_spiking(Branches(), IMAGES)


def test_an_operation_on_several_images_is_refused_once_there_are_spikes():
    with pytest.raises(
        ValueError, match=rf"mean .*\(test_architectures\.py:{_line('mean of the images')}\) joins or cuts"
    ):
        to_spiking(Around(Batch()), IMAGES, **AWAKE)
    cnn = Around(Batch(), first=True)  # before, it is what it is
    agrees(to_spiking(cnn, IMAGES, **AWAKE), cnn, IMAGES)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.relu(left) + right


def test_two_inputs_are_refused_by_name():
    with pytest.raises(ValueError, match=r"takes 2 inputs \(left, right\)"):
        to_spiking(TwoInputs(), IMAGES)


class StemMean(nn.Module):
    """Adds a number, or a picture, that the stem makes of all images to what spikes."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.of = nn.Conv2d(1, 1, 1), nn.Linear(1, 3), of

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.relu(self.conv(x)) + self.of(x))
        return self.head(x.flatten(1).mean(1, keepdim=True))


def _tuple_of_both(x: Tensor) -> Tensor:
    parts = (x + 1).chunk(2, 2)[:1] + (F.relu(x)[:, :, 1:],)  # noqa: RUF005
    return torch.cat(parts, 2)


@pytest.mark.parametrize(
    "of", [lambda x: x.mean(), lambda x: x.mean(0), lambda x: x[0], lambda x: x[:1], _tuple_of_both],
    ids=["mean of all", "mean of the images", "one image", "a batch of one", "tuple"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (3, 1, 4, 1), (3, 1, 1, 4)], ids=str)
def test_what_the_stem_makes_of_all_images_is_exact_or_refused(of, shape):
    if of is _tuple_of_both and shape[2] == 1:
        pytest.skip("there is nothing to cut in two")
    images = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cnn = randomise_(StemMean(of)).double().eval()
    with torch.no_grad():
        cnn.conv.weight.abs_()
    try:
        snn = to_spiking(cnn, images, **AWAKE)
    except ValueError as error:
        refusal = str(error)
    else:
        return agrees(snn, cnn, images)
    assert re.match("(add|cat|getitem|mean) .*test_architectures.py:", refusal)
