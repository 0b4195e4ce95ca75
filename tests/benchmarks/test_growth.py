"""benchmarks.growth: its axes are a decade long, and its exponents are those of the laws behind the numbers."""

from __future__ import annotations

import pytest

from benchmarks import growth
from llmtrain.model.cost import parameter_count


@pytest.mark.parametrize("axis", growth.AXES)
def test_each_axis_spans_a_decade_and_moves_nothing_else(axis: str) -> None:
    configs = [growth.made(axis, size) for size in growth.AXES[axis]]
    measures = {
        "parameters": [parameter_count(config.model, config.data.seq_len) for config in configs],
        "length": [config.data.seq_len for config in configs],
        "batch": [config.training.micro_batch_size for config in configs],
    }
    assert measures[axis][-1] >= 10 * measures[axis][0]
    assert all(len(set(values)) == 1 for name, values in measures.items() if name != axis)


def test_the_exponent_of_a_power_law_and_its_spread() -> None:
    sizes = list(growth.AXES["length"])
    rounds = {growth.name(("length", size)): [3e-3 * size**1.5, 2e-3 * size**2] for size in sizes}
    row = {size: {"ms median": size**1.75, "MB of tensors": 5.0 * size, "MB formula": size} for size in sizes}
    rows = [{**row[size], "size": size, "GFLOP": size**1.2, "MB of the process": size} for size in sizes]
    time, memory, _ = growth.fitted("length", rows, rounds)
    assert (time["low"], time["exponent"], time["high"]) == pytest.approx((1.5, 1.75, 2.0))
    assert (memory["low"], memory["exponent"], memory["formula"]) == pytest.approx((1.0, 1.0, 1.0))
    assert time["formula"] == pytest.approx(1.2) and time["off the line, %"] == pytest.approx(0.0, abs=1e-6)


def test_a_sum_of_two_laws_is_off_the_line() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert growth.off_the_line(sizes, [size + size**2 for size in sizes]) > 2
    assert growth.exponent(sizes, [size + size**2 for size in sizes]) == pytest.approx(1.7, abs=0.15)
