"""Conversion: which operations become neurons, what the thresholds are, what is refused."""

import copy
import io
import pickle
import threading
import warnings
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unitstep import nets, to_spiking
from unitstep.calibration import calibrate_
from unitstep.conversion import Spiking, spiking
from unitstep.neuron import SharedDropout

# One threshold per layer, membranes from 0: what can be followed by hand.
plainly = partial(to_spiking, thresholds="percentile", percentile=90.0, initial=0.0)
IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One ReLU module called twice, a functional, a method, a residual and a concatenation with the stem's current."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        stem = self.stem(x)
        y = self.relu(self.a(self.relu(stem)))
        y = F.relu(self.b(y) + stem).relu()
        y = F.avg_pool2d(torch.cat([y, stem], 1), 2)
        return self.head(F.dropout(torch.flatten(y, 1), 0.5, self.training))


def test_a_kept_module_may_not_change_in_place_what_is_the_same_at_all_timesteps():
    """At one timestep who uses the stem's current afterwards would see the change, at several they would not."""

    class Add(nn.Module):
        def forward(self, x, y):
            return x.add_(y)

    class Joining(Shared):
        def __init__(self):
            super().__init__()
            self.block = Add()

        def forward(self, x):
            stem = self.stem(x)
            y = self.block(stem, self.a(self.relu(stem)))
            return self.head(torch.flatten(F.avg_pool2d(torch.cat([y, stem], 1), 2), 1))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"block.*changes stem in place.*write it without in-place"):
        plainly(Joining().eval(), IMAGES, steps=3, leaf_modules=("block",))


