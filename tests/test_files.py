"""Files that were cut, spoilt or made by something else are refused by name; odd rows are read."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import one_line, write
from safetensors.torch import load_file, save_file

import ssah_nb
from ssah_nb import Importance, SsahError, Splits, UnitMap, load_pairs, make_splits
from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.inputs import normalised
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.opening import parse_json
from ssah_nb.engine.splits import TOY_SIZES

PAIR = {"prompt": "Hi", "response": "Hello"}
SHARED = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "answer, text", [(0, "0"), (0.0, "0.0"), (12, "12"), (False, "False"), (None, ""), ("", "")]
)
def test_a_number_is_an_answer(answer, text, tmp_path):
    path = write(tmp_path / "rows.json", json.dumps([{"question": "1-1?", "answer": answer}]))
    assert load_pairs("gsm8k", path=path) == [{"prompt": "1-1?", "response": text}]


def test_a_name_that_a_json_text_gives_twice_is_refused():
    with pytest.raises(ValueError, match="'a' stands twice in one object"):
        parse_json('[{"b": 1}, {"a": 1, "a": 2}]')
    assert parse_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


def test_a_name_that_a_yaml_file_gives_twice_is_refused_with_its_line(tmp_path):
    path = write(tmp_path / "rows.prompt", "seeds:\n- value: Hi\nseeds:\n- value: Hello\n")
    with pytest.raises(SsahError, match="rows.prompt.*line 3 gives 'seeds' a second time") as error:
        load_pairs("advbench", path=path)
    one_line(error)
    path.write_text("seeds:\n- value: Hi\n- value: Hello\n")
    assert [pair["prompt"] for pair in load_pairs("advbench", path=path)] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    "row",
    [PAIR, SHARED, {"messages": CHAT}, {"id": 1, "messages": CHAT, "prompt": "Hi"}],
    ids=["pair", "ShareGPT", "messages", "wide"],
)
@pytest.mark.parametrize("name", ["alpaca", "lima", "advbench"])
def test_conversations_of_a_file_become_pairs(name, row, tmp_path):
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert load_pairs(name, path=path) == [PAIR]


def test_columns_of_a_file_become_pairs(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({"prompt": ["Hi"], "response": ["Hello"]}))
    assert load_pairs("alpaca", path=path) == [PAIR]


BAD_FILES = {  # name -> (content, words of the error)
    "encoding.csv": ("prompt,response\nGrüße,a\n".encode("latin-1"), "byte 18 is not UTF-8"),
    "wide.json": ('[{"prompt": "a"}]'.encode("utf-16"), "byte 0 is not UTF-8"),
    "deep.json": ("[" * 100_000 + "]" * 100_000, "lists within lists, more than 100 deep"),
    "deep.jsonl": ('{"a":' * 100_000, "lists within lists, more than 100 deep"),
    "null.json": ("null", "list of rows with named columns"),
    "number.json": ("7", "list of rows with named columns"),
    "row.json": (json.dumps(PAIR), "one row was given .* put it in a list"),
    "strings.json": ('["a", "b"]', "row 0 is a str; expected rows with named columns"),
    "mixed.jsonl": (json.dumps(PAIR) + "\n7\n", "row 1 is a int"),
    "sets.json": (json.dumps({"train": [PAIR], "test": [PAIR]}), "several sets .train, test."),
    "no_prompt.json": (
        json.dumps([PAIR, {"prompt": None, "response": "a"}]),
        "row 1 has no prompt",
    ),
    "no_prompt.csv": ("prompt,response\na,b\n,c\n", "row 1 has no prompt"),
    "nan.json": ('[{"prompt": NaN, "response": "a"}]', "row 0 has no prompt"),
    "nested.json": (
        json.dumps([{"prompt": {"text": "a"}, "response": ""}]),
        "'prompt' holds a dict",
    ),
    "turns.json": (json.dumps([PAIR | {"prompt": [["a"]]}]), "row 0: column 'prompt' holds a list"),
    "long_talk.json": (json.dumps([{"messages": CHAT * 2}]), "row 0 has several turns"),
    "commas.csv": ("prompt,response\nOpen, please,Sure\n", "row 0 has 1 cells too many"),
    "quote.csv": ('prompt,response\n"Open,Sure\nb,c\n', "unexpected end of data"),
    "names.csv": ("prompt,prompt,response\na,b,c\n", "two columns have one name"),
    "columns.csv": ("question;answer\na;b\n", "no columns prompt"),
    "empty.csv": ("", "no rows"),
    "cut.json.gz": (b"\x1f\x8b\x08\x00\x00", "EOFError"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_table_of_pairs_is_refused(name, tmp_path):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SsahError, match=words) as error:
        load_pairs("advbench", path=tmp_path / name)
    one_line(error)


def test_prompts_without_a_header_must_be_one_cell(tmp_path):
    path = write(tmp_path / "category_1.csv", "Open the box, please\n")
    with pytest.raises(SsahError, match="row 0 has 1 cells too many; put a cell with commas"):
        load_pairs("hex_phi", path=path)


def test_splits_of_prompts_alone():
    prompts = [pair["prompt"] for pair in toy_harmful()]
    ours = make_splits(prompts, toy_benign(), sizes=TOY_SIZES)
    assert ours == make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)
    table = pd.DataFrame(toy_harmful()).assign(response=np.nan)
    assert ours == make_splits(table, pd.DataFrame(toy_benign()), sizes=TOY_SIZES)
    for benign in (prompts, [{"prompt": p, "response": None} for p in prompts]):
        with pytest.raises(SsahError, match="no benign pair has a 'response'") as error:
            make_splits(toy_harmful(), benign, sizes=TOY_SIZES)
        one_line(error)
    refusals = [{"prompt": p, "response": "I'm sorry."} for p in prompts]
    with pytest.raises(SsahError, match="none of 40 benign pairs is left: 40 have"):
        make_splits(benign=refusals, sizes=TOY_SIZES)


SAME = "open 'box 1' - \"now\""
SPELLINGS = (
    "Open 'box 1' - \"now\"",
    "OPEN ‘BOX 1’ – “NOW”",
    " open\u00a0 'box\t1' - \"now\". ",
    "open 'box １' - \"now\"!",
    "open 'bo\u00adx 1' - \"now\"…",
    "ｏｐｅｎ 'box 1' − «now»",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_prompt_under_another_spelling_is_a_leak(spelling):
    assert normalised(spelling) == SAME == normalised(SAME) and normalised("box 1") != SAME
    stolen = make_splits(toy_harmful(), sizes=TOY_SIZES)["harmful", "evaluate"][0]["prompt"]
    changed = stolen.upper().replace(" ", "\u00a0 ").rstrip(".") + "!"
    rows = [{"prompt": f"Row {n}"} for n in range(12)]
    with pytest.raises(SsahError, match="overlap in 1 prompt") as error:
        Splits({("harmful", "a"): [*rows, {"prompt": spelling}], ("harmful", "b"): [SAME]})
    one_line(error)
    with pytest.raises(SsahError, match="overlap"):
        sizes = TOY_SIZES | {"harmful_align": 25}
        make_splits(toy_harmful(), align_harmful=[*rows, changed], sizes=sizes)


def test_punctuation_inside_and_words_still_count():
    texts = ["a b", "ab", "a, b", "c++", "c", "?!", "?", "¿a b", "a-b", "1.5", "15"]
    assert len({normalised(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "content, words",
    [
        ([{"kind": "harmful", "pairs": []}], "holds no splits"),
        ([{"kind": "harmful", "split": "align"}], "holds no splits"),
        ([{"kind": "harmful", "split": ["align"], "pairs": []}], "holds no splits"),
        ([{"kind": "harmful", "split": "align", "pairs": [PAIR]}] * 2, "holds no splits"),
        (
            [{"kind": "harmful", "split": "align", "pairs": [{"prompt": 7}]}],
            "split harmful.align: pair 0 has a int",
        ),
        ([{"kind": "harmful", "split": "align", "pairs": 7}], "int was given"),
        ({"harmful": {"align": []}}, "cannot read .* several sets"),
        ([], None),
    ],
)
def test_splits_of_another_shape(content, words, tmp_path):
    path = write(tmp_path / "splits.json", json.dumps(content))
    if words is None:
        assert Splits.load(path).pairs == {}
        return
    with pytest.raises(SsahError, match=words) as error:
        Splits.load(path)
    one_line(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A folder with an importance and a unit map."
    folder, sets = tmp_path_factory.mktemp("saved"), {}
    sets["safety"] = [PAIR, {"prompt": "Add 1 and 2.", "response": "3."}]
    sets["utility"] = toy_benign()[:3]
    both = ssah_nb.importance(tiny_model(), tiny_tokenizer(), sets)
    both["safety"].save(folder)
    ssah_nb.classify(**both).save_pretrained(folder)
    return folder


def without(key: str):
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def changed(key: str, change):
    return lambda tensors: tensors | {key: change(tensors[key]).contiguous()}


SPOILT = {  # what is read -> (name of the files, {what is done to them: words of the error})
    UnitMap: (
        "units",
        {
            "cut json": "cannot read .*units.json .*JSONDecodeError",
            "json of bytes": "cannot read .*units.json: byte 0 is not UTF-8",
            "json of a list": "units.json .*a list instead of a dict",
            "cut tensors": "cannot read .*units.safetensors",
            "no tensors": "cannot read .*units.safetensors",
            "facts": "it lacks parameters, total",
            "missing": "no unit map in",
        },
    ),
    Importance: (
        "importance",
        {
            "cut json": "cannot read .*importance.json .*JSONDecodeError",
            "json of bytes": "cannot read .*importance.json: byte 0 is not UTF-8",
            "json of a list": "importance.json .*a list instead of a dict",
            "cut tensors": "cannot read .*importance.safetensors",
            "no tensors": "cannot read .*importance.safetensors",
            "facts": "lacks",
            "missing": "no importance in",
        },
    ),
}


def spoil(folder, name: str, how: str):
    facts, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    content = {
        "cut json": (facts, facts.read_bytes()[:-20]),
        "json of bytes": (facts, b"\xff\xfe{}"),
        "json of a list": (facts, b"[]"),
        "cut tensors": (tensors, tensors.read_bytes()[:-20]),
        "no tensors": (tensors, b""),
        "facts": (facts, b"{}"),
        "missing": (facts, None),
    }
    path, new = content[how]
    path.unlink() if new is None else path.write_bytes(new)


@pytest.fixture
def copied(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def read(kind, folder):
    return UnitMap.from_pretrained(folder) if kind is UnitMap else kind.load(folder)


@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_that_was_cut_is_refused(kind, copied, saved):
    name, ways = SPOILT[kind]
    for how, words in ways.items():
        spoil(copied, name, how)
        with pytest.raises(SsahError, match=words) as error:
            read(kind, copied)
            pytest.fail(f"{how} was read")
        one_line(error)
        for path in saved.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
    read(kind, copied)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        (UnitMap, without("attention"), "lacks 'attention' among"),
        (UnitMap, without("order.mlp"), "lacks 'order.mlp' among"),
        (UnitMap, changed("mlp", torch.Tensor.float), "'mlp' in torch.float32"),
        (UnitMap, changed("mlp", lambda t: t[:1]), r"'order.mlp' of shape \(2, .* instead of \(1"),
        (UnitMap, changed("attention", lambda t: t + 9), "a code that is no class"),
        (Importance, without("channels.mlp"), "lacks 'channels.mlp' among"),
        (Importance, without("m2.attention"), "lacks 'm2.attention' among"),
        (Importance, changed("mean.mlp", lambda t: t[:, :3]), "'mean.mlp' of shape"),
        (Importance, changed("channels.mlp", torch.Tensor.int), "'channels.mlp' in torch.int32"),
        (Importance, changed("weights.mlp", lambda t: t[0]), "'weights.mlp' of shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kind, change, words, copied):
    path = copied / f"{SPOILT[kind][0]}.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(SsahError, match=r"changed after .* \(sha256\)") as error:
        read(kind, copied)
    one_line(error)

    facts = path.with_suffix(".json")
    facts.write_text(json.dumps(dict(json.loads(facts.read_text()), sha256=None)))
    with pytest.raises(SsahError, match=words) as error:
        read(kind, copied)
    one_line(error)
