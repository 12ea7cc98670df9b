"""The command line: `python run.py check | data | exp | report | eval | explain | submit | ...`. Wiring only.

Each command imports what it needs, so that `check` and `submit` answer without loading torch.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from foldwise.errors import FoldwiseError

if TYPE_CHECKING:
    from foldwise.records.calibration import Prior
    from foldwise.records.ensemble import Method
    from foldwise.records.submission import Track
    from foldwise.runs.events import Listener
    from foldwise.spec.model import ExperimentSpec

DEMO_EXPERIMENTS = ("demo_cnn", "demo_vit")
# `ensemble.METHODS` and `calibration.PRIORS`, written out: no command waits for numpy to be parsed.
BLENDS = ("best", "mean", "caruana", "logit_mean", "stack")
CORRECTIONS = ("none", "train", "test")
ENGINES = ("torch", "onnx")
_MODEL = "a run, `best`, `strict`, or a submission's folder or hash"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What comes after `run.py`; None for the process's own.

    Returns:
        The exit status: 0, or the `exit_code` of the error that was printed.
    """
    options = _parser().parse_args(arguments)
    root = Path(options.root).resolve()
    try:
        status: int = options.run(root, options)
    except FoldwiseError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_code
    except BrokenPipeError:
        # Whoever read has enough; and at exit nothing must be flushed to it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last finished epoch", file=sys.stderr)  # noqa: T201
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Foldwise: one YAML in, one submission.csv out.")
    parser.add_argument("--root", default=".", help="the project's folder (default: here)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Path, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    check = command("check", _check, "say everything that is wrong with experiment files; runs nothing")
    check.add_argument("experiments", nargs="*", metavar="EXP", help="names or files (default: all)")
    _add_overrides(check)

    data = command("data", _data, "check a competition's files as handed out, and take them in")
    data.add_argument("--comp", default="aspicv", help="name of the competition (default: aspicv)")
    origin = data.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--from", dest="source", type=_source, help="its folder, or hf:<owner/name>[@revision][:config]"
    )
    origin.add_argument("--kaggle", metavar="SLUG", help="fetch it: <competition>, or <owner>/<dataset>")

    exp = command("exp", _exp, "train an experiment on its folds, or go on with it")
    exp.add_argument("experiment", metavar="EXP", help="a name under experiments/, or `all`")
    _add_overrides(exp)
    exp.add_argument("--folds", type=_integers, help="only these folds now, e.g. 0,1")
    exp.add_argument(
        "--split",
        type=int,
        default=0,
        help="which split of folds.csv; 1 confirms what was chosen on 0, as <exp>.split1",
    )
    exp.add_argument("--smoke", action="store_true", help="2 folds, 1 epoch, 64 images: see that it runs")
    exp.add_argument("--fresh", action="store_true", help="delete the run that is there, and begin anew")
    _add_where(exp)

    tuned = command(
        "tune", _tune, "search an experiment's `tune.space`, or go on; ends with experiments/<exp>_tuned.yaml"
    )
    tuned.add_argument("experiment", metavar="EXP", help="a name under experiments/, with a `tune` section")
    _add_overrides(tuned)
    tuned.add_argument("--trials", type=int, help="distinct parameter sets in all (default: the spec's)")
    tuned.add_argument(
        "--storage",
        default=os.environ.get("STORAGE") or None,
        help="journal:<file>, or a database's URL (default: $STORAGE, else SQLite in oof/<exp>/tune/)",
    )
    tuned.add_argument("--fresh", action="store_true", help="delete the study that is there, and begin anew")
    tuned.add_argument(
        "--replay", action="store_true", help="train nothing: what would pruning have saved in the kept study, and lost"
    )
    _add_where(tuned)

    submit = command("submit", _submit, "blend the kept runs and write the submission")
    submit.add_argument("--comp", default="aspicv", help="name of the competition (default: aspicv)")
    submit.add_argument("--runs", type=lambda text: text.split(","), help="only these runs, e.g. a,b (default: all)")

    submit.add_argument("--method", choices=BLENDS, help="blend in this way (default: the data choose)")
    submit.add_argument(
        "--prior",
        choices=CORRECTIONS,
        help="correct class probabilities to the labels' shares (train), or to those of the test images (test)",
    )
    submit.add_argument(
        "--track",
        choices=("best", "strict"),
        help="only the best, or only that of competition data (default: both)",
    )
    submit.add_argument("--kaggle", metavar="SLUG", help="upload it to this Kaggle competition")
    submit.add_argument("--message", help="with --kaggle: what to say with it (default: members and estimate)")
    submit.add_argument("--force", action="store_true", help="with --kaggle: upload the same bytes again")
    submit.add_argument(
        "--score", help="blend nothing: record the newest submission's public score, or `kaggle` to fetch it"
    )
    submit.add_argument("--images", help="with --score: how many test images it is on, e.g. 90 or 30%%")
    submit.add_argument(
        "--of", help="with --score or --kaggle: a kept submission, by folder, start of its hash, `best` or `strict`"
    )

    listed = command("submissions", _submissions, "list the submissions: what was expected, and what they scored")
    listed.add_argument("--comp", default="aspicv", help="name of the competition (default: aspicv)")
    listed.add_argument("--json", action="store_true", help="print it as JSON")

    told = command(
        "results", _results, "write docs/RESULTS.md: what the kept runs score, and what each choice was worth"
    )
    told.add_argument(
        "competition",
        nargs="?",
        metavar="COMP",
        help="the competition that docs/ablations.yaml must be of (default: any)",
    )
    leaked = command("leaks", _leaks, "show which images of a data set are copies of a competition's")
    leaked.add_argument("competition", metavar="COMP", help="what is scored, e.g. aspicv")
    leaked.add_argument("source", metavar="SOURCE", help="the data set from elsewhere, e.g. fer2013_full")
    drifted = command("drift", _drift, "ask whether training and test images can be told apart")
    drifted.add_argument("--comp", default="aspicv", help="name of the competition (default: aspicv)")

    sync = command("sync", _sync, "send to W&B what runs kept on disk")
    sync.add_argument("experiment", nargs="?", metavar="EXP", help="only this one (default: all)")

    report = command("report", _report, "draw the reports of kept runs anew, into oof/<exp>/report/")
    report.add_argument("runs", nargs="+", metavar="EXP", help="names of kept runs")

    evaluate = command("eval", _eval, "score a kept run on another labelled set, into oof/<exp>/eval/")
    evaluate.add_argument("experiment", metavar="EXP", help="a kept run with its weights")
    evaluate.add_argument("--on", required=True, help="a folder, hf:<owner/name>, or a competition under inputs/")
    evaluate.add_argument(
        "--map",
        dest="pairs",
        action="append",
        default=[],
        metavar="A=B",
        help="its class A is our B; `A=` leaves it out",
    )
    evaluate.add_argument("--part", help="only this part of the set, e.g. test")
    evaluate.add_argument("--name", help="name of the evaluation (default: after the set)")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")

    plot = command("plot", _plot, "draw kept runs side by side: scores, curves, recall of each class")
    plot.add_argument("runs", nargs="+", metavar="EXP", help="names of kept runs")
    plot.add_argument("--out", type=Path, help="the PNG (default: oof/comparison.png)")

    compare = command("compare", _compare, "tell kept runs apart: scores, which differences are real, what blends")
    compare.add_argument("--comp", default="aspicv", help="name of the competition (default: aspicv)")
    compare.add_argument("--runs", type=lambda text: text.split(","), help="only these runs, e.g. a,b (default: all)")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print every figure as JSON")
    form.add_argument("--csv", action="store_true", help="print a line a run as CSV")
    form.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path("oof/compare.html"),
        metavar="FILE",
        help="write one page that needs no network (default: oof/compare.html)",
    )
    compare.add_argument("--no-pictures", action="store_true", help="with --html: leave the images out of the page")

    explain = command("explain", _explain, "draw what a kept run looks at: heat maps over mistakes and right answers")
    explain.add_argument("experiment", metavar="EXP", help="a kept run with its weights")
    explain.add_argument("--ids", type=lambda text: text.split(","), help="only these images, e.g. 1,2,3")
    explain.add_argument("--count", type=int, default=16, help="how many images (default: 16)")
    explain.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")

    publish = command("publish", _publish, "push a kept run with a model card to the Hugging Face Hub")
    publish.add_argument("experiment", metavar="EXP", help="a kept run with its weights")
    publish.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository; made where need be")
    publish.add_argument("--private", action="store_true", help="make it a private one")
    publish.add_argument("--license", default="other", help="the hub's identifier, e.g. mit (default: other)")
    publish.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write the files there instead")

    predicted = command("predict", _predict, "say what a kept run or a blend sees in pictures")
    predicted.add_argument("model", metavar="RUN", help=_MODEL)
    predicted.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders, or patterns like 'a/*.jpg'")
    predicted.add_argument("--show-all", action="store_true", help="the probabilities of all classes")
    predicted.add_argument("--json", action="store_true", help="print every figure as JSON")
    predicted.add_argument("--faces", action="store_true", help="find faces, and answer for each")
    predicted.add_argument(
        "--fold", type=int, help="only this fold's models (default: all; of a training image those that never saw it)"
    )
    predicted.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")
    predicted.add_argument("--engine", choices=ENGINES, default="torch", help="what runs the models (default: torch)")

    export = command("export", _export, "write a run or a blend as one ONNX or TorchScript file, and check that")
    export.add_argument("name", metavar="RUN", help=_MODEL)
    export.add_argument("--format", dest="kind", choices=("onnx", "torchscript"), default="onnx", help="default: onnx")
    export.add_argument("--out", type=Path, help="the file (default: exports/<run>.onnx or .pt)")
    export.add_argument("--fold", type=int, help="only the models of this fold (default: all, averaged)")
    export.add_argument("--views", choices=("all", "identity"), default="all", help="identity: faster, another answer")
    export.add_argument("--int8", action="store_true", help="8 bits a weight; says what that costs (ONNX alone)")
    export.add_argument("--images", type=int, default=100, help="how many images to check it on (default: 100)")

    served = command("serve", _serve, "answer for faces over HTTP: a page, a webcam mirror, JSON")
    served.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"{_MODEL}; the default first (default: the best that is here)"
    )
    served.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    served.add_argument("--port", type=int, default=8000, help="0 for any free one (default: 8000)")
    served.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")
    served.add_argument("--engine", choices=ENGINES, default="torch", help="what runs the models (default: torch)")
    served.add_argument(
        "--name",
        dest="names",
        action="append",
        default=[],
        metavar="HOST",
        help="a further name by which it may be reached, such as that of a proxy",
    )
    served.add_argument("--rate", type=float, help="requests a second of one address; 0: no limit (default: 50)")

    mirrored = command("mirror", _mirror, "show a camera or a video with an emoji on each face")
    mirrored.add_argument("name", nargs="?", metavar="RUN", help=f"{_MODEL} (default: the best that is here)")
    mirrored.add_argument("--camera", type=int, default=0, metavar="N", help="which camera (default: 0)")
    mirrored.add_argument("--source", type=Path, metavar="VIDEO", help="a video in place of the camera")
    mirrored.add_argument("--write", type=Path, metavar="OUT", help="annotate --source into this .mp4 or .avi")
    mirrored.add_argument(
        "--snapshots", type=Path, default=Path("snapshots"), help="where the key s saves to (default: snapshots)"
    )
    mirrored.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")

    carried = command("weights", _weights, "carry weights between machines by their hash: push, pull or list them")
    carried.add_argument("what", choices=("push", "pull", "list"))
    carried.add_argument("runs", nargs="*", metavar="EXP", help="kept runs (default: all that have, or lack, weights)")
    carried.add_argument("--to", metavar="PLACE", help="push: a folder, or wandb:<entity>/<project>")
    carried.add_argument("--from", dest="source", metavar="PLACE", help="pull, list: likewise")

    packed = command("kernel", _kernel, "pack a run or a blend into a folder that predicts with no network")
    packed.add_argument("name", metavar="RUN", help=_MODEL)
    packed.add_argument("--out", type=Path, metavar="FOLDER", help="default: build/kernel_<name>")
    packed.add_argument("--wheels", action="store_true", help="download the packages too: several GB")

    demo = command("demo", _demo, "draw a demo competition, train two experiments on it, blend and score them")
    demo.add_argument("--fresh", action="store_true", help="begin anew")

    command("schema", _schema, "write experiments/schema.json anew from the installed libraries")
    return parser


