from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmtrain.observe.record import COLUMNS, Record, SourceRecord


def test_json_gives_the_record_back(make_record):
    record = make_record(7, val_loss=2.25, val_accuracy=0.5, mfu=0.38, train_loss=1 / 3)
    assert Record.from_json(record.to_json()) == record


def test_json_is_one_strict_line_with_every_column(make_record, strict_json):
    line = make_record(7).to_json()
    assert "\n" not in line
    assert tuple(strict_json(line)) == COLUMNS


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_json_and_nan_when_read(make_record, strict_json, bad):
    record = make_record(7, train_loss=bad, grad_norm=bad, val_loss=bad)
    values = strict_json(record.to_json())
    assert values["train_loss"] is values["grad_norm"] is values["val_loss"] is None
    back = Record.from_json(record.to_json())
    assert math.isnan(back.train_loss) and math.isnan(back.grad_norm)
    assert back.val_loss is None


def test_perplexity_is_exp_of_the_loss_and_infinite_rather_than_an_error(make_record):
    assert make_record(1, train_loss=2.0).perplexity == math.exp(2.0)
    assert make_record(1, train_loss=800.0).perplexity == math.inf
    assert math.isnan(make_record(1, train_loss=math.nan).perplexity)


def test_a_record_of_a_newer_or_older_version_is_read(make_record):
    record = make_record(7)
    newer = record.to_json().replace("{", '{"new_field": 1, ', 1)
    assert Record.from_json(newer) == record
    older = record.to_json().replace('"memory_gb": 1.25, ', "")
    assert math.isnan(Record.from_json(older).memory_gb)
    assert replace(Record.from_json(older), memory_gb=1.25) == record


def test_sources_come_back_also_those_of_another_version(make_record):
    record = make_record(7, sources={"web": SourceRecord(1.5, 960, 3.25, None, None)})
    line = record.to_json()
    assert Record.from_json(line) == record
    assert Record.from_json(line.replace('"train_loss": 3.25', '"colour": 1')).sources == {
        "web": SourceRecord(1.5, 960)
    }


@pytest.mark.parametrize("line", ["", "[1]", "{}", '{"step": 1', '{"step": null, "epoch": 0, "tokens": 1}'])
def test_what_is_no_record_is_refused(line):
    with pytest.raises(ValueError):
        Record.from_json(line)
