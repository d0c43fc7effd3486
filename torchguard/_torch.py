"""Which private names of torch does torchguard use, and what happens where one is missing?

The only module that touches names with a leading underscore inside torch. Each has a reason why no public
name will do, and each either falls back on something slower or is listed by :func:`missing`, so that the
guard can say what it does not watch instead of crashing.

But for four that every supported torch has and that are asked at every save: ``tensor._version``, ``tensor._base``,
``tensor._is_view()`` and ``node._sequence_nr()`` stand where they are needed, as a function around one costs half
as much again as the look itself (125 and 82 ns). ``tests/test_architecture.py`` holds the list, and that of operators
whose names are data.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import ref as ref

import torch
import torch.utils.checkpoint

_C: Any = torch._C
_autograd: Any = torch._C._autograd

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


# ---- memory ------------------------------------------------------------------------------------------------
# ``Tensor.data_ptr()`` materialises a copy-on-write tensor and ``untyped_storage()`` makes a Python object:
# the two private look-ups do neither.

if hasattr(_C, "_storage_id"):
    storage_id: Callable[[torch.Tensor], int] = _C._storage_id
else:  # before 2.1

    def storage_id(tensor: torch.Tensor) -> int:
        """Identity of the tensor's storage, the same for all its views."""
        return identity_of(tensor.untyped_storage())


def identity_of(storage: Any) -> int:
    """Identity of an untyped storage, as :func:`storage_id` tells it of a tensor."""
    return int(storage._cdata)


def untyped(storage: Any) -> Any:
    """The storage of bytes inside a typed one; any other thing as it is."""
    return getattr(storage, "_untyped_storage", storage)


if hasattr(_C, "_data_address"):
    storage_address: Callable[[torch.Tensor], int] = _C._data_address
else:

    def storage_address(tensor: torch.Tensor) -> int:
        """Address of the first byte of the tensor's storage."""
        return tensor.untyped_storage().data_ptr()


class WeakStorage:
    """A hold on a storage that does not keep its memory; the storage's identity is not used again meanwhile."""

    __slots__ = ("_reference",)

    def __init__(self, storage: Any) -> None:
        self._reference: int = storage._weak_ref()

    def storage(self) -> torch.UntypedStorage | None:
        """The storage, or None once its memory is gone."""
        storage: torch.UntypedStorage | None = _Storage._new_with_weak_ptr(self._reference)
        return storage

    def __del__(self) -> None:
        _free(self._reference)


_Storage: Any = torch.UntypedStorage
_free: Any = getattr(_Storage, "_free_weak_ref", None)
_CAN_HOLD_WEAKLY = all(hasattr(_Storage, name) for name in ("_weak_ref", "_new_with_weak_ptr", "_free_weak_ref"))


_untyped_storage: Callable[[torch.Tensor], Any] = torch.Tensor.untyped_storage


# In 2.5, and no more in 2.13, the Python object of a tensor or storage that only torch holds dies, and leaves a pointer
# to nothing, when a weak reference has given it out and it is let go of again, unless its owner is told in between.
# Where what torch holds counts as a reference, too, there is nothing to tell.


class _Telling(ref[Any]):
    """A weak reference that tells torch whenever it gives out what it refers to."""

    __slots__ = ()

    def __call__(self) -> Any:
        held = super().__call__()
        tell = getattr(held, "_fix_weakref", None)
        if tell is not None:
            tell()
        return held


def _holders_count() -> bool:
    tensor = torch.ones(1, requires_grad=True)
    before = sys.getrefcount(tensor)
    node = tensor.exp().grad_fn
    return node is not None and sys.getrefcount(tensor) > before


#: Whether what torch alone holds counts as a reference of Python's.
HOLDERS_COUNT = _holders_count()

if not TYPE_CHECKING and not HOLDERS_COUNT:
    ref = _Telling


def weak_storage(tensor: torch.Tensor) -> WeakStorage | None:
    """A weak hold on the tensor's storage; None where this torch has none."""
    return WeakStorage(_untyped_storage(tensor)) if _CAN_HOLD_WEAKLY else None


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of the tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


#: The methods that give what a tensor of a sparse layout is made of.
_COMPRESSED_ROWS = ("crow_indices", "col_indices", "values")
_COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COMPRESSED_ROWS,
    torch.sparse_bsr: _COMPRESSED_ROWS,
    torch.sparse_csc: _COMPRESSED_COLUMNS,
    torch.sparse_bsc: _COMPRESSED_COLUMNS,
}


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that one without memory of its own is made of: sparse, nested or opaque ones, wrapping subclasses."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return [getattr(tensor, name) for name in flatten()[0]]
    if tensor.layout in _PARTS:
        return [getattr(tensor, name)() for name in _PARTS[tensor.layout]]
    if tensor.device.type == "meta" or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return []
    if tensor.is_nested:
        return [tensor.values()]
    return [tensor.to_dense()] if tensor.layout is not torch.strided else []


