"""The refusal margin against a plain computation with the model's own log-softmax."""

import numpy as np
import peft
import pytest
import torch
from helpers import one_line
from helpers_chat import QWEN3, SMOLLM3, with_template
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb import chat_options, refusal_margin, refusal_margins
from ssah_nb.engine import margin
from ssah_nb.engine.chat import encode_pairs, encode_prompts
from ssah_nb.engine.evaluation import safety_report
from ssah_nb.engine.intervals import bootstrap_mean
from ssah_nb.engine.margin import (
    COMPLIANCE_OPENINGS,
    REFUSAL_OPENINGS,
    both_openings,
    opening_tokens,
    prefix_free,
    sequence_log_probabilities,
)
from ssah_nb.engine.models import CHATML, TINY_SIZES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

PROMPTS = ["Hi", "Name three colours, please", "Ho", "Sum 2 and 3", "Tell a story of a fox"]
NO, YES = ["I'm sorry", "I cannot", "Sorry"], ["Sure", "Here", "1"]


def plainly(model, prompt: list[int], opening: list[int], virtual: int = 0) -> float:
    "log p of an opening after a prompt, from one forward pass over both."
    with torch.no_grad():
        logits = model(torch.tensor([prompt + opening])).logits[0].double().log_softmax(-1)
    first = virtual + len(prompt) - 1
    return sum(float(logits[first + step, token]) for step, token in enumerate(opening))