class Indexed(nn.Module):
    """What is hard to write down: max pools that are functions, slices, constants, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)
        self.register_buffer("scale", torch.linspace(0.5, 2, 4)[:, None, None])

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.a(x))), 2)
        x = F.relu(self.b(x) + x) * self.scale
        x = torch.cat([x[:, 2:], x[:, :2]], 1)
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("cnn", [Shared, Indexed])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_network_can_be_saved_whole(cnn, steps):
    torch.manual_seed(0)  # all layers fire
    snn = plainly(cnn().eval(), IMAGES, steps=steps)
    file = io.BytesIO()
    torch.save(snn, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again, Spiking)
    assert torch.equal(again(IMAGES, steps), snn(IMAGES, steps))
    assert [vars(row) for row in again.report.rows] == [vars(row) for row in snn.report.rows]
    assert list(again.lifs) == list(snn.lifs)
    fused = pickle.loads(pickle.dumps(again.fuse(IMAGES, steps)))
    assert torch.equal(fused(IMAGES), snn.fuse(IMAGES, steps)(IMAGES))
    again.classes = ["cat", "dog"]
    for training in (True, False):
        copied = pickle.loads(pickle.dumps(again.train(training)))
        assert all(module.training == training for module in copied.modules())
        assert copied.classes == ["cat", "dog"]


@pytest.mark.parametrize("place", ["", "relu", "norm", "pool"])
def test_hooks_that_would_be_lost_are_refused(place):
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    cnn = nn.Sequential(OrderedDict(**parts, flatten=nn.Flatten(), head=nn.Linear(36, 2))).eval()
    double = partial(lambda module, given, out: 2 * out)
    kept = cnn.conv.register_forward_hook(double)
    options = {"steps": 2, "norm": "fold", "max_pool": "average"}
    assert not torch.equal(spiking(cnn)(IMAGES), (kept.remove(), spiking(cnn)(IMAGES))[1])
    hook = cnn.get_submodule(place).register_forward_hook(double)
    with pytest.raises(ValueError, match=r"forward hooks.* remove them, by remove\(\)"):
        plainly(cnn, IMAGES, **options)
    hook.remove()
    plainly(cnn, IMAGES, **options)


def test_hooks_of_a_block_are_refused_before_they_run():
    ran = []
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.ReLU(), nn.Flatten()).eval()
    cnn[1].register_forward_pre_hook(lambda module, inputs: ran.append(module))
    with pytest.raises(ValueError, match=r"^Sequential 1: its forward hooks would be lost: remove them"):
        spiking(cnn)
    assert not ran
    spiking(cnn, leaf_modules=("1",))(IMAGES)
    assert ran


class Frozen(Shared):
    def train(self, mode=True):
        super().train(mode)
        self.a.eval()


class Locked(Shared):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class InPlace(Shared):
    inplace = property(lambda self: True)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = InPlace()

    def forward(self, x):
        return self.inner(x)


TWO = torch.full((1,), 2.0)


class Scaled(Shared):
    def forward(self, x, scale=TWO, unused=TWO):
        return super().forward(x) * scale


@pytest.mark.parametrize("kind", [Shared, Frozen])
def test_each_module_is_in_the_mode_that_it_had(kind):
    torch.manual_seed(0)
    cnn = kind()
    cnn.train()
    cnn.a.eval()
    snn = plainly(cnn, IMAGES, steps=2)
    assert [name for name, module in snn.named_modules() if not module.training] == ["a"]


def test_what_cannot_be_copied_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Locked cannot be copied; leave out of it .*locks.*pickle"):
        plainly(Locked().eval(), IMAGES, steps=2)


@pytest.mark.parametrize("kind", [Outer, Scaled])
def test_properties_and_defaults_of_many_kinds(kind):
    torch.manual_seed(0)
    cnn = kind().eval()
    with torch.no_grad():
        snn = to_spiking(cnn, IMAGES, steps=256, thresholds="max")
        torch.testing.assert_close(snn(IMAGES, 256), cnn(IMAGES), rtol=0, atol=0.03)


def test_what_is_not_finite_is_no_calibration():
    cnn = Shared().eval()
    images = IMAGES.clone()
    images[3, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="must be finite numbers"):
        plainly(cnn, images, steps=2)
    with torch.no_grad():
        cnn.b.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"b\.weight must be finite numbers"):
        plainly(cnn, IMAGES, steps=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (torch.compile, "OptimizedModule is a wrapper: give the network in it, network._orig_mod"),
        (nn.DataParallel, "DataParallel is a wrapper: give the network in it, network.module"),
        (spiking, "is a spiking one already"),
    ],
)
def test_wrapped_networks_are_named(wrap, way_out):
    with pytest.raises(ValueError, match=way_out):
        spiking(wrap(Shared().eval()))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_calibration_in_windows_is_calibration_at_once(window):
    cnn = Shared().double().eval()
    whole = calibrate_(spiking(cnn), IMAGES.double(), thresholds="percentile", steps=5)
    cut = calibrate_(spiking(cnn), IMAGES.double(), thresholds="percentile", steps=5, window=window)
    for a, b in zip(whole.lifs.values(), cut.lifs.values(), strict=True):
        assert a.threshold.item() == pytest.approx(b.threshold.item(), rel=1e-5)


def test_a_threshold_that_would_not_be_positive_is_a_tenth():
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    nn.init.constant_(cnn[0].weight, -1.0)
    with pytest.warns(UserWarning, match="layer _1 emits no spike"):
        snn = plainly(cnn, IMAGES)
    assert snn.lifs["_1"].threshold.item() == pytest.approx(0.1)


def test_dropout_has_one_mask_for_all_steps():
    dropout = SharedDropout(0.5)
    out = dropout(torch.ones(3 * 4, 50), 3).unflatten(0, (3, 4))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropout.eval()(torch.ones(12, 5), 3), torch.ones(12, 5))


def test_causality_and_statelessness():
    snn = spiking(Shared().double().eval())
    fired: dict[str, torch.Tensor] = {}
    for name, lif in snn.lifs.items():
        lif.register_forward_hook(lambda _m, _i, out, name=name: fired.__setitem__(name, out))
    images = IMAGES.double()
    five = snn(images, steps=5)
    first_of_five = {name: spikes[:8] for name, spikes in fired.items()}
    snn(images, steps=1)
    assert all(torch.equal(fired[name], first_of_five[name]) for name in fired)
    assert torch.equal(snn(images, steps=5), five)
    order = torch.randperm(8)
    torch.testing.assert_close(snn(images[order], steps=5), five[order])


def test_what_nothing_has_spiked_into_is_computed_once():
    snn, rows = spiking(nets.build("vgg-mini", classes=3, size=16).eval()), []
    snn.get_submodule("conv1").register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    snn.get_submodule("conv2").register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    snn(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), steps=5)
    assert rows == [2, 10]


class Joins(nn.Module):
    def __init__(self, join) -> None:
        super().__init__()
        self.join = join

    def forward(self, x):
        return self.join(x)


def around(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), module, nn.Flatten(), nn.Linear(144, 2))


@pytest.mark.parametrize(
    ("cnn", "options", "message"),
    [
        (around(nn.ReLU6()), {"height": "unit"}, "ReLU6 2: a cap has a unit"),
        (around(nn.LayerNorm(6)), {}, "LayerNorm 2: normalises each image by its own statistics"),
        (around(Joins(lambda x: torch.cat([x, x]))), {}, "cat .*joins or cuts the first dimension"),
        (around(Joins(lambda x: x[0])), {}, "getitem .*joins or cuts the first dimension"),
        (around(Joins(torch.flatten)), {}, "Flatten 3 fails with timesteps in the first dimension"),
        (around(Joins(lambda x: torch.div(x, 0.3, rounding_mode="floor"))), {}, "leave rounding_mode out"),
        (around(nn.MaxPool2d(2, return_indices=True)), {}, "leave return_indices out"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), {}, "nothing would spike"),
        (around(nn.BatchNorm2d(4)), {"norm": "none"}, 'BatchNorm2d 2: a batch norm, but norm="none"'),
        (around(nn.Identity()), {"norm": "maybe"}, "norm must be"),
        (around(nn.Identity()), {"readout": "max"}, "readout must be"),
        (around(nn.Identity()), {"height": "half"}, "height must be"),
    ],
)
def test_what_does_not_convert_is_refused_by_name(cnn, options, message):
    with pytest.raises(ValueError, match=message):
        plainly(cnn, IMAGES, **options)


def test_a_refused_calibration_leaves_training_mode():
    snn = spiking(Shared())
    snn.train()
    with pytest.raises(ValueError, match="fails"):
        calibrate_(snn, torch.rand(4, 5, 8, 8), steps=2)
    assert snn.training
    with pytest.raises(KeyError, match="no_such"):
        snn.report["no_such"]


def test_calling_with_no_steps_is_refused():
    snn = spiking(Shared())
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="steps must be a whole number of timesteps"):
            snn(IMAGES, steps=steps)
    assert torch.equal(snn.eval()(IMAGES, steps=np.int64(2)), snn(IMAGES, steps=2))


def test_hooks_that_compute_weights_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, yet there
        cnn = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 2, 3)), nn.ReLU(), nn.Flatten())
        cnn(torch.randn(2, 1, 6, 6))
    with pytest.raises(ValueError, match="remove_weight_norm"):
        to_spiking(cnn.eval(), torch.randn(2, 1, 6, 6), steps=1)


class Defaults(nn.Module):
    """Of many kinds behind the images."""

    def __init__(self):
        super().__init__()
        self.a, self.steps, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x=None, size=(1, 1), stages=[0], options={}, *, scale=2.0):  # noqa: B006
        for _ in stages:
            x = torch.relu(self.steps(torch.relu(self.a(x))))
        return self.fc(F.adaptive_avg_pool2d(x, size).flatten(1) * options.get("times", scale))


def test_defaults_of_all_kinds_and_a_module_named_steps():
    torch.manual_seed(0)
    cnn, images = Defaults().eval(), torch.randn(6, 1, 8, 8)
    snn = to_spiking(cnn, images, steps=64, thresholds="max", initial=0.5)
    assert (snn(images, steps=64) - cnn(images)).abs().max() < 0.05 * cnn(images).abs().max()
    for steps in (1, 3):
        torch.testing.assert_close(snn.fuse(images, steps)(images), snn(images, steps=steps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fuse", "report", "lifs", "meta", "graph"])
def test_names_that_spiking_networks_need_are_refused(name):
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    if name == "graph":
        cnn.register_buffer(name, torch.ones(2))
    else:
        cnn.add_module(name, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"an attribute named {name}, .* rename it"):
        to_spiking(cnn, torch.randn(2, 1, 6, 6), steps=1)


class Token(nn.Module):
    """Joins a constant, expanded to as many rows as there are, with spikes."""

    def __init__(self):
        super().__init__()
        self.a, self.token, self.fc = nn.Conv2d(1, 4, 3), nn.Parameter(torch.rand(1, 1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.fc(x.mean(1))


def test_a_constant_of_as_many_rows_joins_spikes():
    torch.manual_seed(0)
    cnn, images = Token().eval(), torch.randn(6, 1, 8, 8)
    snn = to_spiking(cnn, images, steps=64, thresholds="max", initial=0.5)
    assert (snn(images, steps=64) - cnn(images)).abs().max() < 0.02
    assert snn.report["relu"].error < 0.05


class Cropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x)))[:, :, 1:-1])
        return self.fc(x.mean((2, 3)))


def test_one_image_in_channels_last_behind_a_crop_over_many_steps():
    torch.manual_seed(0)
    cnn = Cropped().eval().to(memory_format=torch.channels_last)
    image = torch.randn(1, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    options = {"steps": 5, "calibration_steps": 15}
    snn = to_spiking(cnn, image, **options)
    plain = to_spiking(copy.deepcopy(cnn).to(memory_format=torch.contiguous_format), image.contiguous(), **options)
    torch.testing.assert_close(snn(image, steps=5), plain(image, steps=5))


def test_neurons_are_where_the_network_is():
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).to("meta")
    assert {parameter.device.type for parameter in spiking(cnn).parameters()} == {"meta"}


class InPlaceInside(nn.Module):
    """Its branch starts with what changes the block's input, which is then added; and it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        if x.sum() < -1e9:
            return x
        return self.conv(self.relu(x)) + x


