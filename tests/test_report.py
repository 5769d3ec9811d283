"""The paper's numbers and our verdicts."""

import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ssah_nb.engine.claims import claims_of, probe_rows, read_claims, report_tables, rows_by_name
from ssah_nb.engine.claims import check_claim, transfer_rows, unit_of
from ssah_nb.engine.drawings.report import EDGE, draw_verdicts, in_words
from ssah_nb.engine.run import SsahError
from ssah_nb.report import judge, paper_numbers, printed, verdict

COMMITTED = Path(__file__).parent.parent / "figures" / "embedded"


def test_paper_numbers():
    assert printed("1", "dense", "utility_mean", "accuracy", "Llama-2-7B-Chat") == 58.3
    assert not paper_numbers().value.isna().any()
    with pytest.raises(SsahError, match="prints no perplexity"):
        printed("2", "initial", "advbench", "perplexity")


@pytest.mark.parametrize(
    "low, high, claim, limit, expected",
    [
        (0.1, 0.2, "above", 0, "holds"),
        (-0.2, -0.1, "above", 0, "fails"),
        (-0.1, 0.1, "above", 0, "open"),
        (0.4, 0.6, "above", 0.5, "open"),
        (0.6, 0.7, "above", 0.5, "holds"),
        (0.1, 0.2, "below", 0, "fails"),
        (-0.05, 0.05, "near", 0.1, "holds"),
        (-0.05, 0.15, "near", 0.1, "open"),
        (0.11, 0.2, "near", 0.1, "fails"),
        (float("nan"), float("nan"), "above", 0, "not measured"),
        (1.0, float("inf"), "above", 0, "holds"),
        (1.0, float("inf"), "below", 0, "fails"),
        (1.0, float("nan"), "above", 0, "not measured"),
    ],
)
def test_verdicts(low, high, claim, limit, expected):
    assert verdict(low, high, claim, limit) == expected


def test_what_cannot_be_judged_is_one_line():
    with pytest.raises(SsahError, match="unknown claim 'higher'; use above, below, near"):
        verdict(0.1, 0.2, "higher")
    with pytest.raises(SsahError, match="the lower end 0.2 lies above the upper end 0.1"):
        verdict(0.2, 0.1, "above")


@pytest.mark.parametrize("axis, lacking", [(0, "dense"), (0, "UCU"), (0, "SCU"), (1, "perplexity")])
def test_what_a_run_left_out_is_not_measured(axis, lacking):
    rows = rows_by_name(report_tables(COMMITTED))
    needed = [{c["row"], c["minus"], c["column"]} for c in claims_of(rows, "B")]
    without = pd.Series([lacking in names for names in needed])
    whole = judge(rows, "B")
    rows["pruning"] = rows["pruning"].drop(lacking, axis=axis)
    judged = judge(rows, "B")
    assert without.any() and set(judged.verdict[without]) == {"not measured"}
    pd.testing.assert_frame_equal(judged[~without], whole[~without])


def test_a_share_that_a_run_left_out_is_unknown():
    rows = rows_by_name(report_tables(COMMITTED))
    rows["pruning"] = rows["pruning"].drop("coherent", axis=1)
    assert judge(rows, "B").claim.str.contains("(an unknown share of the", regex=False).any()


@pytest.mark.parametrize("experiment, table", [("A", "probe"), ("D", "freezing"), ("E", "budget")])
def test_a_run_that_left_all_rows_out_measured_nothing(experiment, table):
    rows = rows_by_name(report_tables(COMMITTED))
    rows[table] = rows[table].iloc[:0]
    claims = read_claims().query("experiment == @experiment and table == @table").claim
    judged = judge(rows, experiment).set_index("claim").verdict
    assert set(judged[claims]) == {"not measured"}


def test_a_value_without_an_interval_is_not_drawn():
    rows = rows_by_name(report_tables(COMMITTED))
    rows["pruning"].loc["SCU", ["perplexity_low", "perplexity_high"]] = float("nan")
    judged = judge(rows, "B")
    assert (
        "not measured" in set(judged.verdict) and judged.measured[judged.low.isna()].notna().any()
    )
    draw_verdicts(judged)


