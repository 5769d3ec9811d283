"""Wall minutes and peak memory of a whole command: `python benchmarks/commands.py make reproduce`.

Adds a row to benchmarks/results/commands.csv, so that the spread between runs is seen. A command
that failed or was killed before goes on, so the minutes of its row are added to. Memory is the
summed proportional set size (pages that processes share count once) of the command and everything
that it starts, sampled every two seconds; on systems without it, the summed resident set size.
"""

import platform
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

RESULTS = Path(__file__).parent / "results" / "commands.csv"


def memory(process: psutil.Process) -> int:  # bytes of the process and all below it
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            info = p.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # it ended while we looked
    return total


def cpu_name() -> str:  # not ssah_nb's processor: ssah_nb is installed by the command that is timed
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def main(command: list[str]) -> int:
    start, peak = time.time(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, memory(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(2)
    row = {
        "command": " ".join(command),
        "minutes": (time.time() - start) / 60,
        "peak_gb": peak / 1e9,
        "starts": 1,
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "exit": process.wait(),
    }
    rows = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=list(row))
    stopped = (rows.command == row["command"]) & (rows.cpu == row["cpu"]) & (rows.exit != 0)
    for before in rows[stopped].itertuples():
        row |= {
            "minutes": row["minutes"] + before.minutes,
            "peak_gb": max(row["peak_gb"], before.peak_gb),
            "starts": before.starts + 1,
        }
    row |= {"minutes": round(row["minutes"], 1), "peak_gb": round(row["peak_gb"], 2)}
    RESULTS.parent.mkdir(exist_ok=True)
    pd.concat([rows[~stopped], pd.DataFrame([row])]).sort_values("command", kind="stable").to_csv(
        RESULTS, index=False
    )
    print(row)
    return row["exit"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
