"""The method written from its equations: slow, plain PyTorch, time loop outermost, nothing of `unitstep` in it.

Read it to learn the method. One neuron layer has a threshold V, a leak λ and a membrane U per neuron. At every step

    U ← λ·U + I                     integrate the input current I; before the first step U is initial·V
    z = U/V − 1                     how far above the threshold, in thresholds
    s = 1 if U > V else 0           fire; on a tie there is no spike
    output = s·h                    h = 1 (height "unit") or h = V (height "threshold")
    U ← U − V·s                     soft reset, in the same step, after the spike

The step function has no useful derivative, so ds/dz = 0.3·max(0, 1 − |z|) stands in for it. The s of the reset is a
constant in the backward pass; everything else is differentiated as it is written, by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Spike(torch.autograd.Function):
    """Forward: the spikes as given. Backward: as if they were a smooth ramp with slope 0.3·max(0, 1 − |z|) at z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, spikes: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return spikes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grads[0] * 0.3 * (1 - z.abs()).clamp(min=0), None


@dataclass
class Neurons:
    """One layer of neurons, with state: call it once per step with that step's current, get that step's spikes."""

    V: Tensor
    leak: Tensor
    height: str = "unit"
    initial: float = 0.0
    membrane: Tensor | None = None
    rate: list[float] = field(default_factory=list)  # share of the neurons that fired, one number per step
    margin: float = float("inf")  # the smallest |U/V − 1| seen so far: how near rounding came to flipping a spike

    def __call__(self, current: Tensor) -> Tensor:
        u = self.initial * self.V * torch.ones_like(current) if self.membrane is None else self.membrane
        u = self.leak * u + current
        z = u / self.V - 1
        s: Tensor = _Spike.apply(z, (u > self.V).to(u.dtype))
        self.membrane = u - self.V * s.detach()
        self.rate.append(s.mean().item())
        self.margin = min([self.margin, *z.detach().abs().flatten().tolist()])
        return s * self.V if self.height == "threshold" else s


def lif(
    currents: Sequence[Tensor], V: Tensor, leak: Tensor, *, height: str = "unit", initial: float = 0.0
) -> list[Tensor]:
    """The spikes of every step, from the current of every step."""
    neurons = Neurons(V, leak, height, initial)
    return [neurons(current) for current in currents]


def margin(currents: Sequence[Tensor], V: Tensor, leak: Tensor, *, initial: float = 0.0) -> float:
    """The smallest |U/V − 1| of any neuron at any step."""
    neurons = Neurons(V, leak, "unit", initial)
    for current in currents:
        neurons(current)
    return neurons.margin


# A small net: conv → (norm) → neurons → average pool → conv → (norm) → neurons → flatten → linear → neurons → linear.
#
# `w` holds its tensors by name: conv1.weight, conv1.bias, conv2.…, linear1.…, readout.… and, if there is batch norm,
# norm1.weight, norm1.bias, norm1.running_mean, norm1.running_var, norm2.…; a bias may be missing.


def net(images: Tensor, w: Mapping[str, Tensor], neurons: Sequence[Neurons], *, steps: int, readout: str) -> Tensor:
    """Logits [B, classes], one step after the other; batch norm, if any, with its running statistics."""
    n1, n2, n3 = neurons
    total = torch.zeros((), dtype=images.dtype)
    for _ in range(steps):
        x = images  # direct encoding: the image itself is what the first convolution sees, at every step
        x = n1(_norm(_conv(x, w, "conv1"), w, "norm1"))
        x = F.avg_pool2d(x, 2)
        x = n2(_norm(_conv(x, w, "conv2"), w, "norm2"))
        x = n3(_linear(x.flatten(1), w, "linear1"))
        total = total + _linear(x, w, "readout")  # integrates without leak, never spikes
    return total / steps if readout == "mean" else total


def net_train(
    images: Tensor, w: Mapping[str, Tensor], neurons: Sequence[Neurons], *, steps: int, readout: str
) -> Tensor:
    """The same net with batch norm in training.

    Its statistics are those of all images at all steps together, so a layer needs the currents of every step before the
    first neuron behind it can be simulated: here, and only here, the loop over layers is the outer one.
    """
    n1, n2, n3 = neurons

    def each(f: Callable[[Tensor], Tensor], xs: list[Tensor]) -> list[Tensor]:
        return [f(x) for x in xs]  # in the order of the steps, since f may be neurons, which have state

    xs = [images] * steps
    xs = each(n1, _norm_train(each(lambda x: _conv(x, w, "conv1"), xs), w, "norm1"))
    xs = each(lambda x: F.avg_pool2d(x, 2), xs)
    xs = each(n2, _norm_train(each(lambda x: _conv(x, w, "conv2"), xs), w, "norm2"))
    xs = each(n3, each(lambda x: _linear(x.flatten(1), w, "linear1"), xs))
    logits = torch.stack(each(lambda x: _linear(x, w, "readout"), xs))
    return logits.mean(0) if readout == "mean" else logits.sum(0)


def _conv(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=1)


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" not in w:
        return x
    return _standardise(x, w, name, w[f"{name}.running_mean"], w[f"{name}.running_var"])


def _norm_train(xs: list[Tensor], w: Mapping[str, Tensor], name: str) -> list[Tensor]:
    if f"{name}.weight" not in w:
        return xs
    everything = torch.cat(xs)  # [T·B, C, H, W]
    mean = everything.mean((0, 2, 3))
    var = everything.var((0, 2, 3), correction=0)
    return [_standardise(x, w, name, mean, var) for x in xs]


def _standardise(x: Tensor, w: Mapping[str, Tensor], name: str, mean: Tensor, var: Tensor) -> Tensor:
    def channels(v: Tensor) -> Tensor:
        return v.reshape(1, -1, 1, 1)

    z = (x - channels(mean)) / (channels(var) + 1e-5).sqrt()
    return z * channels(w[f"{name}.weight"]) + channels(w[f"{name}.bias"])
