"""Training only the redundant units."""

import pytest

from ssah_nb.attribution import importance
from ssah_nb.budget import budget_masks, redundant_units, train_only
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


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_a_budget_counts_the_biases_that_it_trains(share):
    model = tiny_model("qwen2", num_key_value_heads=4)  # each head has keys and values of its own
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    utility = importance(model, tiny_tokenizer(), BENIGN)
    student = train_only(model, redundant_units(utility, share))
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trained <= share * sum(p.numel() for p in student.parameters())