def _source(text: str) -> Path | str:
    return text if text.startswith("hf:") else Path(text)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="change the spec")
    parser.add_argument("--name", help="name of the changed experiment (default: its name and a hash)")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:<n> or mps (default: $DEVICE, else the best there is)")
    parser.add_argument("--on", default="local", help="local (default), processes, or ray (a cluster by $RAY_ADDRESS)")
    parser.add_argument("--workers", type=int, help="processes: folds at a time (default: what cores or GPUs allow)")
    parser.add_argument(
        "--track", default=os.environ.get("TRACK") or "wandb", help="wandb, tensorboard, both by comma, or none"
    )
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT") or "foldwise", help="the W&B project")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected fold numbers such as 0,1, but got {text!r}") from None


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)  # noqa: T201


def _load(root: Path, name: str, options: argparse.Namespace, *, tuning: bool = False) -> ExperimentSpec:
    from foldwise.spec.load import load_experiment, split_overrides

    overrides = [override for text in options.overrides for override in split_overrides(text)]
    return load_experiment(
        _experiment_file(root, name), overrides=overrides, name=options.name, root=root, tuning=tuning
    )


def _experiment_file(root: Path, name: str) -> Path:
    from foldwise.spec.yaml import did_you_mean

    path = Path(name) if name.endswith((".yaml", ".yml")) else root / "experiments" / f"{name}.yaml"
    if path.exists():
        return path.resolve()
    there = sorted(file.stem for file in (root / "experiments").glob("*.yaml"))
    guess = did_you_mean(name, there)
    raise FoldwiseError(
        f"there is no experiment `{name}` (no file {path})\n"
        f"  fix: {guess + ' ' if guess else ''}experiments here: {', '.join(there) or 'none'}"
    )


