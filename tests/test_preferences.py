"""Preference optimization against the paper's equation."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssah_nb.attribution import importance
from ssah_nb.budget import redundant_units, train_only
from ssah_nb.engine.chat import chat_prompt
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.preferences import finetune_dpo, preferences, reference_margins
from ssah_nb.engine.run import SsahError

BENIGN = [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(4)]
ROWS = preferences(
    [{"prompt": f"Open box {i}"} for i in range(4)], ["Sure, it is open."] * 3 + [" \n"], BENIGN
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def log_probability(model, tokenizer, prompt, answer):
    """log p(answer | prompt), one sequence at a time."""
    start = tokenizer(chat_prompt(tokenizer, prompt)).input_ids
    ids = torch.tensor([start + tokenizer(answer + "<|im_end|>").input_ids])
    logits = model(ids).logits.log_softmax(-1)[0]
    return sum(logits[t - 1, ids[0, t]] for t in range(len(start), ids.shape[1]))


def test_an_empty_compliance_is_no_error():
    assert ROWS[3]["rejected"] == "Sure." and all(row["chosen"] != row["rejected"] for row in ROWS)


# row by row, all at once, with RPO's term
@pytest.mark.parametrize("max_tokens, sft_weight", [(1, 0.0), (4096, 0.0), (4096, 0.5)])
def test_dpo_step_is_the_papers_equation(tokenizer, max_tokens, sft_weight):
    model, reference = tiny_model(seed=1), tiny_model(seed=1)
    expected = []
    for epoch in range(2):  # all rows in one batch: the second loss is after one step
        chosen, rejected, before, after = (
            torch.stack([log_probability(m, tokenizer, r["prompt"], r[key]) for r in ROWS])
            for m in (model, reference)
            for key in ("chosen", "rejected")
        )
        sizes = torch.tensor([len(tokenizer(r["chosen"] + "<|im_end|>").input_ids) for r in ROWS])
        dpo = -F.logsigmoid(0.1 * (chosen - rejected - (before - after)))
        expected.append((dpo - sft_weight * chosen / sizes).mean())
        if epoch == 0:  # the warm-up's first step
            adam = dict(lr=1e-2 / 1.1, betas=(0.9, 0.99), weight_decay=0.0)
            optimizer = torch.optim.AdamW(model.parameters(), **adam)
            expected[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    training = dict(lr=1e-2, epochs=2, batch_size=8, sft_weight=sft_weight, max_tokens=max_tokens)
    history = finetune_dpo(tiny_model(seed=1), tokenizer, ROWS, **training)
    assert history.loss.tolist() == pytest.approx([e.item() for e in expected], rel=1e-3)


def test_a_reference_can_be_computed_once_for_several_runs(tokenizer):
    def train(reference):
        training = dict(lr=1e-2, epochs=2, batch_size=4, reference=reference)
        return finetune_dpo(tiny_model(), tokenizer, ROWS, **training).loss.tolist()

    reference = reference_margins(tiny_model(), tokenizer, ROWS)
    other = reference_margins(tiny_model(seed=1), tokenizer, ROWS)
    assert train(reference) == train(None) != train(other)
    assert train(reference.tolist()) == train(reference.numpy()) == train(reference)
    with pytest.raises(SsahError, match=f"reference has 2 margins for {len(ROWS)} rows"):
        train(reference[:2])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shared", [False, True])  # a reference that is made beforehand
def test_training_starts_at_its_reference(tokenizer, mixed, shared):
    model, reference = tiny_model(), None
    if shared:
        reference = reference_margins(model, tokenizer, ROWS, mixed=mixed)
    history = finetune_dpo(model, tokenizer, ROWS, reference=reference, mixed=mixed)
    assert history.loss[0] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("mark", [False, True])
def test_the_reference_follows_the_mark_of_the_run_and_has_no_dropout(tokenizer, mark):
    model = tiny_model()
    model.ssah_mixed = mark
    plain = reference_margins(model, tokenizer, ROWS)
    assert torch.equal(plain, reference_margins(model, tokenizer, ROWS, mixed=mark))
    assert not torch.equal(plain, reference_margins(model, tokenizer, ROWS, mixed=not mark))
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    assert torch.equal(plain, reference_margins(model.train(), tokenizer, ROWS)) and model.training


@pytest.mark.parametrize("mixed", [False, True])
def test_dpo_trains_redundant_units_only(tokenizer, mixed):
    model = tiny_model()
    utility = importance(model, tokenizer, BENIGN)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_only(model, redundant_units(utility, 0.1))
    finetune_dpo(model, tokenizer, ROWS, lr=1e-2, batch_size=4, mixed=mixed)
    after = model.state_dict()
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0 < changed <= 0.1 * sum(p.numel() for p in tiny_model().parameters())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "margins, words", [([0.0], "1 margins for 2 rows"), ([0.0, math.nan], "reference margin 1")]
)
def test_a_reference_of_other_rows_or_of_no_numbers(tokenizer, margins, words):
    rows = [{"prompt": f"Why {i}?", "chosen": "No.", "rejected": "Yes."} for i in range(2)]
    with pytest.raises(SsahError, match=words):
        finetune_dpo(tiny_model(), tokenizer, rows, reference=torch.tensor(margins))


def test_a_system_prompt_stands_before_every_answer(tokenizer):
    model = tiny_model()
    margins = reference_margins(model, tokenizer, ROWS[:2], system="Be safe.")
    chat = lambda row: chat_prompt(tokenizer, row["prompt"], "Be safe.")
    for row, margin in zip(ROWS, margins):
        start = tokenizer(chat(row)).input_ids
        both = []
        for key in ("chosen", "rejected"):
            ids = torch.tensor([start + tokenizer(row[key] + "<|im_end|>").input_ids])
            logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            both.append(logs[len(start) - 1 :].sum())
        assert margin.item() == pytest.approx((both[0] - both[1]).item(), abs=1e-3)
    history = finetune_dpo(model, tokenizer, ROWS[:2], system="Be safe.")
    assert history.loss[0] == pytest.approx(math.log(2))


def test_an_anchor_joins_each_step(tokenizer):
    class Anchor:
        calls = 0

        def loss(self, model):
            self.calls += 1
            return model.lm_head.weight.sum()

    anchor, model = Anchor(), tiny_model()
    finetune_dpo(model, tokenizer, ROWS, epochs=2, batch_size=4, anchor=anchor)
    assert anchor.calls == 4
