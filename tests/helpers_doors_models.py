"""Doors for models, each with a good one, and with damage that only it can have."""

import json
import os
import pickle
from pathlib import Path

import ssah_nb
import torch
import users_model
from helpers_hostile import Door, write
from helpers_units import random_mask
from profile_values import ProfileError
from test_models import Evil, write_gguf

from ssah_nb import SsahError, load_model, load_pruned
from ssah_nb.engine.models import save_model, tiny_model, tiny_tokenizer

MODEL, TOKENIZER, IDS = tiny_model(), tiny_tokenizer(), torch.arange(8)[None]


def use_folder(folder: Path):
    model, tokenizer = load_model(folder / "model", device="cpu")
    with torch.no_grad():
        assert model(IDS).logits.shape[:2] == (1, 8) and tokenizer("Hi")["input_ids"]


def told(**changes):
    "Damage: entries of config.json."

    def damage(folder: Path):
        path = folder / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def brings_code(folder: Path):
    "Python files that leave a mark, named as the code of configuration, model and tokenizer."
    code = f"import os\nos.mkdir({str(folder.parent / 'ran')!r})\n"
    write(folder / "model/evil.py", code)
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    told(auto_map=names, model_type="evil", architectures=["M"])(folder)
    path = folder / "model/tokenizer_config.json"
    known = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    path.write_text(json.dumps(known | {"tokenizer_class": "T"}))


def is_pickled(folder: Path, keep: bool = False):
    evil = pickle.dumps({"lm_head.weight": Evil(folder.parent / "ran")})
    write(folder / "model/pytorch_model.bin", evil), write(folder / "model/scheduler.pkl", evil)
    if not keep:
        (folder / "model/model.safetensors").unlink()


def points_outside(folder: Path):
    weights = dict.fromkeys(MODEL.state_dict(), "../../outside.safetensors")
    write(folder / "model/model.safetensors.index.json", json.dumps({"weight_map": weights}))
    (folder / "model/model.safetensors").unlink()


CLAIMS = {
    "layers": {"num_hidden_layers": 10**7},
    "many layers": {"num_hidden_layers": 900},
    "width": {"hidden_size": 10**9},
    "channels": {"intermediate_size": 10**11},
    "heads": {"head_dim": 1 << 40},
    "vocabulary": {"vocab_size": 10**10},
    "positions": {"max_position_embeddings": 1 << 50},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**8},
    "kernel": {"_attn_implementation": "owner/name", "attn_implementation": "owner/name"},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    "inner": {"text_config": {"num_hidden_layers": 10**9}},
}
FOLDER_DAMAGE = {f"claims {name}": told(**changes) for name, changes in CLAIMS.items()} | {
    "brings code": brings_code,
    "is pickled": is_pickled,
    "has pickles, too": lambda folder: is_pickled(folder, keep=True),
    "points outside": points_outside,
    "a pipe beside": lambda folder: os.mkfifo(folder / "model/generation_config.json.x"),
}
FOLDERS = Door(
    lambda folder: save_model(MODEL, TOKENIZER, folder / "model"),
    use_folder,
    {
        "model/model.safetensors": 12,
        "model/config.json": 15,
        "model/tokenizer.json": 4,
        "model/tokenizer_config.json": 4,
        "model/generation_config.json": 4,
    },
    FOLDER_DAMAGE,
    SsahError,
)


def use_users_model(folder: Path):
    users_model.check_model(str(folder / "model"))


USERS_MODEL = Door(
    FOLDERS.make,
    use_users_model,
    {"model/model.safetensors": 8, "model/config.json": 6},
    FOLDER_DAMAGE,
    ProfileError,
)


def use_pruned(folder: Path):
    with torch.no_grad():
        assert load_pruned(folder / "model")(IDS).logits.shape[:2] == (1, 8)


def kept(change):
    "Damage: what the configuration says was kept."

    def damage(folder: Path):
        path = folder / "model/config.json"
        config = json.loads(path.read_text())
        config["ssah_kept"] = change(config["ssah_kept"])
        path.write_text(json.dumps(config))

    return damage


KEPT = {
    "no list": lambda k: 7,
    "nothing": lambda k: {},
    "one layer": lambda k: {kind: rows[:1] for kind, rows in k.items()},
    "far": lambda k: k | {"mlp": [[10**9]] * 2},
    "below": lambda k: k | {"mlp": [[-1]] * 2},
    "words": lambda k: k | {"attention": [["a"], [0]]},
    "none of a layer": lambda k: k | {"mlp": [[], [0]]},
    "half a group": lambda k: k | {"attention": [[0], [0]]},
    "twice": lambda k: k | {"mlp": [[0, 0], [0, 0]]},
}
PRUNED = Door(
    lambda folder: save_model(ssah_nb.prune(MODEL, random_mask(0)), TOKENIZER, folder / "model"),
    use_pruned,
    {"model/model.safetensors": 8, "model/config.json": 9, "model/generation_config.json": 3},
    FOLDER_DAMAGE | {f"kept: {name}": kept(change) for name, change in KEPT.items()},
    SsahError,
)


def use_gguf(folder: Path):
    model, tokenizer = load_model(folder / "tiny.gguf", device="cpu")
    with torch.no_grad():
        assert model(IDS).logits.shape[:2] == (1, 8) and tokenizer("Hi")["input_ids"]


def said_in_gguf(name: str, value: bytes):
    "Damage: the bytes of one number of a GGUF file."

    def damage(folder: Path):
        data, key = (folder / "tiny.gguf").read_bytes(), name.encode()
        at = data.index(key) + len(key) + 4
        write(folder / "tiny.gguf", data[:at] + value + data[at + len(value) :])

    return damage


def counts(tensors: int, fields: int):
    return lambda folder: write(
        folder / "tiny.gguf",
        (d := (folder / "tiny.gguf").read_bytes())[:8]
        + tensors.to_bytes(8, "little")
        + fields.to_bytes(8, "little")
        + d[24:],
    )


GGUF_DAMAGE = {
    f"claims {number:,} {name}": said_in_gguf(f"llama.{name}", number.to_bytes(4, "little"))
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    for number in (0, 3, 10**6, (1 << 32) - 1)
} | {
    "claims tensors": counts(1 << 60, 5),
    "claims a few tensors": counts(10**5, 5),
    "claims fields": counts(21, 1 << 60),
    "claims no tensors": counts(0, 5),
}
GGUF = Door(
    lambda folder: write_gguf(write(folder / "tiny.gguf", "")),
    use_gguf,
    {"tiny.gguf": 20},
    GGUF_DAMAGE,
    SsahError,
)