# ---- version counters --------------------------------------------------------------------------------------
# There is no public way to put a counter back, which the probe for shared counters needs.

_set_counter = getattr(_autograd, "_unsafe_set_version_counter", None)
CAN_PROBE_COUNTERS = _set_counter is not None


def _sets_several() -> bool:
    try:
        _set_counter((torch.empty(0),), (0,))  # type: ignore[misc]
    except TypeError:  # a tensor and an int, up to 2.5
        return False
    return True


#: Whether it takes several tensors. Not to be tried at each call: the error of a wrong one shows the tensor's values.
SETS_SEVERAL_COUNTERS = CAN_PROBE_COUNTERS and _sets_several()


def set_version(tensor: torch.Tensor, version: int) -> None:
    """Set the version counter of ``tensor``, and with it that of everything that shares the counter."""
    assert _set_counter is not None
    if SETS_SEVERAL_COUNTERS:
        _set_counter((tensor,), (version,))
    else:
        _set_counter(tensor, version)


# A leaf or an input that was saved is held by its node, and that shows in the number of its holders.

_use_count: Callable[[torch.Tensor], int] | None = getattr(torch.Tensor, "_use_count", None)

#: How many hold a tensor, all of Python counting for one: at least 2 where a node has saved the very tensor.
holders: Callable[[torch.Tensor], int] = _use_count or (lambda tensor: 1)


# ---- modes and subclasses ----------------------------------------------------------------------------------
# Reading ``tensor._version`` calls a user's ``__torch_function__``; the guard must not be seen by it.

function_mode_active: Callable[[], bool] = getattr(_C, "_is_torch_function_mode_enabled", lambda: True)
dispatch_mode_depth: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", lambda: 0)
no_torch_function: Callable[[], AbstractContextManager[Any]] = getattr(_C, "DisableTorchFunction", nullcontext)
no_torch_dispatch: Callable[[], AbstractContextManager[Any]] = getattr(_C, "_DisableTorchDispatch", nullcontext)


no_transforms: Callable[[], AbstractContextManager[Any]] = getattr(_C, "_DisableFuncTorch", nullcontext)


innermost_transform: Callable[[], Any] = getattr(
    getattr(_C, "_functorch", None), "peek_interpreter_stack", lambda: None
)


def any_mode_active() -> bool:
    """Whether a user's mode, or a transform of torch.func, would see what is done with tensors now."""
    return function_mode_active() or dispatch_mode_depth() > 0 or innermost_transform() is not None


@contextmanager
def unseen() -> Iterator[None]:
    """Do something with tensors of real memory that no user's mode, no subclass and no transform sees."""
    with no_torch_function(), no_torch_dispatch(), no_transforms():
        yield


@contextmanager
def hidden() -> Iterator[None]:
    """The same, and no graph records it: for all that the guard looks at and copies."""
    with no_torch_function(), no_torch_dispatch(), no_transforms(), torch.no_grad():
        yield


@contextmanager
def rehearsing() -> Iterator[None]:
    """Make a user's call on copies: unseen and unrecorded, but inside the torch.func transforms that are on."""
    with no_torch_function(), no_torch_dispatch(), torch.no_grad():
        yield


def push_function_mode(mode: Any) -> None:
    """Put a function mode onto this thread's stack."""
    mode.__enter__()


def remove_function_mode(mode: Any) -> None:
    """Take a function mode off this thread's stack, wherever it lies on it."""
    from torch.overrides import _pop_mode, _push_mode

    above = []
    while _C._len_torch_function_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


# ---- torch.func --------------------------------------------------------------------------------------------
# Inside a transform a tensor is a wrapper, with a version counter of its own and no memory; what it wraps may be
# a wrapper again. There is no public way to what lies behind.

_transforms: Any = getattr(_C, "_functorch", None)
_NO = lambda tensor: False  # noqa: E731
_is_wrapped: Callable[[torch.Tensor], bool] = getattr(_transforms, "is_functorch_wrapped_tensor", _NO)
_is_grad_wrapper: Callable[[torch.Tensor], bool] = getattr(_transforms, "is_gradtrackingtensor", _NO)
_is_batch_wrapper: Callable[[torch.Tensor], bool] = getattr(_transforms, "is_batchedtensor", _NO)
#: The level that torch tells of a wrapper whose transform is over.
_OVER = -2


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether torch.func made this tensor around another one."""
    # Functionalisation, which compilers use, makes wrappers as well.
    return _is_wrapped(tensor) and (_is_grad_wrapper(tensor) or _is_batch_wrapper(tensor))


def is_grad_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it is one of those of ``torch.func.grad`` and its like, and not of ``vmap``."""
    return _is_wrapped(tensor) and _is_grad_wrapper(tensor)


def levels_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, what it wraps, and so on down to the one that has memory."""
    yield tensor
    while is_wrapper(tensor):
        tensor = _transforms.get_unwrapped(tensor)
        yield tensor


def behind(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has the memory: ``tensor`` itself unless torch.func wrapped it."""
    while _is_wrapped(tensor) and is_wrapper(tensor):
        tensor = _transforms.get_unwrapped(tensor)
    return tensor


