"""Limits: nobody gets more than is allowed, a refusal comes at once, and what waits is predicted together."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldwise.serve.limits import BATCH, Batcher, Budget, BusyError, RateLimit


class TestRateLimit:
    @given(
        st.lists(st.floats(0, 3), min_size=1, max_size=200),
        st.sampled_from([0.5, 3.0, 20.0]),
        st.sampled_from([1.0, 7.0]),
    )
    def test_nobody_gets_more_than_the_burst_and_the_rate(self, gaps, rate, burst):
        limit, now, granted = RateLimit(rate, burst), 0.0, []
        for gap in gaps:
            now += gap
            if limit.wait("1.2.3.4", now) == 0:
                granted.append(now)
        for first, start in enumerate(granted):
            for count, end in enumerate(granted[first:], start=1):
                assert count <= burst + rate * (end - start) + 1e-6

    @given(st.lists(st.floats(0, 2), max_size=50))
    def test_who_waits_as_told_is_let_in(self, gaps):
        limit, now = RateLimit(2.0, 3.0), 0.0
        for gap in gaps:
            now += gap
            wait = limit.wait("1.2.3.4", now)
            if wait:
                now += wait + 1e-9
                assert limit.wait("1.2.3.4", now) == 0

    def test_clients_do_not_share_but_a_network_of_ipv6_does(self):
        limit = RateLimit(1.0, 1.0)
        assert limit.wait("10.0.0.1", 0) == 0
        assert limit.wait("10.0.0.1", 0) == 1
        assert limit.wait("10.0.0.2", 0) == 0
        assert limit.wait("2001:db8::1", 0) == 0
        assert limit.wait("2001:db8::ffff:1", 0) == 1
        assert limit.wait("2001:db8:0:1::1", 0) == 0
        assert limit.wait("::ffff:10.0.0.9", 0) == 0
        assert limit.wait("::ffff:10.0.0.8", 0) == 0, "addresses of IPv4 are clients of their own, mapped or not"

    def test_infinity_is_no_limit(self):
        limit = RateLimit(float("inf"), 1.0)
        assert {limit.wait("10.0.0.1", 0) for _ in range(1000)} == {0}

    def test_memory_is_bounded(self):
        limit = RateLimit(0.001, 1.0)
        for number in range(30_000):
            limit.wait(f"client {number}", 0)
        assert len(limit._buckets) == 10_000


class TestBudget:
    def test_what_was_held_comes_back_also_after_an_error(self):
        budget = Budget(10)
        with suppress(ZeroDivisionError), budget.share() as hold:
            hold(10)
            1 / 0  # noqa: B018
        with budget.share() as hold:
            hold(10)

    def test_more_than_is_left_is_refused(self):
        budget = Budget(10)
        with budget.share() as first, budget.share() as second:
            first(6)
            with pytest.raises(BusyError) as caught:
                second(5)
            assert str(caught.value) == "too many large requests are under way\n  fix: try again in 2 s"
            second(4)


class Engine:
    """Answers with the first pixel; waits where it is told to."""

    def __init__(self):
        self.sizes = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self.failure = None

    def probabilities(self, pixels):
        self.threads.add(threading.get_ident())
        self.asked.set()
        assert self.gate.wait(20)
        self.sizes.append(len(pixels))
        if self.failure:
            raise self.failure
        return pixels[:, 0, 0, :1].astype(np.float64)

    def hold(self):
        self.gate.clear()
        self.asked.clear()


def image(value):
    return np.full((2, 2, 1), value, dtype=np.uint8)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def told():
    return []


@pytest.fixture
def batcher(told):
    with Batcher(most_waiting=20, on_batch=told.append) as made:
        yield made


class TestBatcher:
    def test_one_image_costs_one(self, batcher, engine, told):
        assert batcher.predict(engine, [image(7)]).result(20).tolist() == [[7]]
        assert engine.sizes == [1]
        assert told == [1]

    @pytest.mark.parametrize(("count", "sizes"), [(2, [2]), (16, [16]), (37, [16, 16, 5])])
    def test_what_comes_together_is_predicted_together(self, batcher, engine, count, sizes):
        rows = batcher.predict(engine, [image(value) for value in range(count)]).result(20)
        assert rows[:, 0].tolist() == list(range(count))
        assert engine.sizes == sizes

    def test_what_waits_is_predicted_together_and_everybody_gets_his_own(self, batcher, engine, told):
        engine.hold()
        first = batcher.predict(engine, [image(0)])
        assert engine.asked.wait(20)
        others = [batcher.predict(engine, [image(10 * n + 1), image(10 * n + 2)]) for n in range(1, 7)]
        assert batcher.waiting == 12
        engine.gate.set()
        assert first.result(20).tolist() == [[0]]
        assert [other.result(20)[:, 0].tolist() for other in others] == [[10 * n + 1, 10 * n + 2] for n in range(1, 7)]
        assert told == [1, 12]
        assert len(engine.threads) == 1

    def test_engines_are_not_mixed_and_keep_their_turn(self, batcher, engine):
        other, order = Engine(), []
        engine.hold()
        running = batcher.predict(engine, [image(0)])
        assert engine.asked.wait(20)
        jobs = [
            batcher.predict(which, [image(value)])
            for which, value in ((other, 1), (engine, 2), (other, 3), (engine, 4))
        ]
        jobs.insert(2, batcher.call(lambda: order.append(other.sizes + engine.sizes)))
        engine.gate.set()
        for job in (running, *jobs):
            job.result(20)
        assert (other.sizes, engine.sizes) == ([2], [1, 2])
        assert order == [[2, 1, 2]], "other work comes in its turn: after the two batches that began before it"

    def test_too_much_is_refused_at_once(self, batcher, engine):
        engine.hold()
        running = batcher.predict(engine, [image(0)])
        assert engine.asked.wait(20)
        waiting = [batcher.predict(engine, [image(1)] * 10) for _ in range(2)]
        with pytest.raises(BusyError) as caught:
            batcher.predict(engine, [image(2)])
        assert str(caught.value) == "20 images wait already\n  fix: try again in 1 s"
        with pytest.raises(BusyError):
            batcher.call(lambda: None)
        engine.gate.set()
        for job in (running, *waiting):
            job.result(20)

    def test_a_large_request_is_taken_where_nothing_waits(self, batcher, engine):
        assert len(batcher.predict(engine, [image(1)] * 50).result(20)) == 50

    def test_what_was_cancelled_is_not_computed_and_makes_room(self, batcher, engine):
        engine.hold()
        running = batcher.predict(engine, [image(0)])
        assert engine.asked.wait(20)
        cancelled = batcher.predict(engine, [image(1)] * 20)
        assert cancelled.cancel()
        other = batcher.predict(engine, [image(2)] * 20)
        engine.gate.set()
        running.result(20)
        assert other.result(20)[:, 0].tolist() == [2] * 20
        assert engine.sizes == [1, 16, 4]

    def test_a_failure_is_told_and_the_next_one_answered(self, batcher, engine):
        engine.failure = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            batcher.predict(engine, [image(1)]).result(20)
        with pytest.raises(ZeroDivisionError):
            batcher.call(lambda: 1 / 0).result(20)
        engine.failure = None
        assert batcher.predict(engine, [image(3)]).result(20).tolist() == [[3]]

    def test_nothing_to_predict_is_a_mistake_of_the_caller(self, batcher, engine):
        with pytest.raises(ValueError, match="at least one image must be there, but got none"):
            batcher.predict(engine, [])

    def test_many_threads_get_their_own_rows(self, batcher, engine):
        wrong = []

        def ask(seed):
            rng = np.random.default_rng(seed)
            for _ in range(20):
                values = rng.integers(0, 256, rng.integers(1, 3)).tolist()
                rows = batcher.predict(engine, [image(value) for value in values]).result(20)
                wrong.extend([values] if rows[:, 0].tolist() != values else [])

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert max(engine.sizes) <= BATCH
        assert len(engine.threads) == 1

    def test_the_end_finishes_what_is_computed_and_cancels_what_waits(self, engine):
        batcher = Batcher()
        engine.hold()
        running, waiting = batcher.predict(engine, [image(1)]), None
        assert engine.asked.wait(20)
        waiting = batcher.predict(engine, [image(2)])
        closing = threading.Thread(target=batcher.close)
        closing.start()
        with pytest.raises(CancelledError):
            waiting.result(20)
        engine.gate.set()
        closing.join(20)
        assert running.result(20).tolist() == [[1]]
        with pytest.raises(BusyError, match="the server is stopping"):
            batcher.predict(engine, [image(3)])
