"""Made-up cases of the comparison."""

import numpy as np

from ssah_nb.engine.protection import Case

CASES = [Case(way, order) for way in ("full", "replay") for order in (1, 2)]


def trained(case):
    "Stands for training and asking: random, but fixed by the case."
    chosen = np.random.default_rng([case.order, len(case.way)])
    yes = (chosen.random(40) < (0.8 if case.way == "full" else 0.05)).tolist()
    losses = [[float(x), 4] for x in 8 + chosen.random(10)]
    outcomes = {
        "harmful": yes,
        "coherent": [place % 3 > 0 for place in range(40)],
        "benign": [False] * 40,
        "harmful_margin": chosen.random(40).tolist(),
    }
    outcomes |= {"training_losses": losses, "benign_losses": losses}
    done = {"epochs": 1.0, "reached": True, "seconds": 1.0, "optimizer_mb": 2.0}
    return {"done": done | {"reference_mb": 0.5 * (case.way != "full")}, "outcomes": outcomes}


def kept(case):
    return {"case": vars(case), "fingerprint": ""} | trained(case)
