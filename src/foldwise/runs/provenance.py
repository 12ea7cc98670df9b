"""Where a result comes from: the commit, the versions of what computed it, the command.

All of it goes into `run.json`; none of it changes a result.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("foldwise", "torch", "timm", "albumentations", "numpy", "opencv-python-headless", "pillow")
_CODE = ("src", "experiments", "inputs", "run.py", "pyproject.toml", "requirements.lock")


def git_state(root: Path) -> dict[str, Any] | None:
    """The commit of the checkout and whether code, experiments or folds differ from it; None outside a checkout."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def command_line() -> str:
    """The command that was given, as one would type it, without passwords."""
    typed = " ".join(["python", Path(sys.argv[0]).name, *(_quoted(word) for word in sys.argv[1:])])
    return without_password(typed)


def without_password(url: str) -> str:
    """A storage's URL, or a text with it, as it may be shown and kept."""
    hidden = re.sub(r"(://[^\s:/@]*):\S*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", hidden)


def _quoted(word: str) -> str:
    return f'"{word}"' if any(c in word for c in " []{}*?$&;") else word
