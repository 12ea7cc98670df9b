"""A comparison of runs as text: tables for a terminal, JSON with every figure, CSV with one row a run.

What is printed is a selection that fits 80 columns; what is left out is in the JSON.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from math import isnan
from typing import Any

import numpy as np
from rich.box import Box
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foldwise.files import pretty_json
from foldwise.metrics import METRICS, confusion_matrix
from foldwise.records.compare import ALPHA, LEVEL, Comparison, Group, Row
from foldwise.records.store import external_words
from foldwise.spec.load import differences, with_defaults
from foldwise.stats import Difference, holm, normal_p, wilson

SCHEMA_VERSION = 1
# Rows of the table of blended pairs, and ids of images: what a terminal shows.
_PAIRS_SHOWN, _IDS_SHOWN = 5, 8

# A rule below the header alone, as box.SIMPLE_HEAD, of characters that every log and terminal has.
_BOX = Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)


# Printed --------------------------------------------------------------------------------------------------------------


def render(comparison: Comparison) -> RenderableType:
    """The comparison as tables that are readable from 80 columns on."""
    parts: list[RenderableType] = []
    for group in comparison.groups:
        count = _counted(len(group.rows), "run")
        heading = f"{comparison.competition}, {group.title}: {count}, scored on {_counted(group.n_scored, 'image')}"
        tables = [_score_table(group), _training_table(group)]
        if len(group.rows) > 1:
            tables[1:1] = [_neighbour_table(group), _pair_table(group)]
        tables += [_facts(lines)] if (lines := _lines(group)) else []
        parts += [Text(heading, style="bold"), Text(), *map(_indented, tables)]
    if comparison.left_out:
        parts.append(_indented(_facts([("left out", line) for line in comparison.left_out])))
    return Stack(*parts)


def _indented(table: Table) -> RenderableType:
    return Padding(table, (0, 0, 1, 1), expand=False)


def _grid(title: str) -> Table:
    return Table(
        box=_BOX,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        title_style="italic",
    )


def _name_column(table: Table, header: str) -> None:
    # A name may have 80 characters: it is broken rather than cut, since names are what one copies.
    table.add_column(header, overflow="fold", min_width=8)


def _score_table(group: Group) -> Table:
    table = _grid("Scores")
    _name_column(table, "run")
    table.add_column(group.metric, no_wrap=True)
    several = len(group.rows) > 1
    tested = any(row.run.info.get("test_score") is not None for row in group.rows)
    augmented = any(row.tta_gain is not None for row in group.rows)
    marked = any(row.marks for row in group.rows)
    if several:
        table.add_column("against the best", no_wrap=True)
    if tested:
        table.add_column("test part", no_wrap=True)
    if augmented:
        table.add_column("TTA", no_wrap=True, justify="right")
    if marked:
        table.add_column("marks", overflow="fold")
    for row in group.rows:
        cells = [row.name, _plus_minus(row.score, row.standard_error)]
        if several:
            told = row.told_from_best
            cells.append("the best" if told is None else _verdict("worse", told, "unclear"))
        if tested:
            info = row.run.info
            told = info.get("test_score") is not None
            cells.append(_plus_minus(info["test_score"], info["test_standard_error"]) if told else "-")
        if augmented:
            cells.append(_tta(row))
        if marked:
            cells.append(", ".join(row.marks) or "-")
        table.add_row(*map(Text, cells))
    return table


def _tta(row: Row) -> str:
    if row.tta_gain is None:
        return "-"
    return f"{row.tta_gain:+.4f}" + ("" if row.tta_error is None else f" +- {row.tta_error:.4f}")


def _neighbour_table(group: Group) -> Table:
    table = _grid("Is the difference real? Each run and the next")
    _name_column(table, "run")
    _name_column(table, "next")
    table.add_column("ahead by", no_wrap=True)
    table.add_column("the first is", no_wrap=True)
    for pair in group.neighbours:
        gain = _plus_minus(pair.difference.gain, pair.difference.standard_error)
        table.add_row(*map(Text, (pair.better, pair.worse, gain, _verdict("better", pair.p_corrected))))
    return table


def _pair_table(group: Group) -> Table:
    pairs = _pairs(group)
    count = len(pairs)
    few = f"best {_PAIRS_SHOWN} of {count} pairs" if count > _PAIRS_SHOWN else _counted(count, "pair")
    table = _grid(f"Two blended: the mean less the better one ({few})")
    _name_column(table, "run")
    _name_column(table, "with")
    table.add_column("differ on", no_wrap=True, justify="right")
    table.add_column("gain", no_wrap=True)
    table.add_column("blending", no_wrap=True)
    for pair in sorted(pairs, key=lambda pair: -pair["gain"])[:_PAIRS_SHOWN]:
        verdict = _verdict("helps" if pair["gain"] > 0 else "hurts", pair["p_corrected"], "unclear")
        gain = f"{pair['gain']:+.4f} +- {pair['standard_error']:.4f}"
        table.add_row(*map(Text, (pair["first"], pair["second"], f"{pair['disagreement']:.1%}", gain, verdict)))
    return table


def _training_table(group: Group) -> Table:
    table = _grid("Training")
    _name_column(table, "run")
    table.add_column("seeds", no_wrap=True)
    table.add_column("parameters", no_wrap=True, justify="right")
    table.add_column("wall time", no_wrap=True, justify="right")
    table.add_column("data", overflow="fold")
    table.add_column("trained on", overflow="fold")
    for row in group.rows:
        words = external_words(row.run.info["external"])
        data = f"external: {', '.join(words)}" if words else "own"
        seeds = f"{row.seeds}" if row.seed_std is None else f"{row.seeds}, std {row.seed_std:.4f}"
        table.add_row(*map(Text, (row.name, seeds, millions(row.parameters), duration(row.wall_s), data, row.device)))
    return table


def _lines(group: Group) -> list[tuple[str, str]]:
    """What is said below the tables: a word and its text each."""
    lines = []
    if group.best is not None:
        best = group.best
        lines.append(
            (
                "the best",
                f"{group.rows[0].name}, chosen among {best.chosen_among} on the very images that score it: its "
                f"{best.naive:.4f} may flatter. Corrected for the choice (BBC-CV): "
                f"{_plus_minus(best.score, best.standard_error)}, {best.level:.0%} interval "
                f"{best.low:.4f} to {best.high:.4f}",
            )
        )
    if len(group.rows) > 1:
        close = [row.name for row in group.rows if row.told_from_best is not None and row.told_from_best >= ALPHA]
        listed = f"not told apart from the best: {', '.join(close)}" if close else "no other run: each is worse"
        lines.append(("close", listed))
        lines += _missed_lines(group)
        lines.append(
            ("p", f"{_test_of(group.metric)}; corrected for how many are compared (Holm); told apart below {ALPHA}")
        )
    if any(row.tta_gain is not None for row in group.rows):
        text = "gain of test-time augmentation, with its paired standard error where the run's record tells it"
        lines.append(("TTA", text))
    return lines


def _missed_lines(group: Group) -> list[tuple[str, str]]:
    if not METRICS[group.metric].hard:
        return []
    count, runs = len(group.missed), "both" if len(group.rows) == 2 else f"all {len(group.rows)}"
    share, (low, high) = _share(count, group.n_scored)
    be = "is" if count == 1 else "are"
    told = f"{_counted(count, 'image')} ({share:.1%}; {low:.1%} to {high:.1%}) {be} missed by {runs} runs"
    lines = [("all wrong", told)]
    agreed = [image for image in group.missed if len(set(image.predicted)) == 1]
    if agreed:
        named = ", ".join(f"{image.id} ({image.label}: {image.predicted[0]})" for image in agreed[:_IDS_SHOWN])
        more = f" and {len(agreed) - _IDS_SHOWN:,} more" if len(agreed) > _IDS_SHOWN else ""
        get = "gets" if len(agreed) == 1 else "get"
        told = f"{len(agreed):,} of these {get} the same wrong class from {runs}, as id (label: class): {named}{more}"
        lines.append(("", told))
    return lines


def _facts(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for word, text in lines:
        table.add_row(word, Text(text))
    return table


def _verdict(word: str, p: float, otherwise: str = "not told apart") -> str:
    return f"{word if p < ALPHA else otherwise} ({_p_text(p)})"


def _p_text(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} +- {error:.4f}"


def millions(count: int | None) -> str:
    """A number of parameters in short, `-` where it is not known."""
    return "-" if count is None else f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.1f} M"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: `50 s`, `36 min`, `2.6 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _test_of(metric: str) -> str:
    if metric == "accuracy":
        return "McNemar's test (mid-p) on the same images, near-duplicates counted once"
    return "paired bootstrap over groups of near-duplicates, by the normal distribution"


def _share(count: int, total: int) -> tuple[float, tuple[float, float]]:
    low, high = wilson(np.array([count]), np.array([total]))[0].tolist()
    return count / total, (low, high)


# As files -------------------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> str:
    """Every figure with its uncertainty, as JSON; the same runs give the same text."""
    groups = [_group_json(group) for group in comparison.groups]
    return pretty_json(
        {
            "schema_version": SCHEMA_VERSION,
            "competition": comparison.competition,
            "alpha": ALPHA,
            "groups": groups,
            "left_out": list(comparison.left_out),
        }
    )


def _group_json(group: Group) -> dict[str, Any]:
    metric = METRICS[group.metric]
    share, share_interval = _share(len(group.missed), group.n_scored)
    return {
        "title": group.title,
        "metric": group.metric,
        "greater_is_better": metric.greater_is_better,
        "classes": list(group.classes),
        "n_scored": group.n_scored,
        "test": _test_of(group.metric),
        "runs": [_row_json(row, rank, group) for rank, row in enumerate(group.rows, start=1)],
        "neighbours": [
            {
                "better": pair.better,
                "worse": pair.worse,
                **_difference_json(pair.difference),
                "p": pair.p,
                "p_corrected": pair.p_corrected,
                "told_apart": pair.p_corrected < ALPHA,
                "spec_differences": _spec_differences(upper, lower),
            }
            for pair, (upper, lower) in zip(group.neighbours, pairwise(group.rows), strict=True)
        ],
        "best": None
        if group.best is None
        else {
            "run": group.rows[0].name,
            "naive": group.best.naive,
            "corrected": group.best.score,
            "standard_error": group.best.standard_error,
            "interval": [group.best.low, group.best.high],
            "level": group.best.level,
            "chosen_among": group.best.chosen_among,
            "not_told_from_best": [
                row.name for row in group.rows if row.told_from_best is not None and row.told_from_best >= ALPHA
            ],
        },
        "pairs": _pairs(group),
        "missed": None
        if not metric.hard
        else {
            "count": len(group.missed),
            "share": share,
            "interval": list(share_interval),
            "level": LEVEL,
            "images": [
                {
                    "id": image.id,
                    "label": image.label,
                    "predicted": dict(zip((row.name for row in group.rows), image.predicted, strict=True)),
                    "votes": dict(sorted(Counter(image.predicted).items(), key=lambda vote: (-vote[1], vote[0]))),
                }
                for image in group.missed
            ],
        },
    }


def _row_json(row: Row, rank: int, group: Group) -> dict[str, Any]:
    info = row.run.info
    counts = confusion_matrix(row.run.labels, row.run.probs)
    ends = wilson(counts.diagonal(), counts.sum(axis=1)).tolist()
    return {
        "rank": rank,
        "run": row.name,
        "score": row.score,
        "standard_error": row.standard_error,
        "fold_scores": info["fold_scores"],
        "fold_standard_errors": info["fold_standard_errors"],
        "seeds": info["seeds"],
        "seed_scores": info["seed_scores"],
        "seed_std": row.seed_std,
        "test_score": info.get("test_score"),
        "test_standard_error": info.get("test_standard_error"),
        "source_scores": info.get("source_scores", {}),
        "tta": {"views": info["tta"], "gain": row.tta_gain, "standard_error": row.tta_error},
        "parameters": row.parameters,
        "wall_s": row.wall_s,
        "device": row.device,
        "marks": list(row.marks),
        "track": row.track,
        "external": info["external"],
        "recall": {
            name: {"recall": None if isnan(recall) else recall, "interval": None if isnan(recall) else between}
            for name, recall, between in zip(group.classes, row.recall.tolist(), ends, strict=True)
        },
        "behind_best": None
        if row.behind_best is None or row.told_from_best is None
        else {
            **_difference_json(row.behind_best),
            "p_corrected": row.told_from_best,
            "told_apart": row.told_from_best < ALPHA,
        },
        "spec_sha256": info["hashes"]["spec"],
        "oof_sha256": info["hashes"]["oof"],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {
        "gain": difference.gain,
        "standard_error": difference.standard_error,
        "interval": [difference.low, difference.high],
        "level": difference.level,
    }


def _spec_differences(upper: Row, lower: Row) -> list[str]:
    """What the upper run's spec has otherwise than the lower one's, `optim.lr: 0.0002 -> 0.0003` each."""
    old, new = (with_defaults(row.spec) | {"name": ""} for row in (lower, upper))
    return differences(old, new)


def _pairs(group: Group) -> list[dict[str, Any]]:
    """Each two runs of a group: how often they differ, and what blending them gains, corrected for all pairs (Holm)."""
    count = len(group.rows)
    pairs = list(combinations(range(count), 2))
    p_values = [normal_p(group.pair_gain[pair], group.pair_gain_error[pair]) for pair in pairs]
    differ = np.array([group.disagreement[pair] for pair in pairs])
    ends = wilson(differ * group.n_scored, np.full(len(pairs), group.n_scored)).tolist()
    return [
        {
            "first": group.rows[i].name,
            "second": group.rows[j].name,
            "disagreement": float(group.disagreement[i, j]),
            "disagreement_interval": between,
            "gain": float(group.pair_gain[i, j]),
            "standard_error": float(group.pair_gain_error[i, j]),
            "p": p,
            "p_corrected": corrected,
        }
        for (i, j), between, p, corrected in zip(pairs, ends, p_values, holm(p_values), strict=True)
    ]


def to_csv(comparison: Comparison) -> str:
    """One row a run, best first within each group; an empty cell is unknown or does not apply."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for group in comparison.groups:
        following = {pair.better: pair for pair in group.neighbours}
        for rank, row in enumerate(group.rows, start=1):
            after, behind, info = following.get(row.name), row.behind_best, row.run.info
            cells = {
                "competition": comparison.competition,
                "group": group.title,
                "rank": rank,
                "run": row.name,
                "metric": group.metric,
                "score": row.score,
                "standard_error": row.standard_error,
                "n_scored": group.n_scored,
                "folds": row.folds,
                "seeds": row.seeds,
                "seed_std": row.seed_std,
                "test_score": info.get("test_score"),
                "test_standard_error": info.get("test_standard_error"),
                "tta_gain": row.tta_gain,
                "tta_standard_error": row.tta_error,
                "parameters": row.parameters,
                "wall_s": row.wall_s,
                "device": row.device,
                "marks": ";".join(row.marks),
                "track": row.track,
                "external": ";".join(external_words(info["external"])),
                "behind_best": None if behind is None else behind.gain,
                "behind_best_standard_error": None if behind is None else behind.standard_error,
                "behind_best_p_corrected": row.told_from_best,
                "ahead_of_next": None if after is None else after.difference.gain,
                "ahead_of_next_standard_error": None if after is None else after.difference.standard_error,
                "ahead_of_next_p_corrected": None if after is None else after.p_corrected,
            }
            if writer is None:
                writer = csv.DictWriter(text, list(cells), lineterminator="\n")
                writer.writeheader()
            writer.writerow(cells)
    return text.getvalue()
