"""Times our greedy generation against `model.generate` on the same prompts, padded in one batch, and compares the tokens.

    python benchmarks/generation.py                      # a tiny random model: seconds, only to see that it works
    python benchmarks/generation.py --model embedded     # SmolLM2-135M-Instruct on 100 AdvBench prompts: about two minutes on two cores

The gain grows with the length of the shared prefix (the system prompt), with how much the prompts differ in length, and with the rows that
end early; where none of these is, both ways do the same matrix products and take about as long.
"""

import argparse
import time

import torch

from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.evaluation import SYSTEM_PROMPTS
from ssah_nb.engine.generation import evaluating, greedy_tokens, stop_ids, texts
from ssah_nb.evaluation import shared_prefix
from ssah_nb.engine.batches import encode_prompts
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import processor, set_seed, show_progress


def transformers_tokens(
    model, encoded: list[list[int]], stop: list[int], max_new_tokens: int
) -> list[list[int]]:
    "`model.generate` on all prompts in one left-padded batch; each row cut at its first end token."
    longest = max(map(len, encoded))
    ids = torch.tensor([[stop[0]] * (longest - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=model.device
    )
    with evaluating(model):
        new = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
    rows = new[:, longest:].tolist()
    return [
        row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows
    ]


def seconds(run, device: torch.device) -> tuple[float, list[list[int]]]:
    "Wall seconds of `run`, and what it returned."
    start, result = time.perf_counter(), run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file"
    )
    parser.add_argument(
        "--prompts", help="data set of the prompts; default: toy_harmful for 'tiny', else advbench"
    )
    parser.add_argument("--rows", type=int, default=100, help="prompts, all in one batch")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument(
        "--system",
        nargs="+",
        default=["none", "short"],
        choices=["none", *SYSTEM_PROMPTS],
        help="system prompts to measure with",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="the two ways take turns; the faster run of each counts",
    )
    options, results = parser.parse_args(arguments), []
    show_progress(False)
    set_seed(0)
    model, tokenizer = load_model(options.model)
    prompts = texts(
        load_pairs(options.prompts or ("toy_harmful" if options.model == "tiny" else "advbench"))
    )[: options.rows]
    stop, n = stop_ids(model, tokenizer), options.max_new_tokens
    print(
        f"{options.model} in {model.dtype} on {processor(model.device)}, {torch.get_num_threads()} thread(s), {len(prompts)} prompts, up to {n} new tokens"
    )
    for name in options.system:
        encoded = encode_prompts(
            tokenizer, prompts, None if name == "none" else SYSTEM_PROMPTS[name]
        )
        ways = {
            "transformers": lambda: transformers_tokens(model, encoded, stop, n),
            "ours": lambda: greedy_tokens(model, encoded, stop, n, len(encoded)),
        }
        for run in (greedy_tokens, transformers_tokens):
            run(model, encoded[:2], stop, 2)  # first calls are slow for reasons of their own
        taken, tokens = {way: float("inf") for way in ways}, {}
        for _ in range(options.repeats):
            for way, run in ways.items():
                elapsed, tokens[way] = seconds(run, model.device)
                taken[way] = min(taken[way], elapsed)
        equal = sum(a == b for a, b in zip(*tokens.values()))
        results.append(
            {
                "system": name,
                **taken,
                "ratio": taken["transformers"] / taken["ours"],
                "equal": equal,
                "rows": len(encoded),
            }
        )
        print(
            f"system prompt {name}: {min(map(len, encoded))}-{max(map(len, encoded))} tokens per prompt, {shared_prefix(encoded)} of them shared; "
            f"model.generate {taken['transformers']:.2f} s, ours {taken['ours']:.2f} s, {results[-1]['ratio']:.2f} times faster; "
            f"the same tokens for {equal} of {len(encoded)} prompts"
        )
    return results


if __name__ == "__main__":
    main()
