"""Reading Hugging Face data sets, from the hub or from a local copy, through the `datasets` library.

No code of a data set is ever run: the library refuses it, and images are taken as bytes and decoded here.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from foldwise.data.readers.handout import PART, ColumnsSpec, FilesSpec, HandOut, HandOutError, Table, safe_id, shown
from foldwise.data.readers.images import suffix_of
from foldwise.errors import DataError, Fault, FoldwiseError, HubError

HUB = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<config>[^:@]+))?")

IMAGE, ID = ("image", "img"), "id"
LABEL = ("label", "labels")


@contextmanager
def open_hub(source: Path | str, columns: ColumnsSpec, faults: list[Fault]) -> Iterator[HandOut]:
    """Open a data set of Hugging Face's form; its splits are the parts.

    Ids are the column `id` where there is one, else row numbers from 1 over the splits in order. A label of null
    or -1 is none.

    Args:
        source: A folder with parquet files, or with images and a metadata.csv, .jsonl or .parquet beside them; or
            `hf:<owner/name>[@revision][:config]`.
        columns: What to call the columns of ids and labels.
        faults: Takes what is wrong and leaves the rest readable.

    Raises:
        HandOutError: If it holds no images with labels.
        HubError: If the hub cannot be reached, or has no such data set.
        FoldwiseError: If the library is not installed.
    """
    with ExitStack() as stack:
        splits, where = _loaded(source, stack)
        sets: dict[str, Any] = {}
        for split, rows in splits.items():
            sets[split] = _columns(rows, f"{where}:{split}")
        parts = len(sets) > 1
        place: dict[str, tuple[str, int]] = {}
        names: dict[str, str] = {}
        table: list[tuple[str, ...]] = []
        places: list[str] = []
        number = 0
        for split, (rows, image_column, label_column, label_names) in sets.items():
            has_id = ID in rows.column_names
            for index, row in enumerate(rows):
                number += 1
                at = f"{where}:{split}:{index + 1}"
                image = str(row[ID]) if has_id else str(number)
                raw = _bytes(row[image_column], source)
                if raw is None:
                    fault = Fault(at, f"{image_column} holds no bytes", "copy the images too, or remove the row")
                elif image in place:
                    fault = Fault(at, f"id {image!r} is there twice", "keep one row an id")
                elif not safe_id(image):
                    fault = Fault(at, f"{image!r} cannot be an id", r"give ids without / \ : * { }")
                else:
                    place[image] = split, index
                    names[image] = f"{image}{suffix_of(raw)}"
                    label = _label(row[label_column], label_names) if label_column else ""
                    if label:
                        table.append((image, label, *([split] if parts else [])))
                        places.append(at)
                    continue
                faults.append(fault)
        if not table:
            fix = "give images with labels; null and -1 are none"
            raise HandOutError([*faults, Fault(where, "no image has a label", fix)])

        def read(image: str, _faults: list[Fault]) -> bytes | None:
            split, index = place[image]
            rows, image_column, *_ = sets[split]
            return _bytes(rows[index][image_column], source)

        fixed: list[str] = next((names_ for *_, names_ in sets.values() if names_), [])
        yield HandOut(
            format="datasets",
            source=Path(where),
            table=Table((columns.id, columns.label, *([PART] if parts else [])), tuple(table), tuple(places)),
            names=names,
            read=read,
            where=lambda image: f"{where}:{place[image][0]}:{place[image][1] + 1}",
            columns=columns,
            files=FilesSpec(),
            part=PART if parts else "",
            classes=tuple(fixed),
        )


def dataset_files(source: Path) -> list[Path]:
    """What tells a local copy: parquet files, or metadata beside images; at most two folders down."""
    return [
        path
        for pattern in ("*.parquet", "metadata.csv", "metadata.jsonl")
        for depth in ("", "*/", "*/*/")
        for path in sorted(source.glob(depth + pattern))
    ]


def _loaded(source: Path | str, stack: ExitStack) -> tuple[dict[str, Any], str]:
    """The splits by name, and how messages name the data set."""
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
    except ImportError:
        raise FoldwiseError('datasets is not installed\n  fix: pip install "foldwise[hf]"') from None
    if isinstance(source, Path):
        where = shown(source)
        metadata = any(path.stem == "metadata" for path in dataset_files(source))
        # The library keeps its own copy of what it reads; it goes with this call.
        kept = stack.enter_context(tempfile.TemporaryDirectory(prefix="foldwise-datasets-"))
        was_shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            # By the format's name, never by the folder's: a folder's own description could point anywhere.
            return dict(
                datasets.load_dataset(
                    "imagefolder" if metadata else "parquet", data_dir=str(source.resolve()), cache_dir=kept
                )
            ), where
        except (DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            fix = "give a copy that `datasets.load_dataset` reads"
            raise HandOutError([Fault(where, f"cannot be read: {cause[0] if cause else error!r}", fix)]) from None
        finally:
            if was_shown:
                datasets.enable_progress_bars()

    match = HUB.fullmatch(source)
    if match is None:
        fix = "write FROM=hf:<owner/name>, and if need be @<revision> and :<config> after it"
        raise DataError([Fault(f"FROM={source}", "names no data set of the hub", fix)])
    name, revision, config = match["name"], match["revision"], match["config"]
    try:
        return dict(datasets.load_dataset(name, name=config, revision=revision)), source
    except DatasetNotFoundError:
        raise HubError(
            f"{source}: the hub has no such data set that you may read\n"
            f"  fix: see https://huggingface.co/datasets/{name}; for a private or gated one, accept its terms there and"
            " set HF_TOKEN"
        ) from None
    except (RuntimeError, ValueError) as error:
        # Among them: an unknown config, and data sets that are a program.
        first = str(error).strip().splitlines()[0]
        raise HandOutError([Fault(source, first, f"see https://huggingface.co/datasets/{name}")]) from None
    except (DatasetsError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"{source}: the hub cannot be reached\n  ({type(error).__name__}: {first})\n"
            "  fix: go online; or on another machine `hf download --repo-type dataset "
            f"{name} --local-dir <folder>`, bring the folder here, and give FROM=<folder>"
        ) from None


def _columns(rows: Any, where: str) -> tuple[Any, str, str, list[str]]:
    """The rows with undecoded images, the columns of image and label, and the names that its numbers stand for."""
    import datasets

    features = rows.features
    images = [name for name in rows.column_names if isinstance(features[name], datasets.Image)]
    images += [
        name for name in rows.column_names if name in IMAGE and isinstance(features[name], dict) and name not in images
    ]
    if not images:
        what = f"there is no column of images; columns: {', '.join(rows.column_names)}"
        raise HandOutError([Fault(where, what, f"call it `{IMAGE[0]}`")])
    image = next((name for name in images if name in IMAGE), images[0])
    labels = [name for name in rows.column_names if name in LABEL]
    labels += [name for name in rows.column_names if isinstance(features[name], datasets.ClassLabel)]
    label = labels[0] if labels else ""
    if isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    wanted = [image, *([label] if label else []), *([ID] if ID in rows.column_names else [])]
    named = features[label].names if label and isinstance(features[label], datasets.ClassLabel) else []
    return rows.select_columns(wanted), image, label, list(named)


def _bytes(cell: Any, source: Path | str) -> bytes | None:
    """An image's bytes; a path is followed only where it leads to a file of the local copy."""
    if not isinstance(cell, dict):
        return None
    if (raw := cell.get("bytes")) is not None:
        return bytes(raw)
    path = cell.get("path")
    if path is None or (isinstance(source, Path) and not Path(path).resolve().is_relative_to(source.resolve())):
        return None
    if not isinstance(source, Path):
        return None
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _label(value: Any, names: list[str]) -> str:
    if value is None or value == -1:
        return ""
    return names[value] if names and isinstance(value, int) else str(value)
