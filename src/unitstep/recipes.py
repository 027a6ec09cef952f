"""What an experiment is, as plain data, and the experiments that come with the library. Knows nothing of torch, files
or devices.

A recipe's steps of randomness, choices and costs are all in its fields: the same recipe on the same machine gives the
same run. The recipes whose names end in "-paper" follow arXiv 2110.05929 as far as it is known; the others are sized
for less hardware.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

Optimizer = Literal["sgd", "nesterov", "adamw", "adam-amsgrad", "muon"]
Thresholds = Literal["percentile", "channel-percentile", "max", "mse"]
STRATEGIES: tuple[str, ...] = get_args(Thresholds)
Augment = Literal["none", "flip", "crop-flip", "resized-crop-flip"]


@dataclass(frozen=True)
class Stage:
    """One rung of the ladder: how the network is trained at one number of timesteps, starting from the rung above."""

    steps: int | None
    """Number of timesteps T; None trains the CNN itself."""
    epochs: float
    """Passes over the training images; fractions are allowed, at least one optimiser step is made. 0: the CNN's
    weights are given; another stage is left out of the ladder."""
    lr: float
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """sgd and nesterov have momentum 0.9; adam-amsgrad is the paper's for spiking stages; muon, for spiking stages, is
    adamw but for convolutions in front of batch norms, whose steps are orthogonalised."""
    weight_decay: float = 0.0
    """Decay of weight matrices and kernels (not of thresholds, leaks, biases and batch norms)."""
    batch: int = 128
    """Images per optimiser step."""
    sizes: tuple[float, ...] = ()
    """Heights and widths of the training images, as shares of the recipe's `size` that end with 1, such as 0.5, 0.75,
    1: each for an equal part of the stage, which takes less time so. Empty: full size throughout, as for a network that
    does not take all of them, of which training warns."""
    accumulate: int = 1
    """Parts that a batch is cut into, to save memory; their gradients are summed."""
    warmup: float = 0.0
    """Share of the stage, 0 to 1, over which lr rises linearly from 0."""
    milestones: tuple[float, ...] = ()
    """Shares of the stage, 0 to 1, at which lr is divided by `factor`; none: lr falls linearly to 0."""
    factor: float = 5.0
    """What lr is divided by at a milestone."""
    label_smoothing: float = 0.0
    """Share of the target, 0 to 1, that is spread over all classes."""
    vector_lr: float = 1.0
    """What `lr` is multiplied by for what is no matrix or kernel: batch norms, biases, thresholds, leaks."""
    distillation: float = 0.0
    """Share of the loss, 0 to 1, that asks a spiking stage for the outputs of the ladder's CNN in place of labels."""
    spike_penalty: float = 0.0
    """What one spike per neuron and image adds to a spiking stage's loss: fewer spikes for some accuracy."""
    weight_bits: int | None = None
    """Bits, 2 to 8, that weights are rounded to, with a scale per output channel, while the stage is trained: what is
    exported in integers is then the network that was trained. None: they are not rounded."""

    keep: Literal["best", "last"] = "best"
    """Which epoch's weights the stage ends with: the best on the validation images, or the last."""
    validate_every: int = 1
    """Epochs from one validation to the next, which on a processor takes some 4 % of an epoch; after the last there
    always is one."""
    recompute: bool = False
    """Compute batch norms, neurons and pools of a spiking stage again in the backward pass instead of keeping
    their outputs: less memory at five timesteps, for 2 to 15 % of the speed. Of no use in the CNN. On a GPU, steps
    are then not recorded and replayed."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a stage needs steps of 1 or more (or None for the CNN), not {self.steps}")
        if not 0 <= self.epochs < 1e9:
            raise ValueError(f"a stage's epochs must be 0 or more, and finite (below 1e9), not {self.epochs}")
        for field in ("lr", "vector_lr", "batch", "accumulate", "factor", "validate_every"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"a stage's {field} must be greater than 0, and finite, not {getattr(self, field)}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} images cannot be cut into {self.accumulate} equal parts (accumulate)"
            )
        if [*self.sizes] != sorted({*self.sizes}) or (self.sizes and not 0 < self.sizes[0] <= self.sizes[-1] == 1):
            raise ValueError(
                "a stage's sizes are shares of the size of the images, each larger than the one before and the last of "
                f"them 1, not {self.sizes}"
            )
        for share in (self.warmup, self.label_smoothing, *self.milestones):
            if not 0 <= share < 1:
                raise ValueError(f"warmup, label_smoothing and milestones are shares from 0 to 1, not {share}")
        if not 0 <= self.distillation <= (0 if self.steps is None else 1):
            raise ValueError(
                f"distillation is a share from 0 to 1, of a spiking stage's loss and not the CNN's; it is "
                f"{self.distillation} in stage {self.name}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"a stage's weight_decay must be 0 or more, and finite, not {self.weight_decay}")
        if not 0 <= self.spike_penalty < math.inf or (self.steps is None and self.spike_penalty):
            raise ValueError(
                f"spike_penalty is 0 or more, in spiking stages alone; it is {self.spike_penalty} in stage {self.name}"
            )
        if self.recompute and self.spike_penalty:
            raise ValueError("recompute cannot be had with spike_penalty, which looks at the spikes: leave one out")
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits is 2 to 8, or None, not {self.weight_bits}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be best or last, not {self.keep!r}")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"no optimizer named {self.optimizer!r}; there are: {', '.join(get_args(Optimizer))}")
        if self.optimizer == "muon" and self.steps is None:
            raise ValueError("the optimizer muon is for spiking stages; for a CNN: nesterov")

    @property
    def name(self) -> str:
        """ "cnn", "t5", "t4", …: as in the run folder's file names."""
        return "cnn" if self.steps is None else f"t{self.steps}"


