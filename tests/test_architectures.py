"""Units are recognised by what a model does: all architectures, and faults that are planted."""

import copy
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
from helpers import one_line
from helpers_units import IDS, MASKS, TOKENIZER, pairs, same_bits, use
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb.attribution import importance
from ssah_nb.engine import proof
from ssah_nb.engine.models import ARCHITECTURES, TINY_SIZES, tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import freeze
from ssah_nb.units import depth_two, signature

sys.path.append(str(Path(__file__).parent.parent / "docs"))

from architectures import architectures, committed, row  # noqa: E402

NAMES, CHUNKS = list(architectures()), 16
REFUSED = (
    "olmo2 olmo3 bitnet diffllama doge gemma3n_text gemma4_text deepseek_v2 deepseek_v3".split()
)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_architecture_is_right_or_refused_as_the_table_says(chunk):
    table = committed()
    for name in NAMES[chunk::CHUNKS]:
        found = row(name)
        assert found["units"] not in ("raw", "wrong"), found
        if name in table:  # another transformers may have other architectures
            same = ("class", "units", "prune")
            assert {k: found[k] for k in same} == {k: table[name][k] for k in same}, found
        full = (found["units"], found["prune"]) == ("supported", "all units")
        assert bool(found["reason"]) != full, found


def test_the_table_is_complete_and_holds_no_fault():
    table = committed()
    assert list(table) == NAMES
    counts = {kind: 0 for kind in ("supported", "refused", "not built", "does not run")}
    for found in table.values():
        counts[found["units"]] += 1
    assert counts["supported"] >= 50 and counts["not built"] + counts["does not run"] <= 8
    assert all(table[name]["units"] == "supported" for name in ARCHITECTURES)
    assert all(table[name]["units"] == "refused" for name in REFUSED)


def hooks(model) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def interleaved(model):
    "A gate and an up matrix whose rows take turns."

    def forward(mlp, x):
        gate, up = mlp.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        return mlp.down_proj(F.silu(gate) * up)

    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: forward(mlp, x)


def normed_heads(model):
    linear = model.model.layers[1].self_attn.k_proj
    linear.register_forward_hook(lambda _, inputs, out: F.rms_norm(out, (16,)))


def scaled_columns(model):
    "A matrix that divides by the length of all that it reads, as a quantized input does."
    linear = model.model.layers[0].self_attn.o_proj
    linear.forward = lambda x: F.linear(x / x.norm(dim=-1, keepdim=True), linear.weight)


def values_of_another_layer(model):
    "The second layer adds what the first one's values are."
    first, second = model.model.layers
    kept = []
    first.self_attn.v_proj.register_forward_hook(lambda _, inputs, out: kept.append(out))
    second.mlp.register_forward_hook(lambda _, inputs, out: out + kept[-1].repeat(1, 1, 2))


def a_layer_twice(model):
    model.model.layers[1] = model.model.layers[0]


def two_widths(model):
    model.model.layers[0].self_attn.head_dim = 16


FAULTS = {
    interleaved: ("phi3", r"layers.1.mlp, the rows of channel 0 in gate_up_proj also move other"),
    normed_heads: ("llama", "layers.1.self_attn, the rows of head 0 in q_proj, k_proj, v_proj"),
    scaled_columns: ("llama", "switching head 0 off is not the same as zeroing its columns"),
    values_of_another_layer: ("llama", "reaches the last states round its own columns"),
    a_layer_twice: ("llama", "runs 2 times in one pass, not once"),
    two_widths: ("llama", "differ in their number of units"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_model_that_breaks_a_sentence_is_refused_and_left_as_it_was(fault):
    kind, message = FAULTS[fault]
    model = tiny_model(kind).train()
    fault(model)
    before, hung, draw = copy.deepcopy(model.state_dict()), hooks(model), torch.get_rng_state()
    for wrong in (
        lambda: depth_two(model),
        lambda: importance(model, TOKENIZER, pairs("No")),
        *(lambda what=what: use(what, model, MASKS["random 0"]) for what in ("pruned", "freeze")),
    ):
        with pytest.raises(SsahError, match=message) as error:
            wrong()
        assert type(model).__name__ in one_line(error)
    assert same_bits(model.state_dict(), before) and hooks(model) == hung and model.training
    assert torch.equal(torch.get_rng_state(), draw) and model not in proof.PROVEN


def passes_counted(model):
    "A list that grows with each pass."
    seen = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_a_model_is_tried_once_and_its_copy_again():
    model = tiny_model()
    seen = passes_counted(model)
    depth_two(model)
    tried = len(seen)
    assert tried > 0
    signature(model), depth_two(model)
    assert len(seen) == tried
    depth_two(copy.deepcopy(model))
    assert len(seen) == 2 * tried


def test_wrapped_frozen_offloaded_and_weightless_models(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    frozen = copy.deepcopy(freeze(tiny_model(), MASKS["random 0"]))
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "lm_head")}
    places |= {"model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    away = accelerate.dispatch_model(
        tiny_model(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    for model in (adapted, frozen, away, tiny_model().to(torch.bfloat16)):
        assert len(depth_two(model)["mlp"]) == 2 and model in proof.PROVEN
    compiled = torch.compile(tiny_model(), backend="eager")
    compiled(input_ids=IDS)
    assert len(depth_two(compiled)["mlp"]) == 2 and compiled in proof.PROVEN
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **TINY_SIZES))
    assert depth_two(empty)["mlp"][0].units == 32 and empty not in proof.PROVEN


def test_a_cut_that_breaks_the_model_is_refused_and_channels_alone_are_cut():
    sizes = TINY_SIZES | {"use_qk_norm": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **sizes)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SsahError, match="cannot be cut out of CohereForCausalLM") as error:
        use("prune", model, MASKS["a group"])
    assert "pruned" in one_line(error) and same_bits(model.state_dict(), before)
    use("prune", model, MASKS["one channel"])


def test_a_cut_that_says_something_else_is_refused():
    model = tiny_model()
    proof.check_cut(model, proof.trial_states(model))
    for layer in model.model.layers:  # what it says depends on how many channels there are
        layer.mlp.register_forward_hook(lambda mlp, _, out: out * mlp.down_proj.in_features)
    with pytest.raises(SsahError, match="without them it computes something else"):
        use("prune", model, MASKS["random 0"])
