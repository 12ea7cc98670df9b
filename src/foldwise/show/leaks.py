"""What the leak guard finds between a data set from elsewhere and a competition: a table, and pairs to look at.

The figures are those by which experiments leave copies out; the picture shows what lies on both sides of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from foldwise.data.competition import Dataset, competition_folder, load_dataset
from foldwise.data.leaks import Likeness, likeness
from foldwise.errors import DataError, Fault
from foldwise.show.plots import COLOURS, GRAY, INK, picture

# Bands above the threshold are those of a run's record; below it, as finely as the eye wants them there.
_BELOW = (-1.0, 0.6, 0.7, 0.8)
_NEAR = 0.05
# Pairs on each side of the threshold, in so many columns.
_PAIRS, _COLUMNS = 16, 4
# Steps between pairs, where an image's longer side is 1.
_PAIR_WIDTH, _PAIR_HEIGHT = 2.3, 1.42


@dataclass(frozen=True, eq=False)
class Leaks:
    """Two data sets and how much the images of one resemble those of the other.

    Attributes:
        source: The data set from elsewhere.
        competition: What is scored.
        likeness: Of the source's images to the competition's.
    """

    source: Dataset
    competition: Dataset
    likeness: Likeness

    @property
    def picture(self) -> Path:
        """Where its picture belongs, relative to the project's root."""
        folder = competition_folder(Path(), self.source.competition.name)
        return folder / f"leaks-{self.competition.competition.name}.png"


def leaks(root: Path, competition: str, source: str, *, say: Callable[[str], None] = lambda _text: None) -> Leaks:
    """Compare a data set with a competition, or read what an earlier comparison of the same images kept.

    Args:
        root: The project's root.
        competition: What is scored.
        source: The data set from elsewhere.
        say: Takes a line where the comparison is going to take its time.

    Raises:
        DataError: If one of them was not taken in, or both are the same.
    """
    if competition == source:
        what = f"{source} is compared with itself, and all of it would be copies"
        raise DataError([Fault("leaks", what, "name the competition, and the data set from elsewhere")])
    theirs, ours = load_dataset(root, source), load_dataset(root, competition)
    return Leaks(theirs, ours, likeness(theirs, ours, root, say=say))


def leak_lines(leaks: Leaks) -> list[str]:
    """What the terminal says: images by similarity, how many lie near the threshold, and what is left."""
    like, ours = leaks.likeness, leaks.competition
    count, gone = len(like.ids), int(like.copies.sum())
    theirs_name, ours_name = leaks.source.competition.name, ours.competition.name
    ends = [*_BELOW, like.threshold]
    below, _ = np.histogram(like.similarity[~like.copies], ends)
    names = [f"below {ends[1]:.2f}", *(f"{low:.2f} to {high:.2f}" for low, high in pairwise(ends[1:]))]
    bands = [(name, number, "kept") for name, number in zip(names, below.tolist(), strict=True)]
    bands += [(name, number, "left out") for name, number in like.counts().items()]
    lines = [f"{count:,} images of {theirs_name} against {len(ours.ids):,} of {ours_name}", ""]
    lines.append(f"{'similarity':<14}  {'images':>8}  {'share':>6}")
    lines += [f"{name:<14}  {number:>8,}  {number / count:>6.1%}  {fate}" for name, number, fate in reversed(bands)]
    under, over = (int(side.sum()) for side in _near(like))
    copied, labelled = np.isin(ours.ids, like.nearest[like.copies]), ours.labels >= 0
    of_labelled, of_others = (
        f"{int((copied & part).sum()):,} of {int(part.sum()):,}" for part in (labelled, ~labelled)
    )
    lines += [
        "",
        f"near {like.threshold:.2f}  {over:,} left out less than {_NEAR} above, {under:,} kept less than {_NEAR} below",
        f"copies     {gone:,} ({gone / count:.1%}), of {of_labelled} labelled and {of_others} unlabelled images of "
        f"{ours_name}",
        f"left       {count - gone:,} images of {theirs_name} are no copies",
    ]
    return lines


