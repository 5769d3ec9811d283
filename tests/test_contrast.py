"""The contrast prompts, and what is reported about them."""

import re

import numpy as np
import pytest

from ssah_nb import contrast_prompts, contrast_report, load_pairs, refusal_margins
from ssah_nb.engine import contrast
from ssah_nb.engine.contrast import contrast_table
from ssah_nb.engine.intervals import wilson
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.paired import paired_difference
from ssah_nb.engine.run import SsahError

COMMON = set("how do i a the to in of my for with and is what it as are that at by which".split())
NO, YES = "I cannot do that.", "Sure, here it is."


def test_the_prompts_are_fifty_pairs_of_one_line():
    table = contrast_table()
    assert list(table) == ["pair", "prompt", "safe"]
    assert table.groupby("pair").safe.agg(list).tolist() == [[1, 0]] * 50
    assert table.prompt.is_unique
    safe, unsafe = contrast_prompts()
    assert (len(safe), len(unsafe)) == (50, 50)
    in_order = table.groupby("pair").prompt.agg(list).tolist()
    assert [list(twins) for twins in zip(safe, unsafe)] == in_order
    for prompt in safe + unsafe:
        assert 3 <= len(prompt.split()) <= 16
        assert prompt[-1] in ".?" and "\n" not in prompt


def test_twins_share_a_word_beyond_the_common_ones():
    for safe, unsafe in zip(*contrast_prompts()):
        words = [
            {word[:5] for word in set(re.findall("[a-z]+", text.lower())) - COMMON}
            for text in (safe, unsafe)
        ]
        assert words[0] & words[1], (safe, unsafe)


def test_they_are_sources_that_load():
    safe, unsafe = contrast_prompts()
    assert [pair["prompt"] for pair in load_pairs("contrast_safe")] == safe
    assert [pair["prompt"] for pair in load_pairs("contrast_unsafe", "evaluate")] == unsafe


def test_report_against_counts_by_hand():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    said = [NO] * 10 + [YES] * 40, [NO] * 5 + [YES] * 15 + [NO] * 30
    responses = dict(safe_responses=said[0], unsafe_responses=said[1])
    row = contrast_report(model, tokenizer, judge="gcg", **responses)
    for name, count in (("refused_safe", 10), ("refused_unsafe", 35)):
        assert [row[name], row[f"{name}_low"]] == [wilson(count, 50).value, wilson(count, 50).low]
    assert row["refused_difference"] == pytest.approx(0.5)
    assert 0.3 < row["refused_difference_low"] < 0.5 < row["refused_difference_high"] < 0.7
    safe, unsafe = (refusal_margins(model, tokenizer, prompts) for prompts in contrast_prompts())
    assert row["margin_difference"] == pytest.approx((unsafe - safe).mean())
    assert row["margin_safe"] == pytest.approx(safe.mean())
    assert row["margin_unsafe"] == pytest.approx(unsafe.mean())
    spread = 1.96 * np.std(unsafe - safe) / 50**0.5
    width = (row["margin_difference_high"] - row["margin_difference_low"]) / 2
    assert width == pytest.approx(spread, rel=0.15)


def test_the_difference_is_paired():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    half = [NO, YES] * 25
    row = contrast_report(model, tokenizer, "gcg", safe_responses=half, unsafe_responses=half)
    ends = [row[f"refused_difference{end}"] for end in ("_low", "", "_high")]
    least = wilson(0, 50).high  # a change of so many prompts may have been missed
    assert ends == pytest.approx([-least, 0, least])
    safe, unsafe = [YES] * 50, [NO] * 50
    row = contrast_report(model, tokenizer, "gcg", safe_responses=safe, unsafe_responses=unsafe)
    ends = [row[f"refused_difference{end}"] for end in ("_low", "", "_high")]
    assert ends == pytest.approx([1 - least, 1, 1])


def test_it_generates_and_refuses_what_does_not_fit():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    row = contrast_report(model, tokenizer, "gcg", max_new_tokens=2)
    assert row["refused_safe"] == row["refused_unsafe"] == 0
    with pytest.raises(SsahError, match="50 prompts but 2 responses"):
        contrast_report(model, tokenizer, "gcg", safe_responses=[NO, NO])


def test_options_reach_the_judge_the_model_and_the_margins(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    generated = []

    def said(model, tokenizer, prompts, **options):
        generated.append(options)
        return [f"{'Here you are. ' * 20}{NO}"] * len(prompts)

    monkeypatch.setattr(contrast, "generate", said)
    options = dict(system="Be safe.", max_new_tokens=3, batch_size=5)
    row = contrast_report(model, tokenizer, ["I cannot"], **options)
    assert generated == [options] * 2
    assert row["refused_safe"] == row["refused_unsafe"] == 0  # a refusal that stands too late
    whole = contrast_report(model, tokenizer, ["I cannot"], window=None, **options)
    assert whole["refused_safe"] == whole["refused_unsafe"] == 1
    other = contrast_report(model, tokenizer, ["never said"], window=None)
    assert other["refused_safe"] == 0
    for name, prompts in zip(("margin_safe", "margin_unsafe"), contrast_prompts()):
        right = refusal_margins(model, tokenizer, prompts, "Be safe.").mean()
        assert whole[name] == pytest.approx(right) and other[name] != pytest.approx(right)


def test_intervals_are_drawn_by_the_seed():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    draw = np.random.default_rng(0)
    safe, unsafe = ([(NO, YES)[i] for i in draw.integers(2, size=50)] for _ in range(2))
    one, same, other = (
        contrast_report(
            model, tokenizer, "gcg", safe_responses=safe, unsafe_responses=unsafe, seed=seed
        )
        for seed in (0, 0, 1)
    )
    assert one == same
    drawn = [f"margin_{name}_low" for name in ("safe", "unsafe", "difference")]
    assert all(one[name] != other[name] for name in drawn)
    refused = [[r == NO for r in rows] for rows in (safe, unsafe)]
    for seed, row in ((0, one), (1, other)):
        assert row["refused_difference_low"] == paired_difference(*refused, seed=seed).low


def test_what_is_wrong_is_refused_before_anything_is_asked():
    with pytest.raises(SsahError, match="seed=1.5"):
        contrast_report(None, None, seed=1.5)
