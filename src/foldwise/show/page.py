"""All kept runs of a competition on one page: `oof/compare.html`, which needs no network and no other file.

Its figures lie in it as JSON, which `page.js` shows as text only; a policy in the page lets nothing else run or load.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from math import erfc, isfinite, sqrt
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foldwise.data.competition import competition_folder, load_dataset
from foldwise.data.folds import Folds, read_folds
from foldwise.errors import FoldwiseError, RecordError
from foldwise.files import atomic_write
from foldwise.metrics import METRICS, Labels, Metric, confusion_matrix
from foldwise.records.compare import ALPHA, LEVEL, Comparison, Group, Missed, Row
from foldwise.records.store import Ids, Probs64, rows_of
from foldwise.show.plots import column_title, mean_curve
from foldwise.show.report import read_curves
from foldwise.spec.load import flatten, with_defaults
from foldwise.stats import bootstrap, mcnemar, wilson

# Pictures on a page: 60 of 48 px are a quarter of a megabyte.
MOST_PICTURES = 60
# Errors of differences in recall, classes x runs x runs, beyond which a page leaves them out: about 15 MB.
_MOST_ERRORS = 2_000_000


def write_page(comparison: Comparison, path: Path, *, root: Path, pictures: bool = True) -> Path:
    """Write one HTML file that shows a comparison: tables, learning curves, matrices of pairs, and what all runs miss.

    It loads nothing: plotly.js, figures and pictures are in it. With pictures it holds images of the competition, and
    is not for publishing.

    Args:
        comparison: What `records.compare` found.
        path: The file to write; usually `oof/compare.html`, which git ignores.
        root: The project's root, for groups of near-duplicates and images.
        pictures: Whether images that every run gets wrong are drawn.

    Returns:
        `path`.

    Raises:
        DataError: If `folds.csv` cannot be read.
        ValueError: If the comparison holds no group.
    """
    from plotly.offline import get_plotlyjs

    title = html.escape(f"{comparison.competition}: runs side by side")
    plotly, script = get_plotlyjs().strip(), _asset("page.js")
    content = Template(_asset("page.html")).substitute(
        title=title,
        policy=_policy(plotly, script),
        style=_asset("page.css"),
        # `<` would end the element, or open a comment that hides its end.
        data=json.dumps(page_data(comparison, root=root, pictures=pictures), allow_nan=False).replace("<", "\\u003c"),
        plotly=plotly,
        script=script,
    )
    atomic_write(path, content)
    return path


def page_data(comparison: Comparison, *, root: Path, pictures: bool) -> dict[str, Any]:
    """What the page shows, as plain JSON values; floats to 6 decimals, None where a figure is not known.

    Args:
        comparison: What `records.compare` found.
        root: The project's root.
        pictures: Whether images that every run gets wrong are in it.

    Raises:
        DataError: If `folds.csv` cannot be read.
        ValueError: If the comparison holds no group.
    """
    if not comparison.groups:
        raise ValueError(f"a page needs a group of runs, but got ({comparison.groups=})")
    notes: list[str] = []
    alike = read_folds(competition_folder(root, comparison.competition) / "folds.csv")
    groups = [_group(group, alike, notes) for group in comparison.groups]
    pictures_note = _add_pictures(comparison, groups, root) if pictures else "Pictures are left out, as was asked for."
    data: dict[str, Any] = _plain(
        {
            "competition": comparison.competition,
            "alpha": ALPHA,
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "groups": groups,
            "left_out": comparison.left_out,
            "notes": notes,
            "pictures_note": pictures_note,
        }
    )
    return data


def _group(group: Group, folds: Folds, notes: list[str]) -> dict[str, Any]:
    metric = METRICS[group.metric]
    panels = {f"val_{metric.name}": column_title(metric.name), "val_loss": "loss"}
    panels.pop("val_log_loss", None)
    ids, labels, probs = _joined(group)
    alike = folds.groups_of(ids.tolist())
    counts = [confusion_matrix(labels, each) for each in probs]
    support = counts[0].sum(axis=1)
    several = len(group.rows) > 1
    differ = wilson(np.rint(group.disagreement * group.n_scored), np.full(group.disagreement.shape, group.n_scored))
    ((low, high),) = wilson(np.array([len(group.missed)]), np.array([group.n_scored]))
    return {
        "title": group.title,
        "metric": metric.name,
        "metric_title": column_title(metric.name),
        "greater_is_better": metric.greater_is_better,
        "panels": [{"key": key, "title": f"validation {title}"} for key, title in panels.items()],
        "n_scored": group.n_scored,
        "classes": group.classes,
        "support": support,
        "runs": [_run(row, hits, tuple(panels), notes) for row, hits in zip(group.rows, counts, strict=True)],
        "neighbours": [
            {
                "better": pair.better,
                "worse": pair.worse,
                "gain": pair.difference.gain,
                "standard_error": pair.difference.standard_error,
                "low": pair.difference.low,
                "high": pair.difference.high,
                "p": pair.p,
                "p_corrected": pair.p_corrected,
            }
            for pair in group.neighbours
        ],
        "best": None if group.best is None else asdict(group.best),
        "disagreement": _off_diagonal(group.disagreement),
        "disagreement_low": _off_diagonal(differ[..., 0]),
        "disagreement_high": _off_diagonal(differ[..., 1]),
        "pair_gain": _off_diagonal(group.pair_gain),
        "pair_gain_error": _off_diagonal(group.pair_gain_error),
        "differences": _differences(group, metric, labels, probs, alike) if several else None,
        "recall_difference_error": _recall_errors(labels, probs, alike) if several else None,
        "missed": [_missed(image) for image in _most_agreed(group.missed)],
        "missed_share": [len(group.missed) / group.n_scored, low, high] if metric.hard else None,
    }


def _run(row: Row, counts: NDArray[np.int64], panels: Sequence[str], notes: list[str]) -> dict[str, Any]:
    support = counts.sum(axis=1)
    seen = support > 0
    spread = wilson(counts.diagonal(), support)
    return {
        "name": row.name,
        "score": row.score,
        "standard_error": row.standard_error,
        "folds": row.folds,
        "seeds": row.seeds,
        "seed_std": row.seed_std,
        "tta_gain": row.tta_gain,
        "tta_error": row.tta_error,
        "parameters": row.parameters,
        "wall_s": row.wall_s,
        "device": row.device,
        "marks": row.marks,
        "track": row.track,
        "told_from_best": row.told_from_best,
        "recall": np.where(seen, row.recall, np.nan),
        "recall_low": np.where(seen, spread[:, 0], np.nan),
        "recall_high": np.where(seen, spread[:, 1], np.nan),
        "spec": {key: _text(value) for key, value in flatten(with_defaults(row.spec)).items() if key != "name"},
        "curves": _curves(row, panels, notes),
    }


def _text(value: Any) -> str:
    """A value of a spec as YAML has it."""
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def _curves(row: Row, panels: Sequence[str], notes: list[str]) -> dict[str, Any] | None:
    """Mean and standard deviation over units of each panel's column; None where there is no history."""
    try:
        units = read_curves(row.run)
    except RecordError as error:
        notes.append(f"{row.name} has no curves: {error.faults[0]}")
        return None
    curves: dict[str, Any] = {}
    for panel in panels:
        epochs, mean = mean_curve(units, panel)
        if np.isnan(mean).all():
            continue
        spread = None
        if len(units) > 1:
            spread = np.std([columns[panel][: len(epochs)] for columns in units.values()], axis=0, ddof=1)
        curves[panel] = {"epoch": epochs.astype(np.int64), "mean": mean, "sd": spread, "units": len(units)}
    return curves


