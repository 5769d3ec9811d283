"""Zero-shot tasks on made-up questions, without a network."""

import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from ssah_nb.engine import tasks
from ssah_nb.engine.generation import generate
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.tasks import SIX, STOCK_TASKS, write_tasks, zero_shot

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


def arrow(rows: list[dict], folder: Path) -> Path:
    "A file as the cache has it."
    place = folder / f"{len(list(folder.iterdir()))}"
    Dataset.from_list(rows).save_to_disk(place)
    return next(place.glob("*.arrow"))


def test_zero_shot_knows_the_right_answer(tmp_path, monkeypatch):
    # the same question once with each answer called right: one of these agrees with the model
    def task_file(task):
        key, answers = ANSWERS[task]
        return arrow([QUESTIONS[task] | {key: answer} for answer in answers], tmp_path)

    monkeypatch.setattr(tasks, "local_task_file", task_file)
    table = zero_shot(tiny_model(), tiny_tokenizer(), tasks=list(STOCK_TASKS), limit=None)
    table = table.set_index("task")
    assert (table.accuracy * table.n == 1).all()
    assert table.n.to_dict() == {task: len(answers) for task, (_, answers) in ANSWERS.items()}


def test_zero_shot_refuses_an_answer_that_is_no_choice(tmp_path, monkeypatch):
    def task_file(task):
        key, answers = ANSWERS[task]
        none = {int: -1, str: "7"}[type(answers[0])]
        return arrow([QUESTIONS[task] | {key: answer} for answer in (answers[0], none)], tmp_path)

    monkeypatch.setattr(tasks, "local_task_file", task_file)
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
        return arrow([QUESTIONS[task]] * 5, tmp_path)

    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(tasks, "local_task_file", task_file)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, state = tiny_model().train(), np.random.get_state()[1].copy()
    drawn = random.getstate()
    table = zero_shot(model, tiny_tokenizer(), tasks=list(STOCK_TASKS), limit=3)
    assert random.getstate() == drawn
    assert table.task.tolist() == list(STOCK_TASKS)
    assert set(SIX) < set(STOCK_TASKS)
    assert (table.n == 3).all()
    # three times the same question
    assert table.accuracy.isin([0, 1]).all()
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert table.set_index("task").acc_norm.notna().to_dict() == {
        t: t in ("hellaswag", "arc_challenge", "openbookqa", "piqa", "arc_easy")
        for t in STOCK_TASKS
    }
    assert model.training and (np.random.get_state()[1] == state).all()
    with pytest.raises(SsahError, match="unknown task 'crossword'.*boolq"):
        write_tasks(["crossword"], tmp_path)
