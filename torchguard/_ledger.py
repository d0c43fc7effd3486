"""Which saves are alive, and which of them lie in a given storage or stretch of memory?

Knows plain integers and weak references only. Note [Lazy index]: a save costs one append to ``pending``; it
is filed under its storage when the first question is asked after it was made, so saves that come and go
between two writes (all of them, in a training loop that writes after backward) are never filed at all. Dead
entries are dropped when they are met, and by a sweep whenever their number may have doubled, so every
operation is flat in the number of live saves. Where many saves lie in one storage (parameters cut from a flat
buffer), a write asks an index of the stretches that they occupy in it, which is drawn on the first such question.

Note [Held by a look]. A save is alive as long as autograd holds it, and that is known by its weak reference. A thread
that looks at the saves of others (at all of them, where a guard is left or ``allow`` is entered; at a few, where it
takes an alias; at one for a moment, wherever it is switched away from) holds them meanwhile: what another thread's
backward lets go of then seems to be alive. So whoever finds that a write would hit a save lets go of it, waits for a
moment at which no other thread is in the middle of a function that holds saves (the ledger's own, and those that are
marked with ``holds_saves``), and looks again. (To wait for those that were in one is not enough: another may have taken
the save up from them.)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref


class Entry(Protocol):
    """What the ledger must know of a save."""

    @property
    def storage(self) -> int:
        """Identity of the storage that holds the save."""


E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])

#: First and one past the last byte of an entry's storage, and whether other storages may lie over the same
#: memory.
Extent = tuple[int, int, bool]

_SLACK = 1024
_LARGE = 64
_FEW = 4

#: Seconds to wait for other threads at the most.
_PATIENCE = 5.0


#: Functions of other modules that hold saves; see Note [Held by a look].
_holders: set[CodeType] = set()


class Ledger(Generic[E]):
    """Live entries by storage, held weakly.

    Args:
        extent_of: tells where an entry's storage lies, or None where it has no memory. A storage is *foreign*
            when torch's own allocator did not make it (``from_numpy``, DLPack, a file): only those can
            overlap another storage.
        is_foreign: the third item of the extent alone, where that is cheaper to tell.
        reach_of: first and one past the last byte that an entry occupies, counted from the beginning of its storage;
            None where a write anywhere in the storage concerns it.
    """

    def __init__(
        self,
        extent_of: Callable[[E], Extent | None],
        is_foreign: Callable[[E], bool] | None = None,
        reach_of: Callable[[E], tuple[int, int] | None] = lambda entry: None,
    ) -> None:
        #: Called when the last entry is gone.
        self.on_empty: Callable[[], None] | None = None
        self._extent_of = extent_of
        self._is_foreign = is_foreign or self._extent_is_foreign
        self.pending: deque[ref[E]] = deque()
        self.filed = 0  # how many have been taken from ``pending`` so far
        self.filing: list[None] = []  # one for each time that somebody has saves in the hands that are in neither
        self.groups: dict[int, list[ref[E]]] = {}
        self.foreign: dict[int, Extent] = {}
        self._reach_of = reach_of
        self._spans = SpansByStorage(self._stretch_of)  # of large groups that somebody has asked about a part of
        self._thin_at: dict[int, int] = {}  # size at which a large group is thinned out next
        self._unmapped: set[int] | None = None  # groups not yet in _map; None until it is first asked for
        self._map = _AddressMap()
        self._sweep_at = _SLACK
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            # No thread but the forking one is in the child: nobody else may be in the middle of something.
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._lock.release,
            )

    def add(self, entry: E) -> None:
        """Enter a save. (The pack hook appends to ``pending`` itself.)"""
        self.pending.append(ref(entry))

    def __bool__(self) -> bool:
        """False only where no save is alive."""
        return self.any_alive()

    def __len__(self) -> int:
        """How many saves are alive."""
        self.file()
        with self._lock:
            return sum(1 for group in list(self.groups.values()) for item in group if item() is not None)

    def file(self) -> None:
        """File what is pending."""
        pending = self.pending
        if not pending and not self.filing:
            return
        groups, is_foreign, filing = self.groups, self._is_foreign, self.filing
        with self._lock:
            filing.append(None)
            waiting = pending
            taken = 0
            item: ref[E] | None = None
            # No other thread takes from it, but a signal's handler or a finaliser may come between any two steps.
            try:
                if len(pending) > _FEW:
                    # Most have died: they are sorted out without a step of Python's for each.
                    waiting = deque()
                    with suppress(IndexError):  # once all are taken
                        waiting.extend(iter(pending.popleft, None))
                    taken = len(waiting)
                    alive = filter(None, map(_call, waiting))
                    waiting = deque(ref(entry) for entry in alive)  # the reference that was pending: an object has one
                while waiting:
                    try:
                        item = waiting.popleft()
                    except IndexError:
                        break  # what was left has been filed meanwhile
                    taken += waiting is pending
                    entry = item()
                    if entry is None:
                        continue
                    storage = entry.storage
                    group = groups.get(storage)
                    if (
                        group is not None
                        and (not group or group[-1]() is None)
                        and not self._ends_alive(storage, group)
                    ):
                        self._close(storage)  # the identity of a storage that is gone, used again
                        group = None
                    if group is None:
                        groups.setdefault(storage, []).append(item)
                        if is_foreign(entry):
                            extent = self._extent_of(entry)
                            if extent is not None:
                                self.foreign[storage] = extent
                        if self._unmapped is not None:
                            self._unmapped.add(storage)
                    else:
                        group.append(item)
                        if len(group) > _LARGE and len(group) > self._thin_at.get(storage, _LARGE):
                            group[:] = [other for other in group if other() is not None]
                            self._spans.pop(storage, None)
                            self._thin_at[storage] = 2 * len(group) + _LARGE
                if len(self.groups) > self._sweep_at:
                    self._sweep()
                self.filed += taken
            except BaseException:
                if waiting is not pending:
                    pending.extendleft(reversed(waiting))
                if item is not None:
                    pending.appendleft(item)
                raise
            finally:
                filing.pop()  # another may be filing above

    def _extent_is_foreign(self, entry: E) -> bool:
        extent = self._extent_of(entry)
        return extent is not None and extent[2]

    def _close(self, *storages: int) -> None:
        for known in (self.groups, self.foreign, self._thin_at, self._spans):
            if known:
                for storage in storages:
                    known.pop(storage, None)
        if self._unmapped is not None:
            for storage in storages:
                self._unmapped.discard(storage)
                self._map.discard(storage)
        if not self.groups and self.on_empty is not None:
            self.on_empty()

    def _sweep(self) -> None:
        for storage, group in list(self.groups.items()):
            group[:] = [item for item in group if item() is not None]
            self._spans.pop(storage, None)
            if not group:
                self._close(storage)
        self._sweep_at = 2 * len(self.groups) + _SLACK

    def any_alive(self) -> bool:
        """Whether any save is alive. Drops the dead ones that it meets, so it is flat in the long run."""
        if self.pending or self.filing:
            self.file()
        if not self.groups:
            return False
        with self._lock:
            dead = []
            try:
                for storage, group in self.groups.items():
                    if (len(group) == 1 and group[0]() is not None) or (
                        len(group) > 1 and self._ends_alive(storage, group)
                    ):
                        break
                    dead.append(storage)
            except RuntimeError:
                return True  # a signal's handler or a finaliser has saved in between
            if dead:
                self._close(*dead)
            return bool(self.groups)

    def _ends_alive(self, storage: int, group: list[ref[E]]) -> bool:
        """Drop the dead entries at a group's end; whether any is left."""
        while group and group[-1]() is None:
            group.pop()
        self._spans.shortened(storage, len(group))
        return bool(group)

    def any_in_storage(self, storage: int) -> bool:
        """Whether any save of one storage is alive. Drops the dead ones that it meets."""
        if self.pending or self.filing:
            self.file()
        group = self.groups.get(storage)
        if group is None:
            return False
        with self._lock:
            if self._ends_alive(storage, group):
                return True
            if self.groups.get(storage) is group:
                self._close(storage)
            return False

    def is_crowded(self, storage: int) -> bool:
        """Whether so many saves lie in a storage that it pays to ask about a part of it only."""
        return len(self.groups.get(storage, ())) > _LARGE

    def is_indexed(self, storage: int) -> bool:
        """Whether it has been taken down which parts of a storage its saves occupy."""
        return storage in self._spans

    def near(self, storage: int, low: int, high: int) -> list[E]:
        """The live saves of one storage that may occupy a byte of ``[low, high)``, counted from its beginning."""
        if self.pending or self.filing:
            self.file()
        group = self.groups.get(storage)
        if group is None or len(group) <= _LARGE:
            return self.in_storage(storage)
        with self._lock:
            near = self._spans.near(storage, group, low, high)
            return [entry for entry in map(_call, near) if entry is not None]

    def _stretch_of(self, item: ref[E]) -> tuple[int, int] | None:
        entry = item()
        return (0, 0) if entry is None else self._reach_of(entry)

    def lies_elsewhere(self, storage: int) -> None:
        """A save of this storage occupies another part of it now."""
        self._spans.pop(storage, None)

    def in_storage(self, storage: int) -> list[E]:
        """The live saves of one storage."""
        if self.pending or self.filing:
            self.file()
        group = self.groups.get(storage)
        if group is None:
            return []
        live = [entry for entry in (item() for item in group) if entry is not None]
        if len(live) < len(group):
            with self._lock:
                group[:] = [item for item in group if item() is not None]
                self._spans.pop(storage, None)
                if not group and self.groups.get(storage) is group:  # and not one that was opened meanwhile
                    self._close(storage)
        return live

    def all_alive(self) -> list[E]:
        """All live saves."""
        self.file()
        with self._lock:
            entries = [item() for group in list(self.groups.values()) for item in group]
        return [entry for entry in entries if entry is not None]

    @staticmethod
    def holds_saves(function: F) -> F:
        """Mark a function that holds saves until it returns, while other threads may be done with them."""
        _holders.add(function.__code__)
        return function

    def outlast_looks(self) -> None:
        """Wait for a moment at which no other thread holds a save. Whoever asks holds none."""
        deadline = time.monotonic() + _PATIENCE
        while _others_hold_saves() and time.monotonic() < deadline:
            time.sleep(0.0005)  # seconds

    @property
    def has_foreign(self) -> bool:
        """Whether a save may lie in memory that torch's allocator did not hand out."""
        if self.pending or self.filing:
            self.file()
        return bool(self.foreign)

    def across_storages(self, storage: int, extent: Extent) -> list[E]:
        """Live saves of *other* storages that lie over the same memory as ``extent``."""
        low, high, foreign = extent
        self.file()
        with self._lock:
            if foreign:
                self._draw_map()
                near: Iterator[int] = iter(self._map.find(low, high))
            else:
                near = (
                    key
                    for key, (start, end, _) in list(self.foreign.items())
                    if low < end and start < high and start < end and low < high
                )
            return [entry for key in near if key != storage for entry in self.in_storage(key)]

    def moved(self, storage: int) -> None:
        """A storage has other memory now: where it lies is looked up again."""
        self.file()
        with self._lock:
            self.foreign.pop(storage, None)
            entry = next((entry for entry in (item() for item in self.groups.get(storage, ())) if entry), None)
            extent = None if entry is None else self._extent_of(entry)
            if extent is not None and extent[2]:
                self.foreign[storage] = extent
            if self._unmapped is not None:
                self._map.discard(storage)
                if entry is not None:
                    self._unmapped.add(storage)

    def _draw_map(self) -> None:
        waiting = self.groups if self._unmapped is None else self._unmapped
        for storage in list(waiting):
            entry = next(
                (entry for entry in (item() for item in self.groups.get(storage, ())) if entry is not None),
                None,
            )
            extent = None if entry is None else self._extent_of(entry)
            if extent is not None:
                self._map.add(storage, extent[0], extent[1])
        self._unmapped = set()


