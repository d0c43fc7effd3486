"""A call is about to write: would it change, unseen by autograd, memory that a live save needs?"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from torchguard import _memory, _places, _policy, _selfwrites, _torch, _verdict
from torchguard._aliases import ALIASES
from torchguard._counts import COUNTS, SLOW_PATH
from torchguard._overlap import overlaps
from torchguard._rehearsal import Rehearsal, rehearse
from torchguard._rereads import Reread, note_write, rereads_of, running
from torchguard._saves import LEDGER, PROOF_BYTES_AT_ALIAS, Save, extent_of, is_foreign, one_copy_each
from torchguard._violation import Kind, SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._writers import OUT, Writer

#: These perturb their inputs through ``.data`` and put them back: the bytes decide at the read.
_TRUSTED_FILES = ("torch/autograd/gradcheck.py", "torch\\autograd\\gradcheck.py")

#: These free memory that is saved and fill it again before backward reads it. What they write is not judged, but what
#: backward finds is.
_REFILLING = ("torch/distributed/fsdp/", "torch\\distributed\\fsdp\\")


_REFILL = "FSDP's all-gather of changed shards"


def is_refill(frame: Any) -> bool:
    """Whether a write comes from code that frees saved memory and fills it again, and from no code of the user's."""
    return _places.reached_through(frame, _REFILLING)


