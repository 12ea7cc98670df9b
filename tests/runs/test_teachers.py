"""Students learn from the teachers' own fold alone: no label leaks, where the averaged files would carry every one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foldwise.data.folds import Folds, read_folds, write_folds
from foldwise.data.ingest import ingest
from foldwise.errors import RecordError
from foldwise.files import sha256_file
from foldwise.learn.device import pick_runtime
from foldwise.records.store import load_run, rows_of
from foldwise.runs import teachers
from foldwise.runs.events import EpochDone, Event, UnitStarted
from foldwise.runs.kept import kept_models
from foldwise.runs.plan import make_plan
from foldwise.spec.model import PseudoSpec

RUNTIME = pick_runtime("cpu", "fp32", 1)
FIX = "name k-fold runs of demo on its present folds, of the same classes"
BOTH = {"pseudo": {"from": ("tiny",), "min_confidence": 0.0}, "distill": {"from": ("tiny",)}}


# A teacher that has memorised noise ----------------------------------------------------------------------------------

SINGLES, PAIRS, FOLDS = 48, 24, 3


class Noise:
    """A competition whose labels are coin flips, and a run that has memorised all of them but those of its fold.

    Each of `singles` has a near-copy among the test images; each of `pairs` has one in another fold, of a label of its
    own. Nothing but memory tells a label, so that a score above chance is a label that leaked.
    """

    def __init__(self, project: Any) -> None:
        self.project = project
        self.singles: list[str] = []
        self.pairs: list[str] = []
        rng = np.random.default_rng(0)
        fold, number = {}, 0

        def draw(base: np.ndarray, similarity: float, place: str) -> str:
            nonlocal number
            number += 1
            pixels = similarity * base + np.sqrt(1 - similarity**2) * rng.normal(size=base.shape)
            path = project.root / "handout" / place / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((128 + 40 * pixels).clip(0, 255).astype(np.uint8)).save(path)
            return str(number)

        for index in range(SINGLES):
            base = rng.normal(size=(32, 32))
            name = draw(base, 1.0, f"train/{'ab'[rng.integers(2)]}")
            draw(base, 0.98, "test")
            fold[name] = index % FOLDS
            self.singles.append(name)
        for index in range(PAIRS):
            base = rng.normal(size=(32, 32))
            for half in range(2):
                name = draw(base, 0.95, f"train/{'ab'[rng.integers(2)]}")
                fold[name] = (index + half) % FOLDS
                self.pairs.append(name)
        ingest(project.root / "handout", project.root, "demo")
        inputs = project.root / "inputs" / "demo"
        text = (inputs / "competition.yaml").read_text()
        (inputs / "competition.yaml").write_text(text.replace("folds: 5, seed: 42, repeats: 2", f"folds: {FOLDS}"))
        drawn = read_folds(inputs / "folds.csv")
        assert len(set(drawn.group.tolist())) == len(drawn.ids), "no image may be a twin of another to `folds.csv`"
        write_folds(
            inputs / "folds.csv", [Folds(drawn.ids, np.array([fold[name] for name in drawn.ids.tolist()]), drawn.group)]
        )

    def run(self, name: str, folds: tuple[int, ...] | None = (0, 1), **sections: Any) -> None:
        spec = self.project.spec(
            name,
            model={"options": {"embed_dim": 64, "depth": 1, "num_heads": 2}},
            augment=(),
            optim={"lr": 5e-3, "weight_decay": 0.0},
            train={"epochs": 10},
            tta=("identity",),
            **sections,
        )
        self.project.run(spec, folds=folds)

    def standard_errors_above_chance(self, name: str, ids: list[str]) -> float:
        """Accuracy of out-of-fold predictions less 1/2, over the standard error of as many coin flips."""
        parts = [self.project.table(name, f"fold{fold}", "seed42", "val.csv") for fold in (0, 1)]
        table = pd.concat(parts)
        table = table[table["id"].isin(ids)]
        right = (table["p_a"] > table["p_b"]).to_numpy() == (table["label"] == "a").to_numpy()
        return float((right.mean() - 0.5) / (0.5 / np.sqrt(len(right))))


@pytest.fixture(scope="module")
def noise(kept: Any, tmp_path_factory: pytest.TempPathFactory) -> Noise:
    made = Noise(type(kept)(tmp_path_factory.mktemp("noise")))
    made.run("teacher", folds=None)
    return made


LESSONS = {
    "pseudo": {"from": ("teacher",), "min_confidence": 0.5},
    "distill": {"from": ("teacher",), "weight": 1.0, "temperature": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("section", LESSONS)
def test_a_student_of_memorising_teachers_scores_at_chance(noise: Noise, section: str) -> None:
    learnt = noise.project.table("teacher", "history.csv").groupby("fold")["train_accuracy"].last()
    assert learnt.min() > 0.85, "the teacher must have memorised its labels, or there is nothing to leak"
    noise.run(f"student_{section}", **{section: LESSONS[section]})
    for ids in (noise.singles, noise.pairs):
        assert noise.standard_errors_above_chance(f"student_{section}", ids) < 3


@pytest.mark.slow
def test_the_averaged_test_predictions_would_leak_the_scored_labels(
    noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(noise.project.path("teacher"))
    monkeypatch.setattr(teachers, "fold_mean", lambda _units, _fold, ids: run.test_probs[rows_of(run.test_ids, ids)])
    noise.run("cheat_pseudo", pseudo=LESSONS["pseudo"])
    assert noise.standard_errors_above_chance("cheat_pseudo", noise.singles) > 3


@pytest.mark.slow
def test_the_out_of_fold_predictions_of_others_would_leak_the_scored_labels(
    noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model behind the OOF row of an image in another fold knew the label of its near-copy in this one."""
    run, make_lesson = load_run(noise.project.path("teacher")), teachers.make_lesson

    def of_oof(spec: Any, table: Any, classes: Any, fold: int, rows: Any, runtime: Any, first: Any, _: Any) -> Any:
        asked = lambda _fold, wanted, _runtime: run.probs[rows_of(run.ids, table.ids[wanted])]  # noqa: E731
        return make_lesson(spec, table, classes, fold, rows, runtime, first, asked)

    monkeypatch.setattr(teachers, "make_lesson", of_oof)
    noise.run("cheat_distill", distill=LESSONS["distill"])
    assert noise.standard_errors_above_chance("cheat_distill", noise.pairs) > 3


