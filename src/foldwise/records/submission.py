"""Writing a blend as a submission, and checking a submission before it is uploaded.

A submission's bytes depend on the runs alone; the `blend.json` beside it says what it is and what to expect of it.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from foldwise.errors import Fault, RecordError
from foldwise.files import atomic_write, pretty_json, sha256_bytes
from foldwise.metrics import LOG_LOSS_EPS
from foldwise.records.ensemble import Blend, Correction, Recipe
from foldwise.records.store import Probs64, rows_of

# 2 added how to calibrate and what was tried; whatever 1 has is there as it was.
SCHEMA_VERSION = 2
_SUBMISSION, _BLEND = "submission.csv", "blend.json"
# Members that are printed; the rest are counted.
_LISTED = 12
# Characters of a line of explanation.
_WIDTH = 105


def check_submission(
    content: bytes,
    *,
    where: str,
    expected_ids: Sequence[str],
    classes: Sequence[str],
    id_column: str = "id",
    label_column: str = "label",
) -> list[Fault]:
    """Find all that keeps a file from being a submission.

    Args:
        content: The bytes of the file.
        where: How to name the file.
        expected_ids: The ids that it must hold, in their order.
        classes: The labels that it may hold.
        id_column: Name of the first column.
        label_column: Name of the second.

    Returns:
        Faults, each with its line; empty for a good submission.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [Fault(where, f"is not UTF-8 (byte {error.start})", "save it as UTF-8")]
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != [id_column, label_column]:
        what = f"the header must be `{id_column},{label_column}`, but is `{','.join(header)}`"
        fix = "save it without a byte order mark" if text.startswith("\ufeff") else ""
        return [Fault(f"{where}:1", what, fix)]

    faults = []
    ids: list[str] = []
    expected = set(expected_ids)
    seen: dict[str, int] = {}
    for row in reader:
        place = f"{where}:{reader.line_num}"
        if len(row) != 2:
            faults.append(Fault(place, f"two cells must be there, but got {len(row)}"))
            continue
        name, label = row
        if not name:
            faults.append(Fault(place, "the id is blank"))
        elif name in seen:
            faults.append(Fault(place, f"the id {name} is there already, in line {seen[name]}"))
        elif name not in expected:
            faults.append(Fault(place, f"the id {name} is none of the {len(expected)} to be predicted"))
        if not label:
            faults.append(Fault(place, f"the label of id {name} is blank"))
        elif label not in classes:
            near = get_close_matches(label, classes, n=1)
            fix = f"did you mean `{near[0]}`?" if near else f"the classes are {', '.join(classes)}"
            faults.append(Fault(place, f"unknown label {label!r}", fix))
        seen.setdefault(name, reader.line_num)
        ids.append(name)
    missing = [name for name in expected_ids if name not in seen]
    if missing:
        what = f"{len(missing)} of {len(expected_ids)} ids are missing: {', '.join(missing[:5])}"
        faults.append(Fault(where, what + (", ..." if len(missing) > 5 else "")))
    if not faults and ids != list(expected_ids):
        first = next(index for index, name in enumerate(ids) if name != expected_ids[index])
        what = (
            f"the order of the ids is not the expected one: id {expected_ids[first]} must be here, but got {ids[first]}"
        )
        faults.append(Fault(f"{where}:{first + 2}", what, "sort the rows"))
    return faults