def _check(root: Path, options: argparse.Namespace) -> int:
    from foldwise.spec.load import check_all

    began = time.perf_counter()
    if options.overrides:
        if not options.experiments:
            given = " ".join(f"--set {text}" for text in options.overrides)
            raise FoldwiseError(f"--set changes one experiment, but none is named\n  fix: check EXP {given}")
        for name in options.experiments:
            _say(f"{_load(root, name, options).name}: ok")
        return 0
    results = check_all(root, [_experiment_file(root, name) for name in options.experiments])
    wrong = [error for _, error in results if error is not None]
    for error in wrong:
        print(error, file=sys.stderr)  # noqa: T201
    good = [path.stem for path, error in results if error is None]
    if good:
        _say(
            f"{len(good)} of {len(results)} experiments are valid "
            f"({time.perf_counter() - began:.2f} s): {', '.join(good)}"
        )
    return 2 if wrong else 0


def _data(root: Path, options: argparse.Namespace) -> int:
    from rich.console import Console

    from foldwise.data.ingest import ingest, render

    with tempfile.TemporaryDirectory() as fetched:
        source = options.source
        if options.kaggle:
            from foldwise.data.download import fetch_kaggle

            source = Path(fetched)
            fetch_kaggle(options.kaggle, source)
        report = ingest(source, root, options.comp)
    Console(soft_wrap=True, highlight=False).print(render(report))
    return 0


