"""The engine's pages run from top to bottom: what they show is what the library does."""

import importlib
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    p for p in (ROOT / "nbs/engine").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT / "nbs/engine"))


def code_of(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_runs(path, tmp_path, monkeypatch):
    """Exported cells are left out: their names come from the module, as a user has them."""
    (module,) = re.findall(r"#\| default_exp (\S+)", "\n".join(code_of(path)))
    exported = vars(importlib.import_module(f"ssah_nb.{module}"))
    names = {name: thing for name, thing in exported.items() if not name.startswith("__")}
    names |= {"__name__": "__main__", "display": lambda *shown: None}
    (tmp_path / "figures").mkdir()  # what a page writes goes beside the link
    for name in ("settings.ini", "nbs", "figures/embedded", "figures/protection", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for i, source in enumerate(code_of(path)):
        if not source.startswith(("#| default_exp", "#| export")):
            exec(compile(source, f"{named(path)}, code cell {i}", "exec"), names)
    plt.close("all")
