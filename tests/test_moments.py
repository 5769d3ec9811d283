"""Moments of activations: merged in any order, and exact with a large mean."""

import pytest
import torch

from ssah_nb.engine.files import SsahError
from ssah_nb.engine.moments import Moments, check_statistics


def test_moments_merge_in_any_order():
    torch.manual_seed(0)
    parts = [
        torch.randn(n, 5) * torch.tensor([1e-3, 1, 1, 100, 1])
        + torch.tensor([50.0, 0, -3, 1e4, 1e-2])
        for n in (1, 700, 3, 64, 0)
    ]
    whole = torch.cat(parts).double()

    def moments(x):
        m = Moments()
        m.add(x.split(10))
        return m

    a, b, c, d, nothing = map(moments, parts)
    for merged in (
        a + b + c + d,
        (d + c) + (b + a),
        nothing + (c + (a + d)) + b,
        moments(torch.cat(parts[::-1])),
    ):
        assert merged.count == 768
        torch.testing.assert_close(merged.mean, whole.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged.variance, whole.var(0, correction=0), rtol=1e-5, atol=0)
    assert nothing.count == 0 and (nothing + nothing).count == 0


@pytest.mark.parametrize("mean", [0, 1e3, -1e5])
def test_a_large_mean_costs_no_digits(mean):
    torch.manual_seed(0)
    # at -1e5 float32 itself resolves 0.008: the reference sees the same rounded numbers
    x = torch.randn(5000, 3) * torch.tensor([0.05, 1.0, 20.0]) + mean
    m = Moments()
    for batch in x.split(500):
        m.add(batch.split(64))
    exact = x.double().var(0, correction=0)
    torch.testing.assert_close(m.variance, exact, rtol=1e-5, atol=0)
    naive = (x.square().mean(0) - x.mean(0).square()).double()
    assert mean == 0 or not torch.allclose(naive, exact, rtol=0.1)


@pytest.mark.parametrize(
    "model, words",
    [
        (None, "toy does not say how many heads its model has; write it again"),
        ({}, "toy does not say how many heads its model has; write it again"),
        ({"heads": 0}, "toy has channels for no whole number of heads; write it again"),
        ({"heads": 4}, "toy has channels for no whole number of heads; write it again"),
    ],
)
def test_scores_without_a_whole_number_of_heads(model, words):
    tensors = {f"channels.{kind}": torch.ones(1, 6) for kind in ("mlp", "attention")}
    check_statistics(tensors, {"count": 0, "model": {"heads": 3}}, "toy")
    with pytest.raises(SsahError, match=f"^{words}$"):
        check_statistics(tensors, {"count": 0, "model": model}, "toy")


def test_a_piece_without_tokens_changes_nothing():
    some = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found, expected = Moments(), Moments()
    found.add([torch.zeros(0, 3), some])
    expected.add([some])
    assert found.count == 5 and torch.equal(found.mean, expected.mean)
    assert torch.equal(found.m2, expected.m2)
