import random

import pandas as pd
import pytest
import torch

from ssah_nb.engine.alignment import STOCK_REFUSALS, alignment_pairs
from ssah_nb.engine.training import finetune, mixed_precision, training_batches, training_perplexity
from ssah_nb.probe import probe, probe_margin
from ssah_nb.attribution import importance
from ssah_nb.classes import pruned
from ssah_nb.units import UnitMask
from ssah_nb.engine.evaluation import perplexity
from ssah_nb.engine.batches import chat_prompt
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

PAIRS = [{"prompt": f"Say {w}", "response": w} for w in ("yes", "no", "maybe", "never")]


def test_alignment_pairs_refuse_the_harmful_and_keep_the_benign():
    pairs = alignment_pairs([{"prompt": "bad", "response": "ignored"}] * 30, PAIRS, seed=1)
    assert all(p["response"] in STOCK_REFUSALS for p in pairs[:30]) and pairs[30:] == PAIRS
    assert (
        pairs
        == alignment_pairs([{"prompt": "bad"}] * 30, PAIRS, seed=1)
        != alignment_pairs([{"prompt": "bad"}] * 30, PAIRS, seed=2)
    )


def test_training_batches_hold_each_row_once():
    encoded = [([1] * n, [2]) for n in range(1, 38)]
    batches = training_batches(encoded, 4, random.Random(0))
    assert sorted(r for b in batches for r in b) == list(range(37)) and max(map(len, batches)) == 4


def test_finetune_learns_and_repeats():
    runs = []
    for _ in range(2):
        model = tiny_model()
        runs.append(
            finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2).loss.tolist()
        )
    assert runs[0] == runs[1] and runs[0][-1] < 0.7 * runs[0][0]


def test_training_under_autocast_follows_float32():
    losses = {}
    for on in (False, True):
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            losses[on] = finetune(
                model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2
            ).loss
    assert (losses[True] / losses[False] - 1).abs().max() < 0.1 and losses[True].iloc[
        -1
    ] < 0.7 * losses[True].iloc[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_precision_follows_float32(architecture):
    losses = {}
    for mixed in (False, True):
        model = tiny_model(architecture)
        history = [
            finetune(model, tiny_tokenizer(), PAIRS, lr=1e-3, epochs=2, batch_size=2, mixed=on).loss
            for on in (mixed, False, mixed)
        ]  # an ordinary model between
        losses[mixed] = pd.concat(history, ignore_index=True)
    assert (
        not torch.equal(torch.tensor(losses[True]), torch.tensor(losses[False]))
        and (losses[True] / losses[False] - 1).abs().max() < 0.01
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(
        torch.equal(p, p.bfloat16().float()) for p in model.parameters() if p.ndim == 2
    )  # the float32 weights were trained, not their copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_a_model_of_two_bytes(dtype):
    model = tiny_model().to(dtype)
    before = perplexity(model, tiny_tokenizer(), PAIRS).value
    history = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2, mixed=True)
    assert {p.dtype for p in model.parameters()} == {dtype} and history.loss.iloc[
        -1
    ] < 0.7 * history.loss.iloc[0]
    assert (
        perplexity(model, tiny_tokenizer(), PAIRS).value < 0.7 * before
    )  # the model itself was trained, not only what it computed with


def test_mixed_precision_ends_with_an_error():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="stop"), mixed_precision(model):
        assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
        raise RuntimeError("stop")
    assert (
        model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
        and model.config._attn_implementation == tiny_model().config._attn_implementation
    )


def test_one_autocast_for_all_measures_what_pruning_and_training_changed():
    model, tokenizer, mask = (
        tiny_model(),
        tiny_tokenizer(),
        UnitMask(torch.arange(64).view(2, 32) % 2 == 0, torch.zeros(2, 4, dtype=torch.bool)),
    )

    def measure():
        with torch.autocast("cpu", torch.bfloat16):
            return perplexity(model, tokenizer, PAIRS).value, importance(
                model, tokenizer, PAIRS
            ).mlp.sum().item()

    def thrice():
        yield measure()
        with pruned(model, mask):
            yield measure()
        finetune(model, tokenizer, PAIRS, lr=1e-2, epochs=2, batch_size=2, mixed=True)
        yield measure()

    apart = list(thrice())
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert list(thrice()) == apart and len(set(apart)) == 3


def test_training_perplexity_is_of_every_kth_pair():
    model, tokenizer, pairs = (
        tiny_model(),
        tiny_tokenizer(),
        [{"prompt": f"Say {i}", "response": "yes " * (1 + i)} for i in range(10)],
    )
    assert training_perplexity(model, tokenizer, pairs) == perplexity(model, tokenizer, pairs).value
    assert (
        training_perplexity(model, tokenizer, pairs, 3, sample=5)
        == perplexity(model, tokenizer, pairs[::2], max_response=3).value
    )


def test_running_a_batch_in_parts_gives_the_same_training():
    losses = [
        finetune(
            tiny_model(), tiny_tokenizer(), PAIRS, lr=1e-3, epochs=2, batch_size=4, max_tokens=m
        ).loss.tolist()
        for m in (10, 10_000)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_finetune_trains_only_what_requires_grad():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(SsahError, match="no parameter"):
        finetune(model, tiny_tokenizer(), PAIRS)
    model.model.layers[0].mlp.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_nan_loss_is_an_error():
    model = tiny_model()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(SsahError, match="training loss is nan at step 0"):
        finetune(model, tiny_tokenizer(), PAIRS)


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
    assert (
        margin.margin.tolist() == pytest.approx([0.3, 0.3])
        and margin.low.tolist() == pytest.approx([0.3, 0.3])
        and margin.n.tolist() == [5, 5]
    )


def test_short_prefix_is_an_error():
    with pytest.raises(SsahError, match="prefix 'x' has 2 tokens, fewer than 10"):
        probe(tiny_model(), tiny_tokenizer(), ["q"], prefixes={"x": "no"})


def test_bfloat16_models_are_trained_in_float32():
    """Steps of 1e-4 on weights near 0.2 are below what bfloat16 can add; the float32 copies keep them."""
    curves = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(torch.bfloat16).to(dtype)  # both start from the same weights
        history = finetune(model, tiny_tokenizer(), PAIRS, lr=2e-4, epochs=40, batch_size=2)
        assert model.dtype == dtype
        curves[dtype] = torch.tensor(history.loss.tolist())
    learned = curves[torch.float32][0] - curves[torch.float32][-1]
    assert learned > 0.3
    assert (curves[torch.float32] - curves[torch.bfloat16]).abs().max() < 0.1 * learned
    parameters = sum(p.numel() for p in tiny_model().parameters())
    assert history.attrs["optimizer_bytes"] >= 3 * 4 * parameters  # two moments and the copy
