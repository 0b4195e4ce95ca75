"""The policy by itself: what is a spike, what is not, what it remembers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from llmtrain.config import HealthSection, make_config
from llmtrain.engine import Limits
from llmtrain.errors import UserError
from llmtrain.health.divergence import DivergencePolicy, Seen


def policy(**health: Any) -> DivergencePolicy:
    return DivergencePolicy(HealthSection(**{"max_skips": 2, **health}))


def take(policy: DivergencePolicy, step: int, loss: float, norm: float, share: float = 1.0) -> str | None:
    """One step, refused where an engine would refuse it."""
    limits = policy.limits(share)
    is_fine = math.isfinite(loss) and math.isfinite(norm) and loss < limits.loss and norm < limits.grad_norm
    return policy.observe(Seen(step, 8 * (step - 1), 8 * step, 1e-3, limits, loss, norm, not is_fine))


def test_before_the_window_is_full_only_what_is_not_finite_is_refused() -> None:
    judge = policy(spike_window=4)
    assert judge.limits() == Limits(math.inf, math.inf)
    taken = [(10.0, 1.0), (math.nan, 1.0), (1e6, 1.0), (3.0, math.inf), (9.0, 1e6), (9.0, 1.0)]
    reasons = [take(judge, step, *values) for step, values in enumerate(taken, 1)]
    assert reasons == [None, "loss nan", None, "gradient norm inf", None, None]
    assert judge.limits().loss < math.inf


def test_spikes_up_are_refused_and_falls_are_not() -> None:
    judge = policy(spike_window=8)
    for step in range(1, 9):
        assert take(judge, step, 5.0 + 0.01 * step, 1.0) is None
    assert take(judge, 9, 0.1, 1e-9) is None
    assert take(judge, 10, 5.4, 9.0) is None  # half a nat, ten times: never less than this is a spike
    assert take(judge, 11, 7.0, 1.0) == "loss 7, limit 5.852, usually 5.055"
    reason = take(judge, 12, 5.0, 100.0)
    assert reason and reason.startswith("gradient norm 100, limit 10,")


def test_a_batch_of_few_targets_may_lie_further_off() -> None:
    judge = policy(spike_window=8)
    for step in range(1, 9):
        take(judge, step, 5.0 + 0.1 * (step % 3), 1.0)
    margins = [judge.limits(share).loss - 5.1 for share in (1.0, 1 / 16)]
    assert margins[1] == pytest.approx(4 * margins[0])


def test_null_refuses_only_what_is_not_finite() -> None:
    judge = policy(spike_window=2, spike_z=None)
    assert [take(judge, step, loss, 1.0) for step, loss in enumerate([1, 1, 1, 1e30, math.nan], 1)] == [
        None, None, None, None, "loss nan",
    ]  # fmt: skip


def test_what_is_refused_does_not_become_usual() -> None:
    judge = policy(spike_window=4, max_skips=4)
    for step in range(1, 5):
        take(judge, step, 2.0, 1.0)
    before = judge.limits()
    assert all(take(judge, step, 50.0, 1.0) for step in range(5, 8))
    assert judge.limits() == before


def test_skips_count_together_within_the_window_only() -> None:
    judge = policy(spike_window=8, max_skips=3)
    for step in range(1, 40):
        take(judge, step, math.nan if step in (4, 12, 20, 25, 27) else 2.0, 1.0)
        found = judge.stretch()
        assert (found is not None) == (step == 27)
        if found:
            assert (found.step, found.begin, found.end) == (20, 8 * 19, 8 * 27)
            break


def test_the_state_goes_through_json_and_gives_the_same_verdicts() -> None:
    generator = np.random.default_rng(1)
    one = policy(spike_window=16)
    for step in range(1, 40):
        take(one, step, math.inf if step == 30 else generator.normal(3, 0.1), generator.lognormal())
    one.leave_out(80, 96, 1)
    two = policy(spike_window=16)
    two.load_state(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert two.limits() == one.limits() and two.state() == one.state() and two.left_out == [(80, 96)]
    smaller = policy(spike_window=4, max_skips=4)
    smaller.load_state(one.state())
    assert smaller.limits() != Limits()


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_run_is_never_refused(seed: int) -> None:
    """Losses that fall by a power law with the noise of small batches, norms with a long tail, a warm-up, restarts."""
    generator = np.random.default_rng(seed)
    judge = policy()
    for step in range(1, 3000):
        loss = 2 + 8 * step**-0.3 + 0.3 * (step % 1000 < 30 and step > 1000) + generator.normal(0, 0.15)
        norm = (0.3 + 3 / math.sqrt(step)) * generator.lognormal(0, 0.5)
        assert take(judge, step, loss, norm) is None


def test_more_skips_than_the_window_has_steps_are_refused() -> None:
    with pytest.raises(UserError, match="max_skips 5 is above spike_window 4"):
        make_config({"health": {"spike_window": 4}})
