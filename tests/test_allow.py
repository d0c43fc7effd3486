"""Does ``allow`` let through exactly what is in its block, and keep the reason with it?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchguard import Guard, SavedTensorCorruptionError, SavedTensorCorruptionWarning, allow, strict, warn


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


def corrupt() -> None:
    y = leaf().exp()
    y.data.zero_()


class Named(torch.Tensor): ...


@pytest.mark.parametrize("kind", [torch.Tensor, Named])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("corrupts", [True, False])
def test_memory_that_a_saved_tensor_is_allowed_to_point_at_is_watched(kind: Any, kept: bool, corrupts: bool) -> None:
    """Somebody has an alias of it from before, and writes by a call that nobody sees."""
    keeper = []

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x * x
        other = torch.ones(3)
        alias = other.data
        if kept:
            keeper.append(alias)
        with allow("the swap"):
            x.data = other.as_subclass(kind)
        if writes:
            torch.full((3,), 0.0 if corrupts else 1.0, out=alias)
        return x, out

    gradients = []
    for writes in (False, True):
        x, out = program(writes)
        out.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) != corrupts  # type: ignore[arg-type]
    with Guard("record") as guard:
        x, out = program(True)
        out.sum().backward()
    assert [violation.kind for violation in guard.violations] == ["unseen"] * corrupts
    assert torch.equal(x.grad, gradients[1])  # type: ignore[arg-type]


def test_a_block() -> None:
    with strict() as guard:
        y = leaf().exp()
        with allow("on purpose"):
            y.data.zero_()
        assert y.sum().item() == 0
    assert guard.violations == []
    [violation] = guard.allowed
    assert violation.allowed == "on purpose"
    assert violation.kind == "write"
    assert violation.operation == "zero_()"
    assert violation.written is not None
    assert violation.written.source == "y.data.zero_()"
    assert violation.to_dict()["allowed"] == "on purpose"


def test_only_the_block() -> None:
    with strict() as guard:
        with allow("on purpose"):
            corrupt()
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert [violation.allowed for violation in guard.allowed] == ["on purpose"]
    assert [violation.allowed for violation in guard.violations] == [None]


def test_also_after_an_exception_in_the_block() -> None:
    with strict():
        with pytest.raises(KeyError), allow("on purpose"):
            raise KeyError
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()


def test_the_innermost_reason_is_kept() -> None:
    with strict() as guard:
        with allow("outer"):
            with allow("inner"):
                corrupt()
            y = leaf().sigmoid()
            y.data.zero_()
    assert [violation.allowed for violation in guard.allowed] == ["inner", "outer"]


def test_one_block_twice_inside_itself() -> None:
    block = allow("twice")
    with strict() as guard:
        with block:
            with block:
                corrupt()
            corrupt()
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert [violation.times for violation in guard.allowed] == [2]


def test_one_site_for_two_reasons() -> None:
    with strict() as guard:
        for reason in ("first", "second", "first"):
            with allow(reason):
                corrupt()
    assert [(violation.allowed, violation.times) for violation in guard.allowed] == [
        ("first", 2),
        ("second", 1),
    ]


def test_a_decorated_function() -> None:
    @allow("decorated")
    def write() -> str:
        """It writes."""
        corrupt()
        return "done"

    assert (write.__name__, write.__doc__) == ("write", "It writes.")
    with strict() as guard:
        assert write() == "done"
        assert write() == "done"
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert [violation.allowed for violation in guard.allowed] == ["decorated"]
    assert guard.allowed[0].times == 2


def test_a_decorated_recursive_function() -> None:
    @allow("deep")
    def write(depth: int) -> None:
        if depth:
            write(depth - 1)
        corrupt()

    with strict() as guard:
        write(3)
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert guard.allowed[0].times == 4


def test_a_decorated_generator_allows_only_while_it_runs() -> None:
    @allow("generator")
    def steps() -> Iterator[int]:
        corrupt()
        yield 1
        corrupt()
        yield 2

    with strict() as guard:
        for _ in steps():
            with pytest.raises(SavedTensorCorruptionError):
                corrupt()
    assert [violation.allowed for violation in guard.allowed] == ["generator"] * len(guard.allowed)
    assert sum(violation.times for violation in guard.allowed) == 2


def test_a_decorated_coroutine() -> None:
    @allow("coroutine")
    async def work() -> None:
        corrupt()
        await asyncio.sleep(0)
        corrupt()

    with strict() as guard:
        asyncio.run(work())
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert sum(violation.times for violation in guard.allowed) == 2


def test_another_thread_is_not_allowed() -> None:
    answers: list[str] = []

    def work() -> None:
        try:
            corrupt()
            answers.append("silent")
        except SavedTensorCorruptionError:
            answers.append("caught")

    with strict():
        with allow("mine alone"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert answers == ["caught"]


@pytest.mark.parametrize("kind", ["rebind", "uncounted", "read"])
def test_every_kind_of_violation_can_be_allowed(kind: str) -> None:
    with strict() as guard:
        x = leaf()
        y = x.exp() * x
        with allow(kind):
            if kind == "rebind":
                x.data = torch.zeros(3)
            elif kind == "uncounted":
                x.detach().apply_(lambda value: value + 1)
            else:
                torch.zeros(3, out=x.data)
                y.sum().backward()
        if kind != "read":
            y.sum().backward()  # reported once, and that was allowed
    assert guard.violations == []
    assert {violation.allowed for violation in guard.allowed} == {kind}


def test_an_unseen_write_that_was_allowed_where_it_happened_is_no_violation_at_the_read() -> None:
    """``out=`` is seen at the read only; the reader did not write, the writer was allowed to."""
    with strict() as guard:
        x = leaf()
        y = x.exp()
        with allow("where it is written"):
            torch.zeros(3, out=y.data)
        y.sum().backward()
    assert guard.violations == []


def test_allow_without_a_guard_does_nothing() -> None:
    with allow("nobody asks"):
        corrupt()


def test_allow_around_a_guard() -> None:
    with allow("all of it"), strict() as guard:
        corrupt()
    assert len(guard.allowed) == 1


def test_a_guard_entered_within_allow_has_its_own_rule_outside() -> None:
    with allow("outer"):
        with warn() as guard:
            corrupt()
        assert guard.violations == []
    assert [violation.allowed for violation in guard.allowed] == ["outer"]


def test_the_innermost_guard_keeps_what_was_allowed() -> None:
    with Guard("record") as outer, Guard("record") as inner:
        with allow("why"):
            corrupt()
    assert len(inner.allowed) == 1
    assert outer.allowed == []


def test_the_reason_may_be_long_and_of_any_script() -> None:
    reason = "ważne: 重みは戻す\n" * 20
    with strict() as guard:
        with allow(reason):
            corrupt()
    assert guard.allowed[0].allowed == reason


def test_blocks_left_out_of_order() -> None:
    first: Any = allow("first")
    second: Any = allow("second")
    with strict() as guard:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        corrupt()
        second.__exit__(None, None, None)
        with pytest.raises(SavedTensorCorruptionError):
            corrupt()
    assert [violation.allowed for violation in guard.allowed] == ["second"]


def _saved_and_allowed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A leaf, an output that is saved, and an alias of it through which an allowed write has gone."""
    x = leaf()
    y = x.exp()
    alias = y.data
    with allow("on purpose"):
        alias.zero_()
    return x, y, alias