@dataclass(frozen=True)
class Recipe:
    """All of an experiment: images, network, conversion, and the ladder of stages from the CNN down to one timestep."""

    name: str
    """Name of the recipe that this one is or started from."""
    data: str
    """Images: a folder of class folders, a folder of parquet files, a Hugging Face hub name, or fashion-mini, which is
    built in."""
    net: str
    """Network: vgg-mini, vgg-small, vgg-quick, vgg6, vgg16, vgg16-conv, vgg16-imagenet, resnet20, or your own
    as package.module:function, which is called without arguments and returns it."""
    stages: tuple[Stage, ...]
    """The ladder, in order; the first stage is the CNN."""
    size: int = 32
    """Height and width of the network's input, in pixels; other images are resized."""
    channels: int = 3
    """3 for colour, 1 for grey; other images are converted."""
    augment: Augment = "crop-flip"
    """Random changes of training images: crop after padding, crop of random size and shape (images are then
    streamed), flip."""
    padding: int = 4
    """Pixels added on each side before such a crop; fewer suit a short training."""
    border: Literal["mean", "mirror"] = "mean"
    """What those pixels are: the mean pixel, or the image mirrored at its outermost pixels."""
    cutout: int = 0
    """Side, in pixels, of a square at a random place of each training image that is painted over with the mean pixel;
    0: none."""
    pixel_zero: tuple[float, ...] = (121.0,)
    """Pixel value, 0 to 255, that becomes 0: one for all channels or one each."""
    pixel_scale: tuple[float, ...] = (1 / 64,)
    """What pixel values are multiplied by after that: one for all channels or one each."""
    whiten: bool = False
    """Train the first convolution in coordinates in which its input, patches of the images, is decorrelated."""
    norm: Literal["none", "fold", "keep"] = "keep"
    """Batch norm: none in the CNN; folded into the weights at conversion where that is exact; or kept through the
    ladder, acting on all timesteps at once."""
    pool: Literal["avg", "max"] = "avg"
    """Pooling over 2×2 pixels."""
    max_pool: Literal["keep", "average"] = "keep"
    """Max pools are kept at conversion, or become average pools, which changes the function."""
    approximate: bool = False
    """Put neurons in the places of LeakyReLU, SiLU, GELU, Hardswish and PReLU too, though they are not ReLUs."""
    leaf_modules: tuple[str, ...] = ()
    """Names of modules that conversion keeps whole."""
    dropout: float = 0.0
    """Dropout probability; a spiking network uses one mask for all timesteps."""
    height: Literal["unit", "threshold"] = "threshold"
    """What a spike is worth downstream: 1 (the paper's) or its layer's threshold."""
    readout: Literal["sum", "mean"] = "mean"
    """How the last layer's output is combined over timesteps: sum (the paper's) or mean."""
    initial: float = 0.0
    """Membrane before the first timestep, in thresholds."""
    thresholds: Thresholds = "percentile"
    """How thresholds are found at conversion: a percentile of the layer's input current, over all channels or of each
    alone; its maximum; or what gives the response nearest to ReLU."""
    percentile: float = 90.0
    """That percentile, above 1 and at most 100."""
    scale: float = 1.0
    """What thresholds so found are multiplied by."""
    calibration_steps: int | None = None
    """Timesteps over which these currents are taken (the paper's: 500); None: those of the first spiking stage."""
    calibration_images: int = 512
    """Augmented training images on which these currents are taken, and, where there are such, the statistics of batch
    norms as a spiking stage begins and those that `whiten` needs."""
    seed: int = 0
    """Seed of all randomness: initial weights, order and augmentation of images, dropout."""

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].steps is not None or any(stage.steps is None for stage in self.stages[1:]):
            raise ValueError("the first stage of a recipe, and no other, is the CNN (steps None)")
        rungs = tuple(stage for stage in self.stages[1:] if stage.epochs)
        object.__setattr__(self, "stages", (self.stages[0], *rungs))
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same number of steps; every rung of the ladder needs its own")
        if self.heights_per_channel and any(stage.weight_bits for stage in self.stages):
            raise ValueError(
                "weights cannot be rounded as they are exported (weight_bits) where spikes of each channel have a "
                "height of their own: choose other thresholds than channel-percentile, or the height unit"
            )
        if self.size < 1 or self.channels not in (1, 3):
            raise ValueError(f"size must be at least 1 pixel and channels 1 or 3, not {self.size} and {self.channels}")
        if self.padding < 0 or self.cutout < 0:
            raise ValueError(f"padding and cutout must be 0 or more pixels, not {self.padding} and {self.cutout}")
        if self.cutout and self.augment in ("none", "resized-crop-flip"):
            raise ValueError(f"cutout goes with augment flip or crop-flip, not {self.augment}: set it to 0")
        if abs(self.seed) >= 2**63:
            raise ValueError(f"seed must be a number of at most 63 bits, not {self.seed}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to 1, not {self.dropout}")
        for name, kind in get_type_hints(Recipe).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        # what calibration would refuse, but after the CNN has been trained
        check_percentile(self.percentile)
        if not all(map(math.isfinite, (*self.pixel_zero, *self.pixel_scale))) or 0 in self.pixel_scale:
            raise ValueError(
                f"pixel_zero and pixel_scale must be finite numbers, the scale not 0, not {self.pixel_zero} and "
                f"{self.pixel_scale}"
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be greater than 0, not {self.scale}")
        if not 0 <= self.initial < 1:
            raise ValueError(f"initial must be from 0 to 1, as a fraction of the threshold, not {self.initial}")
        if self.calibration_images < 1 or (self.calibration_steps is not None and self.calibration_steps < 1):
            raise ValueError("calibration_images and calibration_steps must be 1 or more")

    @property
    def heights_per_channel(self) -> bool:
        """Whether a spike of each channel is worth something of its own."""
        return (self.thresholds, self.height) == ("channel-percentile", "threshold")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


def check_percentile(percentile: float) -> None:
    """ValueError if it is not above 1 and at most 100: 0.99 is meant as 99."""
    if not 1 < percentile <= 100:
        raise ValueError(f"percentile must be above 1 and at most 100, not {percentile}; the 99th is 99, not 0.99")


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`. ValueError if a field is unknown, missing or of the wrong type."""
    return _build(Recipe, values)  # type: ignore[no-any-return]


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """One line per field in which two recipes differ: "stages.1.epochs: 2.0 → 3.0"."""
    a, b = _flat(ours.to_dict()), _flat(theirs.to_dict())
    return [f"{key}: {a.get(key, 'absent')} → {b.get(key, 'absent')}" for key in {**a, **b} if a.get(key) != b.get(key)]


def without_folder(recipe: Recipe) -> Recipe:
    """For files that go to others: the data set by its name, not by the folder where it lies here."""
    return replace(recipe, data=PurePath(recipe.data).name)


def recipe(name: str, **changes: Any) -> Recipe:
    """The shipped recipe `name`, with fields changed. ValueError, with the nearest names, if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(RECIPES)}"
        raise ValueError(f"no recipe named {name!r}; {hint}")
    return replace(RECIPES[name], **changes)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def _build(kind: Any, value: Any, where: str = "recipe") -> Any:
    """`value`, as it came from JSON, in the form that the type `kind` asks for."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or (unknown := value.keys() - hints.keys()):
            raise ValueError(f"{where}: unknown fields {sorted(unknown) if isinstance(value, dict) else value!r}")
        try:
            return kind(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: {value!r} is not a list")
        return tuple(_build(get_args(kind)[0], item, f"{where}.{i}") for i, item in enumerate(value))
    allowed = get_args(kind) or (kind,)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value in allowed or type(value) in allowed:
        return value
    raise ValueError(f"{where}: {value!r} is not {' or '.join(map(str, allowed))}")


# -- the shipped recipes ---------------------------------------------------------------------------------------------


def _ladder(cnn: Stage, last: Stage, *, between: float) -> tuple[Stage, ...]:
    """CNN, T = 5, 4, 3, 2 for `between` epochs each, then `last` at T = 1, where an epoch is cheap and weights may be
    rounded."""
    return (cnn, *(replace(last, steps=steps, epochs=between, weight_bits=None) for steps in (5, 4, 3, 2)), last)


def _paper(name: str, data: str, net: str, *, norm: Literal["none", "fold"], **fields: Any) -> Recipe:
    """Section by section what the authors' scripts do: 300 epochs for a CNN with batch norm, 500 without, then up to
    500 for each T."""
    cnn = Stage(None, 500 if norm == "none" else 300, 0.01, "sgd", 5e-4, batch=64, milestones=(0.45, 0.7, 0.9))
    snn = Stage(1, 500, 1e-4, "adam-amsgrad", batch=64, milestones=(0.6, 0.8, 0.9))
    stages = _ladder(cnn, snn, between=500)
    unit: dict[str, Any] = {"height": "unit", "readout": "sum", "dropout": 0.2, "calibration_steps": 500}
    return Recipe(**{"name": name, "data": data, "net": net, "stages": stages, "norm": norm, **unit, **fields})


def _pixels(mean: tuple[float, ...], deviation: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    """Channel means and deviations, given for pixels from 0 to 1, as `pixel_zero` and `pixel_scale`."""
    zero = tuple(round(255 * m, 3) for m in mean)
    return {"pixel_zero": zero, "pixel_scale": tuple(round(1 / (255 * d), 8) for d in deviation)}


_CIFAR10, _CIFAR100 = "uoft-cs/cifar10", "uoft-cs/cifar100"
_CIFAR10_PIXELS = _pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_PIXELS = _pixels((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_IMAGENET_PIXELS = _pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_MINI = _ladder(Stage(None, 6, 4e-3, warmup=0.2), Stage(1, 10, 4e-3, "muon", warmup=0.1, weight_bits=8), between=1)
_QUICK = (  # straight to T = 1
    Stage(None, 6, 0.1, "nesterov", 5e-4, vector_lr=8, warmup=0.2, label_smoothing=0.1),
    Stage(1, 27, 2e-3, "adamw", 0.2, warmup=0.1, label_smoothing=0.1, weight_bits=8, keep="last"),
)
_QUICK_LONG = (  # a CNN that is trained for long is worth imitating
    replace(_QUICK[0], epochs=30),
    replace(_QUICK[1], epochs=80, distillation=0.5, keep="best"),
)
_VGG16_CONV = _ladder(*_QUICK_LONG, between=1)
_VGG16 = _ladder(  # hidden layers of spikes without a norm do not bear the rate of the others
    Stage(None, 40, 0.1, "nesterov", 5e-4, warmup=0.2, label_smoothing=0.1),
    Stage(1, 100, 1e-3, "adamw", 0.2, warmup=0.1, label_smoothing=0.1, distillation=0.5),
    between=3,
)
_OWN = _ladder(
    Stage(None, 0, 0.1, "sgd"), Stage(1, 20, 1e-3, "adamw", 0.05, warmup=0.1, label_smoothing=0.1), between=2
)
_IMAGES: dict[str, Any] = {"padding": 4, "border": "mirror", "cutout": 8, "whiten": True}
_FASHION: dict[str, Any] = {"channels": 1, "size": 28, "augment": "flip", "pixel_zero": (73.0,)}

_SHIPPED = (
    Recipe("fashion-mini", "fashion-mini", "vgg-mini", _MINI, **_FASHION),
    Recipe("fashion-mnist", "zalando-datasets/fashion_mnist", "vgg-mini", _MINI, **_FASHION),
    Recipe("cifar10-quick", _CIFAR10, "vgg-quick", _QUICK, **_IMAGES),
    Recipe("cifar10-quick-long", _CIFAR10, "vgg-quick", _QUICK_LONG, **_IMAGES),
    Recipe("cifar10-vgg6", _CIFAR10, "vgg6", _VGG16, dropout=0.2, **_IMAGES),
    Recipe("cifar10-vgg16", _CIFAR10, "vgg16", _VGG16, dropout=0.2, **_IMAGES),
    Recipe("cifar10-vgg16-conv", _CIFAR10, "vgg16-conv", _VGG16_CONV, **_IMAGES),
    Recipe("cifar10-resnet20", _CIFAR10, "resnet20", _VGG16_CONV, **_IMAGES),
    Recipe("cifar100-vgg16", _CIFAR100, "vgg16", _VGG16, dropout=0.2, **_IMAGES),
    Recipe("cifar100-resnet20", _CIFAR100, "resnet20", _VGG16_CONV, **_IMAGES),
    _paper("cifar10-vgg6-paper", _CIFAR10, "vgg6", norm="none", **_CIFAR10_PIXELS),
    _paper("cifar10-vgg16-paper", _CIFAR10, "vgg16", norm="none", **_CIFAR10_PIXELS),
    _paper("cifar10-resnet20-paper", _CIFAR10, "resnet20", norm="fold", **_CIFAR10_PIXELS),
    _paper("cifar100-vgg16-paper", _CIFAR100, "vgg16", norm="none", **_CIFAR100_PIXELS),
    _paper("cifar100-resnet20-paper", _CIFAR100, "resnet20", norm="fold", **_CIFAR100_PIXELS),
    _paper(
        "imagenet-vgg16-paper", "ILSVRC/imagenet-1k", "vgg16-imagenet", norm="none", **_IMAGENET_PIXELS,
        size=224, augment="resized-crop-flip", calibration_images=64,
        stages=_ladder(
            Stage(None, 101, 0.01, "sgd", 5e-4, batch=128, milestones=(0.45, 0.7, 0.9), factor=10),
            Stage(1, 25, 2e-5, "adam-amsgrad", batch=128, accumulate=8, milestones=(0.6, 0.8, 0.9)),
            between=25,
        ),
    ),
)  # fmt: skip

OWN = Recipe(  # a user's trained CNN and images
    "own", "", "", _OWN, pixel_zero=(0.0,), pixel_scale=(1 / 255,), initial=0.5
)  # fmt: skip

RECIPES: dict[str, Recipe] = {shipped.name: shipped for shipped in _SHIPPED}
RUN_TO_THE_END = frozenset(
    {"fashion-mini", "cifar10-quick", "cifar10-quick-long", "cifar10-vgg16", "cifar10-vgg16-conv"}
)  # those with a record in benchmarks/records; the others: not run
