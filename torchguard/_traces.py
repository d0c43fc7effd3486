"""Where were aliases of which memory taken lately, and where were silent writes made?

What ``watch()`` keeps so that a refusal can name places: for each storage the last two instructions that took an alias
of it, and the latest silent writes. All holds are weak.

Note [One storage, one trace]. A trace is found by the identity of its storage, and that may be used again once the
storage is gone. So a trace has a hold that tells: on the leaf itself (a parameter, a gradient), which is cheap, or on
the storage, for what an operation returned: there the tensor is often gone long before its memory is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch

from torchguard import _memory, _torch
from torchguard._places import Instruction

_SLACK = 1024
_WRITES_KEPT = 256


class _Pin(_torch.WeakStorage):
    """A weak hold on a storage; as long as it is there, no other storage has its identity."""

    def __call__(self) -> _Pin:
        return self


class Trace:
    """Where aliases of one storage were taken.

    Attributes:
        hold: answers None once the trace may be another storage's.
        code, offset: the instruction that took the last one.
        version: the version of the memory then.
        before: instruction and version of the one before that was taken elsewhere.
    """

    __slots__ = ("before", "code", "hold", "offset", "version")

    def __init__(self, hold: Callable[[], object], code: Any, offset: int, version: int) -> None:
        self.hold = hold
        self.code = code
        self.offset = offset
        self.version = version
        self.before: tuple[Instruction, int] | None = None


class Written:
    """A silent write whose counter was moved for it.

    Attributes:
        title: the call, as a report shows it.
        instruction: where it was made.
    """

    __slots__ = ("_held", "instruction", "title")

    def __init__(
        self, title: str, instruction: Instruction, tensors: Iterable[torch.Tensor], storage: ref[Any] | None = None
    ) -> None:
        self.title = title
        self.instruction = instruction
        with _torch.no_torch_function():
            self._held: list[tuple[ref[Any], int]] = [
                (storage or ref(tensor), _memory.version_of(tensor)) for tensor in tensors
            ]

    def touched(self, storage: int, expected: int) -> bool:
        """Whether it wrote to this storage after something was saved there at version ``expected``."""
        return any(version > expected and _lies_in(hold(), storage) for hold, version in self._held)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of a tensor."""
        self._held = [entry for entry in self._held if entry[0]() is not tensor]


def _lies_in(held: Any, storage: int) -> bool:
    if isinstance(held, torch.UntypedStorage):
        return int(held._cdata) == storage
    return held is not None and _memory.storage_of(held) == storage


class Traces:
    """What is remembered of the process's aliases and silent writes."""

    def __init__(self) -> None:
        self.by_storage: dict[int, Trace] = {}
        self.writes: deque[Written] = deque(maxlen=_WRITES_KEPT)
        self._sweep_at = _SLACK

    def take_down(self, tensor: torch.Tensor, storage: int, instruction: Instruction) -> None:
        """An alias of ``tensor`` is being taken."""
        code, offset = instruction or (None, 0)
        version = _memory.version_of(tensor)
        trace = self.by_storage.get(storage)
        if trace is not None and trace.hold() is not None:
            if trace.code is not code or trace.offset != offset:
                if trace.code is not None:
                    trace.before = ((trace.code, trace.offset), trace.version)
                trace.code, trace.offset, trace.version = code, offset, version
            return
        pin = None if tensor.grad_fn is None else _torch.weak_storage(tensor, _Pin)
        hold: Any = ref(tensor) if pin is None else pin
        self.by_storage[storage] = Trace(hold, code, offset, version)
        if len(self.by_storage) > self._sweep_at:
            for key, trace in list(self.by_storage.items()):
                hold = trace.hold()
                if hold is None or (isinstance(hold, _Pin) and hold.storage() is None):
                    self.by_storage.pop(key, None)
            self._sweep_at = 2 * len(self.by_storage) + _SLACK

    def taken_at(self, storage: int, now: int) -> list[Instruction]:
        """Where aliases were taken since when the version has moved to ``now``, the latest first."""
        trace = self.by_storage.get(storage)
        if trace is None or trace.hold() is None:
            return []
        entries = [((trace.code, trace.offset), trace.version), trace.before]
        return [entry[0] for entry in entries if entry is not None and entry[0] and entry[0][0] and entry[1] < now]

    def written_by(self, storage: int, expected: int) -> Written | None:
        """The latest silent write to a storage after something was saved there at version ``expected``."""
        return next((written for written in reversed(list(self.writes)) if written.touched(storage, expected)), None)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of one tensor: something is about to ask for a tensor without weak references."""
        for storage, trace in list(self.by_storage.items()):
            if trace.hold() is tensor:
                self.by_storage.pop(storage, None)
        for written in list(self.writes):
            written.forget(tensor)

    def clear(self) -> None:
        """Nobody is watching any more."""
        self.by_storage.clear()
        self.writes.clear()


#: Those of this process.
TRACES = Traces()
