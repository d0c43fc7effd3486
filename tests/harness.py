"""Is a program of the catalogue what it claims to be, and does the guard treat it as it must?

A program is a small function that builds a graph, writes to some memory through ``run.write`` and returns gradients. What
is right is computed, never asserted by hand: the program runs without the write, and under save hooks that clone every
save; whether its write changed the bytes of a live save is seen by a recorder. From that follows the program's kind:

* *corrupting*: plain PyTorch finishes, with gradients that differ from the truth. The guard must speak.
* *innocent*: the gradients are the truth and no live save's bytes changed silently. The guard must be silent.
* *unread*: bytes of a live save changed silently and yet no gradient is wrong. strict() may speak at the write.
* *refused*: plain PyTorch raises. Under the guard the same error must come, word for word.

A new case goes into the package ``catalogue``, and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import linecache
import operator
import os
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import torchguard
from torchguard import _hooks, _torch

Kind = Literal["corrupting", "innocent", "unread", "refused"]
Truth = Literal["without the write", "cloned saves"]
Moment = Literal["write", "read"]
Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
Body = Callable[["Run"], Any]
MakeGuard = Callable[[], torchguard.Guard]

#: A line that saves ends with this comment; a write of more than one line marks the line that writes.
SAVED_MARK = "# saved"
WRITTEN_MARK = "# written"
#: A line that takes an alias has one of these in it.
TAKES_AN_ALIAS = ("data", "set_", "copy.copy", "storage")

VALUES = [[-2.5, -1.25, -0.5, 0.75], [0.3, 1.2, 2.5, 3.0], [-0.1, 0.6, -1.7, 4.0]]


# ---- a program and its run ----------------------------------------------------------------------------------------


def no_lack() -> str:
    """For programs that every torch can run."""
    return ""


@dataclass(frozen=True)
class Program:
    """One case of the catalogue.

    Attributes:
        name: unique; the test id.
        route: how it writes, in the words of the design's section 5.
        kind: what it is; checked against what is computed.
        body: the program.
        twin_of: names of the corrupting programs of which it is the innocent counterpart.
        truth: how the right gradients are computed.
        caught: for a corrupting program, whether strict() speaks at the write or at the read.
        every_call: the same for strict(every_call=True).
        exact: whether the report counts exactly the elements that change (it cannot where the write is random).
        enters_guard: the program enters the guard itself, with ``run.guard()``; otherwise all of it is inside.
        allowed: the write stands in an ``allow`` block; the guard must keep silent, and keep the reason.
        hooks: whether it can run under save hooks. Where it cannot, its truth is the run without the write alone, and
            whether a live save's bytes changed cannot be seen: "unread" is then what it says it is.
        only_audit: no Python sees its write: of all modes, audit() alone says so, when backward reads.
        repairable: whether repair() can hand backward what was saved; where it cannot, it must raise or let PyTorch refuse.
            None as the route has it.
        read_in_vain: for an unread program: backward reads the save all the same, and nothing comes of it.
        lacks: what this build of torch lacks for it, in words; empty where it lacks nothing.
    """

    name: str
    route: str
    kind: Kind
    body: Body
    twin_of: tuple[str, ...] = ()
    truth: Truth = "without the write"
    caught: Moment = "write"
    every_call: Moment = "write"
    exact: bool = True
    enters_guard: bool = False
    allowed: bool = False
    hooks: bool = True
    read_in_vain: bool = False
    repairable: bool | None = None
    only_audit: bool = False
    lacks: Callable[[], str] = no_lack

    @property
    def can_be_repaired(self) -> bool:
        """Whether repair() can hand backward what was saved; as the route has it, unless told otherwise.

        It cannot where a checkpoint computes anew, and does not put a subclass around other tensors.
        """
        return (
            self.route not in ("checkpoint", "wrapper subclass", "nested tensor")
            if self.repairable is None
            else self.repairable
        )

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


PROGRAMS: list[Program] = []


def add(
    body: Body,
    *,
    route: str,
    kind: Kind,
    name: str = "",
    twin_of: str | Iterable[str] = (),
    truth: Truth = "without the write",
    caught: Moment = "write",
    every_call: Moment = "write",
    exact: bool = True,
    enters_guard: bool = False,
    allowed: bool = False,
    hooks: bool = True,
    read_in_vain: bool = False,
    repairable: bool | None = None,
    only_audit: bool = False,
    lacks: Callable[[], str] = no_lack,
) -> Program:
    """Put a program into the catalogue."""
    twins = (twin_of,) if isinstance(twin_of, str) else tuple(twin_of)
    found = Program(
        name or getattr(body, "__name__", ""),
        route,
        kind,
        body,
        twins,
        truth,
        caught,
        every_call,
        exact,
        enters_guard,
        allowed,
        hooks,
        read_in_vain,
        repairable,
        only_audit,
        lacks,
    )
    PROGRAMS.append(found)
    return found


def program(**declared: Any) -> Callable[[Body], Body]:
    """The same as a decorator; the program takes the function's name."""

    def decorate(body: Body) -> Body:
        add(body, **declared)
        return body

    return decorate


