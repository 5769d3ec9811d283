"""What several test files share."""

import contextlib
import resource
from pathlib import Path


@contextlib.contextmanager
def files_at_most(size: int):
    "The operating system refuses to make a file longer than so many bytes: a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


PROMPTS = [  # of unlike and of equal lengths
    "Hi",
    "Name three colours, please",
    "Sum 2 and 3",
    "Tell a story about a fox and a hen",
    "Hm?",
    "Sum 4 and 3",
]


def one_line(error) -> str:
    "The message of a raised error, which must be one line."
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    "The path, after the text was written there."
    path.write_text(text, encoding="utf-8")
    return path