def _exp(root: Path, options: argparse.Namespace) -> int:
    if options.experiment != "all":
        _run(root, _load(root, options.experiment, options), options)
        return 0
    failed: dict[str, int] = {}
    for file in sorted((root / "experiments").glob("*.yaml")):
        try:
            _run(root, _load(root, file.stem, options), options)
        except FoldwiseError as error:
            failed[file.stem] = error.exit_code
            print(f"{file.stem}: {error}", file=sys.stderr)  # noqa: T201
    if failed:
        noun = "experiment" if len(failed) == 1 else "experiments"
        print(f"{len(failed)} {noun} did not finish: {', '.join(failed)}", file=sys.stderr)  # noqa: T201
    return max(failed.values(), default=0)


class _Followers:
    """The log and the trackers of a run or a study, made once its folder is open; their notes are said once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._trackers = [] if options.track == "none" else options.track.split(",")
        if unknown := set(self._trackers) - {"wandb", "tensorboard"}:
            raise FoldwiseError(
                f"unknown tracker `{min(unknown)}`\n  fix: --track wandb, tensorboard, wandb,tensorboard or none"
            )
        self._project = options.project
        self._made: list[Any] = []
        self._said: list[str] = []

    def __call__(self, path: Path) -> list[Listener]:
        from foldwise.runs.tracking import tensorboard_tracker, wandb_tracker
        from foldwise.show.progress import log_listener

        listeners: list[Listener] = [log_listener(path / "run.log")]
        if "tensorboard" in self._trackers:  # first, since it may refuse
            self._made.append(tensorboard_tracker(path))
        if "wandb" in self._trackers and (tracker := wandb_tracker(path, self._project)) is not None:
            self._made.append(tracker)
        self._tell()
        return [*listeners, *self._made]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._tell()

    def _tell(self) -> None:
        for note in [note for follower in self._made for note in follower.notes if note not in self._said]:
            self._said.append(note)
            _say(note)


def _tune(root: Path, options: argparse.Namespace) -> int:
    from rich.console import Console

    from foldwise.runs.tune import TuneOptions, tune
    from foldwise.show.tuning import tuning_listener, write_plots

    spec = _load(root, options.experiment, options, tuning=True)
    if options.replay:
        from foldwise.runs.replay import replay_study

        _say(*replay_study(root, spec.competition, root / "oof" / spec.name / "tune"))
        return 0
    device = options.device or os.environ.get("DEVICE") or None
    call = TuneOptions(options.trials, options.storage, options.on, options.workers, device, options.fresh)
    with _Followers(options) as followers:
        screen = tuning_listener(Console(highlight=False))
        info = tune(
            root,
            spec,
            call,
            screen=screen,
            follow=followers,
            plots=lambda study, path, metric: write_plots(study, path, metric=metric),
        )
    if info is not None and info["tuned"] is not None:
        _draw_report(root, root / "oof" / info["tuned"])
    return 0


def _run(root: Path, spec: ExperimentSpec, options: argparse.Namespace) -> dict[str, Any] | None:
    from rich.console import Console

    from foldwise.runs.experiment import Options, run_experiment
    from foldwise.show.progress import progress_listener

    followers = _Followers(options)
    if options.split:
        spec = spec.model_copy(update={"name": f"{spec.name}.split{options.split}"})
    device = options.device or os.environ.get("DEVICE") or None
    call = Options(options.folds, options.smoke, options.fresh, device, options.split, options.on, options.workers)
    complete = root / "oof" / spec.name / "run.json"
    before = complete.exists() and not options.fresh
    with followers:
        record = run_experiment(root, spec, call, screen=progress_listener(Console(highlight=False)), follow=followers)
    if record is not None and not before and not options.smoke:
        _draw_report(root, root / "oof" / spec.name)
    return record


def _draw_report(root: Path, path: Path) -> None:
    """Draw a run's report; a run is complete without one, so that a fault is told and no more."""
    from foldwise.show.report import write_report

    try:
        report = write_report(path, root=root)
    except FoldwiseError as error:
        _say(f"no report: {error}")
        return
    _say(*(f"  {note}" for note in report.notes), f"  report     {path.relative_to(root)}/report")