def _joined(group: Group) -> tuple[Ids, Labels, list[Probs64]]:
    """Ids and labels of the best run's rows, and every run's probabilities in their order."""
    first = group.rows[0].run
    return first.ids, first.labels, [row.run.probs[rows_of(row.run.ids, first.ids)] for row in group.rows]


def _differences(
    group: Group, metric: Metric, labels: Labels, probs: Sequence[Probs64], alike: NDArray[np.str_]
) -> dict[str, Any]:
    """How much better each run is than each other, (R, R) each, and the p-value of each pair, as `compare` has them."""
    drawn = metric.sign * bootstrap(metric, labels, probs, alike)
    scores = metric.sign * np.array([row.score for row in group.rows])
    count = len(scores)
    _, member = np.unique(alike, return_inverse=True)
    right = np.stack([np.bincount(member, weights=each.argmax(axis=1) == labels) for each in probs])
    gain = scores[:, None] - scores
    error, low, high, p = (np.full((count, count), np.nan) for _ in range(4))
    for i in range(count):
        gains = drawn[:, i, None] - drawn
        error[i] = gains.std(axis=0, ddof=1)
        low[i], high[i] = np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        if metric.name == "accuracy":
            ahead = right[i] - right
            p[i] = [mcnemar(*both) for both in zip((ahead > 0).sum(axis=1), (ahead < 0).sum(axis=1), strict=True)]
        else:
            p[i] = [erfc(abs(g) / (e * sqrt(2))) if e else 1.0 for g, e in zip(gain[i], error[i], strict=True)]
    return {
        key: _off_diagonal(matrix)
        for key, matrix in {"gain": gain, "standard_error": error, "low": low, "high": high, "p": p}.items()
    }


