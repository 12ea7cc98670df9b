"""Folds hold each id once, keep groups whole, are stratified, and follow from ids and seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from foldwise.data.folds import Folds, SplitSpec, fold_faults, make_folds, natural_order, read_folds, write_folds
from foldwise.errors import DataError


@st.composite
def labelled(draw: st.DrawFn) -> tuple[list[str], np.ndarray, list[str]]:
    """Ids, labels and groups, with a few groups of two to four."""
    count = draw(st.integers(20, 120))
    labels = np.array(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), dtype=np.int64)
    ids = [str(number) for number in range(1, count + 1)]
    groups = list(ids)
    start = 0
    for size in draw(st.lists(st.integers(2, 4), max_size=5)):
        for row in range(start, min(start + size, count)):
            groups[row] = ids[start]
        start += size
    return ids, labels, groups


def counts(folds: Folds, labels_of: dict[str, int], fold: int, classes: int = 4) -> np.ndarray:
    return np.bincount([labels_of[image] for image in folds.ids[folds.fold == fold]], minlength=classes)


@given(labelled(), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=150)
def test_kfold_is_complete_grouped_stratified_and_balanced(
    drawn: tuple[list[str], np.ndarray, list[str]], folds: int, seed: int
) -> None:
    ids, labels, groups = drawn
    for split in make_folds(ids, labels, groups, SplitSpec(folds=folds, seed=seed, repeats=2)):
        assert split.ids.tolist() == ids
        assert split.group.tolist() == groups
        assert set(split.fold.tolist()) <= set(range(folds))
        for group in set(groups):
            assert len(set(split.fold[split.group == group])) == 1
        largest = max(groups.count(group) for group in set(groups))
        label_of = dict(zip(ids, labels.tolist(), strict=True))
        table = np.array([counts(split, label_of, fold) for fold in range(folds)])
        allowed = 1 if largest == 1 else largest
        assert np.ptp(table, axis=0).max() <= allowed
        assert np.ptp(table.sum(axis=1)) <= (1 if largest == 1 else 2 * largest)


@given(labelled(), st.randoms())
@settings(max_examples=30)
def test_rows_in_another_order_give_the_same_folds(drawn: tuple[list[str], np.ndarray, list[str]], random) -> None:
    ids, labels, groups = drawn
    rows = list(range(len(ids)))
    random.shuffle(rows)
    straight = make_folds(ids, labels, groups, SplitSpec())[0]
    shuffled = make_folds([ids[row] for row in rows], labels[rows], [groups[row] for row in rows], SplitSpec())[0]
    assert straight.sha256 == shuffled.sha256


def hundred() -> tuple[list[str], np.ndarray]:
    return [str(number) for number in range(1, 101)], np.arange(100) % 4


def test_seed_and_repeat_change_the_folds_and_nothing_else_does(tmp_path: Path) -> None:
    ids, labels = hundred()
    made = [make_folds(ids, labels, ids, SplitSpec(seed=seed, repeats=2)) for seed in (1, 1, 2)]
    for number, splits in enumerate(made):
        write_folds(tmp_path / f"{number}.csv", splits)
    first, again, other = ((tmp_path / f"{number}.csv").read_bytes() for number in range(3))
    assert first == again != other
    assert len({folds.sha256 for splits in made for folds in splits}) == 4
    alone = make_folds(ids, labels, ids, SplitSpec(seed=1))[0]
    assert alone.sha256 == made[0][0].sha256, "a second split must not change the first"


def test_folds_do_not_change_from_one_version_to_the_next() -> None:
    ids, labels = hundred()
    assert make_folds(ids, labels, ids, SplitSpec())[0].sha256[:16] == "b45ef3b7f09f5916"


def test_holdout_scores_its_share_of_every_class() -> None:
    ids, labels = hundred()
    groups = ["1" if image in ("1", "2", "3") else image for image in ids]
    split = make_folds(ids, labels, groups, SplitSpec(kind="holdout", share=0.2))[0]
    assert set(split.fold.tolist()) == {-1, 0}
    assert np.bincount(labels[split.fold == 0]).tolist() == [5, 5, 5, 5]
    assert len(set(split.fold[split.group == "1"])) == 1


def test_column_gives_train_val_and_a_labelled_test_part() -> None:
    spec = SplitSpec(kind="column", column="Usage", train=("Training",), val=("PublicTest",), test=("PrivateTest",))
    parts = ["PrivateTest", "Training", "PublicTest", "Training"]
    split = make_folds(["4", "3", "2", "1"], np.zeros(4, np.int64), ["4", "3", "2", "1"], spec, parts=parts)[0]
    assert dict(zip(split.ids.tolist(), split.fold.tolist(), strict=True)) == {"1": -1, "2": 0, "3": -1, "4": -2}


def test_full_trains_on_everything() -> None:
    ids, labels = hundred()
    assert set(make_folds(ids, labels, ids, SplitSpec(kind="full"))[0].fold.tolist()) == {-1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "kfold", "share": 0.1}, "`share` has no effect with `kind: kfold`"),
        ({"kind": "full", "folds": 5, "seed": 1}, "`folds`, `seed` has no effect with `kind: full`"),
        ({"kind": "column"}, "needs `train` and `val`"),
        ({"kind": "column", "train": ("a",), "val": ("a",)}, "'a' is given twice"),
    ],
)
def test_a_split_refuses_keys_that_do_nothing(given: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SplitSpec(**given)


def test_natural_order_counts_where_all_ids_are_numbers() -> None:
    assert natural_order(["10", "9", "1"]) == ["1", "9", "10"]
    assert natural_order(["10", "9", "a"]) == ["10", "9", "a"]


def test_round_trip_and_join_by_id(tmp_path: Path) -> None:
    ids, labels = hundred()
    groups = ["7" if image == "9" else image for image in ids]
    made = make_folds(ids, labels, groups, SplitSpec(repeats=2))
    write_folds(tmp_path / "folds.csv", made)
    for number, folds in enumerate(made):
        read = read_folds(tmp_path / "folds.csv", number)
        assert read.sha256 == folds.sha256
        assert read.of(["9", "7"]).tolist() == [folds.fold[8], folds.fold[6]]
        assert read.groups_of(["9", "8"]).tolist() == ["7", "8"]
    with pytest.raises(KeyError):
        read.of(["101"])
    write_folds(tmp_path / "one.csv", made[:1])
    assert (tmp_path / "one.csv").read_text().startswith("id,fold,group\n1,")
    assert (tmp_path / "folds.csv").read_text().startswith("id,fold,group,split\n1,")


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        (None, 0, "folds.csv: there is no such file\n  fix: ingest the competition: `make data`\n"),
        ("a,b\n", 0, "folds.csv:1: expected the header `id,fold,group` or `id,fold,group,split`, but got 'a,b'\n"),
        ("id,fold,group\n1,0,1\n", 1, "folds.csv: there is no split 1; splits here: 0\n"),
        ("id,fold,group\n1,x,1\n", 0, "folds.csv:2: expected `id,fold,group` with whole numbers, but got '1,x,1'\n"),
        ("id,fold,group\n1,0\n", 0, "folds.csv:2: expected `id,fold,group` with whole numbers, but got '1,0'\n"),
        ("id,fold,group\n1,0,1\n1,1,1\n", 0, "folds.csv:3: id '1' is in split 0 twice\n"),
        ("id,fold,group\n1,-3,1\n", 0, "folds.csv:2: a fold must be at least -2, but got -3\n"),
    ],
)
def test_a_broken_file_says_where(
    text: str | None, split: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("folds.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        read_folds(Path("folds.csv"), split)
    assert str(caught.value).startswith(message)


def test_folds_that_do_not_fit_say_what_to_do() -> None:
    ids, labels = hundred()
    folds = make_folds(ids, labels, ids, SplitSpec())[0]
    fix = "\n  fix: delete f.csv and run `make data` again to remake it, which makes earlier runs incomparable"

    def told(*args: object) -> list[str]:
        return [str(fault) for fault in fold_faults("f.csv", folds, *args)]  # type: ignore[arg-type]

    assert told(ids, SplitSpec()) == []
    assert told([*ids, "101", "102"], SplitSpec()) == [f"f.csv: 2 ids have a label but no fold, first '101'{fix}"]
    assert told(ids[1:], SplitSpec()) == [f"f.csv: 1 id has a fold but no label, first '1'{fix}"]
    assert told(ids, SplitSpec(folds=4)) == [
        f"f.csv: holds the folds 0, 1, 2, 3, 4, but competition.yaml asks for 0, 1, 2, 3{fix}"
    ]
    twin = next(image for image in ids if folds.of([image])[0] != folds.of(["1"])[0])
    groups = ["1" if image == twin else image for image in ids]
    at = folds.of(["1", twin])
    assert told(ids, SplitSpec(), groups) == [
        f"f.csv: near-duplicates '1' and {twin!r} are in folds {at[0]} and {at[1]}{fix}"
    ]
