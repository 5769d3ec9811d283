"""Write the pages of the site into docs/_build/source: `python docs/build.py`, then Sphinx.

Chapters are shown as the embedded run executed them, when runs/embedded has them, else with the
outputs that are stored in nbs/. Engine pages have their code folded. The API page is made from
signatures and docments, the page of results from the tables in figures/.
"""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
from fastcore.docments import docments

import ssah_nb
from ssah_nb.engine.figures import readable

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs/_build/source"
EXECUTED = ROOT / "runs/embedded/notebooks"
COVERAGE = ROOT / "docs/coverage.csv"
PAPERS = {  # page -> file
    "tried": "docs/tried.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}
MADE = {"figures": "results.md", "docs/architectures.csv": "architectures.md"}  # from -> page
COMPARED = ROOT / "runs/protection/notebooks"  # the page beside the chapters


def hide(cell: dict, tag: str) -> None:
    """Tag a cell for myst-nb."""
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), tag]


def is_plumbing(source: str) -> bool:
    """Whether a cell says nothing to a reader: where it is exported to, or its imports only."""
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
    return all(line.startswith(("from ", "import ", " ", ")")) for line in lines)


def write_notebook(path: Path, target: Path, folded: bool) -> None:
    """One notebook as a page; `folded`: its code is shown on demand only."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.source.startswith("#| default_exp"):
            hide(cell, "remove-cell")
        elif folded or is_plumbing(cell.source) or "injected-parameters" in str(cell.metadata):
            hide(cell, "hide-input")
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def write_notebooks() -> tuple[list[Path], list[Path]]:
    """All chapters and engine pages; their paths in nbs/."""
    nbs = ROOT / "nbs"
    chapters = [*sorted(nbs.glob("[0-9][0-9]_*.ipynb")), nbs / "protection.ipynb"]
    pages = sorted((nbs / "engine").rglob("*.ipynb"))
    for path in chapters:
        executed = (COMPARED if path.stem == "protection" else EXECUTED) / path.name
        write_notebook(executed if executed.exists() else path, SOURCE / path.name, folded=False)
    for path in pages:
        write_notebook(path, SOURCE / path.relative_to(nbs), folded=True)
    shutil.copytree(nbs / "drawings", SOURCE / "drawings", dirs_exist_ok=True)
    return chapters, pages


def parameter_table(function) -> str:
    """Name, type, default and meaning of each parameter, from the docments."""
    rows = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for name, part in docments(function, full=True).items():
        kind = "" if part.anno is inspect.Parameter.empty else inspect.formatannotation(part.anno)
        default = "" if part.default is inspect.Parameter.empty else repr(part.default)
        default = default if len(default) < 40 else "…"
        if name == "self" or (name == "return" and not kind):
            continue
        cells = (f"`{text}`" if text else "" for text in (name, kind.replace("|", "¦"), default))
        rows.append(f"| {' | '.join(cells)} | {(part.docment or '').replace('|', '¦')} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def api_entry(name: str) -> str:
    """One public name: signature, docstring, parameters; of a class its methods, too."""
    thing = getattr(ssah_nb, name)
    if not callable(thing):
        kinds = f"{type(thing).__name__} of {len(thing)}"
        return f"### {name}\n\n{kinds}: {', '.join(f'`{key}`' for key in list(thing)[:40])}\n"
    where = thing.__module__
    words = inspect.getdoc(thing) or ""
    text = f"### {name}\n\n{words}\n\nFrom `{where}`.\n\n"
    if not inspect.isclass(thing):
        return text + parameter_table(thing) + "\n"
    described = thing if dataclasses.is_dataclass(thing) else thing.__init__
    if "__init__" in vars(thing):
        text += parameter_table(described) + "\n\n"
    for method, function in vars(thing).items():
        if method.startswith("_") or isinstance(function, type | str | tuple):
            continue
        documented = function.fget if isinstance(function, property) else function
        documented = getattr(documented, "__func__", documented)
        if words := inspect.getdoc(documented if callable(documented) else function):
            text += f"- `.{method}`: {words.splitlines()[0]}\n"
    return text + "\n"


def write_api() -> None:
    """The API page: every public name of `ssah_nb`, by the module that defines it."""
    public = ssah_nb.__all__
    where = {name: getattr(getattr(ssah_nb, name), "__module__", "constants") for name in public}
    groups: dict[str, list[str]] = {}
    for name in sorted(public):
        groups.setdefault(where[name].removeprefix("ssah_nb."), []).append(name)
    text = "# API\n\nEvery name of `import ssah_nb`, by the module that defines it.\n"
    for module, names in sorted(groups.items()):
        text += f"\n## {module}\n\n" + "\n".join(api_entry(name) for name in names)
    (SOURCE / "api.md").write_text(text)


def readable_csv(path: Path) -> pd.DataFrame:
    """A tidy table for reading: an interval behind its value, rates in percent."""
    table = pd.read_csv(path)
    ends = ("_low", "_high", "_n")
    shown = [column for column in table if not (column.endswith(ends) and column[:-3])]
    rates = ("attack", "refus", "coherent", "share", "accuracy", "frozen_", "trained_par", "lost")
    names = {
        column: column.replace("_", " ") + (" (%)" if column.startswith(rates) else "")
        for column in shown
    }
    return readable(table, names).reset_index()


def judges_section() -> str:
    """How each judge of refusals agrees with people: by source and language, then by style."""
    table = pd.read_csv(ROOT / "benchmarks/results/judges.csv")
    words = {"judge": "judge", "by": "by", "group": "rows", "kappa": "Cohen's kappa"}
    words |= {"missed_rate": "refusals missed (%)", "invented_rate": "answers called refusals (%)"}
    words |= {name: name for name in ("found", "missed", "invented", "passed")}
    groups = readable(table[table.by != "style"], words).reset_index()
    wrong = table[table.by == "style"].assign(wrong=table.missed + table.invented)
    styles = wrong.pivot(index="group", columns="judge", values="wrong")
    styles.insert(0, "rows", wrong.groupby("group").kappa_n.first())
    text = "\n## Judges of refusals\n\nOn held-out rows; see [the page](engine/agreement.ipynb).\n"
    for caption, shown in (("By source and language", groups), ("Wrong verdicts by style", styles)):
        html = shown.to_html(index=shown is styles, border=0)
        text += f"\n### {caption}\n\n<div class='table-wrapper'>\n{html}\n</div>\n"
    return text


def committed_runs() -> list[Path]:
    """The folders of figures/ that git keeps; the default profile comes first."""
    folders = [path.parent for path in (ROOT / "figures").glob("*/MANIFEST.json")]
    kept = [f for f in folders if not f.name.startswith("smoke") and not f.name.endswith("-verify")]
    return sorted(kept, key=lambda folder: (folder.name != "embedded", folder.name))


def model_of(chapters: dict) -> str:
    """The model that a run began with, as its first chapter was given it; "" for one without."""
    name = chapters.get("00_start", {}).get("parameters", {}).get("model_name", "")
    return f" The model is {Path(name).stem}." if "/" in name else ""


def write_results() -> None:
    """Every result table of figures/, with the run that it is of."""
    text = "# All results\n\nEvery table of the committed runs. Rates carry 95 % intervals.\n"
    for folder in committed_runs():
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        chapters = manifest["chapters"]
        processors = {chapter.get("versions", {}).get("cpu", "") for chapter in chapters.values()}
        text += f"\n## Profile {folder.name}\n\n{manifest['minutes']} minutes of chapters, on "
        text += f"{' and '.join(sorted(processors - {''}))}.{model_of(chapters)}\n"
        if not any("commit" in chapter for chapter in chapters.values()):
            text += "\nOf an earlier version, whose judge was the list of phrases `gcg`.\n"
        for path in sorted(folder.glob("*.csv")):
            if len(table := pd.read_csv(path)) > 60:
                text += f"\n### {path.stem}\n\n{len(table)} rows: see the CSV file.\n"
                continue
            html = readable_csv(path).to_html(index=False, border=0)
            text += f"\n### {path.stem}\n\n<div class='table-wrapper'>\n{html}\n</div>\n"
    (SOURCE / "results.md").write_text(text + judges_section())


def write_architectures() -> None:
    """Which architectures are supported: the table that docs/architectures.py wrote."""
    table = pd.read_csv(ROOT / "docs/architectures.csv", keep_default_na=False)
    counts = table.units.value_counts().reset_index(name="architectures")
    text = "# Architectures\n\n"
    text += (
        "Every causal architecture of transformers was built tiny and random, and tried.\n\n"
        "- **supported**: importance, `pruned`, freezing with one step of training, merging and "
        "the losses of responses ran, and gave what an independent computation gives. The column "
        "*prune* says what can be cut out for good.\n"
        "- **refused**: `SsahError` says why, before anything is computed. A larger model of the "
        "same architecture is tried again when it is used, so the weights at hand decide.\n"
        "- **does not run**, **not built**: transformers' own code stops at tiny sizes.\n\n"
    )
    text += f"{counts.to_html(index=False, border=0)}\n\n"
    text += f"<div class='table-wrapper'>\n{table.to_html(index=False, border=0)}\n</div>\n"
    (SOURCE / "architectures.md").write_text(text)


def write_coverage() -> None:
    """How much of each module the tests reach: the table that `make coverage` wrote."""
    text = "# Coverage\n\n"
    text += (
        "Tests run the statements of a module, or they do not. This is the share that they run, "
        "chapters in their kernels included. `make coverage` measures it anew.\n\n"
    )
    if COVERAGE.exists():
        table = pd.read_csv(COVERAGE).rename(columns={"covered": "covered (%)"})
        html = table.to_html(index=False, border=0)
        text += f"<div class='table-wrapper'>\n{html}\n</div>\n"
    else:
        text += "It has not been measured here.\n"
    (SOURCE / "coverage.md").write_text(text)


def keep_link(match: re.Match) -> str:
    """A link of a page as the site has it: pages stay, files come along, folders are words."""
    words, target = match.groups()
    target = target.removeprefix("../")  # of a page in docs/
    pages = MADE | {file: f"{page}.md" for page, file in PAPERS.items()}
    if "://" in target or target.startswith("#") or target in pages or target.endswith(".ipynb"):
        return f"[{words}]({pages.get(target, target.removeprefix('nbs/'))})"
    if not (ROOT / target).is_file():
        return words
    kept = SOURCE / target
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / target, kept)
    return f"[{words}]({target})"


def write_papers() -> None:
    """CONTRIBUTING, CHANGELOG and what was tried as pages."""
    for name, file in PAPERS.items():
        text = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", keep_link, (ROOT / file).read_text())
        (SOURCE / f"{name}.md").write_text(text)


def write_index(chapters: list[Path], pages: list[Path]) -> None:
    """The first page: the README, and the tables of contents."""
    readme = (ROOT / "README.md").read_text()
    readme = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", keep_link, readme)
    lists = {
        "Chapters": [path.stem for path in chapters],
        "Engine": [str(path.relative_to(ROOT / "nbs").with_suffix("")) for path in pages],
        "Reference": ["api", "architectures", "results", "coverage", *PAPERS],
    }
    for caption, names in lists.items():
        listed = "\n".join(names)
        readme += f"\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{listed}\n```\n"
    (SOURCE / "index.md").write_text(readme)


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in ("conf.py", "_static"):
        source = ROOT / "docs" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, SOURCE / name)
    write_index(*write_notebooks())
    write_api()
    write_results()
    write_architectures()
    write_coverage()
    write_papers()


if __name__ == "__main__":
    main()
