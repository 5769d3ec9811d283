"""The search for the share of SCU."""

import inspect
import math

import pytest
from helpers_units import made_up

from ssah_nb.classes import search_scu
from ssah_nb.engine.intervals import Estimate, wilson
from ssah_nb.engine.run import SsahError
from ssah_nb.report import printed


def searched(measured: dict, ratios, dense=(0.1, 10.0), **options):
    """What the search chose, its table, and the ratios that it measured.

    `measured` is {units: (attack success, perplexity)}.
    """
    asked = []

    def measure(mask):
        asked.append(len(mask))
        attack, perplexity = measured[len(mask)] if len(mask) else dense
        around = Estimate(perplexity, perplexity - 1, perplexity + 1, 40)
        return wilson(round(attack * 40), 40), around

    chosen, table = search_scu(
        made_up(0), made_up(1), ratios, measure, ratio_of="units", ucu=0.1, ru=0.1, **options
    )
    return chosen, table, asked


def test_the_search_takes_the_largest_set_that_lowers_safety_at_steady_utility():
    ratios = [4 / 72, 16 / 72, 8 / 72, 2 / 72]
    chosen, table, asked = searched(
        {16: (0.9, 99.0), 8: (0.5, 11.5), 4: (0.8, 11.0), 2: (0.1, 10.0)}, (r for r in ratios)
    )
    assert chosen == 8 / 72 and asked == [0, 16, 8]  # from high to low, and no further
    assert table.units.tolist() == [0, 16, 8] and table.steady.tolist() == [True, False, True]
    assert table.lowers_safety.tolist() == [False, True, True]
    assert table.chosen.tolist() == [False, False, True]
    assert table.perplexity.tolist() == [10.0, 99.0, 11.5]
    assert table.attack_success.tolist() == [0.1, 0.9, 0.5]
    low, high = table.attack_success_low[2], table.attack_success_high[0]
    assert (low, high) == (wilson(20, 40).low, wilson(4, 40).high)
    assert low > high


def test_the_search_wants_more_than_noise():
    # 12 and 16 of 40, the dense model 4
    chosen, table, _ = searched({16: (0.3, 10.0), 8: (0.4, 10.0)}, [16 / 72, 8 / 72])
    assert chosen == 8 / 72 and table.lowers_safety.tolist() == [False, False, True]


def test_the_search_when_nothing_is_found():
    ratios = [16 / 72, 8 / 72, 4 / 72]
    chosen, table, _ = searched({16: (0.9, 99.0), 8: (0.2, 11.5), 4: (0.1, 11.0)}, ratios)
    # no set lowers safety: the largest steady one
    assert chosen == 8 / 72
    assert not table[table.chosen].lowers_safety.any()
    chosen, table, asked = searched(
        {16: (0.9, 99.0), 8: (0.9, 50.0), 4: (0.9, float("inf"))}, ratios
    )
    # none is steady: the smallest
    assert chosen == 4 / 72
    assert asked == [0, 16, 8, 4]
    assert not table[table.chosen].steady.any()
    assert searched({16: (0.9, 11.8), 8: (0.9, 11.6), 4: (0.9, 1.0)}, ratios)[0] == 8 / 72
    assert searched({16: (0.9, 11.8)}, ratios, max_perplexity_ratio=1.5)[0] == 16 / 72


def test_the_limit_is_the_largest_rise_that_the_paper_prints():
    without_scu = {
        "Llama-2-7B-Chat": ("1", "1.3%"),
        "Llama-3-8B-Instruct": ("1", "1.4%"),
        "Mistral-7B-Instruct-v0.2": ("12", "2%"),
    }
    perplexities = {
        model: [
            printed(table, setting, "wikitext2", "perplexity", model)
            for setting in ("dense", f"pruned_scu_{share}")
        ]
        for model, (table, share) in without_scu.items()
    }
    rises = [after / before for before, after in perplexities.values()]
    default = inspect.signature(search_scu).parameters["max_perplexity_ratio"].default
    assert default == math.ceil(100 * max(rises)) / 100


def test_what_the_search_refuses():
    with pytest.raises(SsahError, match="no ratios to search"):
        searched({}, [])
    with pytest.raises(SsahError, match="scu=2"):
        searched({}, [2])
    with pytest.raises(SsahError, match="no estimate of attack success"):
        search_scu(made_up(0), made_up(1), [4 / 72], lambda mask: (0.9, 10.0))


def test_a_search_is_refused_before_anything_is_measured():
    for ratios, words in (([0.0], "ratio of 0"), ([0.1, 0], "ratio of 0"), ([0.9, 0.1], "overlap")):
        with pytest.raises(SsahError, match=words):
            search_scu(made_up(0), made_up(1), ratios, lambda mask: pytest.fail("measured"))
