"""`make verify`: figures that are not what their manifest says, and a chapter that runs again."""

import json
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import verify
from clean_notebooks import KERNEL
from compare_runs import disagreements
from nbformat.v4 import new_code_cell, new_notebook

from ssah_nb.engine.manifest import commit_of, data_behind, differences, sha256_of
from ssah_nb.engine.run import Run, write_manifest

ROOT = Path(__file__).parent.parent
SOURCES = """name,kind,wheel,sha256,hub,revision
mine,harmful,w==1,00ff,-,-
theirs,benign,-,-,own/theirs,abc
unused,benign,w==1,00ff,-,-
small,model,m==2,11ee,-,-
"""


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Path:
    """The figures of a run with one chapter, as the library writes them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()
    run = Run(
        "toy", "01_units", seed=3, harmful="mine", model_name="embedded", more={"a": "theirs"}
    )
    run.path("sources.csv").write_text(SOURCES)
    run.path("splits.json").write_text("{}")
    run.save_figure(plt.figure(figsize=(1, 1)), "fig_units", pd.DataFrame({"units": [4]}))
    run.written.append(run.path("tables", "own.csv"))
    run.written[-1].write_text("kept in the run")
    run.finish()
    write_manifest(run)
    return run.figures


def test_untouched_figures_say_what_is_behind_them(figures, capsys):
    assert verify.main([]) == 0
    said = capsys.readouterr().out
    assert "figures/toy: 3 files, all as MANIFEST.json says" in said
    assert "data: mine = w==1 sha256:00ff" in said and "data: theirs = own/theirs at abc" in said
    assert "data: small = m==2 sha256:11ee" in said and "unused" not in said
    assert f"data: splits.json = sha256:{sha256_of(Path('runs/toy/splits.json'))}" in said
    assert "01_units, at an unknown commit: fig_units\n" in said
    assert 'harmful=mine, model_name=embedded, more={a:theirs}, seed=3' in said


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "fig_units.csv").write_text("units\n5\n"), "changed: fig_units.csv"),
        (lambda f: (f / "fig_units.svg").unlink(), "missing: fig_units.svg"),
        (lambda f: (f / "fig_more.png").touch(), "extra: fig_more.png"),
        (lambda f: (f / "own.csv").touch(), "extra: own.csv"),
    ],
)
def test_what_differs_is_named(figures, spoil, words, capsys):
    spoil(figures)
    assert verify.main(["figures/toy"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "figures/toy: 3 files, NOT all as MANIFEST.json says"
    assert said[1] == f"  {words}" and said[2].startswith("  data")


def test_a_folder_in_the_place_of_a_file_is_no_file(figures):
    (figures / "fig_units.csv").unlink()
    (figures / "fig_units.csv").mkdir()
    found = differences(figures, json.loads((figures / "MANIFEST.json").read_text()))
    assert found == {"missing": ["fig_units.csv"], "changed": [], "extra": ["fig_units.csv"]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"chapters": [1]}', '{"chapters": {"a": {}}}'])
def test_a_spoilt_manifest_is_one_line(figures, text, capsys):
    (figures / "MANIFEST.json").write_text(text)
    assert verify.main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: figures/toy/MANIFEST.json is no manifest")
    assert said.err.count("\n") == 1 and not said.out


def test_nothing_to_check_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (([], "no folder under figures/"), ([str(tmp_path)], "no MANIFEST")):
        assert verify.main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_the_committed_figures_are_those_of_their_manifests(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    listed = ["git", "ls-files", "figures/*/MANIFEST.json"]
    found = subprocess.run(listed, capture_output=True, text=True).stdout.split()
    folders = [str(Path(name).parent) for name in found] or ["figures/embedded"]
    assert verify.main(folders) == 0, capsys.readouterr().out


def test_the_commit_says_when_code_was_changed_since(tmp_path):
    assert commit_of(tmp_path) == ""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/a.txt").write_text("1")
    (tmp_path / "ssah_nb").mkdir()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit = commit_of(tmp_path)
    assert len(commit) == 40
    (tmp_path / "figure.txt").touch()  # no code
    assert commit_of(tmp_path) == commit
    (tmp_path / "nbs/a.txt").write_text("2")
    assert commit_of(tmp_path) == commit + "+changes"


def test_a_run_without_a_table_of_sources_has_no_data(tmp_path):
    assert data_behind(tmp_path, {"00_start": {"harmful": "mine"}}) == {}


def test_tables_may_differ_within_their_intervals_and_in_digits():
    first = {
        "t": pd.DataFrame({"rate": [0.5], "rate_low": [0.4], "rate_high": [0.6], "n": [100.0]})
    }
    assert disagreements(first, first) == []
    near = first["t"].assign(rate=0.58, rate_low=0.48, rate_high=0.67, n=100.4)
    assert disagreements(first, {"t": near}) == []
    far = near.assign(rate=0.61, n=102)
    assert disagreements(first, {"t": far}) == [
        "t: 1 numbers without an interval differ by over 1%",
        "t: 1 values outside the first run's 95 % intervals",
    ]
    other = near.rename(columns={"n": "m"})
    assert disagreements(first, {"t": other}) == ["t: other rows or columns"]
    assert disagreements(first, {}) == ["only in one of the runs: t"]
    assert disagreements(first | {"comparison": other}, first | {"comparison": far}) == []


def test_a_turned_verdict_is_named_and_times_are_not_compared():
    report = pd.read_csv(ROOT / "figures/embedded/paper_vs_ours.csv")
    first = {"paper_vs_ours": report, "t": pd.DataFrame({"way": ["full"], "seconds": [100.0]})}
    second = {"paper_vs_ours": report.copy(), "t": first["t"].assign(seconds=130.0)}
    assert disagreements(first, second) == []
    holds = report.index[report.verdict == "holds"][0]
    second["paper_vs_ours"].loc[holds, "verdict"] = "fails"
    (line,) = disagreements(first, second)
    assert line.startswith("another verdict: ") and report.claim[holds] in line


CHAPTER = """
import os
folder = f"figures/{{profile}}"
os.makedirs(folder, exist_ok=True)
open(folder + "/{name}.csv", "w").write(f"seed\\n{{seed}}\\n")
"""
PARAMETERS = 'profile = "smoke"  # name of the run\nseed = 1  # seed'


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The real workflow around two small chapters, and figures that another seed gave."""
    shutil.copytree(
        ROOT / "workflow", tmp_path / "workflow", ignore=shutil.ignore_patterns("__pycache__")
    )
    profile = tmp_path / "workflow/profiles/smoke/parameters.yaml"
    profile.write_text("common: {profile: smoke, seed: 0}\n")
    folder, chapters = tmp_path / "figures/smoke", {}
    for path in (tmp_path / "nbs", folder):
        path.mkdir(parents=True)
    for name in ("00_start", "01_units"):
        notebook = new_notebook(metadata={"kernelspec": KERNEL})
        notebook.cells = [
            new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            new_code_cell(CHAPTER.strip().format(name=name)),
        ]
        nbformat.write(notebook, tmp_path / f"nbs/{name}.ipynb")
        (folder / f"{name}.csv").write_text("seed\n7\n")
        files = {f"{name}.csv": sha256_of(folder / f"{name}.csv")}
        parameters = {"seed": 7, "gone": 1, "mixed": False}
        chapters[name] = {"files": files, "parameters": parameters}
    (folder / "MANIFEST.json").write_text(json.dumps({"chapters": chapters}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_chapter_runs_again_with_the_parameters_of_the_manifest(project, capsys):
    assert verify.main(["--profile", "smoke", "--chapter", "00_start"]) == 0
    assert "00_start: 1 tables agree with those of figures/smoke" in capsys.readouterr().out
    left = [str(p) for folder in ("runs", "figures") for p in Path(folder).rglob("*-verify*")]
    assert not left


def test_another_table_is_named_and_kept(project, monkeypatch, capsys):
    def run_again(profile, chapter, settings):
        assert settings["01_units"] == {"seed": 7} and settings["machine"] == {"mixed": False}
        Path("runs/smoke-verify").mkdir(parents=True)
        shutil.copytree("figures/smoke", "figures/smoke-verify")
        Path("figures/smoke-verify/01_units.csv").write_text("seed\n8\n")

    monkeypatch.setattr(verify, "run_again", run_again)
    assert verify.main(["--profile", "smoke", "--chapter", "01_units"]) == 1
    said = capsys.readouterr().out
    assert "01_units: 1 numbers without an interval differ by over 1%" in said
    assert Path("figures/smoke-verify/01_units.csv").exists()
    assert verify.main([]) == 0  # a run that checks is none to be checked


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--profile", "nope"], "unknown profile 'nope'; known: "),
        (["--profile", "larger"], "figures/larger has no MANIFEST.json"),
        (["--profile", "smoke"], "no tables of a chapter '02_probe' that is here; use one of: 00_"),
    ],
)
def test_a_chapter_that_cannot_run_again_is_one_line(project, arguments, words, capsys):
    assert verify.main(["--chapter", "02_probe", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
