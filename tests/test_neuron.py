"""LIF: conventions by hand-computed vectors, then values and gradients against the oracle, then its promises."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from unitstep.neuron import LIF, compiled

from . import oracle

HEIGHTS = ["unit", "threshold"]
STEPS = [1, 2, 3, 4, 5]


def column(*values: float) -> Tensor:
    """The currents of one neuron, one value per step."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(lif: LIF, current: Tensor, steps: int, *, static: bool = False, seed: int = 9) -> dict[str, Tensor]:
    """Spikes, and the gradients of a random weighting of them."""
    current = current.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    lif.zero_grad()
    spikes = lif(current, steps, static=static)
    spikes.backward(noise(*spikes.shape, seed=seed, dtype=spikes.dtype))
    assert current.grad is not None
    assert lif.threshold.grad is not None
    assert lif.leak.grad is not None
    grads = {"current": current.grad, "threshold": lif.threshold.grad.clone(), "leak": lif.leak.grad.clone()}
    return {"spikes": spikes.detach(), **grads}


def run_oracle(lif: LIF, current: Tensor, steps: int, *, static: bool = False, seed: int = 9) -> dict[str, Tensor]:
    """The same as `run`, by the oracle, in the dtype of the current."""
    current = current.detach().clone().requires_grad_()
    V, leak = (p.detach().to(current.dtype).requires_grad_() for p in (lif.threshold, lif.leak))
    currents = [current] * steps if static else list(current.chunk(steps))
    each = V.view(-1, *[1] * (current.dim() - 2)) if V.dim() else V  # channels are dimension 1
    spikes = torch.cat(oracle.lif(currents, each, leak, height=lif.height, initial=lif.initial))
    spikes.backward(noise(*spikes.shape, seed=seed, dtype=spikes.dtype))
    assert current.grad is not None
    assert V.grad is not None
    return {
        "spikes": spikes.detach(),
        "current": current.grad,
        "threshold": V.grad,
        "leak": torch.zeros_like(leak) if leak.grad is None else leak.grad,
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert torch.equal(got["spikes"], expected["spikes"])
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)  # which names the one that differs


# Conventions


@pytest.mark.parametrize(("current", "spike"), [(0.5, 0.0), (0.75, 0.0), (0.7500001, 1.0), (-1.0, 0.0), (9.0, 1.0)])
def test_fires_above_the_threshold_and_not_at_it(current: float, spike: float) -> None:
    assert LIF(0.75)(column(current), 1).item() == spike


def test_a_spike_of_height_threshold_is_worth_its_threshold() -> None:
    assert LIF(0.75, height="threshold")(column(1.0), 1).item() == 0.75


@pytest.mark.parametrize(
    ("currents", "spikes"),
    [
        ([0.75, 0.75, 0.75, 0.75], [0, 1, 1, 0]),  # 0.75 | 1.5 → 0.5 | 1.25 → 0.25 | 1.0, a tie
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 0]),  # 0.5 | 1.0, a tie | 1.5 → 0.5 | 1.0, a tie
        ([2.5, 0.0, 0.0, 0.0], [1, 1, 0, 0]),  # the reset subtracts: 2.5 → 1.5 → 0.5
        ([-1.0, 1.5, 0.75, 0.0], [0, 0, 1, 0]),  # −1 | 0.5 | 1.25 → 0.25 | 0.25: a membrane may be negative
    ],
)
def test_soft_reset(currents: list[float], spikes: list[float]) -> None:
    assert LIF()(column(*currents), 4).flatten().tolist() == spikes


def test_the_leak_comes_before_the_current() -> None:
    # 1.0 (tie) | 0.5 + 0.75 = 1.25 → 0.25 | 0.125 + 0.875 = 1.0 (tie) | 0.5 + 0.625 = 1.125
    assert LIF(1.0, 0.5)(column(1.0, 0.75, 0.875, 0.625), 4).flatten().tolist() == [0, 1, 0, 1]


