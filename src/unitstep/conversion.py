"""From a CNN to a spiking network: trace it, put a neuron in the place of every ReLU call, find the thresholds. Knows
nothing of training, data sets or files.

Time is folded into the batch: once something has spiked, values are [T·B, …] with all B of step 1 first, and the
user's convolutions, norms, pools and additions run on them untouched. What no spike has reached yet, the stem, is the
same at every step and is computed once, as [B, …].
"""

import copy
import operator
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from unitstep.nets import Normalize
from unitstep.neuron import LIF, Height, check_steps, membranes

Norm = Literal["none", "fold", "keep"]
Readout = Literal["sum", "mean"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RELU_FUNCTIONS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_}
DROPOUTS: dict[Any, Any] = {nn.Dropout: F.dropout, nn.Dropout1d: F.dropout1d, nn.Dropout2d: F.dropout2d}
# Operations that act on each image (and so on each step) alone: they run on folded time as they are.
KEPT_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear, *BATCH_NORMS,
    nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, Normalize,
)  # fmt: skip
KEPT_FUNCTIONS: set[Any] = {
    torch.flatten, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, operator.getitem, getattr,
}  # fmt: skip
KEPT_METHODS = {"flatten", "view", "reshape", "contiguous", "size"}
MEETINGS: set[Any] = {operator.add, operator.iadd, torch.add, torch.cat}  # where the stem's currents may meet spikes


class Spiking(fx.GraphModule):  # type: ignore[misc,unused-ignore]
    """A network callable with any number of timesteps: `snn(images, steps=3)`.

    images [B, C, H, W] → logits [B, classes], the readout's sum or mean over the steps. No state survives a call.
    Parameters and buffers keep the names they had in the CNN; the neurons are `neurons.NAME`, NAME being the ReLU
    call's name in the traced graph. ValueError if steps < 1.
    """

    @property
    def lifs(self) -> dict[str, LIF]:
        """The neuron layers by name, in the order in which they fire."""
        found = ((node, self.get_submodule(str(node.target))) for node in self.graph.nodes if node.op == "call_module")
        return {str(node.target).removeprefix("neurons."): module for node, module in found if isinstance(module, LIF)}


class SharedDropout(nn.Module):
    """Dropout (of elements or of channels) that draws one mask per call and uses it at every step.

    [T·B, …], steps → [T·B, …].
    """

    def __init__(self, p: float, function: Any = F.dropout) -> None:
        super().__init__()
        self.p, self.function = p, function

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = self.function(torch.ones_like(x[: len(x) // steps]), self.p, True)
        return x * _repeat(mask, steps)


def to_spiking(
    cnn: nn.Module,
    images: Tensor,
    *,
    steps: int = 5,
    percentile: float = 90.0,
    scale: float = 1.0,
    calibration_steps: int | None = None,
    height: Height = "threshold",
    initial: float = 0.0,
    readout: Readout = "mean",
    norm: Norm = "keep",
) -> Spiking:
    """A spiking copy of `cnn`, which stays untouched, with thresholds found on `images` [B, C, H, W] at `steps`
    timesteps: see `spiking` and `calibrate_`."""
    snn = spiking(cnn, height=height, initial=initial, readout=readout, norm=norm)
    return calibrate_(snn, images, steps=calibration_steps or steps, percentile=percentile, scale=scale)


def spiking(
    cnn: nn.Module,
    *,
    height: Height = "threshold",
    initial: float = 0.0,
    readout: Readout = "mean",
    norm: Norm = "keep",
) -> Spiking:
    """The structure alone: a copy of `cnn` with a `LIF` of threshold 1 and leak 1 for every ReLU call, shared dropout
    masks and a readout over time.

    height: a spike is worth 1 ("unit", the paper's) or its layer's threshold.  readout: "sum" (the paper's) or "mean"
    over the steps of the last layer's output.
    norm: batch norm is kept, acting on all T·B rows ("keep"), is folded into the convolution or linear layer before it
    ("fold"), or must not be there ("none"). Raises ValueError, naming the operation and the way out, for whatever does
    not convert.
    """
    if norm not in ("none", "fold", "keep"):
        raise ValueError(f'norm must be "none", "fold" or "keep", not {norm!r}')
    if readout not in ("sum", "mean"):
        raise ValueError(f'readout must be "sum" or "mean", not {readout!r}')
    net = copy.deepcopy(cnn)
    try:
        graph = _Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(cnn).__name__} cannot be traced, because what it does depends on the data: {error}"
        ) from error
    if norm != "keep":
        _remove_norms(net, graph, fold=norm == "fold")
    _insert_neurons(net, graph, height, initial, readout)
    snn = Spiking(net, graph)
    snn.train(cnn.training)
    return snn


class _Tracer(fx.Tracer):  # type: ignore[misc,unused-ignore]
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Normalize) or super().is_leaf_module(module, name)


