"""The ways to keep a model safe under benign fine-tuning: by name, side by side, one by one."""

import copy
import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import pytest
import torch
from helpers import one_line
from helpers_units import made_up
from helpers_ways import PAIRS, REFUSALS, run_way, same_weights
from torch import nn

from ssah_nb import WAYS, anchoring
from ssah_nb.engine import holding, matched, ways
from ssah_nb.engine.evaluation import perplexity
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.run import SsahError, side_by_side
from ssah_nb.engine.training import training_perplexity
from ssah_nb.classes import top_units
from ssah_nb.engine.ways import CHANGES, Case, Way, Ways, held_bytes
from ssah_nb.freezing import finetune_protected, frozen_rows_and_columns, frozen_units
from ssah_nb.freezing import safety_layer_units, sn_tune_units
from ssah_nb.units import CLASSES, Scores, UnitMap

NEEDS_REFUSALS = ["gradient_mask", "replay"]
NEEDS_REFUSALS += ["anchor_answers", "anchor_slack", "anchor_hidden"]
NEEDS_REFUSALS += ["anchor_units", "anchor_random"]
NEEDS_REFUSALS += ["project_inputs", "safety_triggered"]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_an_ordinary_model(scored, way):
    if "lora" in way and not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed")
    tokenizer, units, safety, utility = scored
    before = tiny_model()
    unaligned = tiny_model(seed=1)
    training = dict(unaligned=unaligned, lr=1e-2, batch_size=2, refusals=REFUSALS)
    model, done = finetune_protected(
        way, tiny_model(), tokenizer, PAIRS, units, safety, utility, **training
    )
    given = {"model": before, "tokenizer": tokenizer, "refusals": REFUSALS}
    mask = frozen_units(way, units, safety, utility, **given)
    assert list(model.state_dict()) == list(before.state_dict())
    assert done["epochs"] == 1
    assert done["reached"]
    assert done["frozen"] == len(mask)
    weights = zip(model.state_dict().values(), before.state_dict().values())
    assert any(not torch.equal(a, b) for a, b in weights)
    for name, (rows, dim) in frozen_rows_and_columns(before, mask).items():
        a, b = (m.get_submodule(name).weight.movedim(dim, 0)[rows] for m in (model, before))
        assert torch.equal(a, b), name


def test_ways_side_by_side_give_the_same_models_as_one_after_the_other(scored):
    base = tiny_model()
    ways = [
        "scu_all_cu",
        "random",
        "ema",
        *(["lora"] * 2 if importlib.util.find_spec("peft") else []),
    ]

    def work(way):
        model = copy.deepcopy(base)
        training = dict(lr=1e-2, batch_size=2)
        model, _ = finetune_protected(way, model, scored[0], PAIRS, *scored[1:], **training)
        return model.state_dict()

    together, threads = side_by_side(work, ways, torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        alone = [work(way) for way in ways]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(together, alone) for name in a)


def test_the_average_of_weights_is_as_exact_in_bfloat16(scored):
    def moved(dtype):  # an average that is kept in bfloat16 itself does not follow steps this small
        base = tiny_model().to(dtype)
        model, _ = finetune_protected(
            "ema", copy.deepcopy(base), scored[0], PAIRS * 8, *scored[1:], lr=1e-3, batch_size=2
        )
        return torch.cat(
            [
                (a.float() - b.float()).flatten()
                for a, b in zip(model.parameters(), base.parameters())
            ]
        )

    half, full = moved(torch.bfloat16), moved(torch.float32)
    assert (half - full).norm() < 0.2 * full.norm()


def test_optimizer_memory_is_what_is_trained(scored):
    megabytes = {
        way: finetune_protected(
            way, tiny_model(), scored[0], PAIRS, *scored[1:], lr=1e-2, batch_size=2
        )[1]["optimizer_mb"]
        for way in ("full", "scu_all_cu", "low_lr")
    }
    assert megabytes["full"] == megabytes["low_lr"] > 1.5 * megabytes["scu_all_cu"]


