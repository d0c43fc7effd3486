"""Do the guard's promises hold for programs that nobody wrote by hand?"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest
from generated.driven import Judge
from generated.kept import KEPT
from generated.maker import Chance, make_program
from generated.properties import ALL, MODES, Failure, failures, known
from generated.runs import Program, as_script, from_script
from generated.shrink import shrink
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_broken_guard import Mute

import torchguard

#: In so many tests of their own, of which the last WIDE make programs with transforms, compiled regions, ...
PARTS, WIDE = 10, 2

#: How many of others also run in the modes that speak when backward reads.
AT_READ, FIRST_AT_READ = 300, 500_000


@pytest.mark.parametrize("name", KEPT)
def test_what_was_once_wrong_is_right(name: str) -> None:
    assert failures(KEPT[name], ALL) == []


def test_what_was_kept_is_of_every_kind() -> None:
    kinds = {known(program).kind for program in KEPT.values()}
    assert kinds >= {"corrupting", "innocent", "refused"}


@pytest.mark.parametrize("part", range(PARTS))
def test_all_properties_hold(part: int) -> None:
    """300 programs each, the same every time; 6000 new ones each with ``--hypothesis-profile search``."""
    kinds: Counter[str] = Counter()
    programs: set[Program] = set()

    @settings(max_examples=3 * settings().max_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(chance=st.randoms(use_true_random=False))
    def holds(chance: Chance) -> None:
        judged = judge.judge(chance.randrange)
        kinds[judged.kind] += 1
        programs.add(judged.program)
        assert judged.failures == [], f"\n{judged.script}"

    with Judge(wide=part >= PARTS - WIDE) as judge:
        (seed(part)(holds) if settings().derandomize else holds)()
    each = sum(kinds.values())
    assert each >= 300
    assert len(programs) > 0.9 * each
    assert kinds["corrupting"] > each // 25
    assert kinds["crash of PyTorch"] < each // 50


def test_programs_by_seed() -> None:
    found = fuzz.search(seed=0, programs=25, minutes=8)
    assert found.scripts == []
    assert sum(found.kinds.values()) >= 24


def test_a_process_makes_the_same_programs_and_another_comes_when_it_ends() -> None:
    with Judge() as judge:

        def last_choice(_: int) -> int:
            assert judge._process is not None
            judge._process.kill()
            return 0

        judged = judge.judge(last_choice)
        assert (judged.kind, judged.failures, judged.program) == ("crash of PyTorch", [], ())
        for number in (3, 4):
            judged = judge.judge(random.Random(number).randrange)
            assert judged.program == make_program(random.Random(number))
            assert judged.kind == known(judged.program).kind


def test_hypothesis_makes_a_failing_program_simple() -> None:
    failing: list[Program] = []

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(chance=st.randoms(use_true_random=False))
    def holds(chance: Chance) -> None:
        program = make_program(chance, lines=2)
        if any("float64" in line for line in program):
            failing.append(program)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        seed(1)(holds)()
    text = "\n".join(failing[-1])
    assert text.count("float64") == 1
    assert text.count("grid(3, 4") == text.count(".sigmoid()") == 2  # the first of their tables


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_all_properties_hold_where_backward_speaks(wide: bool) -> None:
    found = fuzz.search(seed=FIRST_AT_READ, programs=AT_READ, minutes=8, modes="read", wide=wide)
    assert found.scripts == []
    assert found.kinds["corrupting"] > AT_READ // 25
    assert sum(found.kinds.values()) >= AT_READ * 0.95


def test_the_same_seed_makes_the_same_program() -> None:
    assert make_program(random.Random(3)) == make_program(random.Random(3))
    assert make_program(random.Random(8), wide=True) == make_program(random.Random(8), wide=True)


def test_wide_programs_have_all_that_others_have_not() -> None:
    text = "\n".join(line for number in range(60) for line in make_program(random.Random(number), wide=True))
    for word in ("transformed(", "region(", "keyed", "vmap(", "aot_eager", "use_reentrant=True"):
        assert word in text


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
    assert set(ALL) >= {"strict", "warn", "strict(every_call)", "warn(every_call)", "repair", "audit"}
    assert isinstance(MODES["warn"](), torchguard.Guard)
