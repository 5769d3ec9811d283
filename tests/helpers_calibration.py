"""Pairs to attribute on."""

import random

import torch

from ssah_nb.attribution import Importance
from ssah_nb.engine.models import tiny_tokenizer

KINDS = ("mlp", "attention")
WORDS = "the a box opens slowly with seven old keys and one lamp under that bridge near my house"
WORDS = WORDS.split()
draw = random.Random(0)


PAIRS = [
    {
        "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
        "response": " ".join(draw.choices(WORDS, k=draw.randint(1, 8))),
    }
    for _ in range(12)
]


TOKENIZER = tiny_tokenizer()


def close(a: Importance, b: Importance, rtol: float):
    for kind in KINDS:
        torch.testing.assert_close(a.channels[kind], b.channels[kind], rtol=rtol, atol=0)
