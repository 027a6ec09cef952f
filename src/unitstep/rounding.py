"""Weights in few bits: W ≈ a·q with whole q and one a for each row, which is an output channel. Knows nothing of
spikes, recipes or files.

    a = max|W| / (2^(bits−1) − 1),    q = round(W / a)

A row's factor, such as a batch norm's, changes a and not q. So weights that are rounded in training, with gradients
passed on as if they were not, are those of the integer network that is exported.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # rows of a transposed convolution are inputs, and it is never in integers
ON_GRID = 1e-3  # units: weights that are whole numbers up to the rounding of folded batch norms and heights


def rounded(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """W [O, …] → (q, of W's shape and dtype, and a [O, 1, …]): whole numbers and their unit, 1 in a row of zeros.

    bits: 2 to 8."""
    unit = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / (2 ** (bits - 1) - 1)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    return (weight / unit).round(), unit


def on_grid(weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """`rounded`, and whether that changes nothing: in the fewest bits with which it does not, else in 8."""
    for fewer in range(2, 9):
        q, unit = rounded(weight, fewer)
        if bool(((q * unit - weight).abs() <= ON_GRID * unit).all()):
            return q, unit, True
    return q, unit, False


class Rounded(nn.Module):
    """The parametrization W → a·q of a weight [O, …], with gradients passed straight through."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        q, unit = rounded(weight.detach(), self.bits)
        return q * unit + (weight - weight.detach())  # exactly 0, which hands the gradient straight through

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def round_weights_(net: nn.Module, bits: int) -> None:
    """Let every layer of `net` that is one of `LAYERS` compute with rounded weights from now on, in training too."""
    for module in net.modules():
        if isinstance(module, LAYERS):
            parametrize.register_parametrization(module, "weight", Rounded(bits))
