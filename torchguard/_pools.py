"""How does work that is handed to a pool of threads come under the guard of the thread that hands it over?

Hooks are thread-local, and a pool's threads may have been there before the guard, or stay after it. So it is the
piece of work that is under the guard, in whichever thread it runs, and only while the guard is on: where it was
submitted decides.
An ``allow()`` block holds for the thread that it stands in, not for what is submitted there.
"""

from __future__ import annotations

import concurrent.futures.thread
import multiprocessing.pool
from collections.abc import Callable
from typing import Any

from torchguard import _hooks, _policy

_KEY = "_torchguard_guards"


def make_item(original: Any, item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_WorkItem.__init__``: a call is submitted to an executor (``asyncio.to_thread`` does this, too)."""
    guards = _policy.inherited()
    if guards:
        item.__dict__[_KEY] = guards
    return original(*args, **kwargs)


def run_item(original: Any, item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_WorkItem.run``: and is run, in one of the executor's threads."""
    with _hooks.under(item.__dict__.pop(_KEY, ())):
        return original(*args, **kwargs)


def submit(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``ThreadPool.apply_async`` and the like, whose first argument is the function."""
    guards = _policy.inherited()
    if guards and args and callable(args[0]):
        return original(_Guarded(args[0], guards), *args[1:], **kwargs)
    if guards and callable(kwargs.get("func")):
        return original(*args, **{**kwargs, "func": _Guarded(kwargs["func"], guards)})
    return original(*args, **kwargs)


class _Guarded:
    """A function that runs under the guards of the thread that submitted it."""

    def __init__(self, function: Callable[..., Any], guards: list[_policy.Respondent]) -> None:
        self._function = function
        self._guards = guards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _hooks.under(self._guards):
            return self._function(*args, **kwargs)


#: What is replaced while a guard is on: owner, name, route. Python's own names, looked up at the call.
_items: Any = concurrent.futures.thread._WorkItem
ROUTES: list[tuple[Any, str, Any]] = [
    (_items, "__init__", make_item),
    (_items, "run", run_item),
    *(
        (multiprocessing.pool.ThreadPool, name, submit)
        for name in ("apply_async", "_map_async", "imap", "imap_unordered")
        if hasattr(multiprocessing.pool.ThreadPool, name)
    ),
]
