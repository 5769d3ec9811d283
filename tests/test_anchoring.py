"""An anchor's gradient, in a plain loop and under the trainers that people use."""

import pytest
import torch
from helpers import one_line
from helpers_freezing import PREFERENCES, arguments
from transformers import Trainer, TrainingArguments

import ssah_nb
from ssah_nb import Anchor, SsahError, UnitMask, anchoring, finetune, freeze
from ssah_nb.engine.anchors import listening
from ssah_nb.engine.batches import pad_batch, run_blocks
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.units import depth_two

TOKENIZER = tiny_tokenizer()
REFUSALS = [{"prompt": f"Open box {i}", "response": "I am sorry, no."[: 5 + i]} for i in range(6)]
TASK = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(8)]


def some_units() -> UnitMask:
    "Three channels and a head in the first layer, a channel and two heads in the second."
    mask = UnitMask(torch.zeros(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    mask.mlp[0, [1, 7, 30]] = mask.mlp[1, 4] = mask.attention[0, 3] = True
    mask.attention[1, :2] = True
    return mask


def moved(model, by: float = 0.02):
    "The model after a random walk of all its weights."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p))
    return model


def gradients(model) -> dict:
    "Copies of all gradients; zeros where there is none."
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def close(a: dict, b: dict, **limits) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **limits) for k in a)


def inputs_of(model, names, ids) -> dict:
    "Input of each named linear in one pass over one row."
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: seen.update({n: x[0]}))
        for n in names
    ]
    logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return seen | {"logits": logits}


def rounded(kept: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    "What the anchor has kept, after a look that it is the exact value in half precision."
    assert kept.dtype == torch.float16 and torch.allclose(kept.double(), exact, 1e-3, 1e-3)
    return kept.double()


def obvious_loss(before, model, on: str, kept: list[torch.Tensor]) -> torch.Tensor:
    "The formula of chapter 7, row by row, with `before` as the model at the start."
    mask, modules = some_units(), depth_two(model)
    held = [
        (kind, layer, m) for kind in ("mlp", "attention") for layer, m in enumerate(modules[kind])
    ]
    tokens = []
    for prompt, response in encode_pairs(TOKENIZER, REFUSALS, max_response=4):
        ids, at = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)  # before each token
        with torch.no_grad():
            old = inputs_of(before, [m.b for *_, m in held], ids)
        tokens.append((old, inputs_of(model, [m.b for *_, m in held], ids), at))
    if on == "answers":
        both = [torch.cat([said[i]["logits"][0, said[2]] for said in tokens]) for i in range(2)]
        p, q = (logits.log_softmax(-1) for logits in both)
        p = rounded(kept[0], p).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()
    parts = []
    for (kind, layer, m), before in zip(held, kept):
        chosen = getattr(mask, kind)[layer]
        x = torch.cat([old[m.b][0, at] for old, _, at in tokens])
        y = torch.cat([new[m.b][0, at] for _, new, at in tokens])
        mean, spread = x.mean(0), x.std(0, correction=0)
        spread = spread.clamp_min(spread.median())
        channels = chosen.repeat_interleave(m.width)
        old, new = (((v - mean) / spread)[:, channels] for v in (x, y))
        z = (new - rounded(before, old)).square()
        parts.append(z.unflatten(1, (-1, m.width)).mean(-1))
    return torch.cat(parts, 1).mean(1).mean()


def anchor_on(model, on: str, **options) -> Anchor:
    units = some_units() if on == "units" else None
    return Anchor(model, TOKENIZER, REFUSALS, on=on, units=units, **options)


