"""`make reproduce`: what it says to a wrong profile, and what is left of a run that was killed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import drill
import nbformat
import pytest
import profile_values
import run_chapter
import users_model
from helpers_workflow import PARAMETERS, TARGET, command, make_project, run

ROOT = Path(__file__).parent.parent
PROFILES = sorted(path.name for path in (ROOT / "workflow/profiles").iterdir())


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


def test_unknown_profile_is_one_line():
    result = run(["make", "known-profile", "PROFILE=nope"], ROOT)
    assert result.returncode != 0
    known = " ".join(PROFILES)
    assert result.stdout.splitlines()[0] == f"error: unknown PROFILE 'nope'; known: {known}"


def test_help_lists_what_the_makefile_can_do():
    result = run(["make", "help"], ROOT)
    assert result.returncode == 0, result.stdout
    listed = re.findall(r"^make ([a-z-]+)", result.stdout, re.M)
    assert {"reproduce", "test", "docs", "verify", "test-slurm"} <= set(listed)
    lines = (ROOT / "Makefile").read_text().splitlines()
    assert all(f"{target}:" in " ".join(lines) for target in listed)
    assert result.stdout.splitlines()[-1] == lines[lines.index("") - 1].removeprefix("# ")


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "01_units: {sed: 3}",
            ["01_units has no parameter 'sed'", "it has: profile, seed, seconds"],
        ),
        ("01_unit: {seed: 3}", ["unknown chapter '01_unit'", "known: 00_start, 01_units"]),
        ("common: {sead: 3}", ["no chapter has the common parameter 'sead'"]),
        ("01_units: {seed: -3}", ["01_units: seed is -3; give a number of at least 0"]),
        ("01_units: {seconds: .nan}", ["seconds is nan; give a number of at least 0"]),
        ("common: {seed: '3'}", ["seed is '3', and the notebook has 1; give a value of that kind"]),
        ("01_units: {seed: }", ["seed is None"]),
        ("01_units: {seconds: 1e-3}", ["seconds is '1e-3'", "write 1.0e-3"]),
        ("last: [01_units]", ["last is ['01_units']; give one name"]),
        ("model_files: 3", ["model_files is 3; give a list of paths"]),
        (
            "machine: {devise: cpu}",
            ["machine has no devise", "it has: device, dtype, mixed, at_once"],
        ),
    ],
)
def test_wrong_parameters_are_one_line(project, line, words):
    (project / PARAMETERS).write_text(line + "\n")
    result = run(command(TARGET), project)
    ours = "Using workflow specific profile"
    errors = [text for text in result.stdout.splitlines() if ours not in text]
    assert result.returncode != 0
    assert len(errors) == 1 and errors[0].startswith(f"error: {PARAMETERS}: ")
    assert all(word in errors[0] for word in words)
    assert not (project / "runs").exists()


@pytest.fixture
def longer(project, monkeypatch):
    "A profile that changes what it names of another one; its project is the current folder."
    folder = project / "workflow/profiles/longer"
    shutil.copytree(project / "workflow/profiles/smoke", folder)
    (project / PARAMETERS).write_text(
        "common: {profile: smoke, seed: 0}\nmachine: {device: cpu, mixed: false}\n"
    )
    (folder / "parameters.yaml").write_text(
        "extends: smoke\ncommon: {profile: longer}\n01_units: {seed: 7}\nmachine: {mixed: true}\n"
    )
    monkeypatch.chdir(project)
    return "longer"


def test_profile_that_extends_another_changes_what_it_names(longer):
    assert profile_values.profile_parameters(longer) == {
        "00_start": {"profile": "longer", "seed": 0},
        "01_units": {"profile": "longer", "seed": 7},
    }
    assert profile_values.machine("smoke") == {"SSAH_DEVICE": "cpu", "SSAH_MIXED": "False"}
    assert profile_values.machine(longer) == {"SSAH_DEVICE": "cpu", "SSAH_MIXED": "True"}


def test_common_parameters_win_over_those_that_the_other_profile_gives_a_chapter(longer, project):
    (project / PARAMETERS).write_text("common: {seed: 0}\n01_units: {seed: 5, seconds: 0.5}\n")
    own = project / "workflow/profiles/longer/parameters.yaml"
    own.write_text("extends: smoke\ncommon: {seed: 7}\n")
    assert profile_values.profile_parameters(longer) == {
        "00_start": {"profile": "longer", "seed": 7},
        "01_units": {"profile": "longer", "seed": 7, "seconds": 0.5},
    }
    own.write_text("extends: smoke\ncommon: {seed: 7}\n01_units: {seed: 8}\n")
    assert profile_values.profile_parameters(longer)["01_units"]["seed"] == 8


def test_parameters_from_outside_win_and_are_checked(longer, project, monkeypatch):
    monkeypatch.setenv("SSAH_PARAMETERS", '{"01_units": {"seed": 9}}')
    assert profile_values.profile_parameters(longer)["01_units"]["seed"] == 9
    assert profile_values.profile_parameters(longer)["00_start"]["seed"] == 0
    for said, words in (
        ('{"1_units": {"seed": 9}}', "SSAH_PARAMETERS: unknown chapter '1_units'"),
        ('{"01_units": {"sed": 9}}', "SSAH_PARAMETERS: 01_units has no parameter 'sed'"),
        ('{"01_units": 3}', "is not usable; give JSON such as"),
        ('{"01_units": {"profile": "z"}}', "the run is called 'longer'; leave profile out"),
    ):
        monkeypatch.setenv("SSAH_PARAMETERS", said)
        with pytest.raises(profile_values.ProfileError, match=words):
            profile_values.profile_parameters(longer)


@pytest.mark.slow
def test_a_change_of_the_parameters_from_outside_runs_their_chapter_anew(project):
    assert run(command(TARGET), project).returncode == 0
    changed = os.environ | {"SSAH_PARAMETERS": '{"01_units": {"seed": 9}}'}
    for _ in range(2):  # the second time there is nothing to do
        assert run(command(TARGET), project, env=changed).returncode == 0
    assert (project / "runs/01_units.csv").read_text().startswith("seed,device,mixed\n9,")
    assert (project / "runs/order.txt").read_text().split() == ["00_start", "01_units", "01_units"]


def test_a_chapter_that_no_rule_runs_is_refused(project):
    shutil.copy(project / "nbs/01_units.ipynb", project / "nbs/10_mine.ipynb")
    (project / PARAMETERS).write_text("10_mine: {seed: 3}\n")
    result = run(command(TARGET), project)
    assert result.returncode != 0
    assert "error: 10_mine has no line in NEEDS of workflow/Snakefile" in result.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_data_of_the_hub_need_a_run_that_may_ask_it(profile, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.chdir(tmp_path)
    path = Path(f"workflow/profiles/{profile}/parameters.yaml")
    path.write_text(f"extends: {profile}2\nhub: false\n00_start: {{source: hub}}\n")
    shutil.copytree(ROOT / f"workflow/profiles/{profile}", path.parent.with_name(f"{profile}2"))
    with pytest.raises(
        profile_values.ProfileError, match="00_start has source: hub; then say hub: true in"
    ):
        profile_values.profile_parameters(profile)


def test_a_profile_runs_under_its_own_name_and_keeps_what_it_does_not_change(longer, project):
    settings = project / "workflow/profiles/longer/parameters.yaml"
    settings.write_text("extends: smoke\ncommon:\n01_units: {seed: 7}\n")
    assert profile_values.profile_parameters(longer) == {
        "00_start": {"profile": "longer", "seed": 0},
        "01_units": {"profile": "longer", "seed": 7},
    }
    settings.write_text("extends: smoke\ncommon: {profile: smoke}\n")
    with pytest.raises(profile_values.ProfileError, match="profile: smoke; take that line out"):
        profile_values.profile_parameters(longer)


@pytest.mark.parametrize(
    "line, words",
    [
        ("machine: {mixed: maybe}", "mixed is 'maybe'; use true, false or auto"),
        ("machine: {device: gpu}", "device is 'gpu'; use auto, cpu"),
        ("machine: {at_once: two}", "at_once is 'two'; use a whole number"),
        ("hub: 'no'", "hub is 'no'; use true or false"),
    ],
)
def test_a_value_that_no_machine_has_is_refused(longer, project, line, words):
    settings = project / "workflow/profiles/longer/parameters.yaml"
    settings.write_text(f"extends: smoke\n{line}\n")
    with pytest.raises(profile_values.ProfileError, match=words):
        profile_values.machine(longer)


def test_a_chapter_runs_with_the_machine_of_its_profile(longer, project):
    result = run([sys.executable, "workflow/run_chapter.py", longer, "01_units", "1"], project)
    assert result.returncode == 0, result.stdout
    assert (project / "runs/01_units.csv").read_text() == "seed,device,mixed\n7,cpu,True\n"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("extends: smoke\n01_units: {seed: 7}\n01_units: {seed: 8}\n", "line 3 gives '01_units'"),
        ("extends: smoke\n01_units:\n  seed: 7\n  seconds: 0\n  seed: 8\n", "line 5 gives 'seed'"),
        ("machine: {mixed: true, mixed: false}\n", "line 1 gives 'mixed'"),
    ],
)
def test_a_name_that_a_profile_gives_twice_is_refused(longer, project, text, where):
    settings = project / "workflow/profiles/longer/parameters.yaml"
    settings.write_text(text)
    with pytest.raises(
        profile_values.ProfileError, match=f"parameters.yaml.*: {where} a second time"
    ):
        profile_values.read_profile(longer)


def test_a_profile_can_ask_for_every_device_that_a_model_can_have(longer, project):
    settings = project / "workflow/profiles/longer/parameters.yaml"
    for device in ("auto", "cpu", "cuda", "cuda:1", "spread"):
        settings.write_text(f"extends: smoke\nmachine: {{device: '{device}'}}\n")
        assert profile_values.machine(longer)["SSAH_DEVICE"] == device


def rows_of(page: str, heading: str) -> list[str]:
    "The first column of the table under a heading, without the marks of code."
    cells = nbformat.read(ROOT / page, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    section = text.partition(f"## {heading}\n")[2].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    return [row.replace("`", "") for row in rows]


def test_every_variable_that_is_read_stands_in_the_table():
    folders = (("ssah_nb", "*.py"), ("workflow", "*.py"), ("workflow", "Snakefile"))
    files = [path for folder, name in folders for path in (ROOT / folder).rglob(name)]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "Makefile"])
    read = set(re.findall(r"\bSSAH_[A-Z_]+", text))
    read |= {f"SSAH_{name.upper()}" for name in profile_values.VALUES}
    assert {"SSAH_CACHE", "SSAH_PARAMETERS", "SSAH_AT_ONCE", "SSAH_MAKE"} <= read
    assert sorted(rows_of("nbs/engine/run.ipynb", "Settings from outside")) == sorted(read)


def test_every_section_of_a_profile_stands_in_the_table():
    rows = rows_of("nbs/engine/run.ipynb", "What a profile says")
    files = (ROOT / "workflow/profiles").glob("*/parameters.yaml")
    said = {name for path in files for name in profile_values.read_settings(path)}
    said |= users_model.own_profile("smoke", "org/model", [], "auto", "smoke-model").keys()
    named = said - set(profile_values.notebooks()) - {"machine"}
    machine = {f"machine: {name}" for name in profile_values.VALUES}
    assert set(rows) == named | machine | {"04_classes, ..."}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_names_parameters_that_the_chapters_have(profile, monkeypatch):
    monkeypatch.chdir(ROOT)
    parameters = profile_values.profile_parameters(profile)
    assert list(parameters) == profile_values.notebooks()
    assert all(values["profile"] == profile for values in parameters.values() if values)
    known = {"SSAH_DEVICE", "SSAH_DTYPE", "SSAH_MIXED", "SSAH_AT_ONCE"}
    assert set(profile_values.machine(profile)) <= known


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_can_be_copied(profile, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.chdir(tmp_path)
    folder = Path("workflow/profiles")
    shutil.copytree(folder / profile, folder / "mine")
    original, copied = (profile_values.profile_parameters(name) for name in (profile, "mine"))
    for chapter, values in original.items():
        assert copied[chapter] == values | ({"profile": "mine"} if values else {})


@pytest.mark.slow
def test_make_runs_a_copied_profile_under_its_own_name(project):
    folder = project / "workflow/profiles"
    shutil.copytree(folder / "smoke", folder / "mine")
    (folder / "mine/parameters.yaml").write_text("extends: smoke\n01_units: {seed: 7}\n")
    (project / PARAMETERS).write_text("last: 01_units\ncommon: {seed: 0}\n")
    for name in drill.COPIED_FILES:
        shutil.copy(ROOT / name, project)
    drill.link_environment(project)
    result = run(["make", "reproduce", "PROFILE=mine"], project)
    assert result.returncode == 0, result.stdout
    assert (project / "runs/mine/notebooks/01_units.ipynb").exists()
    assert not (project / "runs/smoke").exists()
    assert (project / "runs/01_units.csv").read_text().startswith("seed,device,mixed\n7,")
    assert "finished: notebooks in runs/mine/notebooks" in result.stdout


def tables(folder: Path, value: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("rates.csv", "MANIFEST.json", "rates.png"):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("with_git", [False, True])
def test_the_committed_tables_are_kept_aside(with_git, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables(tmp_path / "figures/smoke", 1)
    if with_git:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "tables"]):
            subprocess.run(["git", *arguments], check=True)
        tables(tmp_path / "figures/smoke", 2)  # a run has written since
    kept = tmp_path / "runs/smoke/committed"
    tables(kept, 3)
    (kept / "old.csv").write_text("from a run before")
    run_chapter.keep_committed("smoke")
    assert sorted(path.name for path in kept.iterdir()) == ["MANIFEST.json", "rates.csv"]
    assert (kept / "rates.csv").read_text() == "1\n"
    run_chapter.keep_committed("never")  # a profile without figures
    assert list((tmp_path / "runs/never/committed").iterdir()) == []


def test_failing_chapter_says_why_in_one_line(project):
    (project / PARAMETERS).write_text("00_start: {seconds: 1.0e+30}\n")
    result = run(command(TARGET), project)
    assert result.returncode != 0
    log = "runs/smoke/logs/00_start.log"
    assert "[1/2] 00_start: failed: OverflowError: " in result.stdout
    assert f"(whole traceback: {log})" in result.stdout
    assert "Traceback" not in result.stdout
    assert "Traceback" in (project / log).read_text()
    assert not (project / "runs/smoke/notebooks/00_start.ipynb").exists()


def test_package_is_what_the_notebooks_export(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "ssah_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (tmp_path / "ssah_nb").rglob("*.py"):  # one without a notebook must not stay
        if "AUTOGENERATED" in path.read_text():
            path.unlink()
    result = run([Path(sys.executable).parent / "nbdev_export"], tmp_path)
    assert result.returncode == 0, result.stdout
    exported, here = tmp_path / "ssah_nb", ROOT / "ssah_nb"
    modules = [path.relative_to(exported) for path in sorted(exported.rglob("*.py"))]
    assert modules == [path.relative_to(here) for path in sorted(here.rglob("*.py"))]
    stale = [str(m) for m in modules if (exported / m).read_bytes() != (here / m).read_bytes()]
    assert not stale, "run `make export`"
