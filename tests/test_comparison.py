"""Comparing two runs: what differs, and whether it matters."""

import subprocess
import sys
from pathlib import Path

import compare_runs
import pandas as pd
import pytest
from helpers import one_line

from ssah_nb.engine.comparison import agreement, compare_tables, run_tables
from ssah_nb.engine.run import SsahError

ROOT = Path(__file__).parent.parent
RATES = "model,rate,rate_low,rate_high,n\nx,{rate},0.4,0.6,10\ny,0.1,0.0,0.2,10\n"
CLAIMS = "experiment,claim,measured,low,high,verdict\n{claim},{rate},0.4,0.9,{verdict}\n"


def write_run(folder: Path, rate: float, verdict: str) -> None:
    folder.mkdir()
    claims = CLAIMS.format(claim=f"B,pruning it ({rate})", rate=rate, verdict=verdict)
    (folder / "rates.csv").write_text(RATES.format(rate=rate))
    (folder / "paper_vs_ours.csv").write_text(claims)


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    write_run(tmp_path / "a", 0.5, "holds")
    write_run(tmp_path / "b", 0.75, "open")
    return tmp_path / "a", tmp_path / "b"


def test_compare_runs_names_what_differs(runs, capsys):
    compare_runs.main(*runs)
    said = capsys.readouterr().out
    words = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    # rows, numbers, differ, largest, in, intervals, outside
    assert words["rates"] == ["2", "8", "1", "0.33", "rate", "2", "1"]
    assert "1 of 1 verdicts differ" in said
    assert "B: pruning it (0.5): holds (0.5: 0.4 to 0.9), then open (0.75" in said


def test_compare_runs_names_what_cannot_be_compared(runs, capsys):
    (runs[1] / "rates.csv").write_text("model,rate\nx,1\n")
    other = CLAIMS.format(claim="B,another", rate=0.5, verdict="holds")
    (runs[1] / "paper_vs_ours.csv").write_text(other)
    (runs[1] / "more.csv").write_text("x\n1\n")
    with pytest.raises(SsahError, match="the two reports make other claims") as error:
        compare_runs.main(*runs)
    one_line(error)
    said = capsys.readouterr().out
    assert said.count("other rows or columns") == 2
    assert "only in one of the runs: more" in said


def test_an_earlier_comparison_is_no_table_of_one_run(runs, capsys):
    (runs[0] / "comparison.csv").write_text("table,rows\nrates,2\n")
    compare_runs.main(*runs)
    assert "comparison" not in capsys.readouterr().out
    assert not [line for line in agreement(*map(run_tables, runs)) if "only in one" in line]


def test_an_error_of_compare_runs_is_one_line(runs, tmp_path):
    script = [sys.executable, ROOT / "workflow/compare_runs.py", runs[0], tmp_path / "c"]
    result = subprocess.run(script, text=True, capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: no tables in {tmp_path / 'c'}")
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_a_run_agrees_with_itself(runs):
    tables = run_tables(runs[0])
    found = compare_tables(tables, tables)
    assert list(found["differ"]) == list(found["outside"]) == [0, 0]
    assert "1 of 1 verdicts agree" in agreement(tables, tables)[0]


def test_agreement_names_a_verdict_that_changed(runs):
    said = "\n".join(agreement(*map(run_tables, runs)))
    assert "0 of 1 verdicts agree" in said
    assert "pruning it" in said


def test_a_value_that_is_gone_lies_outside(runs):
    tables = run_tables(runs[0])
    gone = tables["rates"].copy()
    gone.loc[0, ["rate", "rate_low", "rate_high"]] = float("nan")
    for first, second in ((tables["rates"], gone), (gone, tables["rates"])):
        said = agreement(tables | {"rates": first}, tables | {"rates": second})
        assert "1 of" in said[0] and "values lie outside" in said[0]


def test_a_turned_verdict_of_a_way_hides_nothing_else():
    columns = {"way": ["full", "replay"], "safety": ["fails", "open"], "utility": ["open", "open"]}
    ends = {"attack_success_low": [0.4, 0.1], "attack_success_high": [0.6, 0.3]}
    first = pd.DataFrame(columns | {"attack_success": [0.5, 0.2]} | ends)
    second = first.assign(attack_success=0.2, safety=["fails", "holds"])
    said = "\n".join(agreement({"protection": first}, {"protection": second}))
    assert "1 of 2 values lie outside" in said and "protection: verdicts that turned: 1" in said
    numbers = pd.DataFrame({"unit": ["a"], "safety": [0.1], "utility": [float("nan")]})
    for same in (first.assign(safety=[float("nan"), "open"]), numbers):
        other = same.assign(safety=same.safety * (1 + 1e-9)) if same is numbers else same
        assert "turned" not in "\n".join(agreement({"t": same}, {"t": other}))


@pytest.mark.parametrize("value, off", [(2.0, 0.5), (float("nan"), float("inf")), (1.0, 0)])
def test_a_difference_is_relative_and_infinite_where_one_is_missing(value, off):
    first, second = (pd.DataFrame({"name": ["a"], "x": [x]}) for x in (1.0, value))
    found = compare_tables({"t": first}, {"t": second})
    assert found.largest[0] == off
