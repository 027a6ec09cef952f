"""LIF against the neurons of snnTorch 1.0 and SpikingJelly 2.0, set to our conventions. Where they differ:

snnTorch 1.0.0, `Leaky`
  * `reset_delay=True`, the default, subtracts the threshold one step later, after the leak: λU − V, not λ(U − V). The
    same at λ = 1 only.
  * `reset_delay=False` resets in the same step, but if a membrane is left above V it decides about U − V at the next:
    such a neuron can fall silent with its membrane above V for good. The same as ours as long as no membrane is left
    above V. The s of this reset is differentiated, so gradients differ as soon as T > 1.
  * Without a reset of its own (`"none"`), and ours between the calls, it is our neuron, for gradients too.
  * The surrogate is a function of U − V, in the unit of the current; ours of z = U/V − 1. `learn_threshold=True` can
    therefore not give ∂z/∂V = −U/V². But V can be moved into the current: I/V against a threshold of 1.
  * On a tie it is silent, as we are. λ is clamped to [0, 1] in the forward pass, its gradient is 0 outside.

SpikingJelly 2.0.0, `IFNode`, `LIFNode`, `ParametricLIFNode`
  * On a tie its surrogates fire. Which, as is their width, is up to the surrogate function: it also makes the spike.
  * Hard reset to 0 by default; `v_reset=None` is the soft one. `detach_reset=False` by default; ours is True.
  * `decay_input=True` by default: the current is divided by τ as well. Ours is False, with λ = 1 − 1/τ.
    `LIFNode` computes U − U/τ + I, so membranes differ from ours in the last bits; τ must be > 1, so λ > 0.
  * τ is a number, or learned as w with λ = 1 − sigmoid(w) < 1; the threshold is a number. No surrogate sees V.
  * `PiecewiseQuadratic(alpha=1)` is max(0, 1 − |U − V|): our surrogate without the 0.3, for V = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unitstep.neuron import LIF

STEPS = [1, 2, 3, 5]
V = 0.75  # exact in fp32, in which thresholds are kept


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grads[0] * 0.3 * (1 - z.abs()).clamp(min=0)


def surrogate(threshold: float) -> Callable[[Tensor], Tensor]:
    """Ours, as a function of U − V: silent on a tie, slope 0.3·max(0, 1 − |z|)/V."""
    return lambda above: Spike.apply(above / threshold)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def currents(steps: int, *, most: float = 2.0) -> Tensor:
    """Random currents [steps, 40] in [−1, most]."""
    return torch.rand(steps, 40, generator=torch.Generator().manual_seed(steps), dtype=torch.float64) * (1 + most) - 1


def gradients(spikes: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return list(torch.autograd.grad(spikes, inputs, weights))


def assert_same(spikes: Tensor, expected: Tensor, inputs: list[Tensor], expected_inputs: list[Tensor]) -> None:
    assert torch.equal(spikes, expected)
    for got, wanted in zip(gradients(spikes, *inputs), gradients(expected, *expected_inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# snnTorch


@pytest.fixture(scope="module")
def leaky() -> Callable[..., Any]:
    snntorch = pytest.importorskip("snntorch", reason="parity with snnTorch needs snntorch (the test extra)")

    def build(threshold: float = V, leak: float = 1.0, **options: Any) -> Any:
        wide = [torch.tensor(x, dtype=torch.float64) for x in (leak, threshold)]
        return snntorch.Leaky(wide[0], threshold=wide[1], spike_grad=surrogate(threshold), **options)

    return build


def run_leaky(neuron: Any, current: Tensor, *, initial: float = 0.0, reset: float = 0.0) -> Tensor:
    """Spikes of all steps. reset: what to subtract ourselves after a spike."""
    membrane = torch.full_like(current[0], initial)
    spikes = []
    for now in current:
        spike, membrane = neuron(now, membrane)
        membrane = membrane - reset * spike.detach()
        spikes.append(spike)
    return torch.stack(spikes)


@pytest.mark.parametrize("steps", STEPS)
def test_snntorch_with_delayed_reset_and_no_leak(leaky: Any, steps: int) -> None:
    current, same = currents(steps).requires_grad_(), currents(steps).requires_grad_()
    neuron = leaky(reset_mechanism="subtract", reset_delay=True)
    assert_same(LIF(V)(current, steps), run_leaky(neuron, same), [current], [same])


@pytest.mark.parametrize("steps", STEPS)
def test_snntorch_with_its_reset_in_the_same_step(leaky: Any, steps: int) -> None:
    current = currents(steps, most=V)  # too little to leave a membrane above the threshold after a reset
    leak = 0.5
    neuron = leaky(leak=leak, reset_mechanism="subtract", reset_delay=False)
    assert torch.equal(LIF(V, leak)(current, steps), run_leaky(neuron, current))


def test_snntorch_differentiates_the_spike_of_that_reset(leaky: Any) -> None:
    current, same = currents(2, most=V).requires_grad_(), currents(2, most=V).requires_grad_()
    theirs = run_leaky(leaky(reset_mechanism="subtract", reset_delay=False), same)
    assert not torch.allclose(gradients(LIF(V)(current, 2), current)[0], gradients(theirs, same)[0])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("leak", [1.0, 0.5])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_snntorch_with_our_reset(leaky: Any, steps: int, leak: float, initial: float) -> None:
    current, same = currents(steps).requires_grad_(), currents(steps).requires_grad_()
    ours = LIF(V, leak, initial=initial).double()
    theirs = leaky(leak=leak, reset_mechanism="none", learn_beta=True)
    spikes = run_leaky(theirs, same, initial=initial * V, reset=V)
    assert_same(ours(current, steps), spikes, [current, ours.leak], [same, theirs.beta])


@pytest.mark.parametrize("steps", STEPS)
def test_snntorch_gives_the_gradient_of_the_threshold_through_the_current(leaky: Any, steps: int) -> None:
    ours = LIF(V, 0.5, initial=0.5).double()
    threshold = torch.tensor(V, dtype=torch.float64, requires_grad=True)
    theirs = run_leaky(leaky(1.0, 0.5, reset_mechanism="none"), currents(steps) / threshold, initial=0.5, reset=1.0)
    assert_same(ours(currents(steps), steps), theirs, [ours.threshold], [threshold])


def test_snntorch_is_silent_on_a_tie(leaky: Any) -> None:
    assert run_leaky(leaky(), column(V)).item() == LIF(V)(column(V), 1).item() == 0


def test_snntorch_with_delayed_reset_leaks_before_it_resets(leaky: Any) -> None:
    current = column(1.5, 0.625, 0.625)  # 1.5, ½·0.5 + 0.625 = 0.875, 1.06; theirs 1.5, ½·1.5 − 1 + 0.625 = 0.375, 0.81
    assert LIF(1.0, 0.5)(current, 3).flatten().tolist() == [1, 0, 1]
    assert run_leaky(leaky(1.0, 0.5), current).flatten().tolist() == [1, 0, 0]


def test_snntorch_falls_silent_when_a_membrane_is_left_above_the_threshold(leaky: Any) -> None:
    current = column(2.5, 0.0, 0.0, 0.0)
    assert LIF()(current, 4).flatten().tolist() == [1, 1, 0, 0]
    assert run_leaky(leaky(1.0, reset_delay=False), current).flatten().tolist() == [1, 0, 0, 0]


# SpikingJelly


@pytest.fixture(scope="module")
def jelly() -> Any:
    return pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="parity with SpikingJelly needs spikingjelly (make test)"
    )


def options(threshold: float = V) -> dict[str, Any]:
    """Its neurons on our terms."""
    return {
        "v_threshold": threshold,
        "v_reset": None,
        "detach_reset": True,
        "surrogate_function": surrogate(threshold),
        "step_mode": "m",
    }


def run_node(node: Any, current: Tensor, *, initial: float = 0.0) -> Tensor:
    node.reset()
    node.v = initial
    spikes: Tensor = node(current)
    return spikes


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_spikingjelly_if(jelly: Any, steps: int, initial: float) -> None:
    current, same = currents(steps).requires_grad_(), currents(steps).requires_grad_()
    node = jelly.IFNode(**options())
    assert_same(LIF(V, initial=initial)(current, steps), run_node(node, same, initial=initial * V), [current], [same])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("leak", [0.25, 0.5, 0.8125])
def test_spikingjelly_lif(jelly: Any, steps: int, leak: float) -> None:
    current, same = currents(steps).requires_grad_(), currents(steps).requires_grad_()
    node = jelly.LIFNode(tau=1 / (1 - leak), decay_input=False, **options())
    assert_same(LIF(V, leak)(current, steps), run_node(node, same), [current], [same])


@pytest.mark.parametrize("steps", [2, 3, 5])  # at T = 1 the leak does nothing, and autograd says so
@pytest.mark.parametrize("leak", [0.25, 0.5, 0.8125])
def test_spikingjelly_gradient_of_the_leak(jelly: Any, steps: int, leak: float) -> None:
    ours = LIF(V, leak).double()
    node = jelly.ParametricLIFNode(init_tau=1 / (1 - leak), decay_input=False, **options()).double()
    (got,) = gradients(ours(currents(steps), steps), ours.leak)
    (through_w,) = gradients(run_node(node, currents(steps)), node.w)
    # λ = 1 − sigmoid(w), and w was rounded to fp32 when the node was built
    torch.testing.assert_close(got, through_w / (-leak * (1 - leak)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_spikingjelly_gives_the_gradient_of_the_threshold_through_the_current(jelly: Any, steps: int) -> None:
    ours = LIF(V, 0.5, initial=0.5).double()
    threshold = torch.tensor(V, dtype=torch.float64, requires_grad=True)
    node = jelly.LIFNode(tau=2.0, decay_input=False, **options(1.0))
    theirs = run_node(node, currents(steps) / threshold, initial=0.5)
    assert_same(ours(currents(steps), steps), theirs, [ours.threshold], [threshold])


def test_spikingjelly_surrogate_of_its_own(jelly: Any) -> None:
    """Of one layer, gradients are proportional to the surrogate, so that the 0.3 can be put in afterwards."""
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate", reason="comes with spikingjelly")
    current, same = currents(5).requires_grad_(), currents(5).requires_grad_()
    node = jelly.IFNode(**options(1.0) | {"surrogate_function": surrogates.PiecewiseQuadratic(alpha=1.0)})
    (theirs,) = gradients(run_node(node, same), same)
    (ours,) = gradients(LIF()(current, 5), current)
    torch.testing.assert_close(ours, 0.3 * theirs, rtol=1e-10, atol=1e-10)


def test_spikingjelly_fires_on_a_tie(jelly: Any) -> None:
    surrogates = pytest.importorskip("spikingjelly.activation_based.surrogate", reason="comes with spikingjelly")
    node = jelly.IFNode(**options() | {"surrogate_function": surrogates.PiecewiseQuadratic(alpha=1.0)})
    assert run_node(node, column(V)).item() == 1
    assert LIF(V)(column(V), 1).item() == 0


def test_spikingjelly_decays_its_input_unless_told_not_to(jelly: Any) -> None:
    current = column(1.0)
    assert run_node(jelly.LIFNode(tau=2.0, decay_input=False, **options()), current).item() == 1
    assert run_node(jelly.LIFNode(tau=2.0, **options()), current).item() == 0
