"""Frozen bits stay, and all others are trained."""

import copy

import pytest
import torch
from helpers_freezing import (
    LONG,
    SHORT,
    adamw,
    check_trained,
    frozen_entries,
    half,
    lora,
    same,
    snapshot,
    train,
)
from transformers import AutoModelForCausalLM

from ssah_nb.budget import train_only
from ssah_nb.classes import pruned
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.parts import adjacent, split_linears
from ssah_nb.engine.training import finetune
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask, depth_two


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_freeze_and_merge_keep_function_names_and_shapes(architecture):
    model, mask = tiny_model(architecture), half()
    before = snapshot(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    logits = [model(ids).logits for ids in (LONG, SHORT)]
    assert freeze(model, mask) is model
    assert len(split_linears(model)) == (8 if architecture == "phi3" else 14)
    for ids, expected in zip((LONG, SHORT), logits):
        assert (model(ids).logits - expected).abs().max() <= 1e-5
    assert same(model.state_dict(), before)
    assert merge(model) is model and not split_linears(model) and same(model.state_dict(), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for ids, expected in zip((LONG, SHORT), logits):
        assert torch.equal(model(ids).logits, expected)


WAYS = {
    "adamw": {},
    "adamw_fused_clipped": {"optimizer": lambda m: adamw(m, fused=True), "clip": 0.5},
    "sgd_momentum": {
        "optimizer": lambda m: torch.optim.SGD(
            m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
        )
    },
    "bf16": {"dtype": torch.bfloat16, "optimizer": lambda m: adamw(m, lr=0.1), "least": 0.7},
    "autocast": {"autocast": True},
    "checkpointing": {"checkpointing": True},
    "requires_grad_": {"requires_grad": True},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", WAYS)
def test_frozen_bits_stay(architecture, way):
    options = WAYS[way]
    model, mask = tiny_model(architecture).to(options.get("dtype", torch.float32)).train(), half()
    before = snapshot(model)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    freeze(model, mask)
    if options.get("requires_grad"):
        model.requires_grad_(True)
    optimizer = options.get("optimizer", adamw)(model)
    train(model, optimizer, clip=options.get("clip"), autocast=options.get("autocast", False))
    for split in split_linears(model).values():
        assert split.frozen_weight.grad is None and split.frozen_weight not in optimizer.state
    check_trained(merge(model).state_dict(), before, mask, architecture, options.get("least", 0.9))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_trained_parts_get_the_gradients_of_the_full_model(architecture, checkpointing, autocast):
    full, model, mask = tiny_model(architecture).train(), tiny_model(architecture).train(), half()
    freeze(model, mask)
    for m in (full, model):
        if checkpointing:
            m.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = m(LONG, labels=LONG).loss + m(SHORT, labels=SHORT).loss
        loss.backward()
    expected = {name: p.grad for name, p in full.named_parameters()}
    tolerance = 0.1 if autocast else 1e-4
    near = lambda grad, wanted: (grad - wanted).norm() <= tolerance * wanted.norm() + 1e-6
    for name, split in split_linears(model).items():
        for kind in split.flags:
            grad = getattr(split, f"trained_{kind}").grad
            full_gradient = split.as_rows(kind, expected.pop(f"{name}.{kind}"))
            wanted = full_gradient[: len(split.parts(kind)[0])]
            if grad is None:
                assert not len(wanted)
            else:
                assert near(grad, wanted), name
    for name, p in model.named_parameters():
        if name in expected:
            assert near(p.grad, expected[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_bits_stay_in_mixed_precision(architecture):
    mask, states = half(), {}
    for mixed in (False, True):
        model = freeze(tiny_model(architecture), mask)
        before = snapshot(model)
        adjacency = [adjacent(*s.parts("weight")) for s in split_linears(model).values()]
        pairs = [{"prompt": f"Say {w}", "response": w} for w in ("yes", "no", "maybe")]
        training = dict(lr=1e-2, epochs=2, batch_size=1)
        finetune(model, tiny_tokenizer(), pairs, mixed=mixed, **training)
        assert [adjacent(*s.parts("weight")) for s in split_linears(model).values()] == adjacency
        states[mixed] = snapshot(merge(model))
        check_trained(states[mixed], before, mask, architecture)
    moved = {
        mixed: torch.cat([(after[name] - before[name]).flatten() for name in before])
        for mixed, after in states.items()
    }
    assert torch.cosine_similarity(moved[True], moved[False], dim=0) > 0.95


def test_save_and_resume_in_mid_training():
    mask, states = half(), []
    for interrupted in (False, True):
        model = freeze(tiny_model().train(), mask)
        before, optimizer = snapshot(model), adamw(model)
        train(model, optimizer, 2)
        if interrupted:
            saved = snapshot(model), copy.deepcopy(optimizer.state_dict())
            model = freeze(tiny_model(seed=1).train(), mask)
            optimizer = adamw(model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(model, optimizer, 2)
        states.append(snapshot(merge(model)))
        check_trained(states[-1], before, mask)
    assert same(*states)


def test_a_checkpoint_that_does_not_fit_is_refused():
    model = freeze(tiny_model(), half())
    state = snapshot(model)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(state | {name: state[name][:, 1:]})
    state.pop(name)
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict(state)


def test_what_was_switched_off_before_stays_off():
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = snapshot(model)
    freeze(model, half(), rest=True)
    train(model, adamw(model), 2)
    after = snapshot(merge(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n for n in before if not torch.equal(after[n], before[n])} == {
        n for n in before if ".1." in n and "_proj" in n and "k_" not in n and "v_" not in n
    }
    first = torch.tensor([[True], [False]])
    check_trained(after, before, UnitMask(half().mlp | first, half().attention | first))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
def test_what_was_pruned_returns_though_it_was_frozen_meanwhile(architecture):
    model = tiny_model(architecture)
    kinds = [torch.zeros(len(m), m[0].units, dtype=torch.bool) for m in depth_two(model).values()]
    for chosen in kinds:
        chosen[:, ::3] = True
    mask, before = UnitMask(*kinds), snapshot(model)
    with pruned(model, mask):
        freeze(model, mask)
    assert same(snapshot(model), before)
    with pruned(merge(model), mask):
        merge(freeze(model, mask))
    assert same(snapshot(model), before)


def test_flags_that_are_changed_while_frozen_stay_changed():
    mask = half()
    mask.attention[:] = False  # keys and values that are frozen whole have no flag meanwhile
    model = freeze(tiny_model(), mask)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in merge(model).parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_hooks_stay_when_a_linear_is_frozen(name, kind):
    model, calls = tiny_model(), []
    linear = model.get_submodule(f"model.layers.0.{name}")
    steer = torch.linspace(-1, 1, linear.in_features if kind == "before" else linear.out_features)

    def after(module, inputs, output):
        calls.append(1)
        return output + steer

    def before(module, inputs):
        calls.append(1)
        return (inputs[0] + steer,)

    put = {"before": linear.register_forward_pre_hook, "after": linear.register_forward_hook}
    handle = put[kind](before if kind == "before" else after)
    wanted = model(LONG).logits
    for changed in (freeze(model, half()), merge(model)):
        calls.clear()
        assert torch.allclose(changed(LONG).logits, wanted, atol=1e-5) and calls == [1]
    handle.remove()
    assert not torch.allclose(model(LONG).logits, wanted, atol=1e-2) and calls == [1]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied, tmp_path):
    model, mask = tiny_model(tie_word_embeddings=tied).train(), half()
    before = snapshot(model)
    freeze(model, mask)
    train(model, adamw(model))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    merge(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    check_trained(again.state_dict(), before, mask)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_only_trains_these_units_alone(tied, checkpointing):
    model, mask = tiny_model(tie_word_embeddings=tied).train(), half()
    before = snapshot(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(LONG, labels=LONG).loss.backward()  # gradients from before freeze must not train anything
    train_only(model, mask)
    train(model, adamw(model))
    after = snapshot(merge(model))
    assert all(p.requires_grad for p in model.parameters())
    entries = frozen_entries("llama", ~mask)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in entries)
    check_trained(after, before, ~mask)


@pytest.mark.parametrize("adapter", [False, True])
def test_train_only_freezes_the_bias_of_b(adapter):
    model, mask = tiny_model(attention_bias=True, mlp_bias=True).train(), half()
    before = snapshot(model)
    if adapter:
        model = lora(model, bias="all")
    train_only(model, mask)
    train(model, adamw(model))
    merge(model)
    if adapter:
        model = model.merge_and_unload()
    changed = {
        name.split(".", 3)[3]
        for name, value in model.state_dict().items()
        if name.endswith(".bias") and not torch.equal(value, before[name])
    }
    attention = {f"self_attn.{name}_proj.bias" for name in "qkv"}
    assert changed == attention | {"mlp.gate_proj.bias", "mlp.up_proj.bias"}
    assert adapter or all(p.requires_grad for p in model.parameters())
