"""Thresholds: each strategy against its formula; the report's numbers; watching; one step after another."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

from unitstep import nets, record, to_spiking
from unitstep.calibration import Activity, _least_squares, calibrate_, unroll
from unitstep.conversion import spiking
from unitstep.drawing import _in_thresholds

# One threshold per layer, membranes from 0: what can be followed by hand.
plainly = partial(to_spiking, thresholds="percentile", percentile=90.0, initial=0.0)
IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain(cap: float | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    relus = [nn.ReLU() if cap is None else nn.Hardtanh(0, cap) for _ in range(2)]
    layers = [nn.Conv2d(3, 4, 3), relus[0], nn.Conv2d(4, 4, 3), relus[1], nn.Flatten(), nn.Linear(64, 2)]
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def simulated(cnn: nn.Sequential, V: torch.Tensor, steps: int, height: str = "threshold") -> torch.Tensor:
    """The second neuron layer's current at each step, [steps, B, C, H, W], by hand."""
    current = cnn[0](IMAGES)
    U, currents = torch.zeros_like(current), []
    for _ in range(steps):
        U = U + current
        spikes = (U > V).float()
        U = U - V * spikes
        currents.append(cnn[2](spikes * V if height == "threshold" else spikes))
    return torch.stack(currents)


def test_per_channel_percentiles():
    cnn = plain()
    snn = plainly(cnn, IMAGES, steps=2, thresholds="channel-percentile", percentile=80)
    first, second = (lif.threshold for lif in snn.lifs.values())
    by_channel = cnn[0](IMAGES).transpose(0, 1).flatten(1)
    peaks = by_channel.quantile(0.8, dim=1, interpolation="nearest")
    assert (peaks < 0).any()
    torch.testing.assert_close(first, torch.where(peaks > 0, peaks, 0.1))
    later = simulated(cnn, first.detach()[:, None, None], 2).transpose(1, 2).flatten(2)
    peaks = later.quantile(0.8, dim=2, interpolation="nearest").amax(0)
    torch.testing.assert_close(second, torch.where(peaks > 0, peaks, 0.1))
    assert snn.report["_1"].found == "percentile 80 per channel"


@pytest.mark.parametrize(
    ("thresholds", "share", "height", "found"),
    [("max", 1.0, "threshold", "maximum × 0.5"), ("percentile", 0.8, "unit", "percentile 80 × 0.5")],
)
def test_one_threshold_for_a_layer_and_scale(thresholds, share, height, found):
    cnn = plain()
    snn = plainly(cnn, IMAGES, steps=3, thresholds=thresholds, percentile=80, scale=0.5, height=height)
    first, second = (lif.threshold for lif in snn.lifs.values())
    assert first.item() == pytest.approx(0.5 * cnn[0](IMAGES).quantile(share, interpolation="nearest").item())
    peaks = simulated(cnn, first.detach(), 3, height).flatten(1).quantile(share, dim=1, interpolation="nearest")
    assert second.item() == pytest.approx(0.5 * peaks.max().item())
    assert snn.report["_1"].found == found


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_least_squares_is_near_the_best_of_a_finer_search(steps, initial):
    """Against the simulated response to a constant current, for many more thresholds than are tried."""
    cnn = plain()
    snn = plainly(cnn, IMAGES, steps=steps, thresholds="mse", initial=initial)
    x = cnn[0](IMAGES).detach().double().flatten()

    def error(V: float) -> float:
        U, spikes = initial * V * torch.ones_like(x), torch.zeros_like(x)
        for _ in range(steps):
            U = U + x
            spikes, U = spikes + (U > V), U - V * (U > V)
        return (x.relu() - V * spikes / steps).square().mean().item()

    best = min(error(V) for V in torch.linspace(0.002, 1, 700).double().mul(x.max()).tolist())
    found = next(iter(snn.lifs.values())).threshold.item()
    assert error(found) <= 1.01 * best
    assert snn.report["_1"].found == "least squares"


