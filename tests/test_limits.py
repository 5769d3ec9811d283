"""Numbers and verdicts that are out of range are refused by name, before anything is computed."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import one_line

import ssah_nb
from ssah_nb import SsahError
from ssah_nb.budget import redundant_units
from ssah_nb.engine.adapters import with_adapter
from ssah_nb.engine.agreement import kappa
from ssah_nb.engine.evaluation import coherence_threshold
from ssah_nb.engine.inputs import as_verdicts
from ssah_nb.engine.intervals import bootstrap_mean, wilson
from ssah_nb.engine.matched import finetune_until
from ssah_nb.engine.paired import mcnemar
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.paired import paired_difference, paired_mean
from ssah_nb.engine.run import set_seed
from ssah_nb.engine.splits import SIZES
from ssah_nb.engine.training import training_perplexity
from ssah_nb.units import UnitMask

PAIRS = [{"prompt": "Add 2 and 3.", "response": "5."}, {"prompt": "Hi", "response": "Hello"}]
ROWS = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No."}]
NAN, INFINITE = float("nan"), float("inf")
COUNT = (0, -1, 1.5, True, "4", None)  # no counts
LIMIT = (0, -5, 1.5, True, "4")  # no limits; None is one
SEED = (-1, 1.5, "0", None, True, 2**32)
AMOUNT = (0, -1e-4, NAN, INFINITE, "1e-4", None)
SHARE = (-0.1, 1.5, NAN, "0.5", None)


def on(function, *given):
    "The function with a model and a tokenizer that must not be touched."
    return lambda **options: function(None, None, *given, **options)


CALLS = {  # function -> (call, what it must refuse)
    "generate": (on(ssah_nb.generate, PAIRS), {"max_new_tokens": COUNT, "batch_size": COUNT}),
    "attack_success": (
        on(ssah_nb.attack_success, PAIRS),
        {"window": LIMIT, "max_new_tokens": COUNT, "batch_size": COUNT},
    ),
    "over_refusal": (on(ssah_nb.over_refusal, PAIRS), {"window": LIMIT, "batch_size": COUNT}),
    "safety_report": (
        on(ssah_nb.safety_report, PAIRS, PAIRS),
        {"window": LIMIT, "max_response": LIMIT, "max_new_tokens": COUNT, "batch_size": COUNT},
    ),
    "perplexity": (on(ssah_nb.perplexity, PAIRS), {"max_response": LIMIT, "seed": SEED}),
    "text_perplexity": (
        on(ssah_nb.text_perplexity, "a b c"),
        {"window": (*COUNT, 1), "limit": LIMIT, "seed": SEED},
    ),
    "coherence_threshold": (
        on(coherence_threshold, PAIRS),
        {"quantile": SHARE, "max_response": LIMIT},
    ),
    "coherence": (
        lambda **o: ssah_nb.coherence(None, None, PAIRS, ["a", "b"], **{"max_perplexity": 9} | o),
        {"max_repetition": SHARE, "max_perplexity": (0, -1, NAN, "9", None)},
    ),
    "importance": (on(ssah_nb.importance, PAIRS), {"max_tokens": COUNT, "max_response": LIMIT}),
    "calibration_sets": (
        on(ssah_nb.attribution.calibration_sets, {}),
        {"pairs_per_set": COUNT, "max_new_tokens": COUNT},
    ),
    "probe": (on(ssah_nb.probe, PAIRS), {"steps": ((), (0,), (2, -1), (1.5,), 2)}),
    "finetune": (
        on(ssah_nb.finetune, PAIRS),
        {
            "batch_size": COUNT,
            "epochs": COUNT,
            "max_tokens": COUNT,
            "lr": AMOUNT,
            "max_response": LIMIT,
            "seed": SEED,
        },
    ),
    "training_perplexity": (on(training_perplexity, PAIRS), {"sample": COUNT}),
    "finetune_dpo": (
        on(ssah_nb.finetune_dpo, ROWS),
        {
            "batch_size": COUNT,
            "epochs": COUNT,
            "max_tokens": COUNT,
            "lr": AMOUNT,
            "beta": AMOUNT,
            "sft_weight": (-1, NAN, "1"),
            "max_response": LIMIT,
            "seed": SEED,
        },
    ),
    "reference_margins": (
        on(ssah_nb.reference_margins, ROWS),
        {"max_tokens": COUNT, "max_response": LIMIT},
    ),
    "finetune_protected": (
        lambda **o: ssah_nb.finetune_protected("full", None, None, PAIRS, None, None, None, **o),
        {"lr": AMOUNT, "lora_lr_factor": AMOUNT, "seed": SEED},
    ),
    "finetune_until": (
        on(finetune_until, PAIRS),
        {"max_epochs": (*AMOUNT, 0.5), "target": (0, -1, NAN, "2"), "ema": (*SHARE, 1, 1.0)},
    ),
    "preferences": (lambda **o: ssah_nb.preferences([], [], PAIRS, **o), {"seed": SEED}),
    "alignment_pairs": (lambda **o: ssah_nb.alignment_pairs([], PAIRS, **o), {"seed": SEED}),
    "make_splits": (
        lambda **o: ssah_nb.make_splits(PAIRS, **o),
        {"seed": SEED, "max_words": COUNT, "sizes": ({"benign_align": True},)},
    ),
    "classify": (
        lambda **o: ssah_nb.classify("safety", None, **o),
        {"scu": SHARE, "ucu": SHARE, "ru": SHARE},
    ),
    "redundant_units": (lambda **o: redundant_units(None, **o), {"share": SHARE}),
    "search_scu": (
        lambda **o: ssah_nb.search_scu(None, None, **{"ratios": [0.1], "measure": print} | o),
        {
            "ratios": (0.01, [], [2], [0.1, NAN], ["0.1"], None),
            "max_perplexity_ratio": AMOUNT,
            "measure": (None, 3),
        },
    ),
    "zero_shot": (
        on(ssah_nb.zero_shot),
        {
            "tasks": ("boolq", [], ["rte", "rte"], ["mmlu"]),
            "limit": LIMIT,
            "batch_size": LIMIT,
        },
    ),
}
MASK = UnitMask(torch.tensor([[True, False]]), torch.tensor([[True]]))
CALLS |= {  # which draw at random: on their own seed alone
    "random_like": (lambda **o: MASK.random_like(**o), {"seed": SEED}),
    "bootstrap_mean": (lambda **o: bootstrap_mean([1.0], **o), {"seed": SEED}),
    "paired_difference": (lambda **o: paired_difference([1], [2], **o), {"seed": SEED}),
    "paired_mean": (lambda **o: paired_mean([1, 2], **o), {"seed": SEED}),
    "kappa": (lambda **o: kappa([True], [True], **o), {"seed": SEED}),
    "refusal_margin": (on(ssah_nb.refusal_margin, PAIRS), {"seed": SEED}),
    "contrast_report": (on(ssah_nb.contrast_report), {"seed": SEED, "window": LIMIT}),
    "Anchor": (on(ssah_nb.Anchor, PAIRS), {"seed": SEED}),
    "with_adapter": (lambda **o: with_adapter(None, options={}, **o), {"seed": SEED}),
    "tiny_model": (tiny_model, {"seed": SEED}),
    "set_seed": (set_seed, {"seed": SEED}),
}
NAMES = {"steps": "steps", "ratios": "scu|ratios", "sizes": "benign_align", "tasks": "task"}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_out_of_range_is_refused_by_its_name(name):
    call, wrong = CALLS[name]
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(SsahError, match=NAMES.get(option, option)) as error:
                call(**{option: value})
                pytest.fail(f"{name} took {option}={value!r}")
            one_line(error)


def test_numbers_of_numpy_are_numbers():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options = {"lr": np.float32(1e-4), "epochs": np.int64(1), "batch_size": np.int32(2)}
    ours = ssah_nb.finetune(copy.deepcopy(model), tokenizer, PAIRS, **options)
    wanted = ssah_nb.finetune(copy.deepcopy(model), tokenizer, PAIRS, lr=1e-4, batch_size=2)
    assert ours.loss.tolist() == wanted.loss.tolist()


SEEDED = {  # what is drawn with a seed
    "tiny_model": lambda seed: tiny_model(seed=seed).lm_head.weight.tolist(),
    "random_like": lambda seed: (MASK & MASK).random_like(seed).mlp.tolist(),
    "finetune": lambda seed: ssah_nb.finetune(
        tiny_model(), tiny_tokenizer(), PAIRS * 2, batch_size=1, seed=seed
    ).loss.tolist(),
    "finetune_dpo": lambda seed: ssah_nb.finetune_dpo(
        tiny_model(), tiny_tokenizer(), ROWS, seed=seed
    ).loss.tolist(),
    "preferences": lambda seed: ssah_nb.preferences([], [], PAIRS, seed),
    "alignment_pairs": lambda seed: ssah_nb.alignment_pairs(PAIRS, [], seed),
    "make_splits": lambda seed: (
        ssah_nb.make_splits(
            benign=PAIRS * 3, seed=seed, sizes=dict.fromkeys(SIZES, 0) | {"benign_attack": 2}
        ).pairs
    ),
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_of_numpy_is_a_seed(name):
    assert SEEDED[name](np.int64(3)) == SEEDED[name](3)


GOOD_VERDICTS = {
    "list": [True, False, True],
    "generator": (word in ("yes", "ja") for word in ("yes", "no", "ja")),
    "array": np.array([True, False, True]),
    "booleans of numpy": [np.True_, np.False_, np.True_],
    "tensor": torch.tensor([True, False, True]),
    "Series": pd.Series([True, False, True]),
}
BAD_VERDICTS = {
    "too few": ([True], "1 verdicts on 3 responses"),
    "too many": ([True] * 4, "4 verdicts on 3 responses"),
    "a word": ([True, "unsafe", True], "verdict 1 is 'unsafe', no boolean"),
    "a score": (np.array([1.0, 0.7, 0.0]), "verdict 0 is 1.0, no boolean"),
    "nothing": ([True, True, None], "verdict 2 is None"),
    "NaN": (pd.Series([True, NAN, False]), "verdict 1 is nan"),
    "one word": ("yes", "one str was given where a list of verdicts"),
    "a table": ({"unsafe": [True, True, True]}, "no boolean"),
    "no list": (None, "list of verdicts"),
    "one number": (torch.tensor(1.0), "list of verdicts"),
}


@pytest.mark.parametrize("form", GOOD_VERDICTS)
def test_verdicts_are_booleans(form):
    rate = ssah_nb.attack_success(
        None, None, ["a"] * 3, lambda p, r: GOOD_VERDICTS[form], responses=["b"] * 3
    )
    assert rate == wilson(2, 3)


def test_what_is_no_verdict_is_refused():
    for what, (given, words) in BAD_VERDICTS.items():
        with pytest.raises(SsahError, match=words) as error:
            ssah_nb.attack_success(None, None, ["a"] * 3, lambda p, r: given, responses=["b"] * 3)
            pytest.fail(f"{what} passed for verdicts")
        one_line(error)
    assert all(type(verdict) is bool for verdict in as_verdicts(np.array([True, False]), 2))


@pytest.mark.parametrize(
    "judge", ["llama", None, 7, [], ["Sorry", ""], ["Sorry", None], iter("ab")]
)
def test_what_is_no_judge_is_refused_before_a_model_is_asked(judge):
    with pytest.raises(SsahError, match="judge") as error:
        ssah_nb.attack_success(None, None, ["a"], judge)
    one_line(error)
    with pytest.raises(SsahError, match="judge"):
        ssah_nb.over_refusal(None, None, ["a"], judge)
    with pytest.raises(SsahError, match="judge"):
        ssah_nb.safety_report(None, None, ["a"], PAIRS, judge=judge)


BAD_RESPONSES = {
    "too few": (["a"], "2 prompts but 1 responses"),
    "one text": ("no", "one str was given where a list of responses"),
    "a number": (["a", 7], "row 1 has a int as its response"),
    "nothing": (["a", None], "row 1 has no response"),
    "no list": (7, "list of responses"),
}


def test_responses_are_texts_one_for_each_prompt():
    for what, (given, words) in BAD_RESPONSES.items():
        for function in (ssah_nb.attack_success, ssah_nb.over_refusal):
            with pytest.raises(SsahError, match=words) as error:
                function(None, None, ["Hi", "Ho"], responses=given)
                pytest.fail(f"{what} passed for responses")
            one_line(error)
        with pytest.raises(SsahError, match=words):
            ssah_nb.coherence(None, None, ["Hi", "Ho"], given, 9.0)
        with pytest.raises(SsahError, match=words):
            ssah_nb.preferences(PAIRS, given, [])
    for given in (["I cannot", ""], pd.Series(["I cannot", ""]), iter(["I cannot", ""])):
        rate = ssah_nb.over_refusal(None, None, ["Hi", "Ho"], responses=given)
        assert rate == wilson(1, 2)


def test_outcomes_pair_up():
    with pytest.raises(SsahError, match="3 and 2 outcomes do not pair up"):
        mcnemar([True] * 3, [False] * 2)


def test_rates_and_means_need_outcomes_that_are_numbers():
    for successes in (-1, 4):
        with pytest.raises(SsahError, match=f"{successes} of 3 outcomes"):
            wilson(successes, 3)
    for totals, counts, words in (
        ([1.0, NAN], None, "item 1 is nan"),
        ([INFINITE, 1.0], None, "item 0 is inf"),
        ([1.0, 2.0], [1, 0], "above 0"),
        ([1.0, 2.0], [1], "1 counts for 2 items"),
    ):
        with pytest.raises(SsahError, match=words) as error:
            bootstrap_mean(totals, counts)
        one_line(error)