def _report(root: Path, options: argparse.Namespace) -> int:
    from foldwise.show.report import write_report

    for name in options.runs:
        path = root / "oof" / name
        report = write_report(path, root=root)
        _say(*report.notes, f"{name}: {len(report.files)} files in {path.relative_to(root)}/report")
    return 0


def _eval(root: Path, options: argparse.Namespace) -> int:
    from foldwise.data.labelled import parse_class_map
    from foldwise.learn.device import pick_runtime
    from foldwise.runs.evaluate import evaluate
    from foldwise.show.report import evaluation_lines, write_evaluation

    evaluation = evaluate(
        root,
        options.experiment,
        options.on,
        runtime=pick_runtime(options.device or os.environ.get("DEVICE") or None, "auto", None),
        class_map=parse_class_map(options.pairs),
        part=options.part,
        called=options.name,
    )
    report = write_evaluation(evaluation)
    _say(*evaluation_lines(evaluation, root), *report.notes)
    return 0


def _plot(root: Path, options: argparse.Namespace) -> int:
    from foldwise.show.report import write_comparison

    _say(f"written  {write_comparison(root, options.runs, options.out or root / 'oof' / 'comparison.png')}")
    return 0


def _leaks(root: Path, options: argparse.Namespace) -> int:
    from foldwise.show.leaks import draw_leaks, leak_lines, leaks

    found = leaks(root, options.competition, options.source, say=_say)
    draw_leaks(found, root)
    _say(*leak_lines(found), f"picture    {found.picture.as_posix()}")
    return 0


