"""What `make test-slurm` says when Slurm is not there, or when a run through it differs.

The run itself takes minutes and needs Slurm, so it is no part of `make test`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import slurm
from helpers import one_line, write

ROOT = Path(__file__).parent.parent


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(slurm, "found", lambda program: None)
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    programs, plugin = slurm.missing()
    assert programs.startswith("not installed: munged, slurmctld, slurmd, sbatch")
    assert "apt-get install slurm-wlm munge" in programs
    assert "snakemake-executor-plugin-slurm" in plugin and ".[slurm]" in plugin
    monkeypatch.setattr(slurm, "found", lambda program: None if program == "munged" else "/there")
    assert slurm.missing()[0].startswith("not installed: munged (")


def test_make_stops_before_anything_runs(tmp_path):
    "With no program to be found, it ends at once with one line for each thing that is missing."
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'workflow')!r}); import slurm, runpy\n"
    script += "import shutil; shutil.which = lambda *_, **__: None\n"
    script += f"runpy.run_path({str(ROOT / 'workflow/slurm.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("not installed: munged")
    assert not list(tmp_path.iterdir())


def test_tables_that_differ_are_named(tmp_path, capsys):
    local, through = tmp_path / "a", tmp_path / "b"
    for folder, value in ((local, 1), (through, 2)):
        (folder / "figures/smoke").mkdir(parents=True)
        write(folder / "figures/smoke/same.csv", "x\n1\n")
        write(folder / "figures/smoke/fig.csv", f"x\n{value}\n")
    write(through / "figures/smoke/more.csv", "x\n")
    a, b = (slurm.tables(folder, "smoke") for folder in (local, through))
    with pytest.raises(slurm.SlurmError, match="of 2 tables differ: fig.csv, more.csv") as error:
        slurm.compare(a, b)
    one_line(error)
    with pytest.raises(slurm.SlurmError, match="0 of 0"):
        slurm.compare({}, {})
    slurm.compare(a, dict(a))
    assert capsys.readouterr().out == "2 tables are the same, byte for byte\n"


def test_a_copy_has_what_git_would_take(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("kept.py", "new.py", "gone.py", "runs.log"):
        write(repository / name, name)
    write(repository / ".gitignore", "*.log\n")
    subprocess.run(["git", "add", "kept.py", "gone.py", ".gitignore"], check=True)
    (repository / "gone.py").unlink()
    copy = slurm.checkout(tmp_path / "copy")
    assert sorted(p.name for p in copy.iterdir()) == [".gitignore", "kept.py", "new.py"]