def write_submission(
    folder: Path, blend: Blend, *, expected_ids: Sequence[str], id_column: str, label_column: str, now: datetime
) -> Path:
    """Write a blend's predictions to a folder of their own, and over the newest copy.

    Args:
        folder: `submissions`; gets `<now>-<hash>/submission.csv` and `blend.json`, and a copy of both as the newest.
        blend: What to submit.
        expected_ids: The ids to predict, in the order to write.
        id_column: Name of the first column.
        label_column: Name of the second.
        now: Names the folder, to the second, unless the very same blend has one already.

    Returns:
        The folder of this submission.

    Raises:
        RecordError: If the blend does not predict an expected id.
    """
    predicted = set(blend.test_ids.tolist())
    if lacking := [name for name in expected_ids if name not in predicted]:
        what = (
            f"the blend predicts {len(blend.test_ids)} ids, but {len(lacking)} of the expected ones are not among them"
        )
        fix = "run its members again on the present data, with --fresh"
        raise RecordError([Fault(_SUBMISSION, f"{what}, such as {lacking[0]}", fix)])
    rows = rows_of(blend.test_ids, np.array(expected_ids, dtype=np.str_))
    labels = [blend.classes[index] for index in blend.test_probs[rows].argmax(axis=1).tolist()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([id_column, label_column])
    writer.writerows(zip(expected_ids, labels, strict=True))
    content = text.getvalue().encode()
    faults = check_submission(
        content,
        where=_SUBMISSION,
        expected_ids=expected_ids,
        classes=blend.classes,
        id_column=id_column,
        label_column=label_column,
    )
    if faults:
        raise RecordError(faults)

    digest = sha256_bytes(content)
    description = pretty_json(_describe(blend, Counter(labels), digest))
    # The same blend again is the same submission: it keeps its folder.
    same = [file.parent for file in folder.glob(f"*-{digest[:8]}/{_BLEND}") if file.read_text("utf-8") == description]
    path = min(same, default=folder / f"{now:%Y%m%d-%H%M%S}-{digest[:8]}")
    for place in (path, folder):
        # A description must never stand beside a submission that it does not describe.
        (place / _BLEND).unlink(missing_ok=True)
        atomic_write(place / _SUBMISSION, content)
        atomic_write(place / _BLEND, description)
    return path


def predict_as_described(told: Mapping[str, Any], probs: Sequence[Probs64]) -> Probs64:
    """Blend predictions in the way that a `blend.json` tells.

    Args:
        told: The content of the file.
        probs: Predictions (N, C) of each of its members, in their order there, of the same images.

    Returns:
        (N, C) float64; of the members' `test.csv` the probabilities that gave `submission.csv`.
    """
    members, classes = told["members"], len(told["classes"])
    weights = np.array([member["weight"] for member in members])
    recipe = Recipe(
        method="best" if told["method"] == "single" else told["method"],
        coefficients=np.array([member.get("coefficient", member["weight"]) for member in members]),
        # The first schema averaged probabilities as they were.
        temperatures=np.array([member.get("temperature", 1.0) for member in members]),
        bias=np.array(told.get("bias", [0.0] * classes)),
        shares=weights,
    )
    correction = told.get("prior", {}).get("correction")
    if correction is None:
        return recipe.predict(probs, None)
    return recipe.predict(probs, Correction(correction["exponent"], tuple(correction["factors"])))


def blend_lines(blend: Blend) -> list[str]:
    """What to tell of a blend: its members, the methods that were tried, the estimate and what to expect."""
    listed = blend.members[:_LISTED]
    width = max(len(name) for name in ("member", *(member.run.name for member in listed)))
    gained = any(member.gain is not None for member in listed)
    lines = [f"{'member':<{width}}  weight  OOF {blend.metric:<14}" + ("  gain from it" if gained else "")]
    for member in listed:
        line = f"{member.run.name:<{width}}  {member.weight:6.3f}  {_with_error(member.score, member.standard_error)}"
        if member.gain is not None and member.gain_standard_error is not None:
            line += f"  {_with_error(member.gain, member.gain_standard_error, sign='+')}"
        lines.append(line)
    if rest := blend.members[_LISTED:]:
        lines.append(f"and {len(rest)} more, with {sum(member.weight for member in rest):.3f} of the weight")
    lines = [line.rstrip() for line in lines]
    if len(blend.trials) > 1:
        lines += ["", f"tried       cross-fitted       over {blend.trials[0].method}"]
        for trial in blend.trials:
            line = f"{trial.method:<10}  {_with_error(trial.score, trial.standard_error)}"
            if trial is not blend.trials[0]:
                line += f"  {_with_error(trial.gain, trial.gain_standard_error, sign='+')}"
            lines.append(line + ("  <- taken" if trial.method == blend.method else ""))
        lines.append("")
    low, high = blend.interval
    right, margin = blend.expected_right(len(blend.test_ids))
    lines += [f"method       {blend.method}, of {_runs(len(blend.considered))}", f"             {blend.choice}"]
    if blend.method == "stack":
        lines.append(f"             weights: {blend.weights_are}")
    if others := Counter(method for method in blend.fold_methods.values() if method != blend.method):
        told = ", ".join(f"{method} in {count}" for method, count in sorted(others.items()))
        lines.append(f"             chosen without one of the {len(blend.fold_methods)} folds: {told}")
    if blend.correction is not None:
        pairs = zip(blend.classes, blend.correction.factors, strict=True)
        factors = ", ".join(f"{name} {factor:.2f}" for name, factor in pairs)
        lines.append(f"prior        {blend.prior}: probabilities to the power {blend.correction.exponent:.2f}, times")
        lines.append(f"             {factors}")
    lines += [
        f"estimate     {_with_error(blend.score, blend.standard_error)}, "
        f"{blend.level:.0%} interval {low:.4f} to {high:.4f}",
        *(f"             {line}" for line in wrap(blend.note, _WIDTH)),
    ]
    if blend.method != "single":
        lines.append(f"naive        {blend.naive:.4f} (scored on the rows that chose the weights: not to be trusted)")
    lines.append(f"expect       {right} +- {margin} of {len(blend.test_ids)} test images right")
    if blend.marks:
        lines.append(f"marks        {', '.join(blend.marks)}")
    return lines


def _with_error(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.4f} +- {error:.4f}"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _describe(blend: Blend, counts: Counter[str], digest: str) -> dict[str, Any]:
    images = counts.total()
    right, margin = blend.expected_right(images)
    return {
        "schema_version": SCHEMA_VERSION,
        "competition": blend.competition,
        "metric": blend.metric,
        "method": blend.method,
        "members": [
            {
                "run": member.run.name,
                "weight": member.weight,
                "score": member.score,
                "standard_error": member.standard_error,
                "coefficient": member.coefficient,
                "temperature": member.temperature,
                "marginal_gain": member.gain,
                "marginal_gain_standard_error": member.gain_standard_error,
                "hashes": member.run.info["hashes"],
            }
            for member in blend.members
        ],
        "weights_are": blend.weights_are,
        "bias": list(blend.bias),
        "calibration": {"kind": "temperature of each run, fitted to its log loss", "least_prob": LOG_LOSS_EPS},
        "prior": {
            "kind": blend.prior,
            "correction": asdict(blend.correction) if blend.correction is not None else None,
        },
        "considered": list(blend.considered),
        "choice": blend.choice,
        "tried": [
            {
                "method": trial.method,
                "score": trial.score,
                "standard_error": trial.standard_error,
                "gain": trial.gain,
                "gain_standard_error": trial.gain_standard_error,
            }
            for trial in blend.trials
        ],
        "estimate": {
            "score": blend.score,
            "standard_error": blend.standard_error,
            "interval": list(blend.interval),
            "level": blend.level,
            "note": blend.note,
            "fold_methods": {str(fold): method for fold, method in blend.fold_methods.items()},
        },
        "naive": blend.naive,
        "expectation": {
            "right": right,
            "plus_minus": margin,
            "of": images,
            "level": blend.level,
            "text": f"expect {right} +- {margin} right of {images}",
        },
        "classes": list(blend.classes),
        "counts": {name: counts[name] for name in blend.classes},
        "folds_sha256": blend.folds_sha256,
        "submission_sha256": digest,
        "marks": blend.marks,
        "external": blend.external,
    }
