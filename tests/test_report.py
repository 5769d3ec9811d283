"""The paper's numbers and our verdicts."""

import pytest

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
