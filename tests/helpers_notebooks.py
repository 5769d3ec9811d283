"""What a notebook shows, and what it must not show."""

import ast
import csv
import html
import io
import json
import re
import statistics
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import nbformat

PICTURES = ("image/png", "image/jpeg")  # base64: no text to read
PLACES = re.compile(
    r"(?<![\w.])/(work|root|home|tmp|usr|opt|var|mnt|Users)/|(?<!\w)/(root|tmp|work)\b"
    r"|site-packages|\b[A-Z]:\\\w"
)
SPOKEN = re.compile(r"""["'“‘(]*[^\W\d_]+(?:['’-][^\W\d_]+)*[.,;:!?"'”’)…]*""")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


# What a chapter is made of


def sources(notebook, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def prose_share(notebook) -> float:
    "Characters of prose for each character of code."
    code = sum(map(len, sources(notebook, "code")))
    return sum(map(len, sources(notebook, "markdown"))) / code


def formulas(notebook) -> int:
    text = "\n\n".join(re.sub(r"`[^`]*`", "", s) for s in sources(notebook, "markdown"))
    displayed = re.findall(r"\$\$.+?\$\$", text, re.S)
    return len(displayed) + len(
        re.findall(r"\$[^$\n]+\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.S))
    )


def images(notebook) -> list[str]:
    "The addresses of the pictures in its prose."
    text = "\n".join(sources(notebook, "markdown"))
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(
        r"<img[^>]+src=\"([^\"]+)", text
    )


def drawings(notebook) -> int:
    return sum(address.endswith(".svg") for address in images(notebook))


def only_imports(source: str) -> bool:
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in statements)


def for_the_reader(notebook) -> list[nbformat.NotebookNode]:
    "Code cells that are neither imports nor exports nor parameters."
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code"
        and not cell.source.startswith("#|")
        and "parameters" not in cell.metadata.get("tags", [])
        and not only_imports(cell.source)
    ]


def shown_share(notebook) -> float:
    cells = for_the_reader(notebook)
    return sum(bool(cell.outputs) for cell in cells) / len(cells)


def lengths(notebook) -> tuple[float, int]:
    "Lines of code cells: the median and the longest."
    lines = [len(source.splitlines()) for source in sources(notebook, "code")]
    return statistics.median(lines), max(lines)


PARAMETER = re.compile(r" +\*{0,2}\w+(: .+)?( = .+|=.+)?,  # .+")


def longest(notebook) -> int:
    "Lines of the longest code cell; a parameter with its explanation is not counted."
    cells = (source.splitlines() for source in sources(notebook, "code"))
    return max(sum(not PARAMETER.fullmatch(line) for line in lines) for lines in cells)


# What it must not show


def output_texts(notebook, without: str = "") -> list[str]:
    "Everything in the outputs that can be read as text, but for cells with a tag."
    found = []
    for cell in notebook.cells:
        if without in cell.metadata.get("tags", []):
            continue
        for output in cell.get("outputs", []):
            data = {k: v for k, v in output.get("data", {}).items() if k not in PICTURES}
            found += [str(value) for value in data.values()]
            found += [output.get("text", ""), output.get("evalue", "")]
            found += output.get("traceback", [])
    return [text for text in found if text]


def places(texts: Iterable[str]) -> list[str]:
    "Absolute paths, with what stands around them."
    return [
        text[max(0, m.start() - 20) : m.end() + 20] for text in texts for m in PLACES.finditer(text)
    ]


def errors(notebook) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    names = [output.ename for output in outputs if output.output_type == "error"]
    return names + [t[:80] for t in output_texts(notebook) if "Traceback (most recent" in t]


def stale_cells(notebook, source_hash) -> list[str]:
    "The first lines of cells that changed after their output was stored, or whose hash is missing."
    return [
        cell.source[:60]
        for cell in notebook.cells
        if cell.cell_type == "code"
        and (cell.outputs or "source_hash" in cell.metadata)
        and cell.metadata.get("source_hash") != source_hash(cell.source)
    ]


def words(text: str) -> list[str]:
    "Lower-case words, without tags, numbers and punctuation."
    return [w.lower().replace("’", "'") for w in WORD.findall(html.unescape(text))]


def runs(text: str, size: int) -> set[tuple[str, ...]]:
    "All runs of so many words."
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}


def said_by_models(responses: Iterable[str], typed: Iterable[str]) -> set[tuple[str, ...]]:
    """The runs of 6 words of responses.

    What people typed is no response, also where a model has learned to say it: stock refusals.
    """
    sentences = [said for said in responses if len(said.split()) >= 6]  # no gibberish in one piece
    said = set().union(*(runs(response, 6) for response in sentences))
    return said - set().union(*(runs(text, 6) for text in typed))


