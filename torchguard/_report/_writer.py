"""How does a running process write its report so that a crash loses no violation?

Each violation is a line in a journal before ``add()`` returns, written without a buffer: whatever kills the process
later, the line stays. A ``.jsonl`` report is its journal; the other formats are made of theirs when the report is
closed, and if the process never gets there, ``torchguard merge`` makes them of the journal that it leaves.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import sys
import threading
import uuid
import weakref
from collections.abc import Callable
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
_TAKEN_BY = f"{_TAKEN}_BY"

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
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _versions() -> str:
    told = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchguard"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version:
            told.insert(0, f"{name} {version}")
    return ", ".join(told)


def _lock(descriptor: int) -> bool:
    """Keep a file until it is closed, or the process ends; False if another process keeps it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a file system without locks
        return True
    return True


class ReportWriter:
    """Writes the report of this process; made by :func:`open_report`. Any thread may add to it; what goes wrong after
    it is open is said, and raises nothing.
    """

    def __init__(self, path: str, say: Callable[[str], None]) -> None:
        self._asked = os.path.abspath(path)
        self._suffix = _files.suffix_of(path)
        self._say = say
        self._inherited = {name: os.environ.get(name) for name in (_TAKEN, _TAKEN_BY)}
        self._start()
        # A child (a worker of a loader, say) makes a file only when it has something to say; a rank always has.
        self._child = self._inherited[_TAKEN] == self._mark() and self._inherited[_TAKEN_BY] != str(os.getpid())
        if not self._child:
            self._open()
            os.environ.update({_TAKEN: self._mark(), _TAKEN_BY: str(os.getpid())})
        _writers.add(self)

    def _mark(self) -> str:
        return f"{self._process.rank}:{self._asked}"

    def _start(self) -> None:
        """As at birth; also in a child that was forked, which must not write to its parent's file."""
        self._lock = threading.RLock()
        self._report = Report()
        self._known: dict[Any, str] = {}
        self._said: dict[tuple[str, Hit], int] = {}
        self._descriptor = -1
        self._broken = False
        self._closed = False
        self._crowded = False  # whether another job writes to the path now
        self._path = ""
        self._root = os.sep
        rank = rank_of_this_process()
        host = re.sub(r"[^\w-]", "_", socket.gethostname().split(".")[0]) or "host"
        self._process = Process(uuid.uuid4().hex[:16], os.getpid(), host, rank, _now(), "", _versions())

    def _name(self) -> str:
        """The path of this process: what the one that was asked for lacks is put before the suffix."""
        rank, host, pid = self._process.rank, self._process.host, str(self._process.pid)
        stem, suffix = os.path.splitext(self._asked)
        of_a_rank = rank is not None and "%r" not in stem
        if of_a_rank:
            stem += ".rank%r"
        # torchrun starts a rank that died again: its report must not take the place of the first one's.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
        if "%p" not in stem and (of_a_rank or self._child or self._crowded or restarted):
            stem += ".pid%p" if "%h" in stem else ".%h.pid%p"
        told = {"%p": pid, "%r": "0" if rank is None else str(rank), "%h": host}
        return re.sub("%[prh]", lambda match: told[match[0]], stem) + suffix

    def _open(self) -> None:
        self._path = self._name()
        self._root = self._find_root()
        try:
            self._open_journal()
            if not _lock(self._descriptor) and not self._crowded:
                self._close_descriptor()
                self._crowded = True
                self._path = self._name()
                self._open_journal()
                _lock(self._descriptor)
            os.ftruncate(self._descriptor, 0)
            if self.journal != self._path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)  # one of an earlier run, which this run would seem to have written
        except OSError as error:
            raise ReportError(_files.cannot_write(self._path, error)) from None
        self._write(process_record(self._process))
        for what in self._report.unwatched:  # told before there was a file
            self._write({"record": "unwatched", "what": what})

    def _open_journal(self) -> None:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.journal, flags, 0o666)

    def _bring_back(self) -> None:
        """A program that begins by emptying its output directory may have removed the report: write it again."""
        if self._descriptor >= 0 and not os.path.lexists(self.journal):
            self._close_descriptor()
            self._open_journal()
            _lock(self._descriptor)
            for record in (process_record(self._process), *self._report.records()):
                self._write(record)

    def _find_root(self) -> str:
        main = getattr(sys.modules.get("__main__"), "__file__", None) or "."
        try:
            return repository_root(os.getcwd()) or repository_root(os.path.dirname(main)) or os.getcwd()
        except OSError:  # the working directory is gone
            return os.sep

    # ---- what it tells

    @property
    def path(self) -> str:
        """Where the report of this process is, or will be when it is closed; ``""`` if there is none."""
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

    def add(self, violation: Violation, *, test: str | None = None, suppressed: bool = False) -> None:
        """Add a violation, ``violation.times`` times. It is in the file when this returns; how often a known site was
        hit is, while the process runs, told to within a tenth.

        Args:
            violation: what was found.
            test: the test that ran; by default the one that pytest says is running.
            suppressed: whether what ``violation.allowed`` says is the reason of a suppression, and not of an ``allow``
                block.
        """
        if test is None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        with self._lock:
            self._try(lambda: self._add(violation, test, suppressed))

    def _add(self, violation: Violation, test: str, suppressed: bool) -> None:
        if self._closed:
            return
        self._look_for_rank()
        self._open_if_needed()
        key = (violation.site, violation.allowed, suppressed)
        identity = self._known.get(key)
        hit = Hit(self._process.id, violation.thread, test)
        if identity is None:
            reason = violation.allowed if suppressed else None
            data = self._data(violation)
            if suppressed:
                data["allowed"] = None
            identity = self._known[key] = site_id(data, reason)
            if identity not in self._report.sites:
                record = self._first(identity, data, reason, hit, violation)
                self._bring_back()
                self._report.apply(record)
                self._said[identity, hit] = violation.times
                self._write(record)
                return
        hits = self._report.sites[identity].hits
        hits[hit] = hits.get(hit, 0) + violation.times
        said = self._said.get((identity, hit), 0)
        if hits[hit] >= said + max(1, said // 10):
            self._say_times(identity, hit)

    def absorb(self, path: str) -> None:
        """Add what is in another process's report, and remove its file.

        Raises:
            ReportError: if it cannot be read.
        """
        other = Report()
        _files.read_into(other, path)
        with self._lock:
            self._open_if_needed()
            for record in other.records():
                self._report.apply(record)
                self._write(record)
            self._report.notes += other.notes
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _open_if_needed(self) -> None:
        if self._descriptor < 0 and not self._broken:
            self._try(self._open)

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
        number = line_hash(place.file, place.line, place.source) if place else ""
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

    def _say_times(self, identity: str, hit: Hit) -> None:
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

    def _try(self, what: Callable[[], None]) -> None:
        """A report that cannot be written must not end the training that it reports on."""
        try:
            what()
        except (OSError, ReportError) as error:
            self._close_descriptor()
            if not self._broken:
                self._broken = True
                self._say(str(error) if isinstance(error, ReportError) else _files.cannot_write(self.journal, error))

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    # ---- the end

    def close(self) -> None:
        """End the report: counts are exact now, and a format other than ``.jsonl`` is made; if it cannot be, that is
        said, and the journal stays.
        """
        with self._lock:
            if self._closed:
                return
            self._try(self._bring_back)
            for identity, site in self._report.sites.items():
                for hit, times in site.hits.items():
                    if self._said.get((identity, hit)) != times:
                        self._say_times(identity, hit)
            self._process = Process(**{**vars(self._process), "ended": _now()})
            record = process_record(self._process)
            self._report.apply(record)
            self._write(record)
            self._closed = True
            self._close_descriptor()
            self._give_name_back()
            if self._path and self._suffix != ".jsonl" and not self._broken:
                self._try(self._make)

    def _make(self) -> None:
        try:
            _files.write_report(self._report, self._path)
        except Exception as error:
            told = str(error) if isinstance(error, ReportError) else _files.cannot_write(self._path, error)
            kept = f"its lines are kept: torchguard merge {self.journal} -o {self._path}"
            raise ReportError(f"{told}; {kept}") from None
        with contextlib.suppress(OSError):
            os.unlink(self.journal)

    def _give_name_back(self) -> None:
        if not self._child and os.environ.get(_TAKEN_BY) == str(os.getpid()):
            for name, value in self._inherited.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _forked(self) -> None:
        closed = self._closed
        self._close_descriptor()
        self._start()
        self._closed, self._child = closed, True


def _after_fork() -> None:
    for writer in list(_writers):
        writer._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _say_on_stderr(line: str) -> None:
    print(f"torchguard: {line}", file=sys.stderr)


def open_report(path: str | os.PathLike[str], say: Callable[[str], None] = _say_on_stderr) -> ReportWriter:
    """Open the report of this process; the suffix says which kind: ``.jsonl``, ``.json``, ``.sarif``, ``.html`` or
    ``.txt``. ``%r``, ``%h`` and ``%p`` stand for rank, host and process.

    A rank of a distributed job writes to a file of its own, ``report.rank1.node7.pid4242.jsonl`` for ``report.jsonl``;
    so does a child of a process that writes to that path (without the rank), when it first has something to tell.

    Args:
        path: where to.
        say: how to tell in one line what goes wrong later.

    Raises:
        ReportError: for a suffix that there is not, or a path that cannot be written to.
    """
    return ReportWriter(os.fspath(path), say)
