"""External images join the training side alone, and no copy of what is scored among them; nor in starting weights.

The labels of all images here are coin flips: nothing but memory tells one, so that a score above chance is a leak.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foldwise.data.competition import Dataset, load_dataset
from foldwise.data.ingest import ingest
from foldwise.data.leaks import THRESHOLD, VERSION, likeness
from foldwise.errors import FoldwiseError, RecordError
from foldwise.files import sha256_json
from foldwise.learn.device import pick_runtime
from foldwise.metrics import METRICS
from foldwise.records.compare import compare
from foldwise.records.compare_text import to_csv
from foldwise.records.ensemble import blend
from foldwise.records.store import list_runs, load_run
from foldwise.runs import crossval, external
from foldwise.runs.crossval import Table, train_unit
from foldwise.runs.external import merged_guards, outdated, unclear
from foldwise.runs.kept import kept_models
from foldwise.runs.plan import make_plan, with_spec
from foldwise.runs.starting import starting_point
from foldwise.runs.teachers import make_lesson, stand_ins

LABELLED, TEST, NEW, NEW_UNLABELLED, FOLDS = 48, 16, 24, 6, 3
COPIES = 2 * (LABELLED + TEST)

# A competition, and elsewhere images in colour and of another size: copies of all of the former, and new ones.

DESCRIBED = """\
name: {name}
classes: {classes}
image: {{height: {size}, width: {size}, channels: {channels}, fit: squash, convert: true}}
split: {split}
"""


def draw(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise, (48, 48) uint8."""
    pixels = cv2.GaussianBlur(rng.normal(size=(48, 48)), (0, 0), 2)
    return (128 + 45 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def copied(pixels: np.ndarray, how: str) -> bytes:
    """An image from elsewhere: in colour, larger, as JPEG; `mirrored` or `shifted` besides."""
    changed = np.roll(pixels, (2, -2), (0, 1)) if how == "shifted" else pixels[:, ::-1] if how == "mirrored" else pixels
    raw = io.BytesIO()
    Image.fromarray(changed).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(raw, "JPEG", quality=80)
    return raw.getvalue()


def take_in(root: Path, name: str, handout: Path, split: str, classes: str, size: int, channels: int) -> None:
    folder = root / "inputs" / name
    folder.mkdir(parents=True)
    described = DESCRIBED.format(name=name, classes=classes, size=size, channels=channels, split=split)
    (folder / "competition.yaml").write_text(described)
    ingest(handout, root, name)


class World:
    """The competition `scored`, and `faces` and `faces_full` from elsewhere: the same images, in folds and without.

    Attributes:
        true: Labels of all images of `scored`, also of its test images.
        copy_of: Of an image of `faces` that is a copy, the image of `scored`.
    """

    def __init__(self, project: Any) -> None:
        self.project = project
        self.true: dict[str, str] = {}
        self.copy_of: dict[str, str] = {}
        self.label: dict[str, str] = {}
        rng = np.random.default_rng(0)
        handout, elsewhere = project.root / "handout", project.root / "elsewhere"

        def put(folder: Path, part: str, name: str, raw: bytes) -> None:
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)

        number = 0
        for index in range(LABELLED + TEST):
            name, pixels = str(index + 1), draw(rng)
            self.true[name] = "ab"[rng.integers(2)]
            raw = io.BytesIO()
            Image.fromarray(pixels).save(raw, "PNG")
            put(handout, f"train/{self.true[name]}" if index < LABELLED else "test", f"{name}.png", raw.getvalue())
            for how in ("plain", ("mirrored", "shifted")[index % 2]):
                number += 1
                self.copy_of[str(number)] = name
                self.label[str(number)] = self.true[name]
                put(elsewhere, f"train/{self.true[name]}", f"{number}.jpg", copied(pixels, how))
        for index in range(NEW + NEW_UNLABELLED):
            number += 1
            label = "abc"[index % 3]
            if index < NEW:
                self.label[str(number)] = label
            put(elsewhere, f"train/{label}" if index < NEW else "test", f"{number}.jpg", copied(draw(rng), "plain"))
        take_in(project.root, "scored", handout, f"{{kind: kfold, folds: {FOLDS}}}", "[a, b]", 48, 1)
        take_in(project.root, "faces", elsewhere, f"{{kind: kfold, folds: {FOLDS}}}", "[b, c, a]", 64, 3)
        take_in(project.root, "faces_full", elsewhere, "{kind: full}", "[a, b, c]", 48, 1)
        for name in ("faces", "faces_full"):
            likeness(load_dataset(project.root, name), load_dataset(project.root, "scored"), project.root)

    def spec(self, name: str = "student", *, epochs: int = 1, lr: float = 5e-3, **sections: Any) -> Any:
        train = {"epochs": epochs, "watch": "inner", **sections.pop("train", {})}
        given = {"competition": "scored", "augment": (), "tta": ("identity",), **sections}
        model = {"options": {"embed_dim": 64, "depth": 1, "num_heads": 2}, **given.pop("model", {})}
        return self.project.spec(name, model=model, optim={"lr": lr, "weight_decay": 0.0}, train=train, **given)

    def plan(self, **sections: Any) -> Any:
        return make_plan(self.project.root, self.spec(**sections))

    def run(self, name: str = "student", *, folds: Any = None, smoke: bool = False, **sections: Any) -> Any:
        return self.project.run(self.spec(name, **sections), folds=folds, smoke=smoke)

    def guard(self, name: str, **changes: Any) -> None:
        """Edit the `leak_guard` of a kept run."""
        path = self.project.path(name) / "run.json"
        record = json.loads(path.read_text())
        record["leak_guard"] |= changes
        path.write_text(json.dumps(record))

    def data(self, name: str) -> Dataset:
        return load_dataset(self.project.root, name)

    def rights(self, name: str, folds: tuple[int, ...]) -> float:
        """Accuracy on scored and on test images less 1/2, over the standard error of as many coin flips."""
        right = []
        for fold in folds:
            for file in ("val.csv", "test.csv") if fold == folds[0] else ("val.csv",):
                table = self.project.table(name, f"fold{fold}", "seed42", file)
                said = np.where(table["p_a"] > table["p_b"], "a", "b")
                right += [self.true[image] == label for image, label in zip(table["id"], said, strict=True)]
        return float((np.mean(right) - 0.5) / (0.5 / np.sqrt(len(right))))


