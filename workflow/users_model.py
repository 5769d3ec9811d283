"""A run on a model of the user's, from the repository's root.

    python workflow/users_model.py check PROFILE MODEL [NAME] [ALIGNED]

MODEL is a hub id, a folder with safetensors, or a .gguf file. It is looked at before anything runs.
Then runs/PROFILE-NAME/profile.yaml is written: the profile with this model. What is wrong is one
line, and exit status 2. With `name` for `check`, PROFILE-NAME is printed and nothing else is done.
"""

import re
import struct
import sys
from pathlib import Path

import yaml
from one_run import write_whole
from profile_values import ProfileError, profile_path, read_settings

from ssah_nb.engine.opening import MOST_HEADER, open_plain, parse_json
from ssah_nb.engine.opening import PICKLES, TOKENIZERS, plain_size, read_json

OWN = ("embedded", "aligned", "tiny")  # names that the library knows
TAKEN_AS = ("auto", "yes", "no")  # ALIGNED=: does the model refuse already


def run_name(profile: str, model: str, name: str = "") -> str:
    """PROFILE-NAME; without NAME, it is the model's file, folder or hub name, cleaned."""
    if not model:
        raise ProfileError("NAME and ALIGNED are about a model of yours; name it: MODEL=...")
    if not name:
        folder = Path(model).expanduser()
        last = folder.resolve().name if folder.exists() else folder.name
        last = last.removesuffix(".gguf")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "model"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ProfileError(f"NAME={name!r} is no folder name; use letters, digits, '.', '_', '-'")
    return f"{profile}-{name}"


def check_gguf(path: Path) -> None:
    """Raise `ProfileError` unless it is a file that begins as GGUF does."""
    if not path.is_file():
        raise ProfileError(f"MODEL: no file {path}; check the path")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ProfileError(f"MODEL: {path} is no GGUF file; fetch it again")


def check_safetensors(path: Path) -> None:
    """Raise `ProfileError` unless the file is as long as its header says."""
    size, length, end = 0, 0, None
    try:
        size = plain_size(path)
        with open_plain(path, size) as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = parse_json(f.read(length).decode()) if length < min(size, MOST_HEADER) else {}
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        pass
    if end is None or 8 + length + end != size:
        raise ProfileError(f"MODEL: {path} is not a whole safetensors file; fetch it again")


def check_weights(files: set[str], where: str) -> None:
    """Raise `ProfileError` unless the names of a folder's files hold a model in safetensors."""
    if "adapter_config.json" in files and "config.json" not in files:
        raise ProfileError(
            f"MODEL: {where} holds an adapter; merge it into its model and save that"
        )
    if "config.json" not in files:
        raise ProfileError(f"MODEL: {where} has no config.json; give the folder of a saved model")
    if not TOKENIZERS & files:
        raise ProfileError(
            f"MODEL: {where} has no tokenizer; save the model's tokenizer there, too"
        )
    if any(file.endswith(".safetensors") for file in files):
        return
    pickled = sorted(file for file in files if file.endswith(PICKLES))
    if pickled:
        raise ProfileError(
            f"MODEL: {where} has its weights pickled only ({pickled[0]}), and a pickle can run "
            "any code; save it with save_pretrained(..., safe_serialization=True)"
        )
    raise ProfileError(f"MODEL: {where} has no .safetensors file; give the folder of a saved model")


def check_folder(folder: Path) -> list[Path]:
    """The weight files of a folder. Raises `ProfileError` for one that is not whole."""
    check_weights({path.name for path in folder.iterdir()}, str(folder))
    try:
        config = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        parts = map(str, read_json(index)["weight_map"].values()) if index.exists() else ()
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ProfileError(
            f"MODEL: {folder} cannot be read ({type(error).__name__}); save it again"
        ) from None
    if "model_type" not in config:
        raise ProfileError(f"MODEL: {folder}/config.json has no model_type; save the model again")
    if "ssah_kept" in config:
        raise ProfileError(f"MODEL: {folder} is a pruned model; give the whole one")
    if lacking := sorted(set(parts) - {path.name for path in folder.iterdir()}):
        raise ProfileError(f"MODEL: {folder} lacks {lacking[0]}; fetch it again")
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        check_safetensors(path)
    return files