def _results(root: Path, options: argparse.Namespace) -> int:
    from foldwise.records.results import write_results

    _say(*write_results(root, options.competition))
    return 0


def _compare(root: Path, options: argparse.Namespace) -> int:
    from foldwise.records.compare import compare
    from foldwise.records.compare_text import render, to_csv, to_json

    if options.no_pictures and not options.html:
        raise FoldwiseError("--no-pictures has no effect alone\n  fix: give --html too")
    if options.html and (options.html.suffix.lower() not in (".html", ".htm") or (root / options.html).is_dir()):
        raise FoldwiseError(
            f"--html {options.html}: is no name of a page\n  fix: end it in .html, e.g. oof/compare.html"
        )
    comparison = compare(root, options.comp, options.runs)
    if options.json or options.csv:
        _say((to_json if options.json else to_csv)(comparison).rstrip("\n"))
        return 0
    if options.html:
        from foldwise.show.page import write_page

        path = write_page(comparison, root / options.html, root=root, pictures=not options.no_pictures)
        _say(f"written  {path.relative_to(root) if path.is_relative_to(root) else path}")
        return 0
    from rich.console import Console

    Console(highlight=False).print(render(comparison))
    return 0


def _explain(root: Path, options: argparse.Namespace) -> int:
    from foldwise.learn.device import pick_runtime
    from foldwise.show.explain import explain

    runtime = pick_runtime(options.device or os.environ.get("DEVICE") or None, "fp32", None)
    path = explain(root, options.experiment, ids=options.ids, count=options.count, runtime=runtime)
    _say(f"written  {path.relative_to(root)}")
    return 0


def _publish(root: Path, options: argparse.Namespace) -> int:
    from foldwise.runs.publish import publish, render

    published = publish(
        root,
        options.experiment,
        options.repo,
        private=options.private,
        license_id=options.license,
        dry_run=options.dry_run,
    )
    _say(*render(published))
    return 0


def _predict(root: Path, options: argparse.Namespace) -> int:
    from foldwise.serve.ask import answer_lines, answers_json, ask, picture_files

    files, faults = picture_files(options.pictures)
    if files:
        from foldwise.files import pretty_json
        from foldwise.serve.predictor import Predictor

        device = options.device or os.environ.get("DEVICE") or None
        predictor = Predictor.load(options.model, root=root, device=device, engine=options.engine)
        asked = ask(predictor, files, faces=options.faces, fold=options.fold, faults=faults)
        if options.json:
            _say(pretty_json(answers_json(asked)).rstrip())
        elif asked.answers:
            _say(*answer_lines(asked, show_all=options.show_all))
        faults = list(asked.faults)
    for fault in faults:
        print(fault, file=sys.stderr)  # noqa: T201
    return 2 if faults else 0


def _export(root: Path, options: argparse.Namespace) -> int:
    from foldwise.serve.export import export, export_lines

    exported = export(
        root,
        options.name,
        kind=options.kind,
        out=options.out,
        fold=options.fold,
        views=["identity"] if options.views == "identity" else None,
        int8=options.int8,
        count=options.images,
    )
    _say(*export_lines(exported, root))
    return 0


def _serve(root: Path, options: argparse.Namespace) -> int:
    from foldwise.serve.app import serve

    return serve(
        root,
        options.runs,
        host=options.host,
        port=options.port,
        device=options.device or os.environ.get("DEVICE") or None,
        engine=options.engine,
        public_names=options.names,
        rate=options.rate,
        say=_say,
    )


