"""`make reproduce MODEL=...`: names, what is refused, and what an aligned model leaves out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import profile_values
import run_chapter
import torch
import users_model
import yaml
from helpers import one_line
from profile_values import ProfileError
from run_config import config_of

from ssah_nb.engine.alignment import make_aligned
from ssah_nb.engine.models import given_stage, load_stage, save_model, tiny_model, tiny_tokenizer
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.start import start_model, take_as

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    "The chapters and the workflow in a folder of their own, which is the current one."
    for name in ("nbs", "workflow", "settings.ini"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("SSAH_DEVICE", "SSAH_DTYPE", "SSAH_MIXED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(project):
    "The folder of a small model that somebody saved."
    return save_model(tiny_model(seed=5), tiny_tokenizer(), project / "My model, v2")


# names, and what is refused


@pytest.mark.parametrize(
    ("model", "name", "run"),
    [
        ("org/Some-Model_1.5B", "", "smoke-Some-Model_1.5B"),
        ("weights/chat.Q4_K_M.gguf", "", "smoke-chat.Q4_K_M"),
        ("a folder/with (odd) näme/", "", "smoke-with-odd-n-me"),
        ("???", "", "smoke-model"),
        ("org/a", "first.try", "smoke-first.try"),
    ],
)
def test_a_run_is_named_by_its_model(project, model, name, run):
    assert users_model.run_name("smoke", model, name) == run


def test_a_folder_is_named_by_where_it_is(mine, monkeypatch):
    monkeypatch.chdir(mine)
    assert users_model.run_name("smoke", ".") == "smoke-My-model-v2"


@pytest.mark.parametrize("name", ["../other", "a/b", ".hidden", "-x", "a b"])
def test_a_name_must_be_a_folder_name(project, name):
    with pytest.raises(ProfileError, match="NAME="):
        users_model.run_name("smoke", "tiny", name)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_safetensors_at_all(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


def without(name):
    return lambda folder: (folder / name).unlink()


def part_lacking(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def pruned(folder):
    config = json.loads((folder / "config.json").read_text()) | {"ssah_kept": []}
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder):
    for name in users_model.TOKENIZERS:
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_weights, "no .safetensors file"),
        (pickled, "pickled only (pytorch_model.bin)"),
        (cut, "not a whole safetensors file"),
        (no_safetensors_at_all, "not a whole safetensors file"),
        (without("config.json"), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no model_type"),
        (part_lacking, "lacks model-2.safetensors"),
        (adapter, "holds an adapter"),
        (pruned, "is a pruned model"),
        (no_tokenizer, "no tokenizer"),
    ],
)
def test_a_broken_folder_is_refused_before_anything_runs(mine, damage, words):
    users_model.check_model(str(mine))
    damage(mine)
    with pytest.raises(ProfileError) as error:
        users_model.prepare("smoke", str(mine))
    assert words in one_line(error)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./no/such folder", "no folder './no/such folder'"),
        ("nothing.gguf", "no file nothing.gguf"),
        ("settings.ini", "neither a folder nor a .gguf file"),
        ("wrong.gguf", "no GGUF file"),
        ("no-such-owner/no-such-model", "no such model on the hub"),
        ("", "MODEL="),
    ],
)
def test_a_wrong_model_is_one_line(project, model, words, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("name not known\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    (project / "wrong.gguf").write_text("<html>")
    with pytest.raises(ProfileError) as error:
        users_model.prepare("smoke", model)
    assert words in one_line(error)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], None),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "pickled only"),
        (["README.md"], "no config.json"),
    ],
)
def test_a_model_on_the_hub_is_known_by_its_files(project, files, refused, monkeypatch):
    import huggingface_hub

    class Found:
        siblings = [type("File", (), {"rfilename": name}) for name in files]

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Found)
    if refused:
        with pytest.raises(ProfileError, match=refused):
            users_model.prepare("smoke", "org/m")
        return
    run = users_model.prepare("smoke", "org/m")
    assert profile_values.read_profile(run)["hub"] is True
    assert profile_values.profile_parameters(run)["00_start"]["model_name"] == "org/m"


def test_a_cached_configuration_alone_is_no_model(project, tmp_path, monkeypatch):
    import huggingface_hub

    class Found:
        siblings = [
            type("File", (), {"rfilename": name})
            for name in ("config.json", "tekken.json", "model.safetensors")
        ]

    (tmp_path / "config.json").write_text("{}")
    kept = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: kept)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Found)
    assert profile_values.read_profile(users_model.prepare("smoke", "org/m"))["hub"] is True


def test_make_refuses_a_wrong_model_with_status_2():
    arguments = ["make", "-o", ".venv/.ready", "reproduce", "PROFILE=smoke", "MODEL=it's/no where"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    first, rest = result.stderr.split("\n", 1)
    assert first == "error: MODEL: no folder \"it's/no where\"; check the path"
    assert "Traceback" not in rest and len(rest.splitlines()) == 1  # make's own


# the profile of such a run


def test_a_run_is_the_profile_with_another_model(mine):
    run = users_model.prepare("smoke", str(mine), aligned="no")
    assert run == "smoke-My-model-v2"
    base, own = (profile_values.profile_parameters(name) for name in ("smoke", run))
    model = {"model_name": str(mine), "revision": "", "aligned_model": "", "aligned": "no"}
    assert own["00_start"] == base["00_start"] | model | {"profile": run}
    changed = {"02_probe": {"aligned_model": ""}}
    for chapter in list(base)[1:]:
        profile = {"profile": run} if base[chapter] else {}
        assert own[chapter] == base[chapter] | profile | changed.get(chapter, {})
    assert profile_values.machine(run) == profile_values.machine("smoke")
    settings = profile_values.read_profile(run)
    assert settings["model_files"] == [str(mine / "model.safetensors")]  # newer ones run anew
    assert config_of("smoke", run) == [f"profile={run}"]
    assert config_of("llama2-7b", "x") == ["profile=x", "gpu=1"]


def test_two_models_never_share_a_run(mine, project):
    other = shutil.copytree(mine, project / "elsewhere" / mine.name)
    run = users_model.prepare("smoke", str(mine))
    kept = Path(f"runs/{run}/profile.yaml").read_text()
    assert users_model.prepare("smoke", str(mine)) == run
    with pytest.raises(ProfileError, match="another name: NAME=") as error:
        users_model.prepare("smoke", str(other))
    assert str(mine) in one_line(error)
    assert Path(f"runs/{run}/profile.yaml").read_text() == kept
    assert users_model.prepare("smoke", str(other), "second") == "smoke-second"
    assert yaml.safe_load(kept)["00_start"]["aligned"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope", "tiny"), "unknown profile 'nope'"),
        (("smoke", "tiny", "", "maybe"), "ALIGNED='maybe' is none of auto, yes, no"),
        (("llama2", "tiny", "7b"), "llama2-7b is a profile"),
    ],
)
def test_other_words_that_are_wrong(project, arguments, words, monkeypatch):
    if arguments[0] == "llama2":
        monkeypatch.setattr(users_model, "profile_path", lambda _: None)
    with pytest.raises(ProfileError) as error:
        users_model.prepare(*arguments)
    assert words in one_line(error)


# aligned, or not


@pytest.mark.parametrize(
    ("aligned", "attack_success", "stage"),
    [
        ("auto", 0.5, "aligned"),
        ("auto", 0.51, "unaligned"),
        ("yes", 1.0, "aligned"),
        ("no", 0.0, "unaligned"),
        (True, 1.0, "aligned"),  # as YAML reads yes
        (False, 0.0, "unaligned"),
    ],
)
def test_what_a_model_is_taken_as(mine, aligned, attack_success, stage):
    run = Run("mine", "00_start")
    start_model(run, str(mine))
    assert take_as(run, attack_success, aligned) == given_stage(run) == stage
    assert [path.name for path in Path("runs/mine/models").iterdir()] == [stage]
    assert run.parameters["taken_as"] == stage
    load_stage(run, stage)


def test_an_aligned_model_is_used_as_it_is(mine):
    run = Run("mine", "02_probe")
    start_model(run, str(mine))
    take_as(run, 0.1)
    assert make_aligned(run, None, lr=1.0) is False  # without data: nothing can be trained
    assert json.loads(run.path("tables", "alignment.json").read_text()) == {"trained": False}
    kept, given = load_stage(run, "aligned")[0], tiny_model(seed=5)
    assert all(torch.equal(kept.state_dict()[name], w) for name, w in given.state_dict().items())
    with pytest.raises(SsahError, match="no unaligned model.*ALIGNED=no") as error:
        load_stage(run, "unaligned")
    assert one_line(error)
    start_model(run, str(mine))  # the run begins again
    assert given_stage(run) == "unaligned" and load_stage(run, "unaligned")


def test_wrong_words_for_aligned_are_refused(mine):
    with pytest.raises(SsahError, match="'auto', 'yes' or 'no'"):
        take_as(Run("mine", "00_start"), 0.1, "perhaps")
    with pytest.raises(SsahError, match="begins unaligned"):
        take_as(Run("alone", "00_start"), 0.1, "yes")
    assert take_as(Run("alone", "00_start"), 0.1, "no") == "unaligned"


def test_the_manifest_identifies_the_model(mine, project):
    run = Run("mine", "00_start", model_name=str(mine))
    start_model(run, str(mine))
    run.finish()
    kept = json.loads(run.path("manifest", "00_start.json").read_text())["parameters"]
    sha256 = subprocess.run(["sha256sum", mine / "model.safetensors"], capture_output=True)
    assert kept["model_sha256"] == sha256.stdout.decode().split()[0]
    other = Run("other", "00_start")
    start_model(other, "tiny")
    assert "model_sha256" not in other.parameters


# what is left out


def test_a_chapter_without_the_cells_that_need_it(project, capsys):
    copy = project / "copy.ipynb"
    assert run_chapter.leave_out("03_attribution", copy)
    before, after = (
        nbformat.read(p, as_version=4).cells for p in ("nbs/03_attribution.ipynb", copy)
    )
    assert [cell.id for cell in before] == [cell.id for cell in after]
    changed = [a for b, a in zip(before, after) if a.source != b.source]
    assert [cell.cell_type for cell in changed] == ["markdown"]
    assert changed[0].source.startswith("*Left out: this needs an unaligned model")
    assert capsys.readouterr().out.startswith("  03_attribution | left out: 1 cells, which needs")
    assert run_chapter.leave_out("04_classes", copy) and capsys.readouterr().out == ""


def test_a_whole_chapter_is_left_out_with_a_manifest(project, capsys):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/given.json").write_text('{"taken_as": "aligned"}')
    Path("runs/mine/profile.yaml").write_text("extends: smoke\ncommon: {profile: mine}\n")
    run_chapter.run("mine", "08_budget", "1")
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert said == [f"  08_budget | left out: all of it, which {run_chapter.LEFT_OUT}"]
    done = nbformat.read("runs/mine/notebooks/08_budget.ipynb", as_version=4)
    assert len(done.cells) == 2 and "Left out" in done.cells[1].source
    part = json.loads(Path("runs/mine/manifest/08_budget.json").read_text())
    assert part["left_out"] == f"it {run_chapter.LEFT_OUT}" and part["files"] == {}


@pytest.mark.slow
def test_chapters_run_on_a_model_that_came_aligned(mine):
    run = users_model.prepare("smoke", str(mine), "own", "yes")
    for chapter in ("00_start", "02_probe", "03_attribution"):
        run_chapter.run(run, chapter, "1")
    table = pd.read_csv(f"figures/{run}/table11_alignment.csv")
    assert table.model.to_list() == ["aligned"]
    assert set(pd.read_csv(f"figures/{run}/fig04_probe_difference.csv").model) == {"aligned"}
    kept = {path.name for path in Path(f"runs/{run}/importance").iterdir()}
    assert "aligned_safety" in kept and "unaligned_utility" not in kept
    part = json.loads(Path(f"runs/{run}/manifest/00_start.json").read_text())["parameters"]
    assert (part["model_name"], part["taken_as"]) == (str(mine), "aligned")
    assert not Path("runs/smoke").exists() and not Path("figures/smoke").exists()
