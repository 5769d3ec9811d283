"""CONTRIBUTING says what is true: its blocks run, and an entry at the named place is enough."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import one_line

from ssah_nb.engine import agreement, data, judges, scores, sources, ways
from ssah_nb.engine.run import SsahError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
REGISTRIES = [sources.SOURCES, judges.JUDGES, ways.WAYS, scores.METHODS]


@pytest.fixture
def registries():
    "What a test registers is gone after it."
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


def test_its_blocks_run_in_their_order(registries, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    columns = set(names["ssah"].safety_report(*model_of(names), names["boxes"], names["benign"]))
    assert {"attack_success_says_box", "attack_success_shut"} <= columns
    table = data.source_table().set_index("name").loc["boxes"]
    assert table.measured == 2 and len(table.sha256) == 64


def model_of(names: dict) -> tuple:
    return names["model"], names["tokenizer"]


def test_what_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", TEXT))
    assert {"export", "lint", "test", "verify", "coverage"} <= targets
    assert [t for t in sorted(targets) if not re.search(rf"^{t}:", makefile, re.M)] == []
    folders = "nbs|tests|workflow|docs|ssah_nb|figures"
    found = re.findall(rf"\b(?:{folders})/[\w/.]*+(?!\*)", TEXT)  # no patterns
    paths = [path.rstrip(".") for path in found]
    missing = {path for path in paths if not (ROOT / path).exists()} - {"ssah_nb/boxes.csv"}
    assert len(paths) > 10 and not missing


NEW = {  # notebook -> a line that begins a list of entries, and what is put behind it
    "sources": (
        "HARMFUL_SOURCES = [",
        'Source("boxes", "harmful", 2, "CC0", "me", "tests", ("evaluate",),'
        ' columns=(PROMPT_ONLY,), file="boxes.csv"),',
    ),
    "judges": ("JUDGES: dict[str, Judge] = {", '"shut": ("stays shut",),'),
    "ways": ("OTHERS = {", '"slowly": Way("slowly", trains=lambda c, m: {"lr_factor": 0.5}),'),
}
USE = """
import ssah_nb as ssah
assert ssah.__file__.startswith({root!r}), ssah.__file__
assert len(ssah.load_pairs("boxes")) == 2
assert ssah.is_refusal("It stays shut.", "shut") and "slowly" in ssah.WAYS
print("one entry each")
"""


def test_one_entry_in_its_notebook_is_enough(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "ssah_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, (line, entry) in NEW.items():
        path = tmp_path / f"nbs/engine/{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [cell for cell in notebook.cells if line in cell.source]
        cell.source = cell.source.replace(line, f"{line}\n    {entry}")
        nbformat.write(notebook, path)
    (tmp_path / "ssah_nb/boxes.csv").write_text("prompt\nOpen it\nMove it\n")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    result = subprocess.run(
        [sys.executable, "-c", USE.format(root=str(tmp_path))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "one entry each\n", result.stderr


# What an entry can get wrong


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"file": "nowhere.csv"}, ["nowhere.csv"]),
        ({"rows": 3}, ["boxes has 1 rows, expected 3", "boxes.csv", "rows="]),
        ({"columns": ((("q",), ""),)}, ["boxes", "q"]),
        ({"name": "box"}, ["SOURCES['boxes']", "Source('boxes'"]),
        ({"file": "", "wheel": "boxes==1"}, ["'boxes==1'", "WHEELS"]),
        ({"file": ""}, ["no wheel holds boxes"]),
    ],
)
def test_a_wrong_source_is_one_line(entry, words, registries, tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("ask\nOpen it\n")
    facts = dict(name="boxes", kind="harmful", rows=1, licence="CC0", origin="me", used_for="this")
    facts |= dict(file=str(path), columns=((("ask",), ""),), members=("a.csv",))
    sources.SOURCES["boxes"] = sources.Source(**facts)
    assert data.load_pairs("boxes") == [{"prompt": "Open it", "response": ""}]
    sources.SOURCES["boxes"] = sources.Source(**facts | entry)
    with pytest.raises(SsahError) as error:
        data.load_pairs("boxes")
    message = one_line(error)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "entry, words", [("stays shut", "is a text"), (3, "is no judge"), ((), "at least"), ([1], "0")]
)
def test_a_wrong_judge_is_one_line(entry, words, registries):
    judges.JUDGES["mine"] = entry
    with pytest.raises(SsahError, match=words) as error:
        judges.check_judge("mine")
    one_line(error)


def test_a_judge_that_is_measured_may_have_a_name(registries):
    judges.JUDGES["all"] = lambda prompts, responses: [True] * len(responses)
    rows = agreement.project_rows().head(40)
    table = agreement.judge_table(rows, {"all": "all"})
    assert table[table.judge == "all"].missed.max() == rows.refusal.sum()
