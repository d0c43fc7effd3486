"""What does a collective write to, and who judges it when what it writes arrives?

All ranks take part in a collective, so one that is called off, or made twice, leaves the others hanging. Where it
would write over a live save it is made once, on a copy; when it has finished (when its Work is waited for) the copy
tells which bytes it would change. Then it is answered, or put into place.

Note [Dropped]. A Work that is dropped before anybody waits for it has nobody to raise to: what it makes is put into
place when it has finished, and the bytes decide when backward reads what it wrote over.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torchguard import _memory, _places, _policy, _rehearsal, _torch, _writes
from torchguard._aliases import ALIASES
from torchguard._counts import COUNTS
from torchguard._saves import LEDGER, Save
from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._writers import Writer

Route = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]

#: The methods of a process group that write: the public name, and the keywords of the argument that they write to.
METHODS = {
    "allreduce": ("all_reduce", ("tensors", "tensor")),
    "allreduce_coalesced": ("all_reduce_coalesced", ("tensors",)),
    "broadcast": ("broadcast", ("tensors", "tensor")),
    "reduce": ("reduce", ("tensors", "tensor")),
    "allgather": ("all_gather", ("output_tensors",)),
    "allgather_coalesced": ("all_gather_coalesced", ("output_lists",)),
    "_allgather_base": ("all_gather_into_tensor", ("output", "output_tensor")),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor", ("outputs",)),
    "all_gather_single": ("all_gather_single", ("output",)),
    "all_gather_single_coalesced": ("all_gather_single", ("outputs",)),
    "gather": ("gather", ("output_tensors",)),
    "scatter": ("scatter", ("output_tensors", "output_tensor")),
    "reduce_scatter": ("reduce_scatter", ("output_tensors", "output")),
    "_reduce_scatter_base": ("reduce_scatter_tensor", ("outputTensor", "output_tensor")),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor", ("outputs",)),
    "reduce_scatter_single": ("reduce_scatter_single", ("outputTensor",)),
    "reduce_scatter_single_coalesced": ("reduce_scatter_single", ("outputs",)),
    "alltoall": ("all_to_all", ("output_tensors", "output_tensor")),
    "alltoall_base": ("all_to_all_single", ("output", "output_tensor")),
    "all_to_all_single": ("all_to_all_single", ("output",)),
    "recv": ("recv", ("tensors",)),
    "recv_anysource": ("recv", ("arg0", "tensors")),
}

_BROADCAST = Writer("broadcast", ((1, "tensors"),), frozenset({"tensors"}), collective=True)


def routes() -> list[tuple[Any, str, Route]]:
    """What is to be patched: owner, name, and the route that leads here."""
    found: list[tuple[Any, str, Route]] = []
    for owner in _torch.PROCESS_GROUPS:
        for name, (title, keywords) in METHODS.items():
            if name in vars(owner):
                found.append((owner, name, _route(title, keywords)))
    found += [(owner, name, _broadcast_coalesced) for owner, name in _torch.BROADCAST_COALESCED]
    return found


def _route(title: str, keywords: Sequence[str]) -> Route:
    writers = {keyword: Writer(title, ((0, keyword),), frozenset({keyword}), collective=True) for keyword in keywords}
    default = writers[keywords[0]]
    any_alive = LEDGER.any_alive

    def route(wrapped: Any, group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any_alive():
            return wrapped(*args, **kwargs)
        if not isinstance(group, _torch.PROCESS_GROUPS):  # called on the class
            group, *rest = args
            args, wrapped = tuple(rest), wrapped.__get__(group)
        writer = default if args else next((writers[keyword] for keyword in keywords if keyword in kwargs), default)
        return _carry_out(writer, wrapped, args, kwargs, group)

    return route


def _broadcast_coalesced(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not LEDGER.any_alive():
        return wrapped(*args, **kwargs)
    return _carry_out(_BROADCAST, wrapped, args, kwargs, None)


def carry_out_operator(writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A collective called as an operator (``torch.ops``): it is waited for here and now."""

    def finish(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        _torch.wait_for_operator(result, writer.targets(args, kwargs) if "c10d_functional" in str(call) else ())
        return result

    return _carry_out(writer, call, args, kwargs, None, finish)


def _carry_out(
    writer: Writer,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    group: Any,
    finish: Callable[..., Any] | None = None,
) -> Any:
    COUNTS.writes += 1
    frame = sys._getframe(2)
    watched: _writes.Watched = []
    hits: list[_writes.Hit] = []
    seen: list[_writes.Expecting] = []
    with _torch.no_torch_function():
        _writes.look(writer, args, kwargs, watched, hits, seen)
    if not hits or _writes.is_refill(frame):
        hits.clear()
        try:
            return call(*args, **kwargs)
        finally:
            for storage, target in watched:
                ALIASES.settle(storage, target)
            for save in seen:
                save.expect_version()
            seen.clear()
    here = _places.user_instruction(frame)
    at_read = _policy.judge_at_read() is not None
    coalesced = group is not None and _torch.in_coalescing_block(group)
    if at_read or coalesced or not _memory.can_be_copied(writer.targets(args, kwargs)):
        for hit in hits:
            hit.save.let_bytes_decide("uncounted", writer.title, here)
        hits.clear()
        return call(*args, **kwargs)
    hits.clear()
    arrival = _Arrival(writer, _rehearsal.rehearse(writer, finish or call, args, kwargs), here)
    if isinstance(arrival.work, _torch.Work):
        return _work_class()(arrival)
    arrival.settle_or_raise()
    return arrival.in_place_of_copies(arrival.work)


class _Arrival:
    """What a collective makes on a copy, until it is put into place.

    Attributes:
        work: what the call returned.
    """

    def __init__(self, writer: Writer, rehearsal: _rehearsal.Rehearsal, here: _places.Instruction) -> None:
        self.work = rehearsal.result
        self._writer = writer
        self._rehearsal = rehearsal
        self._here = here
        self._reasons = list(_policy.state.reasons)
        self._settled = False
        self._unchecked: list[
            _writes.Expecting
        ] = []  # saves whose version nobody checks, and that is to be expected to move
        self._lock = threading.RLock()

    def in_place_of_copies(self, value: Any) -> Any:
        """The same value, with the program's tensors where the copies stand."""
        return self._rehearsal.with_originals(value)

    def settle_or_raise(self) -> None:
        """It has finished: have it answered, and put it into place."""
        with self._lock:
            error = None if self._settled else self._verdict()
            self._settled = True
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    def _verdict(self) -> Exception | None:
        watched, hits = self._look()
        try:
            with _policy.allowed_for(self._reasons):
                _writes.pronounce(self._writer, self._rehearsal, hits, self._here)
            self._rehearsal.put_down()
            for hit in hits:
                hit.save.accept()
        except (SavedTensorCorruptionError, SavedTensorCorruptionWarning) as error:
            return error.with_traceback(None)
        finally:
            hits.clear()
            self._expect(watched)
        return None

    def drop(self) -> None:
        """Nobody is going to wait for it. See Note [Dropped]."""
        if self._settled:
            return
        for hit in self._look()[1]:
            self._let_bytes_decide(hit.save)
            hit.save.remark().awaits = self.settle_unasked
        with suppress(RuntimeError):  # a receive tells nobody when it has finished
            self.work.get_future().then(self._arrived)

    def _arrived(self, future: Any) -> None:
        future.value()  # raises where it failed
        self._put_down()

    def settle_unasked(self) -> None:
        """Backward is about to read what it writes over."""
        try:
            self.work.wait()
        except RuntimeError:  # it failed, and wrote nothing that anybody could rely on
            return
        self._put_down()

    def _put_down(self) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
            watched, hits = self._look()
            for hit in hits:
                self._let_bytes_decide(hit.save)
            self._rehearsal.put_down()
            self._expect(watched)

    def _expect(self, watched: _writes.Watched) -> None:
        """What has moved by now is expected."""
        for storage, target in watched:
            ALIASES.settle(storage, target)
        for save in self._unchecked:
            save.expect_version()
        self._unchecked.clear()

    def _let_bytes_decide(self, save: Save) -> None:
        save.let_bytes_decide("uncounted", self._writer.title, self._here)

    def _look(self) -> tuple[_writes.Watched, list[_writes.Hit]]:
        """What is saved in the memory that it writes to now; there can be more than when it began."""
        watched: _writes.Watched = []
        hits: list[_writes.Hit] = []
        self._unchecked.clear()
        with _torch.no_torch_function():
            writer = replace(self._writer, written=((0, ""),), uncounted=frozenset({""}))
            _writes.look(writer, [self._rehearsal.targets], {}, watched, hits, self._unchecked)
        return watched, hits


_classes: list[Any] = []


def _work_class() -> Any:
    """The Work of a collective that writes to a copy; made when it is first needed."""
    if _classes:
        return _classes[0]

    class Work(_torch.Work):  # type: ignore[misc]
        def __init__(self, arrival: _Arrival) -> None:
            super().__init__()
            self._arrival = arrival

        def wait(self, *args: Any, **kwargs: Any) -> Any:
            result = self._arrival.work.wait(*args, **kwargs)
            self._arrival.settle_or_raise()
            return result

        def is_completed(self) -> bool:
            completed = bool(self._arrival.work.is_completed())
            if completed:
                self._arrival.settle_or_raise()
            return completed

        def result(self) -> Any:
            found = self._arrival.work.result()
            self._arrival.settle_or_raise()
            return self._arrival.in_place_of_copies(found)

        def get_future(self) -> Any:
            def settled(future: Any) -> Any:
                value = future.value()
                self._arrival.settle_or_raise()
                return self._arrival.in_place_of_copies(value)

            return self._arrival.work.get_future().then(settled)

        def __del__(self) -> None:
            self._arrival.drop()

    def passed_on(name: str, settles: bool) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = getattr(self._arrival.work, name)(*args, **kwargs)
            if settles:
                self._arrival.settle_or_raise()
            return result

        return method

    for name in _torch.WORK_NAMES:
        if name not in vars(Work):
            setattr(Work, name, passed_on(name, name in ("synchronize", "block_current_stream")))
    _classes.append(Work)
    return Work
