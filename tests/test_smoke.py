"""The smoke profile, run in this checkout: every chapter, and then the comparison."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers_workflow import command, run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_smoke_profile_runs_every_chapter():
    """Every chapter, top to bottom, on the tiny model; its asserts are the chapter's own tests."""
    chapters = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
    assert len(chapters) == 10
    shutil.rmtree(ROOT / "runs/smoke/notebooks", ignore_errors=True)  # of other tests' runs
    result = run(command("--forceall"), ROOT)
    assert result.returncode == 0, result.stdout
    executed = sorted((ROOT / "runs/smoke/notebooks").glob("*.ipynb"))
    assert [path.stem for path in executed] == chapters


@pytest.mark.slow
def test_the_page_runs_on_the_tiny_model_and_takes_up_what_was_kept():
    command = [sys.executable, "workflow/run_chapter.py", "smoke", "protection", "1"]
    environment = os.environ | {"SSAH_PROGRESS": "0"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    shutil.rmtree(ROOT / "runs/smoke/protection", ignore_errors=True)  # kept whatever the code is
    tables = []
    for _ in range(2):
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append((ROOT / "figures/smoke/protection.csv").read_text())
    assert tables[0] == tables[1]
    assert done.stdout.count("; 0 to run") >= 2
    rows = pd.read_csv(ROOT / "figures/smoke/protection.csv")
    assert {"full", "anchor_answers"} <= set(rows.way) and len(set(rows.condition)) == 3
