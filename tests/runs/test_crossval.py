"""Tables by split kind, the inner slice, the smoke table, and that nothing of a scored row reaches training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.data.competition import CompetitionSpec, Dataset
from foldwise.data.folds import Folds, SplitSpec, make_folds
from foldwise.data.readers import ImageSpec
from foldwise.errors import DeviceError, FoldwiseError
from foldwise.learn.device import pick_runtime
from foldwise.learn.objectives import Taught
from foldwise.records.store import Unit
from foldwise.runs import crossval
from foldwise.runs.crossval import Lesson, Table, inner_slice, make_table, relabelled, smoke_table, train_unit
from foldwise.runs.events import EpochDone, Event, Message, UnitStarted
from foldwise.spec.model import ExperimentSpec, ModelSpec, OptimSpec, TrainSpec

CLASSES = ("happy", "sad", "angry")
LABELLED, TEST = 60, 10
PARTS = np.array(["Training"] * 40 + ["PublicTest"] * 12 + ["PrivateTest"] * 8)
SPLITS = {
    "kfold": SplitSpec(kind="kfold", folds=3),
    "holdout": SplitSpec(kind="holdout", share=0.2),
    "column": SplitSpec(kind="column", train=("Training",), val=("PublicTest",), test=("PrivateTest",)),
    "full": SplitSpec(kind="full"),
}


def dataset(kind: str = "kfold") -> Dataset:
    """Seventy random images, the last ten unlabelled, 1 and 2 twins; its folds are in another order than its ids."""
    rng = np.random.default_rng(3)
    ids = np.arange(1, LABELLED + TEST + 1).astype(str)
    labels = np.concatenate([np.arange(LABELLED) % 3, np.full(TEST, -1)]).astype(np.int64)
    groups = ["1" if name == "2" else name for name in ids[:LABELLED].tolist()]
    folds = make_folds(ids[:LABELLED].tolist(), labels[:LABELLED], groups, SPLITS[kind], parts=PARTS.tolist())[0]
    order = rng.permutation(LABELLED)
    return Dataset(
        CompetitionSpec(
            name="toy", classes=CLASSES, image=ImageSpec(height=16, width=16, channels=1), split=SPLITS[kind]
        ),
        rng.integers(0, 256, (LABELLED + TEST, 16, 16, 1)).astype(np.uint8),
        ids,
        labels,
        Folds(folds.ids[order], folds.fold[order], folds.group[order]),
        "0" * 64,
    )


def spec_of(**train: object) -> ExperimentSpec:
    return ExperimentSpec(
        name="tiny",
        competition="toy",
        model=ModelSpec(arch="vit_small_patch8_48", image_size=16, options={"embed_dim": 24, "depth": 1}),
        optim=OptimSpec(lr=1e-3),
        train=TrainSpec.model_validate({"epochs": 1, "batch_size": 16, "precision": "fp32", "threads": 1} | train),
    )


def run(
    table: Table, folder: Path, spec: ExperimentSpec | None = None, units: tuple[tuple[int, int], ...] = (), **options
) -> tuple[list[Unit], list[Event]]:
    events: list[Event] = []
    finished = [
        train_unit(
            spec or spec_of(),
            table,
            CLASSES,
            "accuracy",
            fold,
            seed,
            folder=folder / f"fold{fold}" / f"seed{seed}",
            runtime=pick_runtime("cpu", "fp32", 1),
            emit=events.append,
            **options,
        )
        for fold, seed in units or tuple((fold, 42) for fold in table.folds)
    ]
    return finished, events


# Tables ---------------------------------------------------------------------------------------------------------------


def test_the_table_joins_folds_by_id() -> None:
    data = dataset()
    table = make_table(data)
    assert table.ids.tolist() == data.ids.tolist()
    of_id = dict(zip(data.folds.ids.tolist(), data.folds.fold.tolist(), strict=True))
    assert table.fold.tolist() == [of_id.get(name, -2) for name in data.ids.tolist()]
    assert table.group[:3].tolist() == ["1", "1", "3"]
    assert table.group[LABELLED:].tolist() == data.ids[LABELLED:].tolist()
    straight = data.folds.ids.astype(int).argsort()
    in_order = Folds(data.folds.ids[straight], data.folds.fold[straight], data.folds.group[straight])
    again = make_table(replace(data, folds=in_order))
    assert again.fold.tolist() == table.fold.tolist()


@pytest.mark.parametrize(
    ("kind", "folds", "trained", "validated", "predicted"),
    [
        ("kfold", (0, 1, 2), [40, 40, 40], [20, 20, 20], TEST),
        ("holdout", (0,), [48], [12], TEST),
        ("column", (0,), [40], [12], TEST + 8),
        ("full", (0,), [60], [0], TEST),
    ],
)
def test_each_kind_of_split_trains_scores_and_predicts_its_own_rows(
    tmp_path: Path, kind: str, folds: tuple[int, ...], trained: list[int], validated: list[int], predicted: int
) -> None:
    data = dataset(kind)
    table = make_table(data)
    units, events = run(table, tmp_path)
    assert table.folds == folds == tuple(unit.fold for unit in units)
    assert [unit.info["n_train"] for unit in units] == trained
    assert [len(unit.val_ids) for unit in units] == [unit.info["n_val"] for unit in units] == validated
    of_id = dict(zip(data.folds.ids.tolist(), data.folds.fold.tolist(), strict=True))
    for unit in units:
        assert unit.val_ids.tolist() == [name for name in table.ids.tolist() if of_id.get(name) == unit.fold]
        assert unit.test_ids.tolist() == [name for name in table.ids.tolist() if of_id.get(name, -2) == -2]
        assert len(unit.test_ids) == predicted
        assert unit.val_probs.shape == (len(unit.val_ids), 3)
        for probs in (unit.val_probs, unit.test_probs):
            np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
        assert (unit.info["score"] is None) is (kind == "full")
    started = [event for event in events if isinstance(event, UnitStarted)]
    assert [(event.fold, event.from_epoch, event.train_images, event.val_images) for event in started] == [
        (fold, 0, count, held) for fold, count, held in zip(folds, trained, validated, strict=True)
    ]
    rows = [event.row for event in events if isinstance(event, EpochDone)]
    assert [row["fold"] for row in rows] == list(folds)
    assert all(("val_loss" in row) is (kind != "full") for row in rows)


# The inner slice ------------------------------------------------------------------------------------------------------


@st.composite
def training_folds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a training fold, labels and groups of all rows; groups of up to three, some with conflicting labels."""
    labels, groups = [], []
    for group in range(draw(st.integers(2, 40))):
        label = draw(st.integers(0, 3))
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            labels.append(draw(st.integers(0, 3)) if draw(st.integers(0, 9)) == 0 else label)
            groups.append(f"g{group}")
    outside = {f"g{group}" for group in draw(st.sets(st.integers(0, 39), max_size=8))}
    rows = np.array([row for row, group in enumerate(groups) if group not in outside], dtype=np.int64)
    return rows, np.array(labels, dtype=np.int64), np.array(groups)


