"""Cross-validation: one unit, a fold with a seed, trained and predicted.

Rows are split by the committed folds; what is watched during training is an inner slice of the training fold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from foldwise.data.competition import Dataset
from foldwise.data.folds import SCORED_ONLY
from foldwise.data.stacked import Images
from foldwise.errors import DeviceError, FoldwiseError
from foldwise.files import atomic_path, sha256_file
from foldwise.learn.augment import Augment, Batches, sampling_weights
from foldwise.learn.device import Runtime, make_deterministic, peak_memory_mib
from foldwise.learn.fit import Fitted, Row, fit
from foldwise.learn.keys import Purpose, generator, torch_seed
from foldwise.learn.models import ToInput, build_model, head_parameters, place, to_input
from foldwise.learn.objectives import Supervised, Taught, loss_class_weights
from foldwise.learn.predict import parse_view, predict, predict_batch_size
from foldwise.metrics import METRICS
from foldwise.records.store import Unit
from foldwise.runs.events import EpochDone, Event, Message, StepDone, UnitStarted
from foldwise.spec.model import ExperimentSpec, ModelSpec, mapped_classes
from foldwise.stats import paired_difference, standard_error

_SMOKE_IMAGES, _SMOKE_TEST_IMAGES, _SMOKE_FOLDS = 64, 16, 2


@dataclass(frozen=True)
class Table:
    """The rows of a data set as cross-validation sees them.

    Attributes:
        images: (N, H, W, C) uint8, memory-mapped.
        ids: (N,) str.
        labels: (N,) int64, -1 where unlabelled.
        fold: (N,) int64: the fold that scores a row; -1 always trained on; -2 never trained on (test).
        group: (N,) str: near-duplicates share one.
        barred: (N,) bool: not trained on, whatever the fold; None where nothing is barred.
        weight: (N,) float32 of each row in the loss, more than 0; None where all weigh the same.
        n_own: The first so many rows are the competition's own, the others external; None for all.
    """

    images: Images
    ids: np.ndarray
    labels: np.ndarray
    fold: np.ndarray
    group: np.ndarray
    barred: np.ndarray | None = None
    weight: np.ndarray | None = None
    n_own: int | None = None

    @property
    def folds(self) -> tuple[int, ...]:
        """The folds to run: those that score rows, or the single fold 0 where none does (`split: full`)."""
        return tuple(int(k) for k in np.unique(self.fold[self.fold >= 0])) or (0,)

    def take(self, rows: np.ndarray) -> Table:
        """A smaller table of some rows, its images in memory."""
        barred, weight = (None if column is None else column[rows] for column in (self.barred, self.weight))
        ids, labels, fold, group = (column[rows] for column in (self.ids, self.labels, self.fold, self.group))
        return Table(self.images[rows], ids, labels, fold, group, barred, weight)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a unit is taught besides its labels.

    Attributes:
        rows: (m,) unlabelled rows that are trained on too.
        taught: Targets and weights of all rows that are trained on, and what is to be matched.
        told: Lines for the user.
        info: What the unit notes of it, as plain JSON values.
    """

    rows: np.ndarray
    taught: Taught
    told: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


def make_table(data: Dataset) -> Table:
    """Join a data set's images with its folds by id."""
    labelled = data.labels >= 0
    fold = np.full(len(data.ids), SCORED_ONLY, dtype=np.int64)
    group = data.ids.copy()
    fold[labelled] = data.folds.of(data.ids[labelled])
    group[labelled] = data.folds.groups_of(data.ids[labelled])
    return Table(data.images, data.ids, data.labels, fold, group)


def relabelled(
    table: Table, classes: Sequence[str], label_map: Mapping[str, str] | None
) -> tuple[Table, tuple[str, ...]]:
    """The table in the classes that an experiment learns, and these classes; see `ExperimentSpec.label_map`."""
    own, becomes = mapped_classes(classes, label_map)
    # The last place is for label -1, the unlabelled.
    return replace(table, labels=np.array([*becomes, -1], dtype=np.int64)[table.labels]), own


def smoke_table(table: Table, seed: int) -> Table:
    """Sixty-four labelled images in two folds and sixteen test images: enough to see every line of code run."""
    rng = generator(Purpose.SMOKE, seed)
    labelled = rng.permutation(np.flatnonzero(table.labels >= 0))
    classes = table.labels[labelled]
    # Deal the classes round-robin, so that every class is there and both folds hold some of each.
    turn = np.empty(len(labelled))
    for label in np.unique(classes):
        turn[classes == label] = np.arange((classes == label).sum())
    chosen = labelled[np.argsort(turn, kind="stable")][:_SMOKE_IMAGES]
    test = np.flatnonzero(table.labels < 0)[:_SMOKE_TEST_IMAGES]
    small = table.take(np.sort(np.concatenate([chosen, test])))
    if (table.fold >= 0).any():
        _, group = np.unique(small.group, return_inverse=True)
        small = replace(small, fold=np.where(small.labels >= 0, group % _SMOKE_FOLDS, SCORED_ONLY))
    return small


