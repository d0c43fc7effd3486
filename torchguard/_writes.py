"""A call is about to write: would it change, unseen by autograd, memory that a live save needs?

Note [Rehearsal]. Where a silent write to a live save is about to happen, the call is first made on a copy of
the memory that it writes to. That shows which bytes it changes, whatever picks them (a slice, a mask, an
index tensor, a scatter, values that happen to be there already), so the verdict is about bytes and not about
what a call might do. It is paid for only by a call that would otherwise be reported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from torchguard import _memory, _places, _policy, _torch, _verdict
from torchguard._aliases import ALIASES, PROOF_BYTES_AT_ALIAS
from torchguard._overlap import overlaps
from torchguard._rereads import Reread, note_write, rereads_of
from torchguard._saves import LEDGER, Save, extent_of, is_foreign
from torchguard._violation import Kind, SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._writers import Writer, all_tensors, substituted

#: These perturb their inputs through ``.data`` and put them back, or free storages and fill them again: the bytes
#: decide at the read.
_TRUSTED_FILES = tuple(
    path.replace("/", separator)
    for separator in "/\\"
    for path in (
        "torch/autograd/gradcheck.py",
        "torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
        "torch/distributed/_composable/fsdp/_fsdp_param.py",
        "torch/distributed/fsdp/_flat_param.py",
    )
)


class _Done(Exception):
    """The call has been made already, on its rehearsal; ``args`` hold what it raised, if it did."""


@dataclass
class _Hit:
    """A live save that a write would silently touch, whether a counter moves, how many elements change."""

    save: Save
    target: torch.Tensor
    counted: bool
    elements: int = 0


def saves_near(tensor: torch.Tensor, storage: int) -> list[Save]:
    """Live saves that may lie over the tensor's memory, whatever storage they are in."""
    saves = LEDGER.in_storage(storage)
    if LEDGER.groups and (LEDGER.foreign or is_foreign(tensor := _torch.behind(tensor))):
        extent = extent_of(tensor)
        if extent is not None:
            saves = saves + LEDGER.across_storages(storage, extent)
    return saves


#: For each block that will put version counters back: the storages that it is about.
preserving: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()
PRESERVES = "_unsafe_preserve_version_counter()"


