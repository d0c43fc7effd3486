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
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from torchguard import _arrays, _memory, _places, _policy
from torchguard._aliases import ALIASES
from torchguard._arrays import Source
from torchguard._exports import EXPORTS
from torchguard._saves import LEDGER, PROOF_BYTES_AT_ALIAS, PROOF_BYTES_AT_SAVE, Save
from torchguard._torch import ref

#: Stands for a tensor that is gone: it has no memory that anything could overlap.
_GONE = torch.empty(0)


class _Running(threading.local):
    """How many checkpoints run their function in this thread, for the first time or again."""

    depth = 0


running = _Running()


@contextmanager
def run_by_a_checkpoint() -> Iterator[None]:
    """A checkpoint runs its function."""
    running.depth += 1
    try:
        yield
    finally:
        running.depth -= 1
        if not running.depth:
            _arrays.forget()


class Reread(Save):
    """A tensor that a checkpoint's function read and did not make.

    Attributes:
        needed: whether backward can still recompute; asked at a write.
        read: whether something was computed from it; otherwise it was only written to.
        home: identity of its storage when it was read.
        late: it may have been written to before its bytes could be kept.
        allowed: the reason, where it was written to inside an ``allow`` block.
    """

    __slots__ = ("_root", "allowed", "home", "late", "needed", "read")

    def __init__(
        self, tensor: torch.Tensor, storage: int, instruction: _places.Instruction, needed: Callable[[], bool]
    ) -> None:
        # What the checkpointed function reads is kept alive by the function, and must not be by the guard.
        self._root: ref[torch.Tensor] | None = ref(tensor)
        self._describe(tensor, storage, instruction, needed)
        if (storage in ALIASES.young or storage in ALIASES.by_storage) and ALIASES.meet_save(storage, tensor):
            self.keep_proof(PROOF_BYTES_AT_SAVE)
        EXPORTS.meet(self, storage, tensor.grad_fn)
        LEDGER.add(self)

    def _describe(
        self, tensor: torch.Tensor, storage: int, instruction: _places.Instruction, needed: Callable[[], bool]
    ) -> None:
        self.code, self.offset = instruction if instruction is not None else (None, 0)
        self.inner_code, self.inner_offset = None, -1
        self.node, self.output = None, 0
        self.storage = self.home = storage
        self.version = _memory.version_of(tensor)
        self.remarks = None
        self.needed = needed
        self.read = False
        self.late = False
        self.allowed: str | None = None

    @property
    def tensor(self) -> torch.Tensor:  # type: ignore[override]
        """The tensor; one without memory once it is gone."""
        tensor = None if self._root is None else self._root()
        return _GONE if tensor is None else tensor

    def let_go(self) -> None:
        """Drop the weak hold on the tensor: something is about to ask for one that nobody has a weak hold on."""
        self._root = None

    def hold(self, tensor: torch.Tensor) -> None:
        """Take it up again."""
        self._root = ref(tensor)
        self.follow()

    @property
    def moved(self) -> bool:
        """False: PyTorch refuses nothing here."""
        return False

    @property
    def operation(self) -> str:
        """What reads it again."""
        return "checkpoint"

    @property
    def proof(self) -> torch.Tensor | None:
        """A copy of the bytes that were read, if there is one."""
        return None if self.remarks is None else self.remarks.proof

    def keep_proof(self, at_most: int | None = None) -> None:
        """Keep a copy of the bytes that were read, unless they may have been written to already."""
        if self.proof is None:
            self.late = self.late or self._displaced
            if not self.late:
                super().keep_proof(at_most)

    @property
    def _displaced(self) -> bool:
        """Whether its version moved, or it lies elsewhere."""
        tensor = self.tensor
        return _memory.version_of(tensor) != self.version or _memory.storage_of(tensor) != self.home

    @property
    def changed(self) -> bool:
        """Whether its bytes are not what they were; where there is no copy, whether something says so."""
        tensor = self.tensor
        if tensor is _GONE:
            return False
        if self.proof is not None:
            return not _memory.same_bytes(tensor, self.proof)
        suspected = self.remarks is not None and self.remarks.suspect is not None
        return self.late or suspected or self._displaced

    def follow(self) -> None:
        """It was pointed at other memory."""
        storage = _memory.storage_of(self.tensor)
        if storage != self.storage:
            self.storage = storage
            LEDGER.add(self)

    def accept(self) -> None:
        """What was written has been answered: what is there now is what the next recomputation is to find."""
        self.follow()
        self.home = self.storage
        self.version = _memory.version_of(self.tensor)
        self.late = False
        self.allowed = None
        remarks = self.remarks
        if remarks is not None:
            remarks.suspect = remarks.guard = remarks.writer = remarks.proof = None
            remarks.compare = False
            if remarks.exports:
                self.keep_proof()


