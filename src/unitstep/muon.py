"""AdamW in which the kernels of convolutions in front of batch norms take orthogonalised steps. Knows nothing of spikes
or recipes.

A gradient of a kernel W, as a matrix of one row per output channel, has a few large singular values and many small
ones; AdamW's steps do, too. Here all directions that the momentum M has are followed alike::

    M ← β·M + G,   U = G + β·M,   β = 0.9
    W ← √rows·W/‖W‖ − η·orth(U),   orth(U) = P·Qᵀ for U = P·Σ·Qᵀ

‖W‖ means nothing in front of a batch norm, but η is relative to it, so it is set. Source: Muon, K. Jordan et al.,
https://kellerjordan.github.io/posts/muon; the norm of W as in their https://github.com/KellerJordan/cifar10-airbench.
"""

import math

import torch
from torch import Tensor

MOMENTUM = 0.9
QUINTIC = (3.4445, -4.7750, 2.0315)  # x ← a·x + b·x³ + c·x⁵ brings 0.01 to 1 near 1 in five rounds
ROUNDS = 5


def orthogonalised(U: Tensor) -> Tensor:
    """U [rows, columns] → about P·Qᵀ: its singular values become 0.7 to 1.2, but for those under a hundredth
    of ‖U‖.

    A Newton-Schulz iteration, X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X from X = U/‖U‖. All X are S·U/‖U‖ with symmetric S
    that commute with X·Xᵀ, so that only these, of the shorter side, are multiplied in each round.
    """
    X = U / U.norm().clamp(min=1e-12)  # what is left once gradients are 0 fades: its squares are 0 some time
    if X.shape[0] > X.shape[1]:
        return orthogonalised(U.T).T
    a, b, c = QUINTIC
    gram = X @ X.T
    S = one = torch.eye(len(X), dtype=X.dtype, device=X.device)
    for _ in range(ROUNDS):
        factor = a * one + b * gram + c * (gram @ gram)
        S, gram = factor @ S, factor @ gram @ factor
    result: Tensor = S @ X
    return result


class Muon(torch.optim.AdamW):
    """`torch.optim.AdamW`, but for parameters in groups with "orthogonal": True, [rows, …], whose steps are those of
    this module's docstring, of η = the group's "lr"; its weight decay does not act on them."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of all parameters that have gradients."""
        kernels = [
            (kernel, group["lr"], kernel.grad)
            for group in self.param_groups
            if group.get("orthogonal")
            for kernel in group["params"]
            if kernel.grad is not None
        ]
        for kernel, _, _ in kernels:
            kernel.grad = None  # AdamW passes over it
        super().step()
        for kernel, rate, gradient in kernels:
            state = self.state[kernel]
            if not state:
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(kernel)}  # AdamW looks for "step"
            momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
            direction = orthogonalised((gradient + MOMENTUM * momentum).flatten(1)).view_as(kernel)
            kernel.mul_(math.sqrt(len(kernel)) / kernel.norm().clamp(min=1e-30)).sub_(rate * direction)
            kernel.grad = gradient
