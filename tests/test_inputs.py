"""What goes in: every container gives the same value, and what is no input is refused by name."""

import copy
import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import one_line

import ssah_nb
from ssah_nb import Importance, SsahError, UnitMap, make_splits
from ssah_nb.engine.data import toy_harmful
from ssah_nb.engine.evaluation import coherence_threshold
from ssah_nb.engine.inputs import as_pairs, as_prompts
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.splits import TOY_SIZES
from ssah_nb.engine.training import training_perplexity

PAIRS = [
    {"prompt": "What is 2 plus 3?", "response": "5."},
    {"prompt": "Name the colour of box 4.", "response": "Box 4 is red."},
]
PROMPTS = [pair["prompt"] for pair in PAIRS]
NAN = float("nan")
SHORT = {"max_new_tokens": 2}


def talk(pair: dict, speaker: str, words: str, names: tuple[str, str]) -> list[dict]:
    return [{speaker: n, words: t} for n, t in zip(names, pair.values())]


def chats() -> list[dict]:
    return [{"messages": talk(p, "role", "content", ("user", "assistant"))} for p in PAIRS]


def shared() -> list[dict]:
    return [{"conversations": talk(p, "from", "value", ("human", "gpt"))} for p in PAIRS]


def containers(rows: list[dict]) -> dict:
    "The same rows in everything that holds rows."
    data, columns = Dataset.from_list(rows), {key: [r[key] for r in rows] for key in rows[0]}
    return {
        "list": rows,
        "tuple": tuple(rows),
        "generator": (row for row in rows),
        "columns": columns,
        "columns of arrays": {key: np.array(part, object) for key, part in columns.items()},
        "Dataset": data,
        "slice of a Dataset": data[:],
        "Dataset as pandas": data.with_format("pandas")[:],
        "IterableDataset": data.to_iterable_dataset(),
        "DataFrame": pd.DataFrame(rows),
        "Series of rows": pd.Series(rows),
        "arrow": pa.Table.from_pylist(rows),
    }


def good_pairs() -> dict:
    "The pairs of PAIRS, in every form."
    wide = [row | {"id": i, "tags": ["x"]} for i, row in enumerate(PAIRS)]
    forms = {"pairs": PAIRS, "wide": wide, "chats": chats(), "ShareGPT": shared()}
    return {f"{c}, {f}": x for f, rows in forms.items() for c, x in containers(rows).items()}


def good_prompts() -> dict:
    "The prompts of PAIRS, in every form."
    column = Dataset.from_list(PAIRS)["prompt"]
    plain = {"list": PROMPTS, "tuple": tuple(PROMPTS), "generator": (p for p in PROMPTS)}
    plain |= {"Series": pd.Series(PROMPTS), "array": np.array(PROMPTS), "Column": column}
    plain |= {"prompts alone": {"prompt": PROMPTS}, "arrow": pa.array(PROMPTS)}
    return plain | good_pairs()


@functools.cache
def scored() -> tuple[Importance, UnitMap]:
    sets = {"safety": PAIRS, "utility": [{"prompt": "Count to 4.", "response": "1 2 3 4"}] * 2}
    both = ssah_nb.importance(tiny_model(), tiny_tokenizer(), sets)
    return both["safety"], ssah_nb.classify(**both, scu=0.05)


def trained(model, tokenizer, pairs) -> list[float]:
    return ssah_nb.finetune(copy.deepcopy(model), tokenizer, pairs).loss.tolist()


def protected(model, tokenizer, pairs) -> float:
    importance, units = scored()
    options = {"units": units, "safety": importance, "utility": importance}
    student = copy.deepcopy(model) if model else None
    student, _ = ssah_nb.finetune_protected("scu_top_cu", student, tokenizer, pairs, **options)
    return float(sum(p.detach().double().abs().sum() for p in student.parameters()))


def preferred(model, tokenizer, pairs) -> list[float]:
    rows = ssah_nb.preferences([], [], pairs)
    return ssah_nb.reference_margins(model, tokenizer, rows).tolist()