def test_training_goes_on_until_the_loss_is_reached_or_says_that_it_never_was(scored):
    def train(target, **options):
        options |= dict(target=target, lr=1e-2, batch_size=2)
        return finetune_protected(
            "scu_all_cu", tiny_model(), scored[0], PAIRS, *scored[1:], **options
        )

    (once, one), (_, never) = train(None), train(1.0)
    assert never["epochs"] == 2
    assert never["reached"] is False
    assert never["training_perplexity"] < one["training_perplexity"]
    after = [train(1.0, max_epochs=1 + i / 8)[1]["training_perplexity"] for i in range(4)]
    assert after[0] == one["training_perplexity"] and sorted(after, reverse=True) == after
    for share in (0.1, 0.9):  # of the two models around the target, the nearer one
        _, done = train(after[1] ** (1 - share) * after[2] ** share)
        assert done["reached"]
        assert done["training_perplexity"] == after[1 if share < 0.5 else 2]
        assert done["epochs"] == (1.125 if share < 0.5 else 1.25)
    model, done = train(0.9999 * one["training_perplexity"])
    assert done["reached"]
    assert done["epochs"] == 1
    weights = zip(model.state_dict().values(), once.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights)


def test_the_perplexity_is_measured_behind_the_system_prompt_of_training(scored, own_way):
    own_way(trains=lambda case, model: {"finish": lambda model: None})
    for way in ("full", "mine"):
        model, done = run_way(scored, way, system="Be brief.", max_response=2)
        wanted = perplexity(model, scored[0], PAIRS, "Be brief.", 2).value
        assert done["training_perplexity"] == wanted
        assert wanted != perplexity(model, scored[0], PAIRS, None, 2).value


EXTRA = [{"prompt": f"Count {i}", "response": f"one {i}"} for i in range(4)]


@pytest.mark.parametrize(
    "given", [iter, pd.DataFrame, lambda rows: {k: [r[k] for r in rows] for k in rows[0]}]
)
def test_pairs_that_are_mixed_in_may_come_in_any_form(scored, given):
    wanted, _ = run_way(scored, "full", extra=EXTRA)
    model, _ = run_way(scored, "full", extra=given(EXTRA))
    assert same_weights(model, wanted)
    assert not same_weights(model, run_way(scored, "full")[0])


@pytest.mark.parametrize("way", NEEDS_REFUSALS[1:] + ["constrained_sft"])
def test_what_a_way_reads_stands_behind_the_system_prompt_of_training(scored, way, monkeypatch):
    seen = []
    for module in (ways, holding, anchoring):
        encode = module.encode_pairs
        noted = lambda tok, pairs, system, *more, f=encode: (
            seen.append(system) or f(tok, pairs, system, *more)
        )
        monkeypatch.setattr(module, "encode_pairs", noted)
    run_way(scored, way, system="Be brief.", max_response=2)
    assert set(seen) <= {"Be brief."} and (seen or way == "replay")


def test_what_a_way_sets_itself_cannot_be_given(scored):
    with pytest.raises(SsahError) as error:
        run_way(scored, "ema", ema=0.9)
    assert "ema sets ema itself; leave it out" in one_line(error)


def test_controls_have_our_size(scored):
    _, units, safety, utility = scored
    free = [way for way in WAYS if way != "gradient_mask"]
    masks = {way: frozen_units(way, units, safety, utility) for way in free}
    ours, small = masks["scu_all_cu"], masks["scu_top_cu"]
    assert masks["random_top_cu"].mlp.sum() == small.mlp.sum() and masks["random_top_cu"] != small
    assert masks["random_top_cu"].attention.sum() == small.attention.sum()
    assert masks["random"].mlp.sum() == ours.mlp.sum() and masks["random"] != ours
    assert torch.equal(masks["random_per_layer"].mlp.sum(1), ours.mlp.sum(1))
    sizes = [units.share(mask)["unit_parameters"] for mask in (masks["sn_tune_our_size"], ours)]
    assert abs(sizes[0] - sizes[1]) < 0.12  # a head of the tiny model is 4 %
    assert masks["safety_layers"].mlp.all(1).sum() == masks["safety_layers"].mlp.any(1).sum() == 1


