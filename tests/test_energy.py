"""Energy models: the paper's figures, sums, and the effect of memory."""

import pytest

from unitstep import energy


def stage(*, steps=1, rate=0.129, first=1_769_472, rest=336_633_856, weights=33_000_000):
    """VGG16's operations, in two layers."""
    common = {"macs": rest, "multiplied": 0, "additions_by_rate": rate * rest, "additions": 0.9 * rate * rest}
    layers = [
        {"name": "a", "input": "analog", "static": True, "macs": first, "multiplied": first, "additions": 0.0,
         "additions_by_rate": 0.0, "weights": 1728, "values": 3072},
        {"name": "b", "input": "binary", "static": False, "weights": weights, "values": 276_480, **common},
    ]  # fmt: skip
    return {"steps": steps, "spikes_per_neuron": rate, "operations": layers}


@pytest.mark.parametrize(("rate", "times"), [(0.129, 33), (0.178, 25)])
def test_the_rates_that_the_papers_ratios_imply(rate, times):
    found = energy.total(stage(rate=rate), energy.MODELS["paper"])
    assert found.cnn_fp32 / found.snn == pytest.approx(times, rel=0.01)
    share = 1_769_472 / 338_403_328
    assert found.cnn_fp32 / found.snn == pytest.approx(4.6 / (share * 4.6 + (1 - share) * 0.9 * rate))


@pytest.mark.parametrize("model", energy.MODELS.values(), ids=energy.MODELS)
def test_a_network_is_the_sum_of_its_layers(model):
    found = energy.total(stage(), model)
    layers = energy.per_layer(stage(), model)
    for part in ("cnn_fp32", "cnn_int8", "fixed", "spikes", "snn"):
        assert getattr(found, part) == pytest.approx(sum(getattr(layer, part) for layer in layers))


@pytest.mark.parametrize("model", energy.MODELS.values(), ids=energy.MODELS)
@pytest.mark.parametrize("rival", ["cnn_fp32", "cnn_int8"])
def test_at_the_break_even_rate_the_energies_are_equal(model, rival):
    found = energy.total(stage(), model)
    rate = energy.break_even(stage(), found, getattr(found, rival))
    if rate is None:
        assert found.fixed >= getattr(found, rival)
    else:
        there = energy.total(stage(rate=rate), model)
        assert there.snn == pytest.approx(getattr(there, rival))


def test_memory_counts_every_pass_and_membranes_above_one_timestep():
    one, five = (energy.total(stage(steps=steps), energy.MODELS["memory"]) for steps in (1, 5))
    compute = energy.total(stage(), energy.MODELS["int8"])
    weights, image, spikes = 33_000_000 * energy.DRAM, 3072 * energy.SRAM, 276_480 / 4 * energy.SRAM
    first = 1728 * energy.DRAM
    assert one.fixed - compute.fixed == pytest.approx(weights + image + spikes + first)
    membranes = 5 * 276_480 * 8 * energy.SRAM
    assert five.fixed - compute.fixed == pytest.approx(5 * (weights + spikes) + image + first + membranes)
    assert one.cnn_fp32 > one.cnn_int8 > one.snn


def test_behind_a_pool_a_cnn_reads_what_the_pool_made_of_it():
    whole, pooled = stage(), stage()
    pooled["operations"][1]["inputs"] = 276_480 // 4
    before, after = (energy.total(each, energy.MODELS["memory"]) for each in (whole, pooled))
    assert before.snn == after.snn
    assert before.cnn_int8 - after.cnn_int8 == pytest.approx(2 * 276_480 * 3 / 4 * energy.SRAM)
    assert before.cnn_fp32 - after.cnn_fp32 == pytest.approx(8 * 276_480 * 3 / 4 * energy.SRAM)


def test_small_networks_stay_on_the_chip():
    small = energy.total(stage(weights=1000), energy.MODELS["memory"])
    compute = energy.total(stage(weights=1000), energy.MODELS["int8"])
    assert small.fixed - compute.fixed == pytest.approx((1000 + 1728 + 3072 + 276_480 / 4) * energy.SRAM)


def test_own_figures():
    found = energy.total(stage(), energy.own(2, 0.5))
    assert found.snn == pytest.approx(2 * 1_769_472 + 0.5 * 0.9 * 0.129 * 336_633_856)
    with pytest.raises(ValueError, match="above 0"):
        energy.own(-1, 1)


def test_what_was_not_counted_costs_nothing_known():
    assert energy.per_layer({"steps": 1, "operations": []}, energy.MODELS["paper"]) == []
    assert energy.break_even({"spikes_per_neuron": 0.0}, energy.Energy(), 1.0) is None