class Run:
    """One run of a program."""

    def __init__(
        self,
        *,
        writes: bool = True,
        guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
        around: Callable[[Callable[[], Any], list[torch.Tensor]], Any] | None = None,
        threads: bool = True,
        checkpoints: bool = True,
    ) -> None:
        self.writes = writes
        self._checkpoints = checkpoints
        self._threads = threads
        self.guard = guard
        self._around = around
        self.writers: list[Callable[..., Any]] = []

    def leaf(
        self, values: Any = VALUES, dtype: torch.dtype = torch.float32, requires_grad: bool = True
    ) -> torch.Tensor:
        """A leaf with memory of its own."""
        return torch.tensor(values, dtype=dtype, requires_grad=requires_grad)

    def checkpoint(self, **options: Any) -> Callable[..., Any]:
        """``torch.utils.checkpoint.checkpoint`` with these options; where saves are cloned the function is just called.

        Backward then reads what was saved in the forward, and nothing is recomputed: that is the truth.
        """
        if self._checkpoints:
            return functools.partial(torch.utils.checkpoint.checkpoint, **options)
        return lambda function, *args, **kwargs: function(*args, **kwargs)

    def in_thread(self, work: Callable[[], Any]) -> Any:
        """Work in a new thread; in place where the truth is computed with save hooks, which no thread inherits."""
        if not self._threads:
            return work()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    def write(self, write: Callable[..., Any], *args: Any) -> Any:
        """Make the write whose effect is in question, unless this run computes the truth without it."""
        if not self.writes:
            return None
        self.writers.append(write)
        if self._around is None:
            return write(*args)
        return self._around(functools.partial(write, *args), list(_tensors_behind((write, args))))


@dataclass
class Outcome:
    """What a run came to."""

    results: list[torch.Tensor | None] = field(default_factory=list)
    error: BaseException | None = None
    writers: list[Callable[..., Any]] = field(default_factory=list)


def _flat(result: Any) -> list[torch.Tensor | None]:
    if result is None or isinstance(result, torch.Tensor):
        return [None if result is None else result.detach().clone()]
    if isinstance(result, (list, tuple)):
        return [leaf for item in result for leaf in _flat(item)]
    return [torch.tensor(result)]


def outcome_of(case: Program, run: Run, guard: Callable[[], AbstractContextManager[Any]]) -> Outcome:
    """Run the program: its results, or its error. The same seed every time."""
    torch.manual_seed(20)
    outcome = Outcome(writers=run.writers)
    run.guard = guard
    try:
        with nullcontext() if case.enters_guard else guard():
            result = case.body(run)
        outcome.results = _flat(result)
    except Exception as error:
        error.__traceback__ = None  # frames would keep the run's graph alive
        outcome.error = error
    return outcome


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


# ---- memory -------------------------------------------------------------------------------------------------------


