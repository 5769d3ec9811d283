"""What `test_processes.py` computes by itself, and in two processes under `accelerate launch`.

    accelerate launch --multi_gpu --num_processes 2 tests/launched.py FOLDER

Every function takes the number of processes and gives tensors by name. As a script, this writes
what each process has found to FOLDER/RANK.pt. Llama is in float64.
"""

import sys

import datasets
import torch
import torch.distributed as dist
from helpers_calibration import PAIRS, TOKENIZER
from helpers_freezing import PREFERENCES, arguments, half
from transformers import Trainer, TrainingArguments

from ssah_nb import Anchor, SsahError, UnitMask, finetune, freeze, importance, merge
from ssah_nb.engine.models import tiny_model
from ssah_nb.units import depth_two

CASES = {
    "one pair a batch": dict(pairs=PAIRS, max_tokens=1),
    "all tokens": dict(pairs=PAIRS[:11], max_tokens=1, tokens="all"),
    "one batch": dict(pairs=PAIRS, max_tokens=10_000),
    "gradient": dict(pairs=PAIRS[:3], max_tokens=1, method="gradient"),
    "magnitude": dict(pairs=PAIRS, method="magnitude"),
}
REFUSALS = [{"prompt": f"Open box {i}", "response": "I am sorry, no."[: 5 + i]} for i in range(6)]
BATCH = 4  # rows of a step, over all processes
IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()]


def model_of(architecture: str = "llama"):
    model = tiny_model(architecture)
    return model.double() if architecture == "llama" else model  # PyTorch's experts know no float64


def mask_of(model) -> UnitMask:
    "Half of the channels, or of the experts' channels, and some heads."
    units = depth_two(model)["mlp"][0].units
    mlp = torch.rand(2, units, generator=torch.Generator().manual_seed(0)) < 0.5
    return UnitMask(mlp, half().attention)


def attribution(processes: int) -> dict:
    found = {}
    for name, case in CASES.items():
        scored = importance(tiny_model(), TOKENIZER, **case)
        found |= {f"{name} mlp": scored.mlp, f"{name} attention": scored.attention}
        found[f"{name} count"] = torch.tensor([m.count for m in scored.moments["mlp"]])
    first = not dist.is_initialized() or dist.get_rank() == 0
    for _ in range(2 if first else 1):  # the other process would not join the second call
        found["alone mlp"] = importance(tiny_model(), TOKENIZER, PAIRS, alone=True).mlp
    return found


def options(processes: int, **more) -> dict:
    return arguments("runs/unused", per_device_train_batch_size=BATCH // processes, **more)


def frozen(processes: int) -> dict:
    model = freeze(model_of(), half())
    Trainer(model, TrainingArguments(**options(processes)), train_dataset=ROWS).train()
    return merge(model).state_dict()


def anchored(processes: int) -> dict:
    found = {}
    for on, units in (("answers", None), ("units", half())):
        model = model_of()
        anchor = Anchor(model, TOKENIZER, REFUSALS, on=on, units=units, slack=0.0)
        settings, callbacks = TrainingArguments(**options(processes)), [anchor.callback()]
        Trainer(model, settings, train_dataset=ROWS, callbacks=callbacks).train()
        found |= {f"{on} {name}": weight for name, weight in model.state_dict().items()}
    return found


def dpo(processes: int) -> dict:
    import trl

    model = freeze(model_of(), half())
    settings = options(processes, max_length=64, bf16=False, optim="sgd")
    trl.DPOTrainer(
        model,
        model_of(),
        trl.DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=TOKENIZER,
    ).train()
    return merge(model).state_dict()


def train(model, processes: int, rank: int):
    "Three steps in a plain loop."
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for ids in IDS[: 3 * BATCH].split(BATCH):
        mine = ids[rank::processes]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_alone(architecture: str) -> dict:
    "What `sharded` must give."
    model = model_of(architecture).train()
    train(freeze(model, mask_of(model)), 1, 0)
    return merge(model).state_dict()


def in_shards(model):
    "The model after `fully_shard` on two CPU processes."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(architecture: str, rank: int) -> dict:
    "States of a frozen model that was trained in shards: gathered, loaded back, and merged."
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    everything = StateDictOptions(full_state_dict=True)
    model = model_of(architecture).train()
    mask = mask_of(model)
    train(in_shards(freeze(model, mask)), 2, rank)
    state = get_model_state_dict(model, options=everything)
    again = in_shards(freeze(model_of(architecture), mask))
    again.load_state_dict(model.state_dict())
    whole = freeze(model_of(architecture), mask)
    whole.load_state_dict(state)
    loaded = get_model_state_dict(again, options=everything)
    return {"gathered": state, "loaded": loaded, "merged": merge(whole).state_dict()}


def flattened(use_orig_params: bool):
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    frozen = freeze(model_of(), half())
    return FullyShardedDataParallel(frozen, device_id=cpu, use_orig_params=use_orig_params)


def refused() -> dict[str, str]:
    "What each of these is refused with."
    anchor = Anchor(model_of(), TOKENIZER, REFUSALS)
    model, frozen = in_shards(model_of()), in_shards(freeze(model_of(), half()))
    calls = {
        "freeze": lambda: freeze(model, half()),
        "merge": lambda: merge(frozen),
        "importance": lambda: importance(model, TOKENIZER, PAIRS),
        "finetune": lambda: finetune(frozen, TOKENIZER, PAIRS),
        "anchor": lambda: Anchor(model, TOKENIZER, REFUSALS),
        "anchor's loss": lambda: anchor.loss(model),
        "flattened whole": lambda: flattened(False),
        "flattened views": lambda: flattened(True),
        "meta": lambda: freeze(model_of(), half()).to("meta"),
    }
    return {name: refusal(call) for name, call in calls.items()}


def refusal(call) -> str:
    try:
        call()
    except (SsahError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


TOGETHER = {"attribution": attribution, "frozen": frozen, "anchored": anchored, "dpo": dpo}

if __name__ == "__main__":
    from accelerate import Accelerator

    state = Accelerator(cpu=True)
    assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"
    found = {name: function(2) for name, function in TOGETHER.items()}
    for architecture in ("llama", "mixtral"):
        found[f"sharded {architecture}"] = sharded(architecture, state.process_index)
    found["refused"] = refused()
    torch.save(found, f"{sys.argv[1]}/{state.process_index}.pt")
    state.end_training()
