"""What several test files share."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def one_line(error) -> str:
    "The message of a raised error, which must be one line."
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    "The path, after the text was written there."
    path.write_text(text, encoding="utf-8")
    return path


def two_processes(script: str, *arguments: str) -> None:
    "Run a script as two processes of torch.distributed, on the CPU; both must end well."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(printed)
