"""Classes, masks and pruning against slow, obvious references (chapter 06)."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ssah_nb.attribution import Importance, importance
from ssah_nb.units import signature
from ssah_nb.classes import classify, load_pruned, prune, pruned, search_scu
from ssah_nb.units import CLASSES, UnitMap, UnitMask
from ssah_nb.engine.intervals import Estimate, wilson
from ssah_nb.freezing import freeze, merge
from ssah_nb.engine.models import ARCHITECTURES, load_model, save_model, tiny_model, tiny_tokenizer
from ssah_nb.units import depth_two, unit_parameters
from ssah_nb.report import printed
from ssah_nb.engine.run import SsahError

TOKENIZER, IDS = tiny_tokenizer(), torch.arange(40).view(2, 20) * 5
INFO = {
    "model": signature(tiny_model()),
    "parameters": {"mlp": 96, "attention": 768.0},
    "total": 20_000,
    "method": "flap",
    "tokens": "response",
}


def made_up(seed: int, layers=2, channels=32, heads=4, width=8, **info) -> Importance:
    draw = torch.Generator().manual_seed(seed)
    raw = {
        "mlp": torch.randn(layers, channels, generator=draw),
        "attention": torch.randn(layers, heads * width, generator=draw),
    }
    return Importance(
        raw, {"mlp": [], "attention": []}, INFO | {"model": INFO["model"] | {"heads": heads}} | info
    )


def pairs(word: str) -> list[dict]:
    return [{"prompt": f"{word} {i}", "response": f"{word}! " * (i + 1)} for i in range(4)]


def as_set(mask: UnitMask) -> set:
    "{(kind, layer, unit)}"
    return {
        (kind, *map(int, where))
        for kind in ("mlp", "attention")
        for where in getattr(mask, kind).nonzero()
    }


def random_mask(seed: int, share=0.4) -> UnitMask:
    draw = torch.Generator().manual_seed(seed)
    return UnitMask(
        torch.rand(2, 32, generator=draw) < share, torch.rand(2, 4, generator=draw) < share
    )


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v.view(torch.uint8), b[k].view(torch.uint8)) for k, v in a.items()
    )


# --- classes ---


def slow_classes(safety: Importance | None, utility: Importance, scu, ucu, ru, ratio_of) -> dict:
    "{(kind, layer, unit): class}, unit by unit."

    def z(scored):
        found = {}
        for layer in range(2):
            for kind in ("mlp", "attention"):
                x = scored.channels[kind][layer].double()
                values = ((x - x.mean()) / x.std()).tolist()
                width = 1 if kind == "mlp" else 8
                for u in range(len(values) // width):
                    found[kind, layer, u] = sum(values[u * width : (u + 1) * width]) / width
        return found

    size = {"mlp": 96, "attention": 768} if ratio_of != "units" else {"mlp": 1, "attention": 1}
    u = z(utility)
    s = z(safety) if safety else {k: 0 for k in u}
    whole = 20_000 if ratio_of == "model" else sum(size[k[0]] for k in u)

    def best(score, ratio):
        chosen, room = [], ratio * whole
        for unit in sorted(u, key=score):
            room -= size[unit[0]]
            if room < -1e-6:
                break
            chosen.append(unit)
        return chosen

    classes = dict.fromkeys(u, "CU" if safety else "UU")
    classes |= dict.fromkeys(best(lambda k: s[k] + u[k], ru), "RU")
    if safety:
        classes |= dict.fromkeys(best(lambda k: s[k] - u[k], ucu), "UCU")
        classes |= dict.fromkeys(best(lambda k: u[k] - s[k], scu), "SCU")
    return classes


@pytest.mark.parametrize("ratio_of", ["parameters", "units", "model"])
@pytest.mark.parametrize(
    "ratios", [(0.01, 0.1, 0.1), (0.05, 0.2, 0.3), (0.0, 0.0, 0.0), (0.15, 0.1, 0.2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_classify_is_the_slow_reference(ratio_of, ratios, seed):
    safety, utility = made_up(seed), made_up(seed + 10)
    for s in (safety, None):
        units = classify(s, utility, *ratios, ratio_of=ratio_of)
        expected = slow_classes(s, utility, *ratios, ratio_of)
        got = {(r.kind, r.layer, r.unit): r["class"] for _, r in units.to_pandas().iterrows()}
        assert got == expected
        for name in CLASSES:
            assert as_set(units.units(name)) == {k for k, c in expected.items() if c == name}
        assert units.shares().units.sum() == 72 and abs(units.shares().share_units.sum() - 1) < 1e-9
    assert as_set(classify(safety, utility, *ratios, ratio_of=ratio_of).scu) == as_set(
        classify(safety, utility, *ratios, ratio_of=ratio_of).units("SCU")
    )


def test_scu_and_ucu_take_precedence_over_ru():
    safety, utility = made_up(0), made_up(1)
    for scored, values in (
        (safety, [[-1.0, -30.0]]),
        (utility, [[-30.0, -1.0]]),
    ):  # channels 0 and 1 of layer 0: smallest sum, largest and smallest difference
        scored.channels["mlp"][0, :2] = torch.tensor(values[0])
    units = classify(safety, utility, scu=1 / 72, ucu=1 / 72, ru=10 / 72, ratio_of="units")
    assert as_set(units.scu) == {("mlp", 0, 0)} and as_set(units.ucu) == {("mlp", 0, 1)}
    assert (
        len(units.ru) == 8
        and len(classify(safety, utility, scu=0, ucu=0, ru=10 / 72, ratio_of="units").ru) == 10
    )
    assert as_set(units.ru) == as_set(
        classify(safety, utility, scu=0, ucu=0, ru=10 / 72, ratio_of="units").ru
    ) - as_set(units.scu | units.ucu)


def test_the_default_ratios_give_the_shares_that_the_paper_prints():
    llama2 = {"parameters": {"mlp": 3 * 4096, "attention": 4 * 128 * 4096}, "total": 6_738_415_616}
    safety, utility = (made_up(seed, 32, 11008, 32, 128, **llama2) for seed in (0, 1))
    units = classify(safety, utility)
    share = units.shares().set_index("class").share_units
    assert 0.013 <= share["SCU"] <= 0.015 and 0.13 <= share["UCU"] <= 0.15
    alone = classify(
        safety, utility, scu=0, ucu=0
    )  # random scores: a sixth of the RU are SCU or UCU, too, and stay that
    assert (
        0.13 <= alone.share(alone.ru)["units"] <= 0.15
        and 0.12 <= share["RU"] < alone.share(alone.ru)["units"]
    )
    parameters = units.share(units.scu)
    assert (
        parameters["unit_parameters"] == pytest.approx(0.01, rel=0.05)
        and parameters["parameters"] < parameters["unit_parameters"]
    )
    by_model = classify(safety, utility, ratio_of="model")
    assert by_model.share(by_model.scu)["parameters"] == pytest.approx(0.01, rel=0.05)
    by_units = classify(safety, utility, ratio_of="units")
    assert len(by_units.scu) == int(0.01 * 32 * (11008 + 32)) and len(by_units.ucu) == int(
        0.1 * 32 * (11008 + 32)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scu=-0.01), "ratio scu=-0.01 is not between 0 and 1"),
        (dict(ru=1.5), "ratio ru=1.5 is not between"),
        (dict(ucu=float("nan")), "ratio ucu=nan"),
        (dict(scu=0.5, ucu=0.3, ru=0.3), "overlap: together they are more than 1"),
        (dict(ratio_of="heads"), "unknown ratio_of 'heads'; use one of parameters"),
        (
            dict(ru=0.9, scu=0, ucu=0, ratio_of="model"),
            "ratio 0.9 of the model is more than all units together",
        ),
        (dict(scu=0.3, ucu=0.3, ru=0, ratio_of="model"), "the ratios scu=0.3 and ucu=0.3 overlap"),
    ],
)
def test_bad_ratios(options, message):
    info = {"total": 24_000}  # the units hold 12 288 of them
    with pytest.raises(SsahError, match=message) as error:
        classify(made_up(0, **info), made_up(1, **info), **options)
    assert "\n" not in str(error.value)
    assert (
        len(classify(made_up(0), made_up(1), scu=0.5, ucu=0.3, ru=0.2, ratio_of="units").cu) < 72
    )  # just fits


def test_importances_of_two_models_do_not_mix():
    base = importance(tiny_model(), TOKENIZER, pairs("No"))
    for other in (
        tiny_model(seed=1),
        tiny_model("mistral"),
        tiny_model(num_key_value_heads=4),
    ):  # the first has the same shape and the same signature
        with pytest.raises(SsahError, match="score both sets on one model"):
            classify(base, importance(other, TOKENIZER, pairs("Yes")))
    classify(base, importance(tiny_model(), TOKENIZER, pairs("Yes")))


# --- masks and maps ---


def test_masks_are_sets():
    a, b, everything = random_mask(0), random_mask(1), as_set(~(random_mask(0) & ~random_mask(0)))
    assert len(everything) == 72 and len(a) == len(as_set(a)) > 0
    assert (
        as_set(a | b) == as_set(a) | as_set(b)
        and as_set(a & b) == as_set(a) & as_set(b)
        and as_set(a - b) == as_set(a) - as_set(b)
    )
    assert as_set(~a) == everything - as_set(a) and a == ~~a and a != b and a != 3
    with pytest.raises(SsahError, match="different models"):
        a | UnitMask(a.mlp[:, :-1], a.attention)
    other = INFO["model"] | {"model_type": "mistral"}
    with pytest.raises(SsahError, match="different models"):
        UnitMask(a.mlp, a.attention, INFO["model"]) & UnitMask(b.mlp, b.attention, other)
    for mask in (
        UnitMask(a.mlp, a.attention, other) | b,
        b - UnitMask(a.mlp, a.attention, other),
        ~UnitMask(a.mlp, a.attention, other).random_like(),
    ):
        assert mask.model == other


def test_random_controls_have_the_same_size():
    mask = random_mask(3, 0.3)
    for seed in range(5):
        plain, layered = mask.random_like(seed), mask.random_like(seed, per_layer=True)
        assert plain.mlp.sum() == mask.mlp.sum() and plain.attention.sum() == mask.attention.sum()
        assert torch.equal(layered.mlp.sum(1), mask.mlp.sum(1)) and torch.equal(
            layered.attention.sum(1), mask.attention.sum(1)
        )
        assert mask.random_like(seed) == plain and mask.random_like(seed + 1) != plain
        for per_layer in (False, True):
            rest = (mask & random_mask(4, 0.5)).random_like(seed, per_layer, among=~mask)
            assert len(rest & mask) == 0 and len(rest) == len(mask & random_mask(4, 0.5)) > 5
    counts = torch.stack([mask.random_like(seed).mlp for seed in range(400)]).float().mean(0)
    assert (counts - mask.mlp.float().mean()).abs().max() < 0.12  # every unit is as likely
    for per_layer in (False, True):
        for among in (mask & ~mask, mask & random_mask(4, 0.5)):
            with pytest.raises(SsahError, match="fewer units to choose among"):
                mask.random_like(0, per_layer, among=among)
        assert mask.random_like(0, per_layer, among=mask) == mask


def test_top_cu():
    units = classify(made_up(0), made_up(1), 0.02, 0.1, 0.1)
    cu = units.to_pandas().query("`class` == 'CU'").sort_values("order", ascending=False)
    for share in (0, 0.06, 0.3, 0.5, 1):
        expected = cu.head(round(share * 72))  # percent of all units, not of the CU
        assert as_set(units.top_cu(share)) == set(zip(expected.kind, expected.layer, expected.unit))
    assert units.top_cu(1) == units.cu and 0 < len(units.top_cu(0.06)) == 4
    for share in (-0.1, 1.1):
        with pytest.raises(SsahError, match="ratio share"):
            units.top_cu(share)
    assert len(classify(None, made_up(1), ru=0.1).top_cu(0.5)) == 0  # an unaligned model has no CU


def test_save_and_load(tmp_path):
    units = classify(made_up(0), made_up(1), 0.02, 0.1, 0.1)
    units.save_pretrained(tmp_path / "a" / "units")
    again = UnitMap.from_pretrained(tmp_path / "a" / "units")
    assert (
        again.to_pandas().equals(units.to_pandas())
        and again.info == units.info
        and again.scu == units.scu
        and again.top_cu(0.1) == units.top_cu(0.1)
    )
    assert again.scu.model == signature(tiny_model()) and again.shares().equals(units.shares())
    with pytest.raises(SsahError, match="no unit map in .*; write one with units.save_pretrained"):
        UnitMap.from_pretrained(tmp_path)


def use(what: str, model, mask):
    if what == "pruned":
        with pruned(model, mask):
            pass
    else:
        {"prune": prune, "freeze": freeze}[what](model, mask)


@pytest.mark.parametrize("what", ["pruned", "prune", "freeze"])
def test_units_of_another_model_are_refused(what):
    units = classify(
        importance(tiny_model(), TOKENIZER, pairs("No")),
        importance(tiny_model(), TOKENIZER, pairs("Yes")),
        0.1,
        0.1,
        0.1,
    )
    same_shape = tiny_model("mistral")
    for model, mask, message in (
        (same_shape, units.scu, "another model .model_type llama instead of mistral"),
        (same_shape, units.top_cu(0.1) | ~units.ru, "another model"),
        (same_shape, units.scu.random_like(), "another model"),
        (tiny_model(intermediate_size=48), units.scu, "channels 32 instead of 48"),
        (tiny_model(num_key_value_heads=4), units.scu, "group 2 instead of 1"),
        (
            tiny_model(),
            UnitMask(units.scu.mlp[:, 1:], units.scu.attention),
            r"mask has mlp units of shape \(2, 31\), the model \(2, 32\)",
        ),
        (
            tiny_model(),
            UnitMask(units.scu.mlp, units.scu.attention[:1]),
            "mask has attention units of shape",
        ),
        (tiny_model(), units, "UnitMap.* units.scu"),
        (tiny_model(), units.scu.mlp, "UnitMask.* units.scu"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(SsahError, match=message) as error:
            use(what, model, mask)
        assert "\n" not in str(error.value) and same_bits(before, model.state_dict())
    use(
        what, tiny_model(seed=1), units.scu
    )  # fine-tuned weights of the same architecture: the same units
    with (
        pytest.raises(SsahError, match="another model"),
        pruned(tiny_model(), units.scu, compensate=importance(same_shape, TOKENIZER, pairs("No"))),
    ):
        pass


# --- pruning ---


def special_masks() -> dict[str, UnitMask]:
    masks = {
        name: UnitMask(torch.zeros(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
        for name in (
            "nothing",
            "one channel",
            "half a group",
            "a group",
            "all heads of a layer",
            "all channels of a layer",
            "everything",
        )
    }
    masks["one channel"].mlp[1, 7] = True
    masks["half a group"].attention[0, 1] = True
    masks["a group"].attention[1, 2:] = True
    masks["all heads of a layer"].attention[0] = True
    masks["all channels of a layer"].mlp[1] = True
    masks["everything"].mlp[:], masks["everything"].attention[:] = True, True
    return masks | {f"random {seed}": random_mask(seed) for seed in range(2)}


MASKS = special_masks()


def with_biases(architecture: str, **config):
    "A tiny model whose biases, if it has any, are not zero."
    model = tiny_model(architecture, **config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
def slow_pruned(model, mask: UnitMask, means: dict | None = None) -> torch.Tensor:
    "Logits with the chosen channels at the input of B set to 0, or to their means, on every forward pass."
    handles = []
    for i, layer in enumerate(model.model.layers):
        for kind, b, width in (
            ("mlp", layer.mlp.down_proj, 1),
            ("attention", layer.self_attn.o_proj, 8),
        ):
            off = getattr(mask, kind)[i].repeat_interleave(width)
            value = means[kind][i] if means else torch.zeros(len(off))
            handles.append(
                b.register_forward_pre_hook(
                    lambda _, inputs, off=off, value=value: (
                        torch.where(off, value.to(inputs[0].dtype), inputs[0]),
                    )
                )
            )
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
            assert not torch.allclose(expected, dense, atol=1e-3) and not torch.allclose(
                expected, compensated, atol=1e-3
            )


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
    before, flags, mask = (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        MASKS["everything"],
    )
    inside = None
    with pytest.raises(KeyError), pruned(model, mask):
        with pruned(model, MASKS["random 1"]):
            inside = float(model.model.layers[0].mlp.down_proj.weight.detach().abs().sum())
        assert not model.model.layers[
            0
        ].mlp.down_proj.weight.any()  # the inner one put back the outer one's zeros
        raise KeyError
    assert (
        inside == 0
        and same_bits(before, model.state_dict())
        and [p.requires_grad for p in model.parameters()] == flags
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def expected_parameters(model, mask: UnitMask, fused: bool) -> int:
    "What `prune` leaves: channels go; heads go when their whole group goes; one channel and one group stay in a layer."
    left = sum(p.numel() for p in model.parameters())
    for layer, (mlp, attention) in enumerate(
        zip(depth_two(model)["mlp"], depth_two(model)["attention"])
    ):
        channels = min(int(mask.mlp[layer].sum()), 31)
        left -= channels * 3 * 32
        groups = (
            0
            if fused
            else int(mask.attention[layer].unflatten(0, (-1, attention.group)).all(1).sum())
        )
        groups = min(groups, 4 // attention.group - 1)
        biases = (
            8 * (attention.group + 2) if getattr(model.config, "model_type", "") == "qwen2" else 0
        )
        left -= groups * (8 * 32 * (2 * attention.group + 2) + biases)
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
        assert tokens.shape == (2, 32) and torch.equal(
            loaded.generate(IDS, do_sample=False), tokens
        )
        assert (
            loaded.dtype == torch.float32
            and load_pruned(folder, torch.bfloat16).dtype == torch.bfloat16
            and not loaded.training
        )
    with pytest.raises(SsahError, match="it is a pruned model: load it with load_pruned") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


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
    with pytest.raises(SsahError, match="q_proj is a Linear whose weight .* has an adapter"):
        prune(adapted, MASKS["random 0"])
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["down_proj"]))
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(SsahError, match="has an adapter"), pruned(adapted, MASKS["random 0"]):
        pass
    assert same_bits(before, adapted.state_dict())


def test_a_pruned_model_can_be_trained():
    small = prune(tiny_model(), MASKS["random 0"])
    small(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    assert unit_parameters(tiny_model())["mlp"] == 96


# --- the search ---


def searched(measured: dict, ratios, dense=(0.1, 10.0), **options):
    "What the search chose, its table, and the ratios that it measured; `measured` is {units: (attack success, perplexity)}."
    asked = []

    def measure(mask):
        asked.append(len(mask))
        attack, perplexity = measured[len(mask)] if len(mask) else dense
        return wilson(round(attack * 40), 40), Estimate(
            perplexity, perplexity - 1, perplexity + 1, 40
        )

    chosen, table = search_scu(
        made_up(0), made_up(1), ratios, measure, ratio_of="units", ucu=0.1, ru=0.1, **options
    )
    return chosen, table, asked


def test_the_search_takes_the_largest_set_that_lowers_safety_at_steady_utility():
    ratios = [4 / 72, 16 / 72, 8 / 72, 2 / 72]
    chosen, table, asked = searched(
        {16: (0.9, 99.0), 8: (0.5, 11.5), 4: (0.8, 11.0), 2: (0.1, 10.0)}, (r for r in ratios)
    )
    assert chosen == 8 / 72 and asked == [0, 16, 8]  # from high to low, and no further
    assert table.units.tolist() == [0, 16, 8] and table.steady.tolist() == [True, False, True]
    assert table.lowers_safety.tolist() == [False, True, True] and table.chosen.tolist() == [
        False,
        False,
        True,
    ]
    assert table.perplexity.tolist() == [10.0, 99.0, 11.5] and table.attack_success.tolist() == [
        0.1,
        0.9,
        0.5,
    ]
    assert (
        table.attack_success_low[2]
        == wilson(20, 40).low
        > table.attack_success_high[0]
        == wilson(4, 40).high
    )


def test_the_search_wants_more_than_noise():
    chosen, table, _ = searched(
        {16: (0.3, 10.0), 8: (0.4, 10.0)}, [16 / 72, 8 / 72]
    )  # 12 and 16 of 40, the dense model 4
    assert chosen == 8 / 72 and table.lowers_safety.tolist() == [False, False, True]


def test_the_search_when_nothing_is_found():
    ratios = [16 / 72, 8 / 72, 4 / 72]
    chosen, table, _ = searched({16: (0.9, 99.0), 8: (0.2, 11.5), 4: (0.1, 11.0)}, ratios)
    assert (
        chosen == 8 / 72 and not table[table.chosen].lowers_safety.any()
    )  # no set lowers safety: the largest steady one
    chosen, table, asked = searched(
        {16: (0.9, 99.0), 8: (0.9, 50.0), 4: (0.9, float("inf"))}, ratios
    )
    assert (
        chosen == 4 / 72 and asked == [0, 16, 8, 4] and not table[table.chosen].steady.any()
    )  # none is steady: the smallest
    assert searched({16: (0.9, 11.8), 8: (0.9, 11.6), 4: (0.9, 1.0)}, ratios)[0] == 8 / 72
    assert searched({16: (0.9, 11.8)}, ratios, max_perplexity_ratio=1.5)[0] == 16 / 72
    without_scu = {
        "Llama-2-7B-Chat": ("1", "1.3%"),
        "Llama-3-8B-Instruct": ("1", "1.4%"),
        "Mistral-7B-Instruct-v0.2": ("12", "2%"),
    }
    perplexities = {
        model: [
            printed(table, setting, "wikitext2", "perplexity", model)
            for setting in ("dense", f"pruned_scu_{share}")
        ]
        for model, (table, share) in without_scu.items()
    }
    rises = [after / before for before, after in perplexities.values()]
    assert inspect.signature(search_scu).parameters["max_perplexity_ratio"].default == round(
        max(rises), 2
    )
    with pytest.raises(SsahError, match="no ratios to search"):
        searched({}, [])
    with pytest.raises(SsahError, match="ratio scu=2"):
        searched({}, [2])
    with pytest.raises(SsahError, match="no estimate of attack success"):
        search_scu(made_up(0), made_up(1), ratios, lambda mask: (0.9, 10.0))
