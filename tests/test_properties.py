"""What holds for any input: scores, classes, masks, moments, batches, intervals.

Hypothesis draws the inputs, the same ones in every run. By hand, with other ones and many more:
HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_properties*.py
"""

import math
import tempfile
from functools import reduce
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import one_line
from helpers_units import INFO
from helpers_properties import NUMBERS, SHARES, fewer, importances, masks, tensors, unit_maps
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ssah_nb.attribution import Importance
from ssah_nb.classes import RATIO_OF, classify, top_units
from ssah_nb.engine.agreement import kappa
from ssah_nb.engine.anchors import turn
from ssah_nb.engine.batches import token_batches
from ssah_nb.engine.intervals import bootstrap_mean, wilson
from ssah_nb.engine.moments import ChannelMoments, Moments
from ssah_nb.engine.paired import holm, paired_difference, paired_mean
from ssah_nb.engine.run import SsahError
from ssah_nb.transfer import lost, transfer
from ssah_nb.units import CLASSES, UnitMap, UnitMask

KINDS = ("mlp", "attention")
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def ratios_of_classes(draw):
    "Shares of SCU, UCU and RU that are not more than 1 together."
    shares = {name: draw(SHARES) for name in ("scu", "ucu", "ru")}
    whole = max(1.0, sum(shares.values()) * (1 + 1e-12))
    return {name: share / whole for name, share in shares.items()}


OPTIONS = st.fixed_dictionaries(
    {"ratio_of": st.sampled_from(RATIO_OF), "square_attention": st.booleans()}
)


def constant() -> Importance:
    "Scores that are all the same."
    raw = {"mlp": torch.ones(2, 10), "attention": torch.ones(2, 4)}
    return Importance(raw, {"mlp": [], "attention": []}, dict(INFO))


TENTHS = {"scu": 0.1, "ucu": 0.1, "ru": 0.1}
BY_UNITS = {"ratio_of": "units", "square_attention": False}


@given(importances(), ratios_of_classes(), OPTIONS, st.booleans())
@example([constant(), constant()], TENTHS, BY_UNITS, True)  # SCU and UCU were the same units
def test_classes_partition_the_units(scored, ratios, options, aligned):
    safety, utility = scored if aligned else (None, scored[1])
    try:
        units = classify(safety, utility, **ratios, **options)
    except SsahError as error:  # a share of the model may be more than all units have
        assert options["ratio_of"] == "model", error
        return
    named = [units.units(name) for name in CLASSES]
    assert not any(len(a & b) for a, b in combinations(named, 2))
    everything = reduce(UnitMask.__or__, named)
    assert not len(~everything)
    shares = units.shares()
    assert shares.units.sum() == len(everything) == sum(map(len, named))
    for column, whole in (("share_units", 1), ("share_mlp", 1), ("share_attention", 1)):
        assert shares[column].sum() == pytest.approx(whole)
    all_of_it = units.share(everything)
    assert shares.share_parameters.sum() == pytest.approx(all_of_it["parameters"])
    assert all_of_it["units"] == all_of_it["unit_parameters"] == 1
    column = {"parameters": "unit_parameters", "units": "units", "model": "parameters"}
    for name in ("SCU", "UCU") if aligned else ("RU",):
        took = units.share(units.units(name))[column[options["ratio_of"]]]
        assert took <= ratios[name.lower()] * (1 + 1e-6)


@given(importances(count=1), SHARES, st.sampled_from(["parameters", "units"]))
def test_top_units_are_the_largest(scored, share, ratio_of):
    [found] = scored
    scores = found.standardized()
    chosen = top_units(scores, share, found.info, ratio_of)
    inside = torch.cat([getattr(scores, k)[getattr(chosen, k)] for k in KINDS])
    outside = torch.cat([getattr(scores, k)[~getattr(chosen, k)] for k in KINDS])
    if len(inside) and len(outside):
        assert inside.min() >= outside.max()
    more = top_units(scores, min(1.0, share + 0.1), found.info, ratio_of)
    assert len(chosen - more) == 0
    assert len(top_units(scores, 1, found.info, ratio_of)) == len(chosen | ~chosen)


NO_NUMBERS = st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38])


@given(importances(), st.sampled_from(KINDS), st.integers(0, 99), NO_NUMBERS, st.booleans())
@example([constant(), constant()], "mlp", 0, torch.nan, True)
@example([constant(), constant()], "attention", 0, 3e38, False)
def test_scores_that_are_no_numbers_are_refused(scored, kind, place, value, aligned):
    safety, utility = scored
    broken = (safety if aligned else utility).channels[kind].flatten()
    broken[place % len(broken)] = value
    with pytest.raises(SsahError, match=f"importance of {kind} units in layer") as error:
        classify(safety if aligned else None, utility, scu=0.1, ucu=0.1, ru=0.1)
    one_line(error)


@given(unit_maps(), SHARES)
def test_the_top_cu_are_the_largest_of_the_cu(units, share):
    top, rest = units.top_cu(share), units.cu - units.top_cu(share)
    assert len(top - units.cu) == 0
    assert len(top) == min(round(share * len(top | ~top)), len(units.cu))
    of = lambda mask: torch.cat([getattr(units.order, k)[getattr(mask, k)] for k in KINDS])
    if len(top) and len(rest):
        assert of(top).min() >= of(rest).max()


