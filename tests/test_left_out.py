"""What a run leaves out when its model came aligned."""

import ast
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ssah_nb.engine.claims import FURTHER, LEFT_OUT, TABLES, report_tables, rows_by_name
from ssah_nb.engine.run import SsahError
from ssah_nb.report import judge

ROOT = Path(__file__).parent.parent


def test_what_needs_an_unaligned_model_is_tagged():
    "Else a run that begins aligned fails in the middle."
    needs = ('load_stage(run, "unaligned")', "unaligned_utility")
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        tags = [tag for cell in cells for tag in cell.metadata.get("tags", ())]
        whole = any(
            {"parameters", "needs_unaligned"} <= set(c.metadata.get("tags", ())) for c in cells
        )
        assert whole == (path.stem == "08_budget"), path
        assert not whole or tags.count("needs_unaligned") == 1
        for cell in () if whole else cells:
            if any(words in cell.source for words in needs) and "#| export" not in cell.source:
                tagged = "needs_unaligned" in cell.metadata.get("tags", ())
                assert tagged or "given_stage(run)" in cell.source, (path.stem, cell.source)


def names_in(sources: list[str], context: type) -> set[str]:
    "The names that are set (ast.Store), functions and their arguments, too, or read (ast.Load)."
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    found = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    if context is ast.Store:
        found |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        found |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return found


@pytest.mark.parametrize("chapter", ["02_probe", "03_attribution", "05_transfer"])
def test_nothing_that_stays_reads_what_was_left_out(chapter):
    cells = nbformat.read(ROOT / f"nbs/{chapter}.ipynb", as_version=4).cells
    code = {False: [], True: []}
    for cell in cells:
        if cell.cell_type == "code":
            code["needs_unaligned" in cell.metadata.get("tags", ())].append(cell.source)
    assert code[True]
    only_there = names_in(code[True], ast.Store) - names_in(code[False], ast.Store)
    assert not only_there & names_in(code[False], ast.Load)


def tables_of_an_aligned_run(folder: Path) -> Path:
    "The committed tables as they would be without the unaligned model."
    committed = ROOT / "figures/embedded"
    further = {name for name in FURTHER if (committed / f"{name}.csv").exists()}
    for name in (set(TABLES) | further) - {"table04_budget"}:
        table = pd.read_csv(committed / f"{name}.csv")
        if "model" in table and name != "table02_freezing":
            table = table[table.model != "unaligned"]
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def test_claims_without_an_unaligned_model_are_left_out(tmp_path):
    folders = ROOT / "figures/embedded", tables_of_an_aligned_run(tmp_path)
    reports = []
    for folder in folders:
        rows = rows_by_name(report_tables(folder))
        judged = [judge(rows, experiment) for experiment in "ABCDE"]
        reports.append(pd.concat(judged, ignore_index=True))
    whole, aligned = reports
    assert (whole.claim == aligned.claim).all() and LEFT_OUT not in set(whole.verdict)
    out = aligned.verdict == LEFT_OUT
    assert out[aligned.experiment == "E"].all() and out[aligned.experiment == "A"].sum() == 4
    assert not out[aligned.experiment.isin(["B", "C", "D"])].any()
    assert (whole.verdict[~out] == aligned.verdict[~out]).all()
    (tmp_path / "table01_pruning.csv").unlink()
    with pytest.raises(SsahError, match="no table table01_pruning"):
        report_tables(tmp_path)
