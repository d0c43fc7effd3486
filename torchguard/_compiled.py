"""What does a function that torch.compile made keep for its backward, where save hooks and PyTorch's own check miss it?

AOTAutograd runs a region as one custom Function. What it gives to ``save_for_backward`` comes to the save hooks. What
a Function of the user's had stashed on its ``ctx`` it stashes as well, in an attribute, unchecked: that attribute is a
descriptor while a guard is on, which makes saves of what is put there and examines them when backward fetches it.

And inductor rebuilds a view of an input with a version counter of its own (PyTorch issue 197887): writes to the input
that autograd tracks pass such a save by. So an input that shares the memory of a save and not its counter is entered
as an alias.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from torchguard import _memory, _places, _policy, _torch
from torchguard._aliases import ALIASES
from torchguard._packing import make_pack
from torchguard._reads import examine, examine_stashed
from torchguard._saves import LEDGER, Save
from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning, Violation
from torchguard._writers import is_in_place
from torchguard._writes import saves_near

_record = make_pack()

#: The frames between the ``ctx`` of a compiled function and what the function was called with.
_FRAMES = 6
_ARGUMENTS = ("args", "deduped_flat_tensor_args")


class _Stash(list[Any]):
    """The tensors that a compiled function stashed, and the saves that stand for them."""

    saves: tuple[Save, ...] = ()


class StashAttribute:
    """``ctx._tensors_no_vc_check`` of the Functions that AOTAutograd makes."""

    def __get__(self, ctx: Any, owner: Any = None) -> Any:
        if ctx is None:
            return self
        try:
            stash = vars(ctx)[_torch.COMPILED_STASH]
        except KeyError:
            raise AttributeError(_torch.COMPILED_STASH) from None
        healed = [examine_stashed(save) for save in getattr(stash, "saves", ())]
        if any(tensor is not None for tensor in healed):
            return [new if new is not None else old for new, old in zip(healed, stash, strict=True)]
        return stash

    def __set__(self, ctx: Any, tensors: Any) -> None:
        vars(ctx)[_torch.COMPILED_STASH] = tensors
        if _policy.innermost() is None or _torch.tracing():
            return
        with _torch.no_torch_function():
            _watch_inputs([*_torch.about_to_save(ctx), *tensors], list(_inputs()))
            if tensors:
                stash = _Stash(tensors)
                stash.saves = tuple(_save_of(tensor) for tensor in tensors)
                vars(ctx)[_torch.COMPILED_STASH] = stash


def _save_of(tensor: torch.Tensor) -> Save:
    save = _record(tensor)
    save.tensor, save.node, save.version = tensor, None, _memory.version_of(tensor)
    save.remark().stashed = True
    return save


def _inputs() -> Iterator[torch.Tensor]:
    """What the compiled function was called with."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        for name in _ARGUMENTS:
            given = frame.f_locals.get(name)
            if isinstance(given, (list, tuple)):
                yield from (item for item in given if isinstance(item, torch.Tensor))
                return
        if frame.f_back is None:
            return
        frame = frame.f_back


def _watch_inputs(kept: list[Any], inputs: list[torch.Tensor]) -> None:
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in inputs:
        by_storage.setdefault(_memory.storage_of(tensor), []).append(tensor)
    by_storage.pop(0, None)
    for tensor in kept:
        storage = _memory.storage_of(tensor) if isinstance(tensor, torch.Tensor) else 0
        for given in by_storage.get(storage, ()):
            known = any(record() is given for record in ALIASES.by_storage.get(storage, ()))
            if not known and not _memory.shares_counter(given, tensor):
                ALIASES.enter(given, storage, None, _memory.version_of(given)).arm(given)


# ---- regions that write through .data ------------------------------------------------------------------------------


