"""Networks of other libraries, to compare with: the same CNN with their neurons in the places of its ReLUs, in the form
that their documentation advises for speed. Knows nothing of clocks.

Their neurons are those that their tutorials begin with; untrained, Norse's hardly spike. Images are shown to the first
convolution at every timestep. SpikingJelly's and Norse's multi-step modes take all timesteps at once, so that
everything between neurons sees one batch [T·B, …]; snnTorch has no such mode, and loops over time outside. All take
images [B, C, H, W] and return logits [B, classes], the mean over time.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from unitstep.neuron import read_out

LEAK = 0.9


class MultiStep(nn.Module):
    """Another library's multi-step neurons, [T, B, …] → [T, B, …], for a batch with time folded into it."""

    def __init__(self, neurons: nn.Module, steps: int) -> None:
        super().__init__()
        self.neurons, self.steps = neurons, steps

    def forward(self, current: Tensor) -> Tensor:
        given = self.neurons(current.unflatten(0, (self.steps, -1)))
        spikes: Tensor = given[0] if isinstance(given, tuple) else given
        return spikes.flatten(0, 1)


class Folded(nn.Module):
    """A network with `MultiStep` neurons: every image at all timesteps."""

    def __init__(self, net: nn.Module, steps: int, reset: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.net, self.steps, self.reset = net, steps, reset

    def forward(self, images: Tensor) -> Tensor:
        self.reset(self.net)
        logits: Tensor = self.net(images.repeat(self.steps, 1, 1, 1))
        return read_out(logits, self.steps, "mean")


class Looped(Folded):
    """A network with single-step neurons that keep their state: one timestep after the other."""

    def forward(self, images: Tensor) -> Tensor:
        self.reset(self.net)
        return torch.stack([self.net(images) for _ in range(self.steps)]).mean(0)


def spikingjelly(cnn: nn.Module, steps: int) -> nn.Module:
    from spikingjelly.activation_based import functional, neuron

    def neurons() -> nn.Module:
        lif = neuron.LIFNode(tau=1 / (1 - LEAK), decay_input=False, v_reset=None, detach_reset=True, step_mode="m")
        return MultiStep(lif, steps)

    return Folded(_with_neurons(cnn, neurons), steps, functional.reset_net)


def snntorch(cnn: nn.Module, steps: int) -> nn.Module:
    import snntorch as library

    def reset(net: nn.Module) -> None:  # snntorch.utils.reset misses neurons inside of blocks
        for module in net.modules():
            if isinstance(module, library.Leaky):
                module.reset_mem()

    def neurons() -> nn.Module:
        lif: nn.Module = library.Leaky(beta=LEAK, init_hidden=True, reset_mechanism="subtract")
        return lif

    return Looped(_with_neurons(cnn, neurons), steps, reset)


def norse(cnn: nn.Module, steps: int) -> nn.Module:
    from norse import torch as library

    parameters = library.LIFParameters(method="super")

    def neurons() -> nn.Module:
        return MultiStep(library.LIF(p=parameters), steps)

    return Folded(_with_neurons(cnn, neurons), steps, lambda _: None)


PEERS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "SpikingJelly": spikingjelly, "snnTorch": snntorch, "Norse": norse,
}  # fmt: skip


def installed(libraries: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and version of each; ValueError, with the way out, for one that is not there."""
    for name in libraries:
        try:
            yield name, version(name)
        except PackageNotFoundError as error:
            way = "pip install -c constraints.txt -e '.[bench]', then the same with --no-deps spikingjelly norse"
            raise ValueError(f"{name} takes part but is not installed: {way}") from error


def _with_neurons(cnn: nn.Module, neurons: Callable[[], nn.Module]) -> nn.Module:
    """A copy of `cnn` with new neurons for each ReLU module."""
    net: Any = copy.deepcopy(cnn)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, neurons())
    return net  # type: ignore[no-any-return]
