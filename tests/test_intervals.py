"""Intervals against published values."""

import math

import numpy as np
import pandas as pd
import pytest

from ssah_nb.engine import intervals
from ssah_nb.engine.intervals import Estimate, bootstrap_mean, exp_of, rate_difference, wilson
from ssah_nb.engine.paired import paired_difference
from ssah_nb.engine.verdicts import within
from ssah_nb.engine.run import SsahError
from ssah_nb.report import verdict


def test_wilson_against_known_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        rate = wilson(successes, n)
        assert (round(rate.low, 4), round(rate.high, 4), rate.n) == (low, high, n)
        assert float(rate) == successes / n
    assert wilson(29, 29).high == 1 and wilson(29, 29).low == pytest.approx(1 - wilson(0, 29).high)
    with pytest.raises(SsahError, match="at least one"):
        wilson(0, 0)


def test_bootstrap_is_seeded_weighted_and_covers():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, 400)
    mean = bootstrap_mean(values)
    assert mean == bootstrap_mean(list(values)) and mean != bootstrap_mean(values, seed=1)
    assert mean.value == pytest.approx(values.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_mean([10, 1], [5, 1]).value == pytest.approx(11 / 6)
    with pytest.raises(SsahError, match="at least one"):
        bootstrap_mean([])


def test_one_item_has_a_mean_and_no_interval():
    one = exp_of(bootstrap_mean([6.0], [3]))
    assert (one.value, one.n) == (pytest.approx(math.exp(2)), 1)
    assert math.isnan(one.low) and math.isnan(one.high)
    assert verdict(one.low, one.high, "below", 100.0) == "not measured"
    for after in ([3.0], [[3.0], [3.0], [4.0]]):
        found = paired_difference([1.0], after)
        assert found.value == pytest.approx(np.mean(after) - 1)
        assert within(found.low, found.high, 100.0) == "not measured"
    yes = paired_difference([False], [True])  # a rate has its own least width
    assert within(yes.low, yes.high, 0.05) == "open" or yes.low > 0.05


def test_estimate_columns():
    assert Estimate(0.5, 0.2, 0.8, 6).columns("rate") == {
        "rate": 0.5,
        "rate_low": 0.2,
        "rate_high": 0.8,
        "rate_n": 6,
    }


def test_difference_of_rates_is_newcombes():
    # Newcombe 1998, table II, example (a): 56/70 − 48/80
    a = pd.Series({"r": 56 / 70, "r_low": 0.6921, "r_high": 0.8775})
    b = pd.Series({"r": 48 / 80, "r_low": 0.4904, "r_high": 0.7002})
    assert rate_difference(a, b, "r") == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-3)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_few_items_have_an_interval_that_is_wide_enough(n):
    chosen, covered = np.random.default_rng(n), 0
    for _ in range(500):
        found = bootstrap_mean(chosen.normal(size=n), draws=300)
        covered += found.low <= 0 <= found.high
    assert covered / 500 > 0.90


def test_resamples_may_be_drawn_some_at_a_time(monkeypatch):
    losses, tokens = np.random.default_rng(0).random((2, 30)) + 1
    picks = np.random.default_rng(5).integers(30, size=(2000, 30))
    expected = losses[picks].sum(1) / tokens[picks].sum(1)
    for at_once in (1, 7 * 30, 1 << 22):
        monkeypatch.setattr(intervals, "AT_ONCE", at_once)
        assert np.array_equal(intervals.resampled_means(losses, tokens, 5, 2000), expected)
