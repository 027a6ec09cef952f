"""A fused network at T = 1 in integers: 8-bit weights, spikes as 0 or 1, whole numbers as thresholds. Knows nothing of
file formats.

Spikes, sums of spikes, and pixels minus an integer zero point are whole numbers x. With the weights of each output
channel rounded to W ≈ a·q, q whole (`unitstep.rounding`), a neuron's current is a·N + b with N = Σ q·x, and::

    a·N + b > θ   ⇔   N > c   ⇔   N > ⌊c⌋ + ½,    c = (θ − b) / a

since N is whole. No sum can be at its threshold, so no rounding of any runtime can flip a spike.

`centre_thresholds_` does the same to the network that was trained so, with b' = b + a·(c − ⌊c⌋ − ½).
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from unitstep.fusing import (
    Fire,
    Scale,
    called_once,
    fuse,
    joins_channels,
    module_of,
    parts,
    scale_input,
    scale_inputs_,
    sums_channels,
    values,
)
from unitstep.graphs import computes_as
from unitstep.nets import Normalize
from unitstep.neuron import LIF
from unitstep.rounding import on_grid

LARGEST = 255  # of the whole numbers that 8 bits hold
SMALL = 128  # of those u for which two products fit in 16 bits with any weight: |q·u + q'·u'| ≤ 2·127·128 < 2¹⁵


@dataclass(frozen=True)
class Whole:
    """What is known of a value that is whole numbers x: which it stands for, and how small and large they can get."""

    unit: Tensor
    """It stands for unit·x; a scalar, or one per channel."""
    least: int
    most: int


def quantize(fused: fx.GraphModule) -> fx.GraphModule:
    """`fused`, which `Spiking.fuse()` made, with every layer in integers whose inputs are spikes, sums of spikes, or
    pixels.

    Weights have 8 bits; those that were trained in fewer keep these.  A copy, whose layers in integers have whole
    numbers as weights, and neurons with a threshold at a half for each channel. Where a layer cannot be in
    integers, `node.meta["float"]` of its operation says why; the others have `node.meta["integer"]`, and
    `node.meta["rounded"]`, whether their weights had to be rounded.
    """
    return _Quantization(copy.deepcopy(fused)).run()


def centre_thresholds_(snn: fx.GraphModule, images: Tensor) -> None:
    """Move each channel's bias, in place, by half a weight unit at most, so that its threshold is in the middle between
    two sums: of a network at one timestep that was trained with rounded weights.

    images: uint8 [B, C, H, W], of which only the shape matters. No spike changes but of neurons that are at their
    thresholds up to rounding, which the integer form decides as this network does from now on. The bias is that of the
    batch norm, convolution or linear layer that neurons take their current from. Where there is none, or where the
    weights are not whole multiples of a unit, nothing is moved.
    """
    fused = quantize(fuse(snn, images))
    for node in snn.graph.nodes:
        neurons = module_of(snn, node)
        if not isinstance(neurons, LIF):
            continue
        fire = next(n for n in fused.graph.nodes if n.target == str(node.target).removeprefix("neurons."))
        centring = fire.all_input_nodes[0].meta.get("centring")
        source = node.all_input_nodes[0]
        bias = getattr(module_of(snn, source), "bias", None)
        if centring is not None and isinstance(bias, nn.Parameter) and called_once(snn, source):
            with torch.no_grad():
                bias.add_(centring.to(bias))


@dataclass
class _Quantization:
    net: fx.GraphModule
    whole: dict[fx.Node, Whole] = field(default_factory=dict)

    def run(self) -> fx.GraphModule:
        for node in list(self.net.graph.nodes):
            module = module_of(self.net, node)
            if node.meta.get("axis") == "size":
                continue
            if computes_as(module, nn.Conv2d, nn.Linear) and self._layer(node, module):
                continue
            made = self._made(node, module)
            if made is not None:
                self.whole[node], node.meta["most"] = made, made.most
            else:
                self._stand_for(node)
        self.net.delete_all_unused_submodules()
        self.net.graph.lint()
        self.net.recompile()
        return self.net

    def _made(self, node: fx.Node, module: nn.Module | None) -> Whole | None:
        """The whole numbers that an operation without weights makes, if it does."""
        if isinstance(module, Normalize):
            return self._pixels(node, module)
        if isinstance(module, Fire):
            self._stand_for(node)  # without a layer before it, its threshold is one of real numbers
            return Whole(torch.ones(()), 0, 1)
        if computes_as(module, nn.AvgPool2d):
            return self._pool(node, module)
        if isinstance(module, Scale) and (given := self.whole.get(node.all_input_nodes[0])) is not None:
            self.net.set_submodule(str(node.target), nn.Identity())  # the height goes into the unit
            return Whole(given.unit * module.factor, given.least, given.most)
        return self._same(node, module)

    def _stand_for(self, node: fx.Node) -> None:
        """`node` takes real numbers: give it unit·x where it has taken x."""
        for source in node.all_input_nodes:
            if source in self.whole and bool((self.whole[source].unit != 1).any()):
                scale_input(self.net, node, source, self.whole[source].unit, "unit")

    def _pixels(self, node: fx.Node, normalize: Normalize) -> Whole | None:
        if node.all_input_nodes[0].op != "placeholder":  # not of raw pixels
            return None
        zero, scale = normalize.get_buffer("zero_point").flatten(), normalize.get_buffer("scale").flatten()
        if len(zero) > 1 or zero.item() != round(zero.item()) or not 0 <= zero.item() <= LARGEST:
            node.meta["float"] = "pixels have no zero point that is one whole number for all channels"
            return None
        point = round(zero.item())
        self.net.set_submodule(str(node.target), Normalize((point,), (1.0,)).to(zero.device))
        return Whole(scale.squeeze() if len(scale) == 1 else scale, -point, LARGEST - point)

    def _layer(self, node: fx.Node, layer: Any) -> bool:
        """Give a layer whole weights, and the neurons behind it thresholds at halves. False if it stays real."""
        source = node.all_input_nodes[0]
        given = self.whole.get(source)
        if given is None:
            node.meta["float"] = "its input is no spikes, sums of spikes, or pixels"
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            node.meta["float"] = f"its padding is {layer.padding_mode}"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1 and given.most - given.least > SMALL:
            node.meta["float"] = f"it is grouped, and its input has numbers above {SMALL}"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1 and not fours(layer):
            node.meta["float"] = "its groups have no multiples of 4 channels, which OpenVINO computes wrongly"
        elif not sums_channels(self.net, node):
            node.meta["float"] = "it acts on the last of several dimensions"
        if given is None or "float" in node.meta:
            return False
        inputs = layer.weight[0].numel()
        if inputs * 128 * LARGEST >= 2**31:
            node.meta["float"] = f"sums of {inputs} inputs may not fit in 32 bits"
            return False
        scale_inputs_(layer, given.unit)
        node.meta["integer"] = True
        q, unit, as_trained = on_grid(layer.weight.detach().double())
        node.meta["rounded"] = not as_trained
        factor = unit.flatten()
        bias = torch.zeros_like(factor) if layer.bias is None else layer.bias.detach().double()
        layer.weight, layer.bias = nn.Parameter(q.float(), requires_grad=False), None
        user = next(iter(node.users), None)
        neurons = module_of(self.net, user) if user is not None and len(node.users) == 1 else None
        if isinstance(neurons, Fire):
            up, down = q.flatten(1).clamp(min=0).sum(1), q.flatten(1).clamp(max=0).sum(1)
            largest, smallest = up * given.most + down * given.least, up * given.least + down * given.most
            exact = (neurons.threshold.double() - bias) / factor
            neurons.threshold = (torch.minimum(torch.maximum(exact.floor(), smallest - 1), largest) + 0.5).float()
            if as_trained:
                node.meta |= {"unit": factor, "centring": factor * (exact - exact.floor() - 0.5)}
            return True
        name = f"{node.name}_real"
        self.net.add_submodule(name, Scale(factor.float(), bias.float()))
        with self.net.graph.inserting_after(node):
            real = self.net.graph.call_module(name, (node,))
        real.meta |= {key: node.meta[key] for key in ("tensor_meta", "axis")}
        node.replace_all_uses_with(real, delete_user_cb=lambda user: user is not real)
        if user is None or user.op != "output":
            node.meta["float"] = "its output does not go to neurons alone"
        return True

    def _pool(self, node: fx.Node, pool: nn.AvgPool2d) -> Whole | None:
        given = self.whole.get(node.all_input_nodes[0])
        size = math.prod(pair(pool.kernel_size))
        if given is None or not divides_by_window(pool) or given.most * size > LARGEST or given.least < 0:
            return None
        sums = nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, divisor_override=1)
        self.net.set_submodule(str(node.target), sums)
        return Whole(given.unit / size, 0, given.most * size)

    def _same(self, node: fx.Node, module: nn.Module | None) -> Whole | None:
        """What hands whole numbers on, or puts them next to each other."""
        given = [self.whole[source] for source in node.all_input_nodes if source in self.whole]
        if joins_channels(node) and len(given) == len(node.all_input_nodes):
            given = [self.whole[source] for source in parts(node)]
            shapes = [source.meta["tensor_meta"].shape for source in parts(node)]
            if all(len(shape) == 4 for shape in shapes) and all(each.least == 0 for each in given):
                unit = torch.cat([each.unit.expand(shape[1]) for each, shape in zip(given, shapes, strict=True)])
                unit = unit[0] if bool((unit == unit[0]).all()) else unit
                return Whole(unit, min(each.least for each in given), max(each.most for each in given))
        if len(given) != 1 or not (computes_as(module, nn.MaxPool2d) or flattens(node, module)):
            return None
        if not flattens(node, module) and bool((given[0].unit < 0).any()):  # the largest x is the smallest value
            return None
        if given[0].unit.dim() and flattens(node, module):  # C·k features, which a linear layer takes as such
            return given[0] if all(sums_channels(self.net, user) for user in node.users) else None
        return given[0]


def fours(conv: nn.Conv2d) -> bool:
    """Whether a grouped convolution is depthwise, or its groups have multiples of 4 channels. OpenVINO 2026.4 computes
    others in integers wrongly on processors without VNNI."""
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    return inputs == outputs == 1 or inputs % 4 == outputs % 4 == 0


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation is [B, C, …] → [B, features]."""
    if computes_as(module, nn.Flatten):
        return bool(module.start_dim == 1 and module.end_dim == -1)
    if module is not None or node.target not in (torch.flatten, "flatten", torch.reshape, "reshape", "view"):
        return False
    before, after = (each.meta["tensor_meta"].shape for each in (values(node)[0], node))
    return len(after) == 2 and after[0] == before[0]


def divides_by_window(pool: nn.AvgPool2d) -> bool:
    """Whether every output is the sum over its window, border included, divided by the window's size."""
    bordered = pair(pool.padding) != (0, 0) and not pool.count_include_pad
    return not (pool.ceil_mode or pool.divisor_override or bordered)


def pair(size: Any) -> tuple[int, int]:
    """What torch takes for both dimensions, or for each."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
