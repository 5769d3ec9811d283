"""Freezing under the trainers that people use."""

import copy

import pytest
import torch
from helpers_freezing import (
    PREFERENCES,
    adamw,
    arguments,
    check_trained,
    half,
    refused,
    same,
    snapshot,
)
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ssah_nb import SsahError, finetune
from ssah_nb.classes import prune, pruned
from ssah_nb.engine.batches import token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.forward import copied
from ssah_nb.engine.holding import unit_gradients
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import depth_two


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(0, 250, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": r, "labels": r} for r in ids]


@pytest.mark.parametrize("rest", [False, True])
def test_trainer_checkpoints_resumes_and_saves(rest, rows, tmp_path):
    mask, states = half(), []
    saving = dict(gradient_checkpointing=True, save_strategy="steps", save_steps=2)
    options = TrainingArguments(**arguments(tmp_path / "run", **saving))
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = tiny_model()
        before = snapshot(model)
        trainer = Trainer(freeze(model, mask, rest=rest), options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        check_trained(snapshot(model), before, mask)
        states.append(snapshot(model))
    assert same(*states)
    model.save_pretrained(tmp_path / "frozen")
    merge(model).save_pretrained(tmp_path / "merged")
    for folder in ("frozen", "merged", "run/checkpoint-4"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
        assert same(again.state_dict(), states[0])


def test_trl_sft(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, mask = tiny_model(), half()
    before = snapshot(model)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Say {i}"}],
            "completion": [{"role": "assistant", "content": f"{i}"}],
        }
        for i in range(16)
    ]
    trl.SFTTrainer(
        freeze(model, mask),
        trl.SFTConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    ).train()
    check_trained(merge(model).state_dict(), before, mask)


def test_a_copy_of_a_model_that_trl_has_trained_is_its_own(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, mask, tokenizer = tiny_model(), half(), tiny_tokenizer()
    rows = datasets.Dataset.from_list([{"prompt": "Say yes", "completion": " yes"}] * 8)
    args = trl.SFTConfig(**arguments(tmp_path, max_length=64, max_steps=1, bf16=False))
    trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    assert "forward" in vars(model)  # TRL's own, which holds on to this model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with pruned(model, mask):
            wanted = model(ids).logits
        assert torch.allclose(prune(model, mask)(ids).logits, wanted, atol=1e-5)
    pairs = [{"prompt": "Say no", "response": "no"}] * 4
    twin, before = copied(model), snapshot(model)
    finetune(twin, tokenizer, pairs, lr=1e-2)
    assert same(snapshot(model), before) and not same(snapshot(twin), before)
    with pytest.raises(SsahError, match="A copy of a model that TRL has trained"):
        finetune(copy.deepcopy(model), tokenizer, pairs, lr=1e-2)
    batches = list(token_batches(encode_pairs(tokenizer, pairs), 1024, model))
    assert all(found.any() for found in unit_gradients(model, depth_two(model), batches).values())


def test_trl_dpo(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, mask = tiny_model(), half()
    before = snapshot(model)
    trl.DPOTrainer(
        freeze(model, mask),
        tiny_model(),
        trl.DPOConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
    ).train()
    check_trained(merge(model).state_dict(), before, mask)


def test_a_trainer_with_an_optimizer_from_before_is_refused(rows, tmp_path):
    model = tiny_model()
    optimizer = adamw(model)
    freeze(model, half())
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows,
        optimizers=(optimizer, None),
    )
    refused(trainer.train, "built before freeze or merge", model)
