"""Faces keep their number from frame to frame, and what is shown of them is calm: from times, boxes and rows alone."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foldwise.serve.faces import Box
from foldwise.serve.pictures import PictureError
from foldwise.serve.tracking import FRAME, MOST_FACES, Session, Tracker, overlap

CLASSES = ("bright", "dark", "red")
SIDE = 40


def box(left, top=0, side=SIDE):
    return Box(left, top, side, side, 1.0)


def row(*shares):
    return np.array([shares], dtype=np.float64)


def rows(count, seed=0):
    drawn = np.random.default_rng(seed).random((count, len(CLASSES))) + 0.01
    return drawn / drawn.sum(axis=1, keepdims=True)


# The state machine ----------------------------------------------------------------------------------------------------


@st.composite
def walks(draw):
    """Faces side by side that move by less than a quarter of a width a frame, never over each other; some are missed.

    Yields (frames, faces) lefts, and whether each was found; a face is never missed for as long as 0.6 s.
    """
    faces = draw(st.integers(1, 4))
    steps = draw(st.integers(1, 12))
    lefts = np.cumsum(np.full(faces, SIDE + 2 * 9))
    frames = [(lefts, [True] * faces)]
    missed = [0] * faces
    for _ in range(steps):
        moves = np.array([draw(st.integers(-9, 9)) for _ in range(faces)])
        # Who would come over a neighbour stays.
        wanted = lefts + moves
        gaps = np.diff(wanted)
        lefts = wanted if (gaps >= SIDE).all() else lefts
        found = [missed[k] > 0 or draw(st.booleans()) or len(frames) < 2 for k in range(faces)]
        missed = [0 if found[k] else missed[k] + 1 for k in range(faces)]
        frames.append((lefts, found))
    return frames


@given(walks(), st.randoms(use_true_random=False))
def test_numbers_never_swap_between_faces_that_do_not_cross(frames, random):
    tracker = Tracker()
    whose = {}
    for k, (lefts, found) in enumerate(frames):
        seen = [(place, box(int(left))) for place, (left, there) in enumerate(zip(lefts, found, strict=True)) if there]
        random.shuffle(seen)
        faces = tracker.update(0.1 * k, [each for _, each in seen], rows(len(seen), k))
        by_place = {place: min(faces, key=lambda face: -overlap(face.box, each)) for place, each in seen}
        for place, face in by_place.items():
            assert face.seen
            assert whose.setdefault(place, face.id) == face.id
        assert len({face.id for face in by_place.values()}) == len(seen)
        assert len(faces) == len(lefts)  # whoever was missed for a frame is still there


@given(
    st.lists(
        st.tuples(
            st.floats(0, 0.5),
            st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200), st.integers(8, 120)), max_size=5),
        ),
        min_size=1,
        max_size=15,
    )
)
def test_whatever_is_found_the_answer_is_sound(frames):
    tracker = Tracker()
    now, given_ids, newest = 0.0, set(), 0
    for k, (passed, found) in enumerate(frames):
        now += passed
        boxes = [Box(left, top, side, side, 1.0) for left, top, side in found]
        faces = tracker.update(now, boxes, rows(len(boxes), k))
        ids = [face.id for face in faces]
        assert ids == sorted(set(ids))
        # A number that was gone does not come back: what is new is greater than all before.
        assert all(each in given_ids or each > newest for each in ids)
        given_ids, newest = set(ids), max([newest, *ids])
        assert sum(face.seen for face in faces) >= len(boxes)
        for face in faces:
            assert face.probabilities.sum() == pytest.approx(1, abs=1e-12)
            assert (face.probabilities >= 0).all()
            assert 0 <= face.label < len(CLASSES)
            assert face.box.width > 0


def test_a_face_that_is_missed_stays_for_six_tenths_of_a_second_and_then_gets_another_number():
    def numbers(last):
        tracker = Tracker()
        for now in (0.0, 0.1):
            tracker.update(now, [box(10)], row(1, 0, 0))
        held = [[(face.id, face.seen) for face in tracker.update(now, [], rows(0))] for now in (0.3, last)]
        (again,) = tracker.update(last, [box(10)], row(1, 0, 0))
        return held, again.id

    assert numbers(0.69) == ([[(1, False)], [(1, False)]], 1)
    assert numbers(0.71) == ([[(1, False)], []], 2)


def test_what_was_found_in_a_single_frame_is_gone_in_the_next():
    tracker = Tracker()
    assert len(tracker.update(0.0, [box(10)], row(1, 0, 0))) == 1
    assert tracker.update(0.1, [], rows(0)) == []


def test_smoothing_goes_by_time_and_not_by_frames():
    def after(frames):
        tracker = Tracker()
        tracker.update(0.0, [box(10)], row(1, 0, 0))
        for k in range(1, frames + 1):
            (face,) = tracker.update(0.4 * k / frames, [box(20)], row(0, 1, 0))
        return face

    # Two half-lives of 0.2 s: a quarter of what was is left.
    for frames in (1, 2, 8):
        assert after(frames).probabilities == pytest.approx([0.25, 0.75, 0])
        assert after(frames).box == box(20)


def test_noise_around_a_tie_does_not_flicker_but_a_lasting_lead_is_shown():
    tracker = Tracker()
    tracker.update(0.0, [box(10)], row(0.5, 0.45, 0.05))
    labels = []
    for k in range(1, 200):
        lead = 0.04 if k % 2 else -0.04
        (face,) = tracker.update(0.05 * k, [box(10)], row(0.475 + lead, 0.475 - lead, 0.05))
        labels.append(face.label)
    assert set(labels) == {0}
    # A lead that is too small to be shown at once, and lasts.
    times = [
        0.05 * k for k in range(200, 300) if tracker.update(0.05 * k, [box(10)], row(0.45, 0.5, 0.05))[0].label == 1
    ]
    assert times
    assert 0.5 <= times[0] - 10 < 1.2
    assert len(times) == 300 - round(times[0] / 0.05)  # and it stays


def test_another_face_is_shown_as_soon_as_it_is_well_ahead():
    tracker = Tracker()
    tracker.update(0.0, [box(10)], row(0.9, 0.1, 0))
    first = next(
        0.02 * k for k in range(1, 100) if tracker.update(0.02 * k, [box(10)], row(0.05, 0.9, 0.05))[0].label == 1
    )
    assert first < 0.4


def test_faces_beside_each_other_go_to_the_nearer_track_first():
    tracker = Tracker()
    tracker.update(0.0, [box(0), box(30)], rows(2))
    # Both overlap the second face; by the sum of overlaps, or in their order, the first would move to the left one.
    faces = tracker.update(0.1, [box(25), box(48)], rows(2))
    assert [(face.id, face.box.left > 20) for face in faces] == [(2, True), (3, True)]


@pytest.mark.parametrize(
    ("now", "boxes", "count", "message"),
    [(0.9, 0, 0, "a frame of 0.9 s came after one of 1.0 s"), (1.0, 1, 2, "1 boxes, but 2 rows of probabilities")],
)
def test_a_clock_that_goes_backwards_and_rows_that_do_not_fit_are_refused(now, boxes, count, message):
    tracker = Tracker()
    tracker.update(1.0, [], rows(0))
    with pytest.raises(ValueError, match=message):
        tracker.update(now, [box(0)] * boxes, rows(count))


@pytest.mark.parametrize(("a", "b", "share"), [(0, 0, 1.0), (0, 20, 1 / 3), (0, 40, 0.0), (0, 90, 0.0)])
def test_overlap_is_intersection_over_union(a, b, share):
    assert overlap(box(a), box(b)) == overlap(box(b), box(a)) == pytest.approx(share)


# Frames ---------------------------------------------------------------------------------------------------------------


class Brightness:
    """Answers by the mean of the pixels in each box, and remembers what it was asked."""

    classes = CLASSES

    def __init__(self):
        self.asked = []

    def predict(self, images, boxes=None, *, fold=None):
        self.asked.append(fold)
        (image,), (some,) = images, boxes
        means = [image[b.top : b.top + b.height, b.left : b.left + b.width].mean() / 255 for b in some]
        probs = np.array([[mean, 1 - mean, 0.0] for mean in means])
        return SimpleNamespace(probabilities=probs)


def jpeg(level, size=(120, 90)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_frame_is_answered_in_its_own_pixels():
    model = Brightness()
    session = Session(model, find=lambda picture, limit: [Box(20, 10, 30, 30, 2.0)][:limit])
    told = session.frame(jpeg(255), 0.0)
    assert {key: told[key] for key in ("frame", "width", "height", "fps")} == {
        "frame": 1,
        "width": 120,
        "height": 90,
        "fps": 0.0,
    }
    assert told["time_ms"] >= 0
    assert told["faces"] == [
        {
            "id": 1,
            "box": [20, 10, 30, 30],
            "label": "bright",
            "confidence": 1.0,
            "probabilities": {"bright": 1.0, "dark": 0.0, "red": 0.0},
            "seen": True,
        }
    ]
    later = [session.frame(jpeg(0), 0.5 * k) for k in (1, 2, 3, 4, 5, 6)]
    assert [each["faces"][0]["label"] for each in later] == ["dark"] * 6
    assert [each["faces"][0]["id"] for each in later] == [1] * 6
    assert later[-1]["fps"] == 2.0


def test_a_frame_without_a_face_asks_no_model_and_a_bad_one_ends_nothing():
    model = Brightness()
    session = Session(model, find=lambda picture, limit: [])
    assert session.frame(jpeg(9), 0.0)["faces"] == []
    with pytest.raises(PictureError) as caught:
        session.frame(b"<svg/>", 0.1)
    assert caught.value.status == 415
    assert session.frame(jpeg(9), 0.2)["frame"] == 2
    assert model.asked == []


def test_a_frame_of_more_pixels_or_bytes_than_a_camera_gives_is_refused():
    session = Session(Brightness(), find=lambda picture, limit: [])
    for raw in (jpeg(9, (1001, 1000)), jpeg(9) + b"\0" * FRAME.bytes):
        with pytest.raises(PictureError) as caught:
            session.frame(raw, 0.0)
        assert caught.value.status == 413


def test_at_most_so_many_faces_are_asked_for():
    asked = []
    session = Session(Brightness(), find=lambda picture, limit: asked.append(limit) or [])
    session.frame(jpeg(9), 0.0)
    assert asked == [MOST_FACES]


@pytest.mark.parametrize(
    ("folds", "slow_s", "asked"),
    [
        ((3, 5, 8), -1.0, [None, None, None, 3, 5, 8, 3]),
        ((3, 5, 8), 1e9, [None] * 7),
        ((3,), -1.0, [None] * 7),
        ((), -1.0, [None] * 7),
    ],
)
def test_folds_take_turns_once_all_together_were_slow_three_times_in_a_row(folds, slow_s, asked):
    model = Brightness()
    session = Session(model, find=lambda picture, limit: [box(20)], folds=folds, slow_s=slow_s)
    told = [session.frame(jpeg(9), 0.1 * k)["in_turns"] for k in range(7)]
    assert model.asked == asked
    assert told == [3 if 3 in asked and k >= 2 else 0 for k in range(7)]


def test_frames_that_are_seconds_apart_still_follow_a_face():
    tracker = Tracker()
    ids = [tracker.update(3.0 * k, [box(10)], row(1, 0, 0))[0].id for k in range(4)]
    assert ids == [1] * 4
