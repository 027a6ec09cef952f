"""From a CNN to the structure of a spiking network: trace it, put a neuron in the place of every ReLU call, and say
what became of each operation. Knows nothing of thresholds' values, training, data sets or files.

Time is folded into the batch: once something has spiked, values are [T·B, …] with all B of step 1 first, and the
user's convolutions, norms, pools and additions run on them untouched. What no spike has reached yet, the stem, is the
same at every step and is computed once, as [B, …].
"""

import contextlib
import copy
import inspect
import io
import itertools
import operator
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from unitstep.fusing import (
    BATCH_NORMS,
    CATS,
    CONVOLUTIONS,
    argument,
    fold_norm,
    fuse,
    has_hooks,
    kind_of,
    module_of,
    refuse_hooks,
)
from unitstep.graphs import Graph, class_of, computes_as
from unitstep.nets import Normalize
from unitstep.neuron import LIF, Height, SharedDropout, check_steps, read_out, repeat
from unitstep.running import first_line

Norm = Literal["none", "fold", "keep"]
Readout = Literal["sum", "mean"]
MaxPool = Literal["keep", "average"]
LeafModules = Sequence[str | type[nn.Module]]


# ------------------------------------------------------------------------------------------ what becomes of operations


@dataclass
class Row:
    """What became of one operation of the traced network."""

    name: str
    """Of the operation in the traced graph; a neuron layer's is its key in `Spiking.lifs`."""
    kind: str
    """Class of the module, or name of the function or method: Conv2d, relu, add, …"""
    path: str
    """Of the module, as in the CNN's state dict; empty for functions and methods."""
    line: str
    """Where the network calls it: net.py:12; empty if that is inside torch."""
    became: str = ""
    """neuron, folded into …, kept with binary, integer or analog input, …, refused: why."""
    shape: tuple[int, ...] | None = None
    """Of the output for one image."""
    cap: float | None = None
    """What the rectifier cuts off above (6 for ReLU6): the threshold never starts above it."""
    threshold: float | None = None
    """In the unit of the current; the mean over the channels if each has its own."""
    found: str | None = None
    """How the threshold was found."""
    rate: float | None = None
    """Spikes per neuron and image, summed over the T steps."""
    error: float | None = None
    """‖mean over the steps of the spiking network's output − the CNN's‖ / ‖the CNN's‖, here, over the first
    128 calibration images."""

    @property
    def refused(self) -> bool:
        return self.became.startswith("refused: ")


@dataclass
class Report:
    """One `Row` per operation, in the order of execution. `print(report)` is a table as wide as the terminal."""

    rows: list[Row]
    steps: int | None = None
    """Timesteps at which rates and errors were taken."""
    images: int = 0
    """Number of images on which they were taken."""

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def place(self, name: str) -> str:
        """Which operation that is, for people: its kind, its name, and the line that calls it."""
        row = self[name]
        return f"{row.kind} {row.path or name}" + (f" ({row.line})" if row.line else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Column, Table

        right = [Column(title, justify="right") for title in ("threshold", "spikes", "error")]
        table = Table(
            "operation", "kind", "output", "became", right[0], "found by", *right[1:], box=None, pad_edge=False
        )
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) if row.shape is not None else ""
            numbers = [
                "" if value is None else f"{value:{form}}"
                for value, form in ((row.threshold, ".4g"), (row.rate, ".3f"), (row.error, ".3f"))
            ]
            refused = f" ({row.line})" if row.refused and row.line else ""
            table.add_row(row.name, row.kind, shape, row.became + refused, numbers[0], row.found, *numbers[1:])
        text = io.StringIO()
        Console(file=text, width=shutil.get_terminal_size((160, 24)).columns).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        if self.steps is not None:
            lines.append(
                f"T = {self.steps}, {self.images} images. spikes: per neuron and image, over all steps. error: of the "
                "mean output over the steps, relative to the CNN's"
            )
        return "\n".join(lines)


class ConversionError(ValueError):
    """A network has operations without a spiking form: `report` names all of them."""

    def __init__(self, report: Report) -> None:
        refused = [row for row in report.rows if row.refused]
        listed = "".join(
            f"\n  {report.place(row.name)}: {row.became.removeprefix('refused: ')}" for row in refused[:10]
        )
        more = f"\n  and {len(refused) - 10} more" if len(refused) > 10 else ""
        number = f"{len(refused)} operations do" if len(refused) > 1 else "1 operation does"
        super().__init__(f"{number} not convert:{listed}{more}")
        self.report = report


class Spiking(Graph):
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

    @property
    def report(self) -> Report:
        """What became of each operation of the CNN. Rates and errors are there after `to_spiking`."""
        report: Report = self.meta["report"]
        return report

    def fuse(self, images: Tensor, steps: int = 1) -> fx.GraphModule:
        """This network at `steps` timesteps as a plain module: convolutions and comparisons, images [B, C, H, W] →
        logits [B, classes], for images as high and wide as `images`, of which nothing else matters. See
        `unitstep.fusing`. ValueError if a module has forward hooks."""
        refuse_hooks(self)
        return fuse(self, images, steps)


