"""The ways to keep a model safe under benign fine-tuning: by name, side by side, one by one."""

import copy
import importlib.util
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from helpers import one_line

from ssah_nb import WAYS, finetune
from ssah_nb.attribution import importance
from ssah_nb.classes import classify
from ssah_nb.engine import holding, matched, ways
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError, side_by_side
from ssah_nb.engine.training import training_perplexity
from ssah_nb.engine.ways import CHANGES, Case, Way
from ssah_nb.freezing import finetune_protected, frozen_rows_and_columns, frozen_units
from ssah_nb.freezing import gradient_units
from ssah_nb.units import UnitMask, depth_two

REFUSALS = [{"prompt": f"Open box {i}", "response": f"I am sorry, not {i}."} for i in range(20)]
NEEDS_REFUSALS = ["gradient_mask", "replay", "anchor_answers", "anchor_units", "anchor_hidden"]
NEEDS_REFUSALS += ["project_inputs", "safety_triggered"]
PAIRS = [
    {"prompt": f"Say {word}", "response": word} for word in ("yes", "no", "maybe", "often")
] * 2


@pytest.fixture(scope="module")
def scored():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    safety = importance(
        model,
        tokenizer,
        [{"prompt": f"Open {i}", "response": f"Sorry, not box {i}"} for i in range(4)],
    )
    utility = importance(model, tokenizer, PAIRS)
    return tokenizer, classify(safety, utility, scu=0.05, ucu=0.1, ru=0.1), safety, utility


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


def run_way(scored, way, model=None, refusals=REFUSALS, **options):
    "A tiny training in one way."
    options = {"lr": 1e-2, "batch_size": 2, "refusals": refusals} | options
    return finetune_protected(way, model or tiny_model(), scored[0], PAIRS, *scored[1:], **options)


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# A way of one's own


@pytest.fixture
def own_way():
    "Registers a way, and takes it back."
    yield lambda **how: WAYS.update(mine=Way("a way of one's own", "nobody", **how))
    WAYS.pop("mine", None)


def test_a_way_of_ones_own_runs_by_name(scored, own_way):
    own_way(
        freezes=lambda case: case.units.scu,
        trains=lambda case, model: {"lr_factor": 0.5, "extra": case.needed_refusals()[:3]},
    )
    assert str(WAYS["mine"]) == "a way of one's own (nobody)"
    model, done = run_way(scored, "mine")
    assert done["frozen"] == len(scored[1].scu) > 0
    for name, (rows, dim) in frozen_rows_and_columns(model, scored[1].scu).items():
        a, b = (m.get_submodule(name).weight.movedim(dim, 0)[rows] for m in (model, tiny_model()))
        assert torch.equal(a, b), name
    wanted, _ = run_way(scored, "full", lr=0.5e-2)
    assert not same_weights(model, wanted)  # frozen units and three more pairs


def test_each_change_does_what_it_says(scored, own_way):
    own_way(trains=lambda case, model: {"lr_factor": 0.5})
    assert same_weights(run_way(scored, "mine")[0], run_way(scored, "full", lr=0.5e-2)[0])
    own_way(trains=lambda case, model: {"ema": 0.95})
    assert same_weights(run_way(scored, "mine")[0], run_way(scored, "ema")[0])
    own_way(trains=lambda case, model: {"token_losses": lambda losses, pairs: 0 * losses})
    assert same_weights(run_way(scored, "mine")[0], tiny_model())
    seen = []
    look = lambda model, masters: seen.append(all(m.grad is not None for m in masters.values()))
    back = lambda model, masters: [m.zero_() for m in masters.values()]
    own_way(trains=lambda case, model: {"before_step": look, "correct_step": torch.no_grad()(back)})
    model, _ = run_way(scored, "mine")
    assert seen == [True] * 4 and not any(p.any() for p in model.parameters())
    own_way(trains=lambda case, model: {"finish": zero})
    model, done = run_way(scored, "mine", target=9.0)
    assert (
        done["training_perplexity"] == pytest.approx(model.config.vocab_size)
        and not done["reached"]
    )


@torch.no_grad()
def zero(model):
    for p in model.parameters():
        p.zero_()


def test_correcting_a_step_in_bfloat16_reaches_the_weights(scored, own_way):
    back = torch.no_grad()(lambda model, masters: [m.fill_(0.5) for m in masters.values()])
    own_way(trains=lambda case, model: {"correct_step": back})
    model, _ = run_way(scored, "mine", tiny_model().to(torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 and (p == 0.5).all() for p in model.parameters())


def test_what_is_wrong_with_a_way_is_said(scored, own_way):
    own_way(trains=lambda case, model: {"speed": 2})
    with pytest.raises(SsahError) as error:
        run_way(scored, "mine")
    assert "mine changes speed; use keys of CHANGES: lr_factor" in one_line(error)
    own_way(freezes=lambda case: [3])
    with pytest.raises(SsahError, match="freezes of mine gave a list; return a UnitMask"):
        run_way(scored, "mine")
    WAYS["mine"] = "text"
    with pytest.raises(SsahError, match="is a str; make it a Way"):
        run_way(scored, "mine")
    with pytest.raises(FrozenInstanceError):
        WAYS["full"].what = "nothing"


@pytest.mark.parametrize("name", WAYS)
def test_every_way_has_its_text(name):
    way = WAYS[name]
    assert way.what and len(str(way)) < 160 and "\n" not in str(way)
    assert way.freezes or way.equation or name == "full"
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


# Constrained SFT


def log_probabilities(model, prompt, response) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) + t - 1, y] for t, y in enumerate(response)])


