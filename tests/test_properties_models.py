"""What holds for any mask on any supported architecture, on tiny random models."""

from contextlib import contextmanager

import pytest
import torch
from helpers_freezing import check_trained, snapshot
from helpers_properties import fewer, masks, model_of, models_with_masks
from helpers_units import IDS, TOKENIZER, same_bits
from hypothesis import given
from hypothesis import strategies as st

from ssah_nb.anchoring import Anchor
from ssah_nb.budget import train_only
from ssah_nb.classes import prune, pruned
from ssah_nb.engine.models import ARCHITECTURES, MIXTURES
from ssah_nb.engine.parts import split_linears
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask

SHAPES = ((2, 32), (2, 4))
DTYPES = (torch.float32, torch.bfloat16)


def flags(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@fewer(1)
@given(models_with_masks(dtypes=DTYPES), st.booleans(), st.booleans())
def test_freeze_then_merge_is_the_identity(drawn, rest, only):
    model, mask = drawn
    before, trains = snapshot(model), flags(model)
    with torch.no_grad():
        said = model(IDS).logits
    try:
        train_only(model, mask) if only else freeze(model, mask, rest=rest)
    except SsahError as error:
        assert "mask is empty" in str(error) or "to train; leave some units" in str(error)
        chosen = ~mask if only else mask
        assert not len(chosen) or not len(~chosen) or rest
    else:
        assert split_linears(model)
        with torch.no_grad():
            now = model(IDS).logits
        near = 1e-4 if model.dtype == torch.float32 else 0.1
        torch.testing.assert_close(now, said, rtol=near, atol=near)
        assert same_bits(model.state_dict(), before)
        assert merge(model) is model
    assert not split_linears(model)
    after = model.state_dict()
    assert list(after) == list(before) and same_bits(after, before) and flags(model) == trains
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, said)


@fewer(2)
@given(st.sampled_from(ARCHITECTURES), masks(shapes=SHAPES))
def test_a_step_changes_no_frozen_bit(architecture, mask):
    model = model_of(architecture)
    before = snapshot(model)
    try:
        freeze(model, mask)
    except SsahError:
        assert not len(mask) or not len(~mask)
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    after = snapshot(merge(model))
    check_trained(after, before, mask, architecture, least=0.5)
    model.load_state_dict(before)


@contextmanager
def untouched(model):
    "No bit of the model is another one afterwards, and it says the same."
    before = snapshot(model)
    with torch.no_grad():
        said = model(IDS).logits
        yield
        assert same_bits(model.state_dict(), before) and torch.equal(model(IDS).logits, said)


@fewer(2)
@given(models_with_masks(architectures=ARCHITECTURES))
def test_prune_is_pruned(drawn):
    model, mask = drawn
    with untouched(model):
        with untouched(model), pruned(model, mask):
            without = model(IDS).logits
        smaller = prune(model, mask)
        torch.testing.assert_close(smaller(IDS).logits, without, rtol=1e-4, atol=1e-4)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, model)]
    assert sizes[0] <= sizes[1]


@fewer(5)
@given(models_with_masks(architectures=MIXTURES))
def test_pruned_leaves_no_trace_in_a_mixture(drawn):
    model, mask = drawn
    with untouched(model):
        with pruned(model, mask):
            model(IDS)
        with pytest.raises(SsahError):
            prune(model, mask)


REFUSALS = [
    {"prompt": f"How do I {what}?", "response": f"I cannot {what}. {'No. ' * n}"}
    for n, what in enumerate(["pick a lock", "open it", "go", "take what is theirs"])
]


@fewer(2)
@given(
    st.sampled_from(ARCHITECTURES),
    st.none() | masks(shapes=SHAPES),
    st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 5),
            "prompts": st.integers(1, 6),
            "every": st.integers(1, 3),
            "weight": st.sampled_from([0, 0.1, 1.0, 1e3]),
            "seed": st.integers(0, 9),
        }
    ),
)
def test_an_anchor_is_at_rest_where_it_was_dropped(architecture, mask, options):
    model = model_of(architecture)
    if mask is not None and not len(mask):
        mask = UnitMask(~mask.mlp, mask.attention)
    anchor = Anchor(model, TOKENIZER, REFUSALS, "units" if mask else "answers", mask, **options)
    for _ in range(3):
        loss = anchor.loss(model)
        assert loss.item() == 0
        loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
    assert 0 <= anchor.report().mean < 1e-3
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.norm.weight.add_(0.5)
        moved = anchor.report(model).mean
        model.model.norm.weight.sub_(0.5)
        model.lm_head.weight.div_(1.5)
    assert mask is not None or moved > 1e-3
