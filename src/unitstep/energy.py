"""What counted operations would cost in energy, by models of hardware. Knows nothing of networks.

A model takes one layer's counts (a row of "operations" in measure.json), the timesteps, and the number of all weights;
it gives picojoules per image. Figures are for 45 nm at 0.9 V (M. Horowitz, "Computing's energy problem",
ISSCC 2014): fp32 multiplication 3.7 and addition 0.9, int8 multiplication 0.2, int32 addition 0.1, 64 bits from 1 MB
of SRAM 100 and from DRAM 1300 pJ. No model is a measurement: none knows of control, clocks, leakage or idle parts.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

FP32_MAC, FP32_ADD = 4.6, 0.9
INT8_MAC, INT8_ADD = 0.3, 0.1  # products of 8 bits; sums in 32 bits
SRAM, DRAM, SRAM_BYTES = 100 / 8, 1300 / 8, 2**20  # pJ per byte; 1 MB

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class Energy:
    """Picojoules per image: of a layer, a network, or a sum of them."""

    cnn_fp32: float = 0.0
    """Of the CNN with 32-bit numbers."""
    cnn_int8: float = 0.0
    """Of the CNN with 8-bit weights and activations."""
    fixed: float = 0.0
    """Of the spiking network: what does not depend on the number of spikes."""
    spikes: float = 0.0
    """And what is proportional to it."""

    @property
    def snn(self) -> float:
        return self.fixed + self.spikes

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Model:
    """A layer's counts, the timesteps, the number of all weights → picojoules per image."""

    about: str
    """What it counts and leaves out."""
    mac: float
    add: float
    """Of a multiply-accumulate and of an accumulation in the spiking network. The CNNs' are those for 45 nm."""
    additions: str = "additions"
    """Which count of additions: of every spike, or "additions_by_rate"."""
    memory: bool = False
    """Whether the traffic to memory is added."""

    def __call__(self, layer: Layer, steps: int, weights: int) -> Energy:
        macs = layer["macs"]
        computed = Energy(
            FP32_MAC * macs, INT8_MAC * macs, self.mac * layer["multiplied"], self.add * layer[self.additions]
        )
        return computed + _traffic(layer, steps, weights) if self.memory else computed


def _traffic(layer: Layer, steps: int, weights: int) -> Energy:
    static, analog = layer["static"], layer["input"] == "analog"
    neurons = layer["values"]
    inputs = layer.get("inputs", neurons)  # which files of before 2026-11-28 do not tell

    def moved(weight_bytes: float, values: float, value_bytes: float, passes: int) -> float:
        place = DRAM if weights * weight_bytes > SRAM_BYTES else SRAM
        one: float = layer["weights"] * weight_bytes * place + values * value_bytes * SRAM
        return passes * one

    membranes = 0.0 if analog or steps == 1 else steps * neurons * 8 * SRAM
    return Energy(  # values are written and read; what is static is taken for pixels, only read, a byte each
        moved(4, inputs, 1 if static else 8, 1),
        moved(1, inputs, 1 if static else 2, 1),
        moved(1, neurons, 1 if static else 2 if analog else 2 / 8, 1 if static else steps) + membranes,
    )


MODELS: dict[str, Model] = {
    "paper": Model(
        "Compute alone, 32-bit, as arXiv 2110.05929 counts: 4.6 pJ for a multiply-accumulate and 0.9 for an "
        "accumulation, of which a layer has spikes per neuron before it × its multiply-accumulates. No memory, no "
        "borders.",
        FP32_MAC, FP32_ADD, "additions_by_rate",
    ),
    "exact": Model(
        "As the paper's model, but with every spike counted to each output that it reaches; k² that enter an average "
        "pool are k², where the paper's formula has their mean.",
        FP32_MAC, FP32_ADD,
    ),
    "int8": Model(
        "Compute alone, with 8-bit weights: 0.3 pJ for a multiply-accumulate, 0.1 for an accumulation, summed in 32 "
        "bits; spikes counted exactly. The rival to look at is the 8-bit CNN.",
        INT8_MAC, INT8_ADD,
    ),
    "memory": Model(
        "The int8 model and the traffic of one image: weights are read once per pass, from DRAM if all of them exceed "
        "1 MB, else from SRAM; what enters a layer was written to SRAM and is read from it: 4 bytes in the fp32 CNN, "
        "1 in the 8-bit one, 1 bit for each spike, those before a pool if one is between. Above one timestep there are "
        "T passes behind the first neurons, and the membranes whose spikes enter the layer are read and written at "
        "each, 4 bytes. What enters several layers counts for each of them. All layers' values are taken to fit into "
        "SRAM.",
        INT8_MAC, INT8_ADD, memory=True,
    ),
}  # fmt: skip


def own(multiply: float, add: float) -> Model:
    """A model of compute alone from figures of your own: pJ of a multiply-accumulate and of an accumulation in the
    spiking network. The CNNs keep the figures for 45 nm. ValueError if one is not above 0."""
    if not (0 < multiply < math.inf and 0 < add < math.inf):
        raise ValueError(f"energies are above 0, unlike {multiply} or {add} pJ")
    return Model(
        f"Compute alone, in the spiking network {multiply:g} pJ for a multiply-accumulate and {add:g} for an "
        f"accumulation; but in the CNNs {FP32_MAC:g} (fp32) and {INT8_MAC:g} (int8), at 45 nm: ratios hold for figures "
        "at 45 nm only.",
        multiply, add,
    )  # fmt: skip


def per_layer(stage: Mapping[str, Any], model: Model) -> list[Energy]:
    """Energy of each layer of a stage of measure.json, in order; empty if its operations were not counted."""
    layers: Sequence[Layer] = stage.get("operations") or ()
    weights = sum(layer["weights"] for layer in layers)
    return [model(layer, stage["steps"] or 1, weights) for layer in layers]


def total(stage: Mapping[str, Any], model: Model) -> Energy:
    """Of a whole network: the sum of its layers."""
    return sum(per_layer(stage, model), Energy())


def break_even(stage: Mapping[str, Any], energy: Energy, rival: float) -> float | None:
    """Spikes per neuron at which the network of `stage`, with the same share of them in each layer, would cost as much
    as the `rival` CNN (pJ). None if the parts without spikes cost that much already, or nothing spikes."""
    if not energy.spikes or energy.fixed >= rival:
        return None
    return float(stage["spikes_per_neuron"] * (rival - energy.fixed) / energy.spikes)
