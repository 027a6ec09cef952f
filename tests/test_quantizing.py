"""Integer networks: how far they are from the fused one, and that they are integers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unitstep import nets, to_onnx, to_spiking
from unitstep.calibration import record
from unitstep.fusing import Fire
from unitstep.quantizing import centre_thresholds_, quantize
from unitstep.rounding import on_grid, round_weights_, rounded


def spiking_vgg(**options):
    torch.manual_seed(0)
    cnn = nets.build("vgg-mini", classes=10)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    cnn.train()(images)  # statistics
    return to_spiking(cnn.eval(), images, steps=1, percentile=80, initial=0.0, **options), images


def fused_vgg(**options):
    snn, images = spiking_vgg(**options)
    return snn.fuse(images), images


@pytest.mark.parametrize("thresholds", ["percentile", "channel-percentile"])
def test_all_weights_are_whole_and_all_thresholds_halves(thresholds):
    fused, _ = fused_vgg(thresholds=thresholds)
    net = quantize(fused)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(module.weight, module.weight.round())
            assert module.weight.abs().max() == 127
            assert module.bias is None
        if isinstance(module, Fire):
            assert torch.equal(module.threshold % 1, torch.full_like(module.threshold, 0.5))
    assert not any("float" in node.meta for node in net.graph.nodes)


def test_of_the_first_layer_hardly_a_spike_differs():
    fused, images = fused_vgg()
    net = quantize(fused)
    first = [nn.Sequential(*list(each.children())[:3])(images) for each in (fused, net)]
    assert (first[0] != first[1]).float().mean() < 0.005


def integer_spikes(snn, images):
    net, seen = quantize(snn.fuse(images)), {}
    for name, module in net.named_modules():
        if isinstance(module, Fire):
            module.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: out != 0}))
    net(images)
    return net, seen


def differing(snn, images):
    _, exact = integer_spikes(snn, images)
    with torch.no_grad(), record(snn) as seen:
        snn(images, 1)
    return [int((layer.spikes[0] != exact[name]).sum()) for name, layer in seen.items()]


def test_centred_thresholds_are_between_two_sums_and_flip_no_other_spike():
    snn, images = spiking_vgg(norm="fold", thresholds="percentile")
    layers = [module for module in snn.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            q, unit = rounded(layer.weight)
            layer.weight.copy_(q * unit)
        pixels = snn.normalize(images)
        sums = (layers[0](pixels) - layers[0].bias.view(-1, 1, 1)).transpose(0, 1).flatten(1)
        first = next(iter(snn.lifs.values()))
        layers[0].bias.copy_(first.threshold - sums.median(1).values)  # some neurons are at their threshold
    assert differing(snn, images)[0] > 0
    before, _ = integer_spikes(snn, images)
    centre_thresholds_(snn, images)
    assert not any(differing(snn, images))
    after, _ = integer_spikes(snn, images)
    moved = [
        (a.threshold != b.threshold).sum()
        for a, b in zip(before.modules(), after.modules(), strict=True)
        if isinstance(a, Fire)
    ]
    assert sum(moved) == 0
    for node in after.graph.nodes:
        if "centring" in node.meta:
            assert (node.meta["centring"].abs() / node.meta["unit"]).max() < 1e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_thresholds_behind_batch_norms_are_centred_too(bits):
    snn, images = spiking_vgg(norm="keep", thresholds="percentile")
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in snn.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in snn.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                q, unit = rounded(module.weight, bits)
                module.weight.copy_(q * unit)
        for norm in norms:
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.1)
    old = [norm.bias.clone() for norm in norms]
    centre_thresholds_(snn, images)
    assert all((norm.bias != bias).any() for norm, bias in zip(norms, old, strict=True))
    assert not any(differing(snn, images))


def test_weights_of_fewer_bits_stay_as_they_are():
    fused, _ = fused_vgg()
    for module in fused.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            q, unit = rounded(module.weight, 4)
            module.weight.copy_(q * unit)
    net = quantize(fused)
    assert all(m.weight.abs().max() == 7 for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))


class BehindNoLayer(nn.Module):
    """Neurons whose current is what another operation than a layer makes of whole numbers."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.pixels = kind, nets.Normalize([100], [0.03])
        self.a, self.pool = nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)
        self.readout = nn.LazyLinear(3)

    def forward(self, x):
        x = self.pixels(x)
        x = torch.relu(x) if self.kind == "pixels" else x
        x = torch.relu(self.a(x))
        if self.kind == "mean":
            x = torch.relu(self.pool(x))
        elif self.kind == "max":
            x = torch.relu(F.max_pool2d(x, 2))
        elif self.kind == "joined":
            x = torch.relu(torch.cat([x, torch.relu(x)], 1))[:, :4]
        return self.readout(x.flatten(1))


