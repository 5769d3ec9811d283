"""Compare two runs: `python workflow/compare_runs.py figures/embedded elsewhere/figures/embedded`.

Says of each table how many of its numbers differ and by how much at most, and how many of the
second run's values lie outside the first run's 95 % intervals; then which claims of the report got
another verdict. The rule itself is ssah_nb.engine.comparison.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from ssah_nb.engine.comparison import (
    both,
    changed_verdicts,
    comparable,
    compare_tables,
    interval_columns,
    only_in_one,
    outside_values,
    relative_differences,
    run_tables,
    turned_verdicts,
    verdict_lines,
)
from ssah_nb.engine.run import SsahError

DIGITS = 0.01  # of a number without an interval: what another processor may change
TIMES = {"seconds", "minutes"}  # columns that differ between any two runs


def disagreements(first: dict[str, pd.DataFrame], second: dict[str, pd.DataFrame]) -> list[str]:
    """A line for each table that differs by more than intervals or digits allow; verdicts, too."""
    lines = [f"only in one of the runs: {name}" for name in only_in_one(first, second)]
    lines += turned_verdicts(first, second)
    for name in both(first, second):
        if not comparable(first[name], second[name]):
            lines.append(f"{name}: other rows or columns")
            continue
        if name == "paper_vs_ours":
            changed = changed_verdicts(first[name], second[name])
            lines += [f"another verdict: {line}" for line in verdict_lines(changed)]
        outside = len(outside_values(name, first[name], second[name]))
        judged = {
            c for column, ends in interval_columns(first[name]).items() for c in (column, *ends)
        }
        off = relative_differences(first[name], second[name])
        other = int((off.drop(columns=(judged | TIMES) & {*off}) > DIGITS).sum().sum())
        if outside:
            lines.append(f"{name}: {outside} values outside the first run's 95 % intervals")
        if other:
            lines.append(f"{name}: {other} numbers without an interval differ by over {DIGITS:.0%}")
    return sorted(lines)


def show(first: dict[str, pd.DataFrame], second: dict[str, pd.DataFrame]) -> None:
    """Print how two runs' tables differ."""
    for name in only_in_one(first, second):
        print(f"only in one of the runs: {name}")
    table = compare_tables(first, second).set_index("table")
    table.index.name = None
    print(table.to_string(na_rep="-", float_format=lambda x: f"{x:.2g}"))
    if "paper_vs_ours" in table.index:
        claims = first["paper_vs_ours"]
        changed = changed_verdicts(claims, second["paper_vs_ours"])
        print(f"{len(changed)} of {len(claims)} verdicts differ")
        for line in verdict_lines(changed):
            print(f"  {line}")


def main(first: Path, second: Path) -> None:
    """Print what differs between the tables of two folders."""
    show(run_tables(first), run_tables(second))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    try:
        main(options.first, options.second)
    except SsahError as error:
        sys.exit(f"error: {error}")
