"""Which calls does the guard see, and how do they reach its judgement?

One ``__torch_function__`` override judges. ``wrapt`` routes into it just the calls that can write, so
ordinary calls pay nothing; ``every_call=True`` also pushes it onto PyTorch's mode stack, where it sees what
no patch can (``out=``, ``torch.ops``, functions bound before the guard came).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
import wrapt
from torch.overrides import TorchFunctionMode

from torchguard import (
    _collectives,
    _compiled,
    _hooked,
    _hooks,
    _interchange,
    _memory,
    _places,
    _policy,
    _pools,
    _preserved,
    _reads,
    _recompute,
    _refusal,
    _stashes,
    _storages,
    _torch,
    _writers,
    _writes,
)
from torchguard._aliases import ALIASES
from torchguard._exports import EXPORTS
from torchguard._rereads import let_go
from torchguard._saves import LEDGER, is_foreign
from torchguard._writers import Writer

#: What each known callable writes to; filled when the patches are prepared.
WRITERS: dict[Any, Writer] = {}


class Override(TorchFunctionMode):
    """Function in; what does it write; verdict; call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)  # dynamo traces through here: nothing in its way, no graph break
        writer = _writer_of(func, kwargs)
        if writer is None:
            return func(*args, **kwargs)
        carry_out = _collectives.carry_out_operator if writer.collective else _writes.carry_out
        result = carry_out(writer, func, args, kwargs)
        if writer.keeps_statistics and _policy.state.every_call and _torch.evaluates(result):
            # What backward will use of them: by this mode's promise it is caught whoever writes, TorchScript, say.
            _writes.prove(writer.targets(args, kwargs))
        return result


_operators: dict[Any, Writer | None] = {}


def _writer_of(func: Any, kwargs: Mapping[str, Any]) -> Writer | None:
    try:
        writer = WRITERS.get(func)
    except TypeError:  # a callable that cannot be hashed is none of torch's
        return None
    if writer is None and isinstance(func, _torch.OPERATOR_TYPES):
        if func not in _operators:
            _operators[func] = _writers.writer_of_operator(func)
        writer = _operators[func]
    if (writer is None or not writer.collective) and func not in WRITERS and kwargs.get("out") is not None:
        return _writers.OUT
    return writer


def _writer_in_checkpoint(func: Any, kwargs: Mapping[str, Any]) -> Writer | None:
    """The same, for what a checkpoint's function calls: in evaluation, running statistics are read as well."""
    writer = _writer_of(func, kwargs)
    return None if writer is not None and writer.keeps_statistics else writer


_override = Override()


# ---- the patches -------------------------------------------------------------------------------------------


class _Copied:
    """Copies, deep-copies, pickles and prints as the function that is wrapped.

    A module that holds ``torch.relu_`` as an attribute is copied and saved as ever, guarded or not.
    """

    __wrapped__: Any

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        function = self.__wrapped__
        reduced = function.__qualname__ if inspect.isfunction(function) else function.__reduce_ex__(protocol)
        if isinstance(reduced, str) and not inspect.isfunction(function):
            # By name the pickler would find this wrapper, or, once the guard is left, not find it.
            return getattr, (_ByName(function.__module__), reduced)
        return reduced


