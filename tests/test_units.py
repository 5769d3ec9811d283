"""The units of each architecture, and masks as sets of them."""

import json
from contextlib import contextmanager

import pytest
import torch
from helpers import one_line
from helpers_units import INFO, as_set, made_up, random_mask
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb.classes import classify
from ssah_nb.engine.models import ARCHITECTURES, tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.units import UnitMap, UnitMask, depth_two, signature, unit_parameters


@contextmanager
def shaken(weight, rows: slice):
    "Inside, noise is on these rows."
    kept = weight[rows].clone()
    weight[rows] += torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    yield
    weight[rows] = kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_the_rows_of_a_unit_feed_its_channels_and_no_others(architecture, groups):
    model, ids = tiny_model(architecture, num_key_value_heads=groups), torch.arange(6)[None]
    for kind, modules in depth_two(model).items():
        for m in modules:
            sizes = (32, 1, 1) if kind == "mlp" else (4, 8, 4 // groups)
            assert (m.kind, m.units, m.width, m.group) == (kind, *sizes)
            linears = {name for name, _ in m.a + m.shared}
            assert len(linears) == (1 if architecture == "phi3" else len(m.a + m.shared))
            seen = []
            handle = model.get_submodule(m.b).register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0][0].clone())
            )
            model(ids)
            # a block of `width` rows feeds one unit, or a group of them
            for parts, heads in ((m.a, 1), (m.shared, m.group)):
                width = heads * m.width
                for name, first in parts:
                    for block in (0, m.units // heads - 1):
                        rows = slice(first + block * m.width, first + (block + 1) * m.width)
                        with shaken(model.get_submodule(name).weight, rows):
                            model(ids)
                        changed = (seen[-1] != seen[0]).any(0).nonzero().flatten().tolist()
                        expected = list(range(block * width, (block + 1) * width))
                        assert changed == expected, (architecture, name)
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parameters_of_all_units_are_those_of_the_depth_two_modules(architecture):
    model, size = tiny_model(architecture), unit_parameters(tiny_model(architecture))
    for kind, modules in depth_two(model).items():
        into = {name for m in modules for name, _ in m.a + m.shared}
        weights = [f"{name}.weight" for name in into | {m.b for m in modules}]
        biases = [f"{name}.bias" for name in into]  # those of B belong to no unit
        held = [p for n, p in model.named_parameters() if n in weights + biases]
        assert sum(m.units * size[kind] for m in modules) == sum(p.numel() for p in held)


@pytest.mark.parametrize(
    "architecture, sizes",
    [
        ("gpt2", dict(n_layer=1, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=0)),
        (
            "opt",
            dict(
                num_hidden_layers=1,
                hidden_size=8,
                word_embed_proj_dim=8,
                ffn_dim=8,
                num_attention_heads=2,
            ),
        ),
    ],
)
def test_an_unsupported_architecture_is_named(architecture, sizes):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, vocab_size=16, **sizes)
    )
    with pytest.raises(SsahError, match="a unit needs a gated MLP") as error:
        depth_two(model)
    assert type(model).__name__ in one_line(error)


def test_masks_are_sets():
    a, b, everything = random_mask(0), random_mask(1), as_set(~(random_mask(0) & ~random_mask(0)))
    assert len(everything) == 72 and len(a) == len(as_set(a)) > 0
    assert as_set(a | b) == as_set(a) | as_set(b)
    assert as_set(a & b) == as_set(a) & as_set(b)
    assert as_set(a - b) == as_set(a) - as_set(b)
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
        assert torch.equal(layered.mlp.sum(1), mask.mlp.sum(1))
        assert torch.equal(layered.attention.sum(1), mask.attention.sum(1))
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
        with pytest.raises(SsahError, match="share=.* is not between 0 and 1"):
            units.top_cu(share)
    assert len(classify(None, made_up(1), ru=0.1).top_cu(0.5)) == 0  # an unaligned model has no CU


def test_a_share_is_of_this_models_units():
    units = classify(made_up(0), made_up(1), 0.02, 0.1, 0.1)
    assert units.share(units.scu | ~units.scu)["units"] == 1
    small = UnitMask(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(SsahError, match="belong to different models"):
        units.share(small)


def test_what_is_no_mask_no_class_or_no_share_is_named():
    units = classify(made_up(0), made_up(1), 0.02, 0.1, 0.1)
    mask, no_mask = units.scu, "does not choose units; pass a UnitMask such as units.scu"
    for call, message in [
        (lambda: units.units("scu"), "unknown class 'scu'; use one of SCU, UCU, CU, RU, UU"),
        (lambda: units.units("SCU", 1), "unknown class 1"),
        (lambda: mask | units, f"UnitMap {no_mask}"),
        (lambda: mask & None, f"NoneType {no_mask}"),
        (lambda: mask - units, f"UnitMap {no_mask}"),
        (lambda: mask.random_like(among=units), f"UnitMap {no_mask}"),
        (lambda: units.share(units), f"UnitMap {no_mask}"),
        (lambda: units.share(None), f"NoneType {no_mask}"),
        (lambda: units.top_cu("6%"), "share='6%' is not between 0 and 1"),
        (lambda: units.top_cu(None), "share=None is not between 0 and 1"),
        (lambda: classify(made_up(0), None), "NoneType has no scores; pass the Importance"),
        (lambda: classify(units, made_up(0)), "UnitMap has no scores; pass the Importance"),
    ]:
        with pytest.raises(SsahError) as error:
            call()
        assert message in one_line(error)


def test_save_and_load(tmp_path):
    units = classify(made_up(0), made_up(1), 0.02, 0.1, 0.1)
    units.save_pretrained(tmp_path / "a" / "units")
    again = UnitMap.from_pretrained(tmp_path / "a" / "units")
    assert again.to_pandas().equals(units.to_pandas())
    assert again.info == units.info
    assert again.scu == units.scu
    assert again.top_cu(0.1) == units.top_cu(0.1)
    assert again.scu.model == signature(tiny_model()) and again.shares().equals(units.shares())
    with pytest.raises(SsahError, match="no unit map in .*; write one with units.save_pretrained"):
        UnitMap.from_pretrained(tmp_path)


def test_a_mask_goes_to_a_folder_and_back(tmp_path):
    mask = random_mask(1)
    mask = UnitMask(mask.mlp, mask.attention, signature(tiny_model()))
    mask.save_pretrained(tmp_path)
    assert UnitMask.load(tmp_path, model=tiny_model()) == mask
    assert UnitMask.load(tmp_path).model == mask.model
    assert "UnitMask.from_pretrained" in (tmp_path / "README.md").read_text()
    with pytest.raises(SsahError, match="belong to another model"):
        UnitMask.load(tmp_path, model=tiny_model("qwen3", intermediate_size=48))
    with pytest.raises(SsahError, match="UnitMask.from_pretrained reads that"):
        UnitMap.load(tmp_path)
    info = json.loads((tmp_path / "mask.json").read_text())
    info.pop("sha256")
    (tmp_path / "mask.json").write_text(json.dumps(info | {"model": {"layers": 5}}))
    with pytest.raises(SsahError, match="layers at once"):
        UnitMask.load(tmp_path)