@given(training_folds(), st.floats(0.01, 0.49), st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=100)
def test_the_inner_slice_is_whole_groups_of_every_class_and_leaves_every_class_in_training(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray], share: float, seed: int, fold: int
) -> None:
    rows, labels, groups = drawn
    held = inner_slice(rows, labels, groups, share, (seed, fold))
    assert held.tolist() == sorted(set(held.tolist()) & set(rows.tolist()))
    left = np.setdiff1d(rows, held)
    assert not set(groups[held]) & set(groups[left])
    assert set(labels[left]) == set(labels[rows])
    pure = {group for group in set(groups[rows]) if len(set(labels[rows][groups[rows] == group])) == 1}
    for label in set(labels[rows].tolist()):
        of_class = rows[labels[rows] == label]
        wanted, got = max(1, round(share * len(of_class))), int((labels[held] == label).sum())
        assert got <= wanted + 2  # the last group taken may be one of three
        if len(set(groups[of_class])) > 1 and set(groups[of_class]) & pure:
            assert got >= 1
    shuffled = np.random.default_rng(seed).permutation(rows)
    np.testing.assert_array_equal(held, inner_slice(shuffled, labels, groups, share, (seed, fold)))


def test_the_inner_slice_holds_its_share_of_each_class_and_follows_seed_and_fold() -> None:
    rows, labels = np.arange(400), np.arange(400) % 4
    groups = rows.astype(str)
    slices = {key: inner_slice(rows, labels, groups, 0.1, key) for key in ((1, 0), (1, 1), (2, 0))}
    for held in slices.values():
        assert np.bincount(labels[held]).tolist() == [10, 10, 10, 10]
    assert len({held.tobytes() for held in slices.values()}) == 3


