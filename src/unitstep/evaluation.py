"""A network on images, in fp32: logits, and how many classes are right. Knows nothing of training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unitstep.data import Split
from unitstep.neuron import memory_format


def choose_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda means here. ValueError if it is none of them or is absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is available here (torch.cuda.is_available() is false): use --device cpu, or install a "
            "CUDA build of torch"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """Let convolutions in fp32 be in fp32 on a GPU, too, in place of TF32, whose 10 bits make other spikes than the
    exported network has."""
    cudnn: Any = torch.backends.cudnn
    before = None
    conv, rnn = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    with contextlib.suppress(RuntimeError):  # the older name of both, which is not to be read if they differ
        before = cudnn.allow_tf32
        cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before is not None:
            cudnn.allow_tf32 = before
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn


def forward(net: nn.Module, images: Tensor, steps: int | None) -> Tensor:
    """images [B, C, …] → logits [B, classes], at `steps` timesteps or, with None, as a CNN."""
    kernels = (memory_format(parameter) for parameter in net.parameters() if not is_lazy(parameter))
    last = images.dim() == 4 and torch.channels_last in kernels
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    logits: Tensor = net(images) if steps is None else net(images, steps)
    return logits


def batch_size(steps: int | None, device: torch.device) -> int:
    """Images in a batch of evaluation: on a processor so few that a layer's values stay near it."""
    return max(1, (512 if device.type == "cuda" else 128) // (steps or 1))


@ieee()
@torch.no_grad()
def accuracy(net: nn.Module, split: Split, steps: int | None, device: torch.device) -> float:
    """Percent of the images of `split` whose class has the largest logit, in fp32; steps=None calls the net as a
    CNN."""
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in split.batches(batch_size(steps, device)):
        right += (forward(net, images.to(device), steps).argmax(1) == labels.to(device)).sum()
    return 100 * right.item() / len(split)
