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
    numbers = [name for name in first if first[name].dtype.kind in "ifb"]
    texts = [name for name in first if name not in numbers and name != "verdict"]
    if list(first) != list(second) or not first[texts].equals(second[texts]):
        return {"rows": "other rows or columns"}
    a, b = first[numbers].astype(float), second[numbers].astype(float)
    off = (
        ((a - b).abs() / pd.concat([a.abs(), b.abs()]).groupby(level=0).max())
        .fillna(0)
        .mask(a.isna() != b.isna(), float("inf"))
    )
    ends = {
        name.removesuffix("_low"): f"{name.removesuffix('_low')}_"
        for name in numbers
        if name.endswith("_low")
    }
    ends |= {
        name: "" for name in ("margin", "measured") if name in numbers
    }  # their interval is called low and high
    outside = sum(
        int(((b[name] < a[f"{end}low"]) | (b[name] > a[f"{end}high"])).sum())
        for name, end in ends.items()
    )
    largest = off.max()
    return {
        "rows": len(a),
        "numbers": a.size,
        "differ": int((off > 0).sum().sum()),
        "largest": largest.max(),
        "in": largest.idxmax() if largest.max() else "",
        "intervals": len(a) * len(ends),
        "outside": outside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    first, second = read(options.first), read(options.second)
    for name in sorted(first.keys() ^ second.keys()):
        print(f"only in one of the runs: {name}")
    found = pd.DataFrame(
        {name: compare(first[name], second[name]) for name in first if name in second}
    ).T
    print(found.to_string(na_rep="-", float_format=lambda x: f"{x:.2g}"))
    if "paper_vs_ours" in first.keys() & second.keys():
        claims, others = first["paper_vs_ours"], second["paper_vs_ours"]
        plain = [
            report.claim.str.replace(r" \(.*?\)", "", regex=True) for report in (claims, others)
        ]  # what is in brackets may be measured
        if not plain[0].equals(plain[1]):
            sys.exit(
                "error: the two reports make other claims, so their verdicts cannot be compared; run chapter 10 of both anew"
            )
        changed = claims.merge(
            others, left_index=True, right_index=True, suffixes=("", "_second")
        ).query("verdict != verdict_second")
        print(f"{len(changed)} of {len(claims)} verdicts differ")
        for row in changed.itertuples():
            print(
                f"  {row.experiment}: {row.claim}: {row.verdict} ({row.measured:.3g}: {row.low:.3g} to {row.high:.3g}), "
                f"then {row.verdict_second} ({row.measured_second:.3g}: {row.low_second:.3g} to {row.high_second:.3g})"
            )


if __name__ == "__main__":
    main()
