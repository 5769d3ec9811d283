"""What an anchor costs beside a full step of training: time and peak memory.

    python benchmarks/anchoring.py                                  # a tiny random model: seconds
    python benchmarks/anchoring.py --model embedded --save          # SmolLM2-135M-Instruct

A step is that of `finetune`: forward and backward over a batch of 16 pairs, clipping, AdamW. The
plain step and the steps with an anchor take turns on the same batches, and each time is a median
over the rounds. An anchor that acts at every k-th step is timed over k steps. Memory is the peak
of a process of its own that loads the model, builds the anchor and makes three steps: resident
memory on a CPU (Linux), allocated memory on a GPU. `--save` writes the table to
benchmarks/results/anchoring.csv.

The bar, for the setting that chapter 7 recommends (one refusal a step): 1.25 x the time and
1.1 x the memory of the plain step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch

from ssah_nb import Anchor
from ssah_nb.engine.alignment import STOCK_REFUSALS
from ssah_nb.engine.batches import response_losses, token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.data import load_pairs
from ssah_nb.engine.models import load_model
from ssah_nb.engine.run import pick_device, pick_mixed, processor, set_seed, show_progress
from ssah_nb.engine.splits import without_safety_phrases
from ssah_nb.engine.training import Stepper, backward_parts, finetune, gradients_to
from ssah_nb.engine.training import mixed_precision
from ssah_nb.units import UnitMask, depth_two

RESULTS = Path(__file__).parent / "results/anchoring.csv"
ANSWERS = [("answers", prompts, 1) for prompts in (1, 2, 4, 8)]
SETTINGS = [("none", 0, 1), *ANSWERS, ("answers", 1, 2), ("answers", 1, 4), ("units", 4, 1)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file")
    add("--rounds", type=int, default=5)
    add("--batch-size", type=int, default=16)
    add("--max-response", type=int, default=24)
    add("--refusals", type=int, default=96)
    add("--lr", type=float, default=1e-5)
    add("--device", default="auto")
    add("--save", action="store_true", help="write benchmarks/results/anchoring.csv")
    add("--memory-of", type=int, help=argparse.SUPPRESS)  # a place in SETTINGS
    return parser.parse_args(arguments)


def load(options: argparse.Namespace):
    "The model as a run would train it, its tokenizer, pairs of the task, and refusals."
    set_seed(0)
    model, tokenizer = load_model(options.model, device=options.device)
    model.ssah_mixed = pick_mixed("auto", model.device)
    tiny = options.model == "tiny"
    task = without_safety_phrases(load_pairs("toy_benign" if tiny else "alpaca_eval"))
    prompts = load_pairs("toy_harmful" if tiny else "advbench")
    answers = list(STOCK_REFUSALS)
    refusals = [
        {"prompt": pair["prompt"], "response": answers[i % len(answers)]}
        for i, pair in enumerate(prompts[: options.refusals])
    ]
    return model, tokenizer, task, refusals


def one_percent(model) -> UnitMask:
    "As many units as the SCU often are: every hundredth channel."
    modules = depth_two(model)
    channels = model.get_submodule(modules["mlp"][0].b).in_features
    mlp = torch.zeros(len(modules["mlp"]), channels, dtype=torch.bool)
    mlp.flatten()[::100] = True
    heads = model.get_submodule(modules["attention"][0].b).in_features
    heads //= modules["attention"][0].width
    return UnitMask(mlp, torch.zeros(len(modules["attention"]), heads, dtype=torch.bool))


def anchor_of(setting, model, tokenizer, refusals):
    "A new anchor; None for the plain step."
    on, prompts, every = setting
    if on == "none":
        return None
    units = one_percent(model) if on == "units" else None
    options = dict(on=on, units=units, prompts=prompts, every=every, weight=0.1, slack=0.0)
    return Anchor(model, tokenizer, refusals, **options)


def step_seconds(model, stepper, parts, anchor, every: int) -> float:
    "Seconds of a step; of an anchor that acts at every k-th step, the mean of k steps."
    start = time.perf_counter()
    for _ in range(every):
        backward_parts(parts())
        if anchor:
            anchor.loss(model).backward()
        stepper.step()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / every


def batches_of(pairs, model, tokenizer, options):
    "For each batch a function that yields the parts of its loss."
    encoded = encode_pairs(tokenizer, pairs, max_response=options.max_response)
    for i in range(0, len(encoded) - options.batch_size + 1, options.batch_size):
        rows = encoded[i : i + options.batch_size]
        tokens = sum(len(response) for _, response in rows)

        def parts(rows=rows, tokens=tokens):
            for part in token_batches(rows, 1024, model):
                yield response_losses(model, part).sum() / tokens

        yield parts


def times(options: argparse.Namespace) -> list[list[float]]:
    "Seconds of each setting, round by round; the first round warms up and does not count."
    model, tokenizer, task, refusals = load(options)
    anchors = [anchor_of(setting, model, tokenizer, refusals) for setting in SETTINGS]
    wanted = options.batch_size * (options.rounds + 1)
    pairs = (task * (wanted // len(task) + 1))[:wanted]
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = Stepper(trained, options.lr, steps=10_000)
    model.train()
    cast = mixed_precision(model) if model.ssah_mixed else nullcontext()
    with gradients_to(stepper.masters), cast:
        rounds = [
            [
                step_seconds(model, stepper, parts, anchor, every)
                for anchor, (*_, every) in zip(anchors, SETTINGS)
            ]
            for parts in batches_of(pairs, model, tokenizer, options)
        ]
    return [list(seconds) for seconds in zip(*rounds[1:])]


def peak_mb(options: argparse.Namespace) -> float:
    "Peak memory of this process after three steps with one setting."
    model, tokenizer, task, refusals = load(options)
    anchor = anchor_of(SETTINGS[options.memory_of], model, tokenizer, refusals)
    pairs = (task * (3 * options.batch_size // len(task) + 1))[: 3 * options.batch_size]
    training = dict(batch_size=options.batch_size, max_response=options.max_response)
    finetune(model, tokenizer, pairs, lr=options.lr, anchor=anchor, **training)
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()  # of this program alone
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def peak_of(place: int, arguments: list[str]) -> float:
    "The same, in a process of its own."
    command = [sys.executable, __file__, *arguments, "--memory-of", str(place)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(arguments: list[str] | None = None) -> pd.DataFrame | None:
    options = parse(arguments)
    show_progress(False)
    if options.memory_of is not None:
        print(peak_mb(options))
        return None
    given = sys.argv[1:] if arguments is None else arguments
    seconds = times(options)
    peaks = [peak_of(place, given) for place in range(len(SETTINGS))]
    rows = []
    for (on, prompts, every), took, peak in zip(SETTINGS, seconds, peaks):
        ratios = [a / b for a, b in zip(took, seconds[0])]
        row = {"on": on, "prompts": prompts, "every": every}
        row |= {"seconds": statistics.median(took), "time": statistics.median(ratios)}
        rows.append(row | {"peak_mb": peak, "memory": peak / peaks[0]})
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in rows[-1].items()})
    table = pd.DataFrame(rows).assign(
        model=options.model,
        batch_size=options.batch_size,
        rounds=options.rounds,
        processor=processor(pick_device(options.device)),
        threads=torch.get_num_threads(),
    )
    if options.save:
        table.to_csv(RESULTS, index=False, float_format="%.4g")
    return table


if __name__ == "__main__":
    main()
