"""How is an attribute of torch replaced, by whom, and how does it come back?

Two kinds of guard patch the same attributes and may be left in any order, so each attribute has a stack of patches: one
that is taken out from below hands what was there before it to the one above.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import wrapt

from torchguard import _torch
from torchguard._fast import native


class Copied:
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
            return getattr, (ByName(function.__module__), reduced)
        return reduced


class ByName:
    """Pickles as the import of a module."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __reduce__(self) -> Any:
        return importlib.import_module, (self.module,)


class BoundRouted(Copied, wrapt.BoundFunctionWrapper[Any, Any]):
    """``x.add_`` while ``torch.Tensor.add_`` is routed."""


class Routed(Copied, wrapt.FunctionWrapper[Any, Any]):
    """A routed function or method."""

    __bound_function_wrapper__ = BoundRouted

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        # On the class a method is the same object each time; wrapt would make a new one.
        return self if instance is None else super().__get__(instance, owner)


def _of_what_is_wrapped(name: str) -> Any:
    return property(lambda self: getattr(self.__wrapped__, name))


class BoundWriter(Copied, functools.partial):  # type: ignore[type-arg]
    """``x.add_`` while ``torch.Tensor.add_`` is routed. For all but a call it is what it stands for."""

    # Calling a partial is all in C. (No __getattribute__: dynamo takes that for something that it cannot trace.)
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
        return self.__wrapped__ == (other.__wrapped__ if isinstance(other, BoundWriter) else other)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)


BoundWriter.__module__ = _of_what_is_wrapped("__module__")


class RoutedWriter(Routed):
    """A routed method that writes, as it is found on the class."""

    def __init__(self, function: Any, call: Callable[..., Any]) -> None:
        super().__init__(function, lambda _, __, args, kwargs: call(*args, **kwargs))
        self._self_call = call

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else BoundWriter(self._self_call, instance)


class RoutedMethod:
    """What stands in ``torch.Tensor`` for a method that writes.

    Binding and calling through wrapt's descriptor takes five times as many instructions.
    """

    __slots__ = ("_self_call", "on_class")

    def __init__(self, on_class: RoutedWriter, call: Callable[..., Any]) -> None:
        self.on_class = on_class
        self._self_call = call

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.on_class if instance is None else BoundWriter(self._self_call, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_call(*args, **kwargs)

    # dynamo finds this and not what stands on the class, and looks it up among the methods of torch.Tensor.
    @property
    def __wrapped__(self) -> Any:
        return self.on_class.__wrapped__

    __class__ = _of_what_is_wrapped("__class__")
    __name__ = _of_what_is_wrapped("__name__")
    __objclass__ = _of_what_is_wrapped("__objclass__")

    def __eq__(self, other: object) -> Any:
        return self.__wrapped__ == other

    def __hash__(self) -> int:
        return hash(self.__wrapped__)


#: The types of what stands in ``torch.Tensor`` for a method that writes.
ROUTED_METHODS: Any = (RoutedMethod,) if native is None else (RoutedMethod, native.Method)

_MISSING = object()


class Patch:
    """One attribute to replace.

    Args:
        rank: patches of a higher rank lie above those of a lower one, whichever comes first.
    """

    __slots__ = ("below", "name", "owner", "rank", "replacement")

    def __init__(self, owner: Any, name: str, replacement: Any, rank: int = 0) -> None:
        self.owner = owner
        self.name = name
        self.replacement = replacement
        self.rank = rank
        #: What lies below: what was there, or the patch of a lower rank.
        self.below: Any = _MISSING

    def install(self) -> None:
        """Put the replacement into its place in the stack."""
        stack = _stacks.setdefault((id(self.owner), self.name), [])
        if self in stack:
            return
        position = sum(other.rank <= self.rank for other in stack)
        if position < len(stack):
            above = stack[position]
            self.below, above.below = above.below, self.replacement
        else:
            self.below = vars(self.owner).get(self.name, _MISSING)
            setattr(self.owner, self.name, self.replacement)
        stack.insert(position, self)

    def restore(self) -> None:
        """Undo :meth:`install`, or what an interrupt left of it."""
        stack = _stacks.get((id(self.owner), self.name), [])
        if self in stack:
            position = stack.index(self)
            del stack[position]
            if not stack:
                del _stacks[id(self.owner), self.name]
            elif position < len(stack) and stack[position].below is self.replacement:
                stack[position].below, self.below = self.below, _MISSING
                return
        here = vars(self.owner).get(self.name)
        if here is not self.replacement and not (
            # Somebody took the method from the class and put it back.
            isinstance(self.replacement, ROUTED_METHODS) and here is self.replacement.on_class
        ):
            return  # somebody else's by now
        if self.below is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.below)
        self.below = _MISSING


#: The patches of each attribute, lowest first.
_stacks: dict[tuple[int, str], list[Patch]] = {}

#: Held while patches come and go.
lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child must not be forked while another thread is half-way through the patches.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class Attribute:
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


_kept: set[str] = set()


def keep_from_the_compiler() -> None:
    """What judges a call is no part of the program that torch.compile is to compile."""
    modules = [name for name in list(sys.modules) if name.partition(".")[0] == __package__ and name not in _kept]
    _kept.update(modules)
    codes = [
        value.__code__
        for module in map(sys.modules.__getitem__, modules)
        for owner in (module, *filter(inspect.isclass, vars(module).values()))
        for value in vars(owner).values()
        if inspect.isfunction(value) and value.__module__.partition(".")[0] == __package__
    ]
    while codes:
        code = codes.pop()
        _torch.skip_compiling(code)
        codes += filter(inspect.iscode, code.co_consts)


def surely(put_back: Callable[[], None]) -> Callable[[], None]:
    """``put_back``, and once more where that is interrupted (Ctrl-C, say): no patch outlives it."""

    def _restore() -> None:
        try:
            put_back()
        except BaseException:
            put_back()
            raise

    return _restore


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """The many small objects made here stay: a search for garbage among them and all of torch takes longer than they
    do. They count as searched once, or the next object that anybody makes would set that search off.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.collect(0)
            gc.enable()


def scripted(patches: Sequence[Patch]) -> list[tuple[Any, str]]:
    """The wrappers that TorchScript has to take for an operator, and the operator's name."""
    wrappers = {id(patch.replacement): patch.replacement for patch in patches}
    for patch in patches:
        if isinstance(patch.replacement, types.ModuleType):
            wrappers.update((id(value), value) for value in vars(patch.replacement).values())
    routed = [wrapper.on_class if isinstance(wrapper, ROUTED_METHODS) else wrapper for wrapper in wrappers.values()]
    names = [(wrapper, _torch.script_name(wrapper.__wrapped__)) for wrapper in routed if isinstance(wrapper, Routed)]
    return [(wrapper, name) for wrapper, name in names if name is not None]
