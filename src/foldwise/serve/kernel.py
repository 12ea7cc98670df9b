"""An offline kernel: one folder that predicts a competition's test images with no network, as a code competition asks.

`build_kernel` packs it from a run or a blend; `main` is what its `predict.py` calls, wherever the folder then lies.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import foldwise
from foldwise.data.competition import CompetitionSpec, load_competition
from foldwise.data.folds import natural_order
from foldwise.data.readers import HandOut, HandOutError, ImageSpec, decode, open_hand_out, shown
from foldwise.data.readers.table import open_images
from foldwise.errors import DataError, Fault, FoldwiseError, HubError, RecordError
from foldwise.files import atomic_write, pretty_json
from foldwise.records.store import Run, write_probs
from foldwise.records.submission import check_submission
from foldwise.runs.kept import verify_weights, weight_files
from foldwise.serve.predictor import Predictor, resolve

# What the packed code imports when it predicts; what these need comes with them.
NEEDED = (
    "filelock",
    "numpy",
    "opencv-python-headless",
    "packaging",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "timm",
    "torch",
)
# Kaggle gives an account somewhat more than 100 GB for all its private data sets.
LARGEST = 100 * 10**9
# Where a code competition runs; what a lock says of other systems is left out.
_KAGGLE = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
# Images that are held in memory at once.
_CHUNK = 1024
_MANIFEST, _PROJECT, _WHEELS = "kernel.json", "project", "wheels"
_OURS = {_MANIFEST, _PROJECT, _WHEELS, "LICENSE", "README.md", "foldwise", "predict.py", "requirements.txt"}
_SAMPLE = re.compile(r"sample[_-]?submission.*\.csv", re.IGNORECASE)

_PREDICT = '''\
"""Predict a competition's test images: python predict.py <folder of images, or the hand-out> [--out submission.csv].

