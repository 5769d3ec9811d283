"""Kill a run at random moments and give the same command again: `make drill`.

    python workflow/drill.py [--kills 20] [--seed 0] [--profile smoke]

It works on a copy of this checkout in a temporary folder, so nothing here is touched. One run
without a kill is the reference. Then a chapter, or two that follow each other, are forgotten, with
their tables, and run anew. At a random moment a signal 9 goes to the group of make, to the kernel
alone, to run_chapter.py alone, to snakemake alone or to make alone. The same command must then end
well, give the same tables byte for byte, and leave nothing behind: no process, no lock, no half
file. (A killed snakemake leaves its empty folder where the system keeps temporary files, and the
system clears that.) Last comes an interrupt as from Ctrl-C: one line, exit status 130, and the same
again.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from one_run import is_held, lock_of

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("workflow", "nbs", "ssah_nb", "figures")
COPIED_FILES = ("Makefile", "settings.ini", "pyproject.toml", "requirements.lock")
VICTIMS = {  # how an argument of the command ends
    "kernel": "ipykernel_launcher",
    "run_chapter": "workflow/run_chapter.py",
    "snakemake": "bin/snakemake",
}
KINDS = ("group", "kernel", "run_chapter", "snakemake", "make")
STOPPED = ": stopped; the same command takes it up again"


def copy_checkout(folder: Path, profile: str) -> None:
    """Copy what a run needs, with this environment; no figures of the profile."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in COPIED_FILES:
        shutil.copy(ROOT / name, folder)
    shutil.rmtree(folder / "figures" / profile, ignore_errors=True)
    link_environment(folder)


def link_environment(folder: Path) -> None:
    """Make the environment of this Python the `.venv` of a folder, which then needs no set-up."""
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".ready":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv/.ready").touch()


