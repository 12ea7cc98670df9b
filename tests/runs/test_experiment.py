"""An experiment from its spec to its sealed folder: what is kept, what is redone, what can be recomputed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, log_loss

from foldwise.errors import DivergedError, FoldwiseError, RecordError
from foldwise.files import sha256_file
from foldwise.records.store import list_runs, load_run
from foldwise.runs.events import EpochDone, RunDone, RunStarted, UnitDone, UnitStarted

FOLDS = range(5)


def probs_of(table: pd.DataFrame) -> pd.DataFrame:
    columns = [name for name in table.columns if name.startswith("p_")]
    return table[columns].rename(columns=lambda name: name.removeprefix("p_"))


def hits(table: pd.DataFrame) -> pd.Series:
    return probs_of(table).idxmax(axis=1) == table["label"]


def as_kept(probs: pd.DataFrame) -> np.ndarray:
    """The float32 that nine digits stand for, wide enough to be summed without rounding."""
    return probs.to_numpy().astype(np.float32).astype(np.float64)


# What lies on disk ----------------------------------------------------------------------------------------------------


def test_every_file_of_the_contract_is_there(kept: Any) -> None:
    files = {str(path.relative_to(kept.path())) for path in kept.path().rglob("*") if path.is_file()}
    units = {
        f"fold{fold}/seed42/{name}"
        for fold in FOLDS
        for name in ("val.csv", "test.csv", "history.csv", "weights.safetensors", "unit.json")
    }
    assert files - {".lock"} == units | {
        "spec.yaml", "oof.csv", "test.csv", "history.csv", "run.json", ".state.json",
    }  # fmt: skip


def test_oof_holds_every_labelled_id_once_with_its_label_and_fold(kept: Any) -> None:
    oof = kept.table("tiny", "oof.csv")
    train = pd.read_csv(kept.root / "inputs" / "demo" / "train.csv", dtype=str)
    folds = pd.read_csv(kept.root / "inputs" / "demo" / "folds.csv", dtype={"id": str})
    folds = folds[folds["split"] == 0]
    assert oof["id"].is_unique
    assert dict(zip(oof["id"], oof["label"], strict=True)) == dict(zip(train["id"], train["label"], strict=True))
    assert dict(zip(oof["id"], oof["fold"], strict=True)) == dict(zip(folds["id"], folds["fold"], strict=True))
    assert (probs_of(oof).sum(axis=1) - 1).abs().max() < 1e-5


def test_scores_recomputed_from_the_files_equal_those_of_the_record(kept: Any) -> None:
    oof, record = kept.table("tiny", "oof.csv"), json.loads((kept.path() / "run.json").read_text())
    assert hits(oof).mean() == record["score"]
    assert hits(oof).groupby(oof["fold"]).mean().to_dict() == {
        int(k): score for k, score in record["fold_scores"].items()
    }
    for fold in FOLDS:
        unit = json.loads((kept.path() / f"fold{fold}" / "seed42" / "unit.json").read_text())
        assert unit["score"] == record["fold_scores"][str(fold)]


def test_oof_and_test_are_gathered_from_the_units(kept: Any) -> None:
    oof, test = kept.table("tiny", "oof.csv"), kept.table("tiny", "test.csv").set_index("id")
    units = [kept.table("tiny", f"fold{fold}", "seed42", "val.csv") for fold in FOLDS]
    of_units = pd.concat(units).set_index("id").loc[oof["id"]]
    np.testing.assert_array_equal(probs_of(of_units).to_numpy(), probs_of(oof).to_numpy())
    tests = [kept.table("tiny", f"fold{fold}", "seed42", "test.csv").set_index("id").loc[test.index] for fold in FOLDS]
    kept_probs = np.array([as_kept(table) for table in tests])
    np.testing.assert_array_equal(kept_probs.mean(axis=0).astype(np.float32), test.to_numpy().astype(np.float32))
    assert np.ptp(kept_probs, axis=0).max() > 1e-3, "folds must differ for the mean to matter"
    assert sorted(test.index.astype(int)) == list(range(141, 171))


def test_what_the_views_add_is_told_with_its_error(kept: Any) -> None:
    record = json.loads((kept.path() / "run.json").read_text())
    told = record["tta_gain"]
    assert told["gain"] == pytest.approx(record["score"] - record["score_without_tta"])
    # The share of images on which views change the verdict bounds the error: at least one image, at most all.
    assert 0 <= told["standard_error"] < 1 / math.sqrt(record["n_scored"])
    units = [json.loads((kept.path() / f"fold{k}" / "seed42" / "unit.json").read_text()) for k in FOLDS]
    shares = np.array([unit["n_val"] for unit in units]) / record["n_scored"]
    errors = [unit["tta_gain"]["standard_error"] for unit in units]
    assert told["standard_error"] == pytest.approx(np.sqrt(((shares * errors) ** 2).sum()))


def test_no_views_no_gain_of_them(project: Any) -> None:
    record, _ = project.run(project.spec(tta=("identity",)))
    assert record["tta_gain"] is None


def test_history_has_a_row_an_epoch_and_unit(kept: Any) -> None:
    history = kept.table("tiny", "history.csv")
    assert list(zip(history["fold"], history["seed"], history["epoch"], strict=True)) == [
        (fold, 42, epoch) for fold in FOLDS for epoch in (1, 2)
    ]
    figures = {"lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_s"}
    assert figures == set(history.columns) - {"fold", "seed", "epoch"}
    assert history[list(figures)].gt(0).all(axis=None)


def test_the_record_says_what_made_the_run(kept: Any) -> None:
    path = kept.path()
    record = json.loads((path / "run.json").read_text())
    assert set(record) == {
        "schema_version", "experiment", "competition", "metric", "score", "standard_error", "fold_scores",
        "fold_standard_errors", "seed_scores", "seed_std", "source_scores", "n_scored", "test_score",
        "test_standard_error", "classes", "split", "seeds", "smoke", "attempt", "started", "finished", "wall_s",
        "peak_rss_mib", "hashes", "weights", "device", "threads", "precision", "git", "versions", "tta", "parameters",
        "command", "tracker", "external", "leak_guard", "marks", "score_without_tta", "tta_gain", "label_map",
    }  # fmt: skip
    assert record["hashes"] | {"folds": "", "inputs": ""} == {
        "start": None,
        "folds": "",
        "inputs": "",
        "spec": sha256_file(path / "spec.yaml"),
        "oof": sha256_file(path / "oof.csv"),
        "test": sha256_file(path / "test.csv"),
    }
    assert record["weights"] == {
        f"fold{fold}/seed42": sha256_file(path / f"fold{fold}" / "seed42" / "weights.safetensors") for fold in FOLDS
    }
    assert (record["n_scored"], record["seeds"], record["attempt"], record["smoke"]) == (140, [42], 1, False)
    assert (record["threads"], record["precision"], record["tta"]) == (1, "fp32", ["identity", "hflip"])
    assert (record["marks"], record["external"], record["tracker"]) == ([], [], None)
    assert 0 < record["standard_error"] < 0.1
    # a linear map of 24 to 7 at the end, and more before it
    assert record["parameters"] > 24 * 7 + 7
    assert load_run(path).info == record


def test_listeners_hear_of_everything_once(project: Any) -> None:
    record, screen = project.run(project.spec())
    kinds = [type(event) for event in screen.events]
    units = [event for event in screen.events if isinstance(event, UnitDone)]
    epochs = [event for event in screen.events if isinstance(event, EpochDone)]
    assert kinds[0] is RunStarted
    assert kinds[-1] is RunDone
    assert kinds.count(UnitStarted) == len(units) == 5
    assert [(event.fold, event.epoch) for event in epochs] == [(fold, epoch) for fold in FOLDS for epoch in (1, 2)]
    assert {str(event.fold): event.score for event in units} == record["fold_scores"]
    done = screen.events[-1]
    assert (done.info, done.path) == (record, "oof/tiny")
    assert np.trace(done.confusion) == round(record["score"] * 140)
    assert sum(row["support"] for row in done.per_class) == np.sum(done.confusion) == 140
    assert screen.closed == 1


# Going on, and beginning anew -----------------------------------------------------------------------------------------


def test_some_folds_now_and_the_rest_later_give_the_same_bytes(project: Any, kept: Any) -> None:
    record, screen = project.run(project.spec(), folds=(3, 0))
    assert record is None
    assert screen.said[-1] == "2 of 5 units are kept; still to run: folds 1, 2, 4"
    assert not (project.path() / "run.json").exists()
    before = project.snapshot()
    assert not [name for name in before if "fold1" in name]

    record, screen = project.run(project.spec())
    (started,) = [event for event in screen.events if isinstance(event, RunStarted)]
    assert [(unit.fold, unit.seed) for unit in started.finished] == [(0, 42), (3, 42)]
    assert [event.fold for event in screen.events if isinstance(event, UnitStarted)] == [1, 2, 4]
    after = project.snapshot()
    kept_units = [name for name in before if "/seed42/" in name]
    assert {name: before[name] for name in kept_units} == {name: after[name] for name in kept_units}
    for name in ("oof.csv", "test.csv"):
        assert (project.path() / name).read_bytes() == (kept.path() / name).read_bytes()
    assert record["score"] == load_run(kept.path()).info["score"]


def test_a_complete_run_is_told_and_not_redone(resumable: Any) -> None:
    before, followed = resumable.snapshot(), []
    record, screen = resumable.run(resumable.spec(), follow=lambda path: followed.append(path) or [])
    assert screen.said == ["tiny is complete and kept; FRESH=1 (--fresh) redoes it"]
    assert [type(event).__name__ for event in screen.events] == ["Message", "RunDone"]
    assert record == json.loads((resumable.path() / "run.json").read_text())
    after = resumable.snapshot()
    state = str(resumable.path() / ".state.json")
    assert {**before, state: before[state][0]} == {**after, state: after[state][0]}
    assert not followed, "a tracker must not start where nothing is to be run"


def test_fresh_is_the_next_attempt_and_gives_the_same_bytes(resumable: Any) -> None:
    (resumable.path() / "left over").write_text("")
    before = resumable.snapshot()
    record, screen = resumable.run(resumable.spec(), fresh=True)
    assert record["attempt"] == 2
    assert screen.events[0].attempt == "2"
    assert not (resumable.path() / "left over").exists()
    after = resumable.snapshot()
    for name in ("oof.csv", "test.csv", "spec.yaml"):
        path = str(resumable.path() / name)
        assert after[path][0] == before[path][0]
        assert after[path][1] > before[path][1]


def test_another_spec_is_refused_with_the_difference_and_nothing_is_touched(resumable: Any) -> None:
    before = resumable.snapshot()
    with pytest.raises(RecordError) as caught:
        resumable.run(resumable.spec(optim={"lr": 1e-3}, tta=("identity",)))
    assert str(caught.value) == (
        "oof/tiny: holds a run of another spec:\n"
        "  optim.lr: 0.003 -> 0.001\n"
        "  tta: [identity, hflip] -> [identity]\n"
        "  fix: give this one a name (NAME=...), or redo it with --fresh\n"
        "1 error; nothing was written."
    )
    assert resumable.snapshot() == before


def test_other_labels_are_refused(resumable: Any) -> None:
    path = resumable.root / "inputs" / "demo" / "train.csv"
    rows = path.read_text().splitlines()
    first, second = ("1,happy", "1,sad")
    rows[1] = first if rows[1] != first else second
    path.write_text("\n".join([*rows, ""]))
    with pytest.raises(
        RecordError, match=r"holds a run of another context:\n  inputs_sha256: [0-9a-f]+ -> [0-9a-f]+\n"
    ):
        resumable.run(resumable.spec())


def test_a_damaged_unit_alone_is_trained_again(resumable: Any, kept: Any) -> None:
    (resumable.path() / "run.json").unlink()
    damaged = resumable.path() / "fold2" / "seed42" / "val.csv"
    damaged.write_text(damaged.read_text().replace("0.1", "0.2"))
    _, screen = resumable.run(resumable.spec())
    assert screen.said == [
        "fold 2, seed 42 is trained again: oof/tiny/fold2/seed42 is damaged (val.csv is not the file that was kept)"
    ]
    assert [event.fold for event in screen.events if isinstance(event, UnitStarted)] == [2]
    for name in ("oof.csv", "test.csv"):
        assert (resumable.path() / name).read_bytes() == (kept.path() / name).read_bytes()


def test_an_unknown_fold_is_refused_before_anything_is_written(project: Any) -> None:
    with pytest.raises(FoldwiseError) as caught:
        project.run(project.spec(), folds=(1, 5))
    assert str(caught.value) == "there is no fold 5: `demo` has folds 0, 1, 2, 3, 4\n  fix: FOLDS=0,1"
    assert not project.path().exists()


def test_a_diverged_unit_ends_the_call_and_closes_the_listeners(project: Any) -> None:
    follower = type(project.run(project.spec(), folds=(0,))[1])()
    spec = project.spec("wild", optim={"lr": 1e6, "name": "sgd"})
    with pytest.raises(DivergedError) as caught:
        project.run(spec, follow=lambda _path: [follower])
    assert "(fold 0, seed 42)" in str(caught.value)
    assert follower.closed == 1
    assert not list(project.path("wild").glob("fold*/seed*/unit.json"))
    (refused,) = list_runs(project.root, "demo")[1][1:]
    assert refused == "wild: is not complete: 0 of 5 units"


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_several_seeds_are_averaged_and_their_spread_is_told(project: Any, kept: Any) -> None:
    record, _ = project.run(project.spec(seeds=(42, 7)))
    oof = project.table("tiny", "oof.csv").set_index("id")
    by_seed = {}
    for seed in (42, 7):
        units = [project.table("tiny", f"fold{fold}", f"seed{seed}", "val.csv") for fold in FOLDS]
        by_seed[seed] = pd.concat(units).set_index("id").loc[oof.index]
    mean = (as_kept(probs_of(by_seed[42])) + as_kept(probs_of(by_seed[7]))) / 2
    np.testing.assert_array_equal(mean.astype(np.float32), probs_of(oof).to_numpy().astype(np.float32))
    scores = {str(seed): hits(table).mean() for seed, table in by_seed.items()}
    assert record["seed_scores"] == scores
    assert record["seed_std"] == pytest.approx(abs(scores["42"] - scores["7"]) / 2**0.5)
    assert record["score"] == hits(oof).mean()
    assert (record["seeds"], len(record["weights"])) == ([42, 7], 10)
    tests = [
        project.table("tiny", f"fold{fold}", f"seed{seed}", "test.csv").set_index("id")
        for fold in FOLDS
        for seed in (42, 7)
    ]
    test = project.table("tiny", "test.csv").set_index("id")
    mean = np.mean([table.loc[test.index].to_numpy() for table in tests], axis=0)
    np.testing.assert_allclose(test.to_numpy(), mean, atol=1e-7)

    alone = pd.concat([kept.table("tiny", f"fold{fold}", "seed42", "val.csv") for fold in FOLDS]).set_index("id")
    np.testing.assert_array_equal(probs_of(alone).loc[oof.index], probs_of(by_seed[42]))
    assert (probs_of(by_seed[42]) - probs_of(by_seed[7])).abs().max(axis=None) > 1e-3, "another seed, another model"


# Smoke ----------------------------------------------------------------------------------------------------------------


def test_a_smoke_run_is_small_kept_apart_and_never_blended(resumable: Any) -> None:
    before = resumable.snapshot()
    spec = resumable.spec(seeds=(42, 7), train={"epochs": 9, "freeze_backbone_epochs": 2})
    for _ in range(2):  # a second one replaces the first
        record, screen = resumable.run(spec, smoke=True)
    path = resumable.path(".smoke") / "tiny"
    assert (record["smoke"], record["seeds"], record["n_scored"]) == (True, [42], 64)
    assert screen.events[0].smoke
    assert sorted(record["fold_scores"]) == ["0", "1"]
    assert len(pd.read_csv(path / "history.csv")) == 2
    assert len(pd.read_csv(path / "test.csv")) == 16
    assert resumable.snapshot() == before
    runs, skipped = list_runs(resumable.root, "demo")
    assert ([run.name for run in runs], skipped) == (["tiny"], [])
    assert load_run(path).info == record


# Watching -------------------------------------------------------------------------------------------------------------


def test_watching_an_inner_slice_leaves_no_mark(project: Any) -> None:
    record, _ = project.run(project.spec(train={"keep": "best", "epochs": 3}))
    history = project.table("tiny", "history.csv")
    assert record["marks"] == []
    assert {"inner_loss", "inner_accuracy", "val_loss", "val_accuracy"} <= set(history.columns)
    for fold in FOLDS:
        unit = json.loads((project.path() / f"fold{fold}" / "seed42" / "unit.json").read_text())
        assert unit["n_inner"] > 0
        assert unit["n_train"] + unit["n_inner"] + unit["n_val"] == 140
        of_fold = history[history["fold"] == fold].set_index("epoch")
        assert unit["best_epoch"] == of_fold["inner_accuracy"].idxmax()


def test_watching_the_scored_fold_marks_the_run_optimistic(project: Any) -> None:
    record, _ = project.run(project.spec(train={"keep": "best", "watch": "scored", "epochs": 2}))
    history = project.table("tiny", "history.csv")
    assert record["marks"] == ["optimistic"]
    assert not [name for name in history.columns if name.startswith("inner")]
    unit = json.loads((project.path() / "fold0" / "seed42" / "unit.json").read_text())
    assert unit["n_inner"] == 0
    assert unit["best_epoch"] == history[history["fold"] == 0].set_index("epoch")["val_accuracy"].idxmax()


def test_early_stopping_is_told_and_resumes_as_stopped(project: Any) -> None:
    spec = project.spec(optim={"lr": 1e-9}, train={"epochs": 30, "early_stop_patience": 2})
    project.run(spec, folds=(0,))
    unit = json.loads((project.path() / "fold0" / "seed42" / "unit.json").read_text())
    assert unit["stopped_early"]
    assert unit["epochs"] < 30


# Other splits and metrics ---------------------------------------------------------------------------------------------


def test_a_holdout_run_scores_its_share_and_does_not_blend(project: Any) -> None:
    project.describe("split: {kind: holdout, share: 0.2, seed: 1}")
    record, _ = project.run(project.spec())
    oof = project.table("tiny", "oof.csv")
    assert 25 <= len(oof) == record["n_scored"] <= 35
    assert list(record["fold_scores"]) == ["0"]
    assert record["score"] == record["fold_scores"]["0"] == hits(oof).mean()
    runs, (reason,) = list_runs(project.root, "demo")
    assert runs == []
    assert reason == "tiny: has no out-of-fold predictions for every image (split kind holdout)"


def test_a_full_run_predicts_and_scores_nothing(project: Any) -> None:
    project.describe("split: {kind: full}")
    record, screen = project.run(project.spec())
    assert (record["score"], record["standard_error"], record["fold_scores"], record["n_scored"]) == (None, None, {}, 0)
    assert record["score_without_tta"] is None
    assert not (project.path() / "oof.csv").exists()
    assert len(project.table("tiny", "test.csv")) == 30
    assert [event.train_images for event in screen.events if isinstance(event, UnitStarted)] == [140]
    assert not [name for name in project.table("tiny", "history.csv").columns if name.startswith("val")]
    assert len(load_run(project.path()).ids) == 0


def test_a_labelled_test_part_is_scored_and_never_trained_on(project: Any) -> None:
    handed_out = project.root / "handout" / "train.csv"
    train = pd.read_csv(handed_out, dtype=str)
    train["Usage"] = ["Training"] * 100 + ["PublicTest"] * 20 + ["PrivateTest"] * 20
    train.to_csv(handed_out, index=False, lineterminator="\n")
    project.describe("split: {kind: column, train: [Training], val: [PublicTest], test: [PrivateTest]}")
    record, screen = project.run(project.spec())
    assert [event.train_images for event in screen.events if isinstance(event, UnitStarted)] == [100]
    oof, test = project.table("tiny", "oof.csv"), project.table("tiny", "test.csv")
    assert sorted(oof["id"].astype(int)) == list(range(101, 121))
    part = train[train["Usage"] == "PrivateTest"].merge(test, on="id", validate="1:1")
    assert len(part) == 20
    assert record["test_score"] == hits(part).mean()
    assert record["score"] == hits(oof).mean()


@pytest.mark.parametrize("metric", ["macro_f1", "log_loss"])
def test_other_metrics_are_recomputable_too(project: Any, metric: str) -> None:
    project.describe(f"metric: {metric}", "split: {kind: kfold, folds: 2, seed: 1}")
    record, _ = project.run(project.spec(train={"keep": "best"}))
    oof = project.table("tiny", "oof.csv")
    probs = probs_of(oof)
    if metric == "macro_f1":
        expected = f1_score(oof["label"], probs.idxmax(axis=1), average="macro", zero_division=0, labels=probs.columns)
    else:
        shares = probs.div(probs.sum(axis=1), axis=0)
        expected = log_loss(oof["label"], shares, labels=list(probs.columns))
    assert record["metric"] == metric
    assert record["score"] == pytest.approx(expected, abs=1e-6)
    history = project.table("tiny", "history.csv")
    column = "inner_loss" if metric == "log_loss" else "inner_macro_f1"
    for fold in (0, 1):
        watched = history[history["fold"] == fold].set_index("epoch")[column]
        unit = json.loads((project.path() / f"fold{fold}" / "seed42" / "unit.json").read_text())
        assert unit["best_epoch"] == (watched.idxmin() if metric == "log_loss" else watched.idxmax())


def test_a_run_goes_on_without_the_images_cache(resumable: Any, kept: Any) -> None:
    for path in Path(resumable.root / "inputs" / "demo" / "cache").iterdir():
        path.unlink()
    record, _ = resumable.run(resumable.spec())
    assert record["hashes"]["inputs"] == load_run(kept.path()).info["hashes"]["inputs"]


def test_merged_classes_are_scored_and_kept_out_of_blends(project: Any) -> None:
    names = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
    label_map = {name: "good" if name in ("happy", "surprise") else "other" for name in names}
    spec = project.spec("merged").model_copy(update={"label_map": label_map})
    record, _ = project.run(spec)
    assert (record["classes"], record["label_map"]) == (["other", "good"], label_map)
    oof = project.table("merged", "oof.csv")
    assert list(oof.columns) == ["id", "fold", "label", "p_other", "p_good"]
    assert record["score"] == hits(oof).mean()
    given = pd.read_csv(project.root / "inputs" / "demo" / "train.csv", dtype=str).set_index("id")["label"]
    assert (oof["label"] == oof["id"].map(given).map(label_map)).all()
    runs, skipped = list_runs(project.root, "demo")
    assert (runs, skipped) == ([], ["merged: is scored on 2 classes of its own (other, good)"])
