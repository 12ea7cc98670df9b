"""The end of a study: finalists in full, the winner's file and run, and figures that anyone can compute again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from foldwise.cli import main
from foldwise.data.folds import read_folds
from foldwise.errors import FoldwiseError
from foldwise.metrics import METRICS
from foldwise.records.ensemble import blend
from foldwise.records.store import list_runs, load_run
from foldwise.records.study import predictions_of, read_study
from foldwise.runs.events import EpochDone, TrialEvent
from foldwise.runs.plan import make_plan
from foldwise.runs.study import set_key
from foldwise.runs.winner import own_run, summary
from foldwise.spec.load import load_experiment
from foldwise.spec.model import resolved
from foldwise.spec.space import own_values, with_parameters
from foldwise.stats import bias_corrected, paired_difference, standard_error

pytestmark = pytest.mark.slow

TUNED = "tiny_tuned"


def spec_of(tuning: Any, **tune: Any) -> Any:
    """What the fixture `tuned` searched."""
    return tuning.spec(changes={"optim": {"lr": 1e-5}}, **({"trials": 6, "finalists": 2} | tune))


def winner_of(tuning: Any) -> Any:
    return load_experiment(tuning.root / "experiments" / f"{TUNED}.yaml", root=tuning.root)


def right(table: pd.DataFrame) -> pd.Series:
    """Whether each row of a table of predictions is right, by id."""
    table = table.set_index("id")
    return table[["p_dark", "p_light"]].idxmax(axis=1).str.removeprefix("p_") == table["label"]


def trained(recorder: Any) -> list[Any]:
    return [e for e in recorder.events if isinstance(e, TrialEvent) and isinstance(e.event, EpochDone)]


# The file and its run -------------------------------------------------------------------------------------------------


def test_the_winners_file_is_an_ordinary_experiment_that_says_where_it_is_from(tuned: Any) -> None:
    info = read_study(tuned.path).info
    text = (tuned.root / "experiments" / f"{TUNED}.yaml").read_text()
    changed = ", ".join(f"{key} {value}" for key, value in info["winner"].items())
    assert text.splitlines()[:3] == [
        "# yaml-language-server: $schema=schema.json",
        f"# tiny with the best of 6 parameter sets: {changed}.",
        f"# Found by: make tune EXP=tiny      Run: make exp EXP={TUNED}",
    ]
    spec = winner_of(tuned)
    folds = read_folds(tuned.root / "inputs" / "demo" / "folds.csv").sha256
    assert (spec.tuned.study, spec.tuned.trials, spec.tuned.folds_sha256) == ("tiny", 6, folds)
    assert spec.tune is None
    expected = resolved(with_parameters(spec_of(tuned), info["winner"], root=tuned.root))
    assert resolved(spec) | {"name": "tiny", "tuned": None} == expected
    assert yaml.safe_load(text)["name"] == TUNED
    assert main(["--root", str(tuned.root), "check", TUNED]) == 0


def test_its_run_is_complete_and_the_same_as_if_it_were_begun_anew(tuned: Any, tmp_path: Path) -> None:
    run = load_run(tuned.root / "oof" / TUNED)
    assert run.info["marks"] == ["tuned"]
    assert (run.info["experiment"], run.info["n_scored"]) == (TUNED, 80)
    anew = type(tuned.project)(shutil.copytree(tuned.root / "inputs", tmp_path / "project" / "inputs").parent)
    record, _ = anew.run(winner_of(tuned))
    assert record is not None
    for name in ("oof.csv", "test.csv", "spec.yaml"):
        assert (run.path / name).read_bytes() == (anew.path(TUNED) / name).read_bytes(), name
    assert record["weights"] == run.info["weights"]
    for key in ("score", "fold_scores", "hashes", "marks", "split", "seeds", "parameters", "score_without_tta"):
        assert record[key] == run.info[key], key
    _, screen = tuned.project.run(winner_of(tuned))
    assert screen.said == [f"{TUNED} is complete and kept; FRESH=1 (--fresh) redoes it"]


def test_the_mark_follows_into_a_blend(retuning: Any) -> None:
    retuning.project.run(retuning.project.spec("other", optim={"lr": 1e-3}, train={"epochs": 1}))
    runs, skipped = list_runs(retuning.root, "demo")
    assert ({run.name for run in runs}, skipped) == ({"other", TUNED}, [])
    folds = read_folds(retuning.root / "inputs" / "demo" / "folds.csv")
    groups = dict(zip(folds.ids.tolist(), folds.group.tolist(), strict=True))
    assert blend(runs, metric=METRICS["accuracy"], groups=groups, methods=("mean",)).marks == ["tuned"]


def test_a_file_of_someones_own_is_not_overwritten(tuning: Any) -> None:
    path = tuning.root / "experiments" / f"{TUNED}.yaml"
    tuning.write(tuning.project.spec(TUNED))
    before = path.read_bytes()
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(spec_of(tuning))
    assert str(caught.value) == (
        f"experiments/{TUNED}.yaml is where the winner goes, but it was not written by a study\n  fix: rename that file"
    )
    assert path.read_bytes() == before
    assert not tuning.path.exists(), "said before anything is trained"


def test_own_values_that_win_write_nothing(tuning: Any) -> None:
    space = {"optim.lr": {"choices": (1e-2, 1e-9)}}
    spec = tuning.spec(
        changes={"optim": {"lr": 1e-2}}, space=space, sampler="grid", trials=2, finalists=2, prune={"folds": False}
    )
    info, screen = tuning.run(spec)
    assert info is not None
    assert (info["tuned"], info["winner"]) == (None, {"optim.lr": 1e-2})
    assert info["finalists"][0]["score"] > info["finalists"][1]["score"]
    assert screen.events[-1].lines[-1] == (
        "  winner     the spec's own values: nothing better was found, so nothing was written"
    )
    assert not (tuning.root / "experiments").exists()
    assert [path.name for path in (tuning.root / "oof").iterdir()] == ["tiny"]


def test_no_finalists_name_no_winner(tuning: Any) -> None:
    info, screen = tuning.run(spec_of(tuning, trials=2, finalists=0))
    assert info is not None
    assert (info["winner"], info["tuned"], info["finalists"]) == (None, None, [])
    assert screen.events[-1].lines[-1] == "  winner     none is named, since `finalists: 0` runs none in full"
    assert not list(tuning.path.glob("*-full"))


def test_a_study_in_full_trains_its_finalists_no_second_time(tuning: Any) -> None:
    spec = spec_of(tuning, trials=3, fidelity={}, prune={"folds": False})
    info, screen = tuning.run(spec)
    assert info is not None
    assert len(trained(screen)) == 3 * 5 * 2
    assert {event.stage for event in trained(screen)} == {"search"}
    assert info["tuned"] == TUNED
    assert info["finalists"][0]["score"] == info["best"]["score"]
    run = load_run(tuning.root / "oof" / TUNED)
    for fold in range(5):
        of_trial = tuning.path / set_key(info["winner"]) / f"fold{fold}" / "seed42" / "weights.safetensors"
        assert of_trial.read_bytes() == (run.path / f"fold{fold}" / "seed42" / "weights.safetensors").read_bytes()


def test_another_winner_replaces_the_one_before(retuning: Any) -> None:
    """Here because the search went on; what the older one trained is no run of the newer file."""
    before = winner_of(retuning)
    retuning.run(spec_of(retuning), trials=7)
    after = winner_of(retuning)
    assert (before.tuned.trials, after.tuned.trials) == (6, 7)
    run = load_run(retuning.root / "oof" / TUNED)
    info = read_study(retuning.path).info
    assert run.info["score"] == info["finalists"][0]["score"]
    assert yaml.safe_load((run.path / "spec.yaml").read_text())["tuned"]["trials"] == 7


# Its figures ----------------------------------------------------------------------------------------------------------


def test_every_figure_can_be_computed_from_the_tables(tuned: Any) -> None:
    """By reading `trials.csv`, `scored.csv` and `folds.csv` as anyone would, with the formulas of `foldwise.stats`."""
    info = json.loads((tuned.path / "tune.json").read_text())
    trials = pd.read_csv(tuned.path / "trials.csv")
    scored = pd.read_csv(tuned.path / "scored.csv", dtype={"id": str})
    folds = pd.read_csv(tuned.root / "inputs" / "demo" / "folds.csv", dtype=str)
    folds = folds[folds["split"] == "0"].set_index("id")
    assert set(scored["id"]) == set(folds.index[folds["fold"].isin(["0", "1"])])
    assert (scored.set_index("id")["fold"].astype(str) == folds["fold"].loc[scored["id"]]).all()
    for row in trials.itertuples():
        hits = scored[f"t{row.number}"] == scored["label"]
        assert hits.mean() == row.score
        assert (hits[scored["fold"] == 0].mean(), hits[scored["fold"] == 1].mean()) == (row.fold_0, row.fold_1)
    assert info["trials"] == {"distinct": 6, "complete": 6, "pruned": 0, "failed": 0, "duplicate": 0}
    assert info["fold_trainings"] == {
        "done": int(trials[["fold_0", "fold_1"]].notna().sum().sum()),
        "possible": 12,
        "saved": 0.0,
    }
    best = trials.loc[trials["score"].idxmax()]
    assert (info["best"]["number"], info["best"]["score"]) == (best["number"], best["score"])
    assert info["best"]["standard_error"] == best["standard_error"]
    assert info["wall_s"] == pytest.approx(trials["wall_s"].sum())

    study = read_study(tuned.path)
    groups = folds["group"].loc[study.scored.ids].to_numpy()
    labels, metric = study.scored.labels, METRICS["accuracy"]
    predictions = {number: predictions_of(study.scored, number)[1] for number in study.scored.values}
    found = bias_corrected(metric, labels, list(predictions.values()), groups)
    for key in ("score", "standard_error", "low", "high", "naive", "chosen_among"):
        assert info["corrected"][key] == pytest.approx(getattr(found, key), abs=1e-9), key
    assert info["corrected"]["score"] < info["best"]["score"], "the best of six is partly luck"
    error = standard_error(metric, labels, predictions[int(best["number"])], groups)
    assert info["best"]["standard_error"] == pytest.approx(error)
    assert info["own"] == own_values(spec_of(tuned))
    assert info["inputs_sha256"] == load_run(tuned.root / "oof" / TUNED).info["hashes"]["inputs"]


def test_the_finalists_are_scored_on_every_image(tuned: Any) -> None:
    info = read_study(tuned.path).info
    scores = {}
    for told in info["finalists"]:
        folder = tuned.path / f"{set_key(told['parameters'])}-full"
        units = [pd.read_csv(folder / f"fold{fold}" / "seed42" / "val.csv", dtype={"id": str}) for fold in range(5)]
        hits = right(pd.concat(units))
        assert len(hits) == 80
        assert told["score"] == hits.mean()
        scores[told["number"]] = told["score"]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    best_two = pd.read_csv(tuned.path / "trials.csv").sort_values(["score", "number"], ascending=[False, True])[:2]
    assert set(scores) == set(best_two["number"])
    assert info["winner"] == info["finalists"][0]["parameters"]
    assert info["corrected_full"]["naive"] == info["finalists"][0]["score"]
    assert info["corrected_full"]["chosen_among"] == 2
    assert info["difference"] is None


def test_the_own_run_takes_part_and_the_second_split_confirms(
    retuning: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(retuning)
    retuning.write(spec)
    before = read_study(retuning.path).info
    assert summary(before)[-1] == "  next       make exp EXP=tiny, then this again: says what tuning gained"

    def call(*words: str) -> None:
        assert main(["--root", str(retuning.root), *words, "--track", "none"]) == 0

    call("exp", "tiny")
    info, screen = retuning.run(spec)
    assert info is not None
    assert trained(screen) == []
    own, found = (load_run(retuning.root / "oof" / name) for name in ("tiny", TUNED))
    assert [told["number"] for told in info["finalists"]].count(None) == 1
    assert info["corrected_full"]["chosen_among"] == 3
    table = {name: right(retuning.project.table(name, "oof.csv")) for name in ("tiny", TUNED)}
    gain = (table[TUNED].astype(int) - table["tiny"].astype(int).loc[table[TUNED].index]).mean()
    assert info["difference"]["gain"] == pytest.approx(gain)
    assert gain > 0
    rows = np.array([own.ids.tolist().index(name) for name in found.ids.tolist()])
    folds = read_folds(retuning.root / "inputs" / "demo" / "folds.csv")
    expected = paired_difference(
        METRICS["accuracy"], found.labels, found.probs, own.probs[rows], folds.groups_of(found.ids)
    )
    assert info["difference"]["low"] == pytest.approx(expected.low)
    plan = make_plan(retuning.root, spec)
    kept = own_run(plan)
    assert kept is not None
    assert kept.name == "tiny"
    for origin in ("inputs_sha256", "start_sha256", "guard_sha256"):
        assert own_run(replace(plan, context=replace(plan.context, **{origin: "0" * 64}))) is None
    assert info["second_split"] is None
    assert screen.events[-1].lines[-1] == (
        f"  next       make exp EXP=tiny SPLIT=1, make exp EXP={TUNED} SPLIT=1, then this again: confirms the gain on "
        "folds that chose nothing"
    )

    call("exp", "tiny", "--split", "1")
    info, _ = retuning.run(spec)
    assert info is not None
    assert info["second_split"] is None, "one of the two is missing"
    call("exp", TUNED, "--split", "1")
    info, screen = retuning.run(spec)
    assert info is not None
    assert trained(screen) == []
    table = {name: right(retuning.project.table(f"{name}.split1", "oof.csv")) for name in ("tiny", TUNED)}
    second = info["second_split"]
    assert (second["own"]["score"], second["tuned"]["score"]) == (table["tiny"].mean(), table[TUNED].mean())
    gain = (table[TUNED].astype(int) - table["tiny"].astype(int).loc[table[TUNED].index]).mean()
    assert second["difference"]["gain"] == pytest.approx(gain)
    assert any(line.startswith("  split 1    own ") for line in screen.events[-1].lines)
    capsys.readouterr()


def test_a_run_of_another_spec_under_the_experiments_name_takes_no_part(retuning: Any) -> None:
    retuning.project.run(retuning.project.spec("tiny", optim={"lr": 5e-3}))
    info, _ = retuning.run(spec_of(retuning))
    assert info is not None
    assert info["difference"] is None
    assert None not in [told["number"] for told in info["finalists"]]
