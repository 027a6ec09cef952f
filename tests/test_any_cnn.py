"""Random networks: a conversion is exact, spike for spike, or it is refused by name."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.simulation import simulate
from unitstep import record, to_spiking

# Weights, images, statistics and thresholds are small integers or powers of two, so in fp64 nothing rounds anywhere.


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x)) > 0.1) if self.training else x


def _chunk(x: Tensor) -> list[Tensor]:
    a, b = x.chunk(2, dim=1)
    return [a, b]


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _discard(_result: Tensor) -> list[Tensor]:
    return []  # whoever looks at the argument sees what has become of it


def _shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


# (net, x, y, k) → a value or a list of values. k is a small number to play with.
Operation = Callable[["Net", Any, Any, int], Any]
RECTIFIERS: dict[str, Operation] = {
    "F.relu": lambda net, x, y, k: F.relu(x),
    "x.relu()": lambda net, x, y, k: x.relu(),
    "clamp_min": lambda net, x, y, k: torch.clamp_min(x, 0),
    "droppath(relu)": lambda net, x, y, k: net.drop_path(torch.relu(x)),
}
CAPPED: dict[str, Operation] = {
    "F.relu6": lambda net, x, y, k: F.relu6(x),
    "clamp(0, 4)": lambda net, x, y, k: x.clamp(0, 4),
    "relu, clamp(max=5)": lambda net, x, y, k: torch.relu(x).clamp(max=5),
}
KEPT: dict[str, Operation] = {
    "x + y": lambda net, x, y, k: x + y,
    "torch.sub": lambda net, x, y, k: torch.sub(x, y),
    "cat": lambda net, x, y, k: torch.cat([x, y], 1),
    "cat 3": lambda net, x, y, k: torch.cat((x, y, x), dim=1),
    "stack": lambda net, x, y, k: torch.stack([x, y], dim=2).flatten(1, 2),
    "scale": lambda net, x, y, k: (x * 2, x / 4, -x, 3 - x)[k],
    "avg_pool": lambda net, x, y, k: F.avg_pool2d(x, 2),
    "max_pool": lambda net, x, y, k: F.max_pool2d(x, 2),
    "adaptive": lambda net, x, y, k: F.adaptive_avg_pool2d(x, (1, 2, 1, 2)[k]),
    "mean": lambda net, x, y, k: (x.mean((2, 3)), x.sum(1, keepdim=True), x.mean(-1), torch.sum(x, (2, 3)))[k],
    "chunk": lambda net, x, y, k: _chunk(x),
    "slice": lambda net, x, y, k: (x[:, :2], x[:, ::2], x[:, :, 1:], x[..., 0])[k],
    "view": lambda net, x, y, k: x.view(x.size(0), -1),
    "reshape": lambda net, x, y, k: x.reshape(x.shape[0], x.size(1) // 2, -1),
    "view, another's size": lambda net, x, y, k: x.contiguous().view(y.shape[0], -1),
    "flatten": lambda net, x, y, k: (torch.flatten(x, 1), x.flatten(2), x.flatten(-2), x.flatten(1, 2))[k],
    "unflatten": lambda net, x, y, k: x.reshape(-1, 2, 2, x.size(1) // 4),
    "shuffle": lambda net, x, y, k: _shuffle(x),
    "into the batch and back": lambda net, x, y, k: F.relu(x.reshape(x.size(0) * x.size(1), -1)).view(x.size(0), -1),
    "transpose": lambda net, x, y, k: (x.transpose(1, 2), x.permute(0, 3, 1, 2), x.transpose(-1, 1), x.unsqueeze(2))[k],
    "pad": lambda net, x, y, k: F.pad(x, (1, 0, 0, 1)),
    "dropout": lambda net, x, y, k: F.dropout(x, 0.5, net.training),
    "constant": lambda net, x, y, k: x * net.constant + net.constant,
}
IN_PLACE: dict[str, Operation] = {
    "F.relu(inplace)": lambda net, x, y, k: F.relu(x, inplace=True),
    "x.relu_(), discarded": lambda net, x, y, k: _discard(x.relu_()),
    "F.relu_": lambda net, x, y, k: F.relu_(x),
    "x += y": lambda net, x, y, k: _iadd(x, y),
    "x.add_(y), discarded": lambda net, x, y, k: _discard(x.add_(y)),
    "x.mul_(2)": lambda net, x, y, k: x.mul_(2),
}
UNSUPPORTED: dict[str, Operation] = {
    "x * y": lambda net, x, y, k: x * y,
    "first image": lambda net, x, y, k: (x[:1], x[0], x[-1:], x[:1])[k],
    "cat images": lambda net, x, y, k: torch.cat([x, y], 0),
    "softmax": lambda net, x, y, k: torch.softmax(x, 1),
    "mean of images": lambda net, x, y, k: (x.mean(0), x.mean(0, keepdim=True), x.mean(), x.sum(0))[k],
    "flip images": lambda net, x, y, k: x.flip(0),
    "into the images": lambda net, x, y, k: x.transpose(0, 1),
    "abs": lambda net, x, y, k: x.abs(),
    "abs_, discarded": lambda net, x, y, k: _discard(x.abs_()),
    "div by n": lambda net, x, y, k: x / x.size(0),
}
TWO = {"x + y", "torch.sub", "cat", "cat 3", "stack", "x += y", "x.add_(y), discarded", "x * y", "cat images"}


def _layer(name: str, x: Tensor, k: int, generator: torch.Generator) -> nn.Module:
    """A layer that x fits into, with small integers as parameters."""

    def integers(tensor: Tensor, low: int, high: int) -> None:
        tensor.copy_(torch.randint(low, high + 1, tensor.shape, generator=generator))

    c = x.shape[1]
    conv = nn.Conv2d if x.dim() == 4 else nn.Conv1d
    layer: nn.Module = {
        "conv": lambda: conv(c, 2 + k % 2 * 2, 3, padding=1),
        "pointwise": lambda: conv(c, c, 1, bias=False),
        "unpadded": lambda: conv(c, 2, 2, stride=1 + k % 2),
        "depthwise": lambda: conv(c, 2 * c if k == 0 else c, 3, padding=1, groups=c, dilation=1 + k % 2),
        "transposed": lambda: nn.ConvTranspose2d(c, 2 * c, 2, stride=2, groups=(1, 2, c, 1)[k], bias=k != 0),
        "linear": lambda: nn.Linear(x.shape[-1], (2, 4, x.shape[-1], 4)[k]),
        "norm": lambda: (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(c, affine=k != 3),
    }[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            integers(parameter, -1, 1)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            integers(layer.running_mean, -2, 2)
            layer.eps = 2.0**-10
            exponents = torch.randint(-1, 2, layer.running_var.shape, generator=generator)
            layer.running_var.copy_(4.0**exponents - layer.eps)
            if layer.weight is not None:
                integers(layer.weight, -1, 2)
    return layer.double().eval()


LAYERS = ("conv", "pointwise", "unpadded", "depthwise", "transposed", "linear", "norm")
PAIRS = {
    "conv and norm": ("conv", "norm"),
    "norm and conv": ("norm", "unpadded"),
    "linear and norm": ("linear", "norm"),
}
OPERATIONS = {**RECTIFIERS, **CAPPED, **KEPT, **IN_PLACE, **UNSUPPORTED}
OFTEN = ["shared relu", "x + y", "cat", "conv", "norm", *PAIRS, *LAYERS, *RECTIFIERS, *KEPT]
Instruction = tuple[str, int, int, int]  # what, on which one or two of the values, and k
PROGRAMS: st.SearchStrategy[list[Instruction]] = st.lists(
    st.tuples(
        st.sampled_from([*OFTEN, *OFTEN, *CAPPED, *IN_PLACE, *UNSUPPORTED, "reuse"]),
        st.integers(0, 3),  # 0 is the latest value
        st.integers(0, 5),
        st.integers(0, 3),
    ),
    min_size=3,
    max_size=8,
)


class Net(nn.Module):
    """Runs a program: each operation takes one or two of the values so far, and adds what it makes to them. Operations
    of a program that do not fit are left out. In the end a hidden layer and a last one see all values not yet used."""

    def __init__(self, program: list[Instruction], images: Tensor, seed: int, inplace: bool) -> None:
        super().__init__()
        self.shared, self.drop_path = nn.ReLU(inplace=inplace), DropPath()
        self.constant = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.eval()
        self.program: list[Instruction] = []
        self.mixed = False
        generator = torch.Generator().manual_seed(seed)
        values, used = [images.clone()], [False]
        singles = [(name, i, j, k) for names, i, j, k in program for name in PAIRS.get(names, (names,))]
        for name, i, j, k in singles:
            x, y = (max(0, len(values) - 1 - each) for each in (i, j))
            try:
                if name == "reuse":
                    name = next(name for name, *_ in self.program if name not in OPERATIONS and name != "shared relu")
                if name in LAYERS:
                    layer = _layer(name, values[x], k, generator)
                    name = f"{name}{len(self.program)}"
                    self.add_module(name, layer)
                new = self._run(name, values[x], values[y], k)
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError, StopIteration):
                continue
            if any(not 0 < value.numel() <= 1024 for value in new):
                continue
            self.program.append((name, x, y, k))
            if name in TWO and (values[x].dim() != values[y].dim() or values[x].shape[:1] != values[y].shape[:1]):
                self.mixed = True  # images of one are added to something else of the other
            used[x] = bool(new)
            used[y] = used[y] or name in TWO
            values, used = values + new, used + [False] * len(new)
        batch = len(images)
        loose = [index for index, seen in enumerate(used) if not seen]
        self.rows = [index for index in loose if values[index].dim() and len(values[index]) == batch] or [0]
        self.odd = [index for index in loose if index not in self.rows]  # not one row per image
        self.flat = {index: values[index].dim() > 1 for index in self.rows}
        features = torch.cat([values[index].reshape(batch, -1) for index in self.rows], 1)
        self.hidden = _layer("linear", features, 1, generator)
        self.head = _layer("linear", self.hidden(features), 0, generator)

    def _run(self, name: str, x: Any, y: Any, k: int) -> list[Any]:
        if name in OPERATIONS:
            made = OPERATIONS[name](self, x, y, k)
        elif name == "shared relu":
            made = self.shared(x)
            if self.shared.inplace and k == 0:
                return _discard(made)
        else:
            made = self.get_submodule(name)(x)
        return made if isinstance(made, list) else [made]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, i, j, k in self.program:
            values += self._run(name, values[i], values[j], k)
        x = torch.cat([values[i].flatten(1) if self.flat[i] else values[i].unsqueeze(1) for i in self.rows], 1)
        for i in self.odd:
            x = x + values[i].sum()
        return self.head(self.shared(self.hidden(x)))


def check(program: list[Instruction], images: Tensor, seed: int, inplace: bool, steps: int, **options: Any) -> str:
    """What became of it, "converted" or "refused"; anything else raises."""
    cnn = Net(program, images, seed, inplace).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # dead layers
            snn = to_spiking(cnn, images, steps=2, **{"thresholds": "percentile", "initial": 0.0, **options})
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        nodes = [node.name for node in fx.symbolic_trace(cnn).graph.nodes]
        assert any(f" {name}" in refusal for name in nodes), f"names no operation: {refusal}"
        used = {name if name in OPERATIONS else name.rstrip("0123456789") for name, *_ in cnn.program}
        reasons = {*IN_PLACE, *UNSUPPORTED, "view, another's size"}
        reasons |= {*CAPPED} if options["height"] == "unit" else set()
        reasons |= {"shared relu"} if inplace else set()
        reasons |= {"norm"} if options["norm"] == "fold" and "linear" in used else set()  # on several dimensions
        assert cnn.mixed or cnn.odd or used & reasons, f"all of this network converts, but: {refusal}"
        return "refused"

    for n, lif in enumerate(snn.lifs.values()):
        if lif.threshold.dim():  # powers of two, since a division by them is exact
            lif.threshold.data = 2.0 ** ((torch.arange(len(lif.threshold)) + n) % 3)
        else:
            lif.threshold.data.fill_((1.0, 0.5, 2.0, 3.0, 4.0)[(seed + n) % 5])
    same = {key: options[key] for key in ("height", "initial", "readout")}
    expected, fired = simulate(cnn, images, [lif.threshold for lif in snn.lifs.values()], steps=steps, **same)
    with record(snn) as seen, torch.no_grad():
        logits = snn(images.clone(), steps=steps)
    for (name, layer), spikes in zip(seen.items(), fired, strict=True):
        assert torch.equal(layer.spikes, spikes), f"other spikes in {name}"
    assert logits.shape == expected.shape
    assert torch.equal(logits, expected), f"logits differ by up to {(logits - expected).abs().max()}"
    return "converted"


QUICK = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining a failure would take minutes
NETWORKS = {
    "program": PROGRAMS,
    "shape": st.sampled_from([(3, 2, 4, 4), (2, 2, 4, 4), (2, 1, 2, 2), (1, 2, 4, 2), (4, 1, 4, 1)]),
    "seed": st.integers(0, 99),
    "inplace": st.booleans(),
    "steps": st.sampled_from([1, 2, 3, 5]),
    "norm": st.sampled_from(["keep", "fold"]),
    "height": st.sampled_from(["threshold", "threshold", "unit"]),
    "initial": st.sampled_from([0.0, 0.5]),
    "readout": st.sampled_from(["sum", "mean"]),
    "thresholds": st.sampled_from(["percentile", "channel-percentile"]),
}


@settings(max_examples=60, deadline=None, derandomize=True, phases=QUICK, report_multiple_bugs=False)
@given(**NETWORKS)
def test_a_random_network_converts_exactly_or_is_refused_by_name(program, shape, seed, inplace, steps, **options):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 4, shape, generator=generator).double()
    event(check(program, images, seed, inplace, steps, **options))
