"""A computation on a GPU that is recorded once and replayed from then on. Knows nothing of networks or training.

A step of training launches a few hundred kernels, many of which run for microseconds, which launching them from Python
can take, too. A CUDA graph holds all of them and is launched at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls that are only computed: what is made at first, kernels and optimiser state, is not to be recorded


class Replayed:
    """`compute(*inputs)`, tensors on a GPU of the same shapes at every call → a tensor. It must do the same at every
    call but for what its inputs, and the tensors that it reads and writes in place, hold; random numbers are drawn
    anew.

    Raises ValueError, at the call that records, if that is impossible, as `compute` waits for the device. Torch's
    random numbers on the GPU are then of no more use in this process.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute, self.calls = compute, 0
        self.stream = torch.cuda.Stream()  # recording is not possible on the usual one
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._record(inputs)
        if self.graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.compute(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.out.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.out = self.compute(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the training steps cannot be recorded for the GPU ({error}): the same command with --compile off "
                "trains without that"
            ) from error
        self.graph = graph
