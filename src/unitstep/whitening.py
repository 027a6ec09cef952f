"""Decorrelated pixels: the first convolution, trained in coordinates in which its input is white. Knows nothing of
spikes, recipes or files.

Neighbouring pixels are nearly equal, so a few directions carry almost all of the power of an image patch x, and steps
of gradient descent that suit them are far too small for the others: edges and colours. With the patches' second
moments E[x·xᵀ] = Σᵢ λᵢ·eᵢ·eᵢᵀ and W the convolution's kernels, as a matrix, ::

    P = rows eᵢ / √(λᵢ + ε),  ε = λ̄/100          W = C·P,  W·x = C·(P·x)

P·x is nearly white, and C is what is trained. The network is the same function of its W before and after: nothing of
this is left in what is stored. Source: whitened patches before the first learned layer, Page's and Jordan's fast
training on CIFAR-10 (arXiv 2404.00498); as a change of coordinates, without a layer, ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

EPSILON = 0.01  # times the mean λ
ROWS = 64  # images at a time


class Whitened(nn.Module):
    """The parametrization W = C·P of a kernel [outputs, inputs, height, width]; moment: E[x·xᵀ], [n, n] with
    n = inputs·height·width."""

    def __init__(self, moment: Tensor) -> None:
        super().__init__()
        power, directions = torch.linalg.eigh(moment.double())
        scale = (power.clamp(min=0) + EPSILON * power.mean()).sqrt()
        self.register_buffer("P", (directions / scale).T.float())
        self.register_buffer("inverse", (directions * scale).float())

    def forward(self, C: Tensor) -> Tensor:
        return self._times(C, "P")

    def right_inverse(self, W: Tensor) -> Tensor:
        return self._times(W, "inverse")

    def _times(self, kernel: Tensor, matrix: str) -> Tensor:
        with torch.autocast(kernel.device.type, enabled=False):
            return (kernel.flatten(1) @ self.get_buffer(matrix).to(kernel.dtype)).view(kernel.shape)


def whiten_(net: nn.Module, images: Tensor, *arguments: Any, fresh: bool) -> None:
    """Train the first convolution that `net(images, *arguments)` calls in white coordinates from now on.

    images [B, C, H, W]: those that E[x·xᵀ] is taken of.  fresh: its random weights become those of C instead of W.
    ValueError if there is no convolution, it is cut into groups or larger than its images, or its kernel is another
    layer's, too.
    """
    found: list[tuple[nn.Conv2d, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not found:
            assert isinstance(layer, nn.Conv2d)
            found.append((layer, inputs[0]))

    total, number = torch.zeros(()), 0  # of x·xᵀ, of patches
    hooks = [layer.register_forward_pre_hook(note) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    try:
        for part in images.split(ROWS):
            found.clear()
            with torch.no_grad():
                net.eval()(part, *arguments)
            if what := _obstacle(net, found):
                raise ValueError(f"the network's input cannot be whitened: {what}. Set whiten to False")
            conv, x = found[0]
            patches = F.unfold(x.float(), conv.kernel_size, conv.dilation, 0, conv.stride).transpose(0, 1).flatten(1)
            total, number = total.to(patches) + patches @ patches.T, number + patches.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    white = Whitened(total / number)
    if fresh:
        conv.weight.data = white(conv.weight.data)
    parametrize.register_parametrization(conv, "weight", white)


def _obstacle(net: nn.Module, found: list[tuple[nn.Conv2d, Tensor]]) -> str:
    """Why that convolution of `net` cannot be trained so; empty if it can."""
    if not found:
        return "it has no convolution"
    conv, x = found[0]
    if conv.groups > 1:
        return "its first convolution is cut into groups"
    if any(d * (k - 1) >= n for d, k, n in zip(conv.dilation, conv.kernel_size, x.shape[2:], strict=True)):
        return "its first convolution is larger than its images"
    if sum(any(p is conv.weight for p in module.parameters(recurse=False)) for module in net.modules()) > 1:
        return "the kernel of its first convolution is another layer's, too"
    return ""


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict that `net` would have without `whiten_` and other parametrizations: with the weight W that it
    computes with, in place of what W is made of."""
    state = net.state_dict()
    for name, module in net.named_modules(remove_duplicate=False):  # a module may have several names
        if parametrize.is_parametrized(module):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.parametrizations.")}
            state[f"{name}.weight"] = module.weight.detach()
    return state
