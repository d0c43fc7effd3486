"""What does a report hold: which processes ran, which sites did they hit, how often, in which thread and test?

A report is what its records add up to. Adding is a join: files may come in any order, and records more than once (a
process's report and a merge that has it already), and the sum is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from torchguard._model import Place
from torchguard._violation import Kind, Violation

#: Version of the records. A reader takes what is not newer than itself.
FORMAT = 1

LABELS = ("saved", "aliased", "written", "read")

#: The places that make a site what it is: backward may read one save from several lines.
SITE = ("saved", "aliased", "written")

#: One record, as in a line of a ``.jsonl`` report.
Record = dict[str, Any]


class ReportError(Exception):
    """A report that cannot be opened, read or written; the message is one line for the user."""


@dataclass(frozen=True, order=True)
class Process:
    """One process that wrote a report.

    Attributes:
        id: unique to this process and start.
        pid: its number, 0 if the line that said so is lost.
        host: name of its machine.
        rank: rank in its distributed job, None if it has none.
        started: when its report was opened, UTC, ISO 8601.
        ended: when its report was closed; ``""`` if it never was.
        versions: of torchguard, torch and Python.
    """

    id: str
    pid: int = 0
    host: str = ""
    rank: int | None = None
    started: str = ""
    ended: str = ""
    versions: str = ""

    @property
    def name(self) -> str:
        """For people: ``rank 1 (pid 4242 on node7)``."""
        process = f"pid {self.pid or '?'} on {self.host or '?'}"
        return process if self.rank is None else f"rank {self.rank} ({process})"


@dataclass(frozen=True)
class Hit:
    """Who hit a site: a process, one of its threads, and the test that ran (``""`` for none)."""

    process: str
    thread: str
    test: str


@dataclass
class Site:
    """A violation, and how often each process, thread and test hit it.

    Attributes:
        id: short hash of what makes two violations the same finding, also across checkouts.
        violation: ``Violation.to_dict()``, less what ``hits`` says, and each place with its ``path`` below the
            repository root (None if it is not) and its ``context``, the lines around it.
        suppressed: the reason if a suppression file answered for it, else None.
        first: when it was first hit, and by which process.
        hits: how often.
        line_hash: what code-scanning services know the line of the write by; ``""`` if its file could not be read.
    """

    id: str
    violation: dict[str, Any]
    suppressed: str | None
    first: tuple[str, str]
    hits: dict[Hit, int] = field(default_factory=dict)
    line_hash: str = ""

    @property
    def times(self) -> int:
        """How often it was hit in all."""
        return sum(self.hits.values())

    @property
    def reason(self) -> str | None:
        """Why it does not count as a finding; None if it does."""
        allowed = self.violation.get("allowed")
        return allowed if allowed is not None else self.suppressed

    def place(self, label: str) -> dict[str, Any] | None:
        """The place called ``saved``, ``aliased``, ``written`` or ``read``."""
        return self.violation.get(label)

    def as_violation(self) -> Violation:
        """The violation, with paths relative to the repository root."""
        known = {entry.name for entry in fields(Violation)}
        data = {name: value for name, value in self.violation.items() if name in known}
        data.update({label: _place(self.place(label)) for label in LABELS})
        hit = next(iter(self.hits), None)
        data.update(shape=tuple(data["shape"]), times=max(1, self.times), thread=hit.thread if hit else "")
        return Violation(**data)

    def steps(self) -> list[tuple[str, dict[str, Any] | None, str]]:
        """The life of the memory in order: what happened (saved, aliased, written, read), the place, what is known."""
        violation = self.as_violation()
        label_of = {id(getattr(violation, label)): label for label in LABELS if getattr(violation, label) is not None}
        return [(step, self.place(label_of.get(id(place), "")), note) for step, place, note in violation.timeline()]

    def order(self) -> tuple[Any, ...]:
        """Sites are listed as they were first hit."""
        return (*self.first, self.id)


def _place(data: Mapping[str, Any] | None) -> Place | None:
    if data is None:
        return None
    return Place(data["path"] or data["file"], data["line"], data["function"], data["source"], data["expression"])


def site_id(violation: Mapping[str, Any], suppressed: str | None) -> str:
    """Hash of what makes two violations the same finding (what ``Violation.site`` has). Paths below the repository root
    make it the same for every rank, wherever its checkout lies.
    """
    places = [
        place and [place["path"] or place["file"], place["line"], place["function"], place["expression"]]
        for place in map(violation.get, SITE)
    ]
    return digest([violation["kind"], violation["operation"], violation["allowed"], suppressed, *places])


def digest(value: Any) -> str:
    """16 hexadecimal digits that plain data is known by."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclass
