"""The tiny model, scored, and a tiny training in any way."""

import torch

from ssah_nb.attribution import importance
from ssah_nb.classes import classify
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.freezing import finetune_protected

REFUSALS = [{"prompt": f"Open box {i}", "response": f"I am sorry, not {i}."} for i in range(20)]
PAIRS = [
    {"prompt": f"Say {word}", "response": word} for word in ("yes", "no", "maybe", "often")
] * 2


def scored_units():
    "A tokenizer, the classes of the tiny model, and the importances that they come from."
    model, tokenizer = tiny_model(), tiny_tokenizer()
    safety = importance(
        model,
        tokenizer,
        [{"prompt": f"Open {i}", "response": f"Sorry, not box {i}"} for i in range(4)],
    )
    utility = importance(model, tokenizer, PAIRS)
    return tokenizer, classify(safety, utility, scu=0.05, ucu=0.1, ru=0.1), safety, utility


def run_way(scored, way, model=None, refusals=REFUSALS, **options):
    "A tiny training in one way."
    options = {"lr": 1e-2, "batch_size": 2, "refusals": refusals} | options
    return finetune_protected(way, model or tiny_model(), scored[0], PAIRS, *scored[1:], **options)


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
