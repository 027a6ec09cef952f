"""Pictures of what a network does. Knows nothing of how that came about."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unitstep.calibration import Activity, sampled
from unitstep.fusing import per_channel


def draw_currents(layers: Mapping[str, Activity], path: str | Path) -> None:
    """Write a picture (PNG, SVG or PDF, by the name) with a histogram of the input current of each neuron layer, in
    thresholds: what lies right of the line fires at the first step if the membrane starts at 0. Of a large layer
    262,144 values are counted, drawn at random."""
    from matplotlib.figure import Figure

    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, layer) in zip(axes, layers.items(), strict=False):
        current = _in_thresholds(layer)
        low, high = min(-2.0, current.quantile(0.001).item()), max(3.0, current.quantile(0.999).item())
        axis.hist(current.clamp(low, high).numpy(), bins=60, color="tab:blue")
        axis.axvline(1, color="tab:red", linewidth=1)
        axis.set_title(f"{name}: {layer.rate:.3f} spikes per neuron", fontsize=8)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.supxlabel("input current / threshold (red line: threshold)", fontsize=9)
    figure.supylabel("values (of large layers a sample)", fontsize=9)
    figure.savefig(path, dpi=130)


def _in_thresholds(layer: Activity) -> Tensor:
    current = layer.current.float() / per_channel(layer.threshold, layer.current.dim() - 1)  # [T, B, C, …]
    return sampled(current.flatten()).cpu()
