"""What is known of a tensor that autograd has saved, and how is it recorded when it is saved?

Note [What a save holds]. PyTorch keeps the very tensor where an op saves an *input* (or a leaf), and a
detached alias where it saves its own *output*, because output -> node -> save -> output would be a cycle that
no garbage collector sees. A save does the same: what it keeps alive, and what ``x.data = y`` does to it, is
what it would be without the guard.

An output is told from an input by the sequence number of the node that made it: the node that is saving right
now is the one created last in this thread, but for those of views that were out of date (see ``made_last``). These
are looked for only where a tensor is new to Python, or was written in place: any other can be no output.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import CodeType
from typing import Any, ClassVar

import torch

from torchguard import _fingerprint, _memory, _places, _policy, _torch
from torchguard._aliases import ALIASES, PROOF_BYTES_AT_ALIAS, PROOF_BYTES_AT_SAVE, AliasRecord
from torchguard._counts import COUNTS, SLOW_PATH
from torchguard._exports import EXPORTS, FRESH, OWN_NODES, Export
from torchguard._inputs import read_recording, saved_before
from torchguard._ledger import Extent, Ledger
from torchguard._torch import ref
from torchguard._violation import Kind

#: A node that is a custom Function may have made other nodes in its forward, which upsets the sequence
#: numbers.
_APPLY_CODE = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)

_FILE_AT = 4096

#: The type of node that a view has once it was written in place.
_VIEW_NODE = type(torch.ones(1, requires_grad=True).as_strided((1,), (1,)).grad_fn)

#: The type of node that a copy has.
_COPY_NODE = type(torch.ones(1, requires_grad=True).clone().grad_fn)

#: With ``every_call`` an operation is called from the override: what called the override is its caller.
OWN_FILES = frozenset(
    {
        __file__,
        *(
            os.path.join(os.path.dirname(__file__), f"{name}.py")
            for name in ("_intercept", "_functorch", "_compiled", "_inputs")
        ),
    }
)


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
        "guard",
        "handed",
        "healed",
        "lent",
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
        self.suspect: AliasRecord | None = None
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
        self.exports: list[Export] = []
        #: Whether the copy is kept for the exports alone, maybe together with other saves.
        self.lent = False
        #: What stands for the tensors inside, where it is a subclass that wraps others.
        self.parts: tuple[Part, ...] = ()
        #: Whether code outside torch has written to it already, where nothing allowed it.
        self.spoilt = False
        #: Where the output is a view that was written in place, a weak hold on it: PyTorch names its node in
        #: a refusal while it lives, and the node that reads once it is gone.
        self.view: ref[torch.Tensor] | None = None


class Save:
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

    #: Whether the guard makes PyTorch's check of versions for it, and whether it is sure that backward will read this
    #: memory (both are otherwise under save hooks of the program).
    checked: ClassVar[bool] = True
    certain: ClassVar[bool] = True
    #: Whether a write that nobody saw has moved the version of one that is not checked.
    tracked: ClassVar[bool] = False

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

    def remark(self) -> Remarks:
        """The remarks, made if there are none yet."""
        if self.remarks is None:
            self.remarks = Remarks()
        return self.remarks

    def keep_proof(self, at_most: int | None = None) -> None:
        """Keep a copy of the saved bytes, if there is none yet and they are no more than ``at_most``."""
        remarks = self.remark()
        tensor = self.tensor
        with _torch.hidden():
            tensor = _torch.behind(tensor)
            if at_most is not None and tensor.numel() * tensor.element_size() > at_most:
                return
            remarks.lent = False
            has_bytes = _memory.span_of(tensor) is not None or _memory.is_empty(tensor)
            if remarks.proof is None and has_bytes and _memory.readable(tensor):
                remarks.proof = _shared_copy_of(tensor)

    def keep_small_proof(self, at_most: int) -> None:
        """The same for a write that nobody will see coming.

        A guard that lets the bytes decide has something to decide by for larger saves, too: no copy, which would double
        their memory, but 64 bits.
        """
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
        plain = type(tensor) in _memory.PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_nested
        if plain and not tensor.is_quantized and not _torch.any_mode_active():
            # The same, at a third of the time: audit() does it for every save.
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
                copies = [copy_of(part) for part in _memory.parts_of(self.tensor)]
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
        return self.tensor if handed is None else handed

    def restored(self) -> torch.Tensor:
        """A copy of the bytes that were saved, for backward: autograd gives it the history that the save has."""
        proof = None if self.remarks is None else self.remarks.proof
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
            return _memory.same_parts(_memory.parts_of(self.tensor), remarks.contents)
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
        return _memory.version_of(self.tensor) != self.version

    @property
    def instruction(self) -> _places.Instruction:
        """The instruction in the user's code that saved it."""
        return None if self.code is None else (self.code, self.offset)

    @property
    def operation(self) -> str:
        """The operation that saved it, ``""`` where it cannot be told."""
        if self.node is not None:
            return operation_of_node(self.node.__name__)
        return "" if self.inner_code is None else _places.operation_of((self.inner_code, self.inner_offset))


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
    stem, backward, number = name.partition("Backward")
    if not backward or not number.isdigit():
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
LEDGER: Ledger[Save] = Ledger(_extent_of, _is_foreign, on_empty=ALIASES.forget_all_dead, reach_of=_reach_of)
ALIASES.live_saves = LEDGER.in_storage
ALIASES.any_live_save = LEDGER.any_in_storage


