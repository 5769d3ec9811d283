"""The probe of hidden states against a plain computation."""

import pandas as pd
import pytest
import torch
from helpers_chat import byte_pairs

from ssah_nb.engine.chat import chat_prompt, encode_pairs
from ssah_nb.engine.drawings.probe import averages
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


def test_margins_are_of_the_last_block_or_of_all_tokens():
    rows = [
        (q, p, k, b, (p == "malicious") * (10.0 * b + k))
        for q in range(3)
        for p in ("benign", "malicious")
        for k in (2, 4)
        for b in (1, 2)
    ]
    table = pd.DataFrame(rows, columns=["query", "prefix", "tokens", "block", "distance"])
    assert probe_margin(table, "tokens").margin.tolist() == [22, 24]
    assert probe_margin(table, "block").margin.tolist() == [13, 23]


def test_a_band_is_over_queries():
    rows = [(q, k, 1.0 * q + 10 * k) for q in range(4) for k in (2, 4)]
    table = pd.DataFrame(rows, columns=["query", "tokens", "distance"])
    table = table.assign(model="aligned", queries="harmful", prefix="benign", block=1)
    row = averages(table, "block").iloc[0]
    assert row["mean"] == 31.5 and row["count"] == 4
    assert row["sem"] == pytest.approx(pd.Series([0.0, 1, 2, 3]).sem())


def test_a_system_prompt_stands_before_the_query():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = probe(model, tokenizer, ["Hi"], steps=(2,), system="Be safe.")
    query = tokenizer(chat_prompt(tokenizer, "Hi", "Be safe.")).input_ids
    longer = query + tokenizer("So", add_special_tokens=False).input_ids
    with torch.no_grad():
        a, b = (model(torch.tensor([ids]), output_hidden_states=True) for ids in (query, longer))
    a, b = (out.hidden_states[1][0, -1] for out in (a, b))
    wanted = 1 - float(torch.cosine_similarity(a, b, dim=0))
    row = found[(found.block == 1) & (found.prefix == "benign")]
    assert row.distance.item() == pytest.approx(wanted, abs=1e-5)


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


def test_what_has_no_margin_is_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = probe(model, tokenizer, ["Hi", "Ho"])
    with pytest.raises(SsahError, match="unknown by='layer'; use 'tokens' or 'block'"):
        probe_margin(found, "layer")
    own = probe(model, tokenizer, ["Hi"], prefixes={"refuse": "I am sorry, but I cannot help"})
    with pytest.raises(SsahError, match="prefixes named 'benign'.*missing: benign, malicious"):
        probe_margin(own, "block")


OPENS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
OPENS += "{% if add_generation_prompt %}ASSISTANT:{{ ' ' }}{% endif %}"


def test_a_prefix_follows_the_text_that_an_answer_follows():
    tokenizer, model = byte_pairs(OPENS, True), tiny_model(vocab_size=300)
    tokenizer.chat_template = OPENS
    words = "Sure, here it is"
    [(query, ids)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": words}], max_response=2)
    with torch.no_grad():
        states = [
            model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0, -1]
            for row in (query, query + ids)
        ]
    wanted = 1 - float(torch.cosine_similarity(*states, dim=0))
    found = probe(model, tokenizer, ["Hi"], prefixes={"malicious": words}, steps=(2,))
    assert found[found.block == 1].distance.item() == pytest.approx(wanted, abs=1e-5)