def inner_slice(
    rows: np.ndarray, labels: np.ndarray, groups: np.ndarray, share: float, key: tuple[int, int]
) -> np.ndarray:
    """Choose the rows of a training fold that are watched instead of trained on.

    Args:
        rows: Rows of the training fold.
        labels: (N,) labels of all rows.
        groups: (N,) groups of all rows; a group is in or out as a whole.
        share: Share of each class to hold back.
        key: (seed, fold).

    Returns:
        The rows held back, sorted; at least one of every class that has two groups or more, one of them of that class
        alone.
    """
    classes = labels[rows]
    wanted = {int(c): max(1, round(share * int((classes == c).sum()))) for c in np.unique(classes)}
    left = {int(c): len(set(groups[rows[classes == c]])) for c in np.unique(classes)}
    members: dict[str, list[int]] = {}
    for row in rows:
        members.setdefault(groups[row], []).append(int(row))
    names = sorted(members)
    held: list[int] = []
    for index in generator(Purpose.INNER, *key).permutation(len(names)):
        group = members[names[index]]
        kinds = {int(labels[row]) for row in group}
        if all(wanted[kind] > 0 and left[kind] > 1 for kind in kinds):
            held.extend(group)
            for kind in kinds:
                left[kind] -= 1
            for row in group:
                wanted[int(labels[row])] -= 1
    return np.sort(np.array(held, dtype=np.int64))


def train_unit(
    spec: ExperimentSpec,
    table: Table,
    classes: Sequence[str],
    metric: str,
    fold: int,
    seed: int,
    *,
    folder: Path,
    runtime: Runtime,
    emit: Callable[[Event], None],
    start_weights: Callable[[int, int], Mapping[str, torch.Tensor]] | None = None,
    start_classes: Sequence[str] | None = None,
    lesson_of: Callable[[int, np.ndarray, Runtime], Lesson] | None = None,
) -> Unit:
    """Train one unit and predict with it, or go on with it from its checkpoint.

    Args:
        spec: The experiment.
        table: Images, labels and folds.
        classes: Class names in index order.
        metric: The competition's metric.
        fold: The fold that is scored.
        seed: Of every random choice.
        folder: The unit's folder, for its checkpoint and weights.
        runtime: Device, precision and threads.
        emit: Takes events.
        start_weights: Weights to start from, by (fold, seed), where the spec says `run:<exp>`.
        start_classes: Classes of those weights' head, in its order. The same ones in another order are put in that of
            `classes`; for others the head begins anew. None: they are `classes`.
        lesson_of: What teachers say, by fold, labelled rows that are trained on, and runtime; None without teachers.

    Returns:
        The finished unit, with nothing stored but `weights.safetensors` and the last checkpoint in its folder.

    Raises:
        DivergedError: If a loss or logit is not finite.
        DeviceError: If the device's memory is too small.
        FoldwiseError: If the folds leave nothing to train on, or weights do not fit.
    """
    try:
        return _train_unit(
            spec, table, classes, metric, fold, seed, folder, runtime, emit, start_weights, start_classes, lesson_of
        )
    except RuntimeError as error:
        # On the CPU it is a plain RuntimeError, known by its words alone.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        half = max(1, spec.train.batch_size // 2)
        raise DeviceError(
            f"out of memory on {runtime.device} in fold {fold}: batches of {spec.train.batch_size} images at "
            f"{spec.model.image_size} px are too much for `{spec.model.arch}`\n"
            f'  fix: SET="train.batch_size={half} train.accumulate={2 * spec.train.accumulate}" trains the same '
            "way in less memory; see docs/TROUBLESHOOTING.md"
        ) from error


