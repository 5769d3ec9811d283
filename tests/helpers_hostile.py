"""Files that mean harm: seeded mutations of good ones, and what each door says to them.

    python tests/helpers_hostile.py SCRATCH DOOR ...

prints one JSON line for each case: before it is opened, and with its outcome. The doors themselves
are in `helpers_doors.py`.
"""

import faulthandler
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SECONDS, BYTES = 5, 2 << 30  # of one case: of the processor, and of memory
WAITING = 60  # seconds on the clock, for what waits and does not work
DEEP = "[" * 400 + "]" * 400
STRANGE = (
    *(None, True, -1, 0, 10**7, 10**30, 1e308, math.nan, math.inf, "x", "", "\ud800"),
    *([], {}, [None], [[[]]], {"a": 1}, [1, "a"], "../../outside", json.loads(DEEP)),
)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


class Door(NamedTuple):
    "One way into the library."

    make: Callable[[Path], object]  # writes good files into a folder
    use: Callable[[Path], object]  # loads them, uses what came out; what must be as it was
    files: dict[str, int]  # name -> how many random mutations
    special: dict[str, Callable[[Path], object]] = {}  # further damage, by name
    error: type = ValueError  # what it may raise; the child sets SsahError


def other_kinds(path: Path) -> dict[str, Callable[[], object]]:
    "What may stand under a name and is no plain file."
    return {
        "nothing": lambda: None,
        "empty": lambda: path.write_bytes(b""),
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "circle": lambda: path.symlink_to(path.name),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "page": lambda: path.write_text("<html><body>404 Not Found</body></html>\n"),
    }


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    "Cut, flipped, filled, doubled or inserted bytes."
    at, size = draw.randrange(len(data) + 1), draw.choice((1, 8, 64))
    noise = draw.randbytes(size)
    return draw.choice(
        (
            data[:at],
            data[:at] + noise + data[at + size :],
            data[:at] + noise + data[at:],
            data[:at] + b"\0" * size + data[at + size :],
            data[:at] + b"\xff" * size + data[at + size :],
            data + data[:at],
            b"\xef\xbb\xbf" + data[at:],
            data[at:],
        )
    )


def places(value, at=()) -> Iterator[tuple]:
    "The paths to all values in lists and dicts; of a long list only the first three."
    yield at
    inner = value.items() if isinstance(value, dict) else ()
    for key, part in enumerate(value[:3]) if isinstance(value, list) else inner:
        yield from places(part, (*at, key))


def changed_json(data: bytes, draw: random.Random) -> bytes:
    "One value is taken out, or replaced by something strange; keys of the top come more often."
    value = json.loads(data)
    paths = [p for p in places(value) if draw.random() < 0.5 or len(p) < 3] or [()]
    *way, last = draw.choice(paths) or (None,)
    if last is None:
        return json.dumps(draw.choice(STRANGE)).encode()
    inner = value
    for key in way:
        inner = inner[key]
    if draw.random() < 0.25:
        del inner[last]
    else:
        inner[last] = draw.choice(STRANGE)
    return json.dumps(value).encode()


def changed_tensors(data: bytes, draw: random.Random) -> bytes:
    "One entry of a safetensors header, its length, or the numbers of one tensor."
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    how = draw.randrange(10)
    if how == 0:
        return struct.pack("<Q", draw.choice((0, 1, 1 << 26, 1 << 62, length + 8))) + data[8:]
    if how == 1:
        entry["dtype"] = draw.choice(("F16", "BF16", "I32", "U8", "F64", "BOOL", "F8_E4M3", "X", 7))
    if how == 2:
        entry["shape"] = draw.choice(([], [0], [-1], [1 << 62, 4], [math.prod(entry["shape"])]))
    if how == 3:
        entry["shape"] = entry["shape"][::-1]
    if how == 4:
        entry["data_offsets"] = draw.choice(([0, 1 << 40], [end, start], [start, end + 8], "x"))
    if how == 5:
        header[draw.choice((name + "x", "evil", "7.before", "../x"))] = header.pop(name)
    if how == 6:
        entry[draw.choice(("dtype", "shape"))] = draw.choice(STRANGE[:16])
    if how == 7 and end - start >= 8:
        body[start : start + 8] = draw.choice((b"\xff" * 8, b"\0\0\x80\x7f" * 2, b"\0" * 8))
    if how == 8:
        body[start:end] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xBF, 0xFF))]) * (end - start)
    if how == 9:
        header["__metadata__"] = draw.choice(({"a": 1}, [], {"format": "tf"}, {"a": "b" * 99}))
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + bytes(body)