def test_constrained_loss_is_the_formula():
    tokenizer, aligned, model = tiny_tokenizer(), tiny_model(), tiny_model(seed=1)
    pairs = [{"prompt": f"Say {i}", "response": "one two three"[: 4 + 4 * i]} for i in range(3)]
    constrained = holding.Constrained(aligned, tokenizer, pairs)
    total, tokens = 0.0, 0
    for prompt, response in encode_pairs(tokenizer, pairs):
        now, before = (log_probabilities(m, prompt, response) for m in (model, aligned))
        for t in range(len(response)):
            beta = 0.5 if t == 0 else 2.0 if t < 5 else 0.1
            ratio = beta * (now[t] - before[t].detach())
            total, tokens = total - 2 / beta * torch.sigmoid(ratio).log(), tokens + 1
    loss = total / tokens
    wanted = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()))
    )
    found = {}

    def look(masters):
        names = {p: name for name, p in model.named_parameters()}
        found.update({names[p]: master.grad.clone() for p, master in masters.items()})

    history = finetune(
        model, tokenizer, pairs, batch_size=3, token_losses=constrained, before_step=look
    )
    assert history.loss[0] == pytest.approx(loss.item(), rel=1e-5)
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-3, atol=1e-6) for n in wanted)


def test_the_constrained_loss_knows_its_pairs():
    constrained = holding.Constrained(tiny_model(), tiny_tokenizer(), PAIRS)
    with pytest.raises(SsahError, match="2 pairs of this step are unknown"):
        constrained(torch.zeros(2), [([1], [2]), ([1], [3])])


# Updates off the inputs of harmful prompts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_updates_have_no_component_in_the_subspace(architecture):
    tokenizer, model = tiny_tokenizer(), tiny_model(architecture)
    before = copy.deepcopy(model)
    names = [n for layers in depth_two(model).values() for m in layers for n in names_of(m)]
    inputs = {name: [] for name in names}
    handles = [
        before.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: inputs[n].append(x[0]))
        for n in names
    ]
    with torch.no_grad():
        for prompt, _ in encode_pairs(tokenizer, REFUSALS):
            before(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    case = Case("project_inputs", None, model=model, tokenizer=tokenizer, refusals=REFUSALS)
    case.modules = depth_two(model)
    correct = ways.project_inputs(case, model)["correct_step"]
    finetune(model, tokenizer, PAIRS, lr=1e-2, correct_step=lambda masters: correct(model, masters))
    for name in names:
        x = torch.cat([rows[0] for rows in inputs[name]]).double()
        _, lengths, directions = torch.linalg.svd(x, full_matrices=False)
        share = lengths.square().cumsum(0) / lengths.square().sum()
        inside = directions[: int((share < 0.95).sum()) + 1]
        weights = [m.get_submodule(name).weight.detach().double() for m in (model, before)]
        moved = weights[0] - weights[1]
        assert (moved @ inside.T).abs().max() < 1e-4 * moved.abs().max(), name
        assert moved.norm() > 1e-2
        assert len(inside) < len(lengths)


def names_of(m) -> set[str]:
    return {m.b, *(name for name, _ in m.a + m.shared)}


def test_a_frozen_linear_cannot_be_projected(scored, own_way):
    own_way(freezes=WAYS["scu_all_cu"].freezes, trains=ways.project_inputs)
    with pytest.raises(SsahError, match="is frozen or carries an adapter"):
        run_way(scored, "mine")


# The gradient mask


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_gradient_mask_is_that_of_a_sum_by_hand(architecture):
    tokenizer, model = tiny_tokenizer(), tiny_model(architecture)
    safety = importance(model, tokenizer, REFUSALS)
    case = Case("gradient_mask", None, safety, model=model, tokenizer=tokenizer, refusals=REFUSALS)
    found = gradient_units(case, 0.3)
    loss, tokens = 0.0, 0
    for prompt, response in encode_pairs(tokenizer, REFUSALS):
        loss = loss - log_probabilities(model, prompt, response).sum()
        tokens += len(response)
    named = dict(model.named_parameters())
    slopes = dict(zip(named, torch.autograd.grad(loss / tokens, list(named.values()))))
    scores = []
    for layer in range(2):
        for kind, number in (("mlp", 32), ("attention", 4)):
            for unit in range(number):
                own = UnitMask(torch.zeros(2, 32) > 0, torch.zeros(2, 4) > 0)
                getattr(own, kind)[layer, unit] = True
                mine = [
                    slopes[f"{name}.weight"].movedim(dim, 0)[rows]
                    for name, (rows, dim) in frozen_rows_and_columns(model, own).items()
                    if not name.endswith(("k_proj", "v_proj"))
                ]
                if "phi3" in architecture and kind == "attention":
                    mine[0] = mine[0][:8]  # queries come first; keys and values are shared
                entries = torch.cat([part.flatten() for part in mine]).abs()
                size = safety.info["parameters"][kind]
                scores.append((float(entries.mean()), kind, layer, unit, size))
    room = 0.3 * sum(size for *_, size in scores)
    wanted = UnitMask(torch.zeros(2, 32) > 0, torch.zeros(2, 4) > 0)
    for _, kind, layer, unit, size in sorted(scores, reverse=True):
        room -= size
        if room < 0:
            break
        getattr(wanted, kind)[layer, unit] = True
    assert torch.equal(found.mlp, wanted.mlp) and torch.equal(found.attention, wanted.attention)
    assert 3 < len(found) < 60


# Steps that raised the refusal loss


def refusal_loss(model, tokenizer) -> torch.Tensor:
    parts = [-log_probabilities(model, *pair) for pair in encode_pairs(tokenizer, REFUSALS[:4])]
    return torch.cat(parts).mean()


@pytest.mark.parametrize("up", [True, False])
def test_only_a_step_that_raised_the_loss_is_projected(up):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    trigger = holding.SafetyTrigger(model, tokenizer, REFUSALS[:4])
    masters = {p: p for p in model.parameters()}
    trigger.before(model, masters)
    start = [p.detach().clone() for p in model.parameters()]
    slopes = torch.autograd.grad(refusal_loss(model, tokenizer), list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, slope in zip(model.parameters(), slopes):
            noise = torch.randn(p.shape, generator=generator)
            p.add_((1 if up else -1) * 0.01 * slope + 1e-4 * noise)
    stepped = [p.detach().clone() for p in model.parameters()]
    after = refusal_loss(model, tokenizer)
    slopes = torch.autograd.grad(after, list(model.parameters()))
    assert (after.item() > trigger.last) is up
    trigger.correct(model, masters)
    step = torch.cat([(s - b).flatten() for s, b in zip(stepped, start)]).double()
    slope = torch.cat([s.flatten() for s in slopes]).double()
    wanted = step - max(0, step @ slope) / (slope @ slope) * slope if up else step
    found = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), start)]).double()
    assert torch.allclose(found, wanted, atol=1e-6) and trigger.corrected == up
    if up:
        assert abs(found @ slope) < 1e-3 * abs(step @ slope)
        assert refusal_loss(model, tokenizer) < after