class _Done(Exception):
    """The call has been made already: its rehearsal was the call."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.rehearsal = rehearsal


class Expecting(Protocol):
    """What is to be told once a call that moves a version has been made."""

    def expect_version(self) -> None:
        """What the version is now is expected."""


#: Storages with aliases whose counters a write may move, each with what is written to there.
Watched = list[tuple[int, torch.Tensor]]


@dataclass
class Hit:
    """A live save that a write would silently touch, whether a counter moves, how many elements change."""

    save: Save
    target: torch.Tensor
    counted: bool
    elements: int = 0


@LEDGER.holds_saves
def saves_near(tensor: torch.Tensor, storage: int, touched: bool = False) -> list[Save]:
    """Live saves in the tensor's storage, and those that lie over its memory in another one.

    Args:
        tensor: what is about to be written to, say.
        storage: the identity of its storage.
        touched: leave out, where the storage holds many, those that lie in another part of it.
    """
    reach = _memory.stretch_in_storage(tensor) if touched and LEDGER.is_crowded(storage) else None
    saves = LEDGER.in_storage(storage) if reach is None else LEDGER.near(storage, *reach)
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
    reads = _selfwrites.own_reads(writer, args, kwargs) if torch.is_grad_enabled() else ()
    if reads:
        return _selfwrites.carry_out(writer, lambda: _carry_out(writer, call, args, kwargs), reads)
    return _carry_out(writer, call, args, kwargs)


def _carry_out(writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if not LEDGER.any_alive():
        return call(*args, **kwargs)
    COUNTS.writes += 1
    if not _policy.state.guards:
        _note_thread()
    watched: Watched = []
    hits: list[Hit] = []
    seen: list[Expecting] = []
    with _torch.no_torch_function():
        look(writer, args, kwargs, watched, hits, seen)
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
        with SLOW_PATH:
            error = _judge(writer, call, args, kwargs, hits)
        if isinstance(error, _Done):
            rehearsal = error.rehearsal
            del error
            if rehearsal.failure is not None:
                raise rehearsal.failure
            return rehearsal.with_originals(rehearsal.result)
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
        for storage, target in watched:
            ALIASES.settle(storage, target)
        watched.clear()
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


@LEDGER.holds_saves
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


def look(
    writer: Writer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watched: Watched,
    hits: list[Hit],
    seen: list[Expecting],
) -> None:
    """Find the storages whose aliases' counters will move, the saves that a silent write would hit, and those whose
    version PyTorch does not check and that therefore is to be expected to move.
    """
    alone = threading.active_count() == 1  # asked first: another may come to its end meanwhile
    _look(writer, args, kwargs, watched, hits, seen)
    if hits and not alone:  # see Note [Held by a look]
        hits.clear()
        seen.clear()
        watched.clear()
        LEDGER.outlast_looks()
        _look(writer, args, kwargs, watched, hits, seen)


@LEDGER.holds_saves
def _look(
    writer: Writer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watched: Watched,
    hits: list[Hit],
    seen: list[Expecting],
) -> None:
    targets = [(target, False) for target in writer.targets(args, kwargs) if not _lies_where_nothing_is_saved(target)]
    if not targets:
        return
    targets += [(part, True) for target, _ in targets for part in _torch.parts_of(target)]
    undecided: list[tuple[Save, Kind, str]] = []
    spared: list[Save] = []
    for target, inside in targets:
        storage = _memory.storage_of(target)
        if not storage:
            continue
        region = _part_written(writer, args, target) if LEDGER.is_crowded(storage) else target
        saves = saves_near(region, storage, touched=_policy.repairer() is None)
        if not saves and not LEDGER.any_in_storage(storage):
            continue  # an alias's counter matters to live saves only
        if storage in ALIASES.by_storage or storage in ALIASES.young:
            ALIASES.before_judged(storage, target)
            watched.append((storage, target))
        rereads = [save for save in saves if isinstance(save, Reread)]
        if rereads and not (writer.keeps_statistics and running.depth):  # a checkpoint's function may update its own
            note_write([entry for entry in rereads if _is_touched(region, entry)], writer.title)
        saves = [save for save in saves if not isinstance(save, Reread)]
        counted = not inside and writer.counts(target, args, kwargs)
        repairs = _policy.repairer() is not None
        lent = counted and ALIASES.lent(target, storage) and not _policy.is_watch(_policy.innermost())
        preserved = bool(preserving) and any(storage in storages for storages in preserving.values())
        for save in saves:
            if not save.checked and not save.tracked:
                seen.append(save)
            elif lent and save.checked and not save.moved:
                seen.append(_Spared(save))
            if not _may_write_to(region, save):
                if (
                    repairs
                    and counted
                    and not preserved
                    and save.checked
                    and not save.moved
                    and save.shares_counter(target)
                ):
                    # Another part of it, but the version counts for all parts.
                    if _lies_apart(region, save):
                        spared.append(save)
                    else:
                        undecided.append((save, "tracked", writer.title))
                continue
            silent = save.stashed or lent or not (counted and save.shares_counter(target))
            if silent and save.certain:
                hits.append(Hit(save, target, counted))
            elif preserved and save.checked:
                # The version moves, and will be put back.
                undecided.append((save, "uncounted", f"{writer.title} under {PRESERVES}"))
            elif not save.checked:
                kind: Kind = "unchecked" if not silent else ("write" if counted else "uncounted")
                undecided.append((save, kind, writer.title))
            elif repairs:
                undecided.append((save, "tracked", writer.title))
    if undecided:
        here = _places.user_instruction(sys._getframe(3))
        with one_copy_each():
            for save, kind, title in undecided:
                save.let_bytes_decide(kind, title, here)
    if spared:
        touched = {id(save) for save, _, _ in undecided} | {id(hit.save) for hit in hits}
        seen += [_Spared(save) for save in spared if id(save) not in touched]
        spared.clear()
    if hits:  # a call that also writes to the saved tensor itself (``_foreach_``) moves its version: PyTorch refuses it
        counting = [
            target
            for target in writer.targets(args, kwargs)
            if writer.counts(target, args, kwargs) and not ALIASES.lent(target, _memory.storage_of(target))
        ]
        hits[:] = [hit for hit in hits if hit.save.stashed or not any(map(hit.save.shares_counter, counting))]


def _part_written(writer: Writer, args: Sequence[Any], target: torch.Tensor) -> torch.Tensor:
    """The view of ``target`` that ``target[i] = v`` writes to, where ``i`` says so; else the target.

    A buffer that is filled row by row, and read row by row, would have each write judged against all rows.
    """
    if writer.name != "__setitem__" or len(args) < 2 or id(args[0]) != id(target):
        return target
    index = args[1]
    if not _picks_a_view(index if type(index) is tuple else (index,)):
        return target
    if type(target) not in _memory.PLAIN_TYPES or not _memory.has_memory(target):
        return target
    try:
        with _torch.hidden():
            part = target[index]
            return part if _memory.storage_of(part) == _memory.storage_of(target) else target
    except (IndexError, RuntimeError, TypeError, ValueError):  # PyTorch is about to refuse the call
        return target


def _picks_a_view(index: tuple[Any, ...]) -> bool:
    return all(
        type(part) is int
        or part is None
        or part is ...
        or (type(part) is slice and all(type(end) is int or end is None for end in (part.start, part.stop, part.step)))
        for part in index
    )


def _lies_where_nothing_is_saved(target: torch.Tensor) -> bool:
    """Whether a quick look tells that no live save lies in the memory of ``target``; asked with user code kept out."""
    if type(target) not in _memory.PLAIN_TYPES or LEDGER.foreign:
        return False
    try:
        return _torch.storage_id(target) not in LEDGER.groups and target.untyped_storage().resizable()
    except _memory.NO_MEMORY:  # sparse, opaque, or torch.func's
        return False


class _Spared:
    """A save whose version moves by a write that does it no harm: under ``watch()``, by one that has been judged and
    would not move it without; under ``repair()``, by one to another part of the memory.
    """

    def __init__(self, save: Save) -> None:
        self._save = save

    def expect_version(self) -> None:
        """The call has been made."""
        self._save.version = _memory.version_of(self._save.tensor)


def _may_write_to(target: torch.Tensor, save: Save) -> bool:
    """Whether the call may write to the save's memory, and PyTorch does not refuse the save."""
    if save.moved and not save.stashed:
        return False  # PyTorch refuses this save already
    return _may_overlap(target, save)


