"""Runs that are killed, interrupted, started twice, or have no room left on the disk."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import drill
import one_run
import psutil
import pytest
import run_chapter
from helpers import files_at_most
from helpers_workflow import PARAMETERS, ROOT, TARGET, command, make_project, run

TABLES = """
from pathlib import Path
table = Path("figures/smoke/{name}.csv")
table.parent.mkdir(parents=True, exist_ok=True)
table.write_text(f"seed\\n{{seed}}\\n")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project of `make_project`, whose chapters write tables, too, and a Makefile."""
    monkeypatch.chdir(tmp_path)  # `Drill` changes into it
    folder = make_project(tmp_path, TABLES.strip())
    for name in drill.COPIED_FILES:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    drill.link_environment(folder)
    return folder


def settings(project, chapter: str = "", seconds: float = 0):
    lines = ["last: 01_units", "common: {profile: smoke, seed: 0}"]
    lines += [f"{chapter}: {{seconds: {seconds}}}"] if chapter else []
    (project / PARAMETERS).write_text("\n".join(lines) + "\n")


def begin(arguments, cwd: Path, chapter: str) -> subprocess.Popen:
    "Start a command; it has come to a chapter, and its output goes to output.txt."
    with open(cwd / "output.txt", "w") as output:
        started = subprocess.Popen(
            arguments, cwd=cwd, stdout=output, stderr=output, start_new_session=True
        )
    order, deadline = cwd / "runs/order.txt", time.monotonic() + 120
    while not (order.exists() and chapter in order.read_text()):
        assert started.poll() is None, (cwd / "output.txt").read_text()
        assert time.monotonic() < deadline, (cwd / "output.txt").read_text()
        time.sleep(0.1)
    return started


@pytest.mark.slow
def test_a_drill_of_three_kills(project, capsys):
    settings(project, "01_units", 0.5)
    chances = random.Random(0)
    chances.choice = lambda numbers: 1  # chapter at a time
    chances.sample = lambda kinds, k: ["kernel", "group", "make"]  # the others are like these
    failed = drill.run_drill(drill.Drill(project, "smoke", chances), 3)
    said = capsys.readouterr().out.splitlines()
    assert failed == 0, said
    assert len(said) == 6 and said[-1].startswith("3 kills and 1 interrupt, 4 taken up again")
    order = (project / "runs/order.txt").read_text().split()
    assert order[:2] == ["00_start", "01_units"] and len(order) >= 2 + 4


def test_an_interrupt_is_one_line_when_the_cell_ends_after_it(project, monkeypatch, caplog):
    async def cell():
        raise RuntimeError("Kernel died")

    def execute(*_):
        loop = asyncio.new_event_loop()
        left = loop.create_task(cell())
        loop.run_until_complete(asyncio.sleep(0))
        assert left.done()
        raise KeyboardInterrupt

    def interrupted() -> str:
        with pytest.raises(SystemExit) as stopped:
            run_chapter.run_notebook("smoke", "01_units", {})
        return str(stopped.value)

    caplog.set_level("ERROR", logger="asyncio")
    monkeypatch.setattr(run_chapter, "execute", execute)
    (project / "runs/smoke/logs").mkdir(parents=True)
    assert interrupted() == f"[2/2] 01_units{drill.STOPPED}"
    gc.collect()
    assert not caplog.records


def test_the_drill_sees_what_is_wrong(project):
    settings(project)
    tried = drill.Drill(project)
    tried.tables = {"a.csv": b"1"}
    tried.finish = lambda chapters: []
    folder = project / "runs/smoke/logs"
    folder.mkdir(parents=True)
    (project / "figures/smoke").mkdir(parents=True)
    (project / "figures/smoke/a.csv").write_text("2")
    (project / "figures/smoke/.a.csv.1.part").touch()
    (folder / "00_start.log").touch()
    stray = subprocess.Popen(
        ["flock", "runs/smoke/logs/00_start.log", "sleep", "600"], start_new_session=True
    )
    while not one_run.is_held(folder / "00_start.log"):
        time.sleep(0.05)
    tried.patience = 0
    wrong = tried.check([])
    os.killpg(stray.pid, signal.SIGKILL)
    stray.wait()
    words = ["a.csv differs", f"process {stray.pid} still runs", ".a.csv.1.part is left"]
    assert all(any(word in line for line in wrong) for word in [*words, "00_start.log is locked"])


@pytest.mark.slow
def test_a_second_run_of_a_profile_is_refused_while_the_first_goes_on(project):
    settings(project, "01_units", 600)
    first = begin(command(), project, "01_units")
    second = run(command("--forceall"), project)
    line = f"error: a run of 'smoke' is going on here (process {first.pid}); "
    assert second.returncode != 0
    assert second.stdout.splitlines()[-1] == line + "wait until it has ended, or stop it"
    forgotten = run(["make", "clean-run", "PROFILE=smoke"], project)
    assert forgotten.returncode != 0 and line in forgotten.stdout
    assert first.poll() is None and (project / "runs/order.txt").read_text().count("\n") == 2

    kernel = drill.Drill(project).processes("ipykernel_launcher")
    first.kill()  # snakemake alone: the chapter and its kernel must notice
    first.wait()
    settings(project)
    again = run(command(), project)
    assert again.returncode == 0, again.stdout
    # the finished chapter was not redone
    order = (project / "runs/order.txt").read_text().split()
    assert order == ["00_start", "01_units", "01_units"]
    assert (project / "runs/01_units.csv").read_text() == "seed,device,mixed\n0,None,None\n"
    assert kernel and not any(process.is_running() for process in kernel)
    names = [path.name for path in sorted((project / TARGET).parent.iterdir())]
    assert names == ["00_start.ipynb", "01_units.ipynb"]


def test_a_lock_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if not child:
        one_run.start("smoke")
        Path("held").touch()
        time.sleep(600)
    while not Path("held").exists():
        time.sleep(0.05)
    with pytest.raises(one_run.RunningError, match=f"process {child}"):
        one_run.start("smoke")
    assert one_run.is_held(one_run.lock_of("smoke"))
    for name in ("figures/smoke/.a.csv.7.part", "runs/smoke/notebooks/00_start.partial.ipynb"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    child = os.fork()
    if not child:
        one_run.start("smoke")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["held", ".running"]


def test_a_kernel_whose_chapter_was_killed_is_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    kernel = ["sleep", "600"]
    with one_run.temporary("smoke", "00_start"):
        left = subprocess.Popen(kernel, env=os.environ)
        other = subprocess.Popen(kernel, env=os.environ | {"TMPDIR": "/tmp"})
        place = Path(os.environ["TMPDIR"])
        assert oct(place.stat().st_mode & 0o777) == "0o700"
        (place / "rest").touch()
    ended = not psutil.pid_exists(left.pid), other.poll() is not None
    other.kill()
    other.wait()
    left.wait()
    assert ended == (True, False)
    assert not (tmp_path / "runs/smoke/tmp").exists()


@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_is_one_line_and_leaves_the_old_notebook(size, project, monkeypatch):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # it could not write either
    settings(project)
    chapter = [sys.executable, "workflow/run_chapter.py", "smoke", "00_start", "1"]
    done = project / "runs/smoke/notebooks/00_start.ipynb"
    done.parent.mkdir(parents=True)
    done.write_text("old")
    with files_at_most(size):
        result = run(chapter, project)
    *_, last = result.stdout.splitlines()
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "File too large" in last and "free some space" in last
    assert done.read_text() == "old"
    assert psutil.Process().children() == []
    assert run(chapter, project).returncode == 0 and done.read_text() != "old"
