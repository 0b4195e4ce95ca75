"""The search finds what fits and is fastest, and exchanges cost what their volumes say."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import make_config
from llmtrain.model.cost import block_matrix_parameters, parameter_count
from llmtrain.planning.budget import compute_optimal
from llmtrain.planning.communication import BASE_S, LINK_SHARE, NVLINK_HOP_S, links_between
from llmtrain.planning.compute import Work, clock_at, compute_seconds
from llmtrain.planning.hardware import GPUS, find_gpu
from llmtrain.planning.layout import (
    CHECKPOINTING,
    ENGINES,
    TIE,
    Layout,
    Run,
    engines_for,
    fastest,
    fits,
    largest_micro_batch,
    micro_batches,
    outcome_of,
    why,
)
from llmtrain.planning.step_time import Exchange, step_seconds

H100 = GPUS["h100"]
MODEL_1B = make_config({"model": {"preset": "1.3b", "vocab_size": 50_304}}).model
RUN = Run(MODEL_1B, 2048, 512, "adamw", "bf16", "auto", H100, 8)


def test_a_ring_in_a_machine_costs_its_volume_and_its_hops() -> None:
    links = links_between(H100, 8, 8)
    expected = BASE_S + 7 * NVLINK_HOP_S + 7 / 8 * 1e9 / (450e9 * LINK_SHARE)
    assert links.gather_s(1e9) == pytest.approx(expected)
    assert links.all_reduce_s(1e9) == pytest.approx(2 * expected)
    assert links_between(H100, 1, 8).all_reduce_s(1e9) == 0


@given(st.sampled_from(sorted(GPUS)), st.integers(1, 12), st.floats(1, 1e12))
def test_more_ranks_and_more_bytes_never_take_less(kind: str, power: int, size: float) -> None:
    few, many = (links_between(GPUS[kind], 2**ranks, 8) for ranks in (power, power + 1))
    assert few.gather_s(size) <= many.gather_s(size)
    assert many.gather_s(size) <= many.gather_s(2 * size)
    assert many.all_reduce_s(size) <= 2 * many.gather_s(size), "a tree is taken where it is faster"


def test_a_slow_network_decides_between_machines() -> None:
    fast, slow = (links_between(H100, 64, 8, network) for network in (None, 1e9))
    assert slow.gather_s(1e9) > 10 * fast.gather_s(1e9)
    assert links_between(H100, 8, 8, 1e9).gather_s(1e9) == links_between(H100, 8, 8).gather_s(1e9)


def test_volumes_are_those_of_zero() -> None:
    """With links so slow that nothing hides, and no latency to speak of: 2P for DDP, 3P for the stages."""
    slow = replace(H100, link=1e8)
    work = Work(MODEL_1B, 2048, 1)
    size = 4 * parameter_count(MODEL_1B, 2048) * 7 / 8 / (1e8 * LINK_SHARE)
    links = links_between(slow, 8, 8)
    for engine, volumes in (("ddp", 2), ("zero1", 3), ("zero2", 3), ("zero3", 3)):
        step = step_seconds(slow, links, engine, work, exchange=Exchange(reuses=0))  # type: ignore[arg-type]
        assert step.exchanged + step.hidden == pytest.approx(volumes * size, rel=0.01), engine
    twice = step_seconds(slow, links, "zero2", work, accumulation=2)
    assert twice.exchanged == pytest.approx(5 * size, rel=0.01), "stage 2 exchanges gradients for each micro-batch"


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_a_step_add_up(engine: str) -> None:
    outcome = outcome_of(RUN, Layout(engine, 1 if engine == "single" else 16, 4, "full"))
    parts = {name: seconds for name, seconds in asdict(outcome.step).items() if name != "hidden"}
    assert all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(outcome.step.total)
    assert outcome.tokens_per_second == pytest.approx(512 * 2048 / outcome.step.total)


def test_recomputing_costs_time_and_compiling_saves_it() -> None:
    plain, selective, full = (
        compute_seconds(H100, Work(MODEL_1B, 2048, 8, checkpointing=kind)).total for kind in CHECKPOINTING
    )
    assert plain < selective < full < 4 / 3 * plain
    assert compute_seconds(H100, Work(MODEL_1B, 2048, 8, compiled=True)).total < plain
    slower = compute_seconds(H100, Work(MODEL_1B, 2048, 8), clock_at(350, 700))
    assert slower.products == pytest.approx(compute_seconds(H100, Work(MODEL_1B, 2048, 8)).products * 2 ** (1 / 3))


def test_a_small_model_waits_for_the_host() -> None:
    tiny = make_config({"model": {"preset": "1m", "vocab_size": 512}}).model
    seconds = compute_seconds(H100, Work(tiny, 64, 1))
    assert seconds.total == seconds.host > 3 * (seconds.products + seconds.attention + seconds.memory)


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_largest_micro_batch_fits_and_one_more_does_not(engine: str, checkpointing: str) -> None:
    largest = largest_micro_batch(RUN, engine, 8, checkpointing)
    assert largest > 0
    assert fits(RUN, Layout(engine, 8, largest, checkpointing))
    assert not fits(RUN, Layout(engine, 8, largest + 1, checkpointing))


def test_nothing_that_fits_is_faster_than_the_fastest() -> None:
    best = fastest(RUN, 8)
    assert best is not None
    for engine, checkpointing, micro in product(engines_for(8), CHECKPOINTING, micro_batches(RUN, 8)):
        outcome = outcome_of(RUN, Layout(engine, 8, micro, checkpointing))
        assert not outcome.fits or outcome.tokens_per_second <= best.tokens_per_second
    assert best.layout.engine == "ddp"
    assert why(RUN, best).startswith("ddp: ")


def test_a_model_too_large_for_ddp_is_cut_and_the_reason_is_said() -> None:
    model = make_config({"model": {"preset": "70b", "vocab_size": 50_304}}).model
    run = replace(RUN, model=model, global_batch=1024)
    best = fastest(run, 256)
    assert best is not None
    assert best.layout.engine == "zero3"
    assert "ddp needs 1," in why(run, best)
    assert fastest(run, 1) is None or fastest(run, 1).layout.engine == "zero3-offload"  # type: ignore[union-attr]


def test_an_engine_that_is_slower_by_less_than_the_error_is_not_called_worse() -> None:
    model = make_config({"model": {"preset": "7b", "vocab_size": 50_304}}).model
    run = replace(RUN, model=model, global_batch=1024, seq_len=8192)
    best, other = fastest(run, 64, ("zero1", "zero2")), fastest(run, 64, ("zero1",))
    assert best is not None and other is not None and best.layout.engine == "zero2"
    slower = 1 - other.tokens_per_second / best.tokens_per_second
    assert 0 < slower < TIE
    assert f"zero1 fits, and is {slower:.0%} slower, less than the formulas' error" in why(run, best)


def test_zero3_is_compiled_where_it_recomputes() -> None:
    kinds = {kind: outcome_of(RUN, Layout("zero3", 8, 1, kind)) for kind in CHECKPOINTING}
    eager = {kind: outcome_of(replace(RUN, compile=False), Layout("zero3", 8, 1, kind)) for kind in CHECKPOINTING}
    faster = {kind: kinds[kind].tokens_per_second > eager[kind].tokens_per_second for kind in CHECKPOINTING}
    assert RUN.compile == "auto" and faster == {"none": False, "selective": True, "full": True}
    assert kinds["none"] == eager["none"]


def test_who_asks_for_compiled_blocks_gets_them_with_what_they_hold() -> None:
    """Under ZeRO-3 without recomputation: faster, and the casts of all blocks on every rank."""
    layout = Layout("zero3", 8, 1, "none")
    left, asked = outcome_of(RUN, layout), outcome_of(replace(RUN, compile=True), layout)
    assert asked.tokens_per_second > left.tokens_per_second
    assert asked.memory.casts == 2 * MODEL_1B.layers * block_matrix_parameters(MODEL_1B)
    assert asked.memory.peak > left.memory.peak and asked.memory.activations < left.memory.activations


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_leave_room_for_larger_micro_batches(checkpointing: str) -> None:
    compiled, eager = (
        largest_micro_batch(replace(RUN, compile=how), "ddp", 8, checkpointing) for how in ("auto", False)
    )
    assert compiled > eager


def test_compute_optimal_is_chinchilla() -> None:
    """Hoffmann et al. 2022, table 3: 67B parameters and 1.5T tokens for 5.76e23 FLOPs."""
    optimum = compute_optimal(5.76e23)
    assert optimum.parameters == pytest.approx(67e9, rel=0.05)
    assert optimum.tokens == pytest.approx(1.5e12, rel=0.1)


def test_gpus_are_found_by_either_name_in_any_case() -> None:
    assert find_gpu("H100") is find_gpu("nvidia h100 80gb hbm3") is H100
