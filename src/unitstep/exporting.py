"""A spiking network as a file for other software, and the proof that it is the same network: the file is run, and its
spikes are compared one by one. Knows nothing of runs, training or data sets.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, fx, nn

from unitstep.calibration import Activity, record, watching
from unitstep.conversion import Spiking
from unitstep.data import Split
from unitstep.files import check_writable, write_whole
from unitstep.fusing import Fire, module_of, per_channel, refuse_hooks, refuse_precision
from unitstep.neuron import LIF, check_steps, membranes
from unitstep.qdq import LOGITS, integer_model
from unitstep.quantizing import quantize
from unitstep.recipes import Recipe, without_folder
from unitstep.running import KEY, first_line, open_model

Form = Literal["int8", "float"]
FLOAT_OPSET = 18
INPUT = "images"  # name of the input in what PyTorch's exporter writes
TIE = 1e-6  # how near its threshold a neuron is when rounding decides, relative to its layer's largest membrane
LOGIT = 1e-4  # how much logits differ by rounding, at most, relative to the largest
BATCH = 100  # images that are compared at a time


@dataclass
class LayerParity:
    """One neuron layer of a file, over all images and steps."""

    name: str
    neurons: int = 0
    differ: int = 0
    """Spikes that the file has and the network has not, or the other way round."""
    unexplained: int = 0
    """Images and steps at which they differ though no neuron was at its threshold here, nor one before differed."""


@dataclass
class Parity:
    """A file in ONNX Runtime against the network that it was made of, on the same images."""

    form: Form
    steps: int
    images: int = 0
    layers: list[LayerParity] = field(default_factory=list)
    """int8: against the network with its weights rounded to 8 bits."""
    logits: float = 0.0
    """The largest difference of a logit; int8: against the network with its weights rounded."""
    unexplained: int = 0
    """Images with the same spikes in all layers and logits that differ by more than rounding does."""
    changed: int = 0
    """Images for which the file predicts another class than the network; int8: with its weights as they were."""
    accuracy: float | None = None
    file_accuracy: float | None = None
    """Percent of the images; None without labels."""
    in_float: dict[str, str] = field(default_factory=dict)
    """int8: the layers that stay in floating point, and why."""
    rounded: tuple[str, ...] = ()
    """int8: the layers whose weights had to be rounded; none if the network was trained with weights of 8 bits."""


def to_onnx(
    snn: Spiking,
    path: str | Path,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 1,
    form: Form | None = None,
    about: dict[str, Any] | None = None,
) -> Parity:
    """Write `snn` at `steps` timesteps to the ONNX file `path`: images [N, C, H, W] as the network takes them → logits
    fp32 [N, classes], for any N.

    images: real ones [B, C, H, W], on which the file is compared with the network; with labels [B], accuracies, too.
    form: "int8", in integers from the pixels to the last spikes, for one step and uint8 images; or "float". None: int8
    if steps is 1.  about: plain data for the file's metadata.

    The file is only written if it is the network. int8: its spikes are those of the network whose weights are rounded,
    all of them. float: a spike that differs belongs to a neuron whose membrane is at its threshold to 1e-6 of the
    layer's largest, or follows from one. Both: where all spikes are the same, logits are, to 1e-4 of the largest.
    Otherwise, and if an operation has no form in ONNX, raises ValueError.
    """
    check_steps(steps)
    form = form or ("int8" if steps == 1 else "float")
    if form not in ("int8", "float"):
        raise ValueError(f'form must be "int8" or "float", not {form!r}')
    if form == "int8" and steps != 1:
        raise ValueError(f"the 8-bit form is for one timestep, not {steps}: export in floating point (--form float)")
    if form == "int8" and images.dtype != torch.uint8:
        raise ValueError(
            f"the 8-bit form takes raw pixels, uint8, not {images.dtype}: export in floating point, or convert "
            "nn.Sequential(unitstep.nets.Normalize((zero,), (scale,)), cnn), which takes pixels"
        )
    if not len(images) or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images and {0 if labels is None else len(labels)} labels: give some, as many")
    if LOGITS in snn.lifs:
        raise ValueError(f"neurons are called {LOGITS}, as the file's output is: give that ReLU another name")
    check_writable(Path(path))
    if form == "float":
        refuse_precision(snn)
    refuse_hooks(snn)  # before it is copied, which what hooks have computed does not allow
    snn, images, labels = copy.deepcopy(snn).eval().cpu(), images.cpu(), None if labels is None else labels.cpu()
    fused = snn.fuse(images, steps)
    given = fused(torch.cat([images[:1]] * 2))
    if given.dim() != 2:
        raise ValueError(f"the network gives {list(given.shape)} for 2 images, not [2, classes]: give it such a head")
    rounded = quantize(fused) if form == "int8" else None
    model = _float_model(fused, images) if rounded is None else integer_model(rounded, images.shape[1:])
    told: dict[str, Any] = {"format": 2, "form": form, "steps": steps, "input": list(images.shape[1:])}
    told |= {"pixels": str(images.dtype).removeprefix("torch."), **(about or {})}
    onnx.helper.set_model_props(model, {KEY: json.dumps(told)})
    try:
        onnx.checker.check_model(model, full_check=True)
        parity = _compare(model, snn, rounded, images, labels, steps)
    except Exception as error:  # of ONNX and its runtime, of many kinds
        reason = first_line(error)
        raise ValueError(f"not written: ONNX does not run this network as PyTorch does ({reason})") from error
    if wild := [layer.name for layer in parity.layers if layer.unexplained]:
        raise ValueError(
            f"not written: in ONNX Runtime {len(wild)} layers spike otherwise than here, first {wild[0]}, and no "
            "rounding explains it. Please report this network"
        )
    if parity.unexplained:
        raise ValueError(
            f"not written: in ONNX Runtime {parity.unexplained} of {len(images)} images have the same spikes as here "
            f"and other logits, by up to {parity.logits:.2g}. Please report this network"
        )
    told |= {"accuracy": parity.file_accuracy, "accuracy_images": parity.images}
    onnx.helper.set_model_props(model, {KEY: json.dumps(told)})
    del model.graph.output[1:]
    write_whole(Path(path), model.SerializeToString())
    return parity


def describe(recipe: Recipe, split: Split) -> dict[str, Any]:
    """What a file's metadata should say of a network that was trained by `recipe` on images such as those of `split`:
    `about` for `to_onnx`."""
    told = {"recipe": without_folder(recipe).to_dict(), "classes": list(split.classes), "short": split.short}
    return told | {"version": version("unitstep")}


def _float_model(fused: fx.GraphModule, images: Tensor) -> onnx.ModelProto:
    """Outputs: the logits, then the spikes of each neuron layer."""
    graph = fx.Graph()
    end = graph.graph_copy(fused.graph, {})
    fires = [node for node in graph.nodes if isinstance(module_of(fused, node), Fire)]
    graph.output((end, *fires))
    return onnx_of(fx.GraphModule(fused, graph), images, [LOGITS, *(node.name for node in fires)])


def onnx_of(net: nn.Module, images: Tensor, outputs: Sequence[str] = (LOGITS,)) -> onnx.ModelProto:
    """Any module of images [N, C, H, W] as PyTorch's own exporter writes it, for any N. ValueError if it cannot."""
    logger = logging.getLogger("torch.onnx")
    with warnings.catch_warnings(), contextlib.ExitStack() as undo:
        warnings.simplefilter("ignore")  # of the exporter's own
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        try:
            batch, two = torch.export.Dim("N", min=1), torch.cat([images[:1]] * 2)  # of one, N would be fixed
            exported = torch.export.export(net, (two,), dynamic_shapes=({0: batch},))
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=FLOAT_OPSET, input_names=[INPUT], output_names=outputs,
                verbose=False,
            )  # fmt: skip
        except Exception as error:  # of many kinds
            raise ValueError(f"PyTorch cannot export this network to ONNX: {first_line(error)}") from error
    assert program is not None
    model = program.model_proto
    for each in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del each.metadata_props[:]  # source lines, with the folders where they are
    return model


