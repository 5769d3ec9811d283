"""Seeds, devices, files, parameters and the manifest."""

import json
import re
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch

from ssah_nb.engine import run as run_module
from ssah_nb.engine.drawings.anchoring import LABELS
from ssah_nb.engine.limits import WORDS
from ssah_nb.engine.run import (
    Run,
    SsahError,
    begin,
    pick_device,
    pick_dtype,
    pick_mixed,
    progress,
    set_seed,
    show_progress,
    side_by_side,
    write_atomic,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()
    return Run("test", "03_attribution", seed=3, lr=0.1)


def test_missing_table_names_the_command(run):
    with pytest.raises(SsahError, match="make reproduce PROFILE=test"):
        run.read_table("table01_pruning")


def test_manifest_has_hashes_parameters_and_device(run):
    table = pd.DataFrame({"a": [0.5], "b": ["text"]})
    run.save_table("table", table, {"b": "what", "a": "how much (%)"})
    run.finish(torch.nn.Linear(1, 1), {"one way": 1.25})
    part = json.loads(run.path("manifest", "03_attribution.json").read_text())
    assert set(part["files"]) == {"table.csv", "table.png", "table.svg"}
    assert part["parameters"] == {"seed": 3, "lr": 0.1}
    assert {"minutes", "device", "dtype", "versions", "threads"} <= set(part)
    assert part["seconds"] == {"one way": 1.2}


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_manifest_names_the_processor_of_the_model(run, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU at {device}")
    model = torch.nn.Identity()
    model.device = torch.device(device)
    run.finish(model)
    named = json.loads(run.path("manifest", "03_attribution.json").read_text())["versions"]
    assert named["cpu"] == run_module.processor()
    assert named.get("gpu") == (None if device == "cpu" else "the GPU at cuda:1")


def test_a_chapter_begins_with_the_parameters_of_its_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_PARAMETERS", '{"04_classes": {"seed": 7, "rows": 3}, "x": {"lr": 9}}')
    cells = {"__name__": "__main__", "_": "hidden", "In": [], "Out": {}, "pd": pd, "begin": begin}
    names = cells | {"profile": "test", "seed": 1, "rows": 100, "lr": 0.1, "ratios": [0.1, 0.2]}
    run = begin("04_classes", names)
    assert run.parameters == {"seed": 7, "rows": 3, "lr": 0.1, "ratios": [0.1, 0.2]}
    assert (names["seed"], names["rows"]) == (7, 3)  # the notebook itself goes on with them
    assert (run.profile, run.chapter) == ("test", "04_classes")
    monkeypatch.delenv("SSAH_PARAMETERS")
    assert begin("04_classes", cells | {"profile": "test", "seed": 2}).parameters == {"seed": 2}


def test_the_seed_of_the_parameters_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    for seed in (1, 2, 1):
        begin("04_classes", {"profile": "test", "seed": seed})
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_environment_decides_what_steers_the_machine(run, monkeypatch):
    for name in ("SSAH_DEVICE", "SSAH_DTYPE", "SSAH_MIXED"):
        monkeypatch.delenv(name, raising=False)
    auto = Run("test", "03_attribution")
    assert (auto.device, auto.dtype, auto.mixed) == ("auto", "auto", "auto")
    monkeypatch.setenv("SSAH_DEVICE", "cuda:1")
    monkeypatch.setenv("SSAH_DTYPE", "bfloat16")
    for word, mixed in (("True", True), ("false", False), ("auto", "auto")):
        monkeypatch.setenv("SSAH_MIXED", word)
        chosen = Run("test", "03_attribution")
        assert (chosen.device, chosen.dtype, chosen.mixed) == ("cuda:1", "bfloat16", mixed)


def test_a_chapter_opened_by_hand_keeps_its_figures_to_itself(run, tmp_path):
    alone = Run("alone", "03_attribution")
    alone.save_table("table", pd.DataFrame({"a": [1]}), {"a": "a"})
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("table.*")}
    assert {str(path.parent) for path in written} == {"runs/alone/figures"}
    run.save_table("table", pd.DataFrame({"a": [1]}), {"a": "a"})
    assert (tmp_path / "figures/test/table.csv").exists()


def test_write_atomic_replaces_or_keeps(tmp_path):
    path = write_atomic(tmp_path / "new" / "file", b"1")
    write_atomic(path, b"22")
    assert path.read_bytes() == b"22" and list(path.parent.iterdir()) == [path]
    with pytest.raises(SsahError, match="cannot write"):
        write_atomic(path / "below", b"3")


def test_device_and_dtype_errors_name_the_choices():
    with pytest.raises(SsahError, match="device 'cuda:99'|device 'nowhere'"):
        pick_device("nowhere")
    with pytest.raises(SsahError, match="float8.*bfloat16"):
        pick_dtype("float8", torch.device("cpu"))
    with pytest.raises(SsahError, match="mixed='yes'"):
        pick_mixed("yes", torch.device("cpu"))


@pytest.mark.parametrize(("speed", "mixed"), [(0.6, False), (1.4, False), (2.2, True)])
def test_auto_is_mixed_where_the_cpu_is_faster(monkeypatch, speed, mixed):
    assert 0 < run_module.bfloat16_speed() < 1000
    monkeypatch.setattr(run_module, "bfloat16_speed", lambda: speed)
    assert pick_mixed("auto", torch.device("cpu")) is mixed
    assert pick_mixed("auto", torch.device("cuda")) is False
    assert pick_mixed(True, torch.device("cpu")) is True
    assert pick_mixed(False, torch.device("cpu")) is False
    assert pick_mixed("auto", "cpu") is mixed
    assert pick_dtype("auto", "cpu") == torch.float32
    for pick in (pick_mixed, pick_dtype):
        with pytest.raises(SsahError, match="device 'gpu' cannot be used"):
            pick("auto", "gpu")


@pytest.mark.parametrize("said", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_at_once_is_one_error(monkeypatch, said):
    monkeypatch.setenv("SSAH_AT_ONCE", said)
    where = rf"SSAH_AT_ONCE='?{re.escape(said)}'? is not usable; give a whole number"
    with pytest.raises(SsahError, match=where):
        side_by_side(str, range(2), torch.device("cpu"))
    with pytest.raises(SsahError, match="at_once=-3 is not usable"):
        side_by_side(str, range(2), torch.device("cpu"), at_once=-3)
    monkeypatch.setenv("SSAH_AT_ONCE", "")  # as one that is not there
    assert side_by_side(str, range(2), torch.device("cpu")) == ["0", "1"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("seed=2", "give JSON such as"),
        ("[1]", "give JSON such as"),
        ('{"04_classes": 3}', "give JSON such as"),
        ('{"04_classes": {"sed": 2}}', "04_classes has no parameter sed"),
        ('{"04_classes": {"np": 2}}', "04_classes has no parameter np"),
    ],
)
def test_wrong_parameters_from_the_environment_are_one_error(run, monkeypatch, said, words):
    monkeypatch.setenv("SSAH_PARAMETERS", said)
    with pytest.raises(SsahError, match=f"SSAH_PARAMETERS.*{words}"):
        begin("04_classes", {"profile": "test", "seed": 1, "np": re})


def test_parameters_for_a_chapter_that_is_not_there_are_refused(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/04_classes.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_PARAMETERS", '{"4_classes": {"seed": 7}}')
    with pytest.raises(SsahError, match="SSAH_PARAMETERS: there is no chapter 4_classes"):
        begin("04_classes", {"profile": "test", "seed": 1})


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("controls", ["random", "randon"], "controls cannot be 'randon'; .*largest norm"),
        ("controls", "random", "controls='random' is no list"),
        ("held", {"full": [1], "scus": [1]}, "held cannot be 'scus'; .*scu_top_cu"),
    ],
)
def test_a_word_that_no_chapter_knows_is_refused_at_its_start(run, parameter, value, words):
    with pytest.raises(SsahError, match=words):
        begin("04_classes", {"profile": "test", "seed": 1, parameter: value})


