"""What pruning would have saved in a recorded study, and how often it would have lost the best trial.

The trials are complete already, so a thousand orders of them under any rule cost seconds and train nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldwise.data.competition import competition_folder
from foldwise.data.folds import read_folds
from foldwise.errors import FoldwiseError
from foldwise.metrics import METRICS, Floats, Labels, Metric
from foldwise.records.store import shown
from foldwise.records.study import predictions_of, read_study
from foldwise.runs.judge import decide
from foldwise.stats import bootstrap, wilson

ERROR_RATES = (0.01, 0.05, 0.1, 0.2)

# Optuna's own defaults.
_MEDIAN_STARTUP_TRIALS = 5
_WILCOXON_LEVEL = 0.1
_WILCOXON_STARTUP_FOLDS = 2

# (trial, look, complete trials so far, best of them) -> whether to prune.
_Rule = Callable[[int, int, list[int], int], bool]


@dataclass(frozen=True)
class Replay:
    """A recorded study played again in random orders under one pruning rule.

    Attributes:
        rule: Its name.
        saved: Share of all trainings of a fold that were not needed, mean over orders.
        saved_error: Standard error of `saved` over orders.
        winner_pruned: Share of orders in which the trial with the best full score was pruned.
        winner_low: Lower end of its 95% Wilson interval over orders.
        winner_high: Upper end of it.
        regret: By how much the full score of the trial that was chosen is worse than the best one, mean over orders.
        trials: Complete trials.
        folds: Folds of each.
        orders: Orders played.
    """

    rule: str
    saved: float
    saved_error: float
    winner_pruned: float
    winner_low: float
    winner_high: float
    regret: float
    trials: int
    folds: int
    orders: int


def replay(
    metric: Metric,
    labels: Labels,
    groups: NDArray[Any],
    fold: NDArray[np.int64],
    predictions: Sequence[Floats],
    *,
    error_rate: float,
    seed_sd: float,
    orders: int = 1000,
    seed: int = 0,
) -> Replay:
    """Play complete trials again in random orders, judged after each fold against the best complete one so far.

    A study in which trials were pruned holds too few of the bad ones: record one without pruning. The figures are
    conditional on the trials, which a sampler that learns proposed in one order: in another it would have proposed
    others.

    Args:
        metric: The competition's.
        labels: (N,) class indices.
        groups: (N,) names or numbers; images of one group are drawn together.
        fold: (N,) folds, trained in the order of their numbers.
        predictions: At least two arrays of (N, C) probabilities, one a complete trial.
        error_rate: Of the judge.
        seed_sd: Of the judge.
        orders: Random orders.
        seed: Of the orders; the same seed gives the same figures.

    Returns:
        What was saved, and what it cost.

    Raises:
        ValueError: If there are fewer than two trials or folds.
    """
    recorded = _Recorded(metric, labels, groups, fold, predictions)
    return _play(f"judge {error_rate:g}", recorded, _judged(recorded, error_rate, seed_sd), orders, seed)


def compare_rules(
    metric: Metric,
    labels: Labels,
    groups: NDArray[Any],
    fold: NDArray[np.int64],
    predictions: Sequence[Floats],
    *,
    seed_sd: float,
    error_rates: Sequence[float] = ERROR_RATES,
    orders: int = 1000,
    seed: int = 0,
) -> list[Replay]:
    """`replay` at several error rates, and under two rules that see only scores.

    `median` is Optuna's MedianPruner, told the score on all folds done. `wilcoxon` is its WilcoxonPruner, told each
    fold's score: a signed-rank test, whose least possible p after n folds is 1/2^n. Both at Optuna's defaults.

    Args:
        metric: The competition's.
        labels: (N,) class indices.
        groups: (N,) names or numbers; images of one group are drawn together.
        fold: (N,) folds, trained in the order of their numbers.
        predictions: At least two arrays of (N, C) probabilities, one a complete trial.
        seed_sd: Of the judge.
        error_rates: Of the judge.
        orders: Random orders, the same for all rules.
        seed: Of the orders.

    Returns:
        A replay a rule: the judge's in the order of `error_rates`, then `median` and `wilcoxon`.

    Raises:
        ValueError: If there are fewer than two trials or folds.
    """
    recorded = _Recorded(metric, labels, groups, fold, predictions)
    rules = {f"judge {rate:g}": _judged(recorded, rate, seed_sd) for rate in error_rates}
    rules |= {"median": _median(recorded), "wilcoxon": _wilcoxon(recorded)}
    return [_play(name, recorded, rule, orders, seed) for name, rule in rules.items()]


def replay_study(root: Path, competition: str, path: Path) -> list[str]:
    """The table of `compare_rules` for a kept study.

    Args:
        root: The project's root.
        competition: The study's.
        path: `oof/<exp>/tune`.

    Returns:
        Lines for the user.

    Raises:
        RecordError: If there is no finished study.
        FoldwiseError: If it holds too little to play again.
    """
    study = read_study(path)
    scored = study.scored
    complete = [trial.number for trial in study.trials if trial.state == "complete"]
    folds = len(np.unique(scored.fold))
    if len(complete) < 3 or folds < 2:
        raise FoldwiseError(
            f"{shown(path)} holds {len(complete)} complete trials of {folds} folds: too little to play again\n"
            '  fix: a study without pruning: make tune EXP=<exp> SET="tune.prune.folds=false" FRESH=1'
        )
    groups = read_folds(competition_folder(root, competition) / "folds.csv").groups_of(scored.ids)
    predictions = [predictions_of(scored, number)[1] for number in complete]
    seed_sd = study.info["seed_sd"]
    pruned = sum(trial.state == "pruned" for trial in study.trials)
    moved = "by an unknown amount, taken as 0" if seed_sd is None else f"by {seed_sd:.4f} beyond its images"
    lines = [
        f"{len(complete)} complete trials of {study.info['experiment']} in 1,000 random orders; "
        f"seeds move a fold's score {moved}"
    ]
    if pruned:
        lines.append(f"{pruned} pruned trials are left out, so that less is saved here than was in the study")
    rules = compare_rules(
        METRICS[scored.metric], scored.labels, groups, scored.fold, predictions, seed_sd=seed_sd or 0.0
    )
    return lines + render(rules)


def render(replays: Sequence[Replay]) -> list[str]:
    """Replays as the lines of a table, a rule a line."""
    lines = [f"{'rule':<12}{'trainings saved':>18}{'best trial pruned':>26}{'regret':>10}"]
    for one in replays:
        saved = f"{one.saved:.1%} +- {one.saved_error:.1%}"
        pruned = f"{one.winner_pruned:.1%} ({one.winner_low:.1%} to {one.winner_high:.1%})"
        lines.append(f"{one.rule:<12}{saved:>18}{pruned:>26}{one.regret:>10.5f}")
    return lines


class _Recorded:
    """What the rules need to know of the complete trials; scores are signed, so that greater is better.

    Attributes:
        folds: Number of folds, K.
        trials: Number of trials, P.
        by_fold: (P, K) score of each fold.
        so_far: (P, K) score on the first folds together; the last column is the full score.
        errors: For each look (P, P) paired standard errors of the gain of one trial over another.
    """

    def __init__(
        self,
        metric: Metric,
        labels: Labels,
        groups: NDArray[Any],
        fold: NDArray[np.int64],
        predictions: Sequence[Floats],
    ) -> None:
        numbers = np.unique(fold).tolist()
        self.folds, self.trials = len(numbers), len(predictions)
        if self.folds < 2 or self.trials < 2:
            what = "a replay needs two complete trials of two folds"
            raise ValueError(f"{what}, but got (trials={self.trials}, folds={self.folds})")

        def scores(rows: NDArray[np.bool_]) -> list[float]:
            return [metric.sign * metric.score(labels[rows], probs[rows]) for probs in predictions]

        done = [np.isin(fold, numbers[:look]) for look in range(1, self.folds + 1)]
        self.by_fold = np.array([scores(fold == number) for number in numbers]).T
        self.so_far = np.array([scores(rows) for rows in done]).T
        self.errors: list[NDArray[np.float64]] = []
        for rows in done[:-1]:
            # The draws depend on nothing but the groups, so that all pairs share what the judge draws for each.
            drawn = bootstrap(metric, labels[rows], [probs[rows] for probs in predictions], groups[rows])
            self.errors.append(
                np.stack([(drawn - drawn[:, [best]]).std(axis=0, ddof=1) for best in range(self.trials)], axis=1)
            )


def _judged(recorded: _Recorded, error_rate: float, seed_sd: float) -> _Rule:
    pruned = np.zeros((recorded.folds, recorded.trials, recorded.trials), dtype=bool)
    for look in range(1, recorded.folds):
        score, errors = recorded.so_far[:, look - 1], recorded.errors[look - 1]
        for trial, best in product(range(recorded.trials), repeat=2):
            verdict = decide(
                float(score[trial] - score[best]),
                float(errors[trial, best]),
                look=look,
                looks=recorded.folds,
                error_rate=error_rate,
                seed_sd=seed_sd,
            )
            pruned[look, trial, best] = verdict.prune
    return lambda trial, look, _, best: bool(pruned[look, trial, best])


def _median(recorded: _Recorded) -> _Rule:
    def rule(trial: int, look: int, complete: list[int], _: int) -> bool:
        if len(complete) < _MEDIAN_STARTUP_TRIALS:
            return False
        others = recorded.so_far[complete, look - 1]
        return bool(recorded.so_far[trial, :look].max() < np.median(others))

    return rule


def _wilcoxon(recorded: _Recorded) -> _Rule:
    means = recorded.by_fold.mean(axis=1)
    pruned = np.zeros((recorded.folds, recorded.trials, recorded.trials), dtype=bool)
    for look in range(_WILCOXON_STARTUP_FOLDS, recorded.folds):
        first = recorded.by_fold[:, :look]
        for trial in range(recorded.trials):
            ahead = first[trial].mean() >= means
            pruned[look, trial] = (_signed_rank(first[trial] - first) < _WILCOXON_LEVEL) & ~ahead
    return lambda trial, look, _, best: bool(pruned[look, trial, best])


def _signed_rank(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """One-sided exact p values of Wilcoxon's signed-rank test (1945, Biometrics Bulletin 1:80), small when negative.

    Args:
        differences: (P, n), n small: all 2^n patterns of signs are enumerated. A zero's rank is split in two halves.

    Returns:
        (P,) chance of a rank sum of positive differences that is as small or smaller.
    """
    size = np.abs(differences)
    below = (size[:, :, None] > size[:, None, :]).sum(axis=2)
    equal = (size[:, :, None] == size[:, None, :]).sum(axis=2)
    rank = below + (equal + 1) / 2
    split = np.where(differences == 0, rank / 2, 0).sum(axis=1)
    signed = np.where(differences == 0, 0, rank)
    observed = (signed * (differences > 0)).sum(axis=1) + split
    patterns = np.array(list(product((0, 1), repeat=differences.shape[1])))
    possible = signed @ patterns.T + split[:, None]
    share: NDArray[np.float64] = (possible <= observed[:, None]).mean(axis=1)
    return share


def _play(name: str, recorded: _Recorded, rule: _Rule, orders: int, seed: int) -> Replay:
    full = recorded.so_far[:, -1]
    rng = np.random.default_rng(seed)
    saved, regret = np.zeros(orders), np.zeros(orders)
    for index in range(orders):
        complete: list[int] = []
        best = -1
        for trial in rng.permutation(recorded.trials).tolist():
            # The first trial has nothing to be compared with.
            looks = range(1, recorded.folds) if complete else range(0)
            stopped = next((look for look in looks if rule(trial, look, complete, best)), None)
            if stopped is not None:
                saved[index] += recorded.folds - stopped
                continue
            complete.append(trial)
            if best < 0 or full[trial] > full[best]:
                best = trial
        regret[index] = full.max() - full[best]
    saved /= recorded.trials * recorded.folds
    lost = int((regret > 0).sum())
    low, high = wilson(np.array([lost]), np.array([orders]))[0].tolist()
    return Replay(
        rule=name,
        saved=float(saved.mean()),
        saved_error=float(saved.std(ddof=1)) / sqrt(orders) if orders > 1 else 0.0,
        winner_pruned=lost / orders,
        winner_low=low,
        winner_high=high,
        regret=float(regret.mean()),
        trials=recorded.trials,
        folds=recorded.folds,
        orders=orders,
    )
