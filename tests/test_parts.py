"""A linear in two parts: what it computes, keeps in memory and shows to others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_freezing import (
    LONG,
    SHORT,
    adamw,
    check_trained,
    frozen_entries,
    half,
    same,
    snapshot,
    train,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssah_nb.engine.models import ARCHITECTURES, tiny_model
from ssah_nb.engine.parts import SplitLinear, adjacent, split_linears
from ssah_nb.engine.products import SplitProduct
from ssah_nb.freezing import freeze, merge


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ids", [LONG, SHORT], ids=["long", "short"])
def test_no_weight_gradient_product_for_frozen_parts(architecture, ids):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    model = tiny_model(architecture).train()
    full = flops(model)
    freeze(model, half())
    frozen = sum(split.frozen_weight.numel() for split in split_linears(model).values())
    assert frozen == sum(
        int(f.expand_as(model.state_dict()[n]).sum())
        for n, f in frozen_entries(architecture, half()).items()
        if n.endswith("weight")
    )
    # of the three products with a weight, the frozen part loses one
    assert full - flops(model) == 2 * ids.numel() * frozen


def test_optimizer_state_is_that_of_the_trained_parameters():
    model = freeze(tiny_model().train(), half())
    optimizer = adamw(model)
    train(model, optimizer, 1)
    held = sum(
        v.numel()
        for state in optimizer.state.values()
        for name, v in state.items()
        if name.startswith("exp_avg")
    )
    frozen = sum(split.frozen_weight.numel() for split in split_linears(model).values())
    assert held == 2 * (tiny_model().num_parameters() - frozen) < 2 * tiny_model().num_parameters()


def test_column_parts_keep_only_what_their_gradient_needs():
    linear = nn.Linear(64, 8, bias=False)
    split, kept = SplitLinear(linear, torch.arange(64) < 48, 1), []

    def pack(t):
        kept.append((tuple(t.shape), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        split(torch.randn(9, 64, requires_grad=True))
    assert ((9, 16), 4 * 9 * 16) in kept and (9, 64) not in {shape for shape, _ in kept}


def apart(model):
    "Give each parameter memory of its own, as a wrapper that gathers and shards them would."
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def test_parts_that_are_moved_apart_train_the_same():
    mask, states = half(), []
    for move in (lambda m: m, apart):
        model = move(freeze(tiny_model().train(), mask))
        train(model, adamw(model))
        states.append(snapshot(merge(model)))
    assert same(*states)


def test_a_compiled_model_trains_the_same():
    mask, states = half(), []
    for backend in (None, "aot_eager"):
        model = freeze(tiny_model().train(), mask)
        compiled = torch.compile(model, backend=backend) if backend else model
        optimizer = adamw(model, lr=1e-3)
        for _ in range(3):
            compiled(input_ids=LONG, labels=LONG).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(snapshot(merge(model)))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_of_an_mlp_are_permuted_where_nothing_depends_on_their_order(architecture):
    model = freeze(tiny_model(architecture), half())
    permuted = {
        name.rpartition(".")[2] for name, split in split_linears(model).items() if split.permuted
    }
    assert permuted == (set() if architecture == "phi3" else {"gate_proj", "up_proj", "down_proj"})
    model = tiny_model(architecture)
    # one weight for each channel, as BitNet has: their order matters
    model.model.layers[0].mlp.norm = nn.LayerNorm(32)
    assert not any(
        split.permuted
        for name, split in split_linears(freeze(model, half())).items()
        if ".0." in name
    )


def beside(model) -> bool:
    "Whether the two parts of every weight lie side by side in memory."
    splits = split_linears(model).values()
    parts = [split.parts(name) for split in splits for name in split.flags]
    return all(adjacent(*pair) for pair in parts if all(map(len, pair)))


def test_copies_casts_modes_and_generation():
    model, mask = freeze(tiny_model(), half()), half()
    before = snapshot(model)
    double = copy.deepcopy(model)
    train(double, adamw(double), 2)
    assert same(model.state_dict(), before)
    check_trained(merge(double).state_dict(), before, mask)
    assert torch.equal(
        model.generate(SHORT, max_new_tokens=5, do_sample=False),
        tiny_model().generate(SHORT, max_new_tokens=5, do_sample=False),
    )
    assert beside(model)
    assert beside(double := copy.deepcopy(model))
    assert beside(double.to(torch.float64))
    assert not beside(apart(double))
    with torch.no_grad():
        torch.testing.assert_close(double(LONG).logits, model.to(torch.float64)(LONG).logits)
    model.train()
    assert all(
        s.training and s.trained_weight.dtype == torch.float64
        for s in split_linears(model).values()
    )
    assert all(model(ids).logits.dtype == torch.float64 for ids in (LONG, SHORT))
    assert not any(m.training for m in merge(model.eval()).modules())
    assert same({n: v.float() for n, v in model.state_dict().items()}, before)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_split_linear_takes_one_row_as_a_linear_does(dim):
    x, trained = torch.randn(6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    frozen = torch.randn(4, 4, dtype=torch.float64)
    x = x[:4] if dim == 0 else x
    parts = [t.requires_grad_() for t in (x, trained)]
    bias = torch.zeros(6 if dim == 0 else 4, dtype=torch.float64, requires_grad=True)
    SplitProduct.apply(*parts, frozen, bias, dim).sum().backward()
    whole = torch.cat([trained.detach(), frozen]).requires_grad_()
    other = x.detach().clone().requires_grad_()
    F.linear(other, whole if dim == 0 else whole.t()).sum().backward()
    assert torch.allclose(x.grad, other.grad) and torch.allclose(trained.grad, whole.grad[:2])
    assert bias.grad.eq(1).all()
