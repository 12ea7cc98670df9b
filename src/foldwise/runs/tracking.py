"""Weights & Biases and TensorBoard as followers of a run, which can neither slow it nor fail it.

W&B lives in a process of its own (`tracker_process`), fed through a queue; TensorBoard writes local files.
"""

from __future__ import annotations

import dataclasses
import json
import netrc
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from foldwise.errors import FoldwiseError
from foldwise.runs.events import EpochDone, Event, Message, RunDone, StepDone, TrialEvent, UnitDone, UnitStarted

# Room for more events than a run has epochs, so that a slow disk is never waited for.
TENSORBOARD_QUEUE = 100_000


class WandbTracker:
    """A listener that hands events to a child process and never waits for it, but for a moment in `close`.

    Attributes:
        notes: Lines for the user, in the order in which they came up; complete after `close`.
        url: Page of the experiment's group, once W&B has answered; None offline.
        pid: Process id of the child; None where it could not be started.
    """

    def __init__(self, folder: Path, project: str, mode: Literal["online", "offline"], deadline_s: float) -> None:
        self.notes: list[str] = []
        self.url: str | None = None
        self._deadline_s = deadline_s
        self._log_path = folder / "wandb" / "tracker.log"
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._child: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []
        try:
            self._child = self._start(folder, project, mode)
        except OSError as error:
            self.notes.append(f"W&B: this run is not tracked ({error})")
        self.pid = self._child.pid if self._child else None

    def on(self, event: Event) -> None:
        """Queue an event for the child; steps and messages are not tracked, and of a trial's units the scores are."""
        if self._child is None or isinstance(event, StepDone | Message):
            return
        if isinstance(event, TrialEvent) and not isinstance(event.event, UnitDone):
            return
        with suppress(TypeError, ValueError):
            self._lines.put(_encode(event))

    def close(self) -> None:
        """Let the child finish until the deadline, then kill it; adds to `notes` what became of it."""
        child, self._child = self._child, None
        if child is None:
            return
        self._lines.put(None)
        try:
            code = child.wait(self._deadline_s)
            if code:
                self.notes.append(f"W&B: its process ended early (exit code {code}); see {self._log_path}")
        except subprocess.TimeoutExpired:
            child.kill()
            self.notes.append(
                f"W&B: its process was stopped after {self._deadline_s:g} s. "
                f"Sync what it kept: .venv/bin/wandb sync --include-online {self._log_path.parent}/*run-*"
            )
            with suppress(subprocess.TimeoutExpired):
                child.wait(self._deadline_s)
        for thread in self._threads:
            thread.join(1.0)

    def _start(self, folder: Path, project: str, mode: str) -> subprocess.Popen[str]:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        # Artifacts wait for their upload beside the run that they belong to, and nothing else is reported.
        settings = {"WANDB_DATA_DIR": str(self._log_path.parent.resolve()), "WANDB_ERROR_REPORTING": "false"}
        # Leaves time before the deadline to write down what W&B did not take.
        patience = str(self._deadline_s * 2 / 3)
        with self._log_path.open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "foldwise.runs.tracker_process", str(folder), project, mode, patience],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=settings | os.environ,
                encoding="utf-8",
                # A Ctrl-C is for the training: the child still has its end to write.
                start_new_session=True,
            )
        for work, pipe in ((self._feed, child.stdin), (self._listen, child.stdout)):
            thread = threading.Thread(target=work, args=(pipe,), daemon=True, name="wandb-tracker")
            thread.start()
            self._threads.append(thread)
        return child

    def _feed(self, pipe: IO[str]) -> None:
        with suppress(OSError), pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _listen(self, pipe: IO[str]) -> None:
        with suppress(OSError, ValueError), pipe:
            for line in pipe:
                report = json.loads(line)
                if "note" in report:
                    self.notes.append(report["note"])
                self.url = report.get("url", self.url)