def _train_unit(
    spec: ExperimentSpec,
    table: Table,
    classes: Sequence[str],
    metric: str,
    fold: int,
    seed: int,
    folder: Path,
    runtime: Runtime,
    emit: Callable[[Event], None],
    start_weights: Callable[[int, int], Mapping[str, torch.Tensor]] | None,
    start_classes: Sequence[str] | None,
    lesson_of: Callable[[int, np.ndarray, Runtime], Lesson] | None,
) -> Unit:
    key = (seed, fold)
    make_deterministic(runtime.threads)
    trainable = (table.labels >= 0) & (table.fold != fold) & (table.fold != SCORED_ONLY)
    train_rows = np.flatnonzero(trainable if table.barred is None else trainable & ~table.barred)
    val_rows = np.flatnonzero((table.labels >= 0) & (table.fold == fold))
    test_rows = np.flatnonzero(table.fold == SCORED_ONLY)
    watched_rows = val_rows
    if spec.watches and spec.train.watch == "inner":
        # What is watched should be like what is scored: the competition's own.
        own_rows = train_rows if table.n_own is None else train_rows[train_rows < table.n_own]
        watched_rows = inner_slice(own_rows, table.labels, table.group, spec.train.inner_share, key)
        train_rows = np.setdiff1d(train_rows, watched_rows)
    if not len(train_rows) or (spec.watches and not len(watched_rows)):
        raise FoldwiseError(
            f"fold {fold} leaves {len(train_rows)} images to train on and {len(watched_rows)} to watch\n"
            "  fix: see `split` in the competition.yaml"
        )

    # Before the seed: teachers' networks are built, which draws. A resumed unit asks again, and gets the same bits.
    lesson = None if lesson_of is None else lesson_of(fold, train_rows, runtime)
    labels, learnt_rows = table.labels, train_rows
    if lesson is not None:
        # To the sampler and to class weights an image with a pseudo-label is one of its likeliest class.
        learnt_rows = np.concatenate([train_rows, lesson.rows])
        labels = labels.copy()
        labels[lesson.rows] = lesson.taught.targets[lesson.rows].argmax(axis=1)
    taught = None if lesson is None else lesson.taught
    if table.weight is not None:
        taught = _weighted(taught, table, len(classes))
    torch.manual_seed(torch_seed(Purpose.INIT, *key))
    model = build_model(spec.model, classes=len(classes), channels=table.images.shape[-1])
    if start_weights is not None:
        theirs = classes if start_classes is None else start_classes
        _start_from(model, start_weights(fold, seed), spec.model.weights, theirs=theirs, ours=classes)
    place(model, runtime)
    prepare = to_input(spec.model, table.images, train_rows).to(runtime.device)
    objective = Supervised(
        labels,
        len(classes),
        loss=spec.loss,
        mixing=spec.mix,
        prepare=prepare,
        runtime=runtime,
        class_weights=loss_class_weights(spec.loss.class_weights, labels[learnt_rows], len(classes)),
        taught=taught,
    )
    batches = Batches(
        table.images,
        learnt_rows,
        Augment(spec.augment, table.images.shape[1:]),
        batch_size=spec.train.batch_size,
        key=key,
        weights=sampling_weights(spec.sampler, labels[learnt_rows], len(classes)),
    )

    def probabilities(scored: nn.Module, rows: np.ndarray, views: Sequence[str]) -> np.ndarray:
        probs = predict(
            scored,
            table.images[rows],
            [parse_view(name) for name in views],
            prepare=prepare,
            runtime=runtime,
            batch_size=predict_batch_size(spec.model.image_size),
        )
        return probs.numpy().reshape(len(rows), len(classes))

    def figures(scored: nn.Module, rows: np.ndarray, prefix: str) -> Row:
        if not len(rows):
            return {}
        probs, labels = probabilities(scored, rows, ["identity"]), table.labels[rows]
        names = dict.fromkeys(("log_loss", "accuracy", metric))
        shown = {name: METRICS[name].score(labels, probs) for name in names}
        return {f"{prefix}_{'loss' if name == 'log_loss' else name}": value for name, value in shown.items()}

    prefix = "val" if watched_rows is val_rows else "inner"

    def evaluate(scored: nn.Module) -> Row:
        row = figures(scored, val_rows, "val")
        return row | figures(scored, watched_rows, "inner") if prefix == "inner" else row

    def watched(row: Row) -> float:
        name = "log_loss" if spec.train.watch_figure == "log_loss" else metric
        value = row[f"{prefix}_{'loss' if name == 'log_loss' else name}"]
        return value if METRICS[name].greater_is_better else -value

    def on_start(epoch: int) -> None:
        emit(UnitStarted(fold, seed, epoch, len(learnt_rows), len(val_rows)))
        for line in () if lesson is None else lesson.told:
            emit(Message(f"fold {fold}, seed {seed}: {line}"))
        if epoch:
            emit(Message(f"fold {fold}, seed {seed}: goes on after epoch {epoch} of {spec.train.epochs}"))

    def on_epoch(row: Row) -> None:
        emit(EpochDone(fold, seed, int(row["epoch"]), {"fold": fold, "seed": seed, **row}))

    fitted = fit(
        model,
        objective,
        batches,
        optim=spec.optim,
        schedule=spec.schedule,
        train=spec.train,
        key=key,
        runtime=runtime,
        checkpoint=folder / "checkpoint.pt",
        unmixed_epochs=spec.mix.off_epochs,
        evaluate=evaluate,
        watched=watched if spec.watches else None,
        on_start=on_start,
        on_step=lambda epoch, step, steps: emit(StepDone(fold, seed, epoch, step, steps)),
        on_epoch=on_epoch,
    )
    began = time.monotonic()
    val_probs = probabilities(fitted.model, val_rows, spec.tta)
    test_probs = probabilities(fitted.model, test_rows, spec.tta)
    plain = probabilities(fitted.model, val_rows, ["identity"])
    weights = folder / "weights.safetensors"
    with atomic_path(weights) as temporary:
        state = {name: tensor.contiguous().cpu() for name, tensor in fitted.model.state_dict().items()}
        safetensors.torch.save_file(state, temporary, metadata=metadata(spec.model, classes, prepare))
    score = METRICS[metric].score
    true, groups = table.labels[val_rows], table.group[val_rows]
    return Unit(
        fold=fold,
        seed=seed,
        val_ids=table.ids[val_rows],
        val_labels=true,
        val_probs=val_probs,
        test_ids=table.ids[test_rows],
        test_probs=test_probs,
        history=[{"fold": fold, "seed": seed, **row} for row in fitted.history],
        info={
            "score": score(true, val_probs) if len(val_rows) else None,
            "standard_error": standard_error(METRICS[metric], true, val_probs, groups) if len(val_rows) else None,
            "score_without_tta": score(true, plain) if len(val_rows) else None,
            "tta_gain": _gain(metric, true, val_probs, plain, groups) if spec.tta != ("identity",) else None,
            "wall_s": round(fitted.wall_s + time.monotonic() - began, 1),
            **_account(fitted, runtime),
            "n_train": len(learnt_rows),
            **({} if lesson is None else lesson.info),
            "n_inner": len(watched_rows) if prefix == "inner" else 0,
            "n_val": len(val_rows),
            "weights_sha256": sha256_file(weights),
        },
    )