def test_the_initial_membrane_is_a_fraction_of_the_threshold_and_leaks() -> None:
    current = column(1.0, 1.125)
    assert LIF(2.0, initial=0.5)(current[:1], 1).item() == 0  # 1 + 1: a tie
    assert LIF(2.0, initial=0.5)(current[1:], 1).item() == 1  # 1 + 1.125
    assert LIF(2.0, 0.5, initial=0.5)(current[1:], 1).item() == 0  # 0.5 + 1.125


@pytest.mark.parametrize(
    ("z", "slope"), [(-1.5, 0.0), (-1.0, 0.0), (-0.5, 0.15), (0.0, 0.3), (0.25, 0.225), (1.0, 0.0), (3.0, 0.0)]
)
def test_surrogate(z: float, slope: float) -> None:
    current = column(2.0 * (1 + z)).requires_grad_()
    LIF(2.0)(current, 1).sum().backward()
    assert current.grad is not None
    assert current.grad.item() == pytest.approx(slope / 2.0, abs=1e-12)  # ∂z/∂I = 1/V


def test_gradients_by_hand() -> None:
    # V 1, λ 0.5: U 1.25, z 0.25, spike, U 0.25 | U 0.125 + 0.375 = 0.5, z −0.5. Slopes 0.225 and 0.15.
    lif = LIF(1.0, 0.5)
    current = column(1.25, 0.375).requires_grad_()
    lif(current, 2).sum().backward()
    assert current.grad is not None
    assert lif.leak.grad is not None
    assert lif.threshold.grad is not None
    torch.testing.assert_close(current.grad, column(0.225 + 0.15 * 0.5, 0.15))
    assert lif.leak.grad.item() == pytest.approx(0.15 * 0.25)  # the membrane that the first step left
    assert lif.threshold.grad.item() == pytest.approx(0.225 * -1.25 + 0.15 * (-0.5 - 0.5))  # −U, and −λ by the reset


def test_parameters() -> None:
    lif = LIF(0.7, 0.9)
    assert {name: (p.shape, p.dtype) for name, p in lif.named_parameters()} == {
        "threshold": (torch.Size(), torch.float32),
        "leak": (torch.Size(), torch.float32),
    }


# Against the oracle


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("leak", [1.0, 0.7])
def test_agrees_with_the_oracle(steps: int, height: Any, static: bool, initial: float, leak: float) -> None:
    lif = LIF(0.8, leak, height=height, initial=initial).double()
    current = noise(7 if static else steps * 7, 11, seed=steps)
    assert_same(run(lif, current, steps, static=static), run_oracle(lif, current, steps, static=static), 1e-10)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data())