class OutsideReread(Reread):
    """Part of a NumPy array that a checkpoint's function read by a tensor of its own making.

    No patch sees who writes there, so it is compared with a copy, unless that would be large.
    """

    __slots__ = ("source",)

    def __init__(
        self, tensor: torch.Tensor, source: Source, instruction: _places.Instruction, needed: Callable[[], bool]
    ) -> None:
        self.source = source
        self._describe(tensor, _memory.storage_of(tensor), instruction, needed)
        self.keep_proof(PROOF_BYTES_AT_ALIAS)

    @property
    def tensor(self) -> torch.Tensor:  # type: ignore[override]
        """A new tensor over it; one without memory once the array is gone."""
        tensor = self.source.tensor()
        return _GONE if tensor is None else tensor

    @property
    def _displaced(self) -> bool:
        return False

    @property
    def changed(self) -> bool:
        """Whether its bytes are not what they were."""
        tensor = self.tensor
        return tensor is not _GONE and self.proof is not None and not _memory.same_bytes(tensor, self.proof)

    def accept(self) -> None:
        """What was written has been answered: what is there now is what the next recomputation is to find."""
        remarks = self.remark()
        remarks.suspect = remarks.guard = remarks.writer = remarks.proof = None
        self.keep_proof(PROOF_BYTES_AT_ALIAS)


def note_write(entries: Iterable[Reread], operation: str) -> None:
    """A call is about to write to these: keep their bytes, and who it was."""
    copies: dict[int, torch.Tensor] = {}  # what many checkpoints read is copied once
    here: _places.Instruction = None
    for entry in entries:
        tensor = entry.tensor
        if tensor is _GONE or not entry.needed():
            continue
        remarks = entry.remark()
        if remarks.writer is not None and (remarks.proof is None or not _memory.same_bytes(tensor, remarks.proof)):
            continue  # whose fault it is, is known
        if id(tensor) in copies and entry.proof is None and not entry.late and not entry.changed:
            remarks.proof = copies[id(tensor)]
        entry.keep_proof()
        if remarks.proof is not None:
            copies[id(tensor)] = remarks.proof
        here = here or _places.user_instruction(sys._getframe(1))
        remarks.compare = True
        remarks.writer = ("recompute", operation, here)
        entry.allowed = _policy.state.reasons[-1] if _policy.state.reasons else None


@contextmanager
def let_go(tensors: Iterable[torch.Tensor], operation: str) -> Iterator[None]:
    """Do something that writes to these and refuses those that somebody has a weak hold on."""
    held = [(tensor, entry) for tensor in tensors for entry in rereads_of(tensor)]
    note_write([entry for _, entry in held], operation)
    for _, entry in held:
        entry.let_go()
    try:
        yield
    finally:
        for tensor, entry in held:
            entry.hold(tensor)


@LEDGER.holds_saves
def rereads_of(tensor: torch.Tensor) -> list[Reread]:
    """The entries of this very tensor."""
    storage = _memory.storage_of(tensor)
    found = LEDGER.in_storage(storage) if storage else []
    return [entry for entry in found if isinstance(entry, Reread) and entry.tensor is tensor]
