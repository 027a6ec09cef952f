"""From the structure of a spiking network to one that works: thresholds found on images, what each layer then does, and
how far it is from the CNN. Knows nothing of training, data sets or files.
"""

import contextlib
import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from unitstep.conversion import LeafModules, MaxPool, Norm, Readout, Spiking, spiking, trace
from unitstep.evaluation import ieee
from unitstep.fusing import BATCH_NORMS
from unitstep.neuron import LIF, Height, check_steps, read_out, repeat
from unitstep.recipes import STRATEGIES, Thresholds, check_percentile
from unitstep.running import first_line

REPORTED = 128  # images on which a report's rates and errors are taken, at most
SAMPLE = 1 << 18  # values of a layer's current that the "mse" strategy, or a picture, looks at, at most
ROWS = 320  # images times steps that a report works on at a time


@ieee()
def to_spiking(
    cnn: nn.Module,
    images: Tensor,
    *,
    steps: int = 5,
    thresholds: Thresholds = "channel-percentile",
    percentile: float = 99.0,
    scale: float = 1.0,
    initial: float = 0.5,
    calibration_steps: int | None = None,
    height: Height = "threshold",
    readout: Readout = "mean",
    norm: Norm = "keep",
    max_pool: MaxPool = "keep",
    approximate: bool = False,
    leaf_modules: LeafModules = (),
) -> Spiking:
    """A spiking copy of `cnn`, which stays untouched, with thresholds found on `images` [B, C, H, W], and a `.report`
    of what became of each operation.

    steps: the T at which the network is going to be used, and for which thresholds are found; the report's spike rates
    and errors are those at T.
    thresholds, percentile, scale, calibration_steps: see `calibrate_`.  height, initial, readout, norm, max_pool,
    approximate, leaf_modules: see `spiking`. Raises ConversionError, a ValueError, which names all operations that do
    not convert; ValueError for other wrong input.
    """
    given: tuple[object, object] = (cnn, images)
    if not isinstance(given[0], nn.Module):
        raise ValueError(f"the network is a {type(cnn).__name__}: give a module, Net() and not its class Net")
    if not isinstance(given[1], Tensor):
        raise ValueError(
            f"images is a {type(images).__name__}: give one tensor [B, C, H, W], of a loader next(iter(loader))[0]"
        )
    options: dict[str, Any] = {"height": height, "initial": initial, "readout": readout, "norm": norm}
    snn = spiking(cnn, max_pool=max_pool, approximate=approximate, leaf_modules=leaf_modules, **options)
    find = {"thresholds": thresholds, "percentile": percentile, "scale": scale}
    calibrate_(snn, images, steps=steps, calibration_steps=calibration_steps, **find)  # type: ignore[arg-type]
    traced = trace(cnn, leaf_modules)
    _check_trace(cnn, traced, images[:2])
    _describe(snn, traced, images[:REPORTED], check_steps(steps))
    return snn


@torch.no_grad()
def _check_trace(cnn: nn.Module, traced: nn.Module, images: Tensor) -> None:
    """ValueError if what was traced is another function than the CNN, where that can be called with images."""
    try:
        copies = [copy.deepcopy(cnn) for _ in range(2)]
        for each in copies:
            each.eval()  # which may return None
        logits, again = (each(images.clone()) for each in copies)
    except Exception:  # whatever the user's code raises: it wants more than images, or asserts what is not traced
        return
    ours, same = traced(images.clone()), False
    if isinstance(logits, Tensor):
        if not torch.allclose(logits, again, equal_nan=True):  # it draws random numbers, perhaps weights
            return
        close = {"rtol": 1e-3, "atol": 1e-3 * logits.nan_to_num().abs().max().item()}
        same = ours.shape == logits.shape and torch.allclose(ours, logits, equal_nan=True, **close)
    if not same:
        raise ValueError(
            f"{type(cnn).__name__}, traced, gives other logits than when it is called: what it computes depends on how "
            "it is called, as by isinstance(x, torch.Tensor), or it changes a value in place unseen, in a leaf module. "
            "Write it without that"
        )


