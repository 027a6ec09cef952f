"""A quantised network as an ONNX model in 8-bit integers, of the standard operators QuantizeLinear and DequantizeLinear
around convolutions, which runtimes fuse. Knows nothing of runs, training or files.

A neuron is part of the convolution before it. Its input holds whole numbers x as u = m·x; its weights q are int8; and
its threshold n + ½, from `unitstep.quantizing`, is an int32 bias::

    fires  ⇔  Σ q·x > n + ½  ⇔  Σ q·u − (m·n + ⌊m/2⌋) ≥ 1

QuantizeLinear, with a scale that is small against that, makes 0 of all that is not above 0 and 255 of all that is: the
comparison is its saturation.

x86 processors without VNNI multiply 8-bit numbers in pairs, and q·u + q'·u' saturates at 2¹⁵ there. No pair gets so far
here: spikes are clipped to 0 and 1, counts are at most 128 if they can be, and a layer of larger u, as pixels are,
reads them twice, with halves of its weights, at most 64::

    Σ q·u = Σ ⌊q/2⌋·u + Σ (q − ⌊q/2⌋)·u
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from unitstep.fusing import BATCH_NORMS, CATS, Fire, Scale, affine, joined_along, kind_of, module_of, parts, per_channel
from unitstep.graphs import computes_as
from unitstep.nets import Normalize
from unitstep.quantizing import LARGEST, SMALL, flattens, pair

OPSET, IR = 13, 7  # the oldest with quantisation per channel
FIRES = 1 / 1024  # scale of a neuron's output: against a margin of at least ½
LOGITS = "logits"


@dataclass
class _Value:
    """A tensor in the file: real numbers, or uint8 u that stand for scale·(u − zero)."""

    name: str
    scale: float | None = None
    """None: real numbers, fp32."""
    zero: int = 0
    times: int = 1
    """u − zero is `times` times the whole number that the quantised network has here."""

    @property
    def unit(self) -> float:
        """The real number that the whole number 1 is."""
        assert self.scale is not None
        return self.scale * self.times


class _Writer:
    """Nodes and constants of a graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        self.constants[name] = numpy_helper.from_array(np.asarray(array, dtype, order="C"), name)
        return name

    def scalar(self, value: float, dtype: Any = np.float32) -> str:
        """A constant that nodes share."""
        return self.constant(f"{np.dtype(dtype).name}_{value:.9g}", value, dtype)

    def real(self, value: _Value, reader: str) -> str:
        """The real numbers of `value`, for the operation `reader`: runtimes fuse best where each reader has a
        dequantisation of its own."""
        if value.scale is None:
            return value.name
        given = [value.name, self.scalar(value.scale), self.scalar(value.zero, np.uint8)]
        return self.add("DequantizeLinear", given, f"{reader}_from_{value.name}")

    def whole(self, value: _Value, reader: str) -> str:
        """The whole numbers of `value` for an operation on real ones."""
        return self.real(value if value.scale is None else replace(value, scale=1 / value.times), reader)

    def quantized(self, real: str, output: str, scale: float, times: int) -> _Value:
        self.add("QuantizeLinear", [real, self.scalar(scale), self.scalar(0, np.uint8)], output)
        return _Value(output, scale, 0, times)


