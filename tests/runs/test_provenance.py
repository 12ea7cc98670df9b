"""The commit, the versions and the command that a record names."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from foldwise.runs.provenance import command_line, git_state, versions


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_dirty_only_where_results_come_from(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) is None, "a repository without a commit has none to name"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "a.yaml").write_text("name: a\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(tmp_path) == clean

    (tmp_path / "oof").mkdir()
    (tmp_path / "oof" / "run.json").write_text("{}\n")
    assert git_state(tmp_path) == clean, "what a run writes must not make the next one dirty"

    (tmp_path / "experiments" / "b.yaml").write_text("name: b\n")
    assert git_state(tmp_path) == clean | {"dirty": True}


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["torch"] == version("torch")
    assert found["foldwise"] == version("foldwise")
    assert next(iter(found)) == "python"


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/run.py", "exp", "tiny", "--set", "tta=[identity, hflip]", "--folds", "0"]
    )
    assert command_line() == 'python run.py exp tiny --set "tta=[identity, hflip]" --folds 0'
