"""Times `importance` against a bare forward pass of the decoder stack, and compares their memory.

    python benchmarks/attribution.py                                  # a tiny random model: seconds
    python benchmarks/attribution.py --model embedded --tokens all    # SmolLM2-135M-Instruct

Both see the same tokens in the same batches. The bar: at most 1.15 x the time and 1.10 x the peak
memory. `importance` is timed whole: tokenizing, sorting, the pass, and the scores. On a tiny model
the fixed costs of a Python hook are most of the time, so its ratio says nothing about a real one.
The embedded model takes some minutes on two cores with 32 benign pairs.
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

from ssah_nb.attribution import importance
from ssah_nb.engine.batches import decoder, token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import processor, set_seed, show_progress
from ssah_nb.engine.scores import METHODS

WAYS = ("forward", "importance")


def prepare(options: argparse.Namespace) -> dict:
    "{way: what makes one pass}, the model, and the tokens of a pass, padding not counted."
    set_seed(0)
    show_progress(False)
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    pairs = load_pairs("toy_benign" if options.model == "tiny" else "alpaca_eval")[: options.pairs]
    encoded = encode_pairs(tokenizer, pairs, max_response=options.max_response)
    batches = list(token_batches(encoded, options.max_tokens, model))

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
    """On Linux: give back what loading the model has left over, and count the peak from here.

    Loading takes more memory than a pass.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc only
        Path("/proc/self/clear_refs").write_text("5")


def process_peak() -> float:
    """The most memory that this process held since `forget_peak`, MB.

    On Linux ru_maxrss is inherited from the process that started this one, VmHWM is not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak(way: str, ready: dict, arguments: list[str]) -> float:
    "Peak memory of one pass, MB, with the model: of the GPU, or of a process that does only this."
    if ready["model"].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ready[way]()
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, __file__, *arguments, "--only", way]
    return float(subprocess.check_output(command, text=True, stderr=subprocess.PIPE).split()[-1])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file")
    add("--tokens", default="response", choices=["response", "all"], help="which tokens count")
    add("--pairs", type=int, default=32, help="calibration pairs")
    add("--method", default="flap", choices=list(METHODS))
    add("--max-response", type=int, default=64, help="tokens kept of a response")
    add("--max-tokens", type=int, default=2048, help="tokens of a batch")
    add("--repeats", type=int, default=5, help="the two ways take turns; medians count")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--only", choices=WAYS, help=argparse.SUPPRESS)  # a process that measures its own memory
    return parser.parse_args(arguments)


def medians(ready: dict, repeats: int) -> dict[str, float]:
    "Seconds of each way; they take turns."
    device, taken = ready["model"].device, {way: [] for way in WAYS}
    for way in WAYS:
        ready[way]()  # first calls are slow for reasons of their own
    for way in WAYS * repeats:
        taken[way].append(seconds(ready[way], device))
    return {way: statistics.median(t) for way, t in taken.items()}


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    ready = prepare(options)
    if options.only:
        forget_peak()
        ready[options.only]()
        print(process_peak())
        return {}

    median = medians(ready, options.repeats)
    memory = {way: peak(way, ready, arguments) for way in WAYS}
    model, tokens = ready["model"], ready["tokens"]
    print(
        f"{options.model} in {model.dtype} on {processor(model.device)}, "
        f"{torch.get_num_threads()} thread(s); {options.pairs} pairs, {tokens} tokens, statistics "
        f"over {options.tokens} tokens, method {options.method}, medians of {options.repeats}"
    )
    for way in WAYS:
        speed = f"{tokens / median[way]:9.0f} tokens/s"
        print(f"{way:>12}: {speed}, peak memory {memory[way]:8.0f} MB")
    time_ratio = median["importance"] / median["forward"]
    memory_ratio = memory["importance"] / memory["forward"]
    ratios = f"time {time_ratio:.3f} (bar 1.15), memory {memory_ratio:.3f} (bar 1.10)"
    print(f"{'ratio':>12}: {ratios}")
    return {"time_ratio": time_ratio, "memory_ratio": memory_ratio}


if __name__ == "__main__":
    main()
