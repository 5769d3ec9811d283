"""Run the smoke profile through a real Slurm on this machine, and compare it with a local run.

    python workflow/slurm.py [--profile smoke] [--cores N]

Two copies of the checkout are made in a temporary folder. The first runs the profile as
`make reproduce` does, the second through `--executor slurm` on a cluster of one node, which listens
on the loopback device only. Its controller is killed once while a chapter runs, and started again.
Both must end with the same tables, byte for byte. Nothing is installed, and all daemons end with
this script. After an error the folder stays, with all logs.
"""

import argparse
import ctypes
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = (
    *("munged", "slurmctld", "slurmd"),
    *("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo"),
)
NEEDED = {
    "programs": "on Debian: apt-get install slurm-wlm munge",
    "snakemake_executor_plugin_slurm": ".venv/bin/pip install -e '.[slurm]'",
}
SAVED = 10  # seconds after which slurmctld has surely saved what it knows of a job
STARTING, ENDING = 60, 10  # seconds that a daemon gets
FLAGS = (
    *("--executor", "slurm", "--jobs", "2", "--keep-going"),
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "4"),
    "--slurm-keep-successful-logs",
)
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={worker}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MinJobAge=3600
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SRUN = """\
#!/bin/sh
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""


class SlurmError(RuntimeError):
    """The test cannot go on; the message is one line."""


def missing() -> list[str]:
    """What is not installed here, and what installs it: one line each."""
    lacking = [program for program in PROGRAMS if not found(program)]
    lines = [f"not installed: {', '.join(lacking)} ({NEEDED['programs']})"] if lacking else []
    plugin = "snakemake_executor_plugin_slurm"
    if importlib.util.find_spec(plugin) is None:
        lines.append(f"not installed: {plugin.replace('_', '-')} ({NEEDED[plugin]})")
    return lines


def found(program: str) -> str | None:
    """Where a program is; daemons lie where only root's PATH leads."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


class Cluster:
    """Munge and Slurm on one node. `with Cluster(folder):` ends all daemons."""

    def __init__(self, folder: Path):  # of the configuration, the logs and the state
        self.folder, self.running = folder, {}
        for part in ("state", "spool", "bin"):
            (folder / part).mkdir()
        path = f"{folder}/bin:{os.environ['PATH']}"
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
        wrapper = folder / "bin/srun"  # as the plugin drops SLURM_CONF before it calls srun
        wrapper.write_text(SRUN.format(folder=folder, srun=found("srun")))
        wrapper.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        ports = {"controller": free_port(), "worker": free_port()}
        cpus = os.cpu_count()
        config = CONFIG.format(host=host, user=user, folder=folder, cpus=cpus, **ports)
        (folder / "slurm.conf").write_text(config)

    def start(self, daemon: str, *arguments: str) -> None:
        """Start a daemon in the foreground, as a child of this process."""
        with open(self.folder / f"{daemon}.out", "a") as out:
            self.running[daemon] = subprocess.Popen(
                [found(daemon), *arguments],
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
                preexec_fn=end_with_parent,
            )

    def start_controller(self) -> None:
        """Start slurmctld; it reads what the one before has saved."""
        self.start("slurmctld", "-D")
        self.wait_until(lambda: "is UP" in self.ask("scontrol", "ping"), "slurmctld answers")

    def __enter__(self):
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        places = [f"--{option}={self.folder}/{name}" for option, name in files.items()]
        try:
            self.start("munged", "--foreground", "--force", *places)
            self.wait_until((self.folder / "munge.socket").exists, "munged listens")
            self.start_controller()
            self.start("slurmd", "-D")
            self.wait_until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "the node idles")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.ask("scancel", "--user", getpass.getuser())
        until = time.monotonic() + ENDING
        while self.ask("squeue", "-h") and time.monotonic() < until:
            time.sleep(0.2)
        for daemon in reversed(self.running.values()):
            daemon.terminate()
        for daemon in self.running.values():
            try:
                daemon.wait(ENDING)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *command: str) -> str:
        """What a program of Slurm prints; nothing when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def wait_until(self, condition, words: str) -> None:
        """Wait. Raises `SlurmError` when a daemon ends, or after `STARTING` seconds."""
        until = time.monotonic() + STARTING
        while not condition():
            ended = [name for name, daemon in self.running.items() if daemon.poll() is not None]
            if ended or time.monotonic() > until:
                what = f"{ended[0]} has ended" if ended else f"{STARTING} seconds have passed"
                raise SlurmError(f"{what} before {words}; see the logs in {self.folder}")
            time.sleep(0.2)

    def kill_controller(self) -> str:
        """Kill slurmctld while a saved job runs, and start it again; the job's number, or ''."""
        lines = self.ask("squeue", "-h", "-t", "RUNNING", "-o", "%i %M").splitlines()
        for line in lines:
            job, seconds = line.split()
            minutes, _, seconds = seconds.rpartition(":")
            if minutes not in ("", "0") or int(seconds) >= SAVED:
                self.running["slurmctld"].kill()
                self.running["slurmctld"].wait()
                time.sleep(3)
                self.start_controller()
                return job
        return ""


