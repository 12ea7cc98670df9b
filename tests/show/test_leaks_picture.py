"""The table and the picture of the leak guard: every figure is that of what was kept, and nothing is cut off."""

from __future__ import annotations

import csv
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text

from foldwise.data.competition import load_dataset
from foldwise.data.leaks import Likeness
from foldwise.errors import DataError
from foldwise.show.leaks import Leaks, draw_leaks, leak_lines, leaks


@pytest.fixture
def drawn(root):
    """The demo, and 60 of its images under names of their own, with similarities that were never measured."""
    demo = load_dataset(root, "demo")
    rng = np.random.default_rng(3)
    similarity = np.concatenate(
        [
            [0.0, 0.84, 0.8499, 0.85, 0.86, 0.899, 0.92, 0.99, 1.0],
            rng.uniform(0.93, 0.949, 14),
            rng.uniform(0.4, 0.79, 37),
        ]
    )
    source = replace(
        demo,
        competition=demo.competition.model_copy(update={"name": "elsewhere"}),
        images=np.repeat(demo.images[:60], 3, axis=-1)[:, :30],
        ids=np.array([f"an-identifier-{row:03}" for row in range(60)]),
        labels=demo.labels[:60],
    )
    nearest = demo.ids[:60].copy()
    nearest[7:9] = demo.ids[demo.labels < 0][:2]
    return Leaks(source, demo, Likeness(source.ids, nearest, similarity.astype(np.float32)))


def test_table(drawn):
    lines = leak_lines(drawn)
    assert lines[0] == "60 images of elsewhere against 170 of demo"
    between = drawn.likeness.similarity[23:]
    assert lines[2:11] == [
        "similarity        images   share",
        "0.98 and more          2    3.3%  left out",
        "0.95 to 0.98           0    0.0%  left out",
        "0.90 to 0.95          15   25.0%  left out",
        "0.85 to 0.90           3    5.0%  left out",
        "0.80 to 0.85           2    3.3%  kept",
        *(
            f"{name:<14}  {count:>8}  {count / 60:>6.1%}  kept"
            for name, count in (
                ("0.70 to 0.80", (between >= 0.7).sum()),
                ("0.60 to 0.70", ((between >= 0.6) & (between < 0.7)).sum()),
                ("below 0.60", 1 + (between < 0.6).sum()),
            )
        ),
    ]
    assert lines[11:] == [
        "",
        "near 0.85  3 left out less than 0.05 above, 2 kept less than 0.05 below",
        "copies     20 (33.3%), of 18 of 140 labelled and 2 of 30 unlabelled images of demo",
        "left       40 images of elsewhere are no copies",
    ]


def test_picture(drawn, tmp_path, figures):
    path = draw_leaks(drawn, tmp_path)
    assert path == tmp_path / "inputs" / "elsewhere" / "leaks-demo.png"
    histogram, below, above = figures[0].axes
    assert sum(patch.get_height() for patch in histogram.patches) == 60
    assert len(below.images) == 32
    assert len(above.images) == 32
    assert [text.get_text() for text in above.texts[:2]] == ["0.8500  …ier-003 | 4", "0.8600  …ier-004 | 5"]
    assert below.texts[0].get_text() == "0.8499  …ier-002 | 3"
    # A pair is the image from elsewhere, wider than high, and beside it its partner.
    np.testing.assert_array_equal(above.images[0].get_array(), drawn.source.images[3])
    np.testing.assert_array_equal(above.images[1].get_array(), drawn.competition.images[3, :, :, 0])
    left, right, bottom, top = above.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(48 / 30)
    whole = figures[0].bbox
    for text in figures[0].findobj(Text):
        if text.get_visible() and text.get_text() and text not in histogram.get_xticklabels(which="both"):
            box = text.get_window_extent()
            assert -1 <= box.x0 <= box.x1 <= whole.x1 + 1, text
    first = path.read_bytes()
    assert draw_leaks(drawn, tmp_path).read_bytes() == first


def test_a_source_without_copies_has_a_picture_too(drawn, tmp_path, figures):
    like = replace(drawn.likeness, similarity=np.full(60, 0.5, np.float32))
    draw_leaks(replace(drawn, likeness=like), tmp_path)
    _, _, above = figures[0].axes
    assert above.get_title(loc="left") == "left out: the least similar pairs, from 0.85 on: none"


def test_the_guard_is_asked_once(root):
    shutil.copytree(root / "inputs" / "demo", root / "inputs" / "mirror", symlinks=True)
    path = root / "inputs" / "mirror" / "competition.yaml"
    path.write_text(re.sub(r"(?m)^name: demo$", "name: mirror", path.read_text()))
    (root / "inputs" / "mirror" / "cache").unlink()
    said = []
    found = leaks(root, "demo", "mirror", say=said.append)
    assert said == ["leak guard: compares 170 images of mirror with 170 of demo, once"]
    assert found.likeness.copies.all()
    assert leak_lines(leaks(root, "demo", "mirror", say=said.append)) == leak_lines(found)
    assert len(said) == 1
    (kept,) = (root / "inputs" / "mirror" / "cache").glob("likeness-*.csv")
    with kept.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 170


def test_a_data_set_is_not_compared_with_itself(root):
    with pytest.raises(DataError) as caught:
        leaks(root, "demo", "demo")
    assert str(caught.value) == (
        "leaks: demo is compared with itself, and all of it would be copies\n"
        "  fix: name the competition, and the data set from elsewhere\n"
        "1 error; nothing was written."
    )
