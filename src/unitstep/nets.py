"""Ordinary convolutional networks with `nn.ReLU`: what the recipes train first. Nothing here spikes or knows of
timesteps.

The networks are those of the paper (VGG6, VGG16, ResNet20) and a small VGG for CPUs. Convolutions and linear layers
have no bias: a batch norm has its own, and without one the thresholds take over its part. Every network takes raw
uint8 images; its first module is `Normalize`.
"""

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Plan = Sequence[int | Literal["P"]]  # output channels of each 3×3 convolution; "P" halves the image

_VGG16: Plan = (64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512, "P", 512, 512, 512)
PLANS: dict[str, tuple[Plan, tuple[int, ...]]] = {  # convolutions, widths of the hidden linear layers
    "vgg-mini": ((16, "P", 32, 32, "P", 64, "P"), ()),
    "vgg-small": ((32, "P", 64, 64, "P", 128, 128, "P", 256, 256, "P"), ()),
    "vgg-quick": ((64, "P", 128, 128, "P", 256, 256, 256, "P", 256, "P"), ()),
    "vgg6": ((64, "P", 128, 128, "P"), (4096, 4096)),
    "vgg16-conv": ((*_VGG16, "P"), ()),
    "vgg16": (_VGG16, (4096, 4096)),
    "vgg16-imagenet": ((*_VGG16, "P"), (4096, 4096)),
}


class Normalize(nn.Module):
    """Pixels [B, C, H, W], uint8 or float in 0…255, → (pixel − zero_point)·scale in the dtype of `scale`, per channel
    or with one value for all."""

    def __init__(self, zero_point: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        zero_point, scale = self.get_buffer("zero_point"), self.get_buffer("scale")
        return (images.to(scale.dtype) - zero_point) * scale


def build(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    size: int = 32,
    batch_norm: bool = True,
    pool: str = "avg",
    dropout: float = 0.0,
    zero_point: Sequence[float] = (121,),
    scale: Sequence[float] = (1 / 64,),
) -> nn.Module:
    """The network `name` (a key of `PLANS`, or "resnet20") for images [B, channels, size, size] → logits [B, classes].
    ValueError if it is unknown."""
    if name not in PLANS and name != "resnet20":
        raise ValueError(f"no network named {name!r}; there are: {', '.join([*PLANS, 'resnet20'])}")
    if len(zero_point) not in (1, channels) or len(scale) not in (1, channels):
        raise ValueError(
            f"zero_point and scale need 1 value or one for each of {channels} channels, not {len(zero_point)} and "
            f"{len(scale)}"
        )
    normalize = Normalize(zero_point, scale)
    net = (
        _ResNet20(normalize, classes, channels, size, batch_norm, pool, dropout)
        if name == "resnet20"
        else _vgg(normalize, *PLANS[name], classes, channels, size, batch_norm, pool, dropout)
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


def imported(place: str) -> nn.Module:
    """The network that "package.module:function" names, made by calling the function. ValueError if there is none."""
    module, _, function = place.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"the network {place!r} cannot be made: {type(error).__name__}: {error}. It means function {function!r}, "
            f"called without arguments, of module {module!r}, which must be importable from here (current folder or "
            "PYTHONPATH)"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{place!r} gave a {type(made).__name__}, not a torch.nn.Module")
    return made


def _pool(kind: str, size: int | None = None) -> nn.Module:
    """Of 2×2 pixels; or of as many as make `size`×`size` of the image, whatever its size."""
    if kind not in ("avg", "max"):
        raise ValueError(f'pool must be "avg" or "max", not {kind!r}')
    if size is not None:
        return nn.AdaptiveAvgPool2d(size) if kind == "avg" else nn.AdaptiveMaxPool2d(size)
    return nn.AvgPool2d(2) if kind == "avg" else nn.MaxPool2d(2)


def _conv(inputs: int, outputs: int, batch_norm: bool, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)] if batch_norm else [conv]


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def _vgg(
    normalize: Normalize,
    plan: Plan,
    hidden: Sequence[int],
    classes: int,
    channels: int,
    size: int,
    batch_norm: bool,
    pool: str,
    dropout: float,
) -> nn.Sequential:
    """conv-ReLU groups with a pool, or dropout, after each ReLU; then linear-ReLU-dropout; then the readout. A pool in
    front of these gives maps of the same size for smaller images, too, if it halves an even number of pixels."""
    layers: dict[str, nn.Module] = {"normalize": normalize}
    number = 0
    for width, after in zip(plan, [*plan[1:], None], strict=True):
        if width == "P":
            last = after is None and size > 1 and size % 2 == 0
            size //= 2
            layers[f"pool{number}"] = _pool(pool, size if last else None)
            continue
        number += 1
        for kind, module in zip(("conv", "norm"), _conv(channels, width, batch_norm), strict=False):
            layers[f"{kind}{number}"] = module
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if dropout and after != "P":
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        channels = width
    if size < 1:
        raise ValueError(
            "the images are too small for this network, whose every pool halves them: use larger images (--size) or "
            "a network with fewer pools (--net)"
        )
    layers["flatten"] = nn.Flatten()
    features = channels * size * size
    for width in hidden:
        number += 1
        layers[f"linear{number}"] = nn.Linear(features, width, bias=False)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        features = width
    layers["readout"] = nn.Linear(features, classes, bias=False)
    return nn.Sequential(OrderedDict(layers))


class _Block(nn.Module):
    """ReLU(conv-ReLU-conv + shortcut); the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv(inputs, outputs, batch_norm, stride),
            nn.ReLU(inplace=True),
            *_dropout(dropout),
            *_conv(outputs, outputs, batch_norm),
        )
        self.shortcut = (
            nn.Sequential(*_conv(inputs, outputs, batch_norm, stride, 1))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


class _ResNet20(nn.Module):
    """Three 3×3 convolutions, a pool, four stages of two blocks (64, 128, 256, 512 channels; strides 1, 2, 2, 2), the
    readout."""

    def __init__(
        self, normalize: Normalize, classes: int, channels: int, size: int, batch_norm: bool, pool: str, dropout: float
    ) -> None:
        super().__init__()
        self.normalize = normalize
        stem: list[nn.Module] = []
        for inputs in (channels, 64, 64):
            stem += [*_conv(inputs, 64, batch_norm), nn.ReLU(inplace=True), *_dropout(dropout)]
        self.stem = nn.Sequential(*stem, _pool(pool))
        shapes = [(64, 64, 1), (64, 64, 1)]  # input channels, output channels, stride
        for width in (128, 256, 512):
            shapes += [(width // 2, width, 2), (width, width, 1)]
        self.blocks = nn.Sequential(*[_Block(*shape, batch_norm, dropout) for shape in shapes])
        side = -(-(size // 2) // 8)  # the pool halves, three stages halve and round up
        if size < 2:
            raise ValueError("the images are too small for resnet20; use images of at least 2×2 pixels (--size)")
        self.readout = nn.Linear(512 * side * side, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.readout(torch.flatten(self.blocks(self.stem(self.normalize(images))), 1))
        return logits
