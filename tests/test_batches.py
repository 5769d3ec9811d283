"""Prompts, tokens and batches."""

import random

import pytest
from helpers import one_line

from ssah_nb.engine.batches import decoder, token_batches
from ssah_nb.engine.chat import chat_prompt, encode_pairs, encode_prompts, end_of_turn
from ssah_nb.engine.models import CHATML, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.units import depth_two

PAIRS = [
    {"prompt": "Say yes", "response": "yes"},
    {"prompt": "Count to five", "response": "1 2 3 4 5"},
    {"prompt": "Hi", "response": "Hello there"},
]


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize(
    "template, system, expected",
    [
        (CHATML, None, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML,
            "Be kind",
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (GEMMA, None, "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
        (
            GEMMA,
            "Be kind",
            "<start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        (PHI, None, "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ],
)
def test_chat_prompt(template, system, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat_prompt(tokenizer, "Hi", system) == expected
    assert tokenizer.decode(encode_prompts(tokenizer, ["Hi"], system)[0]) == expected


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (PHI, "<|end|>"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|im_end|>"),
    ],
)
def test_a_response_ends_with_the_turn(template, end):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end
    prompt, response = encode_pairs(tokenizer, PAIRS)[0]
    assert tokenizer.decode(response) == "yes" + end
    assert tokenizer.decode(prompt) == chat_prompt(tokenizer, "Say yes")
    assert tokenizer.decode(encode_pairs(tokenizer, PAIRS, max_response=2)[0][1]) == "ye"


@pytest.mark.parametrize(
    "pairs, options, message",
    [
        ([], {}, "no pairs given"),
        (PAIRS + [{"prompt": "Hi", "response": " \n"}], {}, "pair 3 has an empty response"),
        (PAIRS + [{"prompt": "Hi"}], {}, "pair 3 lacks a 'prompt' or 'response'"),
        (PAIRS + [{"prompt": "Hi", "response": None}], {}, "pair 3 lacks"),
        (PAIRS, {"max_response": 0}, "max_response=0 keeps no token"),
        (
            PAIRS,
            {"max_length": 40},
            "pair 1 has 32 \\+ 10 tokens, more than the model's context of 40",
        ),
    ],
)
def test_pairs_that_cannot_be_encoded(pairs, options, message):
    with pytest.raises(SsahError, match=message) as error:
        encode_pairs(tiny_tokenizer(), pairs, **options)
    one_line(error)
    assert len(encode_pairs(tiny_tokenizer(), PAIRS, max_length=42)) == 3  # just fits


@pytest.mark.parametrize("max_tokens", [1, 40, 64, 200, 10_000])
def test_token_batches(max_tokens):
    draw = random.Random(0)
    encoded = [
        (
            [draw.randrange(256) for _ in range(draw.randint(1, 30))],
            [draw.randrange(256) for _ in range(draw.randint(1, 30))],
        )
        for _ in range(50)
    ]
    batches = list(token_batches(encoded, max_tokens))
    rows = [r for b in batches for r in b.rows]
    length = [len(encoded[r][0]) + len(encoded[r][1]) for r in rows]
    assert sorted(rows) == list(range(50)) and length == sorted(length, reverse=True)
    for b, following in zip(batches, batches[1:] + [None]):
        assert b.input_ids.shape == b.attention_mask.shape == b.response_mask.shape
        assert b.input_ids.numel() <= max_tokens or len(b.rows) == 1
        if following:
            # no batch is smaller than it must be
            assert (len(b.rows) + 1) * b.input_ids.shape[1] > max_tokens
        for i, r in enumerate(b.rows):
            p, q = encoded[r]
            n = len(p) + len(q)
            assert b.input_ids[i, :n].tolist() == p + q
            assert b.attention_mask[i].tolist() == [1] * n + [0] * (b.input_ids.shape[1] - n)
            assert b.response_mask[i].nonzero().flatten().tolist() == list(range(len(p), n))


def test_the_decoder_has_no_head():
    model = tiny_model()
    assert decoder(model) is model.model and decoder(model.model) is model.model
    assert depth_two(model.model)["mlp"][0].b == "layers.0.mlp.down_proj"
    assert depth_two(model)["mlp"][0].b == "model.layers.0.mlp.down_proj"
