"""Every error a user can cause, and how a list of faults is printed.

An error says where, what and the mend; `cli` prints it without a traceback and exits with its `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


class FoldwiseError(Exception):
    """Something the user can mend. `str(error)` is the whole message, mend included."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an input, with its place and its mend.

    Attributes:
        where: `file:line:column`, `file:row` or whatever names the place best.
        what: What is wrong, with the value.
        fix: What to do about it; empty when `what` already says it.
        source: The offending line of a text file, or None.
        line: Number of `source` in its file, from 1.
        column: Where the offending token starts in `source`, from 1.
        width: Characters of the offending token.
    """

    where: str
    what: str
    fix: str = ""
    source: str | None = None
    line: int = 0
    column: int = 1
    width: int = 1

    def __str__(self) -> str:
        """Render as the place and what is wrong, the marked source line, and the mend."""
        parts = [f"{self.where}: {self.what}"]
        if self.source is not None:
            gutter = f"{self.line:>5} | "
            parts.append(f"{gutter}{self.source}")
            parts.append(" " * (len(gutter) - 2) + "| " + " " * (self.column - 1) + "^" * max(1, self.width))
        if self.fix:
            parts.append(f"  fix: {self.fix}")
        return "\n".join(parts)


class FaultsError(FoldwiseError):
    """Several faults found in one pass over an input; all are shown at once.

    Attributes:
        faults: At least one fault, in the order of the input.
        consequence: What did not happen because of them, e.g. `nothing ran`.
    """

    consequence = "nothing ran"

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        noun = "error" if count == 1 else "errors"
        body = "\n".join(str(fault) for fault in self.faults)
        super().__init__(f"{body}\n{count} {noun}; {self.consequence}.")

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Fault, ...]]]:
        """Pickle by the faults, since an exception's own way would pass the whole message as them."""
        return type(self), (self.faults,)


class SpecError(FaultsError):
    """An experiment file, or an override of it, is not a valid spec."""


class DataError(FaultsError):
    """The files of a competition are not what they should be."""

    consequence = "nothing was written"


class RecordError(FaultsError):
    """Kept runs cannot be read, or do not fit together."""

    consequence = "nothing was written"


class HubError(FoldwiseError):
    """A hub cannot be reached, or refuses what was asked of it."""

    exit_code = 3


class DeviceError(FoldwiseError):
    """The device asked for is not there, or has too little memory."""

    exit_code = 3


class DivergedError(FoldwiseError):
    """A loss or a logit is not finite; names the step window or the row."""

    exit_code = 4
