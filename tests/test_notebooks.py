"""What the bars of a readable chapter are, and what stored outputs must not hold."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from helpers_notebooks import (
    drawings,
    errors,
    for_the_reader,
    formulas,
    images,
    kept_responses,
    lengths,
    longest,
    output_texts,
    places,
    prose_share,
    published,
    read,
    repeated,
    said_by_models,
    shown_completions,
    shown_share,
    sources,
    stale_cells,
    typed_runs,
    untyped,
)
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from clean_notebooks import KERNEL, clean
from store_outputs import source_hash

from ssah_nb.engine.alignment import STOCK_REFUSALS

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
PAGES = sorted(
    path for path in NBS.glob("engine/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
NOTEBOOKS = [*CHAPTERS, NBS / "index.ipynb", NBS / "protection.ipynb", *PAGES]
EXECUTED = sorted((ROOT / "runs/embedded/notebooks").glob("[0-9][0-9]_*.ipynb"))  # the site's


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=named)
each_page = pytest.mark.parametrize("path", PAGES, ids=named)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
each_output = pytest.mark.parametrize("path", NOTEBOOKS + EXECUTED, ids=named)


# A chapter teaches


def test_there_are_ten_chapters():
    assert [path.stem[:2] for path in CHAPTERS] == "00 01 02 03 04 05 06 07 08 09".split()


@each_chapter
def test_a_chapter_explains_more_than_it_computes(path):
    notebook = read(path)
    assert prose_share(notebook) >= 0.8
    assert formulas(notebook) >= 2 or drawings(notebook) >= 1


@each_chapter
def test_a_chapter_goes_in_small_steps(path):
    median, most = lengths(read(path))
    assert median <= 8 and most <= 25


@each_chapter
def test_a_chapter_shows_what_it_does(path):
    assert shown_share(read(path)) >= 0.6


@each_chapter
def test_a_chapter_opens_with_its_claim(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# .+\n+> .+", first.source)


@each_notebook
def test_the_claim_fits_its_line_and_so_the_docstring_of_its_module(path):
    lines = [line for line in read(path).cells[0].source.splitlines() if line.startswith("> ")]
    assert not lines or lines[0].endswith((".", ".)", "?"))


@each_page
def test_an_engine_page_says_what_it_is_for(path):
    assert prose_share(read(path)) >= 0.2


@each_notebook
def test_no_cell_is_long(path):
    assert longest(read(path)) <= 25


# What is stored is what the source gives


@each_notebook
def test_no_cell_changed_after_its_output_was_stored(path):
    assert not stale_cells(read(path), source_hash)


@each_notebook
def test_jupyter_knows_the_kernel(path):
    """With another display name JupyterLab asks for a kernel when it opens the notebook."""
    assert read(path).metadata.kernelspec == KERNEL


def test_cleaning_keeps_the_kernel_and_what_is_clean(tmp_path):
    path, again = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    notebook = made_up(printed("1"))
    notebook.metadata = {"kernelspec": KERNEL | {"display_name": "mine"}, "toc": {}}
    notebook.cells[1].metadata |= {"execution": {"started": "now"}, "tags": ["benign"]}
    nbformat.write(notebook, path)
    assert clean(path)
    assert read(path).metadata == {"kernelspec": KERNEL}
    assert set(read(path).cells[1].metadata) == {"source_hash", "tags"}
    again.write_bytes(path.read_bytes())
    assert not clean(again) and again.read_bytes() == path.read_bytes()


@each_notebook
def test_every_picture_is_there(path):
    missing = [
        address
        for address in images(read(path))
        if not address.startswith(("http:", "https:", "data:"))
        and not (path.parent / address).is_file()
    ]
    assert not missing


@each_output
def test_no_output_holds_a_path_of_this_machine_or_an_error(path):
    notebook = read(path)
    assert not places(output_texts(notebook))
    assert not errors(notebook)


# No completion of a harmful prompt is shown


def typed_texts() -> list[str]:
    "What people wrote: the sources of notebooks and modules, and what models learned to say."
    cells = [
        s for path in NOTEBOOKS for kind in ("code", "markdown") for s in sources(read(path), kind)
    ]
    tables = [path.read_text() for path in (ROOT / "ssah_nb").glob("*.csv")]
    return cells + tables + list(STOCK_REFUSALS)


@pytest.fixture(scope="module")
def typed() -> list[str]:
    return typed_texts()


def test_nothing_repeats_a_response_that_was_kept(typed):
    "`pytest tests/test_notebooks.py -k repeats`: in outputs, logs, tables, drawings and the site."
    if not kept_responses(ROOT)[1]:
        pytest.skip("no run on this machine has kept responses")
    assert not shown_completions(ROOT, typed)


def test_no_output_holds_a_sentence_that_nobody_typed(typed):
    """Also where no run has kept what models said.

    Of 50 answers of the embedded model to harmful prompts the check finds 42, each by itself. A
    cell that shows a benign prompt or its answer has the tag `benign`.
    """
    known = typed_runs(typed)
    shown = {named(path): output_texts(read(path), "benign") for path in NOTEBOOKS + EXECUTED}
    shown |= {name: texts for name, texts in published(ROOT).items() if name.endswith(".csv")}
    found = {name: untyped(texts, known) for name, texts in shown.items()}
    assert not {name: pieces for name, pieces in found.items() if pieces}


# The checks themselves, on made-up notebooks

RESPONSE = "To open the forbidden box you first take a long lever and then you push it down hard"


def made_up(*outputs, source="show(table)", prose="Some words about it."):
    notebook = new_notebook()
    cell = new_code_cell(
        source, outputs=list(outputs), metadata={"source_hash": source_hash(source)}
    )
    notebook.cells = [new_markdown_cell(prose), cell]
    return notebook


def printed(text: str):
    return new_output("stream", name="stdout", text=text)


def table(*cells: str):
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    html = f"<style scoped>td {{vertical-align: top; }}</style><table><tr>{row}</tr></table>"
    return new_output("execute_result", data={"text/html": html, "text/plain": "  ".join(cells)})


def image(address: str) -> str:
    return f"![a drawing]({address})"


@pytest.mark.parametrize(
    "output, whole",
    [
        (printed(f"answer: {RESPONSE}"), True),
        (table("prompt", RESPONSE.upper()), True),
        (table("prompt", RESPONSE.replace("forbidden", "<b>forbidden</b>")), True),
        (table("prompt", RESPONSE[:50] + "..."), False),
        (printed(RESPONSE.replace(" a ", "\na ")), False),
    ],
)
def test_a_completion_is_found(output, whole):
    texts, typed = output_texts(made_up(output)), ["typed by a person"]
    assert repeated(texts, said_by_models([RESPONSE], typed))
    if whole:  # then also on a machine that has kept no responses
        assert untyped(texts, typed_runs(typed))


GIBBERISH = "\x17\x0c\x18\x19M\x7f\x04X" * 3  # what a tiny random model says


@pytest.mark.parametrize("said", [RESPONSE, GIBBERISH])
@pytest.mark.parametrize(
    "place",
    [
        "nbs/00_start.ipynb",
        "nbs/engine/chat.ipynb",
        "runs/smoke/notebooks/00_start.ipynb",
        "runs/smoke/logs/00_start.log",
        "figures/smoke/table.csv",
        "figures/smoke/table.svg",
        "docs/_build/html/00_start.html",
        "README.md",
    ],
)
def test_a_completion_is_found_wherever_it_is_shown(place, said, tmp_path):
    kept = tmp_path / "runs/smoke/completions/harmful_pairs/a.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"notice": "", "pairs": [{"prompt": "Open", "response": said}]}))
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    for words, found in ((f"answer: {said} (no refusal)", True), (said[:10], False)):
        content = nbformat.writes(made_up(printed(words)))
        path.write_text(content if path.suffix == ".ipynb" else f"<td>{words}</td>")
        assert (place in shown_completions(tmp_path, ["answer:"])) is found


@pytest.mark.parametrize(
    "output, response",
    [
        (printed("To open the forbidden ..."), RESPONSE),  # its first words
        (printed(STOCK_REFUSALS[0]), STOCK_REFUSALS[0]),  # what people typed
        (table("without SCU", "98 (93 to 99)", "12.1"), RESPONSE),
        (printed("Pruning 54 units raises attack success from 2 % to 98 % here."), RESPONSE),
    ],
)
def test_what_is_no_completion_is_left_alone(output, response):
    typed = [
        *STOCK_REFUSALS,
        "f'Pruning {n} units raises attack success from {a:.0%} to {b} here.'",
    ]
    texts = output_texts(made_up(output))
    assert not repeated(texts, said_by_models([response], typed))
    assert not untyped(texts, typed_runs(typed))


@pytest.mark.parametrize(
    "text",
    [
        *(f"in /{folder}/project/x.csv" for folder in ("work", "root", "opt", "Users")),
        "'/home/ann/runs'",
        "file:///tmp/x",
        "a/site-packages/b",
    ],
)
def test_a_path_is_found_in_whatever_kind_of_output(text):
    svg = new_output("display_data", data={"image/svg+xml": f"<svg><text>{text}</text></svg>"})
    for output in (printed(f"saved {text}"), table(text), svg):
        assert places(output_texts(made_up(output)))


def test_what_is_no_path_of_a_machine_is_left_alone():
    picture = new_output(
        "display_data", data={"image/png": "/".join(["iVBO", "work", "tmp", "root", "A"])}
    )
    web = "see https://example.org/home/page and runs/alone/figures, 3/4 or a/tmp"
    assert not places(output_texts(made_up(picture, printed(web))))


def test_an_error_is_found():
    failed = new_output("error", ename="ValueError", evalue="no", traceback=["..."])
    assert errors(made_up(failed)) == ["ValueError"]
    assert errors(made_up(printed("Traceback (most recent call last):\n  ...")))
    assert not errors(made_up(printed("fine")))


def test_a_changed_cell_is_found():
    notebook = made_up(printed("1"))
    assert not stale_cells(notebook, source_hash)
    notebook.cells[1].source += "  # changed"
    assert stale_cells(notebook, source_hash) == ["show(table)  # changed"]
    del notebook.cells[1].metadata["source_hash"]
    assert stale_cells(notebook, source_hash)  # an output of unknown origin
    notebook.cells[1].outputs = []
    assert not stale_cells(notebook, source_hash)


def test_the_bars_are_measured_as_they_are_meant():
    notebook = made_up(
        prose=r"The score is $a$, and $$b = \frac{1}{2}$$ " + image("drawings/x.svg")
    )
    assert (formulas(notebook), drawings(notebook), images(notebook)) == (2, 1, ["drawings/x.svg"])
    assert prose_share(made_up(source="x" * 10, prose="y" * 8)) == 0.8
    assert lengths(made_up(source="a = 1\nb = 2\n\nc = 3")) == (4, 4)
    with_parameters = "def f(\n    a: int,  # one\n    *b,  # two\n    c=3,  # three\n):\n    pass"
    assert longest(made_up(source=with_parameters)) == 3
    assert formulas(made_up(prose="`$HOME` costs 5 $")) == 0

    shown = made_up(printed("1"))
    shown.cells += [
        new_code_cell("import a\nfrom b import c"),
        new_code_cell("#| export\ndef f(): ..."),
        new_code_cell("seed = 1  # seed", metadata={"tags": ["parameters"]}),
        new_code_cell("assert f() == 1"),
    ]
    assert [cell.source for cell in for_the_reader(shown)] == ["show(table)", "assert f() == 1"]
    assert shown_share(shown) == 0.5


def test_made_up_notebooks_are_valid():
    nbformat.validate(made_up(printed("1"), table("a", "b")))
