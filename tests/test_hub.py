"""Things to share: what a folder holds, what is refused, and a small hub that they go through."""

import json
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from helpers import one_line
from helpers_hub import Html, hub_at
from helpers_units import TOKENIZER, pairs
from huggingface_hub import ModelCard, constants
from transformers import PreTrainedModel

from ssah_nb import Anchor, Importance, SsahError, UnitMap, classify, freeze, importance
from ssah_nb.engine.models import ARCHITECTURES, tiny_model
from ssah_nb.engine.origin import texts_hash, weights_hash

KINDS = ("units", "importance", "anchor", "anchor on units")


def made(model: PreTrainedModel) -> dict:
    "One thing of each kind."
    safety, utility = (importance(model, TOKENIZER, pairs(word)) for word in ("No", "Yes"))
    units = classify(safety, utility, scu=0.1)
    answers = Anchor(model, TOKENIZER, pairs("No"), prompts=2)
    inside = Anchor(model, TOKENIZER, pairs("No"), on="units", units=units.scu)
    return dict(zip(KINDS, (units, safety, answers, inside)))


@pytest.fixture(scope="module")
def things() -> dict:
    return made(tiny_model())


@pytest.fixture(scope="module")
def folders(things, tmp_path_factory) -> dict:
    "The folder of each thing."
    place = tmp_path_factory.mktemp("things")
    return {name: thing.save_pretrained(place / name) for name, thing in things.items()}


def read(name: str, folder, **options):
    kind = {"units": UnitMap, "importance": Importance}.get(name, Anchor)
    return kind.from_pretrained(folder, **options)


def same(a, b) -> bool:
    "Whether two things hold the same, bit for bit."
    (tensors, info), (others, more) = a.to_files(), b.to_files()
    bits = tensors.keys() == others.keys()
    bits = bits and all(torch.equal(t, others[name]) for name, t in tensors.items())
    plain = lambda facts: json.loads(json.dumps(facts))
    return type(a) is type(b) and bits and plain(info) == plain(more)


# A folder


@pytest.mark.parametrize("name", KINDS)
def test_a_thing_is_the_same_when_it_is_read_again(name, things, folders, tmp_path):
    again = read(name, folders[name], model=tiny_model())
    assert same(again, things[name])
    assert same(type(again).load(again.save(tmp_path)), things[name])
    if name.startswith("anchor"):
        assert again.report(tiny_model()).mean == things[name].report(tiny_model()).mean < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_what_the_facts_and_the_card_say(name, folders):
    kept = name.split()[0]
    info = json.loads((folders[name] / f"{kept}.json").read_text())
    assert info["format"] == 1 and info["base"]["weights"] == weights_hash(tiny_model())
    assert info["base"]["architecture"] == "llama" and len(info["chat template"]["template"]) == 64
    assert set(info["versions"]) == {"ssah_nb", "torch", "transformers"}
    texts = info["calibration"] if kept != "units" else info["calibration"]["safety"]
    assert len(texts) == 1 and len(texts[0]) == 16
    card = ModelCard.load(folders[name] / "README.md")
    assert card.data.library_name == "ssah_nb" and info["kind"].replace(" ", "-") in card.data.tags
    assert info["base"]["weights"] in card.text and "## Limits" in card.text
    assert "encoded" not in card.text
    if kept == "units":
        assert "| SCU |" in card.text and "(classes.png)" in card.text
        assert (folders[name] / "classes.png").read_bytes().startswith(b"\x89PNG")


