"""What do the trainers' callbacks have in common: how is a guard made, entered, left, and left out of copies?"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torchguard import _config
from torchguard._findings import Findings
from torchguard._violation import Violation
from torchguard.guard import Guard

_GUARD_KEYWORDS = tuple(name for name in inspect.signature(Guard).parameters)


class GuardCallback:
    """A guard that a trainer enters and leaves.

    A copy, or what a pickle makes of it in another process, has the settings and none of the findings.

    Args:
        mode: one of torchguard's modes, ``"strict"`` or ``"warn"`` say; ``"off"`` does nothing.
        keywords: those of :class:`torchguard.Guard`; they count more than what the mode is made of.

    Attributes:
        mode: the mode.
        guard: the guard that is on, or the last one that was; None before the first.

    Raises:
        ValueError: for a mode, or a value of a keyword, that does not exist.
        TypeError: for a keyword that ``Guard`` does not have.
    """

    def __init__(self, mode: str = "strict", **keywords: Any) -> None:
        modes = ("off", *_config.MODES)
        if mode not in modes:
            hint = _config.nearest(str(mode), modes)
            raise ValueError(f"torchguard: mode={mode!r} is not a mode of this version{hint}")
        for name in keywords:
            if name not in _GUARD_KEYWORDS:
                hint = _config.nearest(name, _GUARD_KEYWORDS)
                raise TypeError(f"torchguard: {name!r} is no keyword of Guard{hint}")
        self.mode = mode
        self._keywords = {**_config.MODES.get(mode, {}), **keywords}
        # Read now, where somebody sees what is wrong with it, and not in the directory that the program is in by then.
        self._keywords["suppressions"] = Guard(**self._keywords).suppressions
        self._findings = Findings()
        self.guard: Guard | None = None
        self._entered = False

    @property
    def violations(self) -> list[Violation]:
        """What all guards of this callback have found in this process, one a site, see ``Guard.violations``."""
        return self._findings.violations()

    def enter(self, step: Callable[[], int] | None = None) -> None:
        """Enter a new guard; the last one is left first, if it is still on. (Called by torchguard.)

        Args:
            step: says which step of the training it is.
        """
        self.leave()
        if self.mode == "off":
            return
        guard = Guard(**self._keywords)
        guard.findings = self._findings
        guard.step = step
        guard.__enter__()
        self.guard = guard
        self._entered = True

    def leave(self) -> None:
        """Leave the guard, if it is on. (Called by torchguard.)"""
        if self._entered and self.guard is not None:
            self._entered = False
            self.guard.leave()
            self.guard.step = None  # it refers to the trainer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("guard", "_findings", "_entered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._findings = Findings()
        self.guard = None
        self._entered = False


def import_first(module: str, candidates: Sequence[str], extra: str) -> Any:
    """The first of some modules that can be imported.

    Raises:
        ImportError: in one line, where the package is missing.
    """
    for name in candidates:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != name.partition(".")[0]:
                raise  # it is there, and something that it needs is not
    missing = candidates[0].partition(".")[0]
    raise ImportError(
        f"torchguard: {module} needs {missing}, which is not installed: pip install 'torchguard-autograd[{extra}]'"
    ) from None