def compile_region(original: Any, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``OutputGraph.call_user_compiler``: what is compiled remembers its graph if that may write through ``.data``."""
    module = _torch.graph_of(args, kwargs)
    kept = None
    if module is not None and _may_write_through_data(module):
        kept = _torch.copy_of_graph(module)  # a backend may rewrite the graph that it is given
    compiled = original(*args, **kwargs)
    if kept is None or compiled is module or getattr(compiled, "__self__", None) is module:
        return compiled  # run as it stands, call by call, it is seen as any other code
    return _rehearsed(kept, compiled)


def _may_write_through_data(module: Any) -> bool:
    takes_data = writes = False
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            takes_data = takes_data or name == _torch.TAKES_DATA
            writes = writes or is_in_place(name) or "out" in node.kwargs
    return takes_data and writes


def _rehearsed(module: Any, compiled: Any) -> Any:
    """``compiled``, and before each call its graph, call by call, on copies: there its writes meet its saves."""

    def run(*args: Any) -> Any:
        if _policy.innermost() is None or _torch.tracing():
            return compiled(*args)
        guard = _policy.judge_at_read()
        collector = None if guard is None else _Collector(guard)
        try:
            _rehearse(module, args, collector)
        except (SavedTensorCorruptionError, SavedTensorCorruptionWarning) as error:
            raise error.with_traceback(None) from None  # without the frames that hold the rehearsal's saves
        result = compiled(*args)
        if collector is not None and collector.found:
            collector.answer_in_backward(result)
        return result

    return run


class _Collector:
    """Stands in for a guard that judges at the read while a region is rehearsed.

    Backward reads the region's own saves, not the rehearsal's; but it finds in them what these have become.
    """

    judges_at_read = True
    repairs = False
    audits = False
    sees_every_call = False
    depth = "saves"

    def __init__(self, guard: _policy.Respondent) -> None:
        self._guard = guard
        self.found: list[Violation] = []

    def respond(self, violation: Violation) -> None:
        """Keep it."""
        self.found.append(violation)

    def heal(self, violation: Violation) -> bool:
        """The rehearsal's saves are not the ones that backward reads."""
        return False

    def record_allowed(self, violation: Violation) -> None:
        """Nothing is allowed where the guard judges at the read."""

    def note_unwatched(self, what: str) -> None:
        """Pass it on."""
        self._guard.note_unwatched(what)

    @LEDGER.holds_saves
    def judge(self) -> None:
        """The region has been rehearsed: what is known of the saves that it wrote to?"""
        for save in LEDGER.all_alive():
            if save.remarks is not None and save.remarks.taken_by is self:
                examine(save)

    def answer_in_backward(self, result: Any) -> None:
        """Have the guard answer when backward comes to what the region returned."""
        guard, found = self._guard, self.found

        def answer(_: Any) -> None:
            for violation in found:
                guard.respond(violation)

        for node in {tensor.grad_fn for tensor in _memory.tensors_in(result) if tensor.grad_fn is not None}:
            node.register_prehook(answer)


@LEDGER.holds_saves
def _let_bytes_decide(written: list[torch.Tensor], here: _places.Instruction) -> None:
    for tensor in written:
        for save in saves_near(tensor, _memory.storage_of(tensor)):
            save.let_bytes_decide("write", "a region under torch.compile", here)


def _rehearse(module: Any, args: tuple[Any, ...], collector: _Collector | None) -> None:
    given = [value for value in args if isinstance(value, torch.Tensor)]
    here = _places.user_instruction(sys._getframe(2))
    with _torch.no_torch_function():
        # What it writes to from outside, hidden from autograd, may be somebody else's save.
        _let_bytes_decide(given, here)
    if not torch.is_grad_enabled():
        return
    if _torch.has_unknown_operators(module):
        _policy.note_unwatched(
            "what a region under torch.compile writes through .data to its own saves: it calls operators that are not "
            "torch's, which must not be called once more"
        )
        return
    with _torch.hidden():
        copies = _memory.replicas_of([tensor for tensor in given if _memory.span_of(tensor) is not None])
        for tensor in given:
            if tensor.requires_grad and id(tensor) in copies:
                copy = copies[id(tensor)].requires_grad_()
                with torch.enable_grad():
                    copies[id(tensor)] = copy if tensor.is_leaf else copy.clone()  # a leaf must not be written to
    arguments = [copies.get(id(value), value) for value in args]
    with _memory.same_random_numbers(given, ()):
        try:
            with nullcontext() if collector is None else _policy.instead(collector):
                kept = module(*arguments)  # and with it the saves
                if collector is not None:
                    collector.judge()
                del kept
        except (SavedTensorCorruptionError, SavedTensorCorruptionWarning):
            raise
        except Exception:
            return  # the compiled one will say so itself
