"""One run of a profile at a time, and nothing left behind by one that was killed.

    python workflow/one_run.py PROFILE    # an error where a run of the profile is going on

A lock is held on an open file, so it ends with its process, however that ends. Snakemake holds
runs/PROFILE/.running. A second run of the profile is refused. Each chapter holds its log. A second
process for the same chapter waits: the first may be one whose snakemake was killed.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil


class RunningError(RuntimeError):
    """A run of the profile is going on; the message is one line."""


def interrupted_once(*_) -> None:
    """For SIGINT: Ctrl-C ends this process, and pressing it again does not disturb the end."""
    signal.signal(signal.SIGINT, lambda *_: None)
    raise KeyboardInterrupt


def hold(path: Path) -> int | None:
    """Lock a file until this process ends; its handle, or None when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # closed in child processes
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    if not path.exists():
        return False
    handle = hold(path)
    if handle is not None:
        os.close(handle)
    return handle is None


def lock_of(profile: str) -> Path:
    return Path(f"runs/{profile}/.running")


def refuse(profile: str) -> RunningError:
    process = lock_of(profile).read_text().strip() or "unknown"
    return RunningError(
        f"a run of {profile!r} is going on here (process {process}); "
        "wait until it has ended, or stop it"
    )


def start(profile: str) -> None:
    """Hold the profile and tidy up. Raises `RunningError` where another run has it."""
    for _ in range(30):  # a run that was killed needs a moment to notice
        if (handle := hold(lock_of(profile))) is not None:
            break
        time.sleep(0.1)
    else:
        raise refuse(profile)
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    for _ in range(50):  # so do its chapters
        if not any(is_held(path) for path in Path(f"runs/{profile}/logs").glob("*.log")):
            return tidy(profile)
        time.sleep(0.1)


def tidy(profile: str) -> None:
    """Remove what a run that was killed was about to write."""
    for folder in (Path(f"runs/{profile}"), Path(f"figures/{profile}")):
        for part in [*folder.rglob(".*.part"), *folder.glob("notebooks/*.partial.ipynb")]:
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    shutil.rmtree(f"runs/{profile}/tmp", ignore_errors=True)


@contextlib.contextmanager
def chapter_held(profile: str, chapter: str):
    """Hold a chapter, after any other process that runs it; the log of the last one is emptied."""
    log, waited = Path(f"runs/{profile}/logs/{chapter}.log"), False
    while (handle := hold(log)) is None:
        if not waited:
            print(f"  {chapter} | another process runs it: waiting for that to end", flush=True)
        waited = True
        time.sleep(0.2)
    try:
        os.ftruncate(handle, 0)
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a kill leaves the old one or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(profile: str, chapter: str):
    """An empty folder for all temporary files of a chapter and its kernel; removed at the end.

    A kernel that runs in it is one whose chapter was killed, and is ended.
    """
    folder = Path(f"runs/{profile}/tmp/{chapter}").absolute()
    clear(folder)
    (folder / "jupyter").mkdir(parents=True)
    folder.chmod(0o700)
    os.environ.update(TMPDIR=str(folder), JUPYTER_RUNTIME_DIR=str(folder / "jupyter"))
    try:
        yield
    finally:
        clear(folder)
        with contextlib.suppress(OSError):  # another chapter is running, too
            folder.parent.rmdir()


def clear(folder: Path) -> None:
    """End what runs in a folder for temporary files, and remove it."""
    left = processes_in(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: Path) -> list[psutil.Process]:
    """The processes that began with this folder for their temporary files."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is another user's
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found


if __name__ == "__main__":
    if is_held(lock_of(sys.argv[1])):
        sys.exit(f"error: {refuse(sys.argv[1])}")
