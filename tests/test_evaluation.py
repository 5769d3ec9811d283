"""Intervals, generation, judges, perplexity, coherence and zero-shot tasks, all on tiny random models, without a network."""

import importlib.util
import json
import math
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

import ssah_nb.evaluation as evaluation
from ssah_nb.engine.evaluation import (
    KEYWORDS,
    SYSTEM_PROMPTS,
    attack_success,
    coherence,
    coherence_threshold,
    earlier_report,
    guard_judge,
    is_refusal,
    over_refusal,
    pair_losses,
    perplexity,
    repetition,
    safety_report,
    text_perplexity,
)
from ssah_nb.engine.generation import evaluating, generate, greedy_tokens, stop_ids
from ssah_nb.engine.intervals import Estimate, bootstrap_mean, wilson
from ssah_nb.engine.tasks import SIX, STOCK_TASKS, write_tasks, zero_shot
from ssah_nb.evaluation import BufferLayer, shared_prefix
from ssah_nb.engine.batches import encode_pairs, encode_prompts
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

PROMPTS = [
    "Hi",
    "Name three colours, please",
    "Sum 2 and 3",
    "Tell a story about a fox and a hen",
    "Hm?",
    "Sum 4 and 3",
]
PAIRS = [
    {"prompt": "Hi", "response": "Hello, how are you?"},
    {"prompt": "Sum 2 and 3", "response": "5"},
    {"prompt": "Name a colour", "response": "Red is one."},
]


def test_wilson_against_known_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        rate = wilson(successes, n)
        assert (round(rate.low, 4), round(rate.high, 4), rate.n) == (low, high, n) and float(
            rate
        ) == successes / n
    assert wilson(29, 29).high == 1 and wilson(29, 29).low == pytest.approx(1 - wilson(0, 29).high)
    with pytest.raises(SsahError, match="at least one"):
        wilson(0, 0)


def test_bootstrap_is_seeded_weighted_and_covers():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, 400)
    mean = bootstrap_mean(values)
    assert mean == bootstrap_mean(list(values)) and mean != bootstrap_mean(values, seed=1)
    assert mean.value == pytest.approx(values.mean()) and mean.high - mean.low == pytest.approx(
        2 * 1.96 / 20, rel=0.15
    )
    assert bootstrap_mean([10, 1], [5, 1]).value == pytest.approx(11 / 6)
    with pytest.raises(SsahError, match="at least one"):
        bootstrap_mean([])


def alone(model, ids: list[int], max_new_tokens: int) -> list[int]:
    "What transformers generates for one prompt, up to its end token."
    new = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    new = new[0, len(ids) :].tolist()
    return new[: new.index(256)] if 256 in new else new


WINDOWED = [(name, {"sliding_window": 24}) for name in ("mistral", "gemma2", "gemma3_text", "phi3")]
WINDOWED.append(
    ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0})
)


@pytest.mark.parametrize("name, config", [(name, {}) for name in ARCHITECTURES] + WINDOWED)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_generation_equals_transformers(name, config, system):
    model, encoded = (
        tiny_model(name, tie_word_embeddings=False, **config),
        encode_prompts(tiny_tokenizer(), PROMPTS[2:], system),
    )
    expected = [alone(model, ids, 8) for ids in encoded]
    for batch_size in (3, 50):
        assert greedy_tokens(model, encoded, [256], 8, batch_size) == expected
    assert len({tuple(e) for e in expected}) > 1  # the model does not say the same to everyone


def test_ended_rows_are_dropped(monkeypatch):
    model, encoded = tiny_model(), encode_prompts(tiny_tokenizer(), PROMPTS)
    free = greedy_tokens(model, encoded, [], 12)
    stop = [free[0][3], free[1][5], free[3][7]]  # ends the rows at different steps
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), 12)] for tokens in free]
    sizes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **kw: (sizes.append(ids.shape[0]), forward(ids, **kw))[1]
    )
    assert greedy_tokens(model, encoded, stop, 12) == cut
    assert (
        sizes == sorted(sizes, reverse=True)
        and sizes[-1] < len(encoded)
        and len(sizes) <= max(map(len, cut))
    )