def within_what_is_over(tensor: torch.Tensor) -> torch.Tensor:
    """What is inside the wrappers of a ``torch.func.grad`` (or ``vjp``, ...) that is over: operations work on that."""
    while is_grad_wrapper(tensor) and _transforms.maybe_get_level(tensor) == _OVER:
        tensor = _transforms.get_unwrapped(tensor)
    return tensor


def can_be_replaced(tensor: torch.Tensor) -> bool:
    """Whether other memory in the same wrappers (see :func:`wrapped_like`) can stand for what autograd saved.

    Autograd gives what it unpacks the history of the save, but on one level of torch.func only; and a wrapper of a
    transform that is over cannot be made again, which matters where vmap goes on inside it.
    """
    levels = list(levels_of(tensor))
    if any(level.requires_grad or _is_grad_wrapper(level) for level in levels[1:]):
        return False
    is_over = len(levels) > 1 and _transforms.maybe_get_level(tensor) < 0
    return not (is_over and any(_is_batch_wrapper(level) for level in levels[1:]))


def is_flat_nested(tensor: torch.Tensor) -> bool:
    """Whether it is a nested tensor of strided layout; user code is kept out."""
    with no_torch_function():
        return tensor.is_nested and tensor.layout is torch.strided


_set = torch.Tensor.set_


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    with no_torch_function(), no_torch_dispatch(), torch.no_grad():
        return _set(torch.empty(0, dtype=tensor.dtype, device=tensor.device), tensor.untyped_storage())


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with memory that a subclass holds which wraps others (DTensor, ...), ``[]`` for any other tensor.

    What is written to the wrapper is written to these, below autograd, where no version counter moves. A nested tensor
    of strided layout has no strides to tell: its memory is a flat part.
    """
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return [_flat(tensor)] if is_flat_nested(tensor) else []
    parts: list[torch.Tensor] = []
    with no_torch_function():
        for name in flatten(tensor)[0]:
            inner = getattr(tensor, name, None)
            if isinstance(inner, torch.Tensor):
                parts += parts_of(inner) or [inner]
    return parts


def wrapped_like(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``memory`` in the wrappers that ``tensor`` has; those of transforms that are over are left out."""
    for wrapper in reversed(list(levels_of(tensor))[:-1]):
        level = _transforms.maybe_get_level(wrapper)
        if level < 0:
            continue
        if _is_batch_wrapper(wrapper):
            memory = _transforms._add_batch_dim(memory, _transforms.maybe_get_bdim(wrapper), level)
        else:
            memory = _transforms._wrap_for_grad(memory, level)
    return memory


