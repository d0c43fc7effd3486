"""Where were aliases of which memory taken lately, and where were silent writes made?

What ``watch()`` keeps so that a refusal can name places: for each storage the instructions that took an alias of it,
and the latest silent writes. All holds are weak.

Note [One storage, one trace]. A trace is found by the identity of its storage, and that may be used again once the
storage is gone. So a trace has a hold that tells: on the tensor itself, which is cheap, where it is a parameter or held
by another tensor (a gradient); else on the storage, since a tensor is often gone long before its memory is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple
from weakref import ref

import torch

from torchguard import _memory, _torch
from torchguard._places import Instruction

_SLACK = 1024
_WRITES_KEPT = 256
_SITES_KEPT = 16


class _Pin(_torch.WeakStorage):
    """A weak hold on a storage; as long as it is there, no other storage has its identity."""

    def __call__(self) -> _Pin:
        return self


class _Site(NamedTuple):
    """An instruction that takes an alias, and the version of the memory when it first did."""

    code: CodeType
    offset: int
    version: int


#: Where aliases of one storage were taken: sites by :func:`site_key`, and under 0 the hold, which answers None once
#: the trace may be another storage's. A plain dictionary, because it is looked into at every ``.data``.
Trace = dict[int, Any]


def site_key(code: CodeType | None, offset: int) -> int:
    """One number for an instruction: addresses have 48 bits. (Written out where it has to be fast.)"""
    return id(code) ^ (offset << 48)


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


def _hold_of(tensor: torch.Tensor) -> Any:
    tensor = _torch.behind(tensor)
    stays = tensor.grad_fn is None and (tensor.requires_grad or _torch.holders(tensor) > 1)
    return (None if stays else _torch.weak_storage(tensor, _Pin)) or ref(tensor)


def _version_of(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return -1


class Traces:
    """What is remembered of the process's aliases and silent writes."""

    def __init__(self) -> None:
        self.by_storage: dict[int, Trace] = {}
        self.writes: deque[Written] = deque(maxlen=_WRITES_KEPT)
        self._sweep_at = _SLACK

    def take_down(self, tensor: torch.Tensor, storage: int, instruction: Instruction) -> None:
        """An alias of ``tensor`` is being taken."""
        trace = self.by_storage.get(storage)
        if trace is None or trace[0]() is None:
            trace = self.by_storage[storage] = {0: _hold_of(tensor)}
            if len(self.by_storage) > self._sweep_at:
                self._sweep()
        if instruction is None:
            return
        code, offset = instruction
        key = site_key(code, offset)
        if key not in trace:
            if len(trace) > _SITES_KEPT:
                trace.pop(next(key for key in trace if key), None)
            trace[key] = _Site(code, offset, _version_of(tensor))

    def _sweep(self) -> None:
        for key, trace in list(self.by_storage.items()):
            hold = trace[0]()
            if hold is None or (isinstance(hold, _Pin) and hold.storage() is None):
                self.by_storage.pop(key, None)
        self._sweep_at = 2 * len(self.by_storage) + _SLACK

    def taken_at(self, storage: int, now: int) -> list[Instruction]:
        """Where aliases were taken since when the version has moved to ``now``, the latest first."""
        trace = self.by_storage.get(storage)
        if trace is None or trace[0]() is None:
            return []
        sites = [site for key, site in list(trace.items()) if key and site.version < now]
        return [(site.code, site.offset) for site in reversed(sites)]

    def written_by(self, storage: int, expected: int) -> Written | None:
        """The latest silent write to a storage after something was saved there at version ``expected``."""
        return next((written for written in reversed(list(self.writes)) if written.touched(storage, expected)), None)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of one tensor: something is about to ask for a tensor without weak references."""
        for storage, trace in list(self.by_storage.items()):
            if trace[0]() is tensor:
                self.by_storage.pop(storage, None)
        for written in list(self.writes):
            written.forget(tensor)

    def clear(self) -> None:
        """Nobody is watching any more."""
        self.by_storage.clear()
        self.writes.clear()


#: Those of this process.
TRACES = Traces()
