"""How does a running process write its report so that a crash loses no violation?

Each violation is a line in a journal before ``add()`` returns, written without a buffer: whatever kills the process
later, the line stays. A ``.jsonl`` report is its journal; the other formats are made of theirs when the report is
closed, and if the process never gets there, ``torchguard merge`` makes them of the journal that it leaves.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import re
import socket
import sys
import threading
import uuid
import weakref
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from torchguard._report import _files
from torchguard._report._records import (
    LABELS,
    Hit,
    Process,
    Record,
    Report,
    ReportError,
    Site,
    hits_record,
    process_record,
    site_id,
    violation_record,
)
from torchguard._report._source import context_of, line_hash, path_below, repository_root
from torchguard._violation import Violation

#: Rank and size as launchers hand them to a process: torchrun and most others, Slurm, Open MPI, MPICH.
_RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)

#: Tells the children of a process that the plain name of a report is taken.
_TAKEN = "TORCHGUARD_REPORT_TAKEN"

_writers: weakref.WeakSet[ReportWriter] = weakref.WeakSet()


def rank_of_this_process() -> int | None:
    """The rank in a distributed job of more than one process; None outside of one."""
    for rank, size in _RANKS:
        value = os.environ.get(rank, "")
        if value.isdecimal() and os.environ.get(size) != "1":
            return int(value)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()) if distributed.get_world_size() > 1 else None
    return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _versions() -> str:
    told = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchguard"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version:
            told.insert(0, f"{name} {version}")
    return ", ".join(told)


class ReportWriter:
    """Writes the report of this process; made by :func:`open_report`. Any thread may add to it."""

    def __init__(self, path: str) -> None:
        self._asked = os.path.abspath(path)
        self._suffix = _files.suffix_of(path)
        self._start()
        rank = rank_of_this_process()
        taken = os.environ.get(_TAKEN) == self._mark(rank) and self._asked_pid() != os.getpid()
        if not taken:
            # A child (a worker of a loader, say) makes a file only when it has something to say; a rank always has.
            os.environ[_TAKEN] = self._mark(rank)
            os.environ[f"{_TAKEN}_BY"] = str(os.getpid())
            self._open(own_name=rank is not None)
        _writers.add(self)
        atexit.register(self._close_at_exit)

    def _mark(self, rank: int | None) -> str:
        return f"{rank}:{self._asked}"

    @staticmethod
    def _asked_pid() -> int:
        value = os.environ.get(f"{_TAKEN}_BY", "")
        return int(value) if value.isdecimal() else 0

    def _start(self) -> None:
        """As at birth; also in a child that was forked, which must not write to its parent's file."""
        self._lock = threading.RLock()
        self._report = Report()
        self._known: dict[Any, str] = {}
        self._said: dict[tuple[str, Hit], int] = {}
        self._descriptor = -1
        self._broken = False
        self._closed = False
        self._path = ""
        self._root = os.sep
        rank = rank_of_this_process()
        host = re.sub(r"[^\w-]", "_", socket.gethostname().split(".")[0]) or "host"
        self._process = Process(uuid.uuid4().hex[:16], os.getpid(), host, rank, _now(), "", _versions())

    def _open(self, own_name: bool) -> None:
        process = self._process
        self._path = self._asked
        if own_name:
            rank = "" if process.rank is None else f".rank{process.rank}"
            stem = os.path.splitext(self._asked)[0]
            self._path = f"{stem}{rank}.{process.host}.{process.pid}{self._suffix}"
        self._root = self._find_root()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._descriptor = os.open(self.journal, flags, 0o666)
            if self.journal != self._path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)  # one of an earlier run, which this run would seem to have written
        except OSError as error:
            raise ReportError(f"cannot write {self._path}: {_files.why(error)}") from None
        self._write(process_record(process))
        for what in self._report.unwatched:  # told before there was a file
            self._write({"record": "unwatched", "what": what})

    def _find_root(self) -> str:
        main = getattr(sys.modules.get("__main__"), "__file__", None) or "."
        try:
            return repository_root(os.getcwd()) or repository_root(os.path.dirname(main)) or os.getcwd()
        except OSError:  # the working directory is gone
            return os.sep

    # ---- what it tells

    @property
    def path(self) -> str:
        """Where the report of this process is, or will be when it is closed; ``""`` while there is none."""
        return self._path

    @property
    def journal(self) -> str:
        """Where its lines are while the process runs."""
        return self._path if self._suffix == ".jsonl" else self._path + ".jsonl"

    @property
    def report(self) -> Report:
        """What was added so far."""
        return self._report

    # ---- what is added

    def add(self, violation: Violation, *, test: str | None = None, suppressed: str | None = None) -> None:
        """Add a violation, ``violation.times`` times. It is in the file when this returns; how often a known site was
        hit is, while the process runs, told to within a tenth.

        Args:
            violation: what was found.
            test: the test that ran; by default the one that pytest says is running.
            suppressed: the reason, if a suppression file answers for it.
        """
        if test is None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        with self._lock:
            if self._closed:
                return
            self._look_for_rank()
            if self._descriptor < 0 and not self._broken:
                self._try(lambda: self._open(own_name=True))
            key = (violation.site, violation.read, violation.allowed, suppressed)
            identity = self._known.get(key)
            hit = Hit(self._process.id, violation.thread, test)
            if identity is None:
                data = self._data(violation)
                identity = self._known[key] = site_id(data, suppressed)
                if identity not in self._report.sites:
                    record = self._first(identity, data, suppressed, hit, violation)
                    self._report.apply(record)
                    self._said[identity, hit] = violation.times
                    self._write(record)
                    return
            hits = self._report.sites[identity].hits
            hits[hit] = hits.get(hit, 0) + violation.times
            said = self._said.get((identity, hit), 0)
            if hits[hit] >= said + max(1, said // 10):
                self._say(identity, hit)

    def note_unwatched(self, what: str) -> None:
        """Add what the guard cannot watch, once."""
        with self._lock:
            if what not in self._report.unwatched and not self._closed:
                record: Record = {"record": "unwatched", "what": what}
                self._report.apply(record)
                self._write(record)

    def _look_for_rank(self) -> None:
        if self._process.rank is None and (rank := rank_of_this_process()) is not None:
            self._process = Process(**{**vars(self._process), "rank": rank})
            self._write(process_record(self._process))

    def _first(
        self, identity: str, data: dict[str, Any], suppressed: str | None, hit: Hit, violation: Violation
    ) -> Record:
        place = violation.written or violation.read or violation.saved
        number = line_hash(place.file, place.line) if place else ""
        site = Site(identity, data, suppressed, (_now(), hit.process), {}, number)
        return violation_record(site, hit, violation.times, self._process)

    def _data(self, violation: Violation) -> dict[str, Any]:
        data = violation.to_dict()
        del data["times"], data["thread"]
        for label in LABELS:
            place = data.get(label)
            if place is not None:
                place["path"] = path_below(self._root, place["file"])
                place["context"] = context_of(place["file"], place["line"], place["source"])
        return data

    def _say(self, identity: str, hit: Hit) -> None:
        times = self._report.sites[identity].hits[hit]
        self._said[identity, hit] = times
        self._write(hits_record(identity, hit, times))

    def _write(self, record: Record) -> None:
        if self._descriptor < 0:
            return
        data = memoryview(_files.line_of(record))

        def write() -> None:
            rest = data
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

        self._try(write)

    def _try(self, what: Any) -> None:
        """A report that cannot be written must not end the training that it reports on."""
        try:
            what()
        except (OSError, ReportError) as error:
            self._broken = True
            if self._descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(self._descriptor)
                self._descriptor = -1
            print(f"torchguard: the report stops here: {self._path}: {_files.why(error)}", file=sys.stderr)

    # ---- the end

    def close(self) -> None:
        """End the report: counts are exact now, and a format other than ``.jsonl`` is made.

        Raises:
            ReportError: if it cannot be written; the journal stays then.
        """
        with self._lock:
            if self._closed:
                return
            for identity, site in self._report.sites.items():
                for hit, times in site.hits.items():
                    if self._said.get((identity, hit)) != times:
                        self._say(identity, hit)
            self._process = Process(**{**vars(self._process), "ended": _now()})
            record = process_record(self._process)
            self._report.apply(record)
            opened = self._descriptor >= 0
            self._write(record)
            self._closed = True
            atexit.unregister(self._close_at_exit)
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            if opened and self._suffix != ".jsonl":
                _files.write_report(self._report, self._path)
                with contextlib.suppress(OSError):
                    os.unlink(self.journal)

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except ReportError as error:
            print(f"torchguard: {error}", file=sys.stderr)

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _forked(self) -> None:
        closed, descriptor = self._closed, self._descriptor
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._start()
        self._closed = closed


def _after_fork() -> None:
    for writer in list(_writers):
        writer._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_report(path: str | os.PathLike[str]) -> ReportWriter:
    """Open the report of this process; the suffix says which kind: ``.jsonl``, ``.json``, ``.sarif``, ``.html`` or
    ``.txt``.

    A rank of a distributed job writes to a file of its own, ``report.rank1.node7.4242.jsonl`` for ``report.jsonl``;
    so does a child of a process that writes to that path, when it first has something to tell.

    Raises:
        ReportError: for a suffix that there is not, or a path that cannot be written to.
    """
    return ReportWriter(os.fspath(path))