def _lies_apart(target: torch.Tensor, save: Save) -> bool:
    """Whether the two are known to share no element."""
    there, here = _memory.span_of(target), _memory.span_of(save.tensor)
    return there is not None and here is not None and overlaps(there, here) is False


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
    writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], hits: list[Hit]
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
    writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], hits: list[Hit]
) -> None:
    frame = sys._getframe(3)
    if is_refill(frame):
        if "resize_" in writer.name:  # before the first of these writes, while the saved bytes are still there
            for hit in hits:
                hit.save.expect_back(_REFILL)
        hits.clear()
        return
    here = _places.user_instruction(frame)
    if _policy.judge_at_read() is not None:
        leave_to_the_read(writer, hits, here)
        return
    hits[:] = [hit for hit in hits if not hit.save.is_taken or hit.save.is_intact]
    if not hits:
        return
    rehearsal: Rehearsal | None = None
    with _torch.no_torch_function():
        refused = any(writer.refused(hit.target) for hit in hits) and not writer.keeps_statistics
        if writer is OUT and torch.is_grad_enabled():  # out= and gradients do not go together, nearly always
            refused = refused or any(tensor.requires_grad for tensor in _memory.tensors_in([*args, *kwargs.values()]))
    if not refused and not _places.called_from(frame, _TRUSTED_FILES):
        # Where PyTorch refuses the call, it says so itself in a moment. Should it not, the bytes decide.
        with suppress(Exception):
            if _memory.can_be_copied(writer.targets(args, kwargs)):
                rehearsal = rehearse(writer, call, args, kwargs)
    if rehearsal is None:
        for hit in hits:
            hit.save.let_bytes_decide("write" if hit.counted else "uncounted", writer.title, here)
        hits.clear()
        return
    for hit in hits:
        if hit.save.stashed:
            hit.save.let_bytes_decide("stashed", writer.title, here)
    hits[:] = [hit for hit in hits if not hit.save.stashed]
    pronounce(writer, rehearsal, hits, here)
    if writer.once:
        rehearsal.put_down()
        for hit in hits:
            hit.save.accept()
        raise _Done(rehearsal)


def leave_to_the_read(writer: Writer, hits: list[Hit], here: _places.Instruction) -> None:
    """Have the bytes decide about all hits when backward reads."""
    with one_copy_each():
        for hit in hits:
            kind: Kind = "write"
            if hit.save.stashed:
                kind = "stashed"
            elif not hit.counted and (writer.on_storage or hit.save.shares_counter(hit.target)):
                kind = "uncounted"
            alias = ALIASES.taken_at(hit.target, _memory.storage_of(hit.target))
            hit.save.let_bytes_decide(kind, writer.title, here, alias)
    hits.clear()