def reported(model, tokenizer, prompts, benign) -> dict:
    return ssah_nb.safety_report(model, tokenizer, prompts, benign, max_perplexity=9.0, **SHORT)


def probed(model, tokenizer, prompts) -> list[float]:
    return ssah_nb.probe(model, tokenizer, prompts, steps=(1,)).distance.tolist()


def scores_of(model, tokenizer, pairs) -> list:
    return ssah_nb.importance(model, tokenizer, pairs).mlp.tolist()


def calm(model, tokenizer, prompts) -> list:
    return ssah_nb.coherence(model, tokenizer, prompts, ["a", "b"], 9.0).perplexity.tolist()


TAKES_PROMPTS = {  # (model, tokenizer, prompts) -> a value
    "generate": lambda m, t, p: ssah_nb.generate(m, t, p, **SHORT),
    "attack_success": lambda m, t, p: ssah_nb.attack_success(m, t, p, **SHORT),
    "over_refusal": lambda m, t, p: ssah_nb.over_refusal(m, t, p, **SHORT),
    "safety_report": lambda m, t, p: reported(m, t, p, PAIRS),
    "coherence": calm,
    "probe": probed,
}
TAKES_PAIRS = {  # (model, tokenizer, pairs) -> a value
    "perplexity": lambda m, t, p: ssah_nb.perplexity(m, t, p),
    "safety_report": lambda m, t, p: reported(m, t, PROMPTS, p),
    "importance": scores_of,
    "finetune": trained,
    "finetune_protected": protected,
    "preferences": preferred,
    "alignment_pairs": lambda m, t, p: ssah_nb.alignment_pairs([], p),
    "training_perplexity": training_perplexity,
}
TAKES_ROWS = {  # pairs whose responses may be missing
    "coherence_threshold": coherence_threshold,
    "alignment_pairs": lambda m, t, p: ssah_nb.alignment_pairs(p, []),
    "preferences": lambda m, t, p: ssah_nb.preferences(p, ["a", "b"], []),
    "make_splits": lambda m, t, p: make_splits(p, sizes=dict.fromkeys(TOY_SIZES, 0)).pairs,
}


@pytest.mark.parametrize("name", TAKES_PROMPTS)
def test_prompts_from_any_container_give_the_same_value(name):
    call = functools.partial(TAKES_PROMPTS[name], tiny_model(), tiny_tokenizer())
    wanted = call(PROMPTS)
    forms = good_prompts() if name == "generate" else dict(list(good_prompts().items())[::5])
    assert {form: call(given) for form, given in forms.items()} == dict.fromkeys(forms, wanted)


@pytest.mark.parametrize("name", [*TAKES_PAIRS, *TAKES_ROWS])
def test_pairs_from_any_container_give_the_same_value(name):
    call = functools.partial((TAKES_PAIRS | TAKES_ROWS)[name], tiny_model(), tiny_tokenizer())
    wanted = call(PAIRS)
    forms = good_pairs() if name == "perplexity" else dict(list(good_pairs().items())[::7])
    assert {form: call(given) for form, given in forms.items()} == dict.fromkeys(forms, wanted)


def test_every_form_is_the_same_list():
    for form, given in good_prompts().items():
        assert as_prompts(given) == PROMPTS, form
    for form, given in good_pairs().items():
        assert as_pairs(given) == PAIRS, form


def test_a_slice_of_a_dataset_is_counted_by_rows():
    data = Dataset.from_list(toy_harmful())
    rate = ssah_nb.attack_success(tiny_model(), tiny_tokenizer(), data[:8], **SHORT)
    assert rate.n == 8
    assert len(ssah_nb.generate(tiny_model(), tiny_tokenizer(), data[:3]["prompt"], **SHORT)) == 3