def plain_margins(model, tokenizer, prompts, system=None, virtual=0) -> np.ndarray:
    "As `refusal_margins` of NO and YES, one prompt and one opening at a time."
    found = []
    for prompt in encode_prompts(tokenizer, prompts, system):
        chances = [
            sum(
                np.exp(plainly(model, prompt, tokenizer(words).input_ids, virtual))
                for words in openings
            )
            for openings in (NO, YES)
        ]
        found.append(np.log(chances[0] / chances[1]))
    return np.array(found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("system", [None, "Be safe."])
def test_margin_is_that_of_a_plain_loop(name, system):
    model, tokenizer = tiny_model(name, sliding_window=8).double(), tiny_tokenizer()
    found = refusal_margins(model, tokenizer, PROMPTS, system, NO, YES)
    right = plain_margins(model, tokenizer, PROMPTS, system)
    assert found == pytest.approx(right, abs=1e-9)
    assert len(set(found)) == len(PROMPTS)
    mean = refusal_margin(model, tokenizer, PROMPTS, system, refusals=NO, compliances=YES)
    assert mean.value == pytest.approx(right.mean())
    assert mean == bootstrap_mean(found) and mean.low < mean.value < mean.high
    assert mean.n == len(PROMPTS)


def other_model(kind: str, **config):
    "A tiny model of an architecture that `tiny_model` does not make, in float64."
    sizes = AutoConfig.for_model(kind, **(TINY_SIZES | config))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(sizes).double().eval()


@pytest.mark.parametrize("kind", ["falcon_h1", "longrope", "prompt_tuning"])
def test_models_whose_cache_cannot_branch_are_read_by_their_own_forward(kind, monkeypatch):
    used, own = [], margin.own_forward
    monkeypatch.setattr(margin, "own_forward", lambda *a: used.append(1) or own(*a))
    virtual = 0
    if kind == "falcon_h1":
        model = other_model(kind, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    elif kind == "longrope":
        factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
        rope = dict(rope_type="longrope", rope_theta=1e4, **factors)
        limit = dict(original_max_position_embeddings=40, max_position_embeddings=512)
        rope |= {"original_max_position_embeddings": 40}
        model = tiny_model("phi3", rope_parameters=rope, **limit).double()
    else:
        virtual = 3
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model().double(), config).double().eval()
    tokenizer, prompts = tiny_tokenizer(), ["Hi", "Name three colours, please"]
    found = refusal_margins(model, tokenizer, prompts, None, NO, YES)
    right = plain_margins(model, tokenizer, prompts, None, virtual)
    assert found == pytest.approx(right, abs=1e-5)  # some compute in float32 whatever the dtype
    assert used


def test_a_margin_does_not_depend_on_its_batch():
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    whole = refusal_margins(model, tokenizer, PROMPTS)
    assert refusal_margins(model, tokenizer, PROMPTS[::-1])[::-1] == pytest.approx(whole, abs=1e-12)
    for size in (1, 2):
        again = refusal_margins(model, tokenizer, PROMPTS, batch_size=size)
        assert again == pytest.approx(whole, abs=1e-12)
    alone = [refusal_margins(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert alone == pytest.approx(whole, abs=1e-12)


def test_no_opening_is_counted_twice():
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    assert prefix_free([[1, 2, 3], [4], [1, 2], [4], [2]]) == [(2,), (4,), (1, 2)]
    few = refusal_margins(model, tokenizer, PROMPTS, refusals=["I can", "Sorry"])
    many = ["Sorry, no", "I can", "I cannot", "I can't", "Sorry", "I can"]
    assert (refusal_margins(model, tokenizer, PROMPTS, refusals=many) == few).all()
    every = opening_tokens(tokenizer, REFUSAL_OPENINGS)
    assert not [a for a in every for b in every if a != b and a[: len(b)] == b]


def test_all_that_may_follow_has_probability_one():
    model = tiny_model().double()
    one = [(token,) for token in range(1, 258)]
    two = [(0, token) for token in range(258)]
    scores = sequence_log_probabilities(model, [[5, 6, 7], [8]], one + two)
    assert np.exp(scores).sum(1) == pytest.approx([1, 1], abs=1e-9)


def test_the_default_openings_are_two_sides():
    no, yes = both_openings(tiny_tokenizer(), REFUSAL_OPENINGS, COMPLIANCE_OPENINGS)
    decode = tiny_tokenizer().decode
    assert {decode(tokens) for tokens in yes} == set(COMPLIANCE_OPENINGS)
    assert {decode(tokens) for tokens in no} <= set(REFUSAL_OPENINGS)


def test_swapping_the_sides_turns_the_sign():
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    margins = refusal_margins(model, tokenizer, PROMPTS, refusals=NO, compliances=YES)
    swapped = refusal_margins(model, tokenizer, PROMPTS, refusals=YES, compliances=NO)
    assert swapped == pytest.approx(-margins, abs=1e-12)
    more = refusal_margins(model, tokenizer, PROMPTS, refusals=[*NO, "A"], compliances=YES)
    assert (more > margins).all()


def test_what_is_refused_by_name():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(SsahError, match="'I can' and the compliance 'I can' begin with the same"):
        refusal_margin(model, tokenizer, PROMPTS, refusals=["I can"], compliances=["I can"])
    with pytest.raises(SsahError, match="and the compliance 'I can' begin"):
        refusal_margin(model, tokenizer, PROMPTS, refusals=["I can't"], compliances=["I can"])
    with pytest.raises(
        SsahError, match="the refusal 'I can' and the compliance 'I can help' begin"
    ):
        refusal_margin(model, tokenizer, PROMPTS, refusals=["I can"], compliances=["I can help"])
    for openings in ([], ["Sure", " "], [None]):
        with pytest.raises(SsahError, match="no usable openings") as error:
            refusal_margin(model, tokenizer, PROMPTS, compliances=openings)
        one_line(error)
    with pytest.raises(SsahError, match="one string|put it in a list"):
        refusal_margin(model, tokenizer, "Hi")
    with pytest.raises(SsahError):
        refusal_margin(model, tokenizer, [])
    with pytest.raises(SsahError, match="batch_size=0"):
        refusal_margin(model, tokenizer, PROMPTS, batch_size=0)
    with pytest.raises(SsahError, match="context of 512"):
        refusal_margin(model, tokenizer, ["a" * 500])
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(SsahError, match="a logit after prompt 0 is NaN or infinite"):
        refusal_margin(model, tokenizer, PROMPTS)


def test_the_margin_stands_beside_every_rate():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    benign = [{"prompt": "Sum 2 and 3", "response": "5"}]
    row = safety_report(model, tokenizer, PROMPTS, benign, max_new_tokens=4)
    margin = refusal_margin(model, tokenizer, PROMPTS)
    assert row["refusal_margin"] == pytest.approx(margin.value)
    assert [row["refusal_margin_low"], row["refusal_margin_high"]] == pytest.approx(
        [margin.low, margin.high]
    )
    assert row["refusal_margin_n"] == len(PROMPTS)
    with_system = safety_report(
        model, tokenizer, PROMPTS, benign, system="Be safe.", max_new_tokens=4
    )
    margin = refusal_margin(model, tokenizer, PROMPTS, "Be safe.")
    assert with_system["refusal_margin"] == pytest.approx(margin.value)


def test_the_margin_is_that_of_the_template_as_it_is_filled_in():
    model, benign = tiny_model().double(), [{"prompt": "Sum 2 and 3", "response": "5"}]
    tokenizer = with_template("{{ persona }} " + CHATML)
    said = dict(responses=["No."] * len(PROMPTS), benign_responses=["5"], max_perplexity=9.0)
    chat_options(tokenizer, persona="A pirate")
    pirate = refusal_margin(model, tokenizer, PROMPTS)
    row = safety_report(model, tokenizer, PROMPTS, benign, **said)
    assert row["refusal_margin"] == pirate.value
    chat_options(tokenizer, persona="A judge")
    assert refusal_margin(model, tokenizer, PROMPTS).value != pirate.value
    row = safety_report(model, tokenizer, PROMPTS, benign, **said)
    assert row["refusal_margin"] == refusal_margin(model, tokenizer, PROMPTS).value


@pytest.mark.parametrize("template", [QWEN3, SMOLLM3])
def test_an_answer_stands_after_an_empty_thought_also_where_thoughts_are_on(template):
    model, tokenizer = tiny_model().double(), with_template(template)
    chat_options(tokenizer, thinking=True)
    thinking = refusal_margins(model, tokenizer, PROMPTS, None, NO, YES)
    before = [
        p for p, _ in encode_pairs(tokenizer, [{"prompt": p, "response": "No"} for p in PROMPTS])
    ]
    assert all("<think>\n\n</think>" in tokenizer.decode(ids) for ids in before)
    right = [
        np.log(chances[0] / chances[1])
        for prompt in before
        for chances in [
            [
                sum(np.exp(plainly(model, prompt, tokenizer(w).input_ids)) for w in side)
                for side in (NO, YES)
            ]
        ]
    ]
    assert thinking == pytest.approx(np.array(right), abs=1e-9)


def test_options_reach_what_they_are_for(monkeypatch):
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    margins = refusal_margins(model, tokenizer, PROMPTS)
    for seed in (0, 1):
        mean = refusal_margin(model, tokenizer, PROMPTS, seed=seed)
        assert mean == bootstrap_mean(margins, seed=seed)
    assert mean != bootstrap_mean(margins)
    assert opening_tokens(tokenizer, [" Sure\n"]) == opening_tokens(tokenizer, "Sure")
    seen, read, encode = [], margin.read_sequences, margin.encode_pairs
    monkeypatch.setattr(
        margin, "read_sequences", lambda m, p, s: seen.append(tuple(p.shape)) or read(m, p, s)
    )
    refusal_margins(model, tokenizer, ["Hi", "Ho", "Hm", "Ha", "Hee"], batch_size=3)
    assert sorted(rows for rows, _ in seen) == [1, 1, 3] and len(set(seen)) == 3
    monkeypatch.setattr(
        margin, "encode_pairs", lambda t, pairs, system: seen.append(system) or encode(t, pairs)
    )
    refusal_margins(model, tokenizer, ["Hi"], "Be kind.")
    assert seen.count("Be kind.") == 2  # the openings stand after it, too