def _module(net: nn.Module, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def _remove_norms(net: nn.Module, graph: fx.Graph, *, fold: bool) -> None:
    """Fold every batch norm into the layer right before it; without `fold`, refuse the first one found."""
    for node in list(graph.nodes):
        norm = _module(net, node)
        if not isinstance(norm, BATCH_NORMS):
            continue
        if not fold:
            raise ValueError(
                f'{node.target} is a batch norm, but norm="none": use norm="fold" or "keep", or a CNN without batch '
                "norm"
            )
        before = node.args[0]
        layer = _module(net, before)
        foldable = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        calls = [other for other in graph.nodes if other.target in (before.target, node.target)]
        if not foldable or len(before.users) > 1 or len(calls) > 2:
            raise ValueError(
                f"batch norm {node.target} does not directly follow a convolution or linear layer of its own: use "
                'norm="keep"'
            )
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(layer.eval(), norm.eval())  # type: ignore[type-var,union-attr]
        net.set_submodule(str(before.target), fused.requires_grad_())
        net.set_submodule(str(node.target), nn.Identity())
        node.replace_all_uses_with(before)
        graph.erase_node(node)


def _dropout(node: fx.Node, module: nn.Module | None) -> SharedDropout | None:
    """What takes the place of a dropout, as module or function; None for any other operation."""
    if type(module) in DROPOUTS:
        return SharedDropout(module.p, DROPOUTS[type(module)])  # type: ignore[arg-type,union-attr]
    if node.op == "call_function" and node.target in DROPOUTS.values():
        p: Any = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return SharedDropout(float(p), node.target)
    return None


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    return (
        type(module) is nn.ReLU
        or (node.op == "call_function" and node.target in RELU_FUNCTIONS)
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
    )


def _is_kept(node: fx.Node, module: nn.Module | None) -> bool:
    return (
        node.op == "get_attr"
        or isinstance(module, KEPT_MODULES)
        or (node.op == "call_function" and node.target in KEPT_FUNCTIONS | MEETINGS)
        or (node.op == "call_method" and node.target in KEPT_METHODS)
    )


def _mixes_images(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation joins or cuts the batch dimension, which also holds the timesteps."""

    def argument(name: str, position: int, default: Any) -> Any:
        return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)

    if node.target is torch.cat:
        return bool(argument("dim", 1, 0) == 0)
    if node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten"):
        return bool(argument("start_dim", 1, 0) == 0)
    if node.target is operator.getitem:
        index: Any = node.args[1]
        first = index[0] if isinstance(index, tuple) else index
        source = node.all_input_nodes[0]
        is_size = source.target is getattr or (source.op, source.target) == ("call_method", "size")
        return first != slice(None) and not is_size
    return isinstance(module, nn.Flatten) and module.start_dim == 0


def _insert_neurons(net: nn.Module, graph: fx.Graph, height: Height, initial: float, readout: Readout) -> None:
    """Rewrite `graph` in place: it takes (images, steps); `spiked` are the nodes whose values have a time axis."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(
            f"the network takes {len(inputs)} inputs ({', '.join(map(str, inputs))}); only networks of one image "
            "input convert"
        )
    with graph.inserting_after(inputs[0]):
        steps = graph.placeholder("steps", default_value=1)
    with graph.inserting_after(steps):
        steps = graph.call_function(check_steps, (steps,))
    if hasattr(net, "neurons"):
        raise ValueError(
            "the network has an attribute named neurons, the name under which the spiking neurons are stored: rename it"
        )
    net.neurons = nn.Module()
    spiked: set[fx.Node] = set()

    for node in list(graph.nodes):
        if node.op == "placeholder" or node is steps:
            continue
        module = _module(net, node)
        sources = [source for source in node.all_input_nodes if source in spiked]
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node) or node.args[0] not in spiked:
                raise ValueError(
                    "no ReLU lies between the network's input and its output, so nothing would spike; a network must "
                    "return one tensor of logits"
                )
            with graph.inserting_before(node):
                node.args = (graph.call_function(_read_out, (node.args[0], steps, readout)),)
        elif _is_relu(node, module):
            net.neurons.add_module(node.name, LIF(height=height, initial=initial))
            with graph.inserting_before(node):
                kwargs: dict[str, fx.node.Argument] = {} if sources else {"static": True}
                neuron = graph.call_module(f"neurons.{node.name}", (node.all_input_nodes[0], steps), kwargs)
            node.replace_all_uses_with(neuron)
            graph.erase_node(node)
            spiked.add(neuron)
        elif (shared := _dropout(node, module)) is not None:
            net.neurons.add_module(node.name, shared)
            with graph.inserting_before(node):
                dropout = graph.call_module(
                    f"neurons.{node.name}", (node.all_input_nodes[0], *([steps] if sources else []))
                )
            node.replace_all_uses_with(dropout)
            graph.erase_node(node)
            if sources:
                spiked.add(dropout)
        elif not _is_kept(node, module):
            what = (
                f"{type(module).__name__} {node.target}"
                if module
                else f"{getattr(node.target, '__name__', node.target)} (node {node.name})"
            )
            raise ValueError(
                f"{what} has no spiking form here: replace it by ReLU, pooling, batch norm, addition or "
                "concatenation, or leave it out"
            )
        elif sources:
            if _mixes_images(node, module):
                raise ValueError(
                    f"{node.name} joins or cuts the first dimension, which holds images and timesteps: write it so "
                    "that it acts on each image alone, e.g. torch.flatten(x, 1), torch.cat(parts, 1)"
                )
            spiked.add(node)
            for source in node.all_input_nodes:
                if source not in spiked:
                    if node.target not in MEETINGS:
                        raise ValueError(
                            f"{node.name} mixes spikes with {source.name}, which has no time axis: only additions "
                            "and concatenations may do that"
                        )
                    with graph.inserting_before(node):
                        node.replace_input_with(source, graph.call_function(_repeat, (source, steps)))
    graph.lint()