def test_named_sets_are_scored_each_and_columns_are_one_set():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    one = ssah_nb.importance(model, tokenizer, PAIRS).mlp
    sets = {"safety": iter(PAIRS), "utility": Dataset.from_list(PAIRS)}
    for given in (sets, DatasetDict(safety=sets["utility"], utility=sets["utility"])):
        both = ssah_nb.importance(model, tokenizer, given)
        assert all(torch.equal(both[name].mlp, one) for name in ("safety", "utility"))


SYSTEM = [{"role": "system", "content": "Be safe."}]
BAD_ROWS = {  # what is no prompt and no pair, and the words that the error must have
    "a string": ("Hi there", "one str was given .* put it in a list"),
    "bytes": (b"Hi", "one bytes was given"),
    "nothing": (None, "NoneType was given"),
    "a number": (7, "int was given"),
    "a file": (Path("rows.json"), "a file was given .*read_csv"),
    "a set": ({"Hi"}, "a set of .* has no order"),
    "one row": (PAIRS[0], "one row was given .* put it in a list"),
    "one chat": (chats()[0], "one row was given"),
    "no rows": ([], "no (prompts|pairs) given; pass at least one|0 pairs has no variance"),
    "no rows in columns": ({"prompt": [], "response": []}, "pass at least one|0 pairs has no"),
    "no rows in other columns": ({"goal": [], "target": []}, "pass at least one|0 pairs has no"),
    "several sets": ({"train": PAIRS, "test": PAIRS}, r"several sets \(train, test\)"),
    "uneven columns": ({"prompt": ["a", "b"], "response": ["c"]}, "prompt: 2, response: 1"),
    "a missing prompt": ([PAIRS[0], {"prompt": None, "response": "a"}], "1 has no prompt"),
    "NaN in a column": ({"prompt": ["a", NAN], "response": ["b", "c"]}, "1 has no prompt .nan"),
    "NA": (pd.DataFrame({"prompt": ["a", pd.NA], "response": "b"}), "1 has no prompt"),
    "a number of a row": ([PAIRS[0], {"prompt": 7, "response": "a"}], "1 has a int as its prompt"),
    "bytes of a row": ([{"prompt": b"a", "response": "a"}], "0 has a bytes as its prompt"),
    "a blank prompt": ([PAIRS[0], {"prompt": " \n\t", "response": "a"}], "1 has an empty prompt"),
    "half a letter": ([{"prompt": "a\ud800", "response": "a"}], "0 has a prompt .* Unicode"),
    "a list of lists": ([["Hi", "Ho"]], "0 is a list; pass strings"),
    "other names": ([{"question": "a", "answer": "b"}], "rename 'question' to 'prompt'"),
    "near columns": ({"instruction": ["a"], "output": ["b"]}, "rename 'instruction' to 'prompt'"),
    "no such column": ([{"x": "a"}], "lacks a 'prompt'.* among x"),
    "several turns": ([{"messages": chats()[0]["messages"] * 2}], "0 has several turns"),
    "a system turn": ([{"messages": SYSTEM + chats()[0]["messages"]}], "pass its text as system="),
    "an odd turn": ([{"messages": [{"role": "tool", "content": "a"}]}], "a turn of 'tool'"),
    "an empty turn": ([{"messages": talk({"a": None}, "role", "content", ["user"])}], "0 "),
    "no turn": ([{"messages": NAN}], "float was given where a list of messages in .* 0"),
}
BAD_RESPONSES = {
    "prompts alone": (PROMPTS, "pair 0 lacks a 'response'"),
    "no response column": ({"prompt": ["a"], "answer": ["b"]}, "rename 'answer' to 'response'"),
    "a missing response": ([PAIRS[0], {"prompt": "a", "response": None}], "1 has no response"),
    "NaN from a table": (
        pd.DataFrame({"prompt": ["a", "b"], "response": ["c", NAN]}),
        "pair 1 has no response .nan",
    ),
    "a number": ([PAIRS[0], {"prompt": "a", "response": 0}], "1 has a int as its response"),
    "a blank response": ([PAIRS[0], {"prompt": "a", "response": " \n"}], "1 has an empty response"),
    "a question alone": ([{"messages": chats()[0]["messages"][:1]}], "pair 0 lacks a 'response'"),
}


