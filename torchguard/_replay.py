"""A checkpoint recomputes with other bytes than it first ran with: does backward get anything else because of them?

Not every tensor that is read matters: the bias of the last layer is read and no gradient depends on it; an embedding
reads the rows that it looks up; a step counter feeds nothing but itself. So while backward recomputes, each call that
gets something changed is first made on a shadow, a copy of the memory that holds the bytes of the forward. What differs
after the call casts a shadow in its turn. What was changed matters once a call's gradient (at random values, there is
none yet) differs from that of the call on the shadow, something that differs from its shadow is saved by a custom
Function, or a number that differs reaches Python.

All of this is paid for only where something that a checkpoint read has changed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchguard import _arrays, _memory, _torch
from torchguard._counts import COUNTS
from torchguard._packing import make_pack
from torchguard._reads import make_unpack
from torchguard._rereads import OutsideReread, Reread
from torchguard._writers import Writer, substituted

#: Calls whose result is about the tensor and not computed from its bytes, or that must not be made twice.
_PASSED_ON = frozenset(
    [
        *("__get__", "__set__", "__repr__", "__hash__", "__format__", "__len__", "__reduce_ex__", "__deepcopy__"),
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "data_ptr"),
        *("untyped_storage", "storage", "is_contiguous", "is_pinned", "is_shared", "get_device", "register_hook"),
        *("register_post_accumulate_grad_hook", "retain_grad", "requires_grad_", "backward", "grad", "share_memory_"),
    ]
)
#: Calls that hand the bytes to somebody who cannot be followed.
_ESCAPES = frozenset({"numpy", "__array__", "__dlpack__", "to_dlpack"})


class _Shadow:
    """A storage as it would be, had nothing been changed."""

    __slots__ = ("blame", "held", "memory")

    def __init__(self, tensor: torch.Tensor, blame: set[Reread]) -> None:
        whole = _over(tensor.untyped_storage(), tensor, torch.uint8, 0, (tensor.untyped_storage().nbytes(),), (1,))
        COUNTS.copies += 1
        self.memory = whole.clone().untyped_storage()
        self.blame = blame
        self.held = tensor.detach()  # its storage's identity is not to be used again meanwhile

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What ``tensor``, which lies in the storage, would be."""
        if tensor.is_neg() or tensor.layout is not torch.strided:
            raise NotImplementedError
        view = _over(
            self.memory, tensor, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        )
        return view.conj() if tensor.is_conj() else view


def _over(
    storage: torch.UntypedStorage,
    like: torch.Tensor,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=like.device).set_(storage, offset, shape, stride)


class _Call:
    """A call that can be made on other tensors than its own."""

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> None:
        self.func = func
        self.args = list(args)
        self.kwargs = kwargs
        self.tensors = tensors
        self.written = [*written, *_written_in_place(func, args, kwargs)]

    def on(self, stand_ins: Mapping[int, torch.Tensor]) -> Any:
        """Its result on other tensors, by the id of the one that each stands for; draws what the call will draw."""
        with _torch.unseen(), _memory.same_random_numbers(self.tensors, [*self.args, *self.kwargs.values()]):
            return self.func(
                *substituted(self.args, stand_ins),
                **{name: substituted(value, stand_ins) for name, value in self.kwargs.items()},
            )

    def gradients(self, values: Mapping[int, torch.Tensor], grown: set[int]) -> list[torch.Tensor | None]:
        """What backward computes for each input, given some gradients of the outputs, always the same.

        Works on copies: a call may write to what its schema does not say (BatchNorm to its statistics).
        """
        written = {id(tensor) for tensor in self.written}
        with torch.enable_grad(), _torch.without_hooks(), _torch.unseen():
            leaves: list[torch.Tensor] = []
            stand_ins = {}
            for tensor in self.tensors:
                value = values[id(tensor)].detach().clone()
                if tensor.requires_grad or _memory.storage_of(tensor) in grown:
                    leaves.append(value.requires_grad_())
                # Nothing is written to a leaf.
                stand_ins[id(tensor)] = value * 1 if id(tensor) in written and value.requires_grad else value
            outputs = [tensor for tensor in _memory.tensors_in(self.on(stand_ins)) if tensor.requires_grad]
            if not outputs:
                return []
            generator = torch.Generator(outputs[0].device).manual_seed(0)
            directions = [
                torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)
                for tensor in outputs
            ]
            return list(torch.autograd.grad(outputs, leaves, directions, allow_unused=True))


