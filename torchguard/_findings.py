"""What has a guard found so far? One entry a site, and how often it was hit: a long run stays small."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from torchguard import _torch
from torchguard._violation import Violation


class Findings:
    """Violations, allowed ones and what is out of sight; filled from any thread."""

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], Violation] = {}
        self._times: dict[tuple[Any, ...], int] = {}
        self._unwatched: dict[str, None] = dict.fromkeys(_torch.missing())
        self._lock = threading.Lock()

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

    def note_unwatched(self, what: str) -> None:
        """Keep what cannot be watched, once."""
        with self._lock:
            self._unwatched.setdefault(what)

    def unwatched(self) -> list[str]:
        """What cannot be watched."""
        with self._lock:
            return list(self._unwatched)
