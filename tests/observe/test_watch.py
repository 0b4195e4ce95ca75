from __future__ import annotations

import json
import math

import pytest

from llmtrain.observe.watch import Watch


def warnings(watch, records):
    return {record.step: found for record in records if (found := watch.check(record))}


def norms(make_record, *values):
    return [make_record(step, grad_norm=value) for step, value in enumerate(values, 1)]


def evaluations(make_record, vals, trains):
    return [
        make_record(step, val_loss=val, train_loss=train)
        for step, (val, train) in enumerate(zip(vals, trains, strict=True), 1)
    ]


def slowest(make_record, *ranks, spread_s=0.3):
    return [
        make_record(step, slowest_rank=rank, step_time_spread_s=spread_s, step_time_s=1.0)
        for step, rank in enumerate(ranks, 1)
    ]


def test_a_rank_that_is_always_the_slowest_is_named_once_with_what_it_costs(make_record):
    watch = Watch()
    found = warnings(watch, slowest(make_record, *[3] * 30))
    assert list(found) == [10]
    assert "rank 3 " in found[10][0] and "at least 0.3 s of 1 s" in found[10][0]
    # It gets a little better, and then another one is slow.
    assert warnings(watch, slowest(make_record, *[3] * 30, spread_s=0.06)) == {}
    assert "rank 0 " in warnings(watch, slowest(make_record, *[0] * 30))[10][0]


def test_ranks_that_are_slow_in_turn_or_by_little_are_no_stragglers(make_record):
    assert warnings(Watch(), slowest(make_record, *[3, 3, 3, 3, 1] * 10)) == {}
    assert warnings(Watch(), slowest(make_record, *[3] * 30, spread_s=0.09)) == {}
    assert warnings(Watch(), slowest(make_record, *[None] * 30, spread_s=None)) == {}


def test_a_straggler_is_counted_on_after_a_resume(make_record):
    first, second = Watch(), Watch()
    assert warnings(first, slowest(make_record, *[3] * 9)) == {}
    second.load(json.loads(json.dumps(first.state())))
    assert list(warnings(second, slowest(make_record, 3, 3))) == [1]


def test_a_healthy_run_gives_no_warning(make_record):
    records = [
        make_record(s, grad_norm=1 + 8 * math.exp(-s / 10), val_loss=2 + 8.1 / (s + 1) if s % 5 == 0 else None)
        for s in range(1, 1001)
    ]
    assert warnings(Watch(), records) == {}


def test_each_level_of_the_gradient_norm_warns_once_on_the_way_up(make_record):
    found = warnings(Watch(), norms(make_record, 1, 11, 15, 101, 150, 90, 1001, 5000, 200, 11))
    assert list(found) == [2, 4, 7]
    for step, level in ((2, "over 10"), (4, "over 100"), (7, "over 1000")):
        (text,) = found[step]
        assert f"{level}:" in text and "lower optimizer.lr" in text


def test_a_jump_over_several_levels_is_one_warning(make_record):
    found = warnings(Watch(), norms(make_record, 1, 500, 20, 30))
    assert list(found) == [2]
    assert len(found[2]) == 1 and "gradient norm 500 is over 100:" in found[2][0]


def test_a_norm_that_hovers_at_a_limit_does_not_warn_again_until_it_has_clearly_fallen(make_record):
    assert list(warnings(Watch(), norms(make_record, 11, 9, 11, 6, 12, 4.9, 11))) == [1, 7]


def test_a_norm_that_is_not_finite_warns(make_record):
    found = warnings(Watch(), norms(make_record, 1, math.nan, math.inf, 1, math.inf))
    assert list(found) == [2, 5] and "not finite" in found[2][0]


def test_a_vanishing_norm_warns_once_until_it_has_recovered(make_record):
    found = warnings(Watch(), norms(make_record, 1e-3, 9e-7, 1e-8, 1.5e-6, 9e-7, 1e-3, 0.0))
    assert list(found) == [2, 7]
    assert "gradient norm 9e-07 is under 1e-06" in found[2][0] and "llmtrain doctor" in found[2][0]


def test_validation_far_above_training_warns_once_until_the_gap_has_closed(make_record):
    vals, trains = [2.5, 2.51, 2.6, 2.45, 2.52, 2.3, 2.6], [2.0] * 7
    found = warnings(Watch(), evaluations(make_record, vals, trains))
    assert list(found) == [2, 7]
    assert "0.51 nats above training loss 2.000 (overfitting)" in found[2][0]


def test_validation_that_rises_while_training_falls_warns_and_names_the_best(make_record):
    vals = [2.50, 2.30, 2.31, 2.33, 2.36, 2.40, 2.45]
    trains = [2.60, 2.40, 2.35, 2.30, 2.25, 2.20, 2.15]
    found = warnings(Watch(), evaluations(make_record, vals, trains))
    assert list(found) == [5]
    assert "risen 3 times in a row (2.300 → 2.360)" in found[5][0]
    assert "best so far is 2.300 at step 2" in found[5][0]


@pytest.mark.parametrize(
    ("vals", "trains"),
    [
        ([2.3, 2.31, 2.33, 2.32, 2.34, 2.36], [2.4, 2.35, 2.3, 2.25, 2.2, 2.15]),  # never three times in a row
        ([2.3, 2.31, 2.33, 2.36, 2.4], [2.3, 2.31, 2.33, 2.36, 2.4]),  # training rises as well: not overfitting
        ([2.3, 2.3, 2.3, 2.3, 2.3], [2.4, 2.35, 2.3, 2.25, 2.2]),  # flat
    ],
)
def test_other_movements_of_validation_do_not_warn(make_record, vals, trains):
    assert warnings(Watch(), evaluations(make_record, vals, trains)) == {}


def test_training_is_judged_by_its_mean_since_the_last_evaluation(make_record):
    records, step = [], 0
    for val, mean in ((2.3, 2.4), (2.31, 2.3), (2.32, 2.2), (2.33, 2.1)):
        for offset in (-0.4, 0.0, 0.4):  # the record of the evaluation itself is always a high one
            step += 1
            records.append(make_record(step, train_loss=mean + offset, val_loss=val if offset == 0.4 else None))
    assert list(warnings(Watch(), records)) == [12]


def test_losses_that_are_not_finite_say_nothing_about_overfitting(make_record):
    nan = math.nan
    records = evaluations(make_record, [nan, 2.3, 2.4, nan, 2.5, 2.6, math.inf], [2.2, nan, 2.2, 2.1, nan, nan, 2.0])
    watch = Watch()
    assert warnings(watch, records) == {}
    json.dumps(watch.state(), allow_nan=False)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_watch_loaded_from_its_state_goes_on_as_if_never_interrupted(make_record, cut):
    vals = [2.5, 2.3, 2.31, 2.33, 2.36, 2.40, 2.7, 2.9, 2.2, 2.3, 2.9, 3.0]
    records = [
        make_record(step, val_loss=val, train_loss=2.4 - step / 50, grad_norm=norm)
        for step, (val, norm) in enumerate(zip(vals, [1, 20, 200, 30, 1, 20, 1e-7, 1e-7, 1, 2, 30, 4], strict=True), 1)
    ]
    whole = warnings(Watch(), records)
    first, second = Watch(), Watch()
    found = warnings(first, records[:cut])
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert found | warnings(second, records[cut:]) == whole
    assert len(whole) > 4