def carry_out(writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Judge a call that writes, and make it.

    Raises:
        SavedTensorCorruptionError: by the innermost guard, before any memory has changed.
    """
    if not LEDGER.any_alive():
        return call(*args, **kwargs)
    if not _policy.state.guards:
        _note_thread()
    watched: list[int] = []
    hits: list[_Hit] = []
    seen: list[Save] = []
    with _torch.no_torch_function():
        _look(writer, args, kwargs, watched, hits, seen)
    if hits and writer.keeps_statistics:
        proven = [_Proven(hit.save) for hit in hits]
        hits.clear()
        try:
            return call(*args, **kwargs)
        finally:
            here = _places.user_instruction(sys._getframe(1))
            for one in proven:
                one.put_down_to(writer.title, here)
            proven.clear()
    if hits:
        error = _judge(writer, call, args, kwargs, hits)
        if isinstance(error, _Done):
            if error.args:
                raise error.args[0]
            return args[0]
        if error is not None:
            seen.clear()
            try:
                raise error
            finally:
                del error  # it refers to this frame
    if not watched and not hits and not seen:
        return call(*args, **kwargs)
    try:
        return call(*args, **kwargs)
    finally:
        for storage in watched:
            ALIASES.settle(storage)
        for hit in hits:
            hit.save.accept()
        for save in seen:
            save.expect_version()
        hits.clear()
        seen.clear()


def _note_thread() -> None:
    """This thread writes to memory that a guard watches, and has no guard: what it saves itself is not seen."""
    if torch.is_grad_enabled() and _torch.top_hooks() is None and _torch.hooks_enabled():
        name = threading.current_thread().name
        _policy.note_unwatched(f"tensors saved in thread {name!r}, which was there before the guard (writes are seen)")


def prove(tensors: Sequence[torch.Tensor]) -> None:
    """Keep copies of what is saved in the memory of these tensors: the bytes decide, whoever writes."""
    for tensor in tensors:
        storage = _memory.storage_of(tensor)
        for save in saves_near(tensor, storage) if storage else ():
            if save.remarks is None or not save.remarks.compare:
                save.keep_proof()
                save.remark().compare = True


def allow_if_intended(save: Save) -> None:
    """In an ``allow`` block, what a writer has done that the bytes would judge is allowed now."""
    writer = None if save.remarks is None else save.remarks.writer
    if _policy.state.reasons and writer is not None:
        kind, operation, here = writer
        elements = save.changed_elements
        _verdict.pronounce(save, kind, operation, aliased=None, written=here, elements=elements, caught="write")
        save.accept()


class _Proven:
    """A save of which a copy is kept while something runs that may change it."""

    def __init__(self, save: Save) -> None:
        self.save = save
        remarks = save.remark()
        self.was_compared = remarks.compare
        self.had_proof = remarks.proof is not None
        save.keep_proof()
        self.was_intact = save.is_proven

    def put_down_to(self, operation: str, here: _places.Instruction) -> None:
        """It has run. What it changed, the bytes decide at the read; otherwise the copy goes."""
        remarks = self.save.remark()
        if not self.was_intact:
            return  # by another writer
        if not self.save.is_proven:
            remarks.compare = True
            remarks.writer = ("uncounted", operation, here)
            allow_if_intended(self.save)
        elif not self.had_proof:
            remarks.proof = None


def _look(
    writer: Writer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watched: list[int],
    hits: list[_Hit],
    seen: list[Save],
) -> None:
    """Find the storages whose aliases' counters will move, the saves that a silent write would hit, and those whose
    version PyTorch does not check and that therefore is to be expected to move.
    """
    for target in writer.targets(args, kwargs):
        storage = _memory.storage_of(target)
        if not storage:
            continue
        saves = saves_near(target, storage)
        if not saves:
            continue  # an alias's counter matters to live saves only
        if storage in ALIASES.by_storage or storage in ALIASES.young:
            ALIASES.sync(storage, saves)
            watched.append(storage)
        rereads = [save for save in saves if isinstance(save, Reread)]
        if rereads:
            note_write([entry for entry in rereads if _is_touched(target, entry)], writer.title)
            saves = [save for save in saves if not isinstance(save, Reread)]
        counted = writer.counts(target, args, kwargs)
        preserved = bool(preserving) and any(storage in storages for storages in preserving.values())
        for save in saves:
            if not save.checked and not save.tracked:
                seen.append(save)
            if not _may_write_to(writer, target, save):
                continue
            silent = save.stashed or not (counted and save.shares_counter(target))
            if silent and save.certain:
                hits.append(_Hit(save, target, counted))
            elif preserved and save.checked:
                # The version moves, and will be put back.
                here = _places.user_instruction(sys._getframe(2))
                save.let_bytes_decide("uncounted", f"{writer.title} under {PRESERVES}", here)
            elif not save.checked:
                kind: Kind = "unchecked" if not silent else ("write" if counted else "uncounted")
                save.let_bytes_decide(kind, writer.title, _places.user_instruction(sys._getframe(2)))


def _may_write_to(writer: Writer, target: torch.Tensor, save: Save) -> bool:
    """Whether the call may write to the save's memory, and PyTorch refuses neither the call nor the save."""
    if save.moved and not save.stashed:
        return False  # PyTorch refuses this save already
    if (
        target.requires_grad
        and (writer.calls_back or (target.is_leaf and torch.is_grad_enabled()))
        and not writer.keeps_statistics
    ):
        return False  # PyTorch refuses the call
    return _may_overlap(target, save)


def _is_touched(target: torch.Tensor, entry: Reread) -> bool:
    if _may_overlap(target, entry):
        return True
    if _memory.shares_counter(target, entry.tensor):
        entry.keep_proof()  # its version is about to move for nothing
    return False


def _may_overlap(target: torch.Tensor, save: Save) -> bool:
    there = _memory.span_of(target)
    here = _memory.span_of(save.tensor)
    return there is not None and here is not None and overlaps(there, here) is not False


def _judge(
    writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], hits: list[_Hit]
) -> Exception | None:
    """Have the hits answered; what the answer raised is returned. What is left in ``hits`` has been answered.

    An error is raised by the caller, without the frames below: their locals would keep saves alive as long as
    somebody keeps the error.
    """
    try:
        _answer(writer, call, args, kwargs, hits)
    except (SavedTensorCorruptionError, SavedTensorCorruptionWarning, _Done) as error:
        hits.clear()
        return error.with_traceback(None)
    return None


