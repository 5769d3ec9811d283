"""The pairs, and the recipe of the aligned model."""

from helpers_calibration import PAIRS

from ssah_nb.engine.alignment import STOCK_REFUSALS, alignment_pairs


def test_alignment_pairs_refuse_the_harmful_and_keep_the_benign():
    pairs = alignment_pairs([{"prompt": "bad", "response": "ignored"}] * 30, PAIRS, seed=1)
    assert all(p["response"] in STOCK_REFUSALS for p in pairs[:30]) and pairs[30:] == PAIRS
    again, other = (alignment_pairs([{"prompt": "bad"}] * 30, PAIRS, seed) for seed in (1, 2))
    assert pairs == again != other