def _mirror(root: Path, options: argparse.Namespace) -> int:
    from foldwise.serve.mirror import mirror
    from foldwise.serve.predictor import Predictor
    from foldwise.serve.shelf import Catalogue

    name = options.name or Catalogue(root).best().name
    device = options.device or os.environ.get("DEVICE") or None
    predictor = Predictor.load(name, root=root, device=device, batch_size=1)
    _say(f"model     {predictor.name}, version {predictor.version}: {predictor.estimate}")
    mirror(
        predictor,
        folds=predictor.folds,
        camera=options.camera,
        source=options.source,
        write=options.write,
        snapshots=options.snapshots,
        say=_say,
    )
    return 0


def _weights(root: Path, options: argparse.Namespace) -> int:
    from foldwise.runs.weights import pull_weights, push_weights, weights_lines

    given = {"push": options.source is None and options.to, "pull": options.to is None and options.source}
    if not given.get(options.what, options.to is None):
        fix = "weights push --to <folder>, weights pull --from <folder>, or weights list [--from <folder>]"
        raise FoldwiseError(f"weights {options.what}: --to goes with push, --from with pull and list\n  fix: {fix}")
    if options.what == "push":
        push_weights(root, options.runs, options.to, say=_say)
    elif options.what == "pull":
        pull_weights(root, options.runs, options.source, say=_say)
    else:
        _say(*weights_lines(root, options.runs, options.source))
    return 0


def _kernel(root: Path, options: argparse.Namespace) -> int:
    from foldwise.serve.kernel import build_kernel, kernel_lines

    _say(*kernel_lines(build_kernel(root, options.name, options.out, wheels=options.wheels, say=_say), root))
    return 0


def _submit(root: Path, options: argparse.Namespace) -> int:
    _refuse_stray(options)
    if options.score is not None:
        return _record_score(root, options)
    if options.kaggle is not None:
        from foldwise.records.upload import check_slug

        check_slug(options.kaggle)
    if options.of is None:
        _blend(root, options.comp, options.runs, options.method, options.prior or "none", options.track)
    if options.kaggle is not None:
        from foldwise.data.competition import load_competition
        from foldwise.records.history import read_history
        from foldwise.records.upload import PER_DAY, upload

        spec, history = load_competition(root, options.comp), read_history(root, options.comp)
        lines = upload(
            root,
            spec,
            history,
            history.find(options.of or options.track),
            options.kaggle,
            message=options.message,
            per_day=spec.submissions_per_day or PER_DAY,
            force=options.force,
            now=datetime.now(UTC),
        )
        _say(*lines)
    return 0


def _refuse_stray(options: argparse.Namespace) -> None:
    """Refuse what would have no effect."""
    needs = {"message": ("kaggle",), "force": ("kaggle",), "images": ("score",), "of": ("score", "kaggle")}
    for name, partners in needs.items():
        if getattr(options, name) and not any(getattr(options, partner) for partner in partners):
            wanted = " or ".join(f"--{partner}" for partner in partners)
            raise FoldwiseError(f"--{name} has no effect alone\n  fix: give {wanted} too")
    together = [("score", "kaggle"), ("of", "track"), *product(("score", "of"), ("runs", "method", "prior"))]
    for first, second in together:
        if getattr(options, first) and getattr(options, second):
            raise FoldwiseError(f"--{first} and --{second} do not go together\n  fix: one after the other")


def _record_score(root: Path, options: argparse.Namespace) -> int:
    from foldwise.metrics import METRICS
    from foldwise.records.history import history_lines, parse_images, parse_score, read_history, record_score

    history, now = read_history(root, options.comp), datetime.now(UTC)
    submission = history.find(options.of or options.track)
    images = None if options.images is None else parse_images(options.images, submission.images)
    if options.score == "kaggle":
        from foldwise.records.upload import fetch_score

        lines = fetch_score(history, submission, images=images, now=now)
    else:
        score = parse_score(options.score, METRICS[submission.metric])
        lines = record_score(submission, score, images=images, source="user", now=now)
    _say(*lines, "", *history_lines(read_history(root, options.comp)))
    return 0


def _submissions(root: Path, options: argparse.Namespace) -> int:
    from foldwise.files import pretty_json
    from foldwise.records.history import history_json, history_lines, read_history

    history = read_history(root, options.comp)
    _say(pretty_json(history_json(history)).rstrip() if options.json else "\n".join(history_lines(history)))
    return 0


