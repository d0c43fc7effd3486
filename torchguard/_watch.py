"""How does ``watch()`` make PyTorch's own check complete, without save hooks?

Two things blind the check: an alias made by ``.data`` has a version counter of its own, and some writers move none. So
while a guard watches, ``x.data`` is an alias that shares the counter of ``x``, as ``x.detach()`` is (measured: the
counter is all they differ by, but for tracing and torch.func.vmap), and writers that move no counter have theirs moved
for them. What that makes PyTorch refuse, ``_explain`` puts into a report.

Note [Who keeps the plain alias]. ``gradcheck`` perturbs what is saved and puts it back, FSDP frees and refills it,
an ``allow`` block means to write, and ``torch.jit.trace`` records ``detach()`` where it records nothing of ``.data``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from torchguard import _collectives, _counterless, _explain, _memory, _places, _policy, _torch, _writers, _writes
from torchguard._patching import (
    ROUTED_METHODS,
    Patch,
    Routed,
    keep_from_the_compiler,
    lock,
    scripted,
    surely,
    without_collections,
)
from torchguard._saves import LEDGER, Save
from torchguard._torch import ref
from torchguard._traces import TRACES, Written
from torchguard._writers import Writer

#: Not empty while a guard watches.
watching: list[None] = []

#: Not empty while some thread is in an ``allow`` block or traces a graph: then it may be this one.
aside: list[object] = []

#: Code that takes ``.data`` in order to get round the version check, and puts back or fills again what it changes.
_PLAIN_FOR = ("/autograd/gradcheck.py", "\\autograd\\gradcheck.py")

_original: Any = torch.Tensor.data
_get: Callable[[torch.Tensor], torch.Tensor] = _original.__get__
_set: Callable[[torch.Tensor, Any], None] = _original.__set__
_detach: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
_storage: Callable[[torch.Tensor], torch.UntypedStorage] = torch.Tensor.untyped_storage
_NO_DATA = (RuntimeError, NotImplementedError, TypeError, AttributeError)


# ---- x.data ------------------------------------------------------------------------------------------------


def _references_to_a_gradient() -> int:
    """What ``sys.getrefcount`` says in a descriptor of a tensor that only another tensor, and no Python, holds.

    ``p.grad.data`` makes a new trace at every step, of a tensor that nobody has a name for: it is not worth one.
    """

    class Probe:
        def __get__(self, tensor: Any, owner: Any = None) -> int:
            return sys.getrefcount(tensor)

    class Probed(torch.Tensor):
        references = Probe()

    with _torch.unseen():
        holder = torch.ones(1, device="cpu", requires_grad=True)
        holder.grad = torch.ones(1, device="cpu").as_subclass(Probed)
        gradient: Any = holder
        return int(gradient.grad.references)


def _make_attribute() -> Any:
    """The descriptor in the place of ``torch.Tensor.data``; all it uses is bound to local names."""
    original, get, detach = _original, _get, _detach
    plain = _memory.PLAIN_TYPES
    mode_active = _torch.function_mode_active
    traces = TRACES.by_tensor
    getframe = sys._getframe
    transform = _torch.innermost_transform
    references = sys.getrefcount
    of_a_gradient = _references_to_a_gradient()
    own = _places.inside_library.get
    holders = _torch.holders
    storage_id, no_memory = _torch.storage_id, _memory.NO_MEMORY

    class Data:
        """``x.data``, sharing the counter of ``x``."""

        __slots__ = ()

        def __get__(self, tensor: Any, owner: Any = None) -> Any:
            frame = getframe(1)
            if aside or mode_active() or transform() is not None:
                return original if tensor is None else _unusual(tensor, frame)
            trace = traces.get(id(tensor))
            if trace is not None:
                site = trace.get(id(frame.f_code) + frame.f_lasti)
                if site is not None:
                    if type(tensor) in plain:
                        site.latest = tensor._version
                    return detach(tensor)
            if tensor is None:
                return original
            if type(tensor) not in plain:
                return _unusual(tensor, frame)
            try:
                has_storage = storage_id(tensor) != 0
            except no_memory:  # a wrapper of torch.func's, sparse, opaque
                has_storage = False
            if not has_storage:
                return _unusual(tensor, frame)
            if (
                references(tensor) <= of_a_gradient
                and not tensor.requires_grad
                and tensor.grad_fn is None
                and holders(tensor) > 1
                and own(frame.f_code.co_filename) is False
            ):
                return detach(tensor)  # of a new gradient
            return detach(tensor) if _take_down(tensor, frame) else get(tensor)

        def __set__(self, tensor: Any, value: Any) -> None:
            rebind(tensor, value, getframe(1))

        def __delete__(self, tensor: Any) -> None:
            original.__delete__(tensor)

    return Data()


def alias_of(tensor: torch.Tensor, frame: Any) -> tuple[Any, bool]:
    """What ``tensor.data``, asked for in ``frame``, is while a guard watches; and whether it shares the counter."""
    alias = _unusual(tensor, frame)
    return alias, isinstance(alias, torch.Tensor) and _memory.version_of(alias) >= 0 and _shares(alias, tensor)


def _shares(alias: torch.Tensor, tensor: torch.Tensor) -> bool:
    try:
        return _memory.shares_counter(alias, tensor)
    except _NO_DATA:
        return False


def _take_down(tensor: torch.Tensor, frame: Any) -> bool:
    """Remember where an alias is taken; False if it is to be a plain one. See Note [Who keeps the plain alias]."""
    code = frame.f_code
    filename = code.co_filename
    if not _places.is_library(filename):
        TRACES.take_down(tensor, (code, frame.f_lasti))
        return True
    if filename.endswith(_PLAIN_FOR) or _writes.is_refill(frame):
        return False
    TRACES.take_down(tensor, _places.user_instruction(frame))
    return True


def _unusual(tensor: torch.Tensor, frame: Any) -> Any:
    """The same for what is no plain tensor, or where somebody looks on: they see ``.data``, as ever."""
    plain = _get(tensor)
    if not isinstance(plain, torch.Tensor) or (aside and (_policy.state.reasons or _torch.is_tracing())):
        return plain
    with _torch.no_torch_function():
        try:
            if _torch.is_simulated(plain) or _is_tracked_within(tensor) or not _take_down(tensor, frame):
                return plain
            if _torch.is_wrapper(tensor):
                alias = _detach(tensor)
            else:
                with _torch.no_transforms():  # that are on would wrap it
                    alias = _detach(tensor)
            if plain._base is not None and type(alias) is not type(plain):
                alias = alias.as_subclass(type(plain))  # as torch makes it: a view of a plain alias
            if _looks_like(alias, plain):
                if plain.__dict__ and not alias.__dict__:
                    alias.__dict__.update(plain.__dict__)
                return alias
        except _NO_DATA:
            pass
    return plain


def _is_tracked_within(tensor: torch.Tensor) -> bool:
    """Whether it is a wrapper of torch.func's around what is differentiated too: ``.data`` leaves that as it is, where
    ``detach()`` takes it out of all graphs at once.
    """
    return any(level.requires_grad or _torch.is_grad_wrapper(level) for level in list(_torch.levels_of(tensor))[1:])


def _looks_like(alias: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether the one can stand for the other."""
    return (
        type(alias) is type(plain)
        and alias.shape == plain.shape
        and alias.dtype == plain.dtype
        and alias.requires_grad == plain.requires_grad
        and (alias._base is None) == (plain._base is None)
        and (_memory.storage_of(alias) == _memory.storage_of(plain) or not _memory.has_memory(plain))
    )


