"""Try every causal architecture of transformers: `python docs/architectures.py [name ...]`.

Without names it writes docs/architectures.csv: for each architecture whether its units are
supported, or the reason why they are not. The models are tiny and random.
"""

import copy
import csv
import sys
import warnings
from pathlib import Path

import torch
from tiny_configs import architectures, build
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ssah_nb.attribution import importance
from ssah_nb.classes import prune, pruned
from ssah_nb.engine.batches import response_losses, token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import first_line, tiny_tokenizer
from ssah_nb.engine.proof import channels_off, columns_of, entered_again, few_tokens, recorded
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import UnitMask, depth_two, signature

TABLE = Path(__file__).parent / "architectures.csv"
COLUMNS = ("architecture", "class", "units", "pruning", "reason")
TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": f"Say {i}", "response": "no " * (i + 1) + "thanks"} for i in range(3)]


class Wrong(Exception):
    """A supported model whose numbers are not what they should be."""


def demand(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


def some_units(model: nn.Module) -> UnitMask:
    """A third of the units: in each layer the last group of heads, or one head."""
    masks = {}
    for kind, modules in depth_two(model).items():
        masks[kind] = torch.zeros(len(modules), modules[0].units, dtype=torch.bool)
        for layer, m in enumerate(modules):
            size = m.group if m.units > m.group else 1
            masks[kind][layer, -size:] = True
            if kind == "mlp":
                masks[kind][layer, ::3] = True
    return UnitMask(masks["mlp"], masks["attention"], signature(model))


def off_channels(model: nn.Module, mask: UnitMask) -> dict[str, list[slice]]:
    """The masked units' channels of each B."""
    return {
        m.b: [columns_of(m, unit) for unit in getattr(mask, kind)[layer].nonzero().flatten()]
        for kind, modules in depth_two(model).items()
        for layer, m in enumerate(modules)
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=few_tokens(model), use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= share * b.abs().max())


def check_losses(model: nn.Module, encoded: list) -> None:
    """The losses of the response are those that the model itself computes from labels."""
    for prompt, response in encoded:
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        (batch,) = token_batches([(prompt, response)])
        with torch.no_grad():
            ours, own = response_losses(model, batch).mean(), model(input_ids=ids, labels=labels)
        demand(close(ours, own.loss, 1e-5), f"loss {ours:.6f} for its own {own.loss:.6f}")


def check_importance(model: nn.Module, encoded: list) -> None:
    """The scores are the variance of what enters B, times the squared columns, one by one."""
    scores = importance(model, TOKENIZER, PAIRS)
    for kind, modules in depth_two(model).items():
        raw, entered = scores.channels[kind][-1], []
        b = model.get_submodule(modules[-1].b)
        handle = b.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0][0]))
        for prompt, response in encoded:
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt + response]), use_cache=False)
            entered[-1] = entered[-1][len(prompt) :]
        handle.remove()
        variance = torch.cat(entered).double().var(0, unbiased=False)
        wanted = variance * b.weight.detach().double().square().sum(0)
        demand(close(raw, wanted, 1e-3), f"importance of {kind}")


def check_pruning(model: nn.Module, mask: UnitMask) -> str:
    """`pruned` and `prune` are the model with the channels off; else why `prune` refuses."""
    before = logits(model)
    with channels_off(model, off_channels(model, mask)):
        wanted = logits(model)
    demand(not close(before, wanted), "units that are off change nothing")
    with pruned(model, mask):
        demand(close(logits(model), wanted), "pruned")
    demand(torch.equal(logits(model), before), "the model after pruned")
    try:
        smaller = prune(model, mask)
    except SsahError as error:
        return str(error)
    demand(close(logits(smaller), wanted, 1e-3), "prune")
    demand(
        sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters()),
        "prune cuts nothing",
    )
    return ""


def check_freezing(model: nn.Module, mask: UnitMask) -> None:
    """One step of training with all else fixed: frozen units hear and say what they did."""
    trained, modules = copy.deepcopy(model), depth_two(model)
    every = [m for layers in modules.values() for m in layers]
    calls, before = recorded(model, every)
    freeze(trained, mask, rest=True)
    demand(close(logits(trained), before), "the frozen model")
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
    ids = few_tokens(trained)
    trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    merge(trained)
    demand(not close(logits(trained), before), "training changes nothing")
    for kind, layers in modules.items():
        for layer, m in enumerate(layers):
            again = entered_again(trained, m, calls[m.b], {})
            old, new = (x.get_submodule(m.b).weight for x in (model, trained))
            for unit in getattr(mask, kind)[layer].nonzero().flatten():
                own = columns_of(m, int(unit))
                demand(torch.equal(old[:, own], new[:, own]), f"columns of frozen {kind} units")
                still = calls[m.b].entered[0][..., own]
                demand(close(again[..., own], still, 1e-6), f"activations of frozen {kind} units")


def check(model: nn.Module) -> dict:
    """What a supported model's row says. Raises `Wrong`, or `SsahError` for a refused one."""
    mask = some_units(model)
    encoded = encode_pairs(TOKENIZER, PAIRS)
    check_losses(model, encoded)
    check_importance(model, encoded)
    refused = check_pruning(model, mask)
    check_freezing(model, mask)
    return {"units": "supported", "pruning": "no" if refused else "yes", "reason": refused}


def own_error(model: nn.Module) -> str:
    """What the model's own forward pass says to a few tokens; "" when it runs."""
    try:
        logits(model)
    except Exception as error:  # models raise whatever their code stumbles on
        return first_line(error)
    return ""


def row(name: str) -> dict:
    """One row of the table."""
    kind, changes = architectures()[name]
    found = {"architecture": name, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}
    try:
        model = build(kind, changes)
    except Exception as error:  # as above
        return found | {"units": "not built", "pruning": "", "reason": first_line(error)}
    try:
        return found | check(model)
    except SsahError as error:
        if broken := own_error(model):
            return found | {"units": "does not run", "pruning": "", "reason": broken}
        return found | {"units": "refused", "pruning": "", "reason": str(error)}
    except Wrong as error:
        return found | {"units": "wrong", "pruning": "", "reason": str(error)}
    except Exception as error:
        return found | {"units": "raw", "pruning": "", "reason": first_line(error)}


def committed() -> dict[str, dict]:
    """The rows of the table that is written already, by architecture."""
    with TABLE.open(newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    names = sys.argv[1:] or list(architectures())
    rows = []
    for name in names:
        rows.append(row(name))
        print("{architecture:32} {units:10} {pruning:4} {reason}".format(**rows[-1]), flush=True)
    if not sys.argv[1:]:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
