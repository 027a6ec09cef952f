"""Training in less memory: what lies between two convolutions is computed again in the backward pass. Knows nothing of
recipes or optimisers.

A convolution costs much and its output must be kept; batch norm, neurons and pools cost little, and each keeps a tensor
as large, T·B images of it. So the network is cut where values come from a layer with weights or go to several places,
and of each piece between only the inputs are kept. Source: Chen et al., arXiv 1604.06174, by `torch.utils.checkpoint`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from unitstep.fusing import CONVOLUTIONS, module_of
from unitstep.neuron import LIF, compiled, is_compiled

COSTLY = (*CONVOLUTIONS, nn.Linear)


class Piece(nn.Module):
    """Part of a network, which is computed again when its gradient is wanted."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: Any) -> Tensor:
        fuse = is_compiled()  # another thread may compute it again, where the context is not known
        out: Tensor = checkpoint(  # it stops before the convolution at the end, whose input is what was wanted
            self.part, *given, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), self._again(fuse))
        )
        return out

    @contextlib.contextmanager
    def _again(self, fuse: bool) -> Iterator[None]:
        """Batch norms have counted these images already."""
        norms = [module for module in self.part.modules() if isinstance(module, _BatchNorm)]
        usual = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        try:
            for norm in norms:
                norm.momentum, norm.num_batches_tracked = 0.0, None
            with compiled(fuse):
                yield
        finally:
            for norm, (momentum, count) in zip(norms, usual, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count


def recomputing(snn: fx.GraphModule) -> nn.Module:
    """`snn`, with its very modules, in pieces that are computed again in the backward pass: the same values and
    gradients."""
    piece: dict[fx.Node, int] = {}
    for number, node in reversed(list(enumerate(snn.graph.nodes))):
        users = [user for user in node.users if user.op != "output"]
        cut = isinstance(module_of(snn, node), COSTLY) or len(users) != 1
        piece[node] = number if cut else piece[users[0]]
    cut_up = split_module(snn, snn, piece.__getitem__)
    for name, part in list(cut_up.named_children()):
        if any(isinstance(module, LIF) for module in part.modules()):
            cut_up.set_submodule(name, Piece(part))
    return cut_up
