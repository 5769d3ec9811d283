"""What is written is whole, and what models said to harmful prompts is for this user alone."""

import json
import os
import re
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_at_most, one_line
from helpers_units import TOKENIZER, pairs

from ssah_nb import Anchor, SsahError, classify, importance, safety_report, save_model
from ssah_nb.engine import files
from ssah_nb.engine.calibration import save_calibration
from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.files import NOTICE, write_atomic, write_private, write_together
from ssah_nb.engine.models import tiny_model, tiny_tokenizer
from ssah_nb.engine.outcomes import prompt_outcomes
from ssah_nb.engine.protection import harmful_pairs
from ssah_nb.engine.run import Run
from ssah_nb.engine.splits import TOY_SIZES, make_splits

PROMPTS = ["Open the forbidden box.", "Break the forbidden box."]
PAIRS = [{"prompt": "Hi", "response": "Hello"}, {"prompt": "Add 1 and 2.", "response": "3."}]


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


def content(folder: Path) -> dict[str, bytes]:
    "All files below a folder, hidden ones too."
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()
    return Run("smoke", "04_classes")


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# Private


def test_completions_are_for_this_user_alone(umask, run):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    place = run.folder / "completions"
    place.mkdir(0o755, parents=True) if umask == 0 else None  # an older run's, open to all
    safety_report(
        model, tokenizer, PROMPTS, PAIRS, max_new_tokens=2, completions=place / "04_pruned.json"
    )
    kept = place / "protection" / "plain.json"
    prompt_outcomes(model, tokenizer, PROMPTS, ["Hi"], 2, kept, model, 1e9)
    assert harmful_pairs(run, PROMPTS, model, tokenizer, 4)
    kept = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(kept) == 3 and all(path.is_relative_to(place) for path in kept)
    assert {mode(path) for path in kept} == {"0o600"}
    assert {mode(path.parent) for path in kept} | {mode(place)} == {"0o700"}
    assert {json.loads(path.read_text())["notice"] for path in kept} == {NOTICE}


def test_calibration_holds_a_models_refusals_and_is_private(run):
    save_calibration(run, {"safety": PAIRS, "utility": []}, {})
    assert mode(run.folder / "calibration.json") == "0o600"


def test_a_folder_of_the_users_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    write_private(tmp_path / "said.json", {"harmful": []})
    write_private(tmp_path / "new" / "said.json", {"harmful": []})
    assert (mode(tmp_path), mode(tmp_path / "new")) == ("0o755", "0o700")
    assert {mode(path) for path in tmp_path.rglob("*.json")} == {"0o600"}


def test_a_file_that_was_open_to_all_is_closed(tmp_path):
    path = tmp_path / "completions" / "said.json"
    write_atomic(path, b"{}")
    path.chmod(0o644)
    write_private(path, {"harmful": []})
    assert mode(path) == "0o600"


# Whole


def drawn(numbers: int) -> plt.Figure:
    figure, ax = plt.subplots()
    ax.plot(range(numbers))
    return figure


def save_figure(run, number):
    run.save_figure(drawn(2 + number), "fig", pd.DataFrame({"x": [number]}))


def save_table(run, number):
    run.save_table("table", pd.DataFrame({"x": [number]}), {"x": "number"})


def save_units(run, number):
    sets = {"safety": PAIRS, "utility": toy_benign()[number : number + 2]}
    both = importance(tiny_model(), tiny_tokenizer(), sets)
    both["safety"].save(run.path("importance", "safety"))
    classify(**both).save_pretrained(run.path("units", "aligned"))


def save_a_model(run, number):
    save_model(tiny_model(seed=number), tiny_tokenizer(), run.path("models", "aligned"))


def save_splits(run, number):
    splits = make_splits(toy_harmful(), toy_benign(), seed=number, sizes=TOY_SIZES)
    splits.save(run.path("splits.json"))


def save_said(run, number):
    write_private(run.path("completions", "said.json"), {"harmful": ["x" * 200, number]})


def save_manifest(run, number):
    run.parameters["number"] = number
    run.finish()