def _written_in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """What ``F.relu(x, inplace=True)`` and the like write to."""
    if not inspect.isfunction(func):
        return []
    try:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    return [value for value in list(given.values())[:1] if given.get("inplace") and isinstance(value, torch.Tensor)]


def _same(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        a is b is None or (a is not None and b is not None and _memory.same_bytes(a, b))
        for a, b in zip(one, other, strict=True)
    )


class _Active(threading.local):
    replays: tuple[Replay, ...] = ()


_active = _Active()


def innermost() -> Replay | None:
    """The replay that runs in this thread."""
    return _active.replays[-1] if _active.replays else None


class Replay(TorchFunctionMode):
    """Follows what changed through a recomputation.

    Args:
        changed: what is not as it was, each with a copy of its bytes.
        written_inside: which of them the checkpointed function writes to itself.
        writer_of: tells what a call writes to.

    Attributes:
        guilty: those that backward gets wrong values from.
    """

    def __init__(
        self,
        changed: Iterable[Reread],
        written_inside: set[Reread],
        writer_of: Callable[[Any, Mapping[str, Any]], Writer | None],
    ) -> None:
        super().__init__()
        self.guilty: set[Reread] = set()
        self._written_inside = written_inside
        self._writer_of = writer_of
        self._shadows: dict[int, _Shadow] = {}
        #: What the function makes another tensor of, each time that it runs.
        self._outside: list[OutsideReread] = []
        self._judged = 0  # not 0 while a call is made whose gradient has been compared
        self._inner = 0  # not 0 while a checkpoint inside runs its function without a graph
        #: Storages of what has no graph there, and will have one when that checkpoint recomputes.
        self._grown: set[int] = set()
        with _torch.hidden():
            for entry in changed:
                if isinstance(entry, OutsideReread):
                    self._outside.append(entry)
                    continue
                try:
                    self._cast(entry.tensor, {entry}, entry.proof)
                except Exception:
                    self.guilty.add(entry)

    def __enter__(self) -> Replay:
        inner = _torch.top_hooks() or (make_pack(), make_unpack())

        def pack(tensor: torch.Tensor) -> Any:
            self._see_save(tensor)
            return inner[0](tensor)

        self._pair: _torch.Hooks = (pack, inner[1])
        _torch.push_hooks(self._pair)
        _active.replays += (self,)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _torch.remove_function_mode(self)
        _active.replays = _active.replays[:-1]
        _torch.remove_hooks(self._pair)
        del self._pair
        self._shadows.clear()

    def _cast(self, tensor: torch.Tensor, blame: set[Reread], values: torch.Tensor | None = None) -> None:
        storage = _memory.storage_of(tensor)
        shadow = self._shadows.get(storage)
        if shadow is None:
            shadow = _Shadow(tensor, set())
        view = shadow.of(tensor)
        if values is not None:
            if values.shape != view.shape or values.dtype != view.dtype:
                raise NotImplementedError
            view.copy_(values)
        shadow.blame |= blame
        self._shadows[storage] = shadow

    def _meet_outside(self, tensors: Iterable[torch.Tensor]) -> None:
        """Cast the shadows of those that have been made of an array that changed."""
        for tensor in tensors:
            source = _arrays.source_of(tensor)
            if source is None or _memory.storage_of(tensor) in self._shadows:
                continue
            for entry in self._outside:
                try:
                    if entry.source.is_the_same_as(source):
                        with _torch.hidden():
                            self._cast(tensor, {entry}, entry.proof)
                except Exception:
                    self.guilty.add(entry)

    def _see_save(self, tensor: torch.Tensor) -> None:
        shadow = self._shadows.get(_memory.storage_of(tensor))
        if shadow is not None and not self._judged:
            with _torch.hidden():
                self._compare_with(shadow, tensor)

    def _compare_with(self, shadow: _Shadow, tensor: torch.Tensor) -> None:
        try:
            same = _memory.same_bytes(tensor, shadow.of(tensor))
        except Exception:
            same = False
        if not same:
            self.guilty |= shadow.blame

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not (self._shadows or self._outside) or name in _PASSED_ON:
            return func(*args, **kwargs)
        with _torch.no_torch_function():
            tensors = list(_memory.tensors_in([*args, *kwargs.values()]))
            if self._outside:
                self._meet_outside(tensors)
            shadowed = {_memory.storage_of(tensor) for tensor in tensors} & self._shadows.keys()
        if not self._inner:
            return self._follow(func, args, kwargs, tensors, shadowed, name)
        with _torch.no_torch_function():
            recorded = self._would_record(tensors)
        result = self._follow(func, args, kwargs, tensors, shadowed, name)
        if recorded:
            with _torch.no_torch_function():
                self._grown.update(
                    _memory.storage_of(one)
                    for one in _memory.tensors_in(result)
                    if one.is_floating_point() or one.is_complex()
                )
        return result

    def _follow(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
        shadowed: set[int],
        name: str,
    ) -> Any:
        if not shadowed:
            return func(*args, **kwargs)
        blame = set().union(*(self._shadows[storage].blame for storage in shadowed))
        if name in _ESCAPES:
            self.guilty |= blame
            return func(*args, **kwargs)
        return self._make_twice(func, args, kwargs, tensors, blame)

    @contextmanager
    def inner_checkpoint(self) -> Iterator[None]:
        """A checkpoint inside runs its function without a graph, for a backward that will compute one."""
        self._inner += 1
        try:
            yield
        finally:
            self._inner -= 1
            if not self._inner:
                self._grown.clear()

    def _would_record(self, tensors: Iterable[torch.Tensor]) -> bool:
        return any(tensor.requires_grad or _memory.storage_of(tensor) in self._grown for tensor in tensors)

    def _make_twice(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[torch.Tensor],
        blame: set[Reread],
    ) -> Any:
        writer = self._writer_of(func, kwargs)
        call = _Call(func, args, kwargs, tensors, [] if writer is None else writer.targets(args, kwargs))
        try:
            self.guilty |= self._at_fault(call, blame)
            with _torch.hidden():
                for target in call.written:
                    self._cast(target, blame)
                instead = call.on({id(tensor): self._shadow_of(tensor) for tensor in tensors})
        except Exception:  # what cannot be followed counts as wrong
            self.guilty |= blame
            return func(*args, **kwargs)
        self._judged += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._judged -= 1
        with _torch.hidden():
            self._compare_results(result, instead, blame, {_memory.storage_of(tensor) for tensor in tensors})
        return result

    def _shadow_of(self, tensor: torch.Tensor) -> torch.Tensor:
        shadow = self._shadows.get(_memory.storage_of(tensor))
        return tensor.detach().clone() if shadow is None else shadow.of(tensor)

    def _at_fault(self, call: _Call, blame: set[Reread]) -> set[Reread]:
        """What makes the call's gradient another one than on the shadows."""
        if not (torch.is_grad_enabled() or self._inner) or not self._would_record(call.tensors):
            return set()
        with _torch.hidden():
            here = {id(tensor): tensor.detach() for tensor in call.tensors}
            there = {id(tensor): self._shadow_of(tensor) for tensor in call.tensors}
        found = call.gradients(here, self._grown)
        if _same(found, call.gradients(there, self._grown)):
            return set()
        at_fault: set[Reread] = set()
        shadowed = {_memory.storage_of(tensor) for tensor in call.tensors} & self._shadows.keys()
        if len(shadowed) > 1:  # one at a time
            for storage in shadowed:
                moved = {id(one): there[id(one)] for one in call.tensors if _memory.storage_of(one) == storage}
                if not _same(found, call.gradients(here | moved, self._grown)):
                    at_fault |= self._shadows[storage].blame
        return at_fault or blame

    def _compare_results(self, result: Any, instead: Any, blame: set[Reread], inputs: set[int]) -> None:
        if isinstance(result, torch.Tensor) and isinstance(instead, torch.Tensor):
            storage = _memory.storage_of(result)
            if storage in self._shadows or _memory.same_bytes(result, instead):
                return
            try:
                if storage in inputs:
                    raise NotImplementedError  # another view of something that did not change
                self._cast(result, blame, instead)
            except Exception:
                self.guilty |= blame
        elif isinstance(result, (list, tuple)) and isinstance(instead, (list, tuple)):
            if len(result) != len(instead):
                self.guilty |= blame
            for one, other in zip(result, instead, strict=False):
                self._compare_results(one, other, blame, inputs)
        elif isinstance(result, (bool, int, float, complex)) and repr(result) != repr(instead):
            # A number goes where nobody can follow it. One from a counter that the function itself moves differs at
            # each run, and is its own business.
            self.guilty |= blame - self._written_inside