def _answer(
    writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], hits: list[_Hit]
) -> None:
    frame = sys._getframe(3)
    here = _places.user_instruction(frame)
    rehearsals: dict[int, _Rehearsal] | None = None
    if not _places.called_from(frame, _TRUSTED_FILES):
        # Where PyTorch refuses the call, it says so itself in a moment. Should it not, the bytes decide.
        with suppress(Exception):
            rehearsals = _rehearse(writer, call, args, kwargs)
    if rehearsals is None:
        for hit in hits:
            hit.save.let_bytes_decide("write" if hit.counted else "uncounted", writer.title, here)
        hits.clear()
        return
    for hit in hits:
        if hit.save.stashed:
            hit.save.let_bytes_decide("stashed", writer.title, here)
    hits[:] = [hit for hit in hits if not hit.save.stashed]
    with _torch.hidden():
        for hit in hits:
            span = _memory.span_of(hit.save.tensor)
            rehearsal = rehearsals[id(hit.target)]
            if span is not None:
                hit.elements = _memory.touched_elements(rehearsal.mask, rehearsal.address, span)
    hits[:] = [hit for hit in hits if hit.elements]
    for hit in hits:
        shared = not hit.counted and (writer.on_storage or hit.save.shares_counter(hit.target))
        _verdict.pronounce(
            hit.save,
            "uncounted" if shared else "write",
            writer.title,
            aliased=ALIASES.taken_at(hit.target, _memory.storage_of(hit.target)),
            written=here,
            elements=hit.elements,
            caught="write",
        )
    if writer.calls_back:
        # The user's function has run, on the copy: put down what it made instead of running it again.
        with _torch.hidden():
            for target in writer.targets(args, kwargs):
                replica = rehearsals[id(target)].replica
                if replica is None:
                    return
                _memory.overwrite(target, replica)
        for hit in hits:
            hit.save.accept()
        raise _Done(*[rehearsal.failure for rehearsal in rehearsals.values() if rehearsal.failure is not None])


@dataclass
class _Rehearsal:
    """What a call did to a copy of the memory of one of its targets.

    Attributes:
        mask: which bytes of the target's memory, from first to last, it changes.
        address: where the first of these bytes lies.
        replica: the target's copy, after the call; None where it was not rehearsed.
        failure: what the user's function raised, where the call calls one.
    """

    mask: torch.Tensor
    address: int
    replica: torch.Tensor | None = None
    failure: Exception | None = None


def _rehearse(
    writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, _Rehearsal]:
    """What the call changes, for each tensor that it writes to (by id)."""
    targets = writer.targets(args, kwargs)
    generator = kwargs.get("generator")
    with _torch.hidden():
        if any(target.is_conj() or target.is_neg() or target.is_quantized for target in targets):
            # The copy would not be such a tensor: count every element that the call is given.
            return {id(target): _Rehearsal(_memory.reach(target), _address(target)) for target in targets}
        replicas = _memory.replicas_of(targets, all_tensors([*args, *kwargs.values()]))
    failure: Exception | None = None
    with _memory.same_random_numbers(targets if writer.draws else (), generator), _torch.rehearsing():
        try:
            call(*substituted(args, replicas), **{name: substituted(kwargs[name], replicas) for name in kwargs})
        except Exception as error:
            if not writer.calls_back:
                raise
            failure = error  # the user's function raised, half-way: so far the memory is written
    with _torch.hidden():
        return {
            id(target): _Rehearsal(
                _memory.changed_bytes(target, replicas[id(target)]), _address(target), replicas[id(target)], failure
            )
            for target in targets
        }


def _address(target: torch.Tensor) -> int:
    span = _memory.span_of(target)
    return 0 if span is None else span.address


# ---- x.data = y --------------------------------------------------------------------------------------------


