"""Run one chapter, from the repository's root.

    python workflow/run_chapter.py PROFILE CHAPTER THREADS

The executed notebook appears under runs/PROFILE/notebooks only when the chapter has ended well;
until then it is CHAPTER.partial.ipynb. What the chapter prints goes to
runs/PROFILE/logs/CHAPTER.log, and to the terminal line by line.

A run that began with an aligned model has no unaligned one. Then the cells that are tagged
`needs_unaligned` are left out, and a chapter whose parameters are tagged so is left out whole.
"""

import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from inside an import

import nbformat
import papermill
import psutil
from one_run import chapter_held, interrupted_once, temporary, write_whole
from profile_values import (
    ProfileError,
    chapters,
    machine,
    notebooks,
    profile_parameters,
    read_profile,
)

from ssah_nb.engine.opening import read_json

ENVIRONMENT = {
    "IN_TEST": "1",  # nbdev leaves the exporting cells of a notebook alone
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one in the user's home
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "SPYDER_LIKE": "1",  # tqdm.auto then draws bars as text: a terminal has no widgets
    "TQDM_MININTERVAL": "10",  # seconds between two progress lines of a loop
    "TQDM_DELAY": "5",  # seconds before a loop prints any
    "TQDM_NCOLS": "100",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),  # glibc keeps freed memory for the next step,
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),  # which then need not fault in fresh pages
}

LEFT_OUT = "needs an unaligned model, and this run began with an aligned one"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def keep_committed(profile: str) -> None:
    """Put the tables of figures/PROFILE, as git has them, aside in runs/PROFILE/committed.

    Without git, or its history, it is the folder as it is now. The last chapter compares the run
    with them.
    """
    source, kept = f"figures/{profile}", Path(f"runs/{profile}/committed")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    try:
        archive = subprocess.run(["git", "archive", "HEAD", source], capture_output=True)
    except OSError:  # no git here
        archive = None
    if archive and archive.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            for member in files.getmembers():
                if member.name.endswith((".csv", ".json")):
                    (kept / Path(member.name).name).write_bytes(files.extractfile(member).read())
        return
    for path in [*Path(source).glob("*.csv"), *Path(source).glob("*.json")]:
        shutil.copy(path, kept)


def end_with_parent(process: str | None = None) -> None:
    """End this process soon after its parent has ended, however that ended.

    With the number of a process: after that one, which is the parent or the one above it. Also
    when it had ended before this was called.
    """
    expected = int(process) if process else os.getppid()

    def is_there() -> bool:
        parent = os.getppid()
        return expected == parent or expected == psutil.Process(parent).ppid()

    def watch():
        try:
            while is_there():
                time.sleep(0.5)
        finally:  # also when the parent ended while it was asked for its own
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Lines:
    """A stream: what a chapter prints goes to its log, and to the terminal as whole lines."""

    def __init__(self, chapter, log):
        self.chapter, self.log, self.rest, self.last = chapter, log, "", ""

    def write(self, text):
        self.log.write(text)
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in lines:
            if line.strip() and line != self.last:  # a bar draws its last state twice
                print(f"  {self.chapter} | {line.rstrip()}", flush=True)
            self.last = line

    def flush(self):
        self.log.flush()


