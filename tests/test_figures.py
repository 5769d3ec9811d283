"""Figures and tables: the same bytes each time, all three files or none."""

import errno
import os

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ssah_nb.engine import run as setup
from ssah_nb.engine.run import Run, SsahError


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()
    return Run("test", "05_attribution", seed=3, lr=0.1)


def drawn():
    fig, ax = plt.subplots()
    ax.plot([0, 1], [1, 3], label="a line")
    ax.legend()
    plt.close(fig)
    return fig


def test_figure_is_three_files_with_the_same_bytes_each_time(run):
    table = pd.DataFrame({"x": [1, 2], "y": [1 / 3, 2 / 3]})
    run.save_figure(drawn(), "fig", table)
    first = {p.name: p.read_bytes() for p in run.figures.iterdir()}
    run.save_figure(drawn(), "fig", table)
    assert set(first) == {"fig.csv", "fig.png", "fig.svg"}
    assert first == {p.name: p.read_bytes() for p in run.figures.iterdir()}
    assert run.read_table("fig").y[0] == 0.333333


def test_full_disk_leaves_no_half_figure(run, monkeypatch):
    run.save_figure(drawn(), "fig", pd.DataFrame({"x": [1]}))
    before = {p.name: p.read_bytes() for p in run.figures.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(setup.os, "fsync", full)
    with pytest.raises(SsahError, match="No space left.*nothing was changed") as error:
        run.save_figure(drawn(), "fig", pd.DataFrame({"x": [2]}))
    assert "\n" not in str(error.value)
    assert before == {p.name: p.read_bytes() for p in run.figures.iterdir()}
