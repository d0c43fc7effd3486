"""A save was written to: what is said of it, and which guard answers?"""

from __future__ import annotations

import threading
from typing import Literal

import torch

from torchguard import _memory, _places, _policy, _torch
from torchguard._places import Instruction
from torchguard._saves import Save
from torchguard._violation import Kind, Violation


def in_charge(save: Save) -> _policy.Respondent | None:
    """The guard that is to answer for what was done to a save; None where it is allowed, or where there is none."""
    remarks = save.remarks
    if remarks is not None and remarks.taken_by is not None:
        return remarks.taken_by
    if _policy.state.reasons:
        return None
    return _policy.innermost() or (None if remarks is None else remarks.guard)


def can_be_repaired(save: Save) -> bool:
    """Whether the guard in charge repairs, and the bytes that were saved are at hand."""
    if save.remarks is None or save.remarks.proof is None:
        return False
    guard = in_charge(save)
    if guard is None or not guard.repairs:
        return False
    return _torch.can_be_replaced(save.tensor)


def repair(
    save: Save, kind: Kind, operation: str, *, aliased: Instruction, written: Instruction, read: Instruction
) -> torch.Tensor | None:
    """The bytes that were saved, for backward to read; None where the violation is one to live with.

    The guard is told once a save and writer; what is read again is handed out again.
    """
    remarks = save.remark()
    guard = in_charge(save)
    assert guard is not None
    if remarks.healed is None:
        elements = save.changed_elements
        violation = _described(save, kind, operation, aliased, written, read, elements, "read", reason=None)
        remarks.healed = guard.heal(violation)
    return save.restored() if remarks.healed else None


def pronounce(
    save: Save,
    kind: Kind,
    operation: str,
    *,
    aliased: Instruction,
    written: Instruction,
    elements: int,
    caught: Literal["write", "read"],
    read: Instruction = None,
) -> None:
    """Have a violation answered by the guard in charge; raises under ``strict()``."""

    def describe(reason: str | None) -> Violation:
        return _described(save, kind, operation, aliased, written, read, elements, caught, reason)

    remarks = save.remarks
    left, taken_by = (None, None) if remarks is None else (remarks.guard, remarks.taken_by)
    _policy.answer(describe, left, taken_by if caught == "read" else None)


def _described(
    save: Save,
    kind: Kind,
    operation: str,
    aliased: Instruction,
    written: Instruction,
    read: Instruction,
    elements: int,
    caught: Literal["write", "read"],
    reason: str | None,
) -> Violation:
    proof = None if save.remarks is None or caught == "write" else save.remarks.proof
    difference = None if proof is None else _memory.largest_difference(save.tensor, proof)
    saved = save.tensor
    if kind == "rebind" and proof is not None and (proof.shape != saved.shape or proof.dtype != saved.dtype):
        saved = proof  # the tensor is another one by now
    return Violation(
        kind=kind,
        operation=operation,
        saved=_places.place_of(save.instruction),
        aliased=_places.place_of(aliased),
        written=_places.place_of(written),
        read=_places.place_of(read),
        saved_by=save.operation,
        elements=elements,
        largest_difference=difference,
        of=_torch.behind(saved).numel(),
        caught=caught,
        allowed=reason,
        thread=threading.current_thread().name,
        **_memory.describe(saved),
    )
