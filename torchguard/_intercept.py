"""Which calls does the guard see, and how do they reach its judgement?

One ``__torch_function__`` override judges. ``wrapt`` routes into it just the calls that can write, so
ordinary calls pay nothing; ``every_call=True`` also pushes it onto PyTorch's mode stack, where it sees what
no patch can (``out=``, ``torch.ops``, functions bound before the guard came).
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import wrapt
from torch.overrides import TorchFunctionMode

from torchguard import (
    _collectives,
    _compiled,
    _hooked,
    _hooks,
    _inputs,
    _interchange,
    _memory,
    _places,
    _policy,
    _pools,
    _preserved,
    _reads,
    _recompute,
    _refusal,
    _selfwrites,
    _stashes,
    _storages,
    _torch,
    _watch,
    _writers,
    _writes,
)
from torchguard._aliases import ALIASES, FEW_YOUNG
from torchguard._exports import EXPORTS
from torchguard._fast import native
from torchguard._patching import (
    Attribute,
    BoundWriter,
    Patch,
    Routed,
    RoutedMethod,
    RoutedWriter,
    keep_from_the_compiler,
    lock,
    scripted,
    surely,
    without_collections,
)
from torchguard._rereads import let_go
from torchguard._saves import LEDGER
from torchguard._torch import ref
from torchguard._writers import Writer

#: What each known callable writes to; filled when the patches are prepared.
WRITERS: dict[Any, Writer] = {}


class Override(TorchFunctionMode):
    """Function in; what does it write; verdict; call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # dynamo traces through here: nothing in its way, no graph break
            return func(*args, **kwargs)
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


def _route_method(function: Any) -> Any:
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
    grad_enabled = torch.is_grad_enabled
    reads_itself = _selfwrites.may_save_what_it_writes(function.__name__)
    numbers = _selfwrites.NUMBERS

    def call(*args: Any, **kwargs: Any) -> Any:
        if pending or filing:
            file()
        if (
            reads_itself is not None
            and len(args) > 1
            and (len(args) > 2 or type(args[1]) not in numbers)
            and grad_enabled()
            and reads_itself(args)
        ):
            if state.every_call and mode_active():
                return function(*args, **kwargs)
            return judge(function, (), args, kwargs)
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
    on_class = RoutedWriter(function, call)
    if native is None:
        return RoutedMethod(on_class, call)
    tensor_type, parameter_type = torch.Tensor, torch.nn.Parameter
    return native.Method(
        original=function,
        otherwise=call,
        on_class=on_class,
        bound_type=BoundWriter,
        pending=pending,
        filing=filing,
        file=file,
        groups=groups,
        foreign=foreign,
        tensor_type=tensor_type,
        parameter_type=parameter_type,
        mode_active=mode_active,
        storage_id=storage_id,
        grad_enabled=grad_enabled,
        reads_itself=reads_itself,
    )


def _touches_a_save(writer: Writer) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """A quick look at the arguments of a call: may it write to memory in which a live save lies?"""
    any_alive = LEDGER.any_alive
    groups = LEDGER.groups
    foreign = LEDGER.foreign
    plain = _memory.PLAIN_TYPES
    storage_id = _torch.storage_id
    mode_active = _torch.function_mode_active
    written_to = writer.written_to

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not any_alive():
            return False
        if foreign or mode_active():
            return True
        for value in written_to(args, kwargs):
            for tensor in value if type(value) is list or type(value) is tuple else (value,):
                if type(tensor) not in plain:
                    return True
                try:
                    if storage_id(tensor) in groups or not tensor.untyped_storage().resizable():
                        return True
                except _memory.NO_MEMORY:  # sparse, opaque, or torch.func's
                    return True
        return False

    return look


def _route_function(function: Any, writer: Writer) -> Callable[..., Any]:
    """The route from a patched function into the override."""
    judge = _override.__torch_function__
    state = _policy.state
    mode_active = _torch.function_mode_active
    touches_a_save = _touches_a_save(writer)
    grad_enabled = torch.is_grad_enabled
    reads_itself = _selfwrites.may_save_what_it_writes(function.__name__)

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (reads_itself is not None and len(args) > 1 and grad_enabled() and reads_itself(args)) or touches_a_save(
            args, kwargs
        ):
            if state.every_call and mode_active():
                return wrapped(*args, **kwargs)  # the mode on the stack is about to see this call
            return judge(function, (), args, kwargs)
        return wrapped(*args, **kwargs)

    return route


