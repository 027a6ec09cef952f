"""Any CNN as a spiking network, by running its own Python code once per timestep; nothing of `unitstep` in it.

The user's module is not traced or rewritten: its forward runs as it stands, with the images as its input at every step.
While it runs, the n-th rectifying call of a pass does not rectify, but gives its input, as a current, to the n-th layer
of neurons, which keep their membranes from pass to pass (one neuron: `oracle.py`, without leak). What is averaged, or
added up, over the passes is what the forward returns.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

APPROXIMATIONS = ("leaky_relu", "silu", "gelu", "hardswish", "prelu")


class Neurons:
    """One layer: U ← U + I; it fires where U > V; U ← U − V there. What comes out is worth V, or 1."""

    def __init__(self, threshold: Tensor, height: str, initial: float) -> None:
        self.threshold, self.height, self.initial = threshold.detach().double(), height, initial
        self.membrane: Tensor | None = None
        self.spikes: list[Tensor] = []

    def __call__(self, current: Tensor) -> Tensor:
        V = self.threshold
        if V.dim():  # one for each channel
            V = V.view(1, -1, *[1] * (current.dim() - 2))
        membrane = (self.initial * V if self.membrane is None else self.membrane) + current
        fires = membrane > V
        self.membrane = membrane - V * fires
        self.spikes.append(fires)
        return (V * fires if self.height == "threshold" else fires).to(current.dtype)


def rectifies(function: Any, args: Sequence[Any], kwargs: dict[str, Any], approximations: bool) -> bool:
    """Whether a call of torch cuts off below 0, and maybe above."""

    def argument(name: str, position: int, default: Any = None) -> Any:
        return kwargs.get(name, args[position] if len(args) > position else default)

    name = getattr(function, "__name__", "").removesuffix("_")
    if name in ("clamp", "clip", "clamp_min"):
        lower = argument("min", 1)
    elif name == "hardtanh":
        lower = argument("min_val", 1, -1.0)
    else:
        return name in ("relu", "relu6") or (approximations and name in APPROXIMATIONS)
    return isinstance(lower, int | float) and lower == 0


class Pass(TorchFunctionMode):
    """Within this context, one pass through the network, rectifying calls go to the neurons, in their order."""

    def __init__(self, layers: list[Neurons], approximations: bool) -> None:
        super().__init__()
        self.layers, self.approximations = iter(layers), approximations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not rectifies(func, args, kwargs, self.approximations):
            return func(*args, **kwargs)
        current = args[0] if args else kwargs["input"]
        layer = next(self.layers, None)
        assert layer is not None, "the network has more rectifiers than there are thresholds"
        spikes = layer(current)
        in_place = func.__name__.endswith("_") or kwargs.get("inplace", False)
        return current.copy_(spikes) if in_place else spikes


@torch.no_grad()
def simulate(
    cnn: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    thresholds: Sequence[Tensor],
    *,
    steps: int,
    height: str = "threshold",
    initial: float = 0.0,
    readout: str = "mean",
    approximations: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Logits, and for each layer its spikes, bool [T, B, …].

    thresholds: one [] or [C] for each rectifying call of a pass.  approximations: LeakyReLU, SiLU, GELU, Hardswish and
    PReLU are rectifiers too.
    """
    net = copy.deepcopy(cnn).eval() if isinstance(cnn, nn.Module) else cnn
    layers = [Neurons(V, height, initial) for V in thresholds]
    outputs = []
    for _ in range(steps):
        one = Pass(layers, approximations)
        with one:
            outputs.append(net(images.clone()))  # a copy, since the network may write into it
        assert next(one.layers, None) is None, "the network has fewer rectifiers than there are thresholds"
    total = torch.stack(outputs).sum(0)
    return total / steps if readout == "mean" else total, [torch.stack(layer.spikes) for layer in layers]
