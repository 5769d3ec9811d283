"""Take out of every notebook what does not belong into git: `python workflow/clean_notebooks.py`.

It is `nbdev_clean`, but the kernel keeps the name that Jupyter knows. With another name JupyterLab
asks for a kernel when it opens a notebook. A notebook that is clean stays as it is, so that no
chapter counts as edited.
"""

from pathlib import Path

from execnb.nbio import read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config

KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def clean(path: Path) -> bool:
    """Clean one notebook; whether it was changed."""
    before, notebook = path.read_text(encoding="utf-8"), read_nb(path)
    settings, kept = get_config(), "allowed_cell_metadata_keys"
    clean_nb(notebook, clean_ids=settings.clean_ids, **{kept: settings[kept].split()})
    notebook.metadata["kernelspec"] = KERNEL
    write_nb(notebook, path)
    return path.read_text(encoding="utf-8") != before


def main() -> None:
    for path in sorted(Path("nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            clean(path)


if __name__ == "__main__":
    main()
