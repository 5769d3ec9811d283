"""Times a training step with frozen units against the full step.

    python benchmarks/freezing.py                     # two random layers of that model's width
    python benchmarks/freezing.py --model embedded    # SmolLM2-135M-Instruct: about ten minutes

Beside them stands the way of others: full gradients, multiplied by a mask. f is the frozen share of
the parameters that a step multiplies by, the head included. A step multiplies three times with each
of them, and one of the three is the weight gradient: the bar is (1 - f/3) of the full step's time,
and 10 % for all the rest.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from ssah_nb.engine.models import load_model, tiny_model
from ssah_nb.engine.run import processor, set_seed
from ssah_nb.freezing import freeze, frozen_rows_and_columns, merge
from ssah_nb.units import UnitMask, depth_two, unit_parameters

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
    """Random channels and whole groups of heads that bring the frozen share to `f`.

    The second says whether the head must be frozen too.
    """
    modules, size = depth_two(model), unit_parameters(model)
    head, total = model.get_output_embeddings().weight.numel(), linear_parameters(model)
    rest = f * total > 0.99 * (total - head)
    wanted = f * total - head * rest

    def draw(kind: str, parameters: float) -> torch.Tensor:
        layers, first = len(modules[kind]), modules[kind][0]
        chosen = round(parameters / (size[kind] * first.group))
        order = torch.randperm(layers * first.units // first.group)
        return (order < chosen).view(layers, -1).repeat_interleave(first.group, 1)

    heads = modules["attention"][0].units * len(modules["attention"])
    attention = draw("attention", wanted * size["attention"] * heads / (total - head))
    channels = draw("mlp", wanted - float(attention.sum()) * size["attention"])
    return UnitMask(channels, attention), rest


def mask_gradients(model: nn.Module, mask: UnitMask, rest: bool):
    "The way of others: the whole gradient, of which the frozen units' part is set to zero."
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


def three_ways(model: nn.Module, mask: UnitMask, rest: bool) -> dict[str, nn.Module]:
    "The full model, one whose gradients are masked, and one whose units are frozen."
    ways = {way: copy.deepcopy(model) for way in ("full", "masked", "frozen")}
    mask_gradients(ways["masked"], mask, rest)
    freeze(ways["frozen"], mask, rest=rest)
    return ways


def frozen_share(frozen: nn.Module, total: int) -> float:
    "f as it came out."
    parts = [p for n, p in frozen.named_parameters() if n.endswith("trained_weight")]
    return 1 - (linear_parameters(frozen, trained=True) + sum(p.numel() for p in parts)) / total


def unchanged(after: nn.Module, before: nn.Module, mask: UnitMask) -> bool:
    "Whether all bits of the masked units are as they were."
    pairs = [
        [m.get_submodule(n).weight.movedim(dim, 0)[rows.to(before.device)] for m in (after, before)]
        for n, (rows, dim) in frozen_rows_and_columns(before, mask).items()
    ]
    return all(torch.equal(*pair) for pair in pairs)


def measure(model: nn.Module, f: float, batches: list[torch.Tensor], clock) -> dict:
    "One row: the three ways take turns on the same batches."
    mask, rest = random_units(model, f)
    ways = three_ways(model, mask, rest)
    f = frozen_share(ways["frozen"], linear_parameters(model))
    optimizers = {
        way: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for way, m in ways.items()
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for ids in batches:
        for way, m in ways.items():
            taken[way].append(seconds(m, optimizers[way], ids, clock))
    taken = {way: t[1:] for way, t in taken.items()}  # the first steps allocate
    memory = {way: optimizer_memory(o) for way, o in optimizers.items()}
    merge(ways["frozen"])

    def ratio(way: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[way], taken["full"]))

    return {
        "f": f,
        "rest": rest,
        "full_seconds": statistics.median(taken["full"]),
        "time": ratio("frozen"),
        "time_bar": (1 - f / 3) * 1.1,
        "masked_time": ratio("masked"),
        "memory": memory["frozen"] / memory["full"],
        "memory_bar": (1 - f) * 1.05,
        "masked_memory": memory["masked"] / memory["full"],
        "kept": unchanged(ways["frozen"], model, mask),
        "masked_kept": unchanged(ways["masked"], model, mask),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    shares = [0.07, 0.28, 0.72, 0.80]
    add("--model", default="tiny", help="'tiny', 'embedded', a hub id, a folder or a .gguf file")
    add("--shares", type=float, nargs="+", default=shares, help="frozen shares f")
    add("--steps", type=int, default=7, help="steps that are timed, of each way")
    add("--rows", type=int, default=8, help="rows of a batch")
    add("--tokens", type=int, default=64, help="tokens of a row")
    add("--threads", type=int, help="of the CPU; default: torch's own choice")
    own_time = "'cpu' counts the process's own time, for a CPU that others use too"
    add("--clock", choices=["wall", "cpu"], default="wall", help=own_time)
    return parser.parse_args(arguments)


def described(r: dict) -> str:
    "A row as a line."

    def against(value: float, bar: float) -> str:
        return f"{value:.3f} (bar {bar:.3f}, {'met' if value <= bar else 'NOT met'})"

    return (
        f"f = {r['f']:.3f}{' with head, embeddings and norms' if r['rest'] else ''}: "
        f"step {against(r['time'], r['time_bar'])} of the full {r['full_seconds']:.3f} s, "
        f"masked gradient {r['masked_time']:.3f}; "
        f"optimizer memory {against(r['memory'], r['memory_bar'])}, "
        f"masked {r['masked_memory']:.3f}; "
        f"frozen bits {'kept' if r['kept'] else 'CHANGED'}, "
        f"masked {'kept' if r['masked_kept'] else 'changed'}"
    )


def main(arguments: list[str] | None = None) -> list[dict]:
    options, results = parse(arguments), []
    if options.threads:
        torch.set_num_threads(options.threads)
    set_seed(0)
    if options.model == "tiny":
        model = tiny_model(tie_word_embeddings=True, **SMALL)
    else:
        model, _ = load_model(options.model)
    model.train()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    size = (options.rows, options.tokens)
    batches = [torch.randint(0, 256, size, device=model.device) for _ in range(options.steps + 1)]
    print(
        f"{options.model} in {model.dtype} on {processor(model.device)}, "
        f"{torch.get_num_threads()} thread(s), AdamW, {options.rows} x {options.tokens} tokens a "
        f"step, {options.steps} steps, {options.clock} time"
    )
    for share in options.shares:
        results.append(measure(model, share, batches, clock))
        print(described(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    main()
