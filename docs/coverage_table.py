"""Write docs/coverage.csv: how much of each module the tests reach. `make coverage` runs them.

Lines count, and so do the processes that tests start: `make reproduce` of the smoke profile runs
each chapter in a kernel of its own, which is the test of the drawings.
"""

import csv
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs/coverage.csv"
LEAST = 90  # percent of all statements
COLUMNS = ("module", "statements", "missed", "covered")


def rows(measured: coverage.Coverage) -> list[dict]:
    """One row for each module, in the order of their names; then one for all."""
    found = []
    for path in sorted((ROOT / "ssah_nb").rglob("*.py")):
        if path.name == "_modidx.py":  # nbdev's list of names
            continue
        _, statements, _, missing, _ = measured.analysis2(str(path))
        if statements:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append(row(name.removesuffix(".__init__"), len(statements), len(missing)))
    total = row("all", *(sum(r[of] for r in found) for of in ("statements", "missed")))
    return [*found, total]


def row(name: str, statements: int, missed: int) -> dict:
    """A row of the table; `covered` in percent."""
    covered = f"{100 * (statements - missed) / max(1, statements):.1f}"
    return dict(zip(COLUMNS, (name, statements, missed, covered)))


def main() -> int:
    """The exit status: 1 when the tests reach too little."""
    measured = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    measured.load()
    found = rows(measured)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    low = [f"{r['module']} {r['covered']} %" for r in found if float(r["covered"]) < LEAST]
    print(f"{TABLE.relative_to(ROOT)}: {found[-1]['covered']} % of the statements")
    if low:
        print(f"below {LEAST} %: {', '.join(low)}")
    return int(float(found[-1]["covered"]) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