def _encode(event: Event) -> str:
    return json.dumps(_plain(event), default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return value.item() if hasattr(value, "item") else str(value)


def wandb_tracker(
    folder: Path, project: str, *, mode: Literal["auto", "offline"] = "auto", deadline_s: float = 30.0
) -> WandbTracker | None:
    """Follow a run or a study with Weights & Biases: a group an experiment, in it a run a unit and a summary run.

    Of a study the group is `<exp>-tune`, in it a run a parameter set and a summary run.

    Online where an API key is found (`WANDB_API_KEY`, or the netrc file's entry for the host) and
    `WANDB_MODE` does not say `offline`; else everything is kept on disk, and `notes` says how to send it.

    Args:
        folder: The experiment's folder, `oof/<exp>`, or a study's, `oof/<exp>/tune`;
            W&B's files go to `wandb/` in it.
        project: The W&B project.
        mode: `offline` keeps everything on disk even where there is a key.
        deadline_s: How long `close` waits for W&B, s.

    Returns:
        A listener; None where `WANDB_MODE` is `disabled`.
    """
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish == "disabled":
        return None
    if mode == "offline":
        reason = "asked for"
    elif wish in ("offline", "dryrun"):
        reason = f"WANDB_MODE={wish}"
    elif not has_api_key():
        reason = "no API key"
    else:
        reason = ""
    tracker = WandbTracker(folder, project, "offline" if reason else "online", deadline_s)
    if reason and tracker.pid is not None:
        tracker.notes.append(
            f"W&B: offline ({reason}). Sync later: .venv/bin/wandb sync {_from_here(folder)}/wandb/offline-run-*"
        )
    return tracker


def _from_here(folder: Path) -> str:
    """The folder as one would type it here."""
    try:
        return folder.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(folder)


def has_api_key() -> bool:
    """Whether W&B would find an API key: in the environment, or in the netrc file under the host's name."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = os.environ.get("NETRC") or "~/.netrc"
    try:
        return netrc.netrc(Path(path).expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorboardTracker:
    """A listener that writes TensorBoard's event files, one folder a unit; stops at its first failure.

    Attributes:
        notes: A line for the user if something went wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self._folder = folder / "tensorboard"
        self._writers: dict[tuple[int, int], Any] = {}

    def on(self, event: Event) -> None:
        """Write the figures of an epoch or of a finished unit."""
        if self.notes:
            return
        try:
            self._take(event)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the files."""
        try:
            for writer in self._writers.values():
                writer.close()
        except Exception as error:
            self._give_up(error)
        self._writers.clear()

    def _take(self, event: Event) -> None:
        match event:
            case UnitStarted():
                self._writer(event.fold, event.seed, purge_from=event.from_epoch + 1)
            case EpochDone():
                writer = self._writer(event.fold, event.seed)
                for name, value in event.row.items():
                    if name not in ("fold", "seed", "epoch"):
                        writer.add_scalar(name, value, event.epoch)
            case UnitDone():
                writer = self._writer(event.fold, event.seed)
                if event.score is not None:
                    writer.add_scalar("score", event.score, 0)
                writer.close()
                del self._writers[event.fold, event.seed]
            case RunDone():
                self.close()
            case _:
                pass

    def _writer(self, fold: int, seed: int, purge_from: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if (fold, seed) not in self._writers:
            self._writers[fold, seed] = SummaryWriter(
                str(self._folder / f"fold{fold}-seed{seed}"),
                purge_step=purge_from,
                max_queue=TENSORBOARD_QUEUE,
                flush_secs=10,
            )
        return self._writers[fold, seed]

    def _give_up(self, error: Exception) -> None:
        self.notes.append(f"TensorBoard: this run is not followed any further ({error})")


def tensorboard_tracker(folder: Path) -> TensorboardTracker:
    """Follow a run with TensorBoard: `oof/<exp>/tensorboard/fold<k>-seed<s>/`.

    Args:
        folder: The experiment's folder, `oof/<exp>`.

    Raises:
        FoldwiseError: If the package `tensorboard` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise FoldwiseError(
            f"TensorBoard was asked for, but its package cannot be imported ({error})\n"
            "  fix: .venv/bin/pip install -e '.[tensorboard]'"
        ) from error
    return TensorboardTracker(folder)