def test_sn_tune_takes_the_highest_safety_scores_outside_of_the_foundation():
    safety, utility = made_up(0), made_up(1)
    foundation = top_units(utility.standardized(), 0.1, utility.info)
    found, z = sn_tune_units(safety, utility, 0.2), safety.standardized()

    def scores_of(mask):
        return torch.cat([getattr(z, kind)[getattr(mask, kind)] for kind in ("mlp", "attention")])

    assert len(found) > 3 and not len(found & foundation)
    assert scores_of(found).min() >= scores_of(~(found | foundation)).max()


def test_safety_layers_are_those_with_the_most_scu():
    mlp, attention = torch.full((4, 8), 2, dtype=torch.uint8), torch.full((4, 2), 2).byte()
    mlp[2, :3], mlp[0, 0] = CLASSES.index("SCU"), CLASSES.index("SCU")
    units = UnitMap(mlp, attention, Scores(mlp.float(), attention.float()), {})
    for share, layers in ((0.25, [2]), (0.5, [1, 2])):
        found = safety_layer_units(units, share)
        assert found.mlp.all(1).nonzero().flatten().tolist() == layers
        assert torch.equal(found.mlp.any(1), found.mlp.all(1))
        assert torch.equal(found.attention.all(1), found.mlp.all(1))


def test_errors_name_what_is_wrong(scored):
    with pytest.raises(SsahError, match="unknown way 'frozen'; use one of full, scu_top_cu"):
        finetune_protected("frozen", tiny_model(), scored[0], PAIRS, *scored[1:])
    with pytest.raises(SsahError, match="safe_lora needs the model before alignment"):
        finetune_protected("safe_lora", tiny_model(), scored[0], PAIRS, *scored[1:])


@pytest.mark.parametrize("way", NEEDS_REFUSALS)
def test_missing_refusals_are_named_before_anything_is_trained(scored, way):
    model = tiny_model()
    with pytest.raises(SsahError) as error:
        finetune_protected(way, model, scored[0], PAIRS, *scored[1:])
    assert f"{way} needs calibration refusals" in one_line(error)
    before = tiny_model().state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", WAYS)
def test_every_way_has_its_text(name):
    way = WAYS[name]
    assert way.what and len(str(way)) < 160 and "\n" not in str(way)
    assert way.freezes or way.equation or way.source == "control" or name == "full"
    if name in NEEDS_REFUSALS + ["constrained_sft"] and "units" not in name:
        assert way.source


# Replay


def test_replay_mixes_exactly_the_pairs(scored, monkeypatch):
    seen = []
    spy = lambda model, tokenizer, pairs, **_: (
        seen.append(pairs) or plain(model, tokenizer, pairs, **_)
    )
    plain = matched.finetune
    monkeypatch.setattr(matched, "finetune", spy)
    model, done = run_way(scored, "replay", target=1.0, max_epochs=1.25, seed=5)
    key = lambda pairs: sorted((p["prompt"], p["response"]) for p in pairs)
    extra = seen[0][len(PAIRS) :]
    assert seen[0][: len(PAIRS)] == PAIRS and len(extra) == 16 == len({p["prompt"] for p in extra})
    assert set(key(extra)) <= set(key(REFUSALS))
    assert seen[1:] == [PAIRS[:1] + extra[:1] + extra[8:9], PAIRS[1:2] + extra[1:2] + extra[9:10]]
    assert done["training_perplexity"] == training_perplexity(model, scored[0], PAIRS)
    run_way(scored, "replay", refusals=REFUSALS[:3])
    assert key(seen[-1]) == key(PAIRS + REFUSALS[:3])


def test_a_frozen_linear_cannot_be_projected(scored, own_way):
    own_way(freezes=WAYS["scu_all_cu"].freezes, trains=ways.project_inputs)
    with pytest.raises(SsahError, match="is frozen or carries an adapter"):
        run_way(scored, "mine")


