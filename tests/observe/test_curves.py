from __future__ import annotations

import math
import random

import numpy as np
import pytest
from matplotlib.image import imread

from llmtrain.errors import UserError
from llmtrain.observe.curves import BY_EPOCH, CURVE, plot_run, thin
from llmtrain.observe.metrics import MetricsLog

BLUE, RED, GREEN = (31, 119, 180), (214, 39, 40), (44, 160, 44)


def write(run_dir, records):
    log = MetricsLog(run_dir, csv=False, resume_step=0)
    for record in records:
        log.log(record)
    log.close()


def pixels_of(image, colour) -> np.ndarray:
    """(rows, columns) of the pixels of exactly this colour."""
    return np.argwhere((np.round(image[..., :3] * 255) == colour).all(-1))


def test_training_is_blue_and_validation_red_above_the_learning_rate_in_green(tmp_path, make_record):
    write(tmp_path, [make_record(step, val_loss=2.5 if step % 20 == 0 else None) for step in range(1, 201)])
    assert plot_run(tmp_path) == [tmp_path / CURVE, tmp_path / BY_EPOCH]
    curve = imread(tmp_path / CURVE)
    blue, red, green = (pixels_of(curve, colour) for colour in (BLUE, RED, GREEN))
    assert len(blue) > 500 and len(red) > 500 and len(green) > 500
    assert max(blue[:, 0].max(), red[:, 0].max()) < green[:, 0].min()
    by_epoch = imread(tmp_path / BY_EPOCH)
    assert len(pixels_of(by_epoch, BLUE)) > 100 and len(pixels_of(by_epoch, RED)) > 100


RATES = {
    "zero": lambda step: 0.0,
    "warmup from zero": lambda step: (step - 1) * 1e-3,
    "constant": lambda step: 3e-4,
    "falling for ever": lambda step: 10.0**-step,
}


@pytest.mark.slow
@pytest.mark.parametrize(("records", "rate"), [(1, "constant"), (50_000, "warmup from zero"), *((3, r) for r in RATES)])
def test_any_length_and_any_learning_rate_can_be_drawn(tmp_path, make_record, records, rate):
    write(tmp_path, [make_record(step, learning_rate=RATES[rate](step)) for step in range(1, records + 1)])
    plot_run(tmp_path)
    assert len(pixels_of(imread(tmp_path / CURVE), GREEN)) > 20


def test_a_run_without_records_gets_no_picture(tmp_path):
    assert plot_run(tmp_path) == []
    write(tmp_path, [])
    assert plot_run(tmp_path) == []
    assert not list(tmp_path.glob("*.png"))


def test_numbers_that_are_not_finite_are_left_out(tmp_path, make_record):
    bad = {3: math.nan, 5: math.inf, 9: -math.inf}
    write(tmp_path, [make_record(s, train_loss=bad.get(s, 2.0), learning_rate=bad.get(s, 1e-3)) for s in range(1, 10)])
    assert len(plot_run(tmp_path)) == 2


def test_a_run_that_diverged_at_once_can_be_drawn(tmp_path, make_record):
    nan = math.nan
    write(tmp_path, [make_record(step, train_loss=nan, val_loss=nan, learning_rate=nan) for step in range(1, 4)])
    assert plot_run(tmp_path) == []
    write(tmp_path, [make_record(step, train_loss=nan, val_loss=nan) for step in range(1, 4)])
    assert len(plot_run(tmp_path)) == 2


@pytest.mark.parametrize("name", ["cost in $ and $", r"\frac{", "运行", "a" * 300])
def test_any_run_name_can_be_a_title(tmp_path, make_record, name, recwarn):
    write(tmp_path, [make_record(1)])
    assert len(plot_run(tmp_path, name)) == 2


def test_a_spike_does_not_press_the_curve_flat(tmp_path, make_record):
    rng = random.Random(1)
    losses = [4 - 2 * step / 400 + rng.gauss(0, 0.05) for step in range(400)]
    losses[200] = 1e6
    write(tmp_path, [make_record(step + 1, train_loss=loss) for step, loss in enumerate(losses)])
    plot_run(tmp_path)
    blue = pixels_of(imread(tmp_path / CURVE), BLUE)
    left, right = (blue[np.abs(blue[:, 1] - column) < 20, 0].max() for column in (150, 980))
    assert right - left > 150  # the fall is to be seen


@pytest.mark.slow
def test_the_start_of_a_long_run_is_in_the_picture(tmp_path, make_record):
    write(tmp_path, [make_record(step, train_loss=2 + 9 * math.exp(-step / 10)) for step in range(1, 3001)])
    plot_run(tmp_path)
    blue = pixels_of(imread(tmp_path / CURVE), BLUE)
    left, right = (blue[np.abs(blue[:, 1] - column) < 20, 0] for column in (115, 980))
    assert right.min() - left.min() > 250


def test_thinning_keeps_every_spike_and_the_order():
    ys = np.zeros(100_000)
    spikes = [0, 12_345, 54_321, 99_999]
    ys[spikes] = [5, -7, 9, 3]
    thin_xs, thin_ys = thin(np.arange(100_000.0), ys, 4000)
    assert len(thin_xs) <= 4000
    assert (np.diff(thin_xs) > 0).all()
    assert set(spikes) <= set(thin_xs.astype(int))
    assert sorted(thin_ys[thin_ys != 0]) == [-7, 3, 5, 9]


def test_few_points_are_not_thinned():
    xs, ys = np.arange(4000.0), np.random.default_rng(0).normal(size=4000)
    thin_xs, thin_ys = thin(xs, ys, 4000)
    assert (thin_xs == xs).all() and (thin_ys == ys).all()


def test_a_read_only_folder_is_a_clear_error(read_only):
    with pytest.raises(UserError, match=rf"{CURVE}: cannot be written: Permission denied"):
        plot_run(read_only)
