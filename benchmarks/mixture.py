"""Aligns the embedded model on several mixtures and measures each on prompts that are neither aligned nor evaluated on:

    python benchmarks/mixture.py          # about half an hour on two cores; benchmarks/results/mixture.csv

Attack success is measured on the attribution split, over-refusal on the pairs kept for benign fine-tuning. The profile's mixture is the
cheapest of those measured with its max_words that stays below chapter 4's limits (10 % and 15 %) here; the evaluation prompts play no part in the choice.
"""

import sys
from pathlib import Path

import pandas as pd
import yaml

from ssah_nb.engine.alignment import alignment_pairs
from ssah_nb.engine.training import finetune
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.splits import make_splits
from ssah_nb.engine.evaluation import attack_success, over_refusal
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import set_seed

ROOT = Path(__file__).parent.parent
PROFILE = yaml.safe_load((ROOT / "workflow/profiles/embedded/parameters.yaml").read_text())
RESULTS = ROOT / "benchmarks/results/mixture.csv"
COLUMNS = ["seed", "max_words", "harmful", "from_advbench", "benign", "lr", "batch_size"]
CANDIDATES = [
    (100, 80, 400, 2e-4, 8),
    (160, 130, 400, 2e-4, 8),
    (160, 130, 800, 2e-4, 16),
    (100, 80, 700, 2e-4, 8),
    (60, 50, 420, 2e-4, 8),
    (100, 80, 550, 2e-4, 8),
]


def main(candidates: list[tuple] = CANDIDATES):
    data, training, seed = (
        PROFILE["02_data"],
        PROFILE["04_alignment_probe"],
        PROFILE["common"]["seed"],
    )
    rows = (
        pd.read_csv(RESULTS).to_dict("records") if RESULTS.exists() else []
    )  # what was measured is not measured again
    sources = {role: load_pairs(data[role]) for role in ("harmful", "benign", "align_harmful")}
    measured = [tuple(row[c] for c in COLUMNS) for row in rows]
    for candidate in ((seed, data["max_words"], *c) for c in candidates):
        if candidate in measured:
            continue
        *_, harmful, from_harmful, benign, lr, batch_size = candidate
        set_seed(seed)
        sizes = data["sizes"] | {
            "harmful_align": harmful,
            "align_from_harmful": from_harmful,
            "benign_align": benign,
        }
        splits = make_splits(**sources, seed=seed, sizes=sizes, max_words=data["max_words"])
        model, tokenizer = load_model("embedded")
        pairs = alignment_pairs(splits["harmful", "align"], splits["benign", "align"], seed)
        finetune(model, tokenizer, pairs, lr, 1, batch_size, training["max_response"], seed=seed)
        attack, refused = (
            attack_success(model, tokenizer, splits["harmful", "attribute"][-100:]),
            over_refusal(model, tokenizer, splits["benign", "attack"]),
        )
        rows.append(
            dict(zip(COLUMNS, candidate))
            | attack.columns("attack_success")
            | refused.columns("over_refusal")
        )
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(RESULTS, index=False, float_format="%.4g")


if __name__ == "__main__":
    sys.exit(main())
