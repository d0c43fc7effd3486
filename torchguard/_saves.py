"""What is known of a tensor that autograd has saved, and how is it told whether it still holds what it held?

Note [What a save holds]. PyTorch keeps the very tensor where an op saves an *input* (or a leaf), and a
detached alias where it saves its own *output*, because output -> node -> save -> output would be a cycle that
no garbage collector sees. A save does the same: what it keeps alive, and what ``x.data = y`` does to it, is
what it would be without the guard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from torchguard import _fingerprint, _memory, _places, _policy, _torch
from torchguard._counts import COUNTS, SLOW_PATH
from torchguard._fast import native
from torchguard._ledger import Extent, Ledger
from torchguard._model import Span
from torchguard._torch import ref
from torchguard._violation import Kind

#: Saves up to these many bytes are copied when an alias could write to them unseen, so that the bytes decide
#: at the read: when an alias of a live save is taken (once a save, about 50 microseconds at the most), and
#: when something is saved that has a living alias (at every save, 2 microseconds at the most).
PROOF_BYTES_AT_ALIAS = 1 << 20
PROOF_BYTES_AT_SAVE = 1 << 14


class Access(Protocol):
    """Who else can reach the memory of a save: an alias (``_aliases``), or code outside torch (``_exports``)."""

    @property
    def instruction(self) -> _places.Instruction:
        """Where the access was given; None where nobody saw that."""

    @property
    def span(self) -> Span | None:
        """The memory that can be reached; None where that is not known, or is all of the storage."""


class Remarks:
    """What is known of the few saves about which there is something to say."""

    __slots__ = (
        "alias",
        "audited",
        "awaits",
        "compare",
        "contents",
        "exports",
        "fingerprint",
        "for_exports",
        "guard",
        "handed",
        "healed",
        "parts",
        "proof",
        "spoilt",
        "stashed",
        "suspect",
        "taken_by",
        "view",
        "writer",
    )

    def __init__(self) -> None:
        #: The alias whose counter moved without a write that the guard saw.
        self.suspect: Access | None = None
        #: A copy of the saved bytes.
        self.proof: torch.Tensor | None = None
        #: The same of a save without memory of its own (sparse, nested, ...): of each tensor that it is made of.
        self.contents: list[torch.Tensor] | None = None
        #: Whether the copy was made when it was saved, whoever may write.
        self.audited = False
        #: Whether the bytes decide at the read: a trusted or a silent writer has been at work.
        self.compare = False
        #: Whether PyTorch would read it without a look at its version, and never lets go of it: the bytes decide.
        self.stashed = False
        #: What is known of the saved bytes while their memory is given up.
        self.fingerprint: torch.Tensor | None = None
        #: Whether backward is given the copy: None until somebody has asked the guard in charge.
        self.healed: bool | None = None
        #: Waits for a write that has begun in the background; to be called before the bytes are compared.
        self.awaits: Callable[[], None] | None = None
        #: The first such writer since the bytes were last those that were saved, and where, if the guard saw it.
        self.writer: tuple[Kind, str, _places.Instruction] | None = None
        #: Where the alias was taken that it wrote through, if the guard saw that.
        self.alias: _places.Instruction = None
        #: The guard that saw the write and left it to the bytes: it answers, wherever backward reads.
        self.taken_by: _policy.Respondent | None = None
        #: What PyTorch is given when it reads, where that is the wrapper of a transform that is over.
        self.handed: torch.Tensor | None = None
        #: The guard that was left while this save was under suspicion: it answers when backward reads it after all.
        self.guard: _policy.Respondent | None = None
        #: By what code outside torch could write to it: the bytes decide at the read.
        self.exports: list[Access] = []
        #: Whether the copy is kept for the exports alone, maybe together with other saves.
        self.for_exports = False
        #: What stands for the tensors inside, where it is a subclass that wraps others.
        self.parts: tuple[Part, ...] = ()
        #: Whether code outside torch has written to it already, where nothing allowed it.
        self.spoilt = False
        #: Where the output is a view that was written in place, a weak hold on it: PyTorch names its node in
        #: a refusal while it lives, and the node that reads once it is gone.
        self.view: ref[torch.Tensor] | None = None


if TYPE_CHECKING or native is None:

    class Fields:
        """The attributes of a save."""

        __slots__ = (
            "__weakref__",
            "code",
            "inner_code",
            "inner_offset",
            "node",
            "offset",
            "output",
            "remarks",
            "storage",
            "tensor",
            "version",
        )

        tensor: torch.Tensor
        version: int
        storage: int
        code: CodeType | None
        offset: int
        inner_code: CodeType | None
        inner_offset: int
        node: type | None
        output: int
        remarks: Remarks | None

else:
    Fields = native.Fields


class Save(Fields):
    """A tensor that autograd keeps for backward.

    Attributes:
        tensor: the tensor itself where an input or a leaf was saved, a detached alias where an output was.
        version: its version when it was saved.
        storage: identity of its storage when it was saved.
        code, offset: the instruction in the user's code that saved it (None and 0 if there is none).
        inner_code, inner_offset: the innermost instruction, in torch or in the user's code.
        node: type of the node whose output it is, None where it is not an output of the node that saved it.
        output: which output of that node.
        remarks: None until there is something to remark.
    """

    __slots__ = ()

    #: Whether the guard makes PyTorch's check of versions for it, and whether it is sure that backward will read this
    #: memory (both are otherwise under save hooks of the program).
    checked: ClassVar[bool] = True
    certain: ClassVar[bool] = True
    #: Whether a write that nobody saw has moved the version of one that is not checked.
    tracked: ClassVar[bool] = False

    def remark(self) -> Remarks:
        """The remarks, made if there are none yet."""
        if self.remarks is None:
            self.remarks = Remarks()
        return self.remarks

    def keep_proof(self, at_most: int | None = None) -> None:
        """Keep a copy of the saved bytes, if there is none yet and they are no more than ``at_most``."""
        tensor = self.tensor
        if _is_plain(tensor):  # the same, at a third of the time
            if at_most is None or tensor.numel() * tensor.element_size() <= at_most:
                remarks = self.remark()
                remarks.for_exports = False
                has_bytes = not tensor.numel() or _torch.storage_address(tensor)
                if remarks.proof is None and has_bytes and _memory.readable(tensor):
                    remarks.proof = _shared_copy_of(tensor)
            return
        remarks = self.remark()
        with _torch.hidden():
            tensor = _torch.behind(tensor)
            if at_most is not None and tensor.numel() * tensor.element_size() > at_most:
                return
            remarks.for_exports = False
            has_bytes = _memory.span_of(tensor) is not None or _memory.is_empty(tensor)
            if remarks.proof is None and has_bytes and _memory.readable(tensor):
                remarks.proof = _shared_copy_of(tensor)

    def keep_small_proof(self, at_most: int) -> None:
        """The same for a write that nobody will see coming.

        A guard that lets the bytes decide has something to decide by for larger saves, too: no copy, which would double
        their memory, but 64 bits.
        """
        remarks = self.remarks
        if remarks is not None and remarks.proof is not None and not remarks.for_exports:
            return  # asked at every alias that is taken
        if _policy.judge_at_read() is None:
            self.keep_proof(at_most)
            return
        self.keep_proof(max(at_most, PROOF_BYTES_AT_ALIAS))
        remarks = self.remark()
        if self.checked and remarks.proof is None and remarks.fingerprint is None and not remarks.parts:
            remarks.fingerprint = _fingerprint.of(_torch.behind(self.tensor))

    def keep_contents(self) -> None:
        """Keep a copy of what is saved, whatever its layout, and compare when backward reads."""
        remarks = self.remark()
        tensor = self.tensor
        if _is_plain(tensor):  # the same, at a third of the time: audit() does it for every save
            if not tensor.numel() or not _torch.storage_address(tensor) or _torch.is_capturing(tensor):
                return
            try:
                with torch.no_grad():
                    remarks.proof = tensor.detach().clone()
            except (RuntimeError, MemoryError) as error:
                _note_no_room(error)
                return
            remarks.audited = remarks.compare = True
            return
        with _torch.hidden():
            if _torch.is_capturing(self.tensor):
                return  # the copy would be made again with every replay
            self.keep_proof()
            if remarks.proof is None:
                copies = [copy_of(part) for part in _memory.strided_parts_of(self.tensor)]
                remarks.contents = [copy for copy in copies if copy is not None]
                if not copies or len(remarks.contents) < len(copies):
                    remarks.contents = None
        remarks.audited = remarks.compare = remarks.proof is not None or remarks.contents is not None

    def let_bytes_decide(
        self, kind: Kind, operation: str, here: _places.Instruction, aliased: _places.Instruction = None
    ) -> None:
        """A write is coming that nobody can judge now: keep proof, and compare when backward reads."""
        remarks = self.remark()
        writer = (kind, operation, here)
        written = remarks.suspect is not None or (remarks.compare and remarks.writer not in (None, writer))
        if written and not self.is_intact:
            remarks.compare = True  # somebody else has written to it already
            return
        self.keep_proof()
        remarks.suspect = None
        remarks.compare = True
        remarks.writer = writer
        remarks.alias = aliased
        remarks.taken_by = _policy.judge_at_read()
        remarks.healed = None

    def shares_counter(self, target: torch.Tensor) -> bool:
        """Whether a counted write to ``target`` moves the version of what was saved."""
        return _memory.shares_counter(target, self.tensor)

    def expect_version(self) -> None:
        """The version of a save that is not checked has moved by a write that was seen."""

    @property
    def given(self) -> torch.Tensor:
        """The tensor that PyTorch is given when it reads, where nobody repairs."""
        handed = None if self.remarks is None else self.remarks.handed
        tensor = self.tensor if handed is None else handed
        # ``x.data = y`` where y was made in inference mode: PyTorch refuses to take that from a hook.
        return _memory.outside_inference_mode(tensor) if tensor.is_inference() else tensor

    def restored(self) -> torch.Tensor:
        """A copy of the bytes that were saved, for backward: autograd gives it the history that the save has."""
        proof = self.remark().proof
        assert proof is not None
        tensor = self.given
        with _torch.hidden():
            copy = handed_out(proof)
            kind = type(tensor)
            if kind not in _memory.PLAIN_TYPES and not _torch.is_wrapper(tensor):
                copy = copy.as_subclass(kind)
            return _torch.in_place_of(tensor, copy)

    @property
    def is_taken(self) -> bool:
        """Whether a guard has seen a write to it and left it to the bytes."""
        return self.remarks is not None and self.remarks.taken_by is not None

    @property
    def is_intact(self) -> bool:
        """Whether the bytes are known to be those that were saved."""
        return self.is_back or self.is_proven

    @property
    def is_proven(self) -> bool:
        """Whether there is proof, and the bytes are those of it."""
        remarks = self.remarks
        if remarks is None:
            return False
        if remarks.contents is not None:
            return _memory.same_parts(_memory.strided_parts_of(self.tensor), remarks.contents)
        proof = remarks.proof
        return proof is not None and _memory.readable(self.tensor) and _memory.same_bytes(self.tensor, proof)

    @property
    def changed_elements(self) -> int:
        """How many elements differ from the proof; all of them where there is none."""
        return _memory.changed_elements(self.tensor, None if self.remarks is None else self.remarks.proof)

    def expect_back(self, operation: str) -> None:
        """The save's memory is about to be freed by somebody who fills it again, with ``operation``."""
        remarks = self.remark()
        if remarks.compare:
            return
        if remarks.proof is None:
            remarks.fingerprint = _fingerprint.of(self.tensor)
        if remarks.proof is not None or remarks.fingerprint is not None:
            remarks.compare = True
            remarks.writer = ("uncounted", operation, None)

    @property
    def is_back(self) -> bool:
        """Whether the memory that was given up holds what it held, or is not there: then nobody can read it."""
        expected = None if self.remarks is None else self.remarks.fingerprint
        if expected is None:
            return False
        found = _fingerprint.of(self.tensor)
        with _torch.hidden():
            return found is None or bool(torch.equal(found, expected))

    @Ledger.holds_saves
    def follow(self) -> None:
        """The tensor that was saved may lie elsewhere now."""
        if self.node is None:
            storage = _memory.storage_of(self.tensor)
            LEDGER.lies_elsewhere(self.storage)
            if storage != self.storage:
                self.storage = storage
                if not any(save is self for save in LEDGER.in_storage(storage)):
                    LEDGER.add(self)

    def accept(self) -> None:
        """What has happened to the save so far has been answered: what is there now is what backward is to find."""
        self.follow()
        remarks = self.remarks
        if remarks is not None:
            remarks.suspect = remarks.guard = remarks.writer = remarks.alias = None
            remarks.taken_by = remarks.healed = None
            if remarks.fingerprint is not None:
                remarks.fingerprint = _fingerprint.of(self.tensor)
                remarks.compare = remarks.fingerprint is not None
            if remarks.audited:
                remarks.proof = remarks.contents = None
                self.keep_contents()
            elif remarks.proof is not None and not remarks.spoilt:
                remarks.proof = None
                self.keep_proof()

    @property
    def stashed(self) -> bool:
        """Whether PyTorch reads it without a look at its version."""
        return self.remarks is not None and self.remarks.stashed

    @property
    def moved(self) -> bool:
        """Whether the version moved since: PyTorch will refuse to use the save."""
        return _memory.has_moved(self.tensor, self.version)

    @property
    def instruction(self) -> _places.Instruction:
        """The instruction in the user's code that saved it."""
        return None if self.code is None else (self.code, self.offset)

    @property
    def operation(self) -> str:
        """The operation that saved it, ``""`` where it cannot be told."""
        if self.node is not None:
            return operation_of_node(self.node.__name__)
        if self.inner_code is None:
            return ""
        if _places.is_ours(self.inner_code):  # a call that the guard makes for the user's
            return _places.operation_of(self.instruction)
        return _places.operation_of((self.inner_code, self.inner_offset))