def make_pack(exotic: bool = False, audits: bool = False) -> Callable[[torch.Tensor], Save]:
    """A new pack hook, or one for tensors that are known to be no plain ones, or one that keeps the bytes of each save.

    Everything it uses is bound to a local name: it runs once a save.
    """
    pending = LEDGER.pending
    file = LEDGER.file
    append = pending.append
    tensor_type, parameter_type = torch.Tensor, torch.nn.Parameter
    no_memory = _memory.NO_MEMORY
    mode_active = _torch.function_mode_active
    storage_id = _torch.storage_id
    next_number = _torch.next_sequence_number
    made_last = _torch.made_last
    node_type, generic_node = _torch.node_type, _torch.GENERIC_NODE
    inside_library = _places.inside_library
    user_instruction = _places.user_instruction
    user_instruction_above = _places.user_instruction_above
    young = ALIASES.young
    aliases = ALIASES.by_storage
    getframe = sys._getframe
    disabled = _torch.no_torch_function
    exports = EXPORTS.by_storage
    dead_exports = EXPORTS.dead
    recording = read_recording
    references = sys.getrefcount
    first = next_number()
    own_nodes = OWN_NODES
    own_files = OWN_FILES
    view_node = _VIEW_NODE
    # What an operation saves, it saves between two nodes of its thread, and from one instruction: the way from there
    # to the user's code is walked once. (One tuple, so that a thread never sees half of what another wrote.)
    walked: tuple[Any, ...] = (None, None, 0, None, 0)
    # Code of the user's that has saved last: its file need not be looked at again.
    of_user: CodeType | None = None

    def pack(tensor: torch.Tensor, depth: int = 1) -> Save:
        nonlocal walked, of_user
        kind = type(tensor)
        if (kind is tensor_type or kind is parameter_type) and depth == 1:
            if mode_active():
                return pack_exotic(tensor, 3)
            try:
                storage = storage_id(tensor)
            except no_memory:  # sparse, opaque, a functorch wrapper
                return pack_exotic(tensor, 3)
            if tensor.is_nested:
                return pack_exotic(tensor, 3)
        elif depth == 1:
            return pack_exotic(tensor, 3)
        else:
            storage = _memory.storage_of(tensor)
        save = Save()  # attribute by attribute: half the time of a constructor with ten arguments
        save.remarks = None
        save.storage = storage
        save.version = tensor._version
        number = next_number()
        try:
            frame: Any = getframe(depth)
        except ValueError:  # an autograd thread: no Python code on the stack
            frame = None
            save.code = save.inner_code = None
            save.offset = save.inner_offset = 0
        else:
            code = frame.f_code
            offset = frame.f_lasti
            if code is of_user:
                save.code = code
                save.offset = offset
            elif walked[0] == number and walked[1] is code and walked[2] == offset:
                save.code = walked[3]
                save.offset = walked[4]
            elif (inside := inside_library.get(code.co_filename)) is False:
                save.code = of_user = code
                save.offset = offset
            elif code.co_filename in own_files:
                while code.co_filename in own_files and frame.f_back is not None:
                    frame = frame.f_back
                    code = frame.f_code
                offset = frame.f_lasti
                found = user_instruction(frame)
                save.code, save.offset = found if found is not None else (None, 0)
            else:
                found = user_instruction_above(depth + 1 if inside else depth)
                save.code, save.offset = found if found is not None else (None, 0)
                if number >= 0:  # torch may not tell
                    walked = (number, code, offset, save.code, save.offset)
            save.inner_code = code
            save.inner_offset = offset
        grad_fn = tensor.grad_fn
        if grad_fn is not None and (
            (made := grad_fn._sequence_nr()) == number - 1
            or number < 0  # this torch does not tell: never risk a cycle
            or (frame is not None and frame.f_code is _APPLY_CODE and _may_be_output(tensor, grad_fn, frame))
            or (
                (save.version or exotic or (references(tensor) <= FRESH + depth - 2 and not tensor._is_view()))
                and made_last(grad_fn, number - 1 if save.version and _copied_itself(save) else number)
            )
        ):
            node: Any = type(grad_fn)
            if node is generic_node:
                node = node_type(grad_fn)
            save.node = node
            save.output = tensor.output_nr
            save.tensor = tensor.detach()
            if node is view_node:
                save.remark().view = ref(tensor)
            try:
                before = pending[-1]()
            except IndexError:
                before = None
            if before is not None and before.node is None and before.inner_offset == save.inner_offset:
                _mend_foreach(node, made, save.inner_code)
        else:
            save.node = node = None
            save.output = 0
            if recording and storage in recording:
                tensor = saved_before(storage, tensor)
            save.tensor = tensor
        if storage in young or storage in aliases:
            latest = young.get(storage)
            if latest is not None and latest[0]() is None:
                young.pop(storage, None)  # a temporary of the last step
            if storage in young or storage in aliases:
                ALIASES.sync(storage)
                if ALIASES.arm(storage, tensor):
                    save.keep_small_proof(PROOF_BYTES_AT_SAVE)
        if storage in exports:
            known = exports.get(storage)
            if known is not None and known.exports:
                EXPORTS.keep(save, known)
        else:
            if node is not None:
                # Written in place, the node is younger than the memory.
                may_be_older = save.version > 0 or node not in own_nodes
            else:
                base = tensor._base
                if base is not None and (grad_fn := base.grad_fn) is not None:
                    made = grad_fn._sequence_nr()
                if grad_fn is None:
                    # Under one more holder than a fresh tensor: the save.
                    may_be_older = base is not None or references(tensor) > FRESH + depth - 1
                else:
                    may_be_older = save.version > 0 or made < first or type(grad_fn) not in own_nodes
            if may_be_older:
                EXPORTS.ask(save, storage, grad_fn)
        if dead_exports:
            EXPORTS.settle_dead()
        append(ref(save))
        if len(pending) > _FILE_AT:
            file()
        if audits:
            save.keep_contents()
        return save

    def pack_exotic(tensor: torch.Tensor, depth: int = 2) -> Save:
        given = tensor
        with disabled():
            tensor = _torch.within_what_is_over(given)
            save = pack(tensor, depth)
        remarks = save.remark()  # a save with remarks is read with user code kept out
        if tensor is not given:
            remarks.handed = given
        if _memory.span_of(tensor) is None:
            remarks.parts = tuple(
                Part(save, inner) for inner in _torch.parts_of(save.tensor) if _memory.storage_of(inner)
            )
            pending.extend(ref(part) for part in remarks.parts)
        if not (remarks.parts or remarks.contents) and _memory.span_of(tensor) is None and tensor.device.type != "meta":
            layout = str(tensor.layout).removeprefix("torch.")
            _policy.note_unwatched(
                f"{type(tensor).__name__} of layout {layout}: no memory to compare writes with; "
                "PyTorch's own version check still applies"
            )
        return save

    return pack_exotic if exotic else pack