def _recall_errors(labels: Labels, probs: Sequence[Probs64], alike: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """(C, R, R) standard errors of differences in recall, paired, NaN where unknown; None where there are too many.

    A recall is a ratio of sums over groups of near-duplicates: the linearised error of the ratio (Cochran 1977,
    "Sampling Techniques", section 6.4), for all pairs from one matrix of inner products.
    """
    count, classes = len(probs), probs[0].shape[1]
    if classes * count**2 > _MOST_ERRORS:
        return None
    _, member = np.unique(alike, return_inverse=True)
    right = np.stack([each.argmax(axis=1) == labels for each in probs]).astype(np.float64)
    errors = np.full((classes, count, count), np.nan)
    for index in range(classes):
        of_class = labels == index
        if not of_class.any():
            continue
        residual = right[:, of_class] - right[:, of_class].mean(axis=1, keepdims=True)
        by_group = np.stack([np.bincount(member[of_class], weights=row) for row in residual])
        inner = by_group @ by_group.T
        square = inner.diagonal()[:, None] + inner.diagonal() - 2 * inner
        errors[index] = np.sqrt(np.maximum(square, 0)) / of_class.sum()
    # Where no image tells two runs apart, that is no proof that none would.
    return np.where(errors > 1e-9, errors, np.nan)


def _off_diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _most_agreed(missed: Sequence[Missed]) -> list[Missed]:
    """The images on whose wrong class most runs agree first, as they are otherwise."""
    return sorted(missed, key=lambda image: -max(Counter(image.predicted).values()))


def _missed(image: Missed) -> dict[str, Any]:
    return {"id": image.id, "label": image.label, "predicted": image.predicted, "picture": None}


def _add_pictures(comparison: Comparison, groups: Sequence[dict[str, Any]], root: Path) -> str:
    """Put a picture to the first missed images of each group; a line on why there are none, else nothing."""
    try:
        data = load_dataset(root, comparison.competition)
    except FoldwiseError as error:
        return f"There are no pictures: {str(error).splitlines()[0]}"
    row = {image: number for number, image in enumerate(data.ids.tolist())}
    for group, content in zip(comparison.groups, groups, strict=True):
        if any(each.run.info["hashes"]["inputs"] != data.sha256 for each in group.rows):
            return f"There are no pictures: the images or labels of {comparison.competition} are not those of the runs."
        for image in content["missed"][:MOST_PICTURES]:
            image["picture"] = _data_uri(np.asarray(data.images[row[image["id"]]]))
    return ""


def _data_uri(image: NDArray[np.uint8]) -> str:
    """An image, (H, W, C) with C 1 or 3, as PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _plain(value: Any) -> Any:
    """Plain JSON types of arrays, tuples and mappings; floats to 6 decimals, None for what is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if isfinite(value) else None
    return value


def _policy(*scripts: str) -> str:
    """A content security policy by which only these scripts run, and nothing is loaded."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return resources.files("foldwise.show").joinpath(name).read_text(encoding="utf-8").strip()