# What is taught ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def school(kept: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A project with two complete runs: `tiny` of one seed, `other` of two; read-only."""
    made = type(kept)(shutil.copytree(kept.root, tmp_path_factory.mktemp("school") / "project"))
    made.run(made.spec("other", seeds=(1, 2), train={"epochs": 1}))
    return made


@pytest.fixture
def writable(school: Any, tmp_path: Path) -> Any:
    return type(school)(shutil.copytree(school.root, tmp_path / "project"))


def lesson_of(project: Any, fold: int = 2, **sections: Any) -> tuple[Any, Any, np.ndarray]:
    plan = make_plan(project.root, project.spec("student", **sections))
    rows = np.flatnonzero((plan.table.labels >= 0) & (plan.table.fold != fold))[3:]
    return plan, plan.teachers.lesson(fold, rows, RUNTIME), rows


def mean_of_files(project: Any, fold: int) -> pd.DataFrame:
    """The mean of the two runs' test.csv of one fold, a run counting as much as the other."""
    one = project.table("tiny", f"fold{fold}", "seed42", "test.csv").set_index("id")
    two = [project.table("other", f"fold{fold}", f"seed{seed}", "test.csv").set_index("id") for seed in (1, 2)]
    return (one + (two[0] + two[1].loc[two[0].index]).loc[one.index] / 2) / 2


