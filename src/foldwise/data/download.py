"""Fetching a hand-out from Kaggle through its official client, and unpacking it safely.

What the client answers or raises is told with its mend; it may print, exit or go to the network on import.
"""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foldwise.data.readers import HandOutError, shown
from foldwise.data.readers.table import ARCHIVE_BYTES, members
from foldwise.errors import Fault, FoldwiseError

SLUG = re.compile(r"(?P<owner>[A-Za-z0-9][\w-]*/)?(?P<name>[A-Za-z0-9][\w.-]*)")
SIGN_IN = (
    "at kaggle.com, under Settings > API, create a token; then set KAGGLE_API_TOKEN to it, or run `kaggle auth login`"
)
BY_HAND = "download it there by hand, and give FROM=<folder>"


class KaggleError(FoldwiseError):
    """Kaggle does not hand out what was asked for, or cannot be asked."""

    exit_code = 3


def fetch_kaggle(slug: str, folder: Path) -> None:
    """Download all files of a Kaggle competition or data set into a folder, unpacked.

    Args:
        slug: `<competition>`, or `<owner>/<dataset>`: the end of its address.
        folder: Where to; made if need be.

    Raises:
        KaggleError: If there is no token, it is not accepted, the rules are not, there is no such slug, or no network.
        HandOutError: If the archive is damaged, or would unpack to elsewhere.
        FoldwiseError: If the client is not installed.
    """
    match = SLUG.fullmatch(slug)
    if match is None:
        fix = "give the end of its address: <competition>, or <owner>/<dataset>"
        raise KaggleError(f"KAGGLE={slug}: is neither a competition nor a data set\n  fix: {fix}")
    page = f"https://www.kaggle.com/{'datasets' if match['owner'] else 'competitions'}/{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    with _translated(slug, page):
        api = kaggle_client(slug)
        if match["owner"]:
            # It prints the address, which is no news here.
            with contextlib.redirect_stdout(io.StringIO()):
                api.dataset_download_files(slug, path=str(folder), quiet=True)
        else:
            api.competition_download_files(slug, path=str(folder), quiet=True)
    archive = folder / f"{match['name']}.zip"
    if archive.is_file():
        unpack(archive, folder)
        archive.unlink()


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip into a folder, all of it or nothing.

    Raises:
        HandOutError: If it is no zip or is damaged, or if a member leads out of the folder or is encrypted; names
            every such member.
    """
    where = shown(path)
    faults: list[Fault] = []
    damaged = "fetch it again; it is damaged"
    try:
        with zipfile.ZipFile(path) as archive:
            names = members(archive, where, faults, largest=ARCHIVE_BYTES)
            if faults:
                raise HandOutError(faults)
            for name in names:
                archive.extract(name, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise HandOutError([Fault(where, f"cannot be unpacked: {error}", damaged)]) from None


def kaggle_client(slug: str) -> Any:
    """Kaggle's official client, signed in.

    Args:
        slug: What it is wanted for; messages name it.

    Returns:
        A `KaggleApi`; it prints at times, and its errors are read by `refusal`.

    Raises:
        KaggleError: If there is no token.
        FoldwiseError: If the client is not installed.
    """
    # It signs in on import and again here, and prints how to where it cannot.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            from kaggle.api.kaggle_api_extended import KaggleApi
        except ImportError:
            raise FoldwiseError('kaggle is not installed\n  fix: pip install "foldwise[kaggle]"') from None
        api = KaggleApi()
        try:
            api.authenticate()
        except SystemExit:
            raise KaggleError(f"KAGGLE={slug}: there is no Kaggle token\n  fix: {SIGN_IN}") from None
    return api


def refusal(error: OSError) -> tuple[int | None, str] | None:
    """What an error of Kaggle's client says.

    Args:
        error: What was raised.

    Returns:
        The HTTP status, None where no answer came, and the first line of the words with it; None for an error that is
        not of the network.
    """
    # Both come from `requests`, whose errors are OSErrors; only an answer has a status.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return int(status), _first_line(error)
    if type(error).__module__.startswith("requests"):
        return None, f"{type(error).__name__}: {_first_line(error)}"
    return None


@contextmanager
def _translated(slug: str, page: str) -> Iterator[None]:
    """Turn what the client raises into what the user can mend."""
    try:
        yield
    except FoldwiseError:
        raise
    except OSError as error:
        refused = refusal(error)
        if refused is None:
            raise
        status, words = refused
        if status == 401:
            what, fix = "Kaggle does not accept the token (401)", SIGN_IN
        elif status == 403:
            what = "Kaggle does not let you have it (403): its rules are not accepted, or it is private"
            fix = f"open {page}, accept the rules there (Join, or Rules), and try again"
        elif status == 404:
            what = "Kaggle has no such competition or data set (404)"
            fix = "give the end of its address: <competition>, or <owner>/<dataset>"
        elif status == 429:
            what, fix = "Kaggle asks for fewer downloads (429)", f"wait some minutes; or open {page}, {BY_HAND}"
        elif status is not None:
            what, fix = f"Kaggle failed ({status}): {words}", f"try again later; or open {page}, {BY_HAND}"
        else:
            what = f"Kaggle cannot be reached\n  ({words})"
            fix = f"go online; or on another machine open {page}, {BY_HAND}"
        raise KaggleError(f"KAGGLE={slug}: {what}\n  fix: {fix}") from None
    except ValueError as error:
        raise KaggleError(f"KAGGLE={slug}: {_first_line(error)}\n  fix: open {page}, {BY_HAND}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
