"""A spiking network at a fixed number of steps as an ordinary one: batch norms and heights go into the weights next to
them, and a neuron is a comparison. Knows nothing of how a network was converted or trained.

At T = 1 a neuron has U = λ·U(0) + I with U(0) = initial·V and fires if U > V, so::

    s = 1 if I > V·(1 − λ·initial) else 0

which is one comparison. Its height h multiplies every weight that the spikes meet: W·(h·s) = (W·h)·s.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils import parametrize

from unitstep.graphs import Graph, class_of, computes_as
from unitstep.neuron import LIF, SharedDropout, check_steps, membranes, read_out, repeat

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
CATS: tuple[Any, ...] = (torch.cat, torch.concat, torch.concatenate)
AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MAXIMUM = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
POOL_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {  # the equal module, and arguments in order
    F.avg_pool1d: (nn.AvgPool1d, AVERAGE),
    F.avg_pool2d: (nn.AvgPool2d, AVERAGE),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.max_pool1d: (nn.MaxPool1d, MAXIMUM),
    F.max_pool2d: (nn.MaxPool2d, MAXIMUM),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
}
EVEN: dict[Any, Any] = {nn.AdaptiveAvgPool2d: nn.AvgPool2d, nn.AdaptiveMaxPool2d: nn.MaxPool2d}
POOLS = tuple(pool for pool, _ in POOL_FUNCTIONS.values())


class Fire(nn.Module):
    """A `LIF` in evaluation, at a number of steps that is fixed: current [T·B, …], or [B, …] if it is the same at every
    step, → spikes [T·B, …], worth 0 or `height`, in the current's dtype."""

    threshold: Tensor
    leak: Tensor
    height: Tensor

    def __init__(self, lif: LIF, steps: int, static: bool) -> None:
        super().__init__()
        V, leak = lif.threshold.detach(), lif.leak.detach()
        self.steps, self.rows, self.initial = steps, 1 if static else steps, lif.initial
        self.register_buffer("threshold", V * (1 - leak * lif.initial) if steps == 1 else V.clone())
        self.register_buffer("leak", leak.clone())
        self.register_buffer("height", V.clone() if lif.height == "threshold" else torch.ones(()))

    def forward(self, current: Tensor) -> Tensor:
        precision = torch.promote_types(current.dtype, torch.float32)  # as that of a `LIF`
        V = per_channel(self.threshold, current.dim()).to(precision)
        if self.steps == 1:
            fired = current.to(precision) > V
        else:
            over_time = current.unflatten(0, (self.rows, current.shape[0] // self.rows))
            states = membranes(over_time, V, self.leak.to(precision), self.steps, self.initial)
            fired = torch.cat([fires for _, _, fires in states])
        return fired.to(current.dtype) * per_channel(self.height, current.dim()).to(current.dtype)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold.mean():.4g}, height={self.height.mean():.4g}, steps={self.steps}"


class Scale(nn.Module):
    """x·factor + bias, one for all or one per channel (dimension 1): the height of spikes that meet no weights, or what
    whole numbers stand for."""

    factor: Tensor
    bias: Tensor | None

    def __init__(self, factor: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("factor", factor.clone())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * per_channel(self.factor, x.dim()).to(x.dtype)
        return scaled if self.bias is None else scaled + per_channel(self.bias, x.dim())


def per_channel(values: Tensor, dimensions: int) -> Tensor:
    """A scalar as it is, [C] → [C, 1, …], so that it meets dimension 1 of a tensor with so many dimensions."""
    return values if values.dim() == 0 else values.view(-1, *[1] * (dimensions - 2))


# ---------------------------------------------------------------------------------------------------------------- fuse


def fuse(snn: fx.GraphModule, images: Tensor, steps: int = 1) -> fx.GraphModule:
    """The spiking network `snn` at `steps` timesteps as a plain module, in evaluation: images [B, C, H, W] → logits
    [B, classes].

    images: as high and wide as those that the result is for; nothing else matters.  A copy, with nothing to train,
    whose modules have the names of the traced graph's operations: convolutions and linear layers, with a bias where a
    batch norm was, a `Fire` for each neuron layer, and what else the network has. Equal to `snn(images, steps)` but for
    rounding: where a membrane is at its threshold to 1e-6 or so, a spike can differ. Forward hooks are left out.
    ValueError if steps < 1.
    """
    check_steps(steps)
    net = _at_fixed_steps(snn, steps).eval()
    shapes = ShapeProp(net)
    shapes.garbage_collect_values = False
    shapes.propagate(images[:1].to(next(net.buffers()).device))
    _pools_as_modules(net, shapes.env)
    for node in list(net.graph.nodes):
        if computes_as(module_of(net, node), *BATCH_NORMS):
            fold_norm(net, node)
    _heights_into_weights(net)
    net.delete_all_unused_submodules()
    net.graph.lint()
    net.recompile()
    return net.requires_grad_(False)


def refuse_hooks(snn: fx.GraphModule) -> None:
    """ValueError, with its name, if a module that `snn` calls has forward hooks. (Those of neurons only look on.)"""
    for node in snn.graph.nodes:
        called = module_of(snn, node)
        for module in called.modules() if called is not None and not isinstance(called, LIF) else ():
            if has_hooks(module):
                raise ValueError(
                    f"{type(module).__name__} {node.target} has forward hooks, which an equal ordinary network would "
                    "not be sure to keep: remove them, by remove() of what registered them, or as "
                    "torch.nn.utils.remove_spectral_norm and prune.remove do"
                )


def refuse_precision(snn: fx.GraphModule) -> None:
    """ValueError if `snn` has weights that are not fp32."""
    if other := {weight.dtype for weight in snn.parameters() if weight.is_floating_point()} - {torch.float32}:
        raise ValueError(f"the network's weights are {other.pop()}, the file's are fp32: export snn.float()")


def sums_channels(net: nn.Module, node: fx.Node) -> bool:
    """Whether `node` calls a layer that sums over channels, dimension 1, to which heights and batch norms belong: a
    convolution, or a linear layer on [B, features]. Of more dimensions, where they are known, that takes the last."""
    layer, known = module_of(net, node), node.meta.get("tensor_meta")
    rows = known is None or len(known.shape) == 2
    return computes_as(layer, *CONVOLUTIONS) or (computes_as(layer, nn.Linear) and rows)


def _at_fixed_steps(snn: fx.GraphModule, steps: int) -> fx.GraphModule:
    """A copy of `snn` without its input `steps`, and with a module of its own, under the call's name, for every call of
    one."""
    root, graph = nn.Module(), fx.Graph()
    numbers: dict[Any, Any] = {
        node: steps
        for node in snn.graph.nodes
        if node.target is check_steps or (node.op, node.target) == ("placeholder", "steps")
    }
    graph.output(graph.graph_copy(snn.graph, numbers))
    for node in list(graph.nodes):
        module = module_of(snn, node)
        nothing = computes_as(module, SharedDropout, nn.Identity) or (node.op, node.target) == ("call_method", "detach")
        if nothing or (steps == 1 and node.target in (repeat, read_out)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif module is not None:
            if isinstance(module, LIF):
                if (module.threshold <= 0).any() or not 0 < module.leak <= 1:
                    raise ValueError(
                        f"the neurons {node.target} have thresholds of 0 or less, or a leak outside (0, 1]: call "
                        "unitstep.clamp_(network) after each optimiser step"
                    )
                node.name = str(node.target).removeprefix("neurons.")
                module = Fire(module, steps, bool(node.kwargs.get("static")))
                node.args, node.kwargs = node.args[:1], {}
            root.add_module(node.name, _plain(module))
            node.target = node.name
        elif node.op == "get_attr":
            root.register_buffer(node.name, operator.attrgetter(str(node.target))(snn).detach().clone())
            node.target = node.name
    return Graph(root, graph, type(snn).__name__)


def _pools_as_modules(net: fx.GraphModule, found: dict[fx.Node, Any]) -> None:
    """Let functional pools, means over both dimensions of a map, and adaptive pools whose windows are alike and do not
    overlap be the modules that they equal, which all that follows knows. found: what each node gave for an image, where
    a window may be a size of it."""

    def call(node: fx.Node, module: nn.Module, source: fx.Node) -> None:
        if class_of(module) in EVEN and not getattr(module, "return_indices", False):
            (h, w), (rows, columns) = found[source].shape[-2:], node.meta["tensor_meta"].shape[-2:]
            if h % rows == w % columns == 0:
                module = EVEN[class_of(module)]((h // rows, w // columns))
        net.add_submodule(node.name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", node.name, (source,), {}

    for node in list(net.graph.nodes):
        module, source = module_of(net, node), argument(node, "input", 0)
        if module is not None and class_of(module) in EVEN:
            call(node, module, source)
        if module is not None or not isinstance(source, fx.Node):
            continue
        if node.target in POOL_FUNCTIONS:
            pool, names = POOL_FUNCTIONS[node.target]
            args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), found.__getitem__)
            options = {key: value for key, value in kwargs.items() if key != "input"}
            call(node, pool(**dict(zip(names, args, strict=False)), **options), source)
        elif node.target in ("mean", torch.mean) and len(found[source].shape) == 4 and node.all_input_nodes == [source]:
            over, keep = argument(node, "dim", 1), argument(node, "keepdim", 2, False)
            if "dtype" in node.kwargs or not isinstance(over, tuple | list) or {d % 4 for d in over} != {2, 3}:
                continue
            if not keep:
                with net.graph.inserting_before(node):
                    pooled = net.graph.call_function(F.adaptive_avg_pool2d, (source, 1))
                pooled.meta |= {key: node.meta[key] for key in ("axis", "homogeneous") if key in node.meta}
                shape = torch.Size((*found[source].shape[:2], 1, 1))
                pooled.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=shape)
                call(node, nn.Flatten(), pooled)
            call(node if keep else pooled, nn.AdaptiveAvgPool2d(1), source)


def _plain(module: nn.Module) -> nn.Module:
    """A copy without forward hooks. What `module` computes from other tensors, as weight norm does, is a parameter."""
    computed_by_hooks = (x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor))
    plain = copy.deepcopy(module, {id(x): x.detach().clone() for x in computed_by_hooks})
    for part in plain.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    if isinstance(weight := vars(plain).get("weight"), Tensor):  # by an old form of these
        del plain.weight
        plain.weight = nn.Parameter(weight.detach().clone())
    if parametrize.is_parametrized(module):
        computed = {name: getattr(module, name).detach() for name in plain.parametrizations}  # type: ignore[union-attr]
        plain.__class__ = parametrize.type_before_parametrizations(module)
        del plain.parametrizations
        for name, value in computed.items():
            plain.register_parameter(name, nn.Parameter(value.clone()))
    if computes_as(plain, nn.Conv1d, nn.Conv2d) and isinstance(plain.padding, str):  # in numbers, where sides are equal
        same = plain.padding == "same"
        both = [d * (k - 1) * same for d, k in zip(plain.dilation, plain.kernel_size, strict=True)]
        if not any(number % 2 for number in both):
            plain.padding = tuple(number // 2 for number in both)
    return plain


def _heights_into_weights(net: fx.GraphModule) -> None:
    """Let every spike be 1, and the weights it meets so much larger; where it meets none, a `Scale` makes up for it."""
    heights: dict[fx.Node, Tensor] = {}  # what a value must still be multiplied by: one factor, or one per channel
    for node in list(net.graph.nodes):
        module = module_of(net, node)
        if node.meta.get("axis") == "size":  # a shape is the same at any height
            continue
        sources = [source for source in node.all_input_nodes if source in heights]
        if isinstance(module, Fire):
            for source in sources:
                scale_input(net, node, source, heights[source], "height")
            if bool((module.height != 1).any()):
                heights[node], module.height = module.height, torch.ones(())
        elif sources and module is not None and sums_channels(net, node):
            scale_inputs_(module, heights[sources[0]])
        elif sources and (passed := _passed(net, node, heights)) is not None:
            heights[node] = passed
        else:
            for source in sources:
                scale_input(net, node, source, heights[source], "height")


def scale_input(net: fx.GraphModule, node: fx.Node, source: fx.Node, factor: Tensor, what: str) -> None:
    """Multiply `source` by `factor` where `node` takes it; once for all that take it so. what: the factor's name."""
    name = f"{source.name}_{what}"
    scaled = next((user for user in source.users if user.target == name), None)
    if scaled is None:
        net.add_submodule(name, Scale(factor))
        with net.graph.inserting_after(source):
            scaled = net.graph.call_module(name, (source,))
        scaled.meta |= {key: source.meta[key] for key in ("axis", "tensor_meta") if key in source.meta}
    node.replace_input_with(source, scaled)


def _passed(net: fx.GraphModule, node: fx.Node, heights: dict[fx.Node, Tensor]) -> Tensor | None:
    """The height h' with op(h·x, …) = h'·op(x, …) of an operation; None if there is no such."""
    if not node.meta.get("homogeneous") and node.target is not repeat:
        return None
    sources = parts(node) if node.target in CATS else values(node)
    one = torch.ones((), device=next(net.buffers()).device)
    given = [heights.get(source, one) for source in sources]
    if all(height.dim() == 0 and torch.equal(height, given[0]) for height in given):
        return given[0]
    module = module_of(net, node)
    if computes_as(module, *POOLS):
        one_dimension = kind_of(node, module).endswith("1d")
        if len(node.meta["tensor_meta"].shape) == (3 if one_dimension else 4):  # of [B, F], a pool joins features
            return given[0]  # each channel for itself
    if computes_as(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):  # C·k features, k per channel
        return given[0] if all(sums_channels(net, user) for user in node.users) else None
    if joins_channels(node):
        channels = [source.meta["tensor_meta"].shape[1] for source in sources]
        return torch.cat([height.expand(n) for height, n in zip(given, channels, strict=True)])
    return None


def scale_inputs_(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the weights of a convolution or linear layer, in place, as if its input had been multiplied by `factor`:
    a scalar, or [C] for C channels (a linear layer may have several features per channel)."""
    weight = layer.get_parameter("weight")
    factor = factor.to(weight.dtype)
    if factor.dim():
        if isinstance(layer, nn.Linear):
            factor = factor.repeat_interleave(layer.in_features // len(factor))
        elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):  # [I, O / groups, …]
            factor = factor.view(-1, *[1] * (weight.dim() - 1))
        else:
            groups: Any = layer.groups
            factor = _by_input(factor, weight, groups)
    layer.weight = nn.Parameter(weight.detach() * factor, requires_grad=False)


def _by_input(values: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[C] → [O, C / groups, 1, …], one for each weight [O, C / groups, …]: every group of outputs has inputs of its
    own."""
    by_output = values.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return by_output.view(*weight.shape[:2], *[1] * (weight.dim() - 2))


# ---------------------------------------------------------------------------------------------------------- batch norm


def fold_norm(net: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Fold the batch norm that `node` calls into the layer before or behind it, where that changes no value. Returns
    the call of that layer, or None if there is none."""
    norm = module_of(net, node)
    if norm is None or norm.running_mean is None or not called_once(net, node):
        return None

    def own_layer(neighbour: fx.Node) -> bool:
        return called_once(net, neighbour) and sums_channels(net, neighbour)

    before, fused = node.all_input_nodes[0], None
    kept = before
    if len(before.users) == 1 and own_layer(before):
        fused = _fold_into_previous(norm, module_of(net, before))
    if fused is None and len(node.users) == 1 and own_layer(behind := next(iter(node.users))):
        fused, kept = _fold_into_next(norm, module_of(net, behind)), behind
    if fused is None:
        return None
    weight, bias = (any(p.requires_grad for p in part.parameters()) for part in (module_of(net, kept), norm))  # type: ignore[union-attr]
    fused.weight.requires_grad_(weight)
    fused.bias.requires_grad_(weight or bias)
    net.set_submodule(str(kept.target), fused)
    net.set_submodule(str(node.target), nn.Identity())
    node.replace_all_uses_with(before)
    net.graph.erase_node(node)
    return kept


def module_of(net: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls; None if it is no such call."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def kind_of(node: fx.Node, module: nn.Module | None) -> str:
    """What an operation is, for people: the class of its module, or the name of its function or method."""
    return class_of(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))


def values(node: fx.Node) -> list[fx.Node]:
    """What `node` takes, without sizes and constants."""
    return [source for source in node.all_input_nodes if source.meta.get("axis") in ("images", "time")]


def parts(concatenation: fx.Node) -> list[fx.Node]:
    """What a concatenation puts next to each other. A value may be there twice; `all_input_nodes` has it once."""
    given = argument(concatenation, "tensors", 0)
    return [given] if isinstance(given, fx.Node) else list(given)  # one node: of what gives several tensors


def joined_along(concatenation: fx.Node) -> Any:
    """The dimension in which a concatenation does so."""
    return argument(concatenation, "dim", 1, concatenation.kwargs.get("axis", 0))


def joins_channels(node: fx.Node) -> bool:
    """Whether `node` is a concatenation in dimension 1."""
    return node.target in CATS and joined_along(node) == 1


def argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """What `node` calls its function with."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def called_once(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's module, with its weights, is used here and nowhere else."""
    uses = (f"{other.target}." for other in net.graph.nodes if other.op in ("call_module", "get_attr"))
    return node.op == "call_module" and sum(use.startswith(f"{node.target}.") for use in uses) == 1


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(γ/σ, β − γμ/σ) of each channel: what a batch norm in evaluation multiplies by and adds."""
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = (var + norm.eps).rsqrt()  # type: ignore[operator]
    if getattr(norm, "weight", None) is None:
        return scale, -mean * scale
    scale = scale * norm.get_parameter("weight").detach()
    return scale, norm.get_parameter("bias").detach() - mean * scale


def _fold_into_previous(norm: nn.Module, layer: Any) -> Any:
    """A copy of `layer`, whose output the norm takes, that gives the norm's output: γ/σ·(Wx + b) + β − γμ/σ. None if it
    is of another length."""
    if isinstance(layer, nn.Linear) and layer.out_features != norm.num_features:
        return None
    scale, shift = affine(norm)
    by_weight = scale.view(-1, 1)  # [O, 1], or [I, O / groups] where inputs come first
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        by_weight = scale.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
    layer = copy.deepcopy(layer)
    rest = [1] * (layer.weight.dim() - 2)
    layer.weight = nn.Parameter(layer.weight.detach() * by_weight.view(*by_weight.shape, *rest))
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias.detach() * scale + shift)
    return layer


def _fold_into_next(norm: nn.Module, layer: Any) -> Any:
    """A copy of `layer`, which takes the norm's output, that takes the norm's input: W·(γ/σ·x + β − γμ/σ) + b. None if
    there is no exact one: padding is with zeros, which the norm would have moved."""
    if computes_as(layer, nn.Conv1d, nn.Conv2d):
        if isinstance(layer.padding, str) or any(layer.padding):
            return None
        groups = layer.groups
    elif computes_as(layer, nn.Linear) and layer.in_features == norm.num_features:
        groups = 1
    else:
        return None
    layer = copy.deepcopy(layer)
    weight = layer.weight.detach()
    scale, shift = (_by_input(x, weight, groups) for x in affine(norm))
    bias = (weight * shift).flatten(1).sum(1)
    layer.weight = nn.Parameter(weight * scale)
    layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias.detach() + bias)
    return layer