@pytest.mark.parametrize("hard", [True, False])
def test_pseudo_labels_are_those_of_the_folds_own_files(school: Any, hard: bool) -> None:
    mean = mean_of_files(school, 2)
    assert (mean - mean_of_files(school, 3).loc[mean.index]).abs().max(axis=None) > 1e-3, "folds must differ here"
    least = float(mean.max(axis=1).median())
    section = {"from": ("tiny", "other"), "min_confidence": least, "hard": hard, "weight": 0.25}
    plan, lesson, rows = lesson_of(school, pseudo=section)
    taken = mean[mean.max(axis=1) >= least]
    assert 0 < len(taken) < len(mean)
    assert plan.table.ids[lesson.rows].tolist() == [name for name in plan.table.ids.tolist() if name in taken.index]
    expected = taken.loc[plan.table.ids[lesson.rows]].to_numpy()
    if hard:
        expected = np.eye(7)[expected.argmax(axis=1)]
    np.testing.assert_allclose(lesson.taught.targets[lesson.rows], expected, atol=1e-6)
    np.testing.assert_array_equal(lesson.taught.targets[rows], np.eye(7)[plan.table.labels[rows]])
    assert set(lesson.taught.weights[lesson.rows]) == {0.25}
    assert set(lesson.taught.weights[rows]) == {1.0}
    assert lesson.taught.matched is None
    assert lesson.info == {"n_pseudo": len(taken), "n_unlabelled": 30}
    assert lesson.told[0].startswith(f"{len(taken)} of 30 unlabelled images are labelled by teachers (")


def test_what_is_matched_is_what_the_folds_own_models_say(school: Any) -> None:
    section = {"from": ("tiny", "other"), "weight": 0.5, "temperature": 3.0}
    plan, lesson, rows = lesson_of(school, distill=section)
    images = plan.table.images[rows]
    said = {}
    for name in ("tiny", "other"):
        models = kept_models(load_run(school.path(name)), RUNTIME, folds=(2,))
        said[name] = [model.probabilities(images) for model in models]
    assert {name: len(each) for name, each in said.items()} == {"tiny": 1, "other": 2}
    mean = (said["tiny"][0] + (said["other"][0] + said["other"][1]) / 2) / 2
    roots = mean ** (1 / 3)
    np.testing.assert_allclose(lesson.taught.matched[rows], roots / roots.sum(axis=1, keepdims=True), atol=1e-6)
    assert (lesson.taught.share, lesson.taught.temperature) == (0.5, 3.0)
    agree = float((mean.argmax(axis=1) == plan.table.labels[rows]).mean())
    assert lesson.told == [f"teachers give {agree:.1%} of the {len(rows)} trained images their label"]
    other = lesson_of(school, fold=1, distill=section)[1].taught.matched
    both = np.flatnonzero((lesson.taught.matched.sum(axis=1) > 0) & (other.sum(axis=1) > 0))
    assert np.abs(lesson.taught.matched[both] - other[both]).max() > 1e-4, "another fold asks other models"


def test_images_with_pseudo_labels_are_matched_as_well(school: Any) -> None:
    plan, lesson, rows = lesson_of(school, **BOTH)
    assert len(lesson.rows) == 30
    trained = np.concatenate([rows, lesson.rows])
    np.testing.assert_allclose(lesson.taught.matched[trained].sum(axis=1), 1, atol=1e-6)
    hidden = np.setdiff1d(np.arange(len(plan.table.ids)), trained)
    assert not lesson.taught.matched[hidden].any()
    assert not lesson.taught.targets[hidden].any(), "no label of the scored fold may be handed on"


def test_the_least_confidence_is_taken_and_none_may_be() -> None:
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95]])
    taken, targets = teachers.pseudo_labels(probs, PseudoSpec.model_validate({"from": ("a",), "min_confidence": 0.9}))
    assert taken.tolist() == [True, False, True]
    assert targets.tolist() == [[1, 0], [0, 1]]
    section = {"from": ("a",), "min_confidence": 1.0, "hard": False}
    taken, targets = teachers.pseudo_labels(probs, PseudoSpec.model_validate(section))
    assert (taken.any(), targets.shape) == (False, (0, 2))


