"""How do the save hooks get onto, and off, a thread's stack?

Hooks are thread-local and only the innermost pair runs. Each guard has a pair of its own, so that one that leaves out
of order (a closed generator) removes its own and nobody else's. The guards' pairs lie below all of the program's; each
of these is replaced by a pair composed with it (see ``_hooked``) from the first guard to the last, and popped, looked
at and put back as if it were alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchguard import _functorch, _memory, _policy, _torch
from torchguard._hooked import compose, program_of
from torchguard._packing import make_pack
from torchguard._patching import Patch, lock
from torchguard._reads import collecting, collector, unpack
from torchguard._torch import Hooks

_ours: set[int] = set()


# Note [Notes outlive a guard]. Where torch does not show a stack of hooks, what is pushed and popped is written down
# (see ``_torch``) as long as torch is patched, and longer if a guard's pair is on some thread's stack still: a guard
# may be left in another thread than it was entered in, or while a pool works on what was handed to it inside. The pair
# that a thread has from its start to its end is not waited for: some never end, and torch must be as it was found.

_noting = [
    Patch(module, name, noting(getattr(module, name)), rank=-1)
    for places, noting in ((_torch.HOOK_PUSHES, _torch.noting_push), (_torch.HOOK_POPS, _torch.noting_pop))
    for module, name in places
    if not _torch.SHOWS_HOOKS
]
_noted_for: set[object] = set()


def take_notes(reader: object) -> None:
    """Write down from now on what is pushed and popped: ``reader`` will look for a pair of hooks."""
    with lock:
        first = not _noted_for
        _noted_for.add(reader)
        if first:
            _torch.forget_noted_hooks()
            for patch in _noting:
                patch.install()


def take_no_notes(reader: object) -> None:
    """Undo :func:`take_notes`; after the last reader nothing is written down."""
    with lock:
        _noted_for.discard(reader)
        if not _noted_for:
            for patch in _noting:
                patch.restore()
            _torch.forget_noted_hooks()


class _Lifted(threading.local):
    def __init__(self) -> None:
        self.pairs: list[Hooks] = []


_lifted = _Lifted()


#: What takes back the hooks and modes of guards that were left in another thread, by the thread that has them still.
_stale: dict[int, list[tuple[Callable[[], None], int]]] = {}


def abandon(take_back: Callable[[], None], thread: int, reader: int = 0) -> None:
    """A guard is left in another thread: its hooks and its mode go when a guard is entered or left in their own.

    Args:
        reader: identity of the pack hook, which means nothing once that thread has ended.
    """
    _stale.setdefault(thread, []).append((take_back, reader))


def _clear_stale() -> None:
    if not _stale:
        return
    for take_back, _ in _stale.pop(threading.get_ident(), []):
        take_back()
    alive = {thread.ident for thread in threading.enumerate()}
    for thread in [thread for thread in _stale if thread not in alive]:
        for _, reader in _stale.pop(thread, []):
            _ours.discard(reader)  # its stack has gone with it, and another object may get the identity
            take_no_notes(reader)


def push(audits: bool = False, to_the_end: bool = False) -> Hooks:
    """Push a new pair of hooks onto this thread's stack, and return it.

    Args:
        audits: whether it keeps the bytes.
        to_the_end: whether nothing will run in this thread once the pair is removed.
    """
    _clear_stale()
    pair = (make_pack(audits=audits), unpack)
    _ours.add(id(pair[0]))
    try:
        if not to_the_end:
            take_notes(id(pair[0]))
        _put(pair)
    except BaseException:
        remove(pair)  # or its identity, which another object may get, would stay
        raise
    return pair


def _put(pair: Hooks) -> None:
    if _torch.hooks_enabled():
        if _torch.hides_hooks():
            _policy.note_unwatched(
                "save hooks that were pushed before the first guard, which this torch does not show: they are not "
                "called inside it"
            )
        _restack(lambda pairs: [pair, *pairs])
    else:  # inside torch.func: nothing can be pushed until it is left
        _lifted.pairs.append(pair)
        _functorch.start()


def remove(pair: Hooks) -> None:
    """Take a pair off this thread's stack, wherever it lies on it."""
    _clear_stale()
    if _torch.hooks_enabled() and _restack(lambda pairs: [other for other in pairs if other[0] is not pair[0]]):
        _forget(pair)
        return
    _lifted.pairs[:] = [other for other in _lifted.pairs if other[0] is not pair[0]]
    if not _lifted.pairs:
        _functorch.stop()
    _forget(pair)


def _forget(pair: Hooks) -> None:
    _ours.discard(id(pair[0]))
    take_no_notes(id(pair[0]))