def pronounce(writer: Writer, rehearsal: Rehearsal, hits: list[Hit], here: _places.Instruction) -> None:
    """Have those hits answered whose saves the call would silently change; only they are left in ``hits``."""
    changed: dict[int, tuple[torch.Tensor, int]] = {}
    with _torch.hidden():
        for hit in hits:
            span = _memory.span_of(hit.save.tensor)
            if id(hit.target) not in changed:
                mask, skipped = _memory.trimmed(rehearsal.changed_bytes(hit.target))
                changed[id(hit.target)] = mask, _address(hit.target) + skipped
            if span is not None:
                hit.elements = _memory.touched_elements(*changed[id(hit.target)], span)
    hits[:] = [hit for hit in hits if hit.elements]
    for hit in list(hits):
        shared = not hit.counted and _memory.shares_counter(hit.target, hit.save.tensor)
        if shared and rehearsal.moves(hit.target):
            # PyTorch refuses the save, unless somebody puts the version back: then the bytes decide.
            hit.save.let_bytes_decide("uncounted", writer.title, here)
            hits.remove(hit)
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


def _address(target: torch.Tensor) -> int:
    span = _memory.span_of(target)
    return 0 if span is None else span.address


# ---- x.data = y --------------------------------------------------------------------------------------------


@LEDGER.holds_saves
def rebind(setter: Callable[[torch.Tensor, Any], None], tensor: torch.Tensor, value: Any) -> None:
    """Judge ``tensor.data = value``, and do it.

    An input or leaf that was saved is the very object that backward will read: pointing it at other memory
    changes what backward sees. An output's save has a handle of its own and stays what it was.

    Raises:
        SavedTensorCorruptionError: by the innermost guard, before anything has changed.
    """
    if value is tensor:  # Module.to(), where there is nothing to move
        setter(tensor, value)
        return
    alone = threading.active_count() == 1  # asked first: another may come to its end meanwhile
    saves = saves_of(tensor)
    if saves and not alone:  # see Note [Held by a look]
        saves.clear()
        LEDGER.outlast_looks()
        saves = saves_of(tensor)
    undecided: list[Save] = []
    rereads = rereads_of(tensor)
    frame = sys._getframe(1)
    same = False
    if saves and isinstance(value, torch.Tensor) and _accepts(setter, tensor, value):
        COUNTS.writes += 1
        with SLOW_PATH:
            same = _same(tensor, value)
            error = None if same else _judge_rebinding(saves, undecided)
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
    if _policy.innermost() is not None:
        # Whether backward reads it at all, the program's own unpack will tell: then its bytes decide.
        for save in LEDGER.in_storage(_memory.storage_of(tensor)):
            if not save.certain and save.tensor is tensor:
                save.let_bytes_decide("rebind", _REBINDING, _places.user_instruction(frame))
    ALIASES.forget(tensor)  # of the memory that it leaves
    note_write(rereads, _REBINDING)
    setter(tensor, value)
    for save in saves:  # what backward will read lies elsewhere now
        if same and save.is_taken:
            save.follow()
        else:
            save.accept()
    for save in undecided:
        save.follow()
    if saves or undecided:  # what has an alias of the memory that the saves lie in now can write there unseen
        with _torch.no_torch_function():
            if (storage := _memory.storage_of(tensor)) and ALIASES.meet_save(storage, tensor):
                for save in (*saves, *undecided):
                    save.keep_small_proof(PROOF_BYTES_AT_ALIAS)
    saves.clear()
    undecided.clear()
    for entry in rereads:
        entry.follow()
    if isinstance(value, torch.Tensor) and type(value) in _memory.PLAIN_TYPES:
        here = _places.user_instruction(frame)
        for alias in (value, tensor):  # the same memory, two counters
            enter_alias(alias, here, _memory.version_of(alias))


def reshapes(name: str) -> Callable[..., Any]:
    """The route of a method that changes what a tensor is, and no memory: PyTorch refuses what is saved of it."""

    def route(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0] if instance is None and args else instance
        if not isinstance(tensor, torch.Tensor):
            return wrapped(*args, **kwargs)
        keep_before_reshaping(tensor, name)
        with reaching_elsewhere(tensor):
            return wrapped(*args, **kwargs)

    return route


