"""A one-timestep network as a NIR graph, for neuromorphic software and chips. Knows nothing of runs, training or data
sets.

NIR, the Neuromorphic Intermediate Representation (https://neuroir.org), has integrate-and-fire neurons v ← v + r·I that
fire at v > v_threshold and are then at v_reset. From v = 0, and for one step, that is our comparison. It has neither a
soft reset nor a step, so with more of them it is another neuron: only T = 1 can be said in it.

Other libraries read one threshold for a whole layer only, so the weights and bias of each channel are divided by its
threshold, and all neurons fire above 1.
"""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from unitstep.conversion import Spiking
from unitstep.files import check_writable, write_whole
from unitstep.fusing import Fire, Scale, kind_of, module_of, per_channel, refuse_precision, sums_channels, values
from unitstep.graphs import computes_as
from unitstep.nets import Normalize
from unitstep.quantizing import divides_by_window, flattens, pair

INPUT, OUTPUT = "input", "output"


def to_nir(
    snn: Spiking, path: str | Path, images: Tensor, *, steps: int = 1, pools: Literal["mean", "sum"] = "mean"
) -> Any:
    """Write `snn` at one timestep to the NIR file `path`, and return the `nir.NIRGraph`.

    images: [B, C, H, W] as the network takes them, of which only the shape matters. The graph's input is what comes out
    of the network's `Normalize`, (pixel − zero point)·scale, if it begins with one; its output is the logits; its
    neurons are named as in `snn.lifs`. pools: average pools as AvgPool2d nodes, or as SumPool2d, with their sizes in
    the next weights; no library that was tried reads both. Raises ValueError for more than one step, if an operation
    has no form in NIR, naming all, for weights that are not fp32, and if the package nir is not installed.
    """
    if steps != 1:
        raise ValueError(
            f"NIR cannot say a network at {steps} timesteps: its neurons have no soft reset, and it has no step. At "
            "one timestep neither matters (steps=1)"
        )
    try:
        import nir
    except ImportError as error:
        raise ValueError("nir is not installed here: pip install nir") from error
    check_writable(Path(path))
    refuse_precision(snn)
    net = snn.fuse(images).cpu()
    writer = _Writer(net, nir, pools == "sum")
    graph = writer.run()
    content = io.BytesIO()
    nir.write(content, graph)
    write_whole(Path(path), content.getvalue())
    return graph