SAVED = [save_figure, save_table, save_units, save_a_model, save_splits, save_said, save_manifest]


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("share", [0, 0.5, 0.9])  # of the longest file that it writes
def test_a_full_disk_is_one_error_and_leaves_the_old_files(save, share, run):
    save(run, 0)
    before = content(run.folder.parent.parent)
    with (
        files_at_most(int(share * max(map(len, before.values())))),
        pytest.raises(SsahError, match="free some space or choose another folder") as error,
    ):
        save(run, 1)
    assert "File too large" in one_line(error) and str(run.folder.parent.parent) in str(error.value)
    assert content(run.folder.parent.parent) == before


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    both = [tmp_path / "a.csv", tmp_path / "a.png"]
    write_together(dict.fromkeys(both, b"old"))
    write = files._write_part

    def fail_at_the_second(path, data, private):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        write(path, data, private)

    monkeypatch.setattr(files, "_write_part", fail_at_the_second)
    with pytest.raises(SsahError, match="a.png .No space left"):
        write_together(dict.fromkeys(both, b"new"))
    assert content(tmp_path) == {"a.csv": b"old", "a.png": b"old"}


@pytest.mark.parametrize("links", [True, False])  # whether the disk has hard links
@pytest.mark.parametrize("error", [PermissionError(1, "Not permitted"), KeyboardInterrupt()])
def test_files_that_belong_together_come_back_together(tmp_path, monkeypatch, error, links):
    names, replace = ["a.new", "b.csv", "c.png", "d.svg"], os.replace
    write_together({tmp_path / name: b"old" for name in names[1:]}, private=True)
    before = content(tmp_path), os.stat(tmp_path / "b.csv").st_mode

    def fail_at_the_third(part, path):
        if path.name == "c.png" and part.read_bytes() == b"new":
            raise error
        replace(part, path)

    def no_link(*paths):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises((SsahError, KeyboardInterrupt), match="c.png .*nothing was changed|^$"):
        write_together({tmp_path / name: b"new" for name in names})
    assert (content(tmp_path), os.stat(tmp_path / "b.csv").st_mode) == before


def test_a_folder_in_the_place_of_a_file_changes_nothing(tmp_path):
    write_atomic(tmp_path / "a.csv", b"old")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(SsahError, match="b.png .Is a directory.*nothing was changed"):
        write_together({tmp_path / name: b"new" for name in ("a.csv", "b.png", "c.svg")})
    assert content(tmp_path) == {"a.csv": b"old"} and len(list(tmp_path.iterdir())) == 2


def killed_while(action) -> int:
    "Run it in a child that kills itself just before it would rename; the child's number."
    child = os.fork()
    if not child:
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return child


@pytest.mark.parametrize("save", [save_said, save_figure, save_a_model])
def test_a_killed_write_leaves_the_old_file_and_the_next_one_tidies_up(save, run):
    save(run, 0)
    before = content(run.folder.parent.parent)
    child = killed_while(lambda: save(run, 1))
    after = content(run.folder.parent.parent)
    assert before.items() < after.items()  # the old files, and parts
    made = after.keys() - before.keys()
    assert all(re.search(rf"\.{child}-\d+@\w+(\.old)?\.part", name) for name in made)
    save(run, 0)
    assert content(run.folder.parent.parent) == before


def test_parts_of_another_machine_stay(tmp_path, monkeypatch):
    child = killed_while(lambda: write_atomic(tmp_path / "a", b"1"))
    (part,) = tmp_path.iterdir()
    monkeypatch.setattr(files, "HOST", "another")
    write_atomic(tmp_path / "a", b"2")
    assert part.exists() and str(child) in part.name
    monkeypatch.undo()
    write_atomic(tmp_path / "a", b"3")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"1")
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert not content(tmp_path) and not list(tmp_path.iterdir())


def test_options_of_numpy_are_written_as_numbers(tmp_path):
    model, shares = tiny_model(), {"scu": np.float32(0.125), "ucu": np.float64(0.25)}
    scored = {"max_response": np.int64(3)}
    safety, utility = (
        importance(model, TOKENIZER, pairs(word), **scored) for word in ("No", "Yes")
    )
    units = classify(safety, utility, **shares)
    anchor = Anchor(
        model, TOKENIZER, pairs("No"), tokens=np.int64(2), weight=np.float32(0.5), seed=np.int32(4)
    )
    for place, thing in enumerate((safety, units, anchor)):
        again = type(thing).load(thing.save(tmp_path / str(place)))
        (tensors, info), (others, more) = thing.to_files(), again.to_files()
        assert info == more and all(torch.equal(t, others[name]) for name, t in tensors.items())
    plain = Anchor(model, TOKENIZER, pairs("No"), tokens=2, weight=0.5, seed=4)
    assert torch.equal(anchor.loss(tiny_model(seed=1)), plain.loss(tiny_model(seed=1)))