def test_agrees_with_the_oracle_on_ties(data: st.DataObject) -> None:
    """Eighths, with a leak of 1 or ½, are exact in binary, so that ties are real ties on both sides, and frequent."""
    steps = data.draw(st.integers(1, 5))
    static = data.draw(st.booleans())
    eighths = st.integers(-12, 24).map(lambda n: n / 8)
    size = 4 if static else 4 * steps
    values = data.draw(st.lists(eighths, min_size=size, max_size=size))
    lif = LIF(
        data.draw(st.sampled_from([0.375, 0.5, 1.0, 1.25])),
        data.draw(st.sampled_from([0.5, 1.0])),
        height=data.draw(st.sampled_from(HEIGHTS)),
        initial=data.draw(st.sampled_from([0.0, 0.5])),
    ).double()
    current = torch.tensor(values, dtype=torch.float64)
    assert_same(run(lif, current, steps, static=static), run_oracle(lif, current, steps, static=static), 1e-10)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_the_derivatives_of_a_smooth_function(steps: int, height: Any, static: bool) -> None:
    """Freeze which neurons fire, replace each s by the ramp whose slope is the surrogate, differentiate numerically."""
    lif = LIF(0.8, 0.7, height=height, initial=0.25).double()
    current = noise(3 if static else 3 * steps, 4)
    got = run(lif, current, steps, static=static)
    weights = noise(steps, 3, 4, seed=9).reshape(steps, -1)
    fired = (got["spikes"] > 0).double().reshape(steps, -1)
    V0 = lif.threshold.item()

    def ramp(z: Tensor) -> Tensor:
        inside = z.clamp(-1, 1)
        return 0.3 * (inside - inside * inside.abs() / 2)

    def smooth(current: Tensor, V: Tensor, leak: Tensor) -> Tensor:
        flat = current.reshape(1 if static else steps, -1).expand(steps, -1)
        u = 0.25 * V
        total = torch.zeros((), dtype=torch.float64)
        for t in range(steps):
            u = leak * u + flat[t]
            worth = ramp(u / V - 1) * (V0 if height == "threshold" else 1.0)
            total = total + (weights[t] * (worth + fired[t] * (V if height == "threshold" else 0.0))).sum()
            u = u - V * fired[t]
        return total

    point = (current, lif.threshold.detach().clone(), lif.leak.detach().clone())
    for i, name in enumerate(("current", "threshold", "leak")):
        expected = torch.zeros_like(point[i])
        for j in range(expected.numel()):
            up, down = ([p.clone() for p in point] for _ in range(2))
            up[i].view(-1)[j] += 1e-6
            down[i].view(-1)[j] -= 1e-6
            expected.view(-1)[j] = (smooth(*up) - smooth(*down)) / 2e-6
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-7)