def as_lazy_as(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``memory``, conjugated and negated lazily where ``tensor`` is; where that is the tensor itself, no longer."""
    memory = memory.conj() if tensor.is_conj() else memory
    return torch._neg_view(memory) if tensor.is_neg() else memory


def in_place_of(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The same, to be given to autograd instead of ``tensor``: with the wrapper of a transform that is over.

    What is computed from such a wrapper has no history outside the transform; what is computed from a tensor that
    autograd gives the history of a save, has.
    """
    if tensor is not (inner := behind(tensor)) and _transforms.maybe_get_level(tensor) < 0:
        level = _transforms._grad_increment_nesting()
        try:
            wrapped: torch.Tensor = _transforms._wrap_for_grad(wrapped_like(inner, memory), level)
            return wrapped
        finally:
            _transforms._grad_decrement_nesting()
    return wrapped_like(tensor, memory)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave the torch.func transforms that are on in this thread for a block: it calls a custom Function, say."""
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield


def tracing() -> bool:
    """Whether torch.compile is tracing in this thread: what is called then is not the program's run."""
    context = getattr(getattr(torch, "_guards", None), "TracingContext", None)
    return context is not None and context.try_get() is not None


def is_simulated(tensor: torch.Tensor) -> bool:
    """Whether this tensor of a compiler's stands for another one and has no memory."""
    return type(tensor).__module__ in ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")


def has_bytes(tensor: torch.Tensor) -> bool:
    """Whether there is anything behind its shape: not on the meta device, nor where a compiler only goes through it."""
    return tensor.device.type != "meta" and not is_simulated(tensor)


# ---- autograd ----------------------------------------------------------------------------------------------
# The public saved_tensors_hooks pops by position; a guard that leaves out of order must find its own pair.

next_sequence_number: Callable[[], int] = getattr(_autograd, "_get_sequence_nr", lambda: -1)


def sequence_number(node: Any) -> int:
    """The place of a node in the order in which this thread made them."""
    return int(node._sequence_nr())


def made_since(node: Any, number: int) -> bool:
    """Whether this thread made the node since the next sequence number was ``number``; never a leaf's."""
    return number <= int(node._sequence_nr()) < next_sequence_number()


def made_last(node: Any, number: int) -> bool:
    """Whether ``node`` is the latest, ``number`` being the next sequence number, but for those that its inputs made.

    A view whose base was written in place makes its node when an operation asks for it, and that operation has its own
    by then. Every other input's node is older than the operation's.
    """
    if node._sequence_nr() == number - 1:
        return True
    kind = type(node)
    hides = kind is GENERIC_NODE or kind.__name__ in _OPAQUE_NODES or not is_of_torch(kind)
    if not hides and _NAMES_OF_INPUTS.issuperset(_names_of_saves(kind)):
        SAVES_NO_OUTPUT.add(kind)
        return False
    for following, _ in node.next_functions:  # noqa: SIM110 (a generator costs twice as much at every save)
        if following is not None and following._sequence_nr() == number - 1:
            return True
    return False


_ONE = torch.ones((), requires_grad=True)


def make_node() -> None:
    """Have this thread make one more node, which nothing refers to."""
    with unseen(), outside_transforms(), without_hooks(), torch.enable_grad():
        _ONE.view(())


#: The type of all nodes that have none of their own in Python.
GENERIC_NODE: type = type(torch._foreach_exp([torch.ones(1, requires_grad=True)])[0].grad_fn)
_named_nodes: dict[str, type] = {}


def node_type(node: Any) -> type:
    """The type of a node, named as PyTorch names it: for those without one in Python, a type that stands for it."""
    kind = type(node)
    if kind is not GENERIC_NODE:
        return kind
    name = str(node.name())
    if name not in _named_nodes:
        _named_nodes[name] = type(name, (), {})
    return _named_nodes[name]


_SAVED = "_raw_saved_"

#: What the attributes of nodes call the inputs that they have saved. Outputs are "result", "values", "indices", ...
_NAMES_OF_INPUTS = frozenset(
    _SAVED + name
    for name in ("self", "other", "input", "weight", "mat1", "mat2", "tensor1", "tensor2", "mask", "index")
)

#: Types of nodes of which it is known already that they save none of their outputs.
SAVES_NO_OUTPUT: set[type] = set()


_names_of_saves_of: dict[type, list[str]] = {}


def _names_of_saves(kind: type) -> list[str]:
    """The attributes by which nodes of a type show what PyTorch takes hooks on."""
    names = _names_of_saves_of.get(kind)
    if names is None:
        names = _names_of_saves_of[kind] = [name for name in dir(kind) if name.startswith(_SAVED)]
    return names


_saved_tensors: Any = torch.autograd.function.BackwardCFunction.saved_tensors
#: Types of nodes that cannot be asked what they save: an in-place operation on a view, a C++ extension's function.
_OPAQUE_NODES = ("CopySlices", "CppFunction")


def saved_variables(node: Any) -> list[tuple[Any, torch.Tensor]] | None:
    """The saved tensors of a node, each with what PyTorch takes hooks on; None where the node hides them.

    A tensor whose ``grad_fn`` is the node is an output of it; every other is the very tensor that was saved.
    """
    kind = type(node)
    names = _names_of_saves(kind)
    if not names:
        return None if kind.__name__ in _OPAQUE_NODES else []
    found = []
    for name in names:
        try:
            raw = getattr(node, name)
            custom = name == "_raw_saved_tensors" and isinstance(node, torch.autograd.function.BackwardCFunction)
            tensors = _saved_tensors.__get__(node) if custom else getattr(node, "_" + name[len("_raw_") :])
        except (RuntimeError, AttributeError):  # freed, or PyTorch refuses it already
            continue
        several = isinstance(raw, (list, tuple))
        for variable, tensor in zip(raw, tensors, strict=True) if several else ((raw, tensors),):
            if isinstance(tensor, torch.Tensor):
                found.append((variable, tensor))
    return found


def saved_result(node: Any) -> torch.Tensor:
    """The output that a node of an operation like ``exp`` has saved."""
    result: torch.Tensor = node._saved_result
    return result


def about_to_save(ctx: Any) -> tuple[Any, ...]:
    """What ``ctx.save_for_backward`` was given in a forward that runs still."""
    return getattr(ctx, "to_save", None) or ()


_top: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_push: Any = _autograd._push_saved_tensors_default_hooks
_pop: Any = _autograd._pop_saved_tensors_default_hooks

#: Whether torch tells which hooks are on the stack.
SHOWS_HOOKS = _top is not None


# Note [A stack that is not shown]. Torch 2.5 to 2.7 do not tell which hooks are on the stack. What is pushed and
# popped while ``_hooks`` takes notes is written down; pairs that were pushed before lie below, and are never touched.


class _Noted(threading.local):
    def __init__(self) -> None:
        self.pairs: list[Hooks] = []
        self.era = 0


_noted = _Noted()
_era = 0


def forget_noted_hooks() -> None:
    """Notes are taken from now on, or no more: what the threads had pushed until now is not looked at any more."""
    global _era
    _era += 1


def _noted_pairs() -> list[Hooks]:
    if _noted.era != _era:
        _noted.era = _era
        _noted.pairs.clear()
    return _noted.pairs


def noting_push(push: Callable[..., Any]) -> Callable[..., Any]:
    """A function that pushes hooks, which also writes them down where torch does not show them."""
    if _top is not None:
        return push

    def pushing(*args: Any, **kwargs: Any) -> Any:
        result = push(*args, **kwargs)
        _noted_pairs().append((args[0], args[1]))
        return result

    return pushing


def noting_pop(pop: Callable[..., Any]) -> Callable[..., Any]:
    """A function that pops hooks, which also writes that down where torch does not show them."""
    if _top is not None:
        return pop

    def popping(*args: Any, **kwargs: Any) -> Any:
        result = pop(*args, **kwargs)
        del _noted_pairs()[-1:]
        return result

    return popping


_push, _pop = noting_push(_push), noting_pop(_pop)
_disable_hooks: Any = _autograd._saved_tensors_hooks_disable
_enable_hooks: Any = _autograd._saved_tensors_hooks_enable


def hides_hooks() -> bool:
    """Whether this thread has save hooks that torch does not show and nobody has seen being pushed."""
    if _top is not None or _noted_pairs() or not _hooks_enabled():
        return False
    try:
        _disable_hooks("torchguard asks whether there are any")
    except RuntimeError:
        return True
    finally:
        _enable_hooks()
    return False


_hooks_enabled: Callable[[], bool] = getattr(_autograd, "_saved_tensors_hooks_is_enabled", lambda: True)

#: Where torch.func switches save hooks off and on again, by name: patched so that the guard can step aside.
HOOK_SWITCHES = (_autograd, "_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable")
#: Where save hooks are pushed, popped and looked at, by name.
HOOK_PUSHES = tuple(
    (module, "_push_saved_tensors_default_hooks")
    for module in (_autograd, torch.autograd)
    if hasattr(module, "_push_saved_tensors_default_hooks")
)
HOOK_POPS = tuple(
    (module, "_pop_saved_tensors_default_hooks")
    for module in (_autograd, torch.autograd)
    if hasattr(module, "_pop_saved_tensors_default_hooks")
)
HOOK_TOP = (_autograd, "_top_saved_tensors_default_hooks")


def hooks_enabled() -> bool:
    """Whether this thread may push save hooks (torch.func forbids it)."""
    return _hooks_enabled()


def push_hooks(pair: Hooks) -> None:
    """Push a pair of save hooks onto this thread's stack."""
    _push(*pair)


def top_hooks() -> Hooks | None:
    """The innermost pair of save hooks of this thread."""
    if _top is None:
        return _noted_pairs()[-1] if _noted_pairs() else None
    pair = _top(True)
    return None if pair is None else (pair[0], pair[1])


def lift_hooks() -> list[Hooks]:
    """Take all pairs off this thread's stack, and return them, innermost first."""
    lifted: list[Hooks] = []
    while (top := top_hooks()) is not None:
        _pop()
        lifted.append(top)
    return lifted


def remove_hooks(pair: Hooks) -> int:
    """Remove the innermost occurrence of ``pair``, wherever it lies on this thread's stack.

    Returns how many pairs lay above it (they are back where they were), or -1 if it was not there.
    """
    above: list[Hooks] = []
    found = -1
    while (top := top_hooks()) is not None:
        _pop()
        if top[0] is pair[0]:
            found = len(above)
            break
        above.append(top)
    for other in reversed(above):
        _push(*other)
    return found


#: Have torch save, in this thread, as if there were no hooks, and no longer; what it was told before.
_pass_over_hooks: Callable[[bool], bool] = getattr(_autograd, "_saved_tensors_hooks_set_tracing", lambda passing: False)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Run a block with this thread's save hooks lifted: what it saves is saved the way plain PyTorch does."""
    lifted = lift_hooks()
    before = False if SHOWS_HOOKS else _pass_over_hooks(True)  # those that nobody has seen being pushed
    try:
        yield
    finally:
        if not SHOWS_HOOKS:
            _pass_over_hooks(before)
        for pair in reversed(lifted):
            _push(*pair)


# ---- modules -----------------------------------------------------------------------------------------------
# On the way up the stack from an operation, two frames in three are those of a module being called.

_module_call = getattr(torch.nn.Module, "_wrapped_call_impl", None)
#: Code of the method that nothing but ``Module.__call__`` calls; None where this torch has another way.
CALL_IMPL: CodeType | None = (
    getattr(getattr(torch.nn.Module, "_call_impl", None), "__code__", None)
    if _module_call is not None and torch.nn.Module.__call__ is _module_call
    else None
)


def members_of(module: torch.nn.Module) -> list[Any]:
    """Parameters, buffers and modules that a module has itself; the public ways go through what users override."""
    own = vars(module)
    return [*own["_parameters"].values(), *own["_buffers"].values(), *own["_modules"].values()]


# ---- what else is patched ----------------------------------------------------------------------------------
# ``torch.jit.script`` finds an operator by the id of the Python function: a wrapper has to be entered there.


def script_name(function: object) -> str | None:
    """The operator that TorchScript takes ``function`` for, or None."""
    builtins: Any = torch.jit._builtins
    name: str | None = builtins._find_builtin(function)
    return name


def enter_script_name(wrapper: object, name: str) -> None:
    """Let TorchScript take ``wrapper`` for the operator ``name``."""
    builtins: Any = torch.jit._builtins
    builtins._register_builtin(wrapper, name)


def remove_script_name(wrapper: object) -> None:
    """Take back :func:`enter_script_name`."""
    builtins: Any = torch.jit._builtins
    builtins._get_builtin_table().pop(id(wrapper), None)


# ---- torch.compile -----------------------------------------------------------------------------------------


def where_regions_are_compiled() -> tuple[Any, str] | None:
    """The class and the method that hand a graph to a backend; None as long as torch.compile was not loaded."""
    module = sys.modules.get("torch._dynamo.output_graph")
    owner = getattr(module, "OutputGraph", None)
    return (owner, "call_user_compiler") if hasattr(owner, "call_user_compiler") else None


#: The attribute in which a compiled function keeps tensors whose versions nobody compares.
COMPILED_STASH = "_tensors_no_vc_check"
#: What a graph calls to take ``.data``.
TAKES_DATA = "_get_data_attr"


def load_compiler() -> None:
    """What the first call of ``torch.compile`` does."""
    importlib.import_module("torch._dynamo")


def graph_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.GraphModule | None:
    """The graph that a backend is given."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.fx.GraphModule)]
    return given[0] if given else None


def copy_of_graph(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A module of its own graph with the same parameters and buffers."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return torch.fx.GraphModule(module, graph)


def has_unknown_operators(module: torch.fx.GraphModule) -> bool:
    """Whether a graph calls operators that are not torch's own, or calls further graphs."""
    for node in module.graph.nodes:
        target = node.target
        operator = isinstance(target, torch._ops.OperatorBase)
        if operator and str(getattr(target, "namespace", "")) not in ("aten", "prims"):
            return True
        if node.op == "call_module" or "distributed" in str(getattr(target, "__module__", "")):
            return True
    return False


def skip_compiling(code: CodeType) -> None:
    """Have torch.compile run this code as it is: below a compiled frame it is offered every other one."""
    eval_frame: Any = getattr(getattr(_C, "_dynamo", None), "eval_frame", object())
    if hasattr(eval_frame, "skip_code"):  # before 2.7
        eval_frame.skip_code(code)
    elif hasattr(eval_frame, "set_code_exec_strategy"):
        action = eval_frame._FrameAction
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))


