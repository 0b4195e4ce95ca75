from __future__ import annotations

import math

import pytest

from llmtrain.observe import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (873.4, "873"), (999.6, "1.00k"), (1234.5, "1.23k"), (12_345, "12.3k"), (99_960, "100k")],
        *[(412_345, "412k"), (999_600, "1.00M"), (1.5e9, "1.50G"), (2.5e12, "2.50T"), (1e16, "10000T")],
        *[(math.inf, "inf"), (math.nan, "nan")],
    ],
)
def test_compact_numbers_have_three_digits(value, text):
    assert formats.compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (750, "0:12:30"), (90_061, "1d 1:01:01"), (math.inf, "?"), (math.nan, "?")],
)
def test_durations(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.29, "29 %"), (0.999, "99 %"), (1, "100 %"), (math.nan, "? %")]
)
def test_only_what_is_complete_is_100_percent(share, text):
    assert formats.percent(share) == text


@pytest.mark.parametrize(
    ("share", "text"), [(-0.3487, "-34.9 %"), (-0.00996, "-0.996 %"), (-0.0002, "-0.020 %"), (2.5, "+250.0 %")]
)
def test_a_change_is_told_however_small_it_is(share, text):
    assert formats.change(share) == text


def test_numbers_of_a_run():
    assert (formats.count(1200), formats.loss(2.1342), formats.rate(3e-4)) == ("1,200", "2.134", "3.0e-04")
    assert (formats.norm(0.51234), formats.norm(1234.0), formats.norm(3e-7)) == ("0.512", "1.23e+03", "3e-07")


def test_text_cannot_command_the_terminal():
    assert formats.printable("tab\tline\nö 日本 🙂") == "tab\tline\nö 日本 🙂"
    assert formats.printable("\x1b[2J\r\x07\x9b\udc80") == "�[2J����"
