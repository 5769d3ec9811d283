"""One training loop, in float32, bfloat16 and mixed precision."""

import random

import pandas as pd
import pytest
import torch

from ssah_nb.attribution import importance
from ssah_nb.classes import pruned
from ssah_nb.engine.evaluation import perplexity
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.training import finetune, mixed_precision, training_batches, training_perplexity
from ssah_nb.units import UnitMask

PAIRS = [{"prompt": f"Say {w}", "response": w} for w in ("yes", "no", "maybe", "never")]


def test_training_batches_hold_each_row_once():
    encoded = [([1] * n, [2]) for n in range(1, 38)]
    batches = training_batches(encoded, 4, random.Random(0))
    assert sorted(r for b in batches for r in b) == list(range(37)) and max(map(len, batches)) == 4


def test_finetune_learns_and_repeats():
    runs = []
    for _ in range(2):
        model = tiny_model()
        history = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2)
        runs.append(history.loss.tolist())
    assert runs[0] == runs[1] and runs[0][-1] < 0.7 * runs[0][0]


def test_training_under_autocast_follows_float32():
    losses = {}
    for on in (False, True):
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            history = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2)
        losses[on] = history.loss
    assert (losses[True] / losses[False] - 1).abs().max() < 0.1
    assert losses[True].iloc[-1] < 0.7 * losses[True].iloc[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_precision_follows_float32(architecture):
    losses = {}
    for mixed in (False, True):
        model = tiny_model(architecture)
        training = dict(lr=1e-3, epochs=2, batch_size=2)
        history = [
            finetune(model, tiny_tokenizer(), PAIRS, mixed=on, **training).loss
            for on in (mixed, False, mixed)  # an ordinary model between
        ]
        losses[mixed] = pd.concat(history, ignore_index=True)
    assert not torch.equal(torch.tensor(losses[True]), torch.tensor(losses[False]))
    assert (losses[True] / losses[False] - 1).abs().max() < 0.01
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # the float32 weights were trained, not their copies
    assert not any(torch.equal(p, p.bfloat16().float()) for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_a_model_of_two_bytes(dtype):
    model = tiny_model().to(dtype)
    before = perplexity(model, tiny_tokenizer(), PAIRS).value
    history = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, epochs=8, batch_size=2, mixed=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert history.loss.iloc[-1] < 0.7 * history.loss.iloc[0]
    # the model itself was trained, not only what it computed with
    assert perplexity(model, tiny_tokenizer(), PAIRS).value < 0.7 * before


def test_mixed_precision_ends_with_an_error():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="stop"), mixed_precision(model):
        assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
        raise RuntimeError("stop")
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert model.config._attn_implementation == tiny_model().config._attn_implementation


def test_one_autocast_for_all_measures_what_pruning_and_training_changed():
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    mask = UnitMask(torch.arange(64).view(2, 32) % 2 == 0, torch.zeros(2, 4, dtype=torch.bool))

    def measure():
        with torch.autocast("cpu", torch.bfloat16):
            scored = importance(model, tokenizer, PAIRS)
            return perplexity(model, tokenizer, PAIRS).value, scored.mlp.sum().item()

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


@pytest.mark.parametrize("mark", [False, True])
def test_finetune_follows_the_mark_of_the_run(mark):
    losses = {}
    for mixed in (None, mark):
        model = tiny_model()
        model.ssah_mixed = mark
        history = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, batch_size=2, mixed=mixed)
        losses[mixed] = history.loss.tolist()
    assert losses[None] == losses[mark]
    model = tiny_model()
    model.ssah_mixed = mark
    other = finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, batch_size=2, mixed=not mark)
    assert other.loss.tolist() != losses[mark]  # what is said outweighs the mark


def test_training_perplexity_is_of_every_kth_pair():
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    pairs = [{"prompt": f"Say {i}", "response": "yes " * (1 + i)} for i in range(10)]
    assert training_perplexity(model, tokenizer, pairs) == perplexity(model, tokenizer, pairs).value
    every_second = perplexity(model, tokenizer, pairs[::2], max_response=3).value
    assert training_perplexity(model, tokenizer, pairs, 3, sample=5) == every_second


def test_running_a_batch_in_parts_gives_the_same_training():
    training = dict(lr=1e-3, epochs=2, batch_size=4)
    losses = [
        finetune(tiny_model(), tiny_tokenizer(), PAIRS, max_tokens=m, **training).loss.tolist()
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


def test_gradients_from_before_do_not_join_the_first_step():
    def tuned(model):
        finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2)
        return model

    left = tiny_model()
    ids = torch.arange(8)[None]
    (100 * left(input_ids=ids, labels=ids).loss).backward()
    assert all(p.grad is not None for p in left.parameters())
    models = zip(tuned(left).parameters(), tuned(tiny_model()).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in models)
    assert all(p.grad is None for p in left.parameters())


@pytest.mark.parametrize("given", [lambda losses, pairs: losses.mean(), lambda *_: None])
def test_losses_of_ones_own_are_one_a_token(given):
    with pytest.raises(SsahError, match="token_losses gave .*; return losses of tokens") as error:
        finetune(tiny_model(), tiny_tokenizer(), PAIRS, token_losses=given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_seed_says_what_is_dropped(dropout):
    torch.manual_seed(5)
    expected = torch.rand(1)

    def trained(seed):
        model = tiny_model(attention_dropout=dropout)
        finetune(model, tiny_tokenizer(), PAIRS, lr=1e-2, batch_size=len(PAIRS), seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(5)
    first, again, other = trained(0), trained(0), trained(1)
    assert torch.equal(first, again)  # one batch: only what is dropped differs between seeds
    assert torch.allclose(first, other, atol=1e-4) is not bool(dropout)
    assert torch.equal(torch.rand(1), expected)


def test_float64_models_keep_their_digits():
    model = tiny_model().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data += 1e-12  # float32 would lose it
    model.requires_grad_(False).lm_head.requires_grad_(True)
    finetune(model, tiny_tokenizer(), PAIRS, lr=1e-12)
    moved = model.lm_head.weight - before["lm_head.weight"]
    assert (moved > 0).all() and moved.max() < 1e-10


def test_nan_loss_is_an_error():
    model = tiny_model()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(SsahError, match="training loss is nan at step 0"):
        finetune(model, tiny_tokenizer(), PAIRS)
    assert not model.training


def test_bfloat16_models_are_trained_in_float32():
    """Steps of 1e-4 on weights near 0.2 are below what bfloat16 can add.

    The float32 copies keep them.
    """
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