@dataclass
class Drill:
    """A checkout that is run, killed and run again."""

    folder: Path
    profile: str = "smoke"
    chances: random.Random = field(default_factory=random.Random)
    patience: float = 10  # seconds that processes have to end

    def __post_init__(self):
        os.chdir(self.folder)  # locks and processes are found by it
        self.temporary = self.folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.said = self.folder / "said.txt"
        hidden = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SSAH_MAKE", "SSAH_SNAKEMAKE")
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden}
        self.environment["TMPDIR"] = str(self.temporary)

    def notebook(self, chapter: str) -> Path:
        return Path(f"runs/{self.profile}/notebooks/{chapter}.ipynb")

    def start(self, chapters: list[str]) -> subprocess.Popen:
        """Begin the command in a session of its own; with chapters: only they shall be there."""
        flags = " ".join(str(self.notebook(chapter)) for chapter in chapters)
        with open(self.said, "w") as said:
            return subprocess.Popen(
                ["make", "reproduce", f"PROFILE={self.profile}", f"SNAKEMAKE_FLAGS={flags}"],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def finish(self, chapters: list[str]) -> list[str]:
        """The command, undisturbed; what went wrong."""
        status = self.start(chapters).wait()
        return [] if status == 0 else [f"exit status {status}: {self.last_line()}"]

    def last_line(self) -> str:
        return ([""] + self.said.read_text().strip().splitlines())[-1]

    def reference(self) -> list[str]:
        """One run without a kill: what went wrong, and what is remembered of it."""
        began = time.monotonic()
        failed = self.finish([])
        seconds = time.monotonic() - began
        self.tables = self.read_tables()
        self.seconds = {}
        for path in sorted(self.notebook("x").parent.glob("*.ipynb")):
            facts = json.loads(path.read_text())["metadata"]["papermill"]
            self.seconds[path.stem] = facts["duration"]
        over = seconds - sum(self.seconds.values())
        self.overhead = max(1.0, over / (len(self.seconds) + 1)) if self.seconds else 1.0
        return failed or ([] if self.tables else ["it wrote no tables"])

    def read_tables(self) -> dict[str, bytes]:
        found = Path(f"figures/{self.profile}").glob("*.csv")
        return {path.name: path.read_bytes() for path in sorted(found)}

    def forget(self) -> list[str]:
        """A chapter, or two that follow each other, whose notebooks and tables are removed."""
        known, number = sorted(self.seconds), self.chances.choice((1, 2))
        first = self.chances.randrange(len(known) - number + 1)
        chosen = known[first : first + number]
        now = time.time()
        for chapter in known:  # else what follows would be run, too
            os.utime(self.notebook(chapter), (now, now))
        for chapter in chosen:
            self.notebook(chapter).unlink()
            manifest = Path(f"runs/{self.profile}/manifest/{chapter}.json")
            files = json.loads(manifest.read_text())["files"] if manifest.exists() else ()
            for name in files:
                Path(f"figures/{self.profile}/{name}").unlink(missing_ok=True)
        return chosen

    def moment(self, chapters: list[str]) -> float:
        """A random number of seconds from the start of the command to a little before its end."""
        each = [self.seconds[chapter] + self.overhead for chapter in chapters]
        return self.chances.uniform(0, self.overhead + sum(each))

    def processes(self, end: str = "") -> list[psutil.Process]:
        """What runs in the folder; with an end: where an argument of the command ends so."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = Path(process.cwd()) == self.folder and process.pid != os.getpid()
                if here and any(word.endswith(end) for word in process.cmdline()):
                    found.append(process)
        return found

    def kill(self, kind: str, command: subprocess.Popen) -> bool:
        """Send the signal; whether there was somebody to receive it."""
        if kind == "group":
            os.killpg(command.pid, signal.SIGKILL)
        elif kind == "make":
            command.kill()
        else:
            victims = self.processes(VICTIMS[kind])
            for victim in victims[:1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            return bool(victims)
        return True

    def disturb(self, kind: str, chapters: list[str]) -> str:
        """Start the command and kill; when and where that was, "" when it had ended before."""
        command, wait, began = self.start(chapters), self.moment(chapters), time.monotonic()
        while command.poll() is None:
            if time.monotonic() - began >= wait and self.kill(kind, command):
                break
            time.sleep(0.05)
        else:
            return ""
        seconds = time.monotonic() - began
        command.wait()
        starts = [line for line in self.said.read_text().splitlines() if line.endswith(": start")]
        where = starts[-1].split()[1].strip(":") if starts else "the beginning"
        return f"after {seconds:4.1f} s in {where}"

    def left_behind(self) -> list[str]:
        """What is there and should not be, a moment after the command has ended."""
        deadline = time.monotonic() + self.patience
        while (strays := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        runs, figures = Path(f"runs/{self.profile}"), Path(f"figures/{self.profile}")
        files = [*runs.rglob("*.part"), *figures.rglob("*.part"), *runs.rglob("*.partial.ipynb")]
        files += [*runs.glob("tmp")]
        files += [path for path in self.temporary.iterdir() if "snakemake" not in path.name]
        files += [*Path(".snakemake/locks").glob("*"), *Path(".snakemake/incomplete").glob("*")]
        locks = [lock_of(self.profile), *runs.glob("logs/*.log")]
        return (
            [f"process {process.pid} still runs" for process in strays]
            + [f"{path} is left" for path in files]
            + [f"{path} is locked" for path in locks if is_held(path)]
        )

    def check(self, chapters: list[str]) -> list[str]:
        """Give the same command again; what is wrong then."""
        wrong = self.finish(chapters)
        tables = self.read_tables()
        different = sorted(
            name
            for name in tables.keys() | self.tables.keys()
            if tables.get(name) != self.tables.get(name)
        )
        return wrong + [f"{name} differs" for name in different] + self.left_behind()

    def interrupt(self) -> tuple[str, list[str]]:
        """Ctrl-C, pressed three times, while the last chapter runs; where, and what is wrong."""
        chapters = self.forget()
        command, wait = self.start(chapters), self.chances.uniform(0, self.seconds[chapters[-1]])
        while command.poll() is None and self.said.read_text().count(": start") < len(chapters):
            time.sleep(0.05)
        time.sleep(0.8 * wait)
        if self.said.read_text().count(": done") >= len(chapters):  # too late, it was faster
            command.wait()
            return self.interrupt()
        with contextlib.suppress(ProcessLookupError):  # it has ended
            for _ in range(3):
                os.killpg(command.pid, signal.SIGINT)
                time.sleep(0.1)
        status, lines = command.wait(), self.said.read_text().splitlines()
        ended = [line for line in lines if line.endswith(STOPPED)]
        wrong = [] if status in (-signal.SIGINT, 130) else [f"exit status {status}"]
        if len(ended) != 1 or lines[-1] != ended[0]:
            wrong.append(f"it said: {' / '.join(lines[-3:])}")
        return ended[0].split(":")[0] if ended else "", wrong + self.check(chapters)


def one_kill(drill: Drill, kind: str) -> tuple[str, list[str]]:
    """Kill once and give the command again; when and where, and what is wrong then."""
    where = ""
    while not where:
        chapters = drill.forget()
        where = drill.disturb(kind, chapters)
    return where, drill.check(chapters)


def told(number: int, kills: int, kind: str, where: str, wrong: list[str], seconds: float) -> None:
    what = "; ".join(wrong) or "same tables, nothing left"
    print(f"{number:2}/{kills} {kind:11} {where}: {what} ({seconds:.0f} s)", flush=True)


def run_drill(drill: Drill, kills: int) -> int:
    """All kills and one interrupt, a line for each; how many went wrong."""
    began = time.monotonic()
    if wrong := drill.reference():
        print(f"the run without a kill failed: {'; '.join(wrong)}", flush=True)
        return 1
    minutes = (time.monotonic() - began) / 60
    print(f"without a kill: {len(drill.tables)} tables, {minutes:.1f} minutes", flush=True)
    kinds = [kind for _ in range(0, kills, len(KINDS)) for kind in drill.chances.sample(KINDS, 5)]
    failed = 0
    for number, kind in enumerate([*kinds[:kills], "interrupt"], 1):
        start = time.monotonic()
        act = drill.interrupt if kind == "interrupt" else lambda kind=kind: one_kill(drill, kind)
        where, wrong = act()
        failed += bool(wrong)
        told(number, kills + 1, kind, where, wrong, time.monotonic() - start)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{kills} kills and 1 interrupt, {kills + 1 - failed} taken up again with the same tables "
        f"and nothing left, {failed} not; {minutes:.1f} minutes",
        flush=True,
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--profile", default="smoke", help="of workflow/profiles")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssah-drill-") as name:
        folder = Path(name).resolve()
        copy_checkout(folder, options.profile)
        drill = Drill(folder, options.profile, random.Random(options.seed))
        try:
            return bool(run_drill(drill, options.kills))
        finally:
            os.chdir(ROOT)
            for process in drill.processes():  # only when it was stopped itself
                process.kill()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
