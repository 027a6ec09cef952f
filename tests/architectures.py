"""Small networks written the way torchvision and timm write them: what conversion meets in practice. Nothing of
`unitstep` in it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5
AVERAGE = partial(nn.AvgPool2d, kernel_size=2)  # in place of a max pool
MAXIMUM = partial(nn.MaxPool2d, kernel_size=2, stride=2)


class VGG(nn.Module):
    def __init__(self, pool: Callable[[], nn.Module], batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for v in (6, "M", 8, 8, "M"):
            if v == "M":
                layers += [pool()]
            else:
                conv2d = nn.Conv2d(channels, v, kernel_size=3, padding=1)
                layers += [conv2d, nn.BatchNorm2d(v), nn.ReLU(inplace=True)] if batch_norm else [conv2d, nn.ReLU(True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(8 * 2 * 2, 16),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(16, 16),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def conv3x3(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(i: int, o: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inplanes, planes, stride), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1x1(inplanes, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes, stride, groups=2), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv1x1(planes, planes * self.expansion), nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, ...], pool: nn.Module) -> None:
        super().__init__()
        self.inplanes = 4
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool
        self.layer1 = self._make_layer(block, 4, layers[0])
        self.layer2 = self._make_layer(block, 8, layers[1], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * block.expansion, CLASSES)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int = 1
    ) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        layers += [block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class ConvBNReLU(nn.Sequential):
    def __init__(self, i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(i, o, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU(inp, hidden, kernel=1))
        layers += [
            ConvBNReLU(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        settings = ((4, 1, 1), (6, 2, 2), (6, 1, 2), (8, 2, 3))  # channels, stride, expansion
        features: list[nn.Module] = [ConvBNReLU(3, 4, stride=2)]
        channels = 4
        for c, s, t in settings:
            features.append(InvertedResidual(channels, c, s, t))
            channels = c
        features.append(ConvBNReLU(channels, 16, kernel=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        return self.classifier(x)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, kernel_size=1, stride=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, kernel_size=3, stride=1, padding=1, bias=False)
        self.drop_rate = 0.1

    def forward(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _name, layer in self.items():
            new_features = layer(features)
            features.append(new_features)
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 6, kernel_size=3, stride=2, padding=1, bias=False))
        self.features.add_module("denseblock1", DenseBlock(2, 6, 3))
        transition = nn.Sequential()
        transition.add_module("norm", nn.BatchNorm2d(12))
        transition.add_module("relu", nn.ReLU(inplace=True))
        transition.add_module("conv", nn.Conv2d(12, 6, kernel_size=1, stride=1, bias=False))
        transition.add_module("pool", nn.AvgPool2d(kernel_size=2, stride=2))
        self.features.add_module("transition1", transition)
        self.features.add_module("denseblock2", DenseBlock(2, 6, 3))
        self.features.add_module("norm5", nn.BatchNorm2d(12))
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups

    # reshape
    x = x.view(batchsize, groups, channels_per_group, height, width)

    x = torch.transpose(x, 1, 2).contiguous()

    # flatten
    x = x.view(batchsize, num_channels, height, width)

    return x


class ShuffleUnit(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        b = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, b, 1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else b, b, 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(inplace=True),
            nn.Conv2d(b, b, 3, stride, 1, groups=b, bias=False),
            nn.BatchNorm2d(b),
            nn.Conv2d(b, b, 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        out = channel_shuffle(out, 2)
        return out


class ShuffleNetV2(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.maxpool = pool
        self.stage2 = nn.Sequential(ShuffleUnit(6, 8, 2), ShuffleUnit(8, 8, 1))
        self.conv5 = nn.Sequential(nn.Conv2d(8, 12, 1, 1, 0, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x)
        x = self.stage2(x)
        x = self.conv5(x)
        x = x.mean([2, 3])  # globalpool
        x = self.fc(x)
        return x


class Fire(nn.Module):
    def __init__(self, inplanes: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    def __init__(self, pool: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=3, stride=2), nn.ReLU(inplace=True), pool(), Fire(6, 3, 4), Fire(8, 4, 4)
        )
        final_conv = nn.Conv2d(8, CLASSES, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


class BasicConv2d(nn.Module):
    def __init__(self, i: int, o: int, **options: int | tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, bias=False, **options)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class InceptionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 3, kernel_size=1)
        self.branch7_1 = BasicConv2d(channels, 3, kernel_size=1)
        self.branch7_2 = BasicConv2d(3, 3, kernel_size=(1, 5), padding=(0, 2))
        self.branch7_3 = BasicConv2d(3, 4, kernel_size=(5, 1), padding=(2, 0))
        self.branch_pool = BasicConv2d(channels, 3, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1x1 = self.branch1x1(x)
        branch7 = self.branch7_3(self.branch7_2(self.branch7_1(x)))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return [branch1x1, branch7, branch_pool]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 6, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList([InceptionBlock(6), InceptionBlock(10)])
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.unsqueeze(x[:, i], 1) * (0.5 + 0.1 * i) - 0.1 for i in range(3)], 1)  # transform_input
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, 1)
        x = x.view(x.size(0), -1)
        return self.fc(x)


class BatchFromImage(nn.Module):
    """Reads the number of images off the input, and needs it where there are spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)])
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        for conv in self.convs:
            x = F.avg_pool2d(conv(x).relu(), 2)
        return self.head(x.view(n, -1))


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    return x * random_tensor.div_(keep_prob)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class StochasticDepthNet(nn.Module):
    """timm's shape: forward_features and forward_head, blocks with a shortcut and a drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.convs = nn.ModuleList([conv3x3(6, 6) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(3)])
        self.drop_paths = nn.ModuleList([DropPath(0.1 * i) if i else nn.Identity() for i in range(3)])
        self.act = nn.ReLU(inplace=True)
        self.head_drop, self.head = nn.Dropout(0.1), nn.Linear(6, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for conv, norm, path in zip(self.convs, self.norms, self.drop_paths, strict=True):
            shortcut = x
            x = norm(conv(x))
            x = path(x)
            x += shortcut
            x = self.act(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean((-2, -1)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Signal(nn.Module):
    """1-D, as for audio or an electrocardiogram."""

    def __init__(self, pool: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 6, 7, stride=2, padding=3, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True), pool(),
            nn.Conv1d(6, 8, 3, padding=2, dilation=2), nn.BatchNorm1d(8), nn.ReLU(inplace=True), pool(),
        )  # fmt: skip
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        return self.fc(F.adaptive_avg_pool1d(x, 1).squeeze(-1))


class Convolutions(nn.Module):
    """Transposed, dilated, grouped: an encoder, a decoder with a skip connection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.down2 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AvgPool2d(2)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False), nn.BatchNorm2d(6))
        self.last = nn.Conv2d(12, 6, 3, groups=3, padding=1, padding_mode="reflect")
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu_(self.down1(x))
        y = torch.relu(self.down2(skip))
        y = self.up(self.pool(y)).relu_()
        y = torch.clamp(self.last(torch.cat((skip, y), dim=1)), min=0)
        return self.fc(torch.mean(y, dim=(2, 3)))