Everything it needs besides `requirements.txt` lies in this folder; it opens no connection.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from foldwise.serve.kernel import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main(HERE))
'''

Say = Callable[[str], None]


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was packed.

    Attributes:
        path: Its folder.
        name: The run, or `blend:<folder of the submission>`.
        runs: Names of the runs in it.
        models: How many models they have together.
        sizes: Bytes of its parts: `weights`, `wheels` and `rest`.
        requirements: Packages that it needs, with all that these need.
    """

    path: Path
    name: str
    runs: tuple[str, ...]
    models: int
    sizes: dict[str, int]
    requirements: int


def build_kernel(root: Path, name: str, out: Path | None = None, *, wheels: bool = False, say: Say) -> Kernel:
    """Pack a run or a blend into a folder that predicts with no network.

        predict.py          reads test images, writes submission.csv
        foldwise/           this package's own source
        project/            experiments, competition.yaml, records and weights; of a blend also its blend.json
        requirements.txt    what predicting needs, pinned by requirements.lock with hashes
        wheels/             the same as files, where asked for
        README.md, kernel.json

    It holds the records as they are, and so the ids and labels of `oof.csv`; no image is in it.

    Args:
        root: The project's root.
        name: As for `Predictor.load`.
        out: A folder that is new, empty or an earlier kernel, which is replaced; None: `build/kernel_<name>`.
        wheels: Download the packages too, for this machine's Python and system: several GB, most of it CUDA.
        say: Takes a line for each step that takes its time.

    Returns:
        What was packed.

    Raises:
        RecordError: If a run is not complete, or its weights are not here or not what `run.json` vouches for.
        FoldwiseError: If there is no such run or blend, `out` holds something else, requirements.lock does not pin
            what is needed, or the folder is larger than Kaggle takes.
        HubError: If wheels cannot be downloaded.
    """
    runs, told, called = resolve(name, root)
    out = root / "build" / f"kernel_{called.replace(':', '_')}" if out is None else out
    _refuse_foreign(out)
    requirements = requirements_of(NEEDED, root / "requirements.lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        work = Path(scratch) / out.name
        weights = sum(_pack_run(root, run, work / _PROJECT, say) for run in runs)
        if told is not None:
            _pack_submission(root, called, work / _PROJECT)
        competition = runs[0].info["competition"]
        described = Path("inputs") / competition / "competition.yaml"
        _copy(root / described, work / _PROJECT / described)
        shutil.copytree(Path(foldwise.__file__).parent, work / "foldwise", ignore=shutil.ignore_patterns("__pycache__"))
        if (root / "LICENSE").is_file():
            _copy(root / "LICENSE", work / "LICENSE")
        atomic_write(work / "predict.py", _PREDICT)
        atomic_write(work / "requirements.txt", "".join(requirements.values()))
        models = sum(len(run.info["weights"]) for run in runs)
        packed = {
            "schema_version": 1,
            "predicts": called,
            "competition": competition,
            "runs": [run.name for run in runs],
            "models": models,
            "foldwise": foldwise.__version__,
            "python": platform.python_version(),
        }
        atomic_write(work / _MANIFEST, pretty_json(packed))
        if wheels:
            say(f"downloading {len(requirements)} packages: several GB")
            download_wheels(work / "requirements.txt", work / _WHEELS)
        atomic_write(work / "README.md", _readme(called, models, load_competition(root, competition), wheels=wheels))
        sizes = {"weights": weights, "wheels": _size(work / _WHEELS)}
        sizes["rest"] = _size(work) - sum(sizes.values())
        if (total := sum(sizes.values())) > LARGEST:
            raise FoldwiseError(
                f"the kernel of {called} has {total / 1e9:,.1f} GB, and Kaggle takes {LARGEST / 1e9:.0f} GB of private "
                "data sets; nothing was written\n  fix: pack fewer runs, or leave the wheels out"
            )
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    return Kernel(out, called, tuple(run.name for run in runs), models, sizes, len(requirements))


def kernel_lines(kernel: Kernel, root: Path) -> list[str]:
    """What was packed, as lines for the terminal."""
    path = kernel.path.relative_to(root) if kernel.path.is_relative_to(root) else kernel.path
    sizes = ", ".join(f"{part} {size / 1e6:,.1f} MB" for part, size in kernel.sizes.items() if size)
    runs = "1 run" if len(kernel.runs) == 1 else f"{len(kernel.runs)} runs"
    return [
        f"packed     {kernel.name}: {kernel.models} models of {runs} ({', '.join(kernel.runs)})",
        f"size       {sum(kernel.sizes.values()) / 1e6:,.1f} MB: {sizes}",
        f"needs      {kernel.requirements} packages, see requirements.txt; no network",
        "note       it holds oof.csv, and so labels of the competition: see its rules before you share the folder",
        f"written    {path.as_posix()}",
        f"try it     python {path.as_posix()}/predict.py <folder of test images>",
    ]


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that is neither new nor empty nor a kernel."""
    if not out.exists():
        return
    foreign = sorted({path.name for path in out.iterdir()} - _OURS) if out.is_dir() else [out.name]
    if foreign or (any(out.iterdir()) and not (out / _MANIFEST).is_file()):
        what = f"{out} holds something else than a kernel ({', '.join(foreign[:3]) or 'no ' + _MANIFEST})"
        raise FoldwiseError(f"{what}\n  fix: name a new folder, or empty it")


def _pack_run(root: Path, run: Run, project: Path, say: Say) -> int:
    """Copy a run's records and weights: bytes of the weights."""
    to = project / "oof" / run.name
    files = [path for _, path in sorted(weight_files(run).items())]
    for path in files:
        verify_weights(run, path)
    size = sum(path.stat().st_size for path in files)
    say(f"packing    {run.name}: {len(files)} models, {size / 1e6:,.1f} MB")
    for path in files:
        _copy(path, to / path.relative_to(run.path))
    for record in ("run.json", "spec.yaml", "oof.csv", "test.csv"):
        if (run.path / record).exists():
            _copy(run.path / record, to / record)
    experiment = Path("experiments") / f"{run.name}.yaml"
    if (root / experiment).is_file():
        _copy(root / experiment, project / experiment)
    return size


def _pack_submission(root: Path, called: str, project: Path) -> None:
    """Copy the folder of a submission, to where it lay."""
    folder = called.partition(":")[2]
    (path,) = (
        path for path in (root / "submissions" / folder, root / "submissions" / "demo" / folder) if path.is_dir()
    )
    for file in ("blend.json", "submission.csv"):
        _copy(path / file, project / path.relative_to(root) / file)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def requirements_of(needed: Sequence[str], lock: Path) -> dict[str, str]:
    """Packages with all that they need on Linux, as lines of requirements by name, pinned as a lock pins them.

    Args:
        needed: Distributions that are installed here.
        lock: A requirements file with versions and hashes, as `uv pip compile --generate-hashes` writes it.

    Raises:
        FoldwiseError: If the lock is missing, or pins one of them not.
    """
    if not lock.is_file():
        raise FoldwiseError(f"{lock} is missing, which pins what a kernel needs\n  fix: take it back with git")
    pins: dict[str, str] = {}
    for pin in re.findall(r"^[A-Za-z0-9][\w.-]*==.*\n(?:[ \t]+\S.*\n)*", lock.read_text(encoding="utf-8") + "\n", re.M):
        # A package may be pinned once a range of Python versions.
        name = canonicalize_name(pin.partition("==")[0])
        pins[name] = pins.get(name, "") + pin
    found: dict[str, str] = {}
    waiting = [(canonicalize_name(name), frozenset[str]()) for name in needed]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        if name not in pins:
            raise FoldwiseError(f"requirements.lock does not pin {name}, which predicting needs\n  fix: lock it anew")
        found[name] = pins[name]
        for text in _requires(name):
            requirement = Requirement(text)
            marker = requirement.marker
            if marker and not any(marker.evaluate(_KAGGLE | {"extra": extra}) for extra in {"", *extras}):
                continue
            further = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return dict(sorted(found.items()))


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # of another system's; what it needs is then unknown, and with CUDA nothing


def download_wheels(requirements: Path, to: Path) -> None:
    """Download what a requirements file pins, for this machine's Python and system.

    Raises:
        HubError: If something cannot be had, or is not what its hash says.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--require-hashes", "--only-binary", ":all:", "--dest", str(to), "--requirement", str(requirements),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if line.startswith("ERROR")), (lines or ["pip said nothing"])[-1])
        raise HubError(
            f"the wheels cannot be downloaded ({told.removeprefix('ERROR: ')}); nothing was written\n"
            "  fix: go online, or pack without wheels and install requirements.txt where there is a network"
        )


def _readme(called: str, models: int, competition: CompetitionSpec, *, wheels: bool) -> str:
    system = f"CPython {platform.python_version()}, {platform.system()} {platform.machine()}"
    install = "`pip install -r requirements.txt` (or `pip download` it where there is a network)"
    if wheels:
        install = f"`pip install --no-index --find-links wheels -r requirements.txt` (for {system})"
    return f"""\
# {called}, offline
Predicts the classes of `{competition.name}` ({", ".join(competition.classes)}): {models} models, no network.
Made by Foldwise {foldwise.__version__} with {system}; needs Python 3.11 or newer.

1. {install}.
   Where torch, timm and pydantic are there already, as on Kaggle, it may run as it is: try; other versions of
   them may change probabilities by some thousandths.
2. `python predict.py <images> --out submission.csv`: a folder or a zip of test images, or the hand-out. Rows are
   those of `sample_submission.csv`, beside the images or by `--sample`. `--probs` writes probabilities too.
3. On Kaggle: `kaggle datasets init -p .`, then `kaggle datasets create -p . --dir-mode zip`; in the notebook
   `!python /kaggle/input/<data set>/predict.py /kaggle/input/<competition>/<images>`.
   It holds labels of the competition's images (`project/oof/*/oof.csv`): see its rules before you share it.
"""


# Predicting -----------------------------------------------------------------------------------------------------------


def main(here: Path, arguments: Sequence[str] | None = None) -> int:
    """Predict with the kernel in a folder, as its `predict.py` does.

    Args:
        here: The kernel's folder.
        arguments: What comes after `predict.py`; None for the process's own.

    Returns:
        The exit status: 0, or the `exit_code` of the error that was printed.
    """
    parser = argparse.ArgumentParser(prog="predict.py", description="Predict a competition's test images, offline.")
    parser.add_argument("images", type=Path, help="a folder or a zip of images, or the competition's hand-out")
    parser.add_argument("--out", type=Path, default=Path("submission.csv"), help="default: submission.csv")
    parser.add_argument("--sample", type=Path, help="the sample submission (default: the one beside the images)")
    parser.add_argument("--probs", type=Path, help="write the probabilities here too, as test.csv has them")
    parser.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: the best there is)")
    options = parser.parse_args(arguments)
    try:
        predict_folder(
            here / _PROJECT,
            json.loads((here / _MANIFEST).read_bytes())["predicts"],
            options.images,
            options.out,
            sample=options.sample,
            probs_to=options.probs,
            device=options.device,
            say=lambda line: print(line, flush=True),  # noqa: T201
        )
    except FoldwiseError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def predict_folder(
    root: Path,
    name: str,
    source: Path,
    out: Path,
    *,
    sample: Path | None = None,
    probs_to: Path | None = None,
    device: str | None = None,
    say: Say,
) -> None:
    """Predict the test images of a folder and write the submission.

    Images are decoded as the competition's own are. Where its `image.fit` is exact, other sizes are squashed, and other
    colours converted, which is told: nobody can mend a hidden test set.

    Args:
        root: The project's root.
        name: As for `Predictor.load`.
        source: A folder or a zip of images, or a hand-out of any format that `data.readers` opens.
        out: The submission to write.
        sample: The sample submission, whose ids, order and columns are taken; None: the one beside the images, else
            the competition's `test_ids` where they are all there, else all images without a label.
        probs_to: Where to write the probabilities; None: nowhere.
        device: As for `Predictor.load`.
        say: Takes lines for the user.

    Raises:
        DataError: If images cannot be read, or the sample submission names one that is not there; nothing is written.
        RecordError: If the run or the blend is not as it was packed.
    """
    spec = load_competition(root, resolve(name, root)[0][0].info["competition"])
    faults: list[Fault] = []
    with _opened(source, spec, faults) as images:
        _no_faults(faults)
        wanted = _wanted(images, spec, source, sample)
        say(f"images     {len(wanted.ids)} of {images.what}")
        say(f"rows       {wanted.why}")
        predictor = Predictor.load(name, root=root, device=device)
        say(f"model      {predictor.name}: {predictor.estimate}")
        probs = np.empty((len(wanted.ids), len(predictor.classes)))
        brought = 0
        for start in range(0, len(wanted.ids), _CHUNK):
            pixels, others = _decoded(images, wanted.ids[start : start + _CHUNK], spec.image, faults)
            brought += others
            # After a fault only the other faults matter.
            if not faults:
                probs[start : start + _CHUNK] = predictor.predict(list(pixels)).probabilities
        _no_faults(faults)
    if brought:
        form = f"{spec.image.height}x{spec.image.width} px, {'gray' if spec.image.channels == 1 else 'RGB'}"
        say(f"note       brought to {form}, from other sizes or colours: {brought} images")
    labels = [predictor.classes[index] for index in probs.argmax(axis=1).tolist()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(wanted.columns)
    writer.writerows(zip(wanted.given, labels, strict=True))
    content = text.getvalue().encode()
    id_column, label_column = wanted.columns
    if wrong := check_submission(
        content,
        where=str(out),
        expected_ids=wanted.given,
        classes=predictor.classes,
        id_column=id_column,
        label_column=label_column,
    ):
        raise RecordError(wrong)
    if probs_to is not None:
        ids = np.array(wanted.ids, dtype=np.str_)
        write_probs(probs_to, {"id": ids}, probs.astype(np.float32), predictor.classes)
    atomic_write(out, content)
    counts = Counter(labels)
    say(f"labels     {', '.join(f'{label} {counts[label]}' for label in predictor.classes)}")
    say(f"written    {out}" + (f", {probs_to}" if probs_to else ""))


@dataclass(frozen=True)
class _Images:
    """Images, and what is known of them.

    Attributes:
        what: What they are, in words.
        ids: In natural order.
        unlabelled: Those without a label, in natural order.
        read: The bytes of an id's file; None with a fault.
        where: How messages name an id's file.
    """

    what: str
    ids: tuple[str, ...]
    unlabelled: tuple[str, ...]
    read: Callable[[str, list[Fault]], bytes | None]
    where: Callable[[str], str]


@dataclass(frozen=True)
class _Wanted:
    """The rows of a submission.

    Attributes:
        columns: Its header: id and label.
        given: Its ids, as they are to be written.
        ids: The ids of their images.
        why: Where rows and order come from, in words.
    """

    columns: tuple[str, str]
    given: tuple[str, ...]
    ids: tuple[str, ...]
    why: str


@contextmanager
def _opened(source: Path, spec: CompetitionSpec, faults: list[Fault]) -> Iterator[_Images]:
    """The images of a hand-out, or of a plain folder or zip."""
    if not source.exists():
        raise DataError([Fault(str(source), "there is no such folder or zip", "give where the test images lie")])
    with ExitStack() as stack:
        opened: dict[str, HandOut] = {}
        if source.is_dir():
            try:
                for prefix, folder in _hand_outs(source, spec):
                    files = None if spec.sources else spec.files
                    opened[prefix] = stack.enter_context(open_hand_out(folder, spec.columns, files, faults))
            except HandOutError:
                # A table of labels that cannot be read must not turn labelled images into test images.
                if spec.sources or (source / spec.files.train).exists():
                    raise
                opened.clear()
                faults.clear()
        yield _of_hand_outs(opened, source) if opened else _plain(source, spec, stack, faults)


def _hand_outs(source: Path, spec: CompetitionSpec) -> list[tuple[str, Path]]:
    """The hand-outs in a folder, each with what comes before its ids; none where a merged set lacks its own."""
    if not spec.sources:
        return [("", source)]
    folders = [(f"{one.name}-", source / one.path) for one in spec.sources]
    return [(prefix, folder) for prefix, folder in folders if folder.is_dir()]


def _of_hand_outs(opened: Mapping[str, HandOut], source: Path) -> _Images:
    origin = {f"{prefix}{image}": (one, image) for prefix, one in opened.items() for image in one.names}
    labelled = {f"{prefix}{image}" for prefix, one in opened.items() for image in one.labelled}
    ids = tuple(natural_order(origin))
    unlabelled = tuple(image for image in ids if image not in labelled)
    what = f"{len(ids)} images in {shown(source)}, {len(unlabelled)} without a label"

    def read(image: str, faults: list[Fault]) -> bytes | None:
        hand_out, own = origin[image]
        return hand_out.read(own, faults)

    def where(image: str) -> str:
        hand_out, own = origin[image]
        return hand_out.where(own)

    return _Images(what, ids, unlabelled, read, where)


def _plain(source: Path, spec: CompetitionSpec, stack: ExitStack, faults: list[Fault]) -> _Images:
    folder, archive = (source, "") if source.is_dir() else (source.parent, source.name)
    files = stack.enter_context(open_images(folder, archive, faults))
    if files is None:
        raise DataError(faults)
    name_of: dict[str, str] = {}
    for name in sorted(files.files):
        image = spec.files.id_of(name) or Path(name).stem
        if image in name_of:
            what = f"is a second file of the id {image!r}, after {name_of[image]}"
            faults.append(Fault(files.where(name), what, "keep one file an id"))
        name_of.setdefault(image, name)
    ids = tuple(natural_order(name_of))
    what = f"{len(ids)} images in {shown(source)}"
    return _Images(
        what,
        ids,
        ids,
        lambda image, faults: files.read(name_of[image], faults),
        lambda image: files.where(name_of[image]),
    )


def _wanted(images: _Images, spec: CompetitionSpec, source: Path, sample: Path | None) -> _Wanted:
    """The rows to write."""
    columns = spec.columns.id, spec.columns.label
    if sample is None:
        beside = [source, source.parent] if source.is_dir() else [source.parent]
        found = next(filter(None, (_samples(folder) for folder in beside)), [])
        if len(found) > 1:
            what = f"there are several sample submissions: {', '.join(path.name for path in found)}"
            raise DataError([Fault(shown(found[0].parent), what, "name one with --sample")])
        sample = found[0] if found else None
    if sample is not None:
        return _as_sampled(images, spec, sample)
    promised = spec.submission_ids or ()
    there = set(images.ids)
    if promised and there.issuperset(promised):
        return _Wanted(columns, promised, promised, f"those of test_ids {spec.test_ids}, in their order")
    if not images.unlabelled:
        fix = "give a folder of the test images alone, or the sample submission by --sample"
        raise DataError([Fault(shown(source), f"all of the {len(images.ids)} images have a label", fix)])
    lacking = sum(image not in there for image in promised)
    why = "all images without a label, in natural order"
    why += f"; {lacking} of test_ids {spec.test_ids} are not there" if promised else ""
    return _Wanted(columns, images.unlabelled, images.unlabelled, why)


def _samples(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _SAMPLE.fullmatch(path.name))


def _as_sampled(images: _Images, spec: CompetitionSpec, sample: Path) -> _Wanted:
    """The rows of a sample submission, whose ids may be file names."""
    where = shown(sample)
    try:
        rows = [row for row in csv.reader(io.StringIO(sample.read_text("utf-8-sig"), newline="")) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError([Fault(where, f"cannot be read: {error}", "give the competition's own by --sample")]) from None
    if not rows or len(rows[0]) != 2:
        what = f"expected two columns, an id and a label, but got {','.join(rows[0]) if rows else 'an empty file'}"
        raise DataError([Fault(f"{where}:1", what, "name the sample submission with --sample")])
    there = set(images.ids)
    given = tuple(row[0] for row in rows[1:])
    ids = tuple(
        next((name for name in (text, spec.files.id_of(text), Path(text).stem) if name in there), "") for text in given
    )
    if missing := [text for text, image in zip(given, ids, strict=True) if not image]:
        what = f"{len(missing)} of {len(given)} ids have no image, such as {', '.join(missing[:3])}"
        raise DataError([Fault(where, what, "give the folder that holds them all, or the sample that fits it")])
    if twice := [text for text, count in Counter(given).items() if count > 1]:
        raise DataError([Fault(where, f"the id {twice[0]} is there more than once", "keep one row an id")])
    return _Wanted((rows[0][0], rows[0][1]), given, ids, f"those of {where}, in their order")


def _decoded(
    images: _Images, ids: Sequence[str], form: ImageSpec, faults: list[Fault]
) -> tuple[NDArray[np.uint8], int]:
    """Images in the competition's form, (N, H, W, C), and how many had to be brought to it."""
    lenient = form.model_copy(update={"convert": True, "fit": "crop" if form.fit == "exact" else form.fit})
    pixels = np.zeros((len(ids), form.height, form.width, form.channels), dtype=np.uint8)
    brought = 0
    for row, image in enumerate(ids):
        raw = images.read(image, faults)
        if raw is None:
            continue
        try:
            pixels[row] = decode(raw, form, images.where(image))
        except DataError:
            try:
                pixels[row] = decode(raw, lenient, images.where(image))
            except DataError as error:
                faults += error.faults
            else:
                brought += 1
    return pixels, brought


def _no_faults(faults: list[Fault]) -> None:
    if faults:
        raise HandOutError(list(dict.fromkeys(faults)))