def _others_hold_saves() -> bool:
    """Whether another thread is in the middle of a function that holds saves.

    This is such a function: a frame holds what it held until nobody holds the frame.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)  # a frame that holds itself would be a cycle, and hold all above
    for innermost in frames.values():
        frame: FrameType | None = innermost
        while frame is not None and frame.f_code is not _WAITS:  # who waits holds none, and may wait for this one
            if frame.f_code in _holders or frame.f_code.co_filename == __file__:
                return True
            frame = frame.f_back
    return False


_WAITS = Ledger.outlast_looks.__code__

#: Calls a weak reference.
_call: Callable[[ref[Any]], Any] = ref.__call__


class _Spans:
    """Things that lie in one storage, by the stretch that they occupy in it. Those of one stretch are one key."""

    def __init__(self) -> None:
        self.entered = 0  # so many of the list that this is an index of are in here
        self.size = 0
        self._anywhere: list[ref[Any]] = []
        self._by_stretch: dict[tuple[int, int], list[ref[Any]]] = {}
        self._map = _AddressMap(smallest=5)  # single elements of a buffer may be saved

    def enter(self, item: ref[Any], stretch: tuple[int, int] | None) -> None:
        self.size += 1
        if stretch is None:
            self._anywhere.append(item)
            return
        items = self._by_stretch.get(stretch)
        if items is None:
            self._by_stretch[stretch] = [item]
            self._map.add(stretch, *stretch)
        else:
            items.append(item)

    def find(self, low: int, high: int) -> list[ref[Any]]:
        found = list(self._anywhere)
        for stretch in self._map.find(low, high):
            found += self._by_stretch[stretch]
        return found


class SpansByStorage(dict[int, _Spans]):
    """Where in its storage lies each thing of a list: drawn when somebody first asks about a part of the storage.

    Whoever takes something out of the middle of the list takes its storage out of here.

    Args:
        stretch_of: first and one past the last byte of a thing, counted from the beginning of its storage; the same
            twice where it is gone, None where that is not known.
    """

    def __init__(self, stretch_of: Callable[[Any], tuple[int, int] | None]) -> None:
        super().__init__()
        self._stretch_of = stretch_of

    def near(self, storage: int, things: list[Any], low: int, high: int) -> list[Any]:
        """What of the list ``things`` of a storage may occupy a byte of ``[low, high)``."""
        spans = self.get(storage)
        if spans is None or spans.size > 2 * len(things) + _LARGE:
            spans = self[storage] = _Spans()
        fresh = things[spans.entered :]
        for thing in fresh:
            stretch = self._stretch_of(thing)
            if stretch is None or stretch[0] < stretch[1]:
                spans.enter(thing, stretch)
        spans.entered += len(fresh)  # a finaliser may have added more
        return spans.find(low, high)

    def shortened(self, storage: int, length: int) -> None:
        """The list of a storage has lost its end, or another thing stands there."""
        spans = self.get(storage)
        if spans is not None:
            spans.entered = min(spans.entered, length)


class _AddressMap:
    """Keys by the stretch of addresses they occupy.

    A stretch of at most 2**k bytes is entered in the one or two buckets of that size which it touches; a
    question looks at the buckets of each size in use, so it costs the logarithm of the largest stretch, not
    the number of keys.
    """

    def __init__(self, smallest: int = 9) -> None:
        self._smallest = smallest  # exponent of the size of the smallest buckets
        self._levels: dict[int, dict[int, set[Any]]] = {}
        self._stretches: dict[Any, tuple[int, int]] = {}

    def _buckets(self, low: int, high: int) -> tuple[int, range]:
        level = max(self._smallest, (high - low - 1).bit_length())
        return level, range(low >> level, ((high - 1) >> level) + 1)

    def add(self, key: Any, low: int, high: int) -> None:
        self.discard(key)
        if low >= high:
            return
        self._stretches[key] = (low, high)
        level, buckets = self._buckets(low, high)
        for bucket in buckets:
            self._levels.setdefault(level, {}).setdefault(bucket, set()).add(key)

    def discard(self, key: Any) -> None:
        stretch = self._stretches.pop(key, None)
        if stretch is None:
            return
        level, buckets = self._buckets(*stretch)
        rows = self._levels[level]
        for bucket in buckets:
            rows[bucket].discard(key)
            if not rows[bucket]:
                del rows[bucket]
        if not rows:
            del self._levels[level]

    def find(self, low: int, high: int) -> set[Any]:
        """Keys whose stretch shares a byte with ``[low, high)``."""
        found: set[Any] = set()
        if low >= high:
            return found
        for level, rows in self._levels.items():
            first, last = low >> level, (high - 1) >> level
            if last - first < len(rows):
                sets = [rows[bucket] for bucket in range(first, last + 1) if bucket in rows]
            else:
                sets = [keys for bucket, keys in rows.items() if first <= bucket <= last]
            for keys in sets:
                found.update(key for key in keys if self._stretches[key][0] < high and low < self._stretches[key][1])
        return found
