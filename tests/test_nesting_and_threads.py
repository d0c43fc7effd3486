"""Which guard answers where guards nest, and what do other threads, tasks and processes see of them?"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchguard import (
    Guard,
    SavedTensorCorruptionError,
    SavedTensorCorruptionWarning,
    _ledger,
    _memory,
    _packing,
    _policy,
    _reads,
    _torch,
    allow,
    strict,
    warn,
    watch,
)
from torchguard._saves import LEDGER

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


def corrupt() -> None:
    y = leaf().exp()
    y.data.zero_()


def test_who_answers_and_who_is_handed_on_to_a_thread() -> None:
    assert _policy.innermost() is None
    with watch() as outer:
        assert _policy.innermost() is outer
        assert _policy.inherited() == []  # it has nothing in any thread
        with strict() as inner:
            assert _policy.innermost() is inner
            assert _policy.inherited() == [outer, inner]
        assert _policy.innermost_of_depth("watch") is outer
        assert _policy.innermost_of_depth("saves") is None
    assert _policy.innermost() is None
    assert [_policy.is_watch(guard) for guard in (None, outer, inner)] == [False, True, False]


def test_a_guard_of_one_thread_and_one_of_all() -> None:
    one, everywhere = Guard("record"), Guard("record")
    _policy.enter(one)
    _policy.enter(everywhere, everywhere=True)
    try:
        assert (_policy.state.guards, _policy.process_wide, _policy.entered) == ([one], [everywhere], [one, everywhere])
        assert _policy.innermost() is one
        assert run(_policy.innermost) is everywhere
        assert _policy.inherited() == [everywhere, one]
    finally:
        _policy.leave(one)
        assert _policy.innermost() is everywhere
        _policy.leave(everywhere)
        _policy.leave(everywhere)  # it has been left: nothing to be done
    assert (_policy.state.guards, _policy.process_wide, _policy.entered) == ([], [], [])


def test_somebody_else_answers_for_a_block() -> None:
    other = Guard("record")
    with strict() as guard:
        with pytest.raises(ValueError, match="in between"), _policy.instead(other):
            assert _policy.innermost() is other
            assert _policy.state.guards == [guard, other]
            corrupt()
            raise ValueError("in between")
        assert _policy.innermost() is guard
        assert _policy.state.guards == _policy.entered == [guard]
        assert guard.violations == []
        assert [violation.operation for violation in other.violations] == ["zero_()"]


def test_what_was_begun_in_an_allow_block_ends_in_it() -> None:
    with strict() as guard, allow("of this moment"):
        with pytest.raises(ValueError, match="in between"), _policy.allowed_for(["first", "begun in"]):
            assert _policy.state.reasons == ["first", "begun in", "of this moment"]
            raise ValueError("in between")
        assert _policy.state.reasons == ["of this moment"]
    with strict() as guard, _policy.allowed_for(["begun in"]):
        corrupt()
    assert [violation.allowed for violation in guard.allowed] == ["begun in"]
    assert outcome() == "silent"


def outcome() -> str:
    """What a corrupting program meets here and now."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            corrupt()
        except SavedTensorCorruptionError:
            return "raise"
    return "warn" if told else "silent"


