"""Where were aliases of which memory taken lately, and where were silent writes made?

What ``watch()`` keeps so that a refusal can name places: for each tensor the instructions that took an alias of it, and
the latest silent writes. All holds are weak.

Note [Traces of the dead]. A trace goes with its tensor, but memory can outlive that: what an operation returned is
often gone long before the save of it. Such a trace also holds its storage, weakly, and is kept by that once the tensor
dies. Parameters, and what C++ holds, do without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch

from torchguard import _memory, _torch
from torchguard._places import Instruction
from torchguard._torch import ref

_SLACK = 1024
_WRITES_KEPT = 256
_SITES_KEPT = 16
_UNKNOWN = 1 << 62


class Site:
    """An instruction that takes an alias.

    Attributes:
        version: of the memory, when it first did.
        latest: the same, when it last did; of a subclass, which may have more to say, just a large number.
    """

    __slots__ = ("code", "latest", "offset", "version")

    def __init__(self, code: CodeType, offset: int, version: int) -> None:
        self.code = code
        self.offset = offset
        self.version = self.latest = version

    @property
    def instruction(self) -> Instruction:
        """Where the alias is taken."""
        return self.code, self.offset


#: The sites where aliases of one tensor were taken, by one number (the address of the code plus the offset); under 0
#: the hold on the tensor, under 1 that on its storage. A plain dictionary: it is looked into at every ``.data``.
Trace = dict[int, Any]


class _Hold(ref[torch.Tensor]):
    """A weak hold on a tensor that knows under which number its trace is kept."""

    __slots__ = ("key",)

    key: int

    def __new__(cls, tensor: torch.Tensor, when_dead: Any) -> _Hold:
        self: _Hold = ref.__new__(cls, tensor, when_dead)
        self.key = id(tensor)
        return self

    # ref defines __init__ with its own arguments
    def __init__(self, *_: Any) -> None: ...


class Written:
    """A silent write whose counter was moved for it.

    Attributes:
        title: the call, as a report shows it.
        instruction: where it was made.
    """

    __slots__ = ("_held", "instruction", "title")

    def __init__(
        self,
        title: str,
        instruction: Instruction,
        tensors: Iterable[torch.Tensor],
        storage: ref[Any] | None = None,
        left: _torch.WeakStorage | None = None,
    ) -> None:
        self.title = title
        self.instruction = instruction
        with _torch.no_torch_function():
            self._held: list[tuple[Callable[[], Any], int]] = [
                (storage or ref(tensor), _memory.version_of(tensor)) for tensor in tensors
            ]
            if left is not None:  # memory that a tensor was pointed away from: a view of it may be what is saved
                self._held += [(left.storage, version) for _, version in self._held]

    def touched(self, storage: int, expected: int) -> bool:
        """Whether it wrote to this storage after something was saved there at version ``expected``."""
        return any(version > expected and _lies_in(hold(), storage) for hold, version in self._held)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of a tensor."""
        self._held = [entry for entry in self._held if not (isinstance(entry[0], ref) and entry[0]() is tensor)]


def _lies_in(held: Any, storage: int) -> bool:
    if isinstance(held, torch.UntypedStorage):
        return _torch.identity_of(held) == storage
    return held is not None and _memory.storage_of(held) == storage


class Traces:
    """What is remembered of the process's aliases and silent writes."""

    def __init__(self) -> None:
        self.by_tensor: dict[int, Trace] = {}
        self._by_storage: dict[int, Trace] = {}  # of tensors that are gone
        self._sweep_at = _SLACK
        self.writes: deque[Written] = deque(maxlen=_WRITES_KEPT)

    def take_down(self, tensor: torch.Tensor, instruction: Instruction) -> None:
        """An alias of ``tensor`` is being taken."""
        tensor = _torch.behind(tensor)
        trace = self.by_tensor.get(id(tensor))
        if trace is None:
            stays = tensor.grad_fn is None and (tensor.requires_grad or _torch.holders(tensor) > 1)
            weak = None if stays else _torch.weak_storage(tensor)
            trace = self.by_tensor[id(tensor)] = {0: _Hold(tensor, self._died), 1: weak}
        if instruction is None:
            return
        code, offset = instruction
        key = id(code) + offset
        if key not in trace:
            if len(trace) > _SITES_KEPT:
                trace.pop(next(key for key in trace if key > 1), None)
            try:
                version = tensor._version
            except RuntimeError:  # made in inference mode: it has none, and cannot be saved
                return
            site = trace[key] = Site(code, offset, version)
            if type(tensor) not in _memory.PLAIN_TYPES:
                site.latest = _UNKNOWN

    def _died(self, hold: Any) -> None:
        trace = self.by_tensor.get(hold.key)
        if trace is None or trace[0] is not hold:
            return
        del self.by_tensor[hold.key]
        weak = trace[1]
        storage = None if weak is None else weak.storage()
        if storage is not None:
            self._by_storage[_torch.identity_of(storage)] = trace
            if len(self._by_storage) > self._sweep_at:
                for key, trace in list(self._by_storage.items()):
                    if trace[1].storage() is None:
                        self._by_storage.pop(key, None)
                self._sweep_at = 2 * len(self._by_storage) + _SLACK

    def taken_at(self, storage: int, now: int) -> list[Site]:
        """Where aliases were taken since when the version has moved to ``now``, the latest first."""
        traces = [trace for trace in list(self.by_tensor.values()) if _lies_in(trace[0](), storage)]
        gone = self._by_storage.get(storage)
        if gone is not None:
            traces.insert(0, gone)
        sites = [site for trace in traces for key, site in trace.items() if key > 1 and site.version < now]
        return sites[::-1]

    def at_version(self, now: int) -> list[torch.Tensor]:
        """The living tensors at version ``now`` of which an alias was taken before they came to it."""
        found = []
        for trace in list(self.by_tensor.values()):
            tensor = trace[0]()
            earlier = any(site.version < now for key, site in list(trace.items()) if key > 1)
            if tensor is not None and earlier and _memory.version_of(tensor) == now:
                found.append(tensor)
        return found

    def written_by(self, storage: int, expected: int) -> Written | None:
        """The latest silent write to a storage after something was saved there at version ``expected``."""
        return next((written for written in reversed(list(self.writes)) if written.touched(storage, expected)), None)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of one tensor: something is about to ask for a tensor without weak references."""
        self.by_tensor.pop(id(tensor), None)
        for written in list(self.writes):
            written.forget(tensor)

    def clear(self) -> None:
        """Nobody is watching any more."""
        self.by_tensor.clear()
        self._by_storage.clear()
        self.writes.clear()


#: Those of this process.
TRACES = Traces()
