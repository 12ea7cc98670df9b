"""Reading what was handed out, in whatever form: `open_hand_out` finds the format by what is there.

One module a format; each opens to a `HandOut`, and none trusts what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from foldwise.data.readers.folders import class_folders, open_folders
from foldwise.data.readers.handout import ColumnsSpec, FilesSpec, Format, HandOut, HandOutError, Table, safe_id, shown
from foldwise.data.readers.hub import dataset_files, open_hub
from foldwise.data.readers.images import DECODER_VERSION, ImageSpec, decode, header_of
from foldwise.data.readers.pixels import open_pixels, pixel_files
from foldwise.data.readers.table import open_table, read_table
from foldwise.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "DECODER_VERSION",
    "ColumnsSpec",
    "FilesSpec",
    "Format",
    "HandOut",
    "HandOutError",
    "ImageSpec",
    "Table",
    "decode",
    "header_of",
    "open_hand_out",
    "read_table",
    "safe_id",
    "shown",
]

RECOGNISED = """\
what is recognised:
    table      train.csv (or `files.train`) with ids and labels, and the images in a zip or a folder
    pixels     a CSV, gzipped or not, with the columns emotion and pixels, as FER2013 has them
    folders    one folder a class, directly there or below train/, val/, test/
    datasets   a copy of a Hugging Face data set: parquet files, or images with a metadata.csv or .jsonl"""


@contextmanager
def open_hand_out(
    source: Path | str,
    columns: ColumnsSpec,
    files: FilesSpec | None,
    faults: list[Fault],
    *,
    classes: Sequence[str] = (),
    part: str = "",
    parts: Sequence[str] = (),
) -> Iterator[HandOut]:
    """Open a hand-out by the reader that fits it.

    Args:
        source: Its folder, or `hf:<owner/name>[@revision][:config]`.
        columns: Columns of ids and labels: those of a train.csv, else what to call them.
        files: What competition.yaml says of it; None: nothing.
        faults: Takes what is wrong and leaves the rest readable.
        classes: The labels there are; empty: any.
        part: Name of the column that a split goes by, if one does.
        parts: The values of that column.

    Raises:
        HandOutError: If no reader fits, if several do, or if what fits cannot be read at all.
        HubError: If the hub cannot be reached.
        FoldwiseError: If a library for it is not installed.
    """
    with ExitStack() as stack:
        if isinstance(source, str):
            hand_out = stack.enter_context(open_hub(source, columns, faults))
        else:
            kind, source = _found(source, files)
            if kind == "table":
                yield stack.enter_context(
                    open_table(source, columns, files, faults, classes=classes, part=part, parts=parts)
                )
                return
            if kind == "pixels":
                hand_out = stack.enter_context(open_pixels(source, columns, files, faults))
            elif kind == "folders":
                hand_out = stack.enter_context(open_folders(source, columns, faults))
            else:
                hand_out = stack.enter_context(open_hub(source, columns, faults))
        yield hand_out


def _found(source: Path, files: FilesSpec | None) -> tuple[Format, Path]:
    """The one format that fits, and the folder it lies in: an only folder is gone into."""
    if files and files.format:
        return files.format, source
    evidence = _evidence(source, files or FilesSpec())
    inside = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    if not evidence and len(inside) == 1 and inside[0].is_dir():
        return _found(inside[0], files)
    if len(evidence) == 1:
        return next(iter(evidence)), source
    if evidence:
        listed = ", and ".join(f"`{kind}` ({there})" for kind, there in evidence.items())
        what = f"could be read as {listed}"
        fix = f"leave one of them there, or choose in competition.yaml: `files: {{format: {next(iter(evidence))}}}`"
        raise HandOutError([Fault(shown(source), what, fix)])
    names = [f"{path.name}/" if path.is_dir() else path.name for path in inside]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    what = f"nothing here is recognised as a hand-out; there is: {', '.join(names[:8]) or 'nothing'}{more}"
    raise HandOutError([Fault(shown(source), what, f"give the folder that holds one; {RECOGNISED}")])


def _evidence(source: Path, files: FilesSpec) -> dict[Format, str]:
    """The formats that fit, each with what tells."""
    evidence: dict[Format, str] = {}
    labelled, unlabelled = pixel_files(source)
    pixels = [path.name for path in labelled]
    if pixels:
        evidence["pixels"] = ", ".join(pixels)
    others = {path.name for path in labelled + unlabelled}
    if files.train not in others and (there := [n for n in (files.train, files.images) if (source / n).is_file()]):
        evidence["table"] = ", ".join(there)
    described = dataset_files(source)
    if described:
        evidence["datasets"] = described[0].relative_to(source).as_posix()
    # Folders beside a metadata file belong to it.
    if (classes := class_folders(source)) and not any(path.stem == "metadata" for path in described):
        evidence["folders"] = ", ".join(f"{folder}/" for folder in classes[:3]) + (" ..." if len(classes) > 3 else "")
    return evidence
