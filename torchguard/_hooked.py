"""What does backward read where the program has save hooks of its own, and is it still what was saved?

Note [Save hooks of the program]. PyTorch runs only the innermost pair of hooks and, under any pair, compares no
versions. So the program's pair is composed with a record: what it packs is kept next to what the guard must know.

* What it packed holds a tensor over the saved memory: backward will read that memory, the record is *certain*, and
  a silent write is judged at the write, as for any save.
* It holds something else (a key, a file name): only what the program's unpack returns can tell whether the saved
  memory is read. Proof is kept when a write comes, and the bytes decide at the read.
* It holds tensors over other memory: a copy. Nothing more is asked than whether unpack returns the original after all.

A tracked write, which PyTorch would refuse without hooks, passes here unnoticed. Whether backward will read the save is
as open as it is then, so it is judged at the read, by the bytes; where nobody saw it coming, by the version.

The record holds the saved memory weakly: hooks that copy exist to free it.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint

from torchguard import _memory, _places, _policy, _torch, _verdict
from torchguard._aliases import ALIASES
from torchguard._exports import EXPORTS
from torchguard._inputs import forget_read, read_recording, saved_before
from torchguard._overlap import overlaps
from torchguard._packing import OWN_FILES
from torchguard._reads import collector, export_behind, is_unused
from torchguard._rereads import Reread, running
from torchguard._saves import (
    LEDGER,
    PROOF_BYTES_AT_SAVE,
    Access,
    Save,
    copy_of,
    extent_of,
    handed_out,
    operation_of_node,
)
from torchguard._torch import Hooks, ref
from torchguard._violation import Kind


class HookedSave(Save):
    """What autograd keeps where the program has save hooks of its own: what they packed, and a record of the memory.

    Attributes:
        packed: what the program's pack hook returned.
        counter: a tensor that shares the saved tensor's version counter and no memory; None where nothing is recorded.
        held: a weak hold on the tensor whose memory is judged.
        weak: a weak hold on its storage.
        layout: dtype, offset, shape and strides of what is judged.
        output_of: type of the node whose output was saved, None for an input.
        reason: why the writes so far are allowed; None if one of them is not.
        recomputed: whether a checkpoint's function computes it anew when backward reads it.
    """

    __slots__ = ("counter", "held", "layout", "output_of", "packed", "reason", "recomputed", "weak")

    checked = False

    packed: Any
    counter: torch.Tensor | None
    held: Callable[[], torch.Tensor | None]
    weak: _torch.WeakStorage | None
    layout: tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]] | None
    output_of: type | None
    reason: str | None
    recomputed: bool

    @property
    def tensor(self) -> torch.Tensor:  # type: ignore[override]
        """The tensor whose memory is judged, or one like it over the same memory; empty once the memory is gone."""
        tensor = self.held()
        if tensor is not None:
            return tensor
        assert self.counter is not None
        storage = None if self.weak is None else self.weak.storage()
        if storage is None or self.layout is None:
            return self.counter
        with _torch.hidden():
            return _memory.with_counter(self.counter, _memory.over(storage, *self.layout))

    @property
    def certain(self) -> bool:  # type: ignore[override]
        """Whether backward will read this memory, as far as what was packed tells."""
        tensor = self.held()
        if tensor is not None and self.packed is tensor:
            return True
        form = _form_of(self.packed, self.tensor)
        return form is not None and form[0]

    @property
    def moved(self) -> bool:
        """Never refused by PyTorch: it compares no versions under save hooks."""
        return False

    @property
    def tracked(self) -> bool:  # type: ignore[override]
        """Whether the version moved by a write that nobody saw."""
        return self.counter is not None and _memory.version_of(self.counter) != self.version

    @property
    def operation(self) -> str:
        """The operation that saved it, ``""`` where it cannot be told."""
        if self.output_of is not None:
            return operation_of_node(self.output_of.__name__)
        return "" if self.inner_code is None else _places.operation_of((self.inner_code, self.inner_offset))

    def shares_counter(self, target: torch.Tensor) -> bool:
        """Whether a counted write to ``target`` moves the version of what was saved."""
        return self.counter is not None and _memory.shares_counter(target, self.counter)

    def keep_proof(self, at_most: int | None = None) -> None:
        """Keep a copy of the saved bytes, unless they may have changed already."""
        if not self.tracked and (self.remarks is None or self.remarks.suspect is None):
            super().keep_proof(at_most)

    def let_bytes_decide(
        self, kind: Kind, operation: str, here: _places.Instruction, aliased: _places.Instruction = None
    ) -> None:
        """A write is coming: keep proof, and compare when backward reads.

        What is computed anew repeats the writes of a checkpoint's function, and no others.
        """
        if self.recomputed and not running.depth:
            return
        remarks = self.remark()
        if not (remarks.compare or self.tracked or remarks.suspect is not None or remarks.exports):
            # What was copied at the save may not have been filled yet (the noise of an RReLU), and what code outside
            # torch can write to may not be what was saved any more.
            remarks.proof = None
        reasons = _policy.state.reasons
        first = not remarks.compare or (remarks.audited and remarks.writer is None)
        if first or self.reason is not None:
            self.reason = reasons[-1] if reasons else None
        super().let_bytes_decide(kind, operation, here, aliased)

    def expect_version(self) -> None:
        """The version has moved by a write that was seen."""
        if self.counter is not None:
            self.version = _memory.version_of(self.counter)

    def accept(self) -> None:
        """What has happened so far has been answered."""
        self.expect_version()
        self.reason = None
        storage = _memory.storage_of(self.tensor)
        if storage != self.storage:
            self.storage = storage
            self._look_at(self.tensor)
            LEDGER.add(self)
        super().accept()
        if self.remarks is not None:
            self.remarks.compare = self.remarks.audited

    def _look_at(self, tensor: torch.Tensor) -> None:
        self.weak = _torch.weak_storage(tensor)
        conjugated = tensor.is_conj() or tensor.is_neg()
        self.layout = (
            None
            if conjugated
            else (tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))
        )


@LEDGER.holds_saves
def let_go(tensor: torch.Tensor) -> None:
    """Drop the weak holds on a tensor: something asks for one without weak references."""
    for save in LEDGER.in_storage(_memory.storage_of(tensor)):
        if isinstance(save, HookedSave) and save.held() is tensor:
            save.held = _nothing


def _nothing() -> None:
    return None


# ---- what was packed ---------------------------------------------------------------------------------------

#: Of what a pack hook returned, at most so many objects are looked at.
_MOST = 200

_PLAIN_VALUES = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.device,
    torch.dtype,
    torch.Size,
)


def _inside(value: Any) -> Iterator[Any]:
    """The objects directly inside one."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
        yield from value.__defaults__ or ()
    if type(value).__module__ in ("builtins", "torch"):
        return
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):
        yield from list(held.values())
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__"):
                yield getattr(value, name, None)