@pytest.mark.parametrize(
    "blocks, verdicts",
    [  # (margin, low, high) of two blocks; the verdicts of "every block > 0" and "every block < 0"
        ([(-0.012, -0.030, 0.006), (-0.010, -0.012, -0.008)], ("fails", "open")),
        ([(0.010, 0.005, 0.015), (0.012, -0.002, 0.026)], ("open", "fails")),
        ([(0.010, 0.005, 0.015), (0.012, 0.002, 0.026)], ("holds", "fails")),
        ([(-0.2, -0.3, -0.1), (0.2, 0.1, 0.3)], ("fails", "fails")),
        ([(0.2, 0.1, 0.3), (math.nan,) * 3], ("not measured", "not measured")),
    ],
)
def test_a_claim_about_every_block_holds_only_if_all_do(blocks, verdicts):
    rows = [{"block": i, "margin": m, "low": a, "high": b} for i, (m, a, b) in enumerate(blocks)]
    table = probe_rows(pd.DataFrame(rows).assign(n=50, model="aligned", queries="harmful"))
    ends = lambda name: table.loc[name, ["margin_low", "margin_high"]]
    found = verdict(*ends("aligned harmful, lowest"), "above")
    assert (found, verdict(*ends("aligned harmful, highest"), "below")) == verdicts


def test_a_class_that_is_empty_has_no_shares():
    matrix = pd.DataFrame(
        {"module": "global", "before": ["SCU", "RU"], "after": "CU", "units": [3, 0]}
    )
    lost = pd.DataFrame({"class": ["SCU", "RU"], "lost": [0.5, float("nan")], "units": [4, 0]})
    found = transfer_rows(matrix, lost)
    assert found.share["SCU to CU"] == 1 and found.share["SCU lost"] == 0.5
    for name in ("RU to CU", "RU lost"):
        assert pd.isna(found.share[name]) and found.share_n[name] == 0


def test_no_word_of_a_claim_reaches_into_the_plot():
    claims = read_claims()
    words = claims.claim.map(lambda claim: claim.format(coherent="100%", of=" of 0.5%"))
    table = claims[["experiment", "paper"]].assign(claim=words, claimed="> 0", unit="points")
    table = table.assign(measured=0.5, low=0.4, high=0.6, verdict="holds")
    table.loc[0, ["measured", "low", "high"]], table.loc[0, "verdict"] = (
        float("nan"),
        "not measured",
    )
    fig = draw_verdicts(table)
    axes, shown = fig.axes[0], FigureCanvasAgg(fig).get_renderer()
    to_data = axes.transData.inverted()
    left = {
        text.get_text(): to_data.transform(text.get_window_extent(shown).corners())[:, 0].max()
        for text in axes.texts
        if text.get_position()[0] < -EDGE and text.get_weight() == "normal"
    }
    drawn = words.str.replace(r" \(.*?\)", "", regex=True)
    assert drawn[0] not in left and set(drawn[1:]) <= set(left)
    assert not {claim: end for claim, end in left.items() if end > -EDGE}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(experiment="F"), "line 7: experiment 'F'"),
        (dict(table="table01_pruning"), "table 'table01_pruning' is none of probe"),
        (dict(claimed=">= 0"), "claimed '>= 0' is none of"),
        (dict(claimed="> 5%"), "claimed '> 5%'"),
        (dict(needs="unalined"), "needs 'unalined'"),
        (dict(paper="{} %", printed=""), "printed names not as many"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(changes, words):
    claim = read_claims().iloc[0].to_dict()
    check_claim("claims.csv, line 7", claim)
    with pytest.raises(SsahError, match=words):
        check_claim("claims.csv, line 7", claim | changes)


def test_a_margin_is_counted_in_nats():
    claim = read_claims().iloc[0].to_dict() | {"column": "refusal_margin"}
    assert unit_of(claim) == "nats" and in_words(-0.82, -1.0, -0.5, "nats") == (
        "−0.82 nats (−1.00 to −0.50)"
    )
