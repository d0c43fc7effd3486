"""Which guard answers for what happens in this thread, and what is allowed?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torchguard._violation import Violation


class Respondent(Protocol):
    """What answers a violation: a guard."""

    #: What it knows of saves: "watch" for nothing.
    depth: Any

    @property
    def sees_every_call(self) -> bool:
        """Whether it sees calls that no patch sees."""

    @property
    def judges_at_read(self) -> bool:
        """Whether it lets the bytes decide when backward reads, wherever a write was seen coming."""

    @property
    def repairs(self) -> bool:
        """Whether it hands backward the bytes that were saved, where they were kept."""

    @property
    def audits(self) -> bool:
        """Whether the bytes of every save are kept."""

    def heal(self, violation: Violation) -> bool:
        """Answer a violation that can be repaired; False where it is one to live with."""

    def respond(self, violation: Violation) -> None:
        """Raise, warn or record."""

    def record_allowed(self, violation: Violation) -> None:
        """Keep a violation that an ``allow`` block permits."""

    def note_unwatched(self, what: str) -> None:
        """Keep what is out of sight, and say it once."""


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.guards: list[Respondent] = []
        self.reasons: list[str] = []
        self.every_call = 0  # guards of this thread that see every call
        self.mode: Any = None  # and the function mode that shows it to them


state = _ThreadState()

#: Guards that are entered and not yet left, of all threads, oldest first.
entered: list[Respondent] = []

#: Those of them that answer for every thread (``torchguard.enable``), innermost last.
process_wide: list[Respondent] = []

#: Called once the guard can be imported: what came too early, in the middle of that import.
waiting: list[Callable[[], None]] = []

#: The list of its thread that each of them stands in: a guard can be left in another thread.
_homes: dict[int, list[Respondent]] = {}


def innermost() -> Respondent | None:
    """The guard that answers for this thread: its own innermost one, else the process's, else the one entered last.

    A thread without a guard of its own (autograd's device threads, a pool that was there before) still writes
    to, and reads, memory that the process's guards watch.
    """
    for guard in reversed(state.guards):
        if guard in entered:
            return guard
    if process_wide:
        return process_wide[-1]
    return entered[-1] if entered else None


def innermost_of_depth(depth: str) -> Respondent | None:
    """The same of those guards that have this depth."""
    for guards in (state.guards, process_wide, entered):
        for guard in reversed(guards):
            if guard.depth == depth and guard in entered:
                return guard
    return None


def is_watch(guard: Respondent | None) -> bool:
    """Whether a guard leaves it to PyTorch to refuse."""
    return guard is not None and guard.depth == "watch"


def enter(guard: Respondent, everywhere: bool = False) -> None:
    """Make ``guard`` the innermost one of this thread, or that of all threads that have none of their own."""
    entered.append(guard)
    home = process_wide if everywhere else state.guards
    home.append(guard)
    _homes[id(guard)] = home


def leave(guard: Respondent) -> None:
    """Take ``guard`` out, wherever in the order it stands."""
    if guard in entered:
        entered.remove(guard)
    home = _homes.pop(id(guard), [])
    if guard in home:
        home.remove(guard)


def judge_at_read() -> Respondent | None:
    """The guard in charge of a write that is about to happen, where it lets the bytes decide when backward reads.

    In an ``allow`` block there is nothing to decide: what is written there is allowed as it is written.
    """
    if state.reasons:
        return None
    guard = innermost()
    return guard if guard is not None and guard.judges_at_read else None


def repairer() -> Respondent | None:
    """The guard in charge of what happens in this thread, where it repairs; nothing that is allowed is repaired."""
    guard = judge_at_read()
    return guard if guard is not None and guard.repairs else None


def answer(
    describe: Callable[[str | None], Violation],
    left: Respondent | None = None,
    taken_by: Respondent | None = None,
) -> None:
    """Let the innermost guard answer a violation, which ``describe`` (given the reason to allow it) makes.

    Where no guard is on any more, ``left`` answers: one that was left before its suspicion was settled. A write that
    ``taken_by`` saw, outside any ``allow`` block, and did not judge there, is that guard's wherever it is read.
    """
    if taken_by is not None:
        taken_by.respond(describe(None))
        return
    guard = innermost() or left
    if guard is None:
        return
    if state.reasons:
        guard.record_allowed(describe(state.reasons[-1]))
    else:
        guard.respond(describe(None))


@contextmanager
def allowed_for(reasons: list[str]) -> Iterator[None]:
    """Answer as in the ``allow`` blocks that something was begun in, beside those of this moment."""
    added = len(reasons)
    state.reasons[:0] = reasons
    try:
        yield
    finally:
        del state.reasons[:added]


@contextmanager
def instead(respondent: Respondent) -> Iterator[None]:
    """Have somebody else answer in this thread for a block."""
    with_it = [*state.guards, respondent]
    entered.append(respondent)
    before, state.guards[:] = list(state.guards), with_it
    try:
        yield
    finally:
        entered.remove(respondent)
        state.guards[:] = before


def note_unwatched(what: str) -> None:
    """Tell the innermost guard of something that it cannot watch."""
    guard = innermost()
    if guard is not None:
        guard.note_unwatched(what)


def inherited() -> list[Respondent]:
    """The guards that a thread started now should find itself under; none where nothing is to be done for them."""
    guards = [*process_wide, *(guard for guard in still_entered(state.guards) if guard not in process_wide)]
    return guards if any(guard.depth != "watch" for guard in guards) else []


def still_entered(guards: Iterable[Respondent]) -> list[Respondent]:
    """Those of ``guards`` that have not been left."""
    return [guard for guard in guards if guard in entered]


def adopt(guards: list[Any]) -> None:
    """Put this thread under the guards of the thread that started it."""
    state.guards[:] = guards
