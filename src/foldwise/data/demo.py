"""Drawing a competition to try everything on: gray cartoon faces with seven emotions, as a hand-out has them.

Expressions overlap, labels err and pictures recur, so that scores behave as they do on photographs.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from foldwise.files import atomic_write

Pixels = npt.NDArray[np.uint8]

# Shares of the classes in a well-known hand-out of faces.
SHARES = {
    "angry": 0.131,
    "disgust": 0.014,
    "fear": 0.153,
    "happy": 0.237,
    "neutral": 0.181,
    "sad": 0.167,
    "surprise": 0.116,
}
CLASSES = tuple(SHARES)

LABEL_NOISE = 0.05
TWINS = 0.01

# Faces are drawn large and averaged down, which is smoother than any line drawn at the final size.
SIDE, CANVAS = 48, 192


@dataclass(frozen=True)
class Expression:
    """What a face does; 0 is at rest for all but `eyes`.

    Attributes:
        smile: Corners of the mouth, -1 down to 1 up.
        gape: How far the mouth is open, 0 to 1.
        purse: How narrow the mouth is, -1 wide to 1 round.
        sneer: Crooked mouth and wrinkled nose, 0 to 1.
        frown: Brows, -1 inner ends raised to 1 inner ends lowered.
        lift: Brows, -1 low to 1 high.
        eyes: How far they are open, 0 to 1.
    """

    smile: float
    gape: float
    purse: float
    sneer: float
    frown: float
    lift: float
    eyes: float


REST = Expression(smile=0.0, gape=0.0, purse=0.0, sneer=0.0, frown=0.0, lift=0.0, eyes=0.5)
TYPICAL = {
    "angry": Expression(smile=-0.45, gape=0.15, purse=-0.1, sneer=0.1, frown=0.85, lift=-0.5, eyes=0.45),
    "disgust": Expression(smile=-0.45, gape=0.15, purse=0.1, sneer=0.9, frown=0.5, lift=-0.4, eyes=0.25),
    "fear": Expression(smile=-0.35, gape=0.4, purse=-0.3, sneer=0.0, frown=-0.6, lift=0.6, eyes=0.85),
    "happy": Expression(smile=0.85, gape=0.3, purse=-0.4, sneer=0.0, frown=0.0, lift=0.15, eyes=0.45),
    "neutral": REST,
    "sad": Expression(smile=-0.6, gape=0.0, purse=0.15, sneer=0.0, frown=-0.7, lift=-0.1, eyes=0.35),
    "surprise": Expression(smile=0.0, gape=0.8, purse=0.7, sneer=0.0, frown=-0.1, lift=0.9, eyes=0.9),
}


def draw_demo(folder: Path, *, seed: int = 7, train: int = 1000, test: int = 200) -> None:
    """Draw a hand-out: `dataset.zip`, `train.csv`, and `test_labels.csv` to score a submission with.

    About 1 % of the images are another encoding of an earlier one, a third of these under another label and a third
    in the test part; about 5 % of the other labels are wrong. The same arguments give the same bytes.

    Args:
        folder: Where to; made if need be.
        seed: Another seed, other faces.
        train: Labelled images, ids from 1; at least 60 for every class to be there twice.
        test: Images to predict, ids after those.
    """
    rng = np.random.default_rng([seed, train, test])
    truth = _classes(rng, train) + _classes(rng, test)
    twin_of = _twins(rng, truth, train)
    labels = _labels(rng, truth, train, twin_of)

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as files:
        for row, name in enumerate(truth):
            drawn = twin_of.get(row, row)
            face = draw_face(name, np.random.default_rng([seed, drawn]))
            encoded = io.BytesIO()
            Image.fromarray(face).save(encoded, "JPEG", quality=95 if row == drawn else 91)
            # A fixed date: the archive's bytes must not depend on when it was drawn.
            files.writestr(zipfile.ZipInfo(f"{row + 1}.jpg", (2020, 1, 1, 0, 0, 0)), encoded.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "dataset.zip", archive.getvalue())
    for file, rows in (("train.csv", range(train)), ("test_labels.csv", range(train, train + test))):
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "label"])
        writer.writerows([row + 1, labels[row]] for row in rows)
        atomic_write(folder / file, text.getvalue())


def draw_face(emotion: str, rng: np.random.Generator) -> Pixels:
    """Draw one face.

    Args:
        emotion: One of `CLASSES`.
        rng: All that is left to chance comes from it.

    Returns:
        (48, 48) uint8, 0-255.
    """
    backdrop = np.linspace(rng.uniform(30, 215), rng.uniform(30, 215), CANVAS)
    canvas = np.tile(backdrop.astype(np.uint8), (CANVAS, 1))
    _draw(canvas, _expression(emotion, rng), rng)

    turn = cv2.getRotationMatrix2D((CANVAS / 2, CANVAS / 2), float(rng.normal(0, 5)), float(rng.uniform(0.98, 1.14)))
    turn[:, 2] += rng.normal(0, 4, 2)
    posed = cv2.warpAffine(canvas, turn, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    face = cv2.resize(posed, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)

    across, down = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.3) * (across * math.cos(angle) + down * math.sin(angle))
    face = (face * light - 128) * rng.uniform(0.75, 1.15) + 128 + rng.normal(0, 12)
    face = cv2.GaussianBlur(face, (0, 0), float(rng.uniform(0.3, 0.9)))
    face += rng.normal(0, rng.uniform(1, 4), face.shape)
    pixels: Pixels = np.clip(np.rint(face), 0, 255).astype(np.uint8)
    return pixels


def _expression(emotion: str, rng: np.random.Generator) -> Expression:
    """A rendering of an emotion: more or less of it, with something of its own in every feature."""
    strength = rng.beta(4.5, 1.5) * 1.15
    typical, rest = vars(TYPICAL[emotion]), vars(REST)
    own = {name: rest[name] + strength * (typical[name] - rest[name]) + rng.normal(0, 0.14) for name in rest}
    low = {"gape": 0.0, "sneer": 0.0, "eyes": 0.08}
    return Expression(**{name: float(np.clip(value, low.get(name, -1.0), 1.0)) for name, value in own.items()})


def _draw(canvas: Pixels, look: Expression, rng: np.random.Generator) -> None:
    skin = float(rng.uniform(115, 225))
    dark = skin * rng.uniform(0.15, 0.4)
    shade, bright = skin * 0.78, min(255.0, skin * 1.1)
    hair = float(rng.choice([25, 45, 70, 120, 190])) + rng.uniform(-12, 12)
    wide, tall = rng.uniform(52, 62), rng.uniform(66, 76)
    x, y = CANVAS / 2, CANVAS / 2 + 8
    style = rng.choice(["short", "fringe", "long", "curls", "bald", "bun"], p=[0.28, 0.2, 0.2, 0.12, 0.1, 0.1])
    shirt = rng.uniform(20, 235)

    # Behind the head: hair, neck, shoulders.
    if style == "long":
        _oval(canvas, (x, y + 6), (wide + 16, tall + 12), hair)
        _fill(canvas, [(x - wide - 16, y), (x + wide + 16, y), (x + wide + 12, y + 80), (x - wide - 12, y + 80)], hair)
    if style == "curls":
        for turn in np.linspace(math.pi * 0.95, math.pi * 2.05, 11):
            _oval(canvas, (x + wide * math.cos(turn), y - 6 + tall * math.sin(turn)), (17, 17), hair)
    if style == "bun":
        _oval(canvas, (x, y - tall - 10), (20, 18), hair)
    _fill(canvas, [(x - 22, y + 40), (x + 22, y + 40), (x + 26, y + 100), (x - 26, y + 100)], shade)
    _oval(canvas, (x, y + 122), (78, 42), shirt)

    # The head, lit from above by a paler middle.
    for side in (-1, 1):
        _oval(canvas, (x + side * wide, y + 2), (9, 15), shade)
    _oval(canvas, (x, y), (wide, tall), skin)
    _oval(canvas, (x, y + tall * 0.08), (wide * 0.74, tall * 0.78), (skin + bright) / 2)
    if style != "bald":
        thick = {"fringe": 0.5, "short": 0.32, "long": 0.38, "curls": 0.36, "bun": 0.28}[str(style)]
        edge = rng.uniform(-10, 10)
        arc = [
            (x + (wide + 4) * math.cos(turn), y + (tall + 4) * math.sin(turn))
            for turn in np.linspace(math.radians(190), math.radians(350), 28).tolist()
        ]
        brow_line = y - tall * (1 - thick)
        _fill(
            canvas,
            [*arc, (x + wide * 0.7, brow_line + edge), (x, brow_line - 6), (x - wide * 0.7, brow_line - edge)],
            hair,
        )

    _draw_eyes(canvas, look, rng, (x, y, wide, tall), dark, hair if style != "bald" else dark)
    _draw_nose(canvas, look, (x, y), shade, dark)
    _draw_mouth(canvas, look, rng, (x, y + tall * 0.47, wide), dark, shade)


def _draw_eyes(
    canvas: Pixels,
    look: Expression,
    rng: np.random.Generator,
    head: tuple[float, float, float, float],
    dark: float,
    hair: float,
) -> None:
    x, y, wide, tall = head
    gap, size = wide * rng.uniform(0.4, 0.48), rng.uniform(10, 13)
    eye_y, gaze = y - tall * 0.12, rng.normal(0, 2.5)
    open_y = 1.5 + 11.5 * look.eyes
    brow_width, brow_gray = rng.uniform(4.5, 8), min(hair, 130.0) * 0.75
    glasses = rng.random() < 0.13
    for side in (-1, 1):
        eye_x = x + side * gap
        if open_y < 3.2:
            _line(canvas, [(eye_x - size, eye_y), (eye_x, eye_y + 2), (eye_x + size, eye_y)], dark, 3)
        else:
            _oval(canvas, (eye_x, eye_y), (size + 1.5, open_y + 1.5), dark)
            _oval(canvas, (eye_x, eye_y), (size, open_y), 242)
            iris = min(6.5, open_y)
            _oval(canvas, (eye_x + gaze, eye_y), (6.5, iris), dark * 0.5)
            _oval(canvas, (eye_x + gaze + 2, eye_y - iris * 0.4), (1.8, 1.8), 250)
        brow_y = eye_y - 17 - 8 * look.lift - max(0.0, open_y - 7) * 0.6
        inner = (eye_x - side * 15, brow_y + 9.5 * look.frown)
        outer = (eye_x + side * 16, brow_y - 4.5 * look.frown)
        middle = (eye_x + side * 1, (inner[1] + outer[1]) / 2 - 4)
        _line(canvas, [inner, middle, outer], brow_gray, brow_width)
        if look.frown > 0.45:
            _line(canvas, [(x + side * 4, brow_y + 2), (x + side * 3, brow_y + 13)], dark * 1.6, 2)
        if glasses:
            _ring(canvas, (eye_x, eye_y + 1), (size + 8, size + 6), dark * 0.6, 3)
    if glasses:
        _line(canvas, [(x - gap + size + 8, eye_y), (x + gap - size - 8, eye_y)], dark * 0.6, 3)


def _draw_nose(canvas: Pixels, look: Expression, middle: tuple[float, float], shade: float, dark: float) -> None:
    x, y = middle
    _line(canvas, [(x + 2, y - 4), (x + 7, y + 15), (x - 5, y + 17)], shade * 0.85, 3)
    if look.sneer > 0.3:
        for side in (-1, 1):
            for step in range(2):
                top = y - 9 + 8 * step
                _line(canvas, [(x + side * 3, top + 3), (x + side * 10, top - 2)], dark * 1.5, 2.0 * look.sneer + 0.6)
            _line(canvas, [(x + side * 10, y + 12), (x + side * 23, y + 26)], dark * 1.7, 3 * look.sneer)


def _draw_mouth(
    canvas: Pixels,
    look: Expression,
    rng: np.random.Generator,
    place: tuple[float, float, float],
    dark: float,
    shade: float,
) -> None:
    x, y, wide = place
    half = wide * (0.42 - 0.17 * look.purse + 0.06 * max(0.0, look.smile))
    bend, gape = 13 * look.smile, 19 * look.gape
    crook = 8 * look.sneer * float(rng.choice([-1, 1]))
    at = np.linspace(-1, 1, 15)
    # Corners go with the smile, the middle against it; an open mouth bulges both ways.
    line = y + bend * (0.45 - at**2) + crook * at
    bulge = np.sqrt(np.maximum(0, 1 - at**2))
    upper, lower = line - gape * 0.55 * bulge, line + gape * bulge
    xs = x + half * at
    if rng.random() < 0.12:
        _oval(canvas, (x, y - 13), (half * 0.9, 5), shade * 0.45)
    if gape > 3:
        outline = [*zip(xs, upper, strict=True), *zip(xs[::-1], lower[::-1], strict=True)]
        _fill(canvas, outline, dark * 0.55)
        if look.purse < 0.3 and rng.random() < 0.8:
            teeth = [*zip(xs, upper + 1, strict=True), *zip(xs[::-1], (upper + gape * 0.5 * bulge)[::-1], strict=True)]
            _fill(canvas, teeth, 238)
        _line(canvas, outline + outline[:1], dark * 1.3, 3)
    else:
        _line(canvas, list(zip(xs, line, strict=True)), dark, 4.5)
        _line(canvas, [(x - half * 0.4, y + bend * 0.45 + 9), (x + half * 0.4, y + bend * 0.45 + 9)], shade, 3)
    if look.smile > 0.35:
        for side in (-1, 1):
            _line(
                canvas, [(x + side * (half + 3), y - bend - 6), (x + side * (half + 8), y - bend + 6)], shade * 0.8, 2.5
            )


def _oval(canvas: Pixels, middle: tuple[float, float], radii: tuple[float, float], gray: float) -> None:
    _ring(canvas, middle, radii, gray, -1)


def _ring(canvas: Pixels, middle: tuple[float, float], radii: tuple[float, float], gray: float, width: float) -> None:
    sixteenths = [round(16 * value) for value in (*middle, *radii)]
    thickness = -1 if width < 0 else max(1, round(width))
    cv2.ellipse(
        canvas,
        (sixteenths[0], sixteenths[1]),
        (sixteenths[2], sixteenths[3]),
        0,
        0,
        360,
        _gray(gray),
        thickness,
        cv2.LINE_AA,
        4,
    )


def _fill(canvas: Pixels, points: Sequence[Sequence[float]], gray: float) -> None:
    cv2.fillPoly(canvas, [_points(points)], _gray(gray), cv2.LINE_AA, 4)


def _line(canvas: Pixels, points: Sequence[Sequence[float]], gray: float, width: float) -> None:
    cv2.polylines(canvas, [_points(points)], False, _gray(gray), max(1, round(width)), cv2.LINE_AA, 4)


def _points(points: Sequence[Sequence[float]]) -> npt.NDArray[np.int32]:
    return np.rint(16 * np.asarray(points, dtype=np.float64)).astype(np.int32)


def _gray(value: float) -> tuple[int]:
    return (round(min(255.0, max(0.0, value))),)


def _classes(rng: np.random.Generator, count: int) -> list[str]:
    """`count` classes in random order, in the shares of `SHARES`, two of each where there is room."""
    least = 2 if count >= 60 else 0
    exact = {name: share * count for name, share in SHARES.items()}
    counts = {name: max(least, math.floor(wanted)) for name, wanted in exact.items()}
    while (lacking := count - sum(counts.values())) != 0:
        step = 1 if lacking > 0 else -1
        movable = [name for name in counts if step > 0 or counts[name] > least]
        behind = max(movable, key=lambda name: step * (exact[name] - counts[name]))
        counts[behind] += step
    names = [name for name, number in counts.items() for _ in range(number)]
    return [names[index] for index in rng.permutation(count)]


def _twins(rng: np.random.Generator, truth: list[str], train: int) -> dict[int, int]:
    """Rows that repeat an earlier row of their own class; every third such row is a test image."""
    twin_of: dict[int, int] = {}
    used: set[int] = set()
    for number in range(max(3, round(TWINS * len(truth)))):
        rows = range(train, len(truth)) if number % 3 == 2 else range(train)
        free = [row for row in rows if row not in used]
        for row in (free[index] for index in rng.permutation(len(free))):
            earlier = [other for other in range(min(row, train)) if other not in used and truth[other] == truth[row]]
            # Common classes only, so that no label of a rare one is spent on a conflict.
            if earlier and SHARES[truth[row]] > 0.1:
                twin_of[row] = earlier[int(rng.integers(len(earlier)))]
                used |= {row, twin_of[row]}
                break
    return twin_of


def _labels(rng: np.random.Generator, truth: list[str], train: int, twin_of: dict[int, int]) -> list[str]:
    """Labels as annotators gave them: some wrong, and every third twin at odds with the image it repeats."""
    labels = list(truth)

    def another(row: int) -> str:
        others = [name for name in CLASSES if name != truth[row]]
        weights = np.array([SHARES[name] for name in others])
        return str(rng.choice(others, p=weights / weights.sum()))

    for number, row in enumerate(twin_of):
        if number % 3 == 1:
            labels[row] = another(row)
    settled = {*twin_of, *twin_of.values()}
    for rows in (range(train), range(train, len(truth))):
        open_rows = [row for row in rows if row not in settled and SHARES[truth[row]] > 0.1]
        for index in rng.permutation(len(open_rows))[: round(LABEL_NOISE * len(rows))].tolist():
            labels[open_rows[index]] = another(open_rows[index])
    return labels