def _drift(root: Path, options: argparse.Namespace) -> int:
    from foldwise.show.drift import drift, drift_lines, write_drift

    found = drift(root, options.comp)
    paths = write_drift(found, root)
    _say(*drift_lines(found), f"written  {', '.join(path.relative_to(root).as_posix() for path in paths)}")
    return 0


def _sync(root: Path, options: argparse.Namespace) -> int:
    from foldwise.runs.sync import sync_runs

    return 3 if sync_runs(root, options.experiment, say=_say).failed else 0


def _blend(
    root: Path,
    competition: str,
    names: Sequence[str] | None = None,
    method: Method | None = None,
    prior: Prior = "none",
    track: Track | None = None,
) -> Path:
    from foldwise.data.competition import competition_folder, load_competition
    from foldwise.data.folds import natural_order, read_folds
    from foldwise.metrics import METRICS
    from foldwise.records.ensemble import METHODS
    from foldwise.records.history import submissions_folder
    from foldwise.records.store import list_runs
    from foldwise.records.submission import blend_tracks, tracks_lines, write_submissions, written_lines

    spec = load_competition(root, competition)
    runs, skipped = list_runs(root, competition)
    if names is not None:
        there = {run.name for run in runs}
        if missing := [name for name in names if name not in there]:
            reason = next((line for line in skipped if line.startswith(f"{missing[0]}:")), f"{missing[0]}: no such run")
            raise FoldwiseError(f"{reason}\n  fix: runs that can be blended: {', '.join(sorted(there)) or 'none'}")
        runs = [run for run in runs if run.name in names]
    else:
        _say(*(f"left out: {line}" for line in skipped if ": is of competition " not in line))
    if not runs:
        raise FoldwiseError(f"there is no complete run of `{competition}` to submit\n  fix: make exp EXP=<experiment>")
    folds = read_folds(competition_folder(root, competition) / "folds.csv")
    tracks = blend_tracks(
        runs,
        metric=METRICS[spec.metric],
        groups=dict(zip(folds.ids.tolist(), folds.group.tolist(), strict=True)),
        methods=METHODS if method is None else (method,),
        prior=prior,
        track=track,
        named=names is not None,
    )
    written = write_submissions(
        submissions_folder(root, competition),
        tracks,
        expected_ids=spec.submission_ids or tuple(natural_order(tracks.first.test_ids.tolist())),
        id_column=spec.columns.id,
        label_column=spec.columns.label,
        now=datetime.now(),
    )
    _say(*tracks_lines(tracks), *written_lines(written, root))
    return next(iter(written.values()))


def _demo(root: Path, options: argparse.Namespace) -> int:
    from rich.console import Console

    from foldwise.data.competition import competition_folder
    from foldwise.data.demo import draw_demo
    from foldwise.data.ingest import ingest, render

    began = time.monotonic()
    answers = competition_folder(root, "demo") / "test_labels.csv"
    if not answers.exists():
        with tempfile.TemporaryDirectory() as handed_out:
            draw_demo(Path(handed_out))
            Console(soft_wrap=True, highlight=False).print(render(ingest(Path(handed_out), root, "demo")))
            answers.write_bytes((Path(handed_out) / "test_labels.csv").read_bytes())
    call = _parser().parse_args(["exp", "demo", *(["--fresh"] if options.fresh else [])])
    for name in DEMO_EXPERIMENTS:
        _run(root, _load(root, name, call), call)
    _say("")
    path = _blend(root, "demo")
    with answers.open(newline="") as file:
        truth = {row["id"]: row["label"] for row in csv.DictReader(file)}
    with (path / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    hits = sum(truth[row["id"]] == row["label"] for row in rows)
    share = hits / len(rows)
    error = (share * (1 - share) / len(rows)) ** 0.5
    _say(
        f"leaderboard  {hits} of {len(rows)} test images right: {share:.4f} +- {error:.4f}",
        f"That took {time.monotonic() - began:.0f} s. With your own data: make data COMP=<name> FROM=<folder>",
    )
    return 0


def _schema(root: Path, _options: argparse.Namespace) -> int:
    from foldwise.learn.catalogue import write

    path = root / "experiments" / "schema.json"
    write(path)
    _say(f"wrote {path.relative_to(root)}")
    return 0