def test_a_leaf_module_that_needs_to_work_in_place_is_refused():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), InPlaceInside(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(ValueError, match="it changes a value in place unseen, in a leaf module"):
        to_spiking(cnn, torch.randn(8, 3, 8, 8), leaf_modules=("1",))


@pytest.mark.parametrize("relu", [nn.ReLU, nn.SiLU])
def test_a_leaf_module_that_begins_in_place_converts_and_trains(relu):
    leaf = nn.Sequential(relu(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), leaf, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(8, 3, 8, 8)
    to_spiking(cnn, x, steps=2, leaf_modules=("2",)).train()(x, 2).sum().backward()


class AsksForMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x, targets):
        return self.b(torch.relu(self.a(x.flatten(1))))


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.randn(x.shape)


def test_what_cannot_be_called_or_is_random_is_not_compared():
    x = torch.randn(4, 2, 2, 2)
    to_spiking(AsksForMore().eval(), x)
    layers = Draws(), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    to_spiking(nn.Sequential(*layers).eval(), x, leaf_modules=(Draws,))


class AsksForTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x.flatten(1))
        if isinstance(x, torch.Tensor):
            x = 2 * x
        return self.b(torch.relu(x))


def test_a_network_that_is_traced_as_another_is_refused():
    with pytest.raises(ValueError, match=r"AsksForTensor, traced, gives other logits than when it is called"):
        to_spiking(AsksForTensor().eval(), torch.randn(4, 2, 2, 2))


