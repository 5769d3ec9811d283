"""What is shipped: built, installed where no checkout is, and used. `make test-install`."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.install]

ON_TINY = {  # what README's block says -> the same with no download and a random model
    'load_model("aligned")': 'load_model("tiny")',
    "ssah.embedded_splits()": "make_splits(toy_harmful(), toy_benign(), sizes=TOY_SIZES)",
    '{"response": a}': '{"response": "I cannot do that."}',
    " if ssah.is_refusal(a)]": "]",
}
FIRST = """
import sys
from pathlib import Path

import ssah_nb
from ssah_nb.engine.claims import read_claims
from ssah_nb.engine.contrast import contrast_prompts
from ssah_nb.engine.data import toy_benign, toy_harmful
from ssah_nb.engine.run import begin
from ssah_nb.engine.splits import TOY_SIZES, make_splits
from ssah_nb.report import paper_numbers

assert Path(sys.prefix) in Path(ssah_nb.__file__).parents, ssah_nb.__file__
assert Path(ssah_nb.__file__).with_name("py.typed").exists()
assert all(getattr(ssah_nb, name) is not None for name in dir(ssah_nb))
assert len(read_claims()) and len(paper_numbers()) and len(contrast_prompts()[0])
run = begin("mine", {"profile": "alone"})
assert run.folder == Path.cwd() / "runs/alone"
"""
LAST = """
assert ssah.UnitMap.from_pretrained("runs/my-units").scu == units.scu
"""


def on_tiny() -> str:
    "README's library block, with a tiny model and toy data."
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    for old, new in ON_TINY.items():
        assert block.count(old) == 1, f"README's block changed: {old} is not there once"
        block = block.replace(old, new)
    return FIRST + block + LAST


def run(*command: str | Path, folder: Path) -> str:
    "The output of a command that must end well, started in a folder."
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=3600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def files_of(folder: str) -> set[str]:
    "The files of a folder of this checkout, but for what Python and Jupyter leave there."
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    left = ("__pycache__", ".ipynb_checkpoints", "runs")
    return {str(path.relative_to(ROOT)) for path in files if not set(left) & set(path.parts)}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> dict[str, Path]:
    "The wheel and the source distribution of this checkout."
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_holds_the_package_and_the_sdist_its_sources_and_tests(shipped):
    wheel = zipfile.ZipFile(shipped["wheel"]).namelist()
    assert {name for name in wheel if ".dist-info/" not in name} == files_of("ssah_nb")
    with tarfile.open(shipped["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of("ssah_nb") | files_of("nbs") | files_of("tests") <= names
    assert {"README.md", "LICENSE", "Makefile", "requirements.lock", "settings.ini"} <= names
    assert not {name for name in names if name.startswith(("figures", "runs", "docs/_build"))}


@pytest.fixture(scope="module", params=PYTHONS)
def environment(request, tmp_path_factory) -> Path:
    "The Python of a new virtual environment, of each release that is on the path."
    python = shutil.which(f"python{request.param}")
    works = python and subprocess.run([python, "-c", "import ensurepip, venv"]).returncode == 0
    if not works:
        pytest.skip(f"no python{request.param} with venv on the path")
    folder = tmp_path_factory.mktemp(f"python{request.param}")
    run(python, "-m", "venv", folder, folder=folder)
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_library_block_of_the_readme_runs_where_it_was_installed(
    environment, shipped, kind, tmp_path
):
    pip = [environment, "-m", "pip", "install", "-q"]
    run(*pip, shipped[kind], folder=tmp_path)  # and what it needs
    run(*pip, "--force-reinstall", "--no-deps", shipped[kind], folder=tmp_path)
    assert "Estimate(value=" in run(environment, "-I", "-c", on_tiny(), folder=tmp_path)
