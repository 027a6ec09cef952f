"""unitstep: turn a CNN into a spiking network that needs a single timestep, and know what that costs and saves.

Names are imported where they are first used, so `import unitstep` is quick and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {
    "neuron": ("LIF", "clamp_"),
    "exporting": ("to_onnx", "Parity"),
    "neuromorphic": ("to_nir",),
    "conversion": ("Spiking", "Report", "ConversionError"),
    "calibration": ("to_spiking", "record"),
    "recipes": ("Recipe", "Stage", "RECIPES", "recipe"),
    "runs": ("Run", "load"),
    "ladder": ("train",),
    "compact": ("pretrained",),
    "measurement": ("Measurement", "measure", "measure_run"),
    "reporting": ("report",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [  # the public API
    "LIF", "clamp_", "to_spiking", "Spiking", "Report", "ConversionError", "record", "Recipe", "Stage", "RECIPES",
    "recipe", "train", "Run", "load", "pretrained", "to_onnx", "to_nir", "Parity", "Measurement", "measure",
    "measure_run", "report",
]  # fmt: skip

if TYPE_CHECKING:
    from unitstep.calibration import record, to_spiking
    from unitstep.compact import pretrained
    from unitstep.conversion import ConversionError, Report, Spiking
    from unitstep.exporting import Parity, to_onnx
    from unitstep.ladder import train
    from unitstep.measurement import Measurement, measure, measure_run
    from unitstep.neuromorphic import to_nir
    from unitstep.neuron import LIF, clamp_
    from unitstep.recipes import RECIPES, Recipe, Stage, recipe
    from unitstep.reporting import report
    from unitstep.runs import Run, load


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'unitstep' has no attribute {name!r}")
    return getattr(import_module(f"unitstep.{_MODULE[name]}"), name)
