"""What a network computes for one image, operation by operation: multiply-accumulates, and how far each spike reaches.
Knows nothing of energy.

A layer whose input is analog multiplies: its cost are its multiply-accumulates (MACs), known from shapes. A layer whose
input is spikes adds: a spike costs one addition for each output that it reaches, its fan-out, which borders, strides
and groups make smaller. What lies between neurons and a layer is linear in the spikes (pools, additions,
concatenations), so that all additions of layer l are::

    Σ over neurons j of spikes(j)·fan_out(j → l)

A spike that enters an average pool reaches what the pooled value reaches; of spikes that meet in an addition each
counts. The map fan_out(· → l) is the gradient of Σ outputs with all weights 1 and pools that add up.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unitstep.conversion import ADDITIONS, COUNTS, MAX_POOLS, SCALINGS, rule_of
from unitstep.fusing import CONVOLUTIONS, Fire, Scale, argument, kind_of, module_of, values
from unitstep.graphs import class_of, computes_as

Input = Literal["analog", "binary", "integer"]
WEIGHTED: set[Any] = {F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d, F.linear}


@dataclass(frozen=True)
class Layer:
    """What is known of a layer with weights from its shapes, for one image."""

    name: str
    input: Input
    """What it takes: binary spikes; integer, counts of spikes that pools or additions made; or analog."""
    static: bool
    """Whether its input is the same at every timestep, so that it is computed once."""
    macs: int
    """Multiply-accumulates of one timestep, which is an ordinary network's pass, those with padding included."""
    weights: int
    """Weights and biases."""
    inputs: int
    """Numbers of its input at one timestep, which is what an ordinary network reads."""
    values: int
    """Values that it reads at one timestep: neurons that feed it, which are more where a pool is between, or `inputs`
    if that is analog."""


@dataclass(frozen=True)
class Operation(Layer):
    """And how far spikes reach in it."""

    neurons: tuple[str, ...] = ()
    """Neuron layers that feed it."""
    fan_out: dict[str, Tensor] = field(default_factory=dict)
    """For every source of spikes, a neuron layer or a max pool: outputs that a spike of each neuron reaches, [C, …]."""

    def additions(self, spikes: dict[str, Tensor]) -> int:
        """One for each output that each spike reaches. spikes: of each neuron of each source, [C, …]."""
        return sum(int((spikes[name].view_as(reached) * reached).sum()) for name, reached in self.fan_out.items())


@torch.no_grad()
def operations(net: fx.GraphModule, image: Tensor) -> tuple[Operation, ...]:
    """The layers with weights of a fused network at one timestep (`Spiking.fuse`), or of a traced CNN, in the order of
    execution. image: [1, C, H, W], one that spikes can be checked on: a layer whose input is not 0 where no spike
    entered is analog, whatever the graph says."""
    counting = _Counting(net)
    counting.run(image)
    return tuple(counting.found)


@dataclass
class _Spikes:
    """How many spikes are in each element of a value, as a linear function of the sources' spikes."""

    number: Tensor
    kind: Input
    sources: dict[str, Tensor]
    neurons: tuple[str, ...]