VF: Any = torch._VF
NN: Any = torch._C._nn
VARIABLE_FUNCTIONS: Any = torch._C._VariableFunctions


NN_FUNCTIONS = (torch._C, "_nn")

#: Methods of a storage that write to its bytes, and how a report names them.
STORAGE_WRITERS = {
    "fill_": "UntypedStorage.fill_()",
    "copy_": "UntypedStorage.copy_()",
    "__setitem__": "storage[i] = v",
    "_byteswap": "UntypedStorage.byteswap()",
}
#: The method behind ``storage[i] = v`` of a typed storage, where this torch has typed ones.
TYPED_STORAGE_WRITERS = tuple(name for name in ("_setitem",) if hasattr(torch.TypedStorage, name))
#: Those that put it into shared memory.
STORAGE_SHARERS = ("_share_fd_cpu_", "_share_filename_cpu_")

#: Everything that makes a DLPack capsule of a tensor.
CAPSULE_MAKERS = [
    (owner, name)
    for owner, name in (
        (_C, "_to_dlpack"),
        (_C, "_to_dlpack_versioned"),
        (torch.utils.dlpack, "to_dlpack"),
        (torch, "to_dlpack"),
    )
    if hasattr(owner, name)
]

#: What ``torch.ops`` calls are made of.
OPERATOR_TYPES: tuple[type, ...] = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


