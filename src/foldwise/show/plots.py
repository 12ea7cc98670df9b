"""The look of every picture, and the pictures of kept runs: curves, confusions, calibration, galleries, comparisons.

Drawn with matplotlib's objects on Agg alone: no window, no global figure, and the same bytes whenever drawn again.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from foldwise.files import atomic_path

Floats = NDArray[np.float64]
Unit = tuple[int, int]
Columns = Mapping[str, Floats]

DPI = 160
INK, GRAY, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
# Okabe and Ito's colours, told apart by colour-blind readers too (Wong 2011, Nature Methods 8:441); without their
# yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
# Steps between the tiles of a gallery, where an image's longer side is 1.
_TILE_WIDTH, _TILE_HEIGHT = 1.12, 1.32
_PARTS = {"train": ("training", COLOURS[0]), "val": ("validation", COLOURS[1]), "inner": ("inner slice", COLOURS[2])}

_LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names of classes and runs are anybody's, a `$` in them too
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


@dataclass(frozen=True)
class Tile:
    """One image of a gallery.

    Attributes:
        image: (H, W, C) uint8, C 1 or 3.
        name: Its id.
        figure: A number, as it is to be shown beside the id.
        first: A class name.
        second: Another; read as `first -> second`.
    """

    image: NDArray[np.uint8]
    name: str
    figure: str
    first: str
    second: str


@dataclass(frozen=True)
class Bins:
    """Predictions binned by confidence; empty bins left out.

    Attributes:
        low: (B,) lower edges.
        high: (B,) upper edges.
        count: (B,) images.
        confidence: (B,) mean confidence.
        accuracy: (B,) share that is right.
        interval: (B, 2) ends of the interval of `accuracy`.
    """

    low: Floats
    high: Floats
    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats
    interval: Floats


@dataclass(frozen=True)
class Compared:
    """What a comparison shows of one run.

    Attributes:
        name: Of the run.
        score: The metric on all scored images.
        standard_error: Of `score`.
        fold_scores: The metric of each fold.
        epochs: (E,) epochs that every unit reached, from 1.
        curve: (E,) validation metric, mean over units; NaN where it was not kept.
        recall: (C,) of each class; NaN where no image is of it.
        recall_interval: (C, 2) ends of its intervals.
    """

    name: str
    score: float
    standard_error: float
    fold_scores: tuple[float, ...]
    epochs: Floats
    curve: Floats
    recall: Floats
    recall_interval: Floats


@contextmanager
def picture(path: Path, width: float, height: float, *, title: str, note: str = "") -> Iterator[Figure]:
    """Yield an empty figure in the common look; on a clean exit it is written to `path` as PNG, whole or not at all.

    Args:
        path: Where to.
        width: Inches.
        height: Inches.
        title: Above all; cut where it is too long.
        note: Small print below all; wrapped.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        # A class named in a script that the font lacks is drawn as boxes, which is no reason to stop.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(short(title, int(width * 10)), x=0.01, ha="left")
        if note:
            lines = textwrap.fill(note, int(width * 16))
            figure.supxlabel(lines, x=0.01, ha="left", fontsize=7.5, color=GRAY)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def short(name: str, most: int) -> str:
    """`name`, its end left out where it has more than `most` characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def column_title(name: str) -> str:
    """How a figure of `history.csv` or a metric is called in a picture: `macro_f1` becomes `macro F1`."""
    return name.replace("_", " ").replace("f1", "F1")


def mean_curve(units: Mapping[Unit, Columns], column: str) -> tuple[Floats, Floats]:
    """Mean of a column over the units, for the epochs that all of them reached.

    Args:
        units: (fold, seed) to its columns, `epoch` among them, all (epochs of the unit,).
        column: Which; NaN where a unit lacks it.

    Returns:
        (E,) epochs and (E,) means.
    """
    reached = min(len(columns["epoch"]) for columns in units.values())
    blank = np.full(reached, np.nan)
    values = np.stack([columns[column][:reached] if column in columns else blank for columns in units.values()])
    return next(iter(units.values()))["epoch"][:reached], values.mean(axis=0)


def draw_history(
    path: Path, units: Mapping[Unit, Columns], kept: Mapping[Unit, int], *, metric: str, title: str, note: str
) -> None:
    """Draw the learning curves of a run: loss, accuracy and the metric where it is another, the learning rate below.

    Args:
        path: Where to.
        units: (fold, seed) to the columns of its history, each (epochs of the unit,).
        kept: (fold, seed) to the epoch whose weights were kept.
        metric: The competition's.
        title: Above all.
        note: Below all.
    """
    panels = list(dict.fromkeys(["loss", "accuracy", "loss" if metric == "log_loss" else metric]))
    columns = {name for unit in units.values() for name in unit}
    panels = [panel for panel in panels if any(f"{part}_{panel}" in columns for part in _PARTS)]
    with picture(path, 4.6 * len(panels), 4.9, title=title, note=note) as figure:
        grid = figure.add_gridspec(2, len(panels), height_ratios=[5, 1])
        highest = max(float(unit["lr"].max()) for unit in units.values())
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(grid[0, place])
            axes.set_title(column_title(panel))
            axes.tick_params(labelbottom=False)
            for part in _PARTS:
                if f"{part}_{panel}" in columns:
                    _curves(axes, units, kept, part, panel)
            _epochs(axes, units)
            rate = figure.add_subplot(grid[1, place], sharex=axes)
            for unit in units.values():
                rate.plot(unit["epoch"], unit["lr"], color=GRAY, lw=0.8, marker=_dot(unit))
            rate.set_xlabel("epoch")
            rate.set_ylim(0, 1.15 * highest)
            rate.set_yticks([0, highest], ["0", f"{highest:.2g}"])
            if place == 0:
                rate.set_ylabel("learning\nrate", fontsize=8)
        _history_legend(figure.axes[0], columns, units)


def _curves(axes: Axes, units: Mapping[Unit, Columns], kept: Mapping[Unit, int], part: str, panel: str) -> None:
    """One part's curves in one panel: thin per unit, bold their mean, a ring where the weights are from."""
    _, colour = _PARTS[part]
    column = f"{part}_{panel}"
    for key, unit in units.items():
        if column not in unit:
            continue
        alone = len(units) == 1
        width, alpha = (2, 1) if alone else (0.7, 0.45)
        axes.plot(unit["epoch"], unit[column], color=colour, lw=width, alpha=alpha, marker=_dot(unit))
        if part == "val" or (part == "train" and f"val_{panel}" not in unit):
            at = unit["epoch"] == kept[key]
            axes.plot(unit["epoch"][at], unit[column][at], "o", color=colour, mfc="white", ms=4.5, mew=1, zorder=4)
    if len(units) > 1:
        axes.plot(*mean_curve(units, column), color=colour, lw=2.2, marker=_dot(next(iter(units.values()))), zorder=3)


