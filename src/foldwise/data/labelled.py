"""Reading any labelled set of images as a competition would have it: its classes, its form of images.

A set comes from anywhere, so that its classes may go by other names and its images may be of other sizes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from foldwise.data.competition import CompetitionSpec, competition_folder, load_competition
from foldwise.data.folds import Ints, Texts, natural_order
from foldwise.data.readers import (
    ColumnsSpec,
    FilesSpec,
    HandOut,
    HandOutError,
    ImageSpec,
    decode,
    header_of,
    open_hand_out,
    shown,
)
from foldwise.data.readers.handout import unknown
from foldwise.errors import DataError, Fault, FoldwiseError
from foldwise.files import sha256_json
from foldwise.spec.yaml import nearest

ClassMap = Mapping[str, str | None]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and labels, in the natural order of ids.

    Attributes:
        name: As it was asked for: a competition, a folder, or `hf:<owner/name>`.
        ids: (N,) str.
        images: (N, H, W, C) uint8, 0-255.
        labels: (N,) int64, indices into the competition's classes.
        sha256: Over ids, labels and pixels: the same wherever and however the files lie.
        notes: What was left out, and what was done to the images.
    """

    name: str
    ids: Texts
    images: npt.NDArray[np.uint8]
    labels: Ints
    sha256: str
    notes: tuple[str, ...]


def parse_class_map(pairs: Sequence[str]) -> dict[str, str | None]:
    """Read `<its class>=<ours>` pairs; nothing after the `=` leaves the class out.

    Raises:
        FoldwiseError: If one is no such pair, or maps a class a second time.
    """
    class_map: dict[str, str | None] = {}
    for pair in pairs:
        name, equals, label = pair.partition("=")
        if not (equals and name):
            raise FoldwiseError(
                f"expected `<class of the set>=<class of the competition>`, but got {pair!r}\n"
                "  fix: e.g. happiness=happy, or contempt= to leave that class out"
            )
        if name in class_map:
            raise FoldwiseError(f"the class {name!r} is mapped twice\n  fix: map it once")
        class_map[name] = label or None
    return class_map


def ingested_name(on: str, root: Path) -> str | None:
    """The competition under `inputs/` that `on` names, by its name or its folder; None where it names none."""
    folder = competition_folder(root, on)
    if not (folder / "competition.yaml").is_file():
        folder = Path(on)
    known = (folder / "competition.yaml").is_file() and folder.resolve().parent == (root / "inputs").resolve()
    return folder.resolve().name if known else None


def read_labelled(
    on: str, *, root: Path, competition: CompetitionSpec, class_map: ClassMap, part: str | None = None
) -> Labelled:
    """Read the labelled images of a set, brought to a competition's classes and form.

    Args:
        on: A competition under `inputs/`, a folder with a hand-out of any format that is recognised, or a data set of
            the hub, `hf:<owner/name>[@revision][:config]`.
        root: The project's root.
        competition: Whose classes and form the set is brought to. Where its `image.fit` is exact, images of other
            sizes are squashed; colour becomes gray, or gray colour.
        class_map: From the set's class names to the competition's; None: left out.
        part: Only this part of a set that was handed out in parts; None: all of them.

    Raises:
        DataError: With every fault of the set; if a class is neither mapped nor the competition's; if it holds no
            labelled image.
        HubError: If a hub cannot be reached.
        FoldwiseError: If a library that a format needs is not installed.
    """
    faults: list[Fault] = []
    with ExitStack() as stack:
        hand_out = _opened(on, root, stack, faults)
        label_of, notes = _labels(hand_out, competition, class_map, part, on, faults)
        _no_faults(faults)
        if not label_of:
            fix = "give a set with labels, or map fewer of its classes to nothing"
            raise DataError([Fault(on, "there is no labelled image of the competition's classes", fix)])
        ids = natural_order(label_of)
        images, brought = _images(hand_out, ids, competition.image, faults)
        _no_faults(faults)
    names = [label_of[image] for image in ids]
    pixels = hashlib.sha256(repr(images.shape).encode())
    pixels.update(images.data)
    return Labelled(
        name=on,
        ids=np.array(ids, dtype=np.str_),
        images=images,
        labels=np.array([competition.classes.index(label) for label in names], dtype=np.int64),
        sha256=sha256_json([ids, names, pixels.hexdigest()]),
        # What was odd about an ingested set was told when it was taken in.
        notes=(*(hand_out.notes if ingested_name(on, root) is None else ()), *notes, *brought),
    )


def _no_faults(faults: list[Fault]) -> None:
    if faults:
        raise HandOutError(list(dict.fromkeys(faults)))