@pytest.mark.parametrize("on", ["answers", "units"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_is_that_of_the_formula(architecture, on):
    before, model = (tiny_model(architecture).double() for _ in range(2))
    anchor = anchor_on(model, on, prompts=len(REFUSALS), slack=0.0, weight=0.5)
    moved(model)
    loss = anchor.loss(model)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    kept = [part["before"] for part in anchor.reference]
    expected = 0.5 * obvious_loss(before, model, on, kept)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss.item() > 1e-3
    assert close(found, gradients(model), rtol=1e-6, atol=2e-7)  # norms of Gemma are in float32
    assert anchor.report().mean == pytest.approx(2 * expected.item(), rel=1e-6)


@pytest.mark.parametrize("on", ["answers", "units"])
def test_nothing_moves_when_nothing_has_drifted(on):
    model = tiny_model()
    anchor = anchor_on(model, on)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        anchor.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("on", ["answers", "units"])
def test_the_reference_is_as_large_as_promised(on):
    model = tiny_model()
    tokens = sum(len(r) for _, r in encode_pairs(TOKENIZER, REFUSALS, max_response=4))
    kept = sum(part["before"].nbytes for part in anchor_on(model, on).reference)
    channels = 4 + 3 * 8  # of the held units: a head has eight
    assert kept == 2 * tokens * (model.config.vocab_size if on == "answers" else channels)


def test_the_reference_of_units_is_the_same_module_by_module(monkeypatch):
    together = anchor_on(tiny_model(), "units").reference
    monkeypatch.setattr("ssah_nb.anchoring.MOST_BYTES", 1)
    passes, run = [], ssah_nb.anchoring.behaviour_on_all
    monkeypatch.setattr(
        "ssah_nb.anchoring.behaviour_on_all",
        lambda model, encoded, channels, change: (
            passes.append(list(channels)) or run(model, encoded, channels, change)
        ),
    )
    alone = anchor_on(tiny_model(), "units").reference
    assert [len(names) for names in passes] == [1] * len(together)
    for a, b in zip(together, alone, strict=True):
        assert close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("on", ["answers", "units"])
def test_training_drifts_less_with_an_anchor(on):
    drift = {}
    for held in (True, False):
        model = tiny_model()
        anchor = anchor_on(model, on, weight=10.0)
        finetune(model, TOKENIZER, TASK, lr=3e-3, epochs=6, anchor=anchor if held else None)
        drift[held] = anchor.report().mean
    assert drift[True] < 0.5 * drift[False]


def test_every_second_step_has_twice_the_weight():
    model = tiny_model()
    twice, each = (anchor_on(model, "answers", every=every, slack=0.0) for every in (2, 1))
    moved(model)
    losses = [twice.loss(model).item() for _ in range(4)]
    expected = [each.loss(model).item() for _ in range(2)]
    assert losses == pytest.approx([2 * expected[0], 0, 2 * expected[1], 0])


def test_a_frozen_model_is_anchored_alike():
    plain, frozen = tiny_model(), tiny_model()
    anchors = [anchor_on(m, "units") for m in (plain, frozen)]
    mask = UnitMask(torch.zeros(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
    mask.mlp[:, ::3] = True
    moved(plain)
    freeze(moved(frozen), mask)
    losses = [a.loss(m) for a, m in zip(anchors, (plain, frozen))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    losses[1].backward()


def test_units_behind_virtual_tokens_are_those_of_the_words():
    peft = pytest.importorskip("peft")
    tokenizer, base = tiny_tokenizer(), tiny_model()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config)
    module = depth_two(model)["mlp"][0]
    heard = []
    handle = model.get_submodule(module.b).register_forward_pre_hook(
        lambda _, x: heard.append(x[0])
    )
    (pair,) = encode_pairs(tokenizer, REFUSALS[:1], max_response=4)
    with torch.no_grad():
        model(torch.tensor([pair[0] + pair[1]]))
    handle.remove()
    batch = pad_batch([pair], [0], model.device)
    channels = {module.b: torch.arange(heard[0].shape[-1])}
    with torch.no_grad(), listening(model, channels, batch.response_mask) as found:
        run_blocks(model, batch)
    assert heard[0].shape[1] == 3 + batch.input_ids.shape[1]
    torch.testing.assert_close(found[module.b], heard[0][0, -4:])


def test_lora_is_anchored(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    for on in ("answers", "units"):
        anchor = anchor_on(base, on, slack=0.0)
        adapter = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(base, adapter)
        loss = anchor.loss(model)
        loss.backward()
        assert loss > 1e-3
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
        base = tiny_model()


def test_units_held_at_the_places_of_the_past_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(anchoring, "PLACES", "at each token")
    anchor_on(tiny_model(), "units").save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(SsahError, match="build the anchor anew"):
        Anchor.load(tmp_path)


@pytest.mark.parametrize("on", ["answers", "units"])
def test_saved_and_loaded(on, tmp_path):
    model = tiny_model()
    anchor = anchor_on(model, on)
    moved(model)
    anchor.loss(model)
    anchor.save(tmp_path)
    again = Anchor.load(tmp_path)
    assert torch.equal(again.loss(model), anchor.loss(model))
    assert again.report(model).mean == anchor.report(model).mean


# Trainers


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": r, "labels": r} for r in ids]


def trained(folder, rows, on, callbacks, **options) -> dict:
    "Weights after one step of SGD on all rows."
    model = tiny_model()
    anchor = anchor_on(model, on, slack=0.0)
    moved(model)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.5, "learning_rate": 0.1}
    settings |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "warmup_steps": 0}
    args = TrainingArguments(**arguments(folder, **settings | options))
    with_anchor = [anchor.callback()] if callbacks else []
    Trainer(model, args, train_dataset=rows, callbacks=with_anchor).train()
    return dict(model.named_parameters())


@pytest.mark.parametrize("on", ["answers", "units"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["", "checkpoint"])
def test_trainer_steps_as_a_plain_loop(on, options, rows, tmp_path):
    found = trained(tmp_path, rows, on, True, **options)
    model = tiny_model()
    anchor = anchor_on(model, on, slack=0.0)
    moved(model).train()
    ids = torch.tensor([row["input_ids"] for row in rows])
    (model(input_ids=ids, labels=ids).loss + anchor.loss(model)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert close(found, dict(model.named_parameters()), atol=1e-6)
    without = trained(tmp_path / "without", rows, on, False, **options)
    assert not close(found, without, atol=1e-4)


def test_trainer_in_bfloat16_steps_nearly_alike(rows, tmp_path):
    whole = trained(tmp_path / "a", rows, "answers", True)
    mixed = trained(tmp_path / "b", rows, "answers", True, bf16=True)
    assert close(whole, mixed, atol=3e-3)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trainers_call_the_anchor(kind, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = tiny_model()
    anchor = Anchor(model, TOKENIZER, REFUSALS)
    common = {"processing_class": TOKENIZER, "callbacks": [anchor.callback()]}
    options = arguments(tmp_path, max_length=64)
    if kind == "sft":
        talk = [{"prompt": p["prompt"], "completion": p["response"]} for p in TASK]
        data = datasets.Dataset.from_list(talk)
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data, **common)
    else:
        data, config = datasets.Dataset.from_list(PREFERENCES), trl.DPOConfig(**options)
        trainer = trl.DPOTrainer(model, tiny_model(), config, train_dataset=data, **common)
    trainer.train()
    assert anchor.step == trainer.state.global_step > 0


# Errors


def test_errors_come_before_anything_is_computed():
    model = tiny_model()
    wrong = UnitMask(torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))
    cases = {
        "no": {"refusals": []},
        "unknown on='heads'": {"on": "heads"},
        "needs the units": {"on": "units"},
        "holds no units": {"units": some_units()},
        "prompts=0": {"prompts": 0},
        "tokens=2.5": {"tokens": 2.5},
        "weight=-1": {"weight": -1},
    }
    for words, options in cases.items():
        with pytest.raises(SsahError) as error:
            Anchor(model, TOKENIZER, **{"refusals": REFUSALS} | options)
        assert words in one_line(error)
    with pytest.raises(SsahError):
        Anchor(model, TOKENIZER, REFUSALS, on="units", units=wrong)


@pytest.mark.parametrize("on", ["answers", "units"])
def test_a_prompt_beyond_the_context_is_refused(on):
    long = [REFUSALS[0], {"prompt": "x" * 600, "response": "No."}]
    units = {"units": some_units()} if on == "units" else {}
    with pytest.raises(SsahError, match=r"refusal 1 has \d+ \+ 4 tokens.* 512") as error:
        Anchor(tiny_model(), TOKENIZER, long, on=on, **units)
    one_line(error)


def test_what_is_no_anchor_is_refused_before_a_step():
    model = tiny_model()
    anchor = Anchor(model, TOKENIZER, REFUSALS)
    for wrong in (anchor.callback(), "yes"):
        with pytest.raises(SsahError, match="is no anchor; pass the Anchor itself") as error:
            finetune(model, TOKENIZER, TASK, anchor=wrong)
        one_line(error)
    assert anchor.report().mean < 1e-6 and not model.training


def test_another_model_is_refused():
    anchor = Anchor(tiny_model(), TOKENIZER, REFUSALS)
    with pytest.raises(SsahError) as error:
        anchor.loss(tiny_model("qwen2"))
    assert "model_type llama instead of qwen2" in one_line(error)
    with pytest.raises(SsahError) as error:
        anchor.report()
    assert "is gone" in one_line(error)


def test_an_anchor_in_the_middle_of_training_is_refused(rows, tmp_path):
    model = tiny_model()
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    with pytest.raises(SsahError) as error:
        Anchor(model, TOKENIZER, REFUSALS)
    assert "training of this model has begun" in one_line(error)


def test_float16_training_is_refused(rows, tmp_path):
    model = tiny_model()
    callback = Anchor(model, TOKENIZER, REFUSALS).callback()
    args = TrainingArguments(**arguments(tmp_path))
    args.fp16 = True
    with pytest.raises(SsahError) as error:
        callback.on_train_begin(args, None, None, model=model)
    assert "use bf16=True" in one_line(error)


def test_an_anchor_itself_is_no_callback(rows, tmp_path):
    model = tiny_model()
    anchor = Anchor(model, TOKENIZER, REFUSALS)
    args = TrainingArguments(**arguments(tmp_path, max_steps=1))
    with pytest.raises(SsahError, match="callbacks=\\[anchor.callback\\(\\)\\]") as error:
        Trainer(model, args, train_dataset=rows, callbacks=[anchor])
    one_line(error)
    (later := Trainer(model, args, train_dataset=rows)).add_callback(anchor)
    with pytest.raises(SsahError, match="a trainer takes an anchor's callback"):
        later.train()


def test_a_map_of_units_does_not_choose_what_is_held():
    model = tiny_model()
    units = ssah_nb.classify(*(ssah_nb.importance(model, TOKENIZER, p) for p in (REFUSALS, TASK)))
    with pytest.raises(SsahError, match="a UnitMap does not choose units") as error:
        Anchor(model, TOKENIZER, REFUSALS, on="units", units=units)
    one_line(error)
