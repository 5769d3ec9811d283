"""Made-up importances, masks and models of the tiny architecture."""

import torch

from ssah_nb.attribution import Importance
from ssah_nb.classes import prune, pruned
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.freezing import freeze
from ssah_nb.units import UnitMask, signature

TOKENIZER, IDS = tiny_tokenizer(), torch.arange(40).view(2, 20) * 5
INFO = {
    "model": signature(tiny_model()),
    "parameters": {"mlp": 96, "attention": 768.0},
    "total": 20_000,
    "method": "flap",
    "tokens": "response",
}


def made_up(seed: int, layers=2, channels=32, heads=4, width=8, **info) -> Importance:
    draw = torch.Generator().manual_seed(seed)
    raw = {
        "mlp": torch.randn(layers, channels, generator=draw),
        "attention": torch.randn(layers, heads * width, generator=draw),
    }
    return Importance(
        raw, {"mlp": [], "attention": []}, INFO | {"model": INFO["model"] | {"heads": heads}} | info
    )


def pairs(word: str) -> list[dict]:
    return [{"prompt": f"{word} {i}", "response": f"{word}! " * (i + 1)} for i in range(4)]


def as_set(mask: UnitMask) -> set:
    "{(kind, layer, unit)}"
    return {
        (kind, *map(int, where))
        for kind in ("mlp", "attention")
        for where in getattr(mask, kind).nonzero()
    }


def random_mask(seed: int, share=0.4) -> UnitMask:
    draw = torch.Generator().manual_seed(seed)
    return UnitMask(
        torch.rand(2, 32, generator=draw) < share, torch.rand(2, 4, generator=draw) < share
    )


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v.view(torch.uint8), b[k].view(torch.uint8)) for k, v in a.items()
    )


def special_masks() -> dict[str, UnitMask]:
    masks = {
        name: UnitMask(torch.zeros(2, 32, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))
        for name in (
            "nothing",
            "one channel",
            "half a group",
            "a group",
            "all heads of a layer",
            "all channels of a layer",
            "everything",
        )
    }
    masks["one channel"].mlp[1, 7] = True
    masks["half a group"].attention[0, 1] = True
    masks["a group"].attention[1, 2:] = True
    masks["all heads of a layer"].attention[0] = True
    masks["all channels of a layer"].mlp[1] = True
    masks["everything"].mlp[:], masks["everything"].attention[:] = True, True
    return masks | {f"random {seed}": random_mask(seed) for seed in range(2)}


MASKS = special_masks()


def with_biases(architecture: str, **config):
    "A tiny model whose biases, if it has any, are not zero."
    model = tiny_model(architecture, **config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def use(what: str, model, mask):
    if what == "pruned":
        with pruned(model, mask):
            pass
    else:
        {"prune": prune, "freeze": freeze}[what](model, mask)
