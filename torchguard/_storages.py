"""Which methods of a storage write, and what do they write to?

A storage has no version counter: no write to it is ever tracked. Each is expressed as a call on a tensor of
bytes over the storage, so that it is rehearsed and judged like every other write: a replica of that tensor has
a storage of its own, of the same size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torchguard import _memory, _places, _torch, _writes
from torchguard._saves import LEDGER
from torchguard._writers import Writer

#: Taken before anything is patched.
_set = torch.Tensor.set_

Route = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor | None:
    """All of a storage as a tensor of bytes; None where it has no memory."""
    try:
        with _torch.hidden():
            tensor = _set(torch.empty(0, dtype=torch.uint8, device=storage.device), storage)
    except _memory.NO_MEMORY:
        return None
    return None if _memory.span_of(tensor) is None else tensor


def writes(name: str) -> Route:
    """The route of a method that writes to the bytes of its storage."""
    writer = Writer(_torch.STORAGE_WRITERS[name], uncounted=frozenset({"self"}), on_storage=True)

    def route(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = _bytes_of(instance) if isinstance(instance, torch.UntypedStorage) and LEDGER.any_alive() else None
        if target is None:
            return wrapped(*args, **kwargs)

        def call(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
            method = wrapped if tensor is target else getattr(tensor.untyped_storage(), name)
            return method(*rest, **named)

        return _writes.carry_out(writer, call, (target, *args), kwargs)

    return route


def resize(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``resize_``: what lies beyond the new end is lost, and the rest has another address."""
    if not isinstance(instance, torch.UntypedStorage) or not LEDGER.any_alive():
        return wrapped(*args, **kwargs)
    size = args[0] if args else kwargs.get("size")
    target = _bytes_of(instance) if isinstance(size, int) and 0 <= size < instance.nbytes() else None
    try:
        if target is None or not instance.resizable():
            return wrapped(*args, **kwargs)
        lost = target[size:]

        def call(tensor: torch.Tensor) -> Any:
            # The rehearsal changes every byte that the resizing would take away.
            return wrapped(*args, **kwargs) if tensor is lost else tensor.bitwise_not_()

        return _writes.carry_out(_RESIZE, call, (lost,), {})
    finally:
        LEDGER.moved(_torch.identity_of(instance))


_RESIZE = Writer("UntypedStorage.resize_()", uncounted=frozenset({"self"}), on_storage=True)


def enter_alias(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.set_(y)``: ``x`` is an alias, with the counter that it had."""
    tensor = args[0] if instance is None and args else instance
    if isinstance(tensor, torch.Tensor):
        _writes.keep_before_reshaping(tensor, "set_")
        with _writes.reaching_elsewhere(tensor):
            result = wrapped(*args, **kwargs)
    else:
        result = wrapped(*args, **kwargs)
    # A typed storage makes such a tensor for the time of one write.
    if type(result) in _memory.PLAIN_TYPES and sys._getframe(1).f_code.co_filename != torch.storage.__file__:
        _writes.enter_alias(result, _places.user_instruction(sys._getframe(1)), _memory.version_of(result))
    return result
