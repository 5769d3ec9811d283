"""The table of the comparison, its figures, and the claims about it."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers_protection import CASES, kept, trained

from ssah_nb.engine.claims import anchoring_rows, measure, protection_rows, read_claims
from ssah_nb.engine.drawings.protection import by_condition, draw_orders, draw_protection, draw_ways
from ssah_nb.engine.drawings.protection import FAMILIES, family_of, spaced
from ssah_nb.engine.intervals import rate_difference, wilson
from ssah_nb.engine.protection import Case
from ssah_nb.engine.verdicts import CONTROLS, best_ways, case_table, is_control, protection_table
from ssah_nb.engine.ways import WAYS


@pytest.fixture(scope="module")
def table():
    start = kept(Case("aligned", 0)) | {"case": vars(Case("aligned", 0))}
    start["outcomes"] = start["outcomes"] | {"harmful": [False] * 40}
    return protection_table([kept(case) for case in CASES], start)


def test_the_table_by_hand(table):
    rows = table.set_index("way")
    yes = {
        way: np.mean([trained(Case(way, o))["outcomes"]["harmful"] for o in (1, 2)])
        for way in ("full", "replay")
    }
    assert rows.attack_success.to_dict() == pytest.approx(yes)
    assert rows.against_full["replay"] == pytest.approx(yes["replay"] - yes["full"])
    first, second = (trained(Case("full", o))["outcomes"]["harmful"] for o in (1, 2))
    both = [row[i] and i % 3 > 0 for row in (first, second) for i in range(40)]
    assert rows.not_refused_and_coherent["full"] == pytest.approx(sum(both) / 80)
    assert rows.safety_change.to_dict() == pytest.approx(yes)
    worst = max(np.mean(trained(Case("full", o))["outcomes"]["harmful"]) for o in (1, 2))
    assert rows.worst_order["full"] == pytest.approx(worst)
    sums = {
        way: [trained(Case(way, o))["outcomes"]["training_losses"] for o in (1, 2)]
        for way in ("full", "replay")
    }
    ratio = math.exp((np.array(sums["replay"]) - sums["full"])[..., 0].sum() / 2 / 40)
    assert rows.training_ratio["replay"] == pytest.approx(ratio)
    assert rows.training_ratio["full"] == 1 and math.isnan(rows.p["full"])
    assert rows.memory_mb.to_dict() == {"full": 2.0, "replay": 2.5}
    assert rows.over_refusal_change.to_dict() == {"full": 0, "replay": 0}
    assert rows.safety["full"] == "fails" and rows.orders_safer["replay"] == 2
    assert rows.p_holm["replay"] == rows.p["replay"]


def test_units_are_compared_with_as_many_random_ones():
    ways = {"full": 40, "scu_top_cu": 25, "scu_all_cu": 20, "random": 30, "random_top_cu": 35}
    ways |= {"anchor_units": 10, "anchor_random": 12}
    done = {"epochs": 1, "reached": True, "seconds": 1.0, "optimizer_mb": 1.0}
    cases = []
    for way, order in [(way, order) for way in ways for order in (1, 2)]:
        outcomes = {"harmful": [i < ways[way] + order for i in range(50)], "benign": [False] * 50}
        outcomes |= {"harmful_margin": [0.0] * 50}
        outcomes |= {f"{name}_losses": [[1.0, 1]] * 50 for name in ("training", "benign")}
        cases.append({"case": vars(Case(way, order)), "done": done, "outcomes": outcomes})
    start = cases[0] | {"outcomes": cases[0]["outcomes"] | {"harmful": [False] * 50}}
    rows = protection_table(cases, start).set_index("way")
    assert rows.against_random_top_cu["scu_top_cu"] == pytest.approx((25 - 35) / 50)
    assert rows.against_random["scu_all_cu"] == pytest.approx((20 - 30) / 50)
    assert rows.against_anchor_random["anchor_units"] == pytest.approx((10 - 12) / 50)
    assert math.isnan(rows.against_random["random"])
    alone = [k for k in cases if k["case"]["way"] != "random_top_cu"]
    rows = protection_table(alone, start).set_index("way")
    assert rows.against_random_top_cu.isna().all()


def test_the_best_ways_learned_the_pairs(table):
    assert best_ways(table, 3, ["full"]) == ["replay"]
    assert best_ways(table.assign(reached=False), 3) == []
    cases = case_table([kept(case) for case in CASES])
    assert len(cases) == 4 and {"attack_success_low", "refusal_margin"} <= set(cases)


def test_the_figure_has_each_way_and_its_name(table):
    fig = draw_protection(table, 0.1)
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert texts == ["full fine-tuning", "replay of 16 refusals"]
    assert family_of("freeze_mine") == family_of("one's own") == "another way"
    assert {family_of(way) for way in WAYS} == set(FAMILIES) - {"another way"}
    assert not is_control("randomized_smoothing") and all(map(is_control, CONTROLS.values()))
    wanted = np.array([50.0, 50, 51, 99, 0])
    places = spaced(wanted, 4, 0, 100)
    assert (np.diff(places[np.argsort(wanted, kind="stable")]) >= 4 - 1e-9).all()
    assert places.min() >= 0 and places.max() <= 100


def test_the_figure_of_orders_begins_with_the_mildest():
    at = {("aligned", 0): 5, ("full", 1): 40, ("full", 2): 10, ("replay", 2): 3, ("replay", 1): 6}
    rows = [
        {"way": w, "order": o} | wilson(k, 50).columns("attack_success") for (w, o), k in at.items()
    ]
    (ax,) = draw_orders(pd.DataFrame(rows)).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "1"]
    drawn = {}
    for marks in ax.containers:
        places = zip(*marks.lines[0].get_data())
        drawn[marks.get_label()] = {round(place): round(rate) for place, rate in places}
    assert drawn == {"full fine-tuning": {1: 80, 0: 20}, "replay of 16 refusals": {0: 6, 1: 12}}
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [10]


def test_the_figure_of_ways_has_the_safest_on_top(table):
    cases = case_table([kept(Case("aligned", 0)), *map(kept, CASES)])
    fig = draw_ways(table, cases)
    attack, *prices = fig.axes
    names = [label.get_text() for label in attack.get_yticklabels()]
    assert names == ["full fine-tuning", "replay of 16 refusals"]  # from the bottom
    rows = table.sort_values("attack_success", ascending=False)
    columns = ("attack_success", "training_ratio", "over_refusal")
    for ax, column, factor in zip(fig.axes, columns, (100, 1, 100)):
        drawn = [marks.lines[0].get_xdata()[0] for marks in ax.containers]
        assert drawn == pytest.approx(factor * rows[column])
    (each,) = [line.get_xdata() for line in attack.lines if line.get_marker() == "|"][:1]
    assert sorted(each) == sorted(100 * cases[cases.way == "full"].attack_success)
    start = cases[cases.way == "aligned"].iloc[0]
    (grey,) = prices[1].patches
    assert grey.get_x() == pytest.approx(100 * start.over_refusal + 3) and grey.get_width() > 0
    for ax, column in ((attack, "attack_success"), (prices[1], "over_refusal")):
        dotted = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        assert dotted == [100 * start[column]]


def test_a_table_of_conditions_is_folded():
    rows = pd.DataFrame(
        [("b", "hard", 0.5, "fails"), ("a", "hard", 0.25, "open"), ("b", "easy", 0.01, "holds")],
        columns=["name", "condition", "attack_success", "safety"],
    )
    assert by_condition(rows, "attack_success").to_dict() == {
        "hard": {"b": "50", "a": "25"},
        "easy": {"b": "1.0", "a": "–"},
    }
    assert by_condition(rows, "safety").loc["b"].tolist() == ["fails", "holds"]


def rates(held, order, success):
    row = {"held": held, "order": order}
    for column in ("attack_success", "over_refusal"):
        row |= wilson(success, 50).columns(column)
    return row


def test_claims_about_orders_are_decided_by_the_worst_one():
    numbers = [("aligned", 0, 2), ("full", 1, 20), ("full", 2, 40), ("answers", 1, 9)]
    rows = pd.DataFrame([rates(*row) for row in [*numbers, ("answers", 2, 1), ("scu", 3, 1)]])
    found = anchoring_rows(rows)
    by_hand = rate_difference(rows.iloc[3], rows.iloc[1], "attack_success")
    other = rate_difference(rows.iloc[4], rows.iloc[2], "attack_success")  # far lower
    ends = found.loc["answers − full, highest"][
        [f"attack_success{e}" for e in ("", "_low", "_high")]
    ]
    assert tuple(ends) == pytest.approx(by_hand[:3]) and by_hand[0] > other[0]
    assert found.attack_success["answers − aligned, highest"] == pytest.approx(0.14)
    assert "scu − full, highest" not in found.index  # no order in common


def test_the_order_that_is_least_sure_decides_too():
    cases = [("full", 1, 16), ("answers", 1, 4), ("full", 2, 60), ("answers", 2, 47)]
    table = [
        {"held": h, "order": o} | wilson(k, 100).columns("attack_success") for h, o, k in cases
    ]
    table = pd.DataFrame(table).assign(
        over_refusal=0.0, over_refusal_low=0.0, over_refusal_high=0.1
    )
    row = anchoring_rows(table.assign(over_refusal_n=100)).loc["answers − full, highest"]
    assert row.attack_success_high > 0 > row.attack_success  # order 1 alone would be sure


def test_claims_without_their_table_are_not_measured(table):
    ours = read_claims().query("table in ['anchoring', 'protection', 'orders']")
    assert len(ours) > 5 and set(ours.experiment) == {"D"}
    none = {"anchoring": anchoring_rows(None)}
    none |= {name: protection_rows(None) for name in ("protection", "orders")}
    assert all(measure(none, claim)[1] == 0 for claim in ours.to_dict("records"))
    rows = {"protection": protection_rows(table)}
    claim = ours[ours.row == "plain: replay"].iloc[0].to_dict()
    (value, low, high), n = measure(rows, claim)
    assert n == 40 and low <= value <= high
    assert value == table.set_index("way").safety_change["replay"]
