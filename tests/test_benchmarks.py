"""The benchmarks that have no test beside their subject run, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            [
                "gpu.py",
                "--shape",
                "tiny",
                "--device",
                "cpu",
                "--repeats",
                "1",
                "--rows",
                "1",
                "--tokens",
                "8",
            ],
            ["attribution", "training step, f = 0.80"],
        ),
        (["attribution.py", "--repeats", "1", "--pairs", "4"], ["ratio: time", "(bar 1.10)"]),
        (
            ["training.py", "--steps", "2", "--batch-size", "2"],
            ["float32:", "autocast:", "bfloat16:", "mixed:"],
        ),
    ],
)
def test_benchmark_runs(arguments, words):
    result = subprocess.run(
        [sys.executable, BENCHMARKS / arguments[0], *arguments[1:]],
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in words)