def run(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or raises, in a thread of its own."""
    result: list[Any] = []

    def body() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return result[0]


# ---- nesting -----------------------------------------------------------------------------------------------

ACTIONS = ("raise", "warn", "record")


@pytest.mark.parametrize("inner", ACTIONS)
@pytest.mark.parametrize("outer", ACTIONS)
def test_the_innermost_guard_rules(outer: Any, inner: Any) -> None:
    said = {"raise": "raise", "warn": "warn", "record": "silent"}
    with Guard(outer) as around:
        assert outcome() == said[outer]
        with Guard(inner) as within:
            assert outcome() == said[inner]
        assert outcome() == ("silent" if outer == "warn" else said[outer])  # a known site: warned once
    assert [violation.times for violation in around.violations] == [2]
    assert [violation.times for violation in within.violations] == [1]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_every_call_nests(outer: bool, inner: bool) -> None:
    with strict(every_call=outer):
        with strict(every_call=inner):
            assert outcome() == "raise"
        y = leaf().exp()
        caught_at_once = False
        try:
            torch.zeros(3, out=y.data)
        except SavedTensorCorruptionError:
            caught_at_once = True
        assert caught_at_once is outer


def test_ten_deep() -> None:
    guards = [Guard("record") for _ in range(10)]
    for guard in guards:
        guard.__enter__()
        corrupt()
    for guard in reversed(guards):
        guard.__exit__(None, None, None)
        corrupt()
    assert [sum(v.times for v in guard.violations) for guard in guards] == [2] * 9 + [1]


def test_a_save_of_the_outer_guard_written_to_in_the_inner_one() -> None:
    with strict() as outer:
        y = leaf().exp()
        with Guard("record") as inner:
            y.data.zero_()
        y.sum().backward()
    assert len(inner.violations) == 1
    assert outer.violations == []


def test_a_save_of_the_inner_guard_written_to_in_the_outer_one() -> None:
    with Guard("record") as outer:
        with strict() as inner:
            y = leaf().exp()
        y.data.zero_()
    assert len(outer.violations) == 1
    assert inner.violations == []


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_call", [False, True])
def test_a_thread_started_inside_runs_under_the_guard(every_call: bool) -> None:
    with strict(every_call=every_call) as guard:
        answer = run(corrupt)
    assert isinstance(answer, SavedTensorCorruptionError)
    assert answer.violation.thread.startswith("Thread-")
    assert len(guard.violations) == 1


def write_by_out() -> None:
    y = torch.ones(3, requires_grad=True).exp()
    with torch.no_grad():
        torch.neg(y, out=y.data)


def test_a_thread_started_inside_sees_every_call_if_its_parent_does() -> None:
    for start in (run, lambda work: ThreadPoolExecutor(1).submit(work).exception()):
        with strict(every_call=True) as guard:
            answer = start(write_by_out)
        assert isinstance(answer, SavedTensorCorruptionError)
        assert (answer.violation.caught, answer.violation.operation) == ("write", "out=")
        assert len(guard.violations) == 1
        with strict() as guard:
            assert start(write_by_out) is None


def test_nothing_is_left_on_the_stack_of_a_pools_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        with strict(every_call=True):
            assert pool.submit(torch._C._len_torch_function_stack).result() == 1
        assert pool.submit(torch._C._len_torch_function_stack).result() == 0


def test_a_thread_started_by_such_a_thread_as_well() -> None:
    with strict():
        assert isinstance(run(lambda: run(corrupt)), SavedTensorCorruptionError)


def test_a_thread_follows_the_innermost_guard_of_its_parent() -> None:
    with strict(), Guard("record") as inner:
        assert run(corrupt) is None
    assert len(inner.violations) == 1


def test_another_threads_write_to_this_threads_save() -> None:
    with strict() as guard:
        x = leaf()
        y = x.exp()
        answer = run(lambda: y.data.zero_())
        assert isinstance(answer, SavedTensorCorruptionError)
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, x.detach().exp())
    assert len(guard.violations) == 1


def test_this_threads_write_to_another_threads_save() -> None:
    with strict():
        y = run(lambda: leaf().exp())
        with pytest.raises(SavedTensorCorruptionError):
            y.data.zero_()


def test_another_threads_tracked_write_is_refused_by_pytorch() -> None:
    with strict() as guard:
        y = leaf().exp()
        run(lambda: y.detach().zero_())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert guard.violations == []


def test_a_thread_that_was_there_before_writes_to_a_save() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with strict() as guard:
            y = leaf().exp()
            error = pool.submit(lambda: y.data.zero_()).exception(30)
        assert isinstance(error, SavedTensorCorruptionError)
        assert len(guard.violations) == 1
        assert pool.submit(outcome).result(30) == "silent"


def test_a_thread_that_was_there_before_enters_a_guard_of_its_own() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        def work() -> str:
            with strict():
                return outcome()

        with Guard("record") as guard:
            assert pool.submit(work).result(30) == "raise"
            assert outcome() == "silent"
        assert [violation.times for violation in guard.violations] == [1]
        assert pool.submit(outcome).result(30) == "silent"


def test_a_pool_made_inside() -> None:
    with strict() as guard:
        with ThreadPoolExecutor(2) as pool:
            errors = [pool.submit(corrupt).exception(30) for _ in range(4)]
    assert all(isinstance(error, SavedTensorCorruptionError) for error in errors)
    assert sum(violation.times for violation in guard.violations) == 4


def test_a_thread_that_outlives_the_guard_is_harmless() -> None:
    go, answers = threading.Event(), []

    def work() -> None:
        x = leaf()
        y = x.exp()
        go.wait(30)
        y.data.mul_(1)
        y.sum().backward()
        answers.append(x.grad)
        answers.append(outcome())

    with strict() as guard:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive() and not guard.unwatched and thread.ident is None:
            time.sleep(0.001)
    go.set()
    thread.join(30)
    grad, said = answers
    assert torch.equal(grad, leaf().detach().exp())
    assert said == "silent"
    assert guard.violations == []


def test_a_thread_that_outlives_the_guard_answers_to_the_next_one_or_to_none() -> None:
    """The first guard has left: it must not hear of anything any more."""
    start, done = threading.Event(), threading.Event()
    answers: list[str] = []

    def work() -> None:
        start.wait(30)
        answers.append(outcome())
        done.set()

    with strict() as first:
        thread = threading.Thread(target=work)
        thread.start()
    with Guard("record") as second:
        start.set()
        done.wait(30)
    thread.join()
    assert answers == ["silent"]
    assert first.violations == []
    assert len(second.violations) <= 1


def test_the_thread_object_is_left_as_it_was() -> None:
    class Worker(threading.Thread):
        def run(self) -> None:
            self.seen = outcome()

    own: list[int] = []
    with strict():
        worker = Worker()
        worker.start()
        worker.join()
        assert worker.seen == "raise"
        assert "run" not in vars(worker)
        assigned = threading.Thread()
        assigned.run = run_of = lambda: own.append(1)  # type: ignore[method-assign]
        assigned.start()
        assigned.join()
        assert own == [1]
        assert vars(assigned)["run"] is run_of


def test_a_timer_runs_under_the_guard() -> None:
    answers: list[str] = []
    with strict():
        timer = threading.Timer(0.001, lambda: answers.append(outcome()))
        timer.start()
        timer.join()
    assert answers == ["raise"]


def test_a_thread_that_cannot_be_started_twice_says_so_as_ever() -> None:
    with strict():
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            thread.start()
        assert "run" not in vars(thread)


def test_threads_that_enter_and_leave_at_random_times(found: Callable[[], Any]) -> None:
    before = found()
    stop = time.monotonic() + 1.0
    wrong: list[Any] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while time.monotonic() < stop:
                guards = [
                    Guard("raise" if seed % 2 else "record", every_call=chance.random() < 0.3)
                    for _ in range(chance.randrange(1, 4))
                ]
                for guard in guards:
                    guard.__enter__()
                x = leaf()
                y = (x.exp() * x).sigmoid()
                y.sum().backward()
                if x.grad is None or not torch.equal(x.grad, expected):
                    wrong.append("a gradient")
                said = outcome()
                if said != ("raise" if seed % 2 else "silent"):
                    wrong.append(said)
                chance.shuffle(guards)
                for guard in guards:
                    guard.__exit__(None, None, None)
                if chance.random() < 0.2:
                    time.sleep(0.001)
        except BaseException as error:
            wrong.append(error)

    x = leaf()
    (x.exp() * x).sigmoid().sum().backward()
    expected = x.grad
    assert expected is not None
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert before.differences() == []


def test_backward_in_another_thread() -> None:
    with strict() as guard:
        x = leaf()
        y = x.exp()
        assert run(lambda: y.sum().backward()) is None
        assert x.grad is not None
        assert torch.equal(x.grad, x.detach().exp())
        y = leaf().exp()
        torch.zeros(3, out=y.data)
        assert isinstance(run(lambda: y.sum().backward()), SavedTensorCorruptionError)
    assert len(guard.violations) == 1


def test_backward_in_a_thread_that_was_there_before() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with strict() as guard:
            y = leaf().exp()
            torch.zeros(3, out=y.data)
            error = pool.submit(lambda: y.sum().backward()).exception(30)
    assert isinstance(error, SavedTensorCorruptionError)
    assert len(guard.violations) == 1


@pytest.mark.parametrize("every_call", [False, True])
def test_a_guard_left_in_another_thread_restores_torch(found: Callable[[], Any], every_call: bool) -> None:
    """A generator can be closed, or collected, anywhere. Save hooks and modes belong to a thread, patches do not."""
    before = found()

    def body() -> Iterator[int]:
        with strict(every_call=every_call):
            yield 1

    generator: Any = body()
    next(generator)
    assert run(generator.close) is None
    left = before.differences()
    assert [name for name in left if "hooks" not in name and "modes" not in name] == []
    assert outcome() == "silent"
    # What is on the stacks of this thread cannot be taken off from another one; the next guard that leaves here does it.
    with strict():
        pass
    assert before.differences() == []


# ---- tasks -------------------------------------------------------------------------------------------------


def test_tasks_with_guards_of_their_own(found: Callable[[], Any]) -> None:
    before = found()

    async def work(rounds: int) -> int:
        with Guard("record") as guard:
            for _ in range(rounds):
                await asyncio.sleep(0)
                x = leaf()
                x.exp().sum().backward()
        return len(guard.violations)

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(work(rounds) for rounds in (5, 1, 3, 2, 4)))

    assert asyncio.run(all_of_them()) == [0] * 5
    assert before.differences() == []


def test_a_task_that_is_cancelled_leaves_its_guard(found: Callable[[], Any]) -> None:
    before = found()

    async def endless() -> None:
        with strict():
            await asyncio.sleep(100)

    async def main() -> None:
        task = asyncio.create_task(endless())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert before.differences() == []


def test_work_given_to_a_thread_by_a_task() -> None:
    async def main() -> str:
        with strict():
            return await asyncio.to_thread(outcome)

    assert asyncio.run(main()) == "raise"


# ---- processes ---------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_inside_a_guard_is_guarded() -> None:
    with strict():
        x = leaf()
        y = x.exp()
        child = os.fork()
        if child == 0:
            os._exit(child_answers(y))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        y.sum().backward()


def child_answers(y: torch.Tensor) -> int:
    """Exit code of a forked child: 0 where all is well."""
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    try:
        if outcome() != "raise":
            return 2
        try:
            y.data.zero_()
            return 3
        except SavedTensorCorruptionError:
            pass
        with Guard("record"):
            if outcome() != "silent":
                return 4
        return 0
    except BaseException:
        return 5


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_enters_a_guard_can_enter_one() -> None:
    """Every lock that a guard takes may be held by a thread that the child does not have."""
    from torchguard import _patching

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _patching.lock:
            held.set()
            done.wait(0.3)  # whether the fork waits for it or not

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3)
        with strict():
            os._exit(0 if outcome() == "raise" else 2)
    _, status = os.waitpid(child, 0)
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 0, "the child hangs"


def in_a_process(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


LIVE_AT_EXIT = """
import threading, torch, torchguard
guard = torchguard.strict(every_call={every_call})
guard.__enter__()
x = torch.ones(3, requires_grad=True)
y = x.exp()
alias = y.data
def steps():
    with torchguard.warn():
        yield torch.ones(3, requires_grad=True).exp()
generator = steps()
kept = next(generator)
threading.Thread(target=lambda: torch.ones(3, requires_grad=True).exp()).start()
"""


@pytest.mark.parametrize("every_call", [False, True])
def test_an_interpreter_ends_quietly_with_a_guard_still_on(every_call: bool) -> None:
    done = in_a_process(LIVE_AT_EXIT.format(every_call=every_call), "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_that_nobody_catches_ends_the_program_with_the_report() -> None:
    done = in_a_process(
        "import torch, torchguard\n"
        "with torchguard.strict():\n"
        "    y = torch.ones(3, requires_grad=True).exp()\n"
        "    y.data.zero_()\n"
    )
    assert done.returncode == 1
    assert "SavedTensorCorruptionError: zero_() through .data would corrupt" in done.stderr
    assert "\x1b[" not in done.stderr  # no terminal, no colour


def test_a_spawned_process_starts_without_a_guard() -> None:
    import multiprocessing

    with strict():
        context = multiprocessing.get_context("spawn")
        with ThreadPoolExecutor(1):  # threads of multiprocessing start inside the guard
            process = context.Process(target=int)
            process.start()
            process.join(60)
    assert process.exitcode == 0


def test_warnings_are_told_in_the_thread_that_writes() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with warn():
            run(corrupt)
            run(corrupt)
    assert [warning.category for warning in told] == [SavedTensorCorruptionWarning]


def _while_another_thread_looks(monkeypatch: pytest.MonkeyPatch, body: Callable[[Callable[[], None]], None]) -> None:
    """Another thread enters ``allow``, for which it looks at every save, and is in the middle of that when ``body`` calls
    what it is given; it goes on a little later.
    """
    in_the_middle, go_on = threading.Event(), threading.Event()
    looked = _reads._is_kept_anyway

    def slow(save: Any) -> bool:
        if threading.current_thread() is other and not in_the_middle.is_set():
            in_the_middle.set()
            go_on.wait(0.2)  # seconds; nobody sets it: a third thread is not to help
        return looked(save)

    def enter() -> None:
        with allow("to look"):
            pass

    def begin() -> None:
        other.start()
        assert in_the_middle.wait(10)

    other = threading.Thread(target=enter)
    monkeypatch.setattr(_reads, "_is_kept_anyway", slow)
    body(begin)
    other.join(10)
    assert not other.is_alive()


@pytest.mark.parametrize("write", [lambda x: x.data.zero_(), lambda x: setattr(x, "data", torch.zeros(3))])
@pytest.mark.parametrize("corrupts", [False, True])
def test_what_another_thread_looks_at_is_not_kept_alive_by_that(
    write: Callable[[torch.Tensor], object], corrupts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look holds all saves, and backward lets go of them meanwhile."""
    x = leaf()
    with strict() as guard:

        def body(begin: Callable[[], None]) -> None:
            out = (x * x).sum()
            begin()
            if corrupts:
                with pytest.raises(SavedTensorCorruptionError):
                    write(x)
            else:
                out.backward()
                write(x)

        _while_another_thread_looks(monkeypatch, body)
    assert len(guard.violations) == corrupts


class _Halted:
    """A thread that does ``work`` and halts before the ``at``-th instruction of ours, in the middle of whatever it does.

    It goes on as soon as anybody waits for it, or ``finish`` is called.
    """

    def __init__(self, work: Callable[[], object], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = False
        self._left = at
        self._stopped, self._go_on = threading.Event(), threading.Event()
        self._work = work
        monkeypatch.setattr(_ledger.time, "sleep", self._somebody_waits)
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self._stopped.wait(10)

    def finish(self) -> None:
        self._go_on.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _somebody_waits(self, _: float) -> None:
        self._go_on.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(10)

    def _run(self) -> None:
        sys.settrace(self._enter)
        try:
            self._work()
        finally:
            sys.settrace(None)
            self._stopped.set()

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        if Path(frame.f_code.co_filename).parent != Path(_ledger.__file__).parent:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "opcode" and not self.reached:
            self._left -= 1
            if self._left < 0:
                self.reached = True
                self._stopped.set()
                self._go_on.wait(0.02)  # seconds: it may hold a lock that the other needs
        return self._step


def save_and_audit() -> None:
    pack = _packing.make_pack(audits=True)
    with _torch.without_hooks():
        y = leaf().exp()
    pack(y)


#: What a thread may be doing, with no write of its own, while another is done with its saves, and the share of its
#: instructions at which it is halted.
BESIDE: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
    "is any alive": (lambda x: LEDGER.any_alive(), 1),
    "how many are alive": (lambda x: len(LEDGER), 1),
    "filing": (lambda x: LEDGER.file(), 3),
    "those of a storage": (lambda x: LEDGER.in_storage(_memory.storage_of(x)), 1),
    "any of a storage": (lambda x: LEDGER.any_in_storage(_memory.storage_of(x)), 1),
    "all": (lambda x: LEDGER.all_alive(), 1),
    "an alias": (lambda x: x.data, 19),
    "a view that NumPy shares": (lambda x: x.detach().numpy(), 19),
    "a save that is audited": (lambda x: save_and_audit(), 3),
    "what was saved last": (lambda x: _packing._copied_itself(SimpleNamespace(version=1)), 1),  # type: ignore[arg-type]
    "what one instruction saved": (lambda x: _packing._mend_foreach(type(None), 0, None), 1),
    "waiting for others": (lambda x: LEDGER.outlast_looks(), 3),
}


#: These are about saves that nobody has filed yet.
NOT_FILED = {"filing", "a save that is audited", "what was saved last", "what one instruction saved"}


def start_in_a_frame_that_holds_saves(other: _Halted, x: torch.Tensor) -> None:
    """Whoever looks at this thread's frames meanwhile holds them, and so what they hold."""
    saves = [item() for item in LEDGER.pending] or LEDGER.in_storage(_memory.storage_of(x))
    other.start()
    assert len(saves) == 2


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("corrupts", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_another_thread_holds_for_a_moment_is_not_kept_alive_by_that(
    beside: str, corrupts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread can be switched away from between any two instructions."""
    work, share = BESIDE[beside]
    alarms: list[int] = []
    instruction, in_time = 0, True
    while in_time:
        x = leaf()
        with Guard("record") as guard:
            out = (x * x).sum()
            if beside not in NOT_FILED:
                LEDGER.file()
            other = _Halted(lambda x=x: work(x), instruction, monkeypatch)  # type: ignore[misc]
            start_in_a_frame_that_holds_saves(other, x)
            if corrupts:
                with torch.no_grad():
                    x.data.zero_()
            out.backward()
            if not corrupts:
                x.data.zero_()
            other.finish()
        in_time = other.reached
        alarms += [instruction] * len(guard.violations)
        instruction += share
    assert instruction > 3 * share
    assert alarms == (list(range(0, instruction, share)) if corrupts else [])


def test_who_waits_for_others_keeps_nothing_alive() -> None:
    """To look at frames is to hold them: one that held itself would be a cycle, with all that called it."""
    go_on = threading.Event()
    other = threading.Thread(target=go_on.wait)
    other.start()

    def look() -> weakref.ref[torch.Tensor]:
        x = leaf()
        LEDGER.outlast_looks()
        return weakref.ref(x)

    gc.disable()
    try:
        assert look()() is None
    finally:
        gc.enable()
        go_on.set()
        other.join(10)
