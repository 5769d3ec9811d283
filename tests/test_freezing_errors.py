"""What cannot be frozen is refused in one line, with nothing changed."""

import gc

import pytest
import torch
from helpers_freezing import LONG, Int8Linear, adamw, half, refused, train
from torch import nn

from ssah_nb.budget import train_only
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.parts import REPLACED
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import Scores, UnitMap, UnitMask


def test_masks_that_cannot_be_frozen():
    model, mask = tiny_model(), half()
    none, everything = mask & ~mask, mask | ~mask
    units = UnitMap(
        mask.mlp.to(torch.uint8),
        mask.attention.to(torch.uint8),
        Scores(mask.mlp.float(), mask.attention.float()),
        {},
    )
    for bad, message in [
        (none, "empty"),
        (everything, "leaves no unit to train"),
        (UnitMask(mask.mlp[:, 1:], mask.attention), "another model"),
        (UnitMask(mask.mlp[:1], mask.attention[:1]), "another model"),
        (UnitMask(mask.mlp, mask.attention[:, :2]), "another model"),
        (
            UnitMask(mask.mlp.to(torch.uint8), mask.attention),
            "mlp is of torch.uint8; a mask is bool",
        ),
        (UnitMask(mask.mlp, mask.attention.long()), "attention is of torch.int64"),
        (units, "UnitMap does not choose units.*units.scu"),
        (mask.mlp, "Tensor does not choose units"),
    ]:
        refused(lambda: freeze(model, bad), message, model)
    refused(lambda: train_only(model, units), "UnitMap does not choose units", model)
    refused(lambda: train_only(model, none), "leaves no unit to train", model)
    off = tiny_model().requires_grad_(False)
    refused(lambda: freeze(off, mask), "nothing to train", off)


def test_a_model_of_which_only_the_bias_of_b_trains_can_be_frozen():
    model, mask = tiny_model(), half()
    mask.attention[:] = True
    b = "model.layers.0.self_attn.o_proj"
    layer = model.model.layers[0].self_attn
    layer.o_proj = nn.Linear(layer.o_proj.in_features, layer.o_proj.out_features)
    model.requires_grad_(False)
    model.get_submodule(b).bias.requires_grad_(True)
    freeze(model, mask)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{b}.trained_bias"]


def test_models_that_cannot_be_frozen_or_merged():
    model, mask = tiny_model(), half()
    refused(lambda: merge(model), "not frozen", model)
    model.model.layers[1].mlp.down_proj = Int8Linear(model.model.layers[1].mlp.down_proj)
    refused(lambda: freeze(model, mask), "layers.1.mlp.down_proj is a Int8Linear.*quantized", model)
    twice = freeze(tiny_model(), mask)
    refused(lambda: freeze(twice, mask), "frozen already", twice)
    merge(twice)
    refused(lambda: merge(twice), "not frozen", twice)
    freeze(twice, ~mask)
    other = nn.Linear(2, 2)
    refused(lambda: freeze(other, mask), "not supported", other)


@pytest.mark.parametrize("wrap", ["torch", "accelerate"])
@pytest.mark.parametrize("when", ["freeze", "merge"])
def test_an_optimizer_from_before_is_refused_at_its_first_step(wrap, when):
    model, mask = tiny_model().train(), half()
    if when == "merge":
        freeze(model, mask)
    optimizer = adamw(model)
    if wrap == "accelerate":
        from accelerate import Accelerator

        optimizer = Accelerator(cpu=True).prepare(optimizer)
    merge(model) if when == "merge" else freeze(model, mask)
    model(LONG, labels=LONG).loss.backward()
    refused(optimizer.step, "built before freeze or merge", model)
    train(model, adamw(model), 1)  # a new one is fine


def test_other_models_optimizers_are_left_alone():
    model, other = tiny_model().train(), tiny_model().train()
    optimizer = adamw(other)
    freeze(model, half())
    train(other, optimizer, 1)
    gc.collect()
    assert not REPLACED  # nothing that was replaced is kept in memory