# ---- x.data = y --------------------------------------------------------------------------------------------


def rebind(tensor: Any, value: Any, frame: Any = None) -> None:
    """``tensor.data = value``; where autograd may have saved ``tensor`` itself, its counter moves.

    What autograd saved as an input it holds as the very object, and that shows in the number of its holders. (An output
    is saved as an alias, which stays where it was.) Memory that is given up (an empty value), or taken up again, is not
    compared: sharding and offloading do that to every parameter between forward and backward.
    """
    moves = _may_be_saved(tensor, value) and not (aside and _policy.state.reasons)
    # Pointed at what inference mode made, the tensor keeps its counter, but torch does not move that any more.
    counters = [tensor, _memory.counter_of(tensor)] if moves and value.is_inference() else [tensor]
    left = None
    if moves:
        with suppress(*_NO_DATA):  # a wrapper of torch.func's has no storage, nor has a sparse tensor
            left = _torch.weak_storage(tensor)
    _set(tensor, value)
    if moves:
        frame = frame or sys._getframe(1)
        if not (_writes.is_refill(frame) or frame.f_code.co_filename.endswith(_PLAIN_FOR)):
            move(counters)
            TRACES.writes.append(Written("x.data = y", _places.user_instruction(frame), [tensor], left=left))


def _may_be_saved(tensor: Any, value: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or not isinstance(value, torch.Tensor) or _torch.is_simulated(tensor):
        return False
    with _torch.no_torch_function():
        try:
            if _torch.holders(tensor) < 2 or not tensor.numel() or not value.numel():
                return False
            if _storage(tensor).nbytes() == 0 or _storage(value).nbytes() == 0:
                return False
            if tensor.stride() == value.stride() and tensor.data_ptr() == value.data_ptr():
                return tensor.shape != value.shape or tensor.dtype != value.dtype
            return not _memory.same_bytes(tensor, value)
        except _NO_DATA:
            return True


# ---- counters ----------------------------------------------------------------------------------------------


@LEDGER.holds_saves
def move(tensors: Iterable[torch.Tensor]) -> None:
    """Move the version counters of tensors that have been written to.

    What a ``strict()`` that is on as well has saved, it judges itself, and more exactly: there the move is expected.
    """
    moved = [tensor for tensor in tensors if not _torch.is_simulated(tensor)]
    judged: list[Save] = []
    if LEDGER.any_alive():
        for tensor in moved:
            storage = _memory.storage_of(tensor)
            near = _writes.saves_near(tensor, storage) if storage else []
            judged += [save for save in near if type(save) is Save and not save.moved]
    for tensor in moved:
        with suppress(RuntimeError):  # it keeps no version: made in inference mode
            torch.autograd.graph.increment_version(tensor)
    for save in judged:
        save.version = _memory.version_of(save.tensor)
    judged.clear()


def _wrote(title: str, tensors: Sequence[torch.Tensor], frame: Any) -> None:
    if tensors and not (aside and _policy.state.reasons):
        move(tensors)
        TRACES.writes.append(Written(title, _places.user_instruction(frame), tensors))


# ---- writers that move no counter ----------------------------------------------------------------------------

#: These save what they write to: their counter has moved before the call, or backward would refuse the call's own save.
_SAVE_WHAT_THEY_WRITE = frozenset({"rrelu_with_noise", "rrelu_with_noise_"})

#: Written to only if this keyword is given.
_IF_GIVEN = {"grads": "grad_scale"}

Route = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]


