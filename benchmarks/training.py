"""Fine-tuning in float32, under bfloat16 autocast, of a bfloat16 model (with float32 copies) and with `mixed` (autocast, on a CPU with plain attention): speed, and loss against float32's.

    python benchmarks/training.py                                   # a tiny random model: seconds, only to see that it works
    python benchmarks/training.py --model embedded --steps 150      # SmolLM2-135M-Instruct: a quarter of an hour or more on two cores

With MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment, as in the workflow, glibc reuses a step's memory in the next.
The bar, for a CPU with AMX: 2.5 x the speed of float32, optimizer step included, and a loss curve within 1 % of it (means of 10 steps).
"""

import argparse
import os
import time

import pandas as pd
import torch

from ssah_nb.engine.training import finetune
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.splits import without_safety_phrases
from ssah_nb.engine.batches import encode_pairs
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import pick_device, processor, set_seed, show_progress


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-response", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="auto")
    options, rows, curves = parser.parse_args(arguments), [], {}
    show_progress(False)
    pairs = without_safety_phrases(
        load_pairs("toy_benign" if options.model == "tiny" else "alpaca_eval")
    )
    pairs = (pairs * (options.steps * options.batch_size // len(pairs) + 1))[
        : options.steps * options.batch_size
    ]
    print(
        f"{options.model} on {processor(pick_device(options.device))}, {torch.get_num_threads()} thread(s), AdamW, {options.steps} steps of {options.batch_size} pairs, "
        f"responses of up to {options.max_response} tokens"
        + "; memory kept (MALLOC_ variables of the workflow)"
        * ("MALLOC_TRIM_THRESHOLD_" in os.environ)
    )
    for way, dtype in (
        ("float32", torch.float32),
        ("autocast", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("mixed", torch.float32),
    ):
        set_seed(0)
        model, tokenizer = load_model(options.model, dtype, options.device)
        tokens = sum(
            len(p) + len(q) for p, q in encode_pairs(tokenizer, pairs, None, options.max_response)
        )
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=way == "autocast"):
            history = finetune(
                model,
                tokenizer,
                pairs,
                options.lr,
                1,
                options.batch_size,
                options.max_response,
                mixed=way == "mixed",
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken, curves[way] = (
            time.perf_counter() - start,
            history.loss.groupby(history.step // 10).mean(),
        )
        rows.append(
            {
                "way": way,
                "tokens_per_second": tokens / taken,
                "speed": rows[0]["seconds"] / taken if rows else 1.0,
                "seconds": taken,
                "loss_off": float((curves[way] / curves["float32"] - 1).abs().max()),
                "optimizer_mb": history.attrs["optimizer_bytes"] / 1e6,
            }
        )
        print(
            f"{way:>8}: {tokens / taken:6.0f} tokens/s, {rows[-1]['speed']:.2f} x the speed of float32, loss within {rows[-1]['loss_off']:.2%} of its, "
            f"optimizer {rows[-1]['optimizer_mb']:.0f} MB",
            flush=True,
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
