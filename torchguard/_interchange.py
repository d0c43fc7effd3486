"""Which calls hand memory out of torch, or take it in, and what is known of it from then on?

NumPy arrays, DLPack capsules, buffers and shared memory. What can be written to there is kept in ``_exports``;
a torch tensor over such memory is an alias like any other, whose writes are judged as they happen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torchguard import _arrays, _memory, _places, _policy, _torch
from torchguard._exports import EXPORTS, is_open
from torchguard._model import Span
from torchguard._rereads import running
from torchguard._saves import LEDGER
from torchguard._torch import ref
from torchguard._writes import saves_near

Route = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]


@LEDGER.holds_saves
def _hand_out(tensor: torch.Tensor, span: Span | None, frame: Any, handle: Any, was_open: bool = True) -> None:
    """Code outside torch can write to ``span`` from now on, as long as ``handle`` lives (None: for good)."""
    storage = _memory.storage_of(tensor)
    if not storage or span is None or 0 in span.sizes:
        return
    with _torch.no_torch_function():
        shared = EXPORTS.shared(tensor.untyped_storage(), storage, was_open)
    export = EXPORTS.enter(shared, span, _places.user_instruction(frame), handle)
    EXPORTS.settle_dead()
    for save in saves_near(tensor, storage):
        here = _memory.span_of(save.tensor)
        if here is not None and not save.moved and export.reaches(here):
            EXPORTS.keep_proof(save, shared, here, [export])


def _is_open(tensor: torch.Tensor) -> bool:
    try:
        with _torch.no_torch_function():
            return is_open(tensor.untyped_storage())
    except _memory.NO_MEMORY:
        return True


def to_pointer(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.data_ptr()``, where the guard repairs: who has the address can write there as long as the memory lives."""
    tensor = args[0] if instance is None and args else instance
    if isinstance(tensor, torch.Tensor) and _policy.repairer() is not None:
        _hand_out(tensor, _memory.span_of(tensor), sys._getframe(1), None, _is_open(tensor))
    return wrapped(*args, **kwargs)


# ---- NumPy -------------------------------------------------------------------------------------------------


def to_numpy(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.numpy()``, which ``np.asarray(x)`` calls too: exported as long as the array or a view of it lives."""
    tensor = args[0] if instance is None and args else instance
    was_open = not isinstance(tensor, torch.Tensor) or _is_open(tensor)
    array = wrapped(*args, **kwargs)
    span = _memory.span_of(tensor) if isinstance(tensor, torch.Tensor) else None
    if span is not None and _arrays.address_of(array) == span.address:  # else it is a copy
        _hand_out(tensor, span, sys._getframe(1), array, was_open)
    return array


# ---- DLPack ------------------------------------------------------------------------------------------------


def to_capsule(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``to_dlpack``: the capsule gets an alias of its own, which lives and dies with it and its consumer."""
    tensor: Any = args[0] if args else None
    if type(tensor) not in _memory.PLAIN_TYPES or (span := _memory.span_of(tensor)) is None:
        return wrapped(*args, **kwargs)
    with _torch.hidden():
        alias = tensor.detach()
    hold = ref(alias)
    capsule = wrapped(alias, *args[1:], **kwargs)
    del alias
    alias = hold()
    is_copy = alias is None and (kwargs.get("copy") or kwargs.get("dl_device") is not None)
    if not is_copy:
        # A torch that makes an alias of its own for the capsule does not tell when that dies.
        _hand_out(tensor, span, sys._getframe(1), alias, _is_open(tensor))
    return capsule


def cuda_array_interface(get: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """``x.__cuda_array_interface__``: the consumer keeps ``x`` alive, and so the storage."""

    def interface(tensor: torch.Tensor) -> Any:
        told = get(tensor)
        _hand_out(tensor, _memory.span_of(tensor), sys._getframe(2), None, _is_open(tensor))
        return told

    return interface


# ---- taking in ---------------------------------------------------------------------------------------------


def take_in(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``from_numpy``, ``as_tensor``, ``asarray``, ``frombuffer``, ``from_dlpack``: the tensor lies over memory of
    somebody else's, who may still hold it.
    """
    result = wrapped(*args, **kwargs)
    if type(result) in _memory.PLAIN_TYPES:
        source = args[0] if args else next(iter(kwargs.values()), None)
        if running.depth:
            with _torch.no_torch_function():
                _arrays.note(result, source)
        if not isinstance(source, torch.Tensor) and not _torch.function_mode_active():
            _enter_source(result, source, sys._getframe(1))
    return result


def _enter_source(result: torch.Tensor, source: Any, frame: Any) -> None:
    storage = _memory.storage_of(result)
    if not storage or storage in EXPORTS.by_storage or not _is_open(result):
        return
    shared = EXPORTS.shared(result.untyped_storage(), storage, False)
    if type(source) is bytes:
        return  # nobody can write to it
    numpy = sys.modules.get("numpy")
    array = source if numpy is not None and type(source) is numpy.ndarray else None
    EXPORTS.enter(shared, None, _places.user_instruction(frame), array, source=True)


def from_file(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``from_file``: a shared mapping can be written to by whoever opens the file, a private one by nobody."""
    result = wrapped(*args, **kwargs)
    storage = _memory.storage_of(result) if type(result) in _memory.PLAIN_TYPES else 0
    if storage and not _torch.function_mode_active():
        shared = EXPORTS.shared(result.untyped_storage(), storage, False)
        if kwargs.get("shared", args[1] if len(args) > 1 else False):
            EXPORTS.enter(shared, None, _places.user_instruction(sys._getframe(1)))
    return result


# ---- other processes ---------------------------------------------------------------------------------------


@LEDGER.holds_saves
def share(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A storage goes into shared memory, in place: its address changes, and other processes can write to it."""
    result = wrapped(*args, **kwargs)
    if isinstance(instance, torch.UntypedStorage) and instance.device.type == "cpu":
        storage = _torch.identity_of(instance)
        LEDGER.moved(storage)
        shared = EXPORTS.shared(instance, storage, False)
        if not any(export.for_good for export in shared.exports):
            export = EXPORTS.enter(shared, None, _places.user_instruction(sys._getframe(1)))
            for save in LEDGER.in_storage(storage):
                here = _memory.span_of(save.tensor)
                if here is not None and not save.moved:
                    EXPORTS.keep_proof(save, shared, here, [export])
    return result