#: Writes that the schemas of torch 2.5 do not tell: position and name of what is written to.
UNMARKED: dict[str, tuple[tuple[int, str], ...]] = {
    "rrelu_with_noise": ((1, "noise"),),
    "rrelu_with_noise_": ((1, "noise"),),
}


def schemas_of(name: str) -> list[Any]:
    """Schemas of the overloads of ``aten::name``; empty where there is no such operator."""
    find = getattr(_C, "_jit_get_schemas_for_operator", None)
    return list(find(f"aten::{name}")) if find is not None else []


def schema_of(overload: Any) -> Any:
    """What an overload of ``torch.ops`` takes, writes to and returns."""
    return overload._schema


def current_backward() -> int:
    """Identity of the backward pass that runs in this thread; -1 where none does."""
    return int(getattr(_C, "_current_graph_task_id", lambda: -1)())


def when_backward_ends(callback: Callable[[], None]) -> bool:
    """Have something called when the backward pass that runs now has ended; False where this torch cannot."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None or current_backward() < 0:
        return False
    engine.queue_callback(callback)
    return True


def reader() -> tuple[int, str] | None:
    """What tells the node that backward runs in this thread right now from every other."""
    current = getattr(_C, "_current_autograd_node", lambda: None)()
    return None if current is None else (sequence_number(current), str(current.name()))


def is_of_torch(node: type) -> bool:
    """Whether nodes of this type compute what a derivative of torch's own says, and no Function of anybody's."""
    return node.__module__ == "builtins" and node.__name__ != "CppFunction"


def reader_writes_to_nothing() -> bool:
    """Whether what backward runs in this thread right now is known to leave what it reads as it is."""
    current = getattr(_C, "_current_autograd_node", lambda: None)()
    return current is not None and is_of_torch(type(current))


#: What a node of batch normalisation saves and, in training mode, does not use.
_RUNNING_STATISTICS = ("_saved_running_mean", "_saved_running_var")


def unused_by_reader() -> Iterator[Callable[[], Any]]:
    """Reads, for each tensor that the node which backward runs now has saved, takes out and does not use, or that was
    saved before it was filled.

    In training mode the backward of batch normalisation stands on the statistics of the batch; the running ones are
    saved for evaluation mode alone, and taken out in both.
    """
    node = getattr(_C, "_current_autograd_node", lambda: None)()
    if node is None:
        return
    if type(node).__name__.startswith("RreluWithNoiseBackward") and hasattr(type(node), "_saved_noise"):
        yield partial(getattr, node, "_saved_noise")  # saved while it is still empty, and drawn then
    training = getattr(node, "_saved_training", getattr(node, "_saved_train", None))
    if training or type(node).__name__.startswith("BatchNormWithUpdateBackward"):
        for name in _RUNNING_STATISTICS:
            if hasattr(type(node), name):
                yield partial(getattr, node, name)


def evaluates(result: Any) -> bool:
    """Whether this is what batch normalisation returned in evaluation mode, with a graph."""
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    return getattr(getattr(first, "grad_fn", None), "_saved_training", None) is False


def live_with_node(node: Any, item: object) -> None:
    """Keep ``item`` alive as long as the node lives: its metadata is what the node itself holds."""
    node.metadata.setdefault("torchguard", []).append(item)


is_tracing: Callable[[], bool] = getattr(_C, "_is_tracing", lambda: False)

#: What records a graph by running Python, by name.
TRACERS = [
    (owner, name)
    for owner in (_C, getattr(_C, "ScriptModule", None))
    for name in (
        "_create_function_from_trace",
        "_create_function_from_trace_with_dict",
        "_create_graph_by_tracing",
        "_create_method_from_trace",
        "_create_method_from_trace_with_dict",
    )
    if hasattr(owner, name)
]

#: Where every backward pass that Python asks for enters the engine, by name.
ENGINE_ENTRIES = [
    (module, "_engine_run_backward")
    for module in (torch.autograd, torch.autograd.graph)
    if hasattr(module, "_engine_run_backward")
]

#: What every refusal of PyTorch's says, and the versions in it.
REFUSES = "has been modified by an inplace operation"
VERSIONS = re.compile(r"is at version (\d+); expected version (\d+)")


def refused_saves(roots: Iterable[Any], message: str) -> Iterator[tuple[Any, torch.Tensor]]:
    """The nodes of a graph that PyTorch refuses to run with ``message``, each with what it has saved.

    Args:
        roots: tensors, or edges as ``torch.autograd.graph.get_gradient_edge`` makes them.
    """
    waiting = [getattr(root, "node", None) or getattr(root, "grad_fn", None) for root in roots]
    met = {id(node) for node in waiting}
    alive = []  # an id is not used again meanwhile
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        alive.append(node)
        for name in dir(type(node)):
            if name.startswith(_SAVED):
                yield from ((node, tensor) for tensor in _refused_variables(node, name, message))
        for following, _ in node.next_functions:
            if following is not None and id(following) not in met:
                met.add(id(following))
                waiting.append(following)


def _refused_variables(node: Any, name: str, message: str) -> Iterator[torch.Tensor]:
    try:
        raw = getattr(node, name)
    except (RuntimeError, AttributeError):  # freed
        return
    several = isinstance(raw, (list, tuple))
    if several and isinstance(node, torch.autograd.function.BackwardCFunction):
        error = _error_of(lambda: _saved_tensors.__get__(node))
    else:
        error = _error_of(lambda: getattr(node, "_" + name[len("_raw_") :]))
    if error != message:
        return
    for variable in raw if several else (raw,):
        held = getattr(variable, "data", None)
        held = getattr(held, "tensor", held)  # a guard's own record
        # Of several, those that can be had are not it; without its node, an output is refused in other words.
        if isinstance(held, torch.Tensor) and not (several and _error_of(variable.unpack) is None):
            yield held


#: Whether what a node has saved can be looked at where PyTorch refuses to unpack it.
SHOWS_SAVES = hasattr(getattr(_autograd, "SavedTensor", None), "data")


def _error_of(read: Callable[[], Any]) -> str | None:
    try:
        read()
    except (RuntimeError, AttributeError) as error:
        return str(error)
    return None


#: The block that puts version counters back.
PRESERVING_BLOCK: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)


#: Whether such a block takes several tensors.
PRESERVES_SEVERAL = "tensors" in getattr(getattr(PRESERVING_BLOCK, "__init__", None), "__annotations__", ())


def preserved_by(block: Any) -> tuple[torch.Tensor, ...]:
    """The tensors whose version counters such a block puts back: in 2.5 it takes but one."""
    return tuple(block.tensors) if hasattr(block, "tensors") else (block.tensor,)


def node_class_of(function: Any) -> Any:
    """The class of the nodes that a custom Function makes."""
    return getattr(function, "_backward_cls", None)


#: Where checkpoints of the two kinds run their function, by name.
CHECKPOINT_HOOK = (torch.utils.checkpoint, "_checkpoint_hook")
CHECKPOINT_FORWARD = (torch.utils.checkpoint.CheckpointFunction, "forward")
#: By what the former keep their arguments since torch 2.12, or so.
CHECKPOINT_ARGUMENT = (torch.utils.checkpoint, "_make_saved_tensor")


def keeps_its_saves(node: Any) -> bool:
    """Whether backward has not yet let go of what a custom Function's node saved."""
    try:
        return node._raw_saved_tensors is not None
    except RuntimeError:
        return False


