"""Prompts, tokens and batches."""

import random

import pytest

from ssah_nb.engine.batches import decoder, token_batches
from ssah_nb.engine.models import tiny_model
from ssah_nb.units import depth_two


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