def check_hub(name: str) -> None:
    """Raise `ProfileError` unless the hub, or its cache here, has the model in safetensors."""
    import huggingface_hub  # here, as no other kind of model needs it

    nothing = f"MODEL: no folder or .gguf file {name!r} here, and no such model on the hub"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise ProfileError(f"MODEL: no folder {name!r}; check the path")
    try:
        kept = huggingface_hub.try_to_load_from_cache(name, "config.json")
        folder = Path(kept).parent if isinstance(kept, str) else None
        files = {path.name for path in folder.iterdir()} if folder else set()
        if not any(file.endswith(".safetensors") for file in files):  # not all of it is there
            found = huggingface_hub.HfApi().model_info(name, timeout=10)
            files = {file.rfilename for file in found.siblings or []}
    except Exception as error:  # no network, no such model, no access, an id that is none
        reason = str(error).strip().partition("\n")[0][:120]
        raise ProfileError(f"{nothing} ({type(error).__name__}: {reason})") from None
    check_weights(files, f"the hub's {name}")


def check_model(model: str) -> list[str]:
    """The weight files of a model that is here, else []. Raises `ProfileError` for a bad one."""
    path = Path(model).expanduser()
    if model in OWN:
        return []
    if path.suffix == ".gguf":
        check_gguf(path)
        return [str(path)]
    if path.is_dir():
        return [str(file) for file in check_folder(path)]
    if path.exists():
        raise ProfileError(f"MODEL: {path} is neither a folder nor a .gguf file")
    check_hub(model)
    return []


def own_profile(profile: str, model: str, files: list[str], aligned: str, run: str) -> dict:
    """The settings of the run: those of the profile, but for the model."""
    on_hub = not files and model not in OWN
    name = model if on_hub or model in OWN else str(Path(model).expanduser())
    return {
        "extends": profile,
        **({"hub": True} if on_hub else {}),
        "model_files": files,
        "common": {"profile": run},
        "00_start": {"model_name": name, "revision": "", "aligned_model": "", "aligned": aligned},
        "02_probe": {"aligned_model": ""},
    }


def check_same_model(run: str, name: str) -> None:
    """Raise `ProfileError` when another model has a run of this name."""
    path = Path(f"runs/{run}/profile.yaml")
    if not path.exists():
        return
    earlier = (read_settings(path).get("00_start") or {}).get("model_name", "another model")
    if earlier != name:
        raise ProfileError(
            f"runs/{run} is a run on {earlier}; give this one another name: NAME=..."
        )


def prepare(profile: str, model: str, name: str = "", aligned: str = "") -> str:
    """Check the model and write the run's own profile; the run's name. Raises `ProfileError`."""
    profile_path(profile)
    aligned = aligned or "auto"
    if aligned not in TAKEN_AS:
        raise ProfileError(f"ALIGNED={aligned!r} is none of {', '.join(TAKEN_AS)}")
    run = run_name(profile, model, name)
    if Path(f"workflow/profiles/{run}").exists():
        raise ProfileError(f"{run} is a profile; give this run another name: NAME=...")
    settings = own_profile(profile, model, check_model(model), aligned, run)
    check_same_model(run, settings["00_start"]["model_name"])
    path = Path(f"runs/{run}/profile.yaml")
    text = yaml.safe_dump(settings, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_whole(path, text)
    return run


def main(what: str, profile: str, model: str, name: str = "", aligned: str = "") -> None:
    try:
        if what == "check":
            prepare(profile, model, name, aligned)
        else:
            print(run_name(profile, model, name))
    except (ProfileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