def _route_statistics(function: Any, writer: Writer) -> Callable[..., Any]:
    """The route from a function that keeps running statistics: most calls write to none that is saved."""
    judge = _override.__torch_function__
    state = _policy.state
    mode_active = _torch.function_mode_active
    touches_a_save = _touches_a_save(writer)

    def route(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if state.every_call:
            if mode_active():
                return wrapped(*args, **kwargs)
            return judge(function, (), args, kwargs)
        if touches_a_save(args, kwargs):
            return judge(function, (), args, kwargs)
        return wrapped(*args, **kwargs)

    return route


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
    few = FEW_YOUNG
    inside_library = _places.inside_library
    getframe = sys._getframe
    watching = _watch.watching

    def get_data(_: Any, instance: Any, owner: Any = None, alias: Any = None) -> Any:
        if instance is None:
            return _original_data
        if alias is None:  # the part in C has it already
            if watching:
                return _lend(instance, getframe(1))
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
            if storage not in groups:
                code = frame.f_code
                if inside_library.get(code.co_filename) is False:
                    before = young.get(storage)
                    if (len(young) < few) if before is None else (before[0]() is None):
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


def _data() -> Any:
    """What stands in ``torch.Tensor`` for ``data``."""
    get = _data_getter()
    if native is None:
        _Data.__get__ = get  # type: ignore[attr-defined]
        return _Data()
    return native.Data(
        original=_original_data,
        get=get,
        set=_set_data,
        remove=_original_data.__delete__,
        pending=LEDGER.pending,
        filing=LEDGER.filing,
        file=LEDGER.file,
        groups=LEDGER.groups,
        young=ALIASES.young,
        tensor_type=torch.Tensor,
        parameter_type=torch.nn.Parameter,
        storage_id=_torch.storage_id,
        inside_library=_places.inside_library,
        watching=_watch.watching,
        ref=ref,
        few=FEW_YOUNG,
    )


def _lend(tensor: torch.Tensor, frame: Any) -> Any:
    """``x.data`` where a ``watch()`` is on as well: by itself the alias would have a counter of its own."""
    alias, shares = _watch.alias_of(tensor, frame)
    if isinstance(alias, torch.Tensor):
        version = _memory.version_of(alias) if shares else 0
        _writes.enter_alias(alias, _places.user_instruction(frame), version, lent=shares)
    return alias


def _set_data(tensor: torch.Tensor, value: Any) -> None:
    _writes.rebind(_watch.rebind if _watch.watching else _original_data.__set__, tensor, value)


def _part_setter(name: str) -> Callable[[torch.Tensor, Any], None]:
    """``z.real = v`` and ``z.imag = v`` write into the memory of ``z``."""
    setter = getattr(torch.Tensor, name).__set__
    writer = Writer(f"z.{name} = v")
    WRITERS[setter] = writer

    def set_part(tensor: torch.Tensor, value: Any) -> None:
        _writes.carry_out(writer, setter, (tensor, value), {})

    return set_part


@LEDGER.holds_saves
def _detach_in_place(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = instance if isinstance(instance, torch.Tensor) else (args[0] if args else None)
    saves = _writes.detached_in_place(tensor) if isinstance(tensor, torch.Tensor) else []
    result = wrapped(*args, **kwargs)
    if saves and isinstance(tensor, torch.Tensor) and tensor.grad_fn is None:  # a view that is out of date gets another
        for save in saves:
            save.version = _reads.DETACHED
    return result


@LEDGER.holds_saves
def _swap_tensors(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.utils.swap_tensors`` refuses tensors that have weak references, or that autograd holds.

    The guard drops its weak references, and for the time of the call PyTorch holds what the guard's saves hold for it.
    """
    held = []
    tensors = list({id(tensor): tensor for tensor in _memory.tensors_in([*args, *kwargs.values()])}.values())
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


_compile_patch: list[Patch] = []


def _compile(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.compile``: its first call loads the compiler, which is patched once it is there."""
    _torch.load_compiler()
    with lock:
        if _installed:
            _patch_the_compiler()
    below = _compile_patch[0].below  # Lightning, say, has put one of its own there since the patches were made
    return (below if callable(below) else wrapped)(*args, **kwargs)


def _patch_the_compiler() -> None:
    if not _compiler_patches:
        where = _torch.where_regions_are_compiled()
        if where is None:
            return
        owner, name = where
        wrapper = wrapt.FunctionWrapper(getattr(owner, name), _compiled.compile_region)
        _compiler_patches.append(Patch(owner, name, wrapper))
    for patch in _compiler_patches:
        if vars(patch.owner).get(patch.name) is not patch.replacement:
            patch.install()


def _prepare() -> list[Patch]:
    """Everything that is patched while a guard is on, made once."""
    # Tables that torch makes once, on the first call, from what it finds then.
    torch.overrides.get_overridable_functions()
    torch.overrides.get_testing_overrides()
    patches = []
    wrappers: dict[int, Any] = {}
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
                    wrapper = Routed(function, _route_statistics(function, writer))
                else:
                    wrapper = Routed(function, _route_function(function, writer))
                wrappers[id(function)] = wrapper
            if owner is nn_functions:
                setattr(owner, name, wrapper)
            else:
                patches.append(Patch(owner, name, wrapper))
    patches.append(Patch(*_torch.NN_FUNCTIONS, nn_functions))
    WRITERS[torch.nn.init.eye_] = _writers.EYE
    eye = torch.nn.init.eye_
    patches.append(Patch(torch.nn.init, "eye_", Routed(eye, _route_function(eye, _writers.EYE))))
    patches += [Patch(owner, name, Routed(vars(owner)[name], route)) for owner, name, route in _collectives.routes()]
    patches.append(Patch(torch.utils, "swap_tensors", Routed(torch.utils.swap_tensors, _swap_tensors)))
    patches += [Patch(owner, "detach_", Routed(owner.detach_, _detach_in_place)) for owner in (torch.Tensor, torch)]
    patches.append(Patch(torch.Tensor, "data", _data()))
    patches += [
        Patch(torch.Tensor, name, Attribute(getattr(torch.Tensor, name), set=_part_setter(name)))
        for name in ("real", "imag")
    ]
    patches += [
        Patch(owner, name, Routed(getattr(owner, name), _writes.reshapes(name)))
        for owner in (torch.Tensor, torch)
        for name in _writers.RESHAPING
        if hasattr(owner, name)
    ]
    patches += _storage_patches() + _interchange_patches()
    block = _torch.PRESERVING_BLOCK
    if block is not None:
        patches += [
            Patch(block, name, wrapt.FunctionWrapper(vars(block)[name], route))
            for name, route in (
                ("__init__", _preserved.begin),
                ("__enter__", _preserved.begin),
                ("__exit__", _preserved.end),
            )
        ]
    module, off, on = _torch.HOOK_SWITCHES
    for name, route in ((off, _hooks.switch_off), (on, _hooks.switch_on)):
        if hasattr(module, name):
            patches.append(Patch(module, name, wrapt.FunctionWrapper(getattr(module, name), route)))
    for places, noting, route in (
        (_torch.HOOK_PUSHES, _torch.noting_push, _hooks.push_composed),
        (_torch.HOOK_POPS, _torch.noting_pop, _hooks.pop_program),
    ):
        for module, name in places:
            patches.append(Patch(module, name, wrapt.FunctionWrapper(noting(getattr(module, name)), route)))
    module, top = _torch.HOOK_TOP
    if hasattr(module, top):
        patches.append(Patch(module, top, wrapt.FunctionWrapper(getattr(module, top), _hooks.top_of_program)))
    _recompute.writer_of = _writer_in_checkpoint
    module, hook = _torch.CHECKPOINT_HOOK
    if hasattr(module, hook):
        patches.append(Patch(module, hook, wrapt.FunctionWrapper(getattr(module, hook), _recompute.checkpoint_hook)))
    module, keep = _torch.CHECKPOINT_ARGUMENT
    if hasattr(module, keep):
        patches.append(Patch(module, keep, wrapt.FunctionWrapper(getattr(module, keep), _inputs.save_argument)))
    function, forward = _torch.CHECKPOINT_FORWARD
    routed = wrapt.FunctionWrapper(getattr(function, forward), _recompute.checkpoint_forward)
    patches.append(Patch(function, forward, staticmethod(routed)))
    backward = torch.autograd.function.BackwardCFunction
    patches.append(Patch(backward, _torch.COMPILED_STASH, _compiled.StashAttribute()))
    patches.append(Patch(backward, "saved_tensors", Attribute(_hooks.original_saved_tensors, _hooks.saved_tensors)))
    _compile_patch[:] = [Patch(torch, "compile", Routed(torch.compile, _compile))]
    patches += _compile_patch
    start = threading.Thread.start
    patches.append(Patch(threading.Thread, "start", wrapt.FunctionWrapper(start, _hooks.start_thread)))
    patches += [
        Patch(owner, name, wrapt.FunctionWrapper(getattr(owner, name), route)) for owner, name, route in _pools.ROUTES
    ]
    return patches


def _storage_patches() -> list[Patch]:
    storage = torch.UntypedStorage
    routes = {name: _storages.writes(name) for name in _torch.STORAGE_WRITERS}
    routes["resize_"] = _storages.resize
    routes.update(dict.fromkeys(_torch.STORAGE_SHARERS, _interchange.share))
    patches = [
        Patch(storage, name, Routed(getattr(storage, name), _of_instance(route))) for name, route in routes.items()
    ]
    return [*patches, Patch(torch.Tensor, "set_", Routed(torch.Tensor.set_, _storages.enter_alias))]


def _of_instance(route: Callable[..., Any]) -> Callable[..., Any]:
    """A route that finds its instance also where the method is called on the class."""

    def bound(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if instance is None and args:
            return route(functools.partial(wrapped, args[0]), args[0], args[1:], kwargs)
        return route(wrapped, instance, args, kwargs)

    return bound


def _interchange_patches() -> list[Patch]:
    taken = [(torch, name) for name in ("from_numpy", "as_tensor", "asarray", "frombuffer", "from_dlpack")]
    routes: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "numpy", _interchange.to_numpy),
        *((owner, name, _interchange.to_capsule) for owner, name in _torch.CAPSULE_MAKERS),
        *((owner, name, _interchange.take_in) for owner, name in [*taken, (torch.utils.dlpack, "from_dlpack")]),
        (torch, "from_file", _interchange.from_file),
    ]
    wrappers: dict[int, Routed] = {}
    patches = []
    for owner, name, route in routes:
        function = getattr(owner, name)
        wrapper = wrappers.setdefault(id(function), Routed(function, route))  # one function, several names
        patches.append(Patch(owner, name, wrapper))
    interface: Any = torch.Tensor.__cuda_array_interface__
    get = _interchange.cuda_array_interface(interface.__get__)
    return [*patches, Patch(torch.Tensor, "__cuda_array_interface__", Attribute(interface, get))]


_patches: list[Patch] = []
_compiler_patches: list[Patch] = []
_script_names: list[tuple[Any, str]] = []
_installed = 0


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
    """Patch torch; the second and later calls only count."""
    global _installed
    with lock:
        if _installed == 0:
            prepare()
            EXPORTS.renew()
            try:
                _hooks.take_notes("what is patched")
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
    with lock:
        _installed -= 1
        if _installed == 0:
            _restore()


def _put_back() -> None:
    _hooks.take_no_notes("what is patched")
    for wrapper, _ in _script_names:
        _torch.remove_script_name(wrapper)
    for patch in reversed([*_patches, *_compiler_patches]):
        patch.restore()


_restore = surely(_put_back)


class _WhileAsked:
    """A patch that only some guards need."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self._patch = Patch(owner, name, replacement)
        self._count = 0

    def begin(self) -> None:
        """Patch; the second and later calls only count."""
        with lock:
            if self._count == 0:
                self._patch.install()
            self._count += 1

    def end(self) -> None:
        """Undo :meth:`begin`; the last call restores what was there."""
        with lock:
            self._count -= 1
            if self._count == 0:
                try:
                    self._patch.restore()
                except BaseException:
                    self._patch.restore()
                    raise


#: See what custom Functions stash (for audit), and whom addresses are told (for repair).
STASHES = _WhileAsked(torch.autograd.Function, "apply", _stashes.APPLY)
POINTERS = _WhileAsked(torch.Tensor, "data_ptr", Routed(torch.Tensor.data_ptr, _interchange.to_pointer))


def see_every_call() -> Any:
    """See every call of this thread (``every_call=True``), until as many :func:`see_patched_calls`; what sees them."""
    state = _policy.state
    if state.every_call == 0:
        state.mode = Override()
        _torch.push_function_mode(state.mode)
    state.every_call += 1
    return state.mode


def see_patched_calls(mode: Any = None) -> None:
    """Take back :func:`see_every_call`: the mode goes with the last one, wherever it lies on the stack.

    Nothing happens in a thread that has another one than ``mode``: it has the number of one that has ended.
    """
    state = _policy.state
    if mode is not None and state.mode is not mode:
        return
    state.every_call -= 1
    if state.every_call == 0:
        _torch.remove_function_mode(state.mode)
        state.mode = None


_hooks.every_call[:] = [see_every_call, see_patched_calls]