@pytest.mark.filterwarnings("ignore:layer .* emits no spike")  # at thresholds that are then replaced
@pytest.mark.parametrize("kind", ["pixels", "mean", "max", "joined"])
def test_neurons_without_a_layer_before_them_fire_alike(kind):
    torch.manual_seed(0)
    cnn, images = BehindNoLayer(kind), torch.randint(256, (32, 3, 12, 12), dtype=torch.uint8)
    cnn(images)
    for layer in (cnn.a, cnn.readout):  # on the grid, so that nothing is rounded
        q, unit = rounded(layer.weight.detach())
        layer.weight.data = q * unit
    snn = to_spiking(cnn.eval(), images, steps=1, thresholds="percentile", percentile=70, initial=0.0)
    before = torch.tensor(torch.inf)
    for lif in snn.lifs.values():  # of less worth than spikes of the layer before; and none on a tie
        lif.threshold.data.clamp_(max=before / 2).mul_(0.97)
        before = lif.threshold.detach()
    fused = snn.fuse(images)
    with torch.no_grad():
        wanted, logits = fused(images), quantize(fused)(images)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std(0).min() > 1e-2  # images differ


class Computed(nn.Module):
    """A parameter that is reshaped on the way."""

    def __init__(self):
        super().__init__()
        self.pixels, self.gamma = nets.Normalize([100], [0.03]), nn.Parameter(torch.rand(4) + 0.5)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.a(self.pixels(x)))
        x = torch.relu(self.b(x * self.gamma.view(1, -1, 1, 1)))
        return self.c(x.mean((2, 3)))


def test_an_operation_on_constants_alone_is_refused_by_name(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8)
    snn = to_spiking(Computed().eval(), images, steps=1)
    with pytest.raises(ValueError, match="reshape view"):
        to_onnx(snn, tmp_path / "net.onnx", images)
    to_onnx(snn, tmp_path / "net.onnx", images, form="float")


class Wide(nn.Linear):
    pass


@pytest.mark.parametrize("last", [nn.Linear, Wide])
def test_padding_in_words_and_windows_of_one_number(last, tmp_path):
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nets.Normalize([100], [0.03]), nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.ReLU(), nn.AvgPool2d((2,)),
        nn.Conv2d(4, 4, 3, padding="valid"), nn.ReLU(), nn.Flatten(), last(64, 3),
    )  # fmt: skip
    images = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8)
    snn = to_spiking(cnn.eval(), images, steps=1, leaf_modules=(Wide,))
    with torch.no_grad():
        torch.testing.assert_close(snn.fuse(images)(images), snn(images))
    if last is nn.Linear:
        assert not to_onnx(snn, tmp_path / "net.onnx", images).in_float


@pytest.mark.parametrize("zero", [(0,), (0, 1, 2)])
def test_a_second_normalisation_is_not_taken_for_one_of_raw_pixels(zero):
    torch.manual_seed(0)
    twice = nets.Normalize(zero, (1 / 255,)), nets.Normalize((0,), (2.0,))
    cnn = nn.Sequential(*twice, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    fused = to_spiking(cnn, images, steps=1, thresholds="percentile", percentile=90.0).fuse(images)
    expected, found = fused(images), quantize(fused)(images)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_the_largest_of_pixels_with_a_negative_scale_is_not_the_largest_whole_number():
    torch.manual_seed(0)
    layers = nn.MaxPool2d(2), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    cnn = nn.Sequential(nets.Normalize((255,), (-1 / 64,)), *layers).eval()
    fused = to_spiking(cnn, images, steps=1, thresholds="percentile", percentile=90.0).fuse(images)
    net = quantize(fused)
    assert [node.name for node in net.graph.nodes if "float" in node.meta] == ["_2"]
    expected, found = fused(images), net(images)
    assert (found - expected).norm() < 0.1 * expected.norm()


class Conv3x3(nn.Conv2d):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)


class MyNorm(nn.BatchNorm2d):
    pass


class MyPool(nn.AvgPool2d):
    pass


def test_subclasses_that_compute_as_torch_does_are_what_they_are_of(tmp_path):
    torch.manual_seed(0)
    layers = Conv3x3(3, 8), MyNorm(8), nn.ReLU(), MyPool(2), Conv3x3(8, 8), MyNorm(8), nn.ReLU(), nn.Flatten()
    cnn = nn.Sequential(nets.Normalize((121,), (1 / 64,)), *layers, nn.Linear(128, 5)).eval()
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    snn = to_spiking(cnn, images, steps=1, norm="fold", thresholds="percentile")
    folded = [row.kind for row in snn.report.rows if row.became.startswith("folded")]
    assert folded == ["BatchNorm2d", "BatchNorm2d"]
    round_weights_(snn, 8)
    for name, module in snn.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert on_grid(module.weight)[2], name
    parity = to_onnx(snn, tmp_path / "net.onnx", images)
    assert not parity.in_float
    assert not parity.rounded