class Part(Save):
    """A tensor inside a saved subclass that wraps others. PyTorch looks at the wrapper's version only."""

    __slots__ = ()

    def __init__(self, whole: Save, tensor: torch.Tensor) -> None:
        for name in ("code", "offset", "inner_code", "inner_offset"):
            setattr(self, name, getattr(whole, name))
        self.tensor, self.node, self.output = tensor, None, 0
        self.version, self.storage = _memory.version_of(tensor), _memory.storage_of(tensor)
        self.remarks = None
        self.remark().stashed = True


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be looked at and copied as it is: nobody else sees it, and it has elements and strides."""
    return (
        type(tensor) in _memory.PLAIN_TYPES
        and not _torch.any_mode_active()
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not _torch.is_wrapper(tensor)
    )


def copy_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy that is proof of the saved bytes; None where there is no room for it, which must not end the program."""
    try:
        with SLOW_PATH:
            COUNTS.copies += 1
            return tensor.detach().clone()
    except (RuntimeError, MemoryError) as error:
        _note_no_room(error)
        return None


def handed_out(proof: torch.Tensor) -> torch.Tensor:
    """What backward may read in the place of a save: the proof or, where what reads may write to it, a copy."""
    if _torch.reader_writes_to_nothing() and not proof.is_inference():
        return proof.detach()
    copy = copy_of(proof)
    return proof if copy is None else copy  # without room for a copy, right for the first that reads