# ---------------------------------------------------------------------------------------------- what converts, and how
# Values are "binary" (0 or one height), "integer" (whole multiples of heights, also after averaging k² of them) or
# "analog". A kept operation acts on each image and each step alone; here is what it makes of its input's values.

SAME, COUNTS, ANALOG = "same", "counts", "analog"
KEPT_MODULES: dict[type[nn.Module], str] = {
    **dict.fromkeys((*CONVOLUTIONS, nn.Linear, *BATCH_NORMS, Normalize), ANALOG),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), COUNTS),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), SAME),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle), SAME),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), SAME),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d), SAME),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), SAME),
}  # fmt: skip
KEPT_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d, F.linear, F.batch_norm), ANALOG),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), COUNTS),
    **dict.fromkeys((torch.mean, torch.sum), COUNTS),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, torch.amax), SAME),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.movedim, torch.clone), SAME),
    **dict.fromkeys((torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.unbind, torch.narrow), SAME),
    **dict.fromkeys((torch.flip, torch.roll, operator.getitem, F.pad), SAME),
    **dict.fromkeys((F.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle), SAME),
}
KEPT_METHODS: dict[str, str] = {
    **dict.fromkeys(("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"), SAME),
    **dict.fromkeys(
        ("unflatten", "chunk", "split", "unbind", "narrow", "flip", "roll", "clone", "detach", "amax", "float"), SAME
    ),
    **dict.fromkeys(("mean", "sum"), COUNTS),
}
MAX_POOLS: dict[Any, Any] = {  # and the average pools that may take their places
    nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, F.max_pool1d: F.avg_pool1d, F.max_pool2d: F.avg_pool2d,
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_max_pool1d: F.adaptive_avg_pool1d, F.adaptive_max_pool2d: F.adaptive_avg_pool2d,
    torch.amax: torch.mean, "amax": "mean",
}  # fmt: skip
# Several activations may meet in these; scaling is by constants alone.
ADDITIONS: set[Any] = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub"}
CONCATENATIONS: set[Any] = {*CATS, torch.stack}
SCALINGS: set[Any] = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div", operator.neg}
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    **dict.fromkeys(("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"),
}
# In-place operations and what they are otherwise.
IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
    "relu_": "relu", "clamp_": "clamp", "clip_": "clip", "clamp_min_": "clamp_min", "clamp_max_": "clamp_max",
    torch.relu_: torch.relu, F.hardtanh_: F.hardtanh, F.leaky_relu_: F.leaky_relu,
    torch.clamp_: torch.clamp, torch.clip_: torch.clip, torch.clamp_min_: torch.clamp_min,
    torch.clamp_max_: torch.clamp_max,
}  # fmt: skip
INPLACE_FLAGS: dict[Any, int] = {  # position of their argument `inplace`
    F.relu: 1, F.relu6: 1, F.silu: 1, F.hardswish: 1, F.hardtanh: 3, F.leaky_relu: 2, F.dropout: 3, F.dropout1d: 3,
    F.dropout2d: 3,
}  # fmt: skip
VIEWS: set[Any] = {  # outputs share memory with the input
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.movedim, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, torch.narrow, operator.getitem, nn.Flatten, nn.Unflatten, nn.Identity,
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
    "unbind", "narrow", "detach", "float", "unflatten", nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, F.dropout1d,
    F.dropout2d,
}  # fmt: skip
AVERAGED = "average pool in its place: another function"
APPROXIMABLE: set[Any] = {
    nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.PReLU,
    F.leaky_relu, F.silu, F.gelu, F.hardswish, F.prelu,
}  # fmt: skip
DROPOUTS: dict[Any, Any] = {nn.Dropout: F.dropout, nn.Dropout1d: F.dropout1d, nn.Dropout2d: F.dropout2d}
SOFTMAXES: set[Any] = {
    nn.Softmax, nn.LogSoftmax, nn.Sigmoid, F.softmax, F.log_softmax, F.sigmoid, torch.softmax, torch.log_softmax,
    torch.sigmoid, "softmax", "log_softmax", "sigmoid",
}  # fmt: skip
STOCHASTIC_DEPTH = {"StochasticDepth", "DropPath", "stochastic_depth", "drop_path"}  # torchvision's and timm's
OWN_STATISTICS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
OWN_STATISTICS_FUNCTIONS: set[Any] = {F.layer_norm, F.group_norm, F.instance_norm}


def _what(node: fx.Node, module: nn.Module | None) -> Any:
    """What an operation is, as the tables above name it: a module's type, a function, or a method's name."""
    return node.target if module is None else class_of(module)


