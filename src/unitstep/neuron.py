"""The spiking neuron layer: how an input current becomes spikes, and how a gradient comes back. Knows nothing of
networks, data or training.

Per timestep t, with threshold V, leak λ and the membrane U carried from step to step::

    U ← λ·U + I_t               integrate                       (U starts at initial·V)
    s_t = 1 if U > V else 0     fire: strict, a tie is silent
    U ← U − V·s_t               soft reset, in the same step
    output = h·s_t              height h = 1 ("unit") or V ("threshold")

A step function has no useful derivative; backward replaces it by the surrogate ds/dz = 0.3·max(0, 1 − |z|) with z =
U/V − 1, and treats the s in the reset as a constant. At T = 1 with U(0) = 0 all this is one comparison, I > V: neither
leak nor reset acts.
Source: arXiv 2008.03658 and arXiv 2110.05929.
"""

import contextlib
import math
import operator
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Height = Literal["unit", "threshold"]
CHUNK = 1 << 16  # neurons that are worked off at a time without the compiler
MIN_THRESHOLD, MIN_LEAK = 1e-3, 1e-3  # learned values are kept above these

_compiled: ContextVar[bool] = ContextVar("compiled", default=False)


@contextlib.contextmanager
def compiled(enabled: bool) -> Iterator[None]:
    """Within this context every `LIF` runs as one fused kernel forward and one backward, made by `torch.compile`;
    results are the same up to rounding."""
    token = _compiled.set(enabled)
    try:
        yield
    finally:
        _compiled.reset(token)


def is_compiled() -> bool:
    """Whether `compiled(True)` is in force."""
    return _compiled.get()