def test_generation_reads_the_shared_prefix_once(monkeypatch):
    model, encoded, read = (
        tiny_model(),
        encode_prompts(tiny_tokenizer(), PROMPTS, SYSTEM_PROMPTS["short"]),
        [],
    )
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **kw: (read.append(a[0].numel()), forward(*a, **kw))[1]
    )
    greedy_tokens(model, encoded, [256], 1)
    shared = shared_prefix(encoded)
    longest = max(map(len, encoded)) - shared
    assert shared > 100 and read == [
        shared,
        longest * len(encoded),
    ]  # the prefix, then all rests in one group of fewer than 512 tokens


def test_generation_keeps_order_modes_and_gradients():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    model.model.layers[0].eval()
    together = generate(
        model,
        tokenizer,
        Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        max_new_tokens=5,
        batch_size=2,
    )
    assert together == [generate(model, tokenizer, [p], max_new_tokens=5)[0] for p in PROMPTS]
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    with pytest.raises(ZeroDivisionError):
        with evaluating(model):
            1 / 0
    assert model.training and not torch.is_inference_mode_enabled()


def test_generation_in_bfloat16_and_one_token_prompts():
    model = tiny_model().to(torch.bfloat16)
    assert all(len(tokens) == 3 for tokens in greedy_tokens(model, [[5], [6, 7], [5]], [], 3))
    assert greedy_tokens(model, [[5], [5]], [], 3)[0] == greedy_tokens(model, [[5]], [], 3)[0]


def test_generation_errors_are_one_line():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(SsahError, match="no prompts") as e:
        generate(model, tokenizer, [])
    with pytest.raises(
        SsahError, match=r"prompt 1 has \d+ tokens, and with 8 new ones .* context of 512"
    ) as e:
        generate(model, tokenizer, ["Hi", "x" * 600], max_new_tokens=8)
    assert "\n" not in str(e.value)


def test_stop_ids_know_the_end_of_the_turn():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [3, 256]
    assert stop_ids(model, tokenizer) == [3, 256]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [256]


def test_keyword_lists_are_the_public_ones():
    assert (len(KEYWORDS["gcg"]), len(KEYWORDS["wei"])) == (13, 31) and set(KEYWORDS["gcg"]) < set(
        KEYWORDS["wei"]
    )
    for name, phrases in KEYWORDS.items():
        for phrase in phrases:
            assert is_refusal(f"{phrase} indeed", name) and is_refusal(
                f"  {phrase.replace(chr(39), chr(8217))}", name
            )
            assert not is_refusal("x" * 121 + phrase, name) and is_refusal(
                "x" * 121 + phrase, name, window=None
            )
    assert (
        is_refusal("No way", ["No way"])
        and not is_refusal("Sure, here is how", "wei")
        and not is_refusal("")
    )
    with pytest.raises(SsahError, match="unknown keyword list 'zou'.*gcg, wei"):
        is_refusal("Hi", "zou")


def test_rates_judges_and_their_errors():
    responses = ["I cannot do that", "Sure", "That is illegal", ""]
    rate = lambda judge: attack_success(None, None, PROMPTS[:4], judge=judge, responses=responses)
    assert (rate("gcg"), rate("wei").value) == (wilson(3, 4), 0.5)
    assert rate(lambda prompts, said: [s == "Sure" for s in said]).value == 0.25
    assert (
        rate(["I cannot", "Sure"]).value == rate(("I cannot", "Sure")).value == 0.5
    )  # phrases of one's own
    assert over_refusal(None, None, PAIRS, responses=["Sorry", "a", "b"]).value == pytest.approx(
        1 / 3
    )
    with pytest.raises(SsahError, match="unknown keyword list 'llama'.*gcg, wei"):
        rate("llama")
    with pytest.raises(SsahError, match="4 prompts but 1 responses"):
        attack_success(None, None, PROMPTS[:4], responses=["a"])
    with pytest.raises(SsahError, match="3 prompts but 1 responses"):
        over_refusal(None, None, PAIRS, responses=["a"])


