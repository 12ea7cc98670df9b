"""Whether a classifier can tell the training images from the test images: if so, an OOF score need not carry over.

Adversarial validation with an exact permutation test, what differs most, and whether a kept run sees other classes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from foldwise.data.competition import CompetitionSpec, Dataset, competition_folder, load_dataset
from foldwise.data.duplicates import Pair, near_duplicates
from foldwise.data.duplicates import groups as chained
from foldwise.data.folds import SCORED_ONLY
from foldwise.errors import DataError, Fault
from foldwise.files import atomic_write, pretty_json
from foldwise.metrics import METRICS, Floats
from foldwise.records.store import Run, list_runs, read_probs, rows_of
from foldwise.show.plots import Tile, draw_gallery
from foldwise.stats import Z95

Bools = NDArray[np.bool_]

PICTURE, RECORD = "drift.png", "drift.json"
SHUFFLES = 999
ALPHA = 0.05
# With fewer images on a side even a large drift would go unseen.
LEAST = 10
# More images add seconds, and little: with so many an AUC above 0.522 counts already.
MOST_TRAIN, MOST_TEST = 4000, 2000
_FOLDS = 5
# One partition into folds moves an AUC by as much as its standard error; the mean over several is steadier.
_REPEATS = 5
# Below this a found drift is called faint; where no smaller AUC would show, not finding one says little.
_FAINT = _BLIND = 0.6
# Ridge penalty a training row, features being of unit variance; the looks have up to a few hundred features.
_PENALTY = 0.1
_COMPONENTS = 60
_GRID, _CELLS, _BINS = 24, 6, 8
_LEAST_SIDE = 16
_TILES = 12
_SHOWN = 5
_BLOCK_PIXELS = 1 << 24


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve of test images (positive) against training images; 0.5: cannot tell them apart.

    Attributes:
        value: Share of pairs in which the test image has the larger score, ties half.
        low: Lower end of its 95% interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.507 (0.471 to 0.543)`."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Look:
    """What a classifier makes of one set of features.

    Attributes:
        name: `together`, `pixels`, `statistics` or `files`.
        features: Their number.
        auc: Of its cross-validated scores.
        p: Of so large an AUC, were training and test images drawn alike; corrected for all looks.
    """

    name: str
    features: int
    auc: Auc
    p: float


@dataclass(frozen=True)
class Statistic:
    """One statistic of the images, or fact of their files.

    Attributes:
        name: What it is.
        train: Mean over the training images.
        test: Mean over the test images.
        auc: Of the statistic itself; above 0.5 where it is larger in test images.
        p: Of so large a difference either way, were they drawn alike; corrected for all statistics.
    """

    name: str
    train: float
    test: float
    auc: Auc
    p: float


@dataclass(frozen=True)
class Share:
    """How much of one class a run sees.

    Attributes:
        name: Of the class.
        labelled: Its share of the training labels.
        oof: Its mean out-of-fold probability.
        test: Its mean probability on the test images.
        low: Lower end of the 95% interval of `test - oof`.
        high: Upper end.
    """

    name: str
    labelled: float
    oof: float
    test: float
    low: float
    high: float


@dataclass(frozen=True)
class Seen:
    """What the best kept run predicts, out of fold and on the test images.

    Attributes:
        run: Its name.
        shares: A class each.
        p: Of so large differences of the shares, all classes in one, were both drawn alike.
        oof_confidence: Mean probability of the predicted class, out of fold.
        test_confidence: The same on the test images.
        low: Lower end of the 95% interval of its difference, test less OOF.
        high: Upper end.
        averaged: Models whose mean `test_confidence` is of, which lowers it; 1: it is of single models, as OOF is.
    """

    run: str
    shares: tuple[Share, ...]
    p: float
    oof_confidence: float
    test_confidence: float
    low: float
    high: float
    averaged: int


@dataclass(frozen=True, eq=False)
class Drift:
    """How training and test images of a competition differ.

    Attributes:
        competition: Its name.
        inputs_sha256: Of ids, labels and pixels.
        seed: Of sample, folds and shuffles.
        shuffles: Permutations behind each p-value.
        n_train: Training images that were looked at.
        n_test: Test images that were looked at.
        all_train: Training images there are; more than `n_train` where a sample was drawn.
        all_test: Test images there are.
        pairs: Near-duplicates among those looked at.
        across: Those of `pairs` between a training and a test image.
        looks: `together` first.
        critical: Least AUC of a look with p < 0.05.
        statistics: The most different first.
        constant: Statistics that are the same for all images.
        seen: What the best kept run predicts; None where there is none.
        notes: What could not be done, and why.
        tiles: Training images, then test images, that look most like test ones.
    """

    competition: str
    inputs_sha256: str
    seed: int
    shuffles: int
    n_train: int
    n_test: int
    all_train: int
    all_test: int
    pairs: int
    across: int
    looks: tuple[Look, ...]
    critical: float
    statistics: tuple[Statistic, ...]
    constant: tuple[str, ...]
    seen: Seen | None
    notes: tuple[str, ...]
    tiles: tuple[Tile, ...]

    @property
    def strongest(self) -> Look:
        """The look with the smallest p; of equals the one with the largest AUC."""
        return min(self.looks, key=lambda look: (look.p, -look.auc.value))

    @property
    def found(self) -> bool:
        """Whether some look tells training and test images apart."""
        return self.strongest.p < ALPHA


@dataclass(frozen=True, eq=False)
class Told:
    """What `tell_apart` found.

    Attributes:
        looks: In the order of the features.
        critical: Least AUC of a look with p < 0.05.
        likeness: (N,) of the first look: share of the training images of its fold with a smaller score, equal ones
            half; mean over the partitions.
    """

    looks: tuple[Look, ...]
    critical: float
    likeness: Floats


def drift(root: Path, competition: str, *, seed: int = 0) -> Drift:
    """Ask whether the training images of a competition can be told from its test images.

    Training images are the labelled ones; test images those that a submission predicts, and a split's labelled test
    part. Of many images a sample is looked at.

    Args:
        root: The project's root.
        competition: A folder under `inputs/`.
        seed: Of the sample, the folds and the shuffles.

    Raises:
        DataError: If the competition was not taken in, or has fewer than 10 distinct training or test images.
        SpecError: If its competition.yaml is faulty.
    """
    data = load_dataset(root, competition)
    train, test = _sides(data)
    rows = np.sort(
        np.concatenate([_sampled(train, MOST_TRAIN, [seed, 0]), _sampled(test, MOST_TEST, [seed, 1])]), kind="stable"
    )
    is_test = np.isin(rows, test)
    images = np.asarray(data.images[rows])
    pairs = near_duplicates(images, threshold=data.competition.near_duplicate)
    group = _groups(data, rows, pairs)
    sides = (("training", len(np.unique(group[~is_test]))), ("test", len(np.unique(group[is_test]))))
    if few := [(name, count) for name, count in sides if count < LEAST]:
        counted = " and ".join(f"{count or 'no'} {name} {'image' if count == 1 else 'images'}" for name, count in few)
        what = f"has {counted}, twins counted once; to tell training from test images takes {LEAST} of each"
        fix = "take in a hand-out with unlabelled images to predict, or a labelled test part (`split.test`)"
        raise DataError([Fault(f"inputs/{competition}", what, fix)])

    statistics = image_statistics(images)
    files = file_facts(competition_folder(root, competition) / "images", data.competition, data.ids[rows].tolist())
    pixels, both = pixel_features(images, seed=seed), statistics | files
    looks = {
        "together": np.hstack([pixels, _columns(statistics), _columns(files)]),
        "pixels": pixels,
        "statistics": _columns(statistics),
        "files": _columns(files),
    }
    # Where all files are alike, as those written from a table of pixels of one size may be, there is nothing to see.
    looks = {name: features for name, features in looks.items() if features.shape[1]}
    told = tell_apart(looks, is_test, group, seed=seed, shuffles=SHUFFLES)
    compared, constant = compare_statistics(both, is_test, group, seed=seed, shuffles=SHUFFLES)
    notes: list[str] = []
    seen = _seen(root, data, rows, is_test, group, seed, notes)
    ids, classes = data.ids[rows], ("training", "test")
    tiles = []
    for side in (~is_test, is_test):
        there = np.flatnonzero(side)
        likest = there[np.lexsort((there, -told.likeness[there]))][:_TILES]
        tiles += [
            Tile(images[row], str(ids[row]), f"{told.likeness[row]:.2f}", classes[int(is_test[row])], "like test")
            for row in likest.tolist()
        ]
    return Drift(
        competition=competition,
        inputs_sha256=data.sha256,
        seed=seed,
        shuffles=SHUFFLES,
        n_train=int((~is_test).sum()),
        n_test=int(is_test.sum()),
        all_train=len(train),
        all_test=len(test),
        pairs=len(pairs),
        across=sum(bool(is_test[pair.a] != is_test[pair.b]) for pair in pairs),
        looks=told.looks,
        critical=told.critical,
        statistics=compared,
        constant=constant,
        seen=seen,
        notes=tuple(notes),
        tiles=tuple(tiles),
    )


def tell_apart(
    looks: Mapping[str, Floats], test: Bools, group: NDArray[np.int64], *, seed: int = 0, shuffles: int = SHUFFLES
) -> Told:
    """Train a linear classifier of test against training images on each of several sets of features.

    Least squares on the labels with a ridge penalty, which is Fisher's discriminant, regularised (Hastie, Tibshirani
    and Friedman 2009, exercise 4.2), in 5 folds that keep groups whole and are drawn without a look at the labels, 5
    times. It takes all shuffles of the labels at once, so that the whole classifier judges each, in the same folds.
    Labels are shuffled between groups of one size: groups, whole, are exchangeable where there is no drift, whatever
    they are like, so the test is exact. The p-values are corrected by the largest AUC of each shuffle (Westfall and
    Young 1993, Resampling-Based Multiple Testing, section 2.6).

    Args:
        looks: (N, F) features by name; each of its own F.
        test: (N,) True for test images.
        group: (N,) images of one group fall into one fold.
        seed: Of folds and shuffles.
        shuffles: Permutations; the least p-value is 1 / (shuffles + 1).

    Returns:
        The looks with cross-validated AUCs: within folds, each weighted by its pairs.
    """
    fold = _folds(group, [seed, 2])
    labels = _shuffled(test, group, shuffles, [seed, 3])
    targets = labels.astype(np.float64)
    aucs, observed = np.zeros((len(looks), shuffles + 1)), np.zeros((len(looks), *fold.shape))
    for index, features in enumerate(looks.values()):
        scaled = StandardScaler().fit_transform(features)
        pairs = np.zeros(shuffles + 1)
        for repeat, number in np.ndindex(_REPEATS, _FOLDS):
            held = fold[repeat] == number
            model = Ridge(alpha=_PENALTY * int((~held).sum()), solver="cholesky")
            # Rounded, as equal rows must tie, whatever the order of the sums.
            predicted = model.fit(scaled[~held], targets[~held]).predict(scaled[held]).round(9)
            observed[index, repeat, held] = predicted[:, 0]
            won, weight = _pairs_won(predicted, labels[held])
            aucs[index] += won
            pairs += weight
        aucs[index] /= pairs
    largest = aucs[:, 1:].max(axis=0)
    p = _p_values(aucs[:, 0], largest)
    found = tuple(
        Look(
            name,
            features.shape[1],
            # Shuffled labels tell how much training on other images moves an AUC.
            auc_interval(scores, test, group, fold, least_error=float(shuffled.std(ddof=1))),
            float(value),
        )
        for (name, features), scores, shuffled, value in zip(looks.items(), observed, aucs[:, 1:], p, strict=True)
    )
    return Told(found, _critical(largest), _likeness(observed[0], test, fold))


def compare_statistics(
    statistics: Mapping[str, Floats],
    test: Bools,
    group: NDArray[np.int64],
    *,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> tuple[tuple[Statistic, ...], tuple[str, ...]]:
    """Compare statistics of training and test images one by one.

    Args:
        statistics: (N,) values by name.
        test: (N,) True for test images.
        group: (N,) images of one group are shuffled together.
        seed: Of the shuffles.
        shuffles: Permutations.

    Returns:
        Those that vary, the most different first, with p-values corrected for all of them as in `tell_apart`, and the
        names of those that do not.
    """
    varying = {name: values for name, values in statistics.items() if np.ptp(values) > 0}
    constant = tuple(name for name in statistics if name not in varying)
    if not varying:
        return (), constant
    labels = _shuffled(test, group, shuffles, [seed, 3]).astype(np.float64)
    ranks = np.stack([_midranks(values) for values in varying.values()])
    positive, negative = test.sum(), (~test).sum()
    # The rank sum, as of Mann and Whitney, is linear in the labels: all shuffles in one product.
    aucs = (ranks @ labels - positive * (positive + 1) / 2) / (positive * negative)
    distance = np.abs(aucs - 0.5)
    p = _p_values(distance[:, 0], distance[:, 1:].max(axis=0))
    whole = np.zeros((1, len(test)), dtype=np.int64)
    compared = [
        Statistic(
            name,
            float(values[~test].mean()),
            float(values[test].mean()),
            auc_interval(values[None], test, group, whole),
            float(value),
        )
        for (name, values), value in zip(varying.items(), p, strict=True)
    ]
    return tuple(sorted(compared, key=lambda one: -abs(one.auc.value - 0.5))), constant


def auc_interval(
    scores: Floats, test: Bools, group: NDArray[np.int64], fold: NDArray[np.int64], *, least_error: float = 0.0
) -> Auc:
    """Area under the ROC curve within folds, with a 95% interval that knows of groups.

    By the influence of each image (DeLong et al. 1988, Biometrics 44:837; of cross-validated scores: LeDell et al.
    2015, Electronic Journal of Statistics 9:1583), summed over groups (Obuchowski 1997, Biometrics 53:567). That is
    conditional on the trained classifiers, and too little where they learn next to nothing: there `least_error` counts.
    Where one side is wholly above the other no influence is left; so the interval is at least as wide as the exact one
    for m scores that all lie beyond.

    Args:
        scores: (R, N) of R partitions into folds, of any scale, which may differ between folds; the mean is taken.
        test: (N,) True for the positive ones.
        group: (N,) of near-duplicates; a group lies in one fold.
        fold: (R, N) only images of one fold are compared.
        least_error: The standard error is at least this.
    """
    place, size = np.zeros(scores.shape), np.zeros(scores.shape)
    for row, of_row in enumerate(fold):
        for number in np.unique(of_row):
            here = of_row == number
            place[row, here] = _placements(scores[row, here], test[here])
            size[row, here] = np.where(test[here], (~test[here]).sum(), test[here].sum())
    pairs = float(size[:, test].sum())
    value = float((place * size)[:, test].sum()) / pairs
    count = np.where(test, test.sum(), (~test).sum())
    influence = ((place - value) * size).sum(axis=0) / pairs * np.sqrt(count / (count - 1))
    half = Z95 * max(least_error, math.sqrt(float((_by_group(influence, group) ** 2).sum())))
    low, high = max(0.0, value - half), min(1.0, value + half)
    fewest = min(len(np.unique(group[test])), len(np.unique(group[~test])))
    # That all of m independent scores lie beyond the others has at most the probability AUC ** m.
    beyond = 0.025 ** (1 / fewest)
    if value > beyond:
        low = min(low, beyond)
    if value < 1 - beyond:
        high = max(high, 1 - beyond)
    return Auc(value, low, high)


def image_statistics(images: NDArray[np.uint8]) -> dict[str, Floats]:
    """Statistics of each image that a camera, a resize or another encoding would change.

    Noise is Immerkaer's estimate (1996, Computer Vision and Image Understanding 64:300); blockiness the ratio of steps
    across the borders of JPEG's blocks of 8 px to those elsewhere, on a log scale.

    Args:
        images: (N, H, W, C) uint8; may be memory-mapped.

    Returns:
        (N,) by name; in gray values from 0 to 255 where no other unit is told. Colours only with three channels.
    """
    parts = [_statistics_of(_at_least(block)) for block in _blocks(images)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pixel_features(images: NDArray[np.uint8], *, seed: int = 0) -> Floats:
    """What is where in each image: principal components of the pixels, and orientations of edges.

    The pixels are averaged down to 24 a side at most; the edges are those of Dalal and Triggs (2005, CVPR), as square
    roots of shares in 6 x 6 cells with 8 orientations.

    Args:
        images: (N, H, W, C) uint8; may be memory-mapped.
        seed: Of the randomised decomposition.

    Returns:
        (N, F) float64.
    """
    blocks = [_at_least(block) for block in _blocks(images)]
    small = np.concatenate([_small(block) for block in blocks])
    edges = np.concatenate([_edges(block) for block in blocks])
    components = max(1, min(_COMPONENTS, len(images) // 10, small.shape[1] - 1))
    if np.ptp(small, axis=0).any():
        small = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(small)
    return np.hstack([small, edges]).astype(np.float64)


def file_facts(folder: Path, spec: CompetitionSpec, ids: Sequence[str]) -> dict[str, Floats]:
    """What an image's file tells without its pixels.

    Args:
        folder: `inputs/<comp>/images`.
        spec: How ids become file names.
        ids: N ids.

    Returns:
        (N,) by name: size, height and width as handed out, channels, and the mean of JPEG's quantisation table (the
        coarser, the larger; 0 for other formats).
    """
    name_of = {spec.files.id_of(path.name): path for path in sorted(folder.iterdir())}
    rows = []
    for image in ids:
        raw = name_of[image].read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a file was told when it was taken in
            with Image.open(io.BytesIO(raw)) as opened:
                tables = getattr(opened, "quantization", None) or {0: [0]}
                table = next(iter(tables.values()))
                rows.append((len(raw), opened.height, opened.width, len(opened.getbands()), float(np.mean(table))))
    names = ("file size (bytes)", "height handed out", "width handed out", "channels", "JPEG quantisation")
    return dict(zip(names, np.array(rows, dtype=np.float64).T, strict=True))


def drift_lines(drift: Drift) -> list[str]:
    """What the terminal says of a drift, the verdict last."""
    lines = [f"{drift.competition}: {_counted(drift)}"]
    if drift.pairs:
        lines.append(
            f"{drift.pairs} pairs of near-duplicates stay together, {drift.across} of them across train and test"
        )
    lines += ["", f"{'look':<12}  {'AUC (95%)':<22}  {'p':<6}  features"]
    lines += [f"{look.name:<12}  {look.auc!s:<22}  {_p(look.p):<6}  {look.features:>8,}" for look in drift.looks]
    corrected = f", corrected for {len(drift.looks)} looks" if len(drift.looks) > 1 else ""
    lines.append(
        f"p by {drift.shuffles} shuffles of train and test{corrected}; only an AUC above {drift.critical:.3f} counts"
    )
    if shown := drift.statistics[:_SHOWN]:
        width = max(len("most different"), *(len(one.name) for one in shown))
        lines += ["", f"{'most different':<{width}}  {'train':>8}  {'test':>8}  {'AUC (95%)':<22}  p"]
        lines += [
            f"{one.name:<{width}}  {one.train:>8.4g}  {one.test:>8.4g}  {one.auc!s:<22}  {_p(one.p)}" for one in shown
        ]
        told = f"{len(shown)} of {len(drift.statistics)} statistics, for which p is corrected"
        lines.append(f"{told}; means, and the share of pairs in which the test image has more")
    if drift.constant:
        lines.append(f"the same for all images: {', '.join(drift.constant)}")
    if drift.seen:
        lines += ["", *_seen_lines(drift.seen)]
    lines += ["", *(f"note: {note}" for note in drift.notes), *_aligned("verdict", _verdict(drift))]
    return lines


def write_drift(drift: Drift, root: Path) -> tuple[Path, Path]:
    """Write what was found beside the competition's files; the same findings give the same bytes.

        drift.json    all figures, to six digits
        drift.png     the images that look most like test ones         shows the competition's images: not for git

    Args:
        drift: As found.
        root: The project's root; the files go to `inputs/<comp>`.

    Returns:
        The two files.
    """
    folder = competition_folder(root, drift.competition)
    content: dict[str, Any] = {"schema_version": 1, "verdict": _verdict(drift)}
    content |= {key: value for key, value in asdict(drift).items() if key != "tiles"}
    atomic_write(folder / RECORD, pretty_json(_rounded(content)))
    together = drift.looks[0]
    told = "it can tell them apart" if together.p < ALPHA else "it cannot tell them apart: this is mostly noise"
    note = (
        f"First {_TILES} training, then {_TILES} test images at most. Id (share of the training images that look less "
        f"like test images), by all features together: AUC {together.auc}, p = {_p(together.p)}; {told}."
    )
    draw_gallery(folder / PICTURE, drift.tiles, title=f"{drift.competition}: most like test images", note=note)
    return folder / RECORD, folder / PICTURE


def _sides(data: Dataset) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the training and of the test images."""
    scored_only = data.folds.ids[data.folds.fold == SCORED_ONLY]
    wanted = data.competition.submission_ids
    predicted = data.labels < 0
    if wanted is not None:
        predicted = predicted & np.isin(data.ids, wanted)
    test = predicted | np.isin(data.ids, scored_only)
    return np.flatnonzero((data.labels >= 0) & ~test), np.flatnonzero(test)