def mutations(door: Door, good: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    "The cases of a door: a name, which holds the seed, and what is done to a copy of the files."
    for name, count in door.files.items():
        for how in other_kinds(good / name):

            def stands(folder, name=name, how=how):
                (folder / name).unlink()
                other_kinds(folder / name)[how]()

            yield f"{name} is {how}", stands
        ways = [changed_bytes]
        ways += [changed_json] * 2 if name.endswith(".json") else []
        ways += [changed_tensors] * 3 if name.endswith(".safetensors") else []
        for seed in range(count):

            def changes(folder, name=name, way=ways[seed % len(ways)], seed=seed):
                draw = random.Random(f"{name} {seed}")
                (folder / name).write_bytes(way((folder / name).read_bytes(), draw))

            yield f"{name} {ways[seed % len(ways)].__name__} seed {seed}", changes
    yield from door.special.items()


WATCHED: list[bool] = []  # not empty while a case runs


class Hang(BaseException):
    "A case took too long."


def too_long(*_):
    raise Hang(f"over {SECONDS} s of work, or {WAITING} s")


def one(door: Door, folder: Path, good: object = None) -> dict:
    "The outcome of one case: error, loaded (with what a good file gives), or what went wrong."
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    start, found = time.process_time(), {}
    WATCHED.append(True)
    try:
        found["outcome"] = "loaded" if door.use(folder) == good else "loaded something else"
    except door.error as error:
        text = str(error)
        found["outcome"] = "error" if text and "\n" not in text else f"many lines: {text!r}"
        found["said"] = text.replace(str(folder), "")[:150]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found["outcome"] = f"{type(error).__name__}: {str(error)[:100]} ({where.filename[-50:]}"
        found["outcome"] += f":{where.lineno})"
    finally:
        WATCHED.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found | {"seconds": round(time.process_time() - start, 2)}


def watch(scratch: Path, broken: list[str]):
    "Note every write outside of the folder, every pickle that is opened, and all code from there."

    def hook(event: str, arguments: tuple):
        if not WATCHED:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            mode, flags = arguments[1:3]
            writes = (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else "w" in (mode or "")
            )
            outside(arguments[0], event) if writes else None
        elif event in ("os.mkdir", "os.truncate"):
            outside(arguments[0], event)
        elif event in ("os.rename", "os.symlink", "os.link"):
            outside(arguments[1], event)
        elif event == "pickle.find_class":
            broken.append(f"a pickle asks for {arguments}")
        elif event == "exec" and str(scratch) in getattr(arguments[0], "co_filename", ""):
            broken.append(f"ran {arguments[0].co_filename}")

    def outside(path: str | bytes, event: str):
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith((str(scratch), "/dev/")):
            broken.append(f"{event} {path}")

    sys.addaudithook(hook)


def main(scratch: Path, names: list[str]):
    "Try all cases of some doors, and print what became of each."
    from helpers_doors import DOORS

    faulthandler.enable()
    sys.dont_write_bytecode, broken = True, []
    good = {}
    for name in names:  # all is imported before the limits hold
        DOORS[name].make(scratch / name)
        good[name] = DOORS[name].use(scratch / name)
    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    watch(scratch, broken)
    for name in names:
        for case, damage in mutations(DOORS[name], scratch / name):
            print(json.dumps({"door": name, "case": case}), flush=True)
            folder = scratch / "case"
            shutil.copytree(scratch / name, folder)
            damage(folder)
            found = one(DOORS[name], folder, good[name])
            print(json.dumps({"door": name, "case": case, "broken": broken} | found), flush=True)
            broken.clear()
            shutil.rmtree(folder)
    left = sorted(p.name for p in scratch.iterdir())
    print(json.dumps({"left": left}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