def test_a_lesson_that_takes_nothing_says_what_would(school: Any) -> None:
    _, lesson, _ = lesson_of(school, pseudo={"from": ("tiny",), "min_confidence": 1.0})
    assert len(lesson.rows) == 0
    assert lesson.told == [
        "0 of 30 unlabelled images are labelled by teachers; a lower `pseudo.min_confidence` would take some"
    ]


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_a_student_says_what_it_learnt_from(writable: Any) -> None:
    path = writable.path("tiny") / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"marks": ["optimistic"], "external": ["faces"]}))
    spec = writable.spec("student", seeds=(3, 4), train={"epochs": 1}, **BOTH)
    record, screen = writable.run(spec)
    assert record["marks"] == ["transductive", "optimistic"]
    assert record["external"] == ["faces"]
    assert record["n_pseudo"] == {str(fold): 30 for fold in range(5)}
    assert list(record["hashes"]["teachers"]) == ["tiny"]
    unit = json.loads((writable.path("student") / "fold1" / "seed4" / "unit.json").read_text())
    assert (unit["n_pseudo"], unit["n_unlabelled"], unit["n_train"]) == (30, 30, 140 - unit["n_val"] + 30)
    started = next(event for event in screen.events if isinstance(event, UnitStarted))
    assert started.train_images == 140 - started.val_images + 30
    assert screen.said[0].startswith("fold 0, seed 3: 30 of 30 unlabelled images are labelled by teachers (")
    assert screen.said[1].startswith("fold 0, seed 3: teachers give ")
    assert writable.run(spec)[0] == record, "a complete student is kept"
    plan = make_plan(writable.root, writable.spec("grandchild", pseudo={"from": ("student",)}))
    assert plan.teachers.marks == ["transductive", "optimistic"]


def test_a_run_without_teachers_says_nothing_of_them(school: Any) -> None:
    record = load_run(school.path("tiny")).info
    assert "teachers" not in record["hashes"]
    assert "n_pseudo" not in record
    assert "teachers" not in (school.path("tiny") / ".state.json").read_text(), (
        "runs of before must still be gone on with"
    )


class KilledError(Exception):
    """Stands for a kill."""


def test_a_student_that_goes_on_ends_with_the_same_bits(writable: Any, tmp_path: Path) -> None:
    again = type(writable)(shutil.copytree(writable.root, tmp_path / "again"))
    spec = writable.spec("student", mix={"mixup_alpha": 0.4}, sampler="balanced", **BOTH)
    writable.run(spec, folds=(1,))

    class Killer:
        def on(self, event: Event) -> None:
            if isinstance(event, EpochDone):
                raise KilledError

        def close(self) -> None:
            pass

    with pytest.raises(KilledError):
        again.run(spec, folds=(1,), follow=lambda _path: [Killer()])
    _, screen = again.run(spec, folds=(1,))
    assert "goes on after epoch 1 of 2" in " ".join(screen.said)
    for name in ("weights.safetensors", "val.csv", "test.csv"):
        unit = Path("fold1", "seed42", name)
        assert (writable.path("student") / unit).read_bytes() == (again.path("student") / unit).read_bytes()


def test_both_options_change_what_is_learnt(writable: Any) -> None:
    hashes = set()
    for number, sections in enumerate(({}, {"pseudo": BOTH["pseudo"]}, {"distill": BOTH["distill"]}, BOTH)):
        name = f"student{number}"
        writable.run(writable.spec(name, train={"epochs": 1}, **sections), folds=(0,))
        hashes.add(sha256_file(writable.path(name) / "fold0" / "seed42" / "weights.safetensors"))
    assert len(hashes) == 4


def test_a_student_does_not_go_on_with_other_teachers(writable: Any) -> None:
    student = writable.spec("student", train={"epochs": 1}, pseudo={"from": ("tiny", "other")})
    writable.run(student, folds=(0,))
    writable.run(writable.spec("tiny", train={"epochs": 1}), fresh=True)
    with pytest.raises(RecordError) as caught:
        writable.run(student, folds=(1,))
    lines = str(caught.value).splitlines()
    assert lines[0] == "oof/student: holds a run of another context:"
    assert lines[1].startswith("  teachers_sha256.tiny: ")
    assert lines[2] == "  fix: put back what it was made with, or redo it with --fresh"