def _bounds(node: fx.Node, module: nn.Module | None) -> tuple[Any, Any] | None:
    """(lower, upper) between which an operation cuts its input off; None for any other operation."""
    what = _what(node, module)
    if what in (nn.ReLU, F.relu, torch.relu, "relu"):
        return 0, None
    if what in (nn.ReLU6, F.relu6):
        return 0, 6
    if isinstance(module, nn.Hardtanh):
        return module.min_val, module.max_val
    if what is F.hardtanh:
        return argument(node, "min_val", 1, -1.0), argument(node, "max_val", 2, 1.0)
    if what in (torch.clamp, torch.clip, "clamp", "clip"):
        return argument(node, "min", 1), argument(node, "max", 2)
    if what in (torch.clamp_min, "clamp_min"):
        return argument(node, "min", 1), None
    if what in (torch.clamp_max, "clamp_max"):
        return None, argument(node, "max", 1)
    return None


# ------------------------------------------------------------------------------------------------------------- tracing


class _Proxy(fx.Proxy):  # type: ignore[misc,unused-ignore]
    """Augmented assignment changes a tensor in place; a plain Proxy traces it as if it made a new one."""


def _noted(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _augmented in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_augmented.__name__}__", _noted(_augmented))


class _LostHooks(ValueError):
    """A module that is not kept has forward hooks."""


LOST_HOOKS = "its forward hooks would be lost: remove them, by remove() of what registered them"