def _sampled(rows: NDArray[np.intp], most: int, seed: Sequence[int]) -> NDArray[np.intp]:
    if len(rows) <= most:
        return rows
    return np.random.default_rng(seed).choice(rows, most, replace=False)


def _groups(data: Dataset, rows: NDArray[np.intp], pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """(n,) groups of the rows: those of folds.csv, joined by the near-duplicates among the rows."""
    first_of: dict[str, int] = {}
    known = dict(zip(data.folds.ids.tolist(), data.folds.group.tolist(), strict=True))
    edges = list(pairs)
    for place, image in enumerate(data.ids[rows].tolist()):
        first = first_of.setdefault(known.get(image, image), place)
        if first != place:
            edges.append(Pair(first, place, 1.0))
    return chained(len(rows), edges)


def _folds(group: NDArray[np.int64], seed: Sequence[int]) -> NDArray[np.int64]:
    """(R, n) folds, groups whole, without a look at the labels: else the true ones would be unlike shuffled ones."""
    _, member = np.unique(group, return_inverse=True)
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(int(member.max()) + 1)[member] % _FOLDS for _ in range(_REPEATS)])


def _shuffled(test: Bools, group: NDArray[np.int64], shuffles: int, seed: Sequence[int]) -> Bools:
    """(n, shuffles + 1) labels: the true ones, then those with the groups of each size shuffled, each group whole."""
    labels = np.repeat(test[:, None], shuffles + 1, axis=1)
    rng = np.random.default_rng(seed)
    _, member, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = np.argsort(member, kind="stable")
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes):
        # (groups, size) rows of the images of each group of this size.
        rows = order[starts[sizes == size][:, None] + np.arange(size)]
        for shuffle in range(1, shuffles + 1):
            labels[rows, shuffle] = test[rows[rng.permutation(len(rows))]]
    return labels


