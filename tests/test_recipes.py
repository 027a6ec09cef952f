"""Recipes: plain data that survives JSON, is checked, and can be compared."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from unitstep.recipes import RECIPES, Recipe, Stage, differences, recipe, recipe_from_dict

ISSUED = (
    "fashion-mini fashion-mnist cifar10-quick cifar10-quick-long cifar10-vgg6 cifar10-vgg16 cifar10-vgg16-conv "
    "cifar10-resnet20 cifar100-vgg16 cifar100-resnet20"
)
PAPER = "cifar10-vgg6 cifar10-vgg16 cifar10-resnet20 cifar100-vgg16 cifar100-resnet20 imagenet-vgg16"


def test_shipped_recipes():
    assert set(RECIPES) == {*ISSUED.split(), *(f"{name}-paper" for name in PAPER.split())}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_takes_the_ladder(name):
    shipped = RECIPES[name]
    assert recipe_from_dict(json.loads(json.dumps(shipped.to_dict()))) == shipped
    straight = name.startswith("cifar10-quick")
    assert [stage.steps for stage in shipped.stages] == ([None, 1] if straight else [None, 5, 4, 3, 2, 1])
    assert shipped.name == name


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-paper")])
def test_paper_recipes_use_the_papers_choices(name):
    r = RECIPES[name]
    assert (r.height, r.readout, r.percentile, r.scale, r.initial, r.calibration_steps) == (
        "unit",
        "sum",
        90,
        1,
        0,
        500,
    )
    assert r.norm in ("none", "fold")
    assert {(stage.optimizer, stage.weight_decay) for stage in r.stages[1:]} == {("adam-amsgrad", 0.0)}
    assert (r.stages[0].optimizer, r.stages[0].lr, r.stages[0].weight_decay) == ("sgd", 0.01, 5e-4)


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((0.75, 0.5, 1), r"each larger than the one before and the last of them 1, not \(0.75, 0.5, 1\)"),
        ((0.5, 0.5, 1), "each larger"),
        ((0, 1), "shares"),
        ((-0.5, 1), "shares"),
        ((float("nan"), 1), "shares"),
        ((16, 32), "shares"),
        ((0.5, 0.75), "the last of them 1"),
    ],
)
def test_sizes_grow_to_that_of_the_images(sizes, why):
    with pytest.raises(ValueError, match=why):
        Stage(None, 1, 0.1, sizes=sizes)


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no recipe named 'cifar-vgg16'; did you mean .*cifar10-vgg16"):
        recipe("cifar-vgg16")
    with pytest.raises(ValueError, match="there are: fashion-mini"):
        recipe("zzzzzz")


def test_differences_name_the_field():
    one = recipe("fashion-mini")
    other = replace(one, seed=3, stages=(replace(one.stages[0], epochs=99.0), *one.stages[1:]))
    assert differences(one, other) == [f"stages.0.epochs: {one.stages[0].epochs} → 99.0", "seed: 0 → 3"]
    assert differences(one, recipe("fashion-mini")) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("colour", 1, "unknown fields .'colour'"),
        ("seed", "one", "recipe.seed: 'one' is not"),
        ("norm", "sometimes", "recipe.norm: 'sometimes' is not"),
        ("pixel_scale", [0.0], "must be finite numbers, the scale not 0"),
        ("pixel_zero", [float("nan")], "must be finite numbers"),
        ("cutout", -1, "padding and cutout must be 0 or more pixels, not 4 and -1"),
        ("augment", "none", "cutout goes with augment flip or crop-flip, not none: set it to 0"),
        ("stages", [{"steps": 1}], "missing 2 required positional arguments"),
        ("seed", 2**70, "seed must be a number of at most 63 bits"),
        ("leaf_modules", "layer4", "leaf_modules: 'layer4' is not a list"),
        ("stages", [], "the first stage of a recipe, and no other, is the CNN"),
    ],
)
def test_wrong_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({**recipe("fashion-mini", cutout=8).to_dict(), field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps of 1 or more"),
        ({"epochs": -1}, "epochs must be 0 or more"),
        ({"epochs": float("inf")}, "epochs must be 0 or more, and finite"),
        ({"lr": -1.0}, "lr must be greater than 0"),
        ({"batch": 10, "accumulate": 3}, "cannot be cut into 3 equal parts"),
        ({"warmup": 1.0}, "shares from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, and finite, not -0.1"),
        ({"spike_penalty": float("nan")}, "spike_penalty is 0 or more"),
        ({"weight_bits": 16}, "weight_bits is 2 to 8"),
        ({"recompute": True, "spike_penalty": 1}, "recompute cannot be had with spike_penalty"),
        ({"steps": None, "spike_penalty": 1.0}, "spike_penalty is 0 or more, in spiking stages alone"),
        ({"steps": None, "distillation": 0.5}, "of a spiking stage's loss and not the CNN's"),
        ({"distillation": 1.5}, "distillation is a share from 0 to 1"),
        ({"validate_every": 0}, "validate_every must be greater than 0"),
        ({"keep": "first"}, "keep must be best or last, not 'first'"),
        ({"optimizer": "lion"}, "no optimizer named 'lion'"),
    ],
)
def test_wrong_stages_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"steps": 1, "epochs": 1, "lr": 0.1, **arguments})


def test_a_rung_of_no_epochs_is_left_out():
    whole = recipe("fashion-mini")
    cnn, first, *rungs = whole.stages
    shorter = replace(whole, stages=(cnn, replace(first, epochs=0), *rungs))
    assert shorter.stages == (cnn, *rungs)
    assert recipe_from_dict(shorter.to_dict()) == shorter


def test_wrong_ladders_are_refused():
    cnn, spiking = Stage(None, 1, 0.1), Stage(1, 1, 0.1)
    for stages, message in [
        ((spiking,), "is the CNN"),
        ((cnn, cnn), "is the CNN"),
        ((cnn, spiking, spiking), "same number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe("mine", "fashion-mini", "vgg-mini", stages)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("percentile", 0.0), ("percentile", 150.0), ("scale", 0.0), ("initial", 1.0), ("calibration_images", 0),
        ("calibration_steps", 0), ("calibration_steps", -1), ("norm", "folded"), ("thresholds", "median"),
        ("readout", "max"),
    ],
)  # fmt: skip
def test_what_calibration_would_refuse_is_refused_before_the_cnn_is_trained(field, value):
    with pytest.raises(ValueError, match=field):
        recipe("fashion-mini", **{field: value})


@pytest.mark.parametrize("module", ["unitstep", "unitstep.recipes", "unitstep.cli"])
def test_importing_is_light(module):
    heavy = "{'torch', 'numpy', 'datasets', 'pandas', 'tyro', 'rich'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