class _Tracer(fx.Tracer):  # type: ignore[misc,unused-ignore]
    """Notes for each operation the line that calls it, and where it was when tracing failed."""

    def __init__(self, leaf_modules: LeafModules = ()) -> None:
        super().__init__()
        self.leaf_modules = leaf_modules
        self.path = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, Normalize)
            or type(module).__name__ in STOCHASTIC_DEPTH
            or name in self.leaf_modules
            or type(module) in self.leaf_modules
            or class_of(module) is not type(module)
            or super().is_leaf_module(module, name)
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:  # made, or sliced out of a Sequential, in forward: what it does is traced
            return forward(*args, **kwargs)
        if has_hooks(m) and not self.is_leaf_module(m, path):
            raise _LostHooks(f"{type(m).__name__} {path}: {LOST_HOOKS}")
        before, self.path = self.path, path
        out = super().call_module(m, forward, args, kwargs)
        self.path = before  # not after an exception
        return out

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not trace.__code__ and not _is_users(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None and frame.f_code is not trace.__code__:
            node.meta["line"] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return node


def _is_users(file: str) -> bool:
    ours = [f"{Path(module).parent}{os.sep}" for module in (torch.__file__, __file__)]
    return not file.startswith((*ours, "<frozen", "<eval_with_key>"))


def trace(cnn: nn.Module, leaf_modules: LeafModules = ()) -> fx.GraphModule:
    """A traced copy of `cnn` in evaluation mode that changes no value in place. ValueError, with the line in the user's
    file, if it cannot be traced."""
    if has_hooks(cnn):
        raise ValueError(
            f"{type(cnn).__name__} has forward hooks, which its spiking copy would not run: remove them, by remove() "
            "of what registered them, or put what they do into forward"
        )
    if isinstance(leaf_modules, str):
        raise ValueError(f"leaf_modules is a tuple of names or classes: ({leaf_modules!r},)")
    names = dict(cnn.named_modules())
    for leaf in leaf_modules:
        if isinstance(leaf, str) and leaf not in names:
            raise ValueError(f"leaf_modules: {type(cnn).__name__} has no module named {leaf!r}")
    tracer = _Tracer(leaf_modules)
    try:
        net = copy.deepcopy(cnn)
    except Exception as error:  # RuntimeError of tensors that are computed, others of what the user's code holds
        way_out = "leave out of it what cannot be, as locks, open files and generators, or give that a __deepcopy__"
        if isinstance(error, RuntimeError):
            way_out = (
                "if it computes weights from others, make them plain before: "
                "torch.nn.utils.remove_weight_norm(module), or prune.remove(module, 'weight')"
            )
        raise ValueError(f"{type(cnn).__name__} cannot be copied; {way_out} ({first_line(error)})") from error
    net.eval()  # which may return None
    try:
        arguments = inspect.signature(net.forward).parameters
        rest = list(arguments.items())[1:]  # behind the images
        options = {name: option.default for name, option in rest if option.default is not option.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on options without an assertion of their value
            graph = tracer.trace(net, options)
    except _LostHooks:
        raise
    except Exception as error:  # whatever the user's code raises when it meets a stand-in for a tensor
        raise ValueError(_untraceable(cnn, error, tracer.path)) from error
    if isinstance(graph._codegen, fx.graph._PyTreeCodeGen):  # a default is a tuple, list or dict
        end, codegen = graph.output_node(), cast(Any, graph._codegen)
        end.args = (pytree.tree_unflatten(cast(Any, end.args[0]), codegen.pytree_info.out_spec),)
        graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)
    _out_of_place(net, graph)
    for node in graph.find_nodes(op="call_function", target=operator.add):
        if type(node.args[0]) is int and node.args[0] == 0:  # with which `sum` of several tensors begins
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    for node in graph.nodes:  # the same for values that do not lie in memory as they are read, as in channels_last
        views = (node.op, node.target) == ("call_method", "view")
        if views and not isinstance(argument(node, "dtype", 1), torch.dtype):
            node.target, node.meta["view"] = "reshape", True
    for option in graph.find_nodes(op="placeholder"):
        option.args = (None,) if option.args else ()  # a default that is a tensor cannot be written
    traced = fx.GraphModule(net, graph)
    traced.graph.eliminate_dead_code()
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    used = [*inputs[:1], *(node for node in inputs[1:] if node.users)]
    if len(used) != 1:
        raise ValueError(
            f"the network takes {len(used)} inputs ({', '.join(map(str, used))}); only networks "
            "of one image input convert"
        )
    for option in inputs[1:]:
        traced.graph.erase_node(option)
    traced.recompile()
    return traced


def _untraceable(cnn: nn.Module, error: Exception, path: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = ""
    if frames:
        where = f" at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: `{frames[-1].line}`"
    problem = f"{type(cnn).__name__} cannot be traced{where} ({first_line(error)})"
    if isinstance(error, NameError) and "not a member" in str(error):
        way_out = "make modules in __init__, several in an nn.ModuleList"
        return f"{problem}. It does not know these weights as its own: {way_out}"
    way_out = "write that line so that it does not, or "
    if path in ("", "cnn"):  # the whole network; "cnn" is what a run calls a user's
        way_out += "put it into a module of its own, which can be kept as it is, unconverted: leaf_modules=(its name,)"
    else:
        way_out += f"keep the module it stands in as it is, unconverted: leaf_modules=({path!r},)"
    return f"{problem}. Which operations a network runs must not depend on the data: {way_out}"


def _out_of_place(net: nn.Module, graph: fx.Graph) -> None:
    """Let nothing be changed in place: whoever used the changed tensor afterwards uses the result. ValueError where a
    view of it is used afterwards too, or where the change is none of those in `IN_PLACE`."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    modules = {name for name, module in net.named_modules(remove_duplicate=False) if getattr(module, "inplace", False)}
    sizes: set[fx.Node] = set()  # numbers: `n -= 1` makes a new one

    @cache
    def shares(node: fx.Node) -> bool:
        """Whether its output may be its input's memory."""
        module = module_of(net, node)
        unknown = module is not None and not class_of(module).__module__.startswith("torch.")  # may return its input
        return _what(node, module) in VIEWS or unknown or kind_of(node, module) in STOCHASTIC_DEPTH

    def root(node: fx.Node) -> fx.Node:
        while shares(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    for node in graph.nodes:
        if _reads_size(node) or (node.all_input_nodes and all(source in sizes for source in node.all_input_nodes)):
            sizes.add(node)
    for node in list(graph.nodes):
        module = module_of(net, node)
        what, kind = _what(node, module), kind_of(node, module)
        flag = INPLACE_FLAGS.get(what)
        flagged = node.target in modules if module is not None else argument(node, "inplace", flag or 99, False) is True
        if node.op not in ("call_module", "call_function", "call_method") or not node.all_input_nodes:
            continue
        place = f"{kind} {node.name}" + (f" ({node.meta['line']})" if "line" in node.meta else "")
        if node in sizes:
            node.target = IN_PLACE.get(what, node.target)
        elif what in IN_PLACE or flagged:
            if what not in VIEWS:  # else dropout in evaluation, which changes nothing
                memory = root(node.all_input_nodes[0])
                family = [older for older in graph.nodes if order[older] < order[node] and root(older) is memory]
                _redirect(node, place, order, family)
            node.target = node.target if module is not None else IN_PLACE.get(what, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
            if flag is not None:
                node.args = node.args[:flag]
        elif "out" in node.kwargs or (module is None and kind.endswith("_") and not kind.endswith("__")):
            raise ValueError(f"{place} changes a value in place: write it without in-place")
    for name in modules:
        with contextlib.suppress(AttributeError):  # of a property
            net.get_submodule(name).inplace = False  # type: ignore[assignment,unused-ignore]


def rule_of(node: fx.Node, module: nn.Module | None) -> str | None:
    """What a kept operation makes of its input's values; None if it is in no table."""
    if isinstance(module, nn.Upsample) or node.target is F.interpolate:
        mode = argument(node, "mode", 3, "nearest") if module is None else module.mode
        return SAME if mode in ("nearest", "nearest-exact") else ANALOG  # copies, or averages of neighbours
    if module is not None:  # also subclasses that torch makes, as for weight norm
        return next((rule for kept, rule in KEPT_MODULES.items() if isinstance(module, kept)), None)
    kept: dict[Any, str] = KEPT_METHODS if node.op == "call_method" else KEPT_FUNCTIONS
    return kept.get(node.target)


def _redirect(node: fx.Node, place: str, order: dict[fx.Node, int], family: list[fx.Node]) -> None:
    """Give the result of an in-place operation to all who read the changed tensor after it; `family` was made before it
    and shares that tensor's memory."""
    changed, now = node.all_input_nodes[0], order[node]
    for relative in family:
        late = [user for user in relative.users if order[user] > now and not _reads_size(user)]
        if late and relative is not changed:
            raise ValueError(
                f"{place} changes {changed.name} in place, which shares memory with {relative.name}, used later in "
                f"{late[0].name}: write it without in-place"
            )
    for user in [user for user in changed.users if order[user] > now]:
        user.replace_input_with(changed, node)


def _reads_size(node: fx.Node) -> bool:
    return (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")) or (
        node.op == "call_method" and node.target in ("size", "dim", "numel")
    )


# ---------------------------------------------------------------------------------------------------------- conversion


def spiking(
    cnn: nn.Module,
    *,
    height: Height = "threshold",
    initial: float = 0.0,
    readout: Readout = "mean",
    norm: Norm = "keep",
    max_pool: MaxPool = "keep",
    approximate: bool = False,
    leaf_modules: LeafModules = (),
) -> Spiking:
    """The structure alone: a copy of `cnn` with a `LIF` of threshold 1 and leak 1 for every ReLU call, shared dropout
    masks and a readout over time.

    height: a spike is worth 1 ("unit", the paper's) or its layer's threshold.  initial: the membrane before the first
    step, in thresholds.  readout: "sum" (the paper's) or "mean" over the steps of the last layer's output.
    norm: batch norm is kept, acting on all T·B rows ("keep"); is folded into the weights next to it where that is
    exact, else kept ("fold"); or must not be there ("none").  max_pool: "keep" takes the maximum of each step's spikes,
    which is the CNN's function at T = 1 alone; "average" puts average pools in their places, which is another function.
    approximate: put neurons in the places of LeakyReLU, SiLU, GELU, Hardswish and PReLU too, though they are not ReLUs.
    leaf_modules: names or classes of modules that are kept whole, untraced, and run at each step.
    Raises ConversionError, a ValueError, which names all operations that do not convert, and ValueError for a network
    that cannot be traced or has several inputs.
    """
    for name, value, kind in (("norm", norm, Norm), ("readout", readout, Readout), ("max_pool", max_pool, MaxPool)):
        if value not in (known := get_args(kind)):
            raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")
    if isinstance(cnn, Spiking):
        raise ValueError("the network is a spiking one already: calibrate_ finds new thresholds for it")
    if (wrapper := type(cnn).__name__) in WRAPPERS:
        raise ValueError(f"{wrapper} is a wrapper: give the network in it, network.{WRAPPERS[wrapper]}")
    own = (*cnn._modules.keys(), *cnn._parameters.keys(), *cnn._buffers.keys())
    if taken := [name for name in own if hasattr(Spiking, name) or name == "meta"]:
        raise ValueError(
            f"the network has an attribute named {taken[0]}, which in spiking networks is another: rename it"
        )
    if hasattr(cnn, "neurons"):
        raise ValueError(
            "the network has an attribute named neurons, the name under which the spiking neurons are stored: rename it"
        )
    net = trace(cnn, leaf_modules)
    conversion = _Conversion(net, height, initial, readout, norm, max_pool, approximate, leaf_modules)
    snn = conversion.run()
    modes = {name: module.training for name, module in cnn.named_modules(remove_duplicate=False)}
    for name, module in snn.named_modules(remove_duplicate=False):
        module.training = modes.get(name, cnn.training)  # of frozen batch norms, another than the network's
    return snn


@dataclass
class _Conversion:
    """Rewrites a traced network. `axis` says what a value's first dimension holds: "images" in the stem, "time" (steps
    and images) from the first spike on, "logits" after the readout, and "none" for constants and sizes."""

    net: fx.GraphModule
    height: Height
    initial: float
    readout: Readout
    norm: Norm
    max_pool: MaxPool
    approximate: bool
    leaf_modules: LeafModules
    axis: dict[fx.Node, str] = field(default_factory=dict)
    values: dict[fx.Node, str] = field(default_factory=dict)
    rows: dict[fx.Node, Row] = field(default_factory=dict)
    batch: dict[fx.Node, str] = field(default_factory=dict)  # sizes of first dimensions, and whose: images or time
    averaged: set[str] = field(default_factory=set)  # names of max pools that have become average pools
    shapes: dict[fx.Node, str] = field(default_factory=dict)  # whole shapes, which have the first dimension in them

    def run(self) -> Spiking:
        graph = self.graph = self.net.graph
        for node in graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                kind = "view" if "view" in node.meta else kind_of(node, module_of(self.net, node))
                path = str(node.target) if node.op == "call_module" else ""
                self.rows[node] = Row(node.name, kind, path, node.meta.get("line", ""))
        calls = [(node, str(node.target)) for node in self.rows if node.op == "call_module"]
        hooked = [(node, path, module) for node, path in calls if has_hooks(module := self.net.get_submodule(path))]
        self._norms()
        images = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(images):
            steps = graph.placeholder("steps", default_value=1)
        with graph.inserting_after(steps):
            self.steps = graph.call_function(check_steps, (steps,))
        self.net.neurons = nn.Module()
        self.axis[images], self.values[images] = "images", ANALOG
        for node in list(graph.nodes):
            if node in self.rows:
                self._operation(node)
            elif node.op == "output":
                self._output(node)
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        for node, path, module in hooked:
            if not self.rows[node].refused and not (path in called and self.net.get_submodule(path) is module):
                self._refuse(node, LOST_HOOKS)
        report = Report([row for row in self.rows.values() if row.became])
        if any(row.refused for row in report.rows):
            raise ConversionError(report)
        for node in graph.nodes:
            node.meta["axis"] = "time" if node.target is repeat else self.axis.get(node, "none")
        graph.lint()
        if (first := next(itertools.chain(self.net.parameters(), self.net.buffers()), None)) is not None:
            self.net.neurons.to(first.device)
        snn = Spiking(self.net, graph)
        snn.meta["report"] = report
        return snn

    # -- batch norm ----------------------------------------------------------------------------------------------------

    def _norms(self) -> None:
        """Fold every batch norm into the layer before or behind it where that changes no value; refuse or keep the
        others."""
        for node in list(self.graph.nodes):
            module = computes_as(module_of(self.net, node), *BATCH_NORMS)
            if self.norm == "none" and (module or node.target is F.batch_norm):
                self._refuse(node, 'a batch norm, but norm="none": use norm="fold" or "keep"')
            if self.norm != "fold" or not module:
                continue
            before = node.all_input_nodes[0]
            if (kept := fold_norm(self.net, node)) is None:
                continue
            if kept is before:
                kept.meta["as"] = node.name  # its output is now the norm's
            if isinstance(module_of(self.net, kept), nn.Linear):
                kept.meta["vectors"] = node.name
            self.rows[node].became = f"folded into {kept.name}"

    # -- one operation -------------------------------------------------------------------------------------------------

    def _refuse(self, node: fx.Node, why: str) -> None:
        self.rows[node].became = f"refused: {why}"

    def _replace(self, node: fx.Node, target: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `module` in the place of `node`, whose row it takes over."""
        self.net.neurons.add_module(target, module)  # type: ignore[union-attr]
        with self.graph.inserting_before(node):
            new = self.graph.call_module(f"neurons.{target}", args, kwargs)
        new.meta |= {"as": node.meta.get("as", node.name), "row": node.name}
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def _operation(self, node: fx.Node) -> None:
        node.meta["row"] = node.name
        module = module_of(self.net, node)
        what = _what(node, module)
        if self._is_size(node):
            self._size(node)
            self.rows[node].became = "size"
            return
        inputs = [source for source in node.all_input_nodes if self.axis.get(source) in ("images", "time")]
        if not inputs:  # computed from constants alone
            self.axis[node] = "none"
            self.rows[node].became = "constant"
            return
        timed = any(self.axis[source] == "time" for source in inputs)
        axis = "time" if timed else self.axis[inputs[0]]
        self.axis[node], self.values[node] = axis, ANALOG
        if self.rows[node].became or not self._sizes_fit(node, axis):  # refused
            return
        if isinstance(module, nn.Module) and (node.target in self.leaf_modules or type(module) in self.leaf_modules):
            self.rows[node].became = "kept whole as a leaf module, run at each step"
            self._repeat(node, inputs)
        elif (bounds := _bounds(node, module)) is not None:
            self._rectifier(node, bounds)
        elif what in APPROXIMABLE:
            if self.approximate:
                self._neuron(node, f"neuron, approximates {self.rows[node].kind}")
            else:
                self._refuse(
                    node, "not a ReLU; approximate=True puts a neuron in its place all the same, to be trained"
                )
        elif what in DROPOUTS or what in DROPOUTS.values():
            self._dropout(node, module)
        elif self.rows[node].kind in STOCHASTIC_DEPTH:
            if not _hands_on(node, module):
                return self._refuse(node, "it changes values in evaluation, which stochastic depth does not")
            self.rows[node].became = "left out: stochastic depth is off"
            node.replace_all_uses_with(inputs[0])
            self.graph.erase_node(node)
        elif what in SOFTMAXES and timed and [user.op for user in node.users] == ["output"]:
            node.replace_input_with(inputs[0], self._read(inputs[0], before=node))
            self.axis[node] = "logits"
            self.rows[node].became = "kept, after the readout"
        else:
            self._keep(node, module, inputs, timed)

    def _rectifier(self, node: fx.Node, bounds: tuple[Any, Any]) -> None:
        lower, upper = bounds
        source = node.all_input_nodes[0]
        numbers = all(bound is None or isinstance(bound, int | float) for bound in bounds)
        if not numbers or (lower != 0 and lower is not None) or (upper is not None and not upper > 0):
            self._refuse(node, f"it cuts off at {lower} and {upper}; a neuron rectifies: cut off at 0 and above it")
        elif upper is not None and self.height == "unit":
            self._refuse(node, 'a cap has a unit, which spikes of height 1 have lost: use height="threshold"')
        elif lower == 0:
            self._neuron(node, "neuron" if upper is None else f"neuron, capped at {upper:g}", upper)
        elif isinstance(module_of(self.net, source), LIF) and len(source.users) == 1:
            row = next(row for row in self.rows.values() if row.name == source.meta["row"])
            row.cap = upper if row.cap is None else min(row.cap, upper)
            row.became = f"neuron, capped at {row.cap:g}"
            self.rows[node].became = f"folded into {row.name}"
            source.meta["as"] = node.name
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)
        else:
            self._refuse(node, "it cuts off above without rectifying: clamp right behind a ReLU of its own")

    def _neuron(self, node: fx.Node, became: str, cap: float | None = None) -> None:
        source = node.all_input_nodes[0]
        static = {} if self.axis[source] == "time" else {"static": True}
        self.rows[node].became, self.rows[node].cap = became, cap
        lif = LIF(height=self.height, initial=self.initial)
        new = self._replace(node, node.name, lif, source, self.steps, **static)
        self.axis[new], self.values[new] = "time", "binary"

    def _dropout(self, node: fx.Node, module: nn.Module | None) -> None:
        source = node.all_input_nodes[0]
        if module is None and argument(node, "training", 2, True):
            return self._refuse(node, "it drops values in evaluation, too: give it training=self.training")
        p: Any = argument(node, "p", 1, 0.5) if module is None else module.p
        function = node.target if module is None else DROPOUTS[class_of(module)]
        timed = self.axis[source] == "time"
        self.rows[node].became = "one mask for all steps"
        shared = SharedDropout(float(p), function)
        new = self._replace(node, node.name, shared, source, *([self.steps] if timed else []))
        self.axis[new], self.values[new] = self.axis[source], self.values[source]

    def _keep(self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node], timed: bool) -> None:
        what, rule = _what(node, module), rule_of(node, module)
        types = {self.values[source] for source in inputs}
        kinds = ANALOG if ANALOG in types else "integer" if "integer" in types else "binary"
        arguments = (*node.args, *node.kwargs.values())
        first = node.args[0] if node.args else node.kwargs.get("input")
        if what in ADDITIONS or what in CONCATENATIONS:
            constant = [source for source in node.all_input_nodes if source not in inputs]
            terms = (*node.args, node.kwargs.get("other"))
            numbers = what in ADDITIONS and any(isinstance(term, int | float) for term in terms)
            counts = "integer" if kinds == "binary" and what in ADDITIONS else kinds
            homogeneous = not constant and not numbers
            self.values[node] = counts if homogeneous else ANALOG
        elif len(inputs) > 1 or (what in SCALINGS and sum(arg in inputs for arg in arguments) > 1):  # also x * x
            product = what in SCALINGS or what in (torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm")
            why = "multiplies activations, as squeeze-and-excitation and attention do, which spikes cannot"
            return self._refuse(node, why if product else "several activations meet; only + and concatenation do that")
        elif what in SCALINGS and node.kwargs.get("rounding_mode") is not None:
            return self._refuse(node, "it rounds, which no sum of spikes can make up for: leave rounding_mode out")
        elif what in SCALINGS and (first in inputs or what in (operator.mul, torch.mul, "mul")):
            self.values[node], homogeneous = kinds, True
        elif getattr(module, "return_indices", False):
            return self._refuse(node, "it returns indices, which spikes do not have: leave return_indices out")
        elif rule is None or (module is None and first not in inputs):
            why = (
                "it has no spiking form here: use ReLU, pooling, batch norm, addition or concatenation in its place, "
                "or keep a module whole by leaf_modules"
            )
            if isinstance(module, nn.SyncBatchNorm):
                why = "it is for training on several GPUs: put an nn.BatchNorm2d with its state dict there"
            elif what in OWN_STATISTICS_FUNCTIONS or isinstance(module, OWN_STATISTICS):
                why = "normalises each image by its own statistics, which no spike knows: use batch norm"
            return self._refuse(node, why)
        else:
            counts = "integer" if kinds == "binary" else kinds
            self.values[node] = {SAME: kinds, COUNTS: counts, ANALOG: ANALOG}[rule]
            homogeneous = rule in (SAME, COUNTS)
            if what is F.pad and argument(node, "value", 3) not in (None, 0):
                self.values[node], homogeneous = ANALOG, False
        node.meta["homogeneous"] = homogeneous  # op(h·x) = h·op(x)
        became = f"kept, {kinds} input"
        if node.target in self.averaged:
            became = AVERAGED
        elif what in MAX_POOLS:
            if self.max_pool == "average":
                became = self._average(node, module)
                self.values[node] = "integer" if kinds == "binary" else kinds
            elif timed:
                became += "; the CNN's function at T = 1 only"
        elif what is F.batch_norm:
            became += ", with fixed statistics"
        self.rows[node].became = became
        self._repeat(node, inputs)

    def _repeat(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Where some of the inputs have time, give it to the others, too."""
        if self.axis[node] == "time":
            for source in inputs:
                if self.axis[source] == "images":
                    with self.graph.inserting_before(node):
                        repeated = self.graph.call_function(repeat, (source, self.steps))
                    node.replace_input_with(source, repeated)

    def _average(self, node: fx.Node, module: nn.Module | None) -> str:
        """Put an average pool in the place of a max pool."""
        dilation = getattr(module, "dilation", 1) if module is not None else argument(node, "dilation", 4, 1)
        indices = node.kwargs.get("return_indices", False)  # modules that return them have been refused
        if dilation not in (1, (1, 1)) or indices:
            self._refuse(node, "a max pool with dilation or indices has no average pool to take its place")
            return self.rows[node].became
        if module is None:
            kwargs = {key: value for key, value in node.kwargs.items() if key not in ("dilation", "return_indices")}
            if node.target in (F.max_pool1d, F.max_pool2d):
                args = node.args[:4]
                kwargs |= {"count_include_pad": False}
                if len(node.args) > 5:
                    kwargs["ceil_mode"] = node.args[5]
                node.args = args
            node.target, node.kwargs = MAX_POOLS[node.target], kwargs
        else:
            average = MAX_POOLS[class_of(module)]
            if isinstance(module, nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d):
                pool = average(module.output_size)
            else:
                options = {"ceil_mode": module.ceil_mode, "count_include_pad": False}
                pool = average(module.kernel_size, module.stride, module.padding, **options)
            self.net.set_submodule(str(node.target), pool)
            self.averaged.add(str(node.target))
        return AVERAGED

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _is_size(self, node: fx.Node) -> bool:
        if _reads_size(node):
            return True
        sizes = [source for source in node.all_input_nodes if self.axis.get(source) == "size"]
        return bool(sizes) and len(sizes) == len(node.all_input_nodes)

    def _size(self, node: fx.Node) -> None:
        """Note whether an integer, or a shape, has the number of images or of images and steps in it."""
        self.axis[node] = "size"
        source = node.all_input_nodes[0]
        index = node.args[1] if len(node.args) > 1 else None
        owner = self.axis.get(source)
        if node.target is getattr or node.op == "call_method":
            if owner not in ("images", "time"):  # of weights
                return
            if node.target == "dim" or index in ("ndim", "dtype", "device"):
                return
            if node.target == "size" and argument(node, "dim", 1) is not None:
                if argument(node, "dim", 1) == 0:
                    self.batch[node] = str(owner)
            else:
                self.shapes[node] = str(owner)
        elif node.target is operator.getitem and source in self.shapes:
            if index == 0:
                self.batch[node] = self.shapes[source]
            elif isinstance(index, slice) and index.start in (None, 0):
                self.shapes[node] = self.shapes[source]
        else:
            whole = [self.shapes[each] for each in node.all_input_nodes if each in self.shapes]
            batches = [self.batch[each] for each in node.all_input_nodes if each in self.batch]
            if len(batches) == 1 and not whole and node.target in (operator.mul, operator.floordiv):
                self.batch[node] = batches[0]
            elif batches or whole:
                self.shapes[node] = (batches + whole)[0]

    def _sizes_fit(self, node: fx.Node, axis: str) -> bool:
        """Multiply numbers of images by the steps where a value with time uses them. False, and refused, where that
        cannot be done."""
        for size in node.all_input_nodes:
            owner = self.batch.get(size) or self.shapes.get(size)
            if owner is None or owner == axis:
                continue
            if axis == "time" and size in self.batch:
                with self.graph.inserting_before(node):
                    times = self.graph.call_function(operator.mul, (size, self.steps))
                self.axis[times] = "size"
                node.replace_input_with(size, times)
                continue
            self._refuse(
                node,
                f"it uses the shape {size.name} of a value with another first dimension: use the shape of its input",
            )
            return False
        return True

    # -- the end -------------------------------------------------------------------------------------------------------

    def _read(self, logits: fx.Node, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            read = self.graph.call_function(read_out, (logits, self.steps, self.readout))
        row = Row(read.name, "readout", "", "", f"{self.readout} over the steps")
        self.rows[read] = row
        read.meta |= {"row": read.name, "as": logits.meta.get("as", logits.name)}
        self.axis[read] = "logits"
        return read

    def _output(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node):
            kind = next((kind.__name__ for kind in (dict, list, tuple) if isinstance(logits, kind)), repr(logits))
            raise ValueError(
                f"the network returns {kind}; only networks that return one tensor of logits convert: write it so that "
                "it returns that alone"
            )
        if self.axis.get(logits) == "time":
            node.args = (self._read(logits, before=node),)
        elif self.axis.get(logits) != "logits" and not any(row.refused for row in self.rows.values()):
            raise ValueError(
                "no ReLU lies between the network's input and its output, so nothing would spike; a network must "
                "return one tensor of logits"
            )


def _hands_on(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation that changes no shapes hands its input on unchanged. Found by trying."""
    probe = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    function = module if module is not None else node.target
    if len(node.all_input_nodes) != 1 or not callable(function):
        return False
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: probe.clone())
    try:
        return bool(torch.equal(function(*args, **kwargs), probe))
    except Exception:  # whatever the user's code raises on a shape that it was not made for
        return False