@ieee()
@torch.no_grad()
def calibrate_(
    snn: Spiking,
    images: Tensor,
    *,
    steps: int,
    calibration_steps: int | None = None,
    thresholds: Thresholds = "channel-percentile",
    percentile: float = 99.0,
    scale: float = 1.0,
    refresh_norms: bool = False,
    window: int = 10,
) -> Spiking:
    """Set every threshold of `snn`, for use at T = `steps`, from the currents I that `images` [B, C, H, W] cause over
    `calibration_steps` (None: T), in place, layer by layer: earlier layers already spike. V = scale · V₀, and with
    `thresholds`

    - "percentile": V₀ = max over the steps of the `percentile`-th percentile of I over all neurons and images (nearest
      rank). The paper's (arXiv 2110.05929): 90 at 500 steps; DIET-SNN's (2008.03658): 99.7, scale 0.2 to 0.6.
    - "channel-percentile": the same for each channel alone; the layer gets one threshold per channel.
    - "max": V₀ = the largest current at any step.
    - "mse": the V₀ that minimises the mean of (ReLU(x) − r(x))², x = the neuron's mean current over the steps, r the
      response to it, V/T·clip(⌈(T·x + initial·V)/V⌉ − 1, 0, T), by search over 200 fractions of the largest x.

    A capped rectifier's V is at most its cap; V₀ ≤ 0 gives V = 0.1. Leaks become 1.
    refresh_norms: batch norms that were kept take their statistics from these images, too, of the last window.  Steps
    run `window` at a time, so memory does not grow with their number; beyond one window the time grows with the square
    of the number of layers. Warns with the name of a layer that emits no spike.
    """
    check_steps(steps)
    over = check_steps(steps if calibration_steps is None else calibration_steps)
    if thresholds not in STRATEGIES:
        raise ValueError(f"thresholds must be one of {', '.join(STRATEGIES)}, not {thresholds!r}")
    check_percentile(percentile)
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, not {scale}")
    if len(images) == 0:
        raise ValueError("calibration needs at least one image")
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError("calibration images must be finite numbers: some are NaN or infinite")
    for name, tensor in snn.state_dict().items():
        if isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite numbers: some are NaN or infinite")
    training = {name: module.training for name, module in snn.named_modules()}
    norms = [module for module in snn.modules() if isinstance(module, BATCH_NORMS) and refresh_norms]
    momenta = [norm.momentum for norm in norms]
    sweep = _Sweep(snn, images, [min(window, over - start) for start in range(0, over, window)])
    try:
        snn.eval()
        _check_time_axis(snn, images)
        for norm in norms:  # use and remember the statistics of these images
            norm.train()
            norm.momentum = 1.0
        for name, lif in snn.lifs.items():
            row = snn.report[name]
            currents = sweep.currents(name)
            if thresholds == "mse":
                V, row.found = _least_squares(currents, steps, lif.initial, row.cap), "least squares"
            else:
                p = 100.0 if thresholds == "max" else percentile
                V = _percentile(currents, p, per_channel=thresholds == "channel-percentile")
                row.found = "maximum" if p == 100 else f"percentile {p:g}"
                row.found += " per channel" if thresholds == "channel-percentile" else ""
            if scale != 1:
                row.found += f" × {scale:g}"
            V = torch.where(V > 0, V * scale, 0.1)
            if row.cap is not None and (row.cap < V).any():
                row.found = "cap" if (row.cap < V).all() else f"{row.found}, at most the cap"
                V = V.clamp(max=row.cap)
            row.threshold = V.mean().item()
            lif.threshold.data, lif.threshold.grad = V.to(lif.threshold), None  # an optimiser may have it already
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
        message = f"layer {', '.join(dead)} emits no spike on the calibration images: {way_out}"
        warnings.warn(message, stacklevel=4)  # `ieee` and `no_grad` have frames of their own
    return snn


