"""Which private names of torch does torchguard use, and what happens where one is missing?

The only module that touches names with a leading underscore inside torch. Each has a reason why no public
name will do, and each either falls back on something slower or is listed by :func:`missing`, so that the
guard can say what it does not watch instead of crashing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

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
        return int(tensor.untyped_storage()._cdata)


if hasattr(_C, "_data_address"):
    storage_address: Callable[[torch.Tensor], int] = _C._data_address
else:

    def storage_address(tensor: torch.Tensor) -> int:
        """Address of the first byte of the tensor's storage."""
        return tensor.untyped_storage().data_ptr()


# ---- version counters --------------------------------------------------------------------------------------
# There is no public way to put a counter back, which the probe for shared counters needs.

_set_counter = getattr(_autograd, "_unsafe_set_version_counter", None)
CAN_PROBE_COUNTERS = _set_counter is not None


def set_version(tensor: torch.Tensor, version: int) -> None:
    """Set the version counter of ``tensor``, and with it that of everything that shares the counter."""
    assert _set_counter is not None
    try:
        _set_counter((tensor,), (version,))
    except TypeError:  # a tensor and an int up to 2.5
        _set_counter(tensor, version)


# ---- modes and subclasses ----------------------------------------------------------------------------------
# Reading ``tensor._version`` calls a user's ``__torch_function__``; the guard must not be seen by it.

function_mode_active: Callable[[], bool] = getattr(_C, "_is_torch_function_mode_enabled", lambda: True)
dispatch_mode_depth: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", lambda: 0)
no_torch_function: Callable[[], AbstractContextManager[Any]] = getattr(_C, "DisableTorchFunction", nullcontext)
no_torch_dispatch: Callable[[], AbstractContextManager[Any]] = getattr(_C, "_DisableTorchDispatch", nullcontext)


@contextmanager
def unseen() -> Iterator[None]:
    """Do something with tensors of real memory that no user's mode and no subclass sees."""
    with no_torch_function(), no_torch_dispatch():
        yield


@contextmanager
def hidden() -> Iterator[None]:
    """The same, and no graph records it: for all that the guard looks at and copies."""
    with unseen(), torch.no_grad():
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


# ---- autograd ----------------------------------------------------------------------------------------------
# The public saved_tensors_hooks pops by position; a guard that leaves out of order must find its own pair.

next_sequence_number: Callable[[], int] = getattr(_autograd, "_get_sequence_nr", lambda: -1)


def sequence_number(node: Any) -> int:
    """The place of a node in the order in which this thread made them."""
    return int(node._sequence_nr())


_push = _autograd._push_saved_tensors_default_hooks
_pop = _autograd._pop_saved_tensors_default_hooks
_top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_hooks_enabled: Callable[[], bool] = getattr(_autograd, "_saved_tensors_hooks_is_enabled", lambda: True)

#: Where torch.func switches save hooks off and on again, by name: patched so that the guard can step aside.
HOOK_SWITCHES = (_autograd, "_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable")
#: Where save hooks are pushed, by name.
HOOK_PUSH = (_autograd, "_push_saved_tensors_default_hooks")


def hooks_enabled() -> bool:
    """Whether this thread may push save hooks (torch.func forbids it)."""
    return _hooks_enabled()


def push_hooks(pair: Hooks) -> None:
    """Push a pair of save hooks onto this thread's stack."""
    _push(*pair)


def top_hooks() -> Hooks | None:
    """The innermost pair of save hooks of this thread."""
    if _top is None:
        return None
    pair = _top(True)
    return None if pair is None else (pair[0], pair[1])


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


@contextmanager
def without_hooks() -> Iterator[None]:
    """Run a block with this thread's save hooks lifted: what it saves is saved the way plain PyTorch does."""
    lifted: list[Hooks] = []
    while (top := top_hooks()) is not None:
        _pop()
        lifted.append(top)
    try:
        yield
    finally:
        for pair in reversed(lifted):
            _push(*pair)


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


VF: Any = torch._VF
NN: Any = torch._C._nn
VARIABLE_FUNCTIONS: Any = torch._C._VariableFunctions


NN_FUNCTIONS = (torch._C, "_nn")

#: What ``torch.ops`` calls are made of.
OPERATOR_TYPES: tuple[type, ...] = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def schemas_of(name: str) -> list[Any]:
    """Schemas of the overloads of ``aten::name``; empty where there is no such operator."""
    find = getattr(_C, "_jit_get_schemas_for_operator", None)
    return list(find(f"aten::{name}")) if find is not None else []


def reading_node() -> str | None:
    """Name of the node that backward runs in this thread right now."""
    current = getattr(_C, "_current_autograd_node", lambda: None)()
    return None if current is None else str(current.name())


def node_class_of(function: Any) -> Any:
    """The class of the nodes that a custom Function makes."""
    return getattr(function, "_backward_cls", None)


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


def missing() -> list[str]:
    """What this build of torch does not offer, as sentences about what therefore is not watched."""
    told = []
    if not CAN_PROBE_COUNTERS:
        told.append("torch has no _unsafe_set_version_counter: that an alias shares its counter is told from versions")
    if _top is None:
        told.append("torch has no _top_saved_tensors_default_hooks: guards must be left in the order of entering")
    if _c10d is not None and _unbox_work is None:
        told.append("torch cannot unbox the Work of torch.ops.c10d: collectives called by these operators are not seen")
    return told
