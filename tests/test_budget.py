"""Training only the redundant units."""

import pytest

from ssah_nb.attribution import importance
from ssah_nb.budget import redundant_units
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

BENIGN = [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(4)]


def test_a_budget_must_be_a_share():
    utility = importance(tiny_model(), tiny_tokenizer(), BENIGN)
    with pytest.raises(SsahError, match="share=-0.1"):
        redundant_units(utility, -0.1)
    with pytest.raises(SsahError, match="more than all units together"):
        redundant_units(utility, 0.99)
