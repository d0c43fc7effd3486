"""What will a checkpoint read again when backward recomputes, and who has written to it since?

A checkpoint keeps no activations: backward runs its function again. What that reads and did not make (weights,
biases, buffers, masks it closes over) must still be what it was, and PyTorch checks none of it, not even versions.
So each such tensor has an entry in the ledger beside the saves, and a write to its memory, tracked or silent, is
taken down there.

Note [Copy on first write]. Nothing is copied when the tensor is read: its bytes are kept just before the first write
that a patch sees, and compared when backward recomputes. A step of the optimiser after backward meets no entry any
more, because entries die with the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch

from torchguard import _memory, _places, _policy
from torchguard._aliases import ALIASES, PROOF_BYTES_AT_SAVE
from torchguard._saves import LEDGER, Save

#: Stands for a tensor that is gone: it has no memory that anything could overlap.
_GONE = torch.empty(0)


class Reread(Save):
    """A tensor that a checkpoint's function read and did not make.

    Attributes:
        needed: asked at a write: whether backward can still recompute.
        read: whether something was computed from it, or it was only written to.
        operation_seen, written: what wrote to it first, and where; ``""`` and None while nothing was seen to.
        allowed: the reason, where that was inside an ``allow`` block.
        late: there was a write before the bytes could be kept.
    """

    __slots__ = ("_root", "allowed", "late", "needed", "operation_seen", "read", "written")

    def __init__(
        self, tensor: torch.Tensor, storage: int, instruction: _places.Instruction, needed: Callable[[], bool]
    ) -> None:
        # The function that is checkpointed keeps what it reads alive: this must not.
        self._root: ref[torch.Tensor] | None = ref(tensor)
        self.code, self.offset = instruction if instruction is not None else (None, 0)
        self.inner_code, self.inner_offset = None, -1
        self.node, self.output = None, 0
        self.storage = storage
        self.remarks = None
        self.needed = needed
        self.read = False
        self.accept()
        if storage in ALIASES.young or storage in ALIASES.by_storage:
            ALIASES.sync(storage)
            if ALIASES.arm(storage):
                self.keep_proof(PROOF_BYTES_AT_SAVE)
        LEDGER.add(self)

    @property
    def tensor(self) -> torch.Tensor:  # type: ignore[override]
        """The tensor; one without memory once it is gone."""
        tensor = None if self._root is None else self._root()
        return _GONE if tensor is None else tensor

    @property
    def moved(self) -> bool:
        """False: PyTorch refuses nothing here."""
        return False

    @property
    def operation(self) -> str:
        """What will read it again."""
        return "checkpoint"

    def forget(self) -> None:
        """Watch the tensor no longer."""
        self._root = None

    def accept(self) -> None:
        """From now on what is there now is right."""
        tensor = self.tensor
        self.version = _memory.version_of(tensor)
        self.storage = _memory.storage_of(tensor) or self.storage
        self.operation_seen = ""
        self.written: _places.Instruction = None
        self.allowed: str | None = None
        self.late = False
        if self.remarks is not None:
            self.remarks.proof = None
            self.remarks.suspect = None

    def keep_proof(self, at_most: int | None = None) -> None:
        """Keep a copy of the bytes that were read, unless they may have been written to already."""
        if self.remarks is not None and self.remarks.proof is not None:
            return
        if _memory.version_of(self.tensor) != self.version:
            self.late = True
        elif not self.late:
            super().keep_proof(at_most)

    @property
    def proof(self) -> torch.Tensor | None:
        """A copy of the bytes that were read, if it was kept."""
        return None if self.remarks is None else self.remarks.proof

    @property
    def changed(self) -> bool:
        """Whether its bytes are not what they were; where no copy was kept, whether something says so."""
        tensor = self.tensor
        if tensor is _GONE:
            return False
        if self.proof is not None:
            return not _memory.same_bytes(tensor, self.proof)
        suspected = self.remarks is not None and self.remarks.suspect is not None
        return self.late or suspected or self.moved_or_rebound

    @property
    def moved_or_rebound(self) -> bool:
        """Whether the tensor's version moved, or it lies elsewhere."""
        tensor = self.tensor
        return _memory.version_of(tensor) != self.version or _memory.storage_of(tensor) != self.storage


def without_rereads(saves: list[Save]) -> list[Save]:
    """The saves proper."""
    return [save for save in saves if not isinstance(save, Reread)]


def note_write(saves: Iterable[Save], operation: str) -> None:
    """A call is about to write to these: keep the bytes of those that a checkpoint will read again."""
    copies: dict[int, torch.Tensor] = {}  # a tensor that many checkpoints read is copied once
    here: _places.Instruction = None
    for entry in saves:
        if not isinstance(entry, Reread):
            continue
        tensor = entry.tensor
        if tensor is _GONE or not entry.needed():
            continue
        if entry.operation_seen and not (entry.proof is not None and _memory.same_bytes(tensor, entry.proof)):
            continue  # the write that is to blame is known
        if entry.proof is None and id(tensor) in copies and not entry.late and not entry.moved_or_rebound:
            entry.remark().proof = copies[id(tensor)]
        entry.keep_proof()
        if entry.proof is not None:
            copies[id(tensor)] = entry.proof
        here = here or _places.user_instruction(sys._getframe(1))
        entry.operation_seen = operation
        entry.written = here
        entry.allowed = _policy.state.reasons[-1] if _policy.state.reasons else None


def forget(tensors: Iterable[Any]) -> None:
    """Drop the weak holds on these: something is about to ask for tensors without any."""
    for tensor in tensors:
        for entry in LEDGER.in_storage(_memory.storage_of(tensor)):
            if isinstance(entry, Reread) and entry.tensor is tensor:
                entry.forget()


