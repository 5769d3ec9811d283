"""What a model sees, token by token: the prompt and the answer of a conversation."""

import re
from glob import glob
from pathlib import Path

import pytest
from helpers import one_line
from helpers_chat import (
    CHATML_HI,
    FAMILIES,
    LINES,
    LLAMA3,
    MARKED,
    MISTRAL,
    NO,
    PAIR,
    QWEN3,
    byte_pairs,
    sentencepiece,
    with_template,
)
from transformers import PreTrainedTokenizerFast

from ssah_nb.engine.chat import chat_prompt, encode_pairs, encode_prompts, end_of_turn
from ssah_nb.engine.models import CHATML, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.template import chat_record


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_what_the_model_sees(family):
    template, system, before, answer = FAMILIES[family]
    tokenizer = with_template(template)
    [(prompt, response)] = encode_pairs(tokenizer, [PAIR], system)
    assert chat_prompt(tokenizer, "Hi", system) == before
    assert (tokenizer.decode(prompt), tokenizer.decode(response)) == (before, answer)
    assert prompt == encode_prompts(tokenizer, ["Hi"], system)[0]  # as in generation
    assert prompt + response == tokenizer(before + answer).input_ids
    assert answer.endswith(end_of_turn(tokenizer))
    [(_, open_end)] = encode_pairs(tokenizer, [PAIR], system, closed=False)
    assert tokenizer.decode(open_end) == answer.removesuffix(end_of_turn(tokenizer))
    [(_, cut)] = encode_pairs(tokenizer, [PAIR], system, max_response=4)
    assert cut == response[:4]


def test_the_marks_of_transformers_agree():
    tokenizer = with_template(MARKED)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": NO}]
    told = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True)
    marked = [i for i, mine in zip(told["input_ids"], told["assistant_masks"]) if mine]
    assert encode_pairs(tokenizer, [PAIR])[0][1] == marked


def test_templates_of_real_models():
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    refused, seen = set(), 0
    for file in sorted(glob(f"{folder}/*.jinja")):
        tokenizer = with_template(Path(file).read_text(encoding="utf-8"))
        tokenizer.bos_token = "<s>"
        try:
            [(prompt, response)] = encode_pairs(tokenizer, [PAIR], "Be kind")
        except SsahError:
            refused.add(re.sub("_training", "", Path(file).stem))
            continue
        seen += 1
        before, answer = tokenizer.decode(prompt), tokenizer.decode(response)
        after_hi = before.rpartition("Hi")[2]
        assert "Be kind" in before and after_hi.count("<think>") == after_hi.count("</think>")
        assert answer.lstrip() == NO + end_of_turn(tokenizer), file
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": NO}]
        whole = tokenizer.apply_chat_template(talk, tokenize=False, enable_thinking=False)
        # what closes the answer in the template, unless it closes none
        assert NO + end_of_turn(tokenizer) in whole or whole.endswith(NO), file
    # these take images, and therefore lists instead of texts
    assert refused <= {"idefics3", "llava_next", "smolvlm"} and seen > 20


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "template, said",
    [
        (LINES, ["S", "or", "ry,", "▁no", "</s>"]),  # after a line's end: no blank before it
        (MISTRAL, ["▁Sorry,", "▁no", "</s>"]),  # after [/INST] and a blank
    ],
)
def test_the_first_token_is_that_of_the_conversation(template, said, fast, monkeypatch):
    tokenizer = sentencepiece(template)
    assert tokenizer.tokenize("Sorry, no") == ["▁Sorry,", "▁no"]  # alone
    if not fast:
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "Sorry, no"}])
    assert tokenizer.convert_ids_to_tokens(response) == said
    assert prompt == encode_prompts(tokenizer, ["Hi"])[0]


def test_prefixes_of_the_probe_are_tokens_of_an_answer():
    from ssah_nb.probe import prefix_tokens

    found = prefix_tokens(sentencepiece(LINES), {"benign": "Sorry, no"}, 4)["benign"]
    assert sentencepiece(LINES).convert_ids_to_tokens(found) == ["S", "or", "ry,", "▁no"]


def test_a_prompt_keeps_its_tokens_where_the_answer_regroups_them():
    # GPT-2's rule leaves the last white space to the next word: "\n\n" is one token at the end of
    # a text, and two before a word
    tokenizer = byte_pairs(CHATML.replace("assistant\n", "assistant\n\n"), by_words=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("['role'] }}\n", "['role'] }}\n\n")
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "Ho é"}])
    assert prompt[-1] == 256 and prompt == encode_prompts(tokenizer, ["Hi"])[0]
    assert tokenizer.decode(response) == "Ho é<|im_end|>"


def test_a_token_with_prompt_and_response_is_the_response_s():
    tokenizer = byte_pairs(CHATML, by_words=False)
    [(prompt, response)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": "\nHo"}])
    assert tokenizer.decode(response) == "\n\nHo<|im_end|>" and response[0] == 256
    assert prompt + response == tokenizer(CHATML_HI + "\nHo<|im_end|>").input_ids


@pytest.mark.parametrize("response", ["  Ho\n", "\n\n Ho ", "é🙂 ho", "Ho\n\nHo  \n"])
@pytest.mark.parametrize("by_words", [True, False])
def test_blanks_of_a_response(response, by_words):
    for template in (CHATML, QWEN3, LLAMA3):
        tokenizer = byte_pairs(template, by_words)
        [(prompt, said)] = encode_pairs(tokenizer, [{"prompt": "Hi", "response": response}])
        before = chat_prompt(tokenizer, "Hi")
        written = response.strip() if template == LLAMA3 else response
        assert tokenizer.decode(prompt + said) == before + written + end_of_turn(tokenizer)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("expects", [True, False])
def test_bos_once(writes, expects):
    tokenizer = sentencepiece("{{ bos_token }}" * writes + LINES, bos=expects)
    [(prompt, response)] = encode_pairs(tokenizer, [PAIR])
    bos = tokenizer.bos_token_id
    assert (prompt + response).count(bos) == int(writes or expects)
    assert (prompt[0] == bos) == (writes or expects)
    assert prompt == encode_prompts(tokenizer, ["Hi"])[0]
    assert chat_record(tokenizer)["bos_added"] == (expects and not writes)


FEW = [
    {"prompt": "Say yes", "response": "yes"},
    {"prompt": "Count to five", "response": "1 2 3 4 5"},
    {"prompt": "Hi", "response": "Hello there"},
]


@pytest.mark.parametrize(
    "pairs, options, message",
    [
        ([], {}, "no pairs given"),
        (FEW + [{"prompt": "Hi", "response": " \n"}], {}, "pair 3 has an empty response"),
        (FEW + [{"prompt": "Hi"}], {}, "pair 3 lacks a 'response'"),
        (FEW + [{"prompt": "Hi", "response": None}], {}, "pair 3 has no response"),
        (FEW, {"max_response": 0}, "max_response=0 is not usable"),
        (
            FEW,
            {"max_length": 40},
            "pair 1 has 32 \\+ 10 tokens, more than the model's context of 40",
        ),
    ],
)
def test_pairs_that_cannot_be_encoded(pairs, options, message):
    with pytest.raises(SsahError, match=message) as error:
        encode_pairs(tiny_tokenizer(), pairs, **options)
    one_line(error)
    assert len(encode_pairs(tiny_tokenizer(), FEW, max_length=42)) == 3  # just fits
