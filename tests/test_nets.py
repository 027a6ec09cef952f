"""The shipped networks: their sizes are the paper's, and they are ordinary."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unitstep import nets
from unitstep.recipes import RECIPES


@pytest.mark.parametrize(
    ("name", "size", "classes", "macs"),
    [
        ("vgg6", 32, 10, 108_765_184),
        ("vgg16", 32, 10, 338_403_328),
        ("resnet20", 32, 10, 215_699_456),
        ("vgg16-imagenet", 224, 1000, 15_470_264_320),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_multiply_accumulates_are_those_of_the_paper(name, size, classes, macs, batch_norm):
    with torch.device("meta"):
        net = nets.build(name, classes=classes, size=size, batch_norm=batch_norm)
    with FlopCounterMode(display=False) as counter:
        net.to("meta")(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("name", ["vgg-mini", "vgg-quick", "resnet20"])
def test_uint8_images_in_logits_out(name, pool):
    net = nets.build(name, classes=7, channels=1, size=28, pool=pool, dropout=0.1)
    assert net(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape == (3, 7)


def test_no_convolution_or_linear_layer_has_a_bias():
    net = nets.build("vgg6", classes=10)
    assert [name for name, _ in net.named_parameters() if name.endswith("bias") and "norm" not in name] == []


def test_normalize_is_integer_zero_point_and_scale():
    images = torch.tensor([0, 121, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert nets.Normalize((121,), (1 / 64,))(images).flatten().tolist() == [-121 / 64, 0, 134 / 64]
    assert nets.Normalize((0, 100, 200), (1, 0.5, 0.25))(images).flatten().tolist() == [0, 10.5, 13.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg17"}, "no network named 'vgg17'; there are: vgg-mini"),
        ({"name": "vgg16", "size": 8}, "too small for this network"),
        ({"name": "vgg6", "pool": "median"}, 'pool must be "avg" or "max"'),
        ({"name": "vgg6", "zero_point": (1, 2)}, "one for each of 3 channels"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        nets.build(**{"classes": 10, **arguments})


def test_every_recipe_names_a_network():
    assert {recipe.net for recipe in RECIPES.values()} <= {*nets.PLANS, "resnet20"}
