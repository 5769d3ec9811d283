"""Times a training step with frozen units against the full step, beside the way of others: full gradients, multiplied by a mask.

    python benchmarks/freezing.py                      # two random layers of that model's width: about a minute
    python benchmarks/freezing.py --model embedded     # SmolLM2-135M-Instruct: about ten minutes on two cores

f is the frozen share of the parameters that a step multiplies by, the head included. A step multiplies three times with each
of them, and one of the three is the weight gradient: the bar is (1 - f/3) of the full step's time, and 10 % for all the rest.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from ssah_nb.units import UnitMask
from ssah_nb.freezing import freeze, frozen_rows_and_columns, merge
from ssah_nb.engine.models import load_model, tiny_model
from ssah_nb.units import depth_two, unit_parameters
from ssah_nb.engine.run import processor, set_seed

SMALL = dict(
    vocab_size=1024,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)


def linear_parameters(model: nn.Module, trained: bool = False) -> int:
    "Parameters of the model's linears, the head included; of the trained ones only."
    return sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) and (m.weight.requires_grad or not trained)
    )


def random_units(model: nn.Module, f: float) -> tuple[UnitMask, bool]:
    "Random channels and whole groups of heads that bring the frozen share to `f`, and whether the head must be frozen too."
    modules, size, head, total = (
        depth_two(model),
        unit_parameters(model),
        model.get_output_embeddings().weight.numel(),
        linear_parameters(model),
    )
    rest = f * total > 0.99 * (total - head)
    wanted = f * total - head * rest

    def draw(kind: str, parameters: float) -> torch.Tensor:
        layers, (units, group) = (
            len(modules[kind]),
            (modules[kind][0].units, modules[kind][0].group),
        )
        chosen = torch.randperm(layers * units // group) < round(parameters / (size[kind] * group))
        return chosen.view(layers, -1).repeat_interleave(group, 1)

    attention = draw(
        "attention",
        wanted
        * size["attention"]
        * modules["attention"][0].units
        * len(modules["attention"])
        / (total - head),
    )
    return UnitMask(
        draw("mlp", wanted - float(attention.sum()) * size["attention"]), attention
    ), rest


def mask_gradients(model: nn.Module, mask: UnitMask, rest: bool):
    "The way of others: the whole gradient is computed, and the frozen units' part of it is then set to zero."
    for name, (frozen, dim) in frozen_rows_and_columns(model, mask).items():
        kept = (~frozen).float().view((-1, 1) if dim == 0 else (1, -1)).to(model.device)
        model.get_submodule(name).weight.register_hook(lambda grad, kept=kept: grad * kept)
    if rest:
        for name, p in model.named_parameters():
            if "_proj" not in name:
                p.register_hook(torch.zeros_like)


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, clock) -> float:
    "One training step."
    start = clock()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def optimizer_memory(optimizer: torch.optim.Optimizer) -> int:
    "Bytes of its moments."
    return sum(
        v.numel() * v.element_size()
        for state in optimizer.state.values()
        for v in state.values()
        if torch.is_tensor(v) and v.dim()
    )


def measure(model: nn.Module, f: float, batches: list[torch.Tensor], clock) -> dict:
    "One row: the three ways take turns on the same batches."
    mask, rest = random_units(model, f)
    ways = {
        "full": copy.deepcopy(model),
        "masked": copy.deepcopy(model),
        "frozen": freeze(copy.deepcopy(model), mask, rest=rest),
    }
    mask_gradients(ways["masked"], mask, rest)
    total = linear_parameters(model)
    left = linear_parameters(ways["frozen"], trained=True) + sum(
        p.numel() for n, p in ways["frozen"].named_parameters() if n.endswith("trained_weight")
    )
    optimizers = {
        way: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for way, m in ways.items()
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for ids in batches:
        for way, m in ways.items():
            taken[way].append(seconds(m, optimizers[way], ids, clock))
    ratio = {
        way: statistics.median(a / b for a, b in zip(t[1:], taken["full"][1:]))
        for way, t in taken.items()
    }  # without the first steps, which allocate
    memory = {
        way: optimizer_memory(o) / optimizer_memory(optimizers["full"])
        for way, o in optimizers.items()
    }
    before, kept = model.state_dict(), {}
    for way, m in ways.items():
        after = (merge(m) if way == "frozen" else m).state_dict()
        kept[way] = all(
            torch.equal(
                *(s[f"{n}.weight"].movedim(dim, 0)[rows.to(model.device)] for s in (after, before))
            )
            for n, (rows, dim) in frozen_rows_and_columns(model, mask).items()
        )
    f = 1 - left / total
    return {
        "f": f,
        "rest": rest,
        "full_seconds": statistics.median(taken["full"][1:]),
        "time": ratio["frozen"],
        "time_bar": (1 - f / 3) * 1.1,
        "masked_time": ratio["masked"],
        "memory": memory["frozen"],
        "memory_bar": (1 - f) * 1.05,
        "masked_memory": memory["masked"],
        "kept": kept["frozen"],
        "masked_kept": kept["masked"],
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.07, 0.28, 0.72, 0.80], help="frozen shares f"
    )
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed, of each way")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="'cpu' counts the process's own time, for a CPU that others use too",
    )
    options, results = parser.parse_args(arguments), []
    if options.threads:
        torch.set_num_threads(options.threads)
    set_seed(0)
    model = (
        tiny_model(tie_word_embeddings=True, **SMALL)
        if options.model == "tiny"
        else load_model(options.model)[0]
    )
    model.train()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    batches = [
        torch.randint(0, 256, (options.rows, options.tokens), device=model.device)
        for _ in range(options.steps + 1)
    ]
    print(
        f"{options.model} in {model.dtype} on {processor(model.device)}, {torch.get_num_threads()} thread(s), AdamW, {options.rows} x {options.tokens} tokens a step, {options.steps} steps, {options.clock} time"
    )
    verdict = lambda value, bar: (
        f"{value:.3f} (bar {bar:.3f}, {'met' if value <= bar else 'NOT met'})"
    )
    for share in options.shares:
        r = measure(model, share, batches, clock)
        results.append(r)
        print(
            f"f = {r['f']:.3f}{' with head, embeddings and norms' if r['rest'] else ''}: step {verdict(r['time'], r['time_bar'])} of the full {r['full_seconds']:.3f} s, masked gradient {r['masked_time']:.3f}; "
            f"optimizer memory {verdict(r['memory'], r['memory_bar'])}, masked {r['masked_memory']:.3f}; frozen bits {'kept' if r['kept'] else 'CHANGED'}, masked {'kept' if r['masked_kept'] else 'changed'}",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
