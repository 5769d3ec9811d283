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

from ssah_nb.engine.opening import MOST, parse_yaml, read_json, read_text

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

BESIDE = ("protection",)

VALUES = {  # of machine:
    "device": (r"auto|cpu|spread|(cuda|mps|xpu)(:\d+)?", "auto, cpu, cuda, cuda:1 or spread"),
    "dtype": ("auto|float32|bfloat16|float16", "auto, float32, bfloat16 or float16"),
    "mixed": ("auto|true|false", "true, false or auto"),
    "at_once": (r"\d{1,4}", "a whole number; 0 means the default"),
}

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ProfileError(ValueError):
    """A profile that cannot be run; the message is one line."""


def chapters() -> list[str]:
    return sorted(path.stem for path in Path("nbs").glob("[0-9][0-9]_*.ipynb"))


def notebooks() -> list[str]:
    """The chapters, and the pages beside them that a profile may ask for."""
    return chapters() + [name for name in BESIDE if Path(f"nbs/{name}.ipynb").exists()]


def profile_path(profile: str) -> Path:
    """The file of a profile, or of a run on a model of the user's (`users_model.py`)."""
    folder, own = Path("workflow/profiles"), Path(f"runs/{profile}/profile.yaml")
    known = sorted(path.parent.name for path in folder.glob("*/parameters.yaml"))
    if profile in known:
        return folder / profile / "parameters.yaml"
    if not own.exists():
        raise ProfileError(f"unknown profile {profile!r}; known: {', '.join(known)}")
    return own


def read_settings(path: Path) -> dict:
    """What one file of settings says. Raises `ProfileError` for what is none."""
    plain = ("extends", "hub", "last", "model_files")  # the others hold named values
    try:
        settings = parse_yaml(read_text(path, MOST["yaml"])) or {}
    except ValueError as error:
        raise ProfileError(f"{path} cannot be read: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ProfileError(f"{path} holds no settings; write names and values, such as 'hub: true'")
    for name in settings.keys() - set(plain):
        inner = settings[name] or {}
        if not isinstance(inner, dict) or not all(isinstance(key, str) for key in inner):
            raise ProfileError(
                f"{path}: {name} holds no named values; write 'name: value' under it"
            )
    return settings


def read_profile(profile: str, extended: tuple[str, ...] = ()) -> dict:
    """The settings of a profile; with `extends: other`, what it does not say is as in the other."""
    if not isinstance(profile, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", profile):
        raise ProfileError(f"{str(profile)[:40]!r} is no name of a profile")
    if profile in extended:
        raise ProfileError(f"profile {profile!r} extends itself; take 'extends' out of one of them")
    said = read_settings(profile_path(profile))
    settings = {name: value for name, value in said.items() if value is not None}
    other = settings.pop("extends", None)
    base = read_profile(other, (*extended, profile)) if other else {}
    both = {
        key: (base[key] or {}) | settings[key]
        for key in base.keys() & settings.keys()
        if isinstance(settings[key], dict)
    }
    return base | settings | both


def check_name(profile: str) -> None:
    """Raise `ProfileError` where a profile's own file gives its run another name."""
    where = profile_path(profile)
    for section, values in read_settings(where).items():
        said = values.get("profile", profile) if isinstance(values, dict) else profile
        if said != profile:
            raise ProfileError(
                f"{where}: {section} says profile: {said}; take that line out, "
                f"as the run of this profile is called {profile!r}"
            )


def profile_parameters(profile: str) -> dict[str, dict]:
    """The parameters of every chapter. A common parameter goes to each chapter that has it.

    `profile`, the name of the run, is always this profile's and never that of one it extends.
    """
    settings = read_profile(profile)
    check_name(profile)
    where = profile_path(profile)
    common = settings.get("common") or {}
    has = {
        chapter: list(papermill.inspect_notebook(f"nbs/{chapter}.ipynb")) for chapter in notebooks()
    }
    for key in settings.keys() - {"hub", "common", "machine", "model_files", "last"} - has.keys():
        raise ProfileError(f"{where}: unknown chapter {key!r}; known: {', '.join(has)}")
    for name in common:
        if not any(name in names for names in has.values()):
            raise ProfileError(f"{where}: no chapter has the common parameter {name!r}")
    for chapter, names in has.items():
        for name in (settings.get(chapter) or {}).keys() - set(names):
            raise ProfileError(
                f"{where}: {chapter} has no parameter {name!r}; "
                f"it has: {', '.join(names) or 'none'}"
            )
    return {
        chapter: {name: value for name, value in common.items() if name in names}
        | (settings.get(chapter) or {})
        | ({"profile": profile} if "profile" in names else {})
        for chapter, names in has.items()
    }


def check_values(profile: str, settings: dict) -> None:
    """Raise `ProfileError` for a value of `machine` that a run could not use."""
    for name, value in settings.items():
        pattern, words = VALUES[name]
        if not re.fullmatch(pattern, str(value).lower()):
            raise ProfileError(f"{profile_path(profile)}: {name} is {value!r}; use {words}")


def machine(profile: str) -> dict[str, str]:
    """What a profile says about the machine, as the environment variables that a run reads."""
    whole = read_profile(profile)
    said = whole.get("machine") or {}
    settings = {name: value for name, value in said.items() if value is not None}
    if unknown := settings.keys() - VALUES.keys():
        raise ProfileError(
            f"{profile_path(profile)}: machine has no {', '.join(unknown)}; "
            f"it has: {', '.join(VALUES)}"
        )
    check_values(profile, settings)
    if not isinstance(whole.get("hub", False), bool):
        raise ProfileError(f"{profile_path(profile)}: hub is {whole['hub']!r}; use true or false")
    if settings.get("at_once") == 0:  # the default
        del settings["at_once"]
    return {f"SSAH_{name.upper()}": str(value) for name, value in settings.items()}


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
    main(*sys.argv[1:])