class _Copies(threading.local):
    """The copies that were made in a block of :func:`one_copy_each`, by what they are of; None outside."""

    made: dict[Any, torch.Tensor | None] | None = None


_copies = _Copies()


@contextmanager
def one_copy_each() -> Iterator[None]:
    """Nothing is written to in this block: saves of the same memory, of which proof is kept, share one copy."""
    _copies.made = {}
    try:
        yield
    finally:
        _copies.made = None


def _shared_copy_of(tensor: torch.Tensor) -> torch.Tensor | None:
    made = _copies.made
    if made is None or type(tensor) not in _memory.PLAIN_TYPES:
        return copy_of(tensor)
    key = (_memory.span_of(tensor), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    if key[0] is None:
        return copy_of(tensor)
    if key not in made:
        made[key] = copy_of(tensor)
    return made[key]


def _note_no_room(error: Exception) -> None:
    reason = str(error).partition("\n")[0] or type(error).__name__
    _policy.note_unwatched(f"the bytes of some saves: they could not be copied ({reason})")


def operation_of_node(name: str) -> str:
    """``"LinalgSvdBackward0"`` -> ``"linalg_svd"``; a custom Function keeps its own name."""
    stem, backward, number = name.rpartition("Backward")  # the last: "ConvolutionBackwardBackward0"
    if not backward:
        return name
    if not number.isdigit():
        return stem
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(stem))


