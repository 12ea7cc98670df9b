"""The page of a comparison: its figures are those of the kept files, and a real browser shows them without a network.

Runs are of the demo competition, with drawn probabilities in place of training.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binom, norm

from foldwise.data.competition import load_dataset
from foldwise.metrics import METRICS
from foldwise.records.compare import Comparison, Group, Missed, Neighbours, Row
from foldwise.records.store import Run, rows_of
from foldwise.show.page import MOST_PICTURES, page_data, write_page
from foldwise.stats import bias_corrected, paired_difference, wilson

EVIL = "</script><img src=x onerror=window.hacked=1><b>&amp;"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def write_history(path, index, epochs=4):
    rng = np.random.default_rng(index)
    rows = [
        {"fold": fold, "seed": 42, "epoch": e, "lr": 0.1, "val_loss": rng.random(), "val_accuracy": rng.random()}
        for fold in range(3)
        for e in range(1, epochs + 1 + fold)
    ]
    path.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(path / "history.csv", index=False)


def make_run(root, index, name, data, classes):
    """A run of the demo that was never trained, its rows in an order of its own."""
    rng = np.random.default_rng(index)
    rows = rng.permutation(np.flatnonzero(data.labels >= 0))
    labels = data.labels[rows]
    shared = np.random.default_rng(100).normal(0, 1.5, (len(data.labels), len(classes)))[rows]
    logits = rng.normal(size=(len(rows), len(classes))) + shared
    logits[np.arange(len(rows)), labels] += 2.2 - 0.3 * index
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    path = root / "oof" / f"run{index}"
    write_history(path, index)
    fold = np.zeros(len(rows), dtype=np.int64)
    info = {"hashes": {"inputs": data.sha256}}
    return Run(name, path, info, classes, data.ids[rows], fold, labels, probs, data.ids[:0], probs[:0])


def compared(runs, title="3 folds", metric=METRICS["accuracy"]):
    """Runs side by side: figures that the page takes over as they are may be anything."""
    runs = sorted(runs, key=lambda run: -metric.sign * metric.score(run.labels, run.probs))
    first, classes = runs[0], runs[0].classes
    probs = [run.probs[rows_of(run.ids, first.ids)] for run in runs]
    predicted = np.stack([each.argmax(axis=1) for each in probs])
    rows = [
        Row(
            run=run,
            spec={"name": run.name, "optim": {"lr": 0.1 * (place + 1)}, "seeds": [42], "model": {"arch": "same"}},
            score=metric.score(run.labels, run.probs),
            standard_error=0.01 + place / 1000,
            folds=3,
            seeds=1 + place % 2,
            seed_std=0.004 if place % 2 else None,
            tta_gain=0.002 - place / 1000,
            tta_error=None if place == 1 else 0.003,
            parameters=None if place == 1 else [900, 0, 12_000, 1_100_000, 47, 300_000][place % 6],
            wall_s=[50.0, 4000.0, 300.0, 7.0, 100.0, 90.0][place % 6],
            device="cpu",
            marks=("tuned",) if place == 2 else (),
            track="competition data only",
            recall=np.array(
                [(predicted[place] == first.labels)[first.labels == c].mean() for c in range(len(classes))]
            ),
            told_from_best=None if place == 0 else 0.01 * place,
        )
        for place, run in enumerate(runs)
    ]
    neighbours = [
        Neighbours(a.name, b.name, paired_difference(metric, first.labels, p, q, first.ids), 0.0004 * n, 0.02 * n)
        for n, (a, b, p, q) in enumerate(zip(runs, runs[1:], probs, probs[1:], strict=False), start=1)
    ]
    wrong = np.flatnonzero((predicted != first.labels).all(axis=0)).tolist() if metric.hard else []
    missed = [
        Missed(str(first.ids[k]), classes[first.labels[k]], tuple(classes[c] for c in predicted[:, k])) for k in wrong
    ]
    count = len(runs)
    gain = np.random.default_rng(1).normal(0, 0.01, (count, count))
    return Group(
        title=title,
        classes=classes,
        metric=metric.name,
        n_scored=len(first.ids),
        rows=tuple(rows),
        neighbours=tuple(neighbours),
        best=bias_corrected(metric, first.labels, probs, first.ids) if count > 1 else None,
        disagreement=(predicted[:, None] != predicted).mean(axis=-1),
        pair_gain=(gain + gain.T) / 2,
        pair_gain_error=np.full((count, count), 0.005),
        missed=tuple(missed),
    )


@pytest.fixture
def runs(root):
    data = load_dataset(root, "demo")
    classes = (*data.competition.classes[:-1], EVIL)
    names = ["cnn_small", "resnet18", EVIL, "vit_small48", "a_name_that_is_so_long_" * 4, "mlp"]
    return [make_run(root, index, name, data, classes) for index, name in enumerate(names)]


@pytest.fixture
def comparison(runs):
    return Comparison("demo", (compared(runs),), ("half: fold 2 is missing",))


def data_of(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(text)


def near(values):
    return pytest.approx(np.asarray(values, dtype=float), abs=1e-6, nan_ok=True)


def floats(values):
    return np.array(values, dtype=float)


def test_the_page_holds_the_figures_of_the_comparison(comparison, root):
    path = write_page(comparison, root / "oof" / "compare.html", root=root)
    data, group = data_of(path), comparison.groups[0]
    (shown,) = data["groups"]
    assert (data["competition"], shown["metric"], data["left_out"]) == ("demo", "accuracy", ["half: fold 2 is missing"])
    for run, row in zip(shown["runs"], group.rows, strict=True):
        for key in ("name", "seeds", "seed_std", "parameters", "wall_s", "told_from_best", "track", "device"):
            assert run[key] == getattr(row, key)
        assert [run["score"], run["standard_error"], run["tta_gain"]] == near(
            [row.score, row.standard_error, row.tta_gain]
        )
        assert floats(run["recall"]) == near(row.recall)
    for pair, neighbours in zip(shown["neighbours"], group.neighbours, strict=True):
        assert (pair["better"], pair["worse"]) == (neighbours.better, neighbours.worse)
        assert [pair["p"], pair["p_corrected"]] == near([neighbours.p, neighbours.p_corrected])
        assert [pair["gain"], pair["low"], pair["high"]] == near(
            [neighbours.difference.gain, neighbours.difference.low, neighbours.difference.high]
        )
    off = ~np.eye(len(group.rows), dtype=bool)
    for key in ("disagreement", "pair_gain", "pair_gain_error"):
        assert floats(shown[key])[off] == near(getattr(group, key)[off])
    assert shown["best"]["score"] == near(group.best.score)
    assert sorted((m["id"], m["label"], tuple(m["predicted"])) for m in shown["missed"]) == sorted(
        (m.id, m.label, m.predicted) for m in group.missed
    )
    share = len(group.missed) / group.n_scored
    low, high = wilson(np.array([len(group.missed)]), np.array([group.n_scored]))[0]
    assert shown["missed_share"] == near([share, low, high])
    assert shown["runs"][1]["spec"] == {"optim.lr": "0.2", "seeds": "[42]", "model.arch": "same"}


def test_differences_of_any_two_runs_are_paired_over_near_duplicates(comparison, root):
    group, data = comparison.groups[0], load_dataset(root, "demo")
    (shown,) = page_data(comparison, root=root, pictures=False)["groups"]
    first = group.rows[0].run
    groups = data.folds.groups_of(first.ids.tolist())
    a, b = (group.rows[k].run for k in (1, 4))
    p, q = (run.probs[rows_of(run.ids, first.ids)] for run in (a, b))
    expected = paired_difference(METRICS["accuracy"], first.labels, p, q, groups)
    differences = shown["differences"]
    found = [differences[key][1][4] for key in ("gain", "standard_error", "low", "high")]
    assert found == near([expected.gain, expected.standard_error, expected.low, expected.high])
    assert differences["gain"][4][1] == near(-expected.gain)
    both = [np.bincount(np.unique(groups, return_inverse=True)[1], each.argmax(1) == first.labels) for each in (p, q)]
    fewer, more = sorted([(both[0] > both[1]).sum(), (both[0] < both[1]).sum()])
    tail = binom(fewer + more, 0.5)
    assert differences["p"][1][4] == differences["p"][4][1] == near(2 * tail.cdf(fewer) - tail.pmf(fewer))

    of_class = first.labels == 2
    names, member = np.unique(groups[of_class], return_inverse=True)
    right = [(each.argmax(axis=1) == first.labels)[of_class].astype(float) for each in (p, q)]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(3000):
        weight = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))[member]
        drawn.append(np.average(right[0], weights=weight) - np.average(right[1], weights=weight))
    assert shown["recall_difference_error"][2][1][4] == pytest.approx(np.std(drawn), rel=0.1)


def test_classes_that_tell_two_runs_apart_by_no_image_have_no_error(comparison, root):
    group = comparison.groups[0]
    run = group.rows[0].run
    never = run.probs * (np.arange(7) != 3)
    same = [replace(row, run=replace(run, name=row.name, probs=never)) for row in group.rows[:2]]
    alike = replace(group, rows=(*same, *group.rows[2:]))
    (shown,) = page_data(Comparison("demo", (alike,), ()), root=root, pictures=False)["groups"]
    errors = np.array(shown["recall_difference_error"], dtype=float)
    assert np.isnan(errors[:, 0, 1]).all()
    assert (errors[3, 0, 2:] > 0).all()


def test_losses_are_better_when_smaller_and_count_no_misses(runs, root):
    group = compared(runs, metric=METRICS["log_loss"])
    (shown,) = page_data(Comparison("demo", (group,), ()), root=root, pictures=True)["groups"]
    assert [panel["key"] for panel in shown["panels"]] == ["val_loss"]
    assert shown["missed_share"] is None
    best, worst = shown["runs"][0]["score"], shown["runs"][-1]["score"]
    gain, error, p = (shown["differences"][key][0][-1] for key in ("gain", "standard_error", "p"))
    assert gain == near(worst - best)
    assert gain > 0
    assert p == pytest.approx(2 * norm.sf(gain / error), abs=1e-5)


def test_the_order_of_rows_in_the_files_is_of_no_consequence(comparison, root):
    group = comparison.groups[0]
    run = group.rows[3].run
    turned = np.arange(len(run.ids))[::-1]
    other = replace(run, ids=run.ids[turned], labels=run.labels[turned], probs=run.probs[turned])
    rows = tuple(replace(row, run=other) if row.run is run else row for row in group.rows)
    before, after = (
        page_data(Comparison("demo", (each,), ()), root=root, pictures=False)["groups"]
        for each in (group, replace(group, rows=rows))
    )
    assert before == after


def test_curves_are_mean_and_spread_of_the_epochs_that_all_units_reached(comparison, root):
    data = page_data(comparison, root=root, pictures=False)
    assert [panel["key"] for panel in data["groups"][0]["panels"]] == ["val_accuracy", "val_loss"]
    row = comparison.groups[0].rows[2]
    history = pd.read_csv(row.run.path / "history.csv")
    by_epoch = history[history["epoch"] <= 4].groupby("epoch")["val_accuracy"]
    curve = data["groups"][0]["runs"][2]["curves"]["val_accuracy"]
    assert (curve["epoch"], curve["units"]) == ([1, 2, 3, 4], 3)
    assert curve["mean"] == near(by_epoch.mean())
    assert curve["sd"] == near(by_epoch.std())


def test_a_run_without_its_history_has_no_curves_and_that_is_said(comparison, root):
    row = comparison.groups[0].rows[1]
    (row.run.path / "history.csv").unlink()
    data = page_data(comparison, root=root, pictures=False)
    assert data["groups"][0]["runs"][1]["curves"] is None
    (note,) = data["notes"]
    assert note.startswith(f"{row.name} has no curves: ")
    assert "history.csv: is missing" in note


def test_pictures_are_the_images_and_the_most_agreed_mistakes_come_first(comparison, root):
    data = load_dataset(root, "demo")
    missed = page_data(comparison, root=root, pictures=True)["groups"][0]["missed"]
    assert missed
    agreed = [max(Counter(image["predicted"]).values()) for image in missed]
    assert agreed == sorted(agreed, reverse=True)
    for image in missed[:MOST_PICTURES]:
        png = base64.b64decode(image["picture"].removeprefix("data:image/png;base64,"))
        original = data.images[rows_of(data.ids, np.array([image["id"]]))[0]]
        assert (np.asarray(Image.open(io.BytesIO(png))).reshape(original.shape) == original).all()


def test_there_are_at_most_so_many_pictures(comparison, root, monkeypatch):
    monkeypatch.setattr("foldwise.show.page.MOST_PICTURES", 2)
    missed = page_data(comparison, root=root, pictures=True)["groups"][0]["missed"]
    assert [image["picture"] is not None for image in missed] == [True, True] + [False] * (len(missed) - 2)


def test_why_there_are_no_pictures_is_said(comparison, root):
    def note(pictures=True):
        data = page_data(comparison, root=root, pictures=pictures)
        assert all(image["picture"] is None for image in data["groups"][0]["missed"])
        return data["pictures_note"]

    assert note(pictures=False) == "Pictures are left out, as was asked for."
    hashes = comparison.groups[0].rows[1].run.info["hashes"]
    hashes["inputs"] = "0" * 64
    assert note() == "There are no pictures: the images or labels of demo are not those of the runs."
    (root / "inputs" / "demo" / "train.csv").unlink()
    assert note().startswith("There are no pictures: ")
    assert "train.csv: is missing" in note()


def test_only_the_scripts_of_the_page_may_run_and_nothing_loads(comparison, root):
    text = write_page(comparison, root / "compare.html", root=root).read_text("utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts]
    assert len(scripts) == 2
    assert policy.startswith(f"default-src 'none'; script-src {' '.join(hashes)}; ")
    assert text.count("</script") == 3
    assert "<img" not in text


def test_a_comparison_of_nothing_is_no_page(root):
    with pytest.raises(ValueError, match="a page needs a group of runs"):
        write_page(Comparison("demo", (), ()), root / "compare.html", root=root)
    assert not (root / "compare.html").exists()


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("FOLDWISE_REQUIRE_CHROMIUM"):
            pytest.fail("FOLDWISE_REQUIRE_CHROMIUM is set, but there is no chromium")
        pytest.skip("there is no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, root, comparison):
    """Opens the page of a comparison; at the end it must have asked for nothing else, and told no error."""
    seen = SimpleNamespace(requests=[], errors=[])
    contexts = []

    def route(request):
        if request.request.url.startswith("file:"):
            request.continue_()
        else:
            request.abort()

    def opens(shown=comparison, width=1400, scheme="light"):
        path = write_page(shown, root / "oof" / "compare.html", root=root)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda line: seen.errors.append(line.text) if line.type in ("error", "warning") else None)
        page.route("**/*", route)
        page.goto(path.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg", state="attached")
        return page

    yield opens
    for context in contexts:
        context.close()
    assert seen.errors == []
    assert {url for url in seen.requests if not url.startswith("data:")} == {(root / "oof" / "compare.html").as_uri()}


def column(page, index, rows="#g0-runs tbody tr:not([hidden])"):
    return page.eval_on_selector_all(rows, f"rows => rows.map(row => row.cells[{index}].innerText.trim())")


def heads(page):
    return page.eval_on_selector_all("#g0-runs thead th", "cells => cells.map(cell => cell.innerText.trim())")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.mark.slow
def test_everything_is_drawn_and_names_are_text(opened, comparison):
    page = opened()
    plots = "els => els.map(el => [el.data.length, el.clientWidth > 200])"
    assert page.eval_on_selector_all(".js-plotly-plot", plots) == [[12, True]] * 2 + [[1, True]] * 3
    assert page.evaluate("window.hacked") is None
    names = [row.name for row in comparison.groups[0].rows]
    assert column(page, 1) == names
    place = names.index(EVIL)
    assert f"{place + 1} {EVIL}" in page.locator("#g0-two option").all_inner_texts()
    # Plotly takes a little HTML: the name must come through it as it is.
    page.evaluate(
        f"Plotly.Fx.hover(document.querySelector('#g0-curves .plot'), [{{curveNumber: {6 + place}, pointNumber: 1}}])"
    )
    assert page.locator("#g0-curves .hoverlayer").first.text_content().startswith(EVIL)
    ticks = page.locator("#g0-recall .xtick text").all_text_contents()
    assert ticks[:-1] == list(comparison.groups[0].classes[:-1])
    assert ticks[-1].startswith("</script>")
    assert page.locator("#g0-missed img").count() == min(MOST_PICTURES, len(comparison.groups[0].missed))
    assert all(page.eval_on_selector_all("#g0-missed img", "images => images.map(image => image.naturalWidth == 48)"))
    page.locator("#g0-missed summary").click()
    page.wait_for_selector("#g0-missed tbody tr")
    assert page.locator("#g0-missed tbody tr").count() == len(comparison.groups[0].missed)


@pytest.mark.slow
def test_a_click_or_a_key_sorts_by_number_and_leaves_what_is_unknown_last(opened, comparison):
    page = opened()
    rows = comparison.groups[0].rows
    titles = heads(page)
    which = titles.index("Parameters")
    button = page.locator("#g0-runs thead button", has_text="Parameters")
    known = sorted((row for row in rows if row.parameters is not None), key=lambda row: row.parameters)
    unknown = [row.name for row in rows if row.parameters is None]
    button.click()
    assert column(page, 1) == [row.name for row in reversed(known)] + unknown
    button.focus()
    page.keyboard.press("Enter")
    assert column(page, 1) == [row.name for row in known] + unknown
    order = page.eval_on_selector_all("#g0-runs thead th", "cells => cells.map(cell => cell.ariaSort)")
    assert order == ["ascending" if index == which else None for index in range(len(titles))]
    # Gains below zero: their order as text is another.
    by_gain = [row.name for row in sorted(rows, key=lambda row: -row.tta_gain)]
    page.locator("#g0-runs thead button", has_text="TTA gain").click()
    assert column(page, 1) == by_gain
    page.locator("#g0-runs thead button", has_text="TTA gain").click()
    assert column(page, 1) == by_gain[::-1]
    page.locator("#g0-runs thead button", has_text="Run").click()
    assert column(page, 1) != [row.name for row in known] + unknown
    assert set(column(page, 1)) == {row.name for row in rows}
    page.get_by_placeholder("Filter").fill("SMALL")
    assert sorted(column(page, 1)) == ["cnn_small", "vit_small48"]
    assert page.locator("#g0-runs [role=status]").inner_text() == "2 of 6 runs"


@pytest.mark.slow
def test_two_runs_show_how_their_specs_scores_and_recalls_differ(opened, comparison, root):
    page = opened()
    (shown,) = page_data(comparison, root=root, pictures=False)["groups"]
    first, second = page.locator("#g0-two select").all()
    first.select_option("1")
    second.select_option("4")
    spec, recall = page.locator("#g0-two table").all()
    assert spec.locator("tbody tr").all_inner_texts() == ["optim.lr\t0.2\t0.5"]
    differences = shown["differences"]
    told = page.locator("#g0-two p").first.inner_text()
    gain, error, low, high = (differences[key][1][4] for key in ("gain", "standard_error", "low", "high"))
    assert f"{gain:.4f} ± {error:.4f} better (difference 95% {low:+.4f} to {high:+.4f})" in told.replace("\u2212", "-")
    runs, errors = shown["runs"], shown["recall_difference_error"]
    cells = [row.split("\t")[-1].replace("\u2212", "-") for row in recall.locator("tbody tr").all_inner_texts()]
    assert cells == [
        f"{runs[1]['recall'][c] - runs[4]['recall'][c]:+.3f} ± {errors[c][1][4]:.3f}" for c in range(len(cells))
    ]
    first.select_option("4")
    assert "Pick two different runs." in page.locator("#g0-two").inner_text()


@pytest.mark.slow
def test_the_theme_follows_the_system_and_the_button_turns_it(opened):
    page = opened(scheme="dark")

    def colours():
        plot = "getComputedStyle(document.querySelector('.xtick text')).fill"
        return page.evaluate(f"[getComputedStyle(document.body).backgroundColor, {plot}]")

    dark = colours()
    page.get_by_role("button", name="Light theme").click()
    light = colours()
    assert [sum(map(int, re.findall(r"\d+", each)[:3])) > 384 for each in dark + light] == [False, True, True, False]
    page.get_by_role("button", name="Dark theme").click()
    assert colours() == dark


@pytest.mark.slow
def test_curves_are_chosen_by_their_boxes(opened):
    page = opened()
    traces = "els => els.map(el => el.data.length)"
    page.locator("#g0-curves input").nth(2).uncheck()
    assert page.eval_on_selector_all("#g0-curves .plot", traces) == [10, 10]
    page.get_by_role("button", name="None").click()
    assert page.eval_on_selector_all("#g0-curves .plot", traces) == [0, 0]
    assert page.locator("#g0-curves").get_by_text("no run is chosen").count() == 2
    page.get_by_role("button", name="All", exact=True).click()
    assert page.eval_on_selector_all("#g0-curves .plot", traces) == [12, 12]


@pytest.mark.slow
def test_a_narrow_page_never_scrolls_sideways(opened):
    fits = "[...document.querySelectorAll('.plot')].every(el => el.layout.width <= el.clientWidth)"
    page = opened(width=390)
    assert page.evaluate(fits)
    assert overflow(page) <= 0
    page.set_viewport_size({"width": 320, "height": 600})
    # The page's policy forbids `wait_for_function`, which evaluates text in it.
    for _ in range(100):
        if page.evaluate(fits):
            break
        page.wait_for_timeout(50)
    assert page.evaluate(fits)
    assert overflow(page) <= 0


@pytest.mark.slow
def test_many_runs_and_one_alone(opened, runs):
    many = [replace(runs[k % 6], name=f"{runs[k % 6].name[:20]}_{k}") for k in range(42)]
    groups = compared(many), compared(runs[:1], title="second split")
    page = opened(Comparison("demo", groups, ()), width=390)
    assert overflow(page) <= 0
    assert page.locator("#g0-curves input:checked").count() == 6
    assert page.locator("#g1 .card h3").all_inner_texts() == ["Runs", "Learning curves", "Recall of each class"]
    assert page.locator("main > nav a").all_inner_texts() == ["3 folds (42)", "second split (1)"]
