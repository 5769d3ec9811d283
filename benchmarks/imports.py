"""Seconds that an import takes: `python benchmarks/imports.py [--repeats 5]`.

Each line is timed in a new process, after the lines before it. CPU seconds, the least of all
repeats, since other work on the machine only adds. Writes benchmarks/results/imports.csv.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results" / "imports.csv"
LINES = (
    "import torch, transformers",
    "import ssah_nb",
    "from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback",
    "from ssah_nb import freeze",
)
TIMED = """
import sys, time
for line in sys.argv[1:]:
    start = time.process_time()
    exec(line)
    print(time.process_time() - start)
"""


def seconds() -> list[float]:
    """What each line takes, in one new process."""
    command = [sys.executable, "-c", TIMED, *LINES]
    out = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return [float(line) for line in out.split()]


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    least = map(min, zip(*(seconds() for _ in range(options.repeats))))
    table = pd.DataFrame({"line": LINES, "seconds": [round(s, 3) for s in least]})
    table.to_csv(options.out, index=False)
    print(table.to_string(index=False))
    return table


if __name__ == "__main__":
    main()
