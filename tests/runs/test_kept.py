"""The models of a kept run give its OOF rows again, and are loaded only as `run.json` vouches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.torch

from foldwise.data.competition import load_dataset
from foldwise.errors import RecordError
from foldwise.files import sha256_file
from foldwise.learn.device import pick_runtime
from foldwise.records.store import load_run, rows_of, train_again
from foldwise.runs.kept import kept_models

RUNTIME = pick_runtime("cpu", "fp32", 1)


def test_each_fold_gives_its_oof_rows_again(kept: Any) -> None:
    run, data = load_run(kept.path()), load_dataset(kept.root, "demo")
    for model in kept_models(run, RUNTIME):
        mine = run.fold == model.fold
        images = data.images[rows_of(data.ids, run.ids[mine])]
        np.testing.assert_allclose(model.probabilities(images), run.probs[mine], atol=1e-5)
        assert (model.classes, model.channels, model.seed) == (data.competition.classes, 1, 42)


def test_some_folds_alone(kept: Any) -> None:
    assert [model.fold for model in kept_models(load_run(kept.path()), RUNTIME, folds=(1, 3))] == [1, 3]


def test_other_weights_are_refused(resumable: Any) -> None:
    run = load_run(resumable.path())
    path = resumable.path() / "fold1" / "seed42" / "weights.safetensors"
    path.write_bytes((resumable.path() / "fold0" / "seed42" / "weights.safetensors").read_bytes())
    with pytest.raises(RecordError) as caught:
        list(kept_models(run, RUNTIME))
    assert str(caught.value).splitlines()[:2] == [
        "oof/tiny/fold1/seed42/weights.safetensors: is not the file that run.json vouches for",
        "  fix: make exp EXP=tiny FRESH=1",
    ]
    path.unlink()
    with pytest.raises(RecordError) as caught:
        list(kept_models(run, RUNTIME))
    assert str(caught.value).splitlines()[:2] == [
        "oof/tiny: its weights are not on this machine: fold1/seed42",
        "  fix: fetch them: make weights FROM=<folder>, or train it here: make exp EXP=tiny FRESH=1",
    ]


@pytest.mark.parametrize(
    ("name", "command", "again"),
    [
        ("tiny", "python run.py exp tiny", "make exp EXP=tiny FRESH=1"),
        ("tiny.split1", "python run.py exp tiny --split 1", "make exp EXP=tiny SPLIT=1 FRESH=1"),
        (
            "tiny_sqrt",
            "python run.py exp tiny --name tiny_sqrt --set sampler=sqrt",
            "python run.py exp tiny --name tiny_sqrt --set sampler=sqrt --fresh",
        ),
    ],
)
def test_a_run_is_trained_anew_by_what_trained_it(name: str, command: str, again: str) -> None:
    assert train_again(name, {"command": command}) == again


def test_weights_that_do_not_say_what_they_are_of_are_refused(resumable: Any) -> None:
    run = load_run(resumable.path())
    path = resumable.path() / "fold0" / "seed42" / "weights.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    run.info["weights"]["fold0/seed42"] = sha256_file(path)
    with pytest.raises(RecordError, match="oof/tiny/fold0/seed42: was written by an older version, and does not say"):
        next(kept_models(run, RUNTIME))
