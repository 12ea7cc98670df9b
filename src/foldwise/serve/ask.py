"""The command `predict`: files, folders and patterns to answers, as lines for people or as JSON.

An image that the models were trained on is answered by those that never saw it, and the answer says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import Fault
from foldwise.serve.faces import Box, find_faces
from foldwise.serve.pictures import Limits, PictureError, read_picture
from foldwise.serve.predictor import Own, Prediction, Predictor

# Of the user's own files, which may be a camera's largest.
LIMITS = Limits(bytes=64 * 2**20, pixels=80_000_000)

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
_BAR = 24  # characters of a probability of 1
_WIDEST = 40  # characters of a file's name that keep the columns straight


@dataclass(frozen=True, eq=False)
class Answer:
    """What the models say of a picture, or of a face in it.

    Attributes:
        file: As the user named it, or as it is called in the folder that they named.
        label: The likeliest class.
        probabilities: (C,) float64.
        face: Its number in the picture, from 1; 0 for the whole picture.
        box: The face; None for the whole picture.
        fold: Whose models were asked; None for all.
        own: Which training image the picture is; None for none.
        no_face: Whether faces were looked for in vain.
    """

    file: str
    label: str
    probabilities: NDArray[np.float64]
    face: int
    box: Box | None
    fold: int | None
    own: Own | None
    no_face: bool


@dataclass(frozen=True, eq=False)
class Answers:
    """What came of asking about some files.

    Attributes:
        predictor: Who was asked.
        answers: In the order of the files; of a file its faces, the largest first.
        faults: Files that could not be read.
    """

    predictor: Predictor
    answers: tuple[Answer, ...]
    faults: tuple[Fault, ...]


def picture_files(named: Sequence[str]) -> tuple[list[Path], list[Fault]]:
    """Find the files that were named.

    Args:
        named: Files, folders (the pictures in them, by their suffix) and patterns such as `shots/*.jpg`.

    Returns:
        Files in the order named, those of a folder or pattern in natural order; and what is not there.
    """
    files: list[Path] = []
    faults = []
    for name in named:
        path = Path(name)
        if path.is_dir():
            found = [file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file()]
            files += sorted(found, key=_natural)
            if not found:
                faults.append(Fault(_printable(name), "is a folder without pictures", "name the pictures themselves"))
        elif path.exists():
            files.append(path)
        elif matches := [match for match in _matches(path) if match.is_file()]:
            files += sorted(matches, key=_natural)
        else:
            faults.append(Fault(_printable(name), "there is no such file", "give a picture, a folder or a pattern"))
    return list(dict.fromkeys(files)), faults


def ask(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    faces: bool = False,
    fold: int | None = None,
    limits: Limits = LIMITS,
    faults: Sequence[Fault] = (),
) -> Answers:
    """Predict files, all in one batch.

    Args:
        predictor: Who is asked.
        files: Pictures; what cannot be read is a fault, and the others are predicted.
        faces: Look for faces, and answer for each; for the whole picture where there is none.
        fold: Only the models of this fold; None: all, but for a training image those that never saw it.
        limits: Of each file.
        faults: What was wrong before, to be told with the rest.

    Raises:
        FoldwiseError: If there is no such fold.
        DivergedError: If a logit is not finite.
    """
    rows: list[NDArray[np.uint8]] = []
    open_answers: list[tuple[str, int, Box | None, int | None, Own | None]] = []
    told = list(faults)
    for file in files:
        name = _printable(str(file))
        try:
            if file.stat().st_size > limits.bytes:
                what = f"has {file.stat().st_size:,} bytes, but {limits.bytes:,} are allowed"
                raise PictureError(413, Fault(name, what, "make it smaller, or save it as JPEG"))
            picture = read_picture(file.read_bytes(), where=name, limits=limits)
        except PictureError as error:
            told.append(error.fault)
            continue
        except OSError as error:
            told.append(Fault(name, f"cannot be read: {error.strerror}", "see whose file it is"))
            continue
        whole = predictor.prepare([picture])
        (own,) = predictor.own(whole)
        asked = own.fold if fold is None and own is not None and own.fold in predictor.folds else fold
        boxes = find_faces(picture) if faces else []
        rows += list(predictor.prepare([picture], [boxes])) if boxes else list(whole)
        open_answers += [(name, number, box, asked, own) for number, box in enumerate(boxes, start=1)]
        if not boxes:
            open_answers.append((name, 0, None, asked, own))
    predictions: dict[int, tuple[str, NDArray[np.float64]]] = {}
    asked_folds = [asked for _, _, _, asked, _ in open_answers]
    for one in dict.fromkeys(asked_folds):
        mine = [row for row, asked in enumerate(asked_folds) if asked == one]
        found: Prediction = predictor.predict([rows[row] for row in mine], fold=one)
        answered = zip(found.labels.tolist(), found.probabilities, strict=True)
        predictions |= dict(zip(mine, answered, strict=True))
    answers = (
        Answer(name, *predictions[row], number, box, asked, own, faces and not number)
        for row, (name, number, box, asked, own) in enumerate(open_answers)
    )
    return Answers(predictor, tuple(answers), tuple(told))


def answer_lines(asked: Answers, *, show_all: bool = False) -> list[str]:
    """Answers for people: file, label, probability and a bar; at the end how often the models are right.

    Args:
        asked: The answers.
        show_all: The other classes below, the likeliest first.
    """
    names = [_titled(answer) for answer in asked.answers]
    classes = asked.predictor.classes
    width = min(_WIDEST, max(map(len, names), default=0))
    across = max(map(len, classes))
    lines = []
    for name, answer in zip(names, asked.answers, strict=True):
        ranked = sorted(zip(answer.probabilities.tolist(), classes, strict=True), key=lambda pair: -pair[0])
        # Of equal probabilities the label is the first, as `argmax` has it; sorting keeps that order.
        for rank, (prob, label) in enumerate(ranked if show_all else ranked[:1]):
            bar = "#" * round(prob * _BAR)
            lines.append(f"{'' if rank else name:<{width}}  {label:<{across}}  {prob:.2f}  {bar}".rstrip())
        lines += [f"{'':<{width}}  {note}" for note in _notes(asked.predictor, answer)]
    told = f"{asked.predictor.name}, version {asked.predictor.version}: {asked.predictor.estimate}"
    return [*lines, "", told, *_doubts(asked.predictor)] if lines else [told]


def answers_json(asked: Answers) -> dict[str, Any]:
    """Answers for programs; probabilities by class, boxes in pixels of the upright picture."""
    estimate = asked.predictor.estimate
    return {
        "model": asked.predictor.name,
        "version": asked.predictor.version,
        "competition": asked.predictor.competition.name,
        "estimate": asdict(estimate) | {"text": str(estimate)},
        "doubts": _doubts(asked.predictor),
        "answers": [
            {
                "file": answer.file,
                "label": answer.label,
                "confidence": float(answer.probabilities.max()),
                "probabilities": dict(zip(asked.predictor.classes, answer.probabilities.tolist(), strict=True)),
                "box": asdict(answer.box) if answer.box else None,
                "fold": answer.fold,
                "training_image": asdict(answer.own) if answer.own else None,
                "notes": _notes(asked.predictor, answer),
            }
            for answer in asked.answers
        ],
        "faults": [{"file": fault.where, "what": fault.what, "fix": fault.fix} for fault in asked.faults],
    }


def _titled(answer: Answer) -> str:
    """The file's name, with the number of the face; cut on the left where it is long."""
    title = f"{answer.file} face {answer.face}" if answer.face else answer.file
    return title if len(title) <= _WIDEST else f"...{title[3 - _WIDEST :]}"