def _opened(on: str, root: Path, stack: ExitStack, faults: list[Fault]) -> HandOut:
    if on.startswith("hf:"):
        return stack.enter_context(open_hand_out(on, ColumnsSpec(), None, faults))
    name = ingested_name(on, root)
    if name is None:
        if not Path(on).is_dir():
            there = sorted(path.parent.name for path in (root / "inputs").glob("*/competition.yaml"))
            fix = f"give a folder, hf:<owner/name>, or one of the competitions here: {', '.join(there) or 'none'}"
            raise DataError([Fault(f"ON={on}", "there is no such competition, and no such folder", fix)])
        return stack.enter_context(open_hand_out(Path(on), ColumnsSpec(), None, faults))
    spec, folder = load_competition(root, name), competition_folder(root, name)
    if not (folder / "train.csv").is_file():
        fix = f"`make data COMP={name} FROM=<folder>`, where the folder holds what was handed out"
        raise DataError([Fault(shown(folder), "was not taken in on this machine", fix)])
    # What was taken in lies unpacked, whatever it was handed out as.
    files = FilesSpec(format="table", pattern=spec.files.pattern)
    column = spec.split.column if spec.parts else ""
    return stack.enter_context(open_hand_out(folder, spec.columns, files, faults, part=column))


def _labels(
    hand_out: HandOut,
    competition: CompetitionSpec,
    class_map: ClassMap,
    part: str | None,
    on: str,
    faults: list[Fault],
) -> tuple[dict[str, str], list[str]]:
    """The competition's class of each image that counts, by id, and notes on the others."""
    classes = competition.classes
    parts = hand_out.table.column(hand_out.part) if hand_out.part else [""] * len(hand_out.labelled)
    if part is not None and part not in parts:
        what = unknown("part", part, hand_out.parts) if hand_out.part else f"has no parts, but {part!r} is asked for"
        fix = f"parts there: {', '.join(hand_out.parts)}" if hand_out.part else "leave the part out"
        faults.append(Fault(on, what, fix))
        part = None

    label_of: dict[str, str] = {}
    strange: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    rows = zip(hand_out.labelled, hand_out.labels, parts, hand_out.table.places, strict=True)
    for image, label, own_part, place in rows:
        if part is not None and own_part != part:
            continue
        ours = class_map.get(label, label)
        if ours is None:
            gone[label] += 1
        elif ours not in classes:
            strange[label] += label not in class_map
        elif image not in hand_out.names:
            faults.append(Fault(place, f"{image!r} has no image", "add the image, or remove the row"))
        else:
            label_of[image] = ours

    for name, target in class_map.items():
        if target is not None and target not in classes:
            fix = f"the competition's classes are: {', '.join(classes)}"
            faults.append(Fault(f"MAP {name}={target}", unknown("class", target, classes), fix))
    if strange := +strange:
        listed = ", ".join(_counted(label, count, classes) for label, count in strange.items())
        what = f"classes that are neither mapped nor the competition's: {listed}"
        first = next(iter(strange))
        fix = (
            f'map them, MAP="{first}=<class> ...", or to nothing to leave them out ("{first}="); '
            f"the competition's classes are: {', '.join(classes)}"
        )
        faults.append(Fault(on, what, fix))

    notes = [f"left out, as the class map says: {count:,} of {label!r}" for label, count in sorted(gone.items())]
    known = set(hand_out.labels)
    notes += [f"the class map names {name!r}, of which there is no image" for name in class_map if name not in known]
    if unlabelled := len(hand_out.names.keys() - set(hand_out.labelled)):
        notes.append(f"unlabelled images, which do not count: {unlabelled:,}")
    return label_of, notes


def _counted(label: str, count: int, classes: tuple[str, ...]) -> str:
    near = nearest(label.strip(), classes)
    return f"{label!r} ({count:,} images{f'; did you mean {near!r}?' if near else ''})"


def _images(
    hand_out: HandOut, ids: Sequence[str], form: ImageSpec, faults: list[Fault]
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The images in the form asked for, (N, H, W, C), and notes on what was done to them."""
    lenient = form.model_copy(update={"convert": True, "fit": "squash" if form.fit == "exact" else form.fit})
    images = np.zeros((len(ids), form.height, form.width, form.channels), dtype=np.uint8)
    squashed = converted = 0
    for row, image in enumerate(ids):
        raw = hand_out.read(image, faults)
        if raw is None:
            continue
        try:
            images[row] = decode(raw, lenient, hand_out.where(image))
        except DataError as error:
            faults += error.faults
            continue
        if header := header_of(raw):
            *size, mode = header
            squashed += form.fit == "exact" and size != [form.height, form.width]
            converted += mode not in _NATIVE[form.channels]
    notes = []
    if squashed:
        notes.append(f"squashed to {form.height}x{form.width} px, from other sizes: {squashed:,} images")
    if converted:
        notes.append(f"converted to {'gray' if form.channels == 1 else 'RGB'}: {converted:,} images")
    return images, notes


# Modes that are decoded as they are.
_NATIVE = {1: ("L",), 3: ("L", "RGB", "P")}