def test_what_is_watched_is_not_trained_on(tmp_path: Path) -> None:
    table = make_table(dataset())
    spec = spec_of(epochs=2, keep="best")
    (unit,), _ = run(table, tmp_path, spec, units=((1, 42),))
    train = np.flatnonzero((table.labels >= 0) & (table.fold != 1))
    held = inner_slice(train, table.labels, table.group, 0.1, (42, 1))
    assert (unit.info["n_inner"], unit.info["n_train"]) == (len(held), len(train) - len(held))
    assert {"inner_loss", "inner_accuracy", "val_loss", "val_accuracy"} <= set(unit.history[0])
    accuracies = [row["inner_accuracy"] for row in unit.history]
    assert unit.info["best_epoch"] == 1 + int(np.argmax(accuracies))


# Smoke ----------------------------------------------------------------------------------------------------------------


def test_the_smoke_table_is_two_small_folds_of_several_classes() -> None:
    data = dataset()
    many = 10
    images = np.concatenate([data.images] * many)
    ids = np.arange(len(images)).astype(str)
    labels = np.tile(data.labels, many)
    group = np.where(np.arange(len(ids)) % 7 == 0, "0", ids)
    table = Table(images, ids, labels, np.where(labels >= 0, np.arange(len(ids)) % 5, -2), group)
    small = smoke_table(table, 42)
    labelled = small.labels >= 0
    assert (labelled.sum(), (~labelled).sum()) == (64, 16)
    assert small.folds == (0, 1)
    assert set(small.fold[~labelled]) == {-2}
    assert np.ptp(np.bincount(small.labels[labelled])) <= 1
    for fold in small.folds:
        assert set(small.labels[small.fold == fold]) == {0, 1, 2}
    of_group: dict[str, set[int]] = {}
    for name, fold in zip(small.group[labelled].tolist(), small.fold[labelled].tolist(), strict=True):
        of_group.setdefault(name, set()).add(fold)
    assert {len(folds) for folds in of_group.values()} == {1}
    row_of = {name: row for row, name in enumerate(table.ids.tolist())}
    np.testing.assert_array_equal(small.images, table.images[[row_of[name] for name in small.ids.tolist()]])
    assert small.ids.tolist() == smoke_table(table, 42).ids.tolist() != smoke_table(table, 43).ids.tolist()


def test_the_smoke_table_of_a_full_split_scores_nothing() -> None:
    small = smoke_table(make_table(dataset("full")), 42)
    assert set(small.fold[small.labels >= 0]) == {-1}
    assert small.folds == (0,)


