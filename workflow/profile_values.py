"""What a profile says, looked at before anything runs.

A profile gives chapters their parameters, and says where they run. What it cannot say is a
`ProfileError`, one line with the file.
"""

import ast
import math
import os
import re
from pathlib import Path

import nbformat

from ssah_nb.engine.opening import MOST, parse_json, parse_yaml, read_text

BESIDE = ("protection",)  # pages that run as a chapter does

VALUES = {  # of machine:
    "device": (r"auto|cpu|spread|(cuda|mps|xpu)(:\d+)?", "auto, cpu, cuda, cuda:1 or spread"),
    "dtype": ("auto|float32|bfloat16|float16", "auto, float32, bfloat16 or float16"),
    "mixed": ("auto|true|false", "true, false or auto"),
    "at_once": (r"\d{1,4}", "a whole number; 0 means the default"),
}


class ProfileError(ValueError):
    """A profile that cannot be run; the message is one line."""


def chapters() -> list[str]:
    return sorted(path.stem for path in Path("nbs").glob("[0-9][0-9]_*.ipynb"))


def notebooks() -> list[str]:
    """The chapters, and the pages beside them that a profile may ask for."""
    return chapters() + [name for name in BESIDE if Path(f"nbs/{name}.ipynb").exists()]


def own_values(chapter: str) -> dict:
    """The parameters of a chapter with the values of its notebook."""
    cells = nbformat.read(f"nbs/{chapter}.ipynb", as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    lines = ast.parse(tagged[0] if tagged else "").body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def fits(value, own) -> bool:
    """Whether a parameter can have this value, where a chapter's own is `own`."""
    if isinstance(value, bool) and own in ("yes", "no", "auto"):
        return True  # YAML reads yes and no so
    if type(own) is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is type(own) and not (type(value) is int and value < 0)


def check_fits(where: str, name: str, value, own) -> None:
    """Raise `ProfileError` unless a parameter can have this value."""
    if fits(value, own):
        return
    number = type(value) is type(own) or (type(own) is float and type(value) is int)
    if number and type(own) in (int, float):
        raise ProfileError(f"{where}: {name} is {value!r}; give a number of at least 0")
    words = f"{where}: {name} is {value!r}, and the notebook has {own!r}; give a value of that kind"
    if isinstance(value, str) and isinstance(own, float):
        words += " (YAML reads 1e-3 as text: write 1.0e-3)"
    raise ProfileError(words)


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
    for name in settings.keys() & {"extends", "last"}:
        if not isinstance(settings[name], str | None):
            raise ProfileError(f"{path}: {name} is {settings[name]!r}; give one name")
    files = settings.get("model_files") or []
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ProfileError(f"{path}: model_files is {files!r}; give a list of paths")
    for name in settings.keys() - set(plain):
        inner = settings[name] or {}
        if not isinstance(inner, dict) or not all(isinstance(key, str) for key in inner):
            raise ProfileError(
                f"{path}: {name} holds no named values; write 'name: value' under it"
            )
    return settings


def read_profile(profile: str, extended: tuple[str, ...] = ()) -> dict:
    """The settings of a profile; with `extends: other`, what it does not say is as in the other.

    Its `common` parameters win over those that the other gives a chapter by name.
    """
    if not isinstance(profile, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", profile):
        raise ProfileError(f"{str(profile)[:40]!r} is no name of a profile")
    if profile in extended:
        raise ProfileError(f"profile {profile!r} extends itself; take 'extends' out of one of them")
    said = read_settings(profile_path(profile))
    settings = {name: value for name, value in said.items() if value is not None}
    other = settings.pop("extends", None)
    base = read_profile(other, (*extended, profile)) if other else {}
    common = (settings.get("common") or {}).keys()
    for chapter in base.keys() & set(notebooks()):
        base[chapter] = {k: v for k, v in (base[chapter] or {}).items() if k not in common}
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


def given_outside(known: dict[str, dict]) -> dict[str, dict]:
    """What `SSAH_PARAMETERS` says, by chapter. Raises `ProfileError` for what no chapter has."""
    said = os.environ.get("SSAH_PARAMETERS") or "{}"
    try:
        given = {chapter: dict(values) for chapter, values in parse_json(said).items()}
    except (ValueError, TypeError, AttributeError):
        example = '{"04_classes": {"seed": 2}}'
        raise ProfileError(
            f"SSAH_PARAMETERS={said[:40]!r} is not usable; give JSON such as {example}"
        ) from None
    check_parameters("SSAH_PARAMETERS", given, known)
    return given


def check_parameters(where: str, given: dict[str, dict], known: dict[str, dict]) -> None:
    """Raise `ProfileError` for a parameter that its chapter does not have, or of another kind."""
    for chapter, values in given.items():
        if chapter not in known:
            raise ProfileError(f"{where}: unknown chapter {chapter!r}; known: {', '.join(known)}")
        for name, value in values.items():
            if name not in known[chapter]:
                raise ProfileError(
                    f"{where}: {chapter} has no parameter {name!r}; "
                    f"it has: {', '.join(known[chapter]) or 'none'}"
                )
            check_fits(f"{where}: {chapter}", name, value, known[chapter][name])


def profile_parameters(profile: str) -> dict[str, dict]:
    """The parameters of every chapter: common ones, its own, and those of `SSAH_PARAMETERS`.

    `profile`, the name of the run, is always this profile's and never that of one it extends.
    """
    settings = read_profile(profile)
    check_name(profile)
    where = str(profile_path(profile))
    known = {chapter: own_values(chapter) for chapter in notebooks()}
    common = settings.get("common") or {}
    for name in common:
        if not any(name in names for names in known.values()):
            raise ProfileError(f"{where}: no chapter has the common parameter {name!r}")
    others = settings.keys() - {"hub", "common", "machine", "model_files", "last"}
    named = {chapter: settings[chapter] or {} for chapter in sorted(others)}
    check_parameters(where, named, known)
    outside, parameters = given_outside(known), {}
    for chapter, names in known.items():
        if outside.get(chapter, {}).get("profile", profile) != profile:
            raise ProfileError(f"SSAH_PARAMETERS: the run is called {profile!r}; leave profile out")
        shared = {name: value for name, value in common.items() if name in names}
        check_parameters(where, {chapter: shared}, known)
        own = {"profile": profile} if "profile" in names else {}
        parameters[chapter] = shared | named.get(chapter, {}) | outside.get(chapter, {}) | own
    check_source(where, settings, parameters)
    return parameters


def check_source(where: str, settings: dict, parameters: dict[str, dict]) -> None:
    """Raise `ProfileError` where data should come from the hub, and the run may not ask it."""
    for chapter, values in parameters.items():
        if values.get("source") == "hub" and not settings.get("hub"):
            raise ProfileError(f"{chapter} has source: hub; then say hub: true in {where}, too")


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