class _Counting(fx.Interpreter):  # type: ignore[misc,unused-ignore]
    """Runs a network on an image, and its spike counts beside it."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.net = net
        self.spikes: dict[fx.Node, _Spikes] = {}
        self.neurons: dict[str, int] = {}
        self.found: list[Operation] = []

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = super().run_node(n)
        macs = counter.get_total_flops() // 2
        module = module_of(self.net, n)
        if isinstance(module, Fire):
            self.neurons[n.name] = out.numel()
            self.spikes[n] = self._source(n, out, (n.name,))
        elif macs:
            self._weighted(n, module, macs)
        elif n.op in ("call_module", "call_function", "call_method") and (given := values(n)):
            entering = [self.spikes[source] for source in given if source in self.spikes]
            if len(entering) == len(given) and (n.meta.get("homogeneous") or isinstance(module, Scale)):
                self._passed(n, module, out, entering)
        return out

    def _source(self, node: fx.Node, out: Tensor, neurons: tuple[str, ...]) -> _Spikes:
        number = (out != 0).double().requires_grad_()
        return _Spikes(number, "binary", {node.name: number}, neurons)

    def _passed(self, node: fx.Node, module: nn.Module | None, out: Any, entering: list[_Spikes]) -> None:
        what: Any = node.target if module is None else class_of(module)
        neurons = tuple(dict.fromkeys(name for each in entering for name in each.neurons))
        kind: Input = "integer" if any(each.kind == "integer" for each in entering) else "binary"
        if what in MAX_POOLS:
            if kind == "binary":  # of sums, it is not said which spikes came through
                self.spikes[node] = self._source(node, out, neurons)
            return
        with torch.enable_grad():
            if what in ADDITIONS:
                terms = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, fx.Node)]
                added = (self.spikes[term].number for term in terms)
                number = torch.stack(torch.broadcast_tensors(*added)).sum(0)  # in x + x, x twice
                kind = "integer"
            elif what in SCALINGS or what is Scale:
                number = entering[0].number
            else:
                number = self._again(node)
                if rule_of(node, module) == COUNTS:
                    number, kind = _gathered(node, module, entering[0].number, number), "integer"
        sources = {name: each.sources[name] for each in entering for name in each.sources}
        self.spikes[node] = _Spikes(number, kind, sources, neurons)

    def _again(self, node: fx.Node) -> Any:
        """The operation on numbers of spikes in the place of its values."""

        def number(source: fx.Node) -> Any:
            return self.spikes[source].number if source in self.spikes else self.env[source]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), number)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _weighted(self, node: fx.Node, module: nn.Module | None, macs: int) -> None:
        functional = module is None and node.target in WEIGHTED
        source = argument(node, "input", 0) if functional else node.all_input_nodes[0]
        given: Tensor = self.env[source]
        static = node.meta.get("axis") != "time"
        weights = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
        if module is None:
            own = [each for each in node.all_input_nodes if each.op == "get_attr"]
            own = [argument(node, "weight", 1), argument(node, "bias", 2)] if functional else own
            weights = sum(self.env[each].numel() for each in own if isinstance(each, fx.Node))
        spikes = self.spikes.get(source)
        known = computes_as(module, *CONVOLUTIONS, nn.Linear) or functional
        if spikes is None or not known or bool((given[spikes.number == 0] != 0).any()):
            self.found.append(Operation(node.name, "analog", static, macs, weights, given.numel(), given.numel()))
            return
        with torch.enable_grad():
            reached = self._reached(node, module, spikes.number).sum()
        sources = list(spikes.sources.values())
        maps = torch.autograd.grad(reached, sources, retain_graph=True)
        fan_out = {name: of_rows(found.round().long()) for name, found in zip(spikes.sources, maps, strict=True)}
        fed = sum(self.neurons[name] for name in spikes.neurons)
        self.found.append(
            Operation(node.name, spikes.kind, static, macs, weights, given.numel(), fed, spikes.neurons, fan_out)
        )

    def _reached(self, node: fx.Node, module: nn.Module | None, number: Tensor) -> Tensor:
        """The layer with all weights 1, without a bias."""
        if module is not None:
            ones = {
                name: torch.full_like(p, name == "weight", dtype=number.dtype) for name, p in module.named_parameters()
            }
            given = (node.args[1:], {key: value for key, value in node.kwargs.items() if key != "input"})
            args, kwargs = fx.node.map_arg(given, self.env.__getitem__)  # as a transposed convolution's output size
            return torch.func.functional_call(module, ones, (number, *args), kwargs)  # type: ignore[no-any-return]
        weight = torch.ones_like(self.env[argument(node, "weight", 1)], dtype=number.dtype)
        rest = {key: value for key, value in node.kwargs.items() if key not in ("input", "weight", "bias")}
        return node.target(number, weight, None, *node.args[3:], **rest)  # type: ignore[operator,no-any-return]


def of_rows(each: Tensor) -> Tensor:
    """What is known of each neuron, [k, C, …], of the k rows that an image has, mostly one → [C, …], or [C, …, k]."""
    return each[0] if len(each) == 1 else each.movedim(0, -1)


def _gathered(node: fx.Node, module: nn.Module | None, number: Tensor, mean: Any) -> Tensor:
    """The sums over those values whose mean a pool, or a mean over dimensions, takes. mean: what it makes of
    `number`."""
    name = kind_of(node, module).lower().replace("_", "")
    if name == "sum":
        return mean  # type: ignore[no-any-return]
    if name == "mean":
        return mean * (number.numel() / mean.numel())  # type: ignore[no-any-return]
    if name.startswith("adaptive"):  # window i of n over m values: from ⌊i·m/n⌋ to ⌈(i + 1)·m/n⌉
        for dimension in range(-1 if "1d" in name else -2, 0):
            m, n = number.shape[dimension], mean.shape[dimension]
            sizes = [-(-(i + 1) * m // n) - i * m // n for i in range(n)]
            mean = mean * torch.tensor(sizes, device=mean.device).view(-1, *[1] * (-1 - dimension))
        return mean  # type: ignore[no-any-return]
    kernel, stride, padding, ceil = (
        getattr(module, option) for option in ("kernel_size", "stride", "padding", "ceil_mode")
    )
    if "1d" in name:  # which has no divisor of its own choice
        kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        return F.avg_pool2d(number.unsqueeze(-2), kernel, stride, padding, ceil, divisor_override=1).squeeze(-2)
    return F.avg_pool2d(number, kernel, stride, padding, ceil, divisor_override=1)
