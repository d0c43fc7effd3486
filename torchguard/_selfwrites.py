"""Which calls save, for their backward, an alias of what they then write over: ``h.mul_(h.data)``?

Such a save is made inside the call, after the write has been judged and before it is done. So the bytes that may be
saved are copied before, and decide when backward reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torchguard import _memory, _places, _policy, _torch
from torchguard._aliases import ALIASES
from torchguard._model import Span
from torchguard._overlap import overlaps
from torchguard._rereads import Reread
from torchguard._saves import LEDGER, Save
from torchguard._writers import Writer

#: The derivative of these needs none of the tensors' values. Index tensors, which some save, are of another kind of
#: memory than what is written to.
SAVES_NOTHING = frozenset(
    {"__setitem__", "copy_", "add_", "sub_", "__iadd__", "__isub__", "_foreach_copy_", "_foreach_add_", "_foreach_sub_"}
)


#: The types of the arguments that are sure to be no tensor.
NUMBERS = frozenset({int, float})


class _Read(NamedTuple):
    """A tensor that a call reads, and may save, in memory that it writes to."""

    tensor: torch.Tensor
    target: torch.Tensor
    storage: int
    span: Span


def may_save_what_it_writes(name: str) -> Callable[[Sequence[Any]], bool] | None:
    """A quick look at the arguments of calls of this name: does one of the others lie in the first one's storage?

    None where such a call saves nothing.
    """
    plain = _memory.PLAIN_TYPES
    storage_id = _torch.storage_id

    def look(args: Sequence[Any]) -> bool:
        if len(args) < 2 or (type(args[1]) in NUMBERS and len(args) == 2):
            return False
        first = args[0]
        if type(first) not in plain:  # lists of tensors, subclasses: a closer look
            return isinstance(first, (torch.Tensor, list, tuple))
        try:
            for other in args[1:]:
                if type(other) in plain and (other is first or storage_id(other) == storage_id(first)):
                    return True
        except _memory.NO_MEMORY:
            pass
        return False

    return None if name in SAVES_NOTHING else look


def own_reads(writer: Writer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[_Read]:
    """What a call may save of the memory that it writes to."""
    if writer.collective or writer.keeps_statistics or writer.name in SAVES_NOTHING:
        return []
    with _torch.no_torch_function():
        given = list(_memory.tensors_in([*args, *kwargs.values()]))
        if len(given) < 2 or not any(tensor.requires_grad for tensor in given):
            return []
        tracked = _policy.repairer() is not None  # those are PyTorch's to refuse otherwise
        found = []
        for target in writer.targets(args, kwargs):
            span = _memory.span_of(target) if type(target) in _memory.PLAIN_TYPES else None
            if span is None:
                continue
            storage = _memory.storage_of(target)
            for position, tensor in enumerate(given):
                same = tensor is target
                if (same and (not tracked or position == 0)) or _memory.storage_of(tensor) != storage:
                    continue
                here = _memory.span_of(tensor)
                if here is not None and overlaps(span, here) is not False:
                    found.append(_Read(tensor, target, storage, here))
    return found


@LEDGER.holds_saves
def carry_out(writer: Writer, call: Callable[[], Any], reads: list[_Read]) -> Any:
    """Make the call (which is judged by ``call``); where it has saved what it has changed, backward will speak."""
    with _torch.hidden():
        copies = [_torch.behind(read.tensor).detach().clone() for read in reads]
    storages = {read.storage for read in reads}
    before = {id(save) for storage in storages for save in LEDGER.in_storage(storage)}
    result = call()
    if _policy.state.reasons:
        return result
    here = _places.user_instruction(sys._getframe(2))
    with _torch.no_torch_function():
        for storage in storages:
            for save in LEDGER.in_storage(storage):
                if id(save) not in before and not isinstance(save, Reread):
                    _compare(save, writer, reads, copies, here)
    return result


def _compare(
    save: Save, writer: Writer, reads: list[_Read], copies: list[torch.Tensor], here: _places.Instruction
) -> None:
    saved = _torch.behind(save.tensor)
    span = _memory.span_of(saved)
    for read, copy in zip(reads, copies, strict=True):
        if read.span == span and copy.dtype == saved.dtype and not _memory.same_bytes(saved, copy):
            save.remark().proof = copy
            aliased = ALIASES.taken_at(read.target, read.storage)
            save.let_bytes_decide("tracked" if save.moved else "write", writer.title, here, aliased)
            return
