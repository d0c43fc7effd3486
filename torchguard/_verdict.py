"""A save was written to: what is said of it, and which guard answers?"""

from __future__ import annotations

import threading
from typing import Literal

from torchguard import _memory, _places, _policy, _torch
from torchguard._places import Instruction
from torchguard._saves import Save
from torchguard._violation import Kind, Violation


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

    remarks = save.remarks

    def describe(reason: str | None) -> Violation:
        proof = None if remarks is None or caught == "write" else remarks.proof
        difference = None if proof is None else _memory.largest_difference(save.tensor, proof)
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
            of=_torch.behind(save.tensor).numel(),
            caught=caught,
            allowed=reason,
            thread=threading.current_thread().name,
            **_memory.describe(save.tensor),
        )

    left, taken_by = (None, None) if remarks is None else (remarks.guard, remarks.taken_by)
    _policy.answer(describe, left, taken_by if caught == "read" else None)
