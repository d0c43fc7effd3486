"""What does a long run say while it lasts, and how often?"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchguard.guard import Guard

#: Seconds between two lines on a terminal.
INTERVAL = 10

#: A line looks at every live save: it is the longer in coming, the more of them there are, so that all lines together
#: take at most one part in so many of the time.
_SHARE = 200


def begin(guard: Guard, wanted: bool | int, say: Callable[[str], None]) -> Progress | None:
    """Say from now on how far ``guard`` is; None where nobody wants to know, or it is for another rank to say.

    Args:
        wanted: True for lines on a terminal, every :data:`INTERVAL` seconds; or every so many seconds, wherever
            standard error leads.
        say: says one line.
    """
    if wanted is False or os.environ.get("RANK", "0") != "0":
        return None
    if wanted is True and not (sys.stderr is not None and sys.stderr.isatty()):
        return None
    return Progress(guard, INTERVAL if wanted is True else wanted, say)


class Progress:
    """A line at intervals, from construction to :meth:`end`, which says a last one."""

    def __init__(self, guard: Guard, seconds: float, say: Callable[[str], None]) -> None:
        self._guard = guard
        self._seconds = seconds
        self._say = say
        self._start = time.monotonic()
        self._enough = threading.Event()
        # Not a threading.Thread: it would be among the program's when the program lists or joins them, and the guard
        # would take it for one of them.
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        wait = self._seconds
        while not self._enough.wait(wait):
            began = time.perf_counter()
            self._tell()
            wait = max(self._seconds, _SHARE * (time.perf_counter() - began))

    def _tell(self) -> None:
        try:
            found = len(self._guard.violations)
            violations = f"{found or 'no'} {'violation' if found == 1 else 'violations'}"
            self._say(f"{_clock(time.monotonic() - self._start)}  {self._guard.stats}, {violations}")
        except Exception as error:
            self._enough.set()
            self._say(f"no more progress: {type(error).__name__}: {error}")

    def end(self) -> None:
        """Stop; the last line tells of all of it."""
        if not self._enough.is_set():
            self._enough.set()
            self._tell()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
