"""How do records get into files and out of them again, whole or cut off by a crash?

Every kind of report but plain text carries its records: as its lines (``.jsonl``), in the document (``.json``), in a
property bag (``.sarif``), in a data block that no browser runs (``.html``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchguard import _config
from torchguard._report._records import FORMAT, Record, Report, ReportError

SUFFIXES = _config.REPORTS

_BLOCK = re.compile(r'<script type="application/json" id="records">(.*?)</script>', re.S)
_BEGINS = b'{"torchguard": '


def suffix_of(path: str) -> str:
    """Which kind of report a path asks for.

    Raises:
        ReportError: for none that there is.
    """
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in SUFFIXES:
        raise ReportError(f"{path!r} does not say by its ending what to write{_config.nearest(suffix, SUFFIXES)}")
    return suffix.lower()


def why(error: Exception) -> str:
    """The reason of an error of the operating system, without number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def cannot_write(path: str, error: Exception) -> str:
    """One line for the user."""
    return f"the report cannot be written to {path}: {why(error)}"


def line_of(record: Record) -> bytes:
    """A record as one line of UTF-8; half a surrogate pair becomes the JSON escape for it."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_whole(path: str, text: str) -> None:
    """Replace a file at once: a reader, or a crash, finds the old one or the new one.

    Raises:
        ReportError: if it cannot be written.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        Path(part).write_bytes(text.encode("utf-8", "backslashreplace"))
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise ReportError(cannot_write(path, error)) from None


# ---- reading


def read_into(report: Report, path: str) -> None:
    """Add the records of a file to a report, and a note for what of it cannot be read.

    Raises:
        ReportError: if it cannot be read or is none of our reports.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {why(error)}") from None
    if not data.strip():
        report.notes.append(f"{path}: empty: its process ended before it wrote anything")
        return
    if data.lstrip().startswith(_BEGINS) or _BEGINS.startswith(data.strip()):
        _read_lines(report, path, data)
    else:
        _read_document(report, path, data)


def _read_lines(report: Report, path: str, data: bytes) -> None:
    lines = data.split(b"\n")
    last = len(lines) if lines[-1] else None  # every whole line ends in a newline
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            _check_format(path, record)
            report.apply(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if number == last:
                report.notes.append(f"{path}: the last line is cut off, its process was killed while it wrote it")
            else:
                report.notes.append(f"{path}: line {number} cannot be read, it is left out")


def _check_format(path: str, record: Any) -> None:
    version = record.get("torchguard", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ReportError(f"{path} was written by a newer torchguard: merge it with that one")


def _read_document(report: Report, path: str, data: bytes) -> None:
    try:
        text = data.decode()
        if text.lstrip().startswith("<"):
            block = _BLOCK.search(text)
            records = json.loads(block.group(1)) if block else None
        else:
            document = json.loads(text)
            records = document.get("records")
            if "runs" in document:
                records = document["runs"][0]["properties"]["torchguard"]
        if not isinstance(records, list):
            raise ValueError
        for record in records:
            _check_format(path, record)
            report.apply(record)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        hint = "; text reports cannot be merged, the other kinds can" if path.lower().endswith(".txt") else ""
        raise ReportError(f"{path} is not a report of torchguard, or is damaged{hint}") from None


# ---- writing


def write_report(report: Report, path: str) -> None:
    """Write a report in the format that its suffix names.

    Raises:
        ReportError: for a suffix that there is not, or if the file cannot be written.
    """
    write_whole(path, rendered(report, suffix_of(path)))


def rendered(report: Report, suffix: str) -> str:
    """The report as the text of a file."""
    if suffix == ".jsonl":
        return "".join(line_of(record).decode() for record in report.records())
    if suffix == ".json":
        return (
            json.dumps({"records": list(report.records()), "sites": _sites(report)}, indent=1, ensure_ascii=False)
            + "\n"
        )
    if suffix == ".sarif":
        from torchguard._report import _sarif

        return json.dumps(_sarif.document(report), indent=1, ensure_ascii=False) + "\n"
    if suffix == ".html":
        from torchguard._report import _page

        return _page.page(report)
    return text(report)


def _sites(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "times": site.times,
            "ranks": report.ranks(site),
            "reason": site.reason,
            "hits": [{**vars(hit), "times": times} for hit, times in site.hits.items()],
            "violation": site.violation,
        }
        for site in report.ordered()
    ]


def text(report: Report) -> str:
    """The report as a terminal shows it."""
    parts = []
    for site in report.findings:
        parts += [str(site.as_violation()), f"  hit:   {_who(report, site)}\n"]
    for site in report.answered:
        answer = "allowed" if site.suppressed is None else "suppressed"
        violation = site.as_violation()
        place = violation.written or violation.read or violation.saved
        where = f"{place}  {place.source}" if place else "(no user code on the stack)"
        parts.append(f"{violation.headline}\n  {where}\n  {answer}: {site.reason}\n  hit:   {_who(report, site)}\n")
    parts += [f"not watched: {what}" for what in sorted(report.unwatched)]
    parts += [f"note: {note}" for note in report.told()]
    return "\n".join([*parts, f"torchguard: {report.summary()}", ""])


def _who(report: Report, site: Any) -> str:
    where: Iterable[str] = (
        f"{'once' if times == 1 else f'{times} times'} by {report.processes[hit.process].name}, thread {hit.thread}"
        + (f", in {hit.test}" if hit.test else "")
        for hit, times in site.hits.items()
    )
    return "; ".join(where)