def compiler_available(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs to make kernels for `device`: a C++ compiler and Python's header files,
    or Triton on a GPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # type: ignore[attr-defined,unused-ignore]

        return bool(has_triton())
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compiler, *_ = shlex.split(os.environ.get("CXX", "")) or ["g++"]  # "ccache g++" is one, too
    return shutil.which(compiler) is not None and headers.exists()


def membranes(
    current: Tensor, V: Tensor, leak: Tensor, steps: int, initial: Tensor | float
) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
    """Yield per step (membrane left by the step before, membrane before the reset, whether it fires).

    current: [steps, …], or [1, …] if it is the same at every step.  initial: what the membranes start from, as a
    fraction of V or as they are.
    """
    left = initial if isinstance(initial, Tensor) else initial * V if initial else None  # None is 0
    for t in range(steps):
        now = current[t if len(current) == steps else 0].to(V.dtype)
        membrane = now if left is None else leak * left + now
        fires = membrane > V
        yield left, membrane, fires
        if t + 1 < steps:
            left = torch.where(fires, membrane - V, membrane)


def _fire(current: Tensor, V: Tensor, leak: Tensor, steps: int, height: str, initial: float) -> Tensor:
    """[steps, A, C, Z] (or [1, A, C, Z]) → spikes [steps, A, C, Z] in the dtype of `current`.

    C: the channels, with a threshold each: V is [C, 1]; with one threshold for all, C is 1.  A, Z: everything else.
    """
    worth = V if height == "threshold" else torch.ones_like(V)
    states = membranes(current, V, leak, steps, initial)
    spikes = [torch.where(fires, worth, 0).to(current.dtype) for _, _, fires in states]
    return torch.stack(spikes) if steps > 1 else spikes[0][None]


def _step(now: Tensor, V: Tensor, leak: Tensor, initial: Tensor | float, height: str) -> tuple[Tensor, Tensor]:
    """One step of `_fire` from given membranes on: current [A, C, Z] → (spikes, membranes left)."""
    _, membrane, fires = next(membranes(now[None], V, leak, 1, initial))
    worth = V if height == "threshold" else torch.ones_like(V)
    return torch.where(fires, worth, 0).to(now.dtype), torch.where(fires, membrane - V, membrane)


def _fire_backward(
    grad: Tensor, current: Tensor, V: Tensor, leak: Tensor, steps: int, height: str, initial: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_fire` with respect to current, threshold and leak. The membranes are computed again, so only
    `current` had to be kept."""
    states = list(membranes(current, V, leak, steps, initial))
    to_current = []
    to_V, to_leak = torch.zeros_like(states[0][1]), torch.zeros_like(states[0][1])  # of each neuron; summed once, below
    carried = None  # dL/dU after the reset of step t, which comes from step t + 1
    for t in reversed(range(steps)):
        left, membrane, fires = states[t]
        g = grad[t].to(V.dtype)
        relative = membrane / V
        to_z = g * 0.3 * (1 - (relative - 1).abs()).clamp(min=0)  # dL/dz, for height 1
        if height == "threshold":
            to_z = to_z * V
            to_V = to_V + torch.where(fires, g, 0)  # through the height itself
        to_membrane = to_z / V  # ∂z/∂U = 1/V
        to_V = to_V - to_membrane * relative  # ∂z/∂V = −U/V²
        if carried is not None:
            to_membrane = to_membrane + carried  # the reset passes dL/dU on: its s is a constant …
            to_V = to_V - torch.where(fires, carried, 0)  # … but its V is not
        to_current.append(to_membrane.to(current.dtype) if len(current) == steps else to_membrane)
        if left is not None:
            to_leak = to_leak + to_membrane * left
        carried = leak * to_membrane
    if initial and carried is not None:
        to_V = to_V + initial * carried
    to_V, to_leak = to_V.sum((0, 2)).unsqueeze(1), to_leak.sum()  # per channel [C, 1], and for the layer
    if len(current) == steps:
        return torch.stack(to_current[::-1]), to_V, to_leak
    return sum(to_current[1:], to_current[0])[None].to(current.dtype), to_V, to_leak


@cache
def _kernel(function: Any, options: tuple[Any, ...], *case: Any) -> Any:
    """`function` compiled with symbolic sizes, its last arguments fixed: one kernel serves all layers of a case. Each
    case is a function of its own to torch, which gives up a function after eight kernels. Raises rather than fall back
    to eager in silence."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, options)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _fused(function: Any, *args: Any) -> Any:
    """`function(*args)`, tensors first, as a kernel."""
    tensors = [arg.detach() for arg in args if isinstance(arg, Tensor)]  # a view would be compiled anew per base
    kernel = _kernel(function, args[len(tensors) :], tensors[0].dtype, *(size == 1 for size in tensors[0].shape))
    return kernel(*tensors)


class _Fire(torch.autograd.Function):
    """All steps of one layer: one pass forward, one backward. It keeps the current and nothing else.

    current: [rows·B, …], rows: `steps`, or 1 if it is the same at every step.  threshold: [C] or a scalar.
    Without the compiler A is worked off in chunks, whose intermediate results stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, threshold: Tensor, leak: Tensor, steps: int, rows: int, height: str, initial: float
    ) -> Tensor:
        ctx.save_for_backward(current, threshold, leak)
        ctx.options = steps, height, initial
        ctx.rows = rows
        ctx.fuse = is_compiled()  # backward may run in another thread, where the context is not known
        parameters = *_parameters(current, threshold, leak), *ctx.options
        flat = _rows(current, threshold.numel(), rows)
        if ctx.fuse:
            spikes = _fused(_fire, flat, *parameters)
        else:
            spikes = torch.cat([_fire(part, *parameters) for part in _chunks(flat)], 1)
        return _unrows(spikes, current, len(current) // rows * steps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        current, threshold, leak = ctx.saved_tensors
        parameters = *_parameters(current, threshold, leak), *ctx.options
        flat = _rows(current, threshold.numel(), ctx.rows)
        grad = _rows(grads[0].contiguous(memory_format=memory_format(current)), threshold.numel(), ctx.options[0])
        if ctx.fuse:
            to_current, to_V, to_leak = _fused(_fire_backward, grad, flat, *parameters)
        else:
            pairs = zip(_chunks(grad), _chunks(flat), strict=True)
            parts = [_fire_backward(grad, part, *parameters) for grad, part in pairs]
            to_current = torch.cat([part for part, _, _ in parts], 1)
            to_V, to_leak = (torch.stack(sums).sum(0) for sums in list(zip(*parts, strict=True))[1:])
        to_current = _unrows(to_current, current, len(current))
        return to_current, to_V.view_as(threshold).to(threshold.dtype), to_leak.to(leak.dtype), *[None] * 4


def _parameters(current: Tensor, threshold: Tensor, leak: Tensor) -> tuple[Tensor, Tensor]:
    """V [C, 1] and λ in the precision of integration: fp32 for currents in half precision."""
    precision = torch.promote_types(current.dtype, torch.float32)
    return threshold.to(precision).view(-1, 1), leak.to(precision)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """[rows, A, C, Z] → parts of about CHUNK neurons."""
    parts: tuple[Tensor, ...] = x.split(max(1, CHUNK // max(1, x.shape[2] * x.shape[3])), 1)
    return parts


def _rows(x: Tensor, channels: int, rows: int) -> Tensor:
    """[rows·B, …] → [rows, A, C, Z] in memory order: nothing is copied. channels: how many have a threshold of their
    own; 1, and C is 1, if all share one."""
    last = memory_format(x) is torch.channels_last
    dense = x.permute(0, 2, 3, 1) if last else x
    Z = 1 if channels == 1 or last else math.prod(x.shape[2:])
    return dense.reshape(rows, x.numel() // (rows * channels * Z) if Z else 0, channels, Z)


def _unrows(flat: Tensor, like: Tensor, size: int) -> Tensor:
    """The inverse: [steps, A, C, Z] → [size, …] in the shape and memory format of `like`."""
    if memory_format(like) is torch.channels_last:
        return flat.view(size, *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
    return flat.view(size, *like.shape[1:])


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of x are the last dimension in memory, else the usual one."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class LIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons with one learnable threshold and one learnable leak (equations: this
    module's docstring).

    threshold: V > 0, in the unit of the current; a tensor [C] gives each channel (dimension 1) its own.  leak: λ in
    (0, 1]; 1 forgets nothing.  height: what a spike is worth downstream, 1 or V.
    initial: U(0) in units of V (0.5 turns the rounding of a T-step response from floor into nearest).
    Integration is in fp32 for fp32, bf16 and fp16 currents and in fp64 for fp64 ones. No state survives a call.
    """

    def __init__(
        self, threshold: float | Tensor = 1.0, leak: float = 1.0, *, height: Height = "unit", initial: float = 0.0
    ) -> None:
        super().__init__()
        V = torch.as_tensor(threshold, dtype=torch.float32)
        if V.dim() > 1 or not bool((V > 0).all()):
            raise ValueError(f"threshold must be greater than 0, a number or one per channel [C], not {threshold}")
        if not 0 < leak <= 1:
            raise ValueError(f"leak must be in (0, 1], not {leak}: 1 forgets nothing, 0.9 forgets a tenth per step")
        if height not in ("unit", "threshold"):
            raise ValueError(
                f'height must be "unit" (a spike is worth 1) or "threshold" (it is worth V), not {height!r}'
            )
        if not 0 <= initial < 1:
            raise ValueError(f"initial must be in [0, 1), as a fraction of the threshold, not {initial}")
        self.threshold = nn.Parameter(V.detach().clone())
        self.leak = nn.Parameter(torch.tensor(float(leak)))
        self.height, self.initial = height, float(initial)

    def forward(self, current: Tensor, steps: int = 1, *, static: bool = False) -> Tensor:
        """Current [T·B, …], all B of step 1 first, → spikes [T·B, …], worth 0 or h, in the current's dtype;
        channels_last stays so.

        static: the current is [B, …] and the same at every step, as it is until something has spiked.
        Raises ValueError if steps < 1 or if the first dimension is not a multiple of steps.
        """
        check_steps(steps)
        rows = 1 if static else steps
        if current.dim() == 0 or current.shape[0] % rows:
            raise ValueError(
                f"current of shape {list(current.shape)} does not hold {steps} steps: its first dimension must be "
                "steps·batch"
            )
        if self.threshold.dim() and (current.dim() < 2 or current.shape[1] != len(self.threshold)):
            raise ValueError(
                f"{len(self.threshold)} thresholds, one per channel (dimension 1), cannot serve a current of shape "
                f"{list(current.shape)}"
            )
        options = steps, rows, self.height, self.initial
        spikes: Tensor = _Fire.apply(current, self.threshold, self.leak, *options)  # type: ignore[no-untyped-call]
        return spikes

    @torch.no_grad()
    def go_on(self, current: Tensor, steps: int, left: Tensor | None, *, static: bool = False) -> tuple[Tensor, Tensor]:
        """`forward` without gradients from given membranes on: returns the spikes and the membranes after the last
        step, [B, …], to be given to the next call.

        left: None is where a fresh layer starts.
        """
        rows = 1 if static else steps
        V, leak = _parameters(current, self.threshold, self.leak)
        current = current.contiguous(memory_format=memory_format(current[: len(current) // rows]))  # as membranes are
        flat = _rows(current, len(V), rows)
        one = current[: len(current) // rows]
        held: Tensor | float = self.initial
        if left is not None:
            held = _rows(left.contiguous(memory_format=memory_format(one)), len(V), 1)[0]
        spikes = flat.new_empty(steps, *flat.shape[1:])
        for t, out in enumerate(spikes):
            arguments = flat[0 if static else t], V, leak, held, self.height
            fired, held = _fused(_step, *arguments) if is_compiled() else _step(*arguments)
            out.copy_(fired)
        assert isinstance(held, Tensor)
        return _unrows(spikes, current, len(one) * steps), _unrows(held, one, len(one))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take one threshold or one per channel, whatever there was."""
        V = state_dict.get(f"{prefix}threshold")
        if isinstance(V, Tensor) and V.dim() <= 1 and V.shape != self.threshold.shape:
            self.threshold.data = self.threshold.data.new_empty(V.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        V = self.threshold.detach()
        threshold = f"{V.item():.4g}" if V.dim() == 0 else f"{len(V)} of mean {V.mean().item():.4g}"
        learned = f"threshold={threshold}, leak={self.leak.item():.4g}"
        return f"{learned}, height={self.height!r}, initial={self.initial}"


def check_steps(steps: int) -> int:
    """Return `steps` if it is a whole number of timesteps, at least 1; else raise ValueError."""
    whole = isinstance(steps, SupportsIndex) and not isinstance(steps, bool)  # as NumPy's integers are
    if not whole or (number := operator.index(steps)) < 1:
        raise ValueError(f"steps must be a whole number of timesteps, 1 or more, not {steps!r}")
    return number


def clamp_(net: nn.Module) -> None:
    """Bring every threshold of `net` back above 0 and every leak back into (0, 1], in place. To be called after each
    optimiser step of a training loop of your own; `train` does so."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, LIF):
                module.threshold.clamp_(min=MIN_THRESHOLD)
                module.leak.clamp_(min=MIN_LEAK, max=1.0)


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
        return x * repeat(mask, steps)


def repeat(x: Tensor, steps: int) -> Tensor:
    """[B, …] → [T·B, …]: the same at every step."""
    return x if steps == 1 else torch.cat([x] * steps)  # which keeps the memory format, as x.repeat does not


def read_out(x: Tensor, steps: int, readout: str) -> Tensor:
    """[T·B, classes] → [B, classes]: what a neuron without leak and without threshold has integrated, or its mean per
    step."""
    over_time: Tensor = x.unflatten(0, (steps, x.shape[0] // steps))
    return over_time.sum(0) if readout == "sum" else over_time.mean(0)
