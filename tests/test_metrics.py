"""Metrics against scikit-learn, and the tables against counting by hand.

Weights are checked against rows that are given several times.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from foldwise.metrics import LOG_LOSS_EPS, METRICS, confusion_matrix, per_class_table, per_image


def sklearn_score(name, labels, probs, weights):
    predicted = probs.argmax(axis=1)
    classes = np.arange(probs.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if name == "accuracy":
            return accuracy_score(labels, predicted, sample_weight=weights)
        if name == "macro_f1":
            return f1_score(labels, predicted, average="macro", sample_weight=weights, zero_division=0)
        if name == "balanced_accuracy":
            return balanced_accuracy_score(labels, predicted, sample_weight=weights)
        return log_loss(labels, probs, sample_weight=weights, labels=classes)


def draw(seed, rows, classes, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * sharpness
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return rng.integers(0, classes, rows), probs, rng


@pytest.mark.parametrize("name", METRICS)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), classes=st.integers(2, 8), weighted=st.booleans())
def test_scores_are_those_of_scikit_learn(name, seed, rows, classes, weighted):
    labels, probs, rng = draw(seed, rows, classes)
    weights = rng.uniform(0.1, 3, rows) if weighted else None
    assert METRICS[name].score(labels, probs, weights) == pytest.approx(
        sklearn_score(name, labels, probs, weights), abs=1e-12
    )


@pytest.mark.parametrize("name", METRICS)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 30))
def test_an_integer_weight_is_a_repeated_row(name, seed, rows):
    labels, probs, rng = draw(seed, rows, 5)
    weights = rng.integers(0, 4, rows)
    weights[0] = 1
    metric = METRICS[name]
    repeated = np.repeat(np.arange(rows), weights)
    assert metric.score(labels, probs, weights.astype(float)) == pytest.approx(
        metric.score(labels[repeated], probs[repeated]), abs=1e-12
    )


def test_accuracy_is_exactly_the_share_of_right_rows():
    labels, probs, _ = draw(3, 2_700, 7)
    assert METRICS["accuracy"].score(labels, probs) == (probs.argmax(axis=1) == labels).mean()


def test_equal_probabilities_predict_the_lower_class():
    probs = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert METRICS["accuracy"].score(np.array([0, 1]), probs) == 0.5
    assert METRICS["macro_f1"].score(np.array([0, 0]), probs) == 1.0


def test_log_loss_of_an_impossible_label_is_finite():
    loss = METRICS["log_loss"].score(np.array([1]), np.array([[1.0, 0.0]]))
    assert loss == pytest.approx(-np.log(LOG_LOSS_EPS))


@pytest.mark.parametrize("name", METRICS)
def test_no_images_have_no_score(name):
    metric = METRICS[name]
    with pytest.raises(ValueError, match=f"cannot score `{name}` on no images"):
        metric.score(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="on no images"):
        metric.score(np.zeros(2, dtype=np.int64), np.full((2, 3), 1 / 3), np.zeros(2))


@pytest.mark.parametrize("name", ["accuracy", "log_loss"])
def test_per_image_figures_have_the_score_as_their_mean(name):
    labels, probs, _ = draw(5, 200, 6)
    assert per_image(name, labels, probs).mean() == pytest.approx(METRICS[name].score(labels, probs), abs=1e-12)


def test_per_image_refuses_what_is_no_mean_over_images():
    with pytest.raises(ValueError, match=r"got \(name='macro_f1'\)"):
        per_image("macro_f1", np.array([0]), np.array([[1.0, 0.0]]))


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), classes=st.integers(2, 8))
def test_confusion_matrix_is_that_of_scikit_learn(seed, rows, classes):
    labels, probs, _ = draw(seed, rows, classes)
    counts = confusion_matrix(labels, probs)
    expected = sklearn_confusion_matrix(labels, probs.argmax(axis=1), labels=np.arange(classes))
    assert counts.dtype == np.int64
    assert np.array_equal(counts, expected)


def test_per_class_table_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    probs = np.eye(3)[[0, 0, 1, 1, 0]]
    assert per_class_table(labels, probs, ["cat", "dog", "eel"]) == [
        {"class": "cat", "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3},
        {"class": "dog", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        {"class": "eel", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]
