"""What is counted while a guard is on, and how is the time on slow paths taken?

Only what costs microseconds anyway is counted where it happens; saves are counted by the ledger when it files them. The
numbers are the process's, of all threads: a guard's are differences between two moments.
"""

from __future__ import annotations

import threading
import time


class Counts:
    """The counters of this process; they only grow.

    Attributes:
        writes: calls that write, judged because a save was, or might have been, alive in that memory.
        aliases: aliases taken down.
        exports: ways out of torch taken down.
        copies: copies of memory made.
        nanoseconds: time on slow paths, see :class:`SlowPath`.
    """

    __slots__ = ("aliases", "copies", "exports", "nanoseconds", "writes")

    def __init__(self) -> None:
        self.writes = 0
        self.aliases = 0
        self.exports = 0
        self.copies = 0
        self.nanoseconds = 0


#: The one of this process.
COUNTS = Counts()


class SlowPath(threading.local):
    """``with SLOW_PATH:`` adds the time that the block takes, once where one block lies in another."""

    def __init__(self) -> None:
        self._depth = 0
        self._start = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._start = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            spent = time.perf_counter_ns() - self._start
            COUNTS.nanoseconds += spent


SLOW_PATH = SlowPath()