def _pairs_won(scores: Floats, labels: Bools) -> tuple[Floats, Floats]:
    """Pairs of a test and a training image that the test image wins, and all such pairs; for each of (n, B) columns."""
    positive, negative = labels.sum(axis=0), (~labels).sum(axis=0)
    ranks = np.stack([_midranks(column) for column in np.ascontiguousarray(scores.T)])
    won = np.einsum("bn,nb->b", ranks, labels) - positive * (positive + 1) / 2
    return won, (positive * negative).astype(np.float64)


def _midranks(values: Floats) -> Floats:
    """(n,) ranks from 1; equal values share the mean of theirs."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def _placements(scores: Floats, test: Bools) -> Floats:
    """(n,) of a test image the share of training images below it, of a training image that of test images above it."""
    places = np.zeros(len(scores))
    places[test] = _below(scores[~test], scores[test])
    places[~test] = _below(-scores[test], -scores[~test])
    return places


def _likeness(scores: Floats, test: Bools, fold: NDArray[np.int64]) -> Floats:
    """(n,) share of the training images of an image's fold that have a smaller score; (R, n) scores and folds."""
    shares = np.zeros(scores.shape)
    for row, of_row in enumerate(fold):
        for number in np.unique(of_row):
            here = of_row == number
            shares[row, here] = _below(scores[row, here & ~test], scores[row, here])
    mean: Floats = shares.mean(axis=0)
    return mean


