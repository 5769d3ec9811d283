"""A small project with the real workflow, and commands as a user types them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from clean_notebooks import KERNEL

ROOT = Path(__file__).parent.parent
# two chapters are enough: the target of the throwaway runs is the second
NAMES = ["00_start", "01_units"]
TARGET = "runs/smoke/notebooks/01_units.ipynb"
PARAMETERS = "workflow/profiles/smoke/parameters.yaml"
# under `make test`, too, a command is what a user types
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SSAH_MAKE", "SSAH_SNAKEMAKE"):
    os.environ.pop(name, None)


def command(*arguments):
    profile = "workflow/profiles/smoke"
    return [sys.executable, "-m", "snakemake", "--workflow-profile", profile, *arguments]


def run(arguments, cwd, **options):
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.run(arguments, cwd=cwd, text=True, timeout=900, **both, **options)


def cells(*sources):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    return notebook


PARAMETERS_CELL = """
profile = "smoke"  # name of the run
seed = 1  # seed
seconds = 0.0  # how long to wait
"""
START_CELL = """
import os, time
with open("runs/order.txt", "a") as order:
    order.write("{name}\\n")
time.sleep(seconds)
"""
END_CELL = """
machine = os.environ.get("SSAH_DEVICE"), os.environ.get("SSAH_MIXED")
open("runs/{name}.csv", "w").write(f"seed,device,mixed\\n{{seed}},{{machine[0]}},{{machine[1]}}\\n")
"""


def make_project(folder: Path, *more: str) -> Path:
    """The real workflow around two small chapters.

    Each writes a line to runs/order.txt when it starts, and a result when it ends; `more` are the
    sources of further cells.
    """
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=ignore)
    (folder / PARAMETERS).write_text("common: {profile: smoke, seed: 0}\n")
    (folder / "nbs").mkdir()
    for name in NAMES:
        code = [cell.strip().format(name=name) for cell in (START_CELL, END_CELL, *more)]
        nbformat.write(cells(PARAMETERS_CELL.strip(), *code), folder / f"nbs/{name}.ipynb")
    return folder