def _compare(
    model: onnx.ModelProto,
    snn: Spiking,
    rounded: fx.GraphModule | None,
    images: Tensor,
    labels: Tensor | None,
    steps: int,
) -> Parity:
    """Run `model`, whose outputs are logits and spikes, and the file that it becomes, which gives the logits alone,
    beside `snn` and, for integers, beside its `rounded` form."""
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    del alone.graph.output[1:]
    run, file = open_model(model.SerializeToString()), open_model(alone.SerializeToString())
    (one,) = file(images[:1].numpy())
    if one.ndim != 2:
        raise ValueError(
            f"it gives {list(one.shape)} for one image: squeeze() drops that dimension, flatten(1) does not"
        )
    layers = [LayerParity(output.name) for output in model.graph.output[1:]]
    parity = Parity("float" if rounded is None else "int8", steps, len(images), layers)
    right = file_right = 0
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        (logits,), (_, *given) = ([torch.from_numpy(output) for output in each(batch.numpy())] for each in (file, run))
        with torch.no_grad(), record(snn) as seen:
            expected = snn(batch, steps)
        if rounded is None:
            wanted, fired = expected, {name: _spikes(snn.lifs[name], layer) for name, layer in seen.items()}
        else:
            wanted, fired = _rounded_spikes(rounded, batch)
        before = torch.zeros(steps, len(batch), dtype=torch.bool)  # whether a neuron of an earlier layer differed
        for layer, got in zip(layers, given, strict=True):
            spikes, undecided = fired[layer.name]
            differ = ((got > 0).unflatten(0, (steps, -1)) != spikes).reshape(*spikes.shape[:2], -1)
            since = _by_image(differ, len(batch)).cummax(0).values
            earlier = before | torch.cat([torch.zeros_like(since[:1]), since[:-1]])  # or a step earlier
            layer.neurons, layer.differ = differ[0].numel() // len(batch), layer.differ + int(differ.sum())
            odd = differ & ~undecided.reshape(differ.shape)
            layer.unexplained += int((_by_image(odd, len(batch)) & ~earlier).sum())
            before |= since
        apart = (logits - wanted).abs().amax(1)
        parity.logits = max(parity.logits, apart.max().item())
        parity.unexplained += int((~before.any(0) & ~(apart <= LOGIT * wanted.abs().max())).sum())
        parity.changed += int((logits.argmax(1) != expected.argmax(1)).sum())
        if labels is not None:
            right += int((expected.argmax(1) == labels[start : start + BATCH]).sum())
            file_right += int((logits.argmax(1) == labels[start : start + BATCH]).sum())
    if labels is not None:
        parity.accuracy, parity.file_accuracy = 100 * right / len(images), 100 * file_right / len(images)
    if rounded is not None:
        nodes = rounded.graph.nodes
        parity.in_float = {node.name: node.meta["float"] for node in nodes if "float" in node.meta}
        parity.rounded = tuple(node.name for node in nodes if node.meta.get("rounded"))
    return parity


