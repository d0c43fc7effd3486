"""Is a judgement that no other test would miss still made? Each test here was asked for by a mutant that survived."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning

Write = Callable[[torch.Tensor], object]


def gradient(
    write: Write, forward: AbstractContextManager[object], backward: AbstractContextManager[object]
) -> torch.Tensor:
    """Forward and a write in one context, backward in another."""
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with forward:
        out = a.sigmoid()
        write(out)
    with backward:
        out.sum().backward()
    assert a.grad is not None
    return a.grad


def cloning() -> AbstractContextManager[object]:
    return saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor)


def into_its_array(out: torch.Tensor) -> None:
    out.detach().numpy()[:] = 0


def read_its_array(out: torch.Tensor) -> None:
    out.detach().numpy().sum()


def nothing() -> AbstractContextManager[object]:
    return warnings.catch_warnings()


# ---- which guard answers ------------------------------------------------------------------------------------------


def test_a_guard_that_was_left_repairs_what_was_saved_under_it() -> None:
    truth = gradient(into_its_array, cloning(), nothing())
    guard = torchguard.repair()
    with pytest.warns(SavedTensorCorruptionWarning, match="backward is given what was saved"):
        found = gradient(into_its_array, guard, nothing())
    assert torch.equal(found, truth)
    assert not torch.equal(found, gradient(into_its_array, nothing(), nothing()))
    (told,) = guard.violations
    assert told.repaired is True
    assert told.saved_by == "sigmoid"
    assert told.read is not None
    assert told.read.source == "out.sum().backward()"
    assert told.largest_difference == pytest.approx(torch.tensor(3.0).sigmoid().item())

    guard = torchguard.repair()
    assert torch.equal(gradient(read_its_array, guard, nothing()), truth)
    assert guard.violations == []


def test_a_guard_that_was_left_refuses_what_was_saved_under_it() -> None:
    guard = torchguard.strict()
    with pytest.raises(SavedTensorCorruptionError, match="from outside torch"):
        gradient(into_its_array, guard, nothing())
    assert [one.caught for one in guard.violations] == ["read"]
    guard = torchguard.strict()
    gradient(read_its_array, guard, nothing())
    assert guard.violations == []


def test_the_guard_that_is_on_answers_and_not_the_one_that_was_left() -> None:
    left, on = torchguard.strict(), torchguard.Guard(action="record")
    gradient(into_its_array, left, on)
    assert left.violations == []
    assert [one.kind for one in on.violations] == ["exported"]


def test_backward_in_an_allow_block_is_given_what_is_there() -> None:
    """A repair would be another result than that of the program that is allowed."""
    plain = gradient(into_its_array, nothing(), nothing())
    guard = torchguard.repair()
    assert torch.equal(gradient(into_its_array, guard, torchguard.allow("zeroed on purpose")), plain)
    assert guard.violations == []


def test_what_is_suppressed_is_not_repaired() -> None:
    plain = gradient(into_its_array, nothing(), nothing())
    guard = torchguard.repair(suppressions=["test_mutants_judging.py -- zeroed on purpose"])
    assert torch.equal(gradient(into_its_array, guard, nothing()), plain)
    assert guard.violations == []
    assert [one.allowed for one in guard.allowed] == ["zeroed on purpose (suppressed by suppressions:1)"]


def test_at_the_write_nothing_has_changed_yet() -> None:
    """Though a copy of the save is at hand, since an array was made of it."""

    def write(out: torch.Tensor) -> None:
        out.detach().numpy()
        out.data.zero_()

    guard = torchguard.strict()
    with pytest.raises(SavedTensorCorruptionError):
        gradient(write, guard, nothing())
    (told,) = guard.violations
    assert (told.caught, told.elements, told.largest_difference) == ("write", 3, None)


def test_a_repair_tells_all_that_a_refusal_tells() -> None:
    def write(out: torch.Tensor) -> None:
        alias = out.data
        alias[:2].zero_()

    repairing = torchguard.repair()
    with pytest.warns(SavedTensorCorruptionWarning):
        gradient(write, repairing, nothing())
    refusing = torchguard.strict(at="read")
    with pytest.raises(SavedTensorCorruptionError):
        gradient(write, refusing, nothing())
    (repaired,), (refused,) = repairing.violations, refusing.violations
    assert repaired.repaired
    assert not refused.repaired
    for name in ("kind", "operation", "saved", "aliased", "written", "read", "elements", "of", "caught", "saved_by"):
        assert getattr(repaired, name) == getattr(refused, name), name
    assert (repaired.elements, repaired.caught, repaired.operation) == (2, "read", "zero_()")
    assert repaired.aliased is not None
    assert repaired.aliased.source == "alias = out.data"
    assert repaired.written is not None
    assert repaired.written.source == "alias[:2].zero_()"
