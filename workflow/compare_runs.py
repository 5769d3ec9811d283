"""Compare two runs' tables: `python workflow/compare_runs.py figures/embedded ../elsewhere/figures/embedded`.

Says of each table how many of its numbers differ and by how much at most, and how many of the second run's values lie outside the first run's
95 % intervals; then which claims of the report got another verdict.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd


def read(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    if not tables:
        sys.exit(f"error: no tables in {folder}; give the figures folders of two runs")
    return tables


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict:
    """What differs between two forms of one table."""
    texts = [name for name in first if first[name].dtype.kind not in "if" and name != "verdict"]
    if list(first) != list(second) or not first[texts].equals(second[texts]):
        return {"rows": "other rows or columns"}
    numbers = [name for name in first if first[name].dtype.kind in "if"]
    a, b = first[numbers], second[numbers]
    off = ((a - b).abs() / pd.concat([a.abs(), b.abs()]).groupby(level=0).max()).fillna(0).mask(a.isna() != b.isna(), float("inf"))
    value = {name.removesuffix("_low"): name for name in numbers if name.endswith("_low")} | ({"measured": "low"} if "measured" in first else {})
    value |= {"margin": "low"} if "margin" in first else {}
    outside = sum(int(((b[v] < a[low]) | (b[v] > a[low[:-3] + "high"])).sum()) for v, low in value.items())
    worst = off.max().idxmax()
    return {"rows": len(a), "numbers": a.size, "differ": int((off > 0).sum().sum()), "largest": off.max().max(), "in": worst if off.max().max() else "",
            "intervals": len(a) * len(value), "outside": outside}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    first, second = read(options.first), read(options.second)
    for name in first.keys() ^ second.keys():
        print(f"only in one of the runs: {name}")
    found = pd.DataFrame({name: compare(first[name], second[name]) for name in first if name in second}).T
    print(found.to_string(na_rep="-", float_format=lambda x: f"{x:.2g}"))
    if "paper_vs_ours" in first.keys() & second.keys():
        claims, others = first["paper_vs_ours"], second["paper_vs_ours"]
        plain = [report.claim.str.replace(r" \(.*?\)", "", regex=True) for report in (claims, others)]  # what is in brackets may be measured
        if not plain[0].equals(plain[1]):
            sys.exit("error: the two reports make other claims, so their verdicts cannot be compared; run chapter 10 of both anew")
        changed = claims.merge(others, left_index=True, right_index=True, suffixes=("", "_second")).query("verdict != verdict_second")
        print(f"{len(changed)} of {len(claims)} verdicts differ")
        for row in changed.itertuples():
            print(f"  {row.experiment}: {row.claim}: {row.verdict} ({row.measured:.3g}: {row.low:.3g} to {row.high:.3g}), "
                  f"then {row.verdict_second} ({row.measured_second:.3g}: {row.low_second:.3g} to {row.high_second:.3g})")
    return found


if __name__ == "__main__":
    main()
