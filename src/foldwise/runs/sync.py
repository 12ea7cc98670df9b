"""Sending to W&B what runs kept on disk: each piece once, by `wandb sync` in a process of its own.

W&B's command ends well whatever becomes of a piece; what counts is the mark that it leaves beside a piece it sent.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

from foldwise.errors import FoldwiseError, HubError
from foldwise.runs.tracking import has_api_key

# How long the server may take for its first answer, and for a piece.
PROBE_S, PATIENCE_S = 10.0, 300.0


@dataclass(frozen=True)
class Synced:
    """What became of the pieces.

    Attributes:
        sent: Pieces sent now.
        before: Pieces that were sent earlier.
        failed: Pieces that were not sent.
        waiting: Pieces of runs that are under way, which are left alone.
    """

    sent: int
    before: int
    failed: int
    waiting: int


def sync_runs(
    root: Path, experiment: str | None = None, *, say: Callable[[str], None], patience_s: float = PATIENCE_S
) -> Synced:
    """Send the W&B files of all runs and studies under `oof/` that were not sent yet, the oldest of a run first.

    Args:
        root: The project's root.
        experiment: Only this one's run and study; None: all.
        say: Takes a line for each piece as it is sent or not, and a summary.
        patience_s: How long a piece may take, s.

    Returns:
        What became of the pieces.

    Raises:
        FoldwiseError: If there is no such experiment, or no API key.
        HubError: If the server does not answer; nothing was tried.
    """
    folders = _wandb_folders(root, experiment)
    pieces = [file for folder in folders for file in sorted(folder.glob("*run-*/run-*.wandb"), key=_begun)]
    unsent = [file for file in pieces if not marker(file).exists()]
    under_way = {folder for folder in folders if _under_way(folder.parent)}
    waiting = [file for file in unsent if file.parents[1] in under_way]
    for folder in sorted({file.parents[1] for file in waiting}):
        say(f"left alone  {folder.relative_to(root).as_posix()}: its run is under way; sync it afterwards")
    to_send = [file for file in unsent if file not in waiting]
    before = len(pieces) - len(unsent)
    sent = failed = 0
    if to_send:
        environment = wandb_environment()
        for number, file in enumerate(to_send):
            where = file.parent.relative_to(root).as_posix()
            reason, answered = _send(file, environment, patience_s)
            if not reason:
                sent += 1
                say(f"sent        {where}")
                continue
            failed += 1
            say(f"NOT SENT    {where}: {reason}")
            # A server that has taken nothing yet and hangs would do so for each of the others too.
            if not answered and not sent and (rest := len(to_send) - number - 1):
                failed += rest
                say(f"NOT SENT    {rest} more were not tried")
                break
    counts = [
        f"{sent} sent",
        f"{before} sent before",
        f"{len(waiting)} left alone" if waiting else "",
        f"{failed} not sent; the same command tries them again" if failed else "",
    ]
    say(f"W&B: {', '.join(filter(None, counts))}" if pieces else "W&B: there is nothing on disk to send")
    return Synced(sent, before, failed, len(waiting))


def marker(file: Path) -> Path:
    """What `wandb sync` leaves beside a `.wandb` file that it sent, and skips it by."""
    return file.with_suffix(".wandb.synced")


def _begun(file: Path) -> str:
    """What a piece's place in the order of their starts is told by: its folder is `[offline-]run-<when>-<id>`."""
    return file.parent.name.removeprefix("offline-")


def _wandb_folders(root: Path, experiment: str | None) -> list[Path]:
    """The `wandb` folders of runs and of studies."""
    oof = root / "oof"
    names = sorted(path.name for path in oof.glob("[!.]*") if path.is_dir())
    if experiment is not None and experiment not in names:
        there = ", ".join(names) or "none"
        raise FoldwiseError(f"there is no run `{experiment}` under oof/\n  fix: runs here: {there}")
    chosen = names if experiment is None else [experiment]
    folders = [oof / name / part for name in chosen for part in ("wandb", "tune/wandb")]
    return [folder for folder in folders if folder.is_dir()]


def _under_way(path: Path) -> bool:
    """Whether some process is at work on a run or a study, whose files are then still growing."""
    # The locks of a study lie deeper too; a journal's lock is a link, and Optuna's.
    locks = path.rglob("*.lock") if path.name == "tune" else path.glob("*.lock")
    for lock in locks:
        if lock.is_symlink():
            continue
        try:
            with FileLock(lock, timeout=0, thread_local=False):
                pass
        except Timeout:
            return True
    return False


def wandb_environment() -> Mapping[str, str]:
    """The environment for `wandb sync`, once there is a key and a server that answers."""
    if not has_api_key():
        raise FoldwiseError(
            "there is no W&B API key, so that nothing can be sent\n"
            "  fix: .venv/bin/wandb login, or set WANDB_API_KEY; for a server of your own WANDB_BASE_URL too"
        )
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        # wandb itself would try for hours.
        urlopen(Request(url, headers={"User-Agent": "foldwise"}), timeout=PROBE_S).close()  # noqa: S310
    except HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        # Which certificates to trust is for wandb to know.
        if not isinstance(reason, ssl.SSLError):
            fix = "go online, or mend WANDB_BASE_URL, and try again"
            raise HubError(f"W&B at {url} cannot be reached ({reason})\n  fix: {fix}") from None
    # Its mode is that of runs; and nothing is reported anywhere else.
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    return kept | {"WANDB_ERROR_REPORTING": "false"}


def _send(file: Path, environment: Mapping[str, str], patience_s: float) -> tuple[str, bool]:
    """Send one piece.

    Returns:
        Why it was not sent, empty where it was; and whether W&B was done with it within the time.
    """
    # One that went offline on the way is kept under the name of an online one.
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(file.parent)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            **environment,
            "WANDB_DIR": str(file.parents[2].resolve()),
            "WANDB_DATA_DIR": str(file.parents[1].resolve()),
        },
        encoding="utf-8",
        errors="replace",
        # wandb starts a service that has to end with it.
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        return f"no end after {patience_s:g} s", False
    except BaseException:
        _kill(child)
        raise
    return ("", True) if marker(file).exists() else (_reason(said), True)


def _kill(child: subprocess.Popen[str]) -> None:
    """Kill a child with the service that it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.communicate()


def _reason(said: str) -> str:
    """What went wrong, from what `wandb sync` said."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).removeprefix("wandb: ").strip() for line in said.splitlines()]
    wrong = [line for line in lines if re.match(r"(ERROR|Error)\b", line) and "detailed error logs" not in line]
    chosen = (wrong or [line for line in lines if line] or ["wandb sync said nothing"])[-1]
    return re.sub(r"^(ERROR|Error:)\s*", "", chosen)
