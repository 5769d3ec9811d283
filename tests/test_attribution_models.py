"""Attribution only reads the model, wrapped or not."""

import copy
import weakref

import accelerate
import pytest
import torch
from helpers_calibration import PAIRS, TOKENIZER, close

from ssah_nb.attribution import importance
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.moments import Moments
from ssah_nb.engine.scores import METHODS
from ssah_nb.units import depth_two


def test_the_activations_are_left_alone_and_not_kept():
    model, alive, most = tiny_model(), [], []
    depth_two(model)  # the trial of the units is over before we watch
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda _, inputs, out: (
                alive.append(weakref.ref(inputs[0])),
                most.append(sum(r() is not None for r in alive)),
            )[0]
        )
    importance(model, TOKENIZER, PAIRS, tokens="all", max_tokens=100)
    assert len(alive) > 10 and max(most) == 1  # the layers before have let theirs go
    x = torch.randn(40, 8)
    before, m = x.clone(), Moments()
    m.add(x.split(7))
    assert torch.equal(x, before)


def hooks(model) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_unchanged(method):
    model = tiny_model("gemma2").train()  # in training mode, half of it frozen
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    model.model.layers[0].eval()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    importance(model, TOKENIZER, PAIRS, method=method)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == 0
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    # it can still be trained
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()


@pytest.mark.parametrize("method", ["flap", "gradient"])
def test_the_model_is_unchanged_after_an_error(method):
    model = tiny_model().train()
    depth_two(model)  # the trial of the units has passed
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        importance(model, TOKENIZER, PAIRS, method=method)
    assert hooks(model) == 0
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("method", ["flap", "gradient"])
def test_dropout_and_checkpointing_are_off(method):
    model = tiny_model(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    close(
        importance(model, TOKENIZER, PAIRS, method=method),
        importance(tiny_model(), TOKENIZER, PAIRS, method=method),
        1e-6,
    )


@pytest.mark.parametrize("method", ["flap", "wanda_sp", "magnitude", "sn_tune"])
def test_the_head_is_never_computed(method, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
    importance(model, TOKENIZER, PAIRS, method=method)
    with pytest.raises(ZeroDivisionError):
        importance(model, TOKENIZER, PAIRS, method="gradient")  # this one needs the loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_peft_model_counts_its_adapter(architecture, method):
    targets = (
        ["qkv_proj", "gate_up_proj", "down_proj", "o_proj"]
        if architecture == "phi3"
        else ["q_proj", "v_proj", "gate_proj", "down_proj", "o_proj"]
    )
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_model(architecture),
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1),
    ).eval()
    flags = [p.requires_grad for p in model.parameters()]
    got = importance(model, TOKENIZER, PAIRS, method=method)
    assert [p.requires_grad for p in model.parameters()] == flags and any(flags)
    plain = importance(tiny_model(architecture), TOKENIZER, PAIRS, method=method)
    with model.disable_adapter():
        close(importance(model, TOKENIZER, PAIRS, method=method), plain, 1e-5)
    close(got, importance(model.merge_and_unload(), TOKENIZER, PAIRS, method=method), 1e-5)
    assert not torch.allclose(got.mlp, plain.mlp, rtol=0.1)
    assert got.info["model"] == plain.info["model"]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_spread_and_offloaded(method, tmp_path):
    model, whole = tiny_model(), importance(tiny_model(), TOKENIZER, PAIRS, method=method)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    close(importance(model, TOKENIZER, PAIRS, method=method), whole, 1e-6)
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