def draw_leaks(leaks: Leaks, root: Path) -> Path:
    """Draw how similar the images are, and the pairs on both sides of the threshold; not for git, as it shows images.

    Args:
        leaks: As found.
        root: The project's root; the picture goes to `inputs/<source>/leaks-<competition>.png`.

    Returns:
        The picture.
    """
    like, path = leaks.likeness, root / leaks.picture
    theirs, ours = leaks.source.competition.name, leaks.competition.competition.name
    order = np.argsort(like.similarity, kind="stable")
    first = len(order) - int(like.copies.sum())
    sides = [
        (order[:first][::-1][:_PAIRS], f"kept: the most similar pairs, below {like.threshold:.2f}"),
        (order[first:][:_PAIRS], f"left out: the least similar pairs, from {like.threshold:.2f} on"),
    ]
    note = (
        f"Each pair: an image of {theirs} on the left, the image of {ours} that it resembles most on the right; above "
        "them the similarity and the two ids. The step in the histogram is where pairs begin to be compared px by px."
    )
    deep = -(-max(len(rows) for rows, _ in sides) // _COLUMNS)
    with picture(path, 12, 2.9 + 0.92 * deep, title=f"{theirs}: copies of images of {ours}", note=note) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=[1.7, 0.92 * deep])
        _histogram(figure.add_subplot(grid[0, :]), like)
        for column, (rows, title) in enumerate(sides):
            _pairs(figure.add_subplot(grid[1, column]), leaks, rows, title)
    return path


def _near(like: Likeness) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of what is close to the threshold, below and above."""
    close = np.abs(like.similarity - np.float32(like.threshold)) < _NEAR
    return close & ~like.copies, close & like.copies


def _histogram(axes: Axes, like: Likeness) -> None:
    bins = np.linspace(-1, 1, 201).tolist()
    low = max(-1.0, float(np.floor(like.similarity.min() * 20)) / 20)
    for part, colour, name in ((~like.copies, GRAY, "kept"), (like.copies, COLOURS[1], "left out as copies")):
        axes.hist(like.similarity[part], bins, color=colour, label=f"{name}: {int(part.sum()):,}")
    axes.axvline(like.threshold, color=INK, lw=1, ls="--", label=f"threshold {like.threshold:.2f}")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.7, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(low, 1)
    axes.set_ylabel("images")
    axes.set_xlabel("similarity to the likeliest image of the competition", fontsize=8)
    axes.legend(fontsize=8, loc="upper left")


def _pairs(axes: Axes, leaks: Leaks, rows: NDArray[np.intp], title: str) -> None:
    like = leaks.likeness
    row_of = {image: row for row, image in enumerate(leaks.competition.ids.tolist())}
    axes.set_axis_off()
    axes.set_title(title if len(rows) else f"{title}: none")
    for index, row in enumerate(rows.tolist()):
        down, across = divmod(index, _COLUMNS)
        top, left = down * _PAIR_HEIGHT, across * _PAIR_WIDTH
        nearest = str(like.nearest[row])
        shown = leaks.source.images[row], leaks.competition.images[row_of[nearest]]
        for offset, image in zip((0.0, 1.03), shown, strict=True):
            height, width = (side / max(image.shape[:2]) for side in image.shape[:2])
            x = left + offset + (1 - width) / 2
            extent = (x, x + width, top + height, top)
            flat = image[..., 0] if image.shape[-1] == 1 else image
            axes.imshow(flat, cmap="gray", vmin=0, vmax=255, interpolation="bicubic", extent=extent)
        caption = f"{like.similarity[row]:.4f}  {_end(str(like.ids[row]))} | {_end(nearest)}"
        axes.text(left, top - 0.06, caption, fontsize=6.5, va="bottom", color=INK)
    deep = max(1, -(-len(rows) // _COLUMNS))
    axes.set_xlim(0, _COLUMNS * _PAIR_WIDTH)
    axes.set_ylim(deep * _PAIR_HEIGHT - 0.4, -0.4)
    axes.set_anchor("NW")


def _end(name: str) -> str:
    """The end of an id, where ids differ."""
    return name if len(name) <= 8 else "…" + name[-7:]
