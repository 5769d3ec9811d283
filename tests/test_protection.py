"""The comparison: its cases, that they are kept, its table, and its page on the tiny model."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import one_line
from helpers_protection import CASES, kept, trained
from helpers_ways import scored_units

from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.evaluation import attack_success, over_refusal, perplexity
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.protection import (
    CONDITIONS,
    PREFILLED,
    Asked,
    Case,
    Condition,
    Judging,
    asked_of,
    estimate,
    fingerprint,
    first_words,
    harmful_pairs,
    kept_case,
    load_cases,
    outcomes_of,
    run_cases,
    save_cases,
    training_pairs,
    json_of,
)
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.engine.splits import Splits
from ssah_nb.engine.verdicts import case_table, protection_table
from ssah_nb.freezing import finetune_protected

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZES = dict(evaluate=4, further=3, second=3, benign=4, contrast=2, training=8, poison=4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run whose folders are the test's own."
    (tmp_path / "settings.ini").write_text("")
    monkeypatch.chdir(tmp_path)
    return Run("alone", "protection")


def split():
    return Splits(
        {
            ("harmful", "attribute"): toy_harmful()[:20],
            ("harmful", "evaluate"): toy_harmful()[20:26],
            ("benign", "attack"): toy_benign()[:20],
            ("benign", "evaluate"): toy_benign()[20:26],
        }
    )


def test_no_prompt_is_calibrated_trained_on_and_asked():
    used = toy_harmful()[:10]
    asked = asked_of(split(), used, SIZES)
    calibrated = {pair["prompt"] for pair in used}
    assert len(asked.harmful) == 7 and len(asked.poison) == 4
    assert not calibrated & {*asked.harmful, *asked.poison}
    assert not set(asked.harmful) & set(asked.poison)
    assert SIZES["training"] <= len(asked.training) == 10  # of 20 every second
    assert not {p["prompt"] for p in asked.benign} & {p["prompt"] for p in asked.training}
    few = asked_of(split(), used, SIZES | {"further": 100})
    assert not set(few.harmful) & set(few.poison) and len(few.harmful) == 4 + 6


def test_more_benign_prompts_come_from_the_attribution_split():
    splits, scored = split(), [{"prompt": f"Scored {i}", "response": "yes"} for i in range(9)]
    splits.pairs["benign", "attribute"] = scored
    of_evaluation = len(splits["benign", "evaluate"])
    asked = asked_of(splits, [], SIZES | {"benign": of_evaluation + 2})
    assert asked.benign == splits["benign", "evaluate"] + scored[:2]
    assert asked_of(split(), [], SIZES | {"benign": 100}).benign == splits["benign", "evaluate"]


def test_what_is_kept_is_what_the_measures_give(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    asked = asked_of(split(), toy_harmful()[:10], SIZES)
    judging = Judging(model, math.inf, prefilled=2, max_new_tokens=5, max_response=6)
    found = outcomes_of(model, tokenizer, asked, judging, tmp_path / "said.json")
    rate = attack_success(model, tokenizer, asked.harmful, max_new_tokens=5)
    assert sum(found["harmful"]) / len(asked.harmful) == rate.value
    refused = over_refusal(model, tokenizer, asked.benign, max_new_tokens=5)
    assert sum(found["benign"]) / len(asked.benign) == refused.value
    losses = np.array(found["benign_losses"])
    slow = perplexity(model, tokenizer, asked.benign, max_response=6)
    assert math.exp(losses[:, 0].sum() / losses[:, 1].sum()) == pytest.approx(slow.value, rel=1e-4)
    assert len(found["harmful_margin"]) == len(asked.harmful)
    assert {f"prefilled_{n}" for n in PREFILLED} <= set(found) and len(found["prefilled_5"]) == 2
    words = json.dumps(found)
    assert not any(prompt in words for prompt in asked.harmful)
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said["harmful"]) == len(asked.harmful) + len(asked.second)


def test_first_words_are_the_openings_tokens():
    tokenizer = tiny_tokenizer()
    words = [first_words(tokenizer, n, "Sure, here is") for n in (2, 5)]
    assert words[0] and words[1].startswith(words[0]) and "Sure, here is".startswith(words[1])
    ids = [tokenizer(w, add_special_tokens=False).input_ids for w in words]
    assert [len(row) for row in ids] == [2, 5]


def test_harder_conditions_train_on_what_they_say():
    benign, poison = toy_benign()[:18], toy_harmful()[:4]
    assert training_pairs(CONDITIONS["plain"], benign, []) == (benign, [])
    pairs, extra = training_pairs(Condition(poison=0.1), benign, poison)
    assert len(extra) == 2 and len(extra) / len(pairs + extra) == 0.1
    assert len(training_pairs(Condition(steps=3), benign, poison)[0]) == 54
    with pytest.raises(SsahError, match="only 4 are there") as error:
        training_pairs(Condition(poison=0.5), benign, poison)
    one_line(error)


def test_harmful_pairs_are_made_once_for_each_model_and_lie_under_runs(run):
    prompts, models = ["Open box 1", "Open box 2"], [tiny_model(), tiny_model(seed=1)]
    rows = harmful_pairs(run, prompts, models[0], tiny_tokenizer(), 5)
    assert {row["prompt"] for row in rows} <= set(prompts) and all(row["response"] for row in rows)
    (path,) = run.folder.rglob("harmful_pairs/*.json")
    made = path.stat().st_mtime_ns
    assert rows == harmful_pairs(run, prompts, models[0], tiny_tokenizer(), 5)
    assert path.stat().st_mtime_ns == made
    assert rows != harmful_pairs(run, prompts, models[1], tiny_tokenizer(), 5)
    assert len([*path.parent.iterdir()]) == 2
    with pytest.raises(SsahError, match="unaligned model"):
        harmful_pairs(run, prompts, None, tiny_tokenizer(), 5)


def test_a_comparison_that_was_stopped_gives_the_same_rows(run):
    whole, calls = run_cases(run, CASES, trained, "a", CPU), []
    for path in run.path("protection", "x").parent.glob("*-2.json"):
        path.unlink()

    def stopped(case):
        calls.append(case)
        if case.way == "replay":
            raise KeyboardInterrupt
        return trained(case)

    with pytest.raises(KeyboardInterrupt):
        run_cases(run, CASES, stopped, "a", CPU)
    assert calls and all(case.order == 2 for case in calls)
    assert kept_case(run, CASES[1], "a") and not kept_case(run, CASES[3], "a")
    calls.clear()

    def goes_on(case):
        calls.append(case)
        return trained(case)

    assert run_cases(run, CASES, goes_on, "a", CPU) == json.loads(json.dumps(whole))
    assert calls == [CASES[3]]
    run_cases(run, CASES, goes_on, "b", CPU)  # another setting: all anew
    assert len(calls) == 5
    with pytest.raises(SsahError, match="listed twice"):
        run_cases(run, CASES + CASES[:1], trained, "a", CPU)


def diverged(case):
    "The same, where one way has lost its numbers."
    found = trained(case)
    if case.way == "replay":
        found["done"]["training_perplexity"] = math.inf
        found["outcomes"]["training_losses"] = [[math.inf, 4]] * 10
        found["outcomes"]["harmful_margin"][0] = -math.inf
    return found


def test_a_way_that_diverged_is_kept_and_leaves_the_others_their_rows(run):
    first = run_cases(run, CASES, diverged, "a", CPU)
    again = run_cases(run, CASES, None, "a", CPU)  # nothing is run anew
    assert json.dumps(first) == json.dumps(again)
    assert math.isnan(again[2]["done"]["training_perplexity"])
    start = kept(Case("aligned", 0))
    whole = [found | {"fingerprint": ""} for found in again]
    rows = protection_table(whole, start).set_index("way")
    fine = protection_table([kept(case) for case in CASES], start).set_index("way")
    pd.testing.assert_series_equal(rows.loc["full"], fine.loc["full"])
    assert rows.attack_success["replay"] == fine.attack_success["replay"]
    for column in ("training_ratio", "training_perplexity", "refusal_margin", "margin_change"):
        assert math.isnan(rows[column]["replay"])
    assert rows.perplexity["replay"] == fine.perplexity["replay"]
    assert rows.utility["replay"] in ("not measured", "fails")
    assert case_table(whole).training_perplexity.isna().tolist() == [False, False, True, True]


def test_the_table_can_be_made_of_the_saved_outcomes(tmp_path):
    start = kept(Case("aligned", 0)) | {"case": vars(Case("aligned", 0))}
    cases = [start, *(kept(case) for case in CASES)]
    save_cases(tmp_path / "cases.jsonl.gz", cases)
    first, *others = load_cases(tmp_path / "cases.jsonl.gz")
    pd.testing.assert_frame_equal(
        protection_table(others, first), protection_table(cases[1:], cases[0])
    )


def test_a_file_that_holds_no_cases_is_refused_by_name(tmp_path):
    wrong = {"cut": b"\x1f\x8b", "text": b"{}", "empty": gzip.compress(b"")}
    wrong |= {"other": gzip.compress(b'{"a": 1}\n'), "list": gzip.compress(b"[1]\n")}
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SsahError, match=f"{name}.*save_cases"):
            load_cases(tmp_path / name)
    with pytest.raises(SsahError, match="missing.*save_cases"):
        load_cases(tmp_path / "missing")


def test_the_estimate_counts_what_is_left(run):
    whole = estimate(run, CASES, "a", seconds=120, at_once=2)
    assert whole == "0 of 4 cases are kept; 4 to run, about 4 minutes"

    def slow(case):
        found = trained(case)
        return found | {"done": found["done"] | {"case_seconds": 600.0}}

    run_cases(run, CASES[:1], slow, "a", CPU)
    left = estimate(run, CASES, "a", seconds=120, at_once=1)
    assert left == "1 of 4 cases are kept; 3 to run, about 30 minutes"


def test_a_fingerprint_changes_with_anything_that_counts():
    asked = asked_of(split(), [], SIZES)
    prints = {fingerprint("m", vars(asked), 1), fingerprint("n", vars(asked), 1)}
    prints.add(fingerprint("m", vars(asked), 2))
    prints.add(fingerprint("m", vars(Asked(**vars(asked) | {"poison": []})), 1))
    assert len(prints) == 4 and fingerprint("m", vars(asked), 1) in prints


def test_a_target_of_numpy_can_be_kept():
    tokenizer, units, safety, utility = scored_units()
    pairs = [{"prompt": "Say yes", "response": "yes"}] * 4
    scored = (units, safety, utility)
    options = {"batch_size": 2, "target": np.float64(1e6), "max_epochs": 1}
    _, done = finetune_protected("full", tiny_model(), tokenizer, pairs, *scored, **options)
    assert json.loads(json_of({"done": done}))["done"]["reached"] is True
