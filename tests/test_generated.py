"""Do the guard's promises hold for programs that nobody wrote by hand?"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from generated.kept import KEPT
from generated.maker import make_program
from generated.properties import MODES, Failure, failures, known
from generated.runs import Program, as_script, from_script
from generated.shrink import shrink
from test_broken_guard import Mute

import torchguard

#: How many programs are made, in so many processes one after the other.
PROGRAMS, PARTS = 2400, 8


@pytest.mark.parametrize("name", KEPT)
def test_what_was_once_wrong_is_right(name: str) -> None:
    assert failures(KEPT[name]) == []


def test_what_was_kept_is_of_every_kind() -> None:
    kinds = {known(program).kind for program in KEPT.values()}
    assert kinds == {"corrupting", "innocent", "refused"}


@pytest.mark.parametrize("part", range(PARTS))
def test_all_properties_hold(part: int) -> None:
    """In a process of their own: some programs crash PyTorch itself."""
    each = PROGRAMS // PARTS
    found = fuzz.search(seed=part * each, programs=each, minutes=8)
    assert found.scripts == []
    assert found.kinds["corrupting"] > each // 25
    assert sum(found.kinds.values()) >= each * 0.95


def test_the_same_seed_makes_the_same_program() -> None:
    assert make_program(random.Random(3)) == make_program(random.Random(3))


def corrupting() -> Program:
    return next(
        program
        for program in (make_program(random.Random(seed)) for seed in range(1000))
        if known(program).kind == "corrupting"
    )


def test_a_guard_that_says_nothing_fails() -> None:
    found = failures(corrupting(), {"mute": lambda: Mute("raise")})
    assert "missed" in {failure.kind for failure in found}


def test_a_failing_program_is_cut_down_and_runs_as_a_script(tmp_path: Path) -> None:
    program = corrupting()

    def fails(shorter: Program) -> bool:
        return any(failure.kind == "missed" for failure in failures(shorter, {"mute": lambda: Mute("record")}))

    small = shrink(program, fails)
    assert fails(small)
    assert len(small) < len(program)
    script = tmp_path / "failing.py"
    script.write_text(as_script(small, "a note"))
    assert from_script(script.read_text()) == small
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert "SavedTensorCorruptionError" in ran.stderr


def test_a_failure_says_what_and_where() -> None:
    assert str(Failure("missed", "strict", "a1.grad")) == "missed under strict: a1.grad"
    assert set(MODES) >= {"strict", "warn", "strict(every_call)", "warn(every_call)"}
    assert isinstance(MODES["warn"](), torchguard.Guard)
