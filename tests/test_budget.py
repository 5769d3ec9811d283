"""Training only some units, by refusals or by preferences."""

import pytest
import torch
import torch.nn.functional as F

from ssah_nb import (
    SsahError,
    finetune_dpo,
    importance,
    preferences,
    redundant_units,
    reference_margins,
    train_only,
)
from ssah_nb.engine.batches import chat_prompt
from ssah_nb.engine.models import tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize(
    "max_tokens, sft_weight", [(1, 0.0), (4096, 0.0), (4096, 0.5)]
)  # row by row, all at once, with RPO's term
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
        expected.append(
            (
                -F.logsigmoid(0.1 * (chosen - rejected - (before - after)))
                - sft_weight * chosen / sizes
            ).mean()
        )
        if epoch == 0:
            history = finetune_dpo(
                tiny_model(seed=1),
                tokenizer,
                ROWS,
                lr=1e-2,
                epochs=2,
                batch_size=8,
                sft_weight=sft_weight,
                max_tokens=max_tokens,
            )
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=1e-2 / 1.1, betas=(0.9, 0.99), weight_decay=0.0
            )  # the warm-up's first step
            expected[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert history.loss.tolist() == pytest.approx([e.item() for e in expected], rel=1e-3)


def test_a_reference_can_be_computed_once_for_several_runs(tokenizer):
    train = lambda reference: finetune_dpo(
        tiny_model(), tokenizer, ROWS, lr=1e-2, epochs=2, batch_size=4, reference=reference
    )
    reference = reference_margins(tiny_model(), tokenizer, ROWS)
    assert (
        train(reference).loss.tolist()
        == train(None).loss.tolist()
        != train(reference_margins(tiny_model(seed=1), tokenizer, ROWS)).loss.tolist()
    )
    with pytest.raises(SsahError, match=f"reference has 2 margins for {len(ROWS)} rows"):
        train(reference[:2])


@pytest.mark.parametrize("mixed", [False, True])
def test_dpo_trains_redundant_units_only(tokenizer, mixed):
    model = tiny_model()
    utility = importance(model, tokenizer, BENIGN)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    finetune_dpo(
        train_only(model, redundant_units(utility, 0.1)),
        tokenizer,
        ROWS,
        lr=1e-2,
        batch_size=4,
        mixed=mixed,
    )
    after = model.state_dict()
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0 < changed <= 0.1 * sum(p.numel() for p in tiny_model().parameters())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_budget_must_be_a_share(tokenizer):
    utility = importance(tiny_model(), tokenizer, BENIGN)
    with pytest.raises(SsahError, match="share=-0.1"):
        redundant_units(utility, -0.1)
    with pytest.raises(SsahError, match="more than all units together"):
        redundant_units(utility, 0.99)