def test_a_cap_limits_the_threshold():
    snn = plainly(plain(cap=0.1), IMAGES, steps=4, thresholds="max")
    assert [lif.threshold.item() for lif in snn.lifs.values()] == pytest.approx([0.1, 0.1])
    assert snn.report["_1"].found == "cap"
    assert snn.report["_1"].became == "neuron, capped at 0.1"
    free = plainly(plain(cap=50), IMAGES, steps=4, thresholds="channel-percentile", percentile=99)
    cap = next(iter(free.lifs.values())).threshold.median().item()
    each = plainly(plain(cap=cap), IMAGES, steps=4, thresholds="channel-percentile", percentile=99)
    assert each.report["_1"].found == "percentile 99 per channel, at most the cap"
    low = plainly(plain(cap=50), IMAGES, steps=4, thresholds="max")
    assert low.report["_1"].found == "maximum"


def test_calibration_over_other_steps_than_those_of_use():
    snn = plainly(plain(), IMAGES, steps=2, calibration_steps=6, thresholds="max")
    same = plainly(plain(), IMAGES, steps=6, thresholds="max")
    assert [lif.threshold.item() for lif in snn.lifs.values()] == [lif.threshold.item() for lif in same.lifs.values()]
    assert snn.report.steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": "median"}, "thresholds must be one of percentile, channel-percentile, max, mse"),
        ({"percentile": 0.99}, "the 99th is 99, not 0.99"),
        ({"percentile": 0}, "percentile must be above 1 and at most 100, not 0"),
        ({"percentile": 101}, "percentile must be above 1 and at most 100, not 101"),
        ({"scale": -1}, "scale must be greater than 0"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"calibration_steps": 0}, "steps must be a whole number"),
        ({"calibration_steps": 1.5}, "steps must be a whole number"),
        ({"initial": 1.0}, r"initial must be in \[0, 1\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        plainly(plain(), IMAGES, **options)


def test_what_is_no_network_or_no_tensor_is_refused():
    with pytest.raises(ValueError, match=r"the network is a type: give a module, Net\(\) and not its class"):
        to_spiking(nn.ReLU, IMAGES)
    with pytest.raises(ValueError, match=r"images is a list: give one tensor"):
        to_spiking(plain(), [IMAGES])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        plainly(plain(), IMAGES[:0])


def test_the_default_is_what_measured_best():
    """benchmarks/conversion.py: percentile 99 of each channel, membranes from half the threshold."""
    snn = to_spiking(plain(), IMAGES)
    best = to_spiking(plain(), IMAGES, thresholds="channel-percentile", percentile=99, initial=0.5)
    assert [lif.initial for lif in snn.lifs.values()] == [0.5, 0.5]
    for ours, theirs in zip(snn.lifs.values(), best.lifs.values(), strict=True):
        assert torch.equal(ours.threshold, theirs.threshold)


def test_kept_batch_norms_keep_the_cnns_statistics_unless_asked():
    cnn = nets.build("vgg-mini", classes=3, size=16)
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    snn = plainly(cnn, images, steps=2)
    assert torch.equal(snn.get_submodule("norm2").running_mean, cnn.get_submodule("norm2").running_mean)
    refreshed = calibrate_(spiking(cnn), images, steps=2, refresh_norms=True)
    assert not torch.equal(refreshed.get_submodule("norm2").running_mean, cnn.get_submodule("norm2").running_mean)


def test_the_report_has_rates_and_errors_and_is_plain_data(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    cnn = plain()
    snn = plainly(cnn, IMAGES, steps=4, thresholds="max")
    report = snn.report
    assert [row.kind for row in report.rows] == [*(type(layer).__name__ for layer in cnn), "readout"]
    assert [row.shape for row in report.rows][:2] == [(4, 6, 6), (4, 6, 6)]
    with record(snn) as spikes, torch.no_grad():
        logits = snn(IMAGES, steps=4)
        wanted = cnn(IMAGES)
    for name, layer in spikes.items():
        assert report[name].rate == pytest.approx(layer.rate)
    assert report.rows[-1].error == pytest.approx((logits - wanted).norm().item() / wanted.norm().item(), rel=1e-4)
    assert report["_0"].error == pytest.approx(0, abs=1e-6)
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["became"] == "neuron"
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 2
    assert lines[0].split() == ["operation", "kind", "output", "became", "threshold", "found", "by", "spikes", "error"]
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, str(report).splitlines()[:-1])) <= 70
    other = plainly(cnn, IMAGES, steps=4, height="unit")
    assert all(row.error is None for row in other.report.rows)