def _leaves_of(packed: Any) -> list[Any] | None:
    """The tensors, storages and arrays in what was packed; None where it holds too much to tell."""
    found: list[Any] = []
    seen: set[int] = set()
    todo: list[Any] = [packed]
    while todo:
        value = todo.pop()
        if isinstance(value, _PLAIN_VALUES) or id(value) in seen:
            continue
        seen.add(id(value))
        if len(seen) > _MOST:
            return None
        if isinstance(value, torch.Tensor):
            found.append(value)
            if type(value) not in _memory.PLAIN_TYPES:
                todo.extend(value.__dict__.values())
        elif isinstance(value, (torch.UntypedStorage, torch.TypedStorage)) or hasattr(value, "__array_interface__"):
            found.append(value)
        else:
            todo.extend(_inside(value))
    return found


def _form_of(packed: Any, saved: torch.Tensor) -> tuple[bool, torch.Tensor | None] | None:
    """Whether what was packed is or holds the saved memory, and the tensor in it that does; None for a copy."""
    leaves = _leaves_of(packed)
    if leaves is None:
        return False, None
    live: list[Any] = []
    copies, bytes_held = 0, 0
    for leaf in leaves:
        if _lies_over(leaf, saved):
            live.append(leaf)
        elif isinstance(leaf, torch.Tensor):
            copies += leaf.numel() == saved.numel()
            bytes_held += leaf.numel() * leaf.element_size()
    if not live:
        # One that packs 64 to 1 is still taken for a copy; a number beside a key is not.
        large = bytes_held * 64 >= saved.numel() * saved.element_size()
        return None if copies or (large and bytes_held) else (False, None)
    if copies:
        return False, None  # a copy as well: only unpack tells which of them is read
    tensors = [leaf for leaf in live if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1 == len(live):
        return True, tensors[0]
    return True, next((tensor for tensor in tensors if tensor is saved), None)


def _lies_over(leaf: Any, saved: torch.Tensor) -> bool:
    """Whether a tensor, storage or array shares memory with ``saved``."""
    if leaf is saved:
        return True
    if isinstance(leaf, torch.Tensor):
        if (
            type(leaf) in _memory.PLAIN_TYPES
            and _memory.storage_of(leaf) == _memory.storage_of(saved) != 0
            and leaf.storage_offset() == saved.storage_offset()
            and leaf.numel() == saved.numel() != 0
        ):
            return True
        same = _memory.storage_of(leaf) == _memory.storage_of(saved) != 0
        if not same:
            there, here = extent_of(leaf), extent_of(saved)
            # Only memory that torch's allocator did not hand out can be in two storages.
            if there is None or here is None or not (there[2] or here[2]):
                return False
            if not (there[0] < here[1] and here[0] < there[1]):
                return False
        there_span, here_span = _memory.span_of(leaf), _memory.span_of(saved)
        return there_span is not None and here_span is not None and overlaps(there_span, here_span) is not False
    extent = extent_of(saved)
    if extent is None:
        return False
    if isinstance(leaf, (torch.UntypedStorage, torch.TypedStorage)):
        address = leaf.data_ptr()
    else:
        interface = leaf.__array_interface__
        data = interface.get("data") if isinstance(interface, dict) else None
        address = data[0] if isinstance(data, tuple) else 0
    return bool(extent[0] <= address < extent[1])


# ---- the composed pair -------------------------------------------------------------------------------------


def compose(program: Hooks) -> Hooks:
    """A pair of hooks that records what is saved, and otherwise does what the program's pair does."""
    pack_program, unpack_program = program
    code = getattr(pack_program, "__code__", None)
    plain, any_mode_active = _memory.PLAIN_TYPES, _torch.any_mode_active
    recomputes = code is not None and code.co_filename == torch.utils.checkpoint.__file__

    def pack(tensor: torch.Tensor) -> Any:
        output_of = _node_of_output(tensor)
        if read_recording and output_of is None:
            tensor = saved_before(_memory.storage_of(tensor), tensor)
        packed = pack_program(tensor)
        if type(tensor) in plain and not any_mode_active():
            return _record(
                tensor, packed, output_of, recomputes
            )  # hooks run without grad mode: nobody sees what is done here
        with _torch.hidden():
            return _record(tensor, packed, output_of, recomputes)

    def unpack(save: HookedSave) -> torch.Tensor:
        if collector.saves is not None and collector.unjudged:
            collector.saves.append(save)  # somebody asks which save a node takes out, and not for what it holds
            return save.tensor if save.counter is not None else torch.empty(0)
        suspicious = save.counter is not None and _suspicious(save)
        # What can be repaired is judged by what unpack makes of it: that is what has to be replaced.
        certain = suspicious and save.certain and (save.recomputed or not _verdict.can_be_repaired(save))
        found = _verdict_on(save, save.tensor) if certain else None
        if found is None:
            outer = collector.saves
            collector.saves = None  # what it reads itself is not what is asked for
            try:
                tensor = unpack_program(save.packed)
            finally:
                collector.saves = outer
            if read_recording and isinstance(tensor, torch.Tensor):
                forget_read(tensor)
            if suspicious and not certain:
                found = _verdict_on(save, tensor)
        if isinstance(found, torch.Tensor):
            return found
        if found is not None:
            del save
            try:
                raise found
            finally:
                del found  # it refers to this frame
        return tensor

    pack.program = program  # type: ignore[attr-defined]
    return pack, unpack


def program_of(pair: Hooks) -> Hooks | None:
    """The program's pair in a composed one; None for any other."""
    program: Hooks | None = getattr(pair[0], "program", None) if type(pair[0]) is types.FunctionType else None
    return program if pair[0].__code__ is _PACK_CODE else None


def _nop(_: Any) -> Any:
    return None


_PACK_CODE = compose((_nop, _nop))[0].__code__


def _node_of_output(tensor: torch.Tensor) -> type | None:
    with _torch.no_torch_function():
        node = tensor.grad_fn
        if node is None or not _torch.made_last(node, _torch.next_sequence_number()):
            return None
        return _torch.node_type(node)


def _record(tensor: torch.Tensor, packed: Any, output_of: type | None, recomputed: bool) -> HookedSave:
    save = HookedSave.__new__(HookedSave)
    save.packed = packed
    save.counter = None
    save.remarks = None
    save.node = HookedSave  # neither an input nor an output of a plain save
    save.output = 0
    save.output_of = output_of
    save.reason = None
    save.recomputed = recomputed
    save.held = _nothing
    save.code = save.inner_code = None
    save.offset = save.inner_offset = 0
    save.storage = 0
    if not _memory.has_memory(tensor):
        if _torch.has_bytes(tensor) and tensor.numel():
            _policy.note_unwatched(
                f"{type(tensor).__name__} saved under the program's own save hooks: no memory to compare writes with, "
                "and PyTorch's version check is off"
            )
        return save
    form: tuple[bool, torch.Tensor | None] | None
    if type(packed) in _memory.PLAIN_TYPES:
        form = (True, packed) if _lies_over(packed, tensor) else _form_of(packed, tensor)
    else:
        form = _form_of(packed, tensor)
    judged = tensor if form is None or form[1] is None else form[1]
    save.storage = _memory.storage_of(judged)
    save.version = tensor._version
    save._look_at(judged)
    try:
        save.counter = _memory.counter_of(tensor)
    except _memory.NO_MEMORY:
        return save
    _note_place(save)
    if form is None:
        return save
    # An array or a storage over the memory stays there when the tensor is pointed elsewhere.
    if form[1] is not None or not form[0]:
        save.held = ref(judged)
    storage = save.storage
    if (storage in ALIASES.young or storage in ALIASES.by_storage) and ALIASES.meet_save(storage, tensor):
        save.keep_small_proof(PROOF_BYTES_AT_SAVE)
    if form[0] and judged.numel() * judged.element_size() <= PROOF_BYTES_AT_SAVE:
        remarks = save.remark()  # for a tracked write that nobody sees coming
        if remarks.proof is None:
            remarks.proof = copy_of(judged)
    EXPORTS.meet(save, storage, tensor.grad_fn)
    LEDGER.add(save)
    guard = _policy.innermost()
    if guard is not None and guard.audits and not recomputed:
        save.keep_contents()
    return save


def _note_place(save: HookedSave) -> None:
    try:
        frame: Any = sys._getframe(3)
    except ValueError:  # an autograd thread: no Python code on the stack
        return
    while frame.f_code.co_filename in OWN_FILES and frame.f_back is not None:
        frame = frame.f_back
    save.inner_code, save.inner_offset = frame.f_code, frame.f_lasti
    found = _places.user_instruction(frame)
    if found is not None:
        save.code, save.offset = found


# ---- the read ----------------------------------------------------------------------------------------------


def _suspicious(save: HookedSave) -> bool:
    if save.storage in ALIASES.young or save.storage in ALIASES.by_storage:
        with _torch.no_torch_function():
            ALIASES.sync(save.storage)
    remarks = save.remarks
    if remarks is not None and (remarks.compare or remarks.suspect is not None or _is_exported(save)):
        return True
    return save.tracked or _is_rebound(save)


def _is_exported(save: HookedSave) -> bool:
    return save.remarks is not None and bool(save.remarks.exports) and save.remarks.proof is not None


def _is_rebound(save: HookedSave) -> bool:
    tensor = save.held()
    return tensor is not None and _memory.storage_of(tensor) != save.storage


def _verdict_on(save: HookedSave, read: Any) -> Exception | torch.Tensor | None:
    """What the guard answers, now that backward reads ``read``; returned, so that it is raised without frames that hold
    user tensors. A tensor is what backward is to read instead.
    """
    try:
        with _torch.no_torch_function():
            changed = isinstance(read, torch.Tensor) and (_is_repeated if save.recomputed else _is_changed)(save, read)
            if changed and not is_unused(save):
                return _report(save, None if save.recomputed else read)
    except Exception as error:
        return error.with_traceback(None)
    return None


@LEDGER.holds_saves
def _is_repeated(save: HookedSave, read: torch.Tensor) -> bool:
    """Whether a checkpoint's function, run again, has written once more over what it saved.

    What it read from outside is judged when it has run again (see ``_recompute``).
    """
    if any(isinstance(entry, Reread) for entry in LEDGER.in_storage(save.storage)):
        return False
    remarks = save.remark()
    proof = remarks.proof
    if proof is None or read.shape != proof.shape or read.dtype != proof.dtype:
        return False
    if remarks.writer is None and remarks.suspect is None:
        return False  # proof is kept for code outside torch alone, which writes to what is not read any more
    return not _memory.same_bytes(read, proof)


def _is_changed(save: HookedSave, read: torch.Tensor) -> bool:
    """Whether ``read`` is the saved memory and holds something else than what was saved."""
    saved = save.tensor
    remarks = save.remark()
    proof = remarks.proof
    if read is saved or _lies_over(read, saved):
        comparable = proof is not None and proof.shape == read.shape and proof.dtype == read.dtype
        if proof is not None and _memory.same_bytes(read if comparable else saved, proof):
            remarks.suspect = None  # perturbed and restored, or another part of the memory
            return False
        return True
    if proof is None or read.shape != proof.shape or read.dtype != proof.dtype:
        return False
    # A copy. It was made after the write if it holds what the memory holds now, and not what was saved.
    return not _memory.same_bytes(read, proof) and _memory.same_bytes(read, saved)


def _report(save: HookedSave, read_as: torch.Tensor | None) -> torch.Tensor | None:
    """Have the guard answer. ``read_as`` is what backward would read, if something can be put into its place."""
    remarks = save.remark()
    read = _places.user_instruction(sys._getframe(1))
    alias: Access | None = remarks.suspect
    kind: Kind
    if remarks.writer is not None:
        kind, operation, written = remarks.writer
    elif _is_rebound(save):
        kind, operation, written = "rebind", "x.data = y", read
    elif remarks.audited and alias is None and not save.tracked and not _is_exported(save):
        kind, operation, written = "invisible", "", read
    elif save.tracked or alias is not None or not _is_exported(save):
        kind, operation, written = "unchecked" if save.tracked else "unseen", "", read
    else:
        kind, operation, written, alias = "exported", "", read, export_behind(save)
    reasons = _policy.state.reasons
    aliased = remarks.alias if alias is None else alias.instruction
    instead = None if read_as is None or save.reason is not None else _as_it_was(save, read_as)
    if instead is not None and _verdict.can_be_repaired(save):
        healed = _verdict.repair(save, kind, operation, aliased=aliased, written=written, read=read)
        if healed is None:
            save.accept()
            return None
        return instead
    if save.reason is not None:
        reasons.append(save.reason)
    try:
        _verdict.pronounce(
            save,
            kind,
            operation,
            aliased=aliased,
            written=written,
            read=read,
            elements=save.changed_elements,
            caught="read",
        )
    finally:
        if save.reason is not None:
            reasons.pop()
    save.accept()
    return None


def _as_it_was(save: HookedSave, read: torch.Tensor) -> torch.Tensor | None:
    """``read`` over a copy of the memory as it was when it was saved; None where that cannot be made."""
    proof = None if save.remarks is None else save.remarks.proof
    if proof is None:
        return None
    with _torch.hidden():
        if read.shape == proof.shape and read.dtype == proof.dtype:
            return handed_out(proof)
        saved = save.tensor
        if not _lies_over(read, saved) or not _memory.can_be_copied([saved, read]):
            return None
        replicas = _memory.replicas_of([saved, read])
        _memory.overwrite(replicas[id(saved)], proof)
        return replicas[id(read)]
