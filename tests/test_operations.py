"""Counts of operations against a simulation in which every spike walks to each output that it reaches."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.architectures import ARCHITECTURES, build
from tests.simulation import simulate
from unitstep import nets, record, to_spiking
from unitstep.conversion import trace
from unitstep.measurement import measure
from unitstep.operations import _gathered, operations

# A set of spikes: how many there are at each place (channel, row, column).


def place(spikes):
    return Counter({tuple(int(i) for i in at): 1 for at in spikes.nonzero()})


def walk_conv(spikes, conv, shape):
    """Additions that the spikes cause: through each tap of the kernel, a spike reaches one output, or none."""
    height, width = (
        (shape[i] + 2 * conv.padding[i - 1] - conv.dilation[i - 1] * (conv.kernel_size[i - 1] - 1) - 1)
        // conv.stride[i - 1] + 1
        for i in (1, 2)
    )  # fmt: skip
    total = 0
    for (_, y, x), number in spikes.items():
        for j, i in product(range(conv.kernel_size[0]), range(conv.kernel_size[1])):
            row, no_row = divmod(y + conv.padding[0] - j * conv.dilation[0], conv.stride[0])
            column, no_column = divmod(x + conv.padding[1] - i * conv.dilation[1], conv.stride[1])
            if not no_row and not no_column and 0 <= row < height and 0 <= column < width:
                total += number * conv.out_channels // conv.groups
    return total


def walk_pool(spikes, shape, kernel, stride, padding=0):
    """Where the spikes are after a pool that adds them up."""
    pooled = Counter()
    size = [(shape[i] + 2 * padding - kernel) // stride + 1 for i in (1, 2)]
    for (c, y, x), number in spikes.items():
        for v, u in product(range(size[0]), range(size[1])):
            if 0 <= y + padding - v * stride < kernel and 0 <= x + padding - u * stride < kernel:
                pooled[c, v, u] += number
    return pooled, (shape[0], *size)


def joined(first, second, channels):
    moved = Counter({(c + channels, y, x): number for (c, y, x), number in second.items()})
    return first + moved


class Chain(nn.Module):
    """Average pool, groups, stride, dilation, a max pool, and a linear layer."""

    def __init__(self, draw):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.kernel, self.stride, self.padding = draw["kernel"], draw["stride"], draw["kernel"] // 2
        self.conv2 = nn.Conv2d(4, 4, draw["size"], draw["step"], draw["border"], groups=draw["groups"])
        self.conv3 = nn.Conv2d(4, 3, 2, dilation=draw["step"], padding=1, bias=False)
        self.readout = nn.LazyLinear(3)

    def forward(self, x):
        x = F.avg_pool2d(torch.relu(self.conv1(x)), self.kernel, self.stride, self.padding)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2, 1)
        return self.readout(torch.flatten(torch.relu(self.conv3(x)), 1))

    def walk(self, spikes, shape):
        one, two, three = spikes
        pooled, smaller = walk_pool(place(one), shape, self.kernel, self.stride, self.padding)
        yield "conv2", walk_conv(pooled, self.conv2, smaller)
        maximum, size = walk_pool(place(two), two.shape, 2, 1)
        yield "conv3", walk_conv(Counter(dict.fromkeys(maximum, 1)), self.conv3, size)
        yield "readout", len(place(three)) * 3


class Residual(nn.Module):
    """Spikes that meet in an addition, in a concatenation, and in means over places."""

    def __init__(self, draw):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=draw["groups"])
        self.conv3 = nn.Conv2d(4, 2, draw["size"], padding=draw["border"])
        self.conv4 = nn.Conv2d(4 + 4, 3, 3, stride=draw["step"], padding=draw["border"])
        self.readout = nn.Linear(3 + 2, 3)

    def forward(self, x):
        a = torch.relu(self.conv1(x))
        b = torch.relu(self.conv2(a)) + a
        c = torch.relu(self.conv3(b))
        d = torch.relu(self.conv4(torch.cat([b, a], 1)))
        return self.readout(torch.cat([d.mean((2, 3)), c.mean((2, 3))], 1))

    def walk(self, spikes, shape):
        a, b, c, d = map(place, spikes)
        yield "conv2", walk_conv(a, self.conv2, shape)
        yield "conv3", walk_conv(a + b, self.conv3, shape)
        yield "conv4", walk_conv(joined(a + b, a, 4), self.conv4, (8, *shape[1:]))
        yield "readout", 3 * (sum(c.values()) + sum(d.values()))


DRAW = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([2, 3]), "stride": st.sampled_from([1, 2]), "size": st.sampled_from([1, 2, 3]),
        "step": st.sampled_from([1, 2]), "border": st.sampled_from([0, 1]), "groups": st.sampled_from([1, 2, 4]),
    }
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:layer .* emits no spike")
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([Chain, Residual]), DRAW, st.integers(1, 5))
def test_additions_are_those_of_spikes_that_walk(kind, draw, steps):
    torch.manual_seed(0)
    cnn, images = kind(draw), torch.randn(2, 2, 9, 8)
    cnn(images)
    for parameter in cnn.parameters():
        nn.init.normal_(parameter)
    snn = to_spiking(cnn, images, steps=steps, percentile=60, initial=0.5)
    found = operations(snn.fuse(images), images[:1])
    _, spikes = simulate(cnn, images, [lif.threshold for lif in snn.lifs.values()], steps=steps, initial=0.5)
    walked = Counter()
    for step, image in product(range(steps), range(2)):
        walked.update(dict(cnn.walk([layer[step, image] for layer in spikes], spikes[0].shape[2:])))
    assert found[0].input == "analog"
    assert [operation.name for operation in found[1:]] == list(walked)
    measured = measure(snn, [(images, torch.zeros(2).long())], steps=steps, device="cpu").operations
    assert [2 * row.additions for row in measured[1:]] == list(walked.values())


@pytest.mark.parametrize(("name", "macs"), [("vgg6", 108_765_184), ("vgg16", 338_403_328), ("resnet20", 215_699_456)])
def test_multiplications_are_those_of_the_paper(name, macs):
    cnn, images = nets.build(name, classes=10), torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    found = operations(to_spiking(cnn.eval(), images, steps=1, percentile=90).fuse(images), images)
    assert sum(operation.macs for operation in found) == macs
    assert sum(operation.macs for operation in operations(trace(cnn), images)) == macs
    assert [operation.input for operation in found].count("analog") == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_of_an_architecture_are_found(name):
    """By PyTorch's own counter; and what spikes feed, is fed by as many as there are."""
    cnn, images = build(name)
    with FlopCounterMode(display=False) as counter:
        cnn(images[:1])
    snn = to_spiking(cnn, images, steps=1, approximate=True)
    found = operations(snn.fuse(images), images[:1])
    assert sum(operation.macs for operation in found) == counter.get_total_flops() // 2
    for operation in found:
        if operation.input == "analog":
            assert not operation.fan_out
        else:
            ones = {source: torch.ones_like(reached) for source, reached in operation.fan_out.items()}
            assert operation.additions(ones) > 0
            assert set(operation.neurons) <= snn.lifs.keys()


