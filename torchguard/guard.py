"""How is the guard switched on and off: ``strict()``, ``warn()``, ``Guard`` and ``allow()``?"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

from torchguard import _config, _hooks, _intercept, _policy, _reads, _suppressions, _watch
from torchguard._findings import Findings
from torchguard._stats import Stats, Tally
from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning, Violation

F = TypeVar("F", bound=Callable[..., Any])

Action = Literal["raise", "warn", "repair", "record"]
Moment = Literal["write", "read"]
Depth = Literal["watch", "saves", "bytes"]

Suppressions = _suppressions.Suppressions | str | os.PathLike[str] | Iterable[str] | None

Step = int | Callable[[], int] | None


class _Block:
    """A context manager that also decorates functions, generator functions and coroutine functions."""

    def _fresh(self) -> Any:
        """A context manager for one call of a decorated function."""
        raise NotImplementedError

    def __call__(self, function: F) -> F:
        if not callable(function):
            raise TypeError(f"torchguard: {type(self).__name__.lower()}() decorates functions, not {function!r}")
        if isinstance(function, type):
            raise TypeError(
                f"torchguard: {type(self).__name__.lower()}() decorates functions, not the class {function.__name__}: "
                "decorate the methods that are to be watched"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._fresh():
                    return await function(*args, **kwargs)

            return cast("F", run_coroutine)
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def run_asynchronous_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
                with self._fresh():
                    async for value in function(*args, **kwargs):
                        yield value

            return cast("F", run_asynchronous_generator)
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def run_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                # On only while the generator runs, off while its consumer does, as torch.no_grad() does it.
                return _driven(function(*args, **kwargs), self._fresh)

            return cast("F", run_generator)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._fresh():
                return function(*args, **kwargs)

        return cast("F", run)


def _driven(generator: Generator[Any, Any, Any], fresh: Callable[[], Any]) -> Generator[Any, Any, Any]:
    """Run a generator with a fresh block around each of its steps."""
    resume, argument = generator.send, None
    try:
        while True:
            with fresh():
                try:
                    value = resume(argument)
                except StopIteration as stop:
                    return stop.value
            try:
                resume, argument = generator.send, (yield value)
            except GeneratorExit:
                raise
            except BaseException as error:
                resume, argument = generator.throw, error
    finally:
        with fresh():
            generator.close()


class Guard(_Block):
    """Watches every tensor that autograd saves and every write to its memory, from entering to leaving.

    Use it as ``with Guard() as guard:`` or as a decorator. A guard is entered once; make a new one for the
    next block. Guards nest: the innermost one of a thread answers. Threads that are started inside are under
    it too.

    Args:
        action: what happens at a violation: ``"raise"`` a :class:`SavedTensorCorruptionError`, ``"warn"`` a
            :class:`SavedTensorCorruptionWarning` once a site, ``"repair"`` it (backward is given the bytes that were
            saved, with a warning once a site; an error where they are not at hand), or just ``"record"`` it.
        at: ``"write"``: judged when the write is about to happen, before memory changes. (What only the
            alias's version counter gives away is judged when backward reads the save.) ``"read"``: the bytes decide,
            when backward reads the save. A write that is undone, or whose save nobody reads, is none. Costs a copy of
            each save that is written to, made before the first write. The default, but for ``"repair"``, which can
            only be at the read.
        depth: ``"saves"``: every tensor that autograd saves is known. ``"bytes"``: and a copy of it is kept, so that
            backward notices what no Python sees. ``"watch"``: none is, see :func:`watch`; only with ``action="raise"``
            and ``at="read"``.
        every_call: also see calls that no patch sees (``out=``, ``torch.ops``, functions bound before the
            guard), at the cost of about a microsecond for every torch call.
        suppressions: violations to live with: path of a file, or lines ``GLOB[:LINE|:FUNCTION] [KIND] -- REASON``.

    Attributes:
        step: which step of the training this is, or a function that says so: what is found is reported with it. A
            training loop sets it (``guard.step = i``); the trainers' callbacks do so themselves.

    Raises:
        TypeError: where it is used as a decorator without parentheses.
        ValueError: for an action, a moment or a depth that does not exist or a combination that makes no sense, or a
            suppression that cannot be read.
    """

    def __init__(
        self,
        action: Action = "raise",
        at: Moment | None = None,
        depth: Depth = "saves",
        every_call: bool = False,
        suppressions: Suppressions = None,
    ) -> None:
        if callable(action):
            raise TypeError(_misused("Guard", action))
        _check("action", action, _config.ACTIONS)
        _check("depth", depth, _config.DEPTHS)
        if not isinstance(every_call, bool):
            raise TypeError(f"torchguard: every_call is True or False, not {every_call!r}")
        if depth == "watch":
            _check_watch(action, at or "write", every_call)
        elif at is not None:
            _check("at", at, _config.MOMENTS)
        senseless = _config.senseless(action, at, depth)
        if senseless is not None:
            raise ValueError(f"torchguard: {senseless}")
        self.action: Action = action
        self.at: Moment = at or ("read" if action == "repair" else "write")
        self.depth = depth
        self.every_call = every_call
        self.suppressions, problems = _suppressions.read(suppressions, "suppressions")
        if problems:
            raise ValueError(f"torchguard: {problems[0]}")
        self.findings = Findings(watching=depth == "watch")
        #: Told of every violation, and whether its site is new, before it is answered. Must not raise.
        self.listener: Callable[[Violation, bool], None] | None = None
        #: How many sites to warn of; None for all.
        self.max_reports: int | None = None
        self._step: Step = None
        #: Counts while it is on. (Used by torchguard.)
        self.tally = Tally()
        self._warned = 0
        self._state: Literal["new", "entered", "left"] = "new"
        self._pairs: list[tuple[Any, int]] = []
        self._take_back: Callable[[], None] | None = None  # undoes every_call in the thread that asked for it
        self._patches: list[Any] = []
        self._thread = 0

    @property
    def step(self) -> Step:
        """Which step of the training this is, or a function that says so.

        Raises:
            TypeError: when it is set to anything else, but for None.
        """
        return self._step

    @step.setter
    def step(self, step: Step) -> None:
        if not (step is None or callable(step) or hasattr(step, "__int__")):
            raise TypeError(f"torchguard: guard.step is a number, a function that returns one, or None, not {step!r}")
        self._step = step

    def __repr__(self) -> str:
        return f"<torchguard.Guard action={self.action!r}, {self._state}, {len(self.violations)} violations>"

    def _fresh(self) -> Guard:
        guard = Guard(self.action, self.at, self.depth, self.every_call, self.suppressions)
        guard.findings = self.findings  # what the calls of a decorated function find, the decorator knows
        guard.findings.sum_up_at_exit = self.action == "repair"
        guard.step = self._step
        guard.tally = self.tally
        return guard

    # ---- entering and leaving

    def __enter__(self) -> Guard:
        return self._enter(everywhere=False)

    def enter_everywhere(self) -> Guard:
        """Enter, for all threads of the process; leave with :meth:`leave`. (Called by torchguard.)"""
        return self._enter(everywhere=True)

    def _enter(self, everywhere: bool) -> Guard:
        if self._state != "new":
            what = "is entered already" if self._state == "entered" else "has been used"
            raise RuntimeError(
                f"torchguard: this guard {what}; make a new one for each block, with torchguard.strict() say"
            )
        self._thread = threading.get_ident()
        _intercept.prepare()
        _watch.prepare()  # neither may find the other's patches
        if self.depth == "watch":
            _watch.install()
            try:
                _policy.enter(self, everywhere)
            except BaseException:
                _policy.leave(self)
                _watch.uninstall()
                raise
            self._state = "entered"
            return self
        _intercept.install()
        try:
            self.tally.begin()
            _policy.enter(self, everywhere)
            if everywhere:
                self.cover_this_thread()
            else:
                self._pairs.append((_hooks.push(self.audits), self._thread))
            for needed, patch in ((self.audits, _intercept.STASHES), (self.repairs, _intercept.POINTERS)):
                if needed:
                    patch.begin()
                    self._patches.append(patch)
            if self.every_call:
                self._take_back = functools.partial(_intercept.see_patched_calls, _intercept.see_every_call())
        except BaseException:
            self._leave()
            raise
        self._state = "entered"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def cover_this_thread(self) -> None:
        """Watch what this thread saves, from now on. (Called by torchguard.)"""
        if self.depth == "watch":
            return
        self._pairs.append((_hooks.push(self.audits), threading.get_ident()))

    def leave(self) -> None:
        """Leave, as at the end of the block."""
        if self._state != "entered":
            raise RuntimeError("torchguard: this guard is not entered")
        self._state = "left"
        if self.depth == "watch":
            try:
                _policy.leave(self)
            finally:
                _watch.uninstall()
            return
        try:
            if _policy.entered == [self]:
                _reads.leave_to(self)
        finally:
            self._leave()

    def _leave(self) -> None:
        everywhere = self in _policy.process_wide  # whoever switched it on sums up
        with ExitStack() as steps:  # the last one first, and each whatever becomes of the others
            if not everywhere:
                steps.callback(self.findings.sum_up)
            steps.callback(self.tally.end)
            steps.callback(_intercept.uninstall)
            steps.callback(_policy.leave, self)
            for pair, thread in self._pairs:
                if thread == threading.get_ident():
                    steps.callback(_hooks.remove, pair)
                else:
                    steps.callback(_hooks.abandon, functools.partial(_hooks.remove, pair), thread, id(pair[0]))
            self._pairs.clear()
            for patch in self._patches:
                steps.callback(patch.end)
            self._patches.clear()
            take_back, self._take_back = self._take_back, None
            if take_back is not None and self._thread == threading.get_ident():
                steps.callback(take_back)
            elif take_back is not None:
                steps.callback(_hooks.abandon, take_back, self._thread)

    # ---- what it found

    @property
    def violations(self) -> list[Violation]:
        """The violations so far, one a site, in the order in which they were first seen."""
        return self.findings.violations()

    @property
    def allowed(self) -> list[Violation]:
        """The writes that an :func:`allow` block permitted, one a site, each with its reason."""
        return self.findings.allowed()

    @property
    def unwatched(self) -> list[str]:
        """What this build of torch, or this program, keeps out of the guard's sight, and why."""
        return self.findings.unwatched()

    @property
    def stats(self) -> Stats:
        """What has been done while the guard was on, counted in all threads. Looks at each live save."""
        return self.tally.stats()

    # ---- what the policy calls

    @property
    def sees_every_call(self) -> bool:
        """Whether calls are seen that no patch sees. (Asked by torchguard.)"""
        return self.every_call

    @property
    def judges_at_read(self) -> bool:
        """Whether the bytes decide when backward reads. (Asked by torchguard.)"""
        return self.at == "read" and self.depth != "watch"

    @property
    def repairs(self) -> bool:
        """Whether backward is given what was saved. (Asked by torchguard.)"""
        return self.action == "repair"

    @property
    def audits(self) -> bool:
        """Whether the bytes of every save are kept. (Asked by torchguard.)"""
        return self.depth == "bytes"

    def heal(self, violation: Violation) -> bool:
        """Answer a violation that is repaired, unless it is one to live with. (Called by torchguard.)"""
        suppressed = self.suppressions.reason_for(violation) is not None
        self.respond(replace(violation, repaired=not suppressed))
        return not suppressed

    def respond(self, violation: Violation) -> None:
        """Raise, warn or record. (Called by torchguard.)"""
        reason = self.suppressions.reason_for(violation)
        if reason is not None:
            violation = replace(violation, allowed=reason)
        violation = self._with_step(violation)
        new = self.findings.keep(violation)
        if self.listener is not None:
            self.listener(violation, new)
        if reason is not None:
            return
        if self.action == "raise" or (self.action == "repair" and not violation.repaired):
            raise SavedTensorCorruptionError(violation)
        if self.action != "record" and new and (self.max_reports is None or self._warned < self.max_reports):
            self._warned += 1
            place = violation.written
            warnings.warn_explicit(
                SavedTensorCorruptionWarning(str(violation)),
                category=SavedTensorCorruptionWarning,
                filename=place.file if place else "<autograd>",
                lineno=place.line if place else 0,
            )

    def record_allowed(self, violation: Violation) -> None:
        """Keep a violation that is allowed. (Called by torchguard.)"""
        violation = self._with_step(violation)
        new = self.findings.keep(violation)
        if self.listener is not None:
            self.listener(violation, new)

    def _with_step(self, violation: Violation) -> Violation:
        try:
            step = self._step() if callable(self._step) else self._step
            return violation if step is None else replace(violation, step=int(step))
        except Exception:  # the user's function, or the user's number: the violation must be told all the same
            return violation

    def note_unwatched(self, what: str) -> None:
        """Keep what is out of sight. (Called by torchguard.)"""
        self.findings.note_unwatched(what)


def _check_watch(action: str, at: str, every_call: bool) -> None:
    right = 'depth="watch" goes with action="raise", at="read" and every_call=False, as in torchguard.watch()'
    if action != "raise":
        raise ValueError(f"torchguard: PyTorch itself refuses, nothing can only {action}: {right}, not {action!r}")
    if at != "read":
        raise ValueError(
            f"torchguard: no write is seen, the version is compared when backward reads: {right}, not {at!r}"
        )
    if every_call:
        raise ValueError(f"torchguard: no call is seen: {right}, not every_call=True")


def _check(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"torchguard: {name} is one of {', '.join(map(repr, choices))}, not {value!r}")


def _by_keyword(preset: F) -> F:
    """The same, which says how it is written where it is given something without a keyword."""
    name = preset.__name__

    @functools.wraps(preset)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(_misused(name, args[0]))
        return preset(**kwargs)

    return cast("F", checked)


def _misused(name: str, given: object) -> str:
    if callable(given):
        return f"torchguard: as a decorator it is @torchguard.{name}(), with parentheses, not @torchguard.{name}"
    return f"torchguard: {name}() takes at=, every_call= and suppressions=, by keyword, not {_short(given)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"a {type(value).__name__}"


@_by_keyword
def strict(*, at: Moment | None = None, every_call: bool = False, suppressions: Suppressions = None) -> Guard:
    """Raise :class:`SavedTensorCorruptionError` at the line that corrupts, before any memory changes.

    Args:
        at: when to judge, see :class:`Guard`.
        every_call: see :class:`Guard`.
        suppressions: see :class:`Guard`.
    """
    return Guard("raise", at, every_call=every_call, suppressions=suppressions)


@_by_keyword
def warn(*, at: Moment | None = None, every_call: bool = False, suppressions: Suppressions = None) -> Guard:
    """Warn with :class:`SavedTensorCorruptionWarning`, once a site; results are those of the unguarded
    program.

    Args:
        at: when to judge, see :class:`Guard`.
        every_call: see :class:`Guard`.
        suppressions: see :class:`Guard`.
    """
    return Guard("warn", at, every_call=every_call, suppressions=suppressions)


@_by_keyword
def repair(*, at: Moment | None = None, every_call: bool = True, suppressions: Suppressions = None) -> Guard:
    """Hand backward the bytes that were saved, whatever was written since; warn, once a site, of what was repaired.

    Writes that PyTorch sees, and would refuse, are repaired as well. What cannot be (a raw pointer, what a checkpoint
    reads again) raises :class:`SavedTensorCorruptionError`. Leaving it prints one line that says what was repaired.

    Args:
        at: only ``"read"``, the default.
        every_call: see :class:`Guard`. Without it, what only such a call writes (``out=``, ``torch.ops``) is refused by
            PyTorch or raises, where it cannot be repaired.
        suppressions: see :class:`Guard`; what they speak of is not repaired.
    """
    return Guard("repair", at, every_call=every_call, suppressions=suppressions)


@_by_keyword
def audit(*, at: Moment | None = None, every_call: bool = False, suppressions: Suppressions = None) -> Guard:
    """:func:`strict`, and the bytes of every save are kept and compared when backward reads it.

    So writes are noticed that no Python sees: those of Triton, C++ and ctypes code through ``data_ptr()``, of custom
    operators that do not say what they write to, of other processes, and those to tensors that a Function stashed as
    ``ctx.x = x``. Takes the memory of everything that is saved once more. On a GPU the comparisons are asked for once,
    when backward ends; while a CUDA graph is captured nothing is copied or compared.

    Args:
        at: see :class:`Guard`.
        every_call: see :class:`Guard`.
        suppressions: see :class:`Guard`.
    """
    return Guard("raise", at, "bytes", every_call, suppressions)


@_by_keyword
def watch(*, at: Literal["read"] = "read", every_call: bool = False, suppressions: Suppressions = None) -> Guard:
    """Make PyTorch's own check complete, at next to no cost: for production.

    There are no save hooks, and ordinary calls are left alone. Aliases made by ``.data`` share the version counter of
    their source, and writes that move no counter have it moved for them, so PyTorch refuses at the read what it would
    refuse had the program said ``.detach()`` where it says ``.data``. Its error is raised as a
    :class:`SavedTensorCorruptionError`, which holds PyTorch's message word for word and says where the alias was taken.
    A counter belongs to a whole storage: a write to another row of it is refused, too.

    Args:
        at: PyTorch compares versions when backward reads; there is no other moment.
        every_call: no call is seen, so there is nothing to switch on.
        suppressions: see :class:`Guard`. What is suppressed is refused all the same, in PyTorch's words alone.

    Raises:
        ValueError: for another ``at`` or ``every_call``.
    """
    return Guard("raise", at, "watch", every_call, suppressions)


_NEEDS_REASON = 'torchguard: allow() needs a reason, for example allow("the weights are put back before backward")'


class allow(_Block):
    """A block, or a decorated function, whose writes are intended; nothing in it is a violation.

    Args:
        reason: why; it is kept with each write that it allowed, in ``guard.allowed``.

    Raises:
        TypeError, ValueError: without a reason.
    """

    def __init__(self, reason: str = "") -> None:
        if not isinstance(reason, str):
            raise TypeError(_NEEDS_REASON)
        if not reason.strip():
            raise ValueError(_NEEDS_REASON)
        self.reason = reason

    def _fresh(self) -> allow:
        return self

    def __enter__(self) -> allow:
        _reads.look_for_unseen_writes()
        _policy.state.reasons.append(self.reason)
        _watch.aside.append(self.reason)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _reads.look_for_unseen_writes(leaving=True)
        reasons = _policy.state.reasons
        if self.reason in _watch.aside:
            _watch.aside.remove(self.reason)
        for i in range(len(reasons) - 1, -1, -1):
            if reasons[i] is self.reason:
                del reasons[i]
                break


while _policy.waiting:
    _policy.waiting.pop()()
