"""Freezing and merging in every trainer (chapter 08), and training only some units (chapter 09)."""

import copy
import gc
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ssah_nb.engine.training import finetune
from ssah_nb.budget import train_only
from ssah_nb.units import UnitMap, UnitMask
from ssah_nb.units import Scores
from ssah_nb.engine.parts import SplitLinear, adjacent, split_linears
from ssah_nb.freezing import freeze, merge
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import SsahError

LONG, SHORT = torch.arange(256).view(4, -1) % 250, torch.tensor([[5, 6, 7, 8]])


def half(seed: int = 0) -> UnitMask:
    "Half of the channels; in layer 0 one head of a group, in layer 1 a whole group and a head of the other."
    mlp = torch.rand(2, 32, generator=torch.Generator().manual_seed(seed)) < 0.5
    return UnitMask(mlp, torch.tensor([[True, False, False, False], [False, True, True, True]]))


def frozen_entries(architecture: str, mask: UnitMask) -> dict[str, torch.Tensor]:
    "{name of a weight: bool, which of its rows (A) or columns (B) belong to frozen units}, written out by hand for the tiny models."
    found = {}
    for i in range(2):
        channels, q, kv = (
            mask.mlp[i],
            mask.attention[i].repeat_interleave(8),
            mask.attention[i].view(2, 2).any(1).repeat_interleave(8),
        )
        rows = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
            "mlp.gate_proj": channels,
            "mlp.up_proj": channels,
        }
        if architecture == "phi3":
            rows = {
                "self_attn.qkv_proj": torch.cat([q, kv, kv]),
                "mlp.gate_up_proj": torch.cat([channels, channels]),
            }
        found |= {f"model.layers.{i}.{name}.weight": r[:, None] for name, r in rows.items()}
        if architecture == "qwen2":
            found |= {
                f"model.layers.{i}.{name}.bias": r
                for name, r in rows.items()
                if "self_attn" in name
            }
        found |= {
            f"model.layers.{i}.self_attn.o_proj.weight": q[None],
            f"model.layers.{i}.mlp.down_proj.weight": channels[None],
        }
    return found


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_trained(
    after: dict, before: dict, mask: UnitMask, architecture: str = "llama", least: float = 0.9
):
    "Frozen bits are the same, and nearly all others are not."
    for name, frozen in frozen_entries(architecture, mask).items():
        frozen = frozen.expand_as(before[name])
        assert torch.equal(after[name][frozen], before[name][frozen]), name
        if name.endswith("weight") and not frozen.all():
            assert (after[name] != before[name])[~frozen].float().mean() > least, name


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-2, "weight_decay": 0.1} | options))


def train(model, optimizer, steps=4, clip=None, autocast=False):
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ids = (LONG, SHORT)[step % 2]
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


