"""The table of how much the tests reach, and the pages of the site that it and papers become."""

import csv
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import coverage_table  # noqa: E402

spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
build = importlib.util.module_from_spec(spec)  # another package is called build
spec.loader.exec_module(build)


class Measured:
    "Half of the statements of one module were run, and all of the others'."

    def analysis2(self, path: str):
        missing = [1, 2] if path.endswith("units.py") and "drawings" not in path else []
        return path, [1, 2, 3, 4], [], missing, ""


def test_the_table_has_a_row_for_each_module_and_one_for_all():
    rows = {row["module"]: row for row in coverage_table.rows(Measured())}
    modules = [p for p in (ROOT / "ssah_nb").rglob("*.py") if p.name != "_modidx.py"]
    assert len(rows) == len(modules) + 1 and list(rows)[-1] == "all"
    assert rows["ssah_nb.units"] == dict(
        module="ssah_nb.units", statements=4, missed=2, covered="50.0"
    )
    assert rows["ssah_nb"]["covered"] == rows["ssah_nb.engine.run"]["covered"] == "100.0"
    assert rows["all"]["statements"] == 4 * len(modules) and rows["all"]["missed"] == 2


@pytest.mark.parametrize("missed, status", [(0, 0), (90, 1)])
def test_too_little_is_said_and_is_an_error(missed, status, tmp_path, monkeypatch, capsys):
    found = [coverage_table.row(name, 100, missed) for name in ("a", "all")]
    monkeypatch.setattr(coverage_table, "rows", lambda measured: found)
    monkeypatch.setattr(coverage_table, "ROOT", tmp_path)
    monkeypatch.setattr(coverage_table, "TABLE", tmp_path / "coverage.csv")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert coverage_table.main() == status
    assert ("below 90 %: a 10.0 %" in capsys.readouterr().out) == bool(status)
    with (tmp_path / "coverage.csv").open(newline="") as file:
        assert [row["covered"] for row in csv.DictReader(file)] == [f"{100 - missed:.1f}"] * 2


def test_the_committed_table_is_at_least_90_percent():
    if not coverage_table.TABLE.exists():
        pytest.skip("`make coverage` has not been run")
    with coverage_table.TABLE.open(newline="") as file:
        rows = {row["module"]: float(row["covered"]) for row in csv.DictReader(file)}
    assert len(rows) > 60 and rows["all"] >= coverage_table.LEAST


def test_the_site_shows_it_and_the_papers(tmp_path, monkeypatch):
    table = tmp_path / "coverage.csv"
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    monkeypatch.setattr(build, "COVERAGE", table)
    build.write_coverage()
    assert "not been measured" in (tmp_path / "coverage.md").read_text()
    table.write_text("module,statements,missed,covered\nall,4,2,50.0\n")
    build.write_coverage()
    assert "<td>50.0</td>" in (tmp_path / "coverage.md").read_text()
    build.write_papers()
    assert (tmp_path / "contributing.md").read_text().startswith("# Contributing")
    assert (tmp_path / "changelog.md").read_text().startswith("# Changelog")
    link = re.match(r"\[([^\]]*)\]\(([^)\s]+)\)", "[how](CONTRIBUTING.md)")
    assert build.keep_link(link) == "[how](contributing.md)"