def is_compiled(item: Any) -> bool:
    """Whether a module or function runs what ``torch.compile`` has made."""
    return hasattr(item, "_torchdynamo_orig_callable") or (
        isinstance(item, torch.nn.Module)
        and (item._compiled_call_impl is not None or type(item).__name__ == "OptimizedModule")
    )


# ---- torch.distributed -------------------------------------------------------------------------------------
# Every public collective goes through the methods of a process group, a class of torch's C++ side. ``import torch``
# imports it where torch was built with it (measured from 2.5 to 2.13); the guard never does.

_c10d: Any = getattr(_C, "_distributed_c10d", None)

#: The classes whose methods are collectives; none where torch was built without torch.distributed.
PROCESS_GROUPS: tuple[Any, ...] = tuple(
    owner for owner in (getattr(_c10d, "ProcessGroup", None), getattr(_c10d, "Backend", None)) if owner is not None
)

#: What a collective returns.
Work: Any = getattr(_c10d, "Work", object)

#: The names of its methods and attributes.
WORK_NAMES = tuple(name for name in dir(Work) if not name.startswith(("__", "_pybind11")))

_unbox_work: Any = getattr(Work, "unbox", None)

#: The operators that are collectives, by the first half of their names.
COLLECTIVE_OPERATORS = frozenset({"c10d", "_c10d_functional"} if _unbox_work else {"_c10d_functional"})