EXTERNAL = ({"source": "faces", "class_map": {"c": None}},)


@pytest.fixture(scope="module")
def world(kept: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Without runs; read-only."""
    return World(type(kept)(tmp_path_factory.mktemp("world")))


@pytest.fixture
def mine(world: World, tmp_path: Path) -> World:
    """A copy to write in."""
    return moved(world, tmp_path / "project")


def moved(world: World, to: Path) -> World:
    copy = object.__new__(World)
    copy.__dict__ = {**world.__dict__, "project": type(world.project)(shutil.copytree(world.project.root, to))}
    return copy


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that finds no copy."""

    def blind(*given: Any, **more: Any) -> Any:
        found = likeness(*given, **more)
        return replace(found, similarity=np.zeros_like(found.similarity))

    monkeypatch.setattr(external, "likeness", blind)


def refusal(world: World, **sections: Any) -> str:
    with pytest.raises(FoldwiseError) as caught:
        world.plan(**sections)
    return str(caught.value)


# What joins -----------------------------------------------------------------------------------------------------------


def test_external_rows_are_the_new_images_on_the_training_side_of_every_fold(world: World) -> None:
    strict, plan = world.plan(), world.plan(external=EXTERNAL)
    own, table = strict.table, plan.table
    n = len(own.ids)
    assert (table.n_own, own.n_own, own.barred, own.weight) == (n, None, None, None)
    for column in ("ids", "labels", "fold", "group"):
        np.testing.assert_array_equal(getattr(table, column)[:n], getattr(own, column))
    np.testing.assert_array_equal(table.images[np.arange(n)], own.images[np.arange(n)])
    new = {f"faces:{image}" for image, label in world.label.items() if image not in world.copy_of and label != "c"}
    assert set(table.ids[n:].tolist()) == new
    assert set(table.fold[n:].tolist()) == {-1}
    assert len(set(table.group[n:].tolist())) == len(new)
    assert not table.barred.any()
    assert table.folds == strict.table.folds
    for row in range(n, len(table.ids)):
        image = table.ids[row].removeprefix("faces:")
        assert plan.classes[table.labels[row]] == world.label[image], "by name: the two orders of classes differ"
        raw = next((world.project.root / "inputs" / "faces" / "images").glob(f"{image}.*"))
        colours = np.asarray(Image.open(raw))
        assert colours.shape == (64, 64, 3)
        gray = cv2.resize(cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY), (48, 48), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(table.images[row][..., 0], gray)


def test_a_label_map_comes_after_the_class_map(world: World) -> None:
    class_map = {"a": "b", "b": "a", "c": "b"}
    plan = world.plan(external=({"source": "faces", "class_map": class_map},), label_map={"a": "yes", "b": "no"})
    assert plan.classes == ("yes", "no")
    rows = np.arange(plan.table.n_own, len(plan.table.ids))
    assert len(rows) == NEW
    becomes = {"a": "no", "b": "yes", "c": "no"}
    for row in rows.tolist():
        image = plan.table.ids[row].removeprefix("faces:")
        assert plan.classes[plan.table.labels[row]] == becomes[world.label[image]]


def test_classes_that_do_not_fit_are_all_named_before_anything_is_compared(
    mine: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "likeness", None)
    sections = (
        {"source": "faces", "class_map": {"joy": "a", "a": "fear"}},
        {"source": "faces_full", "class_map": {"c": "b", "b": None}},
    )
    assert refusal(mine, external=sections) == (
        "external: `class_map` of faces names 'joy', which is no class of it\n"
        "  fix: one of: b, c, a\n"
        "external: the class 'c' of faces becomes 'c', which is no class of scored\n"
        "  fix: map it in `class_map` (one of: a, b), or to null to leave it out\n"
        "external: the class 'a' of faces becomes 'fear', which is no class of scored\n"
        "  fix: map it in `class_map` (one of: a, b), or to null to leave it out\n"
        "3 errors; nothing was written."
    )


def test_a_source_of_which_nothing_is_left_is_refused(world: World) -> None:
    section = {"source": "faces", "class_map": {"a": None, "b": None, "c": None}}
    images = COPIES + NEW + NEW_UNLABELLED
    assert refusal(world, external=(section,)).splitlines()[:2] == [
        f"external: nothing of faces is left to train on: {images} of {images} images are of no class here, and "
        f"{COPIES} are copies of what is scored",
        "  fix: remove the source, or look at its `class_map`",
    ]


def test_a_source_that_is_not_here_is_named_with_the_mend(world: World) -> None:
    assert refusal(world, external=({"source": "gone"},)).splitlines()[:2] == [
        f"{world.project.root}/inputs/gone/competition.yaml: there is no such file",
        "  fix: `make data COMP=gone FROM=<folder>`, where the folder holds what was handed out",
    ]


def test_several_sources_join_one_after_the_other_with_weights_of_their_own(world: World) -> None:
    sections = (*EXTERNAL, {"source": "faces_full", "class_map": {"c": "a"}, "weight": 0.25})
    plan = world.plan(external=sections)
    table, n = plan.table, LABELLED + TEST
    count = NEW * 2 // 3
    assert [name.split(":")[0] for name in table.ids[n:].tolist()] == ["faces"] * count + ["faces_full"] * NEW
    assert table.weight.tolist() == [1.0] * (n + count) + [0.25] * NEW
    assert [(one["source"], one["images"], one["weight"]) for one in plan.guarded.external] == [
        ("faces", count, 1.0),
        ("faces_full", NEW, 0.25),
    ]
    both = [world.label[name.split(":")[1]] for name in table.ids[n + count :].tolist()]
    expected = [plan.classes.index({"c": "a"}.get(label, label)) for label in both]
    assert table.labels[n + count :].tolist() == expected


def test_the_guards_record_can_be_recomputed(world: World) -> None:
    plan = world.plan(external=EXTERNAL)
    source, scored = world.data("faces"), world.data("scored")
    found = likeness(source, scored, world.project.root)
    gone = sorted(found.ids[found.similarity >= THRESHOLD].tolist(), key=int)
    assert gone == sorted(world.copy_of, key=int), "every copy, and nothing else"
    assert plan.guarded.guard == {
        "version": VERSION,
        "threshold": THRESHOLD,
        "clear_of": {
            "scored": {
                "inputs_sha256": scored.sha256,
                "dropped": {
                    "faces": {
                        "images": len(source.ids),
                        "dropped": COPIES,
                        "by_similarity": found.counts(),
                        "ids_sha256": sha256_json(gone),
                    }
                },
            }
        },
    }
    assert plan.guarded.external == [
        {"source": "faces", "images": NEW * 2 // 3, "weight": 1.0, "inputs_sha256": source.sha256}
    ]
    assert plan.guarded.told[0].startswith(
        f"leak guard: {COPIES} of {len(source.ids)} images of faces are copies of images of scored and are left out ("
    )
    assert plan.guarded.told[1] == f"{NEW * 2 // 3} images of faces join the training side of every fold"


def test_own_images_that_are_copies_of_another_competition_s_are_barred(world: World) -> None:
    plan = world.plan(competition="faces", clear_of=("scored",))
    barred = plan.table.ids[plan.table.barred]
    assert sorted(barred.tolist()) == sorted(world.copy_of)
    assert plan.guarded.external == []
    assert plan.guarded.guard["clear_of"]["scored"]["dropped"]["faces"]["dropped"] == COPIES
    assert plan.table.n_own is None


def test_neither_key_leaves_no_trace(world: World) -> None:
    plan = world.plan()
    assert (plan.guarded.guard, plan.guarded.sha256, plan.guarded.external, plan.guarded.told) == (None, None, [], [])
    assert plan.context.guard_sha256 is None


def test_another_spec_of_a_plan_gets_the_external_data_that_it_asks_for(world: World) -> None:
    plan = world.plan()
    other = with_spec(plan, world.spec(external=EXTERNAL))
    assert other.table.n_own == LABELLED + TEST
    assert other.context == world.plan(external=EXTERNAL).context
    again = with_spec(other, world.spec())
    assert (again.table.n_own, again.context) == (None, plan.context)


# Guards put together --------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["x", "y", "z"])
ENTRIES = st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 9), min_size=1), max_size=3)


