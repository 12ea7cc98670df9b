"""The list of what can be served is that of the records on disk, and what is held is made once."""

from __future__ import annotations

import shutil
import threading

import pytest
from fake_models import keep_untrained

from foldwise.errors import FoldwiseError
from foldwise.records.store import load_run
from foldwise.serve.shelf import Catalogue, Shelf


class TestShelf:
    def test_threads_that_want_the_same_get_the_same(self):
        made, ready = [], threading.Event()

        def make(name):
            ready.wait(20)
            made.append(name)
            return object()

        shelf, got = Shelf(make, 2), []
        threads = [threading.Thread(target=lambda: got.append(shelf.get("a"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        ready.set()
        for thread in threads:
            thread.join(20)
        assert made == ["a"]
        assert len(set(got)) == 1
        assert shelf.peek("a") is got[0]

    def test_the_one_asked_for_least_recently_makes_room_unless_it_is_kept(self):
        shelf = Shelf(str.upper, 3, keep=["k"])
        for name in "kab":
            shelf.get(name)
        assert shelf.peek("a") == "A"
        shelf.get("c")
        assert shelf.names == ["k", "a", "c"]
        assert shelf.peek("b") is None

    def test_what_cannot_be_made_is_not_held(self):
        shelf = Shelf(lambda name: 1 // len(name), 2)
        with pytest.raises(ZeroDivisionError):
            shelf.get("")
        assert shelf.names == []


class TestCatalogue:
    @pytest.fixture
    def root(self, demo_root, tmp_path):
        root = tmp_path / "project"
        shutil.copytree(demo_root, root)
        keep_untrained(root, "tiny")
        return root

    def test_it_lists_what_is_complete_and_says_what_is_missing(self, root):
        now = [0.0]
        catalogue = Catalogue(root, clock=lambda: now[0])
        info = load_run(root / "oof" / "tiny").info
        (tiny,) = catalogue.entries()
        assert (tiny.name, tiny.kind, tiny.competition) == ("tiny", "run", "demo")
        assert (tiny.score, tiny.standard_error, tiny.n_scored) == (info["score"], info["standard_error"], 140)
        assert tiny.missing == ()
        assert catalogue.best() is catalogue.find("tiny") is tiny

        with pytest.raises(FoldwiseError) as caught:
            catalogue.find("tinny")
        assert str(caught.value) == ("there is no run or blend 'tinny'\n  fix: did you mean `tiny`? served here: tiny")

        (root / "oof" / "tiny" / "fold3" / "seed42" / "weights.safetensors").unlink()
        shutil.copytree(root / "oof" / "tiny", root / "oof" / "broken")
        (root / "oof" / "broken" / "oof.csv").write_text("id\n")
        now[0] = 9.0
        assert catalogue.entries() == [tiny], "for ten seconds nothing is read"
        now[0] = 11.0
        (tiny,) = catalogue.entries()
        assert tiny.missing == ("tiny",)
        assert tiny.unserved == "the weights of tiny are not on this machine"
        with pytest.raises(FoldwiseError, match="there is nothing to serve"):
            catalogue.best()