@contextmanager
def reaching_elsewhere(tensor: torch.Tensor) -> Iterator[None]:
    """Around a call that may point a tensor at another part of its storage: what was saved may be that very tensor.

    PyTorch refuses such a save, unless a block puts the counter back.
    """
    storage = _memory.storage_of(tensor) if LEDGER.groups or ALIASES.by_storage else 0
    if not storage or not (LEDGER.is_indexed(storage) or storage in ALIASES.by_storage):
        yield
        return
    with _torch.no_torch_function():
        ALIASES.sync(storage)  # what has been written so far was written where it reached until now
    before = _memory.stretch_in_storage(tensor)
    try:
        yield
    finally:
        if _memory.stretch_in_storage(tensor) != before:
            LEDGER.lies_elsewhere(storage)
            ALIASES.lies_elsewhere(storage, tensor)


@LEDGER.holds_saves
def keep_before_reshaping(tensor: torch.Tensor, name: str) -> None:
    """Keep what is saved of a tensor that is about to be reshaped in place, if somebody repairs."""
    if _policy.repairer() is None or not LEDGER.any_alive():
        return
    here = _places.user_instruction(sys._getframe(2))
    with _torch.no_torch_function(), one_copy_each():
        for save in LEDGER.in_storage(_memory.storage_of(tensor)):
            if save.checked and not isinstance(save, Reread) and not save.moved and save.shares_counter(tensor):
                save.let_bytes_decide("tracked", f"{name}()", here)


@LEDGER.holds_saves
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
    if is_refill(frame):
        return None
    here = _places.user_instruction(frame)
    at_read = _policy.judge_at_read() is not None
    trusted = at_read or _places.called_from(frame, _TRUSTED_FILES)
    repairs = _policy.repairer() is not None
    try:
        for save in saves:
            if save.is_taken and not at_read and not save.is_intact:
                undecided.append(save)  # who wrote to it first answers for it
            elif save.stashed or (trusted and not (at_read and save.moved)) or (repairs and save.is_taken):
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
    if tensor.requires_grad and not (value.is_floating_point() or value.is_complex()):
        return False  # the copy, which requires no gradient, would take it
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
        if tensor.is_nested and value.is_nested:
            inside = zip(tensor.unbind(), value.unbind(), strict=False)
            return tensor.size(0) == value.size(0) and all(_same(one, other) for one, other in inside)
        if (
            tensor.is_nested != value.is_nested
            or tensor.shape != value.shape
            or tensor.dtype != value.dtype
            or tensor.device != value.device
        ):
            return False
        if (span := _memory.span_of(tensor)) is not None and span == _memory.span_of(value):
            return True
        return _memory.same_bytes(tensor, value)


# ---- aliases -----------------------------------------------------------------------------------------------


@LEDGER.holds_saves
def enter_alias(alias: torch.Tensor, here: _places.Instruction, version: int | None = None, lent: bool = False) -> None:
    """Take down an alias with a counter of its own (but if it is lent); watch it at once where a live save needs it."""
    storage = _memory.storage_of(alias)
    if not storage:
        return
    # One made in inference mode has no counter that would tell of a write; a nested one has no strides to tell where.
    if (version is not None and version < 0) or _torch.is_flat_nested(alias):
        for save in LEDGER.in_storage(storage):
            save.keep_proof(PROOF_BYTES_AT_ALIAS)
            if save.is_proven:
                save.remark().compare = True
        return
    record = ALIASES.enter(alias, storage, here, version, lent)
    if LEDGER.any_in_storage(storage) and not lent:
        record.arm(alias)
        reach = _memory.stretch_in_storage(alias) if LEDGER.is_crowded(storage) else None
        for save in LEDGER.in_storage(storage) if reach is None else LEDGER.near(storage, *reach):
            save.keep_small_proof(PROOF_BYTES_AT_ALIAS)


@LEDGER.holds_saves
def detached_in_place(tensor: torch.Tensor) -> list[Save]:
    """The saves that hold ``tensor`` as a non-leaf input: detached in place, PyTorch refuses them."""
    return [] if tensor.is_leaf else [save for save in saves_of(tensor) if save.checked]