# dtypes


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_float32(steps: int, height: Any, static: bool) -> None:
    lif = LIF(0.8, 0.7, height=height, initial=0.5)
    current = noise(7 if static else steps * 7, 11, seed=steps, dtype=torch.float32)
    currents = [current] * steps if static else list(current.chunk(steps))
    assert oracle.margin(currents, lif.threshold.detach(), lif.leak.detach(), initial=0.5) > 1e-5
    assert_same(run(lif, current, steps, static=static), run_oracle(lif, current, steps, static=static), 1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_bfloat16_is_integrated_in_float32(steps: int, height: Any, static: bool) -> None:
    lif = LIF(0.8, 0.7, height=height)
    current = noise(7 if static else steps * 7, 11, seed=steps, dtype=torch.bfloat16)
    half, full = run(lif, current, steps, static=static), run(lif, current.float(), steps, static=static)
    assert half["spikes"].dtype == half["current"].dtype == torch.bfloat16
    assert torch.equal(half["spikes"], full["spikes"].bfloat16())
    assert half["threshold"].dtype == torch.float32
    torch.testing.assert_close(half["current"].float(), full["current"], rtol=2e-2, atol=2e-2)
    for name in ("threshold", "leak"):
        torch.testing.assert_close(half[name], full[name], rtol=2e-2, atol=0.3)


def test_float64_stays_float64_with_float32_parameters() -> None:
    lif = LIF(0.7, 0.9)
    got, expected = run(lif, noise(6, 5), 3), run_oracle(lif, noise(6, 5), 3)
    assert got["spikes"].dtype == got["current"].dtype == torch.float64
    assert got["threshold"].dtype == got["leak"].dtype == torch.float32
    torch.testing.assert_close(got["current"], expected["current"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["threshold"].double(), expected["threshold"], rtol=1e-6, atol=1e-6)


# Shapes and layouts


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_memory_format_is_kept(layout: torch.memory_format, static: bool, steps: int) -> None:
    lif = LIF(0.8, 0.7).double()
    current = noise(6, 3, 4, 5).contiguous(memory_format=layout)
    got = run(lif, current, steps, static=static)
    assert got["spikes"].is_contiguous(memory_format=layout)
    assert got["current"].is_contiguous(memory_format=layout)
    assert_same(got, run_oracle(lif, noise(6, 3, 4, 5), steps, static=static), 1e-10)


def test_any_strides() -> None:
    lif = LIF(0.8, 0.7).double()
    current = noise(5, 9, 12).permute(2, 0, 1)[::2]
    assert_same(run(lif, current, 3), run(lif, current.contiguous(), 3), 1e-12)


def test_gradients_of_any_strides() -> None:
    lif = LIF(0.8, 0.7).double()
    current = noise(6, 3, 4, 5).requires_grad_()
    weights = noise(6, 3, 4, 5, seed=1)
    (expected,) = torch.autograd.grad((lif(current, 3) * weights).sum(), current)
    (got,) = torch.autograd.grad(lif(current, 3), current, weights.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (expanded,) = torch.autograd.grad(lif(current, 3).sum(), current)  # sum hands back a gradient of stride 0
    (ones,) = torch.autograd.grad(lif(current, 3), current, torch.ones_like(current))
    torch.testing.assert_close(expanded, ones, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 5), (6, 3, 2, 2), (6, 3, 2, 1, 2), (6, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_any_number_of_dimensions(shape: tuple[int, ...], static: bool) -> None:
    lif = LIF(0.8, 0.7).double()
    got = run(lif, noise(*shape), 3, static=static)
    assert got["spikes"].shape == ((18, *shape[1:]) if static else shape)
    assert_same(got, run_oracle(lif, noise(*shape), 3, static=static), 1e-10)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 2, 2), (6, 0)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_in_nothing_out(shape: tuple[int, ...], static: bool, steps: int) -> None:
    got = run(LIF(), noise(*shape), steps, static=static)
    assert got["spikes"].shape == ((shape[0] * steps, *shape[1:]) if static else shape)
    assert got["threshold"].item() == got["leak"].item() == 0


# Promises


def test_a_state_dict_gives_one_threshold_or_one_per_channel() -> None:
    lif = LIF(0.8)
    parameter = lif.threshold
    lif.load_state_dict(LIF(torch.tensor([1.0, 2.0])).state_dict())
    assert lif.threshold is parameter
    assert lif.threshold.tolist() == [1.0, 2.0]
    lif.load_state_dict(dict(lif.named_parameters()))  # itself
    assert lif.threshold.tolist() == [1.0, 2.0]
    lif.load_state_dict({name: value.half() for name, value in LIF(0.5).state_dict().items()})
    assert (lif.threshold.dtype, lif.threshold.tolist()) == (torch.float32, 0.5)


def test_causality() -> None:
    lif = LIF(0.8, 0.7)
    current = noise(5 * 4, 6)
    spikes = lif(current, 5)
    for steps in STEPS:
        assert torch.equal(spikes[: steps * 4], lif(current[: steps * 4], steps))


def test_a_second_call_knows_nothing_of_the_first() -> None:
    lif = LIF(0.8, 0.7)
    current = noise(6, 5)
    first = lif(current, 3)
    lif(noise(10, 5, seed=1), 5)
    assert torch.equal(lif(current, 3), first)
    assert not list(lif.buffers())


def test_images_do_not_meet() -> None:
    lif = LIF(0.8, 0.7)
    current = noise(3, 8, 5)  # [T, B, …]
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    spikes = lif(current.flatten(0, 1), 3).unflatten(0, (3, 8))
    assert torch.equal(lif(current[:, order].flatten(0, 1), 3).unflatten(0, (3, 8)), spikes[:, order])


def test_the_current_is_not_written_to() -> None:
    current = noise(6, 5)
    run(LIF(), current, 3)
    with torch.no_grad():
        LIF()(current, 1).fill_(7)
    assert torch.equal(current, noise(6, 5))


@pytest.mark.parametrize("frozen", ["current", "threshold", "leak"])
@pytest.mark.parametrize("height", HEIGHTS)
def test_gradients_where_one_is_not_wanted(frozen: str, height: Any) -> None:
    lif = LIF(0.8, 0.7, height=height).double()
    current = noise(6, 5).requires_grad_()
    tensors = {"current": current, "threshold": lif.threshold, "leak": lif.leak}
    expected = run(lif, current, 3)
    lif.zero_grad()
    tensors[frozen].requires_grad_(False)
    spikes = lif(current, 3)
    spikes.backward(noise(6, 5, seed=9))
    for name, tensor in tensors.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_no_graph_without_gradients() -> None:
    current = noise(6, 5)
    expected = LIF(0.8)(current, 3).detach()
    with torch.no_grad():
        assert torch.equal(LIF(0.8)(current, 3), expected)
    with torch.inference_mode():
        assert torch.equal(LIF(0.8)(current, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_backward_keeps_nothing_but_the_current(dtype: torch.dtype, static: bool, steps: int) -> None:
    current = noise(steps * 8, 100, dtype=dtype).requires_grad_()
    saved: dict[int, int] = {}  # by storage: what is saved twice is held once

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LIF(0.8, 0.7)(current, steps, static=static)
    assert sum(saved.values()) <= current.numel() * current.element_size() + 64


@pytest.mark.parametrize("static", [False, True])
def test_a_layer_too_large_for_one_piece(static: bool) -> None:
    lif = LIF(0.8, 0.7, height="threshold").double()
    current = noise(1 if static else 3, 70_001)
    assert_same(run(lif, current, 3, static=static), run_oracle(lif, current, 3, static=static), 1e-8)


# One threshold per channel


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 2), (4, 30, 700), (4, 3, 2, 2)])
def test_a_threshold_per_channel(steps: int, height: Any, static: bool, shape: tuple[int, ...]) -> None:
    lif = LIF(torch.tensor([0.5, 0.8, 1.25, 2.0]), 0.7, height=height, initial=0.25).double()
    current = noise((1 if static else steps) * 2, *shape)
    assert_same(run(lif, current, steps, static=static), run_oracle(lif, current, steps, static=static), 1e-9)
    if len(shape) == 3:
        last = current.contiguous(memory_format=torch.channels_last)
        assert_same(run(lif, last, steps, static=static), run_oracle(lif, current, steps, static=static), 1e-9)
        assert lif(last, steps, static=static).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threshold", [torch.tensor(0.8), torch.tensor([0.5, 0.8, 1.25])])
@pytest.mark.parametrize("initial", [0.0, 0.25])
@pytest.mark.parametrize("layouts", ["cc", "cl", "lc", "ll"])
def test_going_on_is_one_long_call(threshold: Tensor, initial: float, layouts: str) -> None:
    """5 steps as 2 and 3, in any memory format."""
    lif = LIF(threshold, 0.7, height="threshold", initial=initial).double()
    current = noise(5 * 2, 3, 4, 2)
    first, second = (
        part.contiguous(memory_format=torch.channels_last if layout == "l" else torch.contiguous_format)
        for part, layout in zip((current[:4], current[4:]), layouts, strict=True)
    )
    early, left = lif.go_on(first, 2, None)
    late, left = lif.go_on(second, 3, left)
    assert torch.equal(torch.cat([early, late]), lif(current, 5))
    assert late.is_contiguous(memory_format=torch.channels_last) == (layouts[1] == "l")
    assert left.shape == (2, 3, 4, 2)
    still = lif.go_on(current[:2], 2, None, static=True)[0]
    assert torch.equal(still, lif(current[:2], 2, static=True))


def test_as_many_thresholds_as_channels() -> None:
    lif = LIF(torch.ones(3))
    assert "3 of mean 1" in repr(lif)
    for shape in [(2, 6), (3,), (2, 6, 3, 3)]:
        with pytest.raises(ValueError, match=r"3 thresholds, one per channel \(dimension 1\), cannot serve"):
            lif(torch.zeros(shape))


# Compiled


def compile_tests(test: Callable[..., None]) -> Callable[..., None]:
    marks = [
        pytest.mark.usefixtures("_compiler"),
        pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch hides it itself, unless it is an error
        pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),  # torch, on torch
    ]
    for mark in marks:
        test = mark(test)
    return test


@pytest.fixture
def _compiler() -> Iterator[None]:
    """Makes errors of graph breaks and of the recompile limit, after which torch would quietly run eagerly."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler on PATH")
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@compile_tests
@pytest.mark.parametrize(
    ("steps", "height", "static"),
    [
        (1, "threshold", True),
        (2, "unit", False),
        (2, "threshold", True),
        (3, "unit", True),
        (4, "threshold", False),
        (5, "threshold", False),
        (5, "unit", True),
    ],
)
def test_compiled_agrees_with_eager(steps: int, height: Any, static: bool) -> None:
    """Slow: seconds per case. One kernel each way serves every shape: to compile again after the first is an error."""
    lif = LIF(0.8, 0.7, height=height)
    for i, shape in enumerate([(2, 5, 4, 3), (3, 17), (1, 2, 8, 8)]):
        current = noise(*((1 if static else steps) * shape[0], *shape[1:]), seed=1, dtype=torch.float32)
        currents = [current] * steps if static else list(current.chunk(steps))
        assert oracle.margin(currents, lif.threshold.detach(), lif.leak.detach()) > 1e-6
        eager = run(lif.train(), current, steps, static=static)
        with compiled(True), torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(run(lif, current, steps, static=static), eager, 1e-5)
            with torch.no_grad():
                assert torch.equal(lif.eval()(current, steps, static=static), eager["spikes"])


@compile_tests
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_with_a_threshold_per_channel(layout: torch.memory_format) -> None:
    for i, (C, side) in enumerate([(4, 5), (6, 3)]):
        lif = LIF(torch.linspace(0.5, 2, C), 0.7, height="threshold", initial=0.5)
        current = noise(3 * 2, C, side, side, dtype=torch.float32).to(memory_format=layout)
        eager = run(lif, current, 3)
        with compiled(True), torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(run(lif, current, 3), eager, 1e-5)
            early, left = lif.go_on(current[:2], 1, None)
            assert torch.equal(torch.cat([early, lif.go_on(current[2:], 2, left)[0]]), eager["spikes"])


@compile_tests
def test_compiled_compiles() -> None:
    torch.compiler.reset()
    with compiled(True):
        run(LIF(), noise(4, 5), 2)
        assert counters["stats"]["unique_graphs"] == 2  # forward and backward
        with compiled(False):
            run(LIF(), noise(6, 5), 3)
    assert counters["stats"]["unique_graphs"] == 2


# Mistakes


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("static", [False, True])
def test_refuses_fewer_than_one_step(steps: int, static: bool) -> None:
    with pytest.raises(ValueError, match="step"):
        LIF()(noise(4, 3), steps, static=static)


def test_refuses_rows_that_are_no_multiple_of_the_steps() -> None:
    with pytest.raises(ValueError, match="step"):
        LIF()(noise(7, 3), 2)
    assert LIF()(noise(7, 3), 2, static=True).shape == (14, 3)


def test_refuses_an_unknown_height() -> None:
    wrong: Any = "volt"
    with pytest.raises(ValueError, match="volt"):
        LIF(height=wrong)


@pytest.mark.parametrize("threshold", [0.0, -1.0, torch.tensor([1.0, 0.0])])
def test_refuses_a_threshold_that_is_not_positive(threshold: float | Tensor) -> None:
    with pytest.raises(ValueError, match="threshold"):
        LIF(threshold)


@pytest.mark.parametrize("leak", [0.0, -0.5, 1.5])
def test_refuses_a_leak_outside_0_to_1(leak: float) -> None:
    with pytest.raises(ValueError, match="leak"):
        LIF(1.0, leak)
