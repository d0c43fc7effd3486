"""Would the catalogue notice a guard that is broken? One that never speaks, one that always does, one that changes results."""

from __future__ import annotations

import dataclasses
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
        if case.kind == kind and not case.allowed and not case.only_audit:
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
    assert fails(case, Mode("mute", Mute))
    assert fails(case, Mode("mute, warning", lambda: Mute("warn"), "warn"))


@pytest.mark.parametrize("case", [case for case in PROGRAMS if case.only_audit][::5], ids=str)
def test_an_audit_that_looks_at_no_bytes_fails_where_no_python_sees_the_write(case: Program) -> None:
    assert fails(case, Mode("blind", torchguard.strict, "audit"))
    assert fails(case, Mode("mute audit", lambda: Mute(depth="bytes"), "audit"))


class Forging(Guard):
    """Says that it repairs, and hands backward something else."""

    @property
    def repairs(self) -> bool:
        return True

    def heal(self, violation: Violation) -> bool:
        super().heal(violation)
        return False


@pytest.mark.parametrize("case", [case for case in sample("corrupting") if case.can_be_repaired], ids=str)
def test_a_repair_that_is_none_fails(case: Program) -> None:
    assert fails(case, Mode("mute repair", lambda: Mute(at="read", every_call=True), "repair"))
    assert fails(case, Mode("forging", lambda: Forging("repair", every_call=True), "repair"))
    assert fails(case, Mode("warning only", lambda: torchguard.warn(at="read", every_call=True), "repair"))


@pytest.mark.parametrize("case", sample("innocent"), ids=str)
def test_a_guard_that_always_speaks_fails_on_every_innocent_program(case: Program) -> None:
    assert fails(case, Mode("alarmist", Alarmist))


@pytest.mark.parametrize("case", [case for case in sample("corrupting") if case.caught == "write"], ids=str)
def test_a_guard_that_speaks_too_late_fails_where_memory_must_not_change(case: Program) -> None:
    assert fails(case, Mode("late", Late))


@pytest.mark.parametrize("case", sample("refused"), ids=str)
def test_a_guard_that_lets_pass_what_pytorch_refuses_fails(case: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save hooks alone do that: PyTorch's own check is off under them."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with hooks:
        outcome = harness.outcome_of(case, harness.Run(), harness.nullcontext)
    if outcome.error is not None or case.route == "swap_tensors":
        pytest.skip("refused for another reason than a save's version")
    monkeypatch.setattr("torchguard._reads._refuse", lambda save: None)
    assert fails(case, Mode("lax", torchguard.strict))


class Misplacing(Guard):
    """Raises in time, and names another line as the one that wrote, or as the one that saved."""

    what = "written"

    def respond(self, violation: Violation) -> None:
        place = getattr(violation, self.what)
        if place is not None:
            moved = dataclasses.replace(place, line=1)
            violation = dataclasses.replace(violation, **{self.what: moved})
        super().respond(violation)


class MisplacingTheSave(Misplacing):
    what = "saved"


class Miscounting(Guard):
    """Raises in time, and says of every write that one element more changes."""

    def respond(self, violation: Violation) -> None:
        super().respond(dataclasses.replace(violation, elements=violation.elements + 1))


@pytest.mark.parametrize("broken", [Misplacing, MisplacingTheSave, Miscounting])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in sample("corrupting")
        if case.caught == "write" and case.exact and case.hooks and case.route != "x.data = y"
    ],
    ids=str,
)
def test_a_guard_whose_report_is_wrong_fails(case: Program, broken: type[Guard]) -> None:
    assert fails(case, Mode(broken.__name__, broken))


class Meddling(Guard):
    """Hands backward something else than what was saved."""

    def __enter__(self) -> Guard:
        super().__enter__()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hooks.__exit__(kind, error, traceback)
        super().__exit__(kind, error, traceback)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if tensor.is_floating_point() else tensor


class Repairing(Meddling):
    """Keeps what was saved: the guarded program is right where the unguarded one is wrong, and the bug is hidden."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


OWN_HOOKS = "save hooks of the program"
RECOMPUTED = "checkpoint"  # what is wrong there was never saved


@pytest.mark.parametrize(
    "case",
    [case for case in sample("corrupting") if case.route not in ("another thread", OWN_HOOKS, RECOMPUTED)],
    ids=str,
)
def test_a_guard_that_hides_the_corruption_fails(case: Program) -> None:
    assert fails(case, Mode("repairing", lambda: Repairing("warn"), "warn"))


@pytest.mark.parametrize(
    "case", [case for case in sample("corrupting") if case.route == OWN_HOOKS and case.caught == "read"], ids=str
)
def test_a_guard_that_lets_pass_what_pytorch_does_not_check_fails(
    case: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchguard._hooked._is_changed", lambda *_: False)
    assert fails(case, Mode("lax under hooks", torchguard.strict))


def test_a_guard_that_knows_only_versions_under_hooks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchguard._hooked._is_changed", lambda *_: True)
    for name in ("hooks_inside_itself_tracked_times_one", "hooks_inside_key_tracked_times_one"):
        case = next(case for case in PROGRAMS if case.name == name)
        assert fails(case, Mode("versions only", torchguard.strict))


def test_a_guard_that_changes_results_fails() -> None:
    """On every innocent program whose gradients come out of a save; many, and of many routes."""
    found = []
    for case in sample("innocent"):
        with harness._quiet():
            guarded = harness.outcome_of(case, harness.Run(), Meddling)
        if guarded.error is None and not harness.same_bits(guarded.results, harness.plain_run(case).results):
            assert fails(case, Mode("meddling", Meddling)), case
            assert fails(case, Mode("meddling, warning", lambda: Meddling("warn"), "warn")), case
            found.append(case.route)
    assert len(set(found)) > 15


class Sticky(Guard):
    """Leaves a pair of save hooks behind."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        torch._C._autograd._push_saved_tensors_default_hooks(lambda tensor: tensor, lambda tensor: tensor)


def test_a_guard_that_leaves_its_hooks_fails() -> None:
    try:
        assert fails(sample("innocent")[0], Mode("sticky", Sticky))
    finally:
        torch._C._autograd._pop_saved_tensors_default_hooks()


# ---- a program with the wrong label -------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", ["corrupting", "innocent", "unread", "refused"])
@pytest.mark.parametrize("kind", ["corrupting", "innocent", "unread", "refused"])
def test_a_program_that_is_not_what_it_claims_fails(kind: str, claimed: Any) -> None:
    for case in sample(kind):
        if not case.hooks and {kind, claimed} == {"innocent", "unread"}:
            continue  # no recorder can be under it: only the results tell
        wrong = dataclasses.replace(case, kind=claimed)
        if claimed == kind:
            harness.check_kind(wrong)
        else:
            with pytest.raises(AssertionError):
                harness.check_kind(wrong)


def test_a_truth_that_misses_what_the_write_does_to_the_forward_fails() -> None:
    """The run without the write is the truth only where the write changes nothing but what backward reads."""
    case = next(case for case in PROGRAMS if case.name == "alias_written_before_the_save")
    assert case.truth == "cloned saves"
    with pytest.raises(AssertionError, match="cloned saves"):
        harness.check_kind(dataclasses.replace(case, truth="without the write"))
