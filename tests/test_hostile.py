"""Every file that the library opens ends in one line of our error, or in a load that can be used.

Unit maps, importances and anchors carry a seal, so that a load must give what was saved. Where a
file has none (a table of prompts, the weights of a model), other content is other data.

The cases are made by seeded mutations (`helpers_hostile.py`) of good files, one set for each door
(`helpers_doors.py`, `helpers_doors_models.py`). A child process opens them, with 5 seconds of the
processor and 2 GB for each. It also notes what is written outside of its folder, which pickles are
opened, and which code from there is run.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_doors import DOORS
from helpers_hostile import Door, mutations, one, too_long
from test_models import Evil

from ssah_nb import SsahError

MODELS = ("folders", "users' models", "pruned", "gguf")
GROUPS = [[name for name in DOORS if name not in MODELS], list(MODELS)]


def outcomes(scratch: Path, doors: list[str]) -> list[dict]:
    "What became of each case of some doors; a case that ended the child comes last, without any."
    command = [sys.executable, str(Path(__file__).with_name("helpers_hostile.py")), scratch, *doors]
    places = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "workflow")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.run(
        command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=600
    )
    told = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    cases = {(row["door"], row["case"]): row for row in told if "case" in row}
    assert child.returncode == 0, f"{list(cases)[-1:]} ended the process: {child.stderr[-2000:]}"
    assert told[-1] == {"left": sorted(doors)}, told[-1]
    return list(cases.values())


@pytest.fixture(scope="session")
def tried(tmp_path_factory) -> dict[str, list[dict]]:
    "The outcomes of all cases, by door."
    scratches = [tmp_path_factory.mktemp("hostile") for _ in GROUPS]
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        found = [row for rows in pool.map(outcomes, scratches, GROUPS) for row in rows]
    return {door: [row for row in found if row["door"] == door] for door in DOORS}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_a_hostile_file_is_refused_in_one_line_or_can_be_used(door, tried):
    rows = tried[door]
    wrong = [row for row in rows if row["outcome"] not in ("error", "loaded") or row["broken"]]
    assert not wrong, "\n".join(f"{row['case']}: {row['outcome']} {row['broken']}" for row in wrong)
    refused = sum(row["outcome"] == "error" for row in rows)
    print(f"{door}: {len(rows)} cases, {refused} refused, {len(rows) - refused} loaded")
    assert refused >= len(rows) / 3


@pytest.mark.slow
def test_there_are_enough_cases(tried):
    assert sum(map(len, tried.values())) >= 500
    assert all(len(rows) >= 15 for rows in tried.values())


def judged(folder: Path, use, error: type = SsahError) -> str:
    return one(Door(lambda folder: None, use, {}, {}, error), folder)["outcome"]


def forever(folder):
    while folder:
        pass


@pytest.mark.parametrize(
    ("limit", "use"), [("SECONDS", forever), ("WAITING", lambda folder: time.sleep(5))]
)
def test_the_judge_sees_what_takes_too_long(limit, use, tmp_path, monkeypatch):
    monkeypatch.setattr(f"helpers_hostile.{limit}", 0.05)
    numbers = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(number, too_long) for number in numbers]
    try:
        assert judged(tmp_path, use).startswith("Hang")
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_the_judge_sees_what_is_wrong(tmp_path):
    assert judged(tmp_path, lambda folder: 1 / 0).startswith("ZeroDivisionError")
    assert judged(tmp_path, lambda folder: fail("a\nb")).startswith("many lines")
    assert judged(tmp_path, lambda folder: fail("one")) == "error"
    assert judged(tmp_path, lambda folder: None) == "loaded"
    assert judged(tmp_path, lambda folder: {"a": 1}) == "loaded something else"


def fail(words: str):
    raise SsahError(words)


WATCHER = """
import os, pickle, sys
from pathlib import Path
from helpers_hostile import WATCHED, watch
scratch, broken = Path(sys.argv[1]) / "in", []
watch(scratch, broken)
WATCHED.append(True)
open(scratch / "a", "w").close()
(scratch / "b").mkdir()
assert not broken, broken
open(scratch.parent / "a", "w").close()
os.mkdir(scratch.parent / "b")
os.symlink("x", scratch.parent / "c")
pickle.loads(b"cos\\nmkdir\\n.")
exec(compile("1", str(scratch / "evil.py"), "exec"))
print(len(broken))
"""


def test_the_watcher_sees_writes_pickles_and_code(tmp_path):
    (tmp_path / "in").mkdir()
    command = [sys.executable, "-c", WATCHER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.stdout == "5\n", child.stdout + child.stderr


def test_the_same_seed_makes_the_same_file(tmp_path):
    name, content = "a.json", [{"prompt": "a", "response": "b"}] * 3
    made = []
    for turn in ("first", "second"):
        folder = tmp_path / turn
        folder.mkdir()
        for case, damage in mutations(Door(None, None, {name: 9}), folder):
            if "seed" in case:
                (folder / name).write_text(json.dumps(content))
                damage(folder)
                made.append((case, (folder / name).read_bytes()))
    assert made[:9] == made[9:] and len({data for _, data in made}) >= 7


def test_the_mark_of_a_pickle_works(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