def _below(others: Floats, scores: Floats) -> Floats:
    """(n,) share of (m,) others that are smaller than each score, equal ones half; 0 where there are none."""
    ordered = np.sort(others)
    twice = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    shares: Floats = twice / (2 * max(1, len(others)))
    return shares


def _p_values(observed: Floats, shuffled: Floats) -> Floats:
    """(n,) p-values of (n,) figures by the (B,) largest of each shuffle; the observed one counts as a shuffle too."""
    as_large: Floats = (shuffled >= observed[:, None] - 1e-12).sum(axis=1) + 1.0
    return as_large / (len(shuffled) + 1)


def _critical(shuffled: Floats) -> float:
    """The figure above which `_p_values` gives less than ALPHA."""
    allowed = math.ceil(ALPHA * (len(shuffled) + 1)) - 2  # shuffles that may be as large
    return float(np.sort(shuffled)[::-1][max(0, allowed)])


def _by_group(values: Floats, group: NDArray[np.int64]) -> Floats:
    """Sums over groups, (G,) or (G, C)."""
    _, member = np.unique(group, return_inverse=True)
    sums = np.zeros((int(member.max()) + 1, *values.shape[1:]))
    np.add.at(sums, member, values)
    return sums


def _columns(statistics: Mapping[str, Floats]) -> Floats:
    """(N, F) features of the statistics that vary: each, and its distance from the middle, for both ends at once."""
    columns = []
    for values in statistics.values():
        if np.ptp(values) > 0:
            middle = np.median(values)
            columns += [values, np.abs(values - middle)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(next(iter(statistics.values()))), 0))


