"""Aligns the embedded model on several mixtures of harmful and benign pairs and measures each.

    python benchmarks/mixture.py    # half an hour on two cores; benchmarks/results/mixture.csv

Each is measured on prompts that are neither aligned nor evaluated on: attack success on the
attribution split, over-refusal on the pairs kept for benign fine-tuning. The recipe's mixture is
the cheapest of those measured with its max_words that stays below chapter 2's limits (10 % and
15 %) here; the evaluation prompts play no part in the choice.
"""

import sys
from pathlib import Path

import pandas as pd

from ssah_nb.engine.alignment import RECIPE, align
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.evaluation import attack_success, over_refusal
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import set_seed
from ssah_nb.engine.splits import make_splits

RESULTS = Path(__file__).parent / "results/mixture.csv"
COLUMNS = ["seed", "max_words", "harmful", "from_advbench", "benign", "lr", "batch_size"]
CANDIDATES = [
    (100, 80, 400, 2e-4, 8),
    (160, 130, 400, 2e-4, 8),
    (160, 130, 800, 2e-4, 16),
    (100, 80, 700, 2e-4, 8),
    (60, 50, 420, 2e-4, 8),
    (100, 80, 550, 2e-4, 8),
]


def measure(sources: dict[str, list[dict]], candidate: tuple) -> dict:
    "One row: the rates after alignment on this mixture."
    seed, max_words, harmful, from_harmful, benign, lr, batch_size = candidate
    set_seed(seed)
    sizes = RECIPE["data"]["sizes"] | {
        "harmful_align": harmful,
        "align_from_harmful": from_harmful,
        "benign_align": benign,
    }
    splits = make_splits(**sources, seed=seed, sizes=sizes, max_words=max_words)
    model, tokenizer = load_model(RECIPE["model"])
    training = {name: RECIPE[name] for name in ("epochs", "max_response")}
    align(model, tokenizer, splits, seed, False, lr=lr, batch_size=batch_size, **training)

    attack = attack_success(model, tokenizer, splits["harmful", "attribute"][-100:])
    refused = over_refusal(model, tokenizer, splits["benign", "attack"])
    rates = attack.columns("attack_success") | refused.columns("over_refusal")
    return dict(zip(COLUMNS, candidate)) | rates


def main(candidates: list[tuple] = CANDIDATES):
    data = RECIPE["data"]
    sources = {role: load_pairs(data[role]) for role in ("harmful", "benign", "align_harmful")}
    rows = pd.read_csv(RESULTS).to_dict("records") if RESULTS.exists() else []
    measured = [tuple(row[column] for column in COLUMNS) for row in rows]
    for candidate in ((RECIPE["seed"], data["max_words"], *c) for c in candidates):
        if candidate in measured:
            continue
        rows.append(measure(sources, candidate))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(RESULTS, index=False, float_format="%.4g")


if __name__ == "__main__":
    sys.exit(main())
