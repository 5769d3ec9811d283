"""The site and the chapters in a real browser: `make test-browser` (needs Debian's chromium)."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs/_build/html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make docs")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    serve = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def site_pages() -> list[str]:
    return sorted(
        str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts
    )


@pytest.mark.parametrize("name", site_pages())
def test_page_of_the_site(browser, site, name):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: answer.status >= 400 and wrong.append(answer.url))
    page.goto(f"{site}/{name}", wait_until="networkidle")
    pictures = page.eval_on_selector_all(
        "img", "all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
    )
    width = page.evaluate("document.documentElement.scrollWidth")
    formulas = page.eval_on_selector_all("mjx-merror", "all => all.length")
    page.close()
    assert not wrong and not pictures and width <= 1280 and formulas == 0, (wrong, pictures, width)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a copy of the notebooks, whose parameters are the smoke profile's."""
    sys.path.insert(0, str(ROOT / "workflow"))
    from profile_values import profile_parameters

    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    shutil.copy(ROOT / "settings.ini", folder)
    with contextlib.chdir(ROOT):
        parameters = json.dumps(profile_parameters("smoke"))
    environment = os.environ | {"SSAH_PARAMETERS": parameters, "SSAH_MIXED": "false"}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyter", "lab", *options, f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).read()
            break
        time.sleep(0.5)
    yield folder, f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


def code_cells(path: Path) -> list:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def save(page) -> None:
    """Save the notebook. JupyterLab may ask first, since its own autosave has touched the file."""
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1_500)
    overwrite = page.locator(".jp-Dialog button", has_text="Overwrite")
    if overwrite.count():
        overwrite.first.click()
        page.wait_for_timeout(1_000)


def run_all_cells(browser, url: str, path: Path) -> None:
    """Open a notebook, run all cells from the menu, and save it until each cell has run."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(url)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.wait_for_timeout(3_000)
    if page.locator(".jp-Dialog", has_text="Select Kernel").count():  # a server that just started
        page.locator(".jp-Dialog button", has_text="Select").last.click()
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        page.wait_for_timeout(3_000)
        save(page)
        cells = code_cells(path)
        if all(cell.execution_count for cell in cells) or errors_of(cells):
            break
    asked = page.locator(".jp-Dialog").all_inner_texts()
    page.close()
    assert not asked


def errors_of(cells: list) -> list[str]:
    return [output.evalue for c in cells for output in c.outputs if output.output_type == "error"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_in_jupyterlab(browser, lab, chapter):
    folder, address = lab
    path = folder / "nbs" / f"{chapter}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # what is found afterwards was made here
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
    url = f"{address}/lab/workspaces/{chapter}/tree/nbs/{path.name}"
    run_all_cells(browser, url, path)
    cells = code_cells(path)
    assert not errors_of(cells)
    assert all(cell.execution_count for cell in cells)
