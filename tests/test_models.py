"""Loading and saving models."""

import errno
import json
import os
import resource

import gguf
import numpy as np
import pytest
import torch
from helpers import one_line
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from ssah_nb.engine import files, models
from ssah_nb.engine.models import (
    ARCHITECTURES,
    CHATML,
    is_mixed,
    load_model,
    load_stage,
    save_model,
    tiny_model,
    tiny_tokenizer,
)
from ssah_nb.engine.run import Run, SsahError, pick_device
from ssah_nb.units import depth_two


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
    assert tokens.chat_template == CHATML
    assert tokens("Héllo 12<|im_end|>").input_ids == tokenizer("Héllo 12<|im_end|>").input_ids
    assert tokens.pad_token == "<|im_end|>"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    assert load_model(folder, dtype="float32", device="cpu")[0].dtype == torch.float32


def test_the_tied_head_stays_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    again, _ = load_model(save_model(model, tiny_tokenizer(), tmp_path / "model"), device="cpu")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_rust(*args, **kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("what", ["weights", "weights, by safetensors", "tokenizer", "last step"])
def test_a_full_disk_leaves_the_old_model(what, tmp_path, monkeypatch):
    old = tiny_model(seed=0)
    new = tiny_model(seed=1)
    tokenizer = tiny_tokenizer()
    replace = os.replace
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
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_model(new, tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "other", ["notes.txt", "checkpoint-2", "README.md", "importance.safetensors"]
)
def test_saving_never_deletes_what_is_no_model(other, tmp_path):
    folder = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    (folder / other).mkdir() if other == "checkpoint-2" else (folder / other).write_text("mine")
    before = {p.name for p in folder.iterdir()}
    with pytest.raises(SsahError, match=f"holds {other}, .* choose another folder") as error:
        save_model(tiny_model(seed=1), tiny_tokenizer(), folder)
    one_line(error)
    assert {p.name for p in folder.iterdir()} == before


def test_what_a_save_has_written_can_be_replaced(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": tokenizer.chat_template}
    for seed in (0, 1):
        folder = save_model(tiny_model(seed=seed), tokenizer, tmp_path / "model")
    assert any(path.is_dir() for path in folder.iterdir())


def test_a_relative_folder_stays_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(save_model(tiny_model(), tiny_tokenizer(), "mine")) == "mine"


def test_an_adapter_alone_is_not_saved(tmp_path):
    peft = pytest.importorskip("peft")
    folder = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SsahError, match="merge it first: model.merge_and_unload") as error:
        save_model(adapted, tiny_tokenizer(), folder)
    one_line(error)
    load_model(folder, device="cpu")


def test_a_disk_that_takes_no_more(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    try:
        # the operating system itself refuses to write on
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(SsahError, match="cannot save the model"):
            save_model(model, tokenizer, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def gguf_writer(path, model) -> gguf.GGUFWriter:
    "A GGUF file that knows all of a tiny Llama but its weights."
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
    return writer


def write_gguf(path):
    "A whole GGUF file of a tiny Llama, as llama.cpp's converter writes it."
    model = tiny_model(vocab_size=259)
    writer = gguf_writer(path, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        heads = 4 if "q_proj" in name else 2
        if "q_proj" in name or "k_proj" in name:
            # GGUF's order for RoPE
            weight = weight.view(heads, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        name = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
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
    words = "cannot load model .* pickled only .* save it as safetensors"
    with pytest.raises(SsahError, match=words) as error:
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
    with pytest.raises(
        SsahError, match="cannot load model .* use 'embedded', 'aligned', 'tiny'"
    ) as error:
        load_model(name)
    assert repr(name) in one_line(error)


@pytest.mark.parametrize("name", [3, None, ["tiny"]])
def test_a_name_is_a_text_or_a_path(name):
    with pytest.raises(SsahError, match="names no model; give a hub id"):
        load_model(name)


def test_unknown_dtype_and_device():
    with pytest.raises(SsahError, match="unknown dtype 'int3'"):
        load_model("tiny", dtype="int3")
    with pytest.raises(SsahError, match="device 'cuda:99' cannot be used"):
        load_model("tiny", device="cuda:99")


def test_an_unknown_tiny_architecture():
    with pytest.raises(SsahError, match="use one of llama") as error:
        tiny_model("gpt5")
    assert "'gpt5'" in one_line(error)


def test_a_stage_that_has_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SsahError, match="no aligned model in .* or `make reproduce PROFILE=embedded`"
    ):
        load_stage(Run("embedded", "05"), "aligned")
    # smoke: the tiny model
    assert depth_two(load_stage(Run("smoke", "05"), "aligned")[0])["mlp"][0].units == 32
    run = Run("embedded", "05")
    model = tiny_model(seed=3)
    save_model(model, tiny_tokenizer(), run.path("models", "aligned"))
    assert torch.equal(load_stage(run, "aligned")[0].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stage_carries_what_the_run_decided(mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_MIXED", str(mixed))
    monkeypatch.setenv("SSAH_DTYPE", "bfloat16")
    run = Run("smoke", "05_transfer")
    model, _ = load_stage(run, "unaligned")
    assert model.dtype == torch.bfloat16
    assert is_mixed(model) is mixed and run.parameters["mixed"] is mixed
    assert not is_mixed(load_model("tiny")[0])  # a model that no run has loaded


def test_alone_makes_the_first_two_stages_and_names_the_chapter_of_the_third(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked, tiny = [], (tiny_model(), tiny_tokenizer())
    monkeypatch.setattr(models, "load_model", lambda name, *a: (asked.append(name), tiny)[1])
    run = Run("alone", "05_transfer")
    load_stage(run, "unaligned")
    load_stage(run, "aligned")
    assert asked == ["embedded", "aligned"]
    with pytest.raises(SsahError, match="no finetuned model in .*; run the chapter") as error:
        load_stage(run, "finetuned")
    one_line(error)


def test_a_file_is_not_replaced_by_a_model(tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(SsahError, match="results.csv is a file, and a model is a folder") as error:
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "results.csv")
    one_line(error)
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_a_model_whose_replacement_was_killed_comes_back(tmp_path, monkeypatch):
    folder = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(files, "has_ended", lambda process: True)
    work = files.part_of(folder)
    work.mkdir()
    os.replace(folder, work / "old")  # here the process was killed
    broken = tiny_model(seed=1)
    monkeypatch.setattr(broken, "save_pretrained", full_disk)
    with pytest.raises(SsahError, match="cannot save the model"):
        save_model(broken, tiny_tokenizer(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_small_models_are_not_spread(monkeypatch):
    moved = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, *to: moved.append(to) or model)
    load_model("tiny", device="spread")
    assert moved[-1] == (pick_device("auto"),)


def test_a_folder_without_a_tokenizer_or_with_an_adapter_only_says_so(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(SsahError, match="it holds no tokenizer.*processing_class") as error:
        load_model(tmp_path / "bare")
    one_line(error)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SsahError, match="it holds an adapter only.*merge_and_unload") as error:
        load_model(tmp_path / "adapter")
    one_line(error)
    with pytest.raises(SsahError, match="there is no such folder; check the path"):
        load_model(tmp_path / "nowhere")


def test_a_tokenizer_without_words_is_none(tmp_path):
    save_model(tiny_model("qwen2"), tiny_tokenizer(), tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer.json"):
        path.unlink()
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(SsahError, match="it holds no tokenizer"):
        load_model(tmp_path / "model")