class _Below:
    """What a patch of ours lies over: torch's own function, or what another guard has put there."""

    patch: Patch | None = None

    def call(self, wrapped: Any, instance: Any = None) -> Any:
        below: Any = None if self.patch is None else self.patch.below
        if not isinstance(below, Routed) and not isinstance(below, ROUTED_METHODS):
            return wrapped
        return below if instance is None else below.__get__(instance, type(instance))


def _patch_over(owner: Any, name: str, function: Any, make: Callable[[_Below], Route]) -> Patch:
    below = _Below()
    patch = Patch(owner, name, Routed(function, make(below)), rank=1)
    below.patch = patch
    return patch


def _route(writer: Writer, is_method: bool) -> Callable[[_Below], Route]:
    entries = [entry for entry in writer.written if entry[1] in writer.uncounted]

    def written(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        given = tuple(entry for entry in entries if kwargs.get(_IF_GIVEN.get(entry[1], ""), writer) is not None)
        return replace(writer, written=given).targets(args, kwargs)

    def make(below: _Below) -> Route:
        def route(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = instance if is_method else None
            call = below.call(wrapped, given)
            if torch.compiler.is_compiling():
                return call(*args, **kwargs)
            targets = written(args if given is None else (given, *args), kwargs)
            if writer.name in _SAVE_WHAT_THEY_WRITE:
                _wrote(writer.title, targets, sys._getframe(1))
                return call(*args, **kwargs)
            if writer.calls_back:  # a function of the user's may stop it half-way
                try:
                    return call(*args, **kwargs)
                finally:
                    _wrote(writer.title, targets, sys._getframe(1))
            result = call(*args, **kwargs)
            _wrote(writer.title, targets, sys._getframe(1))
            return result

        return route

    return make


# ---- running statistics --------------------------------------------------------------------------------------


class _Evaluation:
    """Lives as long as the node of an evaluation of batch normalisation, which needs the running statistics."""

    __slots__ = ("__weakref__",)


#: Those that live, by the storage of the statistics.
_evaluations: dict[int, list[ref[_Evaluation]]] = {}
_TRAINING = 5


def _route_statistics(writer: Writer) -> Callable[[_Below], Route]:
    """Running statistics are saved in training as well, where backward makes nothing of them: were their counter always
    moved, two forward passes before one backward would be refused. It moves where an evaluation waits for its backward.
    """
    says_whether_it_trains = any(
        argument.name == "training" for schema in _torch.schemas_of(writer.name) for argument in schema.arguments
    )

    def make(below: _Below) -> Route:
        def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = below.call(wrapped)
            trains = args[_TRAINING] if len(args) > _TRAINING else kwargs.get("training")
            if trains or not says_whether_it_trains:
                if _evaluations and not torch.compiler.is_compiling():
                    needed = [tensor for tensor in writer.targets(args, kwargs) if _is_needed(tensor)]
                    _wrote(writer.title, needed, sys._getframe(1))  # first: the call saves them, too
                return call(*args, **kwargs)
            result = call(*args, **kwargs)
            if torch.is_grad_enabled() and _torch.evaluates(result):
                _enter_evaluation(result, writer.targets(args, kwargs))
            return result

        return route

    return make


def _enter_evaluation(result: Any, statistics: Iterable[torch.Tensor]) -> None:
    first = result[0] if isinstance(result, (list, tuple)) else result
    evaluation = _Evaluation()
    _torch.live_with_node(first.grad_fn, evaluation)
    hold = ref(evaluation)
    for tensor in statistics:
        storage = _memory.storage_of(tensor)
        if storage:
            alive = [other for other in _evaluations.get(storage, ()) if other() is not None]
            _evaluations[storage] = [*alive, hold]


def _is_needed(statistics: torch.Tensor) -> bool:
    storage = _memory.storage_of(statistics)
    holds = _evaluations.get(storage)
    if holds is None:
        return False
    alive = [hold for hold in holds if hold() is not None]
    if not alive:
        _evaluations.pop(storage, None)
    return bool(alive)


# ---- collectives ---------------------------------------------------------------------------------------------


def _route_collective(title: str, keywords: Sequence[str]) -> Callable[[_Below], Route]:
    def make(below: _Below) -> Route:
        def route(wrapped: Any, group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = below.call(wrapped, group)(*args, **kwargs)
            rest = args if group is not None else args[1:]
            given = rest[0] if rest else next((kwargs[keyword] for keyword in keywords if keyword in kwargs), None)
            frame = sys._getframe(1)
            if not _writes.is_refill(frame):
                _wrote(title, list(_memory.tensors_in(given)), frame)
            return result

        return route

    return make


# ---- storages ------------------------------------------------------------------------------------------------


class _Counters:
    """The version counters of the tensors that a storage was asked of: it has none of its own."""

    def __init__(self, storage: Any) -> None:
        self.hold: Any = ref(storage, self._died)
        self.key = _torch.identity_of(storage)
        self.counters: list[torch.Tensor] = []
        self.latest: Any = None  # a weak hold on the tensor that was asked last

    def _died(self, _: Any) -> None:
        if _counters.get(self.key) is self:
            del _counters[self.key]


_counters: dict[int, _Counters] = {}


def _hand_out_storage(below: _Below) -> Route:
    def route(wrapped: Any, tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        storage = below.call(wrapped, tensor)(*args, **kwargs)
        if tensor is None:
            tensor = args[0] if args else None
        if isinstance(tensor, torch.Tensor) and not (torch.compiler.is_compiling() or _torch.is_simulated(tensor)):
            with suppress(*_NO_DATA):
                _enter_counter(tensor, storage)
        return storage

    return route


def _enter_counter(tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    if _memory.version_of(tensor) < 0:
        return
    key = _torch.identity_of(storage)
    entry = _counters.get(key)
    if entry is None or entry.hold() is not storage:
        entry = _counters[key] = _Counters(storage)
    if entry.latest is not None and entry.latest() is tensor:
        return
    entry.latest = ref(tensor)
    if not any(_memory.shares_counter(counter, tensor) for counter in entry.counters):
        entry.counters.append(_memory.counter_of(tensor))


def _route_storage(title: str) -> Callable[[_Below], Route]:
    def make(below: _Below) -> Route:
        def route(wrapped: Any, storage: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = below.call(wrapped, storage)(*args, **kwargs)
            _wrote_storage(title, storage if storage is not None else args[0], sys._getframe(1))
            return result

        return route

    return make


def _wrote_storage(title: str, storage: Any, frame: Any) -> None:
    untyped: Any = _torch.untyped(storage)
    if not isinstance(untyped, torch.UntypedStorage):
        return
    entry = _counters.get(_torch.identity_of(untyped))
    if entry is None or entry.hold() is not untyped or (aside and _policy.state.reasons) or _writes.is_refill(frame):
        return
    with suppress(*_NO_DATA):
        # A tensor over the storage that shares the counter: what strict() knows of is found by its memory.
        over = _over(untyped)
        tensors = [_memory.with_counter(counter, over) for counter in entry.counters]
        move(tensors)
        TRACES.writes.append(Written(title, _places.user_instruction(frame), tensors, storage=entry.hold))


def _over(storage: torch.UntypedStorage) -> torch.Tensor:
    with _torch.hidden():
        return _memory.over(storage, torch.uint8, 0, (storage.nbytes(),), (1,))


# ---- the patches ---------------------------------------------------------------------------------------------


def _swap_tensors(below: _Below) -> Route:
    """``torch.utils.swap_tensors`` refuses tensors that have weak references."""

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in _memory.tensors_in([*args, *kwargs.values()]):
            TRACES.forget(tensor)
            for entry in list(_counters.values()):
                if entry.latest is not None and entry.latest() is tensor:
                    entry.latest = None
        return below.call(wrapped)(*args, **kwargs)

    return route


def _trace(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A graph is traced: see Note [Who keeps the plain alias]."""
    aside.append(wrapped)
    try:
        return wrapped(*args, **kwargs)
    finally:
        aside.pop()


def _take_dlpack(below: _Below) -> Route:
    """``from_dlpack(x)`` of a tensor makes an alias on a storage of its own; it gets the counter of ``x``."""

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = below.call(wrapped)(*args, **kwargs)
        source: Any = args[0] if args else kwargs.get("ext_tensor")
        plain = _memory.PLAIN_TYPES
        if type(source) in plain and type(result) in plain and not (aside and _policy.state.reasons):
            with suppress(*_NO_DATA):
                if _memory.version_of(source) >= 0 and result.data_ptr() == source.data_ptr():
                    TRACES.take_down(source, _places.user_instruction(sys._getframe(1)))
                    return _memory.with_counter(source, result)
        return result

    return route


def _prepare() -> list[Patch]:
    patches = []
    for owner, namespace in (
        (torch.Tensor, torch.Tensor),
        (torch, torch),
        (_torch.NN, _torch.NN),
        (_torch.VF, _torch.VARIABLE_FUNCTIONS),
    ):
        for name, (function, writer) in _writers.writers_in(namespace, _counterless.UNCOUNTED).items():
            make = _route_statistics(writer) if writer.keeps_statistics else _route(writer, owner is torch.Tensor)
            patches.append(_patch_over(owner, name, function, make))
    for owner in _torch.PROCESS_GROUPS:
        patches += [
            _patch_over(owner, name, vars(owner)[name], _route_collective(title, keywords))
            for name, (title, keywords) in _collectives.METHODS.items()
            if name in vars(owner)
        ]
    storage = torch.UntypedStorage
    for name, title in _torch.STORAGE_WRITERS.items():
        patches.append(_patch_over(storage, name, getattr(storage, name), _route_storage(title)))
    typed = torch.TypedStorage
    for name in _torch.TYPED_STORAGE_WRITERS:
        patches.append(_patch_over(typed, name, getattr(typed, name), _route_storage("storage[i] = v")))
    patches.append(_patch_over(torch.Tensor, "untyped_storage", torch.Tensor.untyped_storage, _hand_out_storage))
    patches.append(_patch_over(torch.utils, "swap_tensors", torch.utils.swap_tensors, _swap_tensors))
    patches += [
        _patch_over(owner, "from_dlpack", owner.from_dlpack, _take_dlpack) for owner in (torch, torch.utils.dlpack)
    ]
    patches += [Patch(owner, name, Routed(getattr(owner, name), _trace), rank=1) for owner, name in _torch.TRACERS]
    patches += _explain.patches()
    patches.append(Patch(torch.Tensor, "data", _make_attribute(), rank=-1))
    return patches


_patches: list[Patch] = []
_script_names: list[tuple[Any, str]] = []


def prepare() -> None:
    """Make the patches, before anything is patched."""
    with lock:
        if not _patches:
            with without_collections():
                keep_from_the_compiler()
                prepared = _prepare()
                _script_names.extend(scripted(prepared))
                _patches.extend(prepared)


def install() -> None:
    """Watch, in all threads; the second and later calls only count."""
    with lock:
        if not watching:
            try:
                for patch in _patches:
                    patch.install()
                for wrapper, name in _script_names:
                    _torch.enter_script_name(wrapper, name)
            except BaseException:
                _restore()
                raise
        watching.append(None)


def uninstall() -> None:
    """Undo :func:`install`; the last call restores every attribute."""
    with lock:
        watching.pop()
        if not watching:
            _restore()


def _put_back() -> None:
    for wrapper, _ in _script_names:
        _torch.remove_script_name(wrapper)
    for patch in reversed(_patches):
        patch.restore()
    TRACES.clear()
    _evaluations.clear()
    _counters.clear()


_restore = surely(_put_back)
