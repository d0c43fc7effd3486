"""Is torch after a guard, by whatever way it was left, exactly what it was before?"""

from __future__ import annotations

import asyncio
import copy
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import needs_shown_hooks, program_hooks
from torch.autograd.graph import saved_tensors_hooks

from torchguard import (
    Guard,
    SavedTensorCorruptionError,
    SavedTensorCorruptionWarning,
    _hooks,
    _intercept,
    _policy,
    _torch,
    strict,
    warn,
)
from torchguard._patching import Patch

TakeDown = Callable[[], Any]

KINDS: dict[str, Callable[[], Guard]] = {
    "strict": strict,
    "warn": warn,
    "record": lambda: Guard("record"),
    "every_call": lambda: strict(every_call=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


def corrupt() -> None:
    y = leaf().exp()
    y.data.zero_()


def is_watched() -> bool:
    """Whether a corrupting program is noticed here and now."""
    try:
        corrupt()
    except SavedTensorCorruptionError:
        return True
    return False


# ---- ways out ----------------------------------------------------------------------------------------------


def normally(guard: Guard) -> None:
    with guard:
        corrupt_quietly()


def corrupt_quietly() -> None:
    leaf().exp().sum().backward()


def by_exception(guard: Guard) -> None:
    with pytest.raises(ValueError, match="out"), guard:
        raise ValueError("out")


def by_violation(guard: Guard) -> None:
    if guard.action == "warn":
        with pytest.warns(SavedTensorCorruptionWarning), guard:
            corrupt()
    elif guard.action == "raise":
        with pytest.raises(SavedTensorCorruptionError), guard:
            corrupt()
    else:
        with guard:
            corrupt()
    assert len(guard.violations) == 1


def by_interrupt(guard: Guard) -> None:
    with pytest.raises(KeyboardInterrupt), guard:
        raise KeyboardInterrupt


def by_sys_exit(guard: Guard) -> None:
    with pytest.raises(SystemExit), guard:
        sys.exit(3)


def by_return(guard: Guard) -> None:
    def inside() -> int:
        with guard:
            return 1

    assert inside() == 1


def by_break(guard: Guard) -> None:
    for _ in range(3):
        with guard:
            break


def steps(guard: Guard) -> Iterator[int]:
    with guard:
        yield 1
        yield 2


def by_closed_generator(guard: Guard) -> None:
    generator = steps(guard)
    next(generator)
    generator.close()


def by_collected_generator(guard: Guard) -> None:
    generator = steps(guard)
    next(generator)
    del generator
    gc.collect()


def by_collected_cycle(guard: Guard) -> None:
    holder: dict[str, Any] = {}
    holder["generator"] = steps(guard)
    holder["itself"] = holder
    next(holder["generator"])
    del holder
    gc.collect()


def by_generator_that_ran_out(guard: Guard) -> None:
    assert list(steps(guard)) == [1, 2]


def by_thrown_exception(guard: Guard) -> None:
    generator = steps(guard)
    next(generator)
    with pytest.raises(ValueError, match="thrown"):
        generator.throw(ValueError("thrown"))


def by_recursion(guard: Guard) -> None:
    def deeper() -> None:
        deeper()

    with pytest.raises(RecursionError), guard:
        deeper()


def by_exception_in_backward(guard: Guard) -> None:
    def hook(_: torch.Tensor) -> None:
        raise ValueError("in a hook")

    with pytest.raises(ValueError, match="in a hook"), guard:
        x = leaf()
        y = x.exp()
        y.register_hook(hook)
        y.sum().backward()


def by_pytorchs_refusal(guard: Guard) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), guard:
        y = leaf().exp()
        y.detach().zero_()
        y.sum().backward()


WAYS = {name: way for name, way in globals().items() if name.startswith("by_")} | {"normally": normally}


@every_kind
@pytest.mark.parametrize("way", WAYS)
def test_torch_is_as_it_was_whatever_the_way_out(kind: str, way: str, found: TakeDown) -> None:
    before = found()
    WAYS[way](KINDS[kind]())
    assert before.differences() == []
    assert not is_watched()
    assert _policy.entered == []


@every_kind
def test_a_guard_is_on_inside_and_off_outside(kind: str, found: TakeDown) -> None:
    before = found()
    with KINDS[kind]():
        assert before.differences() != []
    assert before.differences() == []


def test_equality_does_not_do_for_identity() -> None:
    """wrapt's wrappers compare equal to what they wrap, so the checks above must use ``is``."""
    add = torch.Tensor.add_
    with strict():
        assert torch.Tensor.add_ == add
        assert torch.Tensor.add_ is not add
    assert torch.Tensor.add_ is add


def test_two_hundred_guards_leave_nothing(found: TakeDown) -> None:
    with strict():
        pass
    gc.collect()
    before = found()
    ours = set(_hooks._ours)
    objects = len(gc.get_objects())
    for step in range(200):
        with strict(every_call=step % 2 == 0):
            leaf().exp().sum().backward()
    gc.collect()
    assert before.differences() == []
    assert set(_hooks._ours) == ours
    assert len(gc.get_objects()) - objects < 1000


# ---- an exception while entering ---------------------------------------------------------------------------


def number_of_patches() -> int:
    with strict():
        return len(_intercept._patches)


def failing_at(which: int, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Let the installation of one patch fail, before or after it has taken effect."""
    install = Patch.install
    count = 0

    def failing(patch: Patch) -> None:
        nonlocal count
        count += 1
        if count == which and not after:
            raise MemoryError
        install(patch)
        if count == which:
            raise KeyboardInterrupt

    monkeypatch.setattr(Patch, "install", failing)


def test_a_failure_at_any_patch_restores_all_that_came_before(found: TakeDown) -> None:
    """One of the hundreds of ``setattr`` fails, every third in turn."""
    total = number_of_patches()
    before = found()
    left: dict[int, list[str]] = {}
    for which in range(1, total + 1, 3):
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_at(which, monkeypatch, after=False)
            with pytest.raises(MemoryError):
                strict().__enter__()
        if told := before.differences():
            left[which] = told
    assert left == {}
    assert _intercept._installed == 0


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_an_interrupt_right_after_a_patch_restores_that_one_too(part: float, found: TakeDown) -> None:
    """Ctrl-C comes between any two instructions."""
    which = max(1, int(part * number_of_patches()))
    before = found()
    with pytest.MonkeyPatch.context() as monkeypatch:
        failing_at(which, monkeypatch, after=True)
        with pytest.raises(KeyboardInterrupt):
            strict().__enter__()
    assert before.differences() == []


@pytest.mark.parametrize("every_call", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_policy, "enter"),
        (_hooks, "push"),
        (_torch, "push_hooks"),
        (_torch, "enter_script_name"),
        (_intercept, "see_every_call"),
    ],
)
def test_a_failure_of_any_step_of_entering_restores_all(
    owner: Any, name: str, every_call: bool, found: TakeDown, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "see_every_call" and not every_call:
        pytest.skip("not called")
    with strict():
        pass
    before = found()
    original = getattr(owner, name)
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or name != "enter_script_name":
            raise MemoryError("no room")
        return original(*args)

    guard = strict(every_call=every_call)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(MemoryError):
        guard.__enter__()
    monkeypatch.undo()
    assert before.differences() == []
    assert _policy.entered == []
    with guard:  # it was never entered: it can be now
        assert is_watched()


# ---- decorators --------------------------------------------------------------------------------------------


def test_a_decorated_function_runs_under_a_guard_each_time(found: TakeDown) -> None:
    before = found()

    @strict()
    def watched(value: int, *, more: int = 0) -> tuple[bool, int]:
        """Asks."""
        return is_watched(), value + more

    assert (watched.__name__, watched.__doc__) == ("watched", "Asks.")
    assert watched(1, more=2) == (True, 3)
    assert watched(4) == (True, 4)
    assert before.differences() == []


def test_a_decorated_function_may_call_itself(found: TakeDown) -> None:
    before = found()

    @strict()
    def watched(depth: int) -> bool:
        return watched(depth - 1) and is_watched() if depth else is_watched()

    assert watched(5)
    assert before.differences() == []


def test_decorated_methods() -> None:
    class Trainer:
        name = "a trainer"

        @strict()
        def step(self) -> tuple[bool, str]:
            return is_watched(), self.name

        @classmethod
        @strict()
        def make(cls) -> tuple[bool, str]:
            return is_watched(), cls.__name__

        @staticmethod
        @strict()
        def check() -> bool:
            return is_watched()

        @property
        @strict()
        def seen(self) -> bool:
            return is_watched()

    assert Trainer().step() == (True, "a trainer")
    assert Trainer.make() == (True, "Trainer")
    assert Trainer.check()
    assert Trainer().seen


def test_an_exception_passes_through_a_decorated_function(found: TakeDown) -> None:
    before = found()

    @strict()
    def failing() -> None:
        raise KeyError("through")

    with pytest.raises(KeyError, match="through"):
        failing()
    assert before.differences() == []


def test_a_decorated_generator_is_watched_while_it_runs_and_its_consumer_is_not(found: TakeDown) -> None:
    before = found()
    sent: list[Any] = []

    @strict()
    def talk(first: str) -> Any:
        assert is_watched()
        sent.append((yield first))
        assert is_watched()
        try:
            yield "second"
        except ValueError as error:
            sent.append(str(error))
            assert is_watched()
        yield "third"
        return "returned"

    generator = talk("first")
    assert before.differences() == []
    assert next(generator) == "first"
    assert before.differences() == []
    assert not is_watched()
    assert generator.send("hello") == "second"
    assert generator.throw(ValueError("thrown")) == "third"
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "returned"
    assert sent == ["hello", "thrown"]
    assert before.differences() == []


def test_a_decorated_generator_is_watched_while_it_cleans_up(found: TakeDown) -> None:
    before = found()
    cleaned: list[bool] = []

    @strict()
    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            cleaned.append(is_watched())

    generator: Any = endless()
    next(generator)
    generator.close()
    assert cleaned == [True]
    generator = endless()
    next(generator)
    del generator
    gc.collect()
    assert cleaned == [True, True]
    assert before.differences() == []


def test_a_decorated_generator_lets_exceptions_out_and_yields_from(found: TakeDown) -> None:
    before = found()

    @strict()
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("out")

    @strict()
    def outer() -> Any:
        result = yield from inner()
        yield result

    @strict()
    def inner() -> Any:
        got = yield 1
        return got

    generator = failing()
    next(generator)
    with pytest.raises(KeyError):
        next(generator)
    with pytest.raises(StopIteration):
        next(generator)
    both = outer()
    assert next(both) == 1
    assert both.send("back") == "back"
    assert list(both) == []
    assert before.differences() == []


def test_a_thrown_exception_that_the_generator_does_not_catch_comes_back() -> None:
    @strict()
    def simple() -> Iterator[int]:
        yield 1

    generator: Any = simple()
    next(generator)
    with pytest.raises(ZeroDivisionError):
        generator.throw(ZeroDivisionError)
    fresh: Any = simple()
    with pytest.raises(ZeroDivisionError):
        fresh.throw(ZeroDivisionError)


def test_a_decorated_coroutine(found: TakeDown) -> None:
    before = found()

    @strict()
    async def work(value: int) -> tuple[int, bool]:
        await asyncio.sleep(0)
        return value, is_watched()

    assert asyncio.iscoroutinefunction(work) or asyncio.iscoroutine(work(0))
    assert asyncio.run(work(3)) == (3, True)
    assert before.differences() == []


def test_a_decorated_asynchronous_generator_is_watched(found: TakeDown) -> None:
    before = found()

    @strict()
    async def values() -> Any:
        yield is_watched()
        await asyncio.sleep(0)
        yield is_watched()

    async def collect() -> list[bool]:
        return [value async for value in values()]

    assert asyncio.run(collect()) == [True, True]
    assert before.differences() == []


def test_a_guard_that_decorates_knows_what_was_found() -> None:
    guard = Guard("record")

    @guard
    def step() -> None:
        corrupt()

    for _ in range(3):
        step()
    assert [violation.times for violation in guard.violations] == [3]


def test_a_decorated_step_warns_once_a_site() -> None:
    @warn()
    def step() -> None:
        corrupt()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            step()
    assert len(told) == 1


# ---- actions -----------------------------------------------------------------------------------------------


def test_strict_raises_before_memory_changes() -> None:
    with strict() as guard:
        y = leaf().exp()
        before = y.detach().clone()
        with pytest.raises(SavedTensorCorruptionError):
            y.data.zero_()
        assert torch.equal(y, before)
        y.sum().backward()  # nothing was corrupted
    assert len(guard.violations) == 1


def test_warn_warns_once_a_site_and_counts() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with warn() as guard:
            for _ in range(4):
                corrupt()
            y = leaf().sigmoid()
            y.data.zero_()
    assert [str(warning.message).splitlines()[0] for warning in told] == [
        "zero_() through .data would corrupt a tensor saved for backward"
    ] * 2
    assert [violation.times for violation in guard.violations] == [4, 1]


def test_a_new_guard_warns_anew() -> None:
    for _ in range(2):
        with pytest.warns(SavedTensorCorruptionWarning), warn():
            corrupt()


def test_warnings_can_be_ignored_and_are_counted_all_the_same() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore", SavedTensorCorruptionWarning)
        with warn() as guard:
            corrupt()
            corrupt()
    assert told == []
    assert [violation.times for violation in guard.violations] == [2]


def test_warnings_as_errors_stop_the_write() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with warn() as guard:
            y = leaf().exp()
            before = y.detach().clone()
            with pytest.raises(SavedTensorCorruptionWarning, match=r"zero_\(\) through .data"):
                y.data.zero_()
            assert torch.equal(y, before)
    assert len(guard.violations) == 1


def test_warn_and_record_change_no_result() -> None:
    def program() -> list[torch.Tensor]:
        x, w = leaf(), leaf()
        y = (x * w).sigmoid()
        y.data.mul_(0.5)
        w.data = torch.full((3,), 7.0)
        (y * w).sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        return [x.grad, w.grad, y.detach()]

    plain = program()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for guard in (warn(), Guard("record"), warn(every_call=True)):
            with guard:
                assert all(map(torch.equal, program(), plain))
            assert len(guard.violations) >= 2


@pytest.mark.parametrize("name", ["apply_", "map_"])
def test_a_users_function_is_called_as_often_as_without_the_guard(name: str) -> None:
    def program() -> tuple[list[float], torch.Tensor]:
        calls: list[float] = []

        def function(value: float, other: float = 0.0) -> float:
            calls.append(value)
            return value + len(calls)

        x = leaf()
        y = x.exp() * x
        alias = x.data
        result = alias.apply_(function) if name == "apply_" else alias.map_(torch.ones(3), function)
        assert result.data_ptr() == x.data_ptr()
        return calls, x.detach() + 0 * y.detach()

    calls, values = program()
    with Guard("record") as guard:
        calls_guarded, values_guarded = program()
    assert len(guard.violations) == 1
    assert calls_guarded == calls
    assert torch.equal(values, values_guarded)


def test_a_users_function_that_raises_leaves_what_it_leaves_without_the_guard() -> None:
    def program() -> torch.Tensor:
        calls: list[float] = []

        def function(value: float) -> float:
            calls.append(value)
            if len(calls) == 2:
                raise KeyError("in the middle")
            return value + 1

        x = leaf()
        y = x.exp() * x
        with pytest.raises(KeyError, match="in the middle"):
            x.data.apply_(function)
        assert len(calls) == 2
        return x.detach() + 0 * y.detach()

    plain = program()
    with Guard("record"):
        assert torch.equal(program(), plain)


def test_record_says_nothing_and_keeps_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Guard("record") as guard:
            corrupt()
            corrupt()
    assert [violation.times for violation in guard.violations] == [2]


def test_a_write_that_was_reported_is_not_reported_again_when_it_is_read() -> None:
    with Guard("record") as guard:
        y = leaf().exp()
        y.data.zero_()
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert [violation.caught for violation in guard.violations] == ["write"]


def test_an_unseen_write_is_reported_once() -> None:
    with Guard("record") as guard:
        y = leaf().exp()
        alias = y.data
        torch.zeros(3, out=alias)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert [(violation.caught, violation.times) for violation in guard.violations] == [("read", 1)]


def test_violations_are_a_list_of_ones_own() -> None:
    with Guard("record") as guard:
        corrupt()
    guard.violations.clear()
    guard.allowed.append("x")  # type: ignore[arg-type]
    guard.unwatched.append("x")
    assert len(guard.violations) == 1
    assert guard.allowed == []
    assert "x" not in guard.unwatched


def test_violations_can_be_read_after_the_guard_and_while_it_is_on() -> None:
    with Guard("record") as guard:
        assert guard.violations == []
        corrupt()
        assert len(guard.violations) == 1
    assert len(guard.violations) == 1


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_watched_is_told_once() -> None:
    with strict() as guard:
        for _ in range(3):
            dense = torch.eye(3, requires_grad=True)
            torch.sparse.mm(dense.detach().to_sparse(), dense).sum().backward()
    told = [line for line in guard.unwatched if "sparse" in line]
    assert len(told) == len(set(told)) <= 1
    assert all("\n" not in line for line in guard.unwatched)


def test_a_plain_program_leaves_nothing_unwatched() -> None:
    with strict() as guard:
        corrupt_quietly()
    assert guard.unwatched == []


def test_a_save_from_before_the_guard_is_out_of_sight_and_harmless() -> None:
    y = leaf().exp()
    with strict() as guard:
        y.data.zero_()
        y.sum().backward()
    assert guard.violations == []


def test_a_save_that_is_read_after_the_guard_reads_right() -> None:
    x = leaf()
    with strict():
        y = x.exp()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().exp())


def test_pytorchs_check_is_made_after_the_guard_has_left() -> None:
    with strict():
        y = leaf().exp()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["apply_", "map_"])
def test_what_pytorch_refuses_is_refused_in_pytorchs_words(name: str) -> None:
    """A call that raises without the guard raises the same under it: nothing would have been corrupted."""

    def program() -> None:
        y = leaf().exp()
        with torch.no_grad():
            if name == "apply_":
                y.apply_(lambda value: value + 1)
            else:
                y.map_(y, lambda value, other: value + other)

    with pytest.raises(RuntimeError) as plain:
        program()
    with strict(), pytest.raises(RuntimeError) as guarded:
        program()
    assert (type(guarded.value), str(guarded.value)) == (type(plain.value), str(plain.value))


def test_a_guard_can_be_copied_before_it_is_entered() -> None:
    """Configurations are copied; nothing of a thread is in a guard that is new."""
    guard = strict()
    assert repr(guard)
    with pytest.raises(TypeError):
        copy.deepcopy(guard)


# ---- order -------------------------------------------------------------------------------------------------


def test_guards_in_one_with_statement(found: TakeDown) -> None:
    before = found()
    with strict() as a, Guard("record") as b, warn() as c, Guard("record") as d:
        corrupt()
    assert [len(guard.violations) for guard in (a, b, c, d)] == [0, 0, 0, 1]
    assert before.differences() == []


def test_guards_left_out_of_order(found: TakeDown) -> None:
    before = found()
    first, second, third = Guard("record"), Guard("record"), Guard("record")
    for guard in (first, second, third):
        guard.__enter__()
    second.__exit__(None, None, None)
    corrupt()
    third.__exit__(None, None, None)
    corrupt()
    first.__exit__(None, None, None)
    corrupt()
    assert [sum(v.times for v in guard.violations) for guard in (first, second, third)] == [1, 0, 1]
    assert before.differences() == []


@pytest.mark.parametrize("every_call", [False, True])
def test_a_users_hooks_stay_when_a_guard_below_them_leaves(every_call: bool, found: TakeDown) -> None:
    before = found()
    packed: list[int] = []
    hooks = saved_tensors_hooks(lambda x: packed.append(1) or x, lambda x: x)
    guard = strict(every_call=every_call)
    guard.__enter__()
    hooks.__enter__()
    guard.__exit__(None, None, None)
    leaf().exp()
    assert packed == [1]
    hooks.__exit__(None, None, None)
    leaf().exp()
    assert packed == [1]
    assert before.differences() == []


@needs_shown_hooks
def test_hooks_and_guards_interleaved_in_every_order(found: TakeDown) -> None:
    import itertools

    before = found()
    for order in itertools.permutations(range(4)):
        packed: list[str] = []
        outer = saved_tensors_hooks(lambda x: packed.append("outer") or x, lambda x: x)  # noqa: B023
        inner = saved_tensors_hooks(lambda x: packed.append("inner") or x, lambda x: x)  # noqa: B023
        first, second = Guard("record"), Guard("record")
        outer.__enter__()
        first.__enter__()
        inner.__enter__()
        second.__enter__()
        # The user's pairs are popped by position, the inner one first.
        leaving = [first, second, None, None]
        waiting = [inner, outer]
        for which in order:
            guard = leaving[which]
            if guard is not None:
                guard.__exit__(None, None, None)
                continue
            if hook_owner() is waiting[0].pack_hook:
                waiting.pop(0).__exit__(None, None, None)
        for hooks in waiting:
            while hook_owner() is not hooks.pack_hook:
                _torch._pop()
            hooks.__exit__(None, None, None)
        assert before.differences() == [], order


def hook_owner() -> Any:
    top = program_hooks()
    return None if top is None else top[0]


def test_a_users_mode_stays_when_a_guard_below_it_leaves(found: TakeDown) -> None:
    from torch.overrides import TorchFunctionMode

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    before = found()
    guard = strict(every_call=True)
    guard.__enter__()
    with Counting() as mode:
        guard.__exit__(None, None, None)
        calls = mode.calls
        torch.ones(1).add(1)
        assert mode.calls > calls
    assert before.differences() == []


def test_another_patch_put_on_top_survives_and_is_gone_with_its_owner(found: TakeDown) -> None:
    """Somebody patches ``Tensor.add_`` inside the guard and puts it back inside: as ever."""
    before = found()
    with strict():
        inner = torch.Tensor.add_
        torch.Tensor.add_ = lambda self, *args: inner(self, *args)  # type: ignore[method-assign, assignment]
        torch.ones(3).add_(1)
        torch.Tensor.add_ = inner  # type: ignore[method-assign]
    assert before.differences() == []


def test_a_patch_from_before_is_there_afterwards(found: TakeDown) -> None:
    original = torch.Tensor.add_
    calls: list[int] = []

    def patched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    torch.Tensor.add_ = patched  # type: ignore[method-assign, assignment]
    try:
        with strict():
            torch.ones(3).add_(1)
        assert vars(torch.Tensor)["add_"] is patched
        torch.ones(3).add_(1)
        assert calls[-1:] == [1]
    finally:
        del torch.Tensor.add_
