"""A call is about to write: would it change, unseen by autograd, memory that a live save needs?

Note [Rehearsal]. Where a silent write to a live save is about to happen, the call is first made on a copy of
the memory that it writes to. That shows which bytes it changes, whatever picks them (a slice, a mask, an
index tensor, a scatter, values that happen to be there already), so the verdict is about bytes and not about
what a call might do. It is paid for only by a call that would otherwise be reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from torchguard import _memory, _places, _torch, _verdict
from torchguard._aliases import ALIASES, PROOF_BYTES_AT_ALIAS
from torchguard._overlap import overlaps
from torchguard._rereads import Reread, note_write, rereads_of
from torchguard._saves import LEDGER, Save, extent_of, is_foreign
from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._writers import Writer, all_tensors, substituted

#: These perturb their inputs through ``.data`` and put them back: the bytes decide at the read.
_TRUSTED_FILES = ("torch/autograd/gradcheck.py", "torch\\autograd\\gradcheck.py")


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
    if LEDGER.groups and (LEDGER.foreign or is_foreign(tensor)):
        extent = extent_of(tensor)
        if extent is not None:
            saves = saves + LEDGER.across_storages(storage, extent)
    return saves


def carry_out(writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Judge a call that writes, and make it.

    Raises:
        SavedTensorCorruptionError: by the innermost guard, before any memory has changed.
    """
    if not LEDGER.any_alive():
        return call(*args, **kwargs)
    watched: list[int] = []
    hits: list[_Hit] = []
    with _torch.no_torch_function():
        _look(writer, args, kwargs, watched, hits)
    if hits:
        error = _judge(writer, call, args, kwargs, hits)
        if isinstance(error, _Done):
            if error.args:
                raise error.args[0]
            return args[0]
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
    if not watched and not hits:
        return call(*args, **kwargs)
    try:
        return call(*args, **kwargs)
    finally:
        for storage in watched:
            ALIASES.settle(storage)
        for hit in hits:
            hit.save.accept()
        hits.clear()


def _look(writer: Writer, args: Sequence[Any], kwargs: Mapping[str, Any], watched: list[int], hits: list[_Hit]) -> None:
    """Find the storages whose aliases' counters will move, and the saves that a silent write would hit."""
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
        hits += [_Hit(save, target, counted) for save in saves if _is_silent(writer, counted, target, save)]


def _is_silent(writer: Writer, counted: bool, target: torch.Tensor, save: Save) -> bool:
    """Whether the call may write to the save's memory without moving the save's version."""
    if save.moved:
        return False  # PyTorch refuses this save already
    if target.requires_grad and (writer.calls_back or (target.is_leaf and torch.is_grad_enabled())):
        return False  # PyTorch refuses the call
    return _may_overlap(target, save) and not (counted and _memory.shares_counter(target, save.tensor))


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
    with _torch.hidden():
        for hit in hits:
            span = _memory.span_of(hit.save.tensor)
            rehearsal = rehearsals[id(hit.target)]
            if span is not None:
                hit.elements = _memory.touched_elements(rehearsal.mask, rehearsal.address, span)
    hits[:] = [hit for hit in hits if hit.elements]
    for hit in hits:
        shared = not hit.counted and _memory.shares_counter(hit.target, hit.save.tensor)
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
    with _torch.hidden(), _memory.same_random_numbers(targets if writer.draws else (), generator):
        if any(target.is_conj() or target.is_neg() or target.is_quantized for target in targets):
            # The copy would not be such a tensor: count every element that the call is given.
            return {id(target): _Rehearsal(_memory.reach(target), _address(target)) for target in targets}
        replicas = _memory.replicas_of(targets, all_tensors([*args, *kwargs.values()]))
        failure: Exception | None = None
        try:
            call(*substituted(args, replicas), **{name: substituted(kwargs[name], replicas) for name in kwargs})
        except Exception as error:
            if not writer.calls_back:
                raise
            failure = error  # the user's function raised, half-way: so far the memory is written
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
    rereads = rereads_of(tensor)
    frame = sys._getframe(1)
    if saves and isinstance(value, torch.Tensor) and _accepts(setter, tensor, value):
        error = None if _same(tensor, value) else _judge_rebinding(tensor, saves)
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
    saves.clear()
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
    return [save for save in found if save.tensor is tensor and not isinstance(save, Reread)]


def _judge_rebinding(tensor: torch.Tensor, saves: list[Save]) -> Exception | None:
    frame = sys._getframe(2)
    here = _places.user_instruction(frame)
    trusted = _places.called_from(frame, _TRUSTED_FILES)
    try:
        for save in saves:
            if trusted:
                save.let_bytes_decide("rebind", _REBINDING, here)
            elif not save.moved:
                elements = save.tensor.numel()
                _verdict.pronounce(
                    save, "rebind", _REBINDING, aliased=None, written=here, elements=elements, caught="write"
                )
    except (SavedTensorCorruptionError, SavedTensorCorruptionWarning) as error:
        saves.clear()
        return error.with_traceback(None)
    return None


_REBINDING = "x.data = y"


def _accepts(setter: Callable[[torch.Tensor, Any], None], tensor: torch.Tensor, value: torch.Tensor) -> bool:
    try:
        with _torch.hidden():
            setter(tensor.detach(), value)
    except (RuntimeError, TypeError):
        return False  # PyTorch refuses it, and says so itself in a moment
    return True


def _same(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether backward would see the same values in ``value``."""
    with _torch.hidden():
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
    return [] if tensor.is_leaf else saves_of(tensor)
