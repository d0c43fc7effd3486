"""Is work that is handed to a pool of threads under the guard, whenever the pool's threads were started?"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import multiprocessing.pool
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch
from conftest import Found, hook_stack
from harness import needs_shown_hooks
from torch.autograd.graph import save_on_cpu

from torchguard import Guard, SavedTensorCorruptionError, _policy, _torch, allow, strict, warn

TakeDown = Callable[[], Found]


def leaf() -> torch.Tensor:
    return torch.tensor([0.5, 1.0, 2.0], requires_grad=True)


def corrupting(_: Any = None) -> list[float]:
    w = leaf()
    out = w.exp()
    out.data.zero_()
    out.sum().backward()
    assert w.grad is not None
    result: list[float] = w.grad.tolist()
    return result


def corrupting_two(_: Any, __: Any) -> list[float]:
    return corrupting()


def innocent(_: Any = None) -> list[float]:
    w = leaf()
    w.exp().sum().backward()
    assert w.grad is not None
    w.data.add_(w.grad)
    result: list[float] = w.grad.tolist()
    return result


def state_of_this_thread(_: Any = None) -> tuple[int, int, str]:
    """Guards that this thread is under, pairs of save hooks on its stack."""
    pairs = _torch.lift_hooks()
    for pair in reversed(pairs):
        _torch.push_hooks(pair)
    return len(_policy.state.guards), len(pairs), threading.current_thread().name


def bare(told: tuple[int, int, str]) -> bool:
    return told[:2] == (0, 0)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """With one thread, which has been there before any guard."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(1) as pool:
        pool.apply(int)
        yield pool


SUBMIT: dict[str, Callable[[ThreadPoolExecutor, Any], Any]] = {
    "submit": lambda executor, work: executor.submit(work).result(),
    "map": lambda executor, work: next(iter(executor.map(work, [0]))),
    "run_in_executor": lambda executor, work: asyncio.run(_in_executor(executor, work)),
}

APPLY: dict[str, Callable[[ThreadPool, Any], Any]] = {
    "apply": lambda pool, work: pool.apply(work),
    "apply_async": lambda pool, work: pool.apply_async(work).get(),
    "apply_by_keyword": lambda pool, work: pool.apply_async(func=work).get(),
    "map": lambda pool, work: pool.map(work, [0])[0],
    "map_async": lambda pool, work: pool.map_async(work, [0]).get()[0],
    "imap": lambda pool, work: next(pool.imap(work, [0])),
    "imap_in_chunks": lambda pool, work: next(iter(pool.imap(work, [0, 1], chunksize=2))),
    "imap_unordered": lambda pool, work: next(pool.imap_unordered(work, [0])),
    "starmap": lambda pool, work: pool.starmap(work, [(0,)])[0],
    "starmap_async": lambda pool, work: pool.starmap_async(work, [(0,)]).get()[0],
}


async def _in_executor(executor: ThreadPoolExecutor, work: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


@pytest.mark.parametrize("way", SUBMIT)
def test_an_executor_that_was_there_before(way: str, executor: ThreadPoolExecutor) -> None:
    expected = innocent()
    with strict() as guard:
        assert SUBMIT[way](executor, innocent) == expected
        with pytest.raises(SavedTensorCorruptionError):
            SUBMIT[way](executor, corrupting)
    assert len(guard.violations) == 1
    assert guard.violations[0].thread != threading.current_thread().name
    assert bare(executor.submit(state_of_this_thread).result())
    assert SUBMIT[way](executor, corrupting) == [0, 0, 0]


@pytest.mark.parametrize("way", APPLY)
def test_a_thread_pool_that_was_there_before(way: str, pool: ThreadPool) -> None:
    expected = innocent()
    with strict() as guard:
        assert APPLY[way](pool, innocent) == expected
        with pytest.raises(SavedTensorCorruptionError):
            APPLY[way](pool, corrupting)
    assert len(guard.violations) == 1
    assert bare(pool.apply(state_of_this_thread))
    assert APPLY[way](pool, corrupting) == [0, 0, 0]


def test_asyncio_to_thread() -> None:
    async def program() -> Any:
        await asyncio.to_thread(int)  # the default executor has its thread
        with strict() as guard:
            with pytest.raises(SavedTensorCorruptionError):
                await asyncio.to_thread(corrupting)
            told = await asyncio.to_thread(state_of_this_thread)
        return guard.violations, told, await asyncio.to_thread(state_of_this_thread)

    violations, inside, outside = asyncio.run(program())
    assert len(violations) == 1
    assert inside[:2] == (1, 1)
    assert bare(outside)


@pytest.mark.parametrize("kind", ["executor", "pool"])
def test_a_pool_that_was_made_inside_is_as_new_after_the_guard(kind: str) -> None:
    made: Any
    with strict():
        made = ThreadPoolExecutor(1) if kind == "executor" else ThreadPool(1)
        run: Any = (lambda work: made.submit(work).result()) if kind == "executor" else made.apply
        with pytest.raises(SavedTensorCorruptionError):
            run(corrupting)
        assert run(state_of_this_thread)[:2] == (1, 1)
    assert bare(run(state_of_this_thread))
    assert run(corrupting) == [0, 0, 0]
    if kind == "executor":
        made.shutdown()
    else:
        made.close()
        made.join()


def test_work_that_was_submitted_inside_and_runs_after(executor: ThreadPoolExecutor, pool: ThreadPool) -> None:
    go = threading.Event()
    for submit in (executor.submit, pool.apply_async):
        go.clear()
        blocker: Any = submit(go.wait)
        with strict() as guard:
            late: Any = submit(corrupting)
            told: Any = submit(state_of_this_thread)
        go.set()
        get = "result" if submit == executor.submit else "get"
        assert getattr(late, get)() == [0, 0, 0]
        assert bare(getattr(told, get)())
        assert getattr(blocker, get)()
        assert guard.violations == []


def test_work_that_runs_across_the_end_of_the_guard(executor: ThreadPoolExecutor) -> None:
    inside, go = threading.Event(), threading.Event()

    def work() -> Any:
        out = leaf().exp()
        inside.set()
        go.wait()
        out.data.zero_()
        return out.sum().backward()

    with strict() as guard:
        future = executor.submit(work)
        inside.wait()
    go.set()
    assert future.result() is None
    assert guard.violations == []
    assert bare(executor.submit(state_of_this_thread).result())


def test_an_error_of_the_work_is_its_own(executor: ThreadPoolExecutor, pool: ThreadPool) -> None:
    error = KeyError("mine")

    def fail() -> None:
        raise error

    with strict():
        assert executor.submit(fail).exception() is error
        with pytest.raises(KeyError) as caught:
            pool.apply(fail)
        assert caught.value is error
        assert executor.submit(state_of_this_thread).result()[:2] == (1, 1)
    assert bare(executor.submit(state_of_this_thread).result())
    assert bare(pool.apply(state_of_this_thread))


def test_nested_guards_and_nested_submissions() -> None:
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(int, [0, 0]))

        def work() -> Any:
            with pytest.raises(SavedTensorCorruptionError):
                executor.submit(corrupting).result()
            with Guard("record") as own:
                corrupting()
            return own.violations, state_of_this_thread()

        with warn() as outer, strict() as inner:
            violations, told = executor.submit(work).result()
        assert told[:2] == (2, 1)  # one pair is enough
        assert len(violations) == len(inner.violations) == 1
        assert outer.violations == []
        assert bare(executor.submit(state_of_this_thread).result())