def _tensors_behind(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors that a write can get at: through its closure, its arguments, and the modules and lists there."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors_behind(value.param_groups, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_behind(item, seen)
    elif isinstance(value, dict):
        yield from _tensors_behind(list(value.values()), seen)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                yield from _tensors_behind(cell.cell_contents, seen)
        yield from _tensors_behind(value.__defaults__ or (), seen)
    elif isinstance(getattr(value, "__self__", None), torch.Tensor):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from _tensors_behind(value.args, seen)
    elif type(value).__module__ == "catalogue.hooked":
        names = getattr(value, "__slots__", None) or vars(value)
        yield from _tensors_behind([getattr(value, name) for name in names], seen)


def _memory_of(tensors: Iterable[torch.Tensor]) -> dict[int, bytes]:
    """The bytes of the tensors' storages, by address, without calling anything that a guard could see."""
    found = {}
    with torch._C.DisableTorchFunction():
        for tensor in tensors:
            while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor = torch._C._functorch.get_unwrapped(tensor)
            if (
                tensor.layout == torch.strided
                and tensor.device.type == "cpu"
                and not hasattr(tensor, "__tensor_flatten__")
            ):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = ctypes.string_at(storage.data_ptr(), storage.nbytes())
    return found


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:  # torch crashes on a view of these as bytes
        tensor = tensor.int_repr()
    return _plain(tensor).reshape(-1).view(torch.uint8)


def same_bits(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    """Whether two results are the same, bit for bit."""
    return len(a) == len(b) and all(
        x is y is None
        or (
            x is not None
            and y is not None
            and (x.dtype, x.shape) == (y.dtype, y.shape)
            and torch.equal(_bytes_of(x), _bytes_of(y))
        )
        for x, y in zip(a, b, strict=True)
    )


def same_values(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    """Whether two results hold equal numbers; NaN equals NaN, -0.0 equals 0.0."""
    return len(a) == len(b) and all(
        x is y is None
        or (
            x is not None
            and y is not None
            and x.shape == y.shape
            and torch.allclose(_plain(x), _plain(y), rtol=0, atol=0, equal_nan=True)
        )
        for x, y in zip(a, b, strict=True)
    )


# ---- the truth ----------------------------------------------------------------------------------------------------


class _Recorded:
    """A save as PyTorch itself keeps it: an input is the very tensor, an output a detached alias."""

    def __init__(self, tensor: torch.Tensor) -> None:
        node = tensor.grad_fn
        is_output = (
            node is not None and node._sequence_nr() == torch._C._autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        )
        self.tensor = tensor.detach() if is_output else tensor
        self.version = tensor._version


class Recorder:
    """Save hooks that see whether a write changes the bytes of a live save without moving its version."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[_Recorded] = weakref.WeakSet()
        #: How many elements of a live save changed silently, for each save and write where any did.
        self.changed: list[int] = []
        #: For each write: which of the storages that it can get at hold a save that it changes.
        self.corrupted: list[list[bool]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        return _under_the_programs_hooks(self._recording)

    def _recording(self, program: Hooks | None) -> Hooks:
        if program is None:
            return self._pack, lambda save: save.tensor

        def pack(tensor: torch.Tensor) -> Any:
            packed = program[0](tensor)
            storage = tensor.untyped_storage().data_ptr()
            read = [held for held in _tensors_behind(packed) if held.untyped_storage().data_ptr() == storage]
            return packed, [self._pack(held) for held in read]  # a copy, or a key: nothing that a write could reach

        return pack, lambda pair: program[1](pair[0])

    def _pack(self, tensor: torch.Tensor) -> _Recorded:
        save = _Recorded(tensor)
        self._live.add(save)
        return save

    def around(self, write: Callable[[], Any], tensors: list[torch.Tensor]) -> Any:
        storages = list(_memory_of(tensors))
        corrupted = set()
        before = [
            (weakref.ref(save), save.tensor.untyped_storage().data_ptr(), _bytes_of(save.tensor).clone())
            for save in self._live
        ]
        result = write()
        for hold, address, old in before:
            save = hold()
            if save is not None and save.tensor._version == save.version:
                new = _bytes_of(save.tensor)
                if new.shape != old.shape:
                    self.changed.append(save.tensor.numel())
                elif not torch.equal(new, old):
                    elements = (new != old).view(-1, save.tensor.element_size()).any(-1)
                    self.changed.append(int(elements.sum()))
                else:
                    continue
                corrupted.add(address)
        self.corrupted.append([address in corrupted for address in storages])
        return result


def _cloning() -> AbstractContextManager[Any]:
    def pair(program: Hooks | None) -> Hooks:
        pack, unpack = program or (lambda tensor: tensor, lambda tensor: tensor)
        return lambda tensor: pack(tensor.clone()), unpack

    return _under_the_programs_hooks(pair)


def lacks_shown_hooks() -> str:
    """For programs that push save hooks and enter a guard inside."""
    return "" if _torch.SHOWS_HOOKS else "this torch does not show hooks that were pushed before the guard"


def lacks_blocks_of_several() -> str:
    """For programs that have the counters of several tensors put back."""
    return "" if _torch.PRESERVES_SEVERAL else "a block of this torch preserves one tensor"


@functools.cache
def lacks_writable_capsules() -> str:
    """For programs that write to what NumPy makes of a DLPack capsule."""
    writable = np.from_dlpack(torch.ones(1)).flags.writeable  # type: ignore[arg-type]
    return "" if writable else "this torch's capsules are read-only arrays in NumPy"


@functools.cache
def lacks_versioned_capsules() -> str:
    """For programs that ask for a DLPack capsule of a version."""
    try:
        torch.ones(1).__dlpack__(max_version=(1, 0))
    except TypeError:
        return "this torch's capsules have no version"
    return ""


needs_shown_hooks = pytest.mark.skipif(bool(lacks_shown_hooks()), reason=lacks_shown_hooks())


def program_hooks() -> Hooks | None:
    """The innermost pair of save hooks on this thread's stack that is the program's, as far as this torch shows any."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    pair: Hooks | None = top(True) if top is not None else _hooks.top_of_program(_torch.top_hooks, None, (), {})
    return pair


def _comparing_no_versions() -> AbstractContextManager[Any]:
    return _under_the_programs_hooks(lambda program: program or (lambda tensor: tensor, lambda tensor: tensor))


@contextlib.contextmanager
def _under_the_programs_hooks(make: Callable[[Hooks | None], Hooks]) -> Iterator[None]:
    """Hooks for a run without a guard; where the program has save hooks of its own, ``make`` is given its pair.

    Only the innermost pair runs: what stands for all saves must stand in for the program's pairs, too.
    """
    autograd: Any = torch._C._autograd
    push = autograd._push_saved_tensors_default_hooks
    push(*make(program_hooks()))
    autograd._push_saved_tensors_default_hooks = lambda pack, unpack: push(*make((pack, unpack)))
    try:
        yield
    finally:
        autograd._push_saved_tensors_default_hooks = push
        autograd._pop_saved_tensors_default_hooks()


_plain_runs: dict[Program, Outcome] = {}
_cloned_runs: dict[Program, Outcome] = {}
_records: dict[Program, Recorder] = {}


def plain_run(case: Program) -> Outcome:
    """The program in PyTorch alone, with its write."""
    if case not in _plain_runs:
        with _quiet():
            _plain_runs[case] = outcome_of(case, Run(), nullcontext)
    return _plain_runs[case]


def run_with_cloned_saves(case: Program) -> Outcome:
    """The program with its write where backward reads what was saved, whatever happened since."""
    if case not in _cloned_runs:
        with _quiet():
            if case.hooks:
                _cloned_runs[case] = outcome_of(case, Run(threads=False, checkpoints=False), _cloning)
            else:
                _cloned_runs[case] = outcome_of(case, Run(writes=False), nullcontext)
    return _cloned_runs[case]


def recorded(case: Program) -> Recorder:
    """What the recorder saw of the program's writes."""
    if case not in _records:
        recorder = Recorder()
        if case.hooks:
            with _quiet():
                outcome_of(case, Run(around=recorder.around, threads=False), recorder.hooks)
        _records[case] = recorder
    return _records[case]


def computed_kind(case: Program) -> Kind:
    """The program's kind, as its runs tell."""
    plain = plain_run(case)
    if plain.error is not None:
        return "refused"
    with _quiet():
        without = outcome_of(case, Run(writes=False), nullcontext)
    cloned = run_with_cloned_saves(case)
    if cloned.error is not None:
        raise AssertionError(f"{case}: fails when saves are cloned") from cloned.error
    truth = cloned if case.truth == "cloned saves" else without
    if truth.error is not None:
        raise AssertionError(f"{case}: the run that computes the truth fails") from truth.error
    assert same_values(truth.results, cloned.results), (
        f"{case}: the write changes more than what backward reads; declare truth='cloned saves'"
    )
    if not same_values(plain.results, truth.results):
        return "corrupting"
    if not case.hooks:
        return "unread" if case.kind == "unread" else "innocent"
    return "unread" if recorded(case).changed else "innocent"


def skip_what_is_lacking(case: Program) -> None:
    """Skip the test of a program that this build of torch cannot run, or not as it is meant."""
    if lacking := case.lacks():
        pytest.skip(lacking)


def check_kind(case: Program) -> None:
    """The program is what it says it is."""
    skip_what_is_lacking(case)
    plain = plain_run(case)
    found = computed_kind(case)
    assert found == case.kind, f"{case} is {found}: {plain.error or plain.results}"
    assert plain.writers or found == "refused", f"{case} never writes"
    assert found == "refused" or plain.results, f"{case} returns nothing"


# ---- the guard ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """One way to be under the guard."""

    name: str
    make: MakeGuard
    #: The column of :data:`VERDICTS`.
    column: str = "strict"
    every_call: bool = False

    @property
    def at_read(self) -> bool:
        """Whether what it sees being written is left to the read."""
        return "read" in self.column or self.repairs

    @property
    def repairs(self) -> bool:
        """Whether it hands backward what was saved."""
        return self.column == "repair"

    def __str__(self) -> str:
        return self.name


MODES = (
    Mode("strict", lambda: torchguard.strict()),
    Mode("warn", lambda: torchguard.warn(), "warn"),
    Mode("strict_every_call", lambda: torchguard.strict(every_call=True), every_call=True),
    Mode("warn_every_call", lambda: torchguard.warn(every_call=True), "warn", every_call=True),
    Mode("strict_at_read", lambda: torchguard.strict(at="read"), 'strict(at="read")'),
    Mode("warn_at_read", lambda: torchguard.warn(at="read"), 'warn(at="read")'),
    Mode("repair", lambda: torchguard.repair(), "repair", every_call=True),
    Mode("audit", lambda: torchguard.audit(), "audit"),
)


#: What PyTorch says of a save whose version moved.
MOVED = "modified by an inplace operation"


# ---- the verdicts -------------------------------------------------------------------------------------------------

Verdict = Literal[
    "raises", "raises, if covered", "may raise", "warns", "may warn", "repairs", "silent", "PyTorch refuses"
]

#: What each mode must do with a program; docs/choosing.md shows this table. "may": at the write nobody can know whether
#: backward will read the save, or what comes of it; under watch(), a counter belongs to a whole storage.
#: What watch() covers stands in ``test_watch_catalogue``, which runs it.
VERDICTS: dict[str, dict[str, Verdict]] = {
    "corrupting": {
        "strict": "raises",
        'strict(at="read")': "raises",
        "warn": "warns",
        'warn(at="read")': "warns",
        "repair": "repairs",
        "audit": "raises",
        "watch": "raises, if covered",
    },
    "corrupting, what was saved is not to be had": {
        "strict": "raises",
        'strict(at="read")': "raises",
        "warn": "warns",
        'warn(at="read")': "warns",
        "repair": "raises",
        "audit": "raises",
        "watch": "raises, if covered",
    },
    "corrupting, through a raw pointer": {
        "strict": "silent",
        'strict(at="read")': "silent",
        "warn": "silent",
        'warn(at="read")': "silent",
        "repair": "repairs",
        "audit": "raises",
        "watch": "silent",
    },
    "corrupting, of what a Function stashed on its ctx": {
        "strict": "silent",
        'strict(at="read")': "silent",
        "warn": "silent",
        'warn(at="read")': "silent",
        "repair": "silent",
        "audit": "raises",
        "watch": "silent",
    },
    "written to, and never read": {
        "strict": "may raise",
        'strict(at="read")': "silent",
        "warn": "may warn",
        'warn(at="read")': "silent",
        "repair": "silent",
        "audit": "may raise",
        "watch": "may raise",
    },
    "written to, and read in vain": {
        "strict": "may raise",
        'strict(at="read")': "may raise",
        "warn": "may warn",
        'warn(at="read")': "may warn",
        "repair": "repairs",
        "audit": "may raise",
        "watch": "may raise",
    },
    "innocent, or allowed": {
        "strict": "silent",
        'strict(at="read")': "silent",
        "warn": "silent",
        'warn(at="read")': "silent",
        "repair": "silent",
        "audit": "silent",
        "watch": "may raise",
    },
    "refused by PyTorch, for a save that was written to": {
        "strict": "PyTorch refuses",
        'strict(at="read")': "PyTorch refuses",
        "warn": "PyTorch refuses",
        'warn(at="read")': "PyTorch refuses",
        "repair": "repairs",
        "audit": "PyTorch refuses",
        "watch": "PyTorch refuses",
    },
    "refused by PyTorch for another reason": {
        "strict": "PyTorch refuses",
        'strict(at="read")': "PyTorch refuses",
        "warn": "PyTorch refuses",
        'warn(at="read")': "PyTorch refuses",
        "repair": "PyTorch refuses",
        "audit": "PyTorch refuses",
        "watch": "PyTorch refuses",
    },
}


def table_of_verdicts() -> str:
    """:data:`VERDICTS` as docs/choosing.md shows it."""
    columns = list(next(iter(VERDICTS.values())))
    rows = [f"| {name} | {' | '.join(row[column] for column in columns)} |" for name, row in VERDICTS.items()]
    head = f"| a program that is | {' | '.join(f'`{column}`' for column in columns)} |"
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *rows])


def row_of(case: Program) -> str:
    """The row of :data:`VERDICTS` that a program stands in."""
    if case.kind == "innocent" or case.allowed:
        return "innocent, or allowed"
    if case.kind == "corrupting":
        if case.only_audit:
            pointer = case.can_be_repaired
            return f"corrupting, {'through a raw pointer' if pointer else 'of what a Function stashed on its ctx'}"
        return "corrupting" if case.can_be_repaired else "corrupting, what was saved is not to be had"
    if case.kind == "unread":
        return "written to, and read in vain" if case.read_in_vain else "written to, and never read"
    for_a_save = MOVED in str(plain_run(case).error) and run_with_cloned_saves(case).error is None
    if for_a_save and case.can_be_repaired:
        return "refused by PyTorch, for a save that was written to"
    return "refused by PyTorch for another reason"


def expected_verdict(case: Program, mode: Mode) -> Verdict:
    """What the mode must do with the program."""
    return VERDICTS[row_of(case)][mode.column]


class _Guarded:
    """Watches a guarded run: whether the guard raised at the write, and whether memory changed all the same."""

    def __init__(self, case: Program) -> None:
        self.raised_by: Callable[..., Any] | None = None
        self.changed = False
        self._case = case
        self._writes = 0

    def around(self, write: Callable[[], Any], tensors: list[torch.Tensor]) -> Any:
        before = _memory_of(tensors)
        self._writes += 1
        try:
            return write()
        except torchguard.SavedTensorCorruptionError:
            self.raised_by = write.func  # type: ignore[attr-defined]
            # A write of several steps may have changed other memory before it came to the save.
            corrupted = recorded(self._case).corrupted[self._writes - 1] if self._case.hooks else [True] * len(before)
            after = _memory_of(tensors)
            self.changed = any(
                after.get(address) != old
                for (address, old), holds_save in zip(before.items(), corrupted, strict=True)
                if holds_save
            )
            raise


def check_guarded(case: Program, mode: Mode) -> None:
    """The guard does with the program what it must, and leaves nothing behind."""
    plain = plain_run(case)
    recorded(case)  # before a guard is on
    if mode.repairs or case.kind == "refused":
        run_with_cloned_saves(case)
    watch = _Guarded(case)
    guards: list[torchguard.Guard] = []

    @contextlib.contextmanager
    def guarded() -> Iterator[torchguard.Guard]:
        guard = mode.make()
        guards.append(guard)
        with guard:
            yield guard

    before = _TorchAsItIs()
    with _quiet() as caught:
        outcome = outcome_of(case, Run(around=watch.around), guarded)
    left = before.differences()
    assert not left, f"{case}: the guard leaves something behind: {left}"

    assert len(guards) == 1, f"{case} enters {len(guards)} guards"
    spoken = [note for note in caught if issubclass(note.category, torchguard.SavedTensorCorruptionWarning)]
    told = _Told(case, mode, plain, outcome, guards[0], spoken, watch)
    told.check(expected_verdict(case, mode))


def check_all_modes(case: Program, modes: Iterable[Mode] = MODES) -> None:
    """The program under every mode; what fails is said with the mode's name."""
    skip_what_is_lacking(case)
    failed = []
    for mode in modes:
        try:
            check_guarded(case, mode)
        except AssertionError as error:
            failed.append(f"under {mode}: {error}")
    assert not failed, "\n".join(failed)


@dataclass
class _Told:
    case: Program
    mode: Mode
    plain: Outcome
    outcome: Outcome
    guard: torchguard.Guard
    spoken: list[warnings.WarningMessage]
    watch: _Guarded

    @property
    def moment(self) -> Moment:
        if self.mode.at_read:
            return "read"
        if self.case.kind == "unread":
            return "write"
        if self.case.only_audit:
            return "read"
        return self.case.every_call if self.mode.every_call else self.case.caught

    def check_refused(self) -> None:
        error, expected = self.outcome.error, self.plain.error
        assert error is not None, f"{self.case}: PyTorch refuses it, under the guard it passes"
        assert type(error) is type(expected), f"{self.case}: {error!r} instead of {expected!r}"
        assert str(error) == str(expected), f"{self.case}: not PyTorch's words:\n{error}\n{expected}"
        self.check_silent_but_for_the_error()

    def check(self, verdict: Verdict) -> None:
        """The guard did what it must."""
        if verdict == "PyTorch refuses":
            self.check_refused()
        elif verdict == "repairs":
            self.check_repaired()
        elif verdict in ("raises", "may raise"):
            self.check_raised(must=verdict == "raises")
        elif verdict in ("warns", "may warn"):
            self.check_warned(must=verdict == "warns")
            self.check_same_results()
        else:
            self.check_silent()
            self.check_same_results()
            assert all(violation.allowed for violation in self.guard.allowed)
            assert bool(self.guard.allowed) == self.case.allowed, f"{self.case}: allowed: {self.guard.allowed}"

    def check_repaired(self) -> None:
        """Backward read what was saved, and the guard said so."""
        truth, error = run_with_cloned_saves(self.case), self.outcome.error
        if error is not None:
            raise AssertionError(f"{self.case}: not repaired:\n{error}") from error
        assert same_values(self.outcome.results, truth.results), (
            f"{self.case}: repaired, and wrong: {self.outcome.results} is not {truth.results}"
        )
        if self.case.kind == "refused" and not self.spoken:
            self.check_nothing_to_heal(truth)
            return
        assert self.spoken, f"{self.case}: repaired, and nothing was said"
        assert self.guard.violations, f"{self.case}: warned, and guard.violations is empty"
        assert all(violation.repaired for violation in self.guard.violations)
        if self.case.kind == "corrupting":
            self.check_violation(self.guard.violations[0])

    def check_nothing_to_heal(self, truth: Outcome) -> None:
        """PyTorch would refuse it, and what backward would have read is what was saved, all the same."""
        self.check_silent()
        with _quiet():
            unchecked = outcome_of(self.case, Run(threads=False), _comparing_no_versions)
        assert same_values(unchecked.results, truth.results), f"{self.case}: repaired, and nothing was said"

    def check_silent(self) -> None:
        if self.outcome.error is not None:
            raise AssertionError(f"{self.case}: raised:\n{self.outcome.error}") from self.outcome.error
        self.check_silent_but_for_the_error()

    def check_silent_but_for_the_error(self) -> None:
        assert not self.spoken, f"{self.case}: false alarm:\n{self.spoken[0].message}"
        assert not self.guard.violations, f"{self.case}: false alarm:\n{self.guard.violations[0]}"

    def check_same_results(self) -> None:
        assert self.outcome.error is None, f"{self.case}: {self.outcome.error!r}"
        assert same_bits(self.outcome.results, self.plain.results), (
            f"{self.case}: the guard changes results: {self.outcome.results} is not {self.plain.results}"
        )

    def check_raised(self, must: bool) -> None:
        error = self.outcome.error
        if error is None:
            assert not must, f"{self.case}: missed"
            assert not self.guard.violations, f"{self.case}: violations, and nothing was raised"
            self.check_same_results()
            return
        if not isinstance(error, torchguard.SavedTensorCorruptionError):
            raise AssertionError(f"{self.case}: {error!r} is not the guard's") from error
        assert self.guard.violations, f"{self.case}: raised, and guard.violations is empty"
        text, violation = str(error), error.violation
        self.check_violation(violation)
        for place in (violation.saved, violation.written):
            assert place is None or f"{os.path.basename(place.file)}:{place.line}" in text, f"{place}\n{text}"
        if self.moment == "write":
            assert self.watch.raised_by is not None, f"{self.case}: raised, but not at the write:\n{text}"
            assert not self.watch.changed, f"{self.case}: memory had changed when the error came"
        else:
            assert self.watch.raised_by is None, f"{self.case}: caught at the write, not at the read"

    def check_warned(self, must: bool) -> None:
        if not self.spoken:
            assert not must, f"{self.case}: missed"
            assert not self.guard.violations, f"{self.case}: violations, and no warning"
            return
        assert self.guard.violations, f"{self.case}: warned, and guard.violations is empty"
        first = self.guard.violations[0]
        self.check_violation(first)
        place = first.written
        assert place is not None
        assert self.spoken[0].lineno == place.line
        assert _same_file(self.spoken[0].filename, place.file)
        if not must:
            for violation in self.guard.violations:
                assert violation.caught == self.moment, f"{self.case}: a save nobody misreads:\n{violation}"

    def check_violation(self, violation: torchguard.Violation) -> None:
        must = self.case.kind == "corrupting"
        assert violation.caught == self.moment, f"{self.case}: caught at the {violation.caught}:\n{violation}"
        saved = violation.saved
        assert saved is not None, f"{self.case}: no place that saved"
        if must:
            line = linecache.getline(os.path.abspath(saved.file), saved.line)
            assert SAVED_MARK in line, f"{self.case}: {saved} does not save: {line!r}"
        written = violation.written
        if violation.kind == "recompute" and violation.operation:
            assert written is not None
            assert any(_lies_in(written, writer) for writer in self.outcome.writers), f"{self.case}: {written}"
        left_to_the_read = self.mode.at_read and self.case.caught == "write" and not self.case.only_audit
        if left_to_the_read and violation.kind in ("write", "uncounted"):
            difference = violation.largest_difference
            assert difference is not None, f"{self.case}: by how much?\n{violation}"
            assert f", by up to {difference:.3g}" in str(violation)
        if violation.caught != "write" and not left_to_the_read:
            return
        assert written is not None, f"{self.case}: no place that wrote"
        assert any(_lies_in(written, writer) for writer in self.outcome.writers), (
            f"{self.case}: {written} does not write: {written.source!r}"
        )
        assert violation.operation, f"{self.case}: no operation"
        counts = recorded(self.case).changed
        if violation.kind == "write" and self.case.exact and self.case.hooks:
            assert violation.elements in counts, f"{self.case}: {violation.elements} elements, not {counts}"
        assert 0 < violation.elements <= violation.of
        aliased = violation.aliased
        assert aliased is None or any(word in aliased.source for word in TAKES_AN_ALIAS), (
            f"{self.case}: {aliased} takes no alias: {aliased.source!r}"
        )


def _lies_in(place: Any, function: Callable[..., Any]) -> bool:
    """Whether the place is a line of the function: of its only one, or of the one that is marked as the write."""
    code: types.CodeType = function.__code__  # type: ignore[attr-defined]
    lines = _lines_of(code)
    if place.line not in lines or not _same_file(place.file, code.co_filename):
        return False
    return len(lines) == 1 or WRITTEN_MARK in linecache.getline(code.co_filename, place.line)


def _lines_of(code: types.CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line is not None}
    if code.co_name != "<lambda>" and len(lines) > 1:
        lines.discard(code.co_firstlineno)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            lines |= _lines_of(constant)
    return lines


def _same_file(a: str, b: str) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)