def _restack(change: Callable[[list[Hooks]], list[Hooks]]) -> bool:
    """Put other pairs of guards at the bottom of this thread's stack, and compose the program's above as that asks.

    Returns whether anything changed.
    """
    stack = _torch.lift_hooks()[::-1]
    guards, program = [pair for pair in stack if _is_ours(pair)], [pair for pair in stack if not _is_ours(pair)]
    changed = change(guards)
    if changed and not guards:
        program = [compose(pair) for pair in program]
    elif guards and not changed:
        program = [program_of(pair) or pair for pair in program]
    for pair in (*changed, *program):
        _torch.push_hooks(pair)
    return len(changed) != len(guards)


def _is_ours(pair: Hooks) -> bool:
    return id(pair[0]) in _ours


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


# ---- the program's pairs -------------------------------------------------------------------------------------


def push_composed(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_push_saved_tensors_default_hooks``: under a guard of this thread, the program's pair is composed."""
    if len(args) == 2 and not kwargs and callable(args[0]) and callable(args[1]) and _is_guarded():
        return original(*compose((args[0], args[1])))
    return original(*args, **kwargs)


def _is_guarded() -> bool:
    """Whether a guard's pair, or one composed for a guard, is on this thread's stack."""
    top = _torch.top_hooks()
    return top is not None and (_is_ours(top) or program_of(top) is not None)


def pop_program(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_pop_saved_tensors_default_hooks``: the guards' pairs are not the program's to pop."""
    top = _torch.top_hooks()
    if top is None or not _is_ours(top):
        return original(*args, **kwargs)
    with _torch.without_hooks():
        return original(*args, **kwargs)  # raises: the program has no pair on the stack


def top_of_program(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_top_saved_tensors_default_hooks``: the program sees its own pair, and none where only guards have one."""
    top = original(*args, **kwargs)
    if top is None or _is_ours(top):
        return None
    return program_of(top) or top


# ---- ctx.saved_tensors -------------------------------------------------------------------------------------

original_saved_tensors: Any = torch.autograd.function.BackwardCFunction.saved_tensors


def saved_tensors(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    """``ctx.saved_tensors``: under save hooks PyTorch makes new tensors; hand back the inputs that were
    saved.
    """
    outer = collector.saves
    collector.saves = []
    collecting.append(None)
    try:
        unpacked: tuple[torch.Tensor | None, ...] = original_saved_tensors.__get__(ctx)
        saves = collector.saves
    finally:
        collecting.pop()
        collector.saves = outer
    if len(saves) != sum(tensor is not None for tensor in unpacked):
        return unpacked  # saved under somebody else's hooks
    waiting = iter(saves)
    result: list[torch.Tensor | None] = []
    for tensor in unpacked:
        if tensor is None:
            result.append(None)
            continue
        save = next(waiting)
        # Under repair(), what backward is given in the place of a save lies elsewhere.
        is_input = save.node is None and _memory.storage_of(save.tensor) == _memory.storage_of(tensor)
        result.append(save.tensor if is_input else tensor)
    return tuple(result)


# ---- threads -----------------------------------------------------------------------------------------------


_POOLS = ("concurrent.futures.thread", "multiprocessing.pool")


def _nothing() -> None:
    return None


#: Have a thread see every call, and no longer; those of ``_intercept``.
every_call: list[Callable[[], Any]] = []


@contextmanager
def under(guards: Sequence[_policy.Respondent], to_the_end: bool = False) -> Iterator[None]:
    """Run a block, or ``to_the_end`` of this thread, under those of another thread's guards that are still on."""
    adopted = _policy.still_entered(guards)
    if not adopted:
        yield
        return
    before = list(_policy.state.guards)
    _policy.adopt(adopted)
    pair = push(adopted[-1].audits, to_the_end)
    begin, end = every_call if any(guard.sees_every_call for guard in adopted) else (_nothing, _nothing)
    begin()
    try:
        yield
    finally:
        end()
        remove(pair)
        _policy.adopt(before)


def start_thread(original: Any, thread: threading.Thread, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Thread.start``: a thread started inside a guard runs under it.

    Those of a pool may outlive the guard: there it is the work that runs under it (see ``_pools``).
    """
    guards = _policy.inherited()
    if not guards or getattr(thread.__dict__.get("_target"), "__module__", "") in _POOLS:
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
        with under(guards, to_the_end=True):
            run()

    thread.run = run_guarded  # type: ignore[method-assign]
    try:
        return original(*args, **kwargs)
    except BaseException:
        put_back()
        raise
