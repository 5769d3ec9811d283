"""Try every causal architecture of transformers: `python docs/architectures.py [name ...]`.

Without names it writes docs/architectures.csv: for each architecture whether its units are
supported, or the reason why they are not. The models are tiny and random.
"""

import copy
import csv
import sys
import warnings
from collections.abc import Iterator
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
from ssah_nb.engine.models import tiny_tokenizer
from ssah_nb.engine.proof import entered_again, few_tokens, recorded, trial_states
from ssah_nb.engine.run import SsahError
from ssah_nb.freezing import freeze, merge
from ssah_nb.units import DepthTwo, UnitMask, depth_two, signature

TABLE = Path(__file__).parent / "architectures.csv"
COLUMNS = ("architecture", "class", "units", "prune", "reason")
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


def masked(model: nn.Module, mask: UnitMask) -> Iterator[tuple[DepthTwo, torch.Tensor]]:
    """Each module, and which channels of its B belong to the masked units."""
    for kind, modules in depth_two(model).items():
        for layer, m in enumerate(modules):
            yield m, getattr(mask, kind)[layer].repeat_interleave(m.width)


def without(model: nn.Module, mask: UnitMask) -> nn.Module:
    """A copy whose columns of the masked units are zero."""
    changed = copy.deepcopy(model)
    for m, channels in masked(model, mask):
        if m.experts:
            weight = changed.get_parameter(m.b).data
            weight.mul_(~channels.view(m.experts, 1, -1))
        else:
            changed.get_submodule(m.b).weight.data[:, channels] = 0
    return changed


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
        if modules[-1].experts:
            demand(bool(raw.isfinite().all() and raw.any()), "importance of experts")
            continue
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


def check_cut(model: nn.Module, mask: UnitMask) -> None:
    """A model that `prune` made is the model with the columns at zero, and smaller."""
    smaller = prune(model, mask)
    demand(close(logits(smaller), logits(without(model, mask)), 1e-3), "prune")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, model)]
    demand(sizes[0] < sizes[1], "prune cuts nothing")


def check_pruning(model: nn.Module, mask: UnitMask) -> tuple[str, str]:
    """`pruned` is the model with columns at zero; and what `prune` can cut, or why it refuses."""
    before, wanted = logits(model), logits(without(model, mask))
    demand(not close(before, wanted), "units that are off change nothing")
    with pruned(model, mask):
        demand(close(logits(model), wanted), "pruned")
    demand(torch.equal(logits(model), before), "the model after pruned")
    channels, reason = UnitMask(mask.mlp, mask.attention & ~mask.attention, mask.model), ""
    for cut, chosen in (("all units", mask), ("channels", channels)):
        try:
            check_cut(model, chosen)
            return cut, reason
        except SsahError as error:
            reason = reason or str(error)
    return "no", reason


def rows_and_columns(model: nn.Module, m: DepthTwo, channels: torch.Tensor) -> list[torch.Tensor]:
    """The weights of the units whose channels these are."""
    if m.experts:
        down, up = (model.get_parameter(name) for name in (m.b, m.a[0][0]))
        chosen = channels.view(m.experts, -1)
        both = torch.cat([chosen, chosen], 1)
        return [down.transpose(1, 2)[chosen], up[both]]
    found = [model.get_submodule(m.b).weight[:, channels]]
    for name, first in m.a:
        found.append(model.get_submodule(name).weight[first:][: len(channels)][channels])
    of_group = channels.view(-1, m.group, m.width).any(2).any(1)
    shared = of_group.repeat_interleave(m.width)
    for name, first in m.shared:
        found.append(model.get_submodule(name).weight[first:][: len(shared)][shared])
    return found


def check_freezing(model: nn.Module, mask: UnitMask) -> None:
    """One step of training with all else fixed: frozen units hear and say what they did."""
    trained = copy.deepcopy(model)
    plain = [m for layers in depth_two(model).values() for m in layers if not m.experts]
    calls, before = recorded(model, plain)
    freeze(trained, mask, rest=True)
    demand(close(trial_states(trained), before), "the frozen model")
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
    ids = few_tokens(trained)
    trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    merge(trained)
    demand(not close(trial_states(trained), before), "training changes nothing")
    for m, channels in masked(model, mask):
        both = zip(*(rows_and_columns(x, m, channels) for x in (model, trained)))
        demand(all(torch.equal(old, new) for old, new in both), f"frozen bits of {m.b}")
        if not m.experts:
            again, still = entered_again(trained, m, calls[m.b], {}), calls[m.b].entered[0]
            same = close(again[..., channels], still[..., channels], 1e-6)
            demand(same, f"what frozen units hear in {m.b}")


def check(model: nn.Module) -> dict:
    """What a supported model's row says. Raises `Wrong`, or `SsahError` for a refused one."""
    mask = some_units(model)
    encoded = encode_pairs(TOKENIZER, PAIRS)
    check_losses(model, encoded)
    check_importance(model, encoded)
    cut, reason = check_pruning(model, mask)
    check_freezing(model, mask)
    return {"units": "supported", "prune": cut, "reason": reason}


def own_error(model: nn.Module) -> str:
    """What the model's own forward pass says to a few tokens; "" when it runs."""
    try:
        logits(model)
    except Exception as error:  # models raise whatever their code stumbles on
        return said(error)
    return ""


def said(error: Exception) -> str:
    """An error of the model's own code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def short(error: SsahError) -> str:
    """The part of a refusal that is about this model."""
    return str(error).partition(" is not supported: ")[2].partition(";")[0] or str(error)


def found(name: str) -> dict:
    """What is found of one architecture."""
    try:
        model = build(*architectures()[name])
    except Exception as error:  # a model raises whatever its code stumbles on
        return {"units": "not built", "reason": said(error)}
    try:
        return check(model)
    except SsahError as error:
        broken = own_error(model)
        units = "does not run" if broken else "refused"
        return {"units": units, "reason": broken or short(error)}
    except Wrong as error:
        return {"units": "wrong", "reason": str(error)}
    except Exception as error:  # as above
        return {"units": "raw", "reason": said(error)}


def row(name: str) -> dict:
    """One row of the table."""
    kind, _ = architectures()[name]
    facts = {"architecture": name, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "prune": ""}
    return facts | found(name)


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
        print("{architecture:32} {units:12} {prune:9} {reason}".format(**rows[-1]), flush=True)
    if not sys.argv[1:]:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