def check_refused(functions: dict, table: dict):
    "Each function refuses each entry of the table in one line, before it touches the model."
    for name, call in functions.items():
        for what, (given, words) in table.items():
            with pytest.raises(SsahError, match=words) as error:
                call(None, None, given)
                pytest.fail(f"{name} took {what}")
            one_line(error)


def test_what_is_no_prompt_is_refused_before_anything_is_computed():
    check_refused(TAKES_PROMPTS, BAD_ROWS)


def test_what_is_no_pair_is_refused_before_anything_is_computed():
    empty = {"no rows", "no rows in columns", "no rows in other columns"}
    some = {what: entry for what, entry in BAD_ROWS.items() if what not in empty}
    optional = {"preferences", "alignment_pairs"}
    named = {"importance": {"several sets"}}
    for name, call in TAKES_PAIRS.items():
        table = (some if name in optional else BAD_ROWS) | BAD_RESPONSES
        left_out = named.get(name, set())
        check_refused({name: call}, {w: e for w, e in table.items() if w not in left_out})
    check_refused(TAKES_ROWS, some)


SPOKEN_TO = {  # what takes a system prompt
    "generate": lambda m, t, s: ssah_nb.generate(m, t, PROMPTS, system=s, **SHORT),
    "attack_success": lambda m, t, s: ssah_nb.attack_success(m, t, PROMPTS, system=s, **SHORT),
    "perplexity": lambda m, t, s: ssah_nb.perplexity(m, t, PAIRS, system=s),
    "refusal_margin": lambda m, t, s: ssah_nb.refusal_margin(m, t, PROMPTS, system=s),
    "importance": lambda m, t, s: ssah_nb.importance(m, t, PAIRS, system=s),
    "finetune": lambda m, t, s: ssah_nb.finetune(m, t, PAIRS, system=s),
    "Anchor": lambda m, t, s: ssah_nb.Anchor(m, t, PAIRS, system=s),
}
BAD_SYSTEMS = {
    "list": ["Be kind."],
    "dict": {"role": "system", "content": "Be kind."},
    "int": 3,
    "bool": False,
    "float": NAN,
    "bytes": b"Be kind.",
}


@pytest.mark.parametrize("name", SPOKEN_TO)
def test_a_system_prompt_is_one_text(name):
    model, tokenizer, call = tiny_model(), tiny_tokenizer(), SPOKEN_TO[name]
    before = copy.deepcopy(model.state_dict())
    for kind, system in BAD_SYSTEMS.items():
        with pytest.raises(SsahError, match=f"system is a {kind}; pass one string") as error:
            call(model, tokenizer, system)
            pytest.fail(f"{name} took a {kind}")
        one_line(error)
    with pytest.raises(SsahError, match="system has a text that is no valid Unicode"):
        call(model, tokenizer, "Be \ud800")
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["rows.jsonl", "/data/rows.csv", "a/b.json", "b.parquet"])
def test_the_name_of_a_file_is_no_list_of_prompts(name):
    for take in (as_prompts, as_pairs):
        with pytest.raises(SsahError, match="a file was given.*read it"):
            take(name)


@pytest.mark.parametrize(
    "row, todo",
    [
        (
            {"instruction": "Sum", "input": "2 and 3", "output": "5"},
            "join 'instruction' and 'input' to 'prompt' and rename 'output' to 'response'",
        ),
        (
            {"question": "Sum", "input": "2", "context": "and 3", "answer": "5"},
            "join 'question' and 'input' and 'context' to 'prompt'",
        ),
        ({"instruction": "Sum", "input": "", "output": "5"}, "rename 'instruction' to 'prompt'"),
        (
            {"chosen": [{"role": "user", "content": "Hi"}], "rejected": []},
            "rename 'chosen' to 'messages'",
        ),
    ],
)
def test_the_advice_for_other_names_loses_nothing(row, todo):
    with pytest.raises(SsahError) as error:
        as_pairs([row])
    assert todo in one_line(error)