def test_recording_changes_nothing_and_stops():
    snn = plainly(plain(), IMAGES, steps=3)
    before = snn(IMAGES, steps=3)
    with record(snn) as spikes:
        assert torch.equal(snn(IMAGES, steps=3), before)
    first, second = spikes.values()
    assert first.current.shape == (1, 16, 4, 6, 6)
    assert second.current.shape == (3, 16, 4, 4, 4)
    assert first.spikes.shape == (3, 16, 4, 6, 6)
    assert torch.equal(first.spikes[0], first.current[0] > first.threshold)
    assert first.count.tolist() == first.spikes.sum((1, 2, 3, 4)).tolist()
    snn(IMAGES, steps=1)
    assert first is spikes["_1"]


@pytest.mark.parametrize("thresholds", ["percentile", "channel-percentile"])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_one_step_after_another_is_all_at_once(thresholds, initial):
    cnn = nets.build("vgg-mini", classes=3, size=16).double().eval()
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    snn = plainly(cnn, images, steps=5, thresholds=thresholds, initial=initial)
    steps = torch.stack(list(unroll(snn, [images] * 5)))
    with torch.no_grad():
        torch.testing.assert_close(steps.mean(0), snn(images, steps=5))
        torch.testing.assert_close(steps[0], snn(images, steps=1))


def test_least_squares_sees_the_whole_image():
    """More currents than are looked at, 1, but for 0 in one column, on which a stride could fall."""
    for batch in (123, 124, 128):
        current = torch.ones(1, batch, 64, 32, 32)
        current[..., 0] = 0
        assert 0.4 < _least_squares(iter([current]), 2, 0.0, None) < 1


def test_a_large_layer_is_drawn_from_all_its_columns():
    columns = torch.arange(28.0).expand(1, 64, 32, 28, 28)
    layer = Activity(columns, torch.zeros(1), torch.ones(()))
    assert len(_in_thresholds(layer).unique()) == 28


class Squeezes(nn.Module):
    """Loses the dimension of a batch of one, as careless networks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).mean((2, 3), keepdim=True).squeeze())[:, :2]


@pytest.mark.parametrize(("images", "steps"), [(65, 5), (16, 256)])
def test_no_part_of_the_images_is_a_batch_of_one(images, steps):
    to_spiking(Squeezes().eval(), torch.rand(images, 3, 8, 8), steps=steps)


def test_calibration_is_in_fp32_whatever_the_network_is_in():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)).eval()
    with torch.no_grad():
        cnn[0].weight *= 3000  # squares of its currents are no numbers of fp16
    full, half = (
        to_spiking(net, images, steps=4, thresholds="mse").report["_1"].threshold
        for net, images in ((cnn, IMAGES), (copy.deepcopy(cnn).half(), IMAGES.half()))
    )
    assert half == pytest.approx(full, rel=0.02)


def test_an_optimiser_keeps_the_thresholds_that_are_found_anew():
    snn = to_spiking(plain(), IMAGES, steps=2)
    optimizer = torch.optim.SGD(snn.parameters(), lr=1.0)
    calibrate_(snn, IMAGES, steps=2, thresholds="max")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(lif.threshold) in held for lif in snn.lifs.values())
