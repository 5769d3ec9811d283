"""Times `importance` against a bare forward pass of the decoder stack over the same tokens in the same batches, and compares their peak memory.

    python benchmarks/attribution.py                                    # a tiny random model: seconds, only to see that it works
    python benchmarks/attribution.py --model embedded --tokens all      # SmolLM2-135M-Instruct on 32 benign pairs: some minutes on two cores

The bar: at most 1.15 x the time and 1.10 x the peak memory. `importance` is timed whole: tokenizing, sorting, the pass, and the scores.
On a tiny model the fixed costs of a Python hook are most of the time, so its ratio says nothing about a real one.
"""

import argparse
import contextlib
import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ssah_nb.attribution import METHODS, importance
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.batches import decoder, encode_pairs, token_batches
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import processor, set_seed, show_progress

WAYS = ("forward", "importance")


def prepare(options: argparse.Namespace) -> dict:
    "{way: a function that makes one pass}, the model, and the number of tokens in a pass, padding not counted."
    set_seed(0)
    show_progress(False)
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    pairs = load_pairs("toy_benign" if options.model == "tiny" else "alpaca_eval")[: options.pairs]
    encoded = encode_pairs(tokenizer, pairs, max_response=options.max_response)
    batches = list(token_batches(encoded, options.max_tokens, model.device))

    @torch.no_grad()
    def forward():
        for b in batches:
            decoder(model)(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)

    def score():
        importance(
            model,
            tokenizer,
            pairs,
            options.tokens,
            options.method,
            max_response=options.max_response,
            max_tokens=options.max_tokens,
        )

    return {
        "forward": forward,
        "importance": score,
        "model": model,
        "tokens": sum(len(p) + len(q) for p, q in encoded),
    }


def seconds(run, device: torch.device) -> float:
    "Wall seconds of one pass."
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forget_peak():
    "On Linux: give back what loading the model has left over, and count the peak from here, for loading takes more than a pass."
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc only
        Path("/proc/self/clear_refs").write_text("5")


def process_peak() -> float:
    "The most memory that this process held since `forget_peak`, MB. (On Linux ru_maxrss is inherited from the process that started this one, VmHWM is not.)"
    status = Path("/proc/self/status")
    if status.exists():
        return (
            int(
                next(
                    line for line in status.read_text().splitlines() if line.startswith("VmHWM")
                ).split()[1]
            )
            / 1024
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )


def peak(way: str, ready: dict, arguments: list[str]) -> float:
    "Peak memory of one pass, MB, the model included: of the GPU, or of a fresh process that does nothing else."
    if ready["model"].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ready[way]()
        return torch.cuda.max_memory_allocated() / 2**20
    return float(
        subprocess.run(
            [sys.executable, __file__, *arguments, "--only", way],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
    )


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file"
    )
    parser.add_argument(
        "--tokens",
        default="response",
        choices=["response", "all"],
        help="which tokens the statistics count",
    )
    parser.add_argument("--pairs", type=int, default=32, help="calibration pairs")
    parser.add_argument("--method", default="flap", choices=list(METHODS))
    parser.add_argument("--max-response", type=int, default=64, help="tokens kept of a response")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument(
        "--repeats", type=int, default=5, help="the two ways take turns; medians count"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--only", choices=WAYS, help=argparse.SUPPRESS
    )  # a fresh process that measures its own memory
    options = parser.parse_args(arguments)
    ready = prepare(options)
    if options.only:
        forget_peak()
        ready[options.only]()
        print(process_peak())
        return {}
    device, taken = ready["model"].device, {way: [] for way in WAYS}
    for way in WAYS:
        ready[way]()  # first calls are slow for reasons of their own
    for _ in range(options.repeats):
        for way in WAYS:
            taken[way].append(seconds(ready[way], device))
    median, memory = (
        {way: statistics.median(t) for way, t in taken.items()},
        {way: peak(way, ready, arguments) for way in WAYS},
    )
    print(
        f"{options.model} in {ready['model'].dtype} on {processor(device)}, {torch.get_num_threads()} thread(s); {options.pairs} pairs, {ready['tokens']} tokens, statistics over {options.tokens} tokens, "
        f"method {options.method}, medians of {options.repeats}"
    )
    for way in WAYS:
        print(
            f"{way:>12}: {ready['tokens'] / median[way]:9.0f} tokens/s, peak memory {memory[way]:8.0f} MB"
        )
    result = {
        "time_ratio": median["importance"] / median["forward"],
        "memory_ratio": memory["importance"] / memory["forward"],
    }
    print(
        f"{'ratio':>12}: time {result['time_ratio']:.3f} (bar 1.15), memory {result['memory_ratio']:.3f} (bar 1.10)"
    )
    return result


if __name__ == "__main__":
    main()
