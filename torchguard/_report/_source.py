"""Where does a file lie in its repository, and what does it say around a line?"""

from __future__ import annotations

import functools
import linecache
import os
from pathlib import Path
from typing import Any

#: Lines shown on either side of a place.
AROUND = 3

_LONGEST = 300


def repository_root(start: str) -> str:
    """The nearest directory from ``start`` upwards that has a ``.git``; ``""`` if none has."""
    directory = os.path.abspath(start)
    while not os.path.exists(os.path.join(directory, ".git")):
        parent = os.path.dirname(directory)
        if parent == directory:
            return ""
        directory = parent
    return directory


def path_below(root: str, file: str) -> str | None:
    """``file`` relative to ``root``, with forward slashes; None if it does not lie below."""
    if file.startswith("<"):
        return None
    try:
        relative = os.path.relpath(os.path.realpath(file), os.path.realpath(root))
    except (ValueError, OSError):  # another drive on Windows; a working directory that is gone
        return None
    return None if relative.split(os.sep)[0] == os.pardir else Path(relative).as_posix()


def context_of(file: str, line: int, source: str) -> dict[str, Any] | None:
    """The lines around a line, as ``{"first": number of the first, "lines": [...]}``; None if there is no source, or
    if the file has changed since ``source`` was run.
    """
    name = file if file.startswith("<") else os.path.abspath(file)
    lines = linecache.getlines(name)
    if not 1 <= line <= len(lines) or lines[line - 1].strip() != source:
        return None
    first = max(1, line - AROUND)
    return {"first": first, "lines": [_short(text) for text in lines[first - 1 : line + AROUND]]}


def _short(line: str) -> str:
    line = line.rstrip("\r\n")
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def line_hash(file: str, line: int, source: str) -> str:
    """What code-scanning services call ``primaryLocationLineHash``; ``""`` if the file cannot be read, or has changed
    since ``source`` was run.
    """
    try:
        status = os.stat(file)
        text, number = _hashes_of(file, status.st_mtime_ns, status.st_size)[line]
    except (OSError, ValueError, KeyError):  # <stdin> is not a file, and a file need not be text
        return ""
    return number if text.strip() == source else ""


@functools.lru_cache(maxsize=32)  # many sites of one file, at 20 µs a line
def _hashes_of(file: str, modified: int, size: int) -> dict[int, tuple[str, str]]:
    text = Path(file).read_bytes().decode()
    return dict(enumerate(zip(_lines(text), line_hashes(text).values(), strict=True), 1))


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def line_hashes(text: str) -> dict[int, str]:
    """For each line, a number that stays the same while the 100 characters from there on do, blanks not counted: it
    survives edits elsewhere in the file. Equal ones are told apart by their order.

    The services compute it themselves where they have the file, and complain if a report says something else: so this
    is their function, number for number. It is the polynomial over those characters in powers of 37, modulo 2⁶⁴,
    where the end of the file counts as 0xFFFF and what lies beyond it as 0.
    """
    units: list[int] = []
    starts: list[int] = []
    for line in _lines(text):
        starts.append(len(units))
        kept = line.replace(" ", "").replace("\t", "").encode("utf-16-le", "surrogatepass")
        units += [kept[i] | kept[i + 1] << 8 for i in range(0, len(kept), 2)]
        units.append(10)
    units[-1] = 0xFFFF
    units += [0] * 100
    seen: dict[int, int] = {}
    hashes = {}
    for number, start in enumerate(starts, 1):
        value = 0
        for unit in units[start : start + 100]:
            value = (value * 37 + unit) & 0xFFFF_FFFF_FFFF_FFFF
        seen[value] = seen.get(value, 0) + 1
        hashes[number] = f"{value:x}:{seen[value]}"
    return hashes