class _ByName:
    """Pickles as the import of a module."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __reduce__(self) -> Any:
        return importlib.import_module, (self.module,)


class _BoundRouted(_Copied, wrapt.BoundFunctionWrapper[Any, Any]):
    """``x.add_`` while ``torch.Tensor.add_`` is routed."""


class _Routed(_Copied, wrapt.FunctionWrapper[Any, Any]):
    """A routed function or method."""

    __bound_function_wrapper__ = _BoundRouted

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        # On the class a method is the same object each time; wrapt would make a new one.
        return self if instance is None else super().__get__(instance, owner)


def _of_what_is_wrapped(name: str) -> Any:
    return property(lambda self: getattr(self.__wrapped__, name))


class _BoundWriter(_Copied, functools.partial):  # type: ignore[type-arg]
    # x.add_ while torch.Tensor.add_ is routed. Calling a partial is all in C; for all but a call it is what it stands
    # for. (No __getattribute__: dynamo takes that for something that it cannot trace.)
    __slots__ = ()

    @property
    def __wrapped__(self) -> Any:
        return self.func.original.__get__(*self.args)  # type: ignore[attr-defined]

    __class__ = _of_what_is_wrapped("__class__")
    __doc__ = _of_what_is_wrapped("__doc__")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __dir__(self) -> Any:
        return dir(self.__wrapped__)

    def __eq__(self, other: object) -> Any:
        return self.__wrapped__ == (other.__wrapped__ if isinstance(other, _BoundWriter) else other)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)


_BoundWriter.__module__ = _of_what_is_wrapped("__module__")


class _RoutedWriter(_Routed):
    """A routed method that writes, as it is found on the class."""

    def __init__(self, function: Any, call: Callable[..., Any]) -> None:
        super().__init__(function, lambda _, __, args, kwargs: call(*args, **kwargs))
        self._self_call = call

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else _BoundWriter(self._self_call, instance)


class _RoutedMethod:
    """What stands in ``torch.Tensor`` for a method that writes.

    Binding and calling through wrapt's descriptor takes five times as many instructions.
    """

    __slots__ = ("call", "on_class")

    def __init__(self, on_class: _RoutedWriter, call: Callable[..., Any]) -> None:
        self.on_class = on_class
        self.call = call

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.on_class if instance is None else _BoundWriter(self.call, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _route_method(function: Any) -> _RoutedMethod:
    """The route from a patched method of ``torch.Tensor`` into the override.

    Nearly all writes are to memory that no live save has anything to do with; they are let through here.
    """
    judge = _override.__torch_function__
    plain = _memory.PLAIN_TYPES
    storage_id = _torch.storage_id
    state = _policy.state
    mode_active = _torch.function_mode_active
    pending = LEDGER.pending
    filing = LEDGER.filing
    file = LEDGER.file
    groups = LEDGER.groups
    foreign = LEDGER.foreign
    is_wrapper = _torch.is_wrapper

    def call(*args: Any, **kwargs: Any) -> Any:
        if pending or filing:
            file()
        if not groups:
            return function(*args, **kwargs)
        instance: Any = args[0] if args else None
        if type(instance) in plain and not foreign and not mode_active():
            try:
                elsewhere = storage_id(instance) not in groups and instance.untyped_storage().resizable()
            except _memory.NO_MEMORY:  # sparse, opaque, or torch.func's
                elsewhere = not is_wrapper(instance)
            if elsewhere:
                return function(*args, **kwargs)
        if state.every_call and mode_active():
            return function(*args, **kwargs)  # the mode on the stack is about to see this call
        return judge(function, (), args, kwargs)

    call.original = function  # type: ignore[attr-defined]
    return _RoutedMethod(_RoutedWriter(function, call), call)


def _route_function(function: Any) -> Callable[..., Any]:
    """The route from a patched function into the override."""
    judge = _override.__torch_function__
    state = _policy.state
    mode_active = _torch.function_mode_active
    any_alive = LEDGER.any_alive

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any_alive() or (state.every_call and mode_active()):
            return wrapped(*args, **kwargs)
        return judge(function, (), args, kwargs)

    return route


def _route_statistics(function: Any, writer: Writer) -> Callable[..., Any]:
    """The route from a function that keeps running statistics: most calls write to none that is saved."""
    judge = _override.__torch_function__
    state = _policy.state
    mode_active = _torch.function_mode_active
    pending = LEDGER.pending
    filing = LEDGER.filing
    file = LEDGER.file
    groups = LEDGER.groups
    foreign = LEDGER.foreign
    plain = _memory.PLAIN_TYPES
    storage_id = _torch.storage_id
    written = writer.written

    def touches_a_save(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        for position, keyword in written:
            value = args[position] if position < len(args) else kwargs.get(keyword)
            if value is None:
                continue
            if type(value) not in plain or foreign:
                return True
            try:
                if storage_id(value) in groups or is_foreign(value):
                    return True
            except _memory.NO_MEMORY:
                return True
        return False

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if state.every_call:
            if mode_active():
                return wrapped(*args, **kwargs)
            return judge(function, (), args, kwargs)
        if pending or filing:
            file()
        if groups and touches_a_save(args, kwargs):
            return judge(function, (), args, kwargs)
        return wrapped(*args, **kwargs)

    return route


class _Patch:
    """One attribute to replace, and what was there."""

    __slots__ = ("inherited", "name", "original", "owner", "replacement")

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self.owner = owner
        self.name = name
        self.replacement = replacement
        self.original: Any = None
        self.inherited = True

    def install(self) -> None:
        own = vars(self.owner)
        self.inherited = self.name not in own
        self.original = own.get(self.name)
        setattr(self.owner, self.name, self.replacement)

    def restore(self) -> None:
        """Undo :meth:`install`, or what an interrupt left of it."""
        here = vars(self.owner).get(self.name)
        if here is not self.replacement and not (
            # Somebody took the method from the class and put it back.
            isinstance(self.replacement, _RoutedMethod) and here is self.replacement.on_class
        ):
            return
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
        self.original = None


class _Attribute:
    """A descriptor in the place of one of torch's own; on the class it shows the one that it replaces."""

    def __init__(self, original: Any, get: Any = None, set: Any = None) -> None:
        self._original = original
        self._get = get or original.__get__
        self._set = set or original.__set__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._original if instance is None else self._get(instance)

    def __set__(self, instance: Any, value: Any) -> None:
        self._set(instance, value)

    def __delete__(self, instance: Any) -> None:
        self._original.__delete__(instance)


