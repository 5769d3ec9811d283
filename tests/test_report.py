import pandas as pd
import pytest
import torch

from ssah_nb.units import Scores
from ssah_nb.units import CLASSES, UnitMap
from ssah_nb.engine.intervals import rate_difference
from ssah_nb.report import paper_numbers, printed, verdict
from ssah_nb.engine.run import SsahError
from ssah_nb.transfer import lost, transfer


def unit_map(mlp, attention, model="m"):
    code = lambda names: torch.tensor([[CLASSES.index(n) for n in names]], dtype=torch.uint8)
    return UnitMap(
        code(mlp),
        code(attention),
        Scores(torch.zeros(1, len(mlp)), torch.zeros(1, len(attention))),
        {"model": model},
    )


def test_transfer_counts_by_module():
    table = transfer(
        unit_map(["SCU", "SCU", "CU", "RU"], ["CU"]), unit_map(["CU", "SCU", "UCU", "RU"], ["CU"])
    )
    cell = table.set_index(["module", "before", "after"])
    assert (
        cell.loc[("mlp", "SCU", "CU"), "share_of_units"] == 0.25
        and cell.loc[("mlp", "SCU", "CU"), "share_of_class"] == 0.5
    )
    assert (
        cell.loc[("attention", "CU", "CU"), "units"] == 1
        and cell.loc[("global", "CU", "UCU"), "share_of_class"] == 0.5
    )
    assert lost(table) == 0.5 and lost(table, "RU") == 0
    assert table.groupby("module").units.sum().to_dict() == {"global": 5, "attention": 1, "mlp": 4}


def test_transfer_from_an_unaligned_model_has_two_classes_before():
    table = transfer(unit_map(["UU", "RU"], ["UU"]), unit_map(["SCU", "RU"], ["CU"]))
    assert set(table.before) == {"UU", "RU"} and set(table.after) == {"SCU", "RU", "CU"}


def test_transfer_between_models_is_an_error():
    with pytest.raises(SsahError, match="different models"):
        transfer(unit_map(["CU"], ["CU"]), unit_map(["CU"], ["CU"], model="other"))


def test_paper_numbers():
    assert printed("1", "dense", "utility_mean", "accuracy", "Llama-2-7B-Chat") == 58.3
    assert not paper_numbers().value.isna().any()
    with pytest.raises(SsahError, match="prints no perplexity"):
        printed("2", "initial", "advbench", "perplexity")


def test_difference_of_rates_is_newcombes():
    a = pd.Series(
        {"r": 56 / 70, "r_low": 0.6921, "r_high": 0.8775}
    )  # Newcombe 1998, table II, example (a): 56/70 − 48/80
    b = pd.Series({"r": 48 / 80, "r_low": 0.4904, "r_high": 0.7002})
    assert rate_difference(a, b, "r") == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-3)


def test_verdicts():
    assert [
        verdict(0.1, 0.2, "above"),
        verdict(-0.2, -0.1, "above"),
        verdict(-0.1, 0.1, "above"),
    ] == ["holds", "fails", "open"]
    assert [
        verdict(0.4, 0.6, "above", 0.5),
        verdict(0.6, 0.7, "above", 0.5),
        verdict(0.1, 0.2, "below"),
    ] == ["open", "holds", "fails"]
    assert [
        verdict(-0.05, 0.05, "near", 0.1),
        verdict(-0.05, 0.15, "near", 0.1),
        verdict(0.11, 0.2, "near", 0.1),
    ] == ["holds", "open", "fails"]