# Honesty --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [{"epochs": 2}, {"epochs": 2, "keep": "best"}], ids=["fixed length", "best inner"])
def test_weights_do_not_depend_on_pixels_or_labels_of_scored_and_test_rows(tmp_path: Path, train: dict) -> None:
    """Among them the mean and deviation of `normalize: dataset`, which would carry pixels into the first layer."""
    table = make_table(dataset())
    spec = spec_of(**train)
    hidden = (table.fold == 0) | (table.fold == -2)
    other = replace(
        table,
        images=np.where(hidden[:, None, None, None], 255, table.images).astype(np.uint8),
        labels=np.where(table.fold == 0, (table.labels + 1) % 3, table.labels),
    )
    shown = replace(table, images=np.where(hidden[:, None, None, None], table.images, 255).astype(np.uint8))
    weights = []
    for name, rows in (("as it is", table), ("hidden rows changed", other), ("training rows changed", shown)):
        run(rows, tmp_path / name, spec, units=((0, 42),))
        weights.append((tmp_path / name / "fold0" / "seed42" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_units_do_not_depend_on_what_ran_before_them(tmp_path: Path) -> None:
    table = make_table(dataset())
    all_units, _ = run(table, tmp_path / "all", units=((0, 42), (1, 42), (1, 43)))
    (alone,), _ = run(table, tmp_path / "alone", units=((1, 43),))
    np.testing.assert_array_equal(all_units[2].val_probs, alone.val_probs)
    assert not np.array_equal(all_units[1].val_probs, alone.val_probs), "another seed must give other weights"


# Lessons --------------------------------------------------------------------------------------------------------------


def test_a_lesson_adds_its_rows_to_those_that_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(dataset())
    unlabelled = np.flatnonzero(table.labels < 0)[:6]
    seen: dict[str, np.ndarray] = {}

    def lesson_of(fold: int, rows: np.ndarray, _runtime: object) -> Lesson:
        torch.rand(7)  # as networks that are built do
        seen["asked"] = rows
        targets = np.eye(3, dtype=np.float32)[np.where(table.labels >= 0, table.labels, 2)]
        return Lesson(unlabelled, Taught(targets, np.ones(len(targets), dtype=np.float32)), ["taught"], {"n_pseudo": 6})

    def sampling_weights(kind: str, labels: np.ndarray, classes: int) -> np.ndarray | None:
        seen["sampled"] = labels
        return None

    monkeypatch.setattr(crossval, "sampling_weights", sampling_weights)
    spec = spec_of(epochs=1, keep="best")
    (unit,), events = run(table, tmp_path / "a", spec, units=((1, 42),), lesson_of=lesson_of)
    held = inner_slice(np.flatnonzero((table.labels >= 0) & (table.fold != 1)), table.labels, table.group, 0.1, (42, 1))
    assert not set(seen["asked"]) & set(held), "what is watched is taught to nobody"
    assert set(table.fold[seen["asked"]]) == {0, 2}
    assert seen["sampled"].tolist() == [*table.labels[seen["asked"]].tolist(), *[2] * 6]
    assert (unit.info["n_train"], unit.info["n_pseudo"], unit.info["n_inner"]) == (len(seen["asked"]) + 6, 6, len(held))
    assert [event.train_images for event in events if isinstance(event, UnitStarted)] == [len(seen["asked"]) + 6]
    assert [event.text for event in events if isinstance(event, Message)] == ["fold 1, seed 42: taught"]

    none = np.array([], dtype=np.int64)
    quiet = lambda fold, rows, runtime: replace(lesson_of(fold, rows, runtime), rows=none)  # noqa: E731
    (alone,), _ = run(table, tmp_path / "b", spec, units=((1, 42),), lesson_of=quiet)
    (plain,), _ = run(table, tmp_path / "c", spec, units=((1, 42),))
    np.testing.assert_allclose(alone.val_probs, plain.val_probs, atol=1e-5)
    assert np.abs(unit.val_probs - plain.val_probs).max() > 1e-4


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_table_without_training_rows_is_refused(tmp_path: Path) -> None:
    table = make_table(dataset())
    table = replace(table, fold=np.where(table.labels >= 0, 0, -2))
    with pytest.raises(FoldwiseError) as caught:
        run(table, tmp_path)
    assert str(caught.value) == (
        "fold 0 leaves 0 images to train on and 60 to watch\n  fix: see `split` in the competition.yaml"
    )


def test_too_little_memory_names_the_setting_that_trains_the_same_in_less(tmp_path: Path) -> None:
    def exhausted(_fold: int, _seed: int) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(DeviceError) as caught:
        run(make_table(dataset()), tmp_path, spec_of(accumulate=2), units=((1, 42),), start_weights=exhausted)
    message = str(caught.value)
    assert message.startswith(
        "out of memory on cpu in fold 1: batches of 16 images at 16 px are too much for `vit_small"
    )
    assert 'SET="train.batch_size=8 train.accumulate=4"' in message


def test_merged_classes_are_what_is_learnt_and_the_unlabelled_stay_so() -> None:
    table = make_table(dataset())
    merged, classes = relabelled(table, CLASSES, {"happy": "good", "sad": "bad", "angry": "bad"})
    assert classes == ("good", "bad")
    named = np.array([*CLASSES, "none"])[table.labels]
    expected = {"happy": 0, "sad": 1, "angry": 1, "none": -1}
    assert merged.labels.tolist() == [expected[name] for name in named.tolist()]
    same, classes = relabelled(table, CLASSES, None)
    assert classes == CLASSES
    np.testing.assert_array_equal(same.labels, table.labels)


def test_a_head_of_other_classes_is_left_aside_though_it_fits(tmp_path: Path) -> None:
    table = make_table(dataset())
    spec = spec_of(epochs=1).model_copy(update={"optim": OptimSpec(lr=1e-12)})
    (made,), _ = run(table, tmp_path / "made", spec_of(), units=((0, 42),))
    weights = safetensors.torch.load_file(tmp_path / "made" / "fold0" / "seed42" / "weights.safetensors")
    weights["head.bias"] = torch.tensor([50.0, 0.0, 0.0])
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": "run:other"})})
    start = {"start_weights": lambda _fold, _seed: weights}
    (same,), _ = run(table, tmp_path / "same", spec, units=((0, 42),), **start)
    others = {"start_classes": ("happy", "sad", "bored")}
    (anew,), _ = run(table, tmp_path / "anew", spec, units=((0, 42),), **others, **start)
    assert same.val_probs[:, 0].min() > 0.99
    assert anew.val_probs[:, 0].max() < 0.9
    assert made.val_ids.tolist() == anew.val_ids.tolist()


def test_a_head_of_the_same_classes_in_another_order_is_kept(tmp_path: Path) -> None:
    table = make_table(dataset())
    spec = spec_of(epochs=1).model_copy(update={"optim": OptimSpec(lr=1e-12)})
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": "run:other"})})
    run(table, tmp_path / "made", spec_of(), units=((0, 42),))
    weights = safetensors.torch.load_file(tmp_path / "made" / "fold0" / "seed42" / "weights.safetensors")
    turned = {name: tensor[[2, 0, 1]] if name.startswith("head.") else tensor for name, tensor in weights.items()}
    order = {"start_classes": [CLASSES[index] for index in (2, 0, 1)]}
    (same,), _ = run(table, tmp_path / "same", spec, units=((0, 42),), start_weights=lambda _fold, _seed: weights)
    (back,), _ = run(table, tmp_path / "back", spec, units=((0, 42),), start_weights=lambda _f, _s: turned, **order)
    (lost,), _ = run(table, tmp_path / "lost", spec, units=((0, 42),), start_weights=lambda _fold, _seed: turned)
    np.testing.assert_array_equal(back.val_probs, same.val_probs)
    assert np.abs(lost.val_probs - same.val_probs).max() > 0.01


def test_a_layer_of_another_shape_is_not_put_in_order(tmp_path: Path) -> None:
    """Only the last layer is of classes: of a head that is deeper, a hidden layer may go by the same name."""
    table = make_table(dataset())
    spec = spec_of().model_copy(update={"model": spec_of().model.model_copy(update={"weights": "run:other"})})
    run(table, tmp_path / "made", units=((0, 42),))
    weights = safetensors.torch.load_file(tmp_path / "made" / "fold0" / "seed42" / "weights.safetensors")
    hidden = weights | {"head.weight": torch.full((8, 24), 9.0), "head.bias": torch.full((8,), 9.0)}
    order = {"start_classes": [CLASSES[index] for index in (2, 0, 1)]}
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    (given,), _ = run(table, tmp_path / "given", spec, units=((0, 42),), start_weights=lambda _f, _s: hidden, **order)
    (anew,), _ = run(table, tmp_path / "anew", spec, units=((0, 42),), start_weights=lambda _f, _s: body)
    np.testing.assert_array_equal(given.val_probs, anew.val_probs)


def test_weights_of_another_network_are_refused_and_another_head_is_made_anew(tmp_path: Path) -> None:
    table = make_table(dataset())
    spec = spec_of().model_copy(update={"model": spec_of().model.model_copy(update={"weights": "run:other"})})
    run(table, tmp_path / "made", units=((0, 42),))
    weights = safetensors.torch.load_file(tmp_path / "made" / "fold0" / "seed42" / "weights.safetensors")
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    head = {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    (unit,), _ = run(table, tmp_path / "head", spec, units=((0, 42),), start_weights=lambda _fold, _seed: body | head)
    assert unit.val_probs.shape == (20, 3)

    body.pop("pos_embed")
    with pytest.raises(FoldwiseError) as caught:
        run(table, tmp_path / "body", spec, units=((0, 42),), start_weights=lambda _fold, _seed: body)
    assert str(caught.value) == (
        f"`model.weights: run:other` does not fit `model.arch`: 1 of {len(weights)} tensors differ, the first is "
        "`pos_embed`\n  fix: use the same `arch` and `options` as that run"
    )
