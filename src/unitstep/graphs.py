"""A graph module that can be pickled, and so given to `torch.save` and to other processes; and which of torch's classes
a module computes as. Knows nothing of spikes."""

from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import fx, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)
GENERATED = {"_graph", "_code", "_lineno_map", "_prologue_start", "_compiled_call_impl"}
DECIDES = (  # what a class may say of what its modules compute
    "__call__", "forward", "_conv_forward", "_check_input_dim", "weight", "bias", "running_mean", "running_var",
)  # fmt: skip


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of torch that `module` computes as: also of a subclass that does not change that. Else its own."""
    own = type(module)
    kind = next(kind for kind in own.__mro__ if kind.__module__.startswith("torch.nn."))
    same = all(getattr(own, name, None) is getattr(kind, name, None) for name in DECIDES)
    return kind if same and kind not in (nn.Module, nn.Sequential) else own


def computes_as(module: nn.Module | None, *kinds: type[M]) -> TypeGuard[M]:
    """Whether `module` computes as one of these classes does, which `isinstance` does not say of subclasses."""
    return module is not None and class_of(module) in kinds


class Graph(fx.GraphModule):  # type: ignore[misc,unused-ignore]
    """An `fx.GraphModule` that is pickled as a list of its operations. (torch's own would be traced again when it is
    read, which loses its class and what the nodes' `meta` say, and fails where a function depends on the timesteps.)"""

    def __reduce__(self) -> tuple[Any, ...]:
        operations = []
        for node in self.graph.nodes:
            target: Any = node.target
            if "<locals>" in getattr(target, "__qualname__", ""):  # F.max_pool2d
                target = _Reference(target.__name__)
            meta = {key: value for key, value in node.meta.items() if key != "nn_module_stack"}
            operations.append((node.op, target, _written(node.args), _written(node.kwargs), node.name, meta))
        state = {key: value for key, value in self.__dict__.items() if key not in GENERATED}
        return _unpickled, (type(self).__mro__[1], state, operations)  # 0 is a class that torch makes for each instance


@dataclass(frozen=True)
class _Reference:
    """In a pickled graph, the output of an operation, or a function of torch.nn.functional."""

    name: str


def _written(value: Any) -> Any:
    def reference(x: Any) -> Any:
        return _Reference(x.name) if isinstance(x, fx.Node) else x

    return fx.node.map_aggregate(value, reference)


def _unpickled(kind: type[Graph], state: dict[str, Any], operations: list[tuple[Any, ...]]) -> Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def read(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda x: made[x.name] if isinstance(x, _Reference) else x)

    for op, target, args, kwargs, name, meta in operations:
        function = getattr(F, target.name) if isinstance(target, _Reference) else target
        made[name] = graph.create_node(op, function, read(args), read(kwargs), name)
        made[name].meta = meta
    root = nn.Module()
    root.__dict__ |= state
    net = kind(root, graph)
    net.__dict__ |= state  # what the graph does not use is in it, too
    return net