def test_a_readme_of_somebody_else_stays(things, tmp_path):
    (tmp_path / "README.md").write_text("My own words.")
    things["units"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words."
    assert not (tmp_path / "classes.png").exists()


def test_a_map_of_an_unaligned_model_has_its_own_picture(things, tmp_path):
    folder = classify(None, things["importance"], ru=0.2).save_pretrained(tmp_path)
    assert "| UU |" in (folder / "README.md").read_text() and (folder / "classes.png").exists()


def test_files_of_earlier_versions_are_read(folders, tmp_path):
    for name in KINDS:
        kept = name.split()[0]
        for ending in ("json", "safetensors"):
            content = (folders[name] / f"{kept}.{ending}").read_bytes()
            (tmp_path / f"{kept}.{ending}").write_bytes(content)
        path = tmp_path / f"{kept}.json"
        info = json.loads(path.read_text())
        for key in ("kind", "format", "base", "calibration", "versions", "sha256"):
            del info[key]
        path.write_text(json.dumps(info))
        read(name, tmp_path)
        with pytest.raises(SsahError, match="has no hash of the weights .* leave model out"):
            read(name, tmp_path, model=tiny_model())


# The model it belongs to


def test_the_hash_is_that_of_the_numbers():
    model = tiny_model()
    digest = weights_hash(model)
    assert weights_hash(tiny_model().to(torch.bfloat16)) == digest
    others = {weights_hash(tiny_model(name)) for name in ARCHITECTURES}
    assert len(others) == len(ARCHITECTURES) - 1  # a tiny Llama and Mistral have the same weights
    for parameter in model.parameters():
        number = parameter.data.view(-1)[0].clone()
        parameter.data.view(-1)[0] = 7
        assert weights_hash(model) != digest
        parameter.data.view(-1)[0] = number
    assert weights_hash(model) == digest
    assert weights_hash(model.to("meta")) is None


def test_a_frozen_model_has_the_hash_of_its_weights(things):
    assert weights_hash(freeze(tiny_model(), things["units"].scu)) == weights_hash(tiny_model())


def test_large_tensors_are_read_in_part_and_changed_everywhere_by_training():
    linear = torch.nn.Linear(256, 256, bias=False)
    digest = weights_hash(linear)
    linear.weight.data *= 1.01
    assert weights_hash(linear) != digest
    for dim in (0, 1):  # no row and no column is without a number of the sample
        for i in range(256):
            digest, kept = weights_hash(linear), linear.weight.data.clone()
            linear.weight.data.select(dim, i).add_(1)
            assert weights_hash(linear) != digest
            linear.weight.data = kept


@pytest.mark.parametrize("name", KINDS)
def test_another_revision_or_architecture_is_refused(name, folders):
    mine = weights_hash(tiny_model())
    for other in (tiny_model(seed=1), tiny_model("qwen2"), tiny_model("mistral")):
        kind = other.config.model_type
        words = (
            rf"made on a llama model .*{mine}.* and the model is a {kind} .*{weights_hash(other)}"
        )
        with pytest.raises(SsahError, match=words) as error:
            read(name, folders[name], model=other)
        one_line(error)


def test_a_model_without_a_hash_is_told_why(folders):
    absent = tiny_model().to("meta")
    with pytest.raises(SsahError, match="a hash needs weights that are unpacked and in") as error:
        UnitMap.from_pretrained(folders["units"], model=absent)
    assert "None" not in one_line(error) and "revision" not in str(error)
    with pytest.raises(SsahError, match="without a hash.; load a model of that architecture"):
        UnitMap.from_pretrained(folders["units"], model=tiny_model("qwen2").to("meta"))


def test_a_child_is_refused_by_its_hash_and_frozen_without_it(folders):
    child = tiny_model()
    child.model.layers[0].mlp.up_proj.weight.data *= 1.01
    with pytest.raises(SsahError, match="leave model out if the model is meant to differ"):
        UnitMap.from_pretrained(folders["units"], model=child)
    freeze(child, UnitMap.from_pretrained(folders["units"]).scu)


def test_hub_id_and_revision_are_named(folders, tmp_path):
    model = tiny_model()
    model.config._name_or_path, model.config._commit_hash = "owner/base", "c0ffee"
    folder = importance(model, TOKENIZER, pairs("No")).save_pretrained(tmp_path)
    assert ModelCard.load(folder / "README.md").data.base_model == "owner/base"
    model.lm_head.weight.data[0] += 1
    model.config._commit_hash = "decaf"
    words = r"made on owner/base \(revision c0ffee, .* the model is owner/base \(revision decaf, "
    with pytest.raises(SsahError, match=words):
        Importance.from_pretrained(folder, model=model)
    model.config._commit_hash = None  # loaded from a folder of this machine
    folder = importance(model, TOKENIZER, pairs("No")).save_pretrained(tmp_path / "own")
    assert "owner/base" not in (folder / "README.md").read_text()


# The texts


def test_the_texts_have_one_hash_however_they_are_batched():
    score = lambda some, **options: importance(tiny_model(), TOKENIZER, some, **options)
    of = lambda some, **options: score(some, **options).info["calibration"]
    whole = of(pairs("No"))
    assert of(pairs("No"), max_tokens=1) == whole != of(pairs("No")[::-1])
    assert whole != of(pairs("No"), max_response=1) and whole != of(pairs("Yes"))
    first, second = (importance(tiny_model(), TOKENIZER, pairs(word)) for word in ("No", "Yes"))
    assert (first + second).info["calibration"] == whole + of(pairs("Yes"))
    assert classify(first, second, scu=0.1).info["calibration"] == {
        "safety": whole,
        "utility": of(pairs("Yes")),
    }
    assert texts_hash([([1, 2], [3])]) != texts_hash([([1], [2, 3])])


# What is spoilt


def spoilt(folder, kept: str, how: str):
    facts, tensors = folder / f"{kept}.json", folder / f"{kept}.safetensors"
    if how == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    if how == "no facts":
        facts.unlink()
    if how == "no tensors":
        tensors.unlink()
    if how in ("kind", "format", "base"):
        changed = {how: {"kind": "poem", "format": 2, "base": "a model"}[how]}
        facts.write_text(json.dumps(json.loads(facts.read_text()) | changed))


SPOILT = {
    "cut": "cannot read .*safetensors .* cut or changed",
    "no facts": "no .* in .*; write one with .*save_pretrained",
    "no tensors": "no .* in |cannot read .*safetensors",
    "kind": "says that it is of kind 'poem', not '",
    "format": "has format '2', .* reads format 1; install a later version",
    "base": "has a base that is none",
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", KINDS)
def test_a_spoilt_folder_is_refused(name, how, things, tmp_path):
    things[name].save_pretrained(tmp_path)
    spoilt(tmp_path, name.split()[0], how)
    with pytest.raises(SsahError, match=SPOILT[how]) as error:
        read(name, tmp_path)
    one_line(error)


def changed(tensors: dict, info: dict) -> dict:
    "name -> (tensors, facts) of an anchor on units of which one thing does not fit."
    options, first = info["options"], tensors["0.before"]
    facts = {
        "no options": {"options": []},
        "an option too few": {"options": {k: v for k, v in options.items() if k != "seed"}},
        "weight of text": {"options": options | {"weight": "much"}},
        "weight of nan": {"options": options | {"weight": float("nan")}},
        "prompts of true": {"options": options | {"prompts": True}},
        "on answers": {"options": options | {"on": "answers"}},
        "no refusals": {"encoded": []},
        "one refusal": {"encoded": info["encoded"][:1]},
        "text in place of ids": {"encoded": [["No", "!"]] * 4},
        "negative ids": {"encoded": [([-1], row) for _, row in info["encoded"]]},
        "no shape": {"shape": "small"},
    }
    others = {
        "a token too few": {"0.before": first[1:]},
        "a channel too few": {"0.before": first[:, 1:].contiguous()},
        "a row": {"0.before": first[0]},
        "infinity": {"0.before": first / 0},
        "something else": {"before.0": first},
        "more modules": {"99.before": first},
        "a flat mask": {"mask.mlp": tensors["mask.mlp"][0]},
        "a mask of numbers": {"mask.mlp": tensors["mask.mlp"].int()},
        "an empty mask": {"mask.mlp": tensors["mask.mlp"] & False},
        "a mask of three layers": {"mask.mlp": torch.ones(3, 32, dtype=torch.bool)},
    }
    lacking = {"no mask": "mask.mlp", "no reference": "0.before", "no spread": "0.spread"}
    some = {
        how: ({k: t for k, t in tensors.items() if k != name}, info)
        for how, name in lacking.items()
    }
    some |= {how: (tensors, info | more) for how, more in facts.items()}
    return some | {how: (tensors | more, info) for how, more in others.items()}


def test_an_anchor_that_does_not_fit_together_is_refused(things):
    files = things["anchor on units"].to_files()
    Anchor.from_files(*files, "the anchor")
    for how, (tensors, info) in changed(*files).items():
        with pytest.raises(SsahError) as error:
            Anchor.from_files(tensors, info, "the anchor")
            pytest.fail(f"read with {how}")
        one_line(error)


def test_what_is_no_place():
    for name in (None, 3, b"a/b"):
        with pytest.raises(SsahError, match="is neither a folder nor the name of a repository"):
            UnitMap.from_pretrained(name)


def test_another_kind_of_thing_is_named(folders):
    for name, kind in (("units", Importance), ("importance", Anchor), ("anchor", UnitMap)):
        owner = {"units": "UnitMap", "importance": "Importance", "anchor": "Anchor"}[name]
        words = f"no .* in .*; it holds another thing: {owner}.from_pretrained reads that"
        with pytest.raises(SsahError, match=words) as error:
            kind.from_pretrained(folders[name])
        one_line(error)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_at(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.mark.parametrize("name", KINDS)
def test_up_and_down_again(name, things, hub):
    address = things[name].push_to_hub("owner/thing", token=hub.token)
    assert address.startswith(f"{hub.url}/owner/thing/commit/")
    files = hub.repos["owner/thing"]["main"][1]
    assert "README.md" in files and ("classes.png" in files) == (name == "units")
    again = read(name, "owner/thing", model=tiny_model())
    assert same(again, things[name])
    asked = [call for call in hub.asked if call.startswith("GET /owner/thing/resolve")]
    assert len(asked) == 2 and not any("README" in call for call in asked)


def test_each_revision_has_its_own(things, hub):
    small, large = (classify(None, things["importance"], ru=ru) for ru in (0.1, 0.3))
    first = small.push_to_hub("owner/map", token=hub.token).rpartition("/")[2]
    large.push_to_hub("owner/map", revision="large", token=hub.token)
    large.push_to_hub("owner/map", revision="large", token=hub.token)  # once more
    assert same(UnitMap.from_pretrained("owner/map"), small)
    assert same(UnitMap.from_pretrained("owner/map", revision="large"), large)
    assert same(UnitMap.from_pretrained("owner/map", revision=first), small)
    with pytest.raises(SsahError, match="cannot be read from the hub .* check the name, the rev"):
        UnitMap.from_pretrained("owner/map", revision="none")


def test_private_and_missing_repositories(things, hub):
    things["units"].push_to_hub("owner/map", private=True, token=hub.token)
    assert same(UnitMap.from_pretrained("owner/map", token=hub.token), things["units"])
    for name, token in (("owner/map", None), ("owner/map", "hf_wrong"), ("owner/none", hub.token)):
        constants.HF_HUB_CACHE += "_new"  # nothing was fetched before
        with pytest.raises(
            SsahError, match=f"{name} is no folder here, and cannot be read"
        ) as error:
            UnitMap.from_pretrained(name, token=token)
        assert "token=..." in one_line(error)
    with pytest.raises(SsahError, match="no importance in owner/map; write one") as error:
        Importance.from_pretrained("owner/map", token=hub.token)
    one_line(error)


def test_what_cannot_be_uploaded(things, hub):
    for token in (None, "hf_wrong"):
        with pytest.raises(SsahError, match="cannot upload to owner/map .* your token") as error:
            things["units"].push_to_hub("owner/map", token=token)
        one_line(error)
    assert not hub.repos
    for name in ("map", "a/b/c", "../map", "owner/map\n", None):
        with pytest.raises(SsahError, match="is no name of a hub repository"):
            things["units"].push_to_hub(name, token=hub.token)


def test_without_a_network(things, hub):
    things["units"].push_to_hub("owner/map", token=hub.token)
    UnitMap.from_pretrained("owner/map")
    hub.shutdown()
    hub.server_close()
    assert same(UnitMap.from_pretrained("owner/map"), things["units"])  # from the cache
    with pytest.raises(SsahError, match="owner/new is no folder here, and cannot be read") as error:
        UnitMap.from_pretrained("owner/new")
    one_line(error)
    with pytest.raises(SsahError, match="cannot upload to owner/new") as error:
        things["units"].push_to_hub("owner/new", token=hub.token)
    one_line(error)


def test_a_proxy_that_answers_with_a_page(things, hub, monkeypatch):
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Html)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{proxy.server_port}")
    try:
        with pytest.raises(SsahError, match="cannot be read from the hub") as error:
            UnitMap.from_pretrained("owner/map")
        one_line(error)
        with pytest.raises(SsahError, match="cannot upload to owner/map") as error:
            things["units"].push_to_hub("owner/map", token=hub.token)
        one_line(error)
    finally:
        proxy.shutdown()
        proxy.server_close()