@pytest.mark.parametrize("every_call", [False, True])
def test_an_unseen_write_after_an_allowed_one_is_not_allowed(every_call: bool) -> None:
    with strict(every_call=every_call) as guard:
        _, y, alias = _saved_and_allowed()
        with pytest.raises(SavedTensorCorruptionError):
            torch.add(alias, 1, out=alias)
            y.sum().backward()
    assert len(guard.violations) == 1


def test_a_seen_write_after_an_allowed_one_is_not_allowed() -> None:
    with strict():
        _, _, alias = _saved_and_allowed()
        with pytest.raises(SavedTensorCorruptionError):
            alias.add_(1)


def test_nothing_after_an_allowed_write_is_no_violation() -> None:
    with strict() as guard:
        x, y, _ = _saved_and_allowed()
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 0, 0]
    assert guard.violations == []


def test_an_unseen_write_after_one_that_was_warned_of_is_another_finding() -> None:
    with warn() as guard, pytest.warns(SavedTensorCorruptionWarning) as caught:
        y = leaf().exp()
        alias = y.data
        alias.zero_()
        torch.add(alias, 1, out=alias)
        y.sum().backward()
    assert [violation.kind for violation in guard.violations] == ["write", "unseen"]
    assert len(caught) == 2


def test_every_backward_over_a_corrupted_save_is_stopped() -> None:
    with strict():
        y = leaf().exp()
        alias = y.data
        torch.add(alias, 1, out=alias)
        for _ in range(2):
            with pytest.raises(SavedTensorCorruptionError):
                y.sum().backward(retain_graph=True)
