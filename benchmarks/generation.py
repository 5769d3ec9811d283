"""Times our greedy generation against `model.generate` on the same prompts in one padded batch.

    python benchmarks/generation.py                     # a tiny random model: seconds
    python benchmarks/generation.py --model embedded    # SmolLM2-135M-Instruct: some minutes

Ours is `model.generate`, too, in batches sorted by length. So the gain is the padding that is saved
and the batches that end early: it grows with how much the prompts differ in length. The tokens of
both are compared, row by row.
"""

import argparse
import itertools
import time

import torch

from ssah_nb.engine.chat import encode_prompts
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.evaluation import SYSTEM_PROMPTS
from ssah_nb.engine.generation import (
    evaluating,
    greedy_settings,
    greedy_tokens,
    stop_ids,
)
from ssah_nb.engine.inputs import as_prompts
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import processor, set_seed, show_progress


def one_batch(model, encoded: list[list[int]], stop: list[int], most: int) -> list[list[int]]:
    "All prompts in one left-padded batch; each row is cut at its first end token."
    longest = max(map(len, encoded))
    ids = torch.tensor([[stop[0]] * (longest - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=model.device
    )
    with evaluating(model), greedy_settings(model, stop, most):
        new = model.generate(ids, attention_mask=mask)[:, longest:].tolist()
    return [list(itertools.takewhile(lambda token: token not in stop, row)) for row in new]


def seconds(run, device: torch.device) -> tuple[float, list[list[int]]]:
    "Wall seconds of `run`, and what it returned."
    start, result = time.perf_counter(), run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(model, encoded: list[list[int]], stop: list[int], options) -> dict:
    "Seconds of both ways, which take turns; the faster run of each counts."
    most = options.max_new_tokens
    ways = {
        "one_batch": lambda: one_batch(model, encoded, stop, most),
        "ours": lambda: greedy_tokens(model, encoded, stop, most, options.batch_size),
    }
    for run in (greedy_tokens, one_batch):
        run(model, encoded[:2], stop, 2)  # first calls are slow for reasons of their own
    taken, tokens = dict.fromkeys(ways, float("inf")), {}
    for way, run in list(ways.items()) * options.repeats:
        elapsed, tokens[way] = seconds(run, model.device)
        taken[way] = min(taken[way], elapsed)
    equal = sum(a == b for a, b in zip(*tokens.values()))
    ratio = taken["one_batch"] / taken["ours"]
    return {**taken, "ratio": ratio, "equal": equal, "rows": len(encoded)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file")
    add("--prompts", help="data set; default: toy_harmful for 'tiny', else advbench")
    add("--rows", type=int, default=100, help="prompts")
    add("--batch-size", type=int, default=50, help="prompts side by side, in our way")
    add("--max-new-tokens", type=int, default=24)
    systems = ["none", *SYSTEM_PROMPTS]
    add("--system", nargs="+", default=["none", "short"], choices=systems, help="system prompts")
    add("--repeats", type=int, default=1, help="runs of each way")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    options, results = parse(arguments), []
    show_progress(False)
    set_seed(0)
    model, tokenizer = load_model(options.model)
    data = options.prompts or ("toy_harmful" if options.model == "tiny" else "advbench")
    prompts, stop = as_prompts(load_pairs(data))[: options.rows], stop_ids(model, tokenizer)
    print(
        f"{options.model} in {model.dtype} on {processor(model.device)}, "
        f"{torch.get_num_threads()} thread(s), {len(prompts)} prompts, "
        f"up to {options.max_new_tokens} new tokens"
    )
    for name in options.system:
        encoded = encode_prompts(tokenizer, prompts, SYSTEM_PROMPTS.get(name))
        found = {"system": name} | measure(model, encoded, stop, options)
        results.append(found)
        print(
            f"system prompt {name}, {min(map(len, encoded))} to {max(map(len, encoded))} tokens: "
            f"one batch {found['one_batch']:.2f} s, ours {found['ours']:.2f} s, "
            f"{found['ratio']:.2f} times as fast; the same tokens for {found['equal']} of "
            f"{found['rows']} prompts"
        )
    return results


if __name__ == "__main__":
    main()
