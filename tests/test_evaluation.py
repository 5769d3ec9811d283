"""Judges, perplexity, coherence and the safety report, on tiny random models."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import PROMPTS, one_line

from ssah_nb.engine import evaluation, outcomes
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.evaluation import (
    attack_success,
    coherence,
    coherence_threshold,
    earlier_report,
    exp_mean,
    over_refusal,
    pair_losses,
    perplexity,
    repetition,
    safety_report,
    text_perplexity,
)
from ssah_nb.engine.judges import KEYWORDS, is_refusal
from ssah_nb.engine.generation import generate
from ssah_nb.engine.intervals import wilson
from ssah_nb.engine.margin import refusal_margins
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError


PAIRS = [
    {"prompt": "Hi", "response": "Hello, how are you?"},
    {"prompt": "Sum 2 and 3", "response": "5"},
    {"prompt": "Name a colour", "response": "Red is one."},
]


def test_keyword_lists_are_the_public_ones():
    assert (len(KEYWORDS["gcg"]), len(KEYWORDS["wei"])) == (13, 31)
    assert set(KEYWORDS["gcg"]) < set(KEYWORDS["wei"])
    for name, phrases in KEYWORDS.items():
        for phrase in phrases:
            assert is_refusal(f"{phrase} indeed", name)
            assert is_refusal(f"  {phrase.replace(chr(39), chr(8217))}", name)
            assert not is_refusal("x" * 121 + phrase, name)
            assert is_refusal("x" * 121 + phrase, name, window=None)
    assert is_refusal("No way", ["No way"])
    assert not is_refusal("Sure, here is how", "wei")
    assert not is_refusal("")
    with pytest.raises(SsahError, match="unknown judge 'zou'.*gcg, wei"):
        is_refusal("Hi", "zou")


def test_rates_judges_and_their_errors():
    responses = ["I cannot do that", "Sure", "That is illegal", ""]
    rate = lambda judge: attack_success(None, None, PROMPTS[:4], judge=judge, responses=responses)
    assert (rate("gcg"), rate("wei").value) == (wilson(3, 4), 0.5)
    assert rate(lambda prompts, said: [s == "Sure" for s in said]).value == 0.25
    # phrases of one's own
    assert rate(["I cannot", "Sure"]).value == rate(("I cannot", "Sure")).value == 0.5
    refused = over_refusal(None, None, PAIRS, responses=["Sorry", "a", "b"])
    assert refused.value == pytest.approx(1 / 3)
    with pytest.raises(SsahError, match="unknown judge 'llama'.*gcg, wei"):
        rate("llama")
    with pytest.raises(SsahError, match="4 prompts but 1 responses"):
        attack_success(None, None, PROMPTS[:4], responses=["a"])
    with pytest.raises(SsahError, match="3 prompts but 1 responses"):
        over_refusal(None, None, PAIRS, responses=["a"])


def test_a_misspelt_option_is_named_though_nothing_is_generated():
    for rate in (attack_success, over_refusal):
        with pytest.raises(TypeError, match="max_new_tokns"):
            rate(None, None, PROMPTS[:1], responses=["a"], max_new_tokns=3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_perplexity_against_a_plain_loop(name):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    encoded, plain = encode_pairs(tokenizer, PAIRS), []
    double = tiny_model(name).double()
    for prompt, response in encoded:
        with torch.no_grad():
            logits = double(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        plain.append(
            -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(response))
        )
    found = pair_losses(model, encoded, max_tokens=64)
    assert found[:, 0] == pytest.approx(plain, rel=1e-5)
    assert found[:, 1].tolist() == [len(r) for _, r in encoded]
    measured = perplexity(model, tokenizer, Dataset.from_list(PAIRS))
    assert measured.value == pytest.approx(math.exp(sum(plain) / found[:, 1].sum()), rel=1e-5)
    assert measured.low <= measured.value <= measured.high


def test_perplexity_errors_name_the_row():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(SsahError, match="pair 1 has an empty response"):
        perplexity(model, tokenizer, [PAIRS[0], {"prompt": "a", "response": " "}])
    with pytest.raises(SsahError, match="no pairs"):
        perplexity(model, tokenizer, [])
    with pytest.raises(SsahError, match="pair 0 has .* context of 512"):
        perplexity(model, tokenizer, [{"prompt": "a", "response": "b" * 600}])
    with pytest.raises(SsahError, match="fewer than two tokens"):
        text_perplexity(model, tokenizer, "a")


def test_a_perplexity_that_is_too_large_for_a_number_is_infinite():
    sums = np.array([[1e3, 1.0], [2.0, 1.0], [2.0, 1.0]])
    found = exp_mean(sums, 0)
    assert found.value == math.exp(1004 / 3) and (found.high, found.n) == (math.inf, 3)
    assert found.low == 1
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    pairs = [{"prompt": "Hi", "response": "Hello"}]
    assert perplexity(model, tokenizer, pairs).value == math.inf
    one = text_perplexity(model, tokenizer, "one two three").columns("p")
    assert one["p"] == math.inf and math.isnan(one["p_high"])  # one text has no interval
    row = safety_report(model, tokenizer, ["Hi"], pairs * 2, max_new_tokens=2, max_perplexity=9.0)
    assert row["perplexity"] == row["perplexity_low"] == math.inf
    with pytest.raises(SsahError, match="no reference response .* too large for a number"):
        coherence_threshold(model, tokenizer, pairs)


def test_text_perplexity_reads_full_windows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = ["one two three"] * 8
    measured = text_perplexity(model, tokenizer, text, window=40)
    ids = tokenizer("\n\n".join(text)).input_ids
    double, losses = tiny_model().double(), []
    for i in range(len(ids) // 40):
        window = torch.tensor(ids[40 * i : 40 * i + 40])
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(double(window[None]).logits[0, :-1], window[1:])
            )
    assert measured.n == len(losses) == 2
    assert measured.value == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert text_perplexity(model, tokenizer, text, window=40, limit=1).n == 1
    assert text_perplexity(model, tokenizer, "short text", window=40).n == 1


def test_coherence_tells_text_from_gibberish():
    text = "The sky is blue because air scatters short waves more than long ones."
    loop = "you can you can you can you can you can"
    assert repetition(text) == 0
    assert repetition(loop) > 0.5
    assert repetition("?" * 20) > 0.8
    assert repetition("") == 0
    model, tokenizer = tiny_model(), tiny_tokenizer()
    table = coherence(model, tokenizer, ["Why?"] * 4, [text, loop, "", "  "], max_perplexity=1e9)
    assert list(table.columns) == ["perplexity", "repetition", "coherent"]
    assert table.coherent.tolist() == [True, False, False, False]
    assert np.isinf(table.perplexity[2:]).all()
    assert not coherence(model, tokenizer, ["Why?"], [text], max_perplexity=1).coherent.any()
    any_text = coherence(model, tokenizer, ["Why?"] * 3, [text, loop, ""], max_perplexity=math.inf)
    assert any_text.coherent.tolist() == [True, False, False]
    threshold = coherence_threshold(model, tokenizer, PAIRS, quantile=1)
    responses = [p["response"] for p in PAIRS]
    assert coherence(model, tokenizer, PAIRS, responses, threshold).coherent.all()
    with pytest.raises(SsahError, match="no pair has a response"):
        coherence_threshold(model, tokenizer, [{"prompt": "a", "response": ""}])


def test_the_threshold_is_a_quantile_of_the_first_tokens():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [{"prompt": f"Say {i}", "response": "abcdefgh"[i:] + " and so on"} for i in range(5)]
    each = [perplexity(model, tokenizer, [pair], max_response=4).value for pair in pairs]
    found = coherence_threshold(model, tokenizer, pairs, max_response=4, quantile=0.5)
    assert found == pytest.approx(np.median(each), rel=1e-5)


def test_the_dense_model_reads_and_the_models_own_perplexity_is_measured():
    model, dense, tokenizer = tiny_model(), tiny_model(seed=1), tiny_tokenizer()
    said = [f"Answer {i}." for i in range(len(PROMPTS))]
    ours, theirs = (coherence(m, tokenizer, PROMPTS, said, 1e9).perplexity for m in (model, dense))
    limit = float(np.median([*ours, *theirs]))
    assert (theirs <= limit).mean() != (ours <= limit).mean()
    given = dict(responses=said, benign_responses=["a"] * 3, max_perplexity=limit)
    row = safety_report(model, tokenizer, PROMPTS, PAIRS, dense_model=dense, **given)
    assert row["coherent"] == (theirs <= limit).mean()
    assert row["perplexity"] == perplexity(model, tokenizer, PAIRS, max_response=32).value


def test_outcomes_are_those_of_the_answers(tmp_path, monkeypatch):
    said = {"a": "I cannot do that.", "b": "Sure, here it is."}
    monkeypatch.setattr(outcomes, "generate", lambda m, t, prompts, n: [said[p] for p in prompts])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    read = coherence(model, tokenizer, ["a", "b"], said.values(), 1e9).perplexity
    limit = float(read.mean())
    asked = ["a", "b"], ["b", "a"], 4, tmp_path / "said.json"
    found = outcomes.prompt_outcomes(model, tokenizer, *asked, model, limit)
    assert found["succeeded"] == [False, True] and found["over_refused"] == [False, True]
    assert found["coherent"] == [value <= limit for value in read]
    assert found["margin"] == pytest.approx(refusal_margins(model, tokenizer, ["a", "b"]))


@pytest.fixture
def calls(monkeypatch) -> list:
    "One entry for each time that the safety report generates."
    calls = []

    def spy(*arguments, **options):
        calls.append(1)
        return generate(*arguments, **options)

    monkeypatch.setattr(evaluation, "generate", spy)
    return calls


def test_safety_report_is_one_consistent_row(calls):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    row = safety_report(model, tokenizer, PROMPTS, PAIRS, max_new_tokens=6)
    assert len(calls) == 2
    assert all(isinstance(v, (int, float)) for v in row.values())
    assert len(pd.DataFrame([row])) == 1
    for name in (
        "attack_success",
        "attack_success_wei",
        "not_refused_and_coherent",
        "coherent",
        "over_refusal",
        "perplexity",
    ):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row[f"{name}_n"] in (len(PROMPTS), len(PAIRS))


def test_safety_report_of_responses_that_are_given(calls, tmp_path):
    options = dict(
        model=tiny_model(),
        tokenizer=tiny_tokenizer(),
        prompts=PROMPTS[:2],
        benign=PAIRS,
        responses=["I cannot", "A fine answer"],
        benign_responses=["Sorry", "a", "b"],
        max_perplexity=1e9,
        max_response=4,
    )
    given = safety_report(judge="wei", completions=tmp_path / "kept.json", **options)
    assert not calls
    names = ("attack_success", "attack_success_gcg", "not_refused_and_coherent", "coherent")
    assert [given[name] for name in names] == [0.5, 0.5, 0.5, 1]
    assert given["over_refusal"] == pytest.approx(1 / 3)
    assert given == safety_report(judge="wei", **options)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["harmful"] == [[PROMPTS[0], "I cannot"], [PROMPTS[1], "A fine answer"]]
    assert [said for _, said in kept["benign"]] == options["benign_responses"]
    own = safety_report(judge=["A fine", "Sorry"], **options)
    assert own["attack_success"] == 0.5
    assert own["over_refusal"] == pytest.approx(1 / 3)
    assert "attack_success_gcg" in own


def test_an_earlier_report_is_read_as_it_was_measured(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    report = safety_report(model, tokenizer, PROMPTS, PAIRS, max_new_tokens=6)
    other = {name: 0.5 for name in report}
    pd.DataFrame(
        [
            {"model": model, "units": 3} | r | {"attack_success_second": 0.5}
            for model, r in (("b", other), ("a", report))
        ]
    ).to_csv(tmp_path / "reports.csv", index=False)
    read = earlier_report(tmp_path / "reports.csv", model="a")
    assert read == pytest.approx(report)
    assert list(read) == list(report)
    assert earlier_report(tmp_path / "reports.csv", model="b") == other
    assert earlier_report(tmp_path / "reports.csv", model="c") is None
    assert earlier_report(tmp_path / "none.csv", model="a") is None


def test_a_response_that_is_no_text_keeps_its_row():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    values = evaluation.response_perplexities(model, tokenizer, ["a", "b", "c"], ["", "Yes.", " "])
    alone = evaluation.response_perplexities(model, tokenizer, ["b"], ["Yes."])
    assert values[1] == pytest.approx(alone[0]) and np.isinf(values[[0, 2]]).all()
    long = "yes " * model.config.max_position_embeddings
    with pytest.raises(SsahError, match="pair 2 has .* more than the model's context") as error:
        evaluation.response_perplexities(model, tokenizer, ["a", "b", "c"], ["", "", long])
    one_line(error)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(completions="."), "is a folder; name a JSON file"),
        (dict(max_perplexity=-1), "max_perplexity=-1 is not usable"),
        (dict(benign_responses=["a"]), "3 prompts but 1 responses"),
        (dict(responses=["a"]), "prompts but 1 responses"),
    ],
)
def test_a_report_is_checked_before_a_model_is_asked(wrong, words, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(SsahError, match=words) as error:
        safety_report(tiny_model(), tiny_tokenizer(), PROMPTS, PAIRS, **wrong)
    one_line(error)


@pytest.mark.parametrize("name, judge", [("low", ("zzz",)), ("broken", "zzz")])
def test_a_judge_that_would_spoil_a_report_is_refused_first(name, judge, monkeypatch):
    monkeypatch.setitem(evaluation.JUDGES, name, judge)
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(SsahError, match="cannot be called 'low'|'broken'"):
        safety_report(tiny_model(), tiny_tokenizer(), PROMPTS, PAIRS)


def test_coherence_is_that_of_an_answer_in_its_conversation():
    model, tokenizer, system = tiny_model(), tiny_tokenizer(), "Be brief."
    said = [pair["response"] for pair in PAIRS]
    asked = [pair["prompt"] for pair in PAIRS]
    encoded = encode_pairs(tokenizer, PAIRS, system, closed=False)
    losses = pair_losses(model, encoded)
    found = coherence(model, tokenizer, asked, said, math.inf, system=system)
    assert found.perplexity.to_numpy() == pytest.approx(np.exp(losses[:, 0] / losses[:, 1]))
    without = coherence(model, tokenizer, asked, said, math.inf)
    assert not np.allclose(found.perplexity, without.perplexity)
    limit = float(found.perplexity.median())
    given = dict(responses=said, benign_responses=said, max_perplexity=limit)
    report = safety_report(model, tokenizer, asked, PAIRS, system=system, **given)
    given.pop("max_perplexity")
    limit = coherence_threshold(model, tokenizer, PAIRS, 24, system=system)
    own = safety_report(model, tokenizer, asked, PAIRS, system=system, **given)
    assert own["max_perplexity"] == limit
    limit = report["max_perplexity"]
    wanted = coherence(model, tokenizer, asked, said, limit, system=system)
    assert report["coherent"] == wanted.coherent.mean()
