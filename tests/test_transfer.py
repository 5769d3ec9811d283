"""How units change their class."""

import json
import math

import pytest
import torch
from helpers import one_line
from helpers_units import TOKENIZER, made_up

from ssah_nb.attribution import importance
from ssah_nb.classes import classify
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.transfer import how_finetuned, lost, transfer
from ssah_nb.units import CLASSES, Scores, UnitMap


def unit_map(mlp, attention, model="m"):
    code = lambda names: torch.tensor([[CLASSES.index(n) for n in names]], dtype=torch.uint8)
    order = Scores(torch.zeros(1, len(mlp)), torch.zeros(1, len(attention)))
    return UnitMap(code(mlp), code(attention), order, {"model": model})


def test_transfer_counts_by_module():
    before = unit_map(["SCU", "SCU", "CU", "RU"], ["CU"])
    after = unit_map(["CU", "SCU", "UCU", "RU"], ["CU"])
    table = transfer(before, after)
    cell = table.set_index(["module", "before", "after"])
    assert cell.loc[("mlp", "SCU", "CU"), "share_of_units"] == 0.25
    assert cell.loc[("mlp", "SCU", "CU"), "share_of_class"] == 0.5
    assert cell.loc[("attention", "CU", "CU"), "units"] == 1
    assert cell.loc[("global", "CU", "UCU"), "share_of_class"] == 0.5
    assert lost(table) == 0.5 and lost(table, "RU") == 0
    assert table.groupby("module").units.sum().to_dict() == {"global": 5, "attention": 1, "mlp": 4}


def test_a_class_that_nobody_has_afterwards_is_lost():
    table = transfer(unit_map(["SCU", "SCU", "CU"], ["CU"]), unit_map(["CU", "RU", "CU"], ["CU"]))
    assert "SCU" not in set(table.after)
    assert lost(table) == 1 and lost(table, "CU") == 0
    assert math.isnan(lost(table, "UCU"))  # nobody was in it


def test_what_is_no_map_has_no_transfer():
    units = unit_map(["SCU", "CU"], ["CU"])
    for pair in ((units.scu, units), (units, units.scu), (None, units)):
        with pytest.raises(SsahError, match="has no classes of units; pass the UnitMap"):
            transfer(*pair)


def test_transfer_from_an_unaligned_model_has_two_classes_before():
    table = transfer(unit_map(["UU", "RU"], ["UU"]), unit_map(["SCU", "RU"], ["CU"]))
    assert set(table.before) == {"UU", "RU"} and set(table.after) == {"SCU", "RU", "CU"}


def test_transfer_between_models_is_an_error():
    with pytest.raises(SsahError, match="different models"):
        transfer(unit_map(["CU"], ["CU"]), unit_map(["CU"], ["CU"], model="other"))
    by_hand = unit_map(["CU"], ["CU"], model=None)
    assert lost(transfer(by_hand, unit_map(["CU"], ["CU"], model="other")), "CU") == 0


OPTIONS = {"scu": 0.05, "ucu": 0.1, "ru": 0.2, "ratio_of": "parameters", "square_attention": False}


def scored(seed: int, **info):
    return made_up(seed, **({"max_response": 4} | info))


@pytest.mark.parametrize(
    "name, other",
    [("scu", 0.2), ("ucu", 0.2), ("ru", 0.1), ("ratio_of", "units"), ("square_attention", True)],
)
def test_maps_that_were_classified_in_two_ways_are_refused(name, other, tmp_path):
    s, u = scored(0), scored(1)
    before, after = classify(s, u, **OPTIONS), classify(s, u, **OPTIONS | {name: other})
    assert lost(transfer(before, classify(s, u, **OPTIONS))) == 0  # nothing was trained
    after.save_pretrained(tmp_path)
    for units in (after, UnitMap.from_pretrained(tmp_path)):
        with pytest.raises(SsahError, match=f"differ in {name} .*classify both in one way"):
            transfer(before, units)


@pytest.mark.parametrize(
    "name, other", [("method", "wanda_sp"), ("tokens", "all"), ("max_response", 48)]
)
def test_maps_that_were_scored_in_two_ways_are_refused(name, other):
    before = classify(scored(0), scored(1))
    after = classify(scored(0, **{name: other}), scored(1, **{name: other}))
    with pytest.raises(SsahError, match=f"differ in {name} .*score"):
        transfer(before, after)
    window = classify(scored(0, max_response=8), scored(1))
    with pytest.raises(SsahError, match="safety_max_response .4 and 8."):
        transfer(before, window)


def test_an_unaligned_map_is_compared_by_what_it_has():
    before = classify(None, scored(2), ru=0.2)
    assert set(transfer(before, classify(scored(0), scored(1), ru=0.2)).before) == {"UU", "RU"}
    with pytest.raises(SsahError, match="differ in ru"):
        transfer(before, classify(scored(0), scored(1), ru=0.1))


def test_an_older_map_that_says_less_is_accepted():
    units = classify(scored(0), scored(1))
    older = UnitMap(units.mlp, units.attention, units.order, dict(units.info))
    for name in ("square_attention", "safety_max_response", "max_response"):
        del older.info[name]
    assert lost(transfer(older, units)) == 0


def test_importance_says_how_much_of_a_response_was_read():
    pairs = [{"prompt": f"Say {i}", "response": f"{i} it is"} for i in range(3)]
    model = tiny_model()
    found = importance(model, TOKENIZER, pairs, max_response=3)
    assert found.info["max_response"] == 3
    units = classify(found, importance(model, TOKENIZER, pairs, max_response=2))
    assert (units.info["safety_max_response"], units.info["max_response"]) == (3, 2)


def test_maps_that_were_scored_on_two_conversations_are_refused():
    pairs = [{"prompt": f"Say {i}", "response": f"{i} it is"} for i in range(3)]
    model, other = tiny_model(), tiny_tokenizer()
    other.chat_template = other.chat_template.replace("user", "human").replace("\n", " ")
    plain, told = (importance(model, TOKENIZER, pairs, system=s) for s in (None, "Be kind."))
    before = classify(plain, plain, **OPTIONS)
    assert lost(transfer(before, classify(plain, plain, **OPTIONS))) == 0
    foreign = importance(model, other, pairs)
    for after, fact in (
        (classify(plain, told, **OPTIONS), r"system \(None and Be kind.\)"),
        (classify(told, plain, **OPTIONS), r"safety_system \(None and Be kind.\)"),
        (classify(foreign, foreign, **OPTIONS), "chat template: template .[0-9a-f]{60} and "),
    ):
        with pytest.raises(SsahError, match=f"differ in {fact}") as error:
            transfer(before, after)
        one_line(error)
    with pytest.raises(SsahError, match="differ in chat template"):
        classify(plain, foreign)
    with pytest.raises(SsahError, match="differ in chat template"):
        plain + foreign


def test_maps_of_two_shapes_are_refused():
    with pytest.raises(SsahError, match="different models"):
        transfer(unit_map(["CU"], ["CU"]), unit_map(["CU", "CU"], ["CU"]))


def test_a_run_tells_how_its_fine_tuned_model_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("alone", "06_freezing", seed=3)
    with pytest.raises(SsahError, match="not known how the model was fine-tuned; run chapter 5"):
        how_finetuned(run)
    trained = {"lr": 1e-3, "epochs": 2, "batch_size": 8, "max_response": 20, "seed": 0}
    run.path("finetuning.json").write_text(json.dumps(trained))
    assert how_finetuned(run) == trained
