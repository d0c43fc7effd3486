"""What does autograd save while save hooks are switched off, as torch.func does it?

``grad``, ``vjp`` and what is made of them switch save hooks off for as long as they run, in their thread. Hooks can
still be registered on each single saved tensor of a node. So, only while hooks are off, a function mode looks after
each call for the nodes that were made since, and gives every tensor that they saved the guard's pair of hooks: from
there on a save is a save.

Note [Levels]. Inside a transform a tensor is a wrapper around another one. Each level has a graph of its own, and a
version counter of its own: that of a wrapper moves with what is written through its own level, that of the tensor with
the memory moves with every write. So what is behind a wrapper is entered as an alias with a counter of its own:
where that one moves, and the wrapper's does not, a write has passed autograd by.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchguard import _memory, _policy, _torch
from torchguard._aliases import ALIASES
from torchguard._packing import make_pack
from torchguard._reads import unpack
from torchguard._saves import Save

_record = make_pack()
_record_wrapper = make_pack(exotic=True)


class _Packing(threading.local):
    """What the pack hook that runs next is to know of the tensor that it is given."""

    saved: torch.Tensor | None = None
    node: Any = None


_packing = _Packing()


def _pack(given: torch.Tensor) -> Save:
    """PyTorch gives a detached alias; what it kept itself, where it kept an input, is the very tensor."""
    wrapper = _torch.is_wrapper(given)
    save = (_record_wrapper if wrapper else _record)(given)
    saved, node = _packing.saved, _packing.node
    assert saved is not None
    if node is None:
        save.tensor = saved
        # The alias of a tensor of an outer level is wrapped anew, and its counter begins anew.
        save.version = _memory.version_of(saved)
    else:
        save.node = type(node)
        save.output = saved.output_nr
    if wrapper:
        _watch_what_is_behind(save)
    guard = _policy.innermost()
    if guard is not None and guard.audits:
        save.keep_contents()
    return save


def _watch_what_is_behind(save: Save) -> None:
    inner = _torch.behind(save.tensor)
    if any(record() is inner for record in ALIASES.by_storage.get(save.storage, ())):
        return
    ALIASES.enter(inner, save.storage, None, _memory.version_of(inner)).arm(inner)


class Watch(TorchFunctionMode):
    """After each call: hooks for what the new nodes have saved."""

    def __init__(self) -> None:
        super().__init__()
        self._since = _torch.next_sequence_number()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return result  # dynamo traces through here, as it does with every mode
        since, now = self._since, _torch.next_sequence_number()
        if now != since and not _torch.tracing():
            self._since = now
            if _torch.dispatch_mode_depth():  # registering hooks detaches, and the mode would see, or trace, that
                _policy.note_unwatched("saves under a dispatch mode while save hooks are switched off (torch.func)")
                return result
            # An in-place call may return nothing, and a custom Function's nodes lie behind what comes next.
            with _torch.no_torch_function():
                _watch_nodes([result, args], since)
        return result


def _watch_nodes(values: Any, since: int) -> None:
    waiting = [
        level.grad_fn
        for tensor in _memory.tensors_in(values)
        for level in _torch.levels_of(tensor)
        if level.requires_grad
    ]
    met: list[Any] = []
    while waiting:
        node = waiting.pop()
        if node is None or not _torch.made_since(node, since) or any(node is other for other in met):
            continue
        met.append(node)
        waiting += [following for following, _ in node.next_functions]
    for node in met:
        _watch_node(node)


def _watch_node(node: Any) -> None:
    saved = _torch.saved_variables(node)
    if saved is None:
        _policy.note_unwatched(
            f"what {type(node).__name__} saves while save hooks are switched off (torch.func): it does not show it"
        )
        return
    for variable, tensor in saved:
        _packing.saved, _packing.node = tensor, node if tensor.grad_fn is node else None
        try:
            variable.register_hooks(_pack, unpack)
        except RuntimeError:  # it has hooks already, or PyTorch refuses it already
            continue
        finally:
            _packing.saved = _packing.node = None


class _Here(threading.local):
    watch: Watch | None = None


_here = _Here()


def start() -> None:
    """Save hooks have been switched off in this thread: watch single nodes."""
    if _here.watch is None and not _torch.tracing():
        _here.watch = Watch()
        _torch.push_function_mode(_here.watch)


def stop() -> None:
    """Save hooks are on again, or no guard is left that needs to know."""
    if _here.watch is not None:
        _torch.remove_function_mode(_here.watch)
        _here.watch = None
