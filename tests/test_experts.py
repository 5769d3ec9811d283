"""Mixtures of experts against plain loops over the experts."""

import copy

import pytest
import torch
from helpers import one_line
from helpers_calibration import PAIRS, TOKENIZER
from helpers_freezing import adamw, same, snapshot, train
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb.anchoring import Anchor
from ssah_nb.attribution import Importance, importance
from ssah_nb.classes import classify, prune, pruned
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import MIXTURES, TINY_EXPERTS, TINY_SIZES, tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.scores import METHODS
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask, depth_two, signature, unit_parameters

IDS = torch.arange(40).view(2, 20) * 5


def blocks(model):
    "The module of each layer that routes, and its experts."
    mlps = [getattr(x, "mlp", None) or x.block_sparse_moe for x in model.model.layers]
    return [(mlp, mlp.experts) for mlp in mlps]


def half(model, seed=0) -> UnitMask:
    "Half of the channels of the experts, and one head."
    draw = torch.Generator().manual_seed(seed)
    heads = torch.zeros(2, 4, dtype=torch.bool)
    heads[1, 2] = True
    return UnitMask(torch.rand(2, 128, generator=draw) < 0.5, heads, signature(model))


def plainly(experts, states, index, weights, means=None, off=None, seen=None):
    "What experts say, token by token; where a unit is off, its mean, or 0, is in its place."
    rows = []
    for token, state in enumerate(states):
        answer = torch.zeros_like(state)
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = linear(state, experts.gate_up_proj[expert]).chunk(2)
            x = torch.nn.functional.silu(gate) * up
            if seen is not None:
                x.retain_grad() if x.requires_grad else None
                seen.append((token, expert, x))
            if off is not None:
                x = torch.where(off.view(4, 32)[expert], means.view(4, 32)[expert], x)
            answer = answer + weight * linear(x, experts.down_proj[expert])
        rows.append(answer)
    return torch.stack(rows)


def by_loop(model, offs=None, means=None, seen=None):
    "Put the plain loop in the place of a model's experts."
    for layer, (_, experts) in enumerate(blocks(model)):
        options = {"off": offs[layer], "means": means[layer]} if offs is not None else {}
        notes = seen.setdefault(layer, []) if seen is not None else None
        experts.forward = lambda *inputs, e=experts, o=options, n=notes: plainly(
            e, *inputs, seen=n, **o
        )
    return model


@torch.enable_grad()
def reference(architecture: str, tokens: str) -> tuple[list, list, torch.nn.Module]:
    "X and ∂L/∂X of each layer and expert, over the tokens that count, in float64."
    model = tiny_model(architecture).double()
    found = [[([], []) for _ in range(4)] for _ in range(2)]
    for prompt, response in encode_pairs(TOKENIZER, PAIRS):
        ids, seen = prompt + response, {}
        logits = by_loop(model, seen=seen)(torch.tensor([ids])).logits[0].log_softmax(-1)
        (-sum(logits[t - 1, ids[t]] for t in range(len(prompt), len(ids)))).backward()
        for layer, notes in seen.items():
            for token, expert, x in notes:
                if tokens == "all" or token >= len(prompt):
                    found[layer][expert][0].append(x.detach())
                    found[layer][expert][1].append(x.grad)
    return found, model


