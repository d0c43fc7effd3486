"""Which memory does a tensor occupy, what is in it, and which version counter does it move?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from torchguard import _torch
from torchguard._counts import COUNTS
from torchguard._model import Span

#: Types whose attributes can be read without calling user code.
PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})

#: Reading a tensor that has no memory of its own (sparse, fake, a functorch wrapper, ...) raises one of
#: these.
NO_MEMORY = (RuntimeError, NotImplementedError, TypeError, AttributeError)

#: Taken before anything is patched: what the guard writes is not to be judged.
_copy = torch.Tensor.copy_
_set = torch.Tensor.set_
_get_data: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_set_data: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_EMPTY = torch.empty(0)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors anywhere in a value's lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage, shared by all its views; 0 where it has none."""
    try:
        return _torch.storage_id(_torch.behind(tensor))
    except NO_MEMORY:
        return 0


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a span (see :func:`span_of`); asked with user code kept out."""
    try:
        return tensor.layout is torch.strided and not tensor.is_nested and _torch.storage_address(tensor) != 0
    except NO_MEMORY:
        return False


def span_of(tensor: torch.Tensor) -> Span | None:
    """The memory of a strided tensor; None where it has none to write to (meta, fake, sparse, ...)."""
    try:
        tensor = _torch.behind(tensor)
        if type(tensor) in PLAIN_TYPES and not _torch.function_mode_active():
            return _span(tensor)
        with _torch.no_torch_function():
            return _span(tensor)
    except NO_MEMORY:
        return None


def _span(tensor: torch.Tensor) -> Span | None:
    base = _torch.storage_address(tensor)
    if base == 0 or tensor.layout is not torch.strided or tensor.is_nested:
        return None
    itemsize = tensor.element_size()
    return Span(
        str(tensor.device),
        base + int(tensor.storage_offset()) * itemsize,
        itemsize,
        tuple(tensor.shape),
        tuple([stride * itemsize for stride in tensor.stride()]),
    )


def is_empty(tensor: torch.Tensor) -> bool:
    """Whether it is a strided tensor without an element: nobody can change what it holds."""
    return (
        not tensor.is_nested and tensor.layout is torch.strided and tensor.device.type != "meta" and not tensor.numel()
    )


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version, or -1 where it keeps none (a tensor made in inference mode)."""
    try:
        with _torch.no_torch_function():
            return tensor._version
    except RuntimeError:
        return -1


def has_moved(tensor: torch.Tensor, version: int) -> bool:
    """Whether PyTorch would refuse a save of ``tensor`` at ``version``; what keeps none now it does not compare."""
    return version_of(tensor) not in (version, -1)


