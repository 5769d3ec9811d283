"""The probe of hidden states against a plain computation."""

import pandas as pd
import pytest
import torch

from ssah_nb.engine.chat import chat_prompt
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.probe import probe, probe_margin


def test_probe_is_the_cosine_distance_of_the_last_tokens():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = (
        probe(model, tokenizer, ["one", "a longer two"], steps=(2, 3))
        .set_index(["query", "prefix", "tokens", "block"])
        .distance
    )
    query = tokenizer(chat_prompt(tokenizer, "one")).input_ids
    longer = query + tokenizer("Sorry", add_special_tokens=False).input_ids[:3]
    with torch.no_grad():
        a, b = (
            model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
            for ids in (query, longer)
        )
    assert found[0, "benign", 3, 1] == pytest.approx(
        1 - float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5
    )


def test_probe_margin_pairs_queries():
    rows = [
        (q, p, k, 1, d + q)
        for q in range(5)
        for k in (2, 4)
        for p, d in (("benign", 0.1), ("malicious", 0.4))
    ]
    margin = probe_margin(
        pd.DataFrame(rows, columns=["query", "prefix", "tokens", "block", "distance"]), "tokens"
    )
    assert margin.margin.tolist() == pytest.approx([0.3, 0.3])
    assert margin.low.tolist() == pytest.approx([0.3, 0.3])
    assert margin.n.tolist() == [5, 5]


def test_short_prefix_is_an_error():
    with pytest.raises(SsahError, match="prefix 'x' has 2 tokens, fewer than 10"):
        probe(tiny_model(), tiny_tokenizer(), ["q"], prefixes={"x": "no"})


@pytest.mark.parametrize("prefixes", [{}, ["I'm sorry"], None, "I'm sorry"])
def test_prefixes_are_texts_by_name(prefixes):
    with pytest.raises(SsahError, match="there is no prefix; give at least one"):
        probe(tiny_model(), tiny_tokenizer(), ["q"], prefixes=prefixes)


def test_a_query_beyond_the_context_is_refused():
    with pytest.raises(SsahError, match=r"prompt 1 has \d+ tokens, and with 10 .* 512"):
        probe(tiny_model(), tiny_tokenizer(), ["one", "x" * 490])
