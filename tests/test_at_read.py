"""at="read": does backward speak exactly where it reads bytes that are not those that were saved?"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning, Violation
from torchguard._saves import LEDGER

LARGE = 1 << 19  # elements of 4 bytes: more than what is copied of a save that somebody has an alias of


def leaf(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, n).requires_grad_()


def caught(run: Callable[[], Any], **keywords: Any) -> Violation:
    with pytest.raises(SavedTensorCorruptionError) as error, torchguard.strict(at="read", **keywords):
        run()
    return error.value.violation


# ---- what it says --------------------------------------------------------------------------------------------------


def test_the_report_has_all_three_places_of_the_write_and_says_by_how_much() -> None:
    def run() -> None:
        y = leaf().sigmoid()
        alias = y.data
        alias[1:].zero_()
        y.sum().backward()

    violation = caught(run)
    truth = torch.linspace(0.5, 1.5, 3).sigmoid()
    assert (violation.kind, violation.caught, violation.operation) == ("write", "read", "zero_()")
    assert (violation.elements, violation.of) == (2, 3)
    assert violation.largest_difference == pytest.approx(float(truth.max()))
    lines = str(violation).splitlines()
    assert lines[0] == "zero_() through .data has corrupted a tensor saved for backward"
    body = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "y = leaf().sigmoid()" in body["saved"]
    assert "alias = y.data" in body["aliased"]
    assert "alias[1:].zero_()     2 of 3 elements, by up to 0.818" in body["written"]
    assert "y.sum().backward()" in body["read"]
    assert "Backward is about to read the saved tensor." in str(violation)
    assert violation.to_dict()["largest_difference"] == violation.largest_difference


def test_a_rebound_tensor_is_compared_with_what_was_saved() -> None:
    def run() -> None:
        x = leaf()
        y = x * x
        x.data = torch.tensor([0.5, 1.0, 4.0])
        y.sum().backward()

    violation = caught(run)
    assert (violation.kind, violation.operation, violation.caught) == ("rebind", "x.data = y", "read")
    assert (violation.elements, violation.largest_difference) == (1, 2.5)
    assert violation.written is not None
    assert violation.written.source == "x.data = torch.tensor([0.5, 1.0, 4.0])"


@pytest.mark.parametrize(
    ("dtype", "value", "difference"),
    [
        (torch.float32, math.nan, math.nan),
        (torch.float32, math.inf, math.inf),
        (torch.complex64, 3 + 4j, 5.0),
        (torch.float16, 2.0, 2.0),
    ],
)
def test_the_largest_difference(dtype: torch.dtype, value: Any, difference: float) -> None:
    def run() -> None:
        x = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
        y = x * x
        x.data[0, 1] = value
        y.abs().sum().backward()

    violation = caught(run)
    assert violation.elements == 1
    assert violation.largest_difference == pytest.approx(difference, nan_ok=True)


def test_negative_zero_is_another_pattern_of_bits() -> None:
    def run() -> None:
        x = torch.zeros(2, requires_grad=True)
        y = torch.copysign(torch.ones(2), x) * x
        x.data.neg_()
        y.sum().backward()

    assert caught(run).largest_difference == 0.0


def test_who_wrote_first_since_the_bytes_were_right_is_told() -> None:
    def run() -> None:
        y = leaf().sigmoid()
        kept = y.detach().clone()
        alias = y.data
        alias.add_(1)
        alias.copy_(kept)  # right again
        alias.mul_(1)  # changes nothing
        alias.sub_(1)  # this one
        alias.zero_()
        y.sum().backward()

    violation = caught(run)
    assert violation.operation == "sub_()"
    assert violation.largest_difference == pytest.approx(0.818, abs=1e-3)  # what backward finds, whoever wrote last


def test_an_unseen_write_before_a_seen_one_is_not_taken_for_what_was_saved() -> None:
    def run() -> None:
        y = leaf(LARGE).sigmoid()
        alias = y.data
        torch.zeros(LARGE, out=alias)
        alias.zero_()
        y.sum().backward()

    assert caught(run).kind == "unseen"


# ---- what is innocent ----------------------------------------------------------------------------------------------


def perturbed_and_restored(x: torch.Tensor, y: torch.Tensor) -> None:
    kept = y.detach().clone()
    y.data.add_(1)
    y.data.copy_(kept)


@pytest.mark.parametrize("value", [torch.ones(4).double() * 3, torch.ones(2, 2), torch.ones(6)])
def test_what_was_saved_is_told_though_the_tensor_is_another_one_by_now(value: torch.Tensor) -> None:
    p, a = torch.nn.Parameter(torch.ones(4)), torch.ones(4, requires_grad=True)
    with torchguard.Guard("record", at="read") as guard:
        loss = (a * p).sum()
        p.data = value
        with contextlib.suppress(RuntimeError):
            loss.backward()
    (violation,) = guard.violations
    assert (violation.shape, violation.dtype, violation.of) == ((4,), "float32", 4)


def restored_by_rebinding(x: torch.Tensor, y: torch.Tensor) -> None:
    kept = x.data
    x.data = torch.sign(kept)
    x.data = kept


def rebound_to_equal_bytes(x: torch.Tensor, y: torch.Tensor) -> None:
    x.data.add_(0)
    x.data = x.data.clone()


def another_part_of_a_large_alias(x: torch.Tensor, y: torch.Tensor) -> None:
    buffer = torch.ones(2 * LARGE)
    z = leaf(LARGE) * buffer[:LARGE]
    torch.zeros(LARGE, out=buffer.data[LARGE:])
    z.sum().backward()


def nobody_reads_it(x: torch.Tensor, y: torch.Tensor) -> None:
    z = x.exp()
    z.data.zero_()


@pytest.mark.parametrize(
    "write",
    [
        perturbed_and_restored,
        restored_by_rebinding,
        rebound_to_equal_bytes,
        another_part_of_a_large_alias,
        nobody_reads_it,
    ],
)
def test_no_false_alarm(write: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    def gradient(guard: Any = None) -> torch.Tensor | None:
        x = leaf()
        y = x.sigmoid() * x
        if guard is not None:
            write(x, y)
        y.sum().backward()
        return x.grad

    with torchguard.strict(at="read") as guard:
        found = gradient(guard)
    truth = gradient()
    assert found is not None
    assert truth is not None
    assert torch.equal(found, truth)
    assert guard.violations == []


def test_a_large_alias_that_is_written_to_unseen_is_told() -> None:
    def run() -> None:
        buffer = torch.ones(2 * LARGE)
        z = leaf(LARGE) * buffer[:LARGE]
        torch.zeros(LARGE, out=buffer.data[:LARGE])
        z.sum().backward()

    assert caught(run).kind == "unseen"


# ---- who answers ---------------------------------------------------------------------------------------------------


def test_every_read_is_judged() -> None:
    with torchguard.strict(at="read"):
        x = leaf()
        y = x.sigmoid()
        y.sum().backward(retain_graph=True)
        y.data.zero_()
        for _ in range(2):
            with pytest.raises(SavedTensorCorruptionError):
                y.sum().backward(retain_graph=True)


def test_the_guard_that_saw_the_write_answers_wherever_it_is_read() -> None:
    with torchguard.Guard("record") as outer:
        with torchguard.Guard("record", at="read") as inner:
            x = leaf()
            y = x.sigmoid()
            y.data.zero_()
        assert inner.violations == []
        y.sum().backward()
    assert [violation.operation for violation in inner.violations] == ["zero_()"]
    assert outer.violations == []


def test_a_guard_within_that_judges_at_the_write_does_so() -> None:
    with torchguard.Guard("record", at="read") as outer, torchguard.strict():
        y = leaf().sigmoid()
        with pytest.raises(SavedTensorCorruptionError) as error:
            y.data.zero_()
    assert error.value.violation.caught == "write"
    assert outer.violations == []


def test_it_answers_after_it_was_left() -> None:
    with torchguard.strict(at="read") as guard:
        y = leaf().sigmoid()
        y.data.zero_()
    with pytest.raises(SavedTensorCorruptionError):
        y.sum().backward()
    assert [violation.operation for violation in guard.violations] == ["zero_()"]


def test_what_is_allowed_is_allowed_and_what_was_written_before_is_not() -> None:
    with torchguard.strict(at="read") as guard:
        y = leaf().sigmoid()
        with torchguard.allow("a test"):
            y.data.zero_()
        y.sum().backward()
    assert guard.violations == []
    assert [violation.allowed for violation in guard.allowed] == ["a test"]

    with torchguard.strict(at="read") as guard:
        y = leaf().sigmoid()
        y.data.zero_()
        with torchguard.allow("another test"):
            y.data.add_(1)
        with pytest.raises(SavedTensorCorruptionError) as error:
            y.sum().backward()
    assert error.value.violation.operation == "zero_()"


def test_allowed_rebinding() -> None:
    with torchguard.strict(at="read") as guard:
        x = leaf()
        y = x * x
        x.data.mul_(1)
        with torchguard.allow("a test"):
            x.data = torch.ones(3)
        y.sum().backward()
    assert guard.violations == []
    assert [violation.kind for violation in guard.allowed] == ["rebind"]


def test_a_suppressed_site_is_suppressed_by_the_line_that_writes() -> None:
    with torchguard.strict(at="read", suppressions=["test_at_read.py write -- a test"]) as guard:
        y = leaf().sigmoid()
        y.data.zero_()
        y.sum().backward()
    assert guard.violations == []
    assert len(guard.allowed) == 1


def test_warn_says_each_write_once() -> None:
    with warnings.catch_warnings(record=True) as said, torchguard.warn(at="read") as guard:
        warnings.simplefilter("always")
        y = leaf().sigmoid()
        y.data.zero_()
        y.sum().backward(retain_graph=True)
        y.sum().backward(retain_graph=True)  # answered
        y.data.add_(1)
        y.sum().backward()
    assert [violation.operation for violation in guard.violations] == ["zero_()", "add_()"]
    assert [note.category for note in said] == [SavedTensorCorruptionWarning] * 2


def test_only_what_is_written_to_is_copied_and_once() -> None:
    def proofs() -> list[int]:
        saves = [save for save in LEDGER.all_alive() if save.remarks is not None]
        return [id(save.remarks.proof) for save in saves if save.remarks.proof is not None]  # type: ignore[union-attr]

    with torchguard.strict(at="read"):
        before = proofs()
        x = leaf(LARGE)
        y, z = x.sigmoid(), x.exp()
        y.data.add_(1)
        (first,) = set(proofs()) - set(before)
        y.data.sub_(1)
        assert set(proofs()) - set(before) == {first}
        del y, z


def test_a_region_under_compile_is_told_in_backward() -> None:
    def region(x: torch.Tensor, write: bool) -> torch.Tensor:
        y = x.sigmoid()
        if write:
            y.data.mul_(2)
        return y * 1

    compiled = torch.compile(region, backend="aot_eager")
    with torchguard.strict(at="read"):
        compiled(leaf(), False).sum().backward()
        out = compiled(leaf(), True)
        with pytest.raises(SavedTensorCorruptionError) as error:
            out.sum().backward()
    assert error.value.violation.operation == "mul_()"
    torch._dynamo.reset()