#: The function behind the broadcasts of DistributedDataParallel, by name, wherever it is looked up.
BROADCAST_COALESCED: tuple[tuple[Any, str], ...] = tuple(
    (owner, "_broadcast_coalesced")
    for owner in (_c10d, getattr(torch, "distributed", None))
    if hasattr(owner, "_broadcast_coalesced")
)


def in_coalescing_block(group: Any) -> bool:
    """Whether what ``group`` is asked to do is put off until a block of calls is left."""
    module: Any = getattr(getattr(torch, "distributed", None), "distributed_c10d", None)
    return group in getattr(getattr(module, "_world", None), "pg_coalesce_state", ())


def wait_for_operator(result: Any, written: Iterable[torch.Tensor]) -> None:
    """Wait until a collective called by its operator has written."""
    for item in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(item, torch.ScriptObject):
            _unbox_work(item).wait()
    wait: Any = getattr(torch.ops._c10d_functional, "wait_tensor", None)
    if wait is not None:
        for tensor in written:
            wait(tensor)


def missing(watching: bool = False) -> list[str]:
    """What this build of torch does not offer, as sentences about what therefore is not watched.

    Args:
        watching: whether it is ``watch()`` that asks, which stands on other names than the guards that see saves.
    """
    told = []
    if not CAN_PROBE_COUNTERS:
        told.append("torch has no _unsafe_set_version_counter: that an alias shares its counter is told from versions")
    if watching:
        if _use_count is None:
            told.append("torch has no Tensor._use_count: x.data = y on a saved tensor")
        if not SHOWS_SAVES:
            told.append(
                "torch does not show saved tensors: a refusal is PyTorch's own, and does not name the lines that led "
                "to it"
            )
        return told
    if not _CAN_HOLD_WEAKLY:
        told.append("torch has no weak references to storages: save hooks that return a key are judged less exactly")
    module, hook = CHECKPOINT_HOOK
    if not hasattr(module, hook):
        told.append("torch.utils.checkpoint has no _checkpoint_hook: what non-reentrant checkpoints read")
    if _c10d is not None and _unbox_work is None:
        told.append("torch cannot unbox the Work of torch.ops.c10d: collectives called by these operators are not seen")
    return told
