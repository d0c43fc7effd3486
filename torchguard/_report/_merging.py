"""How do the reports of many processes become one?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

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
    _files.write_report(report, target)
    return report


def merge_parser(prog: str = "torchguard merge") -> argparse.ArgumentParser:
    """What ``torchguard merge`` takes."""
    parser = argparse.ArgumentParser(prog=prog, description="Make one report of those that several processes wrote.")
    parser.add_argument(
        "files", nargs="+", metavar="FILES", help="reports (.jsonl, .json, .sarif or .html), or journals"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the suffix says the format; also .txt")
    return parser


def merge_command(arguments: Sequence[str]) -> int:
    """``torchguard merge FILES -o OUT``: the exit status, 2 if a file is not what it should be."""
    options = merge_parser().parse_args(arguments)
    try:
        report = merge(options.files, options.output)
    except ReportError as error:
        print(f"torchguard: {error}", file=sys.stderr)
        return 2
    for note in report.told():
        print(f"torchguard: {note}", file=sys.stderr)
    print(f"torchguard: {options.output}: {report.summary()}")
    return 0