def test_frozen_layers_stay_frozen_when_a_batch_norm_is_folded():
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    cnn[:2].requires_grad_(False)
    learned = {name: p.requires_grad for name, p in spiking(cnn, norm="fold").named_parameters()}
    assert not learned["0.weight"]
    assert learned["4.weight"]
    cnn[1].requires_grad_(True)
    learned = {name: p.requires_grad for name, p in spiking(cnn, norm="fold").named_parameters()}
    assert (learned["0.weight"], learned["0.bias"]) == (False, True)


class Makes(nn.Module):
    """Makes modules, and slices a Sequential, when it is called."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Linear(16, 2)

    def forward(self, x):
        x = nn.ReLU()(self.body[2](self.body[:2](x)))
        return nn.Softmax(1)(self.head(nn.Flatten()(nn.AvgPool2d(2)(x))))


def test_modules_that_are_made_in_forward_convert():
    torch.manual_seed(0)
    cnn, images = Makes().eval(), torch.randn(8, 3, 8, 8)
    snn = to_spiking(cnn, images, steps=256, thresholds="max")
    assert len(snn.lifs) == 2
    with torch.no_grad():
        torch.testing.assert_close(snn(images, 256), cnn(images), rtol=0, atol=0.01)


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3)]

    def forward(self, x):
        return torch.relu(self.layers[0](x)).flatten(1)


@pytest.mark.parametrize(
    ("cnn", "options", "message"),
    [
        (Lists(), {}, "make modules in __init__, several in an nn.ModuleList"),
        (torch.optim.swa_utils.AveragedModel(nn.ReLU()), {}, r"AveragedModel is a wrapper: .* network.module"),
        (Makes(), {"leaf_modules": "body"}, r"leaf_modules is a tuple of names or classes: \('body',\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()), {}, "put an nn.BatchNorm2d"),
    ],
)
def test_refusals_name_the_way_out(cnn, options, message):
    with pytest.raises(ValueError, match=message):
        spiking(cnn.eval(), **options)


class LinearByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(F.relu(self.b(self.a(input=x.flatten(1)))))


def test_a_linear_layer_called_by_keyword_takes_up_its_batch_norm():
    assert (
        to_spiking(LinearByKeyword().eval(), torch.randn(4, 3, 2, 2), norm="fold")
        .report["b"]
        .became.startswith("folded")
    )


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(F.batch_norm(self.a(x), self.n.running_mean, self.n.running_var)).flatten(1)


def test_a_batch_norm_as_a_function_is_one():
    with pytest.raises(ValueError, match='a batch norm, but norm="none"'):
        spiking(FunctionalNorm().eval(), norm="none")
    spiking(FunctionalNorm().eval(), norm="keep")