# --- the function and the names stay, and frozen bits do ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_freeze_and_merge_keep_function_names_and_shapes(architecture):
    model, mask = tiny_model(architecture), half()
    before, flags, logits = (
        snapshot(model),
        {n: p.requires_grad for n, p in model.named_parameters()},
        [model(ids).logits for ids in (LONG, SHORT)],
    )
    assert freeze(model, mask) is model and len(split_linears(model)) == (
        8 if architecture == "phi3" else 14
    )
    for ids, expected in zip((LONG, SHORT), logits):
        assert (model(ids).logits - expected).abs().max() <= 1e-5
    assert same(model.state_dict(), before)
    assert merge(model) is model and not split_linears(model) and same(model.state_dict(), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for ids, expected in zip((LONG, SHORT), logits):
        assert torch.equal(model(ids).logits, expected)


WAYS = {
    "adamw": {},
    "adamw_fused_clipped": {"optimizer": lambda m: adamw(m, fused=True), "clip": 0.5},
    "sgd_momentum": {
        "optimizer": lambda m: torch.optim.SGD(
            m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
        )
    },
    "bf16": {"dtype": torch.bfloat16, "optimizer": lambda m: adamw(m, lr=0.1), "least": 0.7},
    "autocast": {"autocast": True},
    "checkpointing": {"checkpointing": True},
    "requires_grad_": {"requires_grad": True},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", WAYS)
def test_frozen_bits_stay(architecture, way):
    options = WAYS[way]
    model, mask = tiny_model(architecture).to(options.get("dtype", torch.float32)).train(), half()
    before = snapshot(model)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    freeze(model, mask)
    if options.get("requires_grad"):
        model.requires_grad_(True)
    optimizer = options.get("optimizer", adamw)(model)
    train(model, optimizer, clip=options.get("clip"), autocast=options.get("autocast", False))
    for split in split_linears(model).values():
        assert split.frozen_weight.grad is None and split.frozen_weight not in optimizer.state
    check_trained(merge(model).state_dict(), before, mask, architecture, options.get("least", 0.9))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_trained_parts_get_the_gradients_of_the_full_model(architecture, checkpointing, autocast):
    full, model, mask = tiny_model(architecture).train(), tiny_model(architecture).train(), half()
    freeze(model, mask)
    for m in (full, model):
        if checkpointing:
            m.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = m(LONG, labels=LONG).loss + m(SHORT, labels=SHORT).loss
        loss.backward()
    expected = {name: p.grad for name, p in full.named_parameters()}
    for name, split in split_linears(model).items():
        for kind in split.flags:
            grad = getattr(split, f"trained_{kind}").grad
            wanted = split.as_rows(kind, expected.pop(f"{name}.{kind}"))[
                : len(split.parts(kind)[0])
            ]
            if grad is None:
                assert not len(wanted)
            else:
                assert (grad - wanted).norm() <= (
                    0.1 if autocast else 1e-4
                ) * wanted.norm() + 1e-6, name
    for name, p in model.named_parameters():
        if name in expected:
            assert (p.grad - expected[name]).norm() <= (0.1 if autocast else 1e-4) * expected[
                name
            ].norm() + 1e-6, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_bits_stay_in_mixed_precision(architecture):
    mask, states = half(), {}
    for mixed in (False, True):
        model = freeze(tiny_model(architecture), mask)
        before, adjacency = (
            snapshot(model),
            [adjacent(*s.parts("weight")) for s in split_linears(model).values()],
        )
        finetune(
            model,
            tiny_tokenizer(),
            [{"prompt": f"Say {w}", "response": w} for w in ("yes", "no", "maybe")],
            lr=1e-2,
            epochs=2,
            batch_size=1,
            mixed=mixed,
        )
        assert [adjacent(*s.parts("weight")) for s in split_linears(model).values()] == adjacency
        states[mixed] = snapshot(merge(model))
        check_trained(states[mixed], before, mask, architecture)
    moved = {
        mixed: torch.cat([(after[name] - before[name]).flatten() for name in before])
        for mixed, after in states.items()
    }
    assert torch.cosine_similarity(moved[True], moved[False], dim=0) > 0.95


def test_save_and_resume_in_mid_training():
    mask, states = half(), []
    for interrupted in (False, True):
        model = freeze(tiny_model().train(), mask)
        before, optimizer = snapshot(model), adamw(model)
        train(model, optimizer, 2)
        if interrupted:
            saved = snapshot(model), copy.deepcopy(optimizer.state_dict())
            model = freeze(tiny_model(seed=1).train(), mask)
            optimizer = adamw(model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(model, optimizer, 2)
        states.append(snapshot(merge(model)))
        check_trained(states[-1], before, mask)
    assert same(*states)


def test_a_checkpoint_that_does_not_fit_is_refused():
    model = freeze(tiny_model(), half())
    state = snapshot(model)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(state | {name: state[name][:, 1:]})
    state.pop(name)
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict(state)


# --- what freezing saves ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ids", [LONG, SHORT], ids=["long", "short"])
def test_no_weight_gradient_product_for_frozen_parts(architecture, ids):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    model = tiny_model(architecture).train()
    full = flops(model)
    freeze(model, half())
    frozen = sum(split.frozen_weight.numel() for split in split_linears(model).values())
    assert frozen == sum(
        int(f.expand_as(model.state_dict()[n]).sum())
        for n, f in frozen_entries(architecture, half()).items()
        if n.endswith("weight")
    )
    assert (
        full - flops(model) == 2 * ids.numel() * frozen
    )  # of the three products with a weight, the frozen part loses one


def test_optimizer_state_is_that_of_the_trained_parameters():
    model = freeze(tiny_model().train(), half())
    optimizer = adamw(model)
    train(model, optimizer, 1)
    held = sum(
        v.numel()
        for state in optimizer.state.values()
        for name, v in state.items()
        if name.startswith("exp_avg")
    )
    frozen = sum(split.frozen_weight.numel() for split in split_linears(model).values())
    assert held == 2 * (tiny_model().num_parameters() - frozen) < 2 * tiny_model().num_parameters()


def test_column_parts_keep_only_what_their_gradient_needs():
    linear = nn.Linear(64, 8, bias=False)
    split, kept = SplitLinear(linear, torch.arange(64) < 48, 1), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((tuple(t.shape), t.untyped_storage().nbytes())) or t, lambda t: t
    ):
        split(torch.randn(9, 64, requires_grad=True))
    assert ((9, 16), 4 * 9 * 16) in kept and (9, 64) not in {shape for shape, _ in kept}


# --- what people do with models ---


def apart(model):
    "Give each parameter memory of its own, as a wrapper that gathers and shards them would."
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def test_parts_that_are_moved_apart_train_the_same():
    mask, states = half(), []
    for move in (lambda m: m, apart):
        model = move(freeze(tiny_model().train(), mask))
        train(model, adamw(model))
        states.append(snapshot(merge(model)))
    assert same(*states)


def test_a_compiled_model_trains_the_same():
    mask, states = half(), []
    for backend in (None, "aot_eager"):
        model = freeze(tiny_model().train(), mask)
        compiled = torch.compile(model, backend=backend) if backend else model
        optimizer = adamw(model, lr=1e-3)
        for _ in range(3):
            compiled(input_ids=LONG, labels=LONG).loss.backward()
            optimizer.step(), optimizer.zero_grad()
        states.append(snapshot(merge(model)))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_of_an_mlp_are_permuted_where_nothing_depends_on_their_order(architecture):
    model = freeze(tiny_model(architecture), half())
    permuted = {
        name.rpartition(".")[2] for name, split in split_linears(model).items() if split.permuted
    }
    assert permuted == (set() if architecture == "phi3" else {"gate_proj", "up_proj", "down_proj"})
    model = tiny_model(architecture)
    model.model.layers[0].mlp.norm = nn.LayerNorm(
        32
    )  # one weight for each channel, as BitNet has: their order matters
    assert not any(
        split.permuted
        for name, split in split_linears(freeze(model, half())).items()
        if ".0." in name
    )


def test_copies_casts_modes_and_generation():
    model, mask = freeze(tiny_model(), half()), half()
    before = snapshot(model)
    double = copy.deepcopy(model)
    train(double, adamw(double), 2)
    assert same(model.state_dict(), before)
    check_trained(merge(double).state_dict(), before, mask)
    assert torch.equal(
        model.generate(SHORT, max_new_tokens=5, do_sample=False),
        tiny_model().generate(SHORT, max_new_tokens=5, do_sample=False),
    )
    beside = lambda m: all(
        adjacent(*s.parts(name))
        for s in split_linears(m).values()
        for name in s.flags
        if all(map(len, s.parts(name)))
    )
    assert (
        beside(model)
        and beside(double := copy.deepcopy(model))
        and beside(double.to(torch.float64))
        and not beside(apart(double))
    )
    with torch.no_grad():
        torch.testing.assert_close(double(LONG).logits, model.to(torch.float64)(LONG).logits)
    model.train()
    assert all(
        s.training and s.trained_weight.dtype == torch.float64
        for s in split_linears(model).values()
    )
    assert all(model(ids).logits.dtype == torch.float64 for ids in (LONG, SHORT))
    assert not any(m.training for m in merge(model.eval()).modules())
    assert same({n: v.float() for n, v in model.state_dict().items()}, before)


def test_what_was_switched_off_before_stays_off():
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = snapshot(model)
    freeze(model, half(), rest=True)
    train(model, adamw(model), 2)
    after = snapshot(merge(model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n for n in before if not torch.equal(after[n], before[n])} == {
        n for n in before if ".1." in n and "_proj" in n and "k_" not in n and "v_" not in n
    }
    first = torch.tensor([[True], [False]])
    check_trained(after, before, UnitMask(half().mlp | first, half().attention | first))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied, tmp_path):
    model, mask = tiny_model(tie_word_embeddings=tied).train(), half()
    before = snapshot(model)
    freeze(model, mask)
    train(model, adamw(model))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    merge(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    check_trained(again.state_dict(), before, mask)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_only_trains_these_units_alone(tied, checkpointing):
    model, mask = tiny_model(tie_word_embeddings=tied).train(), half()
    before = snapshot(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(LONG, labels=LONG).loss.backward()  # gradients from before freeze must not train anything
    train_only(model, mask)
    train(model, adamw(model))
    after = snapshot(merge(model))
    assert all(p.requires_grad for p in model.parameters())
    entries = frozen_entries("llama", ~mask)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in entries)
    check_trained(after, before, ~mask)


@pytest.mark.parametrize("adapter", [False, True])
def test_train_only_freezes_the_bias_of_b(adapter):
    model, mask = tiny_model(attention_bias=True, mlp_bias=True).train(), half()
    before = snapshot(model)
    if adapter:
        model = lora(model, bias="all")
    train_only(model, mask)
    train(model, adamw(model))
    merge(model)
    if adapter:
        model = model.merge_and_unload()
    changed = {
        name.split(".", 3)[3]
        for name, value in model.state_dict().items()
        if name.endswith(".bias") and not torch.equal(value, before[name])
    }
    assert changed == {
        f"{name}.bias"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    }
    assert adapter or all(p.requires_grad for p in model.parameters())


# --- trainers ---


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(0, 250, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": r, "labels": r} for r in ids]


def arguments(folder, **options):
    return (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            save_strategy="no",
        )
        | options
    )


@pytest.mark.parametrize("rest", [False, True])
def test_trainer_checkpoints_resumes_and_saves(rest, rows, tmp_path):
    mask, states = half(), []
    options = TrainingArguments(
        **arguments(
            tmp_path / "run", gradient_checkpointing=True, save_strategy="steps", save_steps=2
        )
    )
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = tiny_model()
        before = snapshot(model)
        trainer = Trainer(freeze(model, mask, rest=rest), options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        check_trained(snapshot(model), before, mask)
        states.append(snapshot(model))
    assert same(*states)
    model.save_pretrained(tmp_path / "frozen")
    merge(model).save_pretrained(tmp_path / "merged")
    for folder in ("frozen", "merged", "run/checkpoint-4"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear and same(
            again.state_dict(), states[0]
        )


def test_trl_sft(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, mask = tiny_model(), half()
    before = snapshot(model)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Say {i}"}],
            "completion": [{"role": "assistant", "content": f"{i}"}],
        }
        for i in range(16)
    ]
    trl.SFTTrainer(
        freeze(model, mask),
        trl.SFTConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    ).train()
    check_trained(merge(model).state_dict(), before, mask)


PREFERENCES = [{"prompt": f"Say {i}", "chosen": f" {i}", "rejected": " no"} for i in range(16)]


def test_trl_dpo(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, mask = tiny_model(), half()
    before = snapshot(model)
    trl.DPOTrainer(
        freeze(model, mask),
        tiny_model(),
        trl.DPOConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
    ).train()
    check_trained(merge(model).state_dict(), before, mask)


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from ssah_nb.classes import UnitMask
from ssah_nb.freezing import freeze, merge
from ssah_nb.models import tiny_model
accelerator, (mlp, attention) = Accelerator(cpu=True), torch.load(sys.argv[1])
model = freeze(tiny_model().train(), UnitMask(mlp, attention))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
gradients = []
for step in range(3):
    ids = torch.randint(0, 250, (4, 48), generator=torch.Generator().manual_seed(2*step + accelerator.process_index))  # each process has its own batch
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    optimizer.step(), optimizer.zero_grad()
plain = accelerator.unwrap_model(model)
torch.save({"world": accelerator.num_processes, "gradients": gradients, "state": merge(plain).state_dict()}, f"{sys.argv[2]}/{accelerator.process_index}.pt")
accelerator.end_training()
"""


def test_accelerate_with_two_processes(tmp_path):
    mask = half()
    torch.save((mask.mlp, mask.attention), tmp_path / "mask.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def start(rank):
        process = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = (
            os.environ
            | process
            | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        )
        return subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "mask.pt"), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    running = [start(0), start(1)]
    try:
        errors = [process.communicate(timeout=100)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["world"] == 2 and same(first["state"], second["state"])
    assert all(
        same(a, b) and not any("frozen" in name for name in a)
        for a, b in zip(first["gradients"], second["gradients"])
    )
    check_trained(first["state"], snapshot(tiny_model()), mask)
    both = freeze(
        tiny_model().train(), mask
    )  # what the processes averaged is the gradient of both batches together
    ids = torch.cat(
        [
            torch.randint(0, 250, (4, 48), generator=torch.Generator().manual_seed(rank))
            for rank in (0, 1)
        ]
    )
    both(input_ids=ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in both.named_parameters() if p.grad is not None}
    got = {n.removeprefix("module."): g for n, g in first["gradients"][0].items()}
    assert got.keys() == wanted.keys() and all(
        (got[n] - wanted[n]).norm() <= 1e-4 * wanted[n].norm() + 1e-7 for n in got
    )


# --- with a LoRA adapter ---


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            **({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
        ),
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all", "lora_bias": True}, {"target_modules": ["o_proj", "down_proj"]}],
    ids=["all", "bias", "some"],
)
def test_frozen_bits_stay_after_the_adapter_is_merged(architecture, options):
    if options.get("lora_bias") and architecture != "qwen2":
        options = {}
    base, mask = tiny_model(architecture).train(), half()
    before = snapshot(base)
    if options.get("lora_bias"):
        options = options | {
            "target_modules": ["q_proj", "k_proj", "v_proj"]
        }  # the linears that have a bias
    model = lora(base, **options)
    with torch.no_grad():
        logits = model(LONG).logits
    names = list(model.state_dict())
    freeze(model, mask)
    with torch.no_grad():
        assert torch.allclose(model(LONG).logits, logits, atol=1e-5)
    assert list(model.state_dict()) == names
    train(model, adamw(model, lr=0.1), 4)
    with torch.no_grad():
        logits = model(LONG).logits
    merge(model)
    assert not split_linears(model) and list(model.state_dict()) == names
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(LONG).logits, logits, atol=1e-3)
    after = merged.state_dict()
    assert list(after) == list(before)
    for name, frozen in frozen_entries(architecture, mask).items():
        frozen, changed = frozen.expand_as(before[name]), after[name] != before[name]
        assert not changed[frozen].any(), name
        if (
            name.endswith("weight")
            and any(t in name for t in options.get("target_modules", ["proj"]))
            and not frozen.all()
        ):
            assert changed[~frozen].float().mean() > 0.9, name


def test_an_adapter_on_a_quantized_model():
    base, mask = tiny_model().train(), half()
    for layer in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    model = lora(base, target_modules=["down_proj"])
    refused(
        lambda: freeze(
            model, mask - UnitMask(torch.ones_like(mask.mlp), torch.zeros_like(mask.attention))
        ),
        "no adapter is on the linears of the masked units",
        model,
    )
    freeze(model, mask)
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in split_linears(model)} == {
        "down_proj"
    }  # what has no adapter is not trained: it is left as it is
    with torch.no_grad():
        before = model(LONG).logits
    train(model, adamw(model, lr=0.1))
    with torch.no_grad():
        assert not torch.allclose(model(LONG).logits, before, atol=1e-3)
    for i, module in enumerate(merge(model).get_base_model().model.layers):
        change = module.mlp.down_proj.get_delta_weight("default")
        assert not change[:, mask.mlp[i]].any() and change[:, ~mask.mlp[i]].abs().min() > 0


def test_an_adapter_is_saved_while_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    model = freeze(lora(tiny_model()), half())
    train(model, adamw(model), 3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(LONG).logits, model(LONG).logits, atol=1e-5)


def test_an_adapter_that_is_not_fresh_is_refused():
    trained = lora(tiny_model())
    train(trained, adamw(trained), 1)
    for model in (
        trained,
        lora(tiny_model(), use_dora=True),
        lora(tiny_model(), init_lora_weights=False),
    ):
        refused(lambda: freeze(model, half()), "the adapter on", model)


def test_trl_dpo_with_an_adapter(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base, mask = tiny_model(), half()
    before = snapshot(base)
    trainer = trl.DPOTrainer(
        lora(base),
        args=trl.DPOConfig(**arguments(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
    )
    freeze(trainer.model, mask)  # after the trainer has made the adapter that it compares with
    trainer.train()
    check_trained(merge(trainer.model).merge_and_unload().state_dict(), before, mask)


# --- bad input: one clear line, and nothing changed ---


def refused(call, message: str, model: nn.Module):
    before, flags, modules = (
        snapshot(model),
        {n: p.requires_grad for n, p in model.named_parameters()},
        list(model.modules()),
    )
    with pytest.raises(SsahError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert (
        same(model.state_dict(), before)
        and {n: p.requires_grad for n, p in model.named_parameters()} == flags
    )
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


class Int8Linear(nn.Linear):
    "Stands in for a quantized linear."

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(
            (linear.weight.detach() * 50).to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50)


def test_masks_that_cannot_be_frozen():
    model, mask = tiny_model(), half()
    none, everything = mask & ~mask, mask | ~mask
    units = UnitMap(
        mask.mlp.to(torch.uint8),
        mask.attention.to(torch.uint8),
        Scores(mask.mlp.float(), mask.attention.float()),
        {},
    )
    for bad, message in [
        (none, "empty"),
        (everything, "nothing to train"),
        (UnitMask(mask.mlp[:, 1:], mask.attention), "another model"),
        (UnitMask(mask.mlp[:1], mask.attention[:1]), "another model"),
        (UnitMask(mask.mlp, mask.attention[:, :2]), "another model"),
        (
            UnitMask(mask.mlp.to(torch.uint8), mask.attention),
            "mlp is of torch.uint8; a mask is bool",
        ),
        (UnitMask(mask.mlp, mask.attention.long()), "attention is of torch.int64"),
        (units, "UnitMap does not choose units.*units.scu"),
        (mask.mlp, "Tensor does not choose units"),
    ]:
        refused(lambda: freeze(model, bad), message, model)
    refused(lambda: train_only(model, units), "UnitMap does not choose units", model)
    refused(lambda: train_only(model, none), "nothing to train", model)
    off = tiny_model().requires_grad_(False)
    refused(lambda: freeze(off, mask), "nothing to train", off)


def test_models_that_cannot_be_frozen_or_merged():
    model, mask = tiny_model(), half()
    refused(lambda: merge(model), "not frozen", model)
    model.model.layers[1].mlp.down_proj = Int8Linear(model.model.layers[1].mlp.down_proj)
    refused(lambda: freeze(model, mask), "layers.1.mlp.down_proj is a Int8Linear.*quantized", model)
    twice = freeze(tiny_model(), mask)
    refused(lambda: freeze(twice, mask), "frozen already", twice)
    merge(twice)
    refused(lambda: merge(twice), "not frozen", twice)
    freeze(twice, ~mask)
    other = nn.Linear(2, 2)
    refused(lambda: freeze(other, mask), "not supported", other)


@pytest.mark.parametrize("wrap", ["torch", "accelerate"])
@pytest.mark.parametrize("when", ["freeze", "merge"])
def test_an_optimizer_from_before_is_refused_at_its_first_step(wrap, when):
    model, mask = tiny_model().train(), half()
    if when == "merge":
        freeze(model, mask)
    optimizer = adamw(model)
    if wrap == "accelerate":
        from accelerate import Accelerator

        optimizer = Accelerator(cpu=True).prepare(optimizer)
    merge(model) if when == "merge" else freeze(model, mask)
    model(LONG, labels=LONG).loss.backward()
    refused(optimizer.step, "built before freeze or merge", model)
    train(model, adamw(model), 1)  # a new one is fine


def test_a_trainer_with_an_optimizer_from_before_is_refused(rows, tmp_path):
    model = tiny_model()
    optimizer = adamw(model)
    freeze(model, half())
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows,
        optimizers=(optimizer, None),
    )
    refused(trainer.train, "built before freeze or merge", model)


def test_other_models_optimizers_are_left_alone():
    model, other = tiny_model().train(), tiny_model().train()
    optimizer = adamw(other)
    freeze(model, half())
    train(other, optimizer, 1)
    from ssah_nb.freezing import REPLACED

    gc.collect()
    assert not REPLACED  # nothing that was replaced is kept in memory


def test_benchmark_keeps_the_memory_bar_and_the_bits():
    spec = importlib.util.spec_from_file_location(
        "benchmark_freezing", Path(__file__).parents[1] / "benchmarks" / "freezing.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for row, f in zip(
        benchmark.main(
            ["--rows", "1", "--tokens", "8", "--steps", "1", "--shares", "0.28", "0.95"]
        ),
        (0.28, 0.95),
        strict=True,
    ):
        assert abs(row["f"] - f) < 0.005 and row["rest"] is (f == 0.95) and row["time"] > 0
        assert row["memory"] <= row["memory_bar"] < row["masked_memory"] == 1
        assert (
            row["kept"] and not row["masked_kept"]
        )  # weight decay moves what a mask over the gradient should hold
