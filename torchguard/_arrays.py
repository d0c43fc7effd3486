"""Which NumPy array lies behind a tensor that a checkpoint's function makes of it?

The tensor is gone as soon as the function has run, the array is not: somebody may write to it, unseen, before backward
makes the next tensor of it. So the array is remembered, by a weak hold on the one that owns the memory, and where in it
the tensor lies.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

from torchguard import _torch
from torchguard._torch import ref

_from_numpy = torch.from_numpy


class Source:
    """Part of the memory of a NumPy array."""

    __slots__ = ("_form", "_owner")

    def __init__(self, array: Any, owner: Any, offset: int) -> None:
        self._owner = weakref.ref(owner)
        self._form = array.shape, array.dtype, offset, array.strides

    def tensor(self) -> torch.Tensor | None:
        """A new tensor over it; None once the array is gone."""
        owner = self._owner()
        if owner is None:
            return None
        array = type(owner)(self._form[0], self._form[1], _buffer(owner), *self._form[2:])
        with _torch.unseen():
            return _from_numpy(array)

    def is_the_same_as(self, other: Source) -> bool:
        """Whether both are the same part of one array."""
        return self._owner() is not None and self._owner() is other._owner() and self._form == other._form


class _Sources(threading.local):
    def __init__(self) -> None:
        self.by_id: dict[int, tuple[ref[torch.Tensor], Source]] = {}


_sources = _Sources()


def note(tensor: torch.Tensor, array: Any) -> None:
    """A tensor has been made of what may be an array, in a checkpoint's function."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(array) is not numpy.ndarray or not array.size:
        return
    owner = array
    while type(owner.base) is numpy.ndarray:
        owner = owner.base
    if isinstance(owner.base, torch.Tensor) or not owner.flags.writeable:
        return  # torch's memory, which is watched as such; or nobody's to write to
    if not (owner.flags.c_contiguous or owner.flags.f_contiguous) or tensor.data_ptr() != address_of(array):
        return
    _sources.by_id[id(tensor)] = ref(tensor), Source(array, owner, address_of(array) - address_of(owner))


def source_of(tensor: torch.Tensor) -> Source | None:
    """What a tensor was made of that was noted in this thread."""
    hold, source = _sources.by_id.get(id(tensor), (None, None))
    return source if hold is not None and hold() is tensor else None


def forget() -> None:
    """The checkpoint's function has run."""
    _sources.by_id.clear()


def address_of(array: Any) -> int:
    """Where an array's first element lies; 0 for what is no array."""
    interface = getattr(array, "__array_interface__", None)
    return int(interface["data"][0]) if isinstance(interface, dict) else 0


def _buffer(owner: Any) -> Any:
    return owner if owner.flags.c_contiguous else owner.T
