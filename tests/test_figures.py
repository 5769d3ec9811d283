"""Figures and tables: the same bytes each time, all three files or none."""

import errno
import os

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ssah_nb.engine import run as run_module
from ssah_nb.engine.figures import COLOURS, readable, table_figure
from ssah_nb.engine.run import Run, SsahError
from ssah_nb.units import CLASSES


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").touch()
    return Run("test", "03_attribution", seed=3, lr=0.1)


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

    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(SsahError, match="No space left.*nothing was changed") as error:
        run.save_figure(drawn(), "fig", pd.DataFrame({"x": [2]}))
    assert "\n" not in str(error.value)
    assert before == {p.name: p.read_bytes() for p in run.figures.iterdir()}


RATES = pd.DataFrame(
    {
        "model": ["dense", "without SCU", "control"],
        "attack": [0.02, 0.98, float("nan")],
        "attack_low": [0.001, 0.93, float("nan")],
        "attack_high": [0.07, 0.99, float("nan")],
        "perplexity": [10.1234, 1234.5, 12.0],
        "units": [0, 1728, 12],
        "steady": [True, False, True],
    }
)
NAMES = {
    "model": "model",
    "attack": "attack success (%)",
    "perplexity": "perplexity",
    "units": "units",
    "steady": "steady",
}


def test_a_table_for_reading_has_units_intervals_and_no_noise():
    shown = readable(RATES, NAMES)
    assert shown.index.name == "model" and list(shown.index) == list(RATES.model)
    assert list(shown.columns) == list(NAMES.values())[1:]
    assert list(shown["attack success (%)"]) == ["2.0 (0.1 to 7.0)", "98 (93 to 99)", "–"]
    assert list(shown["perplexity"]) == ["10.12", "1,234.50", "12.00"]
    assert list(shown["units"]) == ["0", "1,728", "12"]
    assert list(shown["steady"]) == ["True", "False", "True"]


def test_small_numbers_do_not_read_as_zero():
    row = pd.DataFrame({"way": ["a"], "d": [-0.0385], "d_low": [-0.07], "d_high": [-0.0004]})
    assert readable(row, {"way": "way", "d": "d (points)"}).iloc[0, 0] == "-3.9 (-7.0 to -0.04)"
    zero = row.assign(d=0.0, d_low=0.0, d_high=0.0)
    assert readable(zero, {"way": "way", "d": "d (points)"}).iloc[0, 0] == "0.0 (0.0 to 0.0)"


def test_readable_leaves_out_what_is_not_asked_for_and_keeps_the_order():
    shown = readable(RATES, {"units": "units", "model": "name"})
    assert shown.index.name == "units" and list(shown.columns) == ["name"]
    with pytest.raises(KeyError):
        readable(RATES, {"model": "model", "nothing": "nothing"})


def test_a_saved_table_is_tidy_in_its_file_and_readable_where_it_is_shown(run):
    shown = run.save_table("rates", RATES, NAMES)
    assert shown.equals(readable(RATES, NAMES))
    pd.testing.assert_frame_equal(run.read_table("rates"), RATES, rtol=1e-5)
    assert {path.name for path in run.written} == {"rates.csv", "rates.png", "rates.svg"}


def test_each_class_has_a_colour_of_its_own():
    assert COLOURS.keys() == set(CLASSES)
    assert len(set(COLOURS.values())) == len(CLASSES)


def test_every_word_of_a_table_picture_stays_in_its_cell():
    rows = [["SCU + top 6% CU frozen", "SCU", "1.7 (0.3 to 8.9)"], ["MMMMMM", "WWWW", "100 (91)"]]
    fig = table_figure(pd.DataFrame(rows, columns=["what was done", "units", "attack success (%)"]))
    shown = FigureCanvasAgg(fig).get_renderer()
    cells = fig.axes[0].tables[0].get_celld()
    fig.draw(shown)
    for place, cell in cells.items():
        words, room = cell.get_text().get_window_extent(shown), cell.get_window_extent(shown)
        assert room.x0 <= words.x0 and words.x1 <= room.x1, place
    assert len(cells) == 9
