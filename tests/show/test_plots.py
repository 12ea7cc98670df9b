"""Pictures: nothing cut off, the same bytes again, no trace left in matplotlib's settings.

Texts and lines are read back from the figure as it is written.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from foldwise.show.plots import (
    COLOURS,
    Bins,
    Compared,
    Tile,
    draw_calibration,
    draw_comparison,
    draw_confusion,
    draw_gallery,
    draw_history,
    mean_curve,
    picture,
    short,
)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def assert_nothing_cut(figure):
    """Every text lies in the picture; tick labels beyond the limits are not drawn and so do not count."""
    whole = figure.bbox
    hidden = {
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
        if not low - 1e-9 <= tick.get_loc() <= high + 1e-9 or not axes.axison
    }
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
            assert inside, (text.get_text(), box, whole)


def unit(epochs, *, start=1.0, inner=False, metric="accuracy"):
    epoch = np.arange(1.0, epochs + 1)
    columns = {"epoch": epoch, "lr": 0.001 / epoch}
    for shift, part in enumerate(("train", "val", "inner") if inner else ("train", "val")):
        columns[f"{part}_loss"] = start / epoch + 0.1 * shift
        columns[f"{part}_accuracy"] = 1 - start / (epoch + 1 + shift)
    if metric != "accuracy":
        columns[f"val_{metric}"] = 1 - start / (epoch + 2)
    return columns


def compared(name, classes, *, epochs=5, score=0.6):
    recall = np.linspace(0, 1, classes)
    return Compared(
        name,
        score,
        0.01,
        (score - 0.02, score + 0.02),
        np.arange(1.0, epochs + 1),
        np.linspace(0.2, score, epochs),
        recall,
        np.stack([np.maximum(0, recall - 0.1), np.minimum(1, recall + 0.1)], axis=1),
    )


def test_a_picture_is_the_same_bytes_whatever_the_settings_are(tmp_path):
    for name, changes in (("a.png", {}), ("b.png", {"font.size": 30, "axes.grid": False})):
        with mpl.rc_context(changes):
            before = dict(mpl.rcParams)
            with picture(tmp_path / name, 3, 2, title="title", note="note") as figure:
                figure.subplots().plot([1, 2])
            assert dict(mpl.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (480, 320)
        assert set(image.info) <= {"dpi"}


def test_a_picture_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), picture(path, 3, 2, title="t"):
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_are_drawn_as_they_are(tmp_path, figures):
    draw_confusion(tmp_path / "a.png", np.eye(3, dtype=int), ["$x", "y$_2", "猫"], title="$run$", note="")
    assert {"$x", "y$_2", "猫", "$run$"} <= set(texts(figures[0]))


def test_short():
    assert [short("abcdef", most) for most in (7, 6, 4)] == ["abcdef", "abcdef", "abc…"]


def test_the_mean_curve_ends_with_the_first_unit_that_ends():
    units = {(0, 1): {"epoch": np.arange(1.0, 4), "x": np.array([1.0, 2, 3])}, (1, 1): {"epoch": np.arange(1.0, 3)}}
    units[1, 1]["x"] = np.array([3.0, 6])
    epochs, mean = mean_curve(units, "x")
    assert epochs.tolist() == [1, 2]
    assert mean.tolist() == [2, 4]
    del units[1, 1]["x"]
    assert np.isnan(mean_curve(units, "x")[1]).all()


@pytest.mark.parametrize(
    ("units", "metric", "panels"),
    [
        ({(0, 42): unit(6), (1, 42): unit(4, start=2)}, "accuracy", ["loss", "accuracy"]),
        ({(0, 1): unit(1, inner=True), (0, 2): unit(1, inner=True, start=2)}, "log_loss", ["loss", "accuracy"]),
        ({(0, 42): unit(1)}, "accuracy", ["loss", "accuracy"]),
        ({(0, 42): unit(3, metric="macro_f1")}, "macro_f1", ["loss", "accuracy", "macro F1"]),
    ],
)
def test_history(tmp_path, figures, units, metric, panels):
    kept = {key: int(columns["epoch"][-1]) for key, columns in units.items()}
    note = "a long note " * 30
    draw_history(tmp_path / "h.png", units, kept, metric=metric, title="a run", note=note)
    assert_nothing_cut(figures[0])
    big = [axes for axes in figures[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in big] == panels
    inner = any("inner_loss" in columns for columns in units.values())
    labels = [text.get_text() for text in big[0].get_legend().get_texts()]
    assert ("inner slice" in labels) == inner
    rings = [line for line in big[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata().tolist() for line in rings] == [[kept[key]] for key in units]
    single = all(len(columns["epoch"]) == 1 for columns in units.values())
    for colour in {to_hex(line.get_color()) for line in big[0].lines}:
        drawn = [line for line in big[0].lines if to_hex(line.get_color()) == colour]
        if single:
            assert any(line.get_marker() == "o" for line in drawn), "a line of one epoch needs a marker to be seen"


def test_history_of_a_run_that_validates_nothing(tmp_path, figures):
    columns = {name: column for name, column in unit(3).items() if not name.startswith("val_")}
    draw_history(tmp_path / "h.png", {(0, 42): columns}, {(0, 42): 3}, metric="macro_f1", title="full", note="")
    assert [axes.get_title(loc="left") for axes in figures[0].axes if axes.get_title(loc="left")] == [
        "loss",
        "accuracy",
    ]


@pytest.mark.parametrize(
    "classes", [2, 7, pytest.param(40, marks=pytest.mark.slow), pytest.param(51, marks=pytest.mark.slow)]
)
def test_confusion(tmp_path, figures, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes)) + 1000 * np.eye(classes, dtype=int)
    counts[-1] = 0  # no image of the last class
    names = [f"a class with a long name {index}" for index in range(classes)]
    draw_confusion(
        tmp_path / "c.png", counts, names, title="a run with quite a long name: confusion", note="note " * 40
    )
    (figure,) = figures
    assert_nothing_cut(figure)
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.size) < 4000
    cells = [text.get_text() for text in figure.axes[0].texts]
    if classes <= 12:
        assert len(cells) == 2 * classes**2
        assert cells[0] == f"{counts[0, 0]:,}"
        assert cells[1] == f"{counts[0, 0] / counts[0].sum():.0%}"
    elif classes <= 50:
        assert len(cells) == (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) >= 0.005).sum()
        assert cells[0] == f"{counts[0, 0] / counts[0].sum():.0%}".rstrip("%")
    else:
        assert cells == []
    assert [text.get_text() for text in figure.axes[1].texts] == [f"{total:,}" for total in counts.sum(axis=1)]


def test_calibration(tmp_path, figures):
    bins = Bins(
        np.array([0.2, 0.9]),
        np.array([0.3, 1.0]),
        np.array([3, 40000]),
        np.array([0.25, 0.95]),
        np.array([0.0, 1.0]),
        np.array([[0.0, 0.5], [0.9, 1.0]]),
    )
    draw_calibration(tmp_path / "c.png", bins, lines=["one", "two"], title="a run", note="note")
    assert_nothing_cut(figures[0])
    points = figures[0].axes[0].lines[1]
    assert points.get_xdata().tolist() == [0.25, 0.95]
    assert points.get_ydata().tolist() == [0, 1]
    assert [bar.get_height() for bar in figures[0].axes[1].patches] == [3, 40000]


@pytest.mark.parametrize(("count", "shape"), [(1, (48, 48, 1)), (24, (30, 60, 3))])
def test_gallery(tmp_path, figures, count, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tiles = [Tile(image, f"identifier-{n:06}.jpg", "0.50", "class " * 9, "b") for n in range(count)]
    draw_gallery(tmp_path / "g.png", tiles, title="a run: a gallery of images", note="note")
    assert_nothing_cut(figures[0])
    (axes,) = figures[0].axes
    assert len(axes.images) == len(axes.texts) == count
    assert axes.texts[0].get_text() == "…er-000000.jpg  (0.50)\nclass clas… → b"
    boxes = [text.get_window_extent() for text in axes.texts[:6]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), "captions overlap"
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0])


@pytest.mark.parametrize(
    ("runs", "classes", "epochs"), [(1, 2, 1), (3, 7, 5), pytest.param(16, 40, 5, marks=pytest.mark.slow)]
)
def test_comparison(tmp_path, figures, runs, classes, epochs):
    names = [f"experiment_with_a_very_long_name_{index:02}" for index in range(runs)]
    drawn = [compared(name, classes, epochs=epochs, score=0.9 - 0.02 * index) for index, name in enumerate(names)]
    labels = [f"class {index}" for index in range(classes)]
    draw_comparison(tmp_path / "c.png", drawn, labels, metric="accuracy", title="comparison", note="note " * 60)
    (figure,) = figures
    assert_nothing_cut(figure)
    scores, curves, _ = figure.axes
    assert [label.get_text() for label in scores.get_yticklabels()] == [short(name, 28) for name in names]
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in curves.lines}
    assert len(looks) == runs, "two runs look the same"


def test_colours_are_distinct_to_the_colour_blind():
    """No two closer than 30 of 441 in RGB, as seen without red or without green cones (Machado et al. 2009)."""
    seen_by = (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    )
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in seen_by:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        encoded = 255 * np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        distance = np.linalg.norm(encoded[:, None] - encoded[None], axis=-1)
        assert distance[~np.eye(len(COLOURS), dtype=bool)].min() > 30


def test_pictures_are_written_into_a_new_folder(tmp_path):
    path = Path(tmp_path / "new" / "a.png")
    with picture(path, 2, 2, title="t"):
        pass
    assert path.stat().st_mode & 0o777 == 0o644