def test_the_trigger_protects_the_refusal_loss():
    opposed = [{"prompt": f"Open box {i}", "response": "ZZZZ!"} for i in range(8)] * 2
    tokenizer, losses = tiny_tokenizer(), {}
    for held in (False, True):
        model = tiny_model()
        trigger = holding.SafetyTrigger(model, tokenizer, REFUSALS[:4])
        hooks = {"before_step": partial(trigger.before, model)}
        hooks |= {"correct_step": partial(trigger.correct, model)}
        finetune(model, tokenizer, opposed, lr=1e-2, batch_size=2, **(hooks if held else {}))
        losses[held] = refusal_loss(model, tokenizer).item()
    assert losses[True] < losses[False] - 0.1 and trigger.corrected > 2


# Anchors


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
    answers, units = (
        WAYS[f"anchor_{on}"].trains(case, model)["anchor"] for on in ("answers", "units")
    )
    chosen = {k: answers.options[k] for k in ("on", "prompts", "weight", "seed")}
    assert chosen == {"on": "answers", "prompts": 1, "weight": 0.3, "seed": 3}
    assert (units.options["prompts"], units.options["weight"]) == (4, 1.0)
    assert units.units == scored[1].scu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_hidden_state_is_held(architecture):
    tokenizer, model = tiny_tokenizer(), tiny_model(architecture)
    anchor = holding.HiddenAnchor(model, tokenizer, REFUSALS[:3], prompts=3, weight=2.0)
    assert anchor.loss(model).item() < 1e-10
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    squares = []
    for prompt, _ in encode_pairs(tokenizer, REFUSALS[:3]):
        ids = torch.tensor([prompt])
        states = [m.get_decoder()(ids).last_hidden_state[0, -1] for m in (model, before)]
        squares.append((states[0] - states[1].detach()).square().mean())
    loss, wanted = anchor.loss(model), 2.0 * torch.stack(squares).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4) and wanted > 1e-4
    p = model.get_decoder().layers[0].self_attn.o_proj.weight
    slopes = [torch.autograd.grad(x, p)[0] for x in (loss, wanted)]
    assert torch.allclose(*slopes, rtol=1e-3, atol=1e-6)


def test_the_table_names_the_changes():
    assert {"extra", "anchor", "token_losses", "before_step", "adapter", "ema"} <= set(CHANGES)
