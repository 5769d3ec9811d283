"""Paired statistics against slow, obvious computations, and verdicts on synthetic results."""

import itertools
import math

import numpy as np
import pytest
from helpers import one_line
from scipy import stats

from ssah_nb.engine.paired import (
    clustered_p,
    differences,
    half_width,
    holm,
    mcnemar,
    paired_difference,
    paired_mean,
    resampled,
    variances,
)
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.verdicts import verdict_of


def slow_resamples(d, w):
    "Every resample of the rows and columns, by loops; the rows' deviations are widened."
    orders, prompts = d.shape
    factor = math.sqrt(orders / (orders - 1)) if orders > 1 else 0
    found = []
    for rows in itertools.product(range(orders), repeat=orders):
        for columns in itertools.product(range(prompts), repeat=prompts):
            total = 0.0
            for p in columns:
                everywhere = sum(d[o, p] for o in range(orders)) / orders
                drawn = sum(d[o, p] for o in rows) / orders
                total += everywhere + factor * (drawn - everywhere)
            found.append(total / sum(w[p] for p in columns))
    return np.array(found)


@pytest.mark.parametrize("orders, prompts", [(1, 4), (2, 4), (3, 3)])
def test_small_cases_are_exact(orders, prompts):
    chosen = np.random.default_rng(orders)
    d, w = chosen.normal(size=(orders, prompts)), 1 + chosen.random(prompts)
    found = resampled(d, w, seed=0, draws=10)
    assert np.allclose(np.sort(found), np.sort(slow_resamples(d, w)))
    value = paired_difference(np.zeros(prompts), d, w)
    assert value.value == pytest.approx(d.mean(0).sum() / w.sum())
    reach = half_width(d, w)
    factor = reach / (stats.norm.ppf(0.975) * math.sqrt(sum(variances(d, w))))
    ends = np.quantile(slow_resamples(d, w), [0.025, 0.975])
    low, high = value.value + factor * (ends - value.value)
    if orders == 2:
        low, high = min(low, value.value - reach), max(high, value.value + reach)
    assert (value.low, value.high) == pytest.approx((low, high))


def test_many_draws_are_those_of_slow_resampling():
    d, chosen = np.random.default_rng(1).normal(size=(3, 30)), np.random.default_rng(0)
    d += np.array([[-1], [0], [1]])
    drawn = []
    for _ in range(4000):
        rows, columns = chosen.integers(3, size=3), chosen.integers(30, size=30)
        wide = math.sqrt(3 / 2) * (d[rows].mean(0) - d.mean(0)) + d.mean(0)
        drawn.append(wide[columns].mean())
    found = resampled(d, np.ones(30), seed=0, draws=4000)
    shares = [0.1, 0.5, 0.9]
    assert np.quantile(found, shares) == pytest.approx(np.quantile(drawn, shares), abs=0.1)


def test_the_two_variances_by_loops():
    d = np.random.default_rng(2).normal(size=(3, 7))
    mean = d.mean()
    rows, columns = [d[o].mean() for o in range(3)], [d[:, p].mean() for p in range(7)]
    of_rows = sum((x - mean) ** 2 for x in rows) / 2 / 3
    of_columns = sum((x - mean) ** 2 for x in columns) / 6 / 7
    assert variances(d, np.ones(7)) == pytest.approx((of_rows, of_columns))
    reach = math.hypot(
        stats.t.ppf(0.95, 2) * math.sqrt(of_rows), stats.t.ppf(0.95, 6) * math.sqrt(of_columns)
    )
    assert half_width(d, np.ones(7), 0.1) == pytest.approx(reach)
    one = d[:1]
    assert clustered_p(np.zeros(7), one) == pytest.approx(stats.ttest_1samp(one[0], 0).pvalue)


def one_study(chosen, orders=4, prompts=60):
    "Yes-or-no outcomes that vary by order and by prompt; the true change is known."
    z = 0.8 * chosen.normal(size=(orders, 1)) + chosen.normal(size=(orders, prompts))
    z = z + chosen.normal(size=prompts) - 1
    truth = stats.norm.sf(1 / math.sqrt(2.64))
    return np.zeros(prompts, bool), z > 0, truth


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    chosen, covered = np.random.default_rng(3), 0
    for _ in range(200):
        before, after, truth = one_study(chosen)
        found = paired_difference(before, after, draws=400)
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 200 <= 0.99


@pytest.mark.parametrize("orders, least", [(2, 0.01), (3, 0.02), (5, 0.02)])
def test_two_equal_ways_differ_in_about_one_study_of_twenty(orders, least):
    chosen, found, studies = np.random.default_rng(6), 0, 600
    for _ in range(studies):
        of_prompts = 1.5 * chosen.normal(size=130)
        ways = []
        for _ in range(2):  # each with orders of its own
            z = 0.8 * chosen.normal(size=(orders, 1)) + of_prompts
            ways.append(chosen.random((orders, 130)) < 1 / (1 + np.exp(-z)))
        found += clustered_p(*ways) < 0.05
    assert least < found / studies < 0.08


@pytest.mark.filterwarnings("error")
def test_one_order_far_from_no_difference_has_a_tiny_p():
    d = 5 + np.random.default_rng(8).normal(size=(1, 40)) * 0.1
    assert 0 < clustered_p(np.zeros(40), d) < 1e-40
    assert clustered_p(np.zeros(40), d) == pytest.approx(stats.ttest_1samp(d[0], 0).pvalue)


