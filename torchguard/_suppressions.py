"""Which violations has somebody decided to live with, why, and which of these decisions match nothing any more?

A suppression is one line, ``GLOB[:LINE|:FUNCTION] [KIND] -- REASON``. It speaks of the line that writes (of the line
that reads, where the write was not seen).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import get_args

from torchguard._violation import Kind, Violation

KINDS: tuple[str, ...] = get_args(Kind)

_FORM = "GLOB[:LINE|:FUNCTION] [KIND] -- REASON"


class SuppressionError(ValueError):
    """A suppression that cannot be read; the message is one line."""


@dataclass(frozen=True)
class Suppression:
    """One decision to live with a violation.

    Attributes:
        path: glob of the file: ``*`` and ``?`` within a directory, ``**`` across them; a relative one matches at any
            depth.
        lines: first and last line, None for any.
        function: glob of the function's name, qualified or bare; None for any.
        kinds: kinds of violation; empty for any.
        reason: why.
        source: where it was written down, ``suppressions.txt:3`` say.
        text: the line itself.
    """

    path: str
    lines: tuple[int, int] | None
    function: str | None
    kinds: frozenset[str]
    reason: str
    source: str
    text: str

    def matches(self, violation: Violation) -> bool:
        """Whether it speaks of this violation."""
        place = violation.written or violation.read
        if place is None or (self.kinds and violation.kind not in self.kinds):
            return False
        if self.lines is not None and not self.lines[0] <= place.line <= self.lines[1]:
            return False
        if self.function is not None:
            names = (place.function, place.function.rpartition(".")[2])
            if not any(fnmatchcase(name, self.function) for name in names):
                return False
        return self._pattern.fullmatch(_normal(place.file)) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_regex(_slashes(self.path)), re.IGNORECASE if os.name == "nt" else 0)


def _slashes(path: str) -> str:
    return path.replace("\\", "/") if os.name == "nt" else path


def _normal(file: str) -> str:
    """The path that globs are matched against: absolute; ``<stdin>`` and the like as they are."""
    if file.startswith("<"):
        return file
    try:
        return _slashes(os.path.abspath(file))
    except OSError:  # the working directory is gone
        return _slashes(file)


def _regex(glob: str) -> str:
    pattern = "" if glob.startswith("/") or glob[1:2] == ":" else "(?:.*/)?"
    position = 0
    glob = glob.removeprefix("./")
    while position < len(glob):
        if glob.startswith("**/", position):
            pattern += "(?:.*/)?"
            position += 3
        elif glob.startswith("**", position):
            pattern += ".*"
            position += 2
        else:
            pattern += {"*": "[^/]*", "?": "[^/]"}.get(glob[position], re.escape(glob[position]))
            position += 1
    return pattern


def parse(line: str, source: str) -> Suppression | None:
    """Read one line; None for a blank one or a comment."""
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    what, dashes, reason = f" {text} ".partition(" -- ")
    what, reason = what.strip(), reason.strip()
    if not dashes or not reason:
        raise SuppressionError(f"{source}: {text!r} has no reason; write {_FORM}")
    words = what.split()
    if not words or len(words) > 2:
        raise SuppressionError(f"{source}: {text!r} cannot be read; write {_FORM}")
    kinds = frozenset(words[1].split(",")) if len(words) == 2 and words[1] != "*" else frozenset()
    for kind in kinds - set(KINDS):
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SuppressionError(f"{source}: no kind of violation is called {kind!r}; {hint}({', '.join(KINDS)})")
    path, colon, detail = words[0].rpartition(":")
    if not colon or "/" in detail or "\\" in detail:
        path, detail = words[0], ""  # the colon of C:\...
    if not path or (colon and not detail and words[0].endswith(":")):
        raise SuppressionError(f"{source}: {text!r} cannot be read; write {_FORM}")
    lines, function = _lines_or_function(path, detail, source)
    return Suppression(
        path=path,
        lines=lines,
        function=function,
        kinds=kinds,
        reason=reason,
        source=source,
        text=text,
    )


def _lines_or_function(path: str, detail: str, source: str) -> tuple[tuple[int, int] | None, str | None]:
    """What stands behind the colon of a path: first and last line, or a glob of a function's name, or nothing."""
    if not detail:
        return None, None
    column = re.search(r":([\d-]+)$", path)  # LINE:COLUMN, as compilers have it
    lines = re.fullmatch(r"(\d+)(?:-(\d+))?", detail)
    if column is not None:
        wrong = f"'{column[1]}:{detail}' is a line with something behind it"
    elif lines is not None:
        first, last = int(lines[1]), int(lines[2] or lines[1])
        if 0 < first <= last:
            return (first, last), None
        wrong = f"{detail!r} ends before it begins" if first > last else f"{detail!r} counts from 0, and lines from 1"
    elif re.fullmatch(r"(?![\d-])[\w.<>*?\[\]!-]+", detail):
        return None, detail
    else:
        wrong = f"{detail!r} is neither lines nor the name of a function"
    raise SuppressionError(f"{source}: {wrong}; write a line (9), lines (3-9) or a function (step, Model.step, *_step)")


_BY = " (suppressed by "


def gave(reason: str | None) -> bool:
    """Whether a reason to allow a violation is that of a suppression, and not of an ``allow`` block."""
    return reason is not None and _BY in reason and reason.endswith(")")


class Suppressions:
    """A list of them, which remembers which ones have matched."""

    def __init__(self, suppressions: Iterable[Suppression] = ()) -> None:
        self.all = list(suppressions)
        self.used: set[str] = set()

    def __len__(self) -> int:
        return len(self.all)

    def reason_for(self, violation: Violation) -> str | None:
        """The reason of the first that matches, and where it stands; None if none does."""
        for suppression in self.all:
            if suppression.matches(violation):
                self.used.add(suppression.text)
                return f"{suppression.reason}{_BY}{suppression.source})"
        return None

    def stale(self) -> list[Suppression]:
        """Those that have matched nothing so far."""
        return [suppression for suppression in self.all if suppression.text not in self.used]


def read(
    value: Suppressions | str | os.PathLike[str] | Iterable[str] | None, source: str
) -> tuple[Suppressions, list[str]]:
    """Suppressions from a file or a list of lines, and what is wrong with those that cannot be read.

    Args:
        value: path of a file, or the lines; one that is read already is handed back.
        source: what to call a list of lines in messages.
    """
    if isinstance(value, Suppressions):
        return value, []
    if value is None:
        return Suppressions(), []
    if isinstance(value, (str, os.PathLike)):
        source = os.fspath(value)
        try:
            with open(source, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            return Suppressions(), [f"{source}: {getattr(error, 'strerror', None) or error}; nothing is suppressed"]
        source = os.path.relpath(source) if os.path.isabs(source) and _below_here(source) else source
    else:
        lines = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(line, str) for line in lines):
        return Suppressions(), [f"{source}: the path of a file, or lines of text, and not {value!r}"]
    found, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            suppression = parse(line, f"{source}:{number}")
        except SuppressionError as error:
            problems.append(str(error))
        else:
            if suppression is not None:
                found.append(suppression)
    return Suppressions(found), problems


def _below_here(path: str) -> bool:
    try:
        return not os.path.relpath(path).startswith("..")
    except (ValueError, OSError):
        return False
