"""Backward unpacks a save: is it still what was saved?

Asked at every read, so double backward, ``retain_graph`` and an access to ``ctx.saved_tensors`` are all
covered. In this order: PyTorch's own check (which save hooks switch off), the saved tensor pointing
elsewhere, a write nobody saw.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch

from torchguard import _memory, _places, _policy, _refusal, _torch, _verdict
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER, Save
from torchguard._violation import Kind

#: A save's version once its tensor was detached in place, which PyTorch refuses to unpack.
DETACHED = -2


class _Collector(threading.local):
    """Which saves were read in this thread, while somebody wants to know."""

    saves: list[Save] | None = None


collector = _Collector()


def make_unpack() -> Callable[[Save], torch.Tensor]:
    """The unpack hook. What it uses is bound to local names: it runs at every read."""
    young = ALIASES.young
    aliases = ALIASES.by_storage
    mode_active = _torch.function_mode_active
    storage_id = _torch.storage_id
    disabled = _torch.no_torch_function

    def check(save: Save) -> None:
        if save.tensor._version != save.version:
            _refuse(save)
        if save.storage in young or save.storage in aliases:
            ALIASES.sync(save.storage)
        if save.remarks is not None or (save.node is None and _memory.storage_of(save.tensor) != save.storage):
            _examine(save)

    def verdict(save: Save) -> Exception | None:
        try:
            with disabled():
                check(save)
        except Exception as error:
            # Raised by the hook, without the frames below: their locals would keep the save alive for as long
            # as somebody keeps the error.
            return error.with_traceback(None)
        return None

    def unpack(save: Save) -> torch.Tensor:
        if collector.saves is not None:
            collector.saves.append(save)
        tensor = save.tensor
        if (
            save.remarks is not None
            or mode_active()
            or tensor._version != save.version
            or save.storage in young
            or save.storage in aliases
            or (save.node is None and storage_id(tensor) != save.storage)
        ):
            error = verdict(save)
            if error is not None:
                del save, tensor
                try:
                    raise error
                finally:
                    del error  # it refers to this frame
        return tensor

    return unpack


def _refuse(save: Save) -> None:
    if save.version == DETACHED:
        raise _refusal.detached_refusal()
    node = None if save.node is None else save.node.__name__
    view = save.remark().view
    if view is not None and view() is None:
        node = _torch.reading_node() or node
    raise _refusal.refusal(save.tensor, save.version, node, save.output)


def _examine(save: Save) -> None:
    remarks = save.remark()
    if remarks.awaits is not None:
        awaits, remarks.awaits = remarks.awaits, None
        awaits()
    tensor = save.tensor
    rebound = save.node is None and save.storage != 0 and _memory.storage_of(tensor) != save.storage
    if not (rebound or remarks.compare or remarks.suspect is not None):
        return
    if save.is_back or (remarks.proof is not None and _memory.same_bytes(tensor, remarks.proof)):
        remarks.suspect = None  # perturbed and restored, or another part of the alias's memory
        return
    _report(save, rebound)


def _report(save: Save, rebound: bool) -> None:
    remarks = save.remark()
    suspect = remarks.suspect
    read = _places.user_instruction(sys._getframe(1))
    kind: Kind = "rebind" if rebound else "unseen"
    operation, written = "x.data = y" if rebound else "", read
    if remarks.writer is not None and not rebound:
        kind, operation, written = remarks.writer
    _verdict.pronounce(
        save,
        kind,
        operation,
        aliased=None if suspect is None else suspect.instruction,
        written=written,
        read=read,
        elements=_changed_elements(save),
        caught="read",
    )
    save.accept()  # nothing was raised: a later write is another violation


def _changed_elements(save: Save) -> int:
    """How many elements differ from the proof; all of them where there is none."""
    tensor, proof = save.tensor, None if save.remarks is None else save.remarks.proof
    if proof is None or proof.shape != tensor.shape or not tensor.numel():
        return tensor.numel()
    with _torch.hidden():
        changed = _memory.as_bytes(proof.contiguous()) != _memory.as_bytes(tensor.contiguous())
        return int(changed.view(-1, tensor.element_size()).any(-1).sum())


def look_for_unseen_writes(leaving: bool = False) -> None:
    """Ask every watched counter now. On leaving an ``allow`` block, what moved in it is allowed."""
    for storage in list(ALIASES.by_storage) + list(ALIASES.young):
        saves = LEDGER.in_storage(storage)
        before = {id(save) for save in saves if save.remarks is not None and save.remarks.suspect is not None}
        ALIASES.sync(storage, saves)
        if leaving:
            for save in saves:
                if save.remarks is not None and save.remarks.suspect is not None and id(save) not in before:
                    _examine(save)  # inside the block, so it is recorded as allowed


def leave_to(guard: _policy.Respondent) -> None:
    """``guard``, the last one, is being left: it answers for what was written under it and is read afterwards."""
    look_for_unseen_writes()
    for save in LEDGER.all_alive():
        remarks = save.remarks
        if (
            remarks is not None
            and (remarks.suspect is not None or remarks.compare)
            and not save.is_back
            and (remarks.proof is None or not _memory.same_bytes(save.tensor, remarks.proof))
        ):
            remarks.guard = guard