def _extent_of(save: Save) -> Extent | None:
    return extent_of(save.tensor)


def _reach_of(save: Save) -> tuple[int, int] | None:
    # Of the other kinds, a version is watched that moves wherever in the storage somebody writes.
    return _memory.stretch_in_storage(save.tensor) if type(save) is Save else None


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether another storage may lie over the same memory: torch's own allocator did not make this one."""
    if type(tensor) in _memory.PLAIN_TYPES and not _torch.function_mode_active():
        return not tensor.untyped_storage().resizable()
    extent = extent_of(tensor)
    return extent is not None and extent[2]


def _is_foreign(save: Save) -> bool:
    try:  # what torch.func wraps has remarks
        return is_foreign(save.tensor if save.remarks is None else _torch.behind(save.tensor))
    except _memory.NO_MEMORY:
        return False


def extent_of(tensor: torch.Tensor) -> Extent | None:
    """Where the tensor's storage lies, and whether it is foreign; None where it has no memory."""
    try:
        with _torch.no_torch_function():
            tensor = _torch.behind(tensor)
            low = _torch.storage_address(tensor)
            storage = tensor.untyped_storage()
            return (low, low + storage.nbytes(), not storage.resizable()) if low else None
    except _memory.NO_MEMORY:
        return None


#: The live saves of this process.
LEDGER: Ledger[Save] = Ledger(_extent_of, _is_foreign, reach_of=_reach_of)