def _latest(most: int) -> list[ref[Save]]:
    """The latest saves that are not filed yet, newest first."""
    try:
        return list(islice(reversed(LEDGER.pending), most))
    except RuntimeError:  # another thread saves or files
        return []


def _copied_itself(save: Save) -> bool:
    """Whether what is saving saved a copy of what it was about to write over: the copy has a node, too."""
    for item in _latest(1):
        before = item()
        return (
            save.version > 0
            and before is not None
            and before.node is _COPY_NODE
            and before.inner_code is save.inner_code
            and before.inner_offset == save.inner_offset
        )
    return False


def _mend_foreach(node: type, number: int, code: CodeType | None) -> None:
    """A ``_foreach_`` operator makes all its nodes before it saves: only its last output was told as one.

    Going back from there, what one instruction saved, of one type of node, with numbers that run without a
    gap, are outputs as well. What saves its input and its output (``h = h.cumprod(0)`` in a loop) looks the same, but
    for the name that it is called by. (Where that does not tell, its input is kept as an alias, and ``h.data = y`` on
    it is not reported.)
    """
    mended = False
    for item in _latest(1024):
        save = item()
        if save is None or save.node is not None or save.inner_code is not code:
            return
        grad_fn: Any = save.tensor.grad_fn
        number -= 1
        if grad_fn is None or _torch.node_type(grad_fn) is not node or _torch.sequence_number(grad_fn) != number:
            return
        if not mended and code and _places.operation_of((code, save.inner_offset)) == operation_of_node(node.__name__):
            return  # ``h.cumprod(0).cumprod(0)``
        mended = True
        save.node = node
        save.output = save.tensor.output_nr
        save.tensor = save.tensor.detach()


def _may_be_output(tensor: torch.Tensor, grad_fn: Any, frame: Any) -> bool:
    """Whether a custom Function, applied in ``frame``, may be saving an output of its own.

    Its forward can have recorded a graph, and then its node is not the newest. What it was given is an input.
    """
    local = frame.f_locals
    given = local.get("args", ())
    if any(one is tensor for item in given for one in (item if isinstance(item, (list, tuple)) else (item,))):
        return False
    return type(grad_fn) is _torch.node_class_of(local.get("cls"))
