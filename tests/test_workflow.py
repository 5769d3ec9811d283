"""`make reproduce`: what it says to a wrong profile, and what is left of a run that was killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
# two chapters are enough: the target of the throwaway runs is the second
NAMES = ["00_setup", "01_models"]
TARGET = "runs/smoke/notebooks/01_models.ipynb"
PARAMETERS = "workflow/profiles/smoke/parameters.yaml"
# under `make test`, too, a command is what a user types
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)


def command(*arguments):
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        "workflow/profiles/smoke",
        *arguments,
    ]


def run(arguments, cwd, **options):
    return subprocess.run(
        arguments,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
        **options,
    )


def cells(*sources):
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        }
    )
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    return notebook


@pytest.fixture
def project(tmp_path):
    """The real workflow around two small chapters; each writes a line to runs/order.txt when it starts and a result when it ends."""
    shutil.copytree(
        ROOT / "workflow", tmp_path / "workflow", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / PARAMETERS).write_text("common: {profile: smoke, seed: 0}\n")
    (tmp_path / "nbs").mkdir()
    for name in NAMES:
        notebook = cells(
            'profile = "smoke"  # name of the run\nseed = 1  # seed\nseconds = 0  # how long to wait',
            f'import time\nwith open("runs/order.txt", "a") as order:\n    order.write("{name}\\n")\ntime.sleep(seconds)',
            f'open("runs/{name}.csv", "w").write(f"seed\\n{{seed}}\\n")',
        )
        nbformat.write(notebook, tmp_path / "nbs" / f"{name}.ipynb")
    return tmp_path


def test_unknown_profile_is_one_line():
    result = run(["make", "known-profile", "PROFILE=nope"], ROOT)
    assert result.returncode != 0
    assert (
        result.stdout.splitlines()[0]
        == "error: unknown PROFILE 'nope'; known: embedded extended llama2-7b smoke"
    )


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "01_models: {sed: 3}",
            ["01_models has no parameter 'sed'", "it has: profile, seed, seconds"],
        ),
        ("01_model: {seed: 3}", ["unknown chapter '01_model'", "known: 00_setup, 01_models"]),
        ("common: {sead: 3}", ["no chapter has the common parameter 'sead'"]),
    ],
)
def test_wrong_parameters_are_one_line(project, line, words):
    (project / PARAMETERS).write_text(line + "\n")
    result = run(command(TARGET), project)
    errors = [
        text for text in result.stdout.splitlines() if "Using workflow specific profile" not in text
    ]
    assert (
        result.returncode != 0
        and len(errors) == 1
        and errors[0].startswith(f"error: {PARAMETERS}: ")
    )
    assert all(word in errors[0] for word in words)
    assert not (project / "runs").exists()


def test_profile_that_extends_another_changes_what_it_names(project):
    folder = project / "workflow/profiles/longer"
    shutil.copytree(project / "workflow/profiles/smoke", folder)
    (folder / "parameters.yaml").write_text(
        "extends: smoke\ncommon: {profile: longer}\n01_models: {seed: 7}\n"
    )
    code = "import sys; sys.path.insert(0, 'workflow'); from run_chapter import profile_parameters; print(profile_parameters('longer'))"
    printed = run([sys.executable, "-c", code], project).stdout
    assert eval(printed) == {
        "00_setup": {"profile": "longer", "seed": 0},
        "01_models": {"profile": "longer", "seed": 7},
    }


def test_failing_chapter_says_why_in_one_line(project):
    (project / PARAMETERS).write_text("00_setup: {seconds: -1}\n")
    result = run(command(TARGET), project)
    assert result.returncode != 0
    assert (
        "[1/2] 00_setup: failed: ValueError: sleep length must be non-negative (whole traceback: runs/smoke/logs/00_setup.log)"
        in result.stdout
    )
    assert (
        "Traceback" not in result.stdout
        and "Traceback" in (project / "runs/smoke/logs/00_setup.log").read_text()
    )
    assert not (project / "runs/smoke/notebooks/00_setup.ipynb").exists()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_goes_on_where_it_was(project, stop):
    order = project / "runs/order.txt"
    (project / PARAMETERS).write_text(
        "common: {profile: smoke, seed: 0}\n01_models: {seconds: 600}\n"
    )
    with open(project / "output.txt", "w") as output:
        # a shell's background jobs ignore Ctrl-C
        running = subprocess.Popen(
            command(TARGET),
            cwd=project,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 120
    while not (order.exists() and "01_models" in order.read_text()):
        assert running.poll() is None and time.monotonic() < deadline, (
            project / "output.txt"
        ).read_text()
        time.sleep(0.2)
    if stop == signal.SIGKILL:
        running.kill()  # snakemake alone: the chapter and its kernel must notice
    else:
        os.killpg(running.pid, stop)  # as Ctrl-C does
    running.wait(120)
    assert not (project / TARGET).exists()
    (project / PARAMETERS).write_text("common: {profile: smoke, seed: 0}\n")

    result = run(command(TARGET), project)
    assert result.returncode == 0, result.stdout
    # the finished chapter was not redone
    assert order.read_text().split() == ["00_setup", "01_models", "01_models"]
    assert (project / "runs/01_models.csv").read_text() == "seed\n0\n"
    assert sorted(path.name for path in (project / TARGET).parent.iterdir()) == [
        "00_setup.ipynb",
        "01_models.ipynb",
    ]


@pytest.mark.slow
def test_smoke_profile_runs_every_chapter():
    """Every notebook, top to bottom, with its default parameters; its asserts are the notebook's own tests."""
    chapters = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
    assert len(chapters) == 11
    result = run(command("--forceall"), ROOT)
    assert result.returncode == 0, result.stdout
    assert [
        path.stem for path in sorted((ROOT / "runs/smoke/notebooks").glob("*.ipynb"))
    ] == chapters


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ["nbs", "ssah_nb"]:
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ["settings.ini", "pyproject.toml"]:
        shutil.copy(ROOT / name, tmp_path)
    result = run([Path(sys.executable).with_name("nbdev_export")], tmp_path)
    assert result.returncode == 0, result.stdout
    for path in sorted((tmp_path / "ssah_nb").glob("*.py")):
        assert path.read_bytes() == (ROOT / "ssah_nb" / path.name).read_bytes(), (
            f"{path.name}: run `make export`"
        )


