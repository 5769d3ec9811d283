"""The package as a whole: what an import loads, and its public names."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import nbformat
import pytest

import ssah_nb
from ssah_nb.engine.ways import Way, Ways

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ssah_nb.__file__).parent


def stub_names() -> dict[str, str]:
    "Public name -> its module, as the stub says."
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    return {alias.name: f"ssah_nb.{node.module}" for node in imports for alias in node.names}


def fresh(code: str) -> str:
    "What a new process prints."
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


FIRST_USE = """
import sys
import torch, transformers
before = set(sys.modules)
import ssah_nb
ours = {name for name in set(sys.modules) - before if name.startswith("ssah_nb")}
assert ours == {"ssah_nb"}, ours
heavy = {"matplotlib", "seaborn", "datasets", "pandas", "scipy", "lm_eval", "gguf", "peft", "trl"}
assert not (heavy - before) & set(sys.modules), heavy & set(sys.modules)
import transformers.modeling_utils, transformers.trainer_callback
before = set(sys.modules)
from ssah_nb import freeze, importance, prune
heavy = {"matplotlib", "seaborn", "datasets", "scipy.stats", "lm_eval", "gguf", "trl"}
assert not (heavy - before) & set(sys.modules), heavy & set(sys.modules)
import ssah_nb.probe, ssah_nb.transfer
from ssah_nb import probe, transfer
assert callable(probe) and callable(ssah_nb.transfer)
from ssah_nb.freezing import WAYS
print(*WAYS)
"""


def test_an_import_loads_what_is_used_and_the_table_of_ways_is_whole():
    assert fresh(FIRST_USE).split() == list(ssah_nb.WAYS)
    assert {"full", "scu_all_cu", "lora", "anchor_units"} <= set(ssah_nb.WAYS)


@pytest.mark.parametrize("name, module", stub_names().items())
def test_a_public_name_is_that_of_its_module(name, module):
    assert getattr(ssah_nb, name) is getattr(import_module(module), name)


def test_public_names_can_be_listed_and_starred():
    assert dir(ssah_nb) == ssah_nb.__all__ == sorted(stub_names())
    names = {}
    exec("from ssah_nb import *", names)
    assert set(stub_names()) <= set(names)
    with pytest.raises(AttributeError, match="nothing"):
        ssah_nb.nothing


CHAPTER = """
from importlib import import_module
ways = import_module("made_up_table").WAYS
ways |= {"first": "the chapter's", "second": "the chapter's"}
"""


def test_ways_of_a_chapter_join_at_the_first_look(tmp_path, monkeypatch):
    (tmp_path / "made_up_chapter.py").write_text(CHAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    table = type(sys)("made_up_table")
    monkeypatch.setitem(sys.modules, "made_up_table", table)
    ways = table.WAYS = Ways("made_up_chapter")
    own = ways["first"] = Way("a reader's")
    assert "made_up_chapter" not in sys.modules
    assert list(ways) == ["first", "second"] and ways["first"] is own
    assert len(ways) == 2 and "second" in ways
    del ways["second"]
    assert list(ways) == ["first"] and repr(ways) == repr({"first": own})


WRONG = """
units.nothing()
ssah.freeze(model, "all")
"""


def test_who_follows_the_readme_gets_types_and_no_complaint(tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    (tmp_path / "block.py").write_text(block + WRONG)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    result = subprocess.run(
        [*command, tmp_path / "block.py"], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    told = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert len(told) == 2, result.stdout + result.stderr
    assert '"UnitMap" has no attribute "nothing"' in told[0]
    assert 'expected "UnitMask"' in told[1]


# what is installed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDS = {  # folder -> the extras with which it is used, beside the dependencies
    "ssah_nb": ("run", "train"),
    "nbs": ("run", "train"),
    "workflow": ("run", "test", "dev"),
    "docs": ("docs", "test"),
    "benchmarks": ("run",),
    "tests": ("run", "train", "test"),
}


def distribution(name: str) -> str:
    "How an index compares the names of distributions; of a requirement, its name."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()


def code_below(folder: Path) -> list[str]:
    "The sources of modules, scripts and code cells."
    pages, files = (
        [path for path in folder.rglob(kind) if "_build" not in path.parts]
        for kind in ("*.ipynb", "*.py")
    )
    cells = [cell for path in pages for cell in nbformat.read(path, as_version=4).cells]
    codes = [cell.source for cell in cells if cell.cell_type == "code"]
    return codes + [path.read_text() for path in files]


def modules_of(source: str) -> set[str]:
    "The outermost modules that a source imports, relative ones left out."
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("folder", NEEDS)
def test_what_is_imported_is_declared(folder):
    known = metadata.packages_distributions()
    declared = set(map(distribution, PROJECT["dependencies"]))
    for extra in NEEDS[folder]:
        declared |= set(map(distribution, EXTRAS[extra]))
    imported = set().union(*map(modules_of, code_below(ROOT / folder)))
    ours = {path.stem for name in NEEDS for path in (ROOT / name).glob("*.py")} | {"ssah_nb"}
    others = imported - ours - set(sys.stdlib_module_names)
    assert "pandas" in others
    missing = {n for n in others if not set(map(distribution, known.get(n, ()))) & declared}
    assert not missing, f"declare in pyproject.toml: {sorted(missing)}"


def test_the_lock_names_its_extras_and_pythons_and_holds_what_they_ask_for():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    recipe = (ROOT / "Makefile").read_text().split("\nlock:")[1]
    (made,) = re.findall(r"install -e '\.\[(.*?)\]'", recipe)
    named = re.search(r"extras (.*?) resolve to, for Python (.*)\.$", lines[0])
    assert re.findall(r"\w+", named[1].replace(" and ", " ")) == made.split(",")
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert re.findall(r"3\.(\d+)", named[2]) == [str(n) for n in range(int(low), int(high))]
    locked = {distribution(line) for line in lines if not line.startswith("#")}
    asked = PROJECT["dependencies"] + [one for extra in made.split(",") for one in EXTRAS[extra]]
    assert set(map(distribution, asked)) <= locked
