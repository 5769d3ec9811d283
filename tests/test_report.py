"""The paper's numbers and our verdicts."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ssah_nb.engine.claims import read_claims
from ssah_nb.engine.drawings.report import EDGE, draw_verdicts
from ssah_nb.engine.run import SsahError
from ssah_nb.report import paper_numbers, printed, verdict


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
    ],
)
def test_verdicts(low, high, claim, limit, expected):
    assert verdict(low, high, claim, limit) == expected


def test_no_word_of_a_claim_reaches_into_the_plot():
    claims = read_claims()
    words = claims.claim.map(lambda claim: claim.format(coherent="100%", of=" of 0.5%"))
    table = claims[["experiment", "paper"]].assign(claim=words, claimed="> 0", unit="points")
    table = table.assign(measured=0.5, low=0.4, high=0.6, verdict="holds")
    table.loc[0, ["measured", "verdict"]] = float("nan"), "not measured"
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
