"""The pairs, and the recipe of the aligned model."""

import pytest
import torch
from helpers_calibration import PAIRS

from ssah_nb.engine import alignment
from ssah_nb.engine.alignment import RECIPE, STOCK_REFUSALS, align, aligned_folder, alignment_pairs
from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.models import load_model, tiny_model, tiny_tokenizer
from ssah_nb.engine.splits import TOY_SIZES, make_splits


def test_alignment_pairs_refuse_the_harmful_and_keep_the_benign():
    pairs = alignment_pairs([{"prompt": "bad", "response": "ignored"}] * 30, PAIRS, seed=1)
    assert all(p["response"] in STOCK_REFUSALS for p in pairs[:30]) and pairs[30:] == PAIRS
    again, other = (alignment_pairs([{"prompt": "bad"}] * 30, PAIRS, seed) for seed in (1, 2))
    assert pairs == again != other


CPU = torch.device("cpu")
TINY = {"model": "tiny", "data": {}, "seed": 1, "lr": 1e-3, "epochs": 1, "batch_size": 8}
TINY |= {"max_response": 4}


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list:
    "An empty cache, toy data, and one entry for each training."
    trained = []
    toy = make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)

    def spy(*arguments, **options):
        trained.append(options)
        return align(*arguments, **options)

    monkeypatch.setenv("SSAH_CACHE", str(tmp_path))
    monkeypatch.setattr(alignment, "named_splits", lambda seed, **data: toy)
    monkeypatch.setattr(alignment, "align", spy)
    return trained


def folders(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "models").iterdir() if path.is_dir())


def test_the_aligned_model_is_made_once_and_kept(trained, tmp_path, capsys):
    folder = aligned_folder(CPU, False, TINY)
    assert folders(tmp_path) == [folder.name] and "first use only" in capsys.readouterr().out
    assert trained == [
        {"seed": 1, "lr": 1e-3, "epochs": 1, "batch_size": 8, "max_response": 4, "mixed": False}
    ]
    before = (folder / "model.safetensors").read_bytes()
    assert aligned_folder(CPU, False, TINY) == folder
    assert len(trained) == 1 and (folder / "model.safetensors").read_bytes() == before
    model, _ = load_model(folder, device="cpu")
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_the_name_of_the_folder_holds_the_recipe(trained, tmp_path):
    recipes = [TINY, TINY | {"seed": 2}, TINY | {"lr": 2e-3}, TINY | {"data": {"max_words": 3}}]
    names = [aligned_folder(CPU, False, recipe).name for recipe in recipes]
    names.append(aligned_folder(CPU, True, TINY).name)
    assert len(set(names)) == 5 and folders(tmp_path) == sorted(names)
    assert aligned_folder(CPU, False, dict(reversed(TINY.items()))).name == names[0]


@pytest.mark.parametrize("where", ["align", "save_model"])
def test_a_half_made_folder_never_appears(where, trained, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(alignment, where, stop)
        with pytest.raises(KeyboardInterrupt):
            aligned_folder(CPU, False, TINY)
        assert folders(tmp_path) == []
    with monkeypatch.context() as patch:  # while it is being written, too
        patch.setattr(type(tiny_tokenizer()), "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            aligned_folder(CPU, False, TINY)
        assert folders(tmp_path) == []
    assert aligned_folder(CPU, False, TINY).exists()


def test_load_model_takes_the_aligned_model_from_there(trained, monkeypatch):
    folder = aligned_folder(CPU, False, TINY)
    monkeypatch.setattr(alignment, "aligned_folder", lambda device: folder)
    weight = load_model("aligned", device="cpu")[0].lm_head.weight
    assert torch.equal(weight, load_model(folder, device="cpu")[0].lm_head.weight)


def test_the_recipe_names_every_setting_that_is_used():
    assert set(RECIPE) == set(TINY)
