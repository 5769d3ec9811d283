"""What a user passes by mistake: a wrapper, no tokenizer, a model elsewhere, a path with ~."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import one_line
from helpers_units import TOKENIZER, pairs
from torch import nn

import ssah_nb as ssah
from ssah_nb import SsahError
from ssah_nb.engine import run
from ssah_nb.engine.anchors import check_trainer
from ssah_nb.engine.models import tiny_model
from ssah_nb.engine.origin import weights_hash
from ssah_nb.engine.states import check_in_memory

PAIRS = pairs("No")
PROMPTS = [pair["prompt"] for pair in PAIRS]
ANCHOR = ssah.Anchor(tiny_model(), TOKENIZER, PAIRS)
CALLS = {
    "generate": lambda m, t: ssah.generate(m, t, PROMPTS, 2),
    "perplexity": lambda m, t: ssah.perplexity(m, t, PAIRS),
    "refusal_margins": lambda m, t: ssah.refusal_margins(m, t, PROMPTS),
    "importance": lambda m, t: ssah.importance(m, t, PAIRS),
    "finetune": lambda m, t: ssah.finetune(m, t, PAIRS),
    "Anchor": lambda m, t: ssah.Anchor(m, t, PAIRS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrapper_and_no_tokenizer_are_named(call):
    with pytest.raises(SsahError, match="a DataParallel is no model of transformers; take it out"):
        call(nn.DataParallel(tiny_model()), TOKENIZER)
    for wrong in (None, SimpleNamespace(tokenizer=TOKENIZER), tiny_model()):
        with pytest.raises(SsahError, match="is no tokenizer; pass the model's own") as error:
            call(tiny_model(), wrong)
        one_line(error)


def test_a_wrapper_has_no_loss_of_an_anchor():
    with pytest.raises(SsahError, match="a DataParallel is no model"):
        ANCHOR.loss(nn.DataParallel(tiny_model()))


def test_a_device_without_float64_is_refused():
    weight = SimpleNamespace(device=SimpleNamespace(type="mps"), is_meta=False)
    model = SimpleNamespace(parameters=lambda: [weight], named_parameters=lambda: [("w", weight)])
    with pytest.raises(SsahError, match="no float64"):
        check_in_memory(model, sums=True)
    check_in_memory(model)


@pytest.mark.parametrize("name", ["tiny", "embedded", "aligned", "model.gguf", "."])
def test_what_is_no_hub_model_has_no_revision(name):
    with pytest.raises(SsahError, match="is not on the hub and has no revision='v1'"):
        ssah.load_model(name, revision="v1")


def test_a_compiled_model_has_the_hash_of_its_weights():
    model = tiny_model()
    assert weights_hash(torch.compile(model)) == weights_hash(model)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    ssah.save_model(model, TOKENIZER, "~/model")
    ANCHOR.save("~/anchor")
    ssah.Splits({("harmful", "align"): PAIRS}).save("~/splits.json")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "anchor", "splits.json"}
    again, _ = ssah.load_model("~/model")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert len(ssah.Splits.load("~/splits.json")["harmful", "align"]) == len(PAIRS)
    ssah.Anchor.load("~/anchor")


def test_sharding_that_accelerate_was_launched_with_is_refused(monkeypatch):
    args = SimpleNamespace(fp16=False, deepspeed=None, fsdp=None, deepspeed_plugin=None)
    state = SimpleNamespace(global_step=0)
    check_trainer(ANCHOR, tiny_model(), args, state)
    with pytest.raises(SsahError, match="an anchor needs whole weights"):
        plugin = {"deepspeed_plugin": object()}
        check_trainer(ANCHOR, tiny_model(), SimpleNamespace(**vars(args) | plugin), state)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SsahError, match="an anchor needs whole weights"):
        check_trainer(ANCHOR, tiny_model(), args, state)


def test_mixed_auto_is_decided(monkeypatch):
    losses = lambda mixed: ssah.finetune(tiny_model(), TOKENIZER, PAIRS, mixed=mixed).loss.tolist()
    assert losses(True) != losses(False)
    for speed, mixed in ((1.0, False), (2.0, True)):
        monkeypatch.setattr(run, "bfloat16_speed", lambda: speed)
        assert losses("auto") == losses(mixed)
    with pytest.raises(SsahError, match="mixed='yes'"):
        ssah.finetune(tiny_model(), TOKENIZER, PAIRS, mixed="yes")


@pytest.mark.parametrize(
    "unaligned, words",
    [
        ("folder", "a str is no model"),
        (tiny_model(hidden_size=16), "unaligned has no model.layers"),
    ],
)
def test_another_model_before_alignment_is_refused_before_training(unaligned, words):
    pytest.importorskip("peft")
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    scores = [ssah.importance(model, TOKENIZER, pairs(word)) for word in ("No", "Yes")]
    given = model, TOKENIZER, PAIRS, ssah.classify(*scores), *scores
    with pytest.raises(SsahError, match=words) as error:
        ssah.finetune_protected("safe_lora", *given, unaligned=unaligned)
    one_line(error)
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["mine.csv", Path("mine.csv")])
def test_a_file_is_no_source(name):
    with pytest.raises(SsahError, match="'mine.csv' is a file and no source; .*read_csv"):
        ssah.load_pairs(name)


def test_the_home_of_nobody_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ssah.Splits({("harmful", "align"): PAIRS}).save("~nobody-x/splits.json")
    assert (tmp_path / "~nobody-x/splits.json").exists()


def test_refusals_of_harmless_prompts_are_not_counted_by_a_function():
    with pytest.raises(SsahError, match="cannot count refusals"):
        ssah.contrast_report(tiny_model(), TOKENIZER, lambda prompts, said: [False] * len(said))


def test_a_text_and_a_task_need_a_tokenizer():
    with pytest.raises(SsahError, match="is no tokenizer"):
        ssah.text_perplexity(tiny_model(), None, "a b c")
    with pytest.raises(SsahError, match="is no tokenizer"):
        ssah.zero_shot(tiny_model(), None, ["rte"])