def checkout(folder: Path) -> Path:
    """A copy of what git tracks, or does not ignore, in this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if Path(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
    return folder


def snakemake(folder: Path, profile: str, cores: int, flags: tuple, environment: dict):
    """Start a run of the profile in a copy; what it prints goes to the terminal."""
    command = [sys.executable, "-m", "snakemake", "--workflow-profile"]
    command += [f"workflow/profiles/{profile}", "--cores", str(cores), *flags]
    plain = {k: v for k, v in environment.items() if not k.startswith("MAKE")}
    return subprocess.Popen(command, cwd=folder, env=plain)


def tables(folder: Path, profile: str) -> dict[str, bytes]:
    """The tables of a run, by name."""
    return {p.name: p.read_bytes() for p in sorted((folder / f"figures/{profile}").glob("*.csv"))}


def run_on(cluster: Cluster, folder: Path, profile: str, cores: int) -> None:
    """Run the profile through Slurm and kill the controller once. Raises `SlurmError`."""
    killed, running = "", snakemake(folder, profile, cores, FLAGS, cluster.environment)
    try:
        while running.poll() is None:
            time.sleep(0.5)
            if not killed and (killed := cluster.kill_controller()):
                print(f"killed and restarted slurmctld while job {killed} ran", flush=True)
    finally:
        running.terminate()
    if running.returncode:
        raise SlurmError(f"the run through Slurm failed ({running.returncode}); see {folder}")
    if not killed:
        raise SlurmError(f"no job ran for {SAVED} seconds, so the controller was never killed")


def compare(local: dict[str, bytes], slurm: dict[str, bytes]) -> None:
    """Raise `SlurmError` unless both runs have the same tables."""
    differ = sorted(n for n in local.keys() | slurm.keys() if local.get(n) != slurm.get(n))
    if differ or not local:
        raise SlurmError(f"{len(differ)} of {len(local)} tables differ: {', '.join(differ)}")
    print(f"{len(local)} tables are the same, byte for byte")


def main(profile: str, cores: int, folder: Path) -> None:
    """Both runs, and their comparison. Raises `SlurmError`."""
    folder.chmod(0o755)  # munge asks for it
    local, remote = (checkout(folder / name) for name in ("local", "slurm"))
    if snakemake(local, profile, cores, (), os.environ).wait():
        raise SlurmError(f"the local run failed; see {local}")
    (folder / "cluster").mkdir()
    with Cluster(folder / "cluster") as cluster:
        run_on(cluster, remote, profile, cores)
    compare(tables(local, profile), tables(remote, profile))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if lacking := missing():
        sys.exit("\n".join(lacking))
    temporary = Path(tempfile.mkdtemp(prefix="ssah-slurm-"))
    try:
        main(options.profile, options.cores, temporary)
    except KeyboardInterrupt:
        sys.exit(130)
    except SlurmError as error:
        sys.exit(f"error: {error}")  # the logs stay
    shutil.rmtree(temporary)
