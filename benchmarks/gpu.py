"""Attribution, freezing and anchoring on a GPU, on a random model of Llama-2-7B's shape in bf16.

    python benchmarks/gpu.py                              # 80 GB: benchmarks/results/gpu.csv
    python benchmarks/gpu.py --shape tiny --device cpu    # seconds, only to see that it works

Attribution is measured against a bare forward pass of the decoder stack over the same batches, and
the pass against the chip's own rate of bfloat16 matrix products. A training step is measured with
the shares f of its multiplied parameters frozen: 0, 0.28 and 0.80, and with an anchor that looks at
1 or 4 refusals a step. On a GPU it takes minutes.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from freezing import frozen_share, linear_parameters, optimizer_memory, random_units
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ssah_nb.anchoring import Anchor
from ssah_nb.engine.batches import TokenBatch, decoder
from ssah_nb.engine.models import tiny_tokenizer
from ssah_nb.engine.run import processor, show_progress
from ssah_nb.engine.scores import METHODS, collect_moments
from ssah_nb.freezing import freeze
from ssah_nb.units import depth_two

SHAPES = {
    "llama2-7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "tiny": dict(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}


def random_model(shape: str, device: str) -> PreTrainedModel:
    "A random model of this shape in bfloat16, made on the device."
    torch.manual_seed(0)  # not set_seed: deterministic algorithms are not what people train with
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **SHAPES[shape]), dtype=torch.bfloat16
        )


def seconds(run, device: str, repeats: int) -> float:
    "Mean wall seconds of a run, after one that is not counted."
    taken = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.mean(taken[1:])


def peak_gb(device: str, reset: bool = False) -> float:
    "Peak memory of the GPU since the last reset; NaN on a CPU."
    if device != "cuda":
        return float("nan")
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


def matmul_rate(options: argparse.Namespace) -> float:
    "Floating point operations per second in a large bfloat16 matrix product."
    size = 8192 if options.shape != "tiny" else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, options.device, options.repeats)


def attribution(model: PreTrainedModel, options: argparse.Namespace) -> list[dict]:
    "Tokens per second of the bare pass and of attribution, and their share of the matmul rate."
    device, rate = options.device, matmul_rate(options)
    ids = torch.randint(0, 256, (options.rows, options.tokens), device=device)
    all_tokens = torch.ones_like(ids)
    batch = TokenBatch(ids, all_tokens, all_tokens.bool(), list(range(len(ids))))
    batches = [batch] * options.batches
    tokens = ids.numel() * options.batches

    @torch.no_grad()
    def forward():
        for _ in batches:
            decoder(model)(input_ids=ids, attention_mask=all_tokens, use_cache=False)

    def score():
        collect_moments(model, depth_two(model), batches, METHODS["flap"])

    head = model.get_output_embeddings().weight.numel()
    flops = 2 * (linear_parameters(model) - head) * tokens
    rows = []
    for name, run in {"forward": forward, "attribution": score}.items():
        peak_gb(device, reset=True)
        taken = seconds(run, device, options.repeats)
        rows.append(
            {
                "what": name,
                "seconds": taken,
                "tokens_per_second": tokens / taken,
                "of_matmul_rate": flops / taken / rate,
                "peak_gb": peak_gb(device),
                "ratio": taken / (rows[0]["seconds"] if rows else taken),
            }
        )
    return rows


def stepped(
    model: PreTrainedModel, options: argparse.Namespace, anchor: Anchor | None = None
) -> dict:
    "Seconds and memory of a training step: forward, backward, AdamW."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, 256, (options.rows, options.tokens), device=options.device)

    def run():
        if anchor:
            anchor.loss(model).backward()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak_gb(options.device, reset=True)
    taken = seconds(run, options.device, options.repeats)
    return {
        "seconds": taken,
        "tokens_per_second": ids.numel() / taken,
        "peak_gb": peak_gb(options.device),
        "optimizer_gb": optimizer_memory(optimizer) / 1e9,
    }


def frozen_step(f: float, options: argparse.Namespace) -> dict:
    "A training step with the share f frozen."
    model = random_model(options.shape, options.device).train()
    total = linear_parameters(model)
    if f:
        mask, rest = random_units(model, f)
        freeze(model, mask, rest=rest)
        f = frozen_share(model, total)
    return {"what": f"training step, f = {f:.2f}", "f": f} | stepped(model, options)


def anchored_step(how: tuple[int, int], options: argparse.Namespace) -> dict:
    "A training step with an anchor on answers: so many refusals, at every so manieth step."
    prompts, every = how
    model = random_model(options.shape, options.device)
    refusals = [{"prompt": f"Open box {i} " * 8, "response": "I am sorry."} for i in range(32)]
    anchor = Anchor(model, tiny_tokenizer(), refusals, prompts=prompts, every=every, slack=0.0)
    what = f"training step, anchored on {prompts} every {every}"
    return {"what": what, "prompts": prompts} | stepped(model.train(), options, anchor)


def compared(rows: list[dict]) -> list[dict]:
    "The rows, each with its ratio to the full training step, and with its bar."
    full = next((r for r in rows if r.get("f") == 0), None)
    for r in rows:
        if full and "f" in r:
            r |= {
                "ratio": r["seconds"] / full["seconds"],
                "bar": (1 - r["f"] / 3) * 1.1,
                "memory_ratio": r["optimizer_gb"] / full["optimizer_gb"],
            }
        elif full and "prompts" in r:
            r |= {"ratio": r["seconds"] / full["seconds"], "bar": 1.25}
            r["memory_ratio"] = r["peak_gb"] / full["peak_gb"]
        elif r["what"] == "attribution":
            r["bar"] = 1.15
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", default="llama2-7b", choices=list(SHAPES))
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--shares", type=float, nargs="+", default=[0.0, 0.28, 0.80], help="frozen shares f")
    add("--prompts", type=int, nargs="*", default=[1, 4], help="refusals of an anchored step")
    add("--rows", type=int, default=4, help="rows of a batch")
    add("--batches", type=int, default=8, help="batches of a pass and of an attribution")
    add("--tokens", type=int, default=512, help="tokens of a row")
    add("--repeats", type=int, default=6)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; use --device cpu --shape tiny to try the script")
    return options


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    show_progress(False)
    model = random_model(options.shape, options.device).eval()
    rows = attribution(model, options)
    del model
    steps = [(frozen_step, f) for f in options.shares]
    for step, how in steps + [
        (anchored_step, (n, every)) for n in options.prompts for every in (1, 2)
    ]:
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        rows.append(step(how, options))
    table = pd.DataFrame(compared(rows)).assign(
        shape=options.shape,
        chip=processor(options.device),
        batch=f"{options.rows} x {options.tokens}",
        torch=torch.__version__,
    )
    print(table.to_string(index=False))
    if options.device == "cuda":
        table.to_csv(Path(__file__).parent / "results/gpu.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