def _percentile(currents: Iterator[Tensor], percentile: float, per_channel: bool) -> Tensor:
    """Of currents [steps, B, C, …], the largest of any step; [C], or [] where there are no channels. (`torch.quantile`
    takes no more than 16 million elements.)"""
    peaks = []
    for now in (step for window in currents for step in window):
        rows = now.transpose(0, 1).flatten(1) if per_channel and now.dim() > 1 else now.flatten()[None]
        rank = 1 + round(percentile / 100 * (rows.shape[1] - 1))
        peak = rows.amax(1) if rank == rows.shape[1] else rows.kthvalue(rank, 1).values
        peaks.append(peak if per_channel and now.dim() > 1 else peak[0])
    return torch.stack(peaks).amax(0)


def sampled(x: Tensor) -> Tensor:
    """x [n], or `SAMPLE` of its values if those are fewer, from random places: equal strides could meet one column of
    the image only."""
    if len(x) <= SAMPLE:
        return x
    return x[torch.randint(len(x), (SAMPLE,), generator=torch.Generator().manual_seed(0)).to(x.device)]


def _least_squares(currents: Iterator[Tensor], steps: int, initial: float, cap: float | None) -> Tensor:
    """The threshold whose response over `steps` to the mean current is nearest to ReLU, or to the capped ReLU."""
    sums = [(window.sum(0, dtype=torch.promote_types(window.dtype, torch.float32)), len(window)) for window in currents]
    x = (torch.stack([total for total, _ in sums]).sum(0) / sum(length for _, length in sums)).flatten()
    x = sampled(x)
    top = x.max() if cap is None else x.max().clamp(max=cap)
    wanted = x.clamp(0, cap)
    best, V = math.inf, top
    for fraction in torch.linspace(1, 200, 200, dtype=x.dtype, device=x.device) / 200:
        candidate = fraction * top
        spikes = (((steps * x + initial * candidate) / candidate).ceil() - 1).clamp(0, steps)
        error = (wanted - candidate * spikes / steps).square().mean().item()
        if error < best:
            best, V = error, candidate
    return V


# ---------------------------------------------------------------------------------- one operation after another


class _Stepper(fx.Interpreter):  # type: ignore[misc,unused-ignore]
    """Runs a spiking network operation by operation, without gradients; membranes stay, so that the next window of
    steps goes on from them."""

    def __init__(self, snn: Spiking) -> None:
        super().__init__(snn)
        self.left: dict[str, Tensor | None] = {}
        self.alive: set[str] = set()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lif = self.fetch_attr(target)
        if not isinstance(lif, LIF):
            return super().call_module(target, args, kwargs)
        current, steps = args
        spikes, self.left[target] = lif.go_on(current, steps, self.left.get(target), **kwargs)
        if spikes.any():
            self.alive.add(target.removeprefix("neurons."))
        return spikes