def test_a_layer_behind_what_no_spike_is_left_of_is_analog():
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    nn.init.ones_(cnn[2].bias)
    images = torch.randn(4, 1, 6, 6)
    (first, second, last) = measure(
        to_spiking(cnn.eval(), images, steps=3), [(images, torch.zeros(4))], steps=3, device="cpu"
    ).operations
    assert [first.input, second.input, last.input] == ["analog", "analog", "binary"]
    assert (first.multiplied, second.multiplied, last.multiplied) == (first.macs, 3 * second.macs, 0)
    assert (first.additions, second.additions) == (0, 0)


class Doubled(nn.Module):
    def __init__(self, double):
        super().__init__()
        self.double, self.a, self.b = double, nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x + x if self.double else x).flatten(1)


def test_a_value_added_to_itself_brings_its_spikes_twice():
    counts = []
    for double in (True, False):
        torch.manual_seed(0)
        snn = to_spiking(Doubled(double).eval(), images := torch.randn(4, 1, 6, 6), steps=1)
        counts.append(measure(snn, [(images, torch.zeros(4))], steps=1, device="cpu").operations[1].additions)
    assert counts[0] == 2 * counts[1] > 0


class Functional(nn.Module):
    """Two convolutions: the second as `second` calls it."""

    def __init__(self, second, norm=False):
        super().__init__()
        self.a, self.b, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), second
        if norm:
            nn.utils.parametrizations.weight_norm(self.b)

    def forward(self, x):
        return self.second(self.b, torch.relu(self.a(x))).flatten(1)


