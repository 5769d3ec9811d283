"""The house: imports go one way, and no file, function or line is too long to be read."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssah_nb"
CHAPTERS = [path.stem[3:] for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")
SCRIPTS = [
    path
    for folder in ("tests", "workflow", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
SETTINGS = [ROOT / "workflow/Snakefile", *sorted((ROOT / "workflow").rglob("*.yaml"))]
NOTEBOOKS = [
    path
    for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(source: str, module: str) -> set[str]:
    "The modules of this package that a module imports, in functions too; without `ssah_nb.`."
    found, place = set(), f"ssah_nb.{module}".split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = place[: len(place) - node.level] if node.level else []
            parent = ".".join(above + ([node.module] if node.module else []))
            found |= {f"{parent}.{alias.name}" for alias in node.names} | {parent}
    return {name.removeprefix("ssah_nb.") for name in found if name.startswith("ssah_nb.")}


def rank(module: str) -> int:
    "0 for the engine, then the chapters in their order; a module may import only from below."
    first = module.split(".")[0]
    return 0 if first == "engine" else 1 + CHAPTERS.index(first)


def upward(source: str, module: str) -> set[str]:
    "What a module imports and must not."
    rooms = {"engine", *CHAPTERS}
    found = {name for name in imported(source, module) if name.split(".")[0] in rooms}
    return {name for name in found if rank(name) > rank(module)}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if path.name != "__init__.py":
        assert not upward(path.read_text(), module)


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("units", "from .engine.run import Run", set()),
        ("units", "from .probe import probe", {"probe", "probe.probe"}),
        ("attribution", "import ssah_nb.classes", {"classes"}),
        ("engine.models", "from ..units import UnitMap", {"units", "units.UnitMap"}),
        ("engine.models", "def f():\n    from ssah_nb.units import x", {"units", "units.x"}),
        ("engine.models", "from ssah_nb import units", {"units"}),
        ("engine.drawings.probe", "from ...probe import x", {"probe", "probe.x"}),
        ("engine.drawings.probe", "from ..figures import COLOURS\nimport torch", set()),
        ("report", "from .freezing import WAYS\nfrom . import units", set()),
    ],
)
def test_an_import_of_a_later_room_is_seen(module, source, wrong):
    assert upward(source, module) == wrong


def test_a_chapter_has_one_module_of_the_same_name():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "_modidx"}
    assert modules <= set(CHAPTERS)
    assert {"units", "probe", "attribution", "classes", "transfer", "freezing"} <= modules


def functions(source: str) -> dict[str, int]:
    "The lines of each function."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in nodes}


def written(source: str) -> str:
    "A module without the list of its names, which nbdev writes."
    return re.sub(r"__all__ = \[.*?\]\n", "", source, flags=re.S)


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=named)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert written(source).count("\n") <= 400
    assert not {name: n for name, n in functions(source).items() if n > 40}


def long_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 100]


@pytest.mark.parametrize("path", MODULES + SCRIPTS + SETTINGS, ids=named)
def test_lines_are_short(path):
    assert not long_lines(written(path.read_text()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_lines_of_code_cells_are_short(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not long_lines("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def long_prose(text: str) -> list[str]:
    "Long lines but those that cannot be cut: rows of tables, formulas, images and addresses."
    whole = ("$$", "![", "http")
    return [
        line
        for line in long_lines(text)
        if not line.startswith("|") and not any(mark in line for mark in whole)
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_lines_of_prose_are_short(path):
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert not long_prose("\n".join(texts))


@pytest.mark.parametrize("line, is_long", [("word " * 21, True), ("| cell " * 20 + "|", False)])
def test_a_long_line_of_prose_is_seen(line, is_long):
    assert bool(long_prose(f"a short one\n{line}")) is is_long


def test_ruff_finds_nothing():
    folders = ["nbs", "ssah_nb", "tests", "workflow", "benchmarks"]
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise"]
    result = subprocess.run([*command, *folders], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
