"""Does everything that can go wrong around the guard leave torch as it was, and the program to itself?"""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import soak
import torch
from generated.maker import make_program
from generated.properties import failures
from harness import program_hooks
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import Guard, SavedTensorCorruptionError, _hooks, _memory, _policy, strict, warn
from torchguard._saves import LEDGER

ALL_KINDS: dict[str, Callable[[], Any]] = {
    "strict": strict,
    "warn": warn,
    "every_call": lambda: strict(every_call=True),
    "warn_every_call": lambda: warn(every_call=True),
    "at_read": lambda: strict(at="read"),
    "repair": torchguard.repair,
    "audit": torchguard.audit,
    "watch": torchguard.watch,
}


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


class Injected(BaseException):
    """Neither the guard nor PyTorch raises it."""


@contextmanager
def failing_call(number: int, but: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """The call of one of torchguard's functions raises, the ``number``-th that is made; yields what has been called.

    Those named in ``but`` do not raise: the next one does.
    """
    made: list[str] = []
    raised: list[bool] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_name  # what ``__del__`` raises goes nowhere
        if event == "call" and frame.f_globals.get("__package__") == "torchguard" and name != "__del__":
            made.append(name)
            if 0 < number <= len(made) and not raised and name not in but:
                raised.append(True)
                raise Injected

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield made
    finally:
        sys.settrace(outer)


def points(total: int) -> list[int]:
    """All of the first and the last calls, and some of the hundreds of one kind between them."""
    return [*range(1, min(total, 60) + 1), *range(61, max(total - 60, 61), 97), *range(max(total - 60, 61), total + 1)]


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
def test_entering_fails_at_any_call_and_leaves_nothing(make: Callable[[], Guard], found: Callable[[], Any]) -> None:
    with make():
        pass
    guard = make()
    with failing_call(0) as made:
        guard.__enter__()
    guard.__exit__(None, None, None)
    before, ours = found(), set(_hooks._ours)
    left = {}
    for number in points(len(made)):
        guard = make()
        with failing_call(number), pytest.raises(Injected):
            guard.__enter__()
        if (told := before.differences()) or (told := ["an identity in _ours"] * len(_hooks._ours - ours)):
            left[number, made[number - 1]] = told
            break
    assert left == {}


#: An exception at the very call of these is one that comes before anything could be done about it.
BEFORE_ANYTHING = frozenset({"__exit__", "leave", "_leave", "uninstall", "_restore", "end"})


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
def test_leaving_fails_at_any_call_and_each_patch_is_taken_back(
    make: Callable[[], Guard], found: Callable[[], Any]
) -> None:
    """Where the very call that takes hooks or a mode off this thread's stack fails, these stay: nobody else can."""
    before = found()

    def leave(number: int) -> list[str]:
        guard = make()
        guard.__enter__()
        y = leaf().exp()
        _ = y.data.sum()
        try:
            with failing_call(number, BEFORE_ANYTHING) as made:
                guard.__exit__(None, None, None)
        except Injected:
            pass
        return made

    made = leave(0)
    left = {}
    for number in points(len(made)):
        called = leave(number)
        told = before.differences()
        if told and set(told) <= {"the stack of saved tensor hooks", "the stack of function modes"}:
            assert {"remove", "remove_function_mode", "see_patched_calls"} & set(called)
            clear_stacks()
            told = before.differences()
        if told:
            left[number, called[-1]] = told
            break
    assert left == {}


def clear_stacks() -> None:
    while program_hooks() is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    _policy.state.every_call, _policy.state.mode = 0, None
    _hooks._ours.clear()  # by identity, which others may get now


# ---- no room for a copy --------------------------------------------------------------------------------------


def no_room(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no room for a copy")


def programs_that_need_a_copy() -> dict[str, Callable[[], torch.Tensor]]:
    def alias_of_a_save() -> torch.Tensor:
        a = leaf()
        y = a.exp()
        _ = y.data.sum()
        y.sum().backward()
        return a.grad

    def export() -> torch.Tensor:
        a = leaf()
        y = a.exp()
        array = y.detach().numpy()
        y.sum().backward()
        return a.grad * float(array[0])

    def hooks() -> torch.Tensor:
        a = leaf()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            a.exp().sum().backward()
        return a.grad

    def recomputed() -> torch.Tensor:
        a, b = leaf(), torch.ones(3)
        y = checkpoint(lambda x: (x * b).sin(), a.exp(), use_reentrant=False)
        y.sum().backward()
        b.mul_(2)
        return a.grad

    def double() -> torch.Tensor:
        a = leaf()
        y = a.exp()
        (slope,) = torch.autograd.grad((y.data * y * y).sum(), a, create_graph=True)
        slope.sum().backward()
        return a.grad

    return {function.__name__: function for function in (alias_of_a_save, export, hooks, recomputed, double)}


@contextmanager
def no_room_for_copy(number: int) -> Iterator[list[str]]:
    """The ``number``-th copy that the guard makes finds no room (the first is 1); yields who has made copies."""
    made: list[str] = []
    original = torch.Tensor.clone

    def clone(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        caller = sys._getframe(1)
        if caller.f_globals.get("__package__") == "torchguard" and caller.f_code.co_name != "__torch_function__":
            made.append(caller.f_code.co_name)
            if len(made) == number:
                raise torch.OutOfMemoryError("no room for a copy")
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", clone)
        yield made


@pytest.mark.parametrize("mode", ALL_KINDS)
@pytest.mark.parametrize("name", programs_that_need_a_copy())
def test_a_program_goes_on_where_there_is_no_room_for_a_copy(name: str, mode: str) -> None:
    program = programs_that_need_a_copy()[name]
    expected = program()
    with no_room_for_copy(0) as made, ALL_KINDS[mode]():
        program()
    assert mode == "watch" or made or name in ("recomputed", "double")
    for number in range(1, len(made) + 1):
        with no_room_for_copy(number), ALL_KINDS[mode]() as guard:
            result = program()
        assert torch.equal(result, expected)
        assert guard.violations == []
        assert any("no room for a copy" in what for what in guard.unwatched), made[number - 1]


@pytest.mark.parametrize("mode", ALL_KINDS)
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_write_is_reported_wherever_there_was_no_room_for_a_copy(seen: bool, mode: str) -> None:
    def corrupting() -> torch.Tensor:
        a = leaf()
        y = a.exp()
        alias = y.data
        alias.mul_(2) if seen else torch.mul(alias, 2, out=alias)
        y.sum().backward()
        return a.grad

    def speaks() -> str:
        try:
            with ALL_KINDS[mode]() as guard, warnings.catch_warnings():
                warnings.simplefilter("ignore", torchguard.SavedTensorCorruptionWarning)
                gradient = corrupting()
        except RuntimeError as error:
            return type(error).__name__
        return f"{len(guard.violations)} of them, {gradient.tolist()}"

    with no_room_for_copy(0) as made:
        expected = speaks()
    for number in range(1, len(made) + 1):
        with no_room_for_copy(number):
            found = speaks()
        # What was not copied cannot be repaired: that is refused, and not let through.
        assert found == expected or (mode == "repair" and found == "SavedTensorCorruptionError"), made[number - 1]


def test_a_write_is_reported_where_there_is_no_room_to_rehearse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a = leaf()
    with strict():
        y = a.exp()
        alias = y.data
        monkeypatch.setattr(torch.Tensor, "clone", no_room)
        monkeypatch.setattr(_memory, "replicas_of", no_room)
        with pytest.raises(SavedTensorCorruptionError):
            alias.zero_()
            y.sum().backward()


# ---- hooks that raise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL_KINDS.values(), ids=ALL_KINDS)
def test_hooks_of_the_program_that_raise(make: Callable[[], Guard], found: Callable[[], Any]) -> None:
    before = found()

    def raising(_: Any) -> Any:
        raise ZeroDivisionError

    def same(x: Any) -> Any:
        return x

    a = leaf()
    with make() as guard:
        with pytest.raises(ZeroDivisionError), torch.autograd.graph.saved_tensors_hooks(raising, same):
            a.exp()
        with torch.autograd.graph.saved_tensors_hooks(same, raising):
            y = a.exp()
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        z = a.exp()
        z.register_hook(raising)
        with pytest.raises(ZeroDivisionError):
            z.sum().backward(retain_graph=True)
        b = leaf()
        b.register_post_accumulate_grad_hook(raising)
        with pytest.raises(ZeroDivisionError):
            b.exp().sum().backward()
        layer = torch.nn.Linear(3, 3)
        layer.register_forward_hook(lambda *_: raising(None))
        with pytest.raises(ZeroDivisionError):
            layer(a)
        v = a.exp()
        v.grad_fn.register_prehook(raising)
        with pytest.raises(ZeroDivisionError):
            v.sum().backward()
        w = a.exp()
        w.sum().backward()
    assert guard.violations == []
    assert torch.equal(a.grad, a.detach().exp())
    assert before.differences() == []


# ---- the garbage collector -----------------------------------------------------------------------------------


def test_a_collector_that_runs_all_the_time_changes_nothing() -> None:
    """It runs in the middle of the guard's own work, and what dies there asks for its tables."""
    thresholds = gc.get_threshold()
    programs = [make_program(random.Random(seed)) for seed in range(40)]
    try:
        gc.set_threshold(1, 1, 1)
        wrong = [str(one) for program in programs for one in failures(program, collecting=True) if one.kind != "kept"]
    finally:
        gc.set_threshold(*thresholds)
    assert wrong == []


def test_a_graph_in_a_cycle_is_collected(empty_ledger: None) -> None:
    class Holder:
        pass

    with strict():
        for _ in range(50):
            holder: Any = Holder()
            holder.itself = holder
            holder.y = leaf().exp().sin()
        del holder
        gc.collect()
        assert len(LEDGER) == 0


# ---- threads -------------------------------------------------------------------------------------------------


def in_three_dozen_threads(work: Callable[[int], None]) -> None:
    """Have each call ``work`` with its number, all at once."""
    barrier = threading.Barrier(36)

    def run(number: int) -> None:
        barrier.wait(60)
        work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(36)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"


def test_three_dozen_threads_with_guards_of_all_kinds(found: Callable[[], Any]) -> None:
    """watch() has all threads' ``.data`` share counters while it is on: what strict() would raise, PyTorch may refuse."""
    before = found()
    wrong: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(6):
            kind, corrupting = chance.choice([*ALL_KINDS]), chance.random() < 0.5
            a = leaf()
            refused = False
            with ALL_KINDS[kind]() as guard:
                try:
                    y = a.exp()
                    (y if corrupting else y.clone()).data.mul_(2)
                    y.sum().backward()
                except RuntimeError:
                    refused = True
            if (refused or bool(guard.violations)) != corrupting:
                wrong.append(f"thread {number} under {kind}: refused {refused}, {guard.violations}, {corrupting}")
            elif kind == "repair" and not refused and not torch.equal(a.grad, a.detach().exp()):
                wrong.append(f"thread {number}: not repaired")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_three_dozen_threads(work)
    assert wrong == []
    assert before.differences() == []


def test_three_dozen_threads(found: Callable[[], Any]) -> None:
    """Guards come and go in each while the others save, write and read; each catches its own, and nothing hangs."""
    before = found()
    wrong: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(12):
            corrupting, raising = chance.random() < 0.5, chance.random() < 0.5
            a = leaf()
            spoke = False
            with Guard("raise" if raising else "record") as guard:
                y = a.exp()
                try:
                    (y if corrupting else y.clone()).data.mul_(2)
                    y.sum().backward()
                except SavedTensorCorruptionError:
                    spoke = True
            spoke = spoke or bool(guard.violations)
            if spoke != corrupting:
                wrong.append(f"thread {number}: spoke {spoke}, corrupting {corrupting}, raising {raising}")

    in_three_dozen_threads(work)
    assert wrong == []
    assert before.differences() == []


# ---- the soak ------------------------------------------------------------------------------------------------


def test_a_soak_of_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """``make soak`` takes an hour."""
    began = time.monotonic()
    assert soak.main(["--minutes", "1", "--seed", "1"]) == 0
    assert time.monotonic() - began > 55
    told = capsys.readouterr().out
    assert "0 wrong" in told
    assert "rounds" in told


def test_a_soak_notices_a_leak_and_a_broken_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    pack = torchguard.Guard.__enter__

    def leaking(guard: Guard) -> Guard:
        held.append(bytearray(1 << 20))
        return pack(guard)

    monkeypatch.setattr(Guard, "__enter__", leaking)
    assert soak.main(["--minutes", "0.1", "--seed", "1", "--grow", "8"]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(Guard, "respond", lambda *_: None)
    assert soak.main(["--minutes", "0.02", "--seed", "1"]) == 1
