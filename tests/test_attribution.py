"""Importance against slow, obvious references in float64 (chapter 05)."""

import copy
import functools
import json
import os
import random
import socket
import subprocess
import sys
import weakref

import accelerate
import datasets
import pytest
import torch

from ssah_nb.attribution import Importance, METHODS, importance, load_calibration, zscore
from ssah_nb.engine.moments import Moments
from ssah_nb.engine.batches import encode_pairs, token_batches
from ssah_nb.engine.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import Run, SsahError

KINDS = ("mlp", "attention")
WORDS = "the a box opens slowly with seven old keys and one lamp under that bridge near my house".split()
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


# --- the reference: rows one by one, everything kept, nothing shared with the library but the names of HF's modules ---


@functools.cache
@torch.enable_grad()
def reference_pass(architecture: str, dtype: torch.dtype):
    "(model in float64, {(layer, module): [(prompt length, X [tokens, channels], ∂L/∂X) of each row]}), L the summed loss of the responses."
    model, seen = tiny_model(architecture).to(dtype).double(), {}

    def keep(key):
        def hook(_, inputs):
            inputs[0].requires_grad_() if inputs[0].is_leaf else inputs[0].retain_grad()
            seen.setdefault(key, []).append(inputs[0])

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep((i, "mlp")))
        layer.self_attn.o_proj.register_forward_pre_hook(keep((i, "attention")))
    for prompt, response in encode_pairs(TOKENIZER, PAIRS):
        ids = prompt + response
        predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -sum(predicted[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
        loss.backward()
    prompts = [len(p) for p, _ in encode_pairs(TOKENIZER, PAIRS)]
    return model, {
        key: [(n, x.detach()[0], x.grad[0]) for n, x in zip(prompts, xs)]
        for key, xs in seen.items()
    }


@torch.no_grad()
def reference(
    architecture: str, dtype: torch.dtype, method: str, tokens: str
) -> dict[str, torch.Tensor]:
    model, seen = reference_pass(architecture, dtype)
    rows = {kind: [] for kind in KINDS}
    for i, layer in enumerate(model.model.layers):
        for kind, b in (("mlp", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj)):
            start = (lambda n: n) if tokens == "response" else (lambda n: 0)
            x = torch.cat([x[start(n) :] for n, x, _ in seen[i, kind]])
            g = torch.cat([g[start(n) :] for n, _, g in seen[i, kind]])
            if kind == "mlp":
                a = (
                    layer.mlp.gate_up_proj.weight.chunk(2)
                    if architecture == "phi3"
                    else (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
                )
            else:
                a = (
                    layer.self_attn.qkv_proj.weight[:32]
                    if architecture == "phi3"
                    else layer.self_attn.q_proj.weight,
                )
            scores = []
            for j in range(x.shape[1]):
                column, off = b.weight[:, j], x.clone()
                off[:, j] = 0
                if method == "flap":
                    scores.append(((x[:, j] - x[:, j].mean()) ** 2).mean() * column.norm() ** 2)
                if method == "wanda_sp":
                    scores.append((column.abs() * (x[:, j] ** 2).mean().sqrt()).mean())
                if method == "magnitude":
                    scores.append(column.norm() ** 2 + sum(w[j].norm() ** 2 for w in a))
                if method == "gradient":
                    scores.append((x[:, j] * g[:, j]).abs().mean())
                if method == "sn_tune":
                    scores.append(
                        (b(x) - b(off)).norm(dim=1).mean()
                    )  # what the output loses when the unit is off
            rows[kind].append(torch.stack(scores))
    return {kind: torch.stack(layers) for kind, layers in rows.items()}


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_reference(architecture, method, tokens):
    expected = reference(architecture, torch.float32, method, tokens)
    got = importance(
        tiny_model(architecture), TOKENIZER, PAIRS, tokens=tokens, method=method, max_tokens=200
    )
    for kind in KINDS:
        assert got.channels[kind].shape == (2, 32)
        torch.testing.assert_close(got.channels[kind].double(), expected[kind], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        got.attention.double(), expected["attention"].view(2, 4, 8).mean(-1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_reference_in_bfloat16(architecture, method):
    # The model itself computes in bfloat16, so single weak channels differ by up to 2.7 % from float64 on the same weights.
    # Hence: 2 % of the channel's score, or of the layer's mean score where a channel's is below it.
    expected = reference(architecture, torch.bfloat16, method, "response")
    got = importance(
        tiny_model(architecture).bfloat16(), TOKENIZER, PAIRS, method=method, max_tokens=200
    )
    for kind in KINDS:
        error = (got.channels[kind] - expected[kind]).abs() / torch.maximum(
            expected[kind], expected[kind].mean(1, keepdim=True)
        )
        assert error.max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["flap", "wanda_sp", "sn_tune"])
def test_half_precision_adds_no_error_to_the_statistics(method, dtype):
    "Against float64 on the very activations that the model computed: the 2 % above are the model's, not the accumulators'."
    model, seen = tiny_model().to(dtype), []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    got = importance(model, TOKENIZER, PAIRS, method=method, max_tokens=200)
    handle.remove()
    x = torch.cat(
        [
            x[b.response_mask]
            for x, b in zip(seen, token_batches(encode_pairs(TOKENIZER, PAIRS), 200), strict=True)
        ]
    )
    b = down.weight.detach().double()
    expected = {
        "flap": x.var(0, correction=0) * b.square().sum(0),
        "wanda_sp": x.square().mean(0).sqrt() * b.abs().mean(0),
        "sn_tune": x.abs().mean(0) * b.norm(dim=0),
    }
    torch.testing.assert_close(got.mlp[1].double(), expected[method], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_padding_do_not_count(method):
    for tokens in ("response", "all"):
        together, alone = (
            importance(tiny_model(), TOKENIZER, PAIRS, tokens=tokens, method=method, max_tokens=n)
            for n in (10_000, 1)
        )
        close(together, alone, 1e-5)
    if method != "magnitude":
        assert together.moments["mlp"][0].count == sum(
            len(p) + len(q) for p, q in encode_pairs(TOKENIZER, PAIRS)
        )
        assert not torch.allclose(
            together.mlp, importance(tiny_model(), TOKENIZER, PAIRS, method=method).mlp, rtol=1e-2
        )  # "all" is not "response"


# --- moments ---


def test_moments_merge_in_any_order():
    torch.manual_seed(0)
    parts = [
        torch.randn(n, 5) * torch.tensor([1e-3, 1, 1, 100, 1])
        + torch.tensor([50.0, 0, -3, 1e4, 1e-2])
        for n in (1, 700, 3, 64, 0)
    ]
    whole = torch.cat(parts).double()

    def moments(x):
        m = Moments()
        m.add(x.split(10))
        return m

    a, b, c, d, nothing = map(moments, parts)
    for merged in (
        a + b + c + d,
        (d + c) + (b + a),
        nothing + (c + (a + d)) + b,
        moments(torch.cat(parts[::-1])),
    ):
        assert merged.count == 768
        torch.testing.assert_close(merged.mean, whole.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged.variance, whole.var(0, correction=0), rtol=1e-5, atol=0)
    assert nothing.count == 0 and (nothing + nothing).count == 0


@pytest.mark.parametrize("mean", [0, 1e3, -1e5])
def test_a_large_mean_costs_no_digits(mean):
    torch.manual_seed(0)
    x = (
        torch.randn(5000, 3) * torch.tensor([0.05, 1.0, 20.0]) + mean
    )  # at -1e5 float32 itself resolves 0.008: the reference sees the same rounded numbers
    m = Moments()
    for batch in x.split(500):
        m.add(batch.split(64))
    exact = x.double().var(0, correction=0)
    torch.testing.assert_close(m.variance, exact, rtol=1e-5, atol=0)
    naive = (x.square().mean(0) - x.mean(0).square()).double()
    assert mean == 0 or not torch.allclose(naive, exact, rtol=0.1)


def test_the_activations_are_left_alone_and_not_kept():
    model, alive, most = tiny_model(), [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda _, inputs, out: (
                alive.append(weakref.ref(inputs[0])),
                most.append(sum(r() is not None for r in alive)),
            )[0]
        )
    importance(model, TOKENIZER, PAIRS, tokens="all", max_tokens=100)
    assert len(alive) > 10 and max(most) == 1  # the layers before have let theirs go
    x = torch.randn(40, 8)
    before, m = x.clone(), Moments()
    m.add(x.split(7))
    assert torch.equal(x, before)


# --- more data, several sets, several processes ---


@pytest.mark.parametrize("method", METHODS)
def test_two_data_sets_add_up(method, tmp_path):
    model = tiny_model("qwen2")
    whole, first, second = (
        importance(model, TOKENIZER, p, method=method) for p in (PAIRS, PAIRS[:3], PAIRS[3:])
    )
    close(first + second, whole, 1e-6)
    close(
        Importance.load(second.save(tmp_path / "second")) + first, whole, 1e-6
    )  # later, from a file
    if method != "magnitude":
        assert not torch.allclose(first.mlp, whole.mlp, rtol=1e-2)


def test_only_like_adds_to_like():
    model = tiny_model()
    base = importance(model, TOKENIZER, PAIRS)
    for other, what in (
        (importance(model, TOKENIZER, PAIRS, method="wanda_sp"), "method"),
        (importance(model, TOKENIZER, PAIRS, tokens="all"), "tokens"),
        (importance(tiny_model(seed=1), TOKENIZER, PAIRS), "weights"),
        (importance(tiny_model("mistral"), TOKENIZER, PAIRS), "model"),
    ):
        with pytest.raises(
            SsahError, match=f"the two importances differ in {what}; score both sets on one model"
        ) as error:
            base + other
        assert "\n" not in str(error.value)
    close(
        base + importance(tiny_model(), TOKENIZER, PAIRS), base, 1e-6
    )  # the same weights again: the same model


def test_several_sets_in_one_call():
    model, sets = tiny_model(), {"safety": PAIRS[:4], "utility": PAIRS[4:]}
    both = importance(model, TOKENIZER, sets)
    assert list(both) == ["safety", "utility"]
    for name, pairs in sets.items():
        close(both[name], importance(model, TOKENIZER, pairs), 0)
    hub = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(pairs) for name, pairs in sets.items()}
    )
    for name, scored in importance(model, TOKENIZER, hub).items():
        close(scored, both[name], 0)
    close(importance(model, TOKENIZER, hub["utility"]), both["utility"], 0)  # a datasets.Dataset
    close(importance(model, TOKENIZER, (p for p in PAIRS[4:])), both["utility"], 0)


WORKER = """
import json, sys, accelerate, torch
from ssah_nb.attribution import importance
from ssah_nb.models import tiny_model, tiny_tokenizer
state = accelerate.Accelerator(cpu=True)
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"
folder, cases = json.loads(sys.argv[1])
for i, case in enumerate(cases): importance(tiny_model(), tiny_tokenizer(), **case).save(f"{folder}/{state.process_index}/{i}")
state.end_training()
"""
CASES = [
    dict(pairs=PAIRS, max_tokens=1),
    dict(pairs=PAIRS[:11], max_tokens=1, tokens="all"),
    dict(pairs=PAIRS, max_tokens=10_000),  # 12, 11 and 1 batches
    dict(pairs=PAIRS[:3], max_tokens=1, method="gradient"),
    dict(pairs=PAIRS, method="magnitude"),
]


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", WORKER, json.dumps([str(tmp_path), CASES])]
    both = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            command,
            env=both | {"RANK": r, "LOCAL_RANK": r},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in "01"
    ]
    try:
        logs = [p.communicate(timeout=600)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    for i, case in enumerate(CASES):
        alone = importance(tiny_model(), TOKENIZER, **case)
        zero, one = (Importance.load(tmp_path / r / str(i)) for r in "01")
        close(zero, alone, 1e-6)
        close(zero, one, 0)
        assert [m.count for m in zero.moments["mlp"]] == [m.count for m in alone.moments["mlp"]]


# --- the model is only read ---


def hooks(model) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_unchanged(method):
    model = tiny_model("gemma2").train()  # in training mode, half of it frozen
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    model.model.layers[0].eval()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    importance(model, TOKENIZER, PAIRS, method=method)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(
        p.grad is None for p in model.parameters()
    )
    assert (
        hooks(model) == 0
        and model.training
        and model.model.layers[1].training
        and not model.model.layers[0].training
    )
    model(
        torch.arange(5)[None], labels=torch.arange(5)[None]
    ).loss.backward()  # it can still be trained


@pytest.mark.parametrize("method", ["flap", "gradient"])
def test_the_model_is_unchanged_after_an_error(method):
    model = tiny_model().train()
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        importance(model, TOKENIZER, PAIRS, method=method)
    assert (
        hooks(model) == 0
        and model.training
        and [p.requires_grad for p in model.parameters()] == flags
    )


@pytest.mark.parametrize("method", ["flap", "gradient"])
def test_dropout_and_checkpointing_are_off(method):
    model = tiny_model(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    close(
        importance(model, TOKENIZER, PAIRS, method=method),
        importance(tiny_model(), TOKENIZER, PAIRS, method=method),
        1e-6,
    )


@pytest.mark.parametrize("method", ["flap", "wanda_sp", "magnitude", "sn_tune"])
def test_the_head_is_never_computed(method, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
    importance(model, TOKENIZER, PAIRS, method=method)
    with pytest.raises(ZeroDivisionError):
        importance(model, TOKENIZER, PAIRS, method="gradient")  # this one needs the loss


# --- wrapped models ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_peft_model_counts_its_adapter(architecture, method):
    targets = (
        ["qkv_proj", "gate_up_proj", "down_proj", "o_proj"]
        if architecture == "phi3"
        else ["q_proj", "v_proj", "gate_proj", "down_proj", "o_proj"]
    )
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_model(architecture),
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1),
    ).eval()
    flags = [p.requires_grad for p in model.parameters()]
    got = importance(model, TOKENIZER, PAIRS, method=method)
    assert [p.requires_grad for p in model.parameters()] == flags and any(flags)
    plain = importance(tiny_model(architecture), TOKENIZER, PAIRS, method=method)
    with model.disable_adapter():
        close(importance(model, TOKENIZER, PAIRS, method=method), plain, 1e-5)
    close(got, importance(model.merge_and_unload(), TOKENIZER, PAIRS, method=method), 1e-5)
    assert (
        not torch.allclose(got.mlp, plain.mlp, rtol=0.1)
        and got.info["model"] == plain.info["model"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_spread_and_offloaded(method, tmp_path):
    model, whole = tiny_model(), importance(tiny_model(), TOKENIZER, PAIRS, method=method)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    close(importance(model, TOKENIZER, PAIRS, method=method), whole, 1e-6)
    assert model.model.layers[1].mlp.down_proj.weight.is_meta


# --- the result ---


def test_zscores():
    x = torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5]])
    assert torch.allclose(
        zscore(x), torch.tensor([[-1.161895, -0.387298, 0.387298, 1.161895], [0, 0, 0, 0]])
    )
    scored = importance(tiny_model(), TOKENIZER, PAIRS)
    for square in (False, True):
        z = scored.standardized(square)
        for layer in range(2):
            mlp, attention = (
                scored.channels["mlp"][layer].double(),
                scored.channels["attention"][layer].double() ** (2 if square else 1),
            )
            torch.testing.assert_close(
                z.mlp[layer].double(), (mlp - mlp.mean()) / mlp.std(), rtol=1e-4, atol=1e-5
            )
            heads = ((attention - attention.mean()) / attention.std()).view(4, 8).mean(1)
            torch.testing.assert_close(z.attention[layer].double(), heads, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scored.standardized(True).attention, scored.standardized().attention)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method, tmp_path):
    scored = importance(tiny_model("gemma3_text"), TOKENIZER, PAIRS, method=method)
    assert sorted(p.name for p in scored.save(tmp_path / "a" / "b").iterdir()) == [
        "importance.json",
        "importance.safetensors",
    ]
    again = Importance.load(tmp_path / "a" / "b")
    close(again, scored, 0)
    assert again.info == scored.info and again.info["method"] == method
    for kind in KINDS:
        assert torch.equal(again.weights[kind], scored.weights[kind]) and len(
            again.moments[kind]
        ) == len(scored.moments[kind])
        for a, b in zip(again.moments[kind], scored.moments[kind]):
            assert a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.m2, b.m2)
    with pytest.raises(SsahError, match="no importance in .*none; write one"):
        Importance.load(tmp_path / "none")


