"""How do the reports of many processes become one?"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from torchguard._report import _files
from torchguard._report._records import Report, ReportError


def merge(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Report:
    """Make one report of several, of any format but text, each site once with all that hit it. The same file twice,
    or a merge and what went into it, counts once. Lines cut off by a crash are left out and noted.

    Raises:
        ReportError: if one cannot be read or is not ours, or the result cannot be written; then nothing is written.
    """
    target = os.fspath(out)
    _files.suffix_of(target)
    report = Report()
    names = [os.fspath(path) for path in paths]
    if not names:
        raise ReportError("merge needs reports to merge")
    for name in names:
        _files.read_into(report, name)
    report.notes += _left_out(names)
    _files.write_report(report, target)
    return report


def _left_out(names: list[str]) -> list[str]:
    """Notes of journals beside the reports that are merged: what a rank that was killed leaves is easily overlooked."""
    given = {os.path.abspath(name) for name in names}
    left: set[str] = set()
    for name in given:
        stem, suffix = os.path.splitext(name)
        if suffix != ".jsonl":
            of_all = glob.escape(re.sub(r"\.rank\d+(\.[^./]*\.pid\d+)?$|\.[^./]*\.pid\d+$", "", stem))
            left |= {*glob.glob(f"{of_all}{suffix}.jsonl"), *glob.glob(f"{of_all}.*{suffix}.jsonl")}
    told = "is of a process that was killed, or runs still; it is not in this report: name it, too"
    return [f"{path} {told}" for path in sorted(left - given)]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"torchguard: merge: {message}; write torchguard merge FILES -o OUT", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchguard merge",
        description="Make one report of those that several processes wrote.",
        allow_abbrev=False,
    )
    kinds = ", ".join(suffix for suffix in _files.SUFFIXES if suffix != ".txt")
    parser.add_argument("files", nargs="+", metavar="FILES", help=f"reports ({kinds}), or globs of them")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help=f"what to write; ends in {', '.join(_files.SUFFIXES)}"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """``torchguard merge FILES -o OUT``: the exit status, 2 if a file is not what it should be."""
    options = _parser().parse_args(arguments)
    try:
        report = merge(itertools.chain.from_iterable(map(_matches, options.files)), options.output)
    except ReportError as error:
        print(f"torchguard: {error}", file=sys.stderr)
        return 2
    for note in report.told():
        print(f"torchguard: {note}", file=sys.stderr)
    print(f"torchguard: {options.output}: {report.summary()}")
    return 0


def _matches(pattern: str) -> list[str]:
    """What a shell that does not do so itself, or was kept from it by quotes, would make of a glob."""
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern))
    if not found:
        raise ReportError(f"no file is called {pattern}")
    return found