def test_the_words_are_those_of_the_chapters():
    assert set(WORDS["held"]) | {"aligned"} == set(LABELS)
    source = (ROOT / "nbs/04_classes.ipynb").read_text()
    (control,) = re.findall(r"def control\(name.*?return like.*?\n", source, re.S)
    named = {word for word in re.findall(r'\\"(.*?)\\"', control) if word.count(" ") <= 2}
    assert set(WORDS["controls"]) == {"random"} | named - {"magnitude"}


def test_seed_repeats():
    set_seed(5)
    a = torch.rand(2)
    set_seed(5)
    assert torch.equal(a, torch.rand(2))


def test_progress_can_be_switched_off_and_on(capsys, monkeypatch):
    monkeypatch.setenv("SSAH_PROGRESS", "1")
    assert list(progress([1, 2], "shown")) == [1, 2]
    assert "shown" in capsys.readouterr().err
    show_progress(False)
    assert list(progress([1, 2], "hidden")) == [1, 2]
    assert "hidden" not in capsys.readouterr().err


def test_side_by_side_keeps_the_order_shares_the_cores_and_raises(monkeypatch):
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    together = threading.Barrier(2, timeout=10)  # nobody passes alone

    def work(x):
        if threads >= 2:
            together.wait()
        return x, torch.get_num_threads()

    share = threads // 2 if threads >= 2 else threads
    assert side_by_side(work, range(4), cpu) == [(x, share) for x in range(4)]
    monkeypatch.setenv("SSAH_AT_ONCE", "1")
    assert side_by_side(lambda x: torch.get_num_threads(), range(2), cpu) == [threads] * 2
    monkeypatch.delenv("SSAH_AT_ONCE")
    # elsewhere one after the other
    count = lambda x: torch.get_num_threads()
    assert side_by_side(count, range(2), torch.device("meta")) == [threads] * 2

    def fail(x):
        if x:
            raise SsahError(f"item {x}")

    with pytest.raises(SsahError, match="item 1"):
        side_by_side(fail, range(3), cpu)
    assert torch.get_num_threads() == threads