@pytest.mark.parametrize(
    "architecture, tokens", [(a, "response") for a in MIXTURES] + [("mixtral", "all")]
)
def test_importance_is_that_of_each_experts_tokens(architecture, tokens):
    found, model = reference(architecture, tokens)
    scored = {
        method: importance(
            tiny_model(architecture), TOKENIZER, PAIRS, tokens=tokens, method=method, max_tokens=200
        )
        for method in METHODS
    }
    for layer, (_, experts) in enumerate(blocks(model)):
        for expert, (xs, gradients) in enumerate(found[layer]):
            x, g = torch.stack(xs), torch.stack(gradients)
            b, a = experts.down_proj[expert].detach(), experts.gate_up_proj[expert].detach()
            expected = {
                "flap": x.var(0, correction=0) * b.square().sum(0),
                "wanda_sp": x.square().mean(0).sqrt() * b.abs().mean(0),
                "sn_tune": x.abs().mean(0) * b.norm(dim=0),
                "gradient": (x * g).abs().mean(0),
                "magnitude": b.square().sum(0) + a.square().sum(1).view(2, 32).sum(0),
            }
            own = slice(32 * expert, 32 * expert + 32)
            for method in METHODS:
                got = scored[method].mlp[layer, own].double()
                torch.testing.assert_close(
                    got, expected[method], rtol=1e-3, atol=1e-5 * float(expected[method].max())
                )
            moments = scored["flap"].moments["mlp"][layer]
            assert (moments.count[own] == len(x)).all()
            torch.testing.assert_close(moments.mean[own], x.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_units_and_their_size(architecture):
    model = tiny_model(architecture)
    assert unit_parameters(model)["mlp"] == 3 * 32
    facts = signature(model)
    assert (facts["channels"], facts["experts"]) == (128, 4)
    scored = importance(model, TOKENIZER, PAIRS)
    assert scored.info["unreached"] == {"units": 0, "share": 0.0}
    units = classify(importance(model, TOKENIZER, PAIRS[:4]), scored)
    assert scored.mlp.shape == (2, 128) and units.shares()["units"].sum() == 2 * (128 + 4)
    share = units.share(units.scu | ~units.scu)
    whole = sum(w.numel() for _, e in blocks(model) for w in e.parameters())
    heads = sum(w.numel() for n, w in model.named_parameters() if n.endswith("_proj.weight"))
    heads -= sum(w.numel() for n, w in model.named_parameters() if "shared_expert." in n)
    named = [(n, w) for n, w in model.named_parameters() if "self_attn" in n]
    heads += sum(w.numel() for n, w in named if n.endswith(("q_proj.bias", "k_proj.bias")))
    heads += sum(w.numel() for n, w in named if n.endswith("v_proj.bias"))
    assert share["parameters"] == (whole + heads) / model.num_parameters()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_hooks_on_frozen_experts_are_called_once(architecture):
    model, calls = tiny_model(architecture), []
    (experts, *_), _ = zip(
        *[(m, n) for n, m in model.named_modules() if hasattr(m, "gate_up_proj")]
    )
    experts.register_forward_hook(lambda module, inputs, output: (calls.append(1), output + 1)[1])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        kinds = [
            torch.zeros(len(m), m[0].units, dtype=torch.bool) for m in depth_two(model).values()
        ]
        kinds[0][:, ::3] = True
        for changed in (freeze(model, UnitMask(*kinds)), merge(model)):
            calls.clear()
            assert torch.allclose(changed(ids).logits, wanted, atol=1e-4) and calls == [1]


def unreached():
    "A model whose router never picks expert 3 of layer 0, and its importances."
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.abs_()
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.forward = never_three(model.model.layers[0].mlp.gate)
    return model


def never_three(gate):
    "The router's forward, that looks at three experts only."

    def forward(states):
        logits = linear(states, gate.weight).index_fill(1, torch.tensor([3]), -torch.inf)
        values, index = logits.softmax(-1).topk(2)
        return logits, values / values.sum(-1, keepdim=True), index

    return forward


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magnitude"])
def test_a_unit_that_no_token_reached_is_redundant(method, tmp_path):
    model = unreached()
    safety, utility = (
        importance(model, TOKENIZER, some, method=method) for some in (PAIRS[:5], PAIRS[5:])
    )
    assert utility.info["unreached"] == {"units": 32, "share": 32 / 256}
    assert not utility.mlp[0, 96:].any() and (utility.mlp[0, :96] >= 0).all()
    z = utility.standardized()
    assert z.mlp.isfinite().all() and (z.mlp[0, 96:] == min(z.mlp.min(), z.attention.min())).all()
    raw = utility.mlp[0, :96]
    torch.testing.assert_close(z.mlp[0, :96], (raw - raw.mean()) / raw.std())
    units = classify(safety, utility, ru=0.13)
    assert units.ru.mlp[0, 96:].all() and not units.order.mlp[0, 96:].any()
    assert classify(None, utility, ru=0.13).ru.mlp[0, 96:].all()
    utility.save(tmp_path)
    again = Importance.load(tmp_path)
    assert torch.equal(again.standardized().mlp, z.mlp) and again.info == utility.info
    both = safety + utility
    assert both.info["unreached"]["units"] == 32 and both.mlp.isfinite().all()
    assert torch.equal((again + safety).mlp, (utility + safety).mlp)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_pruned_is_a_loop_without_these_channels(architecture, means):
    model = tiny_model(architecture)
    mask, before, expected = half(model), snapshot(model), model(IDS).logits
    mask.attention[:] = False
    scored = importance(model, TOKENIZER, PAIRS) if means else None
    constants = scored.mean("mlp") if means else torch.zeros(2, 128)
    slow = by_loop(copy.deepcopy(model), mask.mlp, constants)(IDS).logits
    with pruned(model, mask, scored):
        torch.testing.assert_close(model(IDS).logits, slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, slow, atol=1e-2)
    assert same(model.state_dict(), before) and torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_frozen_channels_keep_their_bits(architecture):
    model = tiny_model(architecture)
    mask, before, expected = half(model), snapshot(model), model(IDS).logits
    kinds = [type(experts) for _, experts in blocks(model)]
    freeze(model, mask)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert same(model.state_dict(), before)
    optimizer = adamw(model)
    train(model, optimizer)
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)
    after = merge(model).state_dict()
    assert [type(experts) for _, experts in blocks(model)] == kinds
    for layer, (mlp, _) in enumerate(blocks(model)):
        at = next(name for name, m in model.named_modules() if m is mlp)
        off = mask.mlp[layer].view(4, 32)
        name = f"{at}.experts.down_proj"
        changed = (after[name] != before[name]).transpose(1, 2)
        assert not changed[off].any() and changed[~off].float().mean() > 0.9
        name = f"{at}.experts.gate_up_proj"
        changed = after[name] != before[name]
        off = torch.cat([off, off], 1)
        assert not changed[off].any() and changed[~off].float().mean() > 0.9
        router = next(
            n for n in before if n.startswith(at) and n.endswith(("gate.weight", "router.weight"))
        )
        assert (after[router] != before[router]).any()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_gradient_is_that_of_the_whole_model(architecture):
    model = tiny_model(architecture)
    mask, whole = half(model), copy.deepcopy(model)
    freeze(model, mask)
    for one in (model, whole):
        one(IDS, labels=IDS).loss.backward()
    pairs = zip(blocks(model), blocks(whole), mask.mlp.view(2, 4, 32), strict=True)
    for (_, split), (_, experts), off in pairs:
        columns = experts.down_proj.grad.transpose(1, 2)[~off]
        rows = experts.gate_up_proj.grad[~torch.cat([off, off], 1)]
        torch.testing.assert_close(split.trained_down_proj.grad, columns, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(split.trained_gate_up_proj.grad, rows, rtol=1e-3, atol=1e-6)
        assert split.frozen_down_proj.grad is None


@pytest.mark.parametrize("architecture", MIXTURES)
def test_merging_without_training_changes_nothing(architecture):
    model = tiny_model(architecture)
    before, expected, mask = snapshot(model), model(IDS).logits, half(model)
    scored = importance(model, TOKENIZER, PAIRS)
    frozen = copy.deepcopy(freeze(model, mask))
    torch.testing.assert_close(
        importance(frozen, TOKENIZER, PAIRS).mlp, scored.mlp, rtol=1e-4, atol=1e-6
    )
    for one in (model, frozen):
        merge(one)
        assert same(one.state_dict(), before) and torch.equal(one(IDS).logits, expected)


def test_a_state_dict_of_the_original_can_be_loaded_and_written_to():
    model = freeze(tiny_model("qwen3_moe"), half(tiny_model("qwen3_moe")))
    other = tiny_model("qwen3_moe", seed=1)
    model.load_state_dict(other.state_dict())
    assert same(model.state_dict(), other.state_dict())
    name = "model.layers.0.mlp.experts.down_proj"
    model.state_dict()[name].mul_(2)
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj.data = new = torch.randn(experts.gate_up_proj.shape)
    merged = merge(model).state_dict()
    assert torch.equal(merged[name], 2 * other.state_dict()[name])
    assert torch.equal(merged[name.replace("down_proj", "gate_up_proj")], new)


def test_the_rest_is_frozen_with_the_router_and_the_shared_expert():
    model = tiny_model("qwen2_moe")
    before = snapshot(model)
    freeze(model, half(model), rest=True)
    train(model, adamw(model))
    after = merge(model).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "model.layers.0.mlp.experts.down_proj" in changed
    assert not any("shared_expert" in name or ".gate." in name for name in changed)


def mixed(**options):
    sizes = TINY_SIZES | TINY_EXPERTS | options
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mixed(mlp_only_layers=[0]), "its layers have 0 or 4 experts"),
        (
            lambda: AutoModelForCausalLM.from_config(
                AutoConfig.for_model("gpt_oss", **TINY_SIZES | TINY_EXPERTS)
            ),
            "GptOssForCausalLM is not supported: its GptOssExperts differ from gated experts",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                AutoConfig.for_model("olmoe", **TINY_SIZES | TINY_EXPERTS)
            ),
            "OlmoeForCausalLM is not supported: in model.layers.0.self_attn",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(SsahError, match=message) as error:
        unit_parameters(make())
    one_line(error)