# Anchors


def test_the_control_of_held_units_holds_as_many_random_ones(scored, monkeypatch):
    made = {}
    for way in ("anchor_units", "anchor_random"):
        spied = lambda case, model, way=way, old=WAYS[way].trains: made.setdefault(
            way, old(case, model)
        )
        monkeypatch.setitem(WAYS, way, Way("spied on", trains=spied))
        run_way(scored, way)
    held, control = (made[way]["anchor"].units for way in made)
    assert held == scored[1].scu
    assert len(control) == len(held) and control != held


@pytest.mark.parametrize("way", ["anchor_answers", "anchor_units", "anchor_hidden"])
def test_anchors_are_called_at_each_step(scored, way, monkeypatch):
    made = []
    trains = WAYS[way].trains
    look = lambda case, model: made.append(trains(case, model)) or made[-1]
    monkeypatch.setitem(WAYS, way, Way("spied on", trains=look))
    model, _ = run_way(scored, way, target=1.0, max_epochs=1.25)
    assert made[0]["anchor"].step == 4 + 2  # a pass of eight pairs, and twice an eighth
    full, _ = run_way(scored, "full", target=1.0, max_epochs=1.25)
    assert not same_weights(model, full)


def test_the_settings_of_the_anchors(scored):
    model = tiny_model()
    case = Case("x", scored[1], model=model, tokenizer=scored[0], refusals=REFUSALS, seed=3)
    answers, slack, units = (
        WAYS[f"anchor_{name}"].trains(case, model)["anchor"]
        for name in ("answers", "slack", "units")
    )
    chosen = {k: answers.options[k] for k in ("on", "prompts", "weight", "seed")}
    assert chosen == {"on": "answers", "prompts": 1, "weight": 0.1, "seed": 3}
    assert answers.options["slack"] == 1e-3 and slack.options == answers.options | {"slack": 0.3}
    assert (units.options["prompts"], units.options["weight"]) == (4, 1.0)
    assert units.units == scored[1].scu


def test_the_table_names_the_changes():
    assert {"extra", "anchor", "token_losses", "before_step", "adapter", "ema"} <= set(CHANGES)


def test_a_chapter_that_could_not_be_imported_is_tried_again(monkeypatch):
    table, mine, theirs = Ways("a chapter"), Way("mine"), Way("theirs")

    def import_half(name):
        table.update({"first": theirs, "changed": theirs})
        raise ImportError(f"{name} is broken")

    table["changed"] = mine
    monkeypatch.setattr(ways, "import_module", import_half)
    for _ in range(2):
        with pytest.raises(ImportError, match="a chapter is broken"):
            list(table)
    monkeypatch.setattr(ways, "import_module", lambda name: table.update(second=theirs))
    assert dict(table) == {"changed": mine, "first": theirs, "second": theirs}


def test_two_threads_read_the_whole_table(monkeypatch):
    table = Ways("a chapter")

    def import_slowly(name):
        time.sleep(0.2)
        table.update(first=Way("first"), number=Way(str(len(table))))  # it may read, too

    monkeypatch.setattr(ways, "import_module", import_slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: list(table), range(2))) == [["first", "number"]] * 2


def test_memory_counts_wherever_it_is_held():
    held, nothing = torch.ones(3), nn.Identity()

    def by_default(model, before=held):
        return before

    def by_name(model, *, before=held):
        return before

    for thing in (by_default, by_name, partial(print, end=held), lambda: held):
        assert held_bytes(thing, nothing) == held.nbytes
    outer = nn.Sequential(nn.Linear(1, 1))
    outer[0].before = held
    assert held_bytes([outer], nothing) == held.nbytes + 8
    assert held_bytes([outer, outer[0], held], outer) == 0


def test_a_closure_may_hold_what_has_no_value_yet():
    held = torch.ones(3)

    def brings():
        return held, later

    assert held_bytes(brings, nn.Linear(2, 2)) == held.nbytes
    later = None
    assert brings() == (held, later)