def _dot(unit: Columns) -> str:
    """A marker where a line of one epoch would be invisible."""
    return "o" if len(unit["epoch"]) == 1 else ""


def _epochs(axes: Axes, units: Mapping[Unit, Columns]) -> None:
    last = max(float(unit["epoch"][-1]) for unit in units.values())
    axes.set_xlim(1 - 0.02 * last - 0.3, last + 0.02 * last + 0.3)
    axes.xaxis.set_major_locator(_whole_epochs(last))


def _whole_epochs(last: float) -> Locator:
    """Ticks at whole epochs, also where there is but one."""
    return FixedLocator([1]) if last == 1 else MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])


def _history_legend(axes: Axes, columns: set[str], units: Mapping[Unit, Columns]) -> None:
    shown = [look for part, look in _PARTS.items() if f"{part}_loss" in columns]
    handles = [Line2D([], [], color=colour, lw=2.2, label=name) for name, colour in shown]
    if len(units) > 1:
        what = "seed" if len({fold for fold, _ in units}) == 1 else "fold"
        both = len({fold for fold, _ in units}) > 1 and len({seed for _, seed in units}) > 1
        each = "fold and seed" if both else what
        handles.append(Line2D([], [], color=GRAY, lw=0.7, label=f"one {each} (bold: mean)"))
    handles.append(Line2D([], [], color=GRAY, marker="o", mfc="white", ls="", ms=4.5, label="epoch kept"))
    axes.legend(handles=handles, fontsize=8)


