"""Pictures: what stands in the file, read back by eye of the machine."""

import matplotlib.pyplot as plt

from launch.page import table
from launch.plot import Axes, plot_lines

SERIES = {"ours": [(1024, 10.0), (4096, 12.0)], "limit": [(1024, 20.0), (4096, 20.0)]}


def _drawn(tmp_path, monkeypatch, series, axes, **options):
    """The figure that was saved."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_lines(tmp_path / "plot.png", series, axes, **options)
    (figure,) = kept
    pixels = plt.imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (630, 960)  # 6.4 x 4.2 inches at 150 dots
    assert pixels[..., :3].std() > 0.02  # something is drawn
    return figure.axes[0]


def test_lines_are_told_apart_without_colour(tmp_path, monkeypatch):
    axes = Axes("speed", "context", "tokens/s", lengths=True)
    plot = _drawn(tmp_path, monkeypatch, SERIES, axes, reference="limit")
    ours, limit = plot.get_lines()
    assert (ours.get_marker(), ours.get_linestyle()) == ("o", "-")
    assert (limit.get_marker(), limit.get_linestyle()) == ("None", "--")
    assert [t.get_text() for t in plot.get_legend().get_texts()] == ["ours", "limit"]
    assert [t.get_text() for t in plot.get_xticklabels()] == ["1K", "4K"]
    assert (plot.get_xscale(), plot.get_yscale()) == ("log", "log")
    assert (plot.get_title(), plot.get_xlabel(), plot.get_ylabel()) == (
        "speed",
        "context",
        "tokens/s",
    )


def test_nothing_to_draw_is_an_empty_plot(tmp_path):
    plot_lines(tmp_path / "plot.png", {}, Axes("none", "x", "y"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_table_is_markdown():
    lines = table("tokens", ["a", "b"], [("1K", ["1", "2"]), ("4K", ["3", ""])])
    assert lines == ["| tokens | a | b |", "|---|---|---|", "| 1K | 1 | 2 |", "| 4K | 3 |  |", ""]