def shares_counter(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a tracked write to ``a`` would move the version of ``b``.

    Proven without touching anything where that is possible; otherwise the counter of ``a`` is bumped and put
    back. A write to a wrapper of torch.func moves its counter and that of each tensor inside it.
    """
    if a is b:
        return True
    if _torch.is_wrapper(a):
        return any(_shares_counter(level, b) for level in _torch.levels_of(a))
    return _shares_counter(a, b)


def _shares_counter(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    version = version_of(a)
    if version < 0 or version != version_of(b):
        return False
    with _torch.no_torch_function():
        base_a, base_b = a._base, b._base
        if base_a is b or base_b is a or (base_a is not None and base_a is base_b):
            return True
        if not _torch.CAN_PROBE_COUNTERS:
            return True  # equal versions are all there is to go by: better silent than wrong
        torch.autograd.graph.increment_version(a)
        shared = b._version != version
        _torch.set_version(a, version)
        return shared


def counter_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares the version counter of ``tensor`` and no memory."""
    if not torch.is_grad_enabled() and type(tensor) in PLAIN_TYPES and not _torch.any_mode_active():
        counter = tensor.detach()  # nobody sees it
        try:
            _set_data(counter, _EMPTY)
            return counter
        except RuntimeError:
            pass
    with _torch.hidden():
        counter = tensor.detach()
        # A quantised tensor takes the memory of its like only.
        _set_data(counter, torch.empty_quantized([0], tensor) if tensor.is_quantized else _EMPTY)
    return counter


def with_counter(counter: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A tensor that shares the version counter of one tensor and the memory of another."""
    with _torch.hidden():
        tensor = counter.detach()
        _set_data(tensor, memory)
    return tensor


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one that the tensor reaches."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _stretch(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from the tensor's first to its last element, gaps included, as one contiguous dimension."""
    tensor = _torch.behind(tensor)
    tensor = _torch.as_lazy_as(tensor, tensor)  # as it lies there, neither conjugated nor negated
    return tensor.detach().as_strided((_extent(tensor),), (1,))


def contents_of(tensor: torch.Tensor) -> torch.Tensor:
    """What the elements hold, in row-major order, as uint8; what is conjugated or negated lazily is so by then."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return as_bytes(tensor.resolve_conj().resolve_neg().contiguous())


def strided_parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that hold what one of any layout holds; none where there are no bytes to read."""
    tensor = _torch.behind(tensor)
    if span_of(tensor) is not None:
        return [tensor] if readable(tensor) else []
    try:
        with _torch.hidden():
            found = _torch.inner_tensors(tensor)
    except NO_MEMORY:
        return []
    return [part for inner in found for part in strided_parts_of(inner)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as uint8."""
    # A single element is contiguous whatever its stride, and is viewed as bytes only if that is 1.
    return tensor.detach().reshape(-1).as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def replicas_of(written: Iterable[torch.Tensor], read: Iterable[torch.Tensor] = ()) -> dict[int, torch.Tensor]:
    """For each tensor, by its id, one of the same layout over a copy of its memory.

    What shares memory shares the copy, so a call that reads in one argument what it writes in another finds its own
    writes. Tensors that are read from memory that nothing writes to are left out.
    """
    groups: dict[int, list[torch.Tensor]] = {}
    for tensor in written:
        groups.setdefault(_torch.storage_id(_torch.behind(tensor)), []).append(tensor)
    for tensor in read:
        group = groups.get(storage_of(tensor))
        if group is not None:
            group.append(tensor)
    replicas = {}
    for group in groups.values():
        inner = [_torch.behind(tensor) for tensor in group]
        reaches = [_reach_in_storage(tensor) for tensor in inner]
        low = min(reach.start for reach in reaches) // _ALIGNMENT * _ALIGNMENT
        high = max(reach.stop for reach in reaches)
        storage = inner[0].untyped_storage()
        COUNTS.copies += 1
        memory = over(storage, torch.uint8, low, (high - low,), (1,)).clone().untyped_storage()
        for given, tensor, reach in zip(group, inner, reaches, strict=True):
            offset = (reach.start - low) // tensor.element_size()
            replica = over(memory, tensor.dtype, offset, tensor.shape, tensor.stride())
            replicas[id(given)] = _torch.wrapped_like(given, _torch.as_lazy_as(tensor, replica))
    return replicas


def can_be_copied(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a copy (see :func:`replicas_of`) would be such a tensor as each of these is."""
    with _torch.no_torch_function():
        return not any(tensor.is_quantized or _torch.parts_of(tensor) for tensor in tensors)


#: No element type is wider.
_ALIGNMENT = 16


def _reach_in_storage(tensor: torch.Tensor) -> range:
    """The bytes from the tensor's first to its last element, counted from the beginning of its storage."""
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    return range(start, start + _extent(tensor) * itemsize)


def stretch_in_storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First and one past the last byte that the tensor reaches, counted from the beginning of its storage; None where
    that cannot be told.
    """
    try:
        with _torch.no_torch_function():
            tensor = _torch.behind(tensor)
            if tensor.layout is not torch.strided or tensor.is_nested:
                return None
            reach = _reach_in_storage(tensor)
            return reach.start, reach.stop
    except NO_MEMORY:
        return None


def end_in_storage(tensor: torch.Tensor) -> int:
    """How many bytes a storage must have at least for the tensor's elements to lie in it."""
    return _reach_in_storage(tensor).stop if tensor.numel() else 0


def over(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """A tensor over a part of a storage, with a version counter of its own."""
    return _set(torch.empty(0, dtype=dtype, device=storage.device), storage, offset, shape, stride)


def outside_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    """One like a tensor that was made in inference mode, over the same memory, that keeps a version counter."""
    if tensor.layout is not torch.strided:
        return tensor
    with _torch.hidden():
        like = over(tensor.untyped_storage(), tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())
        return _torch.as_lazy_as(tensor, like)


def overwrite(tensor: torch.Tensor, replica: torch.Tensor) -> None:
    """Put what a replica holds into the tensor's elements; no version counter of the tensor moves."""
    target, source = _get_data(_torch.behind(tensor)), _torch.behind(replica)
    if 0 in target.stride():  # elements that lie over each other: torch copies memory, and not elements, into them
        target, source = _stretch(target), _stretch(source)
    _copy(target, source)


@contextmanager
def same_random_numbers(targets: Iterable[torch.Tensor], given: Iterable[Any]) -> Iterator[None]:
    """Put the random number generators that a call on ``targets`` draws from back to where they were: torch's own, and
    those among what it is ``given``.
    """
    devices = {target.device for target in targets}
    put_back: list[Callable[[], Any]] = []
    # One at a time: torch asks for a generator's lock while it holds the interpreter's, and another thread that
    # is asking for the state may hold the generator's and wait for the interpreter's.
    with _asking_for_states, _torch.hidden():
        if devices:
            put_back.append(partial(torch.set_rng_state, torch.get_rng_state()))
            put_back += [
                partial(generator.set_state, generator.get_state())
                for generator in given
                if isinstance(generator, torch.Generator)
            ]
        put_back += [
            partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
            for device in devices
            if device.type == "cuda"
        ]
    try:
        yield
    finally:
        with _asking_for_states, _torch.hidden():
            for restore in put_back:
                restore()


_asking_for_states = threading.Lock()

#: A mask of so many bytes is looked through as quickly as its ends are found.
_SHORT = 1 << 10


def changed_bytes(tensor: torch.Tensor, replica: torch.Tensor) -> torch.Tensor:
    """Which bytes of the tensor's memory (from first to last element) differ in ``replica``, as a mask."""
    return as_bytes(_stretch(tensor)) != as_bytes(_stretch(replica))


def trimmed(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The mask from its first to its last byte that is set, and how many come before."""
    if mask.numel() <= _SHORT:
        return mask, 0
    found = mask.nonzero()
    if not len(found):
        return mask[:0], 0
    first, last = int(found[0]), int(found[-1])
    return mask[first : last + 1], first


def touched_elements(mask: torch.Tensor, address: int, span: Span) -> int:
    """How many elements of ``span`` have a byte that is set in ``mask``, whose first byte lies at
    ``address``.
    """
    low, high = span.bounds
    start, end = max(low, address), min(high, address + mask.numel())
    if start >= end:
        return 0
    window = torch.zeros(high - low, dtype=torch.bool, device=mask.device)
    window[start - low : end - low] = mask[start - address : end - address]
    elements = window.as_strided((*span.sizes, span.itemsize), (*span.strides, 1))
    return int(elements.any(-1).sum())


#: An integer type of the same size: what is equal as integers has the same bits.
_WORDS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.complex64: torch.int64,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits (NaNs and signs of zero count)."""
    word = _WORDS.get(a.dtype) if type(a) in PLAIN_TYPES and not _torch.any_mode_active() else None
    if word is not None and not (a.is_conj() or a.is_neg() or b.is_conj() or b.is_neg()):
        # The same, at a third of the time: audit() asks at every read.
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        with torch.no_grad():
            return bool(torch.equal(a.detach().view(word), b.view(word)))
    with _torch.hidden():
        a, b = _torch.behind(a), _torch.behind(b)
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return bool(torch.equal(contents_of(a), contents_of(b)))


def same_parts(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether two tensors, given by what they are made of, hold the same bits."""
    return len(a) == len(b) and all(same_bytes(one, other) for one, other in zip(a, b, strict=True))


def differing_elements(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which elements of two tensors of one dtype and shape differ in a bit, as a mask in row-major order."""
    a, b = contents_of(tensor), contents_of(other)
    return (a != b).view(tensor.numel(), -1).any(-1) if tensor.numel() else torch.zeros(0, dtype=torch.bool)


def any_within(tensor: torch.Tensor, elements: torch.Tensor, span: Span) -> bool:
    """Whether any of the tensor's elements that the mask picks shares a byte with ``span``."""
    here = span_of(tensor)
    if here is None:
        return False
    low = here.bounds[0]
    picked = elements.view(tensor.shape)
    mask = torch.zeros(_extent(tensor), dtype=torch.bool, device=tensor.device)
    offsets = torch.arange(_extent(tensor), device=tensor.device).as_strided(tensor.shape, tensor.stride())
    mask[offsets[picked]] = True  # by offsets, because elements of an expanded tensor lie over each other
    return touched_elements(mask.repeat_interleave(tensor.element_size()), low, span) > 0


def readable(tensor: torch.Tensor) -> bool:
    """Whether the tensor's storage (still) reaches as far as its elements do."""
    try:
        with _torch.no_torch_function():
            tensor = _torch.behind(tensor)
            last = int(tensor.storage_offset()) + _extent(tensor)
            return not tensor.numel() or last * tensor.element_size() <= tensor.untyped_storage().nbytes()
    except NO_MEMORY:
        return False


def changed_elements(tensor: torch.Tensor, proof: torch.Tensor | None) -> int:
    """How many elements differ from the proof; all of them where there is none."""
    tensor = _torch.behind(tensor)
    if proof is None or proof.shape != tensor.shape or proof.dtype != tensor.dtype or not readable(tensor):
        return tensor.numel()
    with _torch.hidden():
        return int(differing_elements(tensor, proof).sum())


def largest_difference(tensor: torch.Tensor, proof: torch.Tensor) -> float | None:
    """By how much the elements differ at most from those of the proof (for complex ones: the distance).

    NaN where one of a pair of differing elements is; None where the two cannot be compared.
    """
    tensor = _torch.behind(tensor)
    if proof.shape != tensor.shape or proof.dtype != tensor.dtype or not readable(tensor):
        return None
    try:
        with _torch.hidden():
            differs = differing_elements(tensor, proof)
            now, before = tensor.reshape(-1)[differs], proof.reshape(-1)[differs]
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            difference = now.to(wide) - before.to(wide)
            difference[now == before] = 0  # infinities, and signs of zero
            return float(difference.abs().max()) if difference.numel() else 0.0
    except NO_MEMORY:  # an element type that knows no arithmetic
        return None


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """dtype, shape and device of a tensor in the words of a report."""
    with _torch.no_torch_function():
        tensor = _torch.behind(tensor)
        return {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": () if _torch.is_flat_nested(tensor) else tuple(tensor.shape),
            "device": str(tensor.device),
        }