def test_however_a_convolution_is_called_its_operations_are_the_same():
    found = []
    for second, norm in (
        (lambda b, x: b(x), False),
        (lambda b, x: F.conv2d(x, b.weight, b.bias), False),
        (lambda b, x: F.conv2d(weight=b.weight, input=x, bias=b.bias), False),
        (lambda b, x: F.conv2d(x, b.weight / 2, b.bias), False),
        (lambda b, x: b(x), True),
    ):
        torch.manual_seed(0)
        cnn, images = Functional(second, norm).eval(), torch.randn(4, 1, 6, 6)
        rows = measure(to_spiking(cnn, images, steps=1), [(images, torch.zeros(4))], steps=1, device="cpu").operations
        found.append((rows[1].input, rows[1].additions, rows[1].macs, rows[1].weights))
    assert found[0][1] > 0
    assert set(found[:-1]) == {found[0]}
    assert found[-1][:3] == found[0][:3]


class Between(nn.Module):
    """Something between neurons and the second layer."""

    def __init__(self, between, second):
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(1, 3, 3, padding=1), second, between

    def forward(self, x):
        return self.between(self.b, torch.relu(self.a(x))).flatten(1)


def inputs_and_additions(between, second=None):
    """What the second layer takes according to the report and to the measurement, and its additions per image."""
    torch.manual_seed(0)
    cnn, images = Between(between, second or nn.Conv2d(3, 2, 3)).eval(), torch.randn(4, 1, 6, 6)
    snn = to_spiking(cnn, images, steps=1)
    found = measure(snn, [(images, torch.zeros(4))], steps=1, device="cpu").operations[1]
    return snn.report["b"].became, found.input, found.additions


def test_what_changes_no_spike_changes_no_count():
    plain = inputs_and_additions(lambda b, x: b(x))
    assert plain[:2] == ("kept, binary input", "binary")
    for between in (lambda b, x: b(x * 0.5), lambda b, x: b(-x), lambda b, x: b(x.detach())):
        assert inputs_and_additions(between) == plain
    twice = inputs_and_additions(lambda b, x: b(x + x))
    assert twice == ("kept, integer input", "integer", 2 * plain[2])
    assert inputs_and_additions(lambda b, x: b(sum([x, x]))) == twice  # which begins with 0 + x
    assert inputs_and_additions(lambda b, x: b(torch.add(x, x, alpha=2))) == twice


@pytest.mark.parametrize("function", [lambda x: F.interpolate(x, scale_factor=2), nn.Upsample(scale_factor=2)])
def test_copies_of_spikes_are_spikes(function):
    copied = inputs_and_additions(lambda b, x: b(function(x)), nn.Conv2d(3, 2, 1))
    assert copied[:2] == ("kept, binary input", "binary")
    assert copied[2] == 4 * inputs_and_additions(lambda b, x: b(x), nn.Conv2d(3, 2, 1))[2] > 0
    smooth = inputs_and_additions(lambda b, x: b(F.interpolate(x, scale_factor=2, mode="bilinear")))
    assert smooth[:2] == ("kept, analog input", "analog")


def test_spikes_reach_what_a_transposed_convolution_is_asked_for():
    up = nn.ConvTranspose2d(3, 2, 3, 2, 1)
    small = inputs_and_additions(lambda b, x: b(x), up)[2]
    large = inputs_and_additions(lambda b, x: b(x, output_size=(12, 12)), up)[2]
    with_option = nn.ConvTranspose2d(3, 2, 3, 2, 1, output_padding=1)
    assert large == inputs_and_additions(lambda b, x: b(x), with_option)[2] > small