IMAGE, SIGNAL = (3, 16, 16), (2, 32)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vgg": (lambda: VGG(MAXIMUM, batch_norm=False), IMAGE),
    "vgg_bn-average": (lambda: VGG(AVERAGE, batch_norm=True), IMAGE),
    "resnet-basic": (lambda: ResNet(BasicBlock, (1, 2), nn.MaxPool2d(3, 2, 1)), IMAGE),
    "resnet-basic-average": (lambda: ResNet(BasicBlock, (1, 1), nn.AvgPool2d(3, 2, 1)), IMAGE),
    "resnet-bottleneck": (lambda: ResNet(Bottleneck, (1, 1), nn.Identity()), IMAGE),
    "mobilenet_v2": (MobileNetV2, IMAGE),
    "densenet": (DenseNet, IMAGE),
    "shufflenet_v2": (lambda: ShuffleNetV2(nn.MaxPool2d(3, 2, 1)), IMAGE),
    "shufflenet_v2-average": (lambda: ShuffleNetV2(nn.AvgPool2d(2)), IMAGE),
    "squeezenet": (lambda: SqueezeNet(partial(nn.MaxPool2d, 3, 2, ceil_mode=True)), IMAGE),
    "squeezenet-average": (lambda: SqueezeNet(partial(nn.AvgPool2d, 3, 2, ceil_mode=True)), IMAGE),
    "inception": (Inception, IMAGE),
    "batch-from-image": (BatchFromImage, IMAGE),
    "stochastic-depth": (StochasticDepthNet, IMAGE),
    "signal": (lambda: Signal(partial(nn.MaxPool1d, 2)), SIGNAL),
    "signal-average": (lambda: Signal(partial(nn.AvgPool1d, 2)), SIGNAL),
    "convolutions": (Convolutions, IMAGE),
}


def has_max_pool(net: nn.Module) -> bool:
    return any(isinstance(module, nn.MaxPool1d | nn.MaxPool2d) for module in net.modules())


def randomise_(net: nn.Module, seed: int = 0) -> nn.Module:
    """In place: weights that pass a signal on through all layers, and batch norms as after some training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor | None, low: float, high: float) -> None:
        if x is not None:
            x.copy_(torch.rand(x.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.1, 0.3)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                uniform(module.bias, -0.1, 0.2)
    return net


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in fp64 and in evaluation mode, and three images for it."""
    factory, shape = ARCHITECTURES[name]
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return randomise_(factory(), seed).double().eval(), images