class Report:
    """What records add up to.

    Attributes:
        processes: by id.
        sites: by id.
        unwatched: what the guards could not watch.
        notes: what was wrong with the files that it was read from.
    """

    processes: dict[str, Process] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    unwatched: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    # ---- adding up

    def apply(self, record: Record) -> None:
        """Add one record; what a newer torchguard writes beside the known ones is passed over.

        Raises:
            ValueError, TypeError, KeyError: if it is not a record.
        """
        kind = record["record"]
        if kind == "process":
            self._join_process(Process(**_typed(record["about"], Process)))
        elif kind == "violation":
            self._join_site(record)
        elif kind == "hits":
            hit, times = Hit(**_typed(record["hit"], Hit)), _count(record["times"])
            site = self.sites[record["site"]]
            site.hits[hit] = max(times, site.hits.get(hit, 0))
            self.processes.setdefault(hit.process, Process(hit.process))  # whose own line may be lost
        elif kind == "unwatched":
            self.unwatched.setdefault(_text(record["what"]))

    def _join_process(self, process: Process) -> None:
        known = self.processes.get(process.id, process)
        # Field by field: a later line of the same process knows its rank, or that it ended.
        joined = {
            entry.name: _larger(getattr(known, entry.name), getattr(process, entry.name)) for entry in fields(Process)
        }
        self.processes[process.id] = Process(**joined)

    def _join_site(self, record: Record) -> None:
        violation, suppressed = _checked(record["violation"]), record["suppressed"]
        if suppressed is not None:
            _text(suppressed)
        hit, times = Hit(**_typed(record["hit"], Hit)), _count(record["times"])
        first = (_text(record["time"]), hit.process)
        identity = site_id(violation, suppressed)
        new = Site(identity, violation, suppressed, first, {}, _text(record["line_hash"]))
        known = self.sites.get(identity, new)
        if first < known.first:
            new.hits = known.hits
            known = new
        known.hits[hit] = max(times, known.hits.get(hit, 0))
        self.sites[identity] = known
        self._join_process(Process(**_typed(record["about"], Process)))
        self.processes.setdefault(hit.process, Process(hit.process))

    # ---- taking apart

    def records(self) -> Iterator[Record]:
        """Records that add up to this report again."""
        for process in sorted(self.processes.values(), key=lambda process: (process.started, process.id)):
            yield process_record(process)
        for site in self.ordered():
            hits = sorted(site.hits.items(), key=lambda item: (item[0].process != site.first[1], str(item[0])))
            (hit, times), *rest = hits
            yield violation_record(site, hit, times, self.processes[hit.process])
            for hit, times in rest:
                yield hits_record(site.id, hit, times)
        for what in sorted(self.unwatched):
            yield {"record": "unwatched", "what": what}

    def ordered(self) -> list[Site]:
        """The sites as they were first hit."""
        return sorted(self.sites.values(), key=Site.order)

    # ---- answers

    @property
    def findings(self) -> list[Site]:
        """The sites that nothing allows or suppresses."""
        return [site for site in self.ordered() if site.reason is None]

    @property
    def answered(self) -> list[Site]:
        """The sites that an ``allow`` block or a suppression answers for."""
        return [site for site in self.ordered() if site.reason is not None]

    @property
    def unfinished(self) -> list[Process]:
        """The processes that never closed their report: killed, or running still."""
        return sorted((one for one in self.processes.values() if not one.ended), key=lambda one: one.name)

    def told(self) -> list[str]:
        """What a reader should know: what was wrong with the files, and which processes did not end."""
        told = list(self.notes)
        if self.unfinished:
            names = ", ".join(process.name for process in self.unfinished)
            count = counted(len(self.unfinished), "process", "processes")
            told.append(
                f"{count} did not close the report (killed, or running still), so counts may be too low: {names}"
            )
        return told

    def ranks(self, site: Site) -> list[int]:
        """The ranks that hit a site."""
        ranks = {self.processes[hit.process].rank for hit in site.hits}
        return sorted(rank for rank in ranks if rank is not None)

    def summary(self) -> str:
        """One line for the user: how many sites, how often, in how many processes."""
        hits = sum(site.times for site in self.findings)
        text = f"{counted(len(self.findings), 'site')}, {counted(hits, 'hit')}, in " if hits else "no violations in "
        text += counted(len(self.processes), "process", "processes")
        if self.answered:
            text += f"; {len(self.answered)} allowed or suppressed"
        return text


def counted(number: int, one: str, many: str = "") -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


# ---- records as they are written


def process_record(process: Process) -> Record:
    """Tells of a process; the first line of its report, and again when its rank becomes known and when it ends."""
    return {"torchguard": FORMAT, "record": "process", "about": vars(process)}


def violation_record(site: Site, hit: Hit, times: int, process: Process) -> Record:
    """Tells of a site when it is first hit; complete in itself, for readers that go line by line."""
    return {
        "record": "violation",
        "site": site.id,
        "time": site.first[0],
        "violation": site.violation,
        "suppressed": site.suppressed,
        "line_hash": site.line_hash,
        "hit": vars(hit),
        "times": times,
        "about": vars(process),
    }


def hits_record(site: str, hit: Hit, times: int) -> Record:
    """Tells how often a known site was hit so far."""
    return {"record": "hits", "site": site, "hit": vars(hit), "times": times}


# ---- what is read is checked: it may be anything


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a text: {value!r}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value


def _typed(data: Any, what: type) -> dict[str, Any]:
    """The entries of ``data`` that the class ``what`` knows, each of the right type."""
    known = {}
    for entry in fields(what):
        if entry.name in data:
            value = data[entry.name]
            if entry.type == "str":
                _text(value)
            elif not (value is None and "None" in str(entry.type)):
                _count(value)
            known[entry.name] = value
    return known


def _checked(violation: Any) -> dict[str, Any]:
    for name in ("kind", "operation", "saved_by", "dtype", "device", "caught"):
        _text(violation[name])
    if violation["kind"] not in get_args(Kind) or violation["caught"] not in ("write", "read"):
        raise ValueError("not a kind of violation")
    for number in (violation["elements"], violation["of"], *violation["shape"]):
        _count(number)
    if violation["allowed"] is not None:
        _text(violation["allowed"])
    for place in map(violation.get, LABELS):
        if place is not None:
            for name in ("file", "function", "source", "expression"):
                _text(place[name])
            _count(place["line"])
            if place["path"] is not None:
                _text(place["path"])
            if place["context"] is not None:
                _count(place["context"]["first"])
                for line in place["context"]["lines"]:
                    _text(line)
    return dict(violation)


def _larger(one: Any, other: Any) -> Any:
    """What is known wins over what is not; the later of two times."""
    known = [value for value in (one, other) if value not in (None, "", 0)]
    return max(known) if known else (one if one is not None else other)