def test_a_smoke_run_asks_no_teachers(project: Any) -> None:
    sections = {"pseudo": {"from": ("gone",)}, "distill": {"from": ("gone",)}}
    record, screen = project.run(project.spec("student", **sections), smoke=True)
    assert record["smoke"]
    assert record["n_pseudo"] == {"0": 16, "1": 16}
    assert screen.said[0] == (
        "a smoke run asks no teachers: what `from` names is not read, and stand-ins know the labels"
    )


# Refusals ------------------------------------------------------------------------------------------------------------


def refusal(project: Any, *, split: int = 0, **sections: Any) -> str:
    with pytest.raises(RecordError) as caught:
        project.run(project.spec("student", **(sections or {"pseudo": {"from": ("tiny",)}})), split=split)
    assert not project.path("student").exists()
    return str(caught.value)


def edit_record(project: Any, name: str, **changes: Any) -> None:
    path = project.path(name) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_teacher_that_will_not_do_is_named_at_once(writable: Any) -> None:
    hashes = json.loads((writable.path("other") / "run.json").read_text())["hashes"]
    edit_record(writable, "tiny", smoke=True, competition="faces")
    edit_record(writable, "other", hashes=hashes | {"folds": "ab" * 32})
    here = hashes["folds"][:8]
    message = refusal(writable, pseudo={"from": ("tiny", "gone")}, distill={"from": ("other", "student")})
    assert message == (
        f"pseudo.from: tiny: is a smoke run\n  fix: {FIX}\n"
        f"pseudo.from: tiny: was trained on faces, not on demo\n  fix: {FIX}\n"
        "oof/gone: is not complete: it has no run.json\n  fix: make exp EXP=gone\n"
        f"distill.from: other: was trained on other folds (abababab, here {here}), and so on labels that this "
        f"experiment is scored on\n  fix: {FIX}\n"
        "oof/student: is not complete: it has no run.json\n  fix: make exp EXP=student\n"
        "5 errors; nothing was written."
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": {"kind": "holdout"}}, "has no models that leave out one fold each (split kind holdout)"),
        ({"hashes": {"inputs": "ab" * 32}}, "was trained on other images or labels (abababab, here "),
        ({"label_map": {"happy": "sad", "sad": "happy"}}, "merges the classes in another way (`label_map`)"),
    ],
)
def test_what_a_teacher_must_share(writable: Any, changes: dict[str, Any], reason: str) -> None:
    info = json.loads((writable.path("tiny") / "run.json").read_text())
    merged = {key: info[key] | change if isinstance(info[key], dict) else change for key, change in changes.items()}
    edit_record(writable, "tiny", **merged)
    assert refusal(writable).startswith(f"pseudo.from: tiny: {reason}")


def test_teachers_of_other_classes_are_refused(school: Any) -> None:
    label_map = dict.fromkeys(load_run(school.path("tiny")).classes, "bad") | {"happy": "good"}
    message = refusal(school, label_map=label_map, distill={"from": ("tiny",)})
    assert message.startswith("distill.from: tiny: is of other classes (")
    assert "; here bad, good)" in message or "; here good, bad)" in message


def test_a_second_split_needs_teachers_of_that_split(writable: Any) -> None:
    assert "pseudo.from: tiny: was trained on other folds (" in refusal(writable, split=1)
    writable.run(writable.spec("tiny.split1", train={"epochs": 1}), split=1)
    plan = make_plan(writable.root, writable.spec("student", pseudo={"from": ("tiny.split1",)}), split=1)
    assert list(plan.context.teachers_sha256) == ["tiny.split1"]


def test_a_run_cannot_be_its_own_teacher(school: Any) -> None:
    with pytest.raises(RecordError, match=r"^pseudo.from: tiny: is this very run\n"):
        make_plan(school.root, school.spec("tiny", pseudo={"from": ("tiny",)}))


