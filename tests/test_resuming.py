"""Anchored trainings that are taken up again, and anchors that cannot work."""

import weakref

import pytest
import torch
from helpers import one_line
from helpers_freezing import arguments, half
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ssah_nb import Anchor, SsahError, UnitMask, finetune, freeze
from ssah_nb.engine import anchors
from ssah_nb.engine.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REFUSALS = [{"prompt": f"Open box {i}", "response": "I am sorry, no."[: 5 + i]} for i in range(6)]
PAIRS = [{"prompt": f"Say {w}", "response": w} for w in ("yes", "no", "maybe", "never")]


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": r, "labels": r} for r in ids]


@pytest.fixture
def half_trained(rows, tmp_path):
    "(model, anchor, steps, checkpoint) -> its weights after so many steps, maybe resumed."
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}

    def train(model, anchor, steps, checkpoint=None):
        args = TrainingArguments(**arguments(tmp_path, max_steps=steps, **options))
        callbacks = [anchor.callback()]
        trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return model.state_dict()

    return train


@pytest.mark.parametrize("source", ["built again", "loaded", "the same"])
def test_an_anchored_training_can_be_resumed(source, half_trained, tmp_path):
    build = lambda model: Anchor(model, TOKENIZER, REFUSALS, prompts=1)
    model = tiny_model()
    anchor = build(model)
    anchor.save(tmp_path / "anchor")
    whole = half_trained(model, anchor, 4)
    again = tiny_model()
    anchors = {"built again": lambda: build(again), "the same": lambda: anchor}
    anchors["loaded"] = lambda: Anchor.load(tmp_path / "anchor")
    resumed = half_trained(again, anchors[source](), 4, tmp_path / "checkpoint-2")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_an_anchor_that_was_built_on_the_checkpoint_is_refused(half_trained, tmp_path):
    model = tiny_model()
    half_trained(model, Anchor(model, TOKENIZER, REFUSALS), 2)
    late = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(SsahError, match="built on the weights of that step") as error:
        half_trained(late, Anchor(late, TOKENIZER, REFUSALS), 4, tmp_path / "checkpoint-2")
    assert "Anchor.load" in one_line(error)


def test_an_anchor_that_training_cannot_reach_is_refused():
    model = tiny_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    units = UnitMask(torch.rand(2, 32) < 0.5, torch.rand(2, 4) < 0.5)
    anchor = Anchor(model, TOKENIZER, REFUSALS, on="units", units=units)
    with pytest.raises(SsahError, match="no weight that is trained can change") as error:
        finetune(model, TOKENIZER, PAIRS, anchor=anchor)
    one_line(error)


def test_an_anchor_can_be_built_in_inference_mode():
    model = tiny_model()
    with torch.inference_mode():
        anchor = Anchor(model, TOKENIZER, REFUSALS)
    with torch.set_grad_enabled(False):  # as on top of many a notebook
        finetune(model, TOKENIZER, PAIRS, lr=1e-2, anchor=anchor)
    assert anchor.report(model).tokens.drift.max() > 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", ["smaller", "whole model"])
def test_the_state_of_another_mask_is_refused_before_it_is_used(mask, fused):
    model, chosen = tiny_model(), half()
    freeze(model, chosen)
    state = stepped(model, fused).state_dict()
    again = tiny_model()
    if mask == "smaller":
        freeze(again, UnitMask(chosen.mlp, torch.zeros_like(chosen.attention)))
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], fused=fused)
    groups = [
        group | {"params": optimizer.state_dict()["param_groups"][0]["params"]}
        for group in state["param_groups"]
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    before = {name: weight.clone() for name, weight in again.state_dict().items()}
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(SsahError, match="weights of other shapes") as error:
        optimizer.step()
    assert "freeze with the mask" in one_line(error)
    assert all(weight.equal(before[name]) for name, weight in again.state_dict().items())


def stepped(model, fused: bool) -> torch.optim.Optimizer:
    "AdamW after one step on all that is trained."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_the_state_of_the_same_mask_is_taken_up():
    model, again = tiny_model(), tiny_model()
    freeze(model, half()), freeze(again, half())
    state = stepped(model, True).state_dict()
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], fused=True)
    optimizer.load_state_dict(state)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_training_that_began_before_anchors_were_imported_is_noticed(monkeypatch):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(9)[None]).logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    monkeypatch.setattr(anchors, "STEPPED", weakref.WeakSet())
    refusals = [{"prompt": "Open it", "response": "No."}]
    with pytest.raises(SsahError, match="training of this model has begun"):
        Anchor(model, tiny_tokenizer(), refusals)
    del optimizer
    Anchor(model, tiny_tokenizer(), refusals)
