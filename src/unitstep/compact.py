"""A trained spiking network as one small file: 8-bit weights, everything else in fp32. Knows nothing of training.

Each matrix or kernel W is stored as int8 q with one scale a per row of its first dimension, the output channel, as
`unitstep.rounding` rounds; weights that were trained in fewer bits keep those. Transposed convolutions, thresholds,
leaks, biases and batch norms stay as they are.
"""

from pathlib import Path

import torch
from torch import Tensor

from unitstep.conversion import Spiking
from unitstep.files import read_tensors, write_tensors
from unitstep.recipes import recipe_from_dict, without_folder
from unitstep.rounding import LAYERS, on_grid
from unitstep.runs import SCHEMA, Run, rebuild

SCALE = ".scale"  # after a tensor's name: its scales
MODELS = Path(__file__).parent / "models"  # trained networks that come with the package, each with its card


def pretrained(name: str) -> Spiking:
    """A trained one-timestep network that comes with the package, for raw uint8 images: "cifar10-t1" or
    "fashion-mini-t1". What it can do is on its card, models/NAME.md. ValueError, with the names there are, if there is
    no such."""
    names = sorted(path.stem for path in MODELS.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"no trained network named {name!r} comes with the package; there are: {', '.join(names)}")
    return load_compact(MODELS / f"{name}.safetensors")


def save_compact(run: Run, path: str | Path) -> None:
    """Write the last finished stage of `run`, which must be a spiking one, to the file `path`. ValueError otherwise."""
    finished = run.stages[-1] if run.stages else None
    if finished is None or finished.stage.steps is None:
        raise ValueError(f"{run.path} has no trained spiking stage: unitstep train goes on with it")
    net, tensors = run.net(finished.index), dict[str, Tensor]()
    weights = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, LAYERS)}
    for name, tensor in net.state_dict().items():
        if name in weights:
            q, unit, _ = on_grid(tensor)
            tensors[name], tensors[name + SCALE] = q.to(torch.int8), unit.flatten()
        else:
            tensors[name] = tensor
    about = {"schema": SCHEMA, "recipe": without_folder(run.recipe).to_dict(), "steps": finished.stage.steps}
    about |= {"classes": list(finished.classes), "val_accuracy": finished.val_accuracy}
    write_tensors(Path(path), tensors, about)


def load_compact(path: str | Path) -> Spiking:
    """The network that `save_compact` wrote, with its weights rounded, in evaluation mode. ValueError if the file is
    anything else."""
    tensors, about = read_tensors(Path(path))
    try:
        if "steps" not in about:
            raise ValueError("it holds a stage of a run: unitstep.load(run) reads that")
        recipe, classes = recipe_from_dict(about["recipe"]), len(about["classes"])
        for name in [name for name in tensors if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors]:
            scale, of = tensors.pop(name), name.removesuffix(SCALE)
            tensors[of] = tensors[of].float() * scale.view(-1, *[1] * (tensors[of].dim() - 1))
        net = rebuild(recipe, classes, tensors, spikes=True)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or is not a compact network of unitstep ({error})") from error
    assert isinstance(net, Spiking)
    return net
