"""What has a guard found so far? One entry a site, and how often it was hit: a long run stays small."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import warnings
from dataclasses import replace
from typing import Any

from torchguard import _torch
from torchguard._violation import UnwatchedWarning, Violation

_SITES_SHOWN = 5

#: What this process has been told of already.
told: set[str] = set()


class Findings:
    """Violations, allowed ones and what is out of sight; filled from any thread."""

    def __init__(self, watching: bool = False) -> None:
        self._first: dict[tuple[Any, ...], Violation] = {}
        self._times: dict[tuple[Any, ...], int] = {}
        self._unwatched: dict[str, None] = {}
        self._lock = threading.Lock()
        self._summed_up = 0
        #: Whether a summary of what was repaired waits for the end of the process: a decorated function is left often.
        self.sum_up_at_exit = False
        self._waits_for_exit = False
        for what in _torch.missing(watching):
            self.note_unwatched(what)

    def keep(self, violation: Violation) -> bool:
        """Keep a violation; False if its site is known already."""
        with self._lock:
            key = (violation.site, violation.allowed)
            known = self._times.get(key, 0)
            self._times[key] = known + 1
            self._first.setdefault(key, violation)
            return known == 0

    def violations(self) -> list[Violation]:
        """Those that nothing allowed, in the order in which their sites were first hit."""
        return [violation for violation in self._counted() if violation.allowed is None]

    def allowed(self) -> list[Violation]:
        """Those that an ``allow`` block permitted."""
        return [violation for violation in self._counted() if violation.allowed is not None]

    def _counted(self) -> list[Violation]:
        with self._lock:
            return [replace(violation, times=self._times[key]) for key, violation in self._first.items()]

    def sum_up(self, at_exit: bool = False) -> None:
        """Print one line about what was repaired since the last one, if anything was."""
        repaired = [violation for violation in self.violations() if violation.repaired]
        saves = sum(violation.times for violation in repaired)
        if saves == self._summed_up:
            return
        if self.sum_up_at_exit and not at_exit:
            if not self._waits_for_exit:
                atexit.register(self.sum_up, at_exit=True)
            self._waits_for_exit = True
            return
        self._summed_up = saves
        sites: dict[str, int] = {}
        for violation in repaired:
            site = str(violation.written or "(no user code on the stack)")
            sites[site] = sites.get(site, 0) + violation.times
        shown = ", ".join(f"{site} ({times})" for site, times in list(sites.items())[:_SITES_SHOWN])
        more = f" and {len(sites) - _SITES_SHOWN} more" if len(sites) > _SITES_SHOWN else ""
        what = f"{saves} {'save' if saves == 1 else 'saves'}"
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"torchguard: repair: backward was given the saved bytes of {what} "
                f"that were written to at {shown}{more}; without repair() the gradients are wrong, or refused\n"
            )

    def note_unwatched(self, what: str) -> None:
        """Keep what cannot be watched, and say it once a process."""
        with self._lock:
            self._unwatched.setdefault(what)
            known = what in told
            told.add(what)
        if not known:
            # Where warnings are errors, it is kept all the same: no operation of the program's is to fail by it.
            with contextlib.suppress(UnwatchedWarning):
                warnings.warn(f"torchguard cannot watch: {what}", UnwatchedWarning, stacklevel=2)

    def unwatched(self) -> list[str]:
        """What cannot be watched."""
        with self._lock:
            return list(self._unwatched)
