"""More data, several sets, several processes, files."""

import json

import datasets
import pytest
import torch
from helpers import one_line
from helpers_calibration import KINDS, PAIRS, TOKENIZER, close

from ssah_nb.attribution import Importance, importance, load_calibration
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.engine.scores import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_two_data_sets_add_up(method, tmp_path):
    model = tiny_model("qwen2")
    whole, first, second = (
        importance(model, TOKENIZER, p, method=method) for p in (PAIRS, PAIRS[:3], PAIRS[3:])
    )
    close(first + second, whole, 1e-6)
    close(sum([first, second]), whole, 1e-6)
    # later, from a file
    close(Importance.load(second.save(tmp_path / "second")) + first, whole, 1e-6)
    if method != "magnitude":
        assert not torch.allclose(first.mlp, whole.mlp, rtol=1e-2)


def test_only_like_adds_to_like():
    model = tiny_model()
    base = importance(model, TOKENIZER, PAIRS)
    for other, what in (
        (importance(model, TOKENIZER, PAIRS, method="wanda_sp"), "method"),
        (importance(model, TOKENIZER, PAIRS, tokens="all"), "tokens"),
        (importance(tiny_model(seed=1), TOKENIZER, PAIRS), "weights"),
        (importance(tiny_model("mistral"), TOKENIZER, PAIRS), "model"),
    ):
        with pytest.raises(
            SsahError, match=f"the two importances differ in {what}; score both sets on one model"
        ) as error:
            base + other
        assert "\n" not in str(error.value)
    for options in ({"max_response": 2}, {"system": "Be nice."}):
        with pytest.raises(SsahError, match=f"have {[*options][0]}=.* so their sum is of neither"):
            base + importance(model, TOKENIZER, PAIRS, **options)
    with pytest.raises(SsahError, match="a int cannot be added to an importance"):
        base + 3
    assert base in [base, base + base] and base != base + base
    lacking = importance(model, TOKENIZER, PAIRS)
    del lacking.moments["attention"], lacking.weights["attention"]
    for one, other in ((base, lacking), (lacking, base)):
        with pytest.raises(SsahError, match="the two importances differ in kinds of units; score"):
            one + other
    # the same weights again: the same model
    close(base + importance(tiny_model(), TOKENIZER, PAIRS), base, 1e-6)


def test_several_sets_in_one_call():
    model, sets = tiny_model(), {"safety": PAIRS[:4], "utility": PAIRS[4:]}
    both = importance(model, TOKENIZER, sets)
    assert list(both) == ["safety", "utility"]
    for name, pairs in sets.items():
        close(both[name], importance(model, TOKENIZER, pairs), 0)
    hub = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(pairs) for name, pairs in sets.items()}
    )
    for name, scored in importance(model, TOKENIZER, hub).items():
        close(scored, both[name], 0)
    close(importance(model, TOKENIZER, hub["utility"]), both["utility"], 0)  # a datasets.Dataset
    close(importance(model, TOKENIZER, (p for p in PAIRS[4:])), both["utility"], 0)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method, tmp_path):
    scored = importance(tiny_model("gemma3_text"), TOKENIZER, PAIRS, method=method)
    assert sorted(p.name for p in scored.save(tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        "importance.json",
        "importance.safetensors",
    ]
    again = Importance.load(tmp_path / "a" / "b")
    close(again, scored, 0)
    assert again.info == scored.info and again.info["method"] == method
    for kind in KINDS:
        assert torch.equal(again.weights[kind], scored.weights[kind])
        assert len(again.moments[kind]) == len(scored.moments[kind])
        for a, b in zip(again.moments[kind], scored.moments[kind]):
            assert a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.m2, b.m2)
    with pytest.raises(SsahError, match="no importance in .*none; write one"):
        Importance.load(tmp_path / "none")


def test_each_set_has_its_own_length():
    model, sets = tiny_model(), {"short": PAIRS[:2], "long": PAIRS[2:]}
    both = importance(model, TOKENIZER, sets, max_response={"short": 2, "long": None, "another": 3})
    for name, kept in (("short", 2), ("long", None)):
        assert torch.equal(
            both[name].mlp, importance(model, TOKENIZER, sets[name], max_response=kept).mlp
        )
    assert not torch.equal(both["short"].mlp, importance(model, TOKENIZER, sets["short"]).mlp)
    with pytest.raises(SsahError, match="max_response names no number for long"):
        importance(model, TOKENIZER, sets, max_response={"short": 2})
    with pytest.raises(SsahError, match="pass `pairs` by name"):
        importance(model, TOKENIZER, PAIRS, max_response={"short": 2})


def test_calibration_is_what_chapter_3_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("mine", "05_transfer")
    sets = {"safety": PAIRS[:2], "utility": PAIRS[2:]}
    options = {"tokens": "all", "method": "flap", "max_response": {"safety": 4, "utility": 8}}
    with pytest.raises(SsahError, match="no calibration pairs in .*calibration.json; ") as error:
        load_calibration(run)
    assert "run chapter 03_attribution, or `make reproduce PROFILE=mine`" in one_line(error)
    run.path("calibration.json").write_text(json.dumps({"sets": sets, "options": options}))
    assert load_calibration(run) == (sets, options)
    made_up, _ = load_calibration(Run("smoke", "05_transfer"))
    assert list(made_up) == ["safety", "utility"]
    assert importance(tiny_model(), TOKENIZER, made_up)["safety"].mlp.shape == (2, 32)