def test_compare_runs_names_what_differs(tmp_path):
    script = [
        sys.executable,
        str(ROOT / "workflow/compare_runs.py"),
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    for folder, rate, verdict in (("a", 0.5, "holds"), ("b", 0.75, "open")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rates.csv").write_text(
            f"model,rate,rate_low,rate_high,n\nx,{rate},0.4,0.6,10\ny,0.1,0.0,0.2,10\n"
        )
        (tmp_path / folder / "paper_vs_ours.csv").write_text(
            f"experiment,claim,measured,low,high,verdict\nB,pruning it ({rate}),{rate},0.4,0.9,{verdict}\n"
        )
    printed = run(script, tmp_path).stdout
    words = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    # rows, numbers, differ, largest, in, intervals, outside
    assert words["rates"] == ["2", "8", "1", "0.33", "rate", "2", "1"]
    assert (
        "1 of 1 verdicts differ" in printed
        and "B: pruning it (0.5): holds (0.5: 0.4 to 0.9), then open (0.75" in printed
    )
    (tmp_path / "b/rates.csv").write_text("model,rate\nx,1\n")
    (tmp_path / "b/paper_vs_ours.csv").write_text(
        "experiment,claim,measured,low,high,verdict\nB,another,0.5,0.4,0.9,holds\n"
    )
    (tmp_path / "b/more.csv").write_text("x\n1\n")
    printed = run(script, tmp_path).stdout
    assert (
        printed.count("other rows or columns") == 2
        and "only in one of the runs: more" in printed
        and "error: the two reports make other claims" in printed
    )
    printed = run([*script[:3], str(tmp_path / "c")], tmp_path).stdout
    assert printed.startswith(f"error: no tables in {tmp_path / 'c'}") and printed.count("\n") == 1