def draw_confusion(path: Path, counts: NDArray[np.int64], classes: Sequence[str], *, title: str, note: str) -> None:
    """Draw a confusion matrix: colour is the share of the row, and the images of each class stand beside.

    Up to 12 classes a cell holds count and share; up to 50 the share, where it is half a percent or more; with
    more classes the colour alone.

    Args:
        path: Where to.
        counts: (C, C), rows true, columns predicted.
        classes: C names.
        title: Above all.
        note: Below all.
    """
    count = len(classes)
    support = counts.sum(axis=1)
    shares = counts / np.maximum(support, 1)[:, None]
    few = count <= 12
    cell = 0.78 if few else 0.3 if count <= 50 else max(0.1, 14 / count)
    names = [short(name, 22) for name in classes]
    beside = 2.6 + 0.075 * max(map(len, names))
    side = cell * count
    with picture(path, max(6.0, side + beside), max(3.6, side + beside - 1.0), title=title, note=note) as figure:
        axes, bars = figure.subplots(1, 2, width_ratios=[max(side, 2.0), 1.0], sharey=True)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        size = 9 if few else 7 if count <= 50 else max(3.0, cell * 45)
        axes.set_xticks(range(count), names, rotation=0 if few and max(map(len, names)) <= 9 else 90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        for row, column in np.ndindex(count, count):
            if count > 50 or (not few and shares[row, column] < 0.005):
                continue
            ink = "white" if shares[row, column] > 0.55 else INK
            share = f"{shares[row, column]:.0%}"
            if few:
                here = dict(ha="center", color=ink if counts[row, column] else "#b0b0b0")  # noqa: C408
                axes.text(column, row, f"{counts[row, column]:,}", va="bottom", fontsize=9, **here)
                axes.text(column, row + 0.06, share, va="top", fontsize=7, **here)
            else:
                axes.text(column, row, share.rstrip("%"), ha="center", va="center", color=ink, fontsize=6)
        if few:
            edges = np.arange(count + 1) - 0.5
            axes.set_xticks(edges, minor=True)
            axes.set_yticks(edges, minor=True)
            axes.tick_params(which="minor", length=0)
            axes.grid(which="minor", color="white", linewidth=1.5)
        bars.barh(range(count), support, color=FAINT, height=0.62)
        bars.set_xlim(0, max(1, int(support.max())) * 1.55)
        for row, total in enumerate(support.tolist()):
            bars.annotate(
                f"{total:,}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=min(size, 8)
            )
        bars.set_title("images", fontsize=8)
        bars.spines[:].set_visible(False)
        bars.grid(visible=False)
        bars.tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)


