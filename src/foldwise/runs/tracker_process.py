"""The process beside a training that speaks to W&B: events come in as JSON lines, notes go out as JSON lines.

`tracking` starts it as `python -m ... FOLDER PROJECT MODE PATIENCE_S`; only here is wandb imported.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import wandb

from foldwise.files import sha256_json
from foldwise.metrics import METRICS
from foldwise.records.history import EXTERNAL_TRACK, OWN_TRACK
from foldwise.runs.sync import marker
from foldwise.spec.load import flatten
from foldwise.spec.yaml import flow_text

# W&B refuses a longer tag.
TAG_LENGTH = 64

Trial = tuple[str, int]


@dataclass(frozen=True)
class Page:
    """What a W&B run is opened as.

    Attributes:
        id: The same for the pieces of a resumed one.
        step_metric: The figure that its curves are drawn over; None where it has no curves.
    """

    id: str
    name: str
    group: str
    job_type: str
    config: Mapping[str, Any]
    tags: Sequence[str | None]
    step_metric: str | None = None


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


def study_id(project: str, started: Mapping[str, Any], trial: str) -> str:
    """Name a W&B run of a study as `run_id` does; more trials may be wanted of a resumed study, so not by its spec.

    Args:
        project: The W&B project.
        started: The fields of the `TuneStarted` event.
        trial: `summary`, or what tells a trial from the others, but not from itself when it is tried again.

    Returns:
        20 hexadecimal digits of a sha256.
    """
    return sha256_json([project, started["experiment"], "tune", started["attempt"], trial])[:20]


class Follower:
    """Turns the events of one experiment or study into W&B runs: one a unit or trial and a summary, in one group.

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
        self._open: dict[str, Any] = {}
        self._trials: dict[Trial, dict[str, Any]] = {}
        self._ended: list[Mapping[str, Any]] = []

    def take(self, message: Mapping[str, Any]) -> None:
        """Carry one event over to W&B."""
        match message["type"]:
            case "RunStarted":
                self._started = dict(message)
            case "UnitStarted":
                self._run(self._unit_page(message))
            case "EpochDone":
                self._log_epoch(message)
            case "UnitDone":
                self._end_unit(message)
            case "RunDone":
                self._summarise(message)
            case "TuneStarted":
                self._started, self._trials = dict(message), {}
                self._ended = list(message["finished"])
            case "TrialStarted":
                self._trials[message["stage"], message["number"]] = dict(message)
                self._run(self._trial_page(message))
            case "TrialEvent":
                self._note_unit(message)
            case "TrialDone":
                self._end_trial(message)
            case "TuneDone":
                self._summarise_study(message)

    def close(self) -> None:
        """Mark as failed the runs of units and trials that did not get to their end."""
        while self._open:
            self._finish(next(iter(self._open)), exit_code=1)

    def _unit_page(self, message: Mapping[str, Any]) -> Page:
        started, fold, seed = self._started, message["fold"], message["seed"]
        several = len(started["spec"].get("seeds", ())) > 1
        return self._run_page(
            f"fold{fold}-seed{seed}",
            f"{started['experiment']}/fold{fold}" + (f"-seed{seed}" if several else ""),
            "unit",
            {"fold": fold, "seed": seed},
            "epoch",
        )

    def _run_page(
        self, unit: str, name: str, job_type: str, more: Mapping[str, Any], step_metric: str | None = None
    ) -> Page:
        started = self._started
        spec = flatten(started["spec"])
        return Page(
            run_id(self._project, started, unit),
            name,
            started["experiment"],
            job_type,
            {**spec, **more, "attempt": started["attempt"], "device": started["device"]},
            [started["competition"], spec.get("model.arch"), "smoke" if started["smoke"] else None],
            step_metric,
        )

    def _trial_page(self, trial: Mapping[str, Any]) -> Page:
        stage, number = trial["stage"], trial["number"]
        names = {"search": f"trial {number}", "seeds": "own values, other seeds", "full": f"trial {number} in full"}
        # By its parameters: a trial that was interrupted is tried again under another number.
        told = sha256_json([stage, trial["parameters"]])
        return self._study_page(told, names[stage], stage, trial["parameters"], "fold")

    def _study_page(
        self, trial: str, name: str, job_type: str, config: Mapping[str, Any], step_metric: str | None = None
    ) -> Page:
        started = self._started
        about = {name: started[name] for name in ("attempt", "device", "executor", "sampler", "epochs")}
        return Page(
            study_id(self._project, started, trial),
            name,
            f"{started['experiment']}-tune",
            job_type,
            {**about, **config},
            [started["competition"], started["sampler"]],
            step_metric,
        )

    def _run(self, page: Page) -> Any:
        run = self._open.get(page.id)
        if run is None:
            run = self._open[page.id] = self._init(page)
        return run

    def _init(self, page: Page) -> Any:
        if self._online:
            try:
                run = self._init_once(page)
            except Exception as error:
                traceback.print_exc()
                self._go_offline(error)
            else:
                self._report("url", f"{run.project_url}/groups/{quote(page.group, safe='')}")
                return run
        return self._init_once(page)

    def _init_once(self, page: Page) -> Any:
        run = wandb.init(
            project=self._project,
            group=page.group,
            name=page.name,
            job_type=page.job_type,
            id=page.id,
            resume="allow",
            config=dict(page.config),
            tags=[tag[:TAG_LENGTH] for tag in page.tags if tag],
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
        if page.step_metric is not None:
            run.define_metric(page.step_metric)
            run.define_metric("*", step_metric=page.step_metric)
        return run

    def _go_offline(self, reason: Exception) -> None:
        self._online = False
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        self._report("note", f"W&B: went offline ({first_line}). {sync_hint(self._folder)}")
        # The service still holds the id of the run that failed; only a new service opens it again.
        self._open.clear()
        wandb.teardown()

    def _finish(self, name: str, exit_code: int) -> None:
        run = self._open.pop(name)
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError as error:
            self._go_offline(error)
        else:
            if self._online:  # all of it has arrived, so that `sync` need not send it
                marker(Path(run.settings.sync_file)).touch()

    def _log_epoch(self, message: Mapping[str, Any]) -> None:
        run = self._run(self._unit_page(message))
        figures = {name: value for name, value in message["row"].items() if name not in ("fold", "seed")}
        # W&B joins the pieces of a resumed run by step, so the step has to be the epoch too.
        run.log(figures | {"epoch": message["epoch"]}, step=message["epoch"])

    def _end_unit(self, message: Mapping[str, Any]) -> None:
        page = self._unit_page(message)
        run = self._run(page)
        run.summary.update({name: message[name] for name in ("score", "wall_s") if message[name] is not None})
        self._finish(page.id, exit_code=0)

    def _note_unit(self, message: Mapping[str, Any]) -> None:
        trial, unit = self._trials.get((message["stage"], message["number"])), message["event"]
        if trial is None or unit["score"] is None:  # it ended already: a pruned one may have units under way
            return
        self._run(self._trial_page(trial)).summary.update({f"fold{unit['fold']}-seed{unit['seed']}": unit["score"]})

    def _end_trial(self, message: Mapping[str, Any]) -> None:
        self._ended.append(message)
        trial = self._trials.pop((message["stage"], message["number"]), message)
        if message["state"] == "duplicate":  # its run is that of the trial with the same parameters
            return
        page = self._trial_page(trial)
        run = self._run(page)
        run.config.update({"state": message["state"]}, allow_val_change=True)
        # At the end and in order, as W&B's steps only go up: folds end in any order, and some in an earlier call.
        for fold, score in sorted((int(fold), score) for fold, score in message["fold_scores"].items()):
            run.log({"fold": fold, "fold_score": score}, step=fold)
        names = ("score", "standard_error", "state", "wall_s", "stage", "reason")
        run.summary.update({name: message[name] for name in names if message[name] is not None})
        self._finish(page.id, exit_code=int(message["state"] == "failed"))

    def _summarise_study(self, message: Mapping[str, Any]) -> None:
        started = self._started
        config = flatten({"space": started["space"], "spec": started["spec"]})
        page = self._study_page("summary", f"{started['experiment']} tune", "summary", config)
        run = self._run(page)
        run.summary.update({name: value for name, value in flatten(message["info"]).items() if value is not None})
        keys = list(dict.fromkeys(key for trial in self._ended for key in trial["parameters"]))
        names = ["number", "stage", "state", "score", "standard_error", "wall_s", "reason"]
        rows: list[Iterable[Any]] = [
            [trial[name] for name in names] + [_cell(trial["parameters"].get(key)) for key in keys]
            for trial in self._ended
        ]
        run.log({"trials": wandb.Table(columns=[*names, *keys], data=rows, allow_mixed_types=True)})
        self._keep_files(run, f"{started['experiment']}-tune", "study", ("trials.csv", "scored.csv", "tune.json"))
        self._finish(page.id, exit_code=0)

    def _keep_files(self, run: Any, name: str, kind: str, files: Iterable[str]) -> None:
        artifact = wandb.Artifact(name, type=kind)
        for file in files:
            if (self._folder / file).is_file():
                artifact.add_file(str(self._folder / file))
        run.log_artifact(artifact)

    def _summarise(self, message: Mapping[str, Any]) -> None:
        info, metric = message["info"], self._started["metric"]
        marks, track = info.get("marks") or [], EXTERNAL_TRACK if info.get("external") else OWN_TRACK
        # One groups by what is configuration, and filters with a click by tags.
        more = {
            "metric": metric,
            "track": track,
            "marks": ", ".join(sorted(marks)) or "none",
            "n_seeds": len(self._started["spec"].get("seeds", ())),
            "n_folds": len(info.get("fold_scores") or {}),
        }
        page = self._run_page("summary", self._started["experiment"], "summary", more)
        run = self._run(replace(page, tags=[*page.tags, *marks, track]))
        figures = {
            f"oof/{metric}": info.get("score"),
            "oof/standard_error": info.get("standard_error"),
            "oof/seed_std": info.get("seed_std"),
            "oof/tta_gain": _tta_gain(metric, info),
            **{f"oof/fold{fold}": score for fold, score in (info.get("fold_scores") or {}).items()},
        }
        run.summary.update({name: value for name, value in (flatten(info) | figures).items() if value is not None})
        if message["per_class"]:
            columns: list[str | int] = list(message["per_class"][0])
            rows: list[Iterable[Any]] = [row.values() for row in message["per_class"]]
            run.log({"per_class": wandb.Table(columns=columns, data=rows)})
        if message["confusion"]:
            run.log({"confusion_matrix": self._confusion(message["confusion"], info["classes"])})
        files = ("oof.csv", "test.csv", "run.json", "spec.yaml")
        self._keep_files(run, f"{self._started['experiment']}-oof", "oof", files)
        self._finish(page.id, exit_code=0)

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


def _tta_gain(metric: str, info: Mapping[str, Any]) -> float | None:
    """How much better the score is with test-time augmentation than without; None where that is not known.

    The score without is a mean over units: only with one seed, and for a mean over images, is it of the same thing.
    """
    with_tta, without = info.get("score"), info.get("score_without_tta")
    if with_tta is None or without is None or len(info["seeds"]) > 1 or metric not in ("accuracy", "log_loss"):
        return None
    gain: float = METRICS[metric].sign * (with_tta - without)
    return gain


def _cell(value: Any) -> Any:
    """A parameter as a table of W&B can hold it."""
    return flow_text(value) if isinstance(value, list | dict) else value


def sync_hint(folder: Path) -> str:
    """How to send later what was kept on disk."""
    return f"Sync later: .venv/bin/wandb sync --include-online {folder}/wandb/*run-*"


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