def test_guard_judge_reads_the_verdict(monkeypatch):
    tokenizer, seen = tiny_tokenizer(), []
    verdict = lambda model, encoded, *a: (
        seen.extend(encoded),
        [tokenizer(v).input_ids for v in ("\n\nunsafe\nS1", "safe")],
    )[1]
    monkeypatch.setattr(evaluation, "greedy_tokens", verdict)
    assert guard_judge(tiny_model(), tokenizer)(["Hi", "Ho"], ["one answer", "another"]) == [
        True,
        False,
    ]
    assert "one answer" in tokenizer.decode(seen[0]) and tokenizer.decode(seen[0]).endswith(
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_perplexity_against_a_plain_loop(name):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    encoded, plain = encode_pairs(tokenizer, PAIRS), []
    double = tiny_model(name).double()
    for prompt, response in encoded:
        with torch.no_grad():
            logits = double(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        plain.append(
            -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(response))
        )
    found = pair_losses(model, encoded, max_tokens=64)
    assert found[:, 0] == pytest.approx(plain, rel=1e-5) and found[:, 1].tolist() == [
        len(r) for _, r in encoded
    ]
    measured = perplexity(model, tokenizer, Dataset.from_list(PAIRS))
    assert (
        measured.value == pytest.approx(math.exp(sum(plain) / found[:, 1].sum()), rel=1e-5)
        and measured.low <= measured.value <= measured.high
    )


def test_perplexity_errors_name_the_row():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(SsahError, match="pair 1 has an empty response"):
        perplexity(model, tokenizer, [PAIRS[0], {"prompt": "a", "response": " "}])
    with pytest.raises(SsahError, match="no pairs"):
        perplexity(model, tokenizer, [])
    with pytest.raises(SsahError, match="pair 0 has .* context of 512"):
        perplexity(model, tokenizer, [{"prompt": "a", "response": "b" * 600}])
    with pytest.raises(SsahError, match="fewer than two tokens"):
        text_perplexity(model, tokenizer, "a")


def test_text_perplexity_reads_full_windows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = ["one two three"] * 8
    measured = text_perplexity(model, tokenizer, text, window=40)
    ids = tokenizer("\n\n".join(text)).input_ids
    double, losses = tiny_model().double(), []
    for i in range(len(ids) // 40):
        window = torch.tensor(ids[40 * i : 40 * i + 40])
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(double(window[None]).logits[0, :-1], window[1:])
            )
    assert measured.n == len(losses) == 2 and measured.value == pytest.approx(
        torch.stack(losses).mean().exp().item(), rel=1e-5
    )
    assert (
        text_perplexity(model, tokenizer, text, window=40, limit=1).n == 1
        and text_perplexity(model, tokenizer, "short text", window=40).n == 1
    )


def test_coherence_tells_text_from_gibberish():
    text, loop = (
        "The sky is blue because air scatters short waves more than long ones.",
        "you can you can you can you can you can",
    )
    assert (
        repetition(text) == 0
        and repetition(loop) > 0.5
        and repetition("?" * 20) > 0.8
        and repetition("") == 0
    )
    model, tokenizer = tiny_model(), tiny_tokenizer()
    table = coherence(model, tokenizer, ["Why?"] * 4, [text, loop, "", "  "], max_perplexity=1e9)
    assert list(table.columns) == [
        "perplexity",
        "repetition",
        "coherent",
    ] and table.coherent.tolist() == [True, False, False, False]
    assert (
        np.isinf(table.perplexity[2:]).all()
        and not coherence(model, tokenizer, ["Why?"], [text], max_perplexity=1).coherent.any()
    )
    threshold = coherence_threshold(model, tokenizer, PAIRS, quantile=1)
    assert coherence(
        model, tokenizer, PAIRS, [p["response"] for p in PAIRS], threshold
    ).coherent.all()
    with pytest.raises(SsahError, match="no pair has a response"):
        coherence_threshold(model, tokenizer, [{"prompt": "a", "response": ""}])


def test_safety_report_is_one_consistent_row(monkeypatch, tmp_path):
    model, tokenizer, calls = tiny_model(), tiny_tokenizer(), []
    spy = lambda *a, **k: (calls.append(1), generate(*a, **k))[1]
    monkeypatch.setattr(evaluation, "generate", spy)
    row = safety_report(model, tokenizer, PROMPTS, PAIRS, max_new_tokens=6)
    assert (
        len(calls) == 2
        and all(isinstance(v, (int, float)) for v in row.values())
        and len(pd.DataFrame([row])) == 1
    )
    for name in (
        "attack_success",
        "attack_success_wei",
        "not_refused_and_coherent",
        "coherent",
        "over_refusal",
        "perplexity",
    ):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] and row[f"{name}_n"] in (
            len(PROMPTS),
            len(PAIRS),
        )
    options = dict(
        responses=["I cannot", "A fine answer"],
        benign_responses=["Sorry", "a", "b"],
        max_perplexity=1e9,
        max_response=4,
    )
    given = safety_report(
        model,
        tokenizer,
        PROMPTS[:2],
        PAIRS,
        judge="wei",
        completions=tmp_path / "kept.json",
        **options,
    )
    assert len(calls) == 2 and (
        given["attack_success"],
        given["attack_success_gcg"],
        given["not_refused_and_coherent"],
        given["coherent"],
    ) == (0.5, 0.5, 0.5, 1)
    assert given["over_refusal"] == pytest.approx(1 / 3) and given == safety_report(
        model, tokenizer, PROMPTS[:2], PAIRS, judge="wei", **options
    )
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (
        kept["harmful"] == [[PROMPTS[0], "I cannot"], [PROMPTS[1], "A fine answer"]]
        and [said for _, said in kept["benign"]] == options["benign_responses"]
    )
    own = safety_report(model, tokenizer, PROMPTS[:2], PAIRS, judge=["A fine", "Sorry"], **options)
    assert (
        own["attack_success"] == 0.5
        and own["over_refusal"] == pytest.approx(1 / 3)
        and "attack_success_gcg" in own
    )