def repeated(texts: Iterable[str], said: set[tuple[str, ...]]) -> set[str]:
    "Runs of 6 words of a response that a text repeats."
    shown = set().union(*(runs(text, 6) for text in texts))
    return {" ".join(run) for run in said & shown}


def pieces(text: str) -> list[str]:
    "The lines and table cells of an output, without its tags."
    text = re.sub(r"<style.*?</style>|<script.*?</script>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"</?(td|th|tr|p|li|div|pre|br|title|desc)\b[^>]*>|\s{2,}", "\n", text)
    return [re.sub(r"<[^>]+>", "", line) for line in text.splitlines()]


def spoken(text: str) -> list[str]:
    "Its words as they stand in a sentence; numbers, names of variables and paths are none."
    return words(
        " ".join(token for token in html.unescape(text).split() if SPOKEN.fullmatch(token))
    )


def typed_runs(typed: Iterable[str]) -> set[tuple[str, ...]]:
    "All runs of three words that people typed, with and without what braces fill in."
    filled = [re.sub(r"\{[^{}\n]*\}", " ", text) for text in typed]
    return set().union(*(runs(text, 3) for text in [*typed, *filled]))


def untyped(texts: Iterable[str], known: set[tuple[str, ...]], most: int = 10) -> list[str]:
    "Lines and table cells with more different words than `most` outside of the known runs."
    found = []
    for piece in (piece for text in texts for piece in pieces(text)):
        said = spoken(piece)
        covered = set()
        for i in range(len(said) - 2):
            if tuple(said[i : i + 3]) in known:
                covered |= set(range(i, i + 3))
        if len({word for i, word in enumerate(said) if i not in covered}) > most:
            found.append(piece.strip())
    return found


# Where a completion could be seen


def kept_responses(root: Path) -> tuple[list[str], list[str]]:
    "The harmful prompts, and what models answered to them, as far as this machine has kept it."
    pairs = []
    for path in root.glob("runs/*/completions/**/*.json"):
        kept = json.loads(path.read_text())
        pairs += kept.get("harmful", [])
        pairs += [(pair["prompt"], pair["response"]) for pair in kept.get("pairs", [])]
    return [prompt for prompt, _ in pairs], [said for _, said in pairs]


def gibberish(responses: Iterable[str]) -> set[str]:
    "How the answers of tiny random models begin: with characters that nobody types."
    begins = {said[:12] for said in responses}
    return {said for said in begins if len({c for c in said if not c.isprintable()}) >= 3}


def texts_of(path: Path) -> list[str]:
    "What a reader can see of a notebook, table, drawing, page or log."
    if path.suffix == ".ipynb":
        return output_texts(read(path))
    text = path.read_text(errors="replace")
    if path.suffix == ".csv":
        rows = csv.reader(io.StringIO(text, newline=""))
        return [cell for row in rows for cell in row if " " in cell]
    if path.suffix == ".svg":
        return re.findall(r">([^<>]*\w[^<>]*)<", text)
    if path.suffix == ".html":
        parts = re.split(r"</?(?:t[dhr]|p|li|div|pre|br|h\d|d[td])\b[^>]*>", text)
        return [html.unescape(re.sub(r"<[^>]+>", "", part)) for part in parts]
    return [text]


PUBLISHED = ("nbs/**/*.ipynb", "nbs/drawings/*.svg", "figures/**/*.csv", "figures/**/*.svg")
PUBLISHED += ("runs/*/notebooks/*.ipynb", "runs/*/figures/*.csv", "runs/*/figures/*.svg")
PUBLISHED += ("runs/*/logs/*.log", "runs/readme/*.ipynb", "docs/_build/html/**/*.html")
PUBLISHED += ("README.md", "benchmarks/results/*.csv")


def published(root: Path) -> dict[str, list[str]]:
    "Everything that a reader can see: outputs, tables, drawings, logs, the README, the site."
    paths = sorted(path for pattern in PUBLISHED for path in root.glob(pattern))
    found = {}
    for path in paths:
        if ".ipynb_checkpoints" in path.parts or path.name.endswith(".partial.ipynb"):
            continue
        with suppress(FileNotFoundError):  # a run that goes on beside this has removed it
            found[str(path.relative_to(root))] = texts_of(path)
    return found


def shown_completions(root: Path, typed: list[str]) -> dict[str, set[str]]:
    "Where a response that was kept is repeated: the file, and what it repeats."
    prompts, responses = kept_responses(root)
    said = said_by_models(responses, typed + prompts)  # a prompt may be shown, cut
    odd = gibberish(responses)
    found = {}
    for name, texts in published(root).items():
        shown = repeated(texts, said) | {o for o in odd if any(o in text for text in texts)}
        found |= {name: shown} if shown else {}
    return found
