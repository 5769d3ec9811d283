"""How units change their class."""

import pytest
import torch

from ssah_nb.engine.run import SsahError
from ssah_nb.transfer import lost, transfer
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


def test_transfer_from_an_unaligned_model_has_two_classes_before():
    table = transfer(unit_map(["UU", "RU"], ["UU"]), unit_map(["SCU", "RU"], ["CU"]))
    assert set(table.before) == {"UU", "RU"} and set(table.after) == {"SCU", "RU", "CU"}


def test_transfer_between_models_is_an_error():
    with pytest.raises(SsahError, match="different models"):
        transfer(unit_map(["CU"], ["CU"]), unit_map(["CU"], ["CU"], model="other"))
