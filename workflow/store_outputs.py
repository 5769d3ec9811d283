"""Run chapters with their default parameters and keep their outputs in nbs/.

    python workflow/store_outputs.py [CHAPTER ...]

Each code cell keeps the hash of its source beside its outputs, so that a test can tell when they
have grown apart.
"""

import hashlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from run_chapter import ENVIRONMENT
from profile_values import notebooks

HIDDEN = {"stderr"}  # progress bars and warnings of this machine


def source_hash(source: str) -> str:
    """What a stored output remembers of its cell."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def store(chapter: str) -> None:
    """Execute one chapter from the repository's root and write it back with its outputs."""
    path = Path(f"nbs/{chapter}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={}).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") not in HIDDEN]
        cell.execution_count = None
        for output in cell.outputs:
            output.pop("execution_count", None)
            if output.output_type == "execute_result":
                output.execution_count = None
        cell.metadata["source_hash"] = source_hash(cell.source)
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT, SSAH_PROGRESS="0", HF_HUB_OFFLINE="1")
    for name in sys.argv[1:] or notebooks():
        print(name, flush=True)
        store(name)
