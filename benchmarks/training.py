"""Fine-tuning in four ways: their speed, and their loss against that of float32.

    python benchmarks/training.py                                 # a tiny random model: seconds
    python benchmarks/training.py --model embedded --steps 150    # SmolLM2-135M-Instruct

The ways: float32; under bfloat16 autocast; a bfloat16 model, with float32 copies; and `mixed`,
which is autocast and, on a CPU, plain attention. The embedded model takes a quarter of an hour or
more on two cores. With MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 in the
environment, as in the workflow, glibc reuses a step's memory in the next.

The bar, for a CPU with AMX: 2.5 x the speed of float32, optimizer step included, and a loss curve
within 1 % of it (means of 10 steps).
"""

import argparse
import os
import time

import pandas as pd
import torch

from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import pick_device, processor, set_seed, show_progress
from ssah_nb.engine.splits import without_safety_phrases
from ssah_nb.engine.training import finetune

WAYS = {
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "mixed": torch.float32,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file")
    add("--steps", type=int, default=10)
    add("--batch-size", type=int, default=8)
    add("--max-response", type=int, default=24)
    add("--lr", type=float, default=1e-4)
    add("--device", default="auto")
    return parser.parse_args(arguments)


def training_pairs(options: argparse.Namespace) -> list[dict]:
    "As many pairs as the steps want, repeated where there are fewer."
    wanted = options.steps * options.batch_size
    source = "toy_benign" if options.model == "tiny" else "alpaca_eval"
    pairs = without_safety_phrases(load_pairs(source))
    return (pairs * (wanted // len(pairs) + 1))[:wanted]


def measure(way: str, pairs: list[dict], options: argparse.Namespace) -> tuple[dict, pd.Series]:
    "One row, and the mean loss of every ten steps."
    set_seed(0)
    model, tokenizer = load_model(options.model, WAYS[way], options.device)
    encoded = encode_pairs(tokenizer, pairs, max_response=options.max_response)
    tokens = sum(len(p) + len(q) for p, q in encoded)
    training = dict(lr=options.lr, batch_size=options.batch_size)
    training |= dict(max_response=options.max_response, mixed=way == "mixed")
    start = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=way == "autocast"):
        history = finetune(model, tokenizer, pairs, **training)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    megabytes = history.attrs["optimizer_bytes"] / 1e6
    row = {"way": way, "tokens_per_second": tokens / taken, "seconds": taken}
    curve = history.loss.groupby(history.step // 10).mean()
    return row | {"optimizer_mb": megabytes}, curve


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    options, rows, plain = parse(arguments), [], None
    show_progress(False)
    pairs = training_pairs(options)
    print(
        f"{options.model} on {processor(pick_device(options.device))}, "
        f"{torch.get_num_threads()} thread(s), AdamW, {options.steps} steps of "
        f"{options.batch_size} pairs, responses of up to {options.max_response} tokens"
        + "; memory kept (MALLOC_ variables of the workflow)"
        * ("MALLOC_TRIM_THRESHOLD_" in os.environ)
    )
    for way in WAYS:
        row, curve = measure(way, pairs, options)
        plain = curve if plain is None else plain
        row["speed"] = (rows[0] if rows else row)["seconds"] / row["seconds"]
        row["loss_off"] = float((curve / plain - 1).abs().max())
        rows.append(row)
        print(
            f"{way:>8}: {row['tokens_per_second']:6.0f} tokens/s, {row['speed']:.2f} x the speed "
            f"of float32, loss within {row['loss_off']:.2%} of its, "
            f"optimizer {row['optimizer_mb']:.0f} MB",
            flush=True,
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