def test_what_is_refused_of_a_model_that_is_supported():
    model = tiny_model("mixtral")
    mask, before = half(model), snapshot(model)
    with pytest.raises(SsahError, match=r"use the reversible pruned\(model, mask\)") as error:
        prune(model, mask)
    one_line(error)
    assert same(model.state_dict(), before)
    freeze(model, mask)
    with (
        pytest.raises(SsahError, match="experts.down_proj is frozen in part") as error,
        pruned(model, mask - UnitMask(mask.mlp & False, mask.attention)),
    ):
        pass
    one_line(error)


def test_an_optimizer_from_before_is_refused():
    model = tiny_model("mixtral")
    optimizer = adamw(model)
    freeze(model, half(model))
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(SsahError, match="built before freeze or merge"):
        optimizer.step()


def test_an_anchor_holds_no_channels_of_experts():
    model = tiny_model("mixtral")
    mask = half(model)
    with pytest.raises(SsahError, match="an anchor cannot hold channels of experts") as error:
        Anchor(model, TOKENIZER, PAIRS, on="units", units=mask)
    one_line(error)
    Anchor(model, TOKENIZER, PAIRS)
    Anchor(model, TOKENIZER, PAIRS, on="units", units=mask - UnitMask(mask.mlp, ~mask.attention))