def _notes(predictor: Predictor, answer: Answer) -> list[str]:
    notes = []
    if answer.box:
        notes.append(f"{answer.box.width} x {answer.box.height} px at {answer.box.left},{answer.box.top}")
    if answer.no_face:
        notes.append("no face was found: this is of the whole picture")
    if answer.own is not None:
        by = "all models" if answer.fold is None else f"fold {answer.fold}"
        seen = "did not see it" if answer.fold == answer.own.fold is not None else "saw it, which proves nothing"
        notes.append(f"image {answer.own.id} of {predictor.competition.name}'s training data: by {by}, which {seen}")
    elif answer.fold is not None:
        notes.append(f"by fold {answer.fold} alone")
    return notes


def _doubts(predictor: Predictor) -> list[str]:
    """Why an answer may be about a picture that the models were trained on, unnoticed."""
    doubts = []
    if not predictor.knows_own:
        name = predictor.competition.name
        doubts.append(f"its training images are not recognised: {name} is not taken in here as the run saw it")
    if predictor.external:
        doubts.append(f"it was trained on {', '.join(predictor.external)} too, whose pictures are not recognised")
    return doubts


def _matches(pattern: Path) -> list[Path]:
    try:
        return list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError:  # such as a**.jpg, which means no file
        return []


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _printable(name: str) -> str:
    """A file's name without what would steer a terminal."""
    return name if name.isprintable() else ascii(name)