def rebind(setter: Callable[[torch.Tensor, Any], None], tensor: torch.Tensor, value: Any) -> None:
    """Judge ``tensor.data = value``, and do it.

    An input or leaf that was saved is the very object that backward will read: pointing it at other memory
    changes what backward sees. An output's save has a handle of its own and stays what it was.

    Raises:
        SavedTensorCorruptionError: by the innermost guard, before anything has changed.
    """
    saves = saves_of(tensor)
    undecided: list[Save] = []
    rereads = rereads_of(tensor)
    frame = sys._getframe(1)
    if saves and isinstance(value, torch.Tensor) and _accepts(setter, tensor, value):
        error = None if _same(tensor, value) else _judge_rebinding(saves, undecided)
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
    ALIASES.forget(tensor)  # of the memory that it leaves
    note_write(rereads, _REBINDING)
    setter(tensor, value)
    for save in saves:  # what backward will read lies elsewhere now
        save.accept()
    for save in undecided:
        save.follow()
    saves.clear()
    undecided.clear()
    for entry in rereads:
        entry.follow()
    if isinstance(value, torch.Tensor) and type(value) in _memory.PLAIN_TYPES:
        here = _places.user_instruction(frame)
        for alias in (value, tensor):  # the same memory, two counters
            enter_alias(alias, here, _memory.version_of(alias))


def saves_of(tensor: torch.Tensor) -> list[Save]:
    """The live saves that hold this very tensor."""
    storage = _memory.storage_of(tensor)
    found = LEDGER.in_storage(storage) if storage else []
    return [
        save
        for save in found
        if save.certain and not isinstance(save, Reread) and any(one is tensor for one in _torch.levels_of(save.tensor))
    ]


def _judge_rebinding(saves: list[Save], undecided: list[Save]) -> Exception | None:
    """Have the saves answered; those that the bytes decide about later are moved over to ``undecided``."""
    frame = sys._getframe(2)
    here = _places.user_instruction(frame)
    trusted = _places.called_from(frame, _TRUSTED_FILES)
    try:
        for save in saves:
            if trusted or save.stashed:
                save.let_bytes_decide("rebind", _REBINDING, here)
                undecided.append(save)
            elif not save.moved:
                elements = save.tensor.numel()
                _verdict.pronounce(
                    save, "rebind", _REBINDING, aliased=None, written=here, elements=elements, caught="write"
                )
    except (SavedTensorCorruptionError, SavedTensorCorruptionWarning) as error:
        saves.clear()
        undecided.clear()
        return error.with_traceback(None)
    saves[:] = [save for save in saves if not any(save is other for other in undecided)]
    return None


_REBINDING = "x.data = y"


def _accepts(setter: Callable[[torch.Tensor, Any], None], tensor: torch.Tensor, value: torch.Tensor) -> bool:
    try:
        with _torch.hidden():
            copy = _torch.wrapped_like(tensor, _torch.behind(tensor).detach())
        with _torch.rehearsing():
            setter(copy, value)
    except (RuntimeError, TypeError):
        return False  # PyTorch refuses it, and says so itself in a moment
    return True


def _same(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether backward would see the same values in ``value``."""
    with _torch.hidden():
        tensor, value = _torch.behind(tensor), _torch.behind(value)
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            return False
        if (span := _memory.span_of(tensor)) is not None and span == _memory.span_of(value):
            return True
        return _memory.same_bytes(tensor, value)


# ---- aliases -----------------------------------------------------------------------------------------------


def enter_alias(alias: torch.Tensor, here: _places.Instruction, version: int = 0) -> None:
    """Take down an alias with a counter of its own; watch the counter at once where a live save needs it."""
    storage = _memory.storage_of(alias)
    if not storage or version < 0:
        return
    saves = LEDGER.in_storage(storage)
    record = ALIASES.enter(alias, storage, here, version)
    if saves:
        record.arm(alias)
        for save in saves:
            save.keep_proof(PROOF_BYTES_AT_ALIAS)


def detached_in_place(tensor: torch.Tensor) -> list[Save]:
    """The saves that hold ``tensor`` as a non-leaf input: detached in place, PyTorch refuses them."""
    return [] if tensor.is_leaf else [save for save in saves_of(tensor) if save.checked]
