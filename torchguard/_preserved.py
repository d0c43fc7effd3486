"""Which version counters are going to be put back, and were saves written to meanwhile?

``with torch.autograd._unsafe_preserve_version_counter(x):`` hides what is written to ``x`` in the block. What is saved
of it is copied on entering, what is saved in the block when the guard sees a write; at the read, the bytes decide.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary, ref

from torchguard import _memory, _places, _torch
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER, Save
from torchguard._writes import PRESERVES, allow_if_intended, preserving, saves_near

#: FSDP2 frees memory that is saved and fills it again, in such a block, before backward reads it: what is there on
#: entering is nothing that anybody saved.
_REFILLS = ("torch/distributed/fsdp/", "torch\\distributed\\fsdp\\")

#: The saves that were copied on entering, and by nobody before.
_copied: WeakKeyDictionary[Any, list[ref[Save]]] = WeakKeyDictionary()


@LEDGER.holds_saves
def begin(original: Any, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``__init__``, which takes down the versions, and ``__enter__``, for a block that was made before the guard."""
    result = original(*args, **kwargs)
    frame = sys._getframe(1)
    if any(part in frame.f_code.co_filename for part in _REFILLS):
        return result
    here = _places.user_instruction(frame)
    storages: set[int] = set()
    copied = _copied.setdefault(block, [])
    for tensor in _torch.preserved_by(block):
        storage = _memory.storage_of(tensor)
        if not storage or storage in storages:
            continue
        storages.add(storage)
        for save in saves_near(tensor, storage):
            if save.moved:
                continue  # PyTorch refuses it
            audited = save.remarks is not None and save.remarks.audited
            if save.remarks is None or not save.remarks.compare or audited:
                if save.remarks is None or save.remarks.proof is None or audited:
                    copied.append(ref(save))
                save.let_bytes_decide("uncounted", f"a write under {PRESERVES}", here)
    preserving[block] = frozenset(storages)
    return result


def end(original: Any, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``__exit__``, which puts the versions back."""
    storages = preserving.pop(block, frozenset())
    for storage in storages:
        ALIASES.sync(storage)
    try:
        return original(*args, **kwargs)
    finally:
        for storage in storages:
            ALIASES.settle(storage)
        for item in _copied.pop(block, []):
            save = item()
            if save is None or save.remarks is None:
                continue
            if save.is_proven:
                save.remarks.writer = None
                if not save.remarks.audited:
                    save.remarks.compare = False
                    save.remarks.proof = None
            else:
                allow_if_intended(save)