@fewer(20)
@given(unit_maps())
def test_a_map_survives_its_file(units):
    with tempfile.TemporaryDirectory() as folder:
        units.save_pretrained(folder)
        again = UnitMap.from_pretrained(folder)
    assert again.info == units.info
    for kind in KINDS:
        assert torch.equal(getattr(again, kind), getattr(units, kind))
        saved, own = (getattr(u.order, kind).view(torch.int32) for u in (again, units))
        assert torch.equal(saved, own)


@given(unit_maps(count=2))
def test_rows_of_a_transfer_table_sum_to_the_class_before(both):
    before, after = both
    table = transfer(before, after)
    masks_of = {"mlp": lambda m: m.mlp.sum(), "attention": lambda m: m.attention.sum()}
    for module, size in (masks_of | {"global": len}).items():
        rows = table[table.module == module]
        for name in CLASSES:
            old, new = (int(size(units.units(name))) for units in both)
            assert rows[rows.before == name].units.sum() == old
            assert rows[rows.after == name].units.sum() == new
            if old:
                assert rows[rows.before == name].share_of_class.sum() == pytest.approx(1)
        assert rows.share_of_units.sum() == pytest.approx(1)
    for name in CLASSES:
        wanted = len(before.units(name) - after.units(name)) / max(1, len(before.units(name)))
        if len(before.units(name)):
            assert lost(table, name) == pytest.approx(wanted)


@given(masks(count=3))
def test_masks_obey_the_laws_of_sets(drawn):
    a, b, c = drawn
    assert ~~a == a and a | a == a and a & a == a
    assert ~(a | b) == ~a & ~b and ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c)
    assert a - b == a & ~b and a | (b - a) == a | b and (a - b) | (a & b) == a
    assert len(a | b) + len(a & b) == len(a) + len(b)
    assert len(a & ~a) == 0 and len(a) + len(~a) == len(a | ~a)


@given(masks(count=2), SEEDS, st.booleans())
def test_random_units_are_as_many_and_from_where_they_may_be(both, seed, per_layer):
    mask, among = both
    mask, among = mask & among, among | mask
    drawn = mask.random_like(seed, per_layer, among)
    assert len(drawn - among) == 0 and drawn == mask.random_like(seed, per_layer, among)
    for kind in KINDS:
        counts = [getattr(m, kind).sum(1 if per_layer else None) for m in (drawn, mask)]
        assert torch.equal(*counts)


@st.composite
def groupings(draw, parts: list):
    "The parts in any order, merged in any order."
    parts = list(draw(st.permutations(parts)))
    while len(parts) > 1:
        place = draw(st.integers(0, len(parts) - 2))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0]


COLUMNS = 3
SHARDS = st.lists(st.integers(0, 6), min_size=1, max_size=6).flatmap(
    lambda sizes: st.tuples(*(tensors(size, COLUMNS) for size in sizes))
)


def by_channel(shard: torch.Tensor, seen: torch.Tensor) -> ChannelMoments:
    "Moments in which each channel has seen only some of the tokens."
    x, count = shard.double() * seen, seen.sum(0)
    mean = x.sum(0) / count.clamp_min(1)
    return ChannelMoments(count, mean, ((x - mean) * seen).square().sum(0))


def same_moments(found: Moments, x: torch.Tensor, seen: torch.Tensor):
    "Whether these are the moments of what was seen, [tokens, channels], in float64."
    scale = max(1.0, float(x.abs().max())) if len(x) else 1.0
    for channel in range(COLUMNS):
        values = x[seen[:, channel], channel].double()
        count = found.count if isinstance(found.count, int) else int(found.count[channel])
        assert count == len(values)
        if count:
            assert abs(float(found.mean[channel] - values.mean())) < 1e-10 * scale
            wanted = (values - values.mean()).square().sum()
            assert abs(float(found.m2[channel] - wanted)) < 1e-10 * scale**2 * count


@given(SHARDS, st.data())
def test_moments_merge_in_any_order(shards, data):
    whole, everywhere = torch.cat(shards), torch.ones(len(torch.cat(shards)), COLUMNS).bool()
    exact = [by_channel(x, torch.ones(x.shape, dtype=torch.bool)) for x in shards]
    plain = [Moments(len(x), m.mean, m.m2) if len(x) else Moments() for x, m in zip(shards, exact)]
    same_moments(data.draw(groupings(plain)), whole, everywhere)
    seen = [data.draw(tensors(*x.shape, of=st.booleans(), dtype=torch.bool)) for x in shards]
    parts = [by_channel(*both) for both in zip(shards, seen)]
    same_moments(data.draw(groupings(parts)), whole, torch.cat(seen))