def test_pseudo_labels_need_unlabelled_images(project: Any) -> None:
    shutil.rmtree(project.root / "handout" / "test", ignore_errors=True)
    table = make_plan(project.root, project.spec()).table
    labelled = table.take(np.flatnonzero(table.labels >= 0))
    spec, data = project.spec("student", **BOTH), make_plan(project.root, project.spec()).data
    for find in (teachers.stand_ins, lambda *given: teachers.find_teachers(project.root, *given)):
        with pytest.raises(RecordError) as caught:
            find(spec, data, labelled, data.competition.classes)
        assert str(caught.value).splitlines()[:2] == [
            "pseudo: demo has no unlabelled images to be given labels",
            "  fix: remove the section",
        ]


# Files of teachers ---------------------------------------------------------------------------------------------------


def test_files_that_are_not_here_are_named_with_the_mend(writable: Any) -> None:
    for fold in (1, 3):
        (writable.path("tiny") / f"fold{fold}" / "seed42" / "unit.json").unlink()
    (writable.path("other") / "fold2" / "seed1" / "weights.safetensors").unlink()
    assert refusal(writable, pseudo={"from": ("tiny",)}, distill={"from": ("other",)}) == (
        "oof/tiny: its fold predictions are not on this machine: fold1/seed42, fold3/seed42\n"
        "  fix: train it here: make exp EXP=tiny FRESH=1\n"
        "oof/other: its weights are not on this machine: fold2/seed1\n"
        "  fix: fetch them: make weights FROM=<folder>, or train it here: make exp EXP=other FRESH=1\n"
        "2 errors; nothing was written."
    )


def rewrite_unit(project: Any, unit: str, source: str, *names: str) -> None:
    """Put files of another unit into one, and the hashes that go with them into its unit.json."""
    folder, other = project.path("tiny") / unit, project.path("tiny") / source
    told = json.loads((folder / "unit.json").read_text())
    for name in names:
        shutil.copy(other / name, folder / name)
        told["vouched"]["files"][name] = sha256_file(folder / name)
    (folder / "unit.json").write_text(json.dumps(told))


def test_a_file_that_was_changed_is_refused(writable: Any) -> None:
    (writable.path("tiny") / "fold1" / "seed42" / "test.csv").unlink()
    path = writable.path("tiny") / "fold3" / "seed42" / "test.csv"
    path.write_text(path.read_text() + "\n")
    lines = refusal(writable).splitlines()
    assert lines[0].startswith("oof/tiny/fold1/seed42: is not what was kept: [Errno 2] No such file or directory")
    assert lines[2] == "oof/tiny/fold3/seed42: is not what was kept: test.csv is not the file that was kept"
    assert lines[3] == "  fix: train it here: make exp EXP=tiny FRESH=1"


def test_a_strangers_predictions_are_refused_though_their_hashes_fit(writable: Any) -> None:
    rewrite_unit(writable, "fold1/seed42", "fold0/seed42", "test.csv")
    assert refusal(writable).splitlines()[0] == (
        "oof/tiny: its fold predictions do not add up to the test.csv that run.json vouches for"
    )


def test_a_unit_in_the_place_of_another_is_refused(writable: Any) -> None:
    """It would have seen the labels of the fold that it is asked for."""
    folder = writable.path("tiny")
    shutil.rmtree(folder / "fold1")
    shutil.copytree(folder / "fold0", folder / "fold1")
    assert refusal(writable).splitlines()[0] == (
        "oof/tiny/fold1/seed42: is not what was kept: unit.json is of fold0/seed42"
    )


def test_a_unit_of_other_validated_images_is_refused(writable: Any) -> None:
    rewrite_unit(writable, "fold1/seed42", "fold0/seed42", "val.csv")
    assert refusal(writable).splitlines()[0] == (
        "oof/tiny/fold1/seed42: is not what was kept: val.csv does not hold the ids of fold 1"
    )


def test_other_weights_are_refused_before_anything_is_trained(writable: Any) -> None:
    folder = writable.path("tiny")
    shutil.copy(folder / "fold0/seed42/weights.safetensors", folder / "fold1/seed42/weights.safetensors")
    with pytest.raises(RecordError, match=r"oof/tiny/fold1/seed42/weights.safetensors: is not the file that run.json"):
        writable.run(writable.spec("student", distill={"from": ("tiny",)}), folds=(1,))