def test_the_innermost_guard_that_is_still_on_answers(executor: ThreadPoolExecutor) -> None:
    go = threading.Event()
    executor.submit(go.wait)
    with Guard("record") as outer:
        with strict():
            future = executor.submit(corrupting)
        go.set()
        assert future.result() == [0, 0, 0]
    assert len(outer.violations) == 1


def test_work_of_a_thread_without_a_guard_is_left_alone(executor: ThreadPoolExecutor) -> None:
    go, told = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(), told.append(executor.submit(state_of_this_thread).result())))
    thread.start()
    with strict():
        go.set()
        thread.join()
    assert [bare(state) for state in told] == [True]


def test_a_reason_to_allow_holds_for_the_thread_that_gave_it(executor: ThreadPoolExecutor) -> None:
    def allowing() -> Any:
        with allow("in the pool"):
            return corrupting()

    with strict() as guard:
        with allow("in this thread"), pytest.raises(SavedTensorCorruptionError):
            executor.submit(corrupting).result()
        executor.submit(allowing).result()
    assert [violation.allowed for violation in guard.allowed] == ["in the pool"]


@needs_shown_hooks
def test_hooks_of_the_program_in_a_pool_thread(executor: ThreadPoolExecutor) -> None:
    stack: list[Any] = []

    def enter() -> None:
        hooks = save_on_cpu()
        hooks.__enter__()
        stack.append(hooks)
        stack.append(hook_stack())

    def work() -> None:
        out = leaf().exp()
        out.detach().mul_(2)
        out.sum().backward()

    executor.submit(enter).result()
    with strict() as guard, pytest.raises(SavedTensorCorruptionError):
        executor.submit(work).result()
    assert [violation.kind for violation in guard.violations] == ["unchecked"]
    assert executor.submit(hook_stack).result() == stack[1]
    assert executor.submit(state_of_this_thread).result()[:2] == (0, 1)
    executor.submit(stack[0].__exit__, None, None, None).result()


def test_a_cancelled_call_and_a_refused_one_are_as_ever(executor: ThreadPoolExecutor) -> None:
    go = threading.Event()
    executor.submit(go.wait)
    with strict():
        future = executor.submit(corrupting)
        assert future.cancel()
        go.set()
        executor.shutdown()
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(corrupting)
        with pytest.raises(TypeError):
            ThreadPoolExecutor(1).submit()  # type: ignore[call-arg]


def test_the_pools_are_left_as_found(found: TakeDown) -> None:
    before = found()
    item: Any = concurrent.futures.thread._WorkItem
    pools: tuple[Any, ...] = (item, ThreadPool, multiprocessing.pool.Pool)
    contents = [dict(vars(owner)) for owner in pools]
    with strict():
        assert vars(item)["run"] is not contents[0]["run"]
    assert [dict(vars(owner)) for owner in pools] == contents
    assert all(vars(item)[name] is value for name, value in contents[0].items())
    assert before.differences() == []


def test_a_hand_written_worker_is_named_once_where_it_shows() -> None:
    work: queue.Queue[Any] = queue.Queue()
    shared = leaf()

    def loop() -> None:
        while (call := work.get()) is not None:
            call()
            work.task_done()

    thread = threading.Thread(target=loop, name="worker")
    thread.start()
    with strict() as guard:
        product = shared * shared
        for _ in range(2):
            work.put(lambda: shared.data.mul_(1))
        work.join()
        assert product.requires_grad
    work.put(None)
    thread.join()
    assert len([line for line in guard.unwatched if "worker" in line]) == 1
    assert guard.violations == []
