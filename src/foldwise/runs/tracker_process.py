"""The process beside a training that speaks to W&B: events come in as JSON lines, notes go out as JSON lines.

`tracking` starts it as `python -m ... FOLDER PROJECT MODE PATIENCE_S`; only here is wandb imported.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import wandb

from foldwise.files import sha256_json
from foldwise.spec.load import flatten

# W&B refuses a longer tag.
TAG_LENGTH = 64

Unit = tuple[int, int]


def run_id(project: str, started: Mapping[str, Any], unit: str) -> str:
    """Name a W&B run so that the pieces of a resumed run join and another attempt never reuses it.

    Args:
        project: The W&B project.
        started: The fields of the `RunStarted` event.
        unit: `summary`, or `fold<k>-seed<s>`.

    Returns:
        20 hexadecimal digits of a sha256.
    """
    return sha256_json([project, started["experiment"], started["spec"], started["attempt"], unit])[:20]


class Follower:
    """Turns the events of one experiment into W&B runs: one a unit and a summary, in one group.

    Once W&B has not answered for `patience_s`, everything further is kept on disk.
    """

    def __init__(
        self, folder: Path, project: str, online: bool, patience_s: float, report: Callable[[str, str], None]
    ) -> None:
        self._online = online
        self._patience_s = patience_s
        self._folder = folder
        self._project = project
        self._report = report
        self._started: dict[str, Any] = {}
        self._open: dict[Unit | None, Any] = {}

    def take(self, message: Mapping[str, Any]) -> None:
        """Carry one event over to W&B."""
        match message["type"]:
            case "RunStarted":
                self._started = dict(message)
            case "UnitStarted":
                self._run((message["fold"], message["seed"]))
            case "EpochDone":
                self._log_epoch(message)
            case "UnitDone":
                self._end_unit(message)
            case "RunDone":
                self._summarise(message)

    def close(self) -> None:
        """Mark as failed the runs of units that did not get to their end."""
        while self._open:
            self._finish(next(iter(self._open)), exit_code=1)

    def _run(self, key: Unit | None) -> Any:
        run = self._open.get(key)
        if run is None:
            run = self._open[key] = self._init(key)
        return run

    def _init(self, key: Unit | None) -> Any:
        if self._online:
            try:
                run = self._init_once(key)
            except Exception as error:
                traceback.print_exc()
                self._go_offline(error)
            else:
                self._report("url", f"{run.project_url}/groups/{quote(self._started['experiment'], safe='')}")
                return run
        return self._init_once(key)

    def _init_once(self, key: Unit | None) -> Any:
        started = self._started
        experiment = started["experiment"]
        spec = flatten(started["spec"])
        if key is None:
            unit, name, job_type = "summary", experiment, "summary"
        else:
            fold, seed = key
            several = len(started["spec"].get("seeds", ())) > 1
            unit, job_type = f"fold{fold}-seed{seed}", "unit"
            name = f"{experiment}/fold{fold}" + (f"-seed{seed}" if several else "")
            spec |= {"fold": fold, "seed": seed}
        tags = [started["competition"], spec.get("model.arch"), "smoke" if started["smoke"] else None]
        run = wandb.init(
            project=self._project,
            group=experiment,
            name=name,
            job_type=job_type,
            id=run_id(self._project, started, unit),
            resume="allow",
            config=spec | {"attempt": started["attempt"], "device": started["device"]},
            tags=[tag[:TAG_LENGTH] for tag in tags if tag],
            dir=str(self._folder),
            mode="online" if self._online else "offline",
            reinit="create_new",
            settings=wandb.Settings(
                allow_val_change=True,
                console="off",
                disable_code=True,
                disable_git=True,
                finish_timeout=self._patience_s,
                finish_timeout_raises=True,
                init_timeout=self._patience_s,
                login_timeout=self._patience_s,
                silent=True,
                symlink=False,
                use_dot_wandb=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        if key is not None:
            run.define_metric("epoch")
            run.define_metric("*", step_metric="epoch")
        return run

    def _go_offline(self, reason: Exception) -> None:
        self._online = False
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        self._report("note", f"W&B: went offline ({first_line}). {sync_hint(self._folder)}")
        # The service still holds the id of the run that failed; only a new service opens it again.
        self._open.clear()
        wandb.teardown()

    def _finish(self, key: Unit | None, exit_code: int) -> None:
        run = self._open.pop(key)
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError as error:
            self._go_offline(error)

    def _log_epoch(self, message: Mapping[str, Any]) -> None:
        run = self._run((message["fold"], message["seed"]))
        figures = {name: value for name, value in message["row"].items() if name not in ("fold", "seed")}
        # W&B joins the pieces of a resumed run by step, so the step has to be the epoch too.
        run.log(figures | {"epoch": message["epoch"]}, step=message["epoch"])

    def _end_unit(self, message: Mapping[str, Any]) -> None:
        key = (message["fold"], message["seed"])
        run = self._run(key)
        run.summary.update({name: message[name] for name in ("score", "wall_s") if message[name] is not None})
        self._finish(key, exit_code=0)

    def _summarise(self, message: Mapping[str, Any]) -> None:
        run = self._run(None)
        info, metric = message["info"], self._started["metric"]
        figures = {
            f"oof/{metric}": info.get("score"),
            "oof/standard_error": info.get("standard_error"),
            **{f"oof/fold{fold}": score for fold, score in (info.get("fold_scores") or {}).items()},
        }
        run.summary.update({name: value for name, value in (flatten(info) | figures).items() if value is not None})
        if message["per_class"]:
            columns: list[str | int] = list(message["per_class"][0])
            rows: list[Iterable[Any]] = [row.values() for row in message["per_class"]]
            run.log({"per_class": wandb.Table(columns=columns, data=rows)})
        if message["confusion"]:
            run.log({"confusion_matrix": self._confusion(message["confusion"], info["classes"])})
        artifact = wandb.Artifact(f"{self._started['experiment']}-oof", type="oof")
        for name in ("oof.csv", "test.csv", "run.json", "spec.yaml"):
            if (self._folder / name).is_file():
                artifact.add_file(str(self._folder / name))
        run.log_artifact(artifact)
        self._finish(None, exit_code=0)

    @staticmethod
    def _confusion(counts: list[list[int]], classes: list[str]) -> Any:
        cells: list[Iterable[Any]] = [
            [actual, predicted, count]
            for actual, row in zip(classes, counts, strict=True)
            for predicted, count in zip(classes, row, strict=True)
        ]
        columns = ("Actual", "Predicted", "nPredictions")
        return wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=wandb.Table(columns=list(columns), data=cells),
            fields={column: column for column in columns},
            string_fields={"title": "Out-of-fold confusion matrix"},
        )


def sync_hint(folder: Path) -> str:
    """How to send later what was kept on disk."""
    return f"Sync later: .venv/bin/wandb sync {folder}/wandb/*run-*"


def main(folder: Path, project: str, mode: str, patience_s: float) -> None:
    """Follow the events on standard input until it ends; a bad one costs itself alone."""
    # wandb and its service inherit these three: they must find neither the events nor the way back.
    events = os.fdopen(os.dup(0), encoding="utf-8")
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def report(kind: str, text: str) -> None:
        print(json.dumps({kind: text}), file=reports, flush=True)

    follower = Follower(folder, project, mode == "online", patience_s, report)
    complained = False
    ended = False
    while not ended:
        line = events.readline()
        ended = not line
        try:
            follower.close() if ended else follower.take(json.loads(line))
        except Exception:
            traceback.print_exc()
            if not complained:
                complained = True
                report("note", f"W&B: not everything could be tracked; see {folder}/wandb/tracker.log")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
