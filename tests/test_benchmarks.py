"""The benchmarks run, on a tiny model."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ssah_nb.engine.splits import TOY_SIZES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "command, words",
    [
        (
            "gpu --shape tiny --device cpu --repeats 1 --rows 1 --tokens 8",
            ["attribution", "training step, f = 0.80"],
        ),
        ("attribution --repeats 1 --pairs 4", ["ratio: time", "(bar 1.10)"]),
        ("training --steps 2 --batch-size 2", ["float32:", "autocast:", "bfloat16:", "mixed:"]),
    ],
)
def test_benchmark_runs(command, words, capsys, monkeypatch):
    monkeypatch.setenv("SSAH_PROGRESS", "1")  # `show_progress` changes it
    monkeypatch.syspath_prepend(BENCHMARKS)  # one imports another
    name, *arguments = command.split()
    benchmark(name).main(arguments)
    said = capsys.readouterr().out
    assert all(word in said for word in words)


def test_the_import_is_timed_in_a_process_of_its_own():
    command = [sys.executable, BENCHMARKS / "imports.py", "--repeats", "1", "--out", "/dev/null"]
    result = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("import ssah_nb", "import freeze"))


def test_generation_finds_the_same_tokens_as_one_padded_batch():
    arguments = ["--rows", "12", "--max-new-tokens", "6", "--batch-size", "5"]
    results = benchmark("generation").main(arguments)
    assert [r["system"] for r in results] == ["none", "short"]
    assert all(r["equal"] == r["rows"] == 12 and r["ratio"] > 0 for r in results)


def test_freezing_keeps_the_memory_bar_and_the_bits():
    shares = (0.28, 0.95)
    arguments = ["--rows", "1", "--tokens", "8", "--steps", "1", "--shares", *map(str, shares)]
    for row, f in zip(benchmark("freezing").main(arguments), shares, strict=True):
        assert abs(row["f"] - f) < 0.005
        assert row["rest"] is (f == 0.95)
        assert row["time"] > 0
        assert row["memory"] <= row["memory_bar"] < row["masked_memory"] == 1
        assert row["kept"]
        # weight decay moves what a mask over the gradient should hold
        assert not row["masked_kept"]


def test_mixture_measures_what_it_was_not_measured_on(tmp_path, monkeypatch):
    mixture = benchmark("mixture")
    recipe = mixture.RECIPE | {"model": "tiny"}
    data = {"harmful": "toy_harmful", "benign": "toy_benign", "align_harmful": "toy_harmful"}
    recipe["data"] = data | {"max_words": 9, "sizes": TOY_SIZES}
    monkeypatch.setattr(mixture, "RECIPE", recipe)
    monkeypatch.setattr(mixture, "RESULTS", tmp_path / "mixture.csv")
    candidates = [(12, 12, 40, 1e-3, 8), (12, 12, 48, 1e-3, 8)]
    for wanted in (candidates[:1], candidates, candidates):  # what was measured is not redone
        mixture.main(wanted)
        table = pd.read_csv(tmp_path / "mixture.csv")
        assert list(table.benign) == [candidate[2] for candidate in wanted]
    assert {"attack_success", "over_refusal_high"} <= set(table.columns)