@given(st.lists(st.none() | ENTRIES, max_size=4), st.lists(NAMES, unique=True))
def test_guards_put_together_tell_all_that_was_dropped_of_what_was_asked(given_: Any, asked: list[str]) -> None:
    def guard(entries: Any) -> Any:
        clear = {name: {"inputs_sha256": f"of {name}", "dropped": dropped} for name, dropped in entries.items()}
        return {"version": 1, "threshold": 0.8, "clear_of": clear}

    guards = [None if entries is None else guard(entries) for entries in given_]
    before = json.dumps(guards)
    merged = merged_guards(guards, asked)
    assert json.dumps(guards) == before
    names = {name for entries in given_ for name in entries or {} if name in asked}
    if not names:
        assert merged is None
        return
    assert set(merged["clear_of"]) == names
    for name in names:
        entry = merged["clear_of"][name]
        assert entry["inputs_sha256"] == f"of {name}"
        assert set(entry["dropped"]) == {source for entries in given_ for source in (entries or {}).get(name, {})}


def test_why_a_run_is_not_clear_of_a_competition(world: World) -> None:
    scored = world.data("scored")
    entry = {"inputs_sha256": scored.sha256, "dropped": {}}
    good = {"version": VERSION, "threshold": THRESHOLD, "clear_of": {"scored": entry}}

    def why(competition: str = "faces", **changes: Any) -> Any:
        return unclear({"competition": competition, "leak_guard": good | changes}, scored)

    assert why() is None
    assert unclear({"competition": "faces", "leak_guard": None}, scored) == "was not kept clear of the images of scored"
    assert why(clear_of={}) == "was not kept clear of the images of scored"
    assert why("scored") == "was trained on scored itself", "though its guard speaks of scored"
    older = "was kept clear of the images of scored by another measure of likeness than today's"
    assert why(version=VERSION - 1) == older
    assert why(threshold=0.99) == older
    other = {"scored": entry | {"inputs_sha256": "ab" * 32}}
    assert why(clear_of=other) == f"was kept clear of other images of scored (abababab, here {scored.sha256[:8]})"
    assert outdated(None, scored) is outdated(good | {"clear_of": {}}, scored) is None


