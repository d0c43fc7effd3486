"""What does a checkpoint's function read, and is it still that when backward runs the function again?

Note [Recording reads]. What autograd saves does not tell: a bias is read and not saved. A function mode on the stack
while the function first runs sees what each call is given; that costs a microsecond a call, where a dispatch mode takes
ten, turns torch.compile off inside (up to 2.8) and changes which kernels are chosen. But a function mode is traced by
torch.compile, is not asked by TorchScript, and bars nn.MultiheadAttention from its fast path. Where one of these may be
inside, the tensors that the function can reach are taken down instead.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchguard import _arrays, _memory, _places, _policy, _replay, _torch, _verdict
from torchguard._rereads import OutsideReread, Reread, note_write, run_by_a_checkpoint
from torchguard._torch import ref
from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._writers import Writer

#: Tells what a call writes to; the interceptor's, once there is one.
writer_of: Callable[[Any, Mapping[str, Any]], Writer | None] = lambda func, kwargs: None  # noqa: E731

#: These describe a tensor, or give another handle on it: nothing is computed from its bytes. (One that is missing here
#: costs an entry and no false alarm.)
_NO_READ = frozenset(
    [
        *("__get__", "__set__", "__hash__", "__len__", "size", "dim", "ndimension", "stride", "numel", "nelement"),
        *("element_size", "storage_offset", "data_ptr", "is_contiguous", "get_device", "is_floating_point"),
        *("is_complex", "requires_grad_", "register_hook", "detach", "view", "view_as", "t", "transpose", "permute"),
        *("expand", "expand_as", "squeeze", "unsqueeze", "narrow", "chunk", "split", "unbind", "select", "zeros_like"),
        *("ones_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty"),
    ]
)

_FAST_PATHS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder)


class Recomputation:
    """What one checkpoint's function read.

    Attributes:
        entries: an entry for each tensor, in the order in which they were met.
        opaque: whether the function may read what no function mode sees: then changed bytes are enough.
    """

    def __init__(self, arguments: Sequence[Any], needed: Callable[[], bool]) -> None:
        self.entries: list[Reread] = []
        self.opaque = False
        self.written_inside: set[Reread] = set()
        self.guilty: list[Reread] = []
        self._needed = needed
        self._instruction = _places.user_instruction(sys._getframe(1))
        # A tensor that is an argument is saved, and so watched already; what else lies in its storage is not.
        self._arguments = [value for value in arguments if isinstance(value, torch.Tensor)]
        self._known: dict[int, Reread] = {}

    def take_down(self, tensor: torch.Tensor) -> Reread | None:
        """The entry of a tensor that is not of the function's making; None where there is nothing to watch."""
        source = _arrays.source_of(tensor)
        if source is not None:
            return self._take_down_array(tensor, source)
        entry = self._known.get(id(tensor))
        if entry is not None and entry.tensor is tensor:
            return entry
        storage = _memory.storage_of(tensor)
        if not storage or _memory.span_of(tensor) is None or any(tensor is one for one in self._arguments):
            return None
        entry = Reread(tensor, storage, self._instruction, self._needed)
        self._known[id(tensor)] = entry
        self.entries.append(entry)
        return entry

    def _take_down_array(self, tensor: torch.Tensor, source: _arrays.Source) -> Reread:
        for entry in self.entries:
            if isinstance(entry, OutsideReread) and entry.source.is_the_same_as(source):
                entry.storage = _memory.storage_of(tensor)  # of the latest tensor that was made of it
                return entry
        entry = OutsideReread(tensor, source, self._instruction, self._needed)
        self.entries.append(entry)
        return entry

    @contextmanager
    def recorder(self, function: Any, arguments: Any) -> Iterator[None]:
        """Records, as long as it is entered, what is read."""
        with self._recorder(function, arguments):
            with run_by_a_checkpoint():
                yield

    def _recorder(self, function: Any, arguments: Any) -> AbstractContextManager[Any]:
        reached = list(_reached(function))
        # An argument that the function also closes over is read that way, too: not what was saved, but what is there.
        closed_over = {id(item) for item in reached}
        self._arguments = [tensor for tensor in self._arguments if id(tensor) not in closed_over]
        reached += _reached(arguments)
        self.opaque = any(isinstance(item, torch.jit.ScriptModule) or _torch.is_compiled(item) for item in reached)
        if not self.opaque and not any(isinstance(item, _FAST_PATHS) and not item.training for item in reached):
            return _Recorder(self)
        for item in reached:
            if isinstance(item, torch.Tensor):
                entry = self.take_down(item)
                if entry is not None:
                    entry.read = True
        return _Finished(self)

    def finish(self) -> None:
        """The function has run: what it only wrote to it does not need."""
        self.entries = [entry for entry in self.entries if entry.read]
        self._known.clear()
        self._arguments.clear()

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the function again; :meth:`report` what it should not have met."""
        with run_by_a_checkpoint():
            return self._run(function, args, kwargs)

    def _run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.guilty = []
        changed = [entry for entry in self.entries if entry.changed] if _answerable(self.entries) else []
        if not changed:
            return function(*args, **kwargs)
        if self.opaque or not torch.is_grad_enabled():
            self.guilty = changed
            return function(*args, **kwargs)
        known = [entry for entry in changed if entry.proof is not None]
        replay = _replay.Replay(known, self.written_inside, writer_of)
        try:
            with replay:
                return function(*args, **kwargs)
        finally:
            self.guilty = [entry for entry in changed if entry.proof is None or entry in replay.guilty]

    def report(self) -> None:
        """Have the guard answer for what was changed.

        Raises:
            SavedTensorCorruptionError: by the guard in charge.
        """
        error = self._verdict()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    def _verdict(self) -> Exception | None:
        guilty, self.guilty = self.guilty, []
        here = _places.user_instruction(sys._getframe(1))
        reasons = _policy.state.reasons
        try:
            for entry in guilty:
                _, operation, written = ("", "", here) if (seen := entry.remark().writer) is None else seen
                suspect = entry.remark().suspect
                if entry.allowed is not None:
                    reasons.append(entry.allowed)
                try:
                    _verdict.pronounce(
                        entry,
                        "recompute",
                        operation,
                        aliased=None if suspect is None else suspect.instruction,
                        written=written,
                        read=here,
                        elements=_memory.changed_elements(entry.tensor, entry.proof),
                        caught="read",
                    )
                finally:
                    if entry.allowed is not None:
                        reasons.pop()
                entry.accept()
        except (SavedTensorCorruptionError, SavedTensorCorruptionWarning) as error:
            return error.with_traceback(None)
        return None


def _answerable(entries: Sequence[Reread]) -> bool:
    """Whether there is a guard to answer for them: one that is on, or was when they were written to."""
    return _policy.innermost() is not None or any(
        entry.remarks is not None and entry.remarks.guard is not None for entry in entries
    )


class _Finished:
    """Does nothing while the function runs."""

    def __init__(self, recomputation: Recomputation) -> None:
        self._recomputation = recomputation

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None:
        self._recomputation.finish()


class _Recorder(TorchFunctionMode):
    """Sees every call of the function as it runs first."""

    def __init__(self, recomputation: Recomputation) -> None:
        super().__init__()
        self._recomputation = recomputation
        #: Storages of what the calls have made.
        self._made: set[int] = set()
        #: Handles that the calls have made on memory that was there before, by id.
        self._derived: dict[int, ref[torch.Tensor]] = {}
        #: Storages that were there before.
        self._found: set[int] = set()

    def __exit__(self, *error: Any) -> None:
        _torch.remove_function_mode(self)
        self._recomputation.finish()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with _torch.no_torch_function():
            self._look(func, args, kwargs)
        result = func(*args, **kwargs)
        with _torch.no_torch_function():
            for tensor in _memory.tensors_in((result,)):
                storage = _memory.storage_of(tensor)
                if storage not in self._found:
                    self._made.add(storage)
                elif id(tensor) not in self._recomputation._known:
                    self._derived[id(tensor)] = ref(tensor)
        return result

    def _look(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        found: list[Reread] = []
        for tensor in _memory.tensors_in((args, kwargs)):
            storage = _memory.storage_of(tensor)
            if not storage or (storage in self._made and _arrays.source_of(tensor) is None):
                continue
            self._found.add(storage)
            derived = self._derived.get(id(tensor))
            if derived is not None and derived() is tensor:
                found += self._roots_of(storage)
            else:
                entry = self._recomputation.take_down(tensor)
                if entry is not None:
                    found.append(entry)
        if not found:
            return
        writer = writer_of(func, kwargs)
        targets = set() if writer is None else {_memory.storage_of(one) for one in writer.targets(args, kwargs)}
        if writer is not None:
            written = [entry for entry in found if entry.storage in targets]
            self._recomputation.written_inside.update(written)
            note_write(written, writer.title)
        if getattr(func, "__name__", "") not in _NO_READ:
            for entry in found:
                entry.read = entry.read or entry.storage not in targets

    def _roots_of(self, storage: int) -> list[Reread]:
        return [entry for entry in self._recomputation.entries if entry.storage == storage]


# ---- what a function can reach -----------------------------------------------------------------------------------

_MOST = 20_000
_NOTHING_INSIDE = frozenset({type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype})
#: What every module has; the first three are looked into.
_IN_EVERY_MODULE = vars(torch.nn.Module()).keys()


def _reached(start: Any) -> Iterator[Any]:
    """Tensors, modules and functions that a function can get at through what it closes over, is bound to or names."""
    seen: set[int] = set()
    todo = [start]
    while todo and len(seen) < _MOST:
        item = todo.pop()
        kind = type(item)
        if kind in _NOTHING_INSIDE or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, torch.nn.Module):
            yield item
            own = vars(item)
            if isinstance(item, torch.jit.ScriptModule):
                todo += [*item.parameters(), *item.buffers()]
            else:
                todo += _torch.members_of(item)
                todo += [own[name] for name in own.keys() - _IN_EVERY_MODULE]
        elif kind is types.FunctionType:
            yield item
            todo += [item.__defaults__, item.__kwdefaults__, *_named_by(item)]
        elif kind is types.MethodType:
            todo += [item.__self__, item.__func__]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, functools.partial):
            todo += [item.func, item.args, item.keywords]
        elif not isinstance(item, type) and isinstance(getattr(item, "__dict__", None), dict):
            todo += vars(item).values()


def _named_by(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    if not _places.is_library(function.__code__.co_filename):
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]


# ---- where checkpoints pass --------------------------------------------------------------------------------------


def _is_watched() -> bool:
    return _policy.innermost() is not None and not torch.compiler.is_compiling()


class _Recorded:
    """torch's hooks around a checkpoint's function, and the recorder inside them."""

    def __init__(self, hooks: AbstractContextManager[Any], recorder: AbstractContextManager[Any]) -> None:
        self._hooks = hooks
        self._recorder = recorder

    def __enter__(self) -> Any:
        entered = self._hooks.__enter__()
        self._recorder.__enter__()
        return entered

    def __exit__(self, *error: Any) -> Any:
        self._recorder.__exit__(*error)
        return self._hooks.__exit__(*error)


def checkpoint_hook(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_checkpoint_hook(frame)``: a checkpoint's function is about to run first (``use_reentrant=False``)."""
    hooks = original(*args, **kwargs)
    if not _is_watched():
        return hooks
    frame = args[0] if args else kwargs["frame"]
    local = sys._getframe(1).f_locals  # the function and its arguments are known to torch's frame alone
    recomputation = Recomputation(local.get("args", ()), lambda: True)
    function = frame.recompute_fn
    hold = ref(frame)

    def recompute(*args: Any, **kwargs: Any) -> Any:
        return recomputation.run(function, args, kwargs)

    def match(*args: Any) -> None:
        # PyTorch compares what was saved with what is saved now. What it refuses, it refuses in its own words.
        frame: Any = hold()
        type(frame).check_recomputed_tensors_match(frame, *args)
        recomputation.report()

    frame.recompute_fn = recompute
    frame.check_recomputed_tensors_match = match
    return _Recorded(hooks, recomputation.recorder(local.get("fn"), (local.get("args"), local.get("kwargs"))))


def checkpoint_forward(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``CheckpointFunction.forward``: a checkpoint's function is about to run first (``use_reentrant=True``)."""
    ctx, function, *rest = args
    if not _is_watched() or not any(ctx.needs_input_grad):
        return original(*args, **kwargs)
    hold = ref(ctx)

    def needed() -> bool:
        """The node outlives a backward that has let go of its saves."""
        node = hold()
        if node is not None and _torch.keeps_its_saves(node):
            return True
        owner = there()
        if owner is not None:
            owner.entries.clear()
        return False

    recomputation = Recomputation(rest[1:], needed)
    there = ref(recomputation)
    shapes: list[list[torch.Size]] = []

    def run(*args: Any) -> Any:
        if not shapes:
            replay = _replay.innermost()
            inner = nullcontext() if replay is None else replay.inner_checkpoint()
            with recomputation.recorder(function, args), inner:
                result = function(*args)
            shapes.append([tensor.shape for tensor in _memory.tensors_in(result)])
            return result
        result = recomputation.run(function, args, {})
        if [tensor.shape for tensor in _memory.tensors_in(result)] == shapes[0]:  # otherwise PyTorch is about to refuse
            recomputation.report()
        return result

    return original(ctx, run, *rest, **kwargs)