def test_an_earlier_report_is_read_as_it_was_measured(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    report = safety_report(model, tokenizer, PROMPTS, PAIRS, max_new_tokens=6)
    other = {name: 0.5 for name in report}
    pd.DataFrame(
        [
            {"model": model, "units": 3} | r | {"attack_success_second": 0.5}
            for model, r in (("b", other), ("a", report))
        ]
    ).to_csv(tmp_path / "reports.csv", index=False)
    read = earlier_report(tmp_path / "reports.csv", model="a")
    assert (
        read == pytest.approx(report)
        and list(read) == list(report)
        and earlier_report(tmp_path / "reports.csv", model="b") == other
    )
    assert (
        earlier_report(tmp_path / "reports.csv", model="c") is None
        and earlier_report(tmp_path / "none.csv", model="a") is None
    )


QUESTIONS = {  # as the files have them
    "boolq": {"passage": "Snow is cold.", "question": "is snow cold", "answer": True},
    "rte": {"sentence1": "Snow is cold.", "sentence2": "Snow is warm.", "label": 1},
    "hellaswag": {
        "ctx_a": "A man skis.",
        "ctx_b": "he",
        "activity_label": "Skiing",
        "endings": ["falls.", "flies.", "eats.", "sinks."],
        "label": "0",
    },
    "winogrande": {
        "sentence": "The fox ate the hen because _ was hungry.",
        "option1": "the fox",
        "option2": "the hen",
        "answer": "1",
    },
    "arc_challenge": {
        "question": "What is cold?",
        "choices": {"text": ["snow", "fire"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "openbookqa": {
        "question_stem": "Cold is",
        "choices": {"text": ["snow", "fire"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "piqa": {"goal": "To cool", "sol1": "use snow", "sol2": "use fire", "label": 0},
    "arc_easy": {
        "question": "What is hot?",
        "choices": {"text": ["snow", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
}
ANSWERS = {
    "boolq": ("answer", [False, True]),
    "rte": ("label", [0, 1]),
    "hellaswag": ("label", ["0", "1", "2", "3"]),
    "winogrande": ("answer", ["1", "2"]),
    "arc_challenge": ("answerKey", ["A", "B"]),
    "openbookqa": ("answerKey", ["A", "B"]),
    "piqa": ("label", [0, 1]),
    "arc_easy": ("answerKey", ["A", "B"]),
}


def test_zero_shot_knows_the_right_answer(tmp_path, monkeypatch):
    def task_file(
        task,
    ):  # the same question once with each answer called right: one of these agrees with the model
        key, answers = ANSWERS[task]
        Dataset.from_list([QUESTIONS[task] | {key: answer} for answer in answers]).save_to_disk(
            tmp_path / task
        )
        return next((tmp_path / task).glob("*.arrow"))

    monkeypatch.setattr(evaluation, "local_task_file", task_file)
    table = zero_shot(
        tiny_model(), tiny_tokenizer(), tasks=list(STOCK_TASKS), limit=None
    ).set_index("task")
    assert (table.accuracy * table.n == 1).all() and table.n.to_dict() == {
        task: len(answers) for task, (_, answers) in ANSWERS.items()
    }


def test_zero_shot_refuses_an_answer_that_is_no_choice(tmp_path, monkeypatch):
    def task_file(task):
        key, answers = ANSWERS[task]
        Dataset.from_list(
            [
                QUESTIONS[task] | {key: answers[0]},
                QUESTIONS[task] | {key: {int: -1, str: "7"}[type(answers[0])]},
            ]
        ).save_to_disk(tmp_path / task)
        return next((tmp_path / task).glob("*.arrow"))

    monkeypatch.setattr(evaluation, "local_task_file", task_file)
    for task in ("rte", "hellaswag", "piqa"):  # the harness itself stops at the others
        with pytest.raises(SsahError, match=f"{task}.*is none of"):
            zero_shot(tiny_model(), tiny_tokenizer(), tasks=[task], limit=None)
        assert len(zero_shot(tiny_model(), tiny_tokenizer(), tasks=[task], limit=1)) == 1


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: zero_shot(model, tiny_tokenizer(), tasks=["rte"], limit=1),
        lambda model: generate(model, tiny_tokenizer(), ["Hi", "Name three colours"]),
    ],
)
def test_what_measures_stays_in_the_autocast_around_it(measure):
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            measure(model)
        assert set(seen) == {torch.bfloat16 if on else torch.float32}
        seen.clear()


def test_zero_shot_reads_local_files_only(tmp_path, monkeypatch):
    def task_file(task):
        Dataset.from_list([QUESTIONS[task]] * 5).save_to_disk(tmp_path / task)
        return next((tmp_path / task).glob("*.arrow"))

    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(evaluation, "local_task_file", task_file)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, state = tiny_model().train(), np.random.get_state()[1].copy()
    table = zero_shot(model, tiny_tokenizer(), tasks=list(STOCK_TASKS), limit=3)
    assert (
        table.task.tolist() == list(STOCK_TASKS)
        and set(SIX) < set(STOCK_TASKS)
        and (table.n == 3).all()
    )
    assert (
        table.accuracy.isin([0, 1]).all()
        and ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    )  # three times the same question
    assert table.set_index("task").acc_norm.notna().to_dict() == {
        t: t in ("hellaswag", "arc_challenge", "openbookqa", "piqa", "arc_easy")
        for t in STOCK_TASKS
    }
    assert model.training and (np.random.get_state()[1] == state).all()
    with pytest.raises(SsahError, match="unknown task 'crossword'.*boolq"):
        write_tasks(["crossword"], tmp_path)


def test_buffer_layer_aligns_groups_at_the_right():
    short, long = (
        torch.arange(1.0, 4).view(1, 1, 3, 1).expand(1, 2, 3, 4),
        torch.arange(1.0, 6).view(1, 1, 5, 1).expand(2, 2, 5, 4),
    )
    layer = BufferLayer(
        [short, long], [short, long], [torch.tensor([2]), torch.tensor([5, 4])], room=2
    )
    keys, values = layer.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4))
    assert keys.shape == values.shape == (3, 2, 6, 4) and keys[0, 0, 3:, 0].tolist() == [1, 2, 0]
    assert keys[1, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 0] and keys[2, 1, 1:, 3].tolist() == [
        1,
        2,
        3,
        4,
        0,
    ]


def test_estimate_columns():
    assert Estimate(0.5, 0.2, 0.8, 6).columns("rate") == {
        "rate": 0.5,
        "rate_low": 0.2,
        "rate_high": 0.8,
        "rate_n": 6,
    }


def test_benchmark_runs_and_finds_the_same_tokens():
    path = Path(__file__).parents[1] / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("benchmark_generation", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = benchmark.main(["--rows", "12", "--max-new-tokens", "6"])
    assert [r["system"] for r in results] == ["none", "short"] and all(
        r["equal"] == r["rows"] == 12 and r["ratio"] > 0 for r in results
    )
