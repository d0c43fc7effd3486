"""How do the save hooks get onto, and off, a thread's stack?

Hooks are thread-local and only the innermost pair runs. Each guard pushes a pair of its own, so that one that
leaves out of order (a closed generator) removes its own and nobody else's.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from torchguard import _functorch, _policy, _torch
from torchguard._reads import collector, unpack
from torchguard._saves import make_pack
from torchguard._torch import Hooks

_ours: set[int] = set()


class _Lifted(threading.local):
    def __init__(self) -> None:
        self.pairs: list[Hooks] = []


_lifted = _Lifted()


#: Pairs whose guard was left in another thread than it was entered in, by the thread that has them still.
_stale: dict[int, list[Hooks]] = {}


def abandon(pair: Hooks, thread: int) -> None:
    """A guard is left in another thread: its pair goes when a guard is entered or left in the pair's own."""
    _stale.setdefault(thread, []).append(pair)


def _clear_stale() -> None:
    for pair in _stale.pop(threading.get_ident(), []):
        remove(pair)


def push() -> Hooks:
    """Push a new pair of hooks onto this thread's stack, and return it."""
    _clear_stale()
    pair = (make_pack(), unpack)
    _ours.add(id(pair[0]))
    if _torch.hooks_enabled():
        _torch.push_hooks(pair)
    else:  # inside torch.func: nothing can be pushed until it is left
        _lifted.pairs.append(pair)
        _functorch.start()
    return pair


def remove(pair: Hooks) -> None:
    """Take a pair off this thread's stack, wherever it lies on it."""
    _clear_stale()
    if _torch.hooks_enabled() and _torch.remove_hooks(pair) >= 0:
        _ours.discard(id(pair[0]))
        return
    _lifted.pairs[:] = [other for other in _lifted.pairs if other[0] is not pair[0]]
    if not _lifted.pairs:
        _functorch.stop()
    _ours.discard(id(pair[0]))


# ---- torch.func --------------------------------------------------------------------------------------------


def switch_off(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_saved_tensors_hooks_disable``: step aside where only the guard's hooks are in the way."""
    must_be_empty = kwargs.get("fail_if_non_empty", args[1] if len(args) > 1 else True)
    if not must_be_empty or not _torch.hooks_enabled():
        return original(*args, **kwargs)
    lifted: list[Hooks] = []
    while (top := _torch.top_hooks()) is not None and id(top[0]) in _ours:
        _torch.remove_hooks(top)
        lifted.append(top)
    try:
        # With a user's pair on the stack torch refuses, as without the guard, and is off all the same.
        return original(*args, **kwargs)
    finally:
        if _torch.hooks_enabled():
            for pair in reversed(lifted):
                _torch.push_hooks(pair)
        elif lifted:
            _lifted.pairs.extend(lifted)
            _functorch.start()


def switch_on(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_saved_tensors_hooks_enable``: put back what stepped aside."""
    _functorch.stop()
    result = original(*args, **kwargs)
    for pair in reversed(_lifted.pairs):
        _torch.push_hooks(pair)
    _lifted.pairs.clear()
    return result


def note_foreign_hooks(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_push_saved_tensors_default_hooks``: only the innermost pair runs, so the guard's does not."""
    _policy.note_unwatched(
        "tensors saved under another pair of save hooks (saved_tensors_hooks, save_on_cpu, checkpoint)"
    )
    return original(*args, **kwargs)


# ---- ctx.saved_tensors -------------------------------------------------------------------------------------

original_saved_tensors: Any = torch.autograd.function.BackwardCFunction.saved_tensors


def saved_tensors(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    """``ctx.saved_tensors``: under save hooks PyTorch makes new tensors; hand back the inputs that were
    saved.
    """
    outer = collector.saves
    collector.saves = []
    try:
        unpacked: tuple[torch.Tensor | None, ...] = original_saved_tensors.__get__(ctx)
        saves = collector.saves
    finally:
        collector.saves = outer
    if len(saves) != sum(tensor is not None for tensor in unpacked):
        return unpacked  # saved under somebody else's hooks
    waiting = iter(saves)
    result: list[torch.Tensor | None] = []
    for tensor in unpacked:
        save = None if tensor is None else next(waiting)
        result.append(save.tensor if save is not None and save.node is None else tensor)
    return tuple(result)


# ---- threads -----------------------------------------------------------------------------------------------


def start_thread(original: Any, thread: threading.Thread, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Thread.start``: a thread started inside a guard runs under it."""
    guards = _policy.inherited()
    if not guards:
        return original(*args, **kwargs)
    run = thread.run
    own = thread.__dict__.get("run")

    def put_back() -> None:
        if own is None:
            thread.__dict__.pop("run", None)
        else:
            thread.__dict__["run"] = own

    def run_guarded() -> None:
        put_back()
        _policy.adopt(guards)
        pair = push()
        try:
            run()
        finally:
            remove(pair)
            _policy.adopt([])

    thread.run = run_guarded  # type: ignore[method-assign]
    try:
        return original(*args, **kwargs)
    except BaseException:
        put_back()
        raise