def _blocks(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The images in blocks that bound the memory their float copies take."""
    step = max(1, _BLOCK_PIXELS // math.prod(images.shape[1:]))
    return [images[start : start + step] for start in range(0, len(images), step)]


def _at_least(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images, their pixels repeated where a side is too short for cells and blocks."""
    for axis in (1, 2):
        images = images.repeat(-(-_LEAST_SIDE // images.shape[axis]), axis=axis)
    return images


def _statistics_of(images: NDArray[np.uint8]) -> dict[str, Floats]:
    gray = images.mean(axis=-1, dtype=np.float64)
    count, height, width = gray.shape
    flat = gray.reshape(count, -1)
    inner = gray[:, 1:-1, 1:-1]
    beside = gray[:, :-2, 1:-1] + gray[:, 2:, 1:-1] + gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:]
    corners = gray[:, :-2, :-2] + gray[:, :-2, 2:] + gray[:, 2:, :-2] + gray[:, 2:, 2:]
    laplacian, immerkaer = beside - 4 * inner, corners - 2 * beside + 4 * inner
    middle = gray[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    # Steps below half a gray value are rounding; they keep the ratio finite.
    down = np.abs(np.diff(gray, axis=1)).mean(axis=2) + 0.5
    across = np.abs(np.diff(gray, axis=2)).mean(axis=1) + 0.5
    blocks = [
        np.log(steps[:, border].mean(axis=1) / steps[:, ~border].mean(axis=1))
        for steps in (down, across)
        for border in [np.arange(steps.shape[1]) % 8 == 7]
    ]
    half_height, half_width = height // 2, width // 2
    statistics = {
        "brightness": flat.mean(axis=1),
        "contrast": flat.std(axis=1),
        "sharpness": np.log1p(laplacian.reshape(count, -1).var(axis=1)),
        "noise": math.sqrt(math.pi / 2) / 6 * np.abs(immerkaer).mean(axis=(1, 2)),
        "blockiness": np.mean(blocks, axis=0),
        "share of black": (flat <= 5).mean(axis=1),
        "share of white": (flat >= 250).mean(axis=1),
        "gray levels": np.array([len(np.unique(row)) for row in flat.astype(np.uint8)], dtype=np.float64),
        "right less left": gray[:, :, -half_width:].mean(axis=(1, 2)) - gray[:, :, :half_width].mean(axis=(1, 2)),
        "bottom less top": gray[:, -half_height:].mean(axis=(1, 2)) - gray[:, :half_height].mean(axis=(1, 2)),
        "middle less edge": middle.mean(axis=(1, 2)) - flat.mean(axis=1),
    }
    if images.shape[-1] == 3:
        red, green, blue = (images[..., band].mean(axis=(1, 2), dtype=np.float64) for band in range(3))
        spread = images.max(axis=-1).astype(np.float64) - images.min(axis=-1)
        statistics |= {
            "red less green": red - green,
            "blue less green": blue - green,
            "colourfulness": spread.mean(axis=(1, 2)),
        }
    return statistics


def _small(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    count, height, width, channels = images.shape
    tall, wide = -(-height // _GRID), -(-width // _GRID)
    cut = images[:, : height // tall * tall, : width // wide * wide]
    boxes = cut.reshape(count, height // tall, tall, width // wide, wide, channels)
    averaged: NDArray[np.float32] = boxes.mean(axis=(2, 4), dtype=np.float32)
    return averaged.reshape(count, -1)


def _edges(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    gray = images.mean(axis=-1, dtype=np.float32)
    count, height, width = gray.shape
    down, across = np.gradient(gray, axis=(1, 2))
    strength = np.hypot(down, across)
    angle = (np.arctan2(down, across) % np.pi / np.pi * _BINS).astype(np.int64) % _BINS
    tall, wide = height // _CELLS, width // _CELLS
    cells = np.zeros((count, _CELLS, _CELLS, _BINS), dtype=np.float32)
    for number in range(_BINS):
        of_bin = np.where(angle == number, strength, 0)[:, : tall * _CELLS, : wide * _CELLS]
        cells[..., number] = of_bin.reshape(count, _CELLS, tall, _CELLS, wide).mean(axis=(2, 4))
    shares: NDArray[np.float32] = np.sqrt(cells / np.maximum(cells.sum(axis=(1, 2, 3), keepdims=True), 1e-6))
    return shares.reshape(count, -1)


def _seen(
    root: Path,
    data: Dataset,
    rows: NDArray[np.intp],
    test: Bools,
    group: NDArray[np.int64],
    seed: int,
    notes: list[str],
) -> Seen | None:
    """What the best kept run predicts for the rows; None and a note where there is no such run.

    Mean probabilities are compared, not counts of predicted classes: `test.csv` averages the models of all folds, which
    leaves mean probabilities what they are, while it makes counts lean to the frequent classes.
    """
    runs, _ = list_runs(root, data.competition.name)
    ids = data.ids[rows]
    fitting = [
        run
        for run in runs
        if run.info["hashes"]["inputs"] == data.sha256 and set(ids[test].tolist()) <= set(run.test_ids.tolist())
    ]
    if not fitting:
        notes.append("no complete k-fold run of these images: nothing is said of the classes on the test images")
        return None
    metric = METRICS[data.competition.metric]
    run = max(fitting, key=lambda run: metric.sign * run.info["score"])
    of_train, of_test = rows_of(run.ids, ids[~test]), rows_of(run.test_ids, ids[test])
    probs = np.zeros((len(rows), len(run.classes)))
    probs[~test], probs[test] = run.probs[of_train], run.test_probs[of_test]
    labels = _shuffled(test, group, SHUFFLES, [seed, 4]).astype(np.float64)
    # (C, shuffles + 1) differences of the mean probabilities; their common covariance treats the true ones like the
    # shuffled ones, so that the test is exact.
    gaps = (probs.T @ labels) / labels.sum(axis=0) - (probs.T @ (1 - labels)) / (1 - labels).sum(axis=0)
    distance = np.einsum("cb,cd,db->b", gaps, np.linalg.pinv(np.cov(gaps), rcond=1e-9, hermitian=True), gaps)
    errors = _difference_errors(probs, test, group)
    oof, there = probs[~test].mean(axis=0), probs[test].mean(axis=0)
    truth = np.bincount(run.labels[of_train], minlength=len(run.classes)) / len(of_train)
    confidence = probs.max(axis=1)
    single = _confidence_of_folds(run)
    if single is not None:
        confidence[test] = single[of_test]
    oof_confidence, test_confidence = float(confidence[~test].mean()), float(confidence[test].mean())
    half = Z95 * float(_difference_errors(confidence[:, None], test, group)[0])
    gap = test_confidence - oof_confidence
    return Seen(
        run=run.name,
        shares=tuple(
            Share(name, float(a), float(b), float(c), float(c - b - Z95 * error), float(c - b + Z95 * error))
            for name, a, b, c, error in zip(run.classes, truth, oof, there, errors, strict=True)
        ),
        p=float(_p_values(distance[:1], distance[1:])[0]),
        oof_confidence=oof_confidence,
        test_confidence=test_confidence,
        low=gap - half,
        high=gap + half,
        averaged=1 if single is not None else len(run.info["fold_scores"]),
    )


def _difference_errors(values: Floats, test: Bools, group: NDArray[np.int64]) -> Floats:
    """(C,) standard errors of the differences of test and training means of (n, C) values, groups drawn whole."""
    influence = np.zeros(values.shape)
    for side, sign in ((test, 1), (~test, -1)):
        count = int(side.sum())
        influence[side] = sign * (values[side] - values[side].mean(axis=0)) / math.sqrt(count * (count - 1))
    errors: Floats = np.sqrt((_by_group(influence, group) ** 2).sum(axis=0))
    return errors


def _confidence_of_folds(run: Run) -> Floats | None:
    """(T,) mean confidence of the folds' own models on the test images; None where their files are not those kept.

    A fold's seeds are averaged first, as in `oof.csv`.
    """
    by_fold: dict[str, list[Floats]] = {}
    try:
        for path in sorted(run.path.glob("fold*/seed*/test.csv")):
            (ids,), probs = read_probs(path, ("id",), run.classes)
            by_fold.setdefault(path.parts[-3], []).append(probs[rows_of(ids, run.test_ids)])
    except (ValueError, KeyError, OSError):
        return None
    folds = [np.mean(seeds, axis=0) for seeds in by_fold.values()]
    if len(folds) != len(run.info["fold_scores"]) or not np.allclose(np.mean(folds, axis=0), run.test_probs, atol=1e-5):
        return None
    confidence: Floats = np.mean([probs.max(axis=1) for probs in folds], axis=0)
    return confidence


def _seen_lines(seen: Seen) -> list[str]:
    width = max(len("class"), *(len(share.name) for share in seen.shares))
    lines = [f"what {seen.run} sees: mean probability of each class, and the 95% interval of the difference"]
    lines.append(f"{'class':<{width}}  labelled     OOF    test  test less OOF")
    lines += [
        f"{share.name:<{width}}  {share.labelled:8.3f}  {share.oof:6.3f}  {share.test:6.3f}  "
        f"{share.test - share.oof:+.3f} ({share.low:+.3f} to {share.high:+.3f})"
        for share in seen.shares
    ]
    which = "differ" if seen.p < ALPHA else "do not differ more than by chance"
    lines.append(f"all classes in one: the shares {which}, p = {_p(seen.p)}")
    gap = seen.test_confidence - seen.oof_confidence
    told = f"confidence: {seen.oof_confidence:.3f} OOF, {seen.test_confidence:.3f} on test"
    lines.append(f"{told}: {gap:+.3f} ({seen.low:+.3f} to {seen.high:+.3f})")
    if seen.averaged > 1:
        lines.append(
            f"  test.csv is the mean of {seen.averaged} models, which lowers it: being lower alone is no sign of drift"
        )
    return lines


def _verdict(drift: Drift) -> list[str]:
    """What it comes to, what follows, and what else differs."""
    strongest, together = drift.strongest, drift.looks[0]
    if not drift.found:
        lines = [f"cannot tell test from training images: AUC {together.auc}, p = {_p(together.p)}"]
        lines.append(
            "nothing seen here speaks against OOF scores holding for test images"
            if drift.critical <= _BLIND
            else f"but so few images show only a drift with an AUC above {drift.critical:.2f}"
        )
    else:
        how = "can just tell" if strongest.auc.value < _FAINT else "can tell"
        by = "all features together" if strongest.name == "together" else strongest.name
        lines = [f"{how} test from training images, by {by}: AUC {strongest.auc}, p = {_p(strongest.p)}"]
        lines.append("OOF scores may not carry over")
        lines += [
            f"{one.name}: {one.train:.4g} in training images, {one.test:.4g} in test images, p = {_p(one.p)}"
            for one in drift.statistics[:_SHOWN]
            if one.p < ALPHA
        ]
    if drift.seen and drift.seen.p < ALPHA:
        lines.append(f"{drift.seen.run} sees other shares of the classes in test images, p = {_p(drift.seen.p)}")
    return lines


def _counted(drift: Drift) -> str:
    parts = []
    for looked, there, name in (
        (drift.n_train, drift.all_train, "training"),
        (drift.n_test, drift.all_test, "test"),
    ):
        sampled = f" (of {there:,}, drawn with seed {drift.seed})" if looked < there else ""
        parts.append(f"{looked:,} {name} images{sampled}")
    return " against ".join(parts)


def _aligned(word: str, lines: Sequence[str]) -> list[str]:
    """The lines in a column of their own, the word before the first."""
    return [f"{word if number == 0 else '':<{len(word)}}  {line}" for number, line in enumerate(lines)]


def _p(value: float) -> str:
    """A p-value as all lines show it: the shuffles give three digits."""
    return f"{value:.3f}"


def _rounded(value: Any) -> Any:
    """Plain JSON with floats to four digits, as sums differ in the last ones from machine to machine."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
