"""The README says what is true: its library block runs as printed, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/tried.md"])
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text())
    inside = [link for link in links if "://" not in link]
    assert len(inside) > 10 or page != "README.md"
    folder = (ROOT / page).parent
    assert [link for link in inside if not (folder / link).exists()] == []


@pytest.mark.slow
@pytest.mark.network
def test_library_block_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    code = [line for line in block.splitlines() if line.strip()]
    assert 10 <= len(code) <= 20
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README", "exec"), names)
    ssah, units = names["ssah"], names["units"]
    assert "Estimate(value=" in capsys.readouterr().out  # attack success without the SCU
    again = ssah.UnitMap.from_pretrained("runs/my-units")
    assert again.scu == units.scu and len(units.scu) > 0
    assert 2 <= len(names["refusals"]) <= len(names["harmful"])