def test_the_mean_is_of_activations():
    _, seen = reference_pass("llama", torch.float32)
    expected = torch.cat([x[n:] for n, x, _ in seen[1, "mlp"]]).mean(0)
    for method in ("flap", "wanda_sp"):
        got = importance(tiny_model(), TOKENIZER, PAIRS, method=method).mean("mlp")[1].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for method in ("sn_tune", "gradient", "magnitude"):
        with pytest.raises(SsahError, match=f"method '{method}' keeps no mean activations"):
            importance(tiny_model(), TOKENIZER, PAIRS, method=method).mean("mlp")


def broken(name: str):
    model = tiny_model()
    model.get_parameter(name).data[0] = float("nan")
    return model


def quantized():
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    return model


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pairs=[]), "a calibration set of 0 pairs has no variance; give at least 2"),
        (dict(pairs=PAIRS[:1]), "a calibration set of 1 pairs has no variance"),
        (dict(pairs={"safety": PAIRS, "utility": PAIRS[:1]}), "a calibration set of 1 pairs"),
        (dict(pairs=PAIRS + [{"prompt": "a", "response": ""}]), "pair 12 has an empty response"),
        (
            dict(pairs=PAIRS + [{"prompt": "a" * 600, "response": "b"}]),
            r"pair 12 has 61\d \+ 2 tokens, more than the model's context of 512",
        ),
        (dict(pairs=PAIRS, method="taylor"), "unknown method 'taylor'; use one of flap, wanda_sp"),
        (dict(pairs=PAIRS, tokens="prompt"), "unknown tokens 'prompt'; use 'response' or 'all'"),
        (
            dict(pairs=PAIRS, model=broken("model.layers.0.mlp.up_proj.weight")),
            "NaN or infinite; check the model's weights",
        ),
        (dict(pairs=PAIRS, model=broken("model.embed_tokens.weight")), "NaN or infinite"),
        (
            dict(
                pairs=PAIRS, model=broken("model.layers.1.mlp.down_proj.weight"), method="magnitude"
            ),
            "importance of mlp units is NaN",
        ),
        (dict(pairs=PAIRS, model=broken("lm_head.weight"), method="gradient"), "NaN or infinite"),
        (
            dict(pairs=PAIRS, model=quantized()),
            "a Linear holds a weight in torch.int8; load the model unquantized",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(SsahError, match=message) as error:
        importance(**({"model": tiny_model(), "tokenizer": TOKENIZER} | options))
    assert "\n" not in str(error.value)


def test_each_set_has_its_own_length():
    model, sets = tiny_model(), {"short": PAIRS[:2], "long": PAIRS[2:]}
    both = importance(model, TOKENIZER, sets, max_response={"short": 2, "long": None, "another": 3})
    for name, kept in (("short", 2), ("long", None)):
        assert torch.equal(
            both[name].mlp, importance(model, TOKENIZER, sets[name], max_response=kept).mlp
        )
    assert not torch.equal(both["short"].mlp, importance(model, TOKENIZER, sets["short"]).mlp)
    with pytest.raises(SsahError, match="max_response names no number for long"):
        importance(model, TOKENIZER, sets, max_response={"short": 2})
    with pytest.raises(SsahError, match="pass `pairs` by name"):
        importance(model, TOKENIZER, PAIRS, max_response={"short": 2})


def test_calibration_is_what_chapter_5_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, sets, options = (
        Run("mine", "07_transfer"),
        {"safety": PAIRS[:2], "utility": PAIRS[2:]},
        {"tokens": "all", "method": "flap", "max_response": {"safety": 4, "utility": 8}},
    )
    with pytest.raises(
        SsahError,
        match="no calibration pairs in .*calibration.json; run chapter 05_attribution, or `make reproduce PROFILE=mine`",
    ):
        load_calibration(run)
    run.path("calibration.json").write_text(json.dumps({"sets": sets, "options": options}))
    assert load_calibration(run) == (sets, options)
    made_up, _ = load_calibration(Run("smoke", "07_transfer"))
    assert list(made_up) == ["safety", "utility"] and importance(tiny_model(), TOKENIZER, made_up)[
        "safety"
    ].mlp.shape == (2, 32)
