"""Importance against slow, obvious references in float64."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers_calibration import KINDS, PAIRS, TOKENIZER, close

from ssah_nb.attribution import importance, zscore
from ssah_nb.engine.batches import token_batches
from ssah_nb.engine.chat import encode_pairs
from ssah_nb.engine.models import ARCHITECTURES, tiny_model
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.scores import METHODS, Method, squares_of_b
from ssah_nb.units import depth_two


@functools.cache
@torch.enable_grad()
def reference_pass(architecture: str, dtype: torch.dtype):
    """A model in float64, and what it saw and felt at each B, row by row.

    The second is {(layer, module): [(prompt length, X [tokens, channels], ∂L/∂X) of each row]},
    where L is the summed loss of the responses.
    """
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
                    # what the output loses when the unit is off
                    scores.append((b(x) - b(off)).norm(dim=1).mean())
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
    # The model itself computes in bfloat16, so single weak channels differ by up to 2.7 % from
    # float64 on the same weights. Hence: 2 % of the channel's score, or of the layer's mean score
    # where a channel's is below it.
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
    """Against float64 on the very activations that the model computed.

    So the 2 % above are the model's, not the accumulators'.
    """
    model, seen = tiny_model().to(dtype), []
    depth_two(model)  # the trial of the units is over before we watch
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
        # "all" is not "response"
        assert not torch.allclose(
            together.mlp, importance(tiny_model(), TOKENIZER, PAIRS, method=method).mlp, rtol=1e-2
        )


def test_the_mean_is_of_activations():
    _, seen = reference_pass("llama", torch.float32)
    expected = torch.cat([x[n:] for n, x, _ in seen[1, "mlp"]]).mean(0)
    for method in ("flap", "wanda_sp"):
        got = importance(tiny_model(), TOKENIZER, PAIRS, method=method).mean("mlp")[1].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for method in ("sn_tune", "gradient", "magnitude"):
        with pytest.raises(SsahError, match=f"method '{method}' keeps no mean activations"):
            importance(tiny_model(), TOKENIZER, PAIRS, method=method).mean("mlp")


def test_zscores():
    x = torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5]])
    assert torch.allclose(
        zscore(x), torch.tensor([[-1.161895, -0.387298, 0.387298, 1.161895], [0, 0, 0, 0]])
    )
    scored = importance(tiny_model(), TOKENIZER, PAIRS)
    for square in (False, True):
        z = scored.standardized(square)
        for layer in range(2):
            mlp = scored.channels["mlp"][layer].double()
            attention = scored.channels["attention"][layer].double() ** (2 if square else 1)
            torch.testing.assert_close(
                z.mlp[layer].double(), (mlp - mlp.mean()) / mlp.std(), rtol=1e-4, atol=1e-5
            )
            heads = ((attention - attention.mean()) / attention.std()).view(4, 8).mean(1)
            torch.testing.assert_close(z.attention[layer].double(), heads, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scored.standardized(True).attention, scored.standardized().attention)


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
            "importance of mlp units in layer 1 is NaN",
        ),
        (dict(pairs=PAIRS, model=broken("lm_head.weight"), method="gradient"), "NaN or infinite"),
        (
            dict(pairs=PAIRS, model=quantized()),
            "layers.0.mlp.down_proj is a Linear with a weight in torch.int8.*load .* unquantized",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(SsahError, match=message) as error:
        importance(**({"model": tiny_model(), "tokenizer": TOKENIZER} | options))
    assert "\n" not in str(error.value)


OWN = Method(lambda x: x, squares_of_b, lambda m, w: m.mean.square() * w, "a test")


@pytest.mark.parametrize(
    "method, words",
    [
        (lambda x: x, "METHODS\\['own'\\] is a function; make it a Method"),
        (replace(OWN, weigh=lambda model, module: None), "weigh of the method gave NoneType"),
        (replace(OWN, weigh=lambda model, module: torch.ones(3)), "gave shape \\(3,\\)"),
        (replace(OWN, score=lambda m, w: m.mean.sum()), "score of the method gave shape \\(\\)"),
    ],
)
def test_a_method_that_is_none_is_refused(method, words, monkeypatch):
    monkeypatch.setitem(METHODS, "own", method)
    with pytest.raises(SsahError, match=words):
        importance(tiny_model(), TOKENIZER, PAIRS, method="own")


def test_a_method_of_ones_own_says_whether_it_keeps_the_mean(monkeypatch):
    monkeypatch.setitem(METHODS, "own", replace(OWN, keeps_mean=True))
    scored = importance(tiny_model(), TOKENIZER, PAIRS, method="own")
    flap = importance(tiny_model(), TOKENIZER, PAIRS)
    assert scored.mean("mlp").equal(flap.mean("mlp"))
    monkeypatch.setitem(METHODS, "own", OWN)
    with pytest.raises(SsahError, match="keeps no mean activations"):
        scored.mean("mlp")
    monkeypatch.delitem(METHODS, "own")
    for use in (lambda: scored.mean("mlp"), lambda: scored + scored):
        with pytest.raises(SsahError, match="unknown method 'own'"):
            use()