class _Writer:
    def __init__(self, net: fx.GraphModule, nir: Any, sums: bool) -> None:
        self.net, self.nir, self.sums = net, nir, sums
        self.windows: dict[str, int] = {}  # what the output of a NIR node must still be divided by
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.names: dict[fx.Node, str] = {}  # of the NIR node whose output a value is

    def run(self) -> Any:
        refused, behind = [], set[fx.Node]()  # behind: what follows from an operation that is refused
        for node in self.net.graph.nodes:
            module = module_of(self.net, node)
            if node.op != "output" and node.name in (INPUT, OUTPUT):  # names of the graph's own
                node.name = f"{node.name}_layer"
            if behind.intersection(node.all_input_nodes):
                behind.add(node)
                continue
            first = isinstance(module, Normalize) and node.all_input_nodes[0].op == "placeholder"
            if node.op == "placeholder" or first:  # the graph takes what is normalised
                self.nodes[INPUT] = self.nir.Input({"input": _shape(node)})
                self.names[node] = INPUT
            elif node.op == "output":
                if self._window(node.args[0]) != 1:
                    raise ValueError("a sum pool at the network's end has no weights behind it: write mean pools")
                self._add(OUTPUT, self.nir.Output({"output": _shape(node.args[0])}), node.args[0])
            elif node.meta.get("axis") == "size":
                continue
            elif node.op.startswith("call_") and not self._operation(node, module):
                refused.append(f"{kind_of(node, module)} {node.name}")
                behind.add(node)
        if refused:
            raise ValueError(f"NIR has no form of these operations: {', '.join(refused)}")
        return self.nir.NIRGraph(self.nodes, self.edges, metadata={})

    def _add(self, name: str, made: Any, source: fx.Node) -> None:
        self.nodes[name] = made
        self.edges.append((self.names[source], name))
        if type(made) in (self.nir.SumPool2d, self.nir.AvgPool2d, self.nir.Flatten):  # the others have divided
            self.windows[name] = self._window(source)
        if isinstance(made, self.nir.SumPool2d):
            self.windows[name] *= int(np.prod(made.kernel_size))

    def _window(self, source: fx.Node) -> int:
        return self.windows.get(self.names[source], 1)

    def _operation(self, node: fx.Node, module: Any) -> bool:
        """Write one operation; False if there is no form of it."""
        if len(values(node)) != 1:
            return False
        source = values(node)[0]
        if computes_as(module, nn.Conv2d, nn.Linear):
            return sums_channels(self.net, node) and self._layer(node, module, source)
        if isinstance(module, Fire):  # weights before it are divided by its threshold
            if not computes_as(module_of(self.net, source), nn.Conv2d, nn.Linear) or len(source.users) > 1:
                return False
            self._fire(node.name, _shape(node), 1.0, source)
        elif isinstance(module, Scale):
            factor = per_channel(module.factor / self._window(source), len(_shape(node)) + 1)
            self._add(node.name, self.nir.Scale(np.broadcast_to(factor.numpy(), (1, *_shape(node)))[0].copy()), source)
        elif computes_as(module, nn.AvgPool2d):
            if not divides_by_window(module):
                return False
            self._add(node.name, self._pool(module), source)
        elif computes_as(module, nn.MaxPool2d):  # of spikes: whether there is one
            one = isinstance(module_of(self.net, source), Fire) and pair(module.dilation) == (1, 1)
            if not one or module.ceil_mode or module.return_indices:
                return False
            self.names[node] = f"{node.name}_pool"
            self._add(self.names[node], self._pool(module), source)
            self._fire(node.name, _shape(node), 0.5 / np.prod(pair(module.kernel_size)) * self._window(node), node)
        elif flattens(node, module):
            # from the end, so that it means the same with and without a dimension for the batch
            self._add(node.name, self.nir.Flatten({"input": _shape(source)}, start_dim=-len(_shape(source))), source)
        else:
            return False
        self.names[node] = node.name
        return True

    def _pool(self, pool: Any) -> Any:
        kernel, stride, padding = (np.array(pair(size)) for size in (pool.kernel_size, pool.stride, pool.padding))
        return (self.nir.SumPool2d if self.sums else self.nir.AvgPool2d)(kernel, stride, padding)

    def _fire(self, name: str, shape: Any, threshold: float, source: fx.Node) -> None:
        ones = np.ones(shape, np.float32)
        self._add(name, self.nir.IF(r=ones, v_threshold=threshold * ones, v_reset=0 * ones), source)

    def _layer(self, node: fx.Node, layer: Any, source: fx.Node) -> bool:
        weight, count = layer.weight.detach() / self._window(source), layer.weight.shape[0]
        bias = torch.zeros(count) if layer.bias is None else layer.bias.detach()
        neurons = [module_of(self.net, user) for user in node.users]
        if len(neurons) == 1 and isinstance(neurons[0], Fire):
            threshold = neurons[0].threshold.expand(count)
            weight, bias = weight / threshold.view(-1, *[1] * (weight.dim() - 1)), bias / threshold
        elif any(isinstance(module, Fire) for module in neurons):
            return False
        if isinstance(layer, nn.Conv2d):
            weight = _ungrouped(weight, layer.groups)
        arrays = {"weight": weight.numpy(), "bias": bias.numpy()}
        if isinstance(layer, nn.Linear):
            made = self.nir.Affine(**arrays)
        elif layer.padding_mode != "zeros":
            return False
        else:
            size = tuple(int(side) for side in _shape(source)[1:])
            options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            made = self.nir.Conv2d(input_shape=size, groups=1, **arrays, **options)
        self._add(node.name, made, source)
        self.names[node] = node.name
        return True


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """[O, I / groups, …] → [O, I, …], with zeros between the groups: nir's own types, and some libraries, know none."""
    parts: Tensor = weight.unflatten(0, (groups, -1))
    each = torch.arange(groups)
    whole = parts.new_zeros(*parts.shape[:2], groups, *parts.shape[2:])
    whole[each, :, each] = parts
    return whole.flatten(0, 1).flatten(1, 2)


def _shape(node: fx.Node) -> "np.ndarray[Any, Any]":
    """Of a value, for one image."""
    return np.array(node.meta["tensor_meta"].shape[1:])
