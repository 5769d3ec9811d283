"""Freezing under the trainers that people use."""

import pytest
import torch
from helpers import two_processes
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

from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.freezing import freeze, merge


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


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from ssah_nb.engine.models import tiny_model
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask

accelerator, (mlp, attention) = Accelerator(cpu=True), torch.load(sys.argv[1])
model = freeze(tiny_model().train(), UnitMask(mlp, attention))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
gradients = []
for step in range(3):
    seed = 2 * step + accelerator.process_index  # each process has its own batch
    ids = torch.randint(0, 250, (4, 48), generator=torch.Generator().manual_seed(seed))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients.append({n: grad.clone() for n, grad in found.items()})
    optimizer.step()
    optimizer.zero_grad()
state = merge(accelerator.unwrap_model(model)).state_dict()
world = accelerator.num_processes
torch.save(
    {"world": world, "gradients": gradients, "state": state},
    f"{sys.argv[2]}/{accelerator.process_index}.pt",
)
accelerator.end_training()
"""


def test_accelerate_with_two_processes(tmp_path):
    mask = half()
    torch.save((mask.mlp, mask.attention), tmp_path / "mask.pt")
    two_processes(TWO_PROCESSES, str(tmp_path / "mask.pt"), str(tmp_path))

    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["world"] == 2 and same(first["state"], second["state"])
    for a, b in zip(first["gradients"], second["gradients"], strict=True):
        assert same(a, b) and not any("frozen" in name for name in a)
    check_trained(first["state"], snapshot(tiny_model()), mask)

    # what the processes averaged is the gradient of both batches together
    both = freeze(tiny_model().train(), mask)
    draws = [torch.Generator().manual_seed(rank) for rank in (0, 1)]
    ids = torch.cat([torch.randint(0, 250, (4, 48), generator=draw) for draw in draws])
    both(input_ids=ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in both.named_parameters() if p.grad is not None}
    got = {n.removeprefix("module."): g for n, g in first["gradients"][0].items()}
    assert got.keys() == wanted.keys()
    assert all((got[n] - wanted[n]).norm() <= 1e-4 * wanted[n].norm() + 1e-7 for n in got)


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
