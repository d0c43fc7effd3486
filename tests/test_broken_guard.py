"""Would the catalogue notice a guard that is broken? One that never speaks, one that always does, one that changes results."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import harness
import pytest
import torch
from catalogue import PROGRAMS
from harness import Mode, Program

import torchguard
from torchguard import Guard, SavedTensorCorruptionError, Violation


def sample(kind: str) -> list[Program]:
    """Of each route the first programs of a kind."""
    routes: dict[str, list[Program]] = {}
    for case in PROGRAMS:
        if case.kind == kind and not case.allowed:
            routes.setdefault(case.route, []).append(case)
    return [case for cases in routes.values() for case in cases[:3]]


class Mute(Guard):
    """Sees everything and says nothing."""

    def respond(self, violation: Violation) -> None:
        pass


class Alarmist(Guard):
    """Speaks at the end of every block, whatever happened."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is None:
            raise SavedTensorCorruptionError(SOME_VIOLATION)


class Late(Guard):
    """Raises like strict(), and only once the memory has changed."""

    def respond(self, violation: Violation) -> None:
        self.missed: Any = violation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is None and hasattr(self, "missed"):
            raise SavedTensorCorruptionError(self.missed)


SOME_VIOLATION = Violation(
    kind="write",
    operation="zero_()",
    saved=None,
    aliased=None,
    written=None,
    saved_by="",
    dtype="float32",
    shape=(1,),
    device="cpu",
    elements=1,
    of=1,
)


def fails(case: Program, mode: Mode) -> bool:
    try:
        harness.check_all_modes(case, [mode])
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("case", sample("corrupting"), ids=str)
def test_a_guard_that_never_speaks_fails_on_every_corrupting_program(case: Program) -> None:
    assert fails(case, Mode("mute", Mute, True, False))
    assert fails(case, Mode("mute, warning", lambda: Mute("warn"), False, False))


@pytest.mark.parametrize("case", sample("innocent"), ids=str)
def test_a_guard_that_always_speaks_fails_on_every_innocent_program(case: Program) -> None:
    assert fails(case, Mode("alarmist", Alarmist, True, False))


@pytest.mark.parametrize("case", [case for case in sample("corrupting") if case.caught == "write"], ids=str)
def test_a_guard_that_speaks_too_late_fails_where_memory_must_not_change(case: Program) -> None:
    assert fails(case, Mode("late", Late, True, False))


@pytest.mark.parametrize("case", sample("refused"), ids=str)
def test_a_guard_that_lets_pass_what_pytorch_refuses_fails(case: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save hooks alone do that: PyTorch's own check is off under them."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with hooks:
        outcome = harness.outcome_of(case, harness.Run(), harness.nullcontext)
    if outcome.error is not None:
        pytest.skip("refused for another reason than a save's version")
    monkeypatch.setattr("torchguard._reads._refuse", lambda save: None)
    assert fails(case, Mode("lax", torchguard.strict, True, False))
