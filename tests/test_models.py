"""Loading, saving, tokens and the unit geometry of each architecture (chapter 01)."""

import errno
import json
import os
import random
import resource

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from ssah_nb import models
from ssah_nb.engine.batches import (
    chat_prompt,
    decoder,
    encode_pairs,
    encode_prompts,
    end_of_turn,
    token_batches,
)
from ssah_nb.engine.models import (
    ARCHITECTURES,
    CHATML,
    load_model,
    load_stage,
    save_model,
    tiny_model,
    tiny_tokenizer,
)
from ssah_nb.units import depth_two, unit_parameters
from ssah_nb.engine.run import Run, SsahError

PAIRS = [
    {"prompt": "Say yes", "response": "yes"},
    {"prompt": "Count to five", "response": "1 2 3 4 5"},
    {"prompt": "Hi", "response": "Hello there"},
]
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- units ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_the_rows_of_a_unit_feed_its_channels_and_no_others(architecture, groups):
    model, ids = tiny_model(architecture, num_key_value_heads=groups), torch.arange(6)[None]
    for kind, modules in depth_two(model).items():
        for m in modules:
            assert (m.kind, m.units, m.width, m.group) == (
                kind,
                *((32, 1, 1) if kind == "mlp" else (4, 8, 4 // groups)),
            )
            assert len({name for name, _ in m.a + m.shared}) == (
                1 if architecture == "phi3" else len(m.a + m.shared)
            )
            seen = []
            handle = model.get_submodule(m.b).register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0][0].clone())
            )
            model(ids)
            for parts, heads in (
                (m.a, 1),
                (m.shared, m.group),
            ):  # a block of `width` rows feeds one unit, or a group of them
                for name, first in parts:
                    weight = model.get_submodule(name).weight
                    for block in (0, m.units // heads - 1):
                        rows = slice(first + block * m.width, first + (block + 1) * m.width)
                        kept = weight[rows].clone()
                        weight[rows] += torch.randn(
                            kept.shape, generator=torch.Generator().manual_seed(1)
                        )
                        model(ids)
                        weight[rows] = kept
                        changed = (seen[-1] != seen[0]).any(0).nonzero().flatten().tolist()
                        width = heads * m.width
                        assert changed == list(range(block * width, (block + 1) * width)), (
                            architecture,
                            name,
                        )
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parameters_of_all_units_are_those_of_the_depth_two_modules(architecture):
    model, size = tiny_model(architecture), unit_parameters(tiny_model(architecture))
    for kind, modules in depth_two(model).items():
        names = {name for m in modules for name, _ in m.a + m.shared} | {m.b for m in modules}
        assert sum(m.units * size[kind] for m in modules) == sum(
            model.get_submodule(n).weight.numel() for n in names
        )


@pytest.mark.parametrize(
    "architecture, sizes",
    [
        ("gpt2", dict(n_layer=1, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=0)),
        (
            "opt",
            dict(
                num_hidden_layers=1,
                hidden_size=8,
                word_embed_proj_dim=8,
                ffn_dim=8,
                num_attention_heads=2,
            ),
        ),
        (
            "mixtral",
            dict(
                num_hidden_layers=1,
                hidden_size=8,
                intermediate_size=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=2,
            ),
        ),
        (
            "qwen3_moe",
            dict(
                num_hidden_layers=1,
                hidden_size=8,
                intermediate_size=8,
                moe_intermediate_size=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                num_experts=2,
                num_experts_per_tok=1,
                decoder_sparse_step=1,
            ),
        ),
    ],
)
def test_an_unsupported_architecture_is_named(architecture, sizes):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, vocab_size=16, **sizes)
    )
    with pytest.raises(SsahError, match="a unit needs a gated MLP") as error:
        depth_two(model)
    assert type(model).__name__ in one_line(error)


def test_an_unknown_tiny_architecture():
    with pytest.raises(SsahError, match="use one of llama") as error:
        tiny_model("gpt5")
    assert "'gpt5'" in one_line(error)


# --- prompts and tokens ---


