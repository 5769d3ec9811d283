"""Check figures against what their manifests say, from the repository's root.

    python workflow/verify.py [FOLDER ...]                          the hashes of all files
    python workflow/verify.py --chapter 03_attribution [--profile embedded]

The first form names files that are missing, changed or extra, and says what is behind each figure:
chapter, commit, parameters, data. Without folders it takes all of figures/. The second form runs a
chapter again, and those that it needs, with the manifest's parameters and in runs/PROFILE-verify;
then it compares the tables. A run that was stopped goes on with the same command. Exit status 1:
something differs, or a folder has no manifest; 2: nothing could be checked.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import yaml
from compare_runs import disagreements, show
from profile_values import ProfileError, notebooks
from run_config import config_of

from ssah_nb.engine.comparison import run_tables
from ssah_nb.engine.manifest import differences
from ssah_nb.engine.run import SsahError

OWN = "-verify"  # how the run of a chapter that is checked is called: PROFILE-verify


def read_manifest(folder: Path) -> dict:
    """What a folder's MANIFEST.json says. Raises `SsahError` when it cannot be read."""
    path = folder / "MANIFEST.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for part in manifest["chapters"].values():
            part["files"].items()
    except FileNotFoundError:
        raise SsahError(
            f"{folder} has no MANIFEST.json; give the figures folder of a run"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SsahError(f"{path} is no manifest ({type(error).__name__}); get it anew") from None
    return manifest


def commit_behind(part: dict, folder: Path) -> str:
    """The commit that the chapter ran at, else the one that brought its files here."""
    if part.get("commit"):
        return f"at {part['commit'][:12]}{'+changes' * part['commit'].endswith('+changes')}"
    command = ["git", "log", "-1", "--format=%h", "--", *part["files"]]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return "at an unknown commit"
    known = found.returncode == 0 and found.stdout.strip()
    return f"committed as {found.stdout.strip()}" if known else "at an unknown commit"


def in_words(value: object) -> str:
    """A parameter as it is typed, without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace('"', "")


def behind(folder: Path, manifest: dict) -> list[str]:
    """What is behind the figures, chapter by chapter, in lines."""
    data = [f"  data: {name} = {what}" for name, what in manifest.get("data", {}).items()]
    lines = data or ["  data: not in this manifest"]
    for chapter, part in manifest["chapters"].items():
        if not part["files"]:
            continue
        names = sorted({Path(name).stem for name in part["files"]})
        commit = commit_behind(part, folder)
        lines.append(f"  {chapter}, {commit}: {' '.join(names)}")
        own = {name: value for name, value in part["parameters"].items() if not name.isupper()}
        lines.append("    " + ", ".join(f"{name}={in_words(own[name])}" for name in sorted(own)))
        lines += [f"    remark: {part['remark']}"] if part.get("remark") else []
    return lines


def check(folder: Path) -> bool:
    """Print what differs in a folder, and what is behind its figures; whether nothing differs."""
    manifest = read_manifest(folder)
    found = differences(folder, manifest)
    count = sum(len(part["files"]) for part in manifest["chapters"].values())
    same = not any(found.values())
    print(f"{folder}: {count} files, {'all' if same else 'NOT all'} as MANIFEST.json says")
    for kind, names in found.items():
        for name in names:
            print(f"  {kind}: {name}")
    print("\n".join(behind(folder, manifest)))
    return same


def folders(named: list[Path]) -> list[Path]:
    """The folders to check: those that were named, else all under figures/."""
    found = named or sorted(path for path in Path("figures").glob("*/") if path.is_dir())
    found = [path for path in found if not path.name.endswith(OWN)]
    if not found:
        raise SsahError("no folder under figures/; give the figures folder of a run")
    return found


def check_all(found: list[Path]) -> int:
    """Check each folder; the exit status. One that cannot be checked is named on stderr."""
    same = []
    for folder in found:
        try:
            same.append(check(folder))
        except SsahError as error:
            print(f"error: {error}", file=sys.stderr)
    if not same:
        return 2
    return 0 if all(same) and len(same) == len(found) else 1


def settings_of(profile: str, manifest: dict) -> dict:
    """The profile of a run with the parameters of a manifest; what chapters lack is named."""
    settings = {"extends": profile, "common": {"profile": profile + OWN}}
    for chapter in notebooks():
        kept = manifest["chapters"].get(chapter, {}).get("parameters", {})
        has = papermill.inspect_notebook(f"nbs/{chapter}.ipynb").keys() - {"profile"}
        settings[chapter] = {name: value for name, value in kept.items() if name in has}
        if new := sorted(has - kept.keys()) if kept else []:
            print(f"{chapter}: the manifest does not know {', '.join(new)}: as the profile says")
    mixed = {part.get("parameters", {}).get("mixed") for part in manifest["chapters"].values()}
    if len(mixed - {None}) == 1:  # where the manifest's run multiplied in bfloat16, this one does
        settings["machine"] = {"mixed": (mixed - {None}).pop()}
    return settings


def run_again(profile: str, chapter: str, settings: dict) -> None:
    """Run a chapter and those before it as runs/PROFILE-verify. Raises `SsahError` if it fails."""
    name = profile + OWN
    path = Path(f"runs/{name}/profile.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "snakemake"]
    command += ["--workflow-profile", f"workflow/profiles/{profile}"]
    target = f"runs/{name}/notebooks/{chapter}.ipynb"
    command += ["--config", *config_of(profile, name), "--", target]
    ends_with = {"SSAH_MAKE": str(os.getpid())}
    done = subprocess.run(command, env=os.environ | ends_with)
    if done.returncode:
        raise SsahError(f"{chapter} could not be run again; the same command takes it up")


def tables_of(folder: Path, names: list[str]) -> dict:
    """Those tables of a run that have these names."""
    return {name: table for name, table in run_tables(folder).items() if name in names}


def check_chapter(profile: str, chapter: str) -> bool:
    """Run a chapter again and compare its tables; whether they agree."""
    known = sorted(path.parent.name for path in Path("workflow/profiles").glob("*/config.yaml"))
    if profile not in known:
        raise SsahError(f"unknown profile {profile!r}; known: {', '.join(known)}")
    folder, again = Path("figures") / profile, Path("figures") / (profile + OWN)
    manifest = read_manifest(folder)
    files = manifest["chapters"].get(chapter, {}).get("files", {})
    names = sorted(name.removesuffix(".csv") for name in files if name.endswith(".csv"))
    if chapter not in notebooks() or not names:
        which = [c for c in notebooks() if manifest["chapters"].get(c, {}).get("files")]
        raise SsahError(
            f"the manifest of {folder} has no tables of a chapter {chapter!r} that is here; "
            f"use one of: {', '.join(which) or 'none, as it is of older notebooks'}"
        )
    run_again(profile, chapter, settings_of(profile, manifest))
    first, second = tables_of(folder, names), tables_of(again, names)
    show(first, second)
    wrong = disagreements(first, second)
    print("\n".join(wrong) or f"{chapter}: {len(first)} tables agree with those of {folder}")
    shutil.rmtree(Path("runs") / again.name)
    if wrong:
        print(f"the new tables are in {again}")
    else:
        shutil.rmtree(again)
    return not wrong


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--chapter")
    parser.add_argument("--profile", default="embedded")
    options = parser.parse_args(arguments)
    try:
        if options.chapter:
            return 0 if check_chapter(options.profile, options.chapter) else 1
        return check_all(folders(options.folders))
    except (SsahError, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command takes it up again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