def _repeat(x: Tensor, steps: int) -> Tensor:
    """[B, …] → [T·B, …]: the same at every step."""
    return x if steps == 1 else x.repeat(steps, *[1] * (x.dim() - 1))


def _read_out(x: Tensor, steps: int, readout: str) -> Tensor:
    """[T·B, classes] → [B, classes]: what a neuron without leak and without threshold has integrated, or its mean per
    step."""
    over_time: Tensor = x.unflatten(0, (steps, len(x) // steps))
    return over_time.sum(0) if readout == "sum" else over_time.mean(0)


@torch.no_grad()
def calibrate_(
    snn: Spiking, images: Tensor, *, steps: int, percentile: float = 90.0, scale: float = 1.0, window: int = 10
) -> Spiking:
    """Set every threshold of `snn` from the currents that `images` [B, C, H, W] cause, in place, layer by layer:
    earlier layers already spike.

    V = scale · max over the steps of the `percentile`-th percentile (nearest rank, over all neurons and images) of the
    layer's current; a result ≤ 0 becomes 0.1. Leaks must still be 1. Batch norms that were kept take their statistics
    from the same images. The paper uses percentile 90 and 500 steps (its predecessor 99.7 and scale 0.2–0.6). Steps
    run `window` at a time, so memory does not grow with their number; beyond one window the time grows with the square
    of the number of layers. Warns with the name of a layer that emits no spike. Source: arXiv 2110.05929, 2008.03658.
    """
    check_steps(steps)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], not {percentile}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, not {scale}")
    if len(images) == 0:
        raise ValueError("calibration needs at least one image")
    training = {name: module.training for name, module in snn.named_modules()}
    snn.eval()
    norms = [module for module in snn.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:  # use and remember the statistics of these images
        norm.train()
        norm.momentum = 1.0
    windows = [min(window, steps - start) for start in range(0, steps, window)]
    sweep = _Sweep(snn, images, windows)
    try:
        for name, lif in snn.lifs.items():
            peak = max(_percentile(now, percentile) for current in sweep.currents(name) for now in current)
            lif.threshold.fill_(scale * peak if peak > 0 else 0.1)
            lif.leak.fill_(1.0)
        for _ in sweep.currents(None):
            pass
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for name, module in snn.named_modules():
            module.training = training[name]
    if dead := [name for name in snn.lifs if name not in sweep.alive]:
        way_out = "a lower percentile or scale lowers its threshold"
        warnings.warn(f"layer {', '.join(dead)} emits no spike on the calibration images: {way_out}", stacklevel=2)
    return snn


def _percentile(x: Tensor, percentile: float) -> float:
    """The value of nearest rank; `torch.quantile` takes no more than 16 million elements."""
    return x.flatten().kthvalue(1 + round(percentile / 100 * (x.numel() - 1))).values.item()


class _Sweep(fx.Interpreter):  # type: ignore[misc,unused-ignore]
    """Runs a spiking network operation by operation, in windows of timesteps between which the membranes are carried
    over.

    A single window is run once, stopping at each layer on the way. Several cannot all be kept in memory: each layer
    starts anew from the images.
    """

    def __init__(self, snn: Spiking, images: Tensor, windows: list[int]) -> None:
        super().__init__(snn)
        self.images, self.windows = images, windows
        self.nodes = list(snn.graph.nodes)
        self.position = 0
        self.left: dict[str, Tensor] = {}  # membranes at the end of the window before
        self.alive: set[str] = set()

    def currents(self, name: str | None) -> Iterator[Tensor]:
        """Per window the current of neuron layer `name`, [steps, B, …] or, if static, [1, B, …]; None runs to the
        end."""
        if len(self.windows) > 1:
            self.left = {}
        for length in self.windows:
            if len(self.windows) > 1 or self.position == 0:
                self.position, self.env = 0, {}
                self.args_iter = iter([self.images, length])
            while self.position < len(self.nodes):
                node = self.nodes[self.position]
                if node.op == "call_module" and node.target == f"neurons.{name}":
                    yield self.env[node.args[0]].unflatten(0, (1 if node.kwargs.get("static") else length, -1))
                    break
                self.env[node] = self.run_node(node)
                for dead in self.user_to_last_uses.get(node, []):
                    del self.env[dead]
                self.position += 1

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lif = self.fetch_attr(target)
        if not isinstance(lif, LIF):
            return super().call_module(target, args, kwargs)
        current, steps = args
        flat = current.flatten(1).unflatten(0, (1 if kwargs.get("static") else steps, -1))
        precision = torch.promote_types(current.dtype, torch.float32)
        V, leak = lif.threshold.to(precision), lif.leak.to(precision)
        left = self.left.get(target, lif.initial * V if lif.initial else None)
        spikes = []
        for _, membrane, fires in membranes(flat, V, leak, steps, left):
            spikes.append((fires * (V if lif.height == "threshold" else 1.0)).to(current.dtype))
            self.left[target] = membrane - V * fires
            if fires.any():
                self.alive.add(target.removeprefix("neurons."))
        return torch.cat(spikes).unflatten(1, current.shape[1:])