@torch.no_grad()
def unroll(snn: Spiking, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """One timestep after another, in constant memory: yields the output of each step, [B, classes].

    frames: the images [B, C, H, W] at each step: the same ones T times for what `snn(images, steps=T)` does, or random
    binary ones for a rate code. The running sum of the outputs is readout "sum", divided by the step's number "mean".
    """
    stepper = _Stepper(snn)
    for frame in frames:
        yield stepper.run(frame, 1)


class _Sweep(_Stepper):
    """Runs a spiking network up to one neuron layer after the other.

    A single window is run once, stopping at each layer on the way. Several cannot all be kept in memory: each layer
    starts anew from the images.
    """

    def __init__(self, snn: Spiking, images: Tensor, windows: list[int]) -> None:
        super().__init__(snn)
        self.images, self.windows = images, windows
        self.running: Iterator[tuple[fx.Node, Any]] | None = None

    def currents(self, name: str | None) -> Iterator[Tensor]:
        """Per window the current of neuron layer `name`, [steps, B, …] or, if static, [1, B, …]; None runs to the
        end."""
        if len(self.windows) > 1:
            self.left = {}
        for length in self.windows:
            if len(self.windows) > 1 or self.running is None:
                self.env, self.running = {}, _values(self, self.images, length)
            for node, _ in self.running:
                layer = node.next
                if layer.target == f"neurons.{name}":
                    current = self.env[layer.all_input_nodes[0]]
                    yield current.unflatten(0, (1 if layer.kwargs.get("static") else length, -1))
                    break


# ------------------------------------------------------------------------------------------------------- the checks


def _check_time_axis(snn: Spiking, images: Tensor) -> None:
    """ValueError, naming the first operation that does not act on each image at each step alone.

    That is found by trying: on random values in the place of 2 steps of 3 images, the output for the last step must be
    what the operation makes of the last step alone.
    """
    batch, steps = 3, 2
    images = images[torch.arange(batch) % len(images)]
    generator = torch.Generator().manual_seed(0)
    whole, part = fx.Interpreter(snn), fx.Interpreter(snn)
    whole.args_iter, part.args_iter = iter([images, steps]), iter([images, 1])

    def rows(x: Tensor) -> Tensor:
        return x[len(x) - len(x) // steps :]

    def noise(x: Any) -> Any:
        return torch.rand(x.shape, generator=generator).to(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    def same(full: Any, one: Any) -> bool:
        if not isinstance(full, Tensor) or full.dim() == 0 or len(full) != steps * len(one):
            return False
        close = {"rtol": 1e-3, "atol": 1e-3 * max(1e-30, one.abs().max().item())}
        return rows(full).shape == one.shape and torch.allclose(rows(full), one, **close)

    order = {node: number for number, node in enumerate(snn.graph.nodes)}
    for node in snn.graph.nodes:
        row = node.meta.get("row")
        ours = node.target in (repeat, read_out) or str(node.target).startswith("neurons.")
        timed = node.meta.get("axis") == "time"
        if node.target is repeat:
            value = whole.env[node.args[0]]
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % batch:
                user = next(user for user in node.users).meta["row"]
                raise ValueError(
                    f"{snn.report.place(user)} joins {node.args[0].name}, which does not hold one row per image, with "
                    "values at each timestep"
                )
        if "vectors" in node.meta and whole.env[node.all_input_nodes[0]].dim() != 2:
            raise ValueError(
                f"{snn.report.place(row)} acts on the last dimension, the batch norm {node.meta['vectors']}, which was "
                'folded into it, on the second: use norm="keep"'
            )
        repeated = [given for given in node.all_input_nodes if given.target is repeat]
        needed = [given for given in repeated if any(order[user] > order[node] for user in given.args[0].users)]
        before = {given: whole.env[given].clone() for given in needed}
        try:
            full, one = whole.run_node(node), part.run_node(node)
        except Exception as error:  # whatever an operation raises on a shape that it was not made for
            if row is None:
                raise
            raise ValueError(_fails(snn, row, error, timed)) from error
        if timed and row and not ours and not all(map(same, pytree.tree_leaves(full), pytree.tree_leaves(one))):
            raise ValueError(
                f"{snn.report.place(row)} joins or cuts the first dimension, which holds images and timesteps: write "
                "it so that it acts on each image alone, e.g. torch.flatten(x, 1), torch.cat(parts, 1), x.mean((2, 3))"
            )
        for given, value in before.items():
            if not torch.equal(whole.env[given], value):
                raise ValueError(
                    f"{snn.report.place(row)} changes {given.args[0].name} in place, which is used afterwards and the "
                    "same at all timesteps: write it without in-place"
                )
        if timed:
            full = pytree.tree_map(noise, full)
            one = pytree.tree_map(rows, full)
        whole.env[node], part.env[node] = full, one


def _fails(snn: Spiking, row: str, error: Exception, timed: bool) -> str:
    what = "with timesteps in the first dimension, beside the images" if timed else "on these images"
    way_out = "; it, and what is before it, must act on each image alone" if timed else ""
    return f"{snn.report.place(row)} fails {what}: {first_line(error)}{way_out}"


@torch.no_grad()
def _describe(snn: Spiking, cnn: fx.GraphModule, images: Tensor, steps: int) -> None:
    """Fill in the report: shapes, spike rates, and errors against the traced CNN, operation by operation."""
    report, lifs = snn.report, snn.lifs
    training = [(module, module.training) for module in snn.modules()]
    faithful = all(lif.height == "threshold" for lif in lifs.values())  # else values have other units than the CNN's
    spikes, neurons = dict.fromkeys(lifs, 0), dict.fromkeys(lifs, 0)
    needed = Counter(node.meta.get("as", node.meta.get("row")) for node in snn.graph.nodes)  # how often each is needed
    squares: dict[str, tuple[float, float]] = {}  # sums over the images: of the difference, of the CNN's value
    snn.eval()
    for part in images.tensor_split(max(1, min(len(images) // 2, -(-len(images) * steps // ROWS)))):
        there = _values(fx.Interpreter(cnn), part)
        ahead: dict[str, Any] = {}  # values of the CNN that are needed later: folding and caps change the order
        left = needed.copy()
        for node, value in _values(_Stepper(snn), part, steps):
            if (row := node.meta.get("row")) is None:
                continue
            name = node.meta.get("as", row)
            while name not in ahead:
                other, wanted = next(there)
                if left[other.name]:
                    ahead[other.name] = wanted
            left[name] -= 1
            wanted = ahead[name] if left[name] else ahead.pop(name)
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            timed = node.meta["axis"] == "time"
            parts = len(value) // (len(part) * (steps if timed else 1))  # of an image, where a view put them in front
            report[row].shape = (*([parts] if parts > 1 else []), *value.shape[1:])
            if row in lifs:
                spikes[row] += int((value != 0).sum())
                neurons[row] += value.numel() // steps
            if not faithful or not isinstance(wanted, Tensor) or node.meta["axis"] == "none":
                continue
            if timed:
                value = read_out(value, steps, "mean")
            elif node.target is read_out and node.args[2] == "sum":
                value = value / steps
            before = squares.get(row, (0.0, 0.0))
            both = ((value - wanted).double().square().sum().item(), wanted.double().square().sum().item())
            squares[row] = before[0] + both[0], before[1] + both[1]
    for row, (difference, whole) in squares.items():
        report[row].error = math.sqrt(difference / whole) if whole else None
    for row, number in spikes.items():
        report[row].rate = number / neurons[row]
    report.steps, report.images = steps, len(images)
    for module, mode in training:
        module.training = mode


def _values(run: fx.Interpreter, *inputs: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Each operation with its value, in order; a value is let go of once nothing needs it."""
    run.args_iter = iter(inputs)
    for node in run.graph.nodes:
        run.env[node] = run.run_node(node)
        yield node, run.env[node]
        for dead in run.user_to_last_uses.get(node, []):
            del run.env[dead]


# --------------------------------------------------------------------------------------------------------- watching


@dataclass(frozen=True)
class Activity:
    """What one neuron layer got and did in a call."""

    current: Tensor
    """[T, B, …], before the leak is taken off and the membrane added; [1, B, …] if it is the same at every step."""
    spikes: Tensor
    """bool [T, B, …]."""
    threshold: Tensor
    """[], or [C] if each channel has its own."""

    @property
    def count(self) -> Tensor:
        """Spikes at each step, over all images and neurons: int64 [T]."""
        return self.spikes.flatten(1).sum(1)

    @property
    def rate(self) -> float:
        """Spikes per neuron and image, summed over the T steps."""
        return self.spikes.sum().item() / self.spikes[0].numel()


@contextlib.contextmanager
def record(snn: Spiking) -> Iterator[dict[str, Activity]]:
    """Within this context each call of `snn` leaves, per neuron layer, its currents and spikes in the dict that is
    given, detached, to be looked at; the network works as without it.

    ``with record(snn) as spikes: snn(images, steps=3)`` and then ``spikes["relu1"].rate``. The last call's are kept.
    """
    seen: dict[str, Activity] = {}

    def note(name: str, lif: LIF, args: tuple[Any, ...], kwargs: dict[str, Any], spikes: Tensor) -> None:
        current, steps = args
        steps_of_current = 1 if kwargs.get("static") else steps
        seen[name] = Activity(
            current.detach().unflatten(0, (steps_of_current, -1)),
            spikes.detach().unflatten(0, (steps, -1)) != 0,
            lif.threshold.detach().clone(),
        )

    with watching(snn.lifs, note):
        yield seen


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], note: Callable[..., None]) -> Iterator[None]:
    """Within this context note(name, module, args, kwargs, output) is called after each call of one of `modules`."""
    hooks = [module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