@dataclass
class _Integer:
    """Writes a network that `quantize` made, operation by operation."""

    net: fx.GraphModule
    writer: _Writer = field(default_factory=_Writer)
    values: dict[fx.Node, _Value] = field(default_factory=dict)
    small: dict[str, str] = field(default_factory=dict)
    """Of values above SMALL: their names, and those of what layers read in their place."""
    refused: list[str] = field(default_factory=list)

    def run(self) -> None:
        for node in self.net.graph.nodes:
            if node.name == LOGITS:  # the output's name
                node.name = f"{LOGITS}_layer"
            if node.op == "placeholder":
                self.values[node] = _Value(node.name, 1.0)
            elif node.op == "output":
                if not self.refused:
                    self.writer.add("Identity", [self.writer.real(self.values[node.args[0]], LOGITS)], LOGITS)
            elif node.meta.get("axis") != "size" and node.op.startswith("call_") and node not in self.values:
                module = module_of(self.net, node)
                written = self._operation(node, module)
                if written is None:
                    self.refused.append(f"{kind_of(node, module)} {node.name}")
                self.values[node] = written or _Value(node.name)

    def _operation(self, node: fx.Node, module: Any) -> _Value | None:
        """Write one operation; None if there is no form of it here."""
        given = [self.values[source] for source in node.all_input_nodes if source in self.values]
        name, write = node.name, self.writer
        if not given:  # of constants alone
            return None
        if computes_as(module, nn.Identity):
            return given[0]
        if isinstance(module, Normalize) and "most" in node.meta:  # whole numbers: pixels less their zero point
            return _Value(given[0].name, 1.0, round(module.get_buffer("zero_point").item()))
        if computes_as(module, nn.Conv2d, nn.Linear):
            return self._layer(node, module, given[0])
        if computes_as(module, nn.AvgPool2d) and "most" in node.meta:
            return self._sum(node, module, given[0])
        if computes_as(module, nn.MaxPool2d) and not module.return_indices and pair(module.dilation) == (1, 1):
            options = {"ceil_mode": int(module.ceil_mode)} | _window(module.kernel_size, module.stride, module.padding)
            return self._handed_on("MaxPool", name, given[0], **options)
        if flattens(node, module):
            return self._handed_on("Flatten", name, given[0])
        if node.target in CATS and len(given) == len(node.all_input_nodes):
            return self._cat(node, [self.values[source] for source in parts(node)], joined_along(node))
        real = [write.whole(value, name) for value in given]  # from here on everything is in floating point
        if isinstance(module, Fire):
            over = write.add("Greater", [real[0], self._vector(node, "threshold", module.threshold)], f"{name}_over")
            levels = [write.scalar(1, np.uint8), write.scalar(0, np.uint8)]
            return _Value(write.add("Where", [over, *levels], name), 1.0)
        if isinstance(module, Scale):
            return _Value(write.add("Mul", [real[0], self._vector(node, "factor", module.factor)], name))
        if isinstance(module, Normalize):
            centred = write.add("Sub", [real[0], write.constant(f"{name}_zero", module.zero_point)], f"{name}_centred")
            return _Value(write.add("Mul", [centred, write.constant(f"{name}_scale", module.scale)], name))
        if node.target in (operator.add, torch.add, "add") and len(real) == 2 and "alpha" not in node.kwargs:
            return _Value(write.add("Add", real, name))
        if computes_as(module, *BATCH_NORMS) and module.running_mean is not None:
            scale, shift = affine(module)
            scaled = write.add("Mul", [real[0], self._vector(node, "scale", scale)], f"{name}_scaled")
            return _Value(write.add("Add", [scaled, self._vector(node, "shift", shift)], name))
        if computes_as(module, nn.AvgPool2d) and not module.divisor_override:
            options = {"ceil_mode": int(module.ceil_mode), "count_include_pad": int(module.count_include_pad)}
            options |= _window(module.kernel_size, module.stride, module.padding)
            return _Value(write.add("AveragePool", real, name, **options))
        if kind_of(node, module).lower().replace("_", "") == "logsoftmax":  # the end of a network, [N, classes]
            return _Value(write.add("LogSoftmax", real, name, axis=1))
        return None

    def _vector(self, node: fx.Node, what: str, values: Tensor) -> str:
        return self.writer.constant(f"{node.name}_{what}", per_channel(values, len(node.meta["tensor_meta"].shape)))

    def _layer(self, node: fx.Node, layer: Any, given: _Value) -> _Value | None:
        """A convolution or linear layer: with the neurons or the unit behind it, if it is in integers."""
        name, write = node.name, self.writer
        kind, options = "Gemm", {"transB": 1}
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                return None
            window = _window(layer.kernel_size, layer.stride, layer.padding)
            kind, options = "Conv", window | {"dilations": pair(layer.dilation), "group": layer.groups}
        elif len(node.meta["tensor_meta"].shape) != 2:
            return None
        if "integer" not in node.meta:
            inputs = [write.whole(given, name)]
            inputs.append(write.constant(f"{name}_weight", layer.weight))
            inputs += [write.constant(f"{name}_bias", layer.bias)] if layer.bias is not None else []
            return _Value(write.add(kind, inputs, name, **options))
        most = given.zero + given.times * node.all_input_nodes[0].meta["most"]
        given, weights = self._small(given, most, layer.weight)
        inputs = [write.whole(given, name)]
        weight = write.constant(f"{name}_weight", weights, np.int8)
        user = next(iter(node.users))
        behind = module_of(self.net, user)
        if isinstance(behind, Scale):  # a·N + b, real numbers
            scale = write.constant(f"{name}_scale", behind.factor)
            zeros = write.constant(f"{name}_zero", torch.zeros_like(behind.factor), np.int8)
            inputs.append(write.add("DequantizeLinear", [weight, scale, zeros], f"{name}_real_weight", axis=0))
            inputs.append(write.constant(f"{name}_bias", behind.bias))
            self.values[user] = _Value(write.add(kind, inputs, user.name, **options))
            return self.values[user]
        assert isinstance(behind, Fire)
        zero = write.constant(f"{name}_zero", 0, np.int8)  # not shared: x64quantprecision of ONNX Runtime replaces it
        unit = [weight, write.scalar(1.0), zero]
        inputs.append(write.add("DequantizeLinear", unit, f"{name}_real_weight"))
        below = (behind.threshold.double() - 0.5).round()  # n: neurons fire from n + 1 on
        bias = write.constant(f"{name}_bias", -(below * given.times + given.times // 2), np.int32)
        unit = [bias, write.scalar(1 / given.times), write.scalar(0, np.int32)]
        inputs.append(write.add("DequantizeLinear", unit, f"{name}_real_bias"))
        current = write.add(kind, inputs, name, **options)
        self.values[user] = write.quantized(current, user.name, FIRES, LARGEST)
        return self.values[user]

    def _small(self, given: _Value, most: int, weights: Tensor) -> tuple[_Value, Tensor]:
        """What a layer reads in place of `given`, whose largest u is `most`, and with which weights [O, I, …], so that
        no pair of products saturates."""
        if most <= SMALL:
            return given, weights
        write, spikes = self.writer, given.times == most
        if given.name not in self.small:
            bounds = [write.scalar(0, np.uint8), write.scalar(1, np.uint8)]
            self.small[given.name] = (
                write.add("Clip", [given.name, *bounds], f"{given.name}_clipped")
                if spikes
                else write.add("Concat", [given.name] * 2, f"{given.name}_twice", axis=1)
            )
        name = self.small[given.name]
        if spikes:
            return _Value(name, 1.0), weights
        half = (weights / 2).floor()
        return replace(given, name=name), torch.cat([half, weights - half], 1)

    def _sum(self, node: fx.Node, pool: nn.AvgPool2d, given: _Value) -> _Value:
        """Counts of spikes: the average pool of what they are worth, quantised so that every count is a level."""
        window = _window(pool.kernel_size, pool.stride, pool.padding)
        real = self.writer.real(given, node.name)
        mean = self.writer.add("AveragePool", [real], f"{node.name}_mean", count_include_pad=1, **window)
        times = max(1, SMALL // node.meta["most"])
        return self.writer.quantized(mean, node.name, given.unit / math.prod(pair(pool.kernel_size)) / times, times)

    def _handed_on(self, kind: str, name: str, given: _Value, **options: Any) -> _Value:
        return replace(given, name=self.writer.add(kind, [given.name], name, **options))

    def _cat(self, node: fx.Node, given: list[_Value], axis: int) -> _Value:
        name, write = node.name, self.writer
        if all((value.scale, value.times) == (given[0].scale, given[0].times) for value in given):
            return replace(given[0], name=write.add("Concat", [value.name for value in given], name, axis=axis))
        real = write.add("Concat", [write.whole(value, name) for value in given], f"{name}_real", axis=axis)
        if "most" not in node.meta or any(value.scale is None or value.zero for value in given):
            return _Value(real)
        times = max(1, SMALL // node.meta["most"])
        return write.quantized(real, name, 1 / times, times)


def _window(kernel: Any, stride: Any, padding: Any) -> dict[str, Any]:
    return {"kernel_shape": pair(kernel), "strides": pair(stride), "pads": pair(padding) * 2}


def integer_model(net: fx.GraphModule, shape: Sequence[int]) -> onnx.ModelProto:
    """The ONNX model of a network that `quantize` made, for images uint8 of `shape` (C, H, W). Outputs: the logits,
    then the spikes of each neuron layer, uint8, above 0 where it fires. ValueError, naming all, if operations have no
    form here."""
    integer = _Integer(net)
    integer.run()
    if integer.refused:
        raise ValueError(
            f"these operations have no 8-bit form: {', '.join(integer.refused)}. Export in floating point: --form float"
        )
    write, nodes = integer.writer, net.graph.nodes
    given = next(node.name for node in nodes if node.op == "placeholder")
    classes = next(node for node in nodes if node.op == "output").args[0].meta["tensor_meta"].shape[1]
    inputs = [helper.make_tensor_value_info(given, TensorProto.UINT8, ["N", *shape])]
    outputs = [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", classes])]
    for node in nodes:
        if isinstance(module_of(net, node), Fire):
            sizes = ["N", *node.meta["tensor_meta"].shape[1:]]
            outputs.append(helper.make_tensor_value_info(integer.values[node].name, TensorProto.UINT8, sizes))
    graph = helper.make_graph(write.nodes, "unitstep", inputs, outputs, list(write.constants.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