class Rows(nn.Module):
    """The second convolution sees each channel of an image as a row of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3), nn.Conv2d(6, 2, 2)

    def forward(self, x):
        x = torch.relu(self.a(x)).reshape(-1, 1, 6, 6)
        x = torch.relu(self.b(x)).reshape(-1, 6, 4, 4)
        return self.c(x).flatten(1)


def test_rows_that_are_no_images_are_neurons_of_their_image():
    torch.manual_seed(0)
    cnn, images, steps = Rows().eval(), torch.randn(5, 1, 8, 8), 2
    snn = to_spiking(cnn, images, steps=steps)
    found = measure(snn, [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(2))], steps=steps, device="cpu")
    with record(snn) as seen, torch.no_grad():
        snn(images, steps=steps)
    first, second = (layer.spikes for layer in seen.values())  # [T, B, 3, 6, 6] and [T, B·3, 2, 4, 4]
    assert [layer.neurons for layer in found.layers] == [3 * 36, 3 * 2 * 16]
    for layer, spikes in zip(found.layers, (first, second), strict=True):
        assert layer.rate == pytest.approx(int((spikes != 0).sum()) / 5 / layer.neurons)
    walked = [0, 0]
    for step, image in product(range(steps), range(5)):
        for channel in range(3):
            walked[0] += walk_conv(place(first[step, image, channel : channel + 1]), cnn.b, (1, 6, 6))
        rows = second[step].unflatten(0, (5, 3))[image].flatten(0, 1)  # [6, 4, 4]
        walked[1] += walk_conv(place(rows), cnn.c, (6, 4, 4))
    assert [5 * row.additions for row in found.operations[1:]] == walked
    assert min(walked) > 0


def test_a_pool_over_features_sums_them():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3)).eval()
    images = torch.randn(5, 6)
    found = operations(to_spiking(cnn, images, steps=1).fuse(images), images[:1])
    assert found[1].input == "integer"
    assert found[1].fan_out["_1"].tolist() == [3] * 16  # each spike is in one window


def test_devices_do_not_mix():
    """On a device that computes nothing but shapes, and refuses operands of another."""
    x = torch.rand(1, 2, 8, 8)
    mean, number = torch.rand(1, 2, 3, 3, device="meta"), x.to("meta")
    node = fx.symbolic_trace(nn.Sequential(pool := nn.AdaptiveAvgPool2d(3))).graph.find_nodes(
        op="call_module", target="0"
    )
    assert _gathered(node[0], pool, number, mean).device.type == "meta"


class Product(nn.Module):
    """A parameter that is multiplied without a layer, which a CNN can have and a spiking network not."""

    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Conv2d(1, 2, 3), nn.Parameter(torch.randn(32, 3))

    def forward(self, x):
        return torch.relu(self.a(x)).flatten(1) @ self.w


def test_a_parameter_that_is_multiplied_counts_as_weights():
    assert operations(trace(Product()), torch.randn(1, 1, 6, 6))[-1].weights == 96


class Least(nn.Module):
    """Minimum pooling of spikes: the maximum of what is negated."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.b(-F.max_pool2d(-torch.relu(self.a(x)), 2)).flatten(1)


def test_negated_spikes_are_spikes():
    torch.manual_seed(0)
    images = torch.rand(8, 1, 8, 8)
    snn = to_spiking(Least().eval(), images, steps=1, percentile=20)
    found = measure(snn, [(images, torch.zeros(8))], steps=1, device="cpu")
    with record(snn) as seen, torch.no_grad():
        snn(images)
    (spikes,) = (layer.spikes[0].float() for layer in seen.values())
    reached = int((-F.max_pool2d(-spikes, 2)).sum()) * 2  # of a 3×3 input one output of each of two channels
    assert 8 * found.operations[1].additions == reached > 0


def test_values_before_a_max_pool_are_the_neurons_as_before_an_average_pool():
    images = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8)
    values = []
    for pool in ("avg", "max"):
        cnn = nets.build("vgg-mini", classes=10, channels=1, size=28, pool=pool).eval()
        found = measure(to_spiking(cnn, images, steps=2), [(images, torch.zeros(8))], steps=2, device="cpu")
        values.append([operation.values for operation in found.operations])
        inputs = [operation.inputs for operation in found.operations]
        assert inputs == [28 * 28, 16 * 14 * 14, 32 * 14 * 14, 32 * 7 * 7, 64 * 3 * 3]
    assert values[0] == values[1] == [28 * 28, 16 * 28 * 28, 32 * 14 * 14, 32 * 14 * 14, 64 * 7 * 7]


class MyConv(nn.Conv2d):
    pass


class MyPool(nn.AvgPool2d):
    pass


class MoreThanConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_count_as_what_they_compute_as():
    x = torch.rand(4, 3, 8, 8)

    def counted(conv, pool, **options):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), pool(2), conv(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        snn = to_spiking(nn.Sequential(*layers).eval(), x, steps=1, thresholds="percentile", **options)
        found = measure(snn, [(x, torch.zeros(4).long())], steps=1, device="cpu").operations
        return [(layer.input, layer.macs, layer.additions) for layer in found]

    plain = counted(nn.Conv2d, nn.AvgPool2d)
    assert counted(MyConv, MyPool) == plain
    assert [layer[0] for layer in plain] == ["analog", "integer", "binary"]
    kept = counted(MoreThanConv, nn.AvgPool2d, leaf_modules=(MoreThanConv,))
    assert [layer[0] for layer in kept] == ["analog", "analog", "binary"]
