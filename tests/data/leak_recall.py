"""What may have happened to a copy of an image, and the share of such copies that the leak guard finds.

`.venv/bin/python tests/data/leak_recall.py aspicv 100` prints the table for 100 images of a competition that was taken
in. A copy is found where the similarity reaches the threshold, whichever image of the competition it is taken for.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from foldwise.data.competition import load_dataset
from foldwise.data.leaks import THRESHOLD, nearest_copies
from foldwise.data.stacked import Stacked
from foldwise.stats import wilson

REPO = Path(__file__).resolve().parents[2]


def jpeg(quality):
    def change(gray):
        file = io.BytesIO()
        Image.fromarray(gray).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return change


def warped(*, right=0.0, down=0.0, degrees=0.0, border=cv2.BORDER_REPLICATE):
    def change(gray):
        height, width = gray.shape
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
        matrix[:, 2] += right, down
        return cv2.warpAffine(gray, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)

    return change


def lit(contrast, brightness):
    return lambda gray: np.clip((gray.astype(np.float32) - 128) * contrast + 128 + brightness, 0, 255).astype(np.uint8)


def gamma(power):
    return lambda gray: np.rint(255 * (gray / 255) ** power).astype(np.uint8)


def resized(*sides):
    def change(gray):
        for side in sides:
            how = cv2.INTER_AREA if side < gray.shape[0] else cv2.INTER_CUBIC
            gray = cv2.resize(gray, (side, side), interpolation=how)
        return gray

    return change


def cropped(border):
    return lambda gray: resized(gray.shape[0])(np.ascontiguousarray(gray[border:-border, border:-border]))


def covered(share):
    def change(gray):
        out = gray.copy()
        out[round(len(gray) * (1 - share)) :] = 128
        return out

    return change


def in_turn(*changes):
    def change(gray):
        for one in changes:
            gray = one(gray)
        return gray

    return change


def mirrored(gray):
    return np.ascontiguousarray(gray[:, ::-1])


Change = Callable[[np.ndarray], np.ndarray]

# (48, 48) uint8 to (side, side) uint8. What the guard promises to see through.
PROMISED: dict[str, Change] = {
    "JPEG, quality 60": jpeg(60),
    "JPEG, quality 30": jpeg(30),
    "JPEG, quality 15": jpeg(15),
    "mirrored": mirrored,
    "moved by 2 px, right and down": warped(right=2, down=2),
    "moved by 4 px, left and up": warped(right=-4, down=-4),
    "contrast x 0.5, brightness + 30": lit(0.5, 30),
    "contrast x 1.4, brightness - 20": lit(1.4, -20),
    "gamma 0.6": gamma(0.6),
    "gamma 1.7": gamma(1.7),
    "down to 24 px and up again": resized(24, 48),
    "as 96 px": resized(96),
    "cropped by 2 px a side": cropped(2),
    "cropped by 4 px a side": cropped(4),
    "mirrored, moved, cropped, lit, 64 px, JPEG 30": in_turn(
        mirrored, warped(right=2, down=-1), cropped(2), gamma(1.3), lit(0.8, 10), resized(64), jpeg(30)
    ),
}
# And what lies at its limits or beyond.
BEYOND: dict[str, Change] = {
    "turned by 3 degrees": warped(degrees=3),
    "turned by 6 degrees": warped(degrees=6),
    "turned by 10 degrees": warped(degrees=10),
    "cropped by 6 px a side": cropped(6),
    "cropped by 8 px a side": cropped(8),
    "lowest quarter covered": covered(1 / 4),
    "lower half covered": covered(1 / 2),
}


def main(competition: str, count: int) -> None:
    """Print a row for each change."""
    others = load_dataset(REPO, competition).images
    rows = np.sort(np.random.default_rng(0).choice(len(others), count, replace=False))
    gray = [others[row, :, :, 0] for row in rows]
    copies = [np.stack([change(image) for image in gray])[..., None] for change in (PROMISED | BEYOND).values()]
    # One call for all: most of the time goes into preparing the competition's images.
    _, similarity = nearest_copies(Stacked(copies), others)
    print("| A copy | Found | 95% interval | Similarity: median (lowest tenth) |\n|---|---|---|---|")
    for name, of_change in zip(PROMISED | BEYOND, np.split(similarity, len(copies)), strict=True):
        found = int((of_change >= THRESHOLD).sum())
        low, high = wilson(np.array([found]), np.array([count]))[0]
        tenth, median = np.quantile(of_change, [0.1, 0.5])
        print(f"| {name} | {found} of {count} | {low:.3f} to {high:.3f} | {median:.2f} ({tenth:.2f}) |")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
