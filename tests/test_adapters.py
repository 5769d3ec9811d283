"""Freezing with a LoRA adapter."""

import pytest
import torch
from helpers_freezing import (
    LONG,
    PREFERENCES,
    Int8Linear,
    adamw,
    arguments,
    check_trained,
    frozen_entries,
    half,
    lora,
    refused,
    snapshot,
    train,
)

from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.parts import split_linears
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all", "lora_bias": True}, {"target_modules": ["o_proj", "down_proj"]}],
    ids=["all", "bias", "some"],
)
def test_frozen_bits_stay_after_the_adapter_is_merged(architecture, options):
    if options.get("lora_bias") and architecture != "qwen2":
        options = {}
    base, mask = tiny_model(architecture).train(), half()
    before = snapshot(base)
    if options.get("lora_bias"):
        # the linears that have a bias
        options = options | {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    model = lora(base, **options)
    with torch.no_grad():
        logits = model(LONG).logits
    names = list(model.state_dict())
    freeze(model, mask)
    with torch.no_grad():
        assert torch.allclose(model(LONG).logits, logits, atol=1e-5)
    assert list(model.state_dict()) == names
    train(model, adamw(model, lr=0.1), 4)
    with torch.no_grad():
        logits = model(LONG).logits
    merge(model)
    assert not split_linears(model) and list(model.state_dict()) == names
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(LONG).logits, logits, atol=1e-3)
    after = merged.state_dict()
    assert list(after) == list(before)
    for name, frozen in frozen_entries(architecture, mask).items():
        frozen, changed = frozen.expand_as(before[name]), after[name] != before[name]
        assert not changed[frozen].any(), name
        adapted = any(t in name for t in options.get("target_modules", ["proj"]))
        if name.endswith("weight") and adapted and not frozen.all():
            assert changed[~frozen].float().mean() > 0.9, name


def test_an_adapter_on_a_quantized_model():
    base, mask = tiny_model().train(), half()
    for layer in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    model = lora(base, target_modules=["down_proj"])
    channels = UnitMask(torch.ones_like(mask.mlp), torch.zeros_like(mask.attention))
    message = "no adapter is on the linears of the masked units"
    refused(lambda: freeze(model, mask - channels), message, model)
    freeze(model, mask)
    # what has no adapter is not trained: it is left as it is
    split = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in split_linears(model)}
    assert split == {"down_proj"}
    with torch.no_grad():
        before = model(LONG).logits
    train(model, adamw(model, lr=0.1))
    with torch.no_grad():
        assert not torch.allclose(model(LONG).logits, before, atol=1e-3)
    for i, module in enumerate(merge(model).get_base_model().model.layers):
        change = module.mlp.down_proj.get_delta_weight("default")
        assert not change[:, mask.mlp[i]].any() and change[:, ~mask.mlp[i]].abs().min() > 0


def test_an_adapter_is_saved_while_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    model = freeze(lora(tiny_model()), half())
    train(model, adamw(model), 3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(LONG).logits, model(LONG).logits, atol=1e-5)


def test_an_adapter_that_is_not_fresh_is_refused():
    trained = lora(tiny_model())
    train(trained, adamw(trained), 1)
    for model in (
        trained,
        lora(tiny_model(), use_dora=True),
        lora(tiny_model(), init_lora_weights=False),
    ):
        refused(lambda: freeze(model, half()), "the adapter on", model)


def test_trl_dpo_with_an_adapter(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base, mask = tiny_model(), half()
    before = snapshot(base)
    trainer = trl.DPOTrainer(
        lora(base),
        args=trl.DPOConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
    )
    freeze(trainer.model, mask)  # after the trainer has made the adapter that it compares with
    trainer.train()
    check_trained(merge(trainer.model).merge_and_unload().state_dict(), before, mask)