def _by_image(neurons: Tensor, images: int) -> Tensor:
    """Whether any of an image's neurons is true: [T, rows, …] → [T, images]. Where rows are no images, as after a
    reshape, any of all images."""
    any_of_row = neurons.any(2)
    return any_of_row if len(any_of_row[0]) == images else any_of_row.any(1, keepdim=True).expand(-1, images)


def _undecided(membrane: Tensor, V: Tensor) -> Tensor:
    """Whether rounding decides if a neuron fires."""
    return (membrane - V).abs() <= TIE * membrane.abs().max()


def _spikes(lif: LIF, layer: Activity) -> tuple[Tensor, Tensor]:
    """Of a recorded layer: spikes, and whether rounding decided them, bool [T, B, …]."""
    current, steps = layer.current, len(layer.spikes)
    V = per_channel(lif.threshold.detach(), current.dim() - 1)
    states = membranes(current, V, lif.leak.detach(), steps, lif.initial)
    return layer.spikes, torch.stack([_undecided(membrane, V) for _, membrane, _ in states])


def _rounded_spikes(rounded: fx.GraphModule, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits, and for each neuron layer spikes, and whether rounding decided them, bool [1, B, …]: never, between whole
    numbers."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    whole = {user.name for node in rounded.graph.nodes if "integer" in node.meta for user in node.users}

    def note(name: str, fire: Fire, inputs: tuple[Tensor], _: Any, out: Tensor) -> None:
        spikes, V = out != 0, per_channel(fire.threshold, out.dim())
        seen[name] = spikes[None], (torch.zeros_like(spikes) if name in whole else _undecided(inputs[0], V))[None]

    with watching({name: module for name, module in rounded.named_modules() if isinstance(module, Fire)}, note):
        return rounded(images), seen