@given(SHARDS)
def test_moments_of_tokens_are_those_of_all_tokens(shards):
    whole, found = torch.cat(shards).double(), Moments()
    for shard in shards:
        found.add(shard.split(2))
    assert found.count == len(whole)
    if len(whole):
        scale = whole.abs().max().clamp_min(1)
        assert ((found.mean - whole.mean(0)).abs() <= 1e-6 * scale).all()
        wanted = (whole - whole.mean(0)).square().sum(0)
        assert ((found.m2 - wanted).abs() <= 1e-5 * scale**2 * len(whole)).all()


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=12)


@given(LENGTHS, st.integers(1, 200))
def test_batches_keep_every_pair_once(lengths, max_tokens):
    encoded = [([row] * p, [-row - 1] * q) for row, (p, q) in enumerate(lengths)]
    batches = list(token_batches(encoded, max_tokens))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(encoded)))
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1
        for i, row in enumerate(batch.rows):
            real = batch.attention_mask[i].bool()
            assert batch.input_ids[i][real].tolist() == sum(encoded[row], [])
            assert batch.input_ids[i][batch.response_mask[i]].tolist() == encoded[row][1]
            assert not batch.input_ids[i][~real].any()


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 9))
def test_every_pair_gets_its_turn_before_one_comes_again(pairs, each, seed):
    rows = [row for step in range(2 * pairs) for row in turn(step, pairs, each, seed)]
    for start in range(0, len(rows), pairs):
        assert sorted(rows[start : start + pairs]) == list(range(pairs))


@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_lies_in_its_interval(counts):
    rate, other = wilson(*counts), wilson(counts[1] - counts[0], counts[1])
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert (rate.low < rate.value or counts[0] == 0) and (
        rate.value < rate.high or other.value == 0
    )
    assert other.low == pytest.approx(1 - rate.high, abs=1e-12)


ITEMS = st.lists(st.tuples(NUMBERS, st.floats(0.5, 100)), min_size=1, max_size=8)


@given(ITEMS, SEEDS)
def test_a_mean_lies_in_its_interval(items, seed):
    totals, counts = zip(*items)
    for mean in (
        bootstrap_mean(totals, counts, seed, 200),
        bootstrap_mean(totals, None, seed, 200),
    ):
        if len(items) == 1:
            assert math.isnan(mean.low) and math.isnan(mean.high)
        else:
            assert mean.low <= mean.value <= mean.high
    shifted = bootstrap_mean([t + 3 * c for t, c in items], counts, seed, 200)
    mean = bootstrap_mean(totals, counts, seed, 200)
    moved = np.array([shifted.value - mean.value, shifted.high - mean.high])
    near = 1e-9 * (1 + max(abs(total) for total in totals))
    assert np.allclose(moved[: len(items)], 3, atol=near)  # of one item the end is NaN


@st.composite
def outcomes(draw):
    "Before and after: [orders, prompts], booleans or numbers."
    orders, prompts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    of = draw(st.sampled_from([st.booleans(), NUMBERS]))
    rows = st.lists(st.lists(of, min_size=prompts, max_size=prompts), min_size=1, max_size=orders)
    before, after = draw(rows), draw(rows)
    assume(1 in (len(before), len(after)) or len(before) == len(after))
    return np.array(before), np.array(after)


@given(outcomes(), st.integers(0, 9))
def test_a_difference_lies_in_its_interval(both, seed):
    before, after = both
    found = paired_difference(before, after, seed=seed, draws=200)
    yes_or_no = np.isin([*before.flat, *after.flat], (0, 1)).all()
    alone = after.shape[1] == 1 and not yes_or_no
    assert found.low <= found.value <= found.high or alone
    assert math.isnan(found.low) == math.isnan(found.high) == alone
    swapped = paired_difference(after, before, seed=seed, draws=200)
    assert swapped.value == -found.value
    mean = paired_mean(after, seed)
    assert mean.low <= mean.value <= mean.high or alone
    if yes_or_no:
        assert -1 <= found.low and found.high <= 1 and 0 <= mean.low and mean.high <= 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_kappa_lies_in_its_interval_and_below_one(rows):
    labels, verdicts = zip(*rows)
    found, swapped = kappa(labels, verdicts, draws=200), kappa(verdicts, labels, draws=200)
    if not np.isnan(found.value):
        symmetric = found.value == pytest.approx(swapped.value)
        assert -1 <= found.value <= 1 and (symmetric or len(set(verdicts)) == 1)
        no_interval = np.isnan([found.low, found.high]).all()
        assert no_interval or found.low <= found.value <= found.high
        assert (labels == verdicts) == (found.value == 1)


@given(st.lists(SHARES, max_size=9), st.randoms(use_true_random=False))
def test_holm_is_monotone_and_bounded(p, shuffler):
    found = holm(p)
    for own, corrected in zip(p, found):
        below = sum(other <= own for other in p)  # those before it, and those that tie
        assert own <= corrected <= min(1, len(p) * own) * (1 + 1e-12)
        assert corrected >= min(1, (len(p) - below + 1) * own)
    assert [x for _, x in sorted(zip(p, found))] == sorted(found)
    order = list(range(len(p)))
    shuffler.shuffle(order)
    assert holm([p[i] for i in order]) == [found[i] for i in order]