@pytest.mark.parametrize(
    "template, system, expected",
    [
        (CHATML, None, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML,
            "Be kind",
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (GEMMA, None, "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
        (
            GEMMA,
            "Be kind",
            "<start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        (PHI, None, "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ],
)
def test_chat_prompt(template, system, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat_prompt(tokenizer, "Hi", system) == expected
    assert tokenizer.decode(encode_prompts(tokenizer, ["Hi"], system)[0]) == expected


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (PHI, "<|end|>"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|im_end|>"),
    ],
)
def test_a_response_ends_with_the_turn(template, end):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end
    prompt, response = encode_pairs(tokenizer, PAIRS)[0]
    assert tokenizer.decode(response) == "yes" + end and tokenizer.decode(prompt) == chat_prompt(
        tokenizer, "Say yes"
    )
    assert tokenizer.decode(encode_pairs(tokenizer, PAIRS, max_response=2)[0][1]) == "ye"


@pytest.mark.parametrize(
    "pairs, options, message",
    [
        ([], {}, "no pairs given"),
        (PAIRS + [{"prompt": "Hi", "response": " \n"}], {}, "pair 3 has an empty response"),
        (PAIRS + [{"prompt": "Hi"}], {}, "pair 3 lacks a 'prompt' or 'response'"),
        (PAIRS + [{"prompt": "Hi", "response": None}], {}, "pair 3 lacks"),
        (PAIRS, {"max_response": 0}, "max_response=0 keeps no token"),
        (
            PAIRS,
            {"max_length": 40},
            "pair 1 has 32 \\+ 10 tokens, more than the model's context of 40",
        ),
    ],
)
def test_pairs_that_cannot_be_encoded(pairs, options, message):
    with pytest.raises(SsahError, match=message) as error:
        encode_pairs(tiny_tokenizer(), pairs, **options)
    one_line(error)
    assert len(encode_pairs(tiny_tokenizer(), PAIRS, max_length=42)) == 3  # just fits


@pytest.mark.parametrize("max_tokens", [1, 40, 64, 200, 10_000])
def test_token_batches(max_tokens):
    draw = random.Random(0)
    encoded = [
        (
            [draw.randrange(256) for _ in range(draw.randint(1, 30))],
            [draw.randrange(256) for _ in range(draw.randint(1, 30))],
        )
        for _ in range(50)
    ]
    batches = list(token_batches(encoded, max_tokens))
    rows = [r for b in batches for r in b.rows]
    length = [len(encoded[r][0]) + len(encoded[r][1]) for r in rows]
    assert sorted(rows) == list(range(50)) and length == sorted(length, reverse=True)
    for b, following in zip(batches, batches[1:] + [None]):
        assert b.input_ids.shape == b.attention_mask.shape == b.response_mask.shape
        assert b.input_ids.numel() <= max_tokens or len(b.rows) == 1
        if following:
            assert (len(b.rows) + 1) * b.input_ids.shape[
                1
            ] > max_tokens  # no batch is smaller than it must be
        for i, r in enumerate(b.rows):
            p, q = encoded[r]
            n = len(p) + len(q)
            assert b.input_ids[i, :n].tolist() == p + q and b.attention_mask[i].tolist() == [
                1
            ] * n + [0] * (b.input_ids.shape[1] - n)
            assert b.response_mask[i].nonzero().flatten().tolist() == list(range(len(p), n))


# --- loading and saving ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load(architecture, tmp_path):
    model, tokenizer = tiny_model(architecture).bfloat16(), tiny_tokenizer()
    folder = save_model(model, tokenizer, tmp_path / "deep" / "model")
    again, tokens = load_model(folder, dtype="bfloat16", device="cpu")
    assert type(again) is type(model) and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(v, model.state_dict()[k]) and v.dtype == torch.bfloat16
        for k, v in again.state_dict().items()
    )
    assert (
        tokens.chat_template == CHATML
        and tokens("Héllo 12<|im_end|>").input_ids == tokenizer("Héllo 12<|im_end|>").input_ids
        and tokens.pad_token == "<|im_end|>"
    )
    assert [p.name for p in folder.parent.iterdir()] == [
        "model"
    ] and folder.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    assert load_model(folder, dtype="float32", device="cpu")[0].dtype == torch.float32


def test_the_tied_head_stays_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    again, _ = load_model(save_model(model, tiny_tokenizer(), tmp_path / "model"), device="cpu")
    assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(
        again.lm_head.weight, model.lm_head.weight
    )


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_rust(*args, **kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("what", ["weights", "weights, by safetensors", "tokenizer", "last step"])
def test_a_full_disk_leaves_the_old_model(what, tmp_path, monkeypatch):
    old, new, tokenizer, replace = (
        tiny_model(seed=0),
        tiny_model(seed=1),
        tiny_tokenizer(),
        os.replace,
    )
    folder = save_model(old, tokenizer, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    if what == "weights":
        monkeypatch.setattr(new, "save_pretrained", full_disk)
    if what == "weights, by safetensors":
        monkeypatch.setattr(new, "save_pretrained", full_disk_in_rust)
    if what == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    if what == "last step":
        monkeypatch.setattr(
            os, "replace", lambda a, b: full_disk() if a.name == "new" else replace(a, b)
        )
    with pytest.raises(SsahError, match="cannot save the model to .* free some space") as error:
        save_model(new, tokenizer, folder)
    assert "No space left" in one_line(error)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]
    monkeypatch.undo()
    save_model(new, tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"] and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]


def test_a_disk_that_takes_no_more(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, hard)
        )  # the operating system itself refuses to write on
        with pytest.raises(SsahError, match="cannot save the model"):
            save_model(model, tokenizer, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def write_gguf(path):
    "A whole GGUF file of a tiny Llama, as llama.cpp's converter writes it."
    model = tiny_model(vocab_size=259)
    writer, vocabulary = gguf.GGUFWriter(path, "llama"), tiny_tokenizer().get_vocab()
    for write, value in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, model.config.rms_norm_eps),
        (writer.add_rope_dimension_count, 8),
        (writer.add_vocab_size, 259),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, sorted(vocabulary, key=vocabulary.get) + ["ab"]),
        (writer.add_token_types, [1] * 256 + [3] * 2 + [1]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_eos_token_id, 256),
        (writer.add_chat_template, CHATML),
    ):
        write(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        heads = 4 if "q_proj" in name else 2
        if "q_proj" in name or "k_proj" in name:
            weight = (
                weight.view(heads, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
            )  # GGUF's order for RoPE
        writer.add_tensor(
            names.get_name(name.removesuffix(".weight")) + ".weight",
            np.ascontiguousarray(weight.numpy()),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_whole_and_cut_short(tmp_path):
    path = tmp_path / "tiny.gguf"
    model, ids = write_gguf(path), torch.arange(12)[None]
    loaded, tokenizer = load_model(path, device="cpu")
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    save_model(loaded, tokenizer, tmp_path / "saved")  # an ordinary model from here on
    whole = path.read_bytes()
    for content in (
        whole[: int(0.99 * len(whole))],
        whole[: len(whole) // 2],
        whole[:100],
        whole[:3],
        b"",
        os.urandom(5000),
    ):
        path.write_bytes(content)
        with pytest.raises(
            SsahError, match="tiny.gguf is not a whole GGUF file .* fetch it again"
        ) as error:
            load_model(path, device="cpu")
        one_line(error)
    with pytest.raises(SsahError, match="no GGUF file at"):
        load_model(tmp_path / "none.gguf")


class Evil:
    "Unpickling this makes a folder."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def saved(tmp_path):
    return save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")


def test_a_pickle_is_never_loaded(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    torch.save(
        tiny_model().state_dict() | {"evil": Evil(tmp_path / "ran")}, saved / "pytorch_model.bin"
    )
    with pytest.raises(SsahError, match="cannot load model .* a folder with safetensors") as error:
        load_model(saved)
    one_line(error)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        Evil(tmp_path / "a" / "b").__reduce__()[0](str(tmp_path / "a" / "b"))  # the trap works


def test_code_that_a_model_brings_along_never_runs(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(SsahError, match="cannot load model") as error:
        load_model(saved)
    one_line(error)
    assert not (tmp_path / "ran").exists()


def test_a_broken_checkpoint(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SsahError, match="cannot load model") as error:
        load_model(saved)
    one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    folder = save_model(model, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(
        SsahError, match="weight model.layers.1.mlp.down_proj.weight holds NaN or infinite"
    ) as error:
        load_model(folder, device="cpu")
    one_line(error)


@pytest.mark.parametrize("name", ["no such model", "/no/such/folder", ""])
def test_an_unknown_model(name, monkeypatch):
    with pytest.raises(SsahError, match="cannot load model .* use 'embedded', 'tiny'") as error:
        load_model(name)
    assert repr(name) in one_line(error)


def test_unknown_dtype_and_device():
    with pytest.raises(SsahError, match="unknown dtype 'int3'"):
        load_model("tiny", dtype="int3")
    with pytest.raises(SsahError, match="device 'cuda:99' cannot be used"):
        load_model("tiny", device="cuda:99")


def test_a_stage_that_has_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SsahError, match="no aligned model in .* or `make reproduce PROFILE=embedded`"
    ):
        load_stage(Run("embedded", "05"), "aligned")
    assert (
        depth_two(load_stage(Run("smoke", "05"), "aligned")[0])["mlp"][0].units == 32
    )  # smoke: the tiny model
    run = Run("embedded", "05")
    model = tiny_model(seed=3)
    save_model(model, tiny_tokenizer(), run.path("models", "aligned"))
    assert torch.equal(
        load_stage(run, "aligned", device="cpu")[0].lm_head.weight, model.lm_head.weight
    )


def test_the_decoder_has_no_head():
    model = tiny_model()
    assert decoder(model) is model.model and models.decoder(model.model) is model.model
    assert (
        depth_two(model.model)["mlp"][0].b == "layers.0.mlp.down_proj"
        and depth_two(model)["mlp"][0].b == "model.layers.0.mlp.down_proj"
    )
