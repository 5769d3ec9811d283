"""Pruning against a slow, obvious reference."""

import copy

import pytest
import torch
from helpers import one_line
from helpers_calibration import TOKENIZER
from helpers_units import IDS, MASKS, pairs, same_bits, use, with_biases
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ssah_nb.attribution import importance
from ssah_nb.classes import load_pruned, prune, pruned
from ssah_nb.engine import hub
from ssah_nb.engine.models import ARCHITECTURES, load_model, save_model, tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask, depth_two, unit_parameters


@torch.no_grad()
def slow_pruned(model, mask: UnitMask, means: dict | None = None) -> torch.Tensor:
    "Logits with the chosen channels at the input of B set to 0, or to their means."
    handles = []
    for i, layer in enumerate(model.model.layers):
        for kind, b, width in (
            ("mlp", layer.mlp.down_proj, 1),
            ("attention", layer.self_attn.o_proj, 8),
        ):
            off = getattr(mask, kind)[i].repeat_interleave(width)
            value = means[kind][i] if means else torch.zeros(len(off))

            def switch_off(_, inputs, off=off, value=value):
                return (torch.where(off, value.to(inputs[0].dtype), inputs[0]),)

            handles.append(b.register_forward_pre_hook(switch_off))
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_pruned_is_the_slow_reference_and_leaves_no_trace(architecture):
    model = with_biases(architecture)
    scored = importance(model, TOKENIZER, pairs("No"))
    before, dense = copy.deepcopy(model.state_dict()), model(IDS).logits
    means = {kind: scored.mean(kind) for kind in ("mlp", "attention")}
    for name, mask in MASKS.items():
        expected, compensated = slow_pruned(model, mask), slow_pruned(model, mask, means)
        with pruned(model, mask) as same:
            assert same is model
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        with pruned(model, mask, compensate=scored):
            torch.testing.assert_close(model(IDS).logits, compensated, rtol=1e-4, atol=1e-5)
        assert same_bits(before, model.state_dict()) and torch.equal(model(IDS).logits, dense)
        if name != "nothing":
            assert not torch.allclose(expected, dense, atol=1e-3)
            assert not torch.allclose(expected, compensated, atol=1e-3)


