"""Do the commands under ``tools/`` say what is true?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import compare
import compat
from catalogue import PROGRAMS

NAMED = {case.name: case for case in PROGRAMS}


@pytest.mark.parametrize(
    ("tool", "program", "column"),
    [
        ("plain PyTorch", PROGRAMS[0].name, "missed"),
        ("torchguard.strict()", PROGRAMS[0].name, "caught"),
        ("allow_mutation_on_saved_tensors", "out_through_an_alias_that_is_gone", "repaired"),
        ("plain PyTorch", "out_into_a_tracked_alias", None),
        ("allow_mutation_on_saved_tensors", "out_into_a_tracked_alias", "refused, then right"),
        ("torchguard.repair()", "out_into_a_tracked_alias", "refused, then right"),
        ("torchguard.repair()", PROGRAMS[0].name, "repaired"),
        ('torchguard.strict(at="read")', PROGRAMS[0].name, "caught"),
        ("torchguard.watch()", PROGRAMS[0].name, "caught"),
        ("torchguard.audit()", PROGRAMS[0].name, "caught"),
        ("torchguard.strict()", "out_of_values_that_are_there", None),
    ],
)
def test_a_program_is_put_into_its_column(tool: str, program: str, column: str | None) -> None:
    case = NAMED[program]
    assert compare.verdict(case, compare.TOOLS[tool]) == column


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5 failed, 33 passed", {"failed": 5, "passed": 33}),
        ("121 passed, 1 skipped, 2 warnings", {"passed": 121, "skipped": 1, "warning": 2}),
        ("807 errors", {"error": 807}),
        ("Segmentation fault", {}),
    ],
)
def test_the_last_line_of_pytest_is_counted(line: str, expected: dict[str, int]) -> None:
    assert compat.counted(line) == expected