# What is trained ------------------------------------------------------------------------------------------------------


def unit_of(plan: Any, table: Table, folder: Path, **options: Any) -> Any:
    runtime = pick_runtime("cpu", "fp32", 1)
    return train_unit(
        plan.spec,
        table,
        plan.classes,
        "accuracy",
        0,
        42,
        folder=folder,
        runtime=runtime,
        emit=lambda _event: None,
        **options,
    )


def test_external_rows_are_trained_on_and_neither_watched_nor_scored_nor_predicted(
    mine: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[np.ndarray] = []

    def spy(rows: np.ndarray, *given: Any) -> np.ndarray:
        watched.append(rows)
        return inner_slice(rows, *given)

    inner_slice = crossval.inner_slice
    monkeypatch.setattr(crossval, "inner_slice", spy)
    record, screen = mine.run(external=EXTERNAL, train={"keep": "best"})
    own, new = LABELLED + TEST, NEW * 2 // 3
    assert len(watched) == FOLDS
    assert all((rows < own).all() for rows in watched)
    oof, test = mine.project.table("student", "oof.csv"), mine.project.table("student", "test.csv")
    assert sorted(oof["id"]) == sorted(mine.data("scored").folds.ids.tolist())
    assert sorted(test["id"], key=int) == [str(LABELLED + 1 + index) for index in range(TEST)]
    for fold in range(FOLDS):
        unit = json.loads((mine.project.path("student") / f"fold{fold}" / "seed42" / "unit.json").read_text())
        assert unit["n_inner"] > 0
        assert unit["n_train"] == LABELLED - unit["n_val"] - unit["n_inner"] + new
    assert record["external"] == [
        {"source": "faces", "images": new, "weight": 1.0, "inputs_sha256": mine.data("faces").sha256}
    ]
    assert record["leak_guard"] == make_plan(mine.project.root, mine.spec(external=EXTERNAL)).guarded.guard
    assert record["hashes"]["guard"] == sha256_json([record["external"], record["leak_guard"]])
    assert load_run(mine.project.path("student")).info == record
    assert any(line.startswith(f"leak guard: {COPIES} of ") for line in screen.said)
    assert mine.run(external=EXTERNAL, train={"keep": "best"})[0] == record, "a complete run is kept"


def test_external_rows_count_as_much_as_rows_of_the_competition_s_own(world: World, tmp_path: Path) -> None:
    """The same bits as a competition that holds these images itself."""
    plan = world.plan(external=EXTERNAL)
    table = plan.table
    assert table.weight is None
    rows = np.arange(len(table.ids))
    plain = Table(np.asarray(table.images[rows]), table.ids, table.labels, table.fold, table.group)
    one, two = unit_of(plan, table, tmp_path / "one"), unit_of(plan, plain, tmp_path / "two")
    assert one.info["weights_sha256"] == two.info["weights_sha256"]
    assert one.info["n_train"] == two.info["n_train"] == 32 + NEW * 2 // 3
    without = unit_of(plan, world.plan().table, tmp_path / "three")
    assert without.info["weights_sha256"] != one.info["weights_sha256"]


@pytest.mark.parametrize("more", [{}, {"mix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}, {"lesson": True}])
def test_labels_count_by_the_weight_of_their_images(world: World, tmp_path: Path, more: dict[str, Any]) -> None:
    """As good as nothing is learnt from an image of hardly any weight, whatever it is mixed with or taught besides."""
    more = dict(more)
    taught = more.pop("lesson", False)
    if taught:
        more |= {
            "pseudo": {"from": ("gone",), "min_confidence": 0.0, "weight": 0.5},
            "distill": {"from": ("gone",), "weight": 0.3},
        }

    def changed(weight: float, flipped: bool) -> float:
        class_map = {"a": "b", "b": "a", "c": None} if flipped else {"c": None}
        asked = {"source": "faces", "class_map": class_map, "weight": weight}
        spec = world.spec(external=(asked,), lr=1e-3, **more)
        data = world.data("scored")
        plain = make_plan(world.project.root, spec.model_copy(update={"pseudo": None, "distill": None}))
        lesson = None
        if taught:
            lesson = external_lesson(spec, data, plain)
        folder = tmp_path / f"{weight}{flipped}"
        return unit_of(replace(plain, spec=spec), plain.table, folder, lesson_of=lesson).val_probs

    def external_lesson(spec: Any, data: Dataset, plan: Any) -> Any:
        def say(_fold: int, rows: np.ndarray, _runtime: Any) -> np.ndarray:
            share = (rows % 5)[:, None] / 4
            return share * np.array([[1.0, 0.0]]) + (1 - share) * np.array([[0.2, 0.8]])

        return lambda fold, rows, runtime: make_lesson(spec, plan.table, plan.classes, fold, rows, runtime, say, say)

    light = np.abs(changed(1e-6, flipped=True) - changed(1e-6, flipped=False)).max()
    heavy = np.abs(changed(1.0, flipped=True) - changed(1.0, flipped=False)).max()
    assert light < 1e-3
    assert heavy > 20 * light
    assert heavy > 5e-3


def test_a_barred_image_is_trained_on_neither_by_its_label_nor_by_a_pseudo_label(mine: World) -> None:
    """Its own test images too may be copies of another competition's."""
    table = mine.plan(competition="faces", clear_of=("scored",)).table
    unlabelled = np.flatnonzero(table.labels < 0)
    table = replace(table, barred=table.barred | np.isin(np.arange(len(table.ids)), unlabelled[:2]))
    spec = mine.spec(competition="faces", pseudo={"from": ("gone",), "min_confidence": 0.0})
    lesson = stand_ins(spec, mine.data("faces"), table, ("b", "c", "a")).lesson(0, np.arange(3), None)
    assert lesson.rows.tolist() == unlabelled[2:].tolist()
    assert lesson.info == {"n_pseudo": NEW_UNLABELLED - 2, "n_unlabelled": NEW_UNLABELLED - 2}


def test_a_smoke_run_takes_some_external_images(mine: World) -> None:
    record, _ = mine.run(external=({"source": "faces", "class_map": {"c": "a"}, "weight": 2.0},), smoke=True)
    assert record["smoke"]
    (entry,) = record["external"]
    assert (entry["source"], entry["images"]) == ("faces", NEW)
    unit = json.loads((mine.project.root / "oof/.smoke/student/fold0/seed42/unit.json").read_text())
    assert unit["n_train"] == LABELLED - unit["n_val"] + NEW


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_external_data(mine: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**EXTERNAL[0], "weight": 0.5}
    mine.run(external=(asked,), folds=(0,))

    def refused(*sections: dict[str, Any]) -> list[str]:
        with pytest.raises(RecordError) as caught:
            mine.run(external=sections, folds=(1,))
        return str(caught.value).splitlines()

    assert refused({**asked, "weight": 0.25})[:2] == [
        "oof/student: holds a run of another spec:",
        "  external.0.weight: 0.5 -> 0.25",
    ]
    lines = refused()
    assert lines[0] == "oof/student: holds a run of another spec:"
    assert "  external.0.source: faces -> (absent)" in lines
    monkeypatch.setattr(external, "THRESHOLD", 0.9)
    lines = refused(asked)
    assert lines[0] == "oof/student: holds a run of another context:"
    assert lines[1].startswith("  guard_sha256: ")
    assert lines[2] == "  fix: put back what it was made with, or redo it with --fresh"
    monkeypatch.undo()
    path = mine.project.root / "inputs" / "faces" / "images"
    new = next(image for image in mine.label if image not in mine.copy_of)
    next(path.glob(f"{new}.*")).write_bytes(copied(draw(np.random.default_rng(9)), "plain"))
    assert refused(asked)[1].startswith("  guard_sha256: ")


# Planted copies -------------------------------------------------------------------------------------------------------

LONG = 25
MEMORISE = {"epochs": LONG, "folds": (0, 1)}


@pytest.mark.slow
def test_copies_of_scored_images_with_their_labels_teach_nothing(mine: World) -> None:
    mine.run(external=EXTERNAL, **MEMORISE)
    learnt = json.loads((mine.project.path("student") / "fold0" / "seed42" / "unit.json").read_text())
    assert learnt["n_train"] == 32 + NEW * 2 // 3
    assert mine.rights("student", (0, 1)) < 3


@pytest.mark.slow
@pytest.mark.usefixtures("unguarded")
def test_without_the_guard_they_would_give_every_label_away(mine: World) -> None:
    mine.run(external=EXTERNAL, **MEMORISE)
    assert mine.rights("student", (0, 1)) > 4


# Starting weights from elsewhere --------------------------------------------------------------------------------------

AB = {"a": "a", "b": "b", "c": "a"}
FROM_PRE = {"model": {"weights": "run:pre"}, "lr": 1e-9}
CLEAR = {"competition": "faces_full", "clear_of": ("scored",), "label_map": AB}


def pretrain(world: World, name: str = "pre", **changes: Any) -> dict[str, Any]:
    record, _ = world.run(name, **{**CLEAR, **changes})
    return record


@pytest.fixture(scope="module")
def begun(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With the run `pre` of another competition, that is clear of `scored`; read-only."""
    made = moved(world, tmp_path_factory.mktemp("begun") / "project")
    pretrain(made)
    return made


@pytest.fixture
def onward(begun: World, tmp_path: Path) -> World:
    """A copy of it to write in."""
    return moved(begun, tmp_path / "project")


@pytest.mark.slow
def test_a_start_that_is_clear_of_the_scored_images_teaches_nothing_of_them(mine: World) -> None:
    pretrain(mine, epochs=LONG)
    unit = json.loads((mine.project.path("pre") / "fold0" / "seed42" / "unit.json").read_text())
    assert unit["n_train"] == NEW
    mine.run(folds=(0, 1), **FROM_PRE)
    assert mine.rights("student", (0, 1)) < 3


@pytest.mark.slow
@pytest.mark.usefixtures("unguarded")
def test_a_start_that_saw_copies_would_know_every_label(mine: World) -> None:
    pretrain(mine, epochs=LONG)
    mine.run(folds=(0, 1), **FROM_PRE)
    assert mine.rights("student", (0, 1)) > 4


def test_a_head_of_the_same_classes_is_kept_and_one_of_others_is_new(onward: World) -> None:
    (model,) = kept_models(load_run(onward.project.path("pre")), pick_runtime("cpu", "fp32", 1))
    scored = onward.data("scored")
    theirs = dict(zip(scored.ids.tolist(), model.probabilities(scored.images), strict=True))

    def furthest(name: str) -> float:
        ours = onward.project.table(name, "fold1", "seed42", "val.csv")
        probs = ours[["p_a", "p_b"]].to_numpy()
        return float(np.abs(probs - np.array([theirs[image] for image in ours["id"]])).max())

    onward.run(folds=(1,), **FROM_PRE)
    assert furthest("student") < 5e-3  # another normalisation, by the mean and deviation of the competition's images
    pretrain(onward, label_map=None, name="three")
    onward.run("other", folds=(1,), model={"weights": "run:three"})
    assert furthest("other") > 3e-2


def test_a_start_without_clear_of_is_refused(onward: World) -> None:
    pretrain(onward, "unclear", clear_of=())
    assert refusal(onward, model={"weights": "run:unclear"}) == (
        "model.weights: run:unclear: was trained on faces_full, and was not kept clear of the images of scored\n"
        "  fix: write `clear_of: [scored]` into experiments/unclear.yaml, and run it again with FRESH=1\n"
        "1 error; nothing was written."
    )


@pytest.mark.parametrize("changes", [{"version": VERSION - 1}, {"threshold": THRESHOLD + 0.05}])
def test_a_start_that_was_cleared_by_another_measure_is_refused(onward: World, changes: dict[str, Any]) -> None:
    onward.guard("pre", **changes)
    assert refusal(onward, **FROM_PRE).startswith(
        "model.weights: run:pre: was trained on faces_full, and was kept clear of the images of scored by another "
        "measure of likeness than today's\n"
    )


def test_a_start_that_was_clear_of_other_images_is_refused(onward: World) -> None:
    before = onward.data("scored").sha256
    raw = io.BytesIO()
    Image.fromarray(draw(np.random.default_rng(9))).save(raw, "PNG")
    next((onward.project.root / "inputs" / "scored" / "images").glob("60.*")).write_bytes(raw.getvalue())
    now = onward.data("scored").sha256
    assert (
        f"was trained on faces_full, and was kept clear of other images of scored ({before[:8]}, here {now[:8]})"
    ) in refusal(onward, **FROM_PRE)


def test_a_chain_of_starts_is_as_clear_as_its_links(onward: World) -> None:
    pretrain(onward, "next", **FROM_PRE)
    record, _ = onward.run(model={"weights": "run:next"}, external=EXTERNAL)
    full, faces = onward.data("faces_full").sha256, onward.data("faces").sha256
    assert record["external"] == [
        {"source": "faces", "images": NEW * 2 // 3, "weight": 1.0, "inputs_sha256": faces},
        {"source": "faces_full", "by": "run:next", "inputs_sha256": full},
    ]
    (entry,) = record["leak_guard"]["clear_of"].values()
    assert {name: one["dropped"] for name, one in entry["dropped"].items()} == {"faces": COPIES, "faces_full": COPIES}

    pretrain(onward, "careless", **FROM_PRE, clear_of=())
    assert load_run(onward.project.path("careless")).info["leak_guard"] is None
    assert "run:careless: was trained on faces_full, and was not kept clear" in refusal(
        onward, model={"weights": "run:careless"}
    )
    assert refusal(onward, **{**CLEAR, "model": {"weights": "run:careless"}}) == (
        "model.weights: run:careless: was not kept clear of the images of scored\n"
        "  fix: write `clear_of: [scored]` into experiments/careless.yaml, and run it again with FRESH=1\n"
        "1 error; nothing was written."
    )


def test_a_run_that_was_trained_on_a_competition_is_not_clear_of_it(onward: World) -> None:
    """Its guard speaks of that competition too, for the sake of its external images."""
    onward.run("inside", external=EXTERNAL)
    guard = load_run(onward.project.path("inside")).info["leak_guard"]
    clear = {"faces_full": {"inputs_sha256": onward.data("faces_full").sha256, "dropped": {}}}
    onward.guard("inside", clear_of=guard["clear_of"] | clear)
    assert refusal(onward, **{**CLEAR, "model": {"weights": "run:inside"}}) == (
        "model.weights: run:inside: was trained on scored itself\n"
        "  fix: start from a run that never saw scored, or take it out of `clear_of`\n"
        "1 error; nothing was written."
    )


def test_a_run_of_the_same_folds_whose_external_data_was_cleared_by_another_measure_is_refused(onward: World) -> None:
    onward.run("inside", external=EXTERNAL)
    asked = {"model": {"weights": "run:inside"}}
    assert onward.plan(**asked).start is not None
    onward.guard("inside", version=VERSION - 1)
    why = "was kept clear of the images of scored by another measure of likeness than today's\n"
    assert refusal(onward, **asked).startswith(f"model.weights: run:inside: {why}  fix: train it again: make exp")
    assert refusal(onward, distill={"from": ("inside",)}).startswith(f"distill.from: inside: {why}")


def test_all_folds_start_from_the_first_of_a_k_fold_run_elsewhere_and_its_teachings_must_be_clear(
    mine: World,
) -> None:
    mine.run("folded", competition="faces", clear_of=("scored",))
    start = starting_point(mine.project.root, mine.spec(model={"weights": "run:folded"}), mine.data("scored"))
    first = safetensors.torch.load_file(mine.project.path("folded") / "fold0" / "seed42" / "weights.safetensors")
    for fold in range(FOLDS):
        found = start.weights_of(fold, 42)
        assert all((found[name] == tensor).all() for name, tensor in first.items())

    student = {"competition": "faces", "clear_of": ("scored",), "distill": {"from": ("folded",)}}
    guard = mine.plan(**student).teachers.guard
    assert guard["clear_of"]["scored"]["dropped"]["faces"]["dropped"] == COPIES
    mine.guard("folded", clear_of={})
    assert refusal(mine, **student) == (
        "distill.from: folded: was not kept clear of the images of scored\n"
        "  fix: write `clear_of: [scored]` into experiments/folded.yaml too, and run it again with FRESH=1\n"
        "1 error; nothing was written."
    )


# What is said of it ---------------------------------------------------------------------------------------------------


def test_external_data_is_told_in_words_and_sets_runs_and_blends_apart(onward: World) -> None:
    root = onward.project.root
    onward.run("strict")
    onward.run("joined", **FROM_PRE, external=({**EXTERNAL[0], "weight": 0.5},))
    found = compare(root, "scored")
    rows = {row.name: row for group in found.groups for row in group.rows}
    assert {name: row.track for name, row in rows.items()} == {
        "strict": "competition data only",
        "joined": "with external data",
    }
    table = {row["run"]: row for row in csv.DictReader(io.StringIO(to_csv(found)))}
    words = f"faces ({NEW * 2 // 3} images, weight 0.5);faces_full (by run:pre)"
    assert {name: row["external"] for name, row in table.items()} == {"strict": "", "joined": words}
    folds = onward.data("scored").folds
    groups = dict(zip(folds.ids.tolist(), folds.group.tolist(), strict=True))
    runs, _ = list_runs(root, "scored")
    both = blend(runs, metric=METRICS["accuracy"], groups=groups, methods=("mean",))
    assert both.external == rows["joined"].run.info["external"]