@torch.no_grad()
def test_the_mean_can_come_from_wanda_but_not_from_absolute_values():
    model, mask = tiny_model(), MASKS["random 0"]
    flap, wanda, sn = (
        importance(model, TOKENIZER, pairs("No"), method=m) for m in ("flap", "wanda_sp", "sn_tune")
    )
    with pruned(model, mask, flap):
        expected = model(IDS).logits
    with pruned(model, mask, wanda):
        torch.testing.assert_close(model(IDS).logits, expected)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(SsahError, match="method 'sn_tune' keeps no mean activations"),
        pruned(model, mask, sn),
    ):
        pass
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_comes_back_bit_for_bit_after_an_error(dtype):
    model = tiny_model().to(dtype)
    model.model.layers[0].mlp.down_proj.weight.data[0, :3] = torch.tensor(
        [-0.0, float("inf"), float("nan")]
    )
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    mask = MASKS["everything"]
    inside = None
    with pytest.raises(KeyError), pruned(model, mask):
        with pruned(model, MASKS["random 1"]):
            inside = float(model.model.layers[0].mlp.down_proj.weight.detach().abs().sum())
        # the inner one put back the outer one's zeros
        assert not model.model.layers[0].mlp.down_proj.weight.any()
        raise KeyError
    assert inside == 0
    assert same_bits(before, model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_model_that_is_cast_meanwhile_gets_its_units_back(architecture):
    model = tiny_model(architecture)
    mask = UnitMask(*(torch.ones(2, n, dtype=torch.bool) for n in unit_counts(model)))
    expected = {name: p.double() for name, p in model.state_dict().items()}
    with pruned(model, mask):
        model.double()
    assert same_bits(expected, model.state_dict())


@torch.no_grad()
def test_a_compiled_model_hears_the_mean():
    model, mask = tiny_model(), MASKS["random 0"]
    scores = importance(model, TOKENIZER, pairs("No"))
    with pruned(model, mask, scores):
        expected = model(IDS).logits
    for layer in model.model.layers:
        layer.compile(backend="eager")
    model(IDS)
    with pruned(model, mask, scores):
        assert torch.equal(model(IDS).logits, expected)


def unit_counts(model) -> list[int]:
    "Channels and heads of a layer."
    return [modules[0].units for modules in depth_two(model).values()]


def expected_parameters(model, mask: UnitMask, fused: bool) -> int:
    """What `prune` leaves.

    Channels go; heads go when their whole group goes; one channel and one group stay in a layer.
    """
    left = sum(p.numel() for p in model.parameters())
    for layer, attention in enumerate(depth_two(model)["attention"]):
        channels = min(int(mask.mlp[layer].sum()), 31)
        left -= channels * 3 * 32

        group = attention.group
        whole_groups = mask.attention[layer].unflatten(0, (-1, group)).all(1)
        groups = 0 if fused else min(int(whole_groups.sum()), 4 // group - 1)
        biases = 8 * (group + 2) if model.config.model_type == "qwen2" else 0
        left -= groups * (8 * 32 * (2 * group + 2) + biases)
    return left


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_prune_equals_pruned(architecture, groups, tmp_path):
    model = with_biases(architecture, num_key_value_heads=groups)
    before = copy.deepcopy(model.state_dict())
    for name, mask in MASKS.items():
        with pruned(model, mask):
            expected = model(IDS).logits
        smaller = prune(model, mask)
        torch.testing.assert_close(smaller(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in smaller.parameters()) == expected_parameters(
            model, mask, architecture == "phi3"
        ), name
    assert same_bits(before, model.state_dict()) and not hasattr(model.config, "ssah_kept")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_pruned_model_is_saved_loaded_and_generates(architecture, tmp_path):
    model = with_biases(architecture, tie_word_embeddings=architecture in ("qwen3", "gemma2"))
    model.generation_config.max_new_tokens = 12
    for name in ("a group", "everything", "random 0"):
        with pruned(model, MASKS[name]):
            expected, tokens = model(IDS).logits, model.generate(IDS, do_sample=False)
        folder = save_model(prune(model, MASKS[name]), TOKENIZER, tmp_path / "small")
        loaded = load_pruned(folder)
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert tokens.shape == (2, 32)
        assert torch.equal(loaded.generate(IDS, do_sample=False), tokens)
        assert loaded.dtype == torch.float32
        assert load_pruned(folder, torch.bfloat16).dtype == torch.bfloat16
        assert load_pruned(folder, "bfloat16", device="cpu").dtype == torch.bfloat16
        assert load_pruned(folder, "auto").dtype == torch.float32  # on the CPU
        assert not loaded.training
    with pytest.raises(SsahError, match="it is a pruned model: load it with load_pruned") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_loading_a_pruned_model_leaves_the_callers_random_numbers(tmp_path):
    folder = save_model(prune(tiny_model(), MASKS["random 0"]), TOKENIZER, tmp_path / "small")
    before = torch.random.get_rng_state()
    load_pruned(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unknown_dtype_or_device_of_a_pruned_model_is_named(tmp_path):
    folder = save_model(prune(tiny_model(), MASKS["random 0"]), TOKENIZER, tmp_path / "small")
    with pytest.raises(SsahError, match="unknown dtype 'float8'"):
        load_pruned(folder, "float8")
    with pytest.raises(SsahError, match="device 'gpu' cannot be used"):
        load_pruned(folder, device="gpu")


def test_a_pruned_model_is_read_from_the_hub(tmp_path, monkeypatch):
    small = prune(tiny_model(), MASKS["random 0"])
    folder, asked = save_model(small, TOKENIZER, tmp_path / "small"), []

    def snapshot(name, revision, token, allow_patterns):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    loaded = load_pruned("owner/small", revision="v1")
    assert asked == [("owner/small", "v1", ["*.json", "*.safetensors"])]
    assert torch.equal(loaded(IDS).logits, small(IDS).logits)


def test_what_load_pruned_refuses(tmp_path):
    whole = save_model(tiny_model(), TOKENIZER, tmp_path / "whole")
    with pytest.raises(SsahError, match="holds no pruned model; load it with load_model"):
        load_pruned(whole)
    with pytest.raises(SsahError, match="no pruned model in") as error:
        load_pruned(tmp_path / "none")
    assert "\n" not in str(error.value)
    small = save_model(prune(tiny_model(), MASKS["random 0"]), TOKENIZER, tmp_path / "small")
    other = save_model(prune(tiny_model(), MASKS["random 1"]), TOKENIZER, tmp_path / "other")
    (small / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(SsahError, match="do not fit its config"):
        load_pruned(small)
    (small / "model.safetensors").unlink()
    with pytest.raises(SsahError, match="do not fit its config"):
        load_pruned(small)


def test_what_cannot_be_pruned():
    small = prune(tiny_model(), MASKS["random 0"])
    with pytest.raises(SsahError, match="pruned already"):
        prune(small, MASKS["random 1"])
    with pytest.raises(SsahError, match="differ in their number of units"):
        importance(small, TOKENIZER, pairs("No"))
    with (
        pytest.raises(SsahError, match="differ in their number of units"),
        pruned(small, MASKS["random 1"]),
    ):
        pass
    frozen = freeze(tiny_model(), MASKS["random 0"])
    torch.testing.assert_close(
        importance(frozen, TOKENIZER, pairs("No")).mlp,
        importance(tiny_model(), TOKENIZER, pairs("No")).mlp,
    )
    for wrong in (
        lambda: use("pruned", frozen, MASKS["random 1"]),
        lambda: prune(frozen, MASKS["random 1"]),
    ):
        with pytest.raises(SsahError, match=r"merge\(model\)") as error:
            wrong()
        assert "\n" not in str(error.value)
    assert same_bits(merge(frozen).state_dict(), tiny_model().state_dict())
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SsahError, match="q_proj is a Linear with an adapter around it"):
        prune(adapted, MASKS["random 0"])
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["down_proj"]))
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(SsahError, match="with an adapter around it"):
        with pruned(adapted, MASKS["random 0"]):
            pass
    assert same_bits(before, adapted.state_dict())


def test_a_pruned_model_can_be_trained():
    small = prune(tiny_model(), MASKS["random 0"])
    small(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    assert unit_parameters(tiny_model())["mlp"] == 96


# Equal widths, for plain transformers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_equal_widths_load_in_plain_transformers(architecture, tmp_path):
    model = with_biases(architecture, tie_word_embeddings=architecture in ("qwen3", "gemma2"))
    model.generation_config.max_new_tokens = 12
    for name in ("everything", "all heads of a layer", "random 0"):
        mask = MASKS[name]
        with pruned(model, mask):
            expected, tokens = model(IDS).logits, model.generate(IDS, do_sample=False)
        left = max(1, 32 - int(mask.mlp.sum(1).min()))  # of the widest layer
        smaller = prune(model, mask, equal_widths=True)
        plain = AutoModelForCausalLM.from_pretrained(save_model(smaller, TOKENIZER, tmp_path / "m"))
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(plain.generate(IDS, do_sample=False), tokens), name
        assert plain.config.intermediate_size == left
        saved = sum(p.numel() for p in model.parameters()) - plain.num_parameters()
        assert saved == 2 * 3 * 32 * (32 - left), name
    assert model.config.intermediate_size == 32
    loaded, _ = load_model(tmp_path / "m")
    assert torch.equal(loaded(IDS).logits, plain(IDS).logits)
    with pytest.raises(SsahError, match="holds no pruned model; load it with load_model"):
        load_pruned(tmp_path / "m")


def test_what_one_width_saves():
    "The layer with the fewest pruned channels sets it; the columns that were filled up are zero."
    mask = UnitMask(torch.zeros(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    mask.mlp[0, :20] = mask.mlp[1, 4:9] = True
    first, second = prune(tiny_model(), mask, equal_widths=True).model.layers
    assert first.mlp.down_proj.weight.shape == second.mlp.down_proj.weight.shape == (32, 27)
    assert (first.mlp.down_proj.weight == 0).all(0).sum() == 15
    assert second.mlp.down_proj.weight.any(0).all()
    again = prune(prune(tiny_model(), mask, True), UnitMask(mask.mlp[:, 5:], mask.attention), True)
    assert again.config.intermediate_size < 27  # it is an ordinary model


def test_a_configuration_that_cannot_say_the_width(monkeypatch):
    model, whole = tiny_model(), tiny_model()
    deaf = staticmethod(lambda config: whole)  # whatever its configuration says
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", deaf)
    words = r"cannot say that each MLP has \d+ channels \(other shapes\); leave equal_widths out"
    with pytest.raises(SsahError, match=words) as error:
        prune(model, MASKS["random 0"], equal_widths=True)
    one_line(error)


def test_what_has_no_means_is_refused():
    model, mask = tiny_model(), MASKS["one channel"]
    with pytest.raises(SsahError, match="a UnitMask has no mean activations") as error:
        with pruned(model, mask, compensate=mask):
            pass
    one_line(error)