_NAMESPACES = (
    torch.Tensor,
    torch,
    torch.nn.functional,
    torch._C._nn,
    torch._VF,
    torch._C._autograd,
    torch._C._TensorBase,
    torch.UntypedStorage,
    torch.utils.dlpack,
    torch._C,
    torch.autograd._unsafe_preserve_version_counter,
)


class _TorchAsItIs:
    """What a guard could leave behind: hooks, modes, and every attribute of the namespaces it patches, by identity."""

    def __init__(self) -> None:
        self._spaces = [dict(vars(space)) for space in _NAMESPACES]
        self._stacks = self._stacks_now()

    @staticmethod
    def _stacks_now() -> Any:
        return {
            "save hooks": program_hooks(),
            "function modes": torch.overrides._len_torch_function_stack(),  # type: ignore[attr-defined]
            "dispatch modes": torch._C._len_torch_dispatch_stack(),
            "grad mode": torch.is_grad_enabled(),
        }

    def differences(self) -> list[str]:
        now = self._stacks_now()
        told = [name for name, value in self._stacks.items() if now[name] != value]
        for space, before in zip(_NAMESPACES, self._spaces, strict=True):
            after = vars(space)
            # map() stops at the shorter one: the lengths say whether there is more.
            if len(after) != len(before) or not all(map(operator.is_, after.values(), before.values())):
                missing = object()
                told += [
                    f"{space.__name__}.{name}"
                    for name in before.keys() | after.keys()
                    if before.get(name, missing) is not after.get(name, missing)
                    and not isinstance(after.get(name), types.ModuleType)  # imported meanwhile
                ]
        return told