_original_data: Any = torch.Tensor.data


class _Data:
    """``torch.Tensor.data`` while it is routed; on the class it shows the original.

    It hands out an alias and takes down where. An alias of memory in which no save lies goes into the one slot of its
    storage (see ``Aliases.young``): that is written out here, since it is what nearly every access comes to.
    """

    __slots__ = ()

    def __set__(self, instance: Any, value: Any) -> None:
        _set_data(instance, value)

    def __delete__(self, instance: Any) -> None:
        _original_data.__delete__(instance)


def _data_getter() -> Callable[..., Any]:
    get = _original_data.__get__
    tensor_type, parameter_type = torch.Tensor, torch.nn.Parameter
    storage_id = _torch.storage_id
    pending = LEDGER.pending
    filing = LEDGER.filing
    file = LEDGER.file
    groups = LEDGER.groups
    young = ALIASES.young
    enter_young = ALIASES.enter_young
    by_storage = ALIASES.by_storage
    inside_library = _places.inside_library
    getframe = sys._getframe

    def get_data(_: _Data, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return _original_data
        alias = get(instance)
        frame = getframe(1)
        kind = type(alias)
        if kind is tensor_type or kind is parameter_type:
            if pending or filing:
                file()
            try:
                storage = storage_id(alias)
            except _memory.NO_MEMORY:  # sparse, opaque, or torch.func's
                _writes.enter_alias(alias, _places.user_instruction(frame))
                return alias
            if storage not in groups and storage not in by_storage:
                code = frame.f_code
                if inside_library.get(code.co_filename) is False:
                    before = young.get(storage)
                    if before is not None and before[0]() is None:
                        young[storage] = (ref(alias), code, frame.f_lasti)
                    else:
                        enter_young(alias, storage, code, frame.f_lasti)
                else:
                    instruction = _places.user_instruction(frame)
                    enter_young(alias, storage, *(instruction or (None, 0)))
                return alias
        if isinstance(alias, torch.Tensor):
            _writes.enter_alias(alias, _places.user_instruction(frame))
        return alias

    return get_data


_Data.__get__ = _data_getter()  # type: ignore[attr-defined]


def _set_data(tensor: torch.Tensor, value: Any) -> None:
    _writes.rebind(_original_data.__set__, tensor, value)


def _part_setter(name: str) -> Callable[[torch.Tensor, Any], None]:
    """``z.real = v`` and ``z.imag = v`` write into the memory of ``z``."""
    setter = getattr(torch.Tensor, name).__set__
    writer = Writer(f"z.{name} = v")
    WRITERS[setter] = writer

    def set_part(tensor: torch.Tensor, value: Any) -> None:
        _writes.carry_out(writer, setter, (tensor, value), {})

    return set_part


def _detach_in_place(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = instance if isinstance(instance, torch.Tensor) else (args[0] if args else None)
    saves = _writes.detached_in_place(tensor) if isinstance(tensor, torch.Tensor) else []
    result = wrapped(*args, **kwargs)
    for save in saves:
        save.version = _reads.DETACHED
    return result


def _swap_tensors(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.utils.swap_tensors`` refuses tensors that have weak references, or that autograd holds.

    The guard drops its weak references, and for the time of the call PyTorch holds what the guard's saves hold for it.
    """
    held = []
    tensors = list({id(tensor): tensor for tensor in _writers.tensors_in([*args, *kwargs.values()])}.values())
    for tensor in tensors:
        ALIASES.forget(tensor)
        held += [_refusal.hold(save.tensor) for save in _writes.saves_of(tensor) if save.checked]
        _reads.let_go(tensor)
        _hooked.let_go(tensor)
    try:
        with let_go(tensors, "swap_tensors()"):
            return wrapped(*args, **kwargs)
    finally:
        held.clear()


def _compile(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.compile``: its first call loads the compiler, which is patched once it is there."""
    _torch.load_compiler()
    with _lock:
        if _installed:
            _patch_the_compiler()
    return wrapped(*args, **kwargs)


def _patch_the_compiler() -> None:
    if not _compiler_patches:
        where = _torch.where_regions_are_compiled()
        if where is None:
            return
        owner, name = where
        wrapper = wrapt.FunctionWrapper(getattr(owner, name), _compiled.compile_region)
        _compiler_patches.append(_Patch(owner, name, wrapper))
    for patch in _compiler_patches:
        if vars(patch.owner).get(patch.name) is not patch.replacement:
            patch.install()


def _prepare() -> list[_Patch]:
    """Everything that is patched while a guard is on, made once."""
    # Tables that torch makes once, on the first call, from what it finds then.
    torch.overrides.get_overridable_functions()
    torch.overrides.get_testing_overrides()
    patches = []
    wrappers: dict[int, _Routed | _RoutedMethod] = {}
    # torch._C._nn is replaced as a whole: its functions pickle by the module's name, which must lead to them.
    nn_functions = types.ModuleType(_torch.NN.__name__)
    nn_functions.__dict__.update(vars(_torch.NN))
    spaces: list[tuple[Any, Any]] = [
        (torch.Tensor, torch.Tensor),
        (torch, torch),
        (torch.nn.functional, torch.nn.functional),
        (nn_functions, _torch.NN),
        (_torch.VF, _torch.VARIABLE_FUNCTIONS),
    ]
    for owner, namespace in spaces:
        for name, (function, writer) in _writers.writers_in(namespace, dir(namespace)).items():
            WRITERS[function] = writer
            wrapper = wrappers.get(id(function))
            if wrapper is None:
                if namespace is torch.Tensor:
                    wrapper = _route_method(function)
                elif writer.keeps_statistics:
                    wrapper = _Routed(function, _route_statistics(function, writer))
                else:
                    wrapper = _Routed(function, _route_function(function))
                wrappers[id(function)] = wrapper
            if owner is nn_functions:
                setattr(owner, name, wrapper)
            else:
                patches.append(_Patch(owner, name, wrapper))
    patches.append(_Patch(*_torch.NN_FUNCTIONS, nn_functions))
    WRITERS[torch.nn.init.eye_] = _writers.EYE
    patches.append(_Patch(torch.nn.init, "eye_", _Routed(torch.nn.init.eye_, _route_function(torch.nn.init.eye_))))
    patches += [_Patch(owner, name, _Routed(vars(owner)[name], route)) for owner, name, route in _collectives.routes()]
    patches.append(_Patch(torch.utils, "swap_tensors", _Routed(torch.utils.swap_tensors, _swap_tensors)))
    patches += [_Patch(owner, "detach_", _Routed(owner.detach_, _detach_in_place)) for owner in (torch.Tensor, torch)]
    patches.append(_Patch(torch.Tensor, "data", _Data()))
    patches += [
        _Patch(torch.Tensor, name, _Attribute(getattr(torch.Tensor, name), set=_part_setter(name)))
        for name in ("real", "imag")
    ]
    patches += [
        _Patch(torch.Tensor, name, _Routed(getattr(torch.Tensor, name), _writes.reshapes(name)))
        for name in _writers.RESHAPING
    ]
    patches += _storage_patches() + _interchange_patches()
    block = _torch.PRESERVING_BLOCK
    if block is not None:
        patches += [
            _Patch(block, name, wrapt.FunctionWrapper(vars(block)[name], route))
            for name, route in (
                ("__init__", _preserved.begin),
                ("__enter__", _preserved.begin),
                ("__exit__", _preserved.end),
            )
        ]
    module, off, on = _torch.HOOK_SWITCHES
    for name, route in ((off, _hooks.switch_off), (on, _hooks.switch_on)):
        if hasattr(module, name):
            patches.append(_Patch(module, name, wrapt.FunctionWrapper(getattr(module, name), route)))
    for places, route in ((_torch.HOOK_PUSHES, _hooks.push_composed), (_torch.HOOK_POPS, _hooks.pop_program)):
        for module, name in places:
            patches.append(_Patch(module, name, wrapt.FunctionWrapper(getattr(module, name), route)))
    module, top = _torch.HOOK_TOP
    if hasattr(module, top):
        patches.append(_Patch(module, top, wrapt.FunctionWrapper(getattr(module, top), _hooks.top_of_program)))
    _recompute.writer_of = _writer_in_checkpoint
    module, hook = _torch.CHECKPOINT_HOOK
    if hasattr(module, hook):
        patches.append(_Patch(module, hook, wrapt.FunctionWrapper(getattr(module, hook), _recompute.checkpoint_hook)))
    function, forward = _torch.CHECKPOINT_FORWARD
    routed = wrapt.FunctionWrapper(getattr(function, forward), _recompute.checkpoint_forward)
    patches.append(_Patch(function, forward, staticmethod(routed)))
    backward = torch.autograd.function.BackwardCFunction
    patches.append(_Patch(backward, _compiled.STASH, _compiled.StashAttribute()))
    patches.append(_Patch(backward, "saved_tensors", _Attribute(_hooks.original_saved_tensors, _hooks.saved_tensors)))
    patches.append(_Patch(torch, "compile", _Routed(torch.compile, _compile)))
    start = threading.Thread.start
    patches.append(_Patch(threading.Thread, "start", wrapt.FunctionWrapper(start, _hooks.start_thread)))
    patches += [
        _Patch(owner, name, wrapt.FunctionWrapper(getattr(owner, name), route)) for owner, name, route in _pools.ROUTES
    ]
    return patches


def _storage_patches() -> list[_Patch]:
    storage = torch.UntypedStorage
    routes = {name: _storages.writes(name) for name in _torch.STORAGE_WRITERS}
    routes["resize_"] = _storages.resize
    routes.update(dict.fromkeys(_torch.STORAGE_SHARERS, _interchange.share))
    patches = [
        _Patch(storage, name, _Routed(getattr(storage, name), _of_instance(route))) for name, route in routes.items()
    ]
    return [*patches, _Patch(torch.Tensor, "set_", _Routed(torch.Tensor.set_, _storages.enter_alias))]


def _of_instance(route: Callable[..., Any]) -> Callable[..., Any]:
    """A route that finds its instance also where the method is called on the class."""

    def bound(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if instance is None and args:
            return route(functools.partial(wrapped, args[0]), args[0], args[1:], kwargs)
        return route(wrapped, instance, args, kwargs)

    return bound


def _interchange_patches() -> list[_Patch]:
    taken = [(torch, name) for name in ("from_numpy", "as_tensor", "asarray", "frombuffer", "from_dlpack")]
    routes: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "numpy", _interchange.to_numpy),
        *((owner, name, _interchange.to_capsule) for owner, name in _torch.CAPSULE_MAKERS),
        *((owner, name, _interchange.take_in) for owner, name in [*taken, (torch.utils.dlpack, "from_dlpack")]),
        (torch, "from_file", _interchange.from_file),
    ]
    wrappers: dict[int, _Routed] = {}
    patches = []
    for owner, name, route in routes:
        function = getattr(owner, name)
        wrapper = wrappers.setdefault(id(function), _Routed(function, route))  # one function, several names
        patches.append(_Patch(owner, name, wrapper))
    interface: Any = torch.Tensor.__cuda_array_interface__
    get = _interchange.cuda_array_interface(interface.__get__)
    return [*patches, _Patch(torch.Tensor, "__cuda_array_interface__", _Attribute(interface, get))]


def _keep_from_the_compiler() -> None:
    """What judges a call is no part of the program that torch.compile is to compile."""
    codes = [
        value.__code__
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == __package__
        for owner in (module, *filter(inspect.isclass, vars(module).values()))
        for value in vars(owner).values()
        if inspect.isfunction(value) and value.__module__.partition(".")[0] == __package__
    ]
    while codes:
        code = codes.pop()
        _torch.skip_compiling(code)
        codes += filter(inspect.iscode, code.co_consts)


def _scripted(patches: list[_Patch]) -> list[tuple[Any, str]]:
    """The wrappers that TorchScript has to take for an operator, and the operator's name."""
    wrappers = {id(patch.replacement): patch.replacement for patch in patches}
    for patch in patches:
        if isinstance(patch.replacement, types.ModuleType):
            wrappers.update((id(value), value) for value in vars(patch.replacement).values())
    routed = [wrapper.on_class if isinstance(wrapper, _RoutedMethod) else wrapper for wrapper in wrappers.values()]
    names = [(wrapper, _torch.script_name(wrapper.__wrapped__)) for wrapper in routed if isinstance(wrapper, _Routed)]
    return [(wrapper, name) for wrapper, name in names if name is not None]


_patches: list[_Patch] = []
_compiler_patches: list[_Patch] = []
_script_names: list[tuple[Any, str]] = []
_installed = 0
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child must not be forked while another thread is half-way through the patches.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def install() -> None:
    """Patch torch; the second and later calls only count."""
    global _installed
    with _lock:
        if _installed == 0:
            if not _patches:
                _keep_from_the_compiler()
                prepared = _prepare()
                _script_names.extend(_scripted(prepared))
                _patches.extend(prepared)
            EXPORTS.renew()
            try:
                for patch in _patches:
                    patch.install()
                _patch_the_compiler()
                for wrapper, name in _script_names:
                    _torch.enter_script_name(wrapper, name)
            except BaseException:
                _restore()
                raise
        _installed += 1


def uninstall() -> None:
    """Undo :func:`install`; the last call restores every attribute."""
    global _installed
    with _lock:
        _installed -= 1
        if _installed == 0:
            _restore()


def _restore() -> None:
    try:
        _put_back()
    except BaseException:  # Ctrl-C, say: no patch outlives it
        _put_back()
        raise


def _put_back() -> None:
    for wrapper, _ in _script_names:
        _torch.remove_script_name(wrapper)
    for patch in reversed([*_patches, *_compiler_patches]):
        patch.restore()


class _WhileAsked:
    """A patch that only some guards need."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self._patch = _Patch(owner, name, replacement)
        self._count = 0

    def begin(self) -> None:
        """Patch; the second and later calls only count."""
        with _lock:
            if self._count == 0:
                self._patch.install()
            self._count += 1

    def end(self) -> None:
        """Undo :meth:`begin`; the last call restores what was there."""
        with _lock:
            self._count -= 1
            if self._count == 0:
                self._patch.restore()


#: See what custom Functions stash (for audit), and whom addresses are told (for repair).
STASHES = _WhileAsked(torch.autograd.Function, "apply", _stashes.APPLY)
POINTERS = _WhileAsked(torch.Tensor, "data_ptr", _Routed(torch.Tensor.data_ptr, _interchange.to_pointer))


def see_every_call() -> None:
    """See every call of this thread (``every_call=True``), until as many :func:`see_patched_calls`."""
    state = _policy.state
    if state.every_call == 0:
        state.mode = Override()
        _torch.push_function_mode(state.mode)
    state.every_call += 1


def see_patched_calls() -> None:
    """Take back :func:`see_every_call`: the mode goes with the last one, wherever it lies on the stack."""
    state = _policy.state
    state.every_call -= 1
    if state.every_call == 0:
        _torch.remove_function_mode(state.mode)
        state.mode = None
