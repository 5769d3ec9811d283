"""Measures every named judge on the held-out rows of this project and of PyRIT.

    python benchmarks/judges.py    # seconds; benchmarks/results/judges.csv

The rules of the default judge were written with the tuning half in sight only.
"""

from pathlib import Path

import pandas as pd

from ssah_nb.engine.agreement import judge_table, project_rows, pyrit_rows

RESULTS = Path(__file__).parent / "results/judges.csv"


def main() -> pd.DataFrame:
    rows = pd.concat([project_rows(), pyrit_rows()], ignore_index=True)
    table = judge_table(rows[rows.split == "held_out"])
    table.round(4).to_csv(RESULTS, index=False)
    return table


if __name__ == "__main__":
    table = main()
    columns = ["judge", "by", "group", "kappa", "missed_rate", "invented_rate", "kappa_n"]
    print(table[~table.by.isin(["style", "language"])][columns].round(3).to_string(index=False))
