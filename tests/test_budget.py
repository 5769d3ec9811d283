"""Training only the redundant units."""

import pytest

from ssah_nb.attribution import importance
from ssah_nb.budget import budget_masks, redundant_units
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

KINDS = ("RU", "random")
BENIGN = [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(4)]


def test_a_budget_must_be_a_share():
    utility = importance(tiny_model(), tiny_tokenizer(), BENIGN)
    with pytest.raises(SsahError, match="share=-0.1"):
        redundant_units(utility, -0.1)
    with pytest.raises(SsahError, match="more than all units together"):
        redundant_units(utility, 0.99)


def test_budgets_that_are_close_have_labels_of_their_own():
    utility = importance(tiny_model(), tiny_tokenizer(), BENIGN)
    masks = budget_masks(utility, [0.2, 0.202, 0.205])
    assert list(masks) == [f"{kind}, {n}%" for n in ("20", "20.2", "20.5") for kind in KINDS]
    assert masks["RU, 20.5%"] == redundant_units(utility, 0.205)
    assert masks["RU, 20%"] == redundant_units(utility, 0.2)