def _gain(
    metric: str, labels: np.ndarray, probs: np.ndarray, plain: np.ndarray, groups: np.ndarray
) -> dict[str, float] | None:
    """What test-time augmentation adds on a fold, positive where it helps, with its paired standard error."""
    if not len(labels):
        return None
    told = paired_difference(METRICS[metric], labels, probs, plain, groups)
    return {"gain": told.gain, "standard_error": told.standard_error}


def _weighted(taught: Taught | None, table: Table, classes: int) -> Taught:
    """What is taught, with each row's own weight in it."""
    assert table.weight is not None
    if taught is not None:
        return replace(taught, weights=taught.weights * table.weight)
    # The last row of the identity is for label -1, whose rows are not trained on.
    return Taught(np.eye(classes + 1, classes, dtype=np.float32)[table.labels], table.weight)


def metadata(model: ModelSpec, classes: Sequence[str], prepare: ToInput) -> dict[str, str]:
    """What a file of weights says of itself, so that it serves without the data: network, classes, normalisation."""
    told = {
        "model": model.model_dump(mode="json"),
        "classes": list(classes),
        "mean": prepare.mean.flatten().tolist(),
        "std": prepare.std.flatten().tolist(),
    }
    return {"foldwise": json.dumps(told, sort_keys=True)}


def _account(fitted: Fitted, runtime: Runtime) -> dict[str, object]:
    return {
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch,
        "stopped_early": fitted.stopped_early,
        "parameters": sum(parameter.numel() for parameter in fitted.model.parameters()),
        "device": str(runtime),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "peak_rss_mib": peak_memory_mib(runtime.device),
    }


def _start_from(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: str,
    *,
    theirs: Sequence[str],
    ours: Sequence[str],
) -> None:
    """Load another run's weights; the head stays as it was made where its classes or its shape differ."""
    own = model.state_dict()
    head = head_parameters(model)
    given = dict(weights)
    if sorted(theirs) != sorted(ours):
        given = {name: tensor for name, tensor in given.items() if name not in head}
    elif list(theirs) != list(ours):
        find: Any = getattr(model, "get_classifier", lambda: None)
        if isinstance(find(), tuple):  # several heads, whose last layers go by many names
            given = {name: tensor for name, tensor in given.items() if name not in head}
        last = [name for name in own if name in head][-1].rpartition(".")[0]
        order = torch.tensor([list(theirs).index(label) for label in ours])
        for name in (name for name in head if name.rpartition(".")[0] == last and name in given):
            if given[name].shape == own[name].shape:
                given[name] = given[name][order]
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    missing = [name for name in own if name not in fitting and name not in head]
    if missing:
        raise FoldwiseError(
            f"`model.weights: {source}` does not fit `model.arch`: {len(missing)} of {len(own)} tensors differ, the "
            f"first is `{missing[0]}`\n  fix: use the same `arch` and `options` as that run"
        )
    model.load_state_dict(fitting, strict=False)
