"""What a chapter takes from earlier ones: from the run, else made, else an error that names it."""

import pytest
import torch
from helpers import one_line

from ssah_nb.attribution import load_calibration, load_scores
from ssah_nb.classes import load_units
from ssah_nb.engine.data import load_splits
from ssah_nb.engine.models import load_stage, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.transfer import load_finetuned

LOADERS = {
    "00_start": load_splits,
    "02_probe": lambda run: load_stage(run, "aligned"),
    "03_attribution": load_scores,
    "03_attribution, pairs": load_calibration,
    "04_classes": lambda run: load_units(run, tiny_model(), tiny_tokenizer()),
    "05_transfer": load_finetuned,
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()


@pytest.mark.parametrize("chapter", LOADERS)
def test_a_missing_stage_of_a_run_names_its_chapter(chapter, tmp_path):
    with pytest.raises(SsahError, match=r"run .*chapter|run the chapter") as error:
        LOADERS[chapter](Run("mine", "06_freezing"))
    message = one_line(error)
    assert "mine" in message
    assert chapter.split(",")[0] in message or "chapter that makes it" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".ini"]


def test_each_stage_is_made_once_on_the_tiny_model(tmp_path):
    run, (model, tokenizer) = Run("smoke", "06_freezing", seed=1), (tiny_model(), tiny_tokenizer())
    safety, utility = load_scores(run, model, tokenizer)
    units = load_units(run, model, tokenizer)
    finetuned, _ = load_finetuned(run)
    assert safety.mlp.shape == utility.mlp.shape == units.mlp.shape == (2, 32)
    assert not torch.equal(finetuned.lm_head.weight, model.lm_head.weight)
    assert len(units.scu) > 0

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = [load_scores(run)[0], load_units(run, None, None), load_finetuned(run)[0]]
    assert torch.equal(again[0].mlp, safety.mlp) and again[1].scu == units.scu
    assert torch.equal(again[2].lm_head.weight, finetuned.lm_head.weight)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_scores_of_other_sets_and_stages_can_be_had_by_name():
    run = Run("smoke", "05_transfer", seed=1)
    names = ("aligned_safety", "unaligned_utility", "aligned_safety_half_1")
    scored = load_scores(run, tiny_model(), tiny_tokenizer(), names)
    assert len(scored) == 3 and all(s.mlp.shape == (2, 32) for s in scored)
    assert not torch.equal(scored[0].mlp, scored[2].mlp)
