"""Aligns the embedded model by DPO with several learning rates and weights of the chosen answers' SFT loss:

    python benchmarks/preferences.py          # benchmarks/results/preferences.csv

Measured as in mixture.py, on prompts that are neither aligned nor evaluated on.
"""

import sys
from pathlib import Path

import pandas as pd
import yaml

from ssah_nb.budget import finetune_dpo, preferences
from ssah_nb.data import load_pairs, make_splits
from ssah_nb.evaluation import attack_success, generate, over_refusal, perplexity
from ssah_nb.models import load_model
from ssah_nb.setup import set_seed

ROOT = Path(__file__).parent.parent
PROFILE = yaml.safe_load((ROOT/"workflow/profiles/embedded/parameters.yaml").read_text())
RESULTS = ROOT/"benchmarks/results/preferences.csv"
CANDIDATES = [(5e-5, 0.0), (2e-4, 0.0), (1e-4, 1.0), (2e-4, 1.0), (4e-4, 1.0)]


def main(candidates: list[tuple] = CANDIDATES):
    data, training, seed = PROFILE["02_data"], PROFILE["09_budget"], PROFILE["common"]["seed"]
    sources = {role: load_pairs(data[role]) for role in ("harmful", "benign", "align_harmful")}
    splits = make_splits(**sources, seed=seed, sizes=data["sizes"], max_words=data["max_words"])
    model, tokenizer = load_model("embedded")
    complied = generate(model, tokenizer, splits["harmful", "align"])
    pairs = preferences(splits["harmful", "align"], complied, splits["benign", "align"], seed)
    rows = pd.read_csv(RESULTS).to_dict("records") if RESULTS.exists() else []  # what was measured is not measured again
    measured = [(row["lr"], row["sft_weight"]) for row in rows]
    for lr, weight in candidates:
        if (lr, weight) in measured: continue
        set_seed(seed)
        model, _ = load_model("embedded")
        finetune_dpo(model, tokenizer, pairs, lr, 1, training["batch_size"], training["max_response"], sft_weight=weight, seed=seed)
        attack, benign = attack_success(model, tokenizer, splits["harmful", "attribute"][-100:]), splits["benign", "attack"]
        rows.append({"lr": lr, "sft_weight": weight} | attack.columns("attack_success") | over_refusal(model, tokenizer, benign).columns("over_refusal")
                    | perplexity(model, tokenizer, benign, max_response=32).columns("perplexity"))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(RESULTS, index=False, float_format="%.4g")


if __name__ == "__main__":
    sys.exit(main())