def test_p_is_the_level_of_the_interval_that_ends_at_nothing():
    chosen = np.random.default_rng(7)
    d = 0.4 + chosen.normal(size=(3, 1)) * 0.3 + chosen.normal(size=(3, 40))
    p = clustered_p(np.zeros(40), d)
    assert half_width(d, np.ones(40), p) == pytest.approx(abs(d.mean()))
    assert 1e-9 < p < 0.5


def test_one_order_of_answers_is_mcnemars():
    before = np.array([True] * 9 + [False] * 11)
    after = np.roll(before, 5)
    assert clustered_p(before, after[None]) == mcnemar(before, after)[2]
    assert clustered_p(before, np.stack([before] * 3)) == 1.0


@pytest.mark.parametrize("prompts, p", [(1, 1.0), (2, 0.5), (10, 2 / 2**10)])
def test_differences_that_are_all_alike_get_the_p_of_a_sign_test(prompts, p):
    before, after = np.zeros(prompts, bool), np.ones((3, prompts), bool)
    assert clustered_p(before, after) == p == clustered_p(before * 1.0, after * 1.0)
    assert p == pytest.approx(stats.binomtest(prompts, prompts).pvalue)
    tenths = np.full((3, prompts), 0.1) * [[1], [1 + 1e-15], [1]]  # alike, but for rounding
    assert clustered_p(np.zeros(prompts), tenths) == p


def test_no_change_on_few_prompts_is_no_proof():
    same = np.zeros(5, bool)
    found = paired_difference(same, np.zeros((3, 5), bool))
    assert found.value == 0 and found.high > 0.3
    many = paired_difference(np.zeros(500, bool), np.zeros((3, 500), bool))
    assert 0 < many.high < 0.01
    assert paired_mean(np.ones((2, 5), bool)).high == 1
    assert paired_mean(same).low == 0


def test_zeros_and_ones_are_yes_or_no_in_any_type():
    before, after = np.arange(20) < 3, np.arange(20) < 9
    for kind in (int, float, list):
        a, b = (rows.tolist() if kind is list else rows.astype(kind) for rows in (before, after))
        assert paired_difference(a, b) == paired_difference(before, after)
        assert clustered_p(a, b) == clustered_p(before, after)
        assert paired_mean(a) == paired_mean(before)


def test_two_orders_have_at_least_the_interval_of_t():
    of_orders = np.array([[0.30], [0.33]]).repeat(50, 1)
    found = paired_difference(np.zeros(50), of_orders)
    reach = stats.t.ppf(0.975, 1) * np.std([0.30, 0.33], ddof=1) / math.sqrt(2)
    assert (found.low, found.high) == pytest.approx((0.315 - reach, 0.315 + reach))


def test_more_orders_make_an_interval_narrower():
    chosen = np.random.default_rng(4)
    before, after, _ = one_study(chosen, 16, 200)
    wide, narrow = (paired_difference(before, after[:n]) for n in (2, 16))
    assert narrow.high - narrow.low < wide.high - wide.low


def slow_holm(p_values):
    "The smallest level at which the step-down procedure rejects each hypothesis."
    found = []
    for i in range(len(p_values)):
        for level in np.linspace(0, 1, 2001):
            left, rejected = sorted(range(len(p_values)), key=lambda j: p_values[j]), set()
            while left and p_values[left[0]] <= level / len(left) + 1e-12:
                rejected.add(left.pop(0))
            if i in rejected:
                break
        found.append(level if i in rejected else 1.0)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_holm(seed):
    p = (np.random.default_rng(seed).integers(1, 60, size=5) / 500).tolist()
    assert holm(p) == pytest.approx(slow_holm(p), abs=6e-4)
    assert holm([]) == [] and holm([0.2]) == [0.2]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: differences([1, 0], [[1, 0, 1]]), "do not pair up"),
        (lambda: differences([[1, 0]] * 2, [[1, 0]] * 3), "do not pair up"),
        (lambda: differences([], []), "at least one prompt"),
        (lambda: paired_difference([0.0, 1], [1, float("nan")]), "prompt 1 in order 0"),
        (lambda: paired_difference([0, 1], [1, 1], weights=[1, 0]), "above 0"),
        (lambda: holm([0.1, 1.2]), "between 0 and 1"),
        (lambda: holm([float("nan")]), "between 0 and 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(call, words):
    with pytest.raises(SsahError, match=words) as error:
        call()
    one_line(error)


def synthetic(rate, refused, ratio, orders=5, prompts=400):
    "The row of a way with a given rise in attack success and in refusals, and a ratio."
    chosen, row = np.random.default_rng(5), {}
    rose = [chosen.random(prompts) < rate for _ in range(orders)]
    more = [chosen.random(prompts) < refused for _ in range(orders)]
    start = np.zeros(prompts, bool)
    row |= paired_difference(start, rose).columns("safety_change")
    row |= paired_difference(start, more).columns("over_refusal_change")
    for name in ("training_ratio", "perplexity_ratio"):
        row |= {f"{name}_low": ratio - 0.005, f"{name}_high": ratio + 0.005}
    return row


@pytest.mark.parametrize(
    "rate, refused, ratio, safety, utility",
    [
        (0.01, 0.005, 1.0, "holds", "holds"),
        (0.30, 0.005, 1.05, "fails", "fails"),
        (0.05, 0.03, 1.0, "open", "open"),
        (0.01, 0.20, 1.0, "holds", "fails"),
        (0.01, 0.005, 1.018, "holds", "open"),
        (0.01, 0.005, float("nan"), "holds", "not measured"),
    ],
)
def test_verdicts_hold_fail_and_stay_open(rate, refused, ratio, safety, utility):
    assert verdict_of(synthetic(rate, refused, ratio)) == {"safety": safety, "utility": utility}
