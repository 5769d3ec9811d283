"""Compare two runs: `python workflow/compare_runs.py figures/embedded elsewhere/figures/embedded`.

Says of each table how many of its numbers differ and by how much at most, and how many of the
second run's values lie outside the first run's 95 % intervals; then which claims of the report got
another verdict. The rule itself is ssah_nb.engine.comparison.
"""

import argparse
import sys
from pathlib import Path

from ssah_nb.engine.comparison import changed_verdicts, compare_tables, run_tables, verdict_lines
from ssah_nb.engine.run import SsahError


def main(first: Path, second: Path) -> None:
    """Print what differs."""
    first, second = run_tables(first), run_tables(second)
    for name in sorted(first.keys() ^ second.keys()):
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    try:
        main(options.first, options.second)
    except SsahError as error:
        sys.exit(f"error: {error}")
