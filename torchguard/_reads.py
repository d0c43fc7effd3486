"""Backward unpacks a save: is it still what was saved?

Asked at every read, so double backward, ``retain_graph`` and an access to ``ctx.saved_tensors`` are all
covered. In this order: PyTorch's own check (which save hooks switch off), the saved tensor pointing
elsewhere, a write nobody saw.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from torchguard import _memory, _places, _policy, _refusal, _torch, _verdict
from torchguard._aliases import ALIASES
from torchguard._audit import SYNCHRONOUS, put_off
from torchguard._counts import SLOW_PATH
from torchguard._exports import EXPORTS
from torchguard._fast import native
from torchguard._inputs import note_read
from torchguard._rereads import Reread
from torchguard._saves import LEDGER, Access, Part, Remarks, Save
from torchguard._violation import Kind

#: A save's version once its tensor was detached in place, which PyTorch refuses to unpack.
DETACHED = -2


class _Collector(threading.local):
    """Which saves were read in this thread, while somebody wants to know."""

    saves: list[Save] | None = None
    #: Whether nothing is to be judged: a read on the guard's own behalf.
    unjudged = False


collector = _Collector()

#: Not empty while any thread wants to know: cheaper to ask than its own.
collecting: list[None] = []


def make_unpack() -> Callable[[Save], torch.Tensor]:
    """The unpack hook. What it uses is bound to local names: it runs at every read."""
    young = ALIASES.young
    aliases = ALIASES.by_storage
    is_quiet = ALIASES.is_quiet
    mode_active = _torch.function_mode_active
    storage_id = _torch.storage_id
    disabled = _torch.no_torch_function
    records = torch.is_grad_enabled

    def check(save: Save) -> torch.Tensor | None:
        if (
            _memory.has_moved(save.tensor, save.version)
            and (save.version == DETACHED or not _verdict.can_be_repaired(save))
            and not _is_its_own_gradient(save)
        ):
            _refuse(save)
        if (save.storage in young or save.storage in aliases) and not is_quiet(save.storage, save.tensor):
            ALIASES.sync(save.storage, save.tensor)
        if save.remarks is not None or _is_rebound(save):
            return _examine(save)
        return None

    def verdict(save: Save) -> Exception | torch.Tensor | None:
        try:
            with disabled():
                return check(save)
        except Exception as error:
            # Raised by the hook, without the frames below: their locals would keep the save alive for as long
            # as somebody keeps the error.
            return error.with_traceback(None)

    def unpack(save: Save) -> torch.Tensor:
        if collecting and collector.saves is not None:
            collector.saves.append(save)
            if collector.unjudged:
                return save.given
        tensor = save.tensor
        if (
            save.remarks is not None
            or mode_active()
            or tensor._version != save.version
            or ((save.storage in young or save.storage in aliases) and not is_quiet(save.storage, tensor))
            or (save.node is None and (storage_id(tensor) != save.storage or records()))
        ):
            found = verdict(save)
            if isinstance(found, torch.Tensor):
                return found  # what was saved, in the place of what is there now
            if found is not None:
                del save, tensor
                try:
                    raise found
                finally:
                    del found  # it refers to this frame
            if save.node is None and records():
                note_read(save)
            return save.given
        return tensor

    if native is None:
        return unpack
    in_c: Callable[[Save], torch.Tensor] = native.Unpack(
        otherwise=unpack,
        collecting=collecting,
        tensor_type=torch.Tensor,
        mode_active=mode_active,
        storage_id=storage_id,
        records=records,
        young=young,
        aliases=aliases,
    )
    return in_c


#: The unpack hook of every guard.
unpack = make_unpack()


def _is_its_own_gradient(save: Save) -> bool:
    """Whether the version of a leaf without an element moved because a gradient was added to its gradient.

    What saved nothing (``cummax``) hands that back as the gradient. Without hooks it is the leaf itself, and is copied;
    with hooks it is a tensor that nobody else has, and is kept: with the leaf's counter.
    """
    tensor = save.tensor
    if not tensor.is_leaf or not _memory.is_empty(tensor):
        return False
    gradient = tensor.grad
    if save.version == DETACHED or gradient is None or not _memory.shares_counter(gradient, tensor):
        return False
    save.version = _memory.version_of(tensor)
    return True


def _refuse(save: Save) -> None:
    if save.version == DETACHED:
        raise _refusal.detached_refusal()
    node = None if save.node is None else save.node.__name__
    view = save.remark().view
    if view is not None and view() is None:
        node = _node_that_wrote(save) or node
    raise _refusal.refusal(save.tensor, save.version, node, save.output)


def _node_that_wrote(save: Save) -> str | None:
    """Name of the node of the call that wrote a view in place and saved it; None where that cannot be told.

    PyTorch names that one once the view is gone. The node that reads is another, around it, and does not show it: so
    the call is made again, on a tensor of its own.
    """
    instruction = save.instruction
    if save.inner_code is not None and not _places.is_ours(save.inner_code):  # else the guard makes the user's call
        instruction = save.inner_code, save.inner_offset
    if instruction is None:
        return None
    name = _places.operation_of(instruction).removesuffix("_")
    write = getattr(torch.ops.aten, f"{name}_", None)
    if write is None:
        return None
    with _torch.unseen(), _torch.outside_transforms(), _torch.without_hooks(), torch.enable_grad():
        tensor: Any = torch.ones((), requires_grad=True).clone()
        try:
            with _memory.same_random_numbers([tensor], ()):
                write(tensor)
        except (RuntimeError, TypeError):  # it takes more than that
            return f"{name.capitalize()}Backward0"
        return str(tensor.grad_fn.name())


@LEDGER.holds_saves
def let_go(tensor: torch.Tensor) -> None:
    """Drop the weak holds on a view that was written in place: something asks for one without weak references."""
    for save in LEDGER.in_storage(_memory.storage_of(tensor)):
        if save.remarks is not None and save.remarks.view is not None and save.remarks.view() is tensor:
            save.remarks.view = None


def _examine(save: Save) -> torch.Tensor | None:
    """Judge a save that there is something to say about; what backward is to read in its place, if anything."""
    remarks = save.remark()
    for part in remarks.parts:
        examine_stashed(part)
    if remarks.awaits is not None:
        awaits, remarks.awaits = remarks.awaits, None
        awaits()
    rebound = _is_rebound(save)
    refused = save.moved and not remarks.stashed  # PyTorch would, and the guard in charge repairs
    if remarks.audited and remarks.writer is None and remarks.suspect is None and not (rebound or refused):
        kind_if_changed: Kind = "stashed" if remarks.stashed else "exported" if remarks.exports else "invisible"
        if save.tensor.device.type not in SYNCHRONOUS and (is_unused(save) or put_off(save, kind_if_changed)):
            return None
    seen = rebound or remarks.compare or remarks.suspect is not None
    if not seen and not refused and (not remarks.exports or remarks.proof is None):
        return None
    with SLOW_PATH:
        if save.is_intact and (not refused or _verdict.can_be_repaired(save)):
            remarks.suspect = None  # perturbed and restored, or another part of the alias's memory
            return None
        if is_unused(save):
            return None
        if rebound:
            kind: Kind = "rebind"
        elif remarks.audited and remarks.writer is None and remarks.suspect is None and not refused:
            kind = kind_if_changed
        else:
            kind = "unseen" if seen else "tracked" if refused else "exported"
        return _report(save, kind)


def _is_rebound(save: Save) -> bool:
    """Whether the tensor that was saved points at other memory now, and nobody has answered for it."""
    return save.node is None and save.storage != 0 and _memory.storage_of(save.tensor) != save.storage


def is_unused(save: Save) -> bool:
    """Whether what reads takes the save out and does nothing with it.

    The node is asked for the tensors of which that is known; its answer comes by way of the unpack hook, which sees
    the saves themselves.
    """
    outer = collector.saves
    found: list[Save] = []
    collector.saves = found
    collector.unjudged = True
    collecting.append(None)
    try:
        for read in _torch.unused_by_reader():
            read()
    finally:
        collecting.pop()
        collector.saves = outer
        collector.unjudged = False
    return any(other is save for other in found)


def _report(save: Save, kind: Kind) -> torch.Tensor | None:
    remarks = save.remark()
    alias: Access | None = export_behind(save) if kind == "exported" else remarks.suspect
    read = _places.user_instruction(sys._getframe(1))
    operation, written = "x.data = y" if kind == "rebind" else "", read
    aliased = None if alias is None else alias.instruction
    if remarks.writer is not None and kind == "unseen":
        kind, operation, written = remarks.writer
        aliased = aliased or remarks.alias
    if remarks.stashed and kind != "exported":
        kind = "wrapped" if isinstance(save, Part) else "stashed"
    if not isinstance(save, Part) and _verdict.can_be_repaired(save):
        healed = _verdict.repair(save, kind, operation, aliased=aliased, written=written, read=read)
        if healed is not None:
            return healed
        if save.moved and not remarks.stashed:
            _refuse(save)
        save.accept()
        return None
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
    remarks.spoilt = False
    save.accept()  # nothing was raised: a later write is another violation
    return None


def export_behind(save: Save) -> Access:
    """The export through which a save was written to: the first that reaches an element that differs."""
    remarks = save.remark()
    exports, proof = remarks.exports, remarks.proof
    if len(exports) > 1 and proof is not None and _memory.readable(save.tensor):
        with _torch.hidden():
            differs = _memory.differing_elements(save.tensor, proof)
            for export in exports:
                if export.span is not None and _memory.any_within(save.tensor, differs, export.span):
                    return export
    return exports[0]


def examine(save: Save) -> None:
    """Have a save judged as if backward read it now."""
    with _torch.no_torch_function():
        _examine(save)


def examine_stashed(save: Save) -> torch.Tensor | None:
    """The same for a save that PyTorch reads without a look at its version: a tracked write is silent, too."""
    ALIASES.sync(save.storage, save.tensor)
    remarks = save.remark()
    remarks.compare = remarks.compare or save.moved
    with _torch.no_torch_function():
        healed = _examine(save)
    save.version = _memory.version_of(save.tensor)
    return healed


@LEDGER.holds_saves
def look_for_unseen_writes(leaving: bool = False) -> None:
    """Ask every watched counter now. On leaving an ``allow`` block, what moved in it is allowed."""
    _look_at_exports()
    for storage in list(ALIASES.by_storage) + list(ALIASES.young):
        saves = LEDGER.in_storage(storage)
        before = {id(save) for save in saves if save.remarks is not None and save.remarks.suspect is not None}
        ALIASES.sync(storage, saves=saves)
        if leaving:
            for save in saves:
                if save.remarks is not None and save.remarks.suspect is not None and id(save) not in before:
                    if isinstance(save, Reread):
                        save.allowed = _policy.state.reasons[-1]
                        continue
                    _examine(save)  # inside the block, so it is recorded as allowed


@LEDGER.holds_saves
def _look_at_exports() -> None:
    """Compare what code outside torch can write to. What changed in an ``allow`` block is allowed, and recorded.

    A save that had changed before is not looked at again until backward reads it.
    """
    EXPORTS.settle_dead()
    inside = bool(_policy.state.reasons)  # a block that is being left counts
    exported = list(EXPORTS.saves())
    # What no Python sees, and what nothing checks, can be told from what came before the block by its bytes alone.
    kept = [save for save in LEDGER.all_alive() if _is_kept_anyway(save)]
    for save in {id(save): save for save in [*exported, *kept]}.values():
        remarks = save.remark()
        if remarks.spoilt or (save.moved and not remarks.stashed) or save.is_intact:
            continue
        if remarks.proof is None and remarks.contents is None:
            continue
        if inside and remarks.stashed:
            examine_stashed(save)
        elif inside:
            _examine(save)
        else:
            remarks.spoilt = True


def _is_kept_anyway(save: Save) -> bool:
    remarks = save.remarks
    return remarks is not None and save.checked and (remarks.stashed or (remarks.audited and remarks.writer is None))


@LEDGER.holds_saves
def leave_to(guard: _policy.Respondent) -> None:
    """``guard``, the last one, is being left: it answers for what was written under it and is read afterwards."""
    look_for_unseen_writes()
    for save in LEDGER.all_alive():
        if save.tracked or ((_is_rebound(save) or _may_differ(save.remarks)) and not save.is_intact):
            save.remark().guard = guard


def _may_differ(remarks: Remarks | None) -> bool:
    """Whether the bytes are to be asked for."""
    return remarks is not None and (
        remarks.suspect is not None or remarks.compare or (bool(remarks.exports) and remarks.proof is not None)
    )
