"""Prompts, tokens and batches."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_ways import PAIRS

from ssah_nb.anchoring import Anchor
from ssah_nb.attribution import importance
from ssah_nb.engine.batches import UNCOMPILED, apart, decoder, pad_batch
from ssah_nb.engine.batches import response_losses, token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.evaluation import perplexity
from ssah_nb.engine.holding import HiddenAnchor
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import side_by_side
from ssah_nb.units import UnitMask, depth_two


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


def test_the_stance_of_the_compiler_returns_whatever_threads_do():
    stance = torch._dynamo.eval_frame._stance
    for _ in range(20):
        models = [tiny_model(seed=seed) for seed in (0, 1)]
        side_by_side(lambda model: len(depth_two(model)), models, torch.device("cpu"))
        assert torch._dynamo.eval_frame._stance == stance
    with pytest.raises(ValueError), UNCOMPILED, UNCOMPILED:
        raise ValueError
    assert torch._dynamo.eval_frame._stance == stance and not UNCOMPILED.open


def test_blocks_that_were_compiled_and_run_are_heard():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    wanted = importance(model, tokenizer, PAIRS)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    perplexity(model, tokenizer, PAIRS)
    found = importance(model, tokenizer, PAIRS)
    assert torch.equal(found.mlp, wanted.mlp) and torch.equal(found.attention, wanted.attention)


def test_an_anchor_hears_units_of_compiled_blocks():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    units = UnitMask(torch.ones(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    perplexity(model, tokenizer, PAIRS)
    anchor = Anchor(model, tokenizer, PAIRS, on="units", units=units)
    assert anchor.loss(model) < 1e-3 and anchor.report().mean < 1e-4


@pytest.mark.parametrize("hold", [Anchor, HiddenAnchor])
def test_a_long_refusal_beside_short_ones_is_no_drift(hold):
    tokenizer = tiny_tokenizer()
    stretched = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model = tiny_model(max_position_embeddings=64, rope_parameters=stretched)
    for layer in model.model.layers:  # attention that looks at positions
        layer.self_attn.q_proj.weight.data *= 3
        layer.self_attn.k_proj.weight.data *= 3
    rows = [{"prompt": "Open it. " * n, "response": "No, I will not."} for n in (1, 2, 3, 9)]
    anchor = hold(model, tokenizer, rows, prompts=4, seed=1)
    assert anchor.loss(model).item() < 1e-4
    batch = pad_batch(encode_pairs(tokenizer, rows, max_response=4), [0, 1, 2, 3])
    with torch.no_grad():
        together = response_losses(model, batch)
        (each,) = apart(model, batch, lambda part: [response_losses(model, part)])
    assert (together - each).abs().max() > 0.001  # so it matters who runs beside whom


def test_another_thread_may_run_a_model_that_is_watched():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    wanted = importance(model, tokenizer, PAIRS)

    def meanwhile(module, inputs):
        if not aside:
            aside.append(True)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(model, input_ids=torch.arange(60)[None]).result()

    aside = []
    model.model.layers[0].register_forward_pre_hook(meanwhile)
    found = importance(model, tokenizer, PAIRS)
    assert aside and torch.equal(found.mlp, wanted.mlp)


def test_the_decoder_has_no_head():
    model = tiny_model()
    assert decoder(model) is model.model and decoder(model.model) is model.model
    assert depth_two(model.model)["mlp"][0].b == "layers.0.mlp.down_proj"
    assert depth_two(model)["mlp"][0].b == "model.layers.0.mlp.down_proj"
