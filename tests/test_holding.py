"""What some ways hold while a model is trained, against slow and obvious computations."""

import copy
from functools import partial

import pytest
import torch

from ssah_nb import finetune
from ssah_nb.attribution import importance
from ssah_nb.engine import holding, ways
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.ways import Case
from ssah_nb.freezing import frozen_rows_and_columns, gradient_units
from ssah_nb.units import UnitMask, depth_two

PAIRS = [{"prompt": f"Say {word}", "response": word} for word in ("yes", "no", "maybe", "often")]
REFUSALS = [{"prompt": f"Open box {i}", "response": f"I am sorry, not {i}."} for i in range(20)]


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


@pytest.mark.parametrize(
    ("architecture", "mixed"),
    [("llama", False), ("qwen2", False), ("phi3", False), ("llama", True)],
)
def test_updates_have_no_component_in_the_subspace(architecture, mixed):
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
    options = {"mixed": mixed, "correct_step": lambda masters: correct(model, masters)}
    finetune(model, tokenizer, PAIRS, lr=1e-2, **options)
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


def test_a_step_is_corrected_in_full_precision(monkeypatch):
    model, tokenizer, casts, asked = tiny_model(), tiny_tokenizer(), {}, []
    is_cast = lambda: torch.is_autocast_enabled("cpu")
    note = {
        name: lambda masters, name=name: casts.update({name: is_cast()})
        for name in ("before_step", "correct_step")
    }
    finetune(model, tokenizer, PAIRS, lr=1e-2, mixed=True, **note)
    assert casts == {"before_step": True, "correct_step": False}

    plain = holding.response_losses
    monkeypatch.setattr(
        holding, "response_losses", lambda *_: (asked.append(is_cast()), plain(*_))[1]
    )
    for mixed in (True, False):
        trigger = holding.SafetyTrigger(model, tokenizer, REFUSALS[:4])
        hooks = {
            "before_step": lambda masters: trigger.before(model, masters),
            "correct_step": lambda masters: trigger.correct(model, masters),
        }
        finetune(model, tokenizer, PAIRS, lr=1e-2, mixed=mixed, **hooks)
        assert asked == [mixed] * 2 * trigger.steps  # both losses of a step in its own products
        asked.clear()


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


# The last hidden state


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