def draw_calibration(path: Path, bins: Bins, *, lines: Sequence[str], title: str, note: str) -> None:
    """Draw a reliability diagram (Guo et al. 2017, figure 1) over a histogram of confidence.

    Args:
        path: Where to.
        bins: Predictions by confidence.
        lines: Figures written above the diagram.
        title: Above all.
        note: Below all.
    """
    with picture(path, 5.4, 6.4, title=title, note=note) as figure:
        axes, below = figure.subplots(2, 1, height_ratios=[3.4, 1], sharex=True)
        width = bins.high - bins.low
        axes.bar(
            bins.low, bins.accuracy - bins.confidence, width, bins.confidence, align="edge", color=COLOURS[1], alpha=0.2
        )
        axes.plot([0, 1], [0, 1], color=GRAY, lw=1, ls="--")
        spread = np.abs(bins.interval - bins.accuracy[:, None]).T
        axes.errorbar(
            bins.confidence, bins.accuracy, spread, fmt="o", ms=5, color=COLOURS[0], lw=1.2, capsize=2.5, zorder=3
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share that is right")
        axes.set_title("\n".join(lines), fontsize=8, linespacing=1.4)
        axes.text(0.03, 0.9, "above the line:\nunderconfident", fontsize=7.5, color=GRAY)
        axes.text(0.97, 0.03, "below the line:\noverconfident", fontsize=7.5, color=GRAY, ha="right")
        below.bar(bins.low, bins.count, width, align="edge", color=FAINT, edgecolor="white")
        below.set_ylabel("images")
        below.set_xlabel("confidence: probability of the predicted class")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        figure.align_ylabels()


def draw_gallery(path: Path, tiles: Sequence[Tile], *, title: str, note: str) -> None:
    """Draw images in a grid of six columns, each with its id, a figure and two class names.

    Args:
        path: Where to.
        tiles: At least one.
        title: Above all.
        note: Below all.
    """
    columns = min(6, max(4, len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    with picture(path, 1.6 * columns, 1.9 * rows + 0.75, title=title, note=note) as figure:
        # One pair of axes for all: one a tile takes ten times as long.
        axes = figure.subplots()
        axes.set_axis_off()
        for index, tile in enumerate(tiles):
            row, column = divmod(index, columns)
            top = row * _TILE_HEIGHT
            image = tile.image[..., 0] if tile.image.shape[-1] == 1 else tile.image
            height, width = (side / max(image.shape[:2]) for side in image.shape[:2])
            left = column * _TILE_WIDTH + (1 - width) / 2
            axes.imshow(
                image,
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="bicubic",
                extent=(left, left + width, top + height, top),
            )
            name = tile.name if len(tile.name) <= 14 else "…" + tile.name[-13:]
            caption = f"{name}  ({tile.figure})\n{short(tile.first, 11)} → {short(tile.second, 11)}"
            middle = column * _TILE_WIDTH + 0.5
            axes.text(middle, top - 0.03, caption, fontsize=7.5, ha="center", va="bottom", linespacing=1.3)
        axes.set_xlim(0, columns * _TILE_WIDTH - 0.12)
        axes.set_ylim(rows * _TILE_HEIGHT - 0.25, -0.25)


def draw_comparison(
    path: Path, runs: Sequence[Compared], classes: Sequence[str], *, metric: str, title: str, note: str
) -> None:
    """Draw several runs side by side: scores, validation curves, and recall of each class.

    Args:
        path: Where to.
        runs: Best first.
        classes: C names.
        metric: The competition's.
        title: Above all.
        note: Below all.
    """
    looks = [
        (COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % 4], _MARKERS[i // len(COLOURS) % 4])
        for i in range(len(runs))
    ]
    label = column_title(metric)
    width = min(20.0, max(10.0, 1.5 + len(classes) * max(0.3, 0.11 * len(runs))))
    with picture(path, width, 6.2 + 0.22 * max(0, len(runs) - 5), title=title, note=note) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1])
        scores, curves = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        recalls = figure.add_subplot(grid[1, :])
        for row, (run, (colour, _, marker)) in enumerate(zip(runs, looks, strict=True)):
            scores.plot(run.fold_scores, [row] * len(run.fold_scores), "|", color=colour, alpha=0.55, ms=7)
            scores.errorbar(run.score, row, xerr=run.standard_error, fmt=marker, color=colour, ms=6, lw=1.8, capsize=3)
            scores.annotate(
                f"{run.score:.4f} ± {run.standard_error:.4f}",
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
        scores.set_yticks(range(len(runs)), [short(run.name, 28) for run in runs])
        scores.set_ylim(len(runs) - 0.4, -0.6)
        scores.margins(x=0.15)
        scores.grid(visible=False, axis="y")
        scores.set_title(f"{label} ± standard error; ticks: folds")
        for run, (colour, dash, marker) in zip(runs, looks, strict=True):
            alone = len(run.epochs) == 1
            curves.plot(run.epochs, run.curve, color=colour, ls=dash, lw=1.8, marker=marker if alone else "")
        curves.xaxis.set_major_locator(_whole_epochs(max(float(run.epochs[-1]) for run in runs)))
        curves.set_xlabel("epoch")
        curves.set_title(f"validation {'loss' if metric == 'log_loss' else label}, mean over folds")
        step = min(0.16, 0.8 / len(runs))
        for index, (run, (colour, _, marker)) in enumerate(zip(runs, looks, strict=True)):
            at = np.arange(len(classes)) + (index - (len(runs) - 1) / 2) * step
            spread = np.abs(run.recall_interval - run.recall[:, None]).T
            recalls.errorbar(at, run.recall, spread, fmt=marker, color=colour, ms=4.5, lw=1.2)
        crowded = len(classes) > 12 or max(map(len, classes)) > 14
        recalls.set_xticks(range(len(classes)), [short(name, 22) for name in classes], rotation=90 if crowded else 0)
        recalls.set_xlim(-0.6, len(classes) - 0.4)
        recalls.set_ylim(-0.02, 1.02)
        recalls.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        recalls.grid(visible=False, axis="x")
        for edge in range(1, len(classes)):
            recalls.axvline(edge - 0.5, color=FAINT, lw=0.6)
        recalls.set_title("recall of each class, with its 95% interval")
        handles = [
            Line2D([], [], color=to_rgba(colour), ls=dash, marker=marker, ms=5, label=short(run.name, 28))
            for run, (colour, dash, marker) in zip(runs, looks, strict=True)
        ]
        curves.legend(handles=handles, fontsize=7.5, ncols=math.ceil(len(runs) / 8))