def drop_progress(path: Path) -> None:
    """Take the progress bars out of an executed notebook; the log has them."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                or (output.text.strip() and not output.text.startswith(("\r", "\x1b[A")))
            ]
    nbformat.write(notebook, path)


def prepare(profile: str, chapter: str, threads: str) -> dict:
    """Set the environment of a chapter; its parameters. Raises `ProfileError`."""
    if chapter not in notebooks():
        raise ProfileError(f"unknown chapter {chapter!r}; known: {', '.join(notebooks())}")
    parameters = profile_parameters(profile)[chapter]
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=threads, **machine(profile))
    if not read_profile(profile).get("hub"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    return parameters


def given_stage(profile: str) -> str:
    """What the model that the run began with was taken as, by its first chapter."""
    path = Path(f"runs/{profile}/given.json")
    try:
        return read_json(path).get("taken_as", "unaligned") if path.exists() else "unaligned"
    except ValueError as error:
        raise ProfileError(str(error)) from None


def leave_out(chapter: str, copy: Path) -> bool:
    """Copy a chapter without what needs an unaligned model; whether anything is left to run."""
    notebook = nbformat.read(f"nbs/{chapter}.ipynb", as_version=4)
    needing = [
        cell for cell in notebook.cells if "needs_unaligned" in cell.metadata.get("tags", ())
    ]
    whole = any("parameters" in cell.metadata.tags for cell in needing)
    words = f"*Left out: this {LEFT_OUT}.*"
    for cell in needing:
        place = notebook.cells.index(cell)
        notebook.cells[place] = nbformat.v4.new_markdown_cell(words, id=cell.id)
    if whole:
        notebook.cells = [notebook.cells[0], nbformat.v4.new_markdown_cell(words)]
    nbformat.write(notebook, copy)
    if needing:
        what = "all of it" if whole else f"{len(needing)} cells"
        print(f"  {chapter} | left out: {what}, which {LEFT_OUT}", flush=True)
    return not whole


def left_out_manifest(profile: str, chapter: str) -> None:
    """The manifest of a chapter that was left out whole."""
    path = Path(f"runs/{profile}/manifest/{chapter}.json")
    part = {"chapter": chapter, "left_out": f"it {LEFT_OUT}", "minutes": 0.0, "files": {}}
    write_whole(path, json.dumps(part, indent=1))


def execute(source: Path, partial: Path, parameters: dict, lines: Lines) -> None:
    """Run the notebook with papermill; what it prints goes to `lines`."""
    papermill.execute_notebook(
        source,
        partial,
        parameters,
        cwd=".",
        progress_bar=False,
        autosave_cell_every=0,  # the notebook is saved after each cell anyway
        stdout_file=lines,
        stderr_file=lines,
        extra_arguments=["--log-level=CRITICAL"],  # no word on a local kernel's encryption
    )


def run(profile: str, chapter: str, threads: str) -> None:
    """Run one chapter, when no other process does. Raises `ProfileError`."""
    parameters = prepare(profile, chapter, threads)
    with chapter_held(profile, chapter), temporary(profile, chapter):
        if chapter == chapters()[0]:
            keep_committed(profile)
        run_notebook(profile, chapter, parameters)


def run_notebook(profile: str, chapter: str, parameters: dict) -> None:
    """Run a chapter's notebook; it appears, executed, when it has ended well."""
    done = Path(f"runs/{profile}/notebooks/{chapter}.ipynb")
    partial = done.with_suffix(".partial.ipynb")
    log_path = Path(f"runs/{profile}/logs/{chapter}.log")
    done.parent.mkdir(parents=True, exist_ok=True)
    known = chapters() if chapter in chapters() else [chapter]
    place = f"[{known.index(chapter) + 1}/{len(known)}] {chapter}"
    print(f"{place}: start", flush=True)
    start = time.monotonic()
    source = Path(f"nbs/{chapter}.ipynb")
    with open(log_path, "a") as log:
        try:
            if given_stage(profile) == "unaligned":
                execute(source, partial, parameters, Lines(chapter, log))
            elif leave_out(chapter, partial):
                execute(partial, partial, parameters, Lines(chapter, log))
            else:
                left_out_manifest(profile, chapter)
        except KeyboardInterrupt:  # the cell's task then ends with the kernel: nothing to report
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            sys.exit(f"{place}: stopped; the same command takes it up again")
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            traceback.print_exc(file=log)
            failed = isinstance(error, papermill.PapermillExecutionError)
            what = f"{error.ename}: {error.evalue}" if failed else repr(error)
            sys.exit(f"{place}: failed: {what} (whole traceback: {log_path})")
    drop_progress(partial)
    os.replace(partial, done)
    print(f"{place}: done in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def main(profile: str, chapter: str, threads: str) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, interrupted_once)
    end_with_parent(os.environ.get("SSAH_SNAKEMAKE"))
    try:
        run(profile, chapter, threads)
    except ProfileError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.exit(
            f"error: cannot write below runs/{profile} ({error.strerror}); "
            "free some space, and the same command goes on"
        )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} PROFILE CHAPTER THREADS")
    main(*sys.argv[1:])
